"""The one study of the product and its peers: given configurations, each with all its epochs, on the same rows."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

BATCH, MAX_LENGTH, SEED, CPU_ROWS = 32, 128, 42, 1024
WEIGHT_DECAYS = (0.0, 0.1)
TINY = {"model_type": "gpt2", "n_layer": 2, "n_embd": 128, "n_head": 4, "n_positions": MAX_LENGTH}


@dataclass(frozen=True)
class Study:
    """A file hands it from process to process."""

    folder: str
    """Everything that the contender writes lies here."""
    tokenizer: str
    data: str
    """A folder with train and validation of MRPC."""
    trials: int
    epochs: int
    gpu: bool
    concurrent: int
    """Trials at a time, where the contender leaves a choice."""

    @staticmethod
    def read(file: str) -> Study:
        return Study(**json.loads(Path(file).read_text()))

    def write(self) -> Path:
        file = Path(self.folder) / "study.json"
        file.write_text(json.dumps(asdict(self)))
        return file

    @property
    def learning_rates(self) -> list[float]:
        count = self.trials // len(WEIGHT_DECAYS)
        return [float(f"{1e-5 * 50 ** (place / max(1, count - 1)):.3g}") for place in range(count)]

    @property
    def grid(self) -> dict[str, list[float]]:
        return {"learning_rate": self.learning_rates, "weight_decay": list(WEIGHT_DECAYS)}

    @property
    def spec(self) -> dict[str, Any]:
        """What the product is told; `model`, `data` and `training` are the peers' too."""
        return {
            "name": "peers",
            "model": {"name": self.tokenizer, "from_scratch": True, "config": {} if self.gpu else TINY},
            "data": {"task": "mrpc", "path": self.data},
            "training": {
                "max_epochs": self.epochs,
                "batch_size": BATCH,
                "max_length": MAX_LENGTH,
                "learning_rate": self.learning_rates[0],
                "weight_decay": WEIGHT_DECAYS[0],
                "warmup_fraction": 0.0,  # this and linear are the Trainer's defaults
                "schedule": "linear",
                "precision": "bf16" if self.gpu else "fp32",
                "seed": SEED,
            },
            "search_space": {name: {"choice": values} for name, values in self.grid.items()},
            "sampler": {"name": "grid"},
            "scheduler": {"name": "none"},
            "budget": {"trials": self.trials, "concurrent_trials": self.concurrent},
            "resources": {"workers": 1, "gpus_per_worker": 1 / self.concurrent if self.gpu else 0},
        }


@dataclass(frozen=True)
class Ran:
    """One trial of a contender."""

    learning_rate: float
    weight_decay: float
    ended: float
    """time.time() of its last report."""
    epoch_s: list[float]
    """Training and evaluation, without the checkpoint."""
    accuracy: float
    """Of the last epoch, as the losses."""
    eval_loss: float
    train_loss: float

    def note(self, study: Study) -> None:
        """One line to the file that all processes of a contender write."""
        descriptor = os.open(Path(study.folder) / "trials.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        os.write(descriptor, (json.dumps(asdict(self)) + "\n").encode())
        os.close(descriptor)


def noted(study: Study) -> list[Ran]:
    file = Path(study.folder) / "trials.jsonl"
    return [Ran(**json.loads(line)) for line in file.read_text().splitlines()] if file.exists() else []
