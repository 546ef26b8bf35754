"""Which checkpoints a study has, and of what worth they are; keeps them within the budget. No Ray."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from trainables.model_files import least_parameters
from trainables.stores import Checkpoints
from tune_service.retention import Kept, to_delete
from tune_service.spec import StudySpec
from tune_service.status import ObjectiveStatus, TrialState, TrialStatus, objective_value

BYTES_PER_PARAMETER = 12
"""Of a checkpoint: weights and AdamW's two moments, in fp32."""


@dataclass
class _Trial:
    """What is remembered of one trial; all of it is in the record and in the store."""

    end: TrialState | None = None
    best: float | None = None
    best_epoch: int | None = None
    """The best epoch; of a trial that saves only some epochs, the best of those."""
    sizes: dict[int, int] = field(default_factory=dict)
    """Epoch -> bytes of the checkpoints that exist."""
    resumable: set[int] = field(default_factory=set)
    """The epochs among them that the trial can go on from."""
    expected: int = 0
    """Bytes of a whole checkpoint, as far as the trial alone knows."""

    def saw(self, value: float, epoch: int, objective: ObjectiveStatus) -> None:
        if self.best is None or self.best_epoch == epoch or objective.better(value, self.best):
            self.best, self.best_epoch = value, epoch


def least_bytes(spec: StudySpec) -> int:
    """What one checkpoint of a study takes at least, optimizer state included; 0 when nothing tells."""
    if spec.model is None:
        return 0
    try:
        return least_parameters(spec.model) * BYTES_PER_PARAMETER
    except (OSError, ValueError, TypeError, KeyError):  # told by the check of the model
        return 0


def most_at_once(running: int, waiting: int) -> int:
    """Checkpoints that lie there at one moment, at most.

    A running trial keeps its last while it writes the next, a waiting one its last; and the best, of all and of those
    that have ended, stay.
    """
    return 2 * running + waiting + 2


