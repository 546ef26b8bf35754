"""How many trials share the GPUs of this machine, where the spec says `gpus_per_worker: auto`. Pure: no Ray, no clock.

Throughput is what all worker groups together finish, epochs a second, each from report to report: so checkpoints and
what lies between two trials count, and the first epoch of a group, with its process's start, does not. It is compared
at twice as many trials, as long as that gains enough. A trial's size can make more of a difference than sharing does:
eight epochs a GPU at least are behind each number.

A study that goes on after its end measures again: the machine may be another.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tune_service.spec import StudySpec
from tune_service.words import counted

START_EACH = 2
"""Trials a GPU at first. Side by side two gain on one (20 % on an H200 that one trial keeps busy); in turns they lose
little (8 % of an H100), for the one trains while the other writes a checkpoint; and they start side by side."""
GAIN = 1.1
"""So many times the throughput makes more trials worth their memory."""
MEMORY_USED = 0.9
"""Of a GPU, by all that share it, at most."""
MIN_EPOCHS = 8
"""Of all trials on one GPU together, before their throughput is believed."""
MIN_GROUP_EPOCHS = 2
"""Of each worker group."""


@dataclass
class _Lane:
    """What one worker group has finished since it was first seen at the present number."""

    since_s: float
    until_s: float
    epochs: int = 0


@dataclass
class _Shared:
    """A trial that was handed out."""

    of_largest: float
    number_at_start: int
    number_when_well: int
    """Trials at once when it last reported, or was handed out."""


class Sharing:
    """The number of trials at once. What it returns beside is a line for people, or None."""

    def __init__(self, num_gpus: int, most: int) -> None:
        """`most`: as many trials at once as CPUs and spec allow, and Ray."""
        self._num_gpus = num_gpus
        self._most = most
        self._target = min(START_EACH * num_gpus, most)
        self._base: tuple[int, float] | None = None
        """(trials at once, epochs a second), the best so far."""
        self._is_settled = False
        self._peak = 0.0
        """Share of a GPU's memory, of the trial that took most."""
        self._of_largest = 0.0
        """Of the largest trial that has reported."""
        self._trials: dict[int, _Shared] = {}
        self._bounds: dict[int, int] = {}
        """Trial that ran out of memory -> as many trials at once as may be since."""
        self._warm: set[int] = set()
        """Worker groups that have finished an epoch."""
        self._lanes: dict[int, _Lane] = {}

    @property
    def number(self) -> int:
        """How many trials may run at once, on all GPUs together."""
        number = min(self._target, self._most, *self._bounds.values())
        if not self._peak:
            return number
        each = max(1, math.floor(MEMORY_USED / self._need + 1e-9))
        return min(number, each * self._num_gpus)

    @property
    def _need(self) -> float:
        """Share of a GPU's memory of the largest trial there may be: at most, for weights do not grow with batches."""
        return self._peak / self._of_largest

    def handed_out(self, trial: int, of_largest: float = 1.0) -> None:
        """`of_largest`: the trial's size, over that of the largest there may be."""
        self._trials[trial] = _Shared(of_largest, self.number, self.number)

    def reported(self, trial: int, group: int, now_s: float, memory_share: float) -> str | None:
        """A trial has finished an epoch in the worker group. `memory_share`: what that took at most; 0: no GPU."""
        before, shared = self.number, self._trials[trial]
        self._peak = max(self._peak, memory_share)
        self._of_largest = max(self._of_largest, shared.of_largest)
        number = shared.number_when_well = self.number
        if number != before:
            self._lanes = {}
            return (
                f"{self._share(number)} from now on: the largest may take {min(1.0, self._need):.0%} of a GPU's memory"
            )
        return None if self._is_settled else self._measure(group, now_s)

    def lost(self, group: int) -> None:
        """The worker group was ended: its next epoch is a first one again."""
        self._warm.discard(group)
        self._lanes = {}

    def ran_out(self, trial: int) -> str | None:
        """The trial ran out of memory, and its group was `lost`. None: by itself; else it is to be tried again."""
        shared, number = self._trials[trial], self.number
        if max(shared.number_at_start, number) <= self._num_gpus:
            self._bounds.pop(trial, None)  # it was this trial, not that there were others
            return None
        fewer = self._num_gpus * max(1, math.ceil(number / self._num_gpus) - 1)
        # The number may be lower already, for another that ran out at the same time.
        self._bounds[trial] = fewer if shared.number_when_well <= number else number
        return f"{self._share(self.number)} from now on: trial {trial} ran out of memory and is tried again"

    def _measure(self, group: int, now_s: float) -> str | None:
        number = self.number
        is_one_too_many = group not in self._lanes and len(self._lanes) >= number
        if group not in self._warm or is_one_too_many:
            self._warm.add(group)
            self._lanes = {}
        lane = self._lanes.get(group)
        if lane is None:
            self._lanes[group] = _Lane(now_s, now_s)
            return None
        lane.until_s, lane.epochs = now_s, lane.epochs + 1
        lanes = self._lanes.values()
        is_enough = sum(lane.epochs for lane in lanes) >= MIN_EPOCHS * self._num_gpus
        if len(lanes) < number or not is_enough or min(lane.epochs for lane in lanes) < MIN_GROUP_EPOCHS:
            return None
        return self._conclude(number, sum(lane.epochs / max(1e-9, lane.until_s - lane.since_s) for lane in lanes))

    def _conclude(self, number: int, per_s: float) -> str | None:
        self._lanes = {}
        base, told = self._base, f"{self._share(number)}: {per_s:.3g} epochs/s"
        if base is not None and number > base[0]:
            if per_s < GAIN * base[1]:
                self._target, self._is_settled = base[0], True
                return f"{self._share(base[0])}: {base[1]:.3g} epochs/s, with {number} it was {per_s:.3g}"
            told += f", with {base[0]} it was {base[1]:.3g}"
        self._base = number, per_s
        self._target = min(2 * number, self._most)
        self._is_settled = number == self._most
        if self.number > number:
            return f"{told}; trying {self.number}"
        return None if base is not None and number == base[0] else told

    def _share(self, number: int) -> str:
        gpus = "the GPU" if self._num_gpus == 1 else f"{self._num_gpus} GPUs"
        return f"{counted(number, 'trial')} {'share' if number > 1 else 'has'} {gpus}"


def of_largest(spec: StudySpec, params: Mapping[str, Any]) -> float:
    """Rows x tokens of a forward pass with these parameters, over those of the search space's largest."""
    return _size(spec, params) / _size(spec, spec.largest_params()) if spec.is_finetune else 1.0


def _size(spec: StudySpec, params: Mapping[str, Any]) -> int:
    training = spec.trial_settings().with_params(dict(params)).training
    return min(training.batch_size, training.micro_batch_size or training.batch_size) * training.max_length
