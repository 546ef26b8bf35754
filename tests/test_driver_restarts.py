"""What a study does when ranks and supervisors are lost, and when trials fail alike."""

from __future__ import annotations

from pathlib import Path

import pytest
from hand_driven import ASHA, HandDriven

from tune_service.failures import MAX_IN_VAIN


class Clock:
    """The driver's own, from before there is a driver."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr("tune_service.driver.time.monotonic", lambda: self.now)


def overdue_after(study: HandDriven, clock: Clock, seconds: int) -> dict[int, float]:
    """Trial -> when it was overdue first. The driver polls once a second: one that polls seldom was stopped itself."""
    overdue: dict[int, float] = {}
    for _ in range(seconds):
        clock.now += 1.0
        for number in study.driver.poll():
            overdue.setdefault(number, clock.now)
    return overdue


def test_a_restart_counts_its_epochs_on_and_writes_a_repeated_one_once(tmp_path: Path) -> None:
    study = HandDriven(tmp_path)
    number = study.begin()
    for epoch, score in [(1, 0.5), (2, 0.6)]:
        assert study.report(number, epoch, score, num_bytes=10)
    assert study.fail(number, "rank 0 died: killed")
    assert "starting again after epoch 2" in study.told[-1]
    assert study.report(number, 2, 0.6, num_bytes=10)  # the supervisor's first: where it goes on
    assert study.report(number, 3, 0.7, num_bytes=10)
    trial = study.trial(number)
    assert [(report.epoch, report.metrics["score"]) for report in trial.reports] == [(1, 0.5), (2, 0.6), (3, 0.7)]
    assert trial.restarts == 1 and trial.state == "running" and trial.reason is None
    assert study.folder.journal.read_text().count('"report:2"') == 1


def test_a_trial_without_checkpoints_begins_again_at_epoch_1_and_says_so(tmp_path: Path) -> None:
    study = HandDriven(tmp_path)
    number = study.begin()
    study.report(number, 1, 0.5)
    assert study.fail(number, "rank 0 raised ValueError: no\nits log")
    assert study.told[-1] == (
        "trial 0: rank 0 raised ValueError: no; starting again at epoch 1: it has no checkpoint to go on from"
    )


def test_every_start_after_the_first_counts_as_a_restart(tmp_path: Path) -> None:
    study = HandDriven(tmp_path, faults={"restarts_per_trial": 9})
    number = study.begin()
    assert study.trial(number).restarts == 0
    study.fail(number, "rank 0 died")
    study.driver.supervisor_lost(number, "node gone")
    assert study.begin() == number
    assert study.trial(number).restarts == 2
    study.resume()
    assert study.begin() == number
    assert study.trial(number).restarts == 3


def test_a_trial_that_crashes_once_more_than_its_restarts_has_failed(tmp_path: Path) -> None:
    study = HandDriven(tmp_path, faults={"restarts_per_trial": 2})
    number = study.begin()
    assert [study.fail(number, "rank 0 died") for _ in range(3)] == [True, True, False]
    assert (study.trial(number).state, study.trial(number).restarts) == ("failed", 2)
    study.run(0.5)  # and the study goes on


def test_resumes_use_up_no_restarts(tmp_path: Path) -> None:
    study = HandDriven(tmp_path, faults={"restarts_per_trial": 1})
    number = study.begin()
    for _ in range(3):
        study.resume()
        assert study.begin() == number
    assert study.fail(number, "rank 0 died")
    assert not study.fail(number, "rank 0 died")
    assert study.trial(number).restarts == 4


def test_lost_supervisors_and_failed_ranks_use_up_the_same_restarts(tmp_path: Path) -> None:
    study = HandDriven(tmp_path, faults={"restarts_per_trial": 2})
    number = study.begin()
    assert study.fail(number, "rank 0 died")
    study.driver.supervisor_lost(number, "node gone")
    assert (study.trial(number).state, study.trial(number).reason) == (
        "paused",
        "the trial's supervisor was lost: node gone",
    )
    assert study.begin() == number, "it is the next in line"
    assert study.trial(number).state == "running"
    assert not study.fail(number, "rank 0 died")
    assert (study.trial(number).state, study.trial(number).restarts) == ("failed", 2)


def test_a_supervisor_that_is_lost_once_too_often_ends_its_trial_as_failed(tmp_path: Path) -> None:
    study = HandDriven(tmp_path, faults={"restarts_per_trial": 1})
    number = study.begin()
    study.driver.supervisor_lost(number, "node gone")
    assert study.begin() == number
    study.driver.supervisor_lost(number, "node gone")
    trial = study.trial(number)
    assert (trial.state, trial.reason) == ("failed", "the trial's supervisor was lost: node gone")


def test_a_supervisor_that_was_lost_before_it_took_its_trial_costs_a_restart_and_no_number(tmp_path: Path) -> None:
    """Tune does not start a trial again that is handed to a warm supervisor which has died."""
    study = HandDriven(tmp_path)
    asked = study.driver.ask()
    assert asked is not None
    study.driver.handed_over(asked.number, is_warm=True)
    study.driver.supervisor_lost(asked.number, "node gone")
    assert study.begin() == asked.number
    assert study.trial(asked.number).restarts == 0, "it had not begun"
    assert study.params() == [asked.params]


def test_a_supervisor_that_dies_before_it_takes_a_trial_that_had_begun_costs_no_restart_either(tmp_path: Path) -> None:
    study = HandDriven(tmp_path, faults={"restarts_per_trial": 1})
    number = study.begin()
    study.driver.supervisor_lost(number, "node gone")
    asked = study.driver.ask()
    assert asked is not None and asked.number == number
    study.driver.supervisor_lost(number, "it was dead")
    assert study.trial(number).state == "paused"


def test_a_supervisor_that_is_silent_for_longer_than_it_said_is_overdue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    study = HandDriven(tmp_path)
    number, other = study.begin(), study.begin()
    study.report(number, 1, 0.5)  # the next one within 60 s, and 30 s for the way
    assert overdue_after(study, clock, 89) == {}
    assert overdue_after(study, clock, 2) == {number: 91.0}  # and not `other`, which is still being set up
    study.driver.supervisor_lost(number, "killed: overdue")
    assert study.driver.poll() == []
    assert study.trial(other).state == "running"


def test_a_supervisor_whose_process_starts_has_the_start_s_time_and_a_warm_one_the_way_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tuner says so at every step while Tune's trial is pending, and may find a warm one for it meanwhile."""
    clock = Clock(monkeypatch)
    study = HandDriven(tmp_path, faults={"start_timeout_s": 100.0})
    cold, warm, moved = (study.driver.ask() for _ in range(3))
    assert cold is not None and warm is not None and moved is not None

    def say() -> None:
        study.driver.handed_over(cold.number, is_warm=False)
        study.driver.handed_over(warm.number, is_warm=True)
        study.driver.handed_over(moved.number, is_warm=clock.now >= 50)

    poll = study.driver.poll
    monkeypatch.setattr(study.driver, "poll", lambda: (say(), poll())[1])
    assert overdue_after(study, clock, 140) == {warm.number: 32.0, moved.number: 81.0, cold.number: 132.0}


