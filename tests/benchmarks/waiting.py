"""A trainable that only waits: what is left is the service's own time."""

from __future__ import annotations

import time
from collections.abc import Iterator

from trainables import Context, Report


def train(context: Context) -> Iterator[Report]:
    for epoch in range(1, context.max_epochs + 1):
        time.sleep(context.params["epoch_s"])
        yield Report(epoch, {"score": context.params["x"] * epoch})
