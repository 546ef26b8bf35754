"""The ranks of one trial as one thing, with a deadline on every wait."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, GetTimeoutError, RayActorError, RayError, RayTaskError
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from trainables.errors import (
    OutOfMemoryError,
    RankNotStartedError,
    StepDeadlineError,
    StorageUnavailableError,
    TrialError,
    WorkerLostError,
)
from trainables.far_ranks import FarRanks, add_to_log
from trainables.memory import num_oom_kills, tells_of_memory
from trainables.rank_actor import RankActor
from trainables.redaction import redacted
from trainables.worker import FIRST_DEADLINE_S, RankReport, RankWorker, Task, log_tail, storage_is_away

STEP_DEADLINE_MIN_S = 60.0
STEP_DEADLINE_FACTOR = 5.0
ECHO_S = 1.0
"""How long after the complaint of one rank the death of another, of which it was the echo, may come to light."""
LAST_WORDS_S = 5.0
"""How long a rank that failed may take to hand over the end of its log, and one that is done to leave its trial."""


@dataclass
class StepDeadline:
    """How long the group may take to its next report."""

    fixed_s: float | None
    """`faults.step_timeout_s` of the spec; None: from the slowest epoch so far."""
    start_s: float
    """`faults.start_timeout_s`: how long its ranks may take to get ready, which is process start and imports."""
    slowest_s: float | None = None
    """The slowest epoch that this group has run; None: none yet."""
    slowest_save_s: float | None = None
    """The same of its checkpoints."""

    @property
    def seconds(self) -> float:
        if self.fixed_s is not None:
            return self.fixed_s
        if self.slowest_s is None:
            return max(FIRST_DEADLINE_S, self.start_s)
        return max(STEP_DEADLINE_MIN_S, STEP_DEADLINE_FACTOR * self.slowest_s)

    @property
    def save_seconds(self) -> float:
        """How long a checkpoint may take, until it is whole."""
        if self.fixed_s is not None:
            return self.fixed_s
        if self.slowest_save_s is None:
            return max(FIRST_DEADLINE_S, self.start_s)
        return max(STEP_DEADLINE_MIN_S, STEP_DEADLINE_FACTOR * self.slowest_save_s)

    def saw(self, epoch_s: float) -> None:
        self.slowest_s = max(self.slowest_s or 0.0, epoch_s)

    def saved(self, save_s: float) -> None:
        self.slowest_save_s = max(self.slowest_save_s or 0.0, save_s)


@dataclass(frozen=True)
class _Asked:
    """What ranks were asked together, and when."""

    at: float
    rank_of: dict[Any, int]
    """Ray's reference of each answer -> its rank."""


class WorkerGroup(ABC):
    """Runs one trial after the other. After a TrialError only `shutdown` may be called."""

    @abstractmethod
    def begin(self, task: Task) -> None:
        """Leaves the trial before, gets every rank ready for this one."""

    @abstractmethod
    def go_on(self) -> None:
        """Sends every rank on its way to the next report, which `next_report` waits for. It need not be called."""

    @abstractmethod
    def next_report(self) -> RankReport | None:
        """Rank 0's next report, when every rank has reached it; None at the trainable's end."""

    @abstractmethod
    def save(self, folder: Path, model_alone: bool = False) -> None:
        """Every rank writes its part of the last report's checkpoint into `folder`."""

    @abstractmethod
    def leave(self) -> None:
        """Lets the ranks leave their trial, some seconds at most, where they stand at a report: before `shutdown`."""

    @abstractmethod
    def shutdown(self) -> None:
        """Ends every process of the group at once. Safe to call twice."""


class InProcessWorkerGroup(WorkerGroup):
    """One rank in this process, for tests and debuggers: the same reports, no actor, no deadline."""

    def __init__(self) -> None:
        self._worker = RankWorker(rank=0, world_size=1, uses_gpu=False)
        self._task: Task | None = None

    def begin(self, task: Task) -> None:
        self._task = task
        with self._log_in_errors():
            self._worker.begin(task)

    def go_on(self) -> None:
        """Nothing: there is one thread."""

    def next_report(self) -> RankReport | None:
        with self._log_in_errors():
            return self._worker.next_report()

    def save(self, folder: Path, model_alone: bool = False) -> None:
        with self._log_in_errors():
            self._worker.save(str(folder), model_alone)

    def leave(self) -> None:
        with suppress(TrialError):
            self._worker.end()

    def shutdown(self) -> None:
        self._worker.end()

    @contextmanager
    def _log_in_errors(self) -> Iterator[None]:
        try:
            yield
        except TrialError as error:
            raise type(error)(_with_log(str(error), self._task, 0)) from error


