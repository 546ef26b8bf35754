"""How long `resume` of a study with 1,000 finished trials takes to its next trial's start, Ray's start included.

    python tests/benchmarks/bench_resume.py [--trials 1000] [--checkpoints] [--runs 3]

From the start of the process to the moment when the record says that the trial began, and to the first line of its
trainable. With --checkpoints every finished trial has one. A run of one trial in a new study is the same but for the
1,000 trials.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml
from machine import show, spread

from tune_service.driver import Driver
from tune_service.record import Record, direction_of
from tune_service.searcher import StudySampler
from tune_service.spec import StudySpec, load_spec
from tune_service.storage import Storage
from tune_service.study import _stored

TRAINABLE = """
import time
from pathlib import Path
from trainables import Report


def train(context):
    with (Path(__file__).parent / "begun").open("a") as file:
        file.write(f"{time.time()}\\n")
    yield Report(1, {"score": context.params["x"]})
"""


def write_spec(root: Path, name: str) -> StudySpec:
    spec = {
        "name": name,
        "trainable": "begins:train",
        "training": {"max_epochs": 1},
        "search_space": {"x": {"uniform": [0.0, 1.0]}, "y": {"log_uniform": [1e-5, 1e-1]}},
        "objective": {"metric": "score", "mode": "max"},
        "scheduler": {"name": "none"},
        "budget": {"trials": 1, "concurrent_trials": 1},
        "resources": {"workers": 1, "gpus_per_worker": 0},
    }
    file = root / f"{name}.yaml"
    file.write_text(yaml.safe_dump(spec))
    (root / "begins.py").write_text(TRAINABLE)
    return load_spec(file)


def write_study(root: Path, trials: int, checkpoints: bool) -> None:
    """A study of finished trials, through driver and record as a run would."""
    spec = write_spec(root, "long")
    folder = Storage(root).create(spec.name)
    record = Record.create(folder, _stored(spec), StudySampler("random", 0, direction_of("max")))
    record.set_budget(trials)
    driver = Driver(spec, record, lambda line: None)
    for number in range(trials):
        asked = driver.ask()
        assert asked is not None
        driver.started(number)
        num_bytes = None
        if checkpoints:
            (folder.checkpoints.stage(number, 1) / "weights").write_bytes(b"w" * 1000)
            num_bytes = folder.checkpoints.commit(number, 1, {"score": asked.params["x"]}).num_bytes
        result = {"number": number, "next_within_s": 60.0, "epoch": 1, "finished": True}
        score = {"metrics": [("score", asked.params["x"])]}
        driver.result(result | score | {"saves": False, "checkpoint_bytes": num_bytes})


def seconds_to_start(root: Path, *command: str) -> tuple[float, float]:
    """From the process's start to its trainable's first line, and to its end."""
    begun = root / "begun"
    begun.unlink(missing_ok=True)
    started = time.time()
    program = [sys.executable, "-m", "tune_service.cli", *command, "--storage", str(root), "--json"]
    done = subprocess.run(program, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    whole_s = time.time() - started
    assert json.loads(done.stdout)["state"] == "completed"
    return float(begun.read_text().split()[0]) - started, whole_s


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--checkpoints", action="store_true")
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        write_study(root, options.trials, options.checkpoints)
        resumed = [seconds_to_start(root, "resume", "long", "--trials", "+1") for _ in range(options.runs)]
        fresh = []
        for run in range(options.runs):
            write_spec(root, f"new-{run}")
            fresh.append(seconds_to_start(root, "run", str(root / f"new-{run}.yaml")))
        show(
            "resume",
            finished_trials=options.trials,
            checkpoints=options.checkpoints,
            resume_to_first_line=spread([first for first, _ in resumed]),
            new_study_to_first_line=spread([first for first, _ in fresh]),
            resume_whole_command=spread([whole for _, whole in resumed]),
        )
