"""Ranks and supervisors that raise, end or freeze: a trial loses the running epoch, and nobody else anything."""

from __future__ import annotations

import signal
import time
from dataclasses import dataclass
from typing import Any

import psutil
import pytest
from fault_points import FaultPoints
from program import RANK, Program, Run, scores, wait_until
from toys import curve, read_notes

from tune_service.prctl import adopt_orphans

FINE, KILLED, RAISES, EXITS, FROZEN, ORPHANED = range(6)
"""What happens to the trial with this x."""


@dataclass(frozen=True)
class Hurt:
    run: Run
    trials: dict[int, Any]
    """By their x."""


@pytest.fixture(scope="module")
def hurt(program: Program) -> Hurt:
    """A study of six trials of two ranks, two at a time. Five are hurt in epoch 3, each in another way."""
    held = [{"x": x, "epoch": 3, "rank": 1, "does": "hold"} for x in (KILLED, FROZEN, ORPHANED)]
    own = [{"x": RAISES, "epoch": 3, "does": "raise"}, {"x": EXITS, "epoch": 3, "rank": 1, "does": "exit"}]
    changes = {
        "training": {"max_epochs": 4, "epoch_s": 0.5, "faults": held + own},
        "search_space": {"x": {"choice": [FINE, KILLED, RAISES, EXITS, FROZEN, ORPHANED]}},
        "budget": {"trials": 6},
        "resources": {"workers": 2},
        "faults": {"step_timeout_s": 20.0},
    }
    command = program.start("run", program.spec("hurt", changes), "--json")
    rank = program.wait_for_note("hurt", "hold", KILLED, epoch=3, rank=1).pid
    program.process(rank).send_signal(signal.SIGKILL)
    rank = program.wait_for_note("hurt", "hold", FROZEN, epoch=3, rank=1).pid
    program.process(rank).send_signal(signal.SIGSTOP)
    rank = program.wait_for_note("hurt", "hold", ORPHANED, epoch=3, rank=1).pid
    program.supervisor_of(rank).send_signal(signal.SIGKILL)
    found = command.wait()
    return Hurt(found, {trial["params"]["x"]: trial for trial in found.json["trials"]})


HURT = pytest.mark.parametrize(
    "x",
    [KILLED, RAISES, EXITS, FROZEN, ORPHANED],
    ids=["rank killed", "rank raises", "rank exits", "rank frozen", "supervisor killed"],
)


@HURT
def test_a_hurt_trial_is_completed_with_the_values_of_an_unhurt_one(hurt: Hurt, x: int) -> None:
    """T4, T10: stock parts count its epochs from 1 again, lose a report, or hang."""
    trial = hurt.trials[x]
    assert (trial["state"], trial["reason"]) == ("completed", None)
    assert scores(trial) == curve(x, 4)


@HURT
def test_a_hurt_trial_was_started_again_once(hurt: Hurt, x: int) -> None:
    assert hurt.trials[x]["restarts"] == 1


@HURT
@pytest.mark.parametrize("rank", [0, 1])
def test_a_hurt_trial_repeats_only_the_running_epoch(hurt: Hurt, program: Program, x: int, rank: int) -> None:
    assert program.epochs("hurt", x, rank) == [1, 2, 3, 3, 4]


def test_the_other_trials_are_left_alone(hurt: Hurt, program: Program) -> None:
    assert hurt.trials[FINE]["restarts"] == 0
    assert program.epochs("hurt", FINE) == [1, 2, 3, 4]


def test_the_study_is_completed_and_says_what_happened(hurt: Hurt) -> None:
    assert hurt.run.code == 0
    assert hurt.run.json["state"] == "completed"
    told = hurt.run.err
    for x, words in {
        KILLED: "rank 1 died",
        RAISES: "rank 0 raised ValueError: an egg was bad",
        EXITS: "rank 1 died",
        FROZEN: "rank 1 gave no report in 20 s",
        ORPHANED: "the trial's supervisor was lost",
    }.items():
        assert f"trial {hurt.trials[x]['number']}: {words}" in told


# ---- trainables that never work


def test_trials_that_fail_alike_end_the_study(program: Program) -> None:
    """The reason has all that is needed to find the fault: the exception, the rank, what it printed last."""
    changes = {
        "trainable": "toys:hopeless",
        "search_space": {"x": {"choice": list(range(8))}},
        "budget": {"trials": 8, "concurrent_trials": 1},
        "faults": {"restarts_per_trial": 1},
    }
    status = program.json("run", program.spec("hopeless", changes), code=1)
    assert status["state"] == "failed" and status["best"] is None
    failed = [trial for trial in status["trials"] if trial["state"] == "failed"]
    assert [trial["number"] for trial in failed] == [0, 1, 2]
    for trial in failed:
        first, *rest = trial["reason"].splitlines()
        assert first == f"rank 0 raised RuntimeError: no bread at {trial['params']['x']}"
        assert "the oven of rank 0 is cold" in rest
        assert trial["restarts"] == 1
        assert program.epochs("hopeless", trial["params"]["x"]) == [1, 1]
    assert program.json("status", "hopeless") == status
    assert program.run("best", "hopeless", "--out", "best-of-hopeless").code == 1


