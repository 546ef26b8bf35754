"""How many trials a study runs at once, when memory runs out and when they share a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
from hand_driven import HandDriven

from tune_service.driver import Driver
from tune_service.sharing import Sharing


def test_a_trial_that_runs_out_of_memory_beside_others_on_its_gpu_waits_until_fewer_run(tmp_path: Path) -> None:
    study = HandDriven(tmp_path, resources={"gpus_per_worker": "auto"}, faults={"on_oom": "fail"})
    study.driver = Driver(study.spec, study.record, study.told.append, Sharing(num_gpus=1, most=8))
    assert study.driver.most_at_once == 2
    first, second = study.begin(), study.begin()
    result = {"number": second, "next_within_s": 60.0, "failure": "out of memory: rank 0", "fault": "memory", "pid": 7}
    assert not study.driver.result(result)
    assert study.told == ["1 trial has the GPU from now on: trial 1 ran out of memory and is tried again"]
    assert (study.trial(second).state, study.driver.most_at_once) == ("paused", 1)
    study.driver.result({"number": first, "next_within_s": 60.0, "failure": "its rank died", "pid": 6})
    assert study.trial(first).state == "running"
    assert study.begin() == second
    assert not study.driver.result(result), "it had the GPU for itself"
    assert study.trial(second).state == "failed"


def test_a_micro_batch_is_halved_only_where_a_trial_has_the_gpu_for_itself(tmp_path: Path) -> None:
    study = HandDriven(tmp_path, resources={"gpus_per_worker": "auto"})
    study.driver = Driver(study.spec, study.record, study.told.append, Sharing(num_gpus=1, most=2))
    number = study.begin()
    result = {"number": number, "next_within_s": 60.0, "failure": "out of memory", "fault": "memory", "pid": 7}
    assert not study.driver.result(result | {"micro_batch_size": 8})
    assert study.begin() == number
    assert study.driver.result(result | {"micro_batch_size": 8})
    asked = study.trial(number)
    assert (asked.state, asked.restarts) == ("running", 2)


def test_the_number_of_trials_at_once_follows_what_their_reports_tell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr("tune_service.driver.time.monotonic", lambda: now[0])
    study = HandDriven(tmp_path, resources={"gpus_per_worker": "auto"})
    study.driver = Driver(study.spec, study.record, study.told.append, Sharing(num_gpus=1, most=8))
    numbers = [study.begin(), study.begin()]

    def report(epoch: int, **more: float) -> None:
        """Both trials, 2 s after the report before."""
        now[0] += 2.0
        for number in numbers:
            result = {"number": number, "pid": number, "next_within_s": 60.0, "finished": False}
            result |= {"epoch": epoch, "metrics": [("score", 0.5)], "saves": False, "checkpoint_bytes": None}
            study.driver.result(result | more)

    report(1)  # told again by supervisors that went on from a checkpoint: nothing was trained
    for epoch in range(2, 7):
        report(epoch, memory_share=0.25)
    assert study.told == []
    report(7, memory_share=0.25)
    assert study.told == ["2 trials share the GPU: 1 epochs/s; trying 3"]
    assert study.driver.most_at_once == 3, "three quarters of the memory; four would take it all"


def test_what_is_measured_beside_a_supervisor_that_died_counts_for_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alone on the GPU its neighbour is faster; two would seem to get more done than they do."""
    now = [0.0]
    monkeypatch.setattr("tune_service.driver.time.monotonic", lambda: now[0])
    study = HandDriven(tmp_path, resources={"gpus_per_worker": "auto"}, training={"max_epochs": 99})
    study.driver = Driver(study.spec, study.record, study.told.append, Sharing(num_gpus=1, most=2))
    numbers = [study.begin(), study.begin()]

    def report(number: int, epoch: int, seconds: float) -> None:
        now[0] += seconds
        result = {"number": number, "pid": number, "next_within_s": 60.0, "finished": False, "epoch": epoch}
        result |= {"metrics": [("score", 0.5)], "saves": False, "checkpoint_bytes": None, "memory_share": 0.1}
        study.driver.result(result)

    for epoch in range(1, 5):
        for number in numbers:
            report(number, epoch, 1.0)
    study.driver.supervisor_lost(numbers[0], "it was killed")
    for epoch in range(5, 15):
        report(numbers[1], epoch, 0.1)
    assert study.told == ["trial 0: the trial's supervisor was lost: it was killed; starting again"]
