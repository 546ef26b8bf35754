"""Studies in an object store: the same commands, a driver that is killed or frozen, a store that is slow or away."""

from __future__ import annotations

import json
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from object_store import BUCKET, Store, Way
from program import Command, Program, opened, scores, wait_until
from toys import HOLD_S, curve

pytestmark = pytest.mark.slow

EPOCHS = 3
URL = f"s3://{BUCKET}/studies"


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    with opened(tmp_path_factory.mktemp("program")) as found:
        yield found


@pytest.fixture
def program(shared: Program, store: Store) -> Program:
    store.door.set("open")
    shared.environment = store.door.environment() | {"TUNE_SERVICE_STORAGE": URL}
    return shared


def changes(**training: Any) -> dict[str, Any]:
    """Two trials, one after the other; one that is held is not taken for one that hangs."""
    budget, faults = {"trials": 2, "concurrent_trials": 1}, {"step_timeout_s": HOLD_S}
    return {"training": {"max_epochs": EPOCHS, **training}, "budget": budget, "faults": faults}


def start_held(program: Program, name: str, x: int = 1, epoch: int = 2) -> Command:
    """A study of two trials that waits in an epoch of one of them."""
    spec = program.spec(name, changes(faults=[{"x": x, "epoch": epoch, "does": "hold"}]))
    command = program.start("run", spec, "--json")
    program.wait_for_note(name, "hold", x, epoch, timeout_s=180)
    return command


def check_completed(status: Any) -> None:
    assert status["state"] == "completed"
    for trial in status["trials"]:
        assert (trial["state"], trial["reason"]) == ("completed", None)
        assert scores(trial) == curve(trial["params"]["x"], EPOCHS)


def test_a_study_lives_in_a_bucket_from_check_to_delete(program: Program, store: Store, tmp_path: Path) -> None:
    spec = program.spec("whole", changes())
    checks = {check["name"]: check for check in program.json("check", spec)["checks"]}
    assert checks["storage"]["ok"] and checks["storage"]["found"] == f"{URL} can be written"
    assert program.json("list") == {"studies": []}
    status = program.json("run", spec)
    check_completed(status)
    assert program.json("status", "whole") == status
    for trial in status["trials"]:
        place = trial["checkpoint"]["path"]
        assert place.startswith(f"{URL}/whole/checkpoints/trial-{trial['number']:05d}-epoch-0003-")
    assert [row["study"] for row in program.json("list")["studies"]] == ["whole"]
    best = program.json("best", "whole", "--out", str(tmp_path / "best"))
    assert json.loads((tmp_path / "best/checkpoint/state-0.json").read_text())["epoch"] == EPOCHS
    assert best["value"] == curve(1, EPOCHS)[-1]
    more = program.json("resume", "whole", "--trials", "2")
    assert more["trials"] == status["trials"], "there was nothing left to do"
    again = program.run("run", spec, "--json")
    assert (again.code, "is not taken" in again.out) == (2, True)
    assert any(name.startswith("driver-") for name in store.names("whole"))
    assert program.json("delete", "whole", "--yes")["bytes"] > 1000
    assert store.names("whole") == []
    assert program.json("list") == {"studies": []}


def test_a_killed_driver_is_followed_at_once_and_no_epoch_is_lost(program: Program) -> None:
    command = start_held(program, "killed")
    running = program.json("status", "killed")
    assert running["state"] == "running"
    command.send(signal.SIGKILL)
    command.wait()
    status = program.json("status", "killed")
    assert status["state"] == "interrupted"
    assert [trial["state"] for trial in status["trials"]] == ["completed", "paused"]
    program.release("killed")
    refused = program.run("run", program.spec("killed", changes()), "--json")
    assert refused.code == 2
    again = program.json("resume", "killed")
    check_completed(again)
    assert again["trials"][1]["restarts"] == 1
    assert program.epochs("killed", 1) == [1, 2, 2, 3], "only the running epoch is repeated"


