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
    last: bool
    """It is the trial's newest, from which the trial would go on."""
    value: float | None
    """The trial's best objective, on the checkpoint of that epoch; None on every other."""


def to_delete(kept: Sequence[Kept], sign: float, budget_bytes: int) -> list[tuple[int, int]]:
    """(trial, epoch) of the checkpoints to delete, in that order. `sign` is 1 for maximising, -1 for minimising.

    A trial without an end keeps its last checkpoint and its best epoch's; an ended one its best epoch's. When these
    and one more checkpoint for each trial that may be saving take more than the budget, the worst go first. The last
    ones of trials without an end, the best of all, and the best of those that ended, always stay.
    """
    unneeded = [one for one in kept if one.value is None and not (one.open and one.last)]
    gone = [(one.trial, one.epoch) for one in unneeded]
    needed = [one for one in kept if (one.trial, one.epoch) not in set(gone)]
    largest = max((one.num_bytes for one in needed), default=0)
    room = budget_bytes - largest * len({one.trial for one in needed if one.open})
    total = sum(one.num_bytes for one in needed)

    def quality(one: Kept) -> float:
        return sign * one.value if one.value is not None else -math.inf

    def best_of(some: Sequence[Kept]) -> Kept | None:
        return max(some, key=lambda one: (quality(one), -one.trial), default=None)

    # A trial without an end may still fail, and then the best is one that ended.
    best = (best_of(needed), best_of([one for one in needed if not one.open]))
    spare = [one for one in needed if one not in best and not (one.open and one.last)]
    for one in sorted(spare, key=quality):
        if total <= room:
            break
        gone.append((one.trial, one.epoch))
        total -= one.num_bytes
    return gone
