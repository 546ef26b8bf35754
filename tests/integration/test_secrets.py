"""What the environment keeps secret is found in no file of a study, in no export and on no screen."""

from __future__ import annotations

from pathlib import Path

import pytest
from program import Program

SECRETS = {
    "SOME_API_KEY": "Zq8-plain-key-4417",
    "DATABASE_PASSWORD": "correct horse battery",
    "HF_TOKEN": "hf_QwErTyUiOpAsDfGhJkLzXcVbNm123456",
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",
}
FINE, RAISES, PRINTS_AND_DIES, SAVE_RAISES = range(4)

TRAINABLE = """
import os
from trainables import Report

ALL = " ".join(os.environ[name] for name in ("SOME_API_KEY", "DATABASE_PASSWORD", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY"))


def save(folder):
    (folder / "weights.json").write_text("{}")


def refuse(folder):
    raise RuntimeError(f"upload refused: {ALL}")


def train(context):
    x = context.params["x"]
    yield Report(1, {"score": x / 10}, save=refuse if x == 3 else save)
    if x == 1:
        try:
            raise ConnectionError(f"401 from https://someone:{os.environ['SOME_API_KEY']}@example.org")
        except ConnectionError as error:
            raise ValueError(f"no answer for {ALL}") from error
    if x == 2:
        print(f"the trainable's own line: {ALL}", flush=True)
        os._exit(3)
    yield Report(2, {"score": x / 10 + 0.5}, save=save)
"""


@pytest.mark.slow
def test_secrets_of_the_environment_reach_neither_record_nor_logs_nor_export_nor_output(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    (program.specs / "leaky.py").write_text(TRAINABLE)
    changes = {
        "trainable": "leaky:train",
        "search_space": {"x": {"choice": [FINE, RAISES, PRINTS_AND_DIES, SAVE_RAISES]}},
        "budget": {"trials": 4},
        "faults": {"restarts_per_trial": 0},
    }
    found = program.json("run", program.spec("leaky", changes))
    reasons = {trial["params"]["x"]: trial["reason"] for trial in found["trials"]}
    assert reasons[FINE] is None
    assert "raised ValueError: no answer for *** *** *** ***" in reasons[RAISES]
    assert "ConnectionError: 401 from https://" in reasons[RAISES]  # of the log's last lines
    assert "the trainable's own line: *** *** *** ***" in reasons[PRINTS_AND_DIES]
    assert "upload refused: *** *** *** ***" in reasons[SAVE_RAISES]

    out = program.folder / "best"
    program.json("best", "leaky", "--out", str(out))
    program.run("status", "leaky")
    own_log = program.storage / "leaky" / "logs" / f"trial-{PRINTS_AND_DIES:05d}-rank-0.log"
    assert SECRETS["SOME_API_KEY"] in own_log.read_text()  # what a trainable prints is its own
    searched = [path for path in files_under(program.folder) if path != own_log]
    assert len(searched) > 10 and any(path.name == "record.journal" for path in searched)
    assert any(path.is_relative_to(out) for path in searched)
    leaks = [(path.name, name) for path in searched for name, value in SECRETS.items() if value.encode() in read(path)]
    assert leaks == []


def files_under(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def read(path: Path) -> bytes:
    return path.read_bytes()
