"""A study that an earlier version wrote is read as what it was, and goes on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tune_service.best import export_best
from tune_service.driver import Driver
from tune_service.record import FORMAT, Record, direction_of
from tune_service.searcher import StudySampler
from tune_service.spec import load_spec, parse_spec
from tune_service.storage import Storage
from tune_service.study import _stored, stored_spec

GOLDEN = Path(__file__).parent / "golden"
FORMATS = sorted(int(path.name.removeprefix("format-")) for path in GOLDEN.glob("format-*"))

TRIALS = [
    # state, reason, scores, restarts, epoch of the checkpoint
    ("completed", None, [0.5, 0.6, 0.7], 0, 3),
    ("pruned", "asha: epoch 1, rank 2 of 2", [0.1], 0, None),
    ("pruned", "diverged: score is nan at epoch 2", [0.55, None], 0, None),
    ("failed", "rank 0 raised ValueError: three is not allowed", [], 1, None),
    ("completed", None, [0.6, 0.9, 0.8], 0, 2),
    ("paused", "stopped by the user", [0.7], 0, 1),
]


@pytest.fixture(params=FORMATS)
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    shutil.copytree(GOLDEN / f"format-{request.param}", tmp_path / "studies")
    return Storage(tmp_path / "studies")


def test_there_is_a_golden_study_of_the_present_format() -> None:
    assert FORMATS[-1] == FORMAT


def test_its_status_is_what_it_was(storage: Storage) -> None:
    status = Record.open(storage.study("golden")).status(deep=True)
    found = [
        (
            trial.state,
            trial.reason and trial.reason.partition("\n")[0],
            [report.metrics["score"] for report in trial.reports],
            trial.restarts,
            trial.checkpoint and trial.checkpoint.epoch,
        )
        for trial in status.trials
    ]
    assert found == TRIALS
    assert [trial.params for trial in status.trials] == [{"x": x} for x in range(6)]
    assert (status.state, status.objective.metric, status.objective.mode) == ("stopped", "score", "max")
    assert status.best is not None
    assert (status.best.number, status.best.epoch, status.best.value, status.best.params) == (4, 2, 0.9, {"x": 4})
    reason = status.trials[3].reason
    assert reason is not None and "Last lines of trial-00003-rank-0.log" in reason


def test_its_best_trial_is_exported(storage: Storage, tmp_path: Path) -> None:
    out = tmp_path / "best"
    export_best("golden", out, storage)
    assert json.loads((out / "checkpoint" / "state.json").read_text()) == {"x": 4, "epoch": 2}
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["metrics"] == {"score": 0.9, "train_loss": 0.5}
    spec = load_spec(out / "config.yaml", here=False)
    assert spec.training_values == {"max_epochs": 3, "seed": 42, "note": "kept as it is", "x": 4}


def test_a_study_that_goes_on_has_the_first_trial_that_it_would_have_had(tmp_path: Path) -> None:
    """A recipe's defaults belong to its study, as its domains do."""
    spec = parse_spec(
        {
            "name": "recipe",
            "model": {"name": "gpt2"},
            "data": {"task": "mrpc"},
            "training": {"learning_rate": 0.5, "weight_decay": 0.5, "batch_size": 8, "warmup_fraction": 0.5},
            "search_space": "gpt2",
        }
    )
    folder = Storage(tmp_path).create("recipe")
    sampler = StudySampler("random", 0, direction_of("max"))
    with folder.driving() as lease:
        Record.create(folder, _stored(spec), sampler, lease, spec.domains.defaults)
    again = stored_spec(Record.open(folder))
    assert again.first_params() == spec.first_params() != {}
    assert again.domains.defaults == spec.domains.defaults and dict(again.domains) == dict(spec.domains)


def test_it_goes_on_with_the_trial_that_waits(storage: Storage) -> None:
    folder = storage.study("golden")
    spec = stored_spec(Record.open(folder))
    with folder.driving() as lease:
        sampler = StudySampler(spec.sampler.name, spec.sampler.seed, direction_of(spec.objective.mode))
        record = Record.open(folder, sampler, lease)
        record.clear_stop()
        record.pause_all("interrupted: the driver was gone")
        driver = Driver(spec, record, lambda line: None)
        asked = driver.ask()
        assert asked is not None and (asked.number, asked.params) == (5, {"x": 5})
        driver.started(5)
        driver.result({"number": 5, "next_within_s": 60.0, "finished": True})
        assert driver.ask() is None
    trial = Record.open(folder).status().trials[5]
    assert (trial.state, trial.restarts) == ("completed", 1)
