"""Studies with their record in a PostgreSQL database: all commands, and whatever happens to driver or server."""

from __future__ import annotations

import json
import re
import signal
import time
import uuid
from collections.abc import Iterator
from typing import Any

import pytest
from postgres_server import PASSWORD, Server
from program import Command, Program, wait_until
from test_interruptions import check_gone_on, held, start_held

from tune_service.lease import SILENT_S


@pytest.fixture
def record(postgres: Server) -> dict[str, Any]:
    """What puts a study's record into a database of the test's own."""
    return {"record": postgres.database(f"test-{uuid.uuid4().hex[:8]}")}


@pytest.fixture
def own_server() -> Iterator[Server]:
    """One that the test may stop."""
    found = Server()
    try:
        yield found
    finally:
        found.close()


def kill(program: Program, command: Command) -> None:
    command.send(signal.SIGKILL)
    assert command.wait().code == -signal.SIGKILL
    wait_until(lambda: not program.processes(), 60, "the end of Ray's processes")


@pytest.mark.slow
def test_every_command_serves_a_study_in_a_database(program: Program, postgres: Server, record: dict[str, Any]) -> None:
    name = record["record"].rpartition("/")[2]
    path = program.spec("bread", held(1, 3) | record)
    checks = {check["name"]: check for check in program.json("check", path)["checks"]}
    assert checks["record"]["ok"] and checks["record"]["found"].endswith("0 studies in it")

    command = start_held(program, "bread", x=1, epoch=3, changes=record)
    folder = program.storage / "bread"
    assert not (folder / "record.journal").exists() and json.loads((folder / "record.json").read_text())["format"] == 1
    running = program.json("status", "bread")
    assert (running["state"], [trial["state"] for trial in running["trials"]]) == ("running", ["completed", "running"])
    assert [row["study"] for row in program.json("list")["studies"]] == ["bread"]
    status = program.json("stop", "bread", "--now")
    found = command.wait()
    assert (found.code, found.json, status["state"]) == (0, status, "stopped")

    check_gone_on(program, "bread", program.json("resume", "bread"), epochs=[1, 2, 3, 3, 4])
    assert len(program.json("resume", "bread", "--trials", "+1")["trials"]) == 2, "the grid has two points"
    best = program.json("best", "bread", "--out", str(program.folder / "best"))
    assert best["number"] == 1
    assert "record: null" in (program.folder / "best" / "config.yaml").read_text()
    assert program.json("delete", "bread", "--yes")["bytes"] > 0
    assert program.json("list")["studies"] == []
    assert postgres.sql(name, "SELECT count(*) FROM trials") == [(0,)]


@pytest.mark.slow
def test_tpe_and_asha_go_on_where_they_were_after_a_kill(program: Program, record: dict[str, Any]) -> None:
    changes = record | {
        "search_space": {"x": {"uniform": [0, 1]}},
        "sampler": {"name": "tpe", "seed": 5},
        "scheduler": {"name": "asha"},
        "budget": {"trials": 14, "concurrent_trials": 1},
    }
    whole = program.json("run", program.spec("whole", changes))
    thirteenth = whole["trials"][12]["params"]["x"]
    command = program.start("run", program.spec("cut", held(thirteenth, 1) | changes), "--json")
    program.wait_for_note("cut", "hold", thirteenth, epoch=1)
    kill(program, command)
    cut = program.json("resume", "cut")
    assert [trial["params"] for trial in cut["trials"]] == [trial["params"] for trial in whole["trials"]]
    assert [trial["reports"] for trial in cut["trials"]] == [trial["reports"] for trial in whole["trials"]]
    assert {trial["state"] for trial in whole["trials"]} == {"completed", "pruned"}


def test_a_killed_driver_leaves_a_study_that_goes_on(program: Program, record: dict[str, Any]) -> None:
    kill(program, start_held(program, "killed", x=1, epoch=3, changes=record))
    assert program.json("status", "killed")["state"] == "interrupted"
    check_gone_on(program, "killed", program.json("resume", "killed"), epochs=[1, 2, 3, 3, 4])


