"""What a laptop does with a cluster's jobs. The dashboard is played by the test."""

from __future__ import annotations

import time
from typing import Any, cast

import pytest

from tune_service import __version__
from tune_service.dashboard import Dashboard, Job
from tune_service.errors import CommandError, StudyRunningError
from tune_service.frames import encode
from tune_service.remote import QUESTION, SETTLED_S, STUDY, RemoteStudies


class Jobs:
    """A list of jobs that can be deleted and stopped."""

    address = "here"

    def __init__(self, *jobs: Job) -> None:
        self._jobs = list(jobs)
        self.deleted: list[str] = []

    def jobs(self) -> list[Job]:
        return self._jobs

    def delete(self, job: str) -> None:
        self.deleted.append(job)


def job(name: str, kind: str, ended_s: float | None) -> Job:
    metadata = {kind: "of mrpc"}
    return Job(name, "SUCCEEDED" if ended_s else "RUNNING", "", metadata, "node", started_s=1000.0, ended_s=ended_s)


def studies(jobs: Jobs) -> Any:
    return RemoteStudies(cast(Dashboard, jobs), None)


def test_old_questions_are_deleted_and_no_study_and_nothing_that_may_still_be_read() -> None:
    old, new = 1000.0 - SETTLED_S - 1, 1000.0 - SETTLED_S + 1
    jobs = Jobs(
        job("now", QUESTION, None),
        job("old", QUESTION, old),
        job("new", QUESTION, new),
        job("study", STUDY, old),
    )
    studies(jobs)._tidy("now")
    assert jobs.deleted == ["old"]


def test_a_studys_next_job_has_the_next_number() -> None:
    jobs = Jobs(
        Job("a-1", "FAILED", "", {STUDY: "a"}, None, 1.0, 2.0), Job("b-7", "FAILED", "", {STUDY: "b"}, None, 1.0, 2.0)
    )
    assert studies(jobs)._next_job("a", StudyRunningError, "") == "a-2"
    assert studies(jobs)._next_job("c", StudyRunningError, "") == "c-1"


def test_a_study_with_a_living_job_is_not_resumed_and_the_way_on_is_said() -> None:
    waiting = Job("a-1", "PENDING", "", {STUDY: "a"}, None, 1.0, None)
    with pytest.raises(StudyRunningError) as refusal:
        studies(Jobs(waiting)).resume("a", None, cast(Any, None))
    (problem,) = refusal.value.problems
    assert (problem.found, problem.expected) == (
        "job a-1 is pending",
        "`tune-service watch a` to follow it, or `tune-service stop a` first",
    )


class Log(Jobs):
    """A job's log that grows by what a test says, and counts what is fetched of it."""

    def __init__(self, *parts: str) -> None:
        super().__init__()
        self._parts, self._text = list(parts), ""
        self.fetched: list[int] = []

    def patiently(self, ask: Any) -> Any:
        return ask()

    def job(self, name: str) -> Job:
        self._text += self._parts.pop(0) if self._parts else ""
        return Job(name, "RUNNING" if self._parts else "SUCCEEDED", "", {}, "node", 1.0, None)

    def log(self, name: str) -> str:
        self.fetched.append(len(self._text))
        return self._text

    def tail(self, job: Job, lines: int) -> str:
        found = "".join(self._text.splitlines(keepends=True)[-lines:])
        self.fetched.append(len(found))
        return found


def test_a_long_answer_is_fetched_once_and_then_only_what_is_new(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tune_service.remote.POLL_S", 0.0)
    long, short = (
        encode("w", 1, {"trials": "x" * 100_000}),
        [encode("w", number, {"n": number}) for number in (2, 3, 4)],
    )
    log = Log("", long, "", "", short[0], "noise\n", short[1] + short[2], encode("w", 5, {"end": True}))
    answers = list(studies(log)._answers({"word": "w", "what": "views", "version": ""}, "question-1"))
    assert [answer.get("n") for answer in answers] == [None, 2, 3, 4]
    # Once, and where another's line stands last.
    assert sum(size > 100_000 for size in log.fetched) == 2
    assert sum(size for size in log.fetched if size < 100_000) < 1_000


LOGS = {"word": "w", "what": "logs", "version": ""}


def signs_of_life(first: int, count: int) -> list[str]:
    return [encode("w", number, {"alive": True}) for number in range(first, first + count)]


def test_a_head_that_shows_no_sign_of_life_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is frozen: its job still runs, as Ray sees it."""
    monkeypatch.setattr("tune_service.remote.POLL_S", 0.01)
    monkeypatch.setattr("tune_service.remote.QUIET_S", 0.3)
    log = Log(*signs_of_life(1, 1), *[""] * 10_000)
    began = time.monotonic()
    with pytest.raises(CommandError) as refusal:
        list(studies(log)._answers({"word": "w", "what": "status", "version": ""}, "question-1"))
    assert refusal.value.problems[0].found == "job question-1 has shown no sign of life for 0 s"
    assert time.monotonic() - began < 5


def test_a_long_answer_is_waited_for_as_long_as_there_are_signs_of_life(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tune_service.remote.POLL_S", 0.02)
    monkeypatch.setattr("tune_service.remote.QUIET_S", 0.5)
    log = Log(*signs_of_life(1, 40), encode("w", 41, {"n": 1}), encode("w", 42, {"end": True}))
    began = time.monotonic()
    (answer,) = studies(log)._answers({"word": "w", "what": "best", "version": ""}, "question-1")
    assert answer["n"] == 1 and time.monotonic() - began > 0.5


def test_a_head_is_not_silent_for_the_time_that_somebody_takes_to_read_its_answers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tune_service.remote.POLL_S", 0.0)
    monkeypatch.setattr("tune_service.remote.QUIET_S", 0.2)
    first, last = encode("w", 2, {"n": 1}), encode("w", 3, {"n": 2}) + encode("w", 4, {"end": True})
    read = []
    for answer in studies(Log(*signs_of_life(1, 1), first, "", last))._answers(LOGS, "question-1"):
        read.append(answer["n"])
        time.sleep(0.4)
    assert read == [1, 2]


def test_a_head_of_an_older_version_shows_no_signs_of_life_and_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tune_service.remote.POLL_S", 0.01)
    monkeypatch.setattr("tune_service.remote.QUIET_S", 0.1)
    first, last = encode("w", 1, {"version": __version__}), encode("w", 2, {"n": 1}) + encode("w", 3, {"end": True})
    (answer,) = studies(Log(first, *[""] * 20, last))._answers(LOGS, "question-1")
    assert answer["n"] == 1
