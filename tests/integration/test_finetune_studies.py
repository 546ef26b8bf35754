"""Fine-tuning through the command line: a small GPT-2 on real pairs of sentences, one rank and two."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from program import RANK, ROOT, Program, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

MODEL = {"n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 64}
NO_DROPOUT = {"embd_pdrop": 0.0, "resid_pdrop": 0.0, "attn_pdrop": 0.0, "summary_first_dropout": 0.0}
NUM_TRAIN, NUM_VALIDATION = 200, 80


@pytest.fixture(scope="module")
def pairs(program: Program, data_dir: Path) -> Path:
    """280 rows of MRPC."""
    folder = program.folder / "pairs"
    folder.mkdir()
    for split, rows in (("train", NUM_TRAIN), ("validation", NUM_VALIDATION)):
        table = pq.read_table(data_dir / "glue" / "mrpc" / f"{split}.parquet")
        pq.write_table(table.slice(0, rows), folder / f"{split}.parquet")
    return folder


@pytest.fixture(scope="module")
def tokenizer(data_dir: Path) -> Path:
    """GPT-2's own."""
    return data_dir / "gpt2-tokenizer"


def finetune_spec(program: Program, name: str, pairs: Path, tokenizer: Path, **changes: Any) -> str:
    spec = {
        "name": name,
        "model": {
            "name": str(tokenizer),
            "from_scratch": True,
            "config": {"model_type": "gpt2"} | MODEL | NO_DROPOUT,
        },
        "data": {"task": "mrpc", "path": str(pairs)},
        "training": {"max_epochs": 3, "batch_size": 16, "max_length": 64, "learning_rate": 1e-3, "precision": "fp32"},
        "search_space": {"learning_rate": {"log_uniform": [1e-4, 1e-2]}, "batch_size": {"choice": [8, 16]}},
        "sampler": {"name": "tpe", "seed": 3},
        "budget": {"trials": 3, "concurrent_trials": 1},
        "resources": {"workers": 2, "gpus_per_worker": 0, "cpus_per_worker": 0.5},
    }
    return program.write_spec(spec | changes)


def curves(status: Any) -> list[list[dict[str, float]]]:
    """Every trial's reports, without what a clock measured."""
    timed = ("epoch_s", "tokens_per_s")
    return [
        [{key: value for key, value in report["metrics"].items() if key not in timed} for report in trial["reports"]]
        for trial in status["trials"]
    ]


@pytest.fixture(scope="module")
def two_ranks(program: Program, pairs: Path, tokenizer: Path) -> Any:
    return program.json("run", finetune_spec(program, "two-ranks", pairs, tokenizer), timeout_s=300)


def test_every_epoch_reports_the_metrics_of_the_contract(two_ranks: Any) -> None:
    assert two_ranks["state"] == "completed"
    assert two_ranks["objective"] == {"metric": "eval_accuracy", "mode": "max"}
    assert len(two_ranks["trials"]) == 3 and all(trial["reports"] for trial in two_ranks["trials"])
    for trial in two_ranks["trials"]:
        assert list(trial["params"]) == ["learning_rate", "batch_size"]
        for report in trial["reports"]:
            assert sorted(report["metrics"]) == [
                "epoch_s",
                "eval_accuracy",
                "eval_f1",
                "eval_loss",
                "learning_rate",
                "tokens_per_s",
                "train_accuracy",
                "train_loss",
            ]
            rows = report["metrics"]["eval_accuracy"] * NUM_VALIDATION
            assert math.isclose(rows, round(rows)), "exact over the ranks: no repeated row"


def test_the_first_trial_has_the_specs_own_values(two_ranks: Any) -> None:
    assert two_ranks["trials"][0]["params"] == {"learning_rate": 1e-3, "batch_size": 16}


def test_the_best_model_opens_and_scores_what_the_study_says(
    two_ranks: Any, program: Program, pairs: Path, tmp_path: Path
) -> None:
    out = tmp_path / "best"
    best = program.json("best", "two-ranks", "--out", str(out))
    assert {path.name for path in out.iterdir()} == {"model", "config.yaml", "metrics.json"}
    assert json.loads((out / "metrics.json").read_text())["value"] == best["value"]
    command = [sys.executable, "-m", "trainables.score", str(out / "model"), str(pairs), "sentence1", "sentence2"]
    found = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    assert math.isclose(float(found.stdout), best["value"])