WAYS = {
    "nothing": "is a generator function; found toys:odd returned NoneType None",
    "text": "yields trainables.Report; found a str",
    "silent": "no finite score was reported",
    "other metric": "the report of epoch 1 has no objective 'score'; its metrics: f1, loss",
    "epoch 0": "counts its epochs up from 1; found epoch 0",
    "epoch twice": "counts its epochs up from 1; found epoch 1 after epoch 1",
    "two minds": "the ranks disagree on the epoch of their report: [1, 2]",
    "word for number": "reports metrics that are numbers; found score is 'good'",
}


@pytest.fixture(scope="module")
def odd(program: Program) -> Any:
    """A study whose trials break the contract of a trainable, each in its own way, and one that keeps it."""
    changes = {
        "trainable": "toys:odd",
        "search_space": {"way": {"choice": [*WAYS, "none"]}},
        "budget": {"trials": len(WAYS) + 1},
        "resources": {"workers": 2},
        "faults": {"restarts_per_trial": 0, "same_error_limit": 99},
    }
    return program.json("run", program.spec("odd", changes))


@pytest.mark.parametrize("way", WAYS)
def test_a_trainable_that_breaks_its_contract_is_told_how(odd: Any, way: str) -> None:
    trial = next(trial for trial in odd["trials"] if trial["params"]["way"] == way)
    assert trial["state"] == "failed"
    assert WAYS[way] in trial["reason"]


def test_a_study_is_completed_when_only_some_trials_failed(odd: Any) -> None:
    assert odd["state"] == "completed"
    assert odd["best"]["value"] == 0.75


def test_without_checkpoints_a_restart_begins_at_epoch_1_and_says_so(program: Program, tmp_path: Any) -> None:
    fault = {"x": 1, "epoch": 3, "does": "raise"}
    changes = {"trainable": "toys:forgetful", "training": {"max_epochs": 4, "faults": [fault]}}
    found = program.run("run", program.spec("forgetful", changes), "--json")
    trial = next(trial for trial in found.json["trials"] if trial["params"]["x"] == 1)
    assert "starting again at epoch 1: it has no checkpoint" in found.err
    assert program.epochs("forgetful", 1) == [1, 2, 3, 1, 2, 3, 4]
    assert scores(trial) == curve(1, 4)
    assert (trial["checkpoint"], trial["restarts"]) == (None, 1)
    out = tmp_path / "best"
    assert program.json("best", "forgetful", "--out", str(out))["number"] == trial["number"]
    assert sorted(path.name for path in out.iterdir()) == ["config.yaml", "metrics.json"]


# ---- frozen supervisors


@pytest.mark.slow
@pytest.mark.parametrize("epoch", [1, 3])
def test_a_frozen_supervisor_costs_its_trial_the_running_epoch(program: Program, epoch: int) -> None:
    """T10: Tune alone would wait for it for ever."""
    name = f"stuck-{epoch}"
    changes = {
        "training": {"max_epochs": 4, "faults": [{"x": 1, "epoch": epoch, "rank": 0, "does": "hold"}]},
        "search_space": {"x": {"choice": [0, 1, 2]}},
        "budget": {"trials": 3, "concurrent_trials": 1},
        "faults": {"step_timeout_s": 12.0},
    }
    command = program.start("run", program.spec(name, changes), "--json")
    rank = program.wait_for_note(name, "hold", 1, epoch).pid
    program.supervisor_of(rank).send_signal(signal.SIGSTOP)
    found = command.wait()
    assert found.code == 0, found.err
    for trial in found.json["trials"]:
        assert scores(trial) == curve(trial["params"]["x"], 4)
        assert trial["restarts"] == (1 if trial["params"]["x"] == 1 else 0)
    assert program.epochs(name, 1) == [*range(1, epoch + 1), *range(epoch, 5)]
    assert f"trial {found.json['trials'][1]['number']}: the trial's supervisor was lost" in found.err


