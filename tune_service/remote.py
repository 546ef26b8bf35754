"""The studies of a cluster, asked from a laptop that holds nothing but the token. `head.py` is the other side.

A question is a short Ray job that runs `head.py` on the head; a study is a long one. Whatever happens to the
connection, a study does not notice.
"""

from __future__ import annotations

import json
import secrets
import shlex
import sys
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from typing import Any

from trainables.errors import Problem, UserError
from trainables.log_names import trial_of
from tune_service import __version__
from tune_service.dashboard import Dashboard, DashboardError, Job
from tune_service.errors import CommandError, RemoteError, StudyExistsError, StudyRunningError
from tune_service.frames import decode, newest
from tune_service.handover import fetch
from tune_service.out_folder import check_out
from tune_service.status import BestTrial, Display, StudyStatus, StudyView
from tune_service.studies import LogPiece, StudyRow, is_in
from tune_service.views import FarStudy, status_of

QUESTION = "question"
STUDY = "study"
POLL_S = 0.1
LINES = 3
"""Of a log for each answer."""
OTHER_LINES = (0, 100)
"""That something else may have printed in between."""
SETTLED_S = 300.0
"""A question that ended so long ago is deleted. Whoever asked it may be without a connection for a time."""
QUIET_S = 120.0
"""A head that answers a question shows a sign of life more often than this."""
QUEUE_S = 120.0
"""How long `submit` waits for the word that the study has begun. A busy head may take longer; the job stays."""


