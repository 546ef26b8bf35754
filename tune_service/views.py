"""A study that is followed from another process: only what has changed travels."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

from tune_service.status import Moment, StudyStatus, StudyView, TrialStatus

BLOCK = 50
"""Trials that are known together: for a study of 10,000 the other side is told 200 digests of what is known."""


class ViewNews:
    """The side that sees the study: what is new since the last look."""

    def __init__(self, known: Sequence[str] = ()) -> None:
        """`known`: the digests of what the other side has from before."""
        self._known = known
        self._trials: list[TrialStatus] | None = None
        self._rest: dict[str, Any] = {}

    def of(self, view: StudyView) -> dict[str, Any] | None:
        """The trials that have changed, and the rest of `status` with what only displays need. None: nothing is new."""
        status = view.status()
        before, self._trials = self._trials, list(status.trials)
        if before is None:
            changed = self._unknown(self._trials)
        else:
            changed = [trial for number, trial in enumerate(self._trials) if [trial] != before[number : number + 1]]
        rest = {
            "status": status.model_copy(update={"trials": ()}).to_json(),
            "budget_trials": view.budget_trials,
            "baseline": view.baseline,
            "notice": view.notice,
            "num_trials": len(self._trials),
        }
        if before is not None and not changed and rest == self._rest:
            return None
        self._rest = rest
        return rest | {"trials": [trial.model_dump(mode="json") for trial in changed]}

    def _unknown(self, trials: Sequence[TrialStatus]) -> list[TrialStatus]:
        blocks = [trials[start : start + BLOCK] for start in range(0, len(trials), BLOCK)]
        new = [block for block, known in zip_longest(blocks, self._known) if block and _digest(block) != known]
        return [trial for block in new for trial in block]


class FarStudy:
    """The side that is told: puts together what comes."""

    def __init__(self) -> None:
        self._trials: list[TrialStatus] = []

    def known(self) -> list[str]:
        """Digests of what is known, for `ViewNews`."""
        starts = range(0, len(self._trials), BLOCK)
        return [_digest(self._trials[start : start + BLOCK]) for start in starts]

    def take(self, document: Mapping[str, Any]) -> FarView:
        del self._trials[document["num_trials"] :]  # a study of this name that was deleted may have had more
        for raw in document["trials"]:
            trial = TrialStatus.model_validate_json(json.dumps(raw))
            number = trial.number
            if number == len(self._trials):
                self._trials.append(trial)
            elif self._trials[number] != trial:  # one that is as it was stays the same object
                self._trials[number] = trial
        return FarView(status_of(document).model_copy(update={"trials": tuple(self._trials)}), document)


class FarView:
    """A view that came from another process."""

    def __init__(self, status: StudyStatus, document: Mapping[str, Any]) -> None:
        self._status = status
        self.objective = status.objective
        self.budget_trials: int = document["budget_trials"]
        self.baseline: float | None = document["baseline"]
        self.notice: str | None = document["notice"]

    def trials(self) -> list[TrialStatus]:
        return list(self._status.trials)

    def changed(self, since: Moment) -> tuple[list[TrialStatus], Moment]:
        now = self._status.trials
        return [trial for number, trial in enumerate(now) if number >= len(since) or trial is not since[number]], now

    def status(self) -> StudyStatus:
        return self._status


def status_of(document: Mapping[str, Any]) -> StudyStatus:
    """The status in a document of another process."""
    return StudyStatus.model_validate_json(json.dumps(document["status"] | {"notice": document["notice"]}))


def _digest(trials: Sequence[TrialStatus]) -> str:
    text = json.dumps([trial.model_dump(mode="json") for trial in trials])
    return hashlib.sha256(text.encode()).hexdigest()[:16]
