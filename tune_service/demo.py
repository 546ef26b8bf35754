"""A small real study that needs no network, no GPU and no data set of others: what `make demo` runs."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tokenizers import Tokenizer, models, pre_tokenizers

from trainables.errors import Problem
from tune_service.best import export_best
from tune_service.check import refuse_faulty
from tune_service.errors import CommandError
from tune_service.machine import this_machine
from tune_service.spec import parse_spec
from tune_service.status import Display, StudyStatus
from tune_service.storage import Storage
from tune_service.study import run_study

NAME = "demo"
GOOD = (
    "bold brave bright calm clever crisp deep fine fresh funny gentle grand kind lively lovely neat quick rich sharp "
    "smart smooth strong sweet tender true vivid warm wise witty wonderful"
).split()
BAD = (
    "awful bland bleak boring clumsy cold crude dark dreary dull empty false flat grim harsh hollow lame lazy loud "
    "messy pale poor sad shallow slow stale tired ugly weak wooden"
).split()
PARTS = "acting camera dialogue ending light music plot script sound story".split()


@dataclass(frozen=True)
class DemoResult:
    status: StudyStatus
    summary: str
    """What the best model scores when it is opened, and where it lies."""


def run_demo(storage: Storage, display: Display) -> DemoResult:
    """Makes data and a tokenizer, runs 16 trials, exports the best model and opens it with `from_pretrained`.

    CommandError when the model does not score what the study says of it.
    """
    storage.check_free(NAME)
    inputs = storage.root / "demo-inputs"
    write_pairs(inputs / "data")
    write_tokenizer(inputs / "tokenizer")
    spec = parse_spec(demo_spec(inputs), inputs)
    refuse_faulty(spec, storage, this_machine())
    status = run_study(spec, storage, display)
    if status.best is None:
        return DemoResult(status, "the demo has no best trial")
    out = storage.root / "demo-best"
    number = 2
    while out.exists():
        out, number = storage.root / f"demo-best-{number}", number + 1
    best = export_best(NAME, out, storage)
    accuracy = score(out / "model", inputs / "data")
    if abs(accuracy - best.value) > 1e-6:
        found = f"the exported model has accuracy {accuracy}, the study says {best.value}"
        raise CommandError(Problem(str(out), "scores what the study says", found, "equal values"))
    summary = f"opened with from_pretrained: accuracy {accuracy:.4f} on the validation rows\nbest model: {out}"
    return DemoResult(status, summary)


def demo_spec(inputs: Path) -> dict[str, Any]:
    """A GPT-2 of 2 layers from scratch, 16 trials of at most 6 epochs."""
    return {
        "name": NAME,
        "model": {
            "name": str(inputs / "tokenizer"),
            "from_scratch": True,
            "config": {"model_type": "gpt2", "n_layer": 2, "n_embd": 64, "n_head": 2, "n_positions": 64},
        },
        "data": {"path": str(inputs / "data"), "text": ["sentence1", "sentence2"]},
        "training": {"max_epochs": 6, "batch_size": 32, "max_length": 32, "learning_rate": 2e-4, "precision": "fp32"},
        "search_space": {
            "learning_rate": {"log_uniform": [1e-4, 1e-2]},
            "batch_size": {"choice": [8, 16, 32]},
            "weight_decay": {"uniform": [0.0, 0.1]},
            "model.config.dropout": {"uniform": [0.0, 0.2]},
        },
        "budget": {"trials": 16},
        "resources": {"workers": 1, "gpus_per_worker": 0},
    }


def write_pairs(folder: Path, num_train: int = 768, num_validation: int = 256, seed: int = 7) -> None:
    """Titles and reviews of films as parquet: label 1 when the five words of praise or blame in both are mostly praise.

    A model has to learn 60 words and to weigh them over both texts: not in one epoch, but in a few.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for split, size in (("train", num_train), ("validation", num_validation)):
        first, second, labels = zip(*(_pair(rng) for _ in range(size)), strict=True)
        columns: dict[str, Any] = {"sentence1": first, "sentence2": second, "label": labels}
        pq.write_table(pa.table(columns), folder / f"{split}.parquet")


def _pair(rng: np.random.Generator) -> tuple[str, str, int]:
    praise = rng.integers(2, size=5)
    words = [str(rng.choice(GOOD if good else BAD)) for good in praise]
    parts = [str(part) for part in rng.choice(PARTS, size=3, replace=False)]
    first = f"a {words[0]} and {words[1]} film"
    second = f"the {parts[0]} is {words[2]} the {parts[1]} {words[3]} and the {parts[2]} {words[4]}"
    return first, second, int(praise.sum() > 2)


def write_tokenizer(folder: Path) -> None:
    """A tokenizer with one token a word, as Hugging Face folders have it."""
    folder.mkdir(parents=True, exist_ok=True)
    words = ["[UNK]", "[PAD]", "[SEP]", "a", "and", "film", "the", "is", *GOOD, *BAD, *PARTS]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "[UNK]", "pad_token": "[PAD]"}
    settings["sep_token"] = "[SEP]"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


def score(model: Path, data: Path) -> float:
    """Accuracy of an exported model on a data folder's validation split, in a process of its own: it needs torch."""
    command = [sys.executable, "-m", "trainables.score", str(model), str(data), "sentence1", "sentence2"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode != 0:
        found = (run.stderr.strip().splitlines() or ["no output"])[-1]
        raise CommandError(Problem(str(model), "opens with from_pretrained", found, "a model folder"))
    return float(run.stdout)