class RemoteStudies:
    """Those of a cluster's storage: `storage` is a folder on the head, None the cluster's own choice."""

    def __init__(self, dashboard: Dashboard, storage: str | None) -> None:
        self._dashboard = dashboard
        self._storage = storage

    @property
    def address(self) -> str:
        """As the user wrote it."""
        return self._dashboard.address

    @property
    def host(self) -> str | None:
        """The head's address as this machine knows it."""
        return self._dashboard.host

    def refuses_strangers(self) -> bool:
        """Whether the dashboard asks for the token."""
        return self._dashboard.refuses_strangers()

    # Questions

    def list(self) -> Iterator[StudyRow]:
        for document in self._ask("list"):
            row = document["row"]
            best = BestTrial.model_validate(row["best"]) if row["best"] else None
            yield StudyRow(row["study"], row["state"], row["trials"], best, document["metric"])

    def status(self, name: str) -> StudyStatus:
        return status_of(self._one("status", study=name))

    def views(self, name: str) -> Iterator[StudyView]:
        more, study = True, FarStudy()
        while more:
            more = False
            for document in self._ask("views", study=name, known=study.known()):
                more = document.get("more", more)
                if "status" in document:
                    yield study.take(document)

    def logs(self, name: str, trial: int | None) -> Iterator[LogPiece]:
        more, since, done = True, dict[str, int](), list[list[int]]()
        while more:
            more = False
            since = {file: end for file, end in since.items() if not is_in(done, trial_of(file))}
            for document in self._ask("logs", study=name, trial=trial, since=since, done=done):
                if "piece" in document:
                    raw = document["piece"]
                    since[raw["file"]] = raw["end"]
                    yield LogPiece(raw["file"], tuple(raw["lines"]), raw["end"])
                else:
                    more, done = document["more"], document["done"]

    def stop(self, name: str, now: bool) -> StudyStatus:
        try:
            for _ in self._ask("stop", study=name, now=now):
                pass
            for _ in self.views(name):
                pass
        except RemoteError:  # perhaps no study yet: its job only waits
            if not self._living(name):
                raise
        for job in self._living(name):  # no driver has heard of the request: this one has not begun
            self._dashboard.stop(job.id)
        return self.status(name)

    def where(self, name: str) -> str:
        return f"{self._one('where', study=name)['where']} on {self._dashboard.address}"

    def delete(self, name: str) -> int:
        return int(self._one("delete", study=name)["bytes"])

    def best(self, name: str, out: Path) -> BestTrial:
        check_out(out)
        with closing(self._ask("best", study=name)) as answers:  # its end removes what lay there to be fetched
            for document in answers:
                fetch(self._dashboard, document["node_id"], document, out)
                return BestTrial.model_validate(document["best"])
        raise self._silent("best", "no answer")

    def checkup(
        self, name: str, package: Path, start_nodes: bool, versions: Mapping[str, str]
    ) -> Generator[Any, None, None]:
        """What the cluster's doctor says of a study that would come with this package, piece by piece."""
        uri = self._dashboard.upload(package)
        return self._ask("check", uri, study=name, start_nodes=start_nodes, versions=versions)

    # Studies

    def submit(self, name: str, spec_text: str, package: Path, patience_s: float | None = QUEUE_S) -> str:
        """Hands a new study over. Returns its job once the study has begun, or after `patience_s` (None: never)."""
        job = self._next_job(name, StudyExistsError, f"another name (--name), or `tune-service stop {name}` first")
        uri = self._dashboard.upload(package)
        self._start(name, job, "run", {"spec": spec_text}, uri, patience_s)
        return job

    def resume(self, name: str, trials: str | None, display: Display) -> StudyStatus:
        """Starts a new job for the study and follows it to its end."""
        expected = f"`tune-service watch {name}` to follow it, or `tune-service stop {name}` first"
        job = self._next_job(name, StudyRunningError, expected)
        self._start(name, job, "resume", {}, None, None, trials=trials)
        display.tell(f"study {name} goes on as job {job}; it does not need this command")
        return self.follow(name, display)

    def follow(self, name: str, display: Display) -> StudyStatus:
        """Shows a study until it ends."""
        for view in self.views(name):
            display.show(view)
        return self.status(name)

    def _next_job(self, name: str, error: type[UserError], expected: str) -> str:
        """An id for the study's next job. Raises `error` while it has a living one, even one that only waits."""
        jobs = self._jobs(name)
        for job in self._living(name):
            rule = "a study is driven by one job"
            found = f"job {job.id} is {job.status.lower()}"
            raise error(Problem("name", rule, found, expected))
        numbers = [int(job.id.rpartition("-")[2]) for job in jobs if job.id.rpartition("-")[2].isdecimal()]
        return f"{name}-{max(numbers, default=0) + 1}"

    def _jobs(self, name: str) -> Sequence[Job]:
        return [job for job in self._dashboard.jobs() if job.metadata.get(STUDY) == name]

    def _living(self, name: str) -> Sequence[Job]:
        """The study's jobs without an end, those that only wait too."""
        return [job for job in self._jobs(name) if not job.has_ended]

    def _start(
        self,
        name: str,
        job: str,
        what: str,
        metadata: Mapping[str, str],
        package: str | None,
        patience_s: float | None,
        **arguments: Any,
    ) -> None:
        request = self._request(what, study=name, **arguments)
        try:
            self._dashboard.submit(job, _entrypoint(request), {STUDY: name, "job_name": name, **metadata}, package)
        except DashboardError as error:
            if self._dashboard.job(job) is None:
                raise
            found = f"job {job} was handed in at the same moment"  # its id is the lock: Ray takes it once
            expected = f"another name (--name), or `tune-service watch {name}`"
            raise StudyExistsError(Problem("name", "a study is driven by one job", found, expected)) from error
        for document in self._answers(request, job, patience_s):
            if "begun" in document:
                return

    # How a question is asked

    def _one(self, what: str, **arguments: Any) -> Any:
        for document in self._ask(what, **arguments):
            return document
        raise self._silent(what, "no answer")

    def _ask(self, what: str, package: str | None = None, **arguments: Any) -> Generator[Any, None, None]:
        """The documents that answer a question. Raises what the head says is wrong."""
        request = self._request(what, **arguments, signs=True)
        job = f"{QUESTION}-{what}-{request['word']}"
        title = f"{what} {arguments.get('study', '')}".strip()
        metadata = {QUESTION: title, "job_name": title}
        is_answered = False
        try:
            self._dashboard.submit(job, _entrypoint(request), metadata, package)
            yield from self._answers(request, job)
            is_answered = True
        finally:
            with suppress(CommandError):
                if not is_answered:
                    self._dashboard.stop(job)  # nobody waits for the rest
                self._tidy(job)

    def _request(self, what: str, **arguments: Any) -> dict[str, Any]:
        own = {"storage": self._storage, "version": __version__, "word": secrets.token_hex(8)}
        return {"what": what, **arguments, **own}  # in the order in which people read it in a list of jobs

    def _answers(self, request: Mapping[str, Any], job: str, patience_s: float | None = None) -> Iterator[Any]:
        """What the head answers, as it comes, until its end; with patience, no longer than that."""
        dashboard, word = self._dashboard, request["word"]
        began, number = time.monotonic(), 0
        heard: float | None = None
        """When the head last showed that it lives; one of an older version does not."""
        while True:
            asked = time.monotonic()
            # Before the log, which is whole then if the job has ended.
            found = dashboard.patiently(lambda: dashboard.job(job))
            log = dashboard.patiently(partial(self._news, found, word, number)) if found else ""
            took_s = time.monotonic() - asked
            documents, number = decode(word, log, number)
            for document in documents:
                if "alive" in document:
                    heard = time.monotonic()
                elif "version" in document:
                    self._compare(document["version"])
                elif "failure" in document:
                    raise RemoteError(document["failure"], document["code"])
                elif "end" in document:
                    return
                else:
                    yield document | {"node_id": found and found.node_id}
            if found is None or found.has_ended:
                raise self._silent(request["what"], _why(found, dashboard.log(job) if found else ""))
            if documents and heard is not None:
                heard = time.monotonic()  # whoever was given them may have taken long over them
            if heard is not None and time.monotonic() - heard > QUIET_S:
                raise self._silent(request["what"], f"job {job} has shown no sign of life for {QUIET_S:.0f} s")
            if patience_s is not None and time.monotonic() - began > patience_s:
                return
            time.sleep(max(POLL_S, 2 * took_s))  # a long log is not fetched all the time

    def _news(self, job: Job, word: str, number: int) -> str:
        """The end of the job's log that has the answers after the one of this number; where that cannot be told, all.

        A follower's first answer can be a megabyte, and is not fetched with every look.
        """
        if job.status == "PENDING":
            return ""
        if number and job.node_id is not None:
            last = newest(word, self._dashboard.tail(job, 1))
            if last == number:
                return ""
            if last is not None:
                for others in OTHER_LINES:
                    tail = self._dashboard.tail(job, LINES * (last - number) + others)
                    if decode(word, tail, number)[1] >= last:
                        return tail
        return self._dashboard.log(job.id)

    def _compare(self, version: str) -> None:
        if version != __version__:
            print(f"this is tune-service {__version__}, the cluster has {version}", file=sys.stderr)

    def _tidy(self, job: str) -> None:
        """Takes old questions off the list of jobs.

        Not this one: Ray puts a job back as FAILED that is deleted in the seconds before its own monitor has seen the
        job's end.
        """
        jobs = self._dashboard.jobs()
        now_s = next((each.started_s for each in jobs if each.id == job), 0.0)
        for each in jobs:
            if QUESTION in each.metadata and each.ended_s is not None and each.ended_s < now_s - SETTLED_S:
                self._dashboard.delete(each.id)

    def _silent(self, what: str, why: str) -> CommandError:
        rule = f"the head of {self._dashboard.address} answers `{what}`"
        expected = "tune-service of this version installed on the head, beside its Ray"
        return CommandError(Problem("--address", rule, why, expected))


def _entrypoint(request: Mapping[str, Any]) -> str:
    # -P: what lies in the folder where a question runs must not take a library's place. A study's own package comes
    # first on the path all the same, as Ray has it for every job.
    return f"python -P -m tune_service.head {shlex.quote(json.dumps(request))}"


def _why(job: Job | None, log: str) -> str:
    if job is None:
        return "the cluster has forgotten the job: its head was started anew"
    lines = [line for line in (log or job.message).splitlines() if line.strip()]
    return f"job {job.id} {job.status.lower()}: {lines[-1] if lines else 'it printed nothing'}"
