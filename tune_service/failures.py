"""How often trials have failed under this driver, and whether they are tried once more. Pure."""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tune_service.spec import FaultSpec

MAX_IN_VAIN = 10
"""So many supervisors may be lost before one takes a trial; then it is that none can be started."""


class Failures:
    """Counts. `restarts` of the record counts resumes too, which are no fault."""

    def __init__(self, spec: FaultSpec) -> None:
        self._spec = spec
        self._faults: Counter[int] = Counter()
        self._in_vain: Counter[int] = Counter()
        self._alike: Counter[str] = Counter()

    def may_restart(self, number: int) -> bool:
        """Counts one more failure of a trial. Whether it is started again."""
        self._faults[number] += 1
        return self._faults[number] <= self._spec.restarts_per_trial

    def may_hand_on(self, number: int) -> bool:
        """A supervisor died before it took the trial: an idle one, most likely, and no fault of the trial's."""
        self._in_vain[number] += 1
        return self._in_vain[number] <= MAX_IN_VAIN

    def too_many_alike(self, reason: str) -> int | None:
        """Counts a trial that failed for good. How many have failed like it, when that ends the study."""
        kind = alike(reason)
        self._alike[kind] += 1
        return self._alike[kind] if self._alike[kind] >= self._spec.same_error_limit else None


def alike(reason: str) -> str:
    """The same for two reasons that differ by their numbers alone."""
    return re.sub(r"0x[0-9a-f]+|\d+", "#", first_line(reason))


def first_line(reason: str) -> str:
    return next((line for line in reason.splitlines() if line.strip()), "")
