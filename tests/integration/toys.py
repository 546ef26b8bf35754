"""Trainables of a user's own that wait where others train. They write down all they do, so that tests can tell.

No torch: a rank is ready in a second. Their checkpoints carry a number that every epoch depends on, so that a trial
which went on from the wrong one has another curve.
"""

from __future__ import annotations

import json
import math
import os
import resource
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from trainables import Context, Report

HOLD_S = 240.0
GO = "go"
"""The file that ends all waiting."""


def curve(x: float, num_epochs: int) -> list[float]:
    """The scores of a trial that nothing disturbed: the higher x, the better."""
    scores, total = [], 0.0
    for epoch in range(1, num_epochs + 1):
        total = _trained(total, x, epoch)
        scores.append(total)
    return scores


def steady(context: Context) -> Iterator[Report]:
    """Reports `curve` and saves every epoch. `training` says how long an epoch takes and what goes wrong."""
    total, epoch = 0.0, 0
    if context.resume_from is not None:
        state = json.loads((context.resume_from / f"state-{context.rank}.json").read_text())
        total, epoch = state["total"], state["epoch"]
    _note(context, "begin", epoch)
    while epoch < context.max_epochs:
        epoch += 1
        _note(context, "epoch", epoch)
        print(f"epoch {epoch} of x={context.params['x']}")
        _go_wrong(context, epoch)
        time.sleep(context.params.get("epoch_s", 0.1))
        total = _trained(total, context.params["x"], epoch)
        metrics = {"score": total, "train_loss": 1.0 / epoch} | _not_finite(context, epoch)
        _note(context, "report", epoch)
        state, num_bytes = {"total": total, "epoch": epoch}, context.params.get("ballast_bytes", 0)
        yield Report(epoch, metrics, save=partial(_save, context.rank, state, num_bytes))
    _note(context, "end", epoch)


def heavy(context: Context) -> Iterator[Report]:
    """As `steady`, but its checkpoints are large and take two seconds."""
    for report in steady(context):
        yield Report(report.epoch, report.metrics, save=partial(_save_heavily, report))


def _save_heavily(report: Report, folder: Path) -> None:
    assert report.save is not None
    time.sleep(2.0)
    report.save(folder)


def crowded(context: Context) -> Iterator[Report]:
    """As `steady`, on a GPU that takes as many trials as `gpu_takes` says: more at once are so slow that together they
    get less done. Writes down which GPU it was given."""
    folder = Path(context.params["notes"])
    (folder / f"card-{context.params['x']}").write_text(os.environ["CUDA_VISIBLE_DEVICES"])
    here = folder / f"trains-{context.params['x']}"
    here.touch()
    for report in steady(context):
        over = len(list(folder.glob("trains-*"))) / context.params["gpu_takes"] - 1
        time.sleep(2 * context.params["epoch_s"] * max(0.0, over))
        if report.epoch == context.max_epochs:
            here.unlink()
        yield report


def forgetful(context: Context) -> Iterator[Report]:
    """As `steady`, but never saves."""
    for report in steady(context):
        yield Report(report.epoch, report.metrics)


def hopeless(context: Context) -> Iterator[Report]:
    """Always fails, after it has said something."""
    print(f"the oven of rank {context.rank} is cold")
    _note(context, "epoch", 1)
    raise RuntimeError(f"no bread at {context.params['x']}")
    yield Report(1, {})


def odd(context: Context) -> Any:
    """Breaks the contract in the way that the parameter `way` names."""
    match context.params["way"]:
        case "nothing":
            return None
        case "text":
            return iter(["epoch 1"])
        case "silent":
            return iter(())
        case "other metric":
            return iter([Report(1, {"loss": 0.5, "f1": 0.25})])
        case "epoch 0":
            return iter([Report(0, {"score": 0.5})])
        case "epoch twice":
            return iter([Report(1, {"score": 0.5}), Report(1, {"score": 0.5})])
        case "two minds":
            return iter([Report(1 + context.rank, {"score": 0.5})])
        case "word for number":
            return iter([Report(1, {"score": "good"})])  # type: ignore[dict-item]
    return iter([Report(1, {"score": 0.75})])


@dataclass(frozen=True)
class Note:
    """One thing that a rank did."""

    event: str
    """begin (epoch: the one it goes on from), epoch (begins), hold (it waits), report (is over), end."""
    x: float
    rank: int
    epoch: int
    pid: int
    at: float


def read_notes(folder: Path) -> list[Note]:
    """All notes so far, in the order in which they were written."""
    try:
        lines = (folder / "notes.jsonl").read_text().splitlines()
    except FileNotFoundError:
        return []
    return [Note(**json.loads(line)) for line in lines]


def _trained(total: float, x: float, epoch: int) -> float:
    return total / 2 + x + epoch / 100


def _not_finite(context: Context, epoch: int) -> dict[str, float]:
    """The metric that `diverge` of `training` names for this moment."""
    wrong = {"score": math.nan, "train_loss": math.inf}
    here = {"x": context.params["x"], "epoch": epoch}
    return {
        each["metric"]: wrong[each["metric"]]
        for each in context.params.get("diverge", ())
        if each.items() >= here.items()
    }


def _save(rank: int, state: dict[str, Any], num_bytes: int, folder: Path) -> None:
    (folder / f"state-{rank}.json").write_text(json.dumps(state))
    (folder / f"ballast-{rank}").write_bytes(bytes(num_bytes))


def _note(context: Context, event: str, epoch: int) -> None:
    path = Path(context.params["notes"]) / "notes.jsonl"
    note = {"event": event, "x": context.params["x"], "rank": context.rank, "epoch": epoch}
    line = json.dumps(note | {"pid": os.getpid(), "at": time.time()}) + "\n"
    with path.open("a") as file:  # one write: ranks append at the same time
        file.write(line)


def _go_wrong(context: Context, epoch: int) -> None:
    """What `faults` of `training` says of this moment, once: after a restart all is well."""
    for fault in context.params.get("faults", ()):
        if (fault["x"], fault["epoch"], fault.get("rank", 0)) != (context.params["x"], epoch, context.rank):
            continue
        marker = Path(context.params["notes"]) / f"done-{context.params['x']}-{epoch}-{context.rank}"
        if marker.exists():
            continue
        marker.touch()
        print(f"rank {context.rank} is about to {fault['does']}", flush=True)
        match fault["does"]:
            case "raise":
                raise ValueError("an egg was bad")
            case "exit":
                os._exit(1)
            case "eat":
                _eat()
            case "hold":
                _note(context, "hold", epoch)
                end = time.monotonic() + HOLD_S
                while not (Path(context.params["notes"]) / GO).exists() and time.monotonic() < end:
                    time.sleep(0.05)


def _eat() -> None:
    """Needs more memory than this process may have: a real allocation that fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (2**32, hard))
    try:
        bytearray(2**36)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
