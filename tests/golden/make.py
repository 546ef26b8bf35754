"""Makes the golden study of this format, with the program itself: `python tests/golden/make.py`.

To be run when FORMAT of `tune_service/record.py` is raised, and never again for a format that was released: the point
of a golden study is that it was written by the version of its time.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import yaml

from tune_service.record import FORMAT

WORK = Path("/tmp/golden")
"""The study remembers where its spec was, so this must say nothing of whoever made it."""
OUT = Path(__file__).parent / f"format-{FORMAT}"

TRAINABLE = """
import json
import math
import time
from trainables import Report

CURVES = [[0.5, 0.6, 0.7], [0.1], [0.55, math.nan], [], [0.6, 0.9, 0.8], [0.7]]


def train(context):
    x = context.params["x"]
    for epoch, score in enumerate(CURVES[x], start=1):
        state = {"x": x, "epoch": epoch}
        save = lambda folder: (folder / "state.json").write_text(json.dumps(state))
        yield Report(epoch, {"score": score, "train_loss": 1 / epoch}, save=save)
    if x == 3:
        raise ValueError("three is not allowed")
    time.sleep(600)
"""

SPEC = {
    "name": "golden",
    "trainable": "golden_module:train",
    "training": {"max_epochs": 3, "note": "kept as it is"},
    "search_space": {"x": {"choice": [0, 1, 2, 3, 4, 5]}},
    "objective": {"metric": "score", "mode": "max"},
    "sampler": {"name": "grid"},
    "scheduler": {"name": "asha", "grace_period": 1, "reduction_factor": 2},
    "budget": {"trials": 6, "concurrent_trials": 1},
    "resources": {"workers": 1, "gpus_per_worker": 0},
    "faults": {"restarts_per_trial": 1},
}


def main() -> None:
    shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir()
    (WORK / "golden_module.py").write_text(TRAINABLE)
    (WORK / "spec.yaml").write_text(yaml.safe_dump(SPEC, sort_keys=False))
    program = [sys.executable, "-m", "tune_service.cli"]
    place = ["--storage", str(WORK / "studies"), "--json"]
    with subprocess.Popen([*program, "run", str(WORK / "spec.yaml"), *place], stdout=subprocess.DEVNULL):
        while True:  # the last trial waits after its first epoch
            time.sleep(2)
            done = subprocess.run([*program, "status", "golden", *place], capture_output=True, text=True, check=False)
            trials = json.loads(done.stdout).get("trials", [])
            if len(trials) == 6 and trials[5]["reports"]:
                break
        subprocess.run([*program, "stop", "golden", "--now", *place], check=True, stdout=subprocess.DEVNULL)
    shutil.rmtree(OUT, ignore_errors=True)
    (OUT / "golden").mkdir(parents=True)
    shutil.copy(WORK / "studies" / "golden" / "record.journal", OUT / "golden")
    shutil.copytree(WORK / "studies" / "golden" / "checkpoints", OUT / "golden" / "checkpoints")
    shutil.rmtree(WORK)


if __name__ == "__main__":
    main()
