"""The service's own time: 64 trials that wait 4 epochs of 0.5 s, 2 at a time.

    python tests/benchmarks/bench_overhead.py

Overhead ratio: from the first trial's start to the last one's end, over the ideal 64 s.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path

import yaml
from machine import show

TRIALS, EPOCHS, EPOCH_S, CONCURRENT = 64, 4, 0.5, 2


def spec() -> dict[str, object]:
    return {
        "name": "waiting",
        "trainable": "waiting:train",
        "training": {"max_epochs": EPOCHS, "epoch_s": EPOCH_S},
        "search_space": {"x": {"uniform": [0.0, 1.0]}},
        "objective": {"metric": "score", "mode": "max"},
        "scheduler": {"name": "none"},
        "budget": {"trials": TRIALS, "concurrent_trials": CONCURRENT},
        "resources": {"workers": 1, "gpus_per_worker": 0},
    }


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        here = Path(__file__).parent
        file = Path(temporary) / "spec.yaml"
        file.write_text(yaml.safe_dump(spec()))
        (Path(temporary) / "waiting.py").write_text((here / "waiting.py").read_text())
        command = [sys.executable, "-m", "tune_service.cli", "run", str(file), "--storage", temporary, "--json"]
        began = time.monotonic()
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        whole_s = time.monotonic() - began
        trials = json.loads(done.stdout)["trials"]
        starts = [datetime.fromisoformat(trial["started_at"]) for trial in trials]
        ends = [datetime.fromisoformat(trial["ended_at"]) for trial in trials]
        took_s = (max(ends) - min(starts)).total_seconds()
        ideal_s = TRIALS * EPOCHS * EPOCH_S / CONCURRENT
        show(
            "overhead",
            trials=len(trials),
            completed=sum(trial["state"] == "completed" for trial in trials),
            ideal_s=ideal_s,
            first_start_to_last_end_s=took_s,
            ratio=round(took_s / ideal_s, 3),
            whole_command_s=round(whole_s, 1),
        )
