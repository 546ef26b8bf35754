"""The one record of a study: an Optuna study in a journal or a database. Everything else is a view of it.

Optuna's trial states serve as they are. A trial that has a number but no end is RUNNING under a driver, and WAITING
when it waits to be started or, stopped with the study, to go on: `study.ask` hands waiting trials out first. Only the
driver writes, but for the request to stop.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, create_trial
from optuna.trial import TrialState as OptunaState

from trainables.checkpoint import finite_or_none
from trainables.errors import BucketError, Problem
from trainables.fault_points import fault_point
from trainables.redaction import redacted
from tune_service.errors import LeaseLostError, RecordUnavailableError, StorageError
from tune_service.home import StudyHome
from tune_service.lease import Lease
from tune_service.record_view import REPORT, RecordView, unreadable
from tune_service.searcher import suggest
from tune_service.status import best_report, objective_value

optuna.logging.set_verbosity(optuna.logging.WARNING)

FORMAT = 1
"""Raised whenever an older reader would misread what a newer writer wrote."""
_MICRO_BATCH = "micro_batch_size"


@dataclass(frozen=True)
class AskedTrial:
    """A trial that may start, or go on."""

    number: int
    params: dict[str, Any]
    micro_batch_size: int | None = None
    """What it had to be cut down to for want of memory; None: as the spec says."""


class Record(RecordView):
    """Reads and writes the record of one study."""

    @staticmethod
    def create(
        folder: StudyHome,
        spec: Mapping[str, Any],
        sampler: BaseSampler,
        lease: Lease | None = None,
        defaults: Mapping[str, Any] | None = None,
    ) -> Record:
        """A new record, where `record` of the spec says. `spec` is kept as it is, and holds at least `objective`,
        `search_space` and `budget`; `defaults` are the search space's.

        No reader meets a record that says half of this.
        """
        attrs = {
            "format": FORMAT,
            "created_at": _now(),
            "spec": dict(spec),
            "budget_trials": spec["budget"]["trials"],
            "defaults": dict(defaults or {}),
        }
        folder.create_record(direction_of(spec["objective"]["mode"]), attrs, lease)
        return Record.open(folder, sampler, lease)

    @staticmethod
    def open(folder: StudyHome, sampler: BaseSampler | None = None, lease: Lease | None = None) -> Record:
        """The record of an existing study. StorageError when it cannot be read, RecordUnavailableError or BucketError
        when the database or the bucket that it lies in is away.

        A driver gives `sampler` and its `lease`: once that is lost, every write raises LeaseLostError.
        """
        try:
            storage, name = folder.open_record(lease)
            study = optuna.load_study(study_name=name, storage=storage, sampler=sampler)
            version = int(study.user_attrs["format"])
            record = Record(folder, study, storage) if version <= FORMAT else None
        except (StorageError, RecordUnavailableError, LeaseLostError, BucketError):
            raise
        except Exception as error:  # what Optuna makes of a file that is not its own is anything
            raise unreadable(folder, f"{type(error).__name__}: {error}") from error
        if record is None:
            found = f"a record of format {version}"
            raise StorageError(Problem(folder.name, f"has a record of format {FORMAT}", found, "a newer tune-service"))
        return record

    # What the driver writes

    def ask(
        self, distributions: dict[str, BaseDistribution], plan: Callable[[int], Mapping[str, Any]]
    ) -> AskedTrial | None:
        """The next trial: one that waits, else a new one while the budget lasts.

        `plan(number)` gives values for a new trial, which the sampler completes.
        """
        trials = self._trials()
        if any(trial.state == OptunaState.WAITING for trial in trials):
            number = self._study.ask(distributions).number
        else:
            number = len(trials)
            if number >= self.budget_trials:
                return None
            params = suggest(self._study, number, plan(number), distributions)
            # Whole, in one append: a trial that has a number has its parameters.
            new = create_trial(state=OptunaState.RUNNING, params=params, distributions=distributions)
            self._storage.create_new_trial(self._study._study_id, new)
        trial = self._trial(number)
        return AskedTrial(number, trial.params, trial.user_attrs.get(_MICRO_BATCH))

    def start(self, number: int) -> None:
        """A trial begins, or begins again."""
        trial = self._trial(number)
        if "started_at" in trial.user_attrs:
            self._set(trial, "restarts", trial.user_attrs.get("restarts", 0) + 1)
        else:
            self._set(trial, "started_at", _now())
        if trial.user_attrs.get("reason") is not None:
            self._set(trial, "reason", None)

    def report(
        self, number: int, epoch: int, metrics: Mapping[str, float], judge: Callable[[], str | None]
    ) -> str | None:
        """Adds an epoch's report. Why the trial stops at it; None when it goes on.

        `judge` says that of an epoch that is new. Its verdict is in the record with the report: whoever goes on after a
        kill applies it, and judges no epoch twice. An epoch that was trained again, after a restart without a
        checkpoint, takes the place of the first: it is the one whose checkpoint there may be.
        """
        trial, kept = self._trial(number), finite_or_none(metrics)
        before = trial.user_attrs.get(REPORT + str(epoch))
        verdict = judge() if before is None else before.get("stop")
        if before is None or before["metrics"] != kept:
            value = metrics.get(self.objective.metric, math.nan)
            report = {"metrics": kept, "at": _now()} | ({"stop": verdict} if verdict else {})
            self._storage.update_trial(trial._trial_id, {REPORT + str(epoch): report}, {epoch: float(value)})
        return verdict

    def set_micro_batch_size(self, number: int, size: int) -> None:
        """The trial needs smaller micro batches than the spec says, under every driver to come."""
        self._set(self._trial(number), _MICRO_BATCH, size)

    def complete(self, number: int) -> None:
        """A trial ran to its end. It counts for the sampler with its best epoch's value."""
        best = best_report(self._status(self._trial(number), True, []), self.objective)
        if best is None:
            self.fail(number, f"no finite {self.objective.metric} was reported")
        else:
            self._end(number, OptunaState.COMPLETE, None, objective_value(best, self.objective))

    def prune(self, number: int, reason: str, diverged: bool = False) -> None:
        """A trial was stopped early. A diverged one is the worst of all for the sampler, whatever it reported."""
        self._end(number, OptunaState.PRUNED, reason, None, {"diverged": True} if diverged else {})

    def fail(self, number: int, reason: str) -> None:
        """A trial crashed for good."""
        self._end(number, OptunaState.FAIL, reason, None)

    def pause(self, number: int, reason: str) -> None:
        """Puts a trial back in line: it is the next to be asked for, and goes on from its last checkpoint."""
        trial = self._trial(number)
        if "started_at" in trial.user_attrs:
            self._set(trial, "reason", redacted(reason))
        self._storage.set_trial_state_values(trial._trial_id, OptunaState.WAITING)

    def pause_all(self, reason: str) -> None:
        """The same for every trial without an end."""
        for trial in self._trials():
            if trial.state == OptunaState.RUNNING:
                self.pause(trial.number, reason)

    def request_stop(self, now: bool) -> None:
        """Asks the driver to end; the one thing that others than the driver write."""
        self._study.set_user_attr("stop", {"at": _now(), "now": now})

    def clear_stop(self) -> None:
        if self.stop_request is not None:
            self._study.set_user_attr("stop", None)

    def set_budget(self, trials: int) -> None:
        self._study.set_user_attr("budget_trials", trials)

    def set_failure(self, reason: str | None) -> None:
        """Why the study ended as a whole, before its budget."""
        reason = reason and redacted(reason)
        if self.failure != reason:
            self._study.set_user_attr("failure", reason)

    def set_baseline(self, value: float | None) -> None:
        self._study.set_user_attr("baseline", value)

    def set_notice(self, text: str | None) -> None:
        """What people should know of the place, above all why trials wait; None: nothing."""
        if self.notice != text:
            self._study.set_user_attr("notice", text)

    def set_saves(self, number: int) -> None:
        """The trial's reports come with checkpoints, so that a missing one is a loss."""
        trial = self._trial(number)
        if not trial.user_attrs.get("saves", False):
            self._set(trial, "saves", True)

    def _end(
        self,
        number: int,
        state: OptunaState,
        reason: str | None,
        value: float | None,
        attrs: Mapping[str, Any] | None = None,
    ) -> None:
        trial = self._trial(number)
        reason = reason and redacted(reason)
        news = dict(attrs or {})
        if trial.user_attrs.get("reason") != reason:
            news["reason"] = reason
        self._storage.update_trial(trial._trial_id, news | {"ended_at": _now()})
        fault_point(f"ending-{number}")
        self._study.tell(number, value, state=state)

    def _set(self, trial: FrozenTrial, name: str, value: Any) -> None:
        self._storage.set_trial_user_attr(trial._trial_id, name, value)


def direction_of(mode: str) -> StudyDirection:
    return StudyDirection.MAXIMIZE if mode == "max" else StudyDirection.MINIMIZE


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
