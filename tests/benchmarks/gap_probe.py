"""`finetune` with a clock: notes when a trial's first optimizer step begins and when each report is ready."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from trainables import Context, Report
from trainables.finetune import Run, finetune


def train(context: Context) -> Iterator[Report]:
    log = Path(context.params["log"])
    train_step = Run._train_step
    begun = False

    def note(event: str) -> None:
        with log.open("a") as file:
            file.write(f"{time.monotonic()} {event}\n")

    def noted_step(run: Run, batch: Any) -> Any:
        nonlocal begun
        if not begun:
            note("first step")
            begun = True
        return train_step(run, batch)

    Run._train_step = noted_step  # type: ignore[method-assign]
    try:
        settings = context.params["settings"]
        training = settings["training"] | {"learning_rate": context.params["learning_rate"]}
        for report in finetune(replace(context, settings=settings | {"training": training})):
            note("report")
            yield report
    finally:
        Run._train_step = train_step  # type: ignore[method-assign]
