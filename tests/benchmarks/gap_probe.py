"""`finetune` with a clock: notes when a trial's first optimizer step begins and when each report is ready."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from trainables import Context, Report
from trainables.finetune import finetune
from trainables.steps import Steps


def train(context: Context) -> Iterator[Report]:
    log = Path(context.params["log"])
    epoch_of_steps = Steps.epoch
    begun = False

    def note(event: str) -> None:
        with log.open("a") as file:
            file.write(f"{time.monotonic()} {event}\n")

    def noted_epoch(steps: Steps, *arguments: Any) -> Any:
        nonlocal begun
        if not begun:
            note("first step")
            begun = True
        return epoch_of_steps(steps, *arguments)

    Steps.epoch = noted_epoch  # type: ignore[method-assign, assignment]
    try:
        settings = context.params["settings"]
        training = settings["training"] | {"learning_rate": context.params["learning_rate"]}
        for report in finetune(replace(context, settings=settings | {"training": training})):
            note("report")
            yield report
    finally:
        Steps.epoch = epoch_of_steps  # type: ignore[method-assign]
