"""Which checkpoints of a study's trials stay, and when a trial waits for room."""

from __future__ import annotations

from pathlib import Path

import pytest
from hand_driven import HandDriven, budget_of


def test_a_trial_keeps_its_best_and_last_checkpoint_while_it_runs_and_then_its_best(tmp_path: Path) -> None:
    study = HandDriven(tmp_path, training={"max_epochs": 5})
    number = study.begin()
    kept = []
    for epoch, score in enumerate([0.5, 0.8, 0.6, 0.7, 0.75], start=1):
        study.report(number, epoch, score, num_bytes=10)
        kept.append(study.folder.checkpoints.epochs(number))
    assert kept == [[1], [2], [2, 3], [2, 4], [2]]
    checkpoint = study.trial(number).checkpoint
    assert checkpoint is not None and (checkpoint.epoch, checkpoint.bytes) == (2, 10)


def test_when_room_is_short_the_worst_trials_checkpoints_go(tmp_path: Path) -> None:
    study = HandDriven(tmp_path, checkpoints=budget_of(400))
    for score in (0.5, 0.7, 0.6):
        study.run(score, num_bytes=100)
    assert study.folder.checkpoints.kept() == {0: [1], 1: [1], 2: [1]}
    study.report(study.begin(), 1, 0.4, num_bytes=100)  # 400 are full, and its next one needs 100
    assert study.folder.checkpoints.kept() == {1: [1], 2: [1], 3: [1]}


def test_room_for_a_trial_s_checkpoints_is_made_when_it_is_handed_out(tmp_path: Path) -> None:
    study = HandDriven(tmp_path, checkpoints=budget_of(400))
    for score in (0.5, 0.7, 0.6):
        study.run(score, num_bytes=100)
    study.begin()
    assert study.folder.checkpoints.kept() == {0: [1], 1: [1], 2: [1]}
    study.begin()
    assert study.folder.checkpoints.kept() == {1: [1], 2: [1]}, "each of the two may write one"


def test_a_trial_that_waits_without_a_checkpoint_takes_no_room(tmp_path: Path) -> None:
    study = HandDriven(tmp_path, checkpoints=budget_of(600))
    study.run(0.5, num_bytes=100)
    first, second = study.begin(), study.begin()
    study.report(first, 1, 0.6, num_bytes=100)
    study.driver.supervisor_lost(second, "node gone")
    assert study.driver.has_room, "two that run with two each, the best, and the best that has ended"


def test_the_only_checkpoint_of_a_trial_of_one_epoch_is_missed_when_it_is_gone(tmp_path: Path) -> None:
    study = HandDriven(tmp_path, training={"max_epochs": 1})
    number = study.run(0.5, num_bytes=10)
    assert study.record.saves(number)
    study.folder.checkpoints.delete(number, 1)
    assert study.record.best() is None


def test_room_is_kept_for_a_whole_checkpoint_before_there_is_one(tmp_path: Path) -> None:
    study = HandDriven(tmp_path, checkpoints=budget_of(400))
    for score in (0.5, 0.7):
        study.run(score, num_bytes=50)
    number = study.begin()
    study.report(number, 1, 0.6, num_bytes=50, resumable=False)
    assert study.folder.checkpoints.kept() == {0: [1], 1: [1], 2: [1]}
    study.saved(number, 1, 50, resumable=False, whole_bytes=300)
    assert study.folder.checkpoints.kept() == {1: [1], 2: [1]}, "150 and 300 are more than 400"
    assert not study.driver.has_room
    study.report(number, 2, 0.6, num_bytes=60)
    assert study.driver.has_room, "it was not so large"


def test_a_failed_trial_keeps_no_checkpoint_that_the_best_one_needs_room_for(tmp_path: Path) -> None:
    study = HandDriven(tmp_path, checkpoints=budget_of(150), faults={"restarts_per_trial": 0})
    study.run(0.7, num_bytes=100)
    number = study.begin()
    study.report(number, 1, 0.9, num_bytes=100)
    study.fail(number, "rank 0 died")
    study.run(0.6, num_bytes=100)
    assert study.folder.checkpoints.kept() == {0: [1]}
    study.kill()
    study.resume()
    study.run(0.8, num_bytes=100)
    best = study.record.status(deep=True).best
    assert best is not None and (best.number, best.value) == (3, 0.8)
    assert study.folder.checkpoints.kept() == {3: [1]}


