"""The supervisor of one trial after the other: the class that Ray Tune holds. No torch in this process."""

from __future__ import annotations

import math
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray import tune

from trainables.bucket_checkpoints import open_store
from trainables.bucket_logs import TrialLogs
from trainables.checkpoint import Manifest, check_written
from trainables.errors import (
    CheckpointBudgetError,
    InputError,
    OutOfMemoryError,
    RankNotStartedError,
    StepDeadlineError,
    StorageUnavailableError,
    TrialError,
    WorkerLostError,
)
from trainables.far import own_files
from trainables.fault_points import fault_point
from trainables.worker import (
    FAST_BYTES_S,
    KEPT_FREE,
    LARGE_BYTES,
    MOST_FREE_S,
    RankReport,
    Task,
    storage_is_away,
)
from trainables.worker_group import RayWorkerGroup, StepDeadline, WorkerGroup

NODE_NEWS_S = 5.0
"""Wait before a group is put on nodes again, when it was put on one that was just going."""


@dataclass(frozen=True)
class GroupShape:
    """What a worker group needs; the same for all trials of a study, or it could not stay warm."""

    name: str
    workers: int
    cpus_per_worker: float
    gpus_per_worker: float
    step_timeout_s: float | None
    start_timeout_s: float
    first_bundle: int = 0
    """Of the placement group, that is a rank's: the supervisor's own comes before it where it is not empty."""
    cards: Sequence[str] = ()
    """GPUs of which a group of one rank takes the one that fewest use; empty: Ray chooses."""


