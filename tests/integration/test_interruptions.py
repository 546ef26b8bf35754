"""Studies that are stopped, cut off, killed, gone on with and extended: nothing is lost but the running epoch."""

from __future__ import annotations

import json
import signal
import time
from collections import defaultdict
from typing import Any

import pytest
from program import Command, Program, scores, wait_until
from toys import HOLD_S, curve, read_notes

from tune_service.prctl import adopt_orphans


def held(x: float, epoch: int) -> dict[str, Any]:
    """A spec's changes by which a trial waits in an epoch, the first time that it comes there, and is let wait."""
    training = {"epoch_s": 0.1, "faults": [{"x": x, "epoch": epoch, "does": "hold"}]}
    return {"training": training, "faults": {"step_timeout_s": HOLD_S}}


def start_held(program: Program, name: str, x: float, epoch: int, changes: dict[str, Any] | None = None) -> Command:
    """A study in which the trial of x=0 is through, and the one of `x` is in the midst of `epoch`."""
    command = program.start("run", program.spec(name, held(x, epoch) | (changes or {})), "--json")
    program.wait_for_note(name, "hold", x, epoch)
    wait_until(lambda: _states(program, name)[0] == "completed", 90, "the end of trial 0")
    return command


def check_gone_on(program: Program, name: str, status: Any, epochs: list[int], restarts: int = 1) -> None:
    """The study is completed as if nothing had happened, and only the running epoch was trained again."""
    assert status["state"] == "completed"
    assert [trial["number"] for trial in status["trials"]] == [0, 1]
    assert [trial["params"]["x"] for trial in status["trials"]] == [0, 1]
    for trial in status["trials"]:
        assert (trial["state"], trial["reason"]) == ("completed", None)
        assert scores(trial) == curve(trial["params"]["x"], 4)
    assert [trial["restarts"] for trial in status["trials"]] == [0, restarts]
    assert program.epochs(name, 0) == [1, 2, 3, 4]
    assert program.epochs(name, 1) == epochs
    assert program.json("status", name) == status


@pytest.mark.parametrize(
    "way",
    [
        "ctrl-c",
        pytest.param("sigterm", marks=pytest.mark.slow),
        pytest.param("closed-terminal", marks=pytest.mark.slow),
    ],
)
def test_an_interrupted_study_goes_on_where_it_was(program: Program, way: str) -> None:
    command = start_held(program, way, x=1, epoch=3)
    if way == "ctrl-c":
        command.ctrl_c()
    elif way == "closed-terminal":
        command.hang_up()
    else:
        command.send(signal.SIGTERM)
    found = command.wait(timeout_s=30)
    assert found.code == 130
    assert list(found.json) == ["error"]
    assert "Traceback" not in found.err
    assert f"interrupted; `tune-service resume {way}` goes on" in found.err
    assert program.leftovers() == []

    status = program.json("status", way)
    assert status["state"] == "interrupted"
    completed, paused = status["trials"]
    assert (completed["state"], paused["state"]) == ("completed", "paused")
    assert paused["reason"] == "interrupted by the user"
    assert paused["checkpoint"]["epoch"] == 2 and paused["ended_at"] is None
    assert status["best"]["number"] == 0

    check_gone_on(program, way, program.json("resume", way), epochs=[1, 2, 3, 3, 4])


@pytest.mark.slow
def test_an_impatient_second_ctrl_c_loses_nothing_either(program: Program) -> None:
    command = start_held(program, "impatient", x=1, epoch=3)
    command.ctrl_c()
    time.sleep(0.3)
    command.ctrl_c()
    assert command.wait(timeout_s=30).code == 130
    wait_until(lambda: not program.processes(), 15, "the end of Ray's processes")
    status = program.json("status", "impatient")
    assert (status["state"], status["trials"][1]["state"]) == ("interrupted", "paused")
    check_gone_on(program, "impatient", program.json("resume", "impatient"), epochs=[1, 2, 3, 3, 4])
    assert program.leftovers() == []


