"""What a study looks like from outside: the contract's JSON, as types. Read off the record, never stored."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field

StudyState = Literal["running", "completed", "stopped", "failed", "interrupted"]
TrialState = Literal["waiting", "running", "paused", "completed", "pruned", "failed"]


class _Status(BaseModel):
    model_config = ConfigDict(frozen=True)


class ObjectiveStatus(_Status):
    metric: str
    mode: Literal["max", "min"]

    def better(self, value: float, than: float) -> bool:
        return value > than if self.mode == "max" else value < than


class EpochReport(_Status):
    epoch: int
    metrics: dict[str, float | None]
    """None where the number was not finite."""


class CheckpointStatus(_Status):
    epoch: int
    bytes: int
    path: str


class TrialStatus(_Status):
    number: int
    state: TrialState
    reason: str | None = None
    """Why the trial ended early, or waits; None for one that does neither."""
    params: dict[str, Any]
    reports: tuple[EpochReport, ...] = ()
    checkpoint: CheckpointStatus | None = None
    """Of its best epoch once the trial has ended, else of its last; None when there is none."""
    restarts: int = 0
    started_at: str | None = None
    ended_at: str | None = None


class BestTrial(_Status):
    number: int
    epoch: int
    value: float
    params: dict[str, Any]


class StudyStatus(_Status):
    study: str
    state: StudyState
    objective: ObjectiveStatus
    trials: tuple[TrialStatus, ...]
    best: BestTrial | None
    notice: str | None = Field(default=None, exclude=True)
    """What people should know of the place, above all why trials wait; not part of the document."""

    def to_json(self) -> dict[str, Any]:
        return self.model_dump(mode="json")


Moment = Sequence[object]
"""A study's trials as they were at some time."""


class StudyView(Protocol):
    """A study at one moment, as a display needs it. A record is one."""

    @property
    def objective(self) -> ObjectiveStatus: ...

    @property
    def budget_trials(self) -> int: ...

    @property
    def baseline(self) -> float | None: ...

    @property
    def notice(self) -> str | None: ...

    def trials(self) -> list[TrialStatus]: ...

    def changed(self, since: Moment) -> tuple[list[TrialStatus], Moment]:
        """The trials that are not as they were; and the present moment, for the next look."""

    def status(self) -> StudyStatus: ...


class Display(Protocol):
    """Shows people how a study goes."""

    def tell(self, line: str) -> None:
        """One event worth a line."""

    def show(self, view: StudyView) -> None:
        """The state of things, called several times a second."""

    def abort(self, error: BaseException) -> None:
        """Ends this process at once, from whatever thread, and says why."""


def diverged_in(metrics: Mapping[str, float | None], metric: str) -> str | None:
    """The loss or the objective that is not finite in a report: its trial has diverged there, whatever else is good.

    None where there is none; what a report lacks is not looked at.
    """
    seen = [name for name in ("train_loss", "eval_loss", metric) if name in metrics]
    return next((name for name in seen if not _is_finite(metrics[name])), None)


def _is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def best_report(trial: TrialStatus, objective: ObjectiveStatus) -> EpochReport | None:
    """The report with the best finite objective; the earliest of equals. None when there is none."""
    best: EpochReport | None = None
    for report in trial.reports:
        value = objective_value(report, objective)
        if value is not None and (best is None or objective.better(value, objective_value(best, objective) or 0.0)):
            best = report
    return best


def objective_value(report: EpochReport, objective: ObjectiveStatus) -> float | None:
    """Of a report that is worth something: in one with which its trial diverged the objective may be finite."""
    return None if diverged_in(report.metrics, objective.metric) else report.metrics.get(objective.metric)


def ranked(trials: Iterable[TrialStatus], objective: ObjectiveStatus) -> list[BestTrial]:
    """Completed and pruned trials with a finite value, best first; ties by number."""
    found = []
    for trial in trials:
        report = best_report(trial, objective) if trial.state in ("completed", "pruned") else None
        if report is not None:
            value = objective_value(report, objective)
            assert value is not None
            found.append(BestTrial(number=trial.number, epoch=report.epoch, value=value, params=trial.params))
    sign = -1.0 if objective.mode == "max" else 1.0
    return sorted(found, key=lambda best: (sign * best.value, best.number))


def best_trial(
    trials: Iterable[TrialStatus], objective: ObjectiveStatus, usable: Callable[[BestTrial], bool]
) -> BestTrial | None:
    """The best report of all completed and pruned trials that is `usable`: its checkpoint still verifies.

    Ties go to the lowest number, then to the earliest epoch.
    """
    sign = -1.0 if objective.mode == "max" else 1.0
    found = [
        BestTrial(number=trial.number, epoch=report.epoch, value=value, params=trial.params)
        for trial in trials
        if trial.state in ("completed", "pruned")
        for report in trial.reports
        if (value := objective_value(report, objective)) is not None
    ]
    found.sort(key=lambda best: (sign * best.value, best.number, best.epoch))
    return next((best for best in found if usable(best)), None)
