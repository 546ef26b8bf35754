"""The gap between a trial's last report and the next one's first step: a warm worker group, beside the stock way.

    python tests/benchmarks/bench_gap.py [--no-stock] [--gpu]

Both train the demo's 2-layer GPT-2 on its data, one trial at a time. The stock way is the documented one for more than
one worker a trial: a Ray Train TorchTrainer inside a Ray Tune function. A trial is 2 epochs.
With --gpu ours is on a GPU.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml
from machine import show, spread

from tune_service.demo import demo_spec, write_pairs, write_tokenizer

OUR_TRIALS, STOCK_TRIALS, EPOCHS = 12, 3, 2


def gaps(log: Path) -> list[float]:
    """Seconds from the last report before each trial's first step to that step."""
    found, last_report = [], None
    for line in log.read_text().splitlines():
        at, event = line.split(" ", 1)
        if event == "report":
            last_report = float(at)
        elif last_report is not None:
            found.append(float(at) - last_report)
    return found


def ours(folder: Path) -> list[float]:
    write_pairs(folder / "data", num_train=256, num_validation=64)
    write_tokenizer(folder / "tokenizer")
    demo = demo_spec(folder)
    log = folder / "ours.log"
    settings = {"model": demo["model"], "data": demo["data"], "training": demo["training"] | {"max_epochs": EPOCHS}}
    spec: dict[str, Any] = {
        "name": "gap",
        "trainable": "gap_probe:train",
        "training": {"max_epochs": EPOCHS, "log": str(log), "settings": settings},
        "search_space": {"learning_rate": {"log_uniform": [1e-4, 1e-2]}},
        "objective": {"metric": "eval_accuracy", "mode": "max"},
        "scheduler": {"name": "none"},
        "budget": {"trials": OUR_TRIALS, "concurrent_trials": 1},
        "resources": {"workers": 1, "gpus_per_worker": int("--gpu" in sys.argv)},
    }
    file = folder / "spec.yaml"
    file.write_text(yaml.safe_dump(spec))
    (folder / "gap_probe.py").write_text((Path(__file__).parent / "gap_probe.py").read_text())
    command = [sys.executable, "-m", "tune_service.cli", "run", str(file), "--storage", str(folder), "--json"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return gaps(log)


def stock(folder: Path) -> list[float]:
    log = folder / "stock.log"
    script = Path(__file__).parent / "stock_trainer.py"
    command = [sys.executable, str(script), str(log), str(STOCK_TRIALS), str(EPOCHS)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return gaps(log)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        found = {"ours": spread(ours(Path(temporary)))}
        if "--no-stock" not in sys.argv:
            found["stock"] = spread(stock(Path(temporary)))
            found["ratio"] = {"stock_over_ours": round(found["stock"]["median_s"] / found["ours"]["median_s"], 1)}
        show("gap", **found)