@pytest.mark.slow
@pytest.mark.parametrize("way", [signal.SIGINT, signal.SIGTERM], ids=lambda way: way.name)
def test_a_study_can_be_interrupted_while_ray_starts(program: Program, way: signal.Signals) -> None:
    name = f"early-{way.name.lower()}"
    command = program.start("run", program.spec(name), "--json")
    wait_until(lambda: "raylet" in program.names(), 60, "Ray's start")
    command.send(way)
    assert command.wait(timeout_s=30).code == 130
    assert program.leftovers() == []
    assert program.json("status", name)["state"] == "interrupted"
    assert program.json("resume", name)["state"] == "completed"


def test_a_study_whose_ray_does_not_start_says_so_and_goes_on_when_it_does(program: Program) -> None:
    no_time = {"RAY_gcs_server_port_wait_time_s": "0"}  # for Ray's server to say where it listens
    found = program.run("run", program.spec("no-ray"), "--json", env=no_time)
    assert found.code == 1
    error = found.json["error"]
    assert error["rule"] == "a study has a Ray of its own" and error["found"].startswith("Ray did not start: "), error
    assert error["expected"] == "`tune-service resume no-ray` when that is put right"
    assert "wait_for_persisted_port" in (program.storage / "no-ray" / "driver.log").read_text(), "its traceback"
    assert program.leftovers() == []
    assert program.json("status", "no-ray")["state"] == "interrupted"
    assert program.json("resume", "no-ray")["state"] == "completed"


def test_a_killed_driver_takes_its_ray_along_and_the_study_goes_on(program: Program) -> None:
    """T2: stock parts forget ASHA's rungs and leave a trial RUNNING for ever.

    This process takes orphans in, as a user's session or a container's init does: Ray's own would then go on.
    """
    adopt_orphans()
    command = start_held(program, "killed", x=1, epoch=3)
    command.send(signal.SIGKILL)
    assert command.wait().code == -signal.SIGKILL
    wait_until(lambda: not program.leftovers(), 60, "the end of Ray's processes and of its files")

    status = program.json("status", "killed")
    assert status["state"] == "interrupted"
    assert [trial["state"] for trial in status["trials"]] == ["completed", "paused"]
    assert status["trials"][1]["reason"] == "interrupted: the driver is gone"

    check_gone_on(program, "killed", program.json("resume", "killed"), epochs=[1, 2, 3, 3, 4])
    assert program.leftovers() == []


@pytest.mark.slow
def test_a_stopped_study_ends_at_the_next_reports_and_goes_on(program: Program) -> None:
    changes = {
        "training": {"faults": [{"x": x, "epoch": 2, "does": "hold"} for x in (0, 1)]},
        "search_space": {"x": {"choice": [0, 1, 2, 3]}},
        "budget": {"trials": 4},
    }
    command = program.start("run", program.spec("stopped", changes), "--json")
    for x in (0, 1):
        program.wait_for_note("stopped", "hold", x, epoch=2)
    stop = program.start("stop", "stopped", "--json")
    wait_until(lambda: "stopping: running trials end at their next report" in command.err, 30, "the request")
    assert stop.is_running and command.is_running
    program.release("stopped")
    found, stopped = command.wait(), stop.wait()
    assert (found.code, stopped.code) == (0, 0)
    status = found.json
    assert stopped.json == status and status["state"] == "stopped"
    assert len(status["trials"]) == 2
    for trial in status["trials"]:
        assert (trial["state"], trial["reason"]) == ("paused", "stopped by the user")
        assert scores(trial) == curve(trial["params"]["x"], 2), "the report that it was stopped at counts"

    status = program.json("resume", "stopped", "--trials", "3")
    assert status["state"] == "completed"
    assert [(trial["params"]["x"], trial["restarts"]) for trial in status["trials"]] == [(0, 1), (1, 1), (2, 0)]
    for trial in status["trials"]:
        assert scores(trial) == curve(trial["params"]["x"], 4)
        assert program.epochs("stopped", trial["params"]["x"]) == [1, 2, 3, 4]


