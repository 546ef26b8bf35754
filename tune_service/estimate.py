"""How long a study will take, from the steps that one trial was timed with. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from trainables.worker import FIRST_DEADLINE_S, KEPT_FREE, LARGE_BYTES
from tune_service.check import Check
from tune_service.kept import BYTES_PER_PARAMETER
from tune_service.scheduler import Asha
from tune_service.spec import StudySpec
from tune_service.words import counted

HOUR_S = 3600.0
PLAYED_STUDIES, PLAYED_TRIALS = 40, 200


@dataclass(frozen=True)
class Estimate:
    """Of a study of `finetune`: the first number if ASHA stops what it is expected to, the second if nothing stops."""

    epochs: tuple[float, float]
    """Of all trials together."""
    epoch_s: tuple[float, float]
    """One of them, evaluation and checkpoint included; the second while all that share a GPU work."""
    wall_s: tuple[float, float]
    gpu_hours: tuple[float, float]
    silent_s: float
    """The longest that a rank may give no sign: an epoch while all that share its GPU work, or a whole checkpoint."""

    def __str__(self) -> str:
        used = f", {_range(*self.gpu_hours, 'GPU hours')}" if self.gpu_hours[1] else ""
        expected, most = (counted(round(number), "epoch") for number in self.epochs)
        epochs = f"{expected} if ASHA stops what it is expected to, {most} if nothing stops"
        return (
            f"{_times(*self.wall_s)}{used}: {epochs if expected != most else most}, of {_times(*self.epoch_s)} each "
            f"with evaluation and checkpoint, by the steps that were timed"
        )


def estimate(spec: StudySpec, step: Mapping[str, float], at_once: int, storage_bytes_s: float) -> Estimate:
    """`at_once`: trials that run side by side; `storage_bytes_s`: what the storage takes, all trials together."""
    trials, resources = most_trials(spec), spec.resources
    train_s = step["train_rows"] * step["train_row_s"] + step["eval_rows"] * step["eval_row_s"]
    whole_bytes = BYTES_PER_PARAMETER * step["parameters"]
    whole_s = whole_bytes / storage_bytes_s
    # A large one is seldom written: in between, the model of a best epoch is a third of it.
    save_s = whole_s if whole_bytes < LARGE_BYTES else min(whole_s, train_s / KEPT_FREE + whole_s / 3)
    share = min(resources.ranks_on_a_gpu, max(1, at_once))
    epoch_s = train_s + save_s, (train_s + save_s) * share
    most = float(trials * spec.max_epochs)
    epochs = (min(most, expected_epochs(spec)), most)
    at_once = max(1, min(at_once, trials))
    wall = tuple(
        max(number * each / at_once, spec.max_epochs * each, number * save_s)
        for number, each in zip(epochs, epoch_s, strict=True)
    )
    gpus = resources.workers * resources.gpu_share
    hours = tuple(number * each * gpus / HOUR_S for number, each in zip(epochs, epoch_s, strict=True))
    return Estimate(epochs, epoch_s, (wall[0], wall[1]), (hours[0], hours[1]), max(train_s * share, whole_s))


def most_trials(spec: StudySpec) -> int:
    """As many as the budget allows; a grid may have fewer points."""
    points = spec.domains.num_points if spec.sampler.name == "grid" else None
    return spec.budget.trials if points is None else min(spec.budget.trials, points)


def expected_epochs(spec: StudySpec) -> float:
    """Of all trials, by ASHA itself on trials that come in an order which says nothing of how good they are.

    A sampler that finds ever better ones has more of them go on.
    """
    trials, max_epochs, asha = most_trials(spec), spec.max_epochs, spec.scheduler
    if asha.name != "asha":
        return float(trials * max_epochs)
    played = min(trials, PLAYED_TRIALS)
    random = np.random.default_rng(0)
    epochs = 0
    for _ in range(PLAYED_STUDIES):
        scheduler = Asha(asha.grace_period, asha.reduction_factor, max_epochs, maximize=True, metric="")
        for number, value in enumerate(random.permutation(played)):
            epochs += _epochs(scheduler, number, float(value), max_epochs)
    return epochs / PLAYED_STUDIES * trials / played


def _epochs(scheduler: Asha, number: int, value: float, max_epochs: int) -> int:
    """How many epochs ASHA lets a trial run that has this value in each of them."""
    for epoch in range(1, max_epochs):
        scheduler.add(number, epoch, value)
        if scheduler.stop_reason(number, epoch) is not None:
            return epoch
    return max_epochs


def too_long(spec: StudySpec, found: Estimate) -> Check | None:
    """A trial whose epoch, or checkpoint, takes longer than a silent rank is waited for is ended again and again."""
    deadline_s = spec.faults.step_timeout_s or max(FIRST_DEADLINE_S, spec.faults.start_timeout_s)
    if found.silent_s <= deadline_s:
        return None
    told = (
        f"an epoch or a checkpoint takes {_times(found.silent_s, found.silent_s)}, and a rank that is silent for "
        f"{deadline_s:.0f} s is ended"
    )
    return Check("estimate", False, told, f"faults.step_timeout_s: {3 * found.silent_s:.0f}", code=2)


def _times(low_s: float, high_s: float) -> str:
    size, unit = (1.0, "s") if high_s < 120 else (60.0, "min") if high_s < 2 * HOUR_S else (HOUR_S, "h")
    return _range(low_s / size, high_s / size, unit)


def _range(low: float, high: float, unit: str) -> str:
    texts = [f"{value:.2g}" if value < 100 else f"{value:.0f}" for value in (low, high)]
    return f"{texts[0]} {unit}" if texts[0] == texts[1] else f"{texts[0]} to {texts[1]} {unit}"