def test_a_trial_that_failed_just_before_its_driver_was_killed_keeps_none_either(tmp_path: Path) -> None:
    study = HandDriven(tmp_path, checkpoints=budget_of(150))
    study.run(0.7, num_bytes=100)
    number = study.begin()
    study.report(number, 1, 0.9, num_bytes=100)
    study.record.fail(number, "rank 0 died")
    study.kill()
    study.resume()
    study.run(0.6, num_bytes=100)
    assert study.folder.checkpoints.kept() == {0: [1]}


def test_the_checkpoints_of_a_resumed_study_are_the_ones_that_are_there(tmp_path: Path) -> None:
    study = HandDriven(tmp_path, checkpoints=budget_of(250))
    study.run(0.5, num_bytes=100)
    number = study.begin()
    study.report(number, 1, 0.6, num_bytes=100)
    store = study.folder.checkpoints
    store.stage(number, 2)  # half a checkpoint of a killed writer
    store.stage(99, 1)
    store.commit(99, 1, {})  # and one of a trial that the record does not know
    study.kill()
    study.resume()
    assert store.kept() == {0: [1], 1: [1]}
    assert list(store.root.glob("trial-*/.*")) == []
    study.begin()
    study.report(number, 2, 0.7, num_bytes=100)
    study.finish(number)
    study.run(0.55, num_bytes=100)
    assert store.kept() == {1: [2], 2: [1]}


def test_an_epoch_that_the_killed_driver_never_saw_is_in_the_record_after_a_resume(tmp_path: Path) -> None:
    study = HandDriven(tmp_path)
    number = study.begin()
    study.report(number, 1, 0.5, num_bytes=10)
    store = study.folder.checkpoints
    (store.stage(number, 2) / "weights").write_bytes(b"w")
    store.commit(number, 2, {"score": 0.6})
    study.kill()
    study.resume()
    assert study.begin() == number
    assert study.report(number, 2, 0.6, num_bytes=1)  # the supervisor's first result is its checkpoint's
    assert [report.metrics["score"] for report in study.trial(number).reports] == [0.5, 0.6]


def test_of_a_trial_that_saves_some_epochs_the_best_saved_one_is_kept_and_exported(tmp_path: Path) -> None:
    study = HandDriven(tmp_path, scheduler={"name": "none"}, budget={"trials": 1})
    number = study.begin()
    study.report(number, 1, 0.9)
    study.report(number, 2, 0.5, num_bytes=10)
    study.report(number, 3, 0.4, num_bytes=10)
    study.finish(number)
    best = study.record.best()
    assert best is not None and (best.number, best.epoch, best.value) == (number, 2, 0.5)
    assert study.record.folder.checkpoints.epochs(number) == [2]


def test_a_running_trial_keeps_what_it_goes_on_from_and_the_model_of_its_best_epoch(tmp_path: Path) -> None:
    study = HandDriven(tmp_path, scheduler={"name": "none"}, budget={"trials": 1})
    number = study.begin()
    study.report(number, 1, 0.5, num_bytes=30)
    study.report(number, 2, 0.9, num_bytes=10, resumable=False)
    study.report(number, 3, 0.6, num_bytes=10, resumable=False)
    assert study.record.folder.checkpoints.epochs(number) == [1, 2]
    study.fail(number, "rank 0 died")
    assert study.told[-1] == "trial 0: rank 0 died; starting again after epoch 1"
    study.resume()
    study.begin()
    study.report(number, 2, 0.9, num_bytes=10, resumable=False)
    assert study.record.folder.checkpoints.epochs(number) == [1, 2], "another driver keeps the same"
    study.report(number, 3, 0.7, num_bytes=30)
    assert study.record.folder.checkpoints.epochs(number) == [2, 3]


@pytest.mark.parametrize("way", ["failed", "out of memory", "supervisor lost", "resumed"])
def test_epochs_that_are_trained_again_count_with_their_new_values_alone(tmp_path: Path, way: str) -> None:
    """On a GPU they come out a little different. The models of the first time must not hold the place of the best."""
    study = HandDriven(tmp_path, scheduler={"name": "none"}, budget={"trials": 1})
    number = study.begin()
    for epoch, score, resumable in ((1, 0.5, True), (4, 0.860, False), (5, 0.862, False)):
        study.report(number, epoch, score, num_bytes=10, resumable=resumable)
    if way == "failed":
        assert study.fail(number, "rank 0 died")
    elif way == "out of memory":
        result = {"number": number, "next_within_s": 60.0, "failure": "out of memory", "fault": "memory"}
        assert study.driver.result(result | {"micro_batch_size": 8})
    elif way == "supervisor lost":
        study.driver.supervisor_lost(number, "killed")
        study.begin()
    else:
        study.resume()
        study.begin()
    assert study.folder.checkpoints.epochs(number) == [1]
    study.report(number, 4, 0.861, num_bytes=10, resumable=False)
    study.report(number, 5, 0.859)
    study.finish(number)
    best = study.record.best()
    assert best is not None and (best.epoch, best.value) == (4, 0.861)
    assert study.folder.checkpoints.epochs(number) == [4]


