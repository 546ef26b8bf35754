"""Makes the golden study of this format: `python tests/golden/make.py`. Driver, supervisor and trainable are the real
ones, in this one process.

To be run when FORMAT of `tune_service/record.py` is raised, and never again for a format that was released: the point
of a golden study is that it was written by the version of its time.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from trainables.trial import TrialSupervisor
from trainables.worker_group import InProcessWorkerGroup, WorkerGroup
from tune_service.driver import USER_STOP, Driver
from tune_service.record import FORMAT, Record, direction_of
from tune_service.searcher import StudySampler
from tune_service.spec import parse_spec
from tune_service.storage import Storage
from tune_service.study import _stored
from tune_service.this_machine import LocalSession
from tune_service.tuner import trial_config

WORK = Path("/tmp/golden")
"""The study remembers where its spec was, so this must say nothing of whoever made it."""
OUT = Path(__file__).parent / f"format-{FORMAT}"

TRAINABLE = """
import json
import math
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


class Supervisor(TrialSupervisor):
    """The real one without Ray: its group is a rank in this process."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.setup(config)

    def _new_group(self) -> WorkerGroup:
        return InProcessWorkerGroup()


def main() -> None:
    shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir()
    (WORK / "golden_module.py").write_text(TRAINABLE)
    spec = parse_spec(SPEC, WORK)
    folder = Storage(WORK / "studies").create(spec.name)
    sampler = StudySampler(spec.sampler.name, spec.sampler.seed, direction_of(spec.objective.mode))
    session = LocalSession(scratch=WORK, concurrent=1)
    with folder.driving() as lease:
        record = Record.create(folder, _stored(spec), sampler, lease)
        driver = Driver(spec, record, lambda line: None)
        while (asked := driver.ask()) is not None:
            driver.started(asked.number)
            supervisor = Supervisor(trial_config(spec, folder, lease.identity, session, asked, slot=0))
            while driver.result(supervisor.step()):
                if asked.params["x"] == 5 and record.trial(asked.number).reports:
                    record.request_stop(now=True)
                    break
            supervisor.cleanup()
            if record.stop_request is not None:
                break
        record.pause_all(USER_STOP)
    shutil.rmtree(OUT, ignore_errors=True)
    (OUT / spec.name).mkdir(parents=True)
    # A log's last lines name files of this tree.
    written = folder.journal.read_text().replace(str(Path(__file__).parents[2]), str(WORK / "tune-service"))
    (OUT / spec.name / folder.journal.name).write_text(written)
    shutil.copytree(folder.checkpoints.root, OUT / spec.name / "checkpoints")
    shutil.rmtree(WORK)


if __name__ == "__main__":
    main()