def test_a_supervisor_that_has_taken_its_trial_may_start_ranks_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The warm ones, which do not answer, and others in their place."""
    clock = Clock(monkeypatch)
    study = HandDriven(tmp_path, faults={"start_timeout_s": 100.0})
    number = study.begin()
    assert overdue_after(study, clock, 240) == {number: 231.0}


def test_supervisors_are_not_overdue_for_a_time_in_which_their_driver_stood_still(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its machine slept: their news lie unread."""
    clock = Clock(monkeypatch)
    study = HandDriven(tmp_path)
    number = study.begin()
    study.report(number, 1, 0.5)
    assert overdue_after(study, clock, 30) == {}
    clock.now += 3600.0
    assert study.driver.poll() == []
    woke_up = clock.now
    assert overdue_after(study, clock, 70) == {number: woke_up + 61.0}


def test_three_trials_that_fail_alike_end_the_study_as_failed(tmp_path: Path) -> None:
    study = HandDriven(tmp_path, faults={"restarts_per_trial": 0, "same_error_limit": 3})
    running = study.begin()
    study.run(0.5)
    for address, line in [("0x7f3a", "log a"), ("0x11bc", "log b")]:
        study.crash(f"rank 0 raised OSError: cannot open {address} of row {len(address)}\n{line}")
    assert not study.driver.stopping
    study.crash("rank 0 raised OSError: cannot open 0xffff of row 99\nlog c")
    assert study.driver.stopping and study.driver.stopping_now
    assert study.driver.ask() is None
    assert not study.report(running, 1, 0.5)
    study.end("the study failed")
    status = study.record.status()
    assert status.state == "failed"
    assert [trial.state for trial in status.trials] == ["paused", "completed", "failed", "failed", "failed"]
    assert str(study.record.failure).startswith("3 trials failed alike: rank 0 raised OSError: cannot open")