@pytest.mark.slow
def test_processes_that_freeze_as_they_start_cost_their_trial_the_time_to_start(program: Program) -> None:
    """A supervisor whose class is being set up, which Tune alone would wait for for ever; then a rank that imports."""
    points = FaultPoints(program.folder / "points-starts")
    points.arm("resetting-0")
    importing = program.folder / "importing"
    (program.specs / "slow_toys.py").write_text(
        "import time\nfrom pathlib import Path\nend = time.monotonic() + 25\n"
        f"while Path({str(importing)!r}).exists() and time.monotonic() < end:\n    time.sleep(0.05)\n"
        "from toys import steady\n"
    )
    changes = {
        "trainable": "slow_toys:steady",
        "search_space": {"x": {"choice": [0, 1]}},
        "budget": {"trials": 2, "concurrent_trials": 1},
        "faults": {"start_timeout_s": 30.0},
    }
    command = program.start("run", program.spec("starts", changes), "--json", env=points.env)
    program.process(points.reached("resetting-0")).send_signal(signal.SIGSTOP)
    importing.touch()  # from here on an import takes until this is gone
    points.release("resetting-0")
    wait_until(lambda: program.named(RANK) or not command.is_running, 120, "a first rank")
    for rank in program.named(RANK):
        rank.send_signal(signal.SIGSTOP)
    importing.unlink()
    found = command.wait(timeout_s=240)
    assert found.code == 0, found.err
    assert [(scores(trial), trial["restarts"]) for trial in found.json["trials"]] == [
        (curve(0, 4), 1),
        (curve(1, 4), 0),
    ]
    assert "trial 0: the trial's supervisor was lost" in found.err
    assert "trial 0: rank 0 gave no answer in 30 s; silent: [0]; starting again at epoch 1" in found.err


@pytest.mark.slow
@pytest.mark.parametrize("way", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "frozen"])
def test_a_driver_s_end_is_cleared_up_behind_whatever_befell_its_guard_before(
    program: Program, way: signal.Signals
) -> None:
    adopt_orphans()  # as a session's or a container's init does: Ray's processes then go on by themselves
    name = f"unguarded-{way.name.lower()}"
    changes = {"training": {"faults": [{"x": 0, "epoch": 2, "does": "hold"}]}, "search_space": {"x": {"choice": [0]}}}
    command = program.start("run", program.spec(name, {**changes, "budget": {"trials": 1}}))
    program.wait_for_note(name, "hold", 0, epoch=2)

    def guards(state: str = psutil.STATUS_SLEEPING) -> list[psutil.Process]:
        found = [each for each in psutil.Process(command.pid).children() if each.status() == state]
        return [each for each in found if "clear_up" in " ".join(each.cmdline())]

    (guard,) = guards()
    guard.send_signal(way)
    if way == signal.SIGKILL:
        wait_until(lambda: [each for each in guards() if each.pid != guard.pid], 20, "a successor")
    else:
        time.sleep(2)  # stopped, or already going on again
        wait_until(guards, 20, "the guard")
    command.send(signal.SIGKILL)
    command.wait()
    wait_until(lambda: not program.leftovers(), 60, "the end of all that the driver left")
    assert not program.leftovers()


@pytest.mark.slow
def test_a_trial_whose_ranks_always_die_is_given_up_and_the_others_go_on(program: Program) -> None:
    faults = [{"x": 1, "epoch": 2, "does": "hold"}]
    changes = {"training": {"faults": faults}, "faults": {"restarts_per_trial": 0}}
    command = program.start("run", program.spec("doomed", changes), "--json")
    rank = program.wait_for_note("doomed", "hold", 1, epoch=2).pid
    wait_until(lambda: program.epochs("doomed", 0) == [1, 2, 3, 4], 60, "the end of the other trial")
    program.process(rank).send_signal(signal.SIGKILL)
    found = command.wait()
    assert found.code == 0
    by_x = {trial["params"]["x"]: trial for trial in found.json["trials"]}
    assert by_x[1]["state"] == "failed"
    assert by_x[1]["reason"].startswith("rank 0 died")
    assert "rank 0 is about to hold" in by_x[1]["reason"]
    assert by_x[0]["state"] == "completed"
    assert found.json["best"]["number"] == by_x[0]["number"]
    assert len(read_notes(program.notes("doomed"))) > 0


def test_a_trial_that_runs_out_of_memory_fails_at_once_and_the_next_one_has_it(program: Program) -> None:
    changes = {
        "training": {"faults": [{"x": 0, "epoch": 2, "does": "eat"}]},
        "budget": {"concurrent_trials": 1},
    }
    status = program.json("run", program.spec("hungry", changes))
    hungry, next_one = status["trials"]
    assert (hungry["state"], hungry["restarts"]) == ("failed", 0)
    assert hungry["reason"].startswith("out of memory: rank 0 raised MemoryError")
    assert (next_one["state"], scores(next_one)) == ("completed", curve(1, 4))
