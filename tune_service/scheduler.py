"""When a trial stops early: ASHA's arithmetic, pure."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from itertools import count, takewhile

from tune_service.status import TrialStatus, diverged_in


def rungs(grace_period: int, reduction_factor: float, max_epochs: int) -> list[int]:
    """Epochs at which trials are compared: [1, 3] for grace period 1, factor 3 and 9 epochs."""
    points = (math.ceil(grace_period * reduction_factor**k) for k in count())
    # A factor near 1 names the same epoch more than once.
    return sorted(set(takewhile(lambda point: point < max_epochs, points)))


@dataclass
class Asha:
    """Asynchronous successive halving, the variant that stops and never pauses (Li et al. 2020, arXiv:1810.05934).

    Compares trials by epoch, each at the last rung that its report has come to. The values are a view of the record.
    """

    grace_period: int
    reduction_factor: float
    max_epochs: int
    maximize: bool
    metric: str
    _values: dict[int, dict[int, float]] = field(default_factory=lambda: defaultdict(dict))
    """Rung -> trial number -> objective at the report with which it came there, as the last rung on its way."""
    _epochs: dict[int, list[int]] = field(default_factory=lambda: defaultdict(list))
    """Trial number -> epochs of its reports, in order."""

    def refill(self, trials: Iterable[TrialStatus]) -> None:
        """Takes the values of a study that goes on."""
        for trial in trials:
            for report in trial.reports:
                value = report.metrics.get(self.metric)
                if value is not None and diverged_in(report.metrics, self.metric) is None:
                    self.add(trial.number, report.epoch, value)

    def add(self, number: int, epoch: int, value: float) -> None:
        epochs = self._epochs[number]
        at = bisect_left(epochs, epoch)
        if at == len(epochs) or epochs[at] != epoch:
            epochs.insert(at, epoch)
        rung = self._rung(number, epoch)
        if rung is not None:
            self._values[rung][number] = value

    def stop_reason(self, number: int, epoch: int) -> str | None:
        """Why the trial stops at this epoch; None when it goes on.

        It goes on when it is among the best 1 / reduction_factor of those that came this far, rounded up, so that the
        first one at a rung always does. Equals share a rank.
        """
        rung = self._rung(number, epoch)
        if rung is None or number not in self._values[rung]:
            return None
        at_rung = self._values[rung]
        sign = 1 if self.maximize else -1
        own = sign * at_rung[number]
        rank = 1 + sum(sign * value > own for value in at_rung.values())
        if rank <= math.ceil(len(at_rung) / self.reduction_factor):
            return None
        return f"asha: epoch {epoch}, rank {rank} of {len(at_rung)}"

    def _rung(self, number: int, epoch: int) -> int | None:
        """The last rung that the trial has come to since its report before: not all report every epoch."""
        epochs = self._epochs[number]
        at = bisect_left(epochs, epoch)
        before = epochs[at - 1] if at else 0
        return max((rung for rung in self._rungs if before < rung <= epoch), default=None)

    @cached_property
    def _rungs(self) -> list[int]:
        return rungs(self.grace_period, self.reduction_factor, self.max_epochs)
