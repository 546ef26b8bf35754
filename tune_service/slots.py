"""How many trials a study runs at once, when that changes: a cluster grows, studies share it, trials share a GPU."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

from tune_service.place import Session, Usage

WAITS_S = 10.0
"""A trial that has had no room for so long is said to wait."""


class Slots:
    """The study's slots, and the worker groups that Tune keeps warm in them."""

    def __init__(
        self,
        session: Session,
        num_running: Callable[[], int],
        wants: Callable[[], int],
        most: Callable[[], float] = lambda: math.inf,
    ) -> None:
        """`num_running`: trials that have a worker group; `wants`: trials that could run now; `most`: as many as may,
        whatever room there is."""
        self._session = session
        self._num_running, self._wants, self._most = num_running, wants, most
        self._cache: Any = None
        self._kind: Any = None
        self._width = 0
        self._waits_since: float | None = None

    def number(self) -> int:
        """How many trials may run at once."""
        return int(min(self._session.slots(self._usage()), self._most()))

    def widen(self, cache: Any, kind: Any) -> None:
        """Takes charge of Tune's cache of idle actors of one kind. There is no public setting for its width.

        Tune keeps one. When two trials end together, the second one's warm worker group would be ended, and started
        again seconds later.
        """
        if self._cache is None:
            self._cache, self._kind = cache, kind
            self.settle()

    def settle(self) -> None:
        """Keeps as many worker groups warm as there are slots; with fewer slots than before, lets idle ones go."""
        if self._cache is None:
            return
        number, usage = self.number(), self._usage()
        is_within = usage.running <= number
        width = number if is_within else max(0, number - self._num_running())
        self._cache.increase_max(self._kind, width - self._width)
        self._cache._may_keep_one = is_within
        self._width = width

    def notice(self, num_open: int) -> str | None:
        """What keeps trials waiting, in words. `num_open`: trials that were handed to Tune and have no end."""
        now = time.monotonic()
        if num_open <= self._num_running():
            self._waits_since = None
        elif self._waits_since is None:
            self._waits_since = now
        return self._session.notice(self._waits_since is not None and now - self._waits_since > WAITS_S)

    def failed(self, reason: str) -> None:
        """A trial failed."""
        self._session.failed(reason)

    def _usage(self) -> Usage:
        idle = self._cache.num_cached_objects if self._cache is not None else 0
        return Usage(running=self._num_running() + idle, wants=self._wants())