class RayWorkerGroup(WorkerGroup):
    """One actor a rank, each in its own bundle of the trial's placement group."""

    def __init__(
        self,
        name: str,
        workers: int,
        cpus_per_worker: float,
        gpus_per_worker: float,
        placement_group: PlacementGroup,
        deadline: StepDeadline,
        first_bundle: int = 0,
        cards: Sequence[str] = (),
    ) -> None:
        self._deadline = deadline
        self._task: Task | None = None
        actor_class = ray.remote(RankActor)
        self._ranks: list[Any] = [
            actor_class.options(
                name=_free_name(f"{name} rank {rank}"),
                num_cpus=cpus_per_worker,
                num_gpus=gpus_per_worker,
                scheduling_strategy=PlacementGroupSchedulingStrategy(placement_group, first_bundle + rank),
                max_restarts=0,
            ).remote(rank, workers, gpus_per_worker > 0, cards)
            for rank in range(workers)
        ]
        self._far = FarRanks(self._ask)
        self._started = False
        self._elsewhere: set[int] = set()
        """Ranks on other nodes, whose memory is not this one's."""
        self._on_their_way: _Asked | None = None

    def begin(self, task: Task) -> None:
        self._task = task
        self._on_their_way = None
        deadline_s = self._deadline.start_s
        if self._started:  # a warm group has nothing to start and to import
            deadline_s = min(deadline_s, self._deadline.seconds)
        end = time.monotonic() + deadline_s
        try:
            self._far.meet(task, deadline_s)
        except WorkerLostError as error:
            raise RankNotStartedError(str(error)) from None
        if not self._started:
            host, port = self._ask(lambda rank: rank.endpoint.remote(), deadline_s, only=[0], until=end)[0]
            nodes = self._ask(lambda rank: rank.rendezvous_at.remote(host, port), deadline_s, until=end)
            here = ray.get_runtime_context().get_node_id()
            self._elsewhere = {rank for rank, node in enumerate(nodes) if node != here}
        self._ask(lambda rank: rank.begin.remote(task), deadline_s, until=end)
        self._started = True

    def go_on(self) -> None:
        self._on_their_way = self._asked(lambda rank: rank.next_report.remote(), range(len(self._ranks)))

    def next_report(self) -> RankReport | None:
        if self._on_their_way is None:
            self.go_on()
        asked, self._on_their_way = self._on_their_way, None
        assert asked is not None
        reports = self._answers(asked, self._deadline.seconds, "report")
        epochs = [report and report.epoch for report in reports]
        if len(set(epochs)) > 1:
            raise TrialError(f"the ranks disagree on the epoch of their report: {epochs}")
        self._deadline.saw(max((report.took_s for report in reports if report), default=0.0))
        if self._task is not None:
            self._far.fetch_logs(self._task, self._deadline.seconds)
        first: RankReport | None = reports[0]
        # Often rank 0 alone has something to save.
        return first and replace(
            first,
            saves=any(report.saves for report in reports),
            saves_model=any(report.saves_model for report in reports),
            num_bytes=max(report.num_bytes for report in reports),
        )

    def save(self, folder: Path, model_alone: bool = False) -> None:
        self._far.save(folder, model_alone, self._deadline.save_seconds)

    def leave(self) -> None:
        if self._on_their_way is None and self._ranks:
            ended = [rank.end.remote() for rank in self._ranks]
            ray.wait(ended, num_returns=len(ended), timeout=LAST_WORDS_S)

    def shutdown(self) -> None:
        for rank in self._ranks:
            ray.kill(rank)  # ends a frozen process too
        self._ranks = []

    def _ask(
        self,
        call: Callable[[Any], Any],
        deadline_s: float,
        only: Sequence[int] | None = None,
        what: str = "answer",
        until: float | None = None,
    ) -> list[Any]:
        """The answers of all ranks, asked together: one left behind would wait in its next all-reduce.

        TrialError as soon as one rank fails, whatever the others do. `what` they are to give, in a word. `until`: the
        end of a deadline that began before.
        """
        asked = self._asked(call, range(len(self._ranks)) if only is None else only)
        return self._answers(asked, deadline_s, what, until)

    def _asked(self, call: Callable[[Any], Any], ranks: Sequence[int]) -> _Asked:
        self._num_oom_kills = num_oom_kills()  # what was killed before is none of these
        return _Asked(time.monotonic(), {call(self._ranks[rank]): rank for rank in ranks})

    def _answers(self, asked: _Asked, deadline_s: float, what: str, until: float | None = None) -> list[Any]:
        rank_of, end = asked.rank_of, asked.at + deadline_s if until is None else until
        answers: dict[int, Any] = {}
        pending = list(rank_of)
        while pending:
            ready, pending = ray.wait(pending, num_returns=1, timeout=max(0.0, end - time.monotonic()))
            if not ready:
                silent = sorted(rank_of[reference] for reference in pending)
                raise StepDeadlineError(
                    _with_log(
                        f"rank {silent[0]} gave no {what} in {deadline_s:.0f} s; silent: {silent}",
                        self._task,
                        silent[0],
                    )
                )
            rank = rank_of[ready[0]]
            try:
                answers[rank] = self._answer(ready[0], rank)
            except TrialError as error:
                raise self._cause(error, {reference: rank_of[reference] for reference in pending}) from None
        return [answers[rank] for rank in rank_of.values()]

    def _cause(self, error: TrialError, pending: dict[Any, int]) -> TrialError:
        """`error`, or the death of another rank when that comes to light at once: a broken connection is its echo."""
        for reference in ray.wait(list(pending), num_returns=len(pending), timeout=ECHO_S)[0] if pending else []:
            try:
                self._answer(reference, pending[reference])
            except (WorkerLostError, OutOfMemoryError) as lost:
                return lost
            except TrialError:
                continue
        return error

    def _answer(self, reference: Any, rank: int) -> Any:
        try:
            return ray.get(reference)
        except RayTaskError as error:
            kind = TrialError
            if isinstance(error.cause, TrialError):
                kind = type(error.cause)
            elif storage_is_away(error.cause):
                kind = StorageUnavailableError
            if rank in self._far and self._task is not None:
                with suppress(RayError):  # its last words; what went wrong is known without
                    add_to_log(self._task, rank, ray.get(self._ranks[rank].log_piece.remote(), timeout=LAST_WORDS_S))
            raise kind(_with_log(str(error.cause), self._task, rank)) from None
        except (RayActorError, GetTimeoutError) as error:
            may_be_memory = rank not in self._elsewhere and "its node has died" not in str(error)
            if tells_of_memory(str(error)) or (may_be_memory and num_oom_kills() > self._num_oom_kills):
                why = f"out of memory: rank {rank} was killed: {_one_line(error)}"
                raise OutOfMemoryError(_with_log(why, self._task, rank)) from None
            raise WorkerLostError(_with_log(f"rank {rank} died: {_one_line(error)}", self._task, rank)) from None


def _with_log(message: str, task: Task | None, rank: int) -> str:
    tail = log_tail(task.log_file(rank)) if task is not None else ""
    if task is None or not tail:
        return redacted(message)
    return redacted(f"{message}\nLast lines of {task.log_file(rank).name}:\n{tail}")


def _free_name(name: str) -> str:
    """`name`, or with a number behind it when a living actor has it: names are unique in a Ray namespace."""
    candidate, count = name, 1
    while True:
        try:
            ray.get_actor(candidate)
        except ValueError:
            return candidate
        count += 1
        candidate = f"{name} ({count})"


def _one_line(error: Exception) -> str:
    """Ray's messages are paragraphs; the first line that says something is enough beside the log."""
    if "its node has died" in str(error):
        return "its node was lost"
    if isinstance(error, ActorUnavailableError):
        return "it cannot be reached: its node was lost, or is cut off"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    causes = [line for line in lines if "cause" in line.lower()]
    return (causes or lines or [type(error).__name__])[0].partition(" Some common causes")[0]