def test_half_a_checkpoint_of_a_lost_supervisor_takes_no_room(tmp_path: Path) -> None:
    study = HandDriven(tmp_path, faults={"restarts_per_trial": 0})
    lost, other = study.begin(), study.begin()
    for number in (lost, other):
        (study.folder.checkpoints.stage(number, 1) / "weights").write_bytes(b"w" * 70)
    study.driver.supervisor_lost(lost, "killed")
    assert study.trial(lost).state == "failed"
    assert study.folder.checkpoints.total_bytes() == 70, "the other one is still being written"


def test_trials_that_are_too_many_for_the_budget_wait_until_fewer_run(tmp_path: Path) -> None:
    """Nobody knows the size of the first checkpoint of a trainable of the user's own."""
    study = HandDriven(tmp_path, checkpoints=budget_of(500), budget={"trials": 4})
    numbers = [study.begin() for _ in range(4)]
    goes_on = [study.report(number, 1, 0.5, num_bytes=100) for number in numbers[:3]]
    assert goes_on == [True, True, True]
    result = {"number": 3, "next_within_s": 60.0, "failure": "checkpoints.budget_gib is too small", "fault": "budget"}
    assert not study.driver.result(result)
    assert (study.trial(3).state, study.driver.stopping) == ("paused", False)
    assert not study.driver.has_room
    for number in numbers[:3]:
        study.finish(number)
    assert study.driver.has_room and study.begin() == 3
    assert not study.driver.result(result), "alone, it has all the room that there is"
    assert study.trial(3).state == "failed"


def test_checkpoints_that_never_fit_fail_their_trials_one_after_the_other(tmp_path: Path) -> None:
    """However many run side by side: one that waits for room is not handed out again beside as many."""
    study = HandDriven(tmp_path, checkpoints=budget_of(500), budget={"trials": 6}, faults={"same_error_limit": 5})
    failure = {"next_within_s": 60.0, "failure": "checkpoints.budget_gib is too small", "fault": "budget"}
    running = [study.begin() for _ in range(3)]
    most = []
    while running and len(most) < 50:
        most.append(len(running))
        number = running.pop()
        assert not study.driver.result(failure | {"number": number})
        while study.driver.has_room and (asked := study.driver.ask()) is not None:
            study.driver.started(asked.number)
            running.append(asked.number)
    assert [study.trial(number).state for number in range(5)] == ["failed"] * 5
    assert len(most) <= 12 and max(study.trial(number).restarts for number in range(5)) <= 3, most


def test_a_trial_that_did_not_fit_beside_others_leaves_their_number_as_it_was_once_it_fits(tmp_path: Path) -> None:
    study = HandDriven(tmp_path, checkpoints=budget_of(5000), budget={"trials": 6})
    failure = {"next_within_s": 60.0, "failure": "checkpoints.budget_gib is too small", "fault": "budget"}
    first, second, third = study.begin(), study.begin(), study.begin()
    study.driver.result(failure | {"number": third})
    assert not study.driver.has_room, "two run"
    study.report(first, 1, 0.5), study.report(second, 1, 0.5)
    study.finish(first)
    assert study.driver.has_room and study.begin() == third
    assert not study.driver.has_room
    study.report(third, 1, 0.6, num_bytes=100)
    assert study.driver.has_room


def test_a_trial_that_never_fitted_leaves_the_number_of_others_as_it_was(tmp_path: Path) -> None:
    study = HandDriven(tmp_path, checkpoints=budget_of(5000), budget={"trials": 6})
    failure = {"next_within_s": 60.0, "failure": "checkpoints.budget_gib is too small", "fault": "budget"}
    first, second = study.begin(), study.begin()
    study.driver.result(failure | {"number": second})
    study.report(first, 1, 0.5)
    study.finish(first)
    assert study.begin() == second and not study.driver.has_room, "it has all the room that there is"
    study.driver.result(failure | {"number": second})
    assert study.trial(second).state == "failed"
    study.begin()
    assert study.driver.has_room
