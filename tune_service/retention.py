"""Which checkpoints go when room is short. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Kept:
    """One checkpoint that exists."""

    trial: int
    epoch: int
    num_bytes: int
    open: bool
    """The trial has no end yet."""
    stopped: bool
    """The trial was stopped early: it is needed only when it is the best one."""
    last: bool
    """It is the newest that the trial can go on from."""
    value: float | None
    """The trial's best objective, on the checkpoint of that epoch; None on every other."""


def to_delete(
    kept: Sequence[Kept], sign: float, budget_bytes: int, num_writers: int, largest_bytes: int = 0
) -> list[tuple[int, int]]:
    """(trial, epoch) of the checkpoints to delete, in that order. `sign` is 1 for maximising, -1 for minimising.

    A trial without an end keeps its last checkpoint and its best epoch's; a completed one its best epoch's; one that
    was stopped none. When these and one more for each of the `num_writers` trials that may be saving (as large as the
    largest here, or `largest_bytes`: those here may be models alone) take more than the budget, the worst go first.
    The last ones of trials without an end, the best of all, and the best of those that ended, always stay.
    """

    def quality(one: Kept) -> float:
        return sign * one.value if one.value is not None else -math.inf

    def best_of(some: Sequence[Kept]) -> Kept | None:
        valued = [one for one in some if one.value is not None]
        return max(valued, key=lambda one: (quality(one), -one.trial), default=None)

    # A trial without an end may still fail, and then the best is one that ended.
    best = (best_of(kept), best_of([one for one in kept if not one.open]))
    free = [one for one in kept if one not in best and not (one.open and one.last)]
    gone = [one for one in free if one.value is None or one.stopped]
    total = sum(one.num_bytes for one in kept) - sum(one.num_bytes for one in gone)
    room = budget_bytes - num_writers * max([largest_bytes, *(one.num_bytes for one in kept)])
    for one in sorted((one for one in free if one not in gone), key=quality):
        if total <= room:
            break
        gone.append(one)
        total -= one.num_bytes
    return [(one.trial, one.epoch) for one in gone]
