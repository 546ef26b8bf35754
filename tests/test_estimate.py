"""How long a study is said to take, against what ASHA really stops and sums that a reader can do."""

from __future__ import annotations

from pathlib import Path

import pytest
from hand_driven import toy_spec

from tune_service.estimate import estimate, expected_epochs, most_trials, too_long
from tune_service.kept import BYTES_PER_PARAMETER
from tune_service.spec import StudySpec

STEP = {"train_rows": 1000.0, "train_row_s": 0.01, "eval_rows": 500.0, "eval_row_s": 0.002, "parameters": 1e6}
"""An epoch of 11 s, and a checkpoint of 12 MB."""


def spec(trials: int = 64, scheduler: str = "asha", **resources: float) -> StudySpec:
    sections = {"budget": {"trials": trials}, "scheduler": {"name": scheduler}}
    return toy_spec(Path.cwd(), resources={"workers": 1, "gpus_per_worker": 0} | resources, **sections)


def test_asha_runs_about_a_third_of_the_trials_beyond_each_rung() -> None:
    """Rungs 1 and 3 of 9 epochs. Of many trials 1/3 and 1/9 go on; of few, more do: the first at a rung always does."""
    assert expected_epochs(spec(3000)) / 3000 == pytest.approx(1 + 2 / 3 + 6 / 9, rel=0.1)
    assert expected_epochs(spec(1)) == 9
    per_trial = [expected_epochs(spec(trials)) / trials for trials in (1, 4, 16, 64, 256)]
    assert per_trial == sorted(per_trial, reverse=True)
    assert expected_epochs(spec(16)) == expected_epochs(spec(16))  # no dice in an estimate


def test_without_a_scheduler_every_trial_runs_all_its_epochs() -> None:
    assert expected_epochs(spec(16, scheduler="none")) == 16 * 9


def test_a_grid_has_no_more_trials_than_points() -> None:
    space = {"x": {"choice": [1, 2, 3]}, "y": {"int_uniform": [1, 2]}}
    grid = toy_spec(Path.cwd(), search_space=space, sampler={"name": "grid"}, budget={"trials": 64})
    assert expected_epochs(grid) == 6 * 9
    assert estimate(grid, STEP, at_once=64, storage_bytes_s=12e6).epochs == (54, 54)
    assert most_trials(toy_spec(Path.cwd(), search_space=space, sampler={"name": "grid"}, budget={"trials": 4})) == 4
    wide = {"x": {"int_uniform": [0, 10**30]}}
    assert most_trials(toy_spec(Path.cwd(), search_space=wide, sampler={"name": "grid"}, budget={"trials": 4})) == 4


def test_time_is_epochs_over_trials_at_once_and_never_less_than_one_trial_takes() -> None:
    found = estimate(spec(16, scheduler="none"), STEP, at_once=4, storage_bytes_s=12e6)
    assert BYTES_PER_PARAMETER * STEP["parameters"] == 12e6  # a second for each checkpoint
    assert found.epoch_s == (12.0, 12.0)
    assert found.wall_s == (16 * 9 * 12 / 4,) * 2
    assert estimate(spec(2, scheduler="none"), STEP, at_once=64, storage_bytes_s=12e6).wall_s[0] == 9 * 12


def test_a_slow_disk_sets_the_pace_however_many_trials_run() -> None:
    """A whole checkpoint takes 100 s: a tenth of an epoch goes into whole ones, and a third of 100 s into a model."""
    large = STEP | {"parameters": 1e7}
    found = estimate(spec(64, scheduler="none"), large, at_once=64, storage_bytes_s=1.2e6)
    assert found.wall_s == pytest.approx((64 * 9 * (1.1 + 100 / 3),) * 2)
    small = estimate(spec(64, scheduler="none"), STEP, at_once=64, storage_bytes_s=0.12e6)
    assert small.wall_s == (64 * 9 * 100,) * 2, "one of less than 50 MB is always whole"


def test_trials_that_share_a_gpu_may_be_as_slow_as_one_after_the_other() -> None:
    found = estimate(spec(16, scheduler="none", gpus_per_worker=0.25), STEP, at_once=4, storage_bytes_s=12e6)
    assert found.epoch_s == (12.0, 48.0)
    assert found.gpu_hours == pytest.approx((16 * 9 * 12 * 0.25 / 3600, 16 * 9 * 48 * 0.25 / 3600))
    assert str(found).startswith("7.2 to 29 min, 0.12 to 0.48 GPU hours: 144 epochs")
    alone = estimate(spec(16, scheduler="none", gpus_per_worker=0.25), STEP, at_once=1, storage_bytes_s=12e6)
    assert alone.epoch_s == (12.0, 12.0)


def test_an_epoch_longer_than_a_silent_rank_is_waited_for_is_refused() -> None:
    slow = STEP | {"train_row_s": 2.0}
    check = too_long(spec(), estimate(spec(), slow, 1, 12e6))
    assert check is not None and (check.ok, check.code) == (False, 2)
    assert check.advice == "faults.step_timeout_s: 6003"
    large = STEP | {"parameters": 1e9}
    check = too_long(spec(), estimate(spec(), large, 1, 12e6))
    assert check is not None and check.found.startswith("an epoch or a checkpoint takes 17 min")
    assert too_long(spec(), estimate(spec(), STEP, 1, 12e6)) is None
    hasty = toy_spec(Path.cwd(), faults={"step_timeout_s": 10.0})
    check = too_long(hasty, estimate(hasty, STEP, 1, 12e6))
    assert check is not None and "a rank that is silent for 10 s is ended" in check.found
