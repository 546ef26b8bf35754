"""What a laptop does with a cluster's jobs. The dashboard is played by the test."""

from __future__ import annotations

from typing import Any, cast

from tune_service.dashboard import Dashboard, Job
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
    assert studies(jobs)._next_job("a", ValueError) == "a-2"
    assert studies(jobs)._next_job("c", ValueError) == "c-1"
