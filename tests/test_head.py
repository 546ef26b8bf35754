"""What the head answers, as its frames; the cluster itself is not needed for it."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hand_driven import HandDriven

from tune_service import __version__
from tune_service.frames import decode
from tune_service.head import Answer

ROOT = Path(__file__).parent.parent


def asked(storage: Path, what: str, **arguments: Any) -> tuple[int, list[Any]]:
    """Exit code and answers."""
    request = {"what": what, "word": "w", "version": __version__, "storage": str(storage)} | arguments
    command = [sys.executable, "-P", "-m", "tune_service.head", json.dumps(request)]
    run = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}, cwd="/", check=False
    )
    assert "Traceback" not in run.stderr, run.stderr
    return run.returncode, decode("w", run.stdout)[0]


def test_it_says_its_version_then_the_answer_then_its_end(tmp_path: Path) -> None:
    study = HandDriven(tmp_path)
    study.run(0.5, 0.7)
    name, storage = study.record.folder.name, study.record.folder.path.parent
    status = study.record.status(deep=True)
    assert asked(storage, "status", study=name) == (
        0,
        [{"version": __version__}, {"status": status.to_json(), "notice": None}, {"end": True}],
    )
    code, (_, row, _) = asked(storage, "list")
    assert (code, row["row"]["study"], row["metric"]) == (0, name, status.objective.metric)


def test_what_is_wrong_comes_as_the_document_and_the_exit_code_of_the_command(tmp_path: Path) -> None:
    code, (_, failure) = asked(tmp_path, "status", study="nothing")
    assert (code, failure["code"], failure["failure"]["error"]["place"]) == (2, 2, "STUDY")


def test_another_version_starts_no_study_but_is_answered(tmp_path: Path) -> None:
    code, (_, failure) = asked(tmp_path, "run", version="0.0.9")
    assert (code, failure["code"]) == (1, 1)
    assert failure["failure"]["error"]["found"] == f"0.0.9 on this machine, {__version__} on the cluster"
    assert asked(tmp_path, "list", version="0.0.9")[0] == 0


def test_a_waiting_answer_ends_with_the_study(tmp_path: Path) -> None:
    study = HandDriven(tmp_path)
    study.run(0.5)
    study.end()
    folder = study.record.folder
    folder.logs.mkdir()
    (folder.logs / "trial-00000-rank-0.log").write_text("one\ntwo\nthree")
    asking = {"study": folder.name, "trial": None, "since": {"trial-00000-rank-0.log": 4}, "done": []}
    _, (_, piece, more, _) = asked(folder.path.parent, "logs", **asking)
    assert piece["piece"] == {"file": "trial-00000-rank-0.log", "lines": ["two", "three"], "end": 13}
    assert more == {"more": False, "done": [[0, 0]]}
    _, (_, more, _) = asked(folder.path.parent, "logs", **asking | {"since": {}, "done": [[0, 0]]})
    assert more == {"more": False, "done": [[0, 0]]}  # what was read to its end is not read again
    _, (_, view, more, _) = asked(folder.path.parent, "views", study=folder.name, known=[])
    assert (view["status"]["study"], view["budget_trials"], more) == (
        folder.name,
        study.record.budget_trials,
        {"more": False},
    )


def test_whoever_waits_for_a_long_answer_gets_signs_of_life_between_its_documents(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tune_service.head.ALIVE_S", 0.05)
    stream = io.StringIO()
    answer = Answer("w", stream)
    with answer.signs_of_life():
        for number in range(3):
            time.sleep(0.2)
            answer.send({"n": number})
    documents, last = decode("w", stream.getvalue())
    time.sleep(0.3)
    assert decode("w", stream.getvalue()) == (documents, last), "none after its end"
    assert documents[0] == {"alive": True}, "one at once"
    assert [each["n"] for each in documents if "n" in each] == [0, 1, 2]
    assert last == len(documents) >= 6


def test_signs_of_life_are_for_those_alone_who_ask_for_them(tmp_path: Path) -> None:
    assert {"alive": True} not in asked(tmp_path, "list")[1]
    assert {"alive": True} in asked(tmp_path, "list", signs=True)[1]
