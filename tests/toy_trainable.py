"""Trainables for tests, each in a few lines and without torch."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from trainables import Context, Report


def counts(context: Context) -> Iterator[Report]:
    """Reports epochs 1 to max_epochs with score = x * epoch + rank; each rank saves a file of its own.

    Rank 0 does not know how much that is.
    """
    for epoch in range(1, context.max_epochs + 1):

        def save(folder: Path, epoch: int = epoch) -> None:
            (folder / f"rank-{context.rank}").write_text(str(epoch))

        print(f"rank {context.rank} at epoch {epoch}")
        score = context.params["x"] * epoch + context.rank
        yield Report(epoch, {"score": score}, save, num_bytes=10 * context.rank)


def fails(context: Context) -> Iterator[Report]:
    """Fails in epoch 2, on the rank that `params` names or on all."""
    print("reading row 7")
    yield Report(1, {"score": 0.5})
    if context.params.get("rank", context.rank) == context.rank:
        raise ValueError("row 8 is no row")
    time.sleep(600)


class UnpicklableError(Exception):
    """Holds a lock, takes two arguments and has text of two lines."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"{first}\n{second}")
        self.lock = threading.Lock()


def raises_unpicklable(context: Context) -> Iterator[Report]:
    yield Report(1, {"score": 0.5})
    raise UnpicklableError("one line", "and another")


def dies(context: Context) -> Iterator[Report]:
    """Rank 1 kills itself in epoch 2, which rank 0 sees first, as a broken connection."""
    print(f"rank {context.rank} is well")
    yield Report(1, {"score": 0.5})
    if context.rank == 1:
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGKILL)
    raise ConnectionError("connection reset by peer")


def exits(context: Context) -> Iterator[Report]:
    yield Report(1, {"score": 0.5})
    os._exit(3)


def tidies(context: Context) -> Iterator[Report]:
    try:
        yield Report(1, {"score": 0.5})
    finally:
        print("tidied")


def sleeps(context: Context) -> Iterator[Report]:
    time.sleep(60)
    yield Report(1, {"score": 0.5})


def disagrees(context: Context) -> Iterator[Report]:
    yield Report(1 + context.rank, {"score": 0.5})


def environment(context: Context) -> Iterator[Report]:
    """What a rank was told, as the score of a dictionary: each variable in the log."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "CUDA_VISIBLE_DEVICES"):
        print(f"{name}={os.environ.get(name)}")
    print(f"{context.rank} of {context.world_size} on {context.device}")
    yield Report(1, {"score": 0.5})
