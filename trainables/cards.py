"""Which GPU a process takes, where several processes share each of several. Ray fills one before it begins the next."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Sequence
from contextlib import suppress
from itertools import count
from pathlib import Path


def take_card(cards: Sequence[str], folder: Path) -> str:
    """The one that the fewest have taken: this process's for as long as it lives. `folder`: the same for all of them.

    A lock file stands for each place on each GPU, for a lock ends with its process, however that ends.
    """
    for place in count():
        for number, card in enumerate(cards):
            descriptor = os.open(folder / f"gpu-{number}-{place}", os.O_WRONLY | os.O_CREAT, 0o600)
            with suppress(BlockingIOError):
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return card  # the descriptor stays open
            os.close(descriptor)
    raise AssertionError("count never ends")