def heavy(epoch: int) -> dict[str, Any]:
    """A trial of six epochs that get worse, whose checkpoints take over 2 s: only that of epoch 1 is written."""
    return {
        "trainable": "toys:heavy",
        "objective": {"mode": "min"},
        "training": {
            "max_epochs": 6,
            "epoch_s": 0.1,
            "ballast_bytes": 50_000_000,
            "faults": [{"x": 1, "epoch": epoch, "does": "hold"}],
        },
        "search_space": {"x": {"choice": [1]}},
        "budget": {"trials": 1},
    }


@pytest.mark.slow
def test_a_trial_whose_checkpoints_are_seldom_is_stopped_with_one_and_loses_nothing(program: Program) -> None:
    command = program.start("run", program.spec("heavy-stopped", heavy(epoch=4)), "--json")
    program.wait_for_note("heavy-stopped", "hold", 1, epoch=4)
    assert program.json("status", "heavy-stopped")["trials"][0]["checkpoint"]["epoch"] == 1
    stop = program.start("stop", "heavy-stopped", "--json")
    wait_until(lambda: "stopping: running trials end at their next report" in command.err, 30, "the request")
    program.release("heavy-stopped")
    assert (command.wait().code, stop.wait().code) == (0, 0)
    (trial,) = program.json("status", "heavy-stopped")["trials"]
    assert (trial["state"], trial["checkpoint"]["epoch"]) == ("paused", 4)
    (trial,) = program.json("resume", "heavy-stopped")["trials"]
    assert program.epochs("heavy-stopped", 1) == [1, 2, 3, 4, 5, 6]
    assert scores(trial) == curve(1, 6)


@pytest.mark.slow
def test_a_trial_whose_checkpoints_are_seldom_goes_on_after_its_last_one_when_it_is_killed(program: Program) -> None:
    command = program.start("run", program.spec("heavy-killed", heavy(epoch=4)), "--json")
    rank = program.wait_for_note("heavy-killed", "hold", 1, epoch=4).pid
    program.process(rank).send_signal(signal.SIGKILL)
    (trial,) = command.wait().json["trials"]
    assert "starting again after epoch 1" in command.err
    assert program.epochs("heavy-killed", 1) == [1, 2, 3, 4, 2, 3, 4, 5, 6]
    assert scores(trial) == curve(1, 6) and trial["checkpoint"]["epoch"] == 1, "the best epoch's"


@pytest.mark.slow
def test_stop_now_ends_trials_at_once(program: Program) -> None:
    command = start_held(program, "stopped-now", x=1, epoch=3)
    status = program.json("stop", "stopped-now", "--now", timeout_s=40)
    found = command.wait()
    assert (found.code, found.json) == (0, status)
    assert status["state"] == "stopped"
    assert status["trials"][1]["reason"] == "stopped by the user"
    check_gone_on(program, "stopped-now", program.json("resume", "stopped-now"), epochs=[1, 2, 3, 3, 4])


@pytest.mark.slow
def test_a_completed_study_can_be_extended(program: Program) -> None:
    changes = {
        "training": {"epoch_s": 0.0, "max_epochs": 2},
        "search_space": {"x": {"uniform": [0, 1]}},
        "sampler": {"name": "tpe"},
    }
    before = program.json("run", program.spec("longer", changes))
    assert (before["state"], len(before["trials"])) == ("completed", 2)
    more = program.json("resume", "longer", "--trials", "+2")
    assert (more["state"], len(more["trials"])) == ("completed", 4)
    assert more["trials"][:2] == before["trials"]
    assert len({trial["params"]["x"] for trial in more["trials"]}) == 4, "the first trials are not suggested again"
    most = program.json("resume", "longer", "--trials", "6")
    assert (most["state"], len(most["trials"])) == ("completed", 6)
    assert program.json("resume", "longer") == most, "there is nothing left to do"
    assert program.json("resume", "longer", "--trials", "2") == most, "they have all ended"
    assert len(program.json("resume", "longer", "--trials", "+1")["trials"]) == 7


