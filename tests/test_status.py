"""Which trial is the best, from what trials reported."""

from __future__ import annotations

import json
import math

import pytest

from tune_service.status import (
    BestTrial,
    EpochReport,
    ObjectiveStatus,
    StudyStatus,
    TrialState,
    TrialStatus,
    best_report,
    best_trial,
    ranked,
)

MAX = ObjectiveStatus(metric="score", mode="max")
MIN = ObjectiveStatus(metric="score", mode="min")


def trial(number: int, *values: float | None, state: TrialState = "completed") -> TrialStatus:
    """A trial that reported `values` from epoch 1 on."""
    reports = tuple(EpochReport(epoch=epoch, metrics={"score": value}) for epoch, value in enumerate(values, start=1))
    return TrialStatus(number=number, state=state, params={"x": number}, reports=reports)


def best(*trials: TrialStatus, objective: ObjectiveStatus = MAX) -> tuple[int, int, float] | None:
    found = best_trial(trials, objective, usable=lambda _: True)
    return (found.number, found.epoch, found.value) if found else None


def test_the_best_report_is_the_best_finite_one_and_the_earliest_of_equals() -> None:
    values = (0.5, 0.9, None, 0.9, 0.1)
    assert best(trial(0, *values)) == (0, 2, 0.9)
    assert best(trial(0, *values), objective=MIN) == (0, 5, 0.1)
    assert best_report(trial(0, None, None), MAX) is None
    assert best_report(trial(0), MAX) is None


def test_a_value_of_zero_is_a_value() -> None:
    assert best(trial(0, -1.0, 0.0, -2.0)) == (0, 2, 0.0)
    assert best(trial(0, 1.0, 0.0, 2.0), objective=MIN) == (0, 2, 0.0)


def test_a_report_without_the_metric_or_with_infinity_is_passed_over() -> None:
    other = EpochReport(epoch=1, metrics={"loss": 0.9})
    infinite = EpochReport(epoch=2, metrics={"score": math.inf})
    status = TrialStatus(number=0, state="completed", params={}, reports=(other, infinite))
    assert best_report(status, MAX) is None


@pytest.mark.parametrize("loss", [math.inf, None])
@pytest.mark.parametrize("name", ["train_loss", "eval_loss"])
def test_a_report_with_which_its_trial_diverged_is_not_the_best_however_good_its_objective(
    name: str, loss: float | None
) -> None:
    good = EpochReport(epoch=1, metrics={"score": 0.5, name: 2.0})
    diverged = EpochReport(epoch=2, metrics={"score": 0.9, name: loss})
    status = TrialStatus(number=0, state="pruned", params={}, reports=(good, diverged))
    assert best_report(status, MAX) == good
    found = best_trial([status], MAX, lambda each: True)
    assert found is not None and (found.epoch, found.value) == (1, 0.5)


def test_of_equal_trials_the_lowest_number_is_the_best() -> None:
    assert best(trial(2, 0.9), trial(1, 0.1, 0.9), trial(3, 0.9)) == (1, 2, 0.9)
    assert best(trial(2, 0.1), trial(1, 0.9, 0.1), trial(3, 0.1), objective=MIN) == (1, 2, 0.1)


@pytest.mark.parametrize("state", ["failed", "paused", "running", "waiting"])
def test_only_completed_and_pruned_trials_can_be_the_best(state: TrialState) -> None:
    assert best(trial(0, 0.9, state=state), trial(1, 0.5)) == (1, 1, 0.5)
    assert best(trial(0, 0.9, state=state)) is None


def test_a_pruned_trial_can_be_the_best() -> None:
    assert best(trial(0, 0.8, 0.9, state="pruned"), trial(1, 0.85)) == (0, 2, 0.9)
    assert best(trial(0, 0.9, None, state="pruned"), trial(1, 0.85)) == (0, 1, 0.9)  # diverged at epoch 2


def test_a_trial_that_is_not_usable_makes_room_for_the_next() -> None:
    asked: list[tuple[int, int]] = []

    def usable(one: BestTrial) -> bool:
        asked.append((one.number, one.epoch))
        return one.number == 2

    found = best_trial([trial(0, 0.9), trial(1, 0.2, 0.8), trial(2, 0.7), trial(3, 0.6)], MAX, usable)
    assert found is not None and (found.number, found.params) == (2, {"x": 2})
    assert asked == [(0, 1), (1, 2), (2, 1)]
    assert best_trial([trial(0, 0.9)], MAX, usable) is None


def test_trials_are_ranked_best_first() -> None:
    trials = [trial(0, 0.5), trial(1), trial(2, 0.7), trial(3, 0.6)]
    assert [one.number for one in ranked(trials, MAX)] == [2, 3, 0]
    assert [one.number for one in ranked(trials, MIN)] == [0, 3, 2]


def test_a_status_is_the_json_of_the_contract() -> None:
    found = BestTrial(number=0, epoch=1, value=0.7, params={"x": 0})
    status = StudyStatus(study="toy", state="running", objective=MAX, trials=(trial(0, 0.7, None),), best=found)
    assert json.loads(json.dumps(status.to_json(), allow_nan=False)) == {
        "study": "toy",
        "state": "running",
        "objective": {"metric": "score", "mode": "max"},
        "trials": [
            {
                "number": 0,
                "state": "completed",
                "reason": None,
                "params": {"x": 0},
                "reports": [
                    {"epoch": 1, "metrics": {"score": 0.7}},
                    {"epoch": 2, "metrics": {"score": None}},
                ],
                "checkpoint": None,
                "restarts": 0,
                "started_at": None,
                "ended_at": None,
            }
        ],
        "best": {"number": 0, "epoch": 1, "value": 0.7, "params": {"x": 0}},
    }
