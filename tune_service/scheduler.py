"""When a trial stops early: ASHA's arithmetic, pure."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from itertools import count, takewhile

from tune_service.status import TrialStatus


def rungs(grace_period: int, reduction_factor: float, max_epochs: int) -> list[int]:
    """Epochs at which trials are compared: [1, 3] for grace period 1, factor 3 and 9 epochs."""
    points = (math.ceil(grace_period * reduction_factor**k) for k in count())
    # A factor near 1 names the same epoch more than once.
    return sorted(set(takewhile(lambda point: point < max_epochs, points)))


@dataclass
class Asha:
    """Asynchronous successive halving, the variant that stops and never pauses (Li et al. 2020, arXiv:1810.05934).

    Compares trials by epoch. The values at the rungs are a view of the record.
    """

    grace_period: int
    reduction_factor: float
    max_epochs: int
    maximize: bool
    metric: str
    _values: dict[int, dict[int, float]] = field(default_factory=dict)
    """Rung -> trial number -> objective at that epoch."""

    def refill(self, trials: Iterable[TrialStatus]) -> None:
        """Takes the values of a study that goes on."""
        for trial in trials:
            for report in trial.reports:
                value = report.metrics.get(self.metric)
                if value is not None:
                    self.add(trial.number, report.epoch, value)

    def add(self, number: int, epoch: int, value: float) -> None:
        if epoch in self._rungs:
            self._values.setdefault(epoch, {})[number] = value

    def stop_reason(self, number: int, epoch: int) -> str | None:
        """Why the trial stops at this epoch; None when it goes on.

        It goes on when it is among the best 1 / reduction_factor of those that came this far, rounded up, so that the
        first one at a rung always does. Equals share a rank.
        """
        at_rung = self._values.get(epoch, {})
        if number not in at_rung:
            return None
        sign = 1 if self.maximize else -1
        own = sign * at_rung[number]
        rank = 1 + sum(sign * value > own for value in at_rung.values())
        if rank <= math.ceil(len(at_rung) / self.reduction_factor):
            return None
        return f"asha: epoch {epoch}, rank {rank} of {len(at_rung)}"

    @cached_property
    def _rungs(self) -> list[int]:
        return rungs(self.grace_period, self.reduction_factor, self.max_epochs)
