"""A trainable that only waits: what is left is the service's own time."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

from trainables import Context, Report


def train(context: Context) -> Iterator[Report]:
    if "log" in context.params:  # when which process began a trial
        with Path(context.params["log"]).open("a") as log:
            log.write(f"{time.time()} {os.getpid()}\n")
    for epoch in range(1, context.max_epochs + 1):
        time.sleep(context.params["epoch_s"])
        yield Report(epoch, {"score": context.params["x"] * epoch})
