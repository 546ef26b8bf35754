"""What a record says: the trials and the study as they are now. Nothing here writes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from typing import TYPE_CHECKING, Any

import optuna
from optuna.trial import FrozenTrial
from optuna.trial import TrialState as OptunaState

from trainables.errors import Problem
from tune_service.errors import StorageError
from tune_service.home import StudyHome
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
)

if TYPE_CHECKING:
    from tune_service.home import RecordStorage

Damaged = AbstractSet[tuple[int, int]]
"""Trial and epoch of checkpoints that are known not to be what was written."""
REPORT = "report:"
"""What the names of the attributes begin with that hold an epoch's metrics; the epoch follows."""
_STATES: dict[OptunaState, TrialState] = {
    OptunaState.COMPLETE: "completed",
    OptunaState.PRUNED: "pruned",
    OptunaState.FAIL: "failed",
}


class RecordView:
    """The record of one study, to be looked at."""

    def __init__(self, folder: StudyHome, study: optuna.Study, storage: RecordStorage) -> None:
        self.folder = folder
        self._study = study
        self._storage = storage
        self.objective = ObjectiveStatus(**self.spec["objective"])
        int(self._attrs["budget_trials"])

    @property
    def spec(self) -> dict[str, Any]:
        return dict(self._attrs["spec"])

    @property
    def defaults(self) -> dict[str, Any]:
        """Of the search space: where the first trial starts when the spec's own value lies outside."""
        return dict(self._attrs.get("defaults", {}))

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
        found: str | None = self._attrs.get("notice")
        return found

    def trials(self) -> list[TrialStatus]:
        return self._statuses(self.folder.driver_is_alive())

    def _statuses(self, alive: bool) -> list[TrialStatus]:
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
        # Optuna, and our Database, put a new object in a trial's place with every change of it.
        now, alive = self._trials(), self.folder.driver_is_alive()
        news = [trial for number, trial in enumerate(now) if number >= len(since) or trial is not since[number]]
        return [self._status(trial, alive, []) for trial in news], now

    def best(
        self, trials: list[TrialStatus] | None = None, deep: bool = False, damaged: Damaged = frozenset()
    ) -> BestTrial | None:
        """The best trial whose checkpoint is whole: by file sizes, or `deep`, by sha256; none of the `damaged`."""
        by_number = {trial.number: trial for trial in (self.trials() if trials is None else trials)}

        def usable(best: BestTrial) -> bool:
            if (best.number, best.epoch) in damaged:
                return False
            return not self.saves(best.number) or self.folder.checkpoints.is_whole(best.number, best.epoch, deep)

        return best_trial(list(by_number.values()), self.objective, usable)

    def status(self, deep: bool = False, damaged: Damaged = frozenset()) -> StudyStatus:
        alive = self.folder.driver_is_alive()  # once: of a frozen one it takes seconds to say so
        trials = self._statuses(alive)
        return StudyStatus(
            study=self.folder.name,
            state=self._state(trials, alive),
            objective=self.objective,
            trials=tuple(trials),
            best=self.best(trials, deep, damaged),
            notice=self.notice if alive else None,
        )

    def _state(self, trials: list[TrialStatus], alive: bool) -> StudyState:
        if alive:
            return "running"
        if self.failure is not None:
            return "failed"
        ended = [trial for trial in trials if trial.state in _STATES.values()]
        is_all = len(trials) >= self.budget_trials or self._attrs.get("exhausted", False)  # of earlier versions' grids
        done = len(ended) == len(trials) and is_all
        if not done:
            return "stopped" if self.stop_request is not None else "interrupted"
        return "failed" if all(trial.state == "failed" for trial in trials) else "completed"

    def saves(self, number: int) -> bool:
        """Whether the trial's reports come with checkpoints, so that a missing one is a loss."""
        return bool(self._trial(number).user_attrs.get("saves", False))

    def _status(self, trial: FrozenTrial, alive: bool, kept: list[int]) -> TrialStatus:
        try:
            return self._read(trial, alive, kept)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise unreadable(self.folder, f"trial {trial.number}: {type(error).__name__}: {error}") from error

    def _read(self, trial: FrozenTrial, alive: bool, kept: list[int]) -> TrialStatus:
        attrs = trial.user_attrs
        reports = sorted(
            (
                EpochReport(epoch=int(name.removeprefix(REPORT)), metrics=_finite(entry["metrics"]))
                for name, entry in attrs.items()
                if name.startswith(REPORT)
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
        path = store.path(trial.number, epoch)
        return CheckpointStatus(epoch=epoch, bytes=store.num_bytes(trial.number, epoch), path=path)

    def _trials(self) -> list[FrozenTrial]:
        return self._study.get_trials(deepcopy=False)

    def _trial(self, number: int) -> FrozenTrial:
        trial_id = self._storage.get_trial_id_from_study_id_trial_number(self._study._study_id, number)
        return self._storage.get_trial(trial_id)

    @property
    def _attrs(self) -> dict[str, Any]:
        """The study's, without the copy that Optuna makes: the driver looks at them at every step."""
        return self._storage.get_study_user_attrs(self._study._study_id)


def _finite(metrics: Mapping[str, float | None]) -> dict[str, float | None]:
    """As they are; a number that is not finite, which no version of ours writes, as None."""
    return {name: value if value is not None and math.isfinite(value) else None for name, value in metrics.items()}


def unreadable(folder: StudyHome, why: str) -> StorageError:
    """The error of a record that is not what this version writes."""
    found = f"{folder.record_where}: {why}"
    return StorageError(Problem(folder.name, "has a record that can be read", found[:1000], "a whole record"))
