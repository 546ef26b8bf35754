"""A record in a bucket beside one in a folder: reports a second, and `status` of many trials. The server is moto's,
on this machine: a real store adds the way to it, some ten milliseconds a request.

    python tests/benchmarks/bench_bucket.py [--trials 1000]
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

from machine import show
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.samplers import RandomSampler

sys.path.insert(0, str(Path(__file__).parents[1]))
from object_store import BUCKET, Door, install_moto, running_moto

from tune_service.home import StudyStorage
from tune_service.record import Record
from tune_service.storages import open_storage

EPOCHS = 3
METRICS = {"score": 0.5, "train_loss": 1.0, "eval_loss": 0.5, "epoch_s": 1.0}


def measure(storage: StudyStorage, num_trials: int) -> tuple[float, float]:
    """(reports a second while trials come and go, seconds from opening the record to its status)."""
    spec = {"objective": {"metric": "score", "mode": "max"}, "search_space": {}, "budget": {"trials": num_trials}}
    study = storage.create("bench")
    space: dict[str, BaseDistribution] = {"x": FloatDistribution(0, 1)}
    with study.driving() as lease, lease.beating(print):
        record = Record.create(study, spec, RandomSampler(seed=0), lease)
        started = time.monotonic()
        for number in range(num_trials):
            record.ask(space, lambda number: {"x": 0.5})
            record.start(number)
            for epoch in range(1, EPOCHS + 1):
                record.report(number, epoch, METRICS, lambda: None)
            record.complete(number)
        written_s = time.monotonic() - started
    started = time.monotonic()
    assert len(Record.open(storage.study("bench")).status().trials) == num_trials
    return num_trials * EPOCHS / written_s, time.monotonic() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=1000)
    num_trials = parser.parse_args().trials
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as root:
        install_moto(Path(root, "moto"))
        with running_moto(Path(root, "moto")) as port:
            door = Door(port)
            os.environ |= door.environment() | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"}
            for name, place in (("folder", f"{root}/studies"), ("bucket", f"s3://{BUCKET}/studies")):
                reports, status_s = measure(open_storage(place), num_trials)
                found |= {f"{name}_reports_per_s": round(reports), f"{name}_status_s": round(status_s, 2)}
            door.close()
    show("bucket", trials=num_trials, **found)


if __name__ == "__main__":
    main()