class TrialSupervisor(tune.Trainable):  # type: ignore[misc]  # Ray has no types
    """One `step` gets the ranks ready, or is one report, or saves the checkpoint of the report before: only when the
    trial was told to go on, so that one that is stopped writes nothing. A failure is a result too, not an exception:
    it is plain data with its reason, and this process, which did not fail, begins again from the last checkpoint when
    it is asked to go on.

    A result holds `epoch`, `metrics` (pairs: Tune would flatten a mapping), `memory_share` (of its GPU, so far at most;
    none in a report from before that is told again), `saves` (its checkpoint is the next result), `owes` (a whole one
    comes, now or with a later report, where `save_whole` is called), `checkpoint_bytes` (None: none was saved so far)
    and `finished`; or `saved`, an epoch, with `owes`, `checkpoint_bytes`, `whole_bytes` (of a whole one, as far as is
    known) and `resumable`; or `finished` alone; or `failure`, with `fault` (storage, budget, memory, input) where the
    cause is known and `micro_batch_size` where it begins again with that; and always `number` and `next_within_s`, the
    time until the next result is overdue.
    """

    def setup(self, config: dict[str, Any]) -> None:
        self._group: WorkerGroup | None = None
        self._shape = GroupShape(**config["group"])
        self._deadline = StepDeadline(self._shape.step_timeout_s, self._shape.start_timeout_s)
        self._logs = TrialLogs(config["task"]["logs"], config["task"]["number"])
        self._saves = False
        """Whether the study's trainable has been seen to save: the deadline of what comes next depends on it."""
        self._whole_s: float | None = None
        """What the last whole checkpoint took, of whichever trial; before there was one, what this trial's would take.
        None: it is not large."""
        self._whole_bytes = 0
        """The last one's size; 0: there was none."""
        self._byte_s = 1 / FAST_BYTES_S
        """What a byte of a checkpoint takes, by the last large model; of use until there was a whole one."""
        self.reset_config(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Takes the next trial. Does nothing that can fail: Tune would not restart a trial that failed here."""
        self._task = Task(**new_config["task"])
        self._store = open_store(self._task.checkpoints, self._task.budget_bytes, self._task.lease)
        self._logs.put()  # the last lines of the trial before
        self._logs = TrialLogs(self._task.logs, self._task.number)
        self._begun = False
        self._unsaved: RankReport | None = None
        """The last report, whose checkpoint is the next result."""
        self._skipped: RankReport | None = None
        """The last report that could be saved, whether it is or not."""
        self._owes = False
        """Whether there is a report that could be saved and since which nothing whole was."""
        self._best: float | None = None
        """The best objective under this supervisor."""
        self._whole_at = time.monotonic()
        """When the trial's last whole checkpoint was there, or it began."""
        self._is_left = False
        self._stale: set[int] = set()
        """Epochs that are trained again, though a model of them was saved: it is replaced, as their reports are."""
        fault_point(f"resetting-{self._task.number}")
        return True

    def step(self) -> dict[str, Any]:
        try:
            result = self._next_result()
        except TrialError as error:
            result = self._failure(str(error), error)
        except Exception as error:  # a full disk; or a fault of ours, which then has its reason in the record
            traceback.print_exc()
            result = self._failure(f"the supervisor raised {type(error).__name__}: {error}", error)
        self._logs.put(in_time="epoch" in result and not result["finished"])
        return result | {"number": self._task.number, "next_within_s": self._next_within_s()}

    def save_whole(self) -> None:
        """The trial is to be left: its next checkpoint is whole, of the last report or else of the next that saves."""
        self._is_left = True

    def cleanup(self) -> None:
        try:
            if self._group is not None:
                self._group.leave()
        finally:
            self._drop_group()
            self._logs.put()
            own_files.remove()

    def _failure(self, reason: str, error: Exception) -> dict[str, Any]:
        self._begun = False
        self._unsaved = self._skipped = None
        self._drop_group()
        result: dict[str, Any] = {"failure": reason}
        if isinstance(error, StorageUnavailableError) or (isinstance(error, OSError) and storage_is_away(error)):
            result["fault"] = "storage"
        elif isinstance(error, CheckpointBudgetError):
            result["fault"] = "budget"
        elif isinstance(error, InputError):
            result["fault"] = "input"
        elif isinstance(error, OutOfMemoryError):
            result["fault"] = "memory"
            smaller = halved(self._task, self._shape.workers) if self._task.shrinks else None
            if smaller is not None:
                self._task = smaller
                result["micro_batch_size"] = smaller.settings["training"]["micro_batch_size"]
        return result

    def _next_result(self) -> dict[str, Any]:
        if not self._begun:
            resumed = self._begin()
            if resumed is not None:
                # A killed driver may never have seen this report; it knows its own again by the epoch.
                return self._result(resumed.epoch, _floats(resumed.metrics), resumed)
            return {"finished": False}  # from here on the driver waits no longer than an epoch takes
        assert self._group is not None
        report = self._skipped if self._is_left else self._unsaved
        self._unsaved = self._skipped = None
        if report is not None:
            manifest = self._save(self._group, report)
            saved = {"saved": report.epoch, "owes": self._owes, "checkpoint_bytes": manifest.num_bytes}
            whole_bytes = self._whole_bytes or report.num_bytes
            return saved | {"whole_bytes": whole_bytes, "resumable": manifest.resumable, "finished": False}
        next_report = self._group.next_report()
        if next_report is None:
            return {"finished": True}
        if not self._whole_bytes:
            self._whole_s = _whole_s(next_report.num_bytes * self._byte_s, next_report.num_bytes)
        self._saves = next_report.saves or self._saves
        self._owes = next_report.saves or self._owes
        written: Manifest | None = None
        is_due = next_report.saves and self._is_due(next_report)
        if is_due and next_report.epoch >= self._task.max_epochs:  # nobody stops it any more
            written = self._save(self._group, next_report)
        else:
            self._unsaved = next_report if is_due else None
            self._skipped = next_report if next_report.saves else None
        result = self._result(next_report.epoch, next_report.metrics, written)
        return result | {"memory_share": next_report.memory_share}

    def _is_due(self, report: RankReport) -> bool:
        """Whether a checkpoint of this report is to be written, whole or of the model alone."""
        value, sign = dict(report.metrics).get(self._task.objective[0]), 1 if self._task.objective[1] == "max" else -1
        is_best = self._best is None or (value is not None and sign * value > sign * self._best)
        if is_best:
            self._best = value
        if is_best or self._whole_s is None or report.epoch in self._stale:
            return True
        return report.epoch < self._task.max_epochs and self._whole_is_due

    @property
    def _whole_is_due(self) -> bool:
        free_s = min(KEPT_FREE * (self._whole_s or 0.0), MOST_FREE_S)
        return self._is_left or time.monotonic() - self._whole_at >= free_s

    def _save(self, group: WorkerGroup, report: RankReport) -> Manifest:
        number, epoch, began = self._task.number, report.epoch, time.monotonic()
        is_last = epoch >= self._task.max_epochs  # nobody goes on from there
        model_alone = report.saves_model and (is_last or not self._whole_is_due)
        self._store.check_room(number, 0 if model_alone else self._whole_bytes)
        try:
            folder = self._store.stage(number, epoch)
            group.save(folder, model_alone)
            check_written(folder)
            if not (self._whole_s is None or self._is_left or is_last):
                group.go_on()
            manifest = self._store.commit(number, epoch, report.metrics, is_last or not model_alone)
        except Exception:
            self._store.discard(number, epoch)  # half a checkpoint takes the room that the record needs
            raise
        took_s = time.monotonic() - began
        if not model_alone:  # a model alone says little of how long a whole one takes
            self._whole_at, self._owes = time.monotonic(), False
            self._deadline.saved(took_s)
            self._whole_bytes = manifest.num_bytes
            self._whole_s = _whole_s(took_s, self._whole_bytes)
        elif manifest.num_bytes >= LARGE_BYTES:
            self._byte_s = took_s / manifest.num_bytes
        return manifest

    def _begin(self) -> Manifest | None:
        """Gets the ranks ready, after the trial's last checkpoint if it has one, which is returned."""
        latest = self._store.latest(self._task.number)
        if latest is None or latest.epoch < self._task.max_epochs:
            folder = self._store.local(latest.trial, latest.epoch) if latest else None
            task = replace(self._task, logs=str(self._logs.folder()))
            self._begin_group(replace(task, resume_from=str(folder) if folder else None))
        self._begun, self._owes, self._best, self._whole_at = True, False, None, time.monotonic()
        begins_after = latest.epoch if latest else 0
        self._stale = {epoch for epoch in self._store.epochs(self._task.number) if epoch > begins_after}
        return latest

    def _begin_group(self, task: Task) -> None:
        if self._group is not None:
            try:
                self._group.begin(task)
            except (WorkerLostError, StepDeadlineError, OutOfMemoryError):
                # Lost since the trial before, or for its sake: no fault of this one, which has not begun anything.
                self._drop_group()
            else:
                return
        self._group = self._new_group()
        try:
            self._group.begin(task)
        except RankNotStartedError:
            # When a node goes, Ray knows it some seconds after its processes are gone, and till then puts others there.
            self._drop_group()
            time.sleep(NODE_NEWS_S)
            self._group = self._new_group()
            self._group.begin(task)

    def _result(self, epoch: int, metrics: dict[str, float], manifest: Manifest | None) -> dict[str, Any]:
        return {
            "epoch": epoch,
            "metrics": list(metrics.items()),
            "saves": self._unsaved is not None,
            "owes": self._owes,
            "checkpoint_bytes": manifest and manifest.num_bytes,
            "finished": epoch >= self._task.max_epochs,
        }

    def _next_within_s(self) -> float:
        if not self._begun:
            return self._shape.start_timeout_s
        # A checkpoint may come before the next report, or with it.
        return self._deadline.seconds + (self._deadline.save_seconds if self._saves else self._deadline.seconds)

    def _new_group(self) -> WorkerGroup:
        shape = self._shape
        self._deadline = StepDeadline(shape.step_timeout_s, shape.start_timeout_s)  # a new group is cold
        return RayWorkerGroup(
            shape.name,
            shape.workers,
            shape.cpus_per_worker,
            shape.gpus_per_worker,
            ray.util.get_current_placement_group(),
            self._deadline,
            shape.first_bundle,
            shape.cards,
        )

    def _drop_group(self) -> None:
        if self._group is not None:
            self._group.shutdown()
            self._group = None


def _whole_s(seconds: float, num_bytes: int) -> float | None:
    return seconds if num_bytes >= LARGE_BYTES else None


def _floats(metrics: dict[str, float | None]) -> dict[str, float]:
    return {name: math.nan if value is None else value for name, value in metrics.items()}


def halved(task: Task, workers: int) -> Task | None:
    """The trial with half the micro batch, at the same global batch; None when there is nothing left to halve."""
    training = task.settings.get("training", {})
    rank_rows = -(-training["batch_size"] // workers) if training else 1
    size = min(training.get("micro_batch_size") or rank_rows, rank_rows)
    if size <= 1:
        return None
    return replace(task, settings=task.settings | {"training": training | {"micro_batch_size": size // 2}})