@pytest.mark.slow
def test_two_studies_run_at_once_and_each_has_one_driver(program: Program) -> None:
    first, second = (program.start("run", program.spec(name, held(1, 2)), "--json") for name in ("one", "two"))
    for name in ("one", "two"):
        program.wait_for_note(name, "hold", x=1, epoch=2)
    assert {row["study"]: row["state"] for row in program.json("list")["studies"]}.items() >= {
        ("one", "running"),
        ("two", "running"),
    }

    for arguments in (["run", str(program.specs / "one.yaml")], ["resume", "one"], ["delete", "one", "--yes"]):
        refused = program.json(*arguments, code=2)
        assert "one" in json.dumps(refused)
    assert program.json("status", "one")["state"] == "running"
    running = program.json("status", "one")["trials"][1]
    assert (running["state"], running["reason"], len(running["reports"])) == ("running", None, 1)
    assert program.run("best", "one", "--out", "best-of-one").code in (0, 1)  # as trial 0 has ended or not

    watch = program.start("watch", "one", "--json")
    wait_until(lambda: watch.out, 30, "the first line of watch")
    program.json("stop", "one", "--now")
    assert first.wait().json["state"] == "stopped"
    seen = [json.loads(line) for line in watch.wait().out.splitlines()]
    assert len(seen) >= 2 and seen[0]["state"] == "running" and seen[-1] == program.json("status", "one")

    assert second.is_running
    assert program.json("status", "two")["state"] == "running"
    second.ctrl_c()
    assert second.wait().code == 130
    for name in ("one", "two"):
        check_gone_on(program, name, program.json("resume", name), epochs=[1, 2, 2, 3, 4])


@pytest.mark.slow
def test_asha_remembers_its_rungs_after_a_kill(program: Program) -> None:
    """T2: after a crash, stock ASHA starts from zero and lets the next trial through whatever it reached."""
    changes = held(5, 2) | {
        "search_space": {"x": {"choice": [9, 8, 7, 5, 1]}},
        "scheduler": {"name": "asha", "grace_period": 2, "reduction_factor": 3},
        "budget": {"trials": 5, "concurrent_trials": 1},
    }
    command = program.start("run", program.spec("rungs", changes), "--json")
    program.wait_for_note("rungs", "hold", x=5, epoch=2)
    command.send(signal.SIGKILL)
    command.wait()
    wait_until(lambda: not program.processes(), 60, "the end of Ray's processes")
    status = program.json("resume", "rungs")
    reasons = [trial["reason"] for trial in status["trials"]]
    assert reasons == [None, *(f"asha: epoch 2, rank {rank} of {rank}" for rank in (2, 3, 4, 5))]
    assert len({trial["number"] for trial in status["trials"]}) == 5


def _states(program: Program, name: str) -> list[str]:
    return [trial["state"] for trial in program.json("status", name)["trials"]]


def test_nothing_ran_twice_at_once(program: Program) -> None:
    """Over all studies of this file: no process began an epoch of a trial that a later one had begun to train."""
    epochs = [(folder.name, note) for folder in program.folder.glob("notes-*") for note in read_notes(folder)]
    last: dict[tuple[str, float, int], tuple[int, int]] = {}
    gone: dict[tuple[str, float, int], set[int]] = defaultdict(set)
    for study, note in epochs:
        if note.event == "epoch":
            trial = study, note.x, note.rank
            epoch, pid = last.get(trial, (0, note.pid))
            if note.pid != pid:
                gone[trial].add(pid)
            assert note.epoch == epoch + 1 or (note.epoch <= epoch + 1 and note.pid != pid)
            assert note.pid not in gone[trial]
            last[trial] = note.epoch, note.pid
    assert any(gone.values()), "there is something to look at"
