"""Real studies on one GPU, through the command line, on MRPC. Prints what they reached.

    TUNE_SERVICE_TEST_DATA=DATA TUNE_SERVICE_TEST_MODELS=MODELS python tests/gpu/run_studies.py OUT [STUDY ...]

DATA holds glue/mrpc/{train,validation}.parquet and gpt2-tokenizer; MODELS holds the folders minilm and smollm2. `gpt2`
(124M, random weights: 64 trials of at most 9 epochs), `gpt2-32` (the same, with a batch of 32 for all), `auto` (24
trials of 4 epochs, as many on the card as pay) and `oom` (a batch that no card holds) need no MODELS.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

GPT2 = {"from_scratch": True, "config": {"model_type": "gpt2"}}
STUDIES: dict[str, dict[str, Any]] = {
    "gpt2": {
        "model": GPT2,
        "training": {"max_epochs": 9, "batch_size": 32},
        "search_space": "gpt2",
        "budget": {"trials": 64},
        "checkpoints": {"budget_gib": 40},
        "resources": {"workers": 1, "gpus_per_worker": 0.25, "cpus_per_worker": 2},
    },
    "gpt2-32": {
        "model": GPT2,
        "training": {"max_epochs": 9, "batch_size": 32},
        "search_space": {
            "learning_rate": {"log_uniform": [1e-5, 2e-4]},
            "weight_decay": {"uniform": [0.0, 0.1]},
            "warmup_fraction": {"uniform": [0.0, 0.1]},
        },
        "budget": {"trials": 64},
        "checkpoints": {"budget_gib": 40},
        "resources": {"workers": 1, "gpus_per_worker": 0.25, "cpus_per_worker": 2},
    },
    "auto": {
        "model": GPT2,
        "training": {"max_epochs": 4, "batch_size": 32},
        "search_space": {"learning_rate": {"log_uniform": [1e-5, 2e-4]}},
        "scheduler": {"name": "none"},
        "budget": {"trials": 24},
        "checkpoints": {"budget_gib": 40},
        "resources": {"workers": 1, "gpus_per_worker": "auto", "cpus_per_worker": 1},
    },
    "oom": {
        "model": GPT2,
        "training": {"max_epochs": 1, "batch_size": 3668, "compile": "off"},
        "search_space": {"learning_rate": {"log_uniform": [1e-5, 2e-4]}},
        "budget": {"trials": 1},
        "faults": {"on_oom": "shrink"},
        "resources": {"workers": 1, "gpus_per_worker": 1, "cpus_per_worker": 2},
    },
    "minilm": {
        "training": {"max_epochs": 9, "batch_size": 32, "learning_rate": 5e-5},
        "search_space": "bert",
        "budget": {"trials": 24},
        "resources": {"workers": 1, "gpus_per_worker": 0.25, "cpus_per_worker": 2},
    },
    "smollm2": {
        "training": {"max_epochs": 3, "batch_size": 32, "learning_rate": 5e-5},
        "search_space": {"learning_rate": {"log_uniform": [1e-5, 2e-4]}, "weight_decay": {"uniform": [0.0, 0.1]}},
        "budget": {"trials": 6},
        "resources": {"workers": 1, "gpus_per_worker": 0.5, "cpus_per_worker": 4},
    },
}


def run(name: str, out: Path) -> dict[str, Any]:
    """One study, its export, and a look at what is left on the card."""
    data, models = Path(os.environ["TUNE_SERVICE_TEST_DATA"]), Path(os.environ.get("TUNE_SERVICE_TEST_MODELS", "."))
    study = STUDIES[name]
    place = data / "gpt2-tokenizer" if "model" in study else models / name
    spec = study | {
        "name": f"mrpc-{name}",
        "model": {"name": str(place)} | study.get("model", {}),
        "data": {"task": "mrpc", "path": str(data / "glue" / "mrpc")},
    }
    file = out / f"{name}.yaml"
    file.write_text(yaml.safe_dump(spec, sort_keys=False))
    before = used_mib()
    started = time.monotonic()
    status = command("run", str(file), "--storage", str(out / "studies"))
    seconds = time.monotonic() - started
    best = command("best", status["study"], "--out", str(out / f"best-{name}"), "--storage", str(out / "studies"))
    states = [trial["state"] for trial in status["trials"]]
    reasons = {trial["reason"].splitlines()[0][:200] for trial in status["trials"] if trial["reason"]}
    epochs = [report["metrics"]["epoch_s"] for trial in status["trials"] for report in trial["reports"]]
    return {
        "study": status["study"],
        "state": status["state"],
        "seconds": round(seconds, 1),
        "trials": {state: states.count(state) for state in sorted(set(states))},
        "restarts": sum(trial["restarts"] for trial in status["trials"]),
        "epochs": len(epochs),
        "median_epoch_s": round(sorted(epochs)[len(epochs) // 2], 2),
        "best": best,
        "gpu_mib_before_and_after": [before, used_mib()],
        "reasons": sorted(reasons),
    }


def command(*arguments: str) -> dict[str, Any]:
    """The JSON that a command prints."""
    done = subprocess.run(
        [sys.executable, "-m", "tune_service.cli", *arguments, "--json"], stdout=subprocess.PIPE, text=True, check=False
    )
    found: dict[str, Any] = json.loads(done.stdout)
    if done.returncode:
        raise SystemExit(json.dumps(found, indent=1))
    return found


def used_mib() -> int:
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    return int(subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0])


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for chosen in sys.argv[2:] or list(STUDIES):
        print(json.dumps(run(chosen, folder), indent=1), flush=True)
