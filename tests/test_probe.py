"""What a trial's ranks find out before a study costs anything: two real ranks in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from free_port import free_port

from tune_service.demo import write_pairs, write_tokenizer

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
RUN = """
import json, os, sys
from trainables.probe import probe
from trainables.report import Context
rank, settings = int(os.environ["RANK"]), json.loads(sys.argv[1])
context = Context(params={}, rank=rank, world_size=2, device="cpu", resume_from=None, seed=1, max_epochs=3,
                  settings=settings)
print(json.dumps([[report.epoch, report.metrics] for report in probe(context)]))
"""


def probed(settings: dict[str, Any]) -> list[list[Any]]:
    """What rank 0 reports."""
    port = free_port()
    fixed = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "TUNE_SERVICE_DEVICE": "cpu"}
    env = os.environ | fixed | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", RUN, json.dumps(settings)]
    ranks = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env | {"RANK": str(rank)}) for rank in (0, 1)
    ]
    said = [rank.communicate(timeout=200)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0]
    first, second = (json.loads(text.splitlines()[-1]) for text in said)
    if settings:  # what was measured is the slower rank's, on both
        assert {name: first[1][1][name] for name in ("step_s", "train_row_s", "peak_bytes")} == {
            name: second[1][1][name] for name in ("step_s", "train_row_s", "peak_bytes")
        }
    return first


def test_two_ranks_reduce_and_train_steps_and_say_how_long_and_in_what_memory(tmp_path: Path) -> None:
    write_pairs(tmp_path / "data", num_train=96, num_validation=40)
    write_tokenizer(tmp_path / "tokenizer")
    sizes = {"model_type": "gpt2", "n_layer": 1, "n_embd": 32, "n_head": 2, "n_positions": 64}
    (one, reduced), (two, steps) = probed(
        {
            "model": {"name": str(tmp_path / "tokenizer"), "from_scratch": True, "config": sizes},
            "data": {"path": str(tmp_path / "data"), "text": ["sentence1", "sentence2"]},
            "training": {"max_epochs": 3, "batch_size": 32, "max_length": 32, "precision": "fp32"},
        }
    )
    assert (one, two) == (1, 2)
    assert reduced["all_reduce_bytes"] == 16 * 1024**2 and 0 < reduced["all_reduce_s"] < 10
    assert (steps["train_rows"], steps["eval_rows"], steps["gpu_bytes"]) == (96, 40, 0)
    # Tokens and positions, a layer of 12 matrices of 32 x 32 with their biases, three norms, the classifier.
    tokens = len(json.loads((tmp_path / "tokenizer/tokenizer.json").read_text())["model"]["vocab"])
    layer = 12 * 32**2 + (3 + 1 + 4 + 1) * 32 + 2 * 2 * 32
    assert steps["parameters"] == (tokens + 64) * 32 + layer + 2 * 32 + 2 * 32
    assert 0 < steps["train_row_s"] < steps["step_s"] < 10
    assert 0.1 < steps["peak_bytes"] / 1024**3 < 4


def test_without_settings_nothing_is_trained(tmp_path: Path) -> None:
    assert [epoch for epoch, _ in probed({})] == [1]