def test_nothing_in_the_checkpoints_is_a_pickle(two_ranks: Any) -> None:
    folder = Path(two_ranks["trials"][0]["checkpoint"]["path"])
    suffixes = {path.suffix for path in folder.rglob("*") if path.is_file()}
    assert suffixes <= {".safetensors", ".json", ".txt", ".jinja"}


def test_one_rank_and_two_have_the_same_curves(two_ranks: Any, program: Program, pairs: Path, tokenizer: Path) -> None:
    one = {"workers": 1, "gpus_per_worker": 0, "cpus_per_worker": 1}
    found = program.json("run", finetune_spec(program, "one-rank", pairs, tokenizer, resources=one), timeout_s=300)
    for ours, theirs in zip(curves(found), curves(two_ranks), strict=False):
        for report, other in zip(ours, theirs, strict=False):
            for name in ("train_loss", "eval_loss", "learning_rate"):
                assert math.isclose(report[name], other[name], rel_tol=1e-4), name
    first, second = found["trials"][0], two_ranks["trials"][0]
    assert first["params"] == second["params"] and len(first["reports"]) == len(second["reports"])


def test_two_runs_of_one_spec_are_the_same(two_ranks: Any, program: Program, pairs: Path, tokenizer: Path) -> None:
    again = program.json("run", finetune_spec(program, "two-ranks-again", pairs, tokenizer), timeout_s=300)
    assert [trial["params"] for trial in again["trials"]] == [trial["params"] for trial in two_ranks["trials"]]
    assert [trial["state"] for trial in again["trials"]] == [trial["state"] for trial in two_ranks["trials"]]
    for ours, theirs in zip(curves(again), curves(two_ranks), strict=True):
        for report, other in zip(ours, theirs, strict=True):
            assert report == pytest.approx(other, rel=1e-5)


def test_a_rank_that_is_frozen_in_a_collective_costs_one_epoch(program: Program, pairs: Path, tokenizer: Path) -> None:
    """T10: gloo alone waits for half an hour."""
    changes: dict[str, Any] = {
        "training": {"max_epochs": 4, "batch_size": 2, "max_length": 64, "learning_rate": 1e-4, "precision": "fp32"},
        "search_space": {"batch_size": {"choice": [2]}},
        "budget": {"trials": 1},
        "scheduler": {"name": "none"},
    }
    calm = program.json("run", finetune_spec(program, "calm", pairs, tokenizer, **changes), timeout_s=200)
    frozen = finetune_spec(program, "frozen", pairs, tokenizer, **changes, faults={"step_timeout_s": 60.0})
    command = program.start("run", frozen, "--json")
    first = program.storage / "frozen" / "checkpoints" / "trial-00000" / "epoch-0001"
    wait_until(first.exists, 120, "the first checkpoint")
    rank = program.named(RANK)[0]
    rank.send_signal(signal.SIGSTOP)
    found = command.wait(timeout_s=200)
    assert found.code == 0, found.err
    assert "gave no report in 60 s" in found.err
    (trial,) = found.json["trials"]
    assert (trial["state"], trial["restarts"]) == ("completed", 1)
    assert [report["epoch"] for report in trial["reports"]] == [1, 2, 3, 4]
    for report, other in zip(curves(found.json)[0], curves(calm)[0], strict=True):
        assert report == pytest.approx(other, rel=1e-5)


def test_the_demo_learns_and_its_best_model_opens(program: Program) -> None:
    found = program.run("demo", timeout_s=500)
    assert found.code == 0, found.err
    status = program.json("status", "demo")
    assert (status["state"], len(status["trials"])) == ("completed", 16)
    assert status["best"]["value"] > 0.8, "always the commonest class is right in about half of the rows"
    assert any(trial["state"] == "pruned" for trial in status["trials"])
    assert f"opened with from_pretrained: accuracy {status['best']['value']:.4f}" in found.out
    assert (program.storage / "demo-best" / "model" / "config.json").is_file()
    refused = program.json("demo", code=2)
    assert "demo" in json.dumps(refused)
