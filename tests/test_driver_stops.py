"""How a study is stopped, and goes on."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hand_driven import ASHA, PAUSED, HandDriven, killed

from tune_service.driver import STOP_POLL_S
from tune_service.record import Record


@pytest.mark.parametrize("now", [False, True])
def test_a_request_to_stop_pauses_trials_at_their_next_report(tmp_path: Path, now: bool) -> None:
    study = HandDriven(tmp_path)
    done, running = study.run(0.9), study.begin()
    study.report(running, 1, 0.5)
    Record.open(study.folder).request_stop(now)  # as another process does
    assert not study.driver.stopping
    study.driver.poll()
    assert study.driver.stopping and study.driver.stopping_now == now
    assert study.told == ["stopping: running trials end " + ("at once" if now else "at their next report")]
    assert study.driver.ask() is None
    assert not study.report(running, 2, 0.6)
    study.end()
    status = study.record.status()
    assert status.state == "stopped"
    assert [trial.state for trial in status.trials] == ["completed", "paused"]
    trial = status.trials[running]
    assert (trial.reason, trial.ended_at, len(trial.reports)) == ("stopped by the user", None, 2)
    assert status.best is not None and status.best.number == done


@pytest.mark.parametrize(("now", "epochs"), [(False, [2]), (True, [1])])
def test_a_trial_that_a_stop_ends_has_the_checkpoint_of_its_last_report_but_not_at_once(
    tmp_path: Path, now: bool, epochs: list[int]
) -> None:
    study = HandDriven(tmp_path)
    running = study.begin()
    assert study.report(running, 1, 0.5, num_bytes=10)
    study.record.request_stop(now)
    study.driver.poll()
    assert not study.report(running, 2, 0.6, num_bytes=10)
    study.end()
    assert study.folder.checkpoints.epochs(running) == epochs
    assert [report.epoch for report in study.trial(running).reports] == [1, 2]


def test_a_supervisor_that_is_lost_while_the_study_stops_costs_its_trial_no_restart(tmp_path: Path) -> None:
    study = HandDriven(tmp_path, faults={"restarts_per_trial": 0})
    running = study.begin()
    study.record.request_stop(now=True)
    study.driver.poll()
    study.driver.supervisor_lost(running, "ended with its Ray")
    trial = study.trial(running)
    assert (trial.state, trial.reason) == ("paused", "the trial's supervisor was lost: ended with its Ray")
    study.resume()
    assert study.begin() == running


def test_a_request_to_stop_is_looked_for_often_but_not_at_every_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = HandDriven(tmp_path)
    now = 1000.0
    monkeypatch.setattr("tune_service.driver.time.monotonic", lambda: now)
    study.driver.poll()
    Record.open(study.folder).request_stop(False)
    study.driver.poll()
    assert not study.driver.stopping
    now += STOP_POLL_S
    study.driver.poll()
    assert study.driver.stopping


def test_a_last_epoch_that_comes_while_the_study_stops_still_completes_its_trial(tmp_path: Path) -> None:
    study = HandDriven(tmp_path, training={"max_epochs": 2}, scheduler=ASHA)
    numbers = [study.begin() for _ in range(3)]
    study.record.request_stop(False)
    study.driver.poll()
    assert not study.report(numbers[0], 2, 0.9)
    assert not study.report(numbers[1], 1, math.nan)
    assert not study.fail(numbers[2], "rank 0 died")
    study.end()
    assert [trial.state for trial in study.record.trials()] == ["completed", "pruned", "paused"]


def test_resume_asks_for_paused_trials_first_with_their_numbers_and_params(tmp_path: Path) -> None:
    study = HandDriven(tmp_path)
    study.run(0.5)
    paused = [study.begin(), study.begin()]
    study.report(paused[1], 1, 0.7)
    before = study.params()
    study.end()
    assert [trial.state for trial in study.record.trials()] == ["completed", "paused", "paused"]
    study.resume()
    asked = [study.driver.ask() for _ in range(3)]
    assert [each and each.number for each in asked] == [1, 2, 3]
    assert [each and each.params for each in asked[:2]] == before[1:]
    study.driver.started(2)
    assert study.report(2, 2, 0.8)
    assert [report.epoch for report in study.trial(2).reports] == [1, 2]
    assert (study.trial(2).state, study.trial(2).restarts, study.trial(2).reason) == ("running", 1, None)


def test_a_trial_of_a_killed_driver_goes_on_first_too(tmp_path: Path) -> None:
    study = HandDriven(tmp_path)
    number = study.begin()
    study.report(number, 1, 0.7)
    study.kill()
    status = study.record.status()
    assert status.state == "interrupted"
    assert (status.trials[0].state, status.trials[0].reason) == ("paused", "interrupted: the driver is gone")
    study.resume()
    assert (study.trial(number).state, study.trial(number).reason) == ("paused", PAUSED)
    assert study.begin() == number


def test_asha_knows_after_a_resume_what_it_knew_before(tmp_path: Path) -> None:
    study = HandDriven(tmp_path, scheduler=ASHA)
    study.run(0.8, 0.8, 0.8)
    study.run(0.7)
    study.kill()
    study.resume()
    number = study.begin()
    assert not study.report(number, 1, 0.75)
    assert study.trial(number).reason == "asha: epoch 1, rank 2 of 3"


def test_asha_does_not_stop_a_trial_at_its_last_epoch(tmp_path: Path) -> None:
    study = HandDriven(tmp_path, scheduler=ASHA, training={"max_epochs": 4})
    study.run(0.9, 0.9, 0.9, 0.9)
    number = study.begin()
    assert not study.driver.result(
        {
            "number": number,
            "next_within_s": 1.0,
            "epoch": 3,
            "metrics": [("score", 0.1)],
            "saves": False,
            "checkpoint_bytes": None,
            "finished": True,
        }
    )
    assert study.trial(number).state == "completed"


def test_a_stop_lets_a_trial_go_on_that_owes_a_whole_checkpoint(tmp_path: Path) -> None:
    study = HandDriven(tmp_path)
    number = study.begin()
    assert study.report(number, 1, 0.5, num_bytes=30)
    assert study.report(number, 2, 0.6)
    study.record.request_stop(False)
    study.driver.poll()
    study.commit(number, 2, 10, {"score": 0.6}, resumable=False)
    assert study.saved(number, 2, 10, resumable=False), "a model alone, asked for just before the stop"
    assert not study.report(number, 3, 0.7, num_bytes=30)
    assert study.folder.checkpoints.epochs(number) == [3]


def test_what_asha_said_is_done_after_a_kill_that_came_before_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = HandDriven(tmp_path, scheduler=ASHA)
    study.run(*[0.9] * 9, num_bytes=10)
    number = study.begin()
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(study.record, "prune", killed)
        study.report(number, 1, 0.1, num_bytes=10)
    study.resume()
    assert study.begin() == number
    assert not study.report(number, 1, 0.1, num_bytes=10), "the checkpoint that it goes on from"
    assert (study.trial(number).state, study.trial(number).reason) == ("pruned", "asha: epoch 1, rank 2 of 2")