@pytest.mark.slow
def test_a_frozen_driver_that_wakes_up_writes_nothing_more(program: Program, record: dict[str, Any]) -> None:
    command = start_held(program, "frozen", x=1, epoch=3, changes=record)
    command.send(signal.SIGSTOP)
    wait_until(lambda: program.json("status", "frozen")["state"] == "interrupted", SILENT_S + 15, "silence")
    resumed = program.start("resume", "frozen", "--json")
    status = resumed.wait().json
    command.send(signal.SIGCONT)
    found = command.wait(timeout_s=90)
    assert found.code == 1 and "a study has one driver" in found.json["error"]["rule"]
    assert program.json("status", "frozen") == status
    assert status["state"] == "completed"


@pytest.mark.slow
def test_a_server_that_restarts_costs_nothing(program: Program, own_server: Server) -> None:
    record = {"record": own_server.database("tune")}
    command = start_held(program, "restart", x=1, epoch=3, changes=record)
    watch = program.start("watch", "restart", "--json")
    wait_until(lambda: watch.out, 30, "the first line of watch")
    own_server.stop()
    program.release("restart")
    program.wait_for_note("restart", "report", x=1, epoch=3)
    time.sleep(1)  # the driver has tried to write it
    own_server.start()
    found = command.wait()
    assert (found.code, found.json["state"]) == (0, "completed"), found.err
    check_gone_on(program, "restart", found.json, epochs=[1, 2, 3, 4], restarts=0)
    assert watch.wait().code == 0


@pytest.mark.slow
def test_a_study_waits_for_a_server_that_is_gone(program: Program, own_server: Server) -> None:
    record = {"record": own_server.database("tune")}
    command = start_held(program, "gone", x=1, epoch=3, changes=record)
    own_server.stop()
    program.release("gone")
    found = command.wait(timeout_s=60)
    assert found.code == 1 and "Traceback" not in found.err
    error = found.json["error"]
    assert "Connection refused" in error["found"] and "tune-service resume gone" in error["expected"]
    for arguments in (["status", "gone"], ["resume", "gone"], ["delete", "gone", "--yes"]):
        assert "Connection refused" in program.json(*arguments, code=1)["error"]["found"]
    listed = program.run("list", "--json")
    assert listed.code == 0 and "gone" not in [row["study"] for row in listed.json["studies"]]
    assert "left out" in listed.err
    refused = program.json("run", program.spec("never", record), code=2)
    assert "record" in refused["errors"][0]["place"] and not (program.storage / "never").exists()

    own_server.start()
    assert program.json("status", "gone")["state"] == "interrupted"
    status = program.json("resume", "gone")
    assert status["state"] == "completed" and program.epochs("gone", 1)[:3] == [1, 2, 3]
    assert [len(trial["reports"]) for trial in status["trials"]] == [4, 4]


@pytest.mark.slow
def test_the_password_is_nowhere_but_where_the_user_put_it(program: Program, postgres: Server) -> None:
    name = f"test-{uuid.uuid4().hex[:8]}"
    postgres.database(name)
    postgres.sql(name, "GRANT CREATE ON SCHEMA public TO baker")
    url = postgres.url(name, "baker")
    path = program.spec("sealed", {"record": url})
    found = program.start("run", path, "--json", env={"PGPASSWORD": PASSWORD}).wait()
    assert (found.code, found.json["state"]) == (0, "completed")
    told = program.json("run", program.spec("wrong", {"record": url}), code=2)["errors"][0]
    assert re.search(r"wrong.yaml:\d+ record$", told["place"]) and "PGPASSWORD" in told["expected"]
    searched = [path for path in program.folder.rglob("*") if path.is_file()]
    assert (program.storage / "sealed" / "record.json") in searched
    assert [path for path in searched if PASSWORD in path.read_text(errors="replace")] == []
