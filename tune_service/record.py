"""The one record of a study: an Optuna study in a journal file. Everything else is a view of it.

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

from trainables.checkpoint import finite_or_none, verify
from trainables.errors import Problem
from trainables.fault_points import fault_point
from trainables.redaction import redacted
from tune_service.errors import StorageError
from tune_service.journal import Journal
from tune_service.lease import Lease
from tune_service.searcher import suggest
from tune_service.status import (
    BestTrial,
    CheckpointStatus,
    EpochReport,
    Moment,
    ObjectiveStatus,
    StudyState,
    StudyStatus,
    TrialState,
    TrialStatus,
    best_report,
    best_trial,
    objective_value,
)
from tune_service.storage import StudyFolder

optuna.logging.set_verbosity(optuna.logging.WARNING)

FORMAT = 1
"""Raised whenever an older reader would misread what a newer writer wrote."""
_REPORT = "report:"
_MICRO_BATCH = "micro_batch_size"
_STATES: dict[OptunaState, TrialState] = {
    OptunaState.COMPLETE: "completed",
    OptunaState.PRUNED: "pruned",
    OptunaState.FAIL: "failed",
}


@dataclass(frozen=True)
class AskedTrial:
    """A trial that may start, or go on."""

    number: int
    params: dict[str, Any]
    micro_batch_size: int | None = None
    """What it had to be cut down to for want of memory; None: as the spec says."""


class Record:
    """Reads and writes the record of one study."""

    def __init__(self, folder: StudyFolder, study: optuna.Study, storage: Journal) -> None:
        self.folder = folder
        self._study = study
        self._storage = storage
        self.objective = ObjectiveStatus(**self.spec["objective"])
        int(self._attrs["budget_trials"])

    @staticmethod
    def create(
        folder: StudyFolder, spec: Mapping[str, Any], sampler: BaseSampler, lease: Lease | None = None
    ) -> Record:
        """A new record. `spec` holds at least `objective`, `search_space` and `budget`, and is kept as it is.

        It is written beside and renamed, so that no reader meets a record that says half of this.
        """
        unfinished = folder.journal.with_suffix(".new")
        storage = Journal(unfinished, folder.journal_lock)
        direction = direction_of(spec["objective"]["mode"])
        study = optuna.create_study(storage=storage, sampler=sampler, study_name=folder.name, direction=direction)
        study.set_user_attr("format", FORMAT)
        study.set_user_attr("created_at", _now())
        study.set_user_attr("spec", dict(spec))
        study.set_user_attr("budget_trials", spec["budget"]["trials"])
        unfinished.replace(folder.journal)
        return Record.open(folder, sampler, lease)

    @staticmethod
    def open(folder: StudyFolder, sampler: BaseSampler | None = None, lease: Lease | None = None) -> Record:
        """The record of an existing study. StorageError when it cannot be read.

        A driver gives `sampler` and its `lease`: once that is lost, every write raises LeaseLostError.
        """
        try:
            storage = Journal(folder.journal, folder.journal_lock, lease)
            study = optuna.load_study(study_name=folder.name, storage=storage, sampler=sampler)
            version = int(study.user_attrs["format"])
            record = Record(folder, study, storage) if version <= FORMAT else None
        except Exception as error:  # what Optuna makes of a file that is not its own is anything
            raise _unreadable(folder, f"{type(error).__name__}: {error}") from error
        if record is None:
            found = f"a record of format {version}"
            raise StorageError(Problem(folder.name, f"has a record of format {FORMAT}", found, "a newer tune-service"))
        return record

    # What the driver writes

    def ask(
        self, distributions: dict[str, BaseDistribution], plan: Callable[[int], Mapping[str, Any] | None]
    ) -> AskedTrial | None:
        """The next trial: one that waits, else a new one while the budget lasts.

        `plan(number)` gives values for a new trial, which the sampler completes; None ends the study.
        """
        trials = self._trials()
        if any(trial.state == OptunaState.WAITING for trial in trials):
            number = self._study.ask(distributions).number
        else:
            number = len(trials)
            values = plan(number) if number < self.budget_trials else None
            if values is None:
                return None
            params = suggest(self._study, number, values, distributions)
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

    def report(self, number: int, epoch: int, metrics: Mapping[str, float]) -> bool:
        """Adds an epoch's report. Whether that epoch is new to the record.

        An epoch that was trained again, after a restart without a checkpoint, takes the place of the first: it is the
        one whose checkpoint there may be.
        """
        trial, kept = self._trial(number), finite_or_none(metrics)
        before = trial.user_attrs.get(_REPORT + str(epoch), {}).get("metrics")
        if before != kept:
            value = metrics.get(self.objective.metric, math.nan)
            report = {_REPORT + str(epoch): {"metrics": kept, "at": _now()}}
            self._storage.update_trial(trial._trial_id, report, {epoch: float(value)})
        return before is None

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
        """What keeps trials waiting, in words; None: nothing does."""
        if self.notice != text:
            self._study.set_user_attr("notice", text)

    # What it says

    @property
    def spec(self) -> dict[str, Any]:
        return dict(self._attrs["spec"])

    @property
    def budget_trials(self) -> int:
        return int(self._attrs["budget_trials"])

    @property
    def stop_request(self) -> dict[str, Any] | None:
        """`{"at", "now"}` of a stop that no resume has taken back."""
        found: dict[str, Any] | None = self._attrs.get("stop")
        return found

    @property
    def failure(self) -> str | None:
        found: str | None = self._attrs.get("failure")
        return found

    @property
    def baseline(self) -> float | None:
        """Accuracy of always answering the commonest class of the validation split; None where it means nothing."""
        found: float | None = self._attrs.get("baseline")
        return found

    @property
    def notice(self) -> str | None:
        found: str | None = self._study.user_attrs.get("notice")
        return found

    def trials(self) -> list[TrialStatus]:
        alive = self.folder.driver_is_alive()
        kept = self.folder.checkpoints.kept()
        return [self._status(trial, alive, kept.get(trial.number, [])) for trial in self._trials()]

    def trial(self, number: int) -> TrialStatus:
        return self._status(self._trial(number), True, self.folder.checkpoints.epochs(number))

    def end_of(self, number: int) -> TrialState | None:
        """How the trial ended; None while it has no end."""
        return _STATES.get(self._trial(number).state)

    def changed(self, since: Moment) -> tuple[list[TrialStatus], Moment]:
        """The trials that are not as they were, without their checkpoints; and the present moment, for the next look.

        Costs next to nothing for those that are: a display looks at 10,000 trials twice a second.
        """
        # Optuna puts a new object in a trial's place with every change of it.
        now, alive = self._trials(), self.folder.driver_is_alive()
        news = [trial for number, trial in enumerate(now) if number >= len(since) or trial is not since[number]]
        return [self._status(trial, alive, []) for trial in news], now

    def best(self, trials: list[TrialStatus] | None = None, deep: bool = False) -> BestTrial | None:
        """The best trial whose checkpoint is whole: by file sizes, or `deep`, by sha256."""
        by_number = {trial.number: trial for trial in (self.trials() if trials is None else trials)}

        def usable(best: BestTrial) -> bool:
            return not self._saves(best.number) or verify(self.folder.checkpoints.folder(best.number, best.epoch), deep)

        return best_trial(list(by_number.values()), self.objective, usable)

    def status(self, deep: bool = False) -> StudyStatus:
        trials = self.trials()
        return StudyStatus(
            study=self.folder.name,
            state=self._state(trials),
            objective=self.objective,
            trials=tuple(trials),
            best=self.best(trials, deep),
            notice=self.notice if self.folder.driver_is_alive() else None,
        )

    def _state(self, trials: list[TrialStatus]) -> StudyState:
        if self.folder.driver_is_alive():
            return "running"
        if self.failure is not None:
            return "failed"
        ended = [trial for trial in trials if trial.state in _STATES.values()]
        done = len(ended) == len(trials) and (len(trials) >= self.budget_trials or self._exhausted)
        if not done:
            return "stopped" if self.stop_request is not None else "interrupted"
        return "failed" if all(trial.state == "failed" for trial in trials) else "completed"

    @property
    def _exhausted(self) -> bool:
        return bool(self._attrs.get("exhausted", False))

    def set_exhausted(self) -> None:
        """A grid came to its last point before the budget did."""
        if not self._exhausted:
            self._study.set_user_attr("exhausted", True)

    def _saves(self, number: int) -> bool:
        return bool(self._trial(number).user_attrs.get("saves", False))

    def set_saves(self, number: int) -> None:
        """The trial's reports come with checkpoints, so that a missing one is a loss."""
        trial = self._trial(number)
        if not trial.user_attrs.get("saves", False):
            self._set(trial, "saves", True)

    def _status(self, trial: FrozenTrial, alive: bool, kept: list[int]) -> TrialStatus:
        try:
            return self._read(trial, alive, kept)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise _unreadable(self.folder, f"trial {trial.number}: {type(error).__name__}: {error}") from error

    def _read(self, trial: FrozenTrial, alive: bool, kept: list[int]) -> TrialStatus:
        attrs = trial.user_attrs
        reports = sorted(
            (
                EpochReport(epoch=int(name.removeprefix(_REPORT)), metrics=_finite(entry["metrics"]))
                for name, entry in attrs.items()
                if name.startswith(_REPORT)
            ),
            key=lambda report: report.epoch,
        )
        started = "started_at" in attrs
        open_state: TrialState = "waiting" if not started else "paused"
        if trial.state == OptunaState.RUNNING and started and alive:
            open_state = "running"
        reason = attrs.get("reason") if open_state != "running" else None
        if open_state == "paused" and trial.state == OptunaState.RUNNING:
            reason = "interrupted: the driver is gone"
        status = TrialStatus(
            number=trial.number,
            state=_STATES.get(trial.state, open_state),
            reason=reason,
            params=trial.params or trial.system_attrs.get("fixed_params", {}),
            reports=tuple(reports),
            restarts=attrs.get("restarts", 0),
            started_at=attrs.get("started_at"),
            # Noted just before the end itself: a driver that was killed in between left a trial that goes on.
            ended_at=attrs.get("ended_at") if trial.state.is_finished() else None,
        )
        return status.model_copy(update={"checkpoint": self._checkpoint(status, kept)})

    def _checkpoint(self, trial: TrialStatus, kept: list[int]) -> CheckpointStatus | None:
        """Read off the folders: a note of what exists could contradict what does."""
        if not kept:
            return None
        best = best_report(trial, self.objective) if trial.ended_at else None
        epoch = best.epoch if best is not None and best.epoch in kept else kept[-1]
        store = self.folder.checkpoints
        path = str(store.folder(trial.number, epoch))
        return CheckpointStatus(epoch=epoch, bytes=store.num_bytes(trial.number, epoch), path=path)

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

    def _trials(self) -> list[FrozenTrial]:
        return self._study.get_trials(deepcopy=False)

    def _trial(self, number: int) -> FrozenTrial:
        trial_id = self._storage.get_trial_id_from_study_id_trial_number(self._study._study_id, number)
        return self._storage.get_trial(trial_id)

    @property
    def _attrs(self) -> dict[str, Any]:
        """The study's, without the copy that Optuna makes: the driver looks at them at every step."""
        return self._storage.get_study_user_attrs(self._study._study_id)

    def _set(self, trial: FrozenTrial, name: str, value: Any) -> None:
        self._storage.set_trial_user_attr(trial._trial_id, name, value)


def _finite(metrics: Mapping[str, float | None]) -> dict[str, float | None]:
    """As they are; a number that is not finite, which no version of ours writes, as None."""
    return {name: value if value is not None and math.isfinite(value) else None for name, value in metrics.items()}


def _unreadable(folder: StudyFolder, why: str) -> StorageError:
    found = f"{folder.journal}: {why}"
    return StorageError(Problem(folder.name, "has a record that can be read", found[:1000], "a whole record"))


def direction_of(mode: str) -> StudyDirection:
    return StudyDirection.MAXIMIZE if mode == "max" else StudyDirection.MINIMIZE


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