class KeptCheckpoints:
    """The checkpoints of one study under its driver."""

    def __init__(
        self,
        store: Checkpoints,
        objective: ObjectiveStatus,
        budget_bytes: int,
        least_bytes: int,
        trials: Iterable[TrialStatus],
    ) -> None:
        """Takes up a study that goes on: what killed writers left is removed, the rest counted.

        `least_bytes`: what one checkpoint takes at least, as far as that is known before there is one.
        """
        self._store, self._objective, self._budget_bytes = store, objective, budget_bytes
        self._largest_bytes = least_bytes
        """The largest checkpoint that there was, or must be expected."""
        self._trials: dict[int, _Trial] = {}
        self.out: set[int] = set()
        """Trials that were handed out and not left since: those that may be saving."""
        self._most_out: dict[int, int] = {}
        """A trial whose checkpoint did not fit beside those of others -> as many may run for it to be tried again."""
        store.sweep()
        kept = store.kept()
        for trial in trials:
            end = trial.state if trial.ended_at is not None else None
            self._take_up(trial, end, kept.pop(trial.number, []))
        for number, epochs in kept.items():  # of trials that the record does not have
            for epoch in epochs:
                store.delete(number, epoch)

    def _take_up(self, status: TrialStatus, end: TrialState | None, epochs: list[int]) -> None:
        trial = self._trials[status.number] = _Trial(end)
        if end is None:
            trial.resumable = {epoch for epoch in epochs if self._store.resumable(status.number, epoch)}
            # What came after the one that it goes on from is trained again, and on a GPU comes out otherwise.
            doomed = [epoch for epoch in epochs if epoch > max(trial.resumable, default=0)]
            for epoch in doomed:
                self._store.delete(status.number, epoch)
            epochs = [epoch for epoch in epochs if epoch not in doomed]
        trial.sizes = {epoch: self._store.num_bytes(status.number, epoch) for epoch in epochs}
        self._largest_bytes = max([self._largest_bytes, *trial.sizes.values()])
        for report in status.reports if end != "failed" else ():
            value = objective_value(report, self._objective)
            if value is not None and (report.epoch in trial.sizes or not trial.sizes):
                trial.saw(value, report.epoch, self._objective)

    @property
    def num_trials(self) -> int:
        return len(self._trials)

    @property
    def num_ended(self) -> int:
        return sum(trial.end is not None for trial in self._trials.values())

    @property
    def has_room(self) -> bool:
        """Whether the budget lets one more trial run beside those that do."""
        waiting = sum(
            trial.end is None and bool(trial.sizes) for number, trial in self._trials.items() if number not in self.out
        )
        needed = most_at_once(len(self.out) + 1, waiting)
        most = min(self._most_out.values(), default=math.inf)
        return not self.out or (len(self.out) < most and needed * self._next_bytes <= self._budget_bytes)

    @property
    def _next_bytes(self) -> int:
        """The most that a next checkpoint may take."""
        return max([self._largest_bytes, *(self._trials[number].expected for number in self.out)])

    def too_many(self, number: int) -> bool:
        """The trial's checkpoint did not fit. Whether it may with fewer trials beside it: then it waits for that."""
        if len(self.out) < 2:
            return False
        self._most_out[number] = len(self.out) - 1
        return True

    def has_value(self, number: int) -> bool:
        """Whether the trial has reported a finite objective."""
        return self._trials[number].best is not None

    def hand_out(self, status: TrialStatus) -> None:
        """The trial begins, or goes on."""
        self.begins_again(status)
        self.out.add(status.number)
        self._retain()  # one more writer needs room

    def begins_again(self, status: TrialStatus) -> None:
        """Looks anew at what a trial has to go on from: a supervisor may have been lost just after a checkpoint."""
        self._take_up(status, None, self._store.epochs(status.number))

    def last_resumable(self, number: int) -> int | None:
        """The epoch after which the trial would go on; None: it would begin again."""
        return max(self._trials[number].resumable, default=None)

    def expect(self, number: int, num_bytes: int) -> None:
        """A whole checkpoint of the trial takes so much; before there was one, by the trial's own word."""
        self._trials[number].expected = min(num_bytes, self._budget_bytes)

    def saw(self, number: int, epoch: int, value: float, num_bytes: int | None, resumable: bool = True) -> None:
        """A report came, with a checkpoint of `num_bytes` or with none."""
        trial = self._trials[number]
        if num_bytes is not None and not trial.sizes:
            trial.best = None  # from now on only what was saved can be exported
        if math.isfinite(value) and (num_bytes is not None or not trial.sizes):
            trial.saw(value, epoch, self._objective)
        if num_bytes is not None:
            trial.sizes[epoch] = num_bytes
            self._most_out.pop(number, None)
            self._largest_bytes = max(self._largest_bytes, num_bytes)
            (trial.resumable.add if resumable else trial.resumable.discard)(epoch)
            self._retain()

    def left(self, number: int, end: TrialState | None) -> None:
        """No supervisor holds the trial any more. `end`: how it ended, None when it goes on later."""
        trial = self._trials[number]
        self.out.discard(number)
        trial.end = end
        if end is not None:
            self._most_out.pop(number, None)
        if end == "failed":
            trial.best = None  # a failed trial is never the best one
        self._retain()

    def lost(self, number: int) -> None:
        """The trial's supervisor is gone, perhaps while it wrote a checkpoint, which would take up room for nothing."""
        self._store.drop_unfinished(number)

    def _retain(self) -> None:
        """Deletes the checkpoints that nothing needs any more, and for the budget the worst."""
        kept = [
            Kept(
                trial=number,
                epoch=epoch,
                num_bytes=num_bytes,
                open=trial.end is None,
                stopped=trial.end == "pruned",
                last=epoch == max(trial.resumable, default=None),
                value=trial.best if epoch == trial.best_epoch else None,
            )
            for number, trial in self._trials.items()
            for epoch, num_bytes in trial.sizes.items()
        ]
        sign = 1.0 if self._objective.mode == "max" else -1.0
        for number, epoch in to_delete(kept, sign, self._budget_bytes, len(self.out), self._next_bytes):
            del self._trials[number].sizes[epoch]
            self._trials[number].resumable.discard(epoch)
            self._store.delete(number, epoch)
