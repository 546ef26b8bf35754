"""A trainable that waits or works an epoch and saves a checkpoint of a given size, with a clock beside it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from trainables import Context, Report

MB = 1_000_000
PARTS = 3
"""Files of a checkpoint, as finetune's: the weights, and an optimizer's state of twice their size."""


@lru_cache(maxsize=1)
def tensors(num_bytes: int) -> dict[str, np.ndarray]:
    return {"weights": np.random.default_rng(0).random(max(1, num_bytes // 8))}  # random: no disk makes it small


def save(folder: Path, num_bytes: int) -> None:
    for part in range(PARTS):
        save_file(tensors(num_bytes // PARTS), folder / f"part-{part}.safetensors")


def train(context: Context) -> Iterator[Report]:
    params = context.params
    num_bytes = int(params["checkpoint_mb"] * MB)
    tensors(num_bytes // PARTS)

    def note(event: str, epoch: int) -> None:
        with Path(params["log"]).open("a") as file:
            file.write(f"{time.time()} {event} {epoch}\n")

    def noted_save(folder: Path) -> None:
        note("save", epoch)
        save(folder, num_bytes)
        note("saved", epoch)

    for epoch in range(1, context.max_epochs + 1):
        note("begin", epoch)
        end = time.perf_counter() + params["epoch_s"]
        if params["busy"]:
            while time.perf_counter() < end:
                pass
        else:
            time.sleep(params["epoch_s"])
        note("end", epoch)
        yield Report(epoch, {"score": params["x"] * epoch}, save=noted_save)
