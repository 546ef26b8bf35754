"""Which GPU a process takes, where several processes share each of several. Ray fills one before it begins the next."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

TURN_S = 2.0


def take_card(cards: Sequence[str], folder: Path) -> str:
    """The one that the fewest have taken: this process's for as long as it lives. `folder`: the same for all of them.

    A lock file stands for each place on each GPU, for a lock ends with its process, however that ends.
    """
    with _turn(folder):
        while True:
            places = [_places(folder, number) for number in range(len(cards))]
            number = min(range(len(cards)), key=lambda number: places[number].count(False))
            free = places[number].index(True) if True in places[number] else len(places[number])
            if _takes(folder / f"gpu-{number}-{free}"):
                return cards[number]


def _takes(path: Path) -> bool:
    """Takes a place, for as long as this process lives; not one that somebody has."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return False
    return True


def is_crowded(own: str, cards: Sequence[str], folder: Path) -> bool:
    """Whether another GPU has at least two processes fewer than this process's own: it were better there."""
    with _turn(folder):
        taken = [_places(folder, number).count(False) for number in range(len(cards))]
    return taken[cards.index(own)] >= min(taken) + 2


@contextmanager
def _turn(folder: Path) -> Iterator[None]:
    """One process at a time looks at the places, for a look takes them for a moment.

    Whoever is longer at it is frozen, most likely, and is not waited for: a look beside another may count a place too
    much.
    """
    with (folder / "gpus").open("w") as turn:
        end = time.monotonic() + TURN_S
        while time.monotonic() < end:
            with suppress(BlockingIOError):
                fcntl.flock(turn, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            time.sleep(0.005)
        yield


def _places(folder: Path, number: int) -> list[bool]:
    """Of each place that there ever was on a GPU, whether it is free."""
    return [_is_free(folder / f"gpu-{number}-{place}") for place in range(len(list(folder.glob(f"gpu-{number}-*"))))]


def _is_free(path: Path) -> bool:
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True
