"""Names of the files that ranks write their logs to, wherever those lie."""

from __future__ import annotations


def log_name(trial: int, rank: int) -> str:
    return f"{prefix_of(trial)}rank-{rank}.log"


def prefix_of(trial: int | None) -> str:
    """What the names of one trial's logs begin with; None: of all trials'."""
    return "trial-" if trial is None else f"trial-{trial:05d}-"


def trial_of(name: str) -> int:
    """The trial that a log is of."""
    return int(name.split("-")[1])