def test_a_frozen_driver_that_was_taken_over_writes_nothing_more(program: Program, store: Store) -> None:
    frozen = start_held(program, "frozen")
    frozen.send(signal.SIGSTOP)
    began = time.monotonic()
    again = program.start("resume", "frozen", "--json")
    wait_until(lambda: program.epochs("frozen", 1)[:3] == [1, 2, 2], 180, "the trial to go on")
    assert time.monotonic() - began > 15
    assert re.search(r"has been silent for 1[5-9] s", again.err)
    program.release("frozen")
    status = again.wait()
    assert status.code == 0, status.err
    check_completed(status.json)
    before = store.names("frozen")
    frozen.send(signal.SIGCONT)
    ended = frozen.wait()
    assert ended.code == 1
    assert "another one has taken the study over" in ended.out
    assert store.names("frozen") == before
    assert program.json("status", "frozen") == status.json


def test_a_request_to_stop_reaches_the_driver_through_the_store(program: Program) -> None:
    command = start_held(program, "stopped")
    stop = program.start("stop", "stopped", "--now", "--json")
    found = command.wait()
    assert (found.code, found.json["state"]) == (0, "stopped")
    assert stop.wait().json["state"] == "stopped"
    program.release("stopped")
    check_completed(program.json("resume", "stopped"))


def test_a_second_driver_is_refused_while_the_first_beats(program: Program) -> None:
    command = start_held(program, "one")
    second = program.run("resume", "one", "--json")
    assert (second.code, "a study has one driver" in second.out) == (2, True)
    program.release("one")
    check_completed(command.wait().json)


def test_logs_are_there_while_the_study_runs(program: Program) -> None:
    command = start_held(program, "logged")
    follow = program.start("logs", "logged")
    program.release("logged")
    command.wait()
    found = follow.wait()
    assert found.out.splitlines() == [
        *(f"trial-00000-rank-0: epoch {epoch} of x=0" for epoch in (1, 2, 3)),
        *(f"trial-00001-rank-0: epoch {epoch} of x=1" for epoch in (1, 2)),
        "trial-00001-rank-0: rank 0 is about to hold",
        "trial-00001-rank-0: epoch 3 of x=1",
    ]


@pytest.mark.parametrize(
    ("way", "found"), [("503", "SLOW_DOWN"), ("403", "credentials"), ("cut", "NETWORK_CONNECTION"), ("silent", "slow")]
)
def test_a_store_that_goes_away_makes_the_study_wait(program: Program, store: Store, way: Way, found: str) -> None:
    name = f"away-{way}"
    command = start_held(program, name)
    store.door.set(way)
    program.release(name)
    ended = command.wait(180)
    assert ended.code == 1, ended.err
    assert "a study's storage takes what it writes" in ended.out
    assert found in ended.out + ended.err
    assert "not-for-the-eyes" not in ended.out + ended.err
    began = time.monotonic()
    refused = program.run("status", name, "--json")
    assert time.monotonic() - began < 40
    assert refused.code == (2 if way == "403" else 1)
    assert URL in refused.json["error"]["place"]
    store.door.set("open")
    status = program.json("status", name)
    assert status["state"] == "interrupted"
    assert [trial["state"] for trial in status["trials"]] == ["completed", "paused"]
    check_completed(program.json("resume", name))


def test_a_slow_store_only_takes_its_time(program: Program, store: Store) -> None:
    store.door.set("slow")
    check_completed(program.json("run", program.spec("slow", changes()), timeout_s=240))


def test_what_the_user_got_wrong_is_told_before_anything_starts(program: Program, store: Store) -> None:
    spec = program.spec("wrong", changes())
    for storage, place, found in (
        ("s3://no-such-bucket/x", "s3://no-such-bucket/x", "no bucket no-such-bucket"),
        ("s3://who:secret-word@lab/x", "--storage", "something before an @"),
        ("ftp://lab/x", "--storage", "ftp://"),
        (f"{URL}?acces_key=secret-word", "--storage", "acces_key"),
    ):
        for command in (["list"], ["status", "wrong"], ["run", spec], ["check", spec]):
            run = program.run(*command, "--storage", storage, "--json")
            assert run.code == 2, run
            assert found in run.out and "secret-word" not in run.out
            if command == ["list"]:
                assert run.json["error"]["place"] == place
    store.door.set("403")
    run = program.run("run", spec, "--json")
    assert (run.code, "credentials may read and write the bucket" in run.out) == (2, True)
    store.door.set("503")
    run = program.run("list", "--json")
    assert run.code == 1
    assert run.json["error"]["rule"] == "the store answers"
