"""What a trainable is given and what it yields."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Report:
    """The end of one epoch on one rank."""

    epoch: int
    """Counted from 1, over restarts too."""
    metrics: Mapping[str, float]
    save: Callable[[Path], None] | None = None
    """Writes the checkpoint of this moment into a folder it is given. Called on every rank, before the next epoch is
    asked for; ranks share the folder, so each names its own files. No links, and no `manifest.json` beside them."""
    save_model: Callable[[Path], None] | None = None
    """Writes only what is handed out when this epoch is the best, a part of what `save` writes: no trial goes on from
    it. Called in the place of `save` where that takes long. Without it a checkpoint is always the whole one."""
    num_bytes: int = 0
    """About what `save` writes, on all ranks together; 0: nobody knows before. It tells which to write first where both
    ways to save are given."""


@dataclass(frozen=True)
class Context:
    """What one rank of one trial knows of itself."""

    params: dict[str, Any]
    """The sampled values, and what the spec's `training` names."""
    rank: int = 0
    world_size: int = 1
    device: str = "cpu"
    """`cuda` when the rank owns (a share of) a GPU, which is then the only one it sees; else `cpu`."""
    resume_from: Path | None = None
    """A folder that `Report.save` wrote, to go on after its epoch; None: begin at epoch 1."""
    seed: int = 42
    max_epochs: int = 9
    settings: dict[str, Any] = field(default_factory=dict)
    """The spec's `model`, `data` and `training` sections for `finetune`; empty for a trainable of the user's own."""


Trainable = Callable[[Context], Iterator[Report]]