def test_trials_that_fail_in_different_ways_do_not_end_the_study(tmp_path: Path) -> None:
    study = HandDriven(tmp_path, faults={"restarts_per_trial": 0})
    for name in "abcdef":
        study.crash(f"rank 0 raised {name}")
    assert study.driver.ask() is not None


@pytest.mark.parametrize("end", ["no report", "no objective", "supervisor lost"])
def test_whatever_way_three_trials_fail_alike_the_study_ends(tmp_path: Path, end: str) -> None:
    study = HandDriven(tmp_path)
    for _ in range(3):
        number = study.begin()
        if end == "no report":
            study.finish(number)
        elif end == "no objective":
            study.driver.result(
                {
                    "number": number,
                    "next_within_s": 1.0,
                    "epoch": 1,
                    "metrics": [],
                    "saves": False,
                    "checkpoint_bytes": None,
                    "finished": False,
                }
            )
        else:
            for _ in range(1 + study.spec.faults.restarts_per_trial):
                study.driver.supervisor_lost(number, "node gone")
                if study.trial(number).ended_at is None:
                    assert study.begin() == number
    assert study.driver.ask() is None and study.record.failure is not None


def test_a_study_that_failed_can_be_resumed(tmp_path: Path) -> None:
    study = HandDriven(tmp_path, faults={"restarts_per_trial": 0})
    for _ in range(3):
        study.crash("rank 0 raised OSError: disk full")
    study.end()
    assert study.record.status().state == "failed"
    study.resume()
    assert study.record.status().state == "running"
    assert study.run(0.5) == 3
    study.crash("rank 0 raised OSError: disk full")
    assert not study.driver.stopping  # counted anew


def test_a_trial_that_starts_again_is_not_judged_twice_at_a_rung_that_it_has_passed(tmp_path: Path) -> None:
    study = HandDriven(tmp_path, scheduler=ASHA, budget={"trials": 4, "concurrent_trials": 4})
    first = study.begin()
    assert study.report(first, 1, 0.1, num_bytes=10)  # the first at a rung goes on
    for score in (0.7, 0.8, 0.9):
        assert study.report(study.begin(), 1, score)
    assert study.fail(first, "rank 0 died")
    assert study.report(first, 1, 0.1, num_bytes=10)  # handed in once more, from the checkpoint
    assert study.report(first, 2, 0.1)


def test_a_trial_that_begins_again_at_epoch_1_says_so_whoever_was_lost(tmp_path: Path) -> None:
    again = "trial 0 begins again at epoch 1: it has no checkpoint to go on from"
    study = HandDriven(tmp_path)
    study.report(study.begin(), 1, 0.5)
    study.driver.supervisor_lost(0, "node gone")
    study.begin()
    assert study.told[-1] == again
    study.report(0, 1, 0.5, num_bytes=10)
    study.resume()
    told = len(study.told)
    study.begin()
    assert again not in study.told[told:], "it goes on after epoch 1"


def test_what_the_user_wrote_wrong_is_not_tried_again(tmp_path: Path) -> None:
    study = HandDriven(tmp_path, faults={"restarts_per_trial": 2})
    number = study.begin()
    reason = "rank 0 raised ModelError: model: can be opened"
    assert not study.driver.result({"number": number, "next_within_s": 60.0, "failure": reason, "fault": "input"})
    assert (study.trial(number).state, study.trial(number).restarts) == ("failed", 0)


def test_supervisors_that_died_idle_use_up_no_restart_of_the_trials_they_are_handed(tmp_path: Path) -> None:
    study = HandDriven(tmp_path, faults={"restarts_per_trial": 0})
    for _ in range(MAX_IN_VAIN):
        asked = study.driver.ask()
        assert asked is not None and asked.number == 0
        study.driver.supervisor_lost(0, "it was dead")
    assert study.begin() == 0
    assert study.trial(0).restarts == 0
    study.driver.supervisor_lost(0, "node gone")
    assert study.trial(0).state == "failed", "this one had taken it"
    for _ in range(MAX_IN_VAIN + 1):
        asked = study.driver.ask()
        assert asked is not None and asked.number == 1
        study.driver.supervisor_lost(1, "it does not start")
    assert study.trial(1).state == "failed", "and this is no accident"
