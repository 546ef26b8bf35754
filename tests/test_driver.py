"""What a study does at each event, with no Ray: how trials end, and which there are."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from hand_driven import ASHA, HandDriven, optuna_trials, play, play_in_pairs, score_of
from optuna.samplers._tpe.sampler import _split_trials
from optuna.trial import TrialState as OptunaState


def test_a_trial_that_asha_stopped_is_pruned_with_every_value_also_the_last(tmp_path: Path) -> None:
    study = HandDriven(tmp_path, scheduler=ASHA)
    first, second = study.begin(), study.begin()
    assert [study.report(first, epoch, score) for epoch, score in [(1, 0.6), (2, 0.7), (3, 0.8)]] == [True] * 3
    assert study.report(second, 1, 0.65) and study.report(second, 2, 0.9)
    assert not study.report(second, 3, 0.75)  # rung 3: the second of two, and ceil(2 / 3) = 1 goes on

    trial = study.trial(second)
    assert (trial.state, trial.reason) == ("pruned", "asha: epoch 3, rank 2 of 2")
    assert [report.metrics["score"] for report in trial.reports] == [0.65, 0.9, 0.75]
    assert trial.ended_at is not None
    found = optuna_trials(study.folder)[second]
    assert found.state == OptunaState.PRUNED
    assert found.intermediate_values == {1: 0.65, 2: 0.9, 3: 0.75}


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("metric", ["train_loss", "eval_loss", "score"])
def test_a_trial_with_a_loss_or_objective_that_is_not_finite_ends_at_that_report(
    tmp_path: Path, metric: str, bad: float
) -> None:
    study = HandDriven(tmp_path)
    number = study.begin()
    assert study.report(number, 1, 0.5, train_loss=1.0, eval_loss=1.0)
    metrics = {"score": 0.6, "train_loss": 1.0, "eval_loss": 1.0} | {metric: bad}
    assert not study.report(number, 2, **metrics)
    trial = study.trial(number)
    assert (trial.state, trial.reason) == ("pruned", f"diverged: {metric} is {bad} at epoch 2")
    assert [report.epoch for report in trial.reports] == [1, 2]
    assert trial.reports[1].metrics[metric] is None


def test_a_report_with_which_a_trial_diverged_stops_no_other_and_is_not_the_best(tmp_path: Path) -> None:
    study = HandDriven(tmp_path, scheduler=ASHA, training={"max_epochs": 9})
    for _ in range(4):
        assert not study.report(study.begin(), 1, 0.9, train_loss=math.inf)
    healthy = study.begin()
    assert study.report(healthy, 1, 0.4), "the first of its rung"
    study.resume()
    assert study.begin() == healthy
    assert not study.report(study.begin(), 1, 0.3), "behind the healthy one"
    assert study.finish(healthy) is False
    best = study.record.status().best
    assert best is not None and (best.number, best.value) == (healthy, 0.4)


def test_the_checkpoint_of_a_report_that_diverged_takes_the_place_of_no_better_one(tmp_path: Path) -> None:
    study = HandDriven(tmp_path, training={"max_epochs": 2})
    number = study.begin()
    assert study.report(number, 1, 0.5, num_bytes=10)
    assert not study.report(number, 2, 0.9, num_bytes=10, train_loss=math.inf)
    best = study.record.status().best
    assert best is not None and (best.epoch, best.value) == (1, 0.5)
    assert 1 in study.folder.checkpoints.epochs(number)


def test_trials_that_diverged_let_no_others_pass_a_rung(tmp_path: Path) -> None:
    """They came there without a value. The best third, rounded up, of four would be two."""
    study = HandDriven(tmp_path, scheduler=ASHA)
    study.run(*[0.9] * 9)
    study.run(math.nan), study.run(math.nan)
    number = study.run(0.8)
    assert study.trial(number).reason == "asha: epoch 1, rank 2 of 2"


def test_another_metric_may_be_nan(tmp_path: Path) -> None:
    study = HandDriven(tmp_path)
    number = study.begin()
    assert study.report(number, 1, 0.5, eval_f1=math.nan)


def test_a_diverged_trial_is_the_worst_of_all_for_tpe(tmp_path: Path) -> None:
    study = HandDriven(tmp_path, scheduler=ASHA)
    diverged_with_value = study.begin()
    study.report(diverged_with_value, 1, 0.98)
    study.report(diverged_with_value, 2, 0.97, train_loss=math.inf)
    diverged = study.run(0.99, math.nan)
    completed, pruned = study.run(0.99, 0.3), study.run(0.2)
    assert study.trial(pruned).reason == "asha: epoch 1, rank 4 of 4"
    study.begin()  # brings the sampler's view up to date

    view = study.record._study.sampler._view
    order = []
    for n in range(1, 5):
        below, _ = _split_trials(view, view.trials, n)
        order += [trial.number for trial in below if trial.number not in order]
    assert order[:2] == [completed, pruned]
    assert set(order[2:]) == {diverged, diverged_with_value}


def test_tpe_keeps_away_from_where_trials_diverge(tmp_path: Path) -> None:
    # At x > 0.5 the first epoch is the best there is and the second one is nan; elsewhere trials stop at epoch 1. TPE
    # by itself would follow the ones that came further.
    study = HandDriven(tmp_path, budget={"trials": 40})
    asked = []
    while (trial := study.driver.ask()) is not None:
        study.driver.started(trial.number)
        asked.append(trial.params["x"])
        if trial.params["x"] > 0.5:
            study.report(trial.number, 1, 1.0)
            study.report(trial.number, 2, math.nan)
        else:
            study.report(trial.number, 1, 0.5)
            study.record.prune(trial.number, "asha: epoch 1, rank 2 of 2")
    assert len(asked) == 40
    assert sum(x <= 0.5 for x in asked[20:]) >= 16


def test_a_trial_counts_with_its_best_epoch(tmp_path: Path) -> None:
    study = HandDriven(tmp_path, training={"max_epochs": 3})
    number = study.run(0.5, 0.8, 0.6)
    assert study.trial(number).state == "completed" and study.trial(number).reason is None
    assert optuna_trials(study.folder)[number].value == 0.8
    best = study.record.status().best
    assert best is not None and (best.number, best.epoch, best.value) == (number, 2, 0.8)


def test_for_a_loss_the_best_epoch_is_the_smallest(tmp_path: Path) -> None:
    study = HandDriven(tmp_path, training={"max_epochs": 3}, objective={"metric": "score", "mode": "min"})
    number = study.run(0.5, 0.3, 0.4)
    assert optuna_trials(study.folder)[number].value == 0.3


def test_a_trial_that_comes_to_its_end_early_is_completed(tmp_path: Path) -> None:
    study = HandDriven(tmp_path)
    number = study.run(0.5, 0.6)
    assert study.trial(number).state == "completed"
    assert [report.epoch for report in study.trial(number).reports] == [1, 2]


def test_a_trial_that_reports_nothing_has_failed(tmp_path: Path) -> None:
    study = HandDriven(tmp_path)
    number = study.run()
    assert (study.trial(number).state, study.trial(number).reason) == (
        "failed",
        "no finite score was reported: its trainable ended without any report",
    )


def test_a_report_without_the_objective_ends_its_trial_at_once_and_says_what_it_has(tmp_path: Path) -> None:
    study = HandDriven(tmp_path, objective={"metric": "accuracy"})
    number = study.begin()
    assert not study.report(number, 1, 0.5, loss=1.0)
    trial = study.trial(number)
    assert trial.state == "failed"
    assert trial.reason == "the report of epoch 1 has no objective 'accuracy'; its metrics: loss, score"


def test_a_crashed_trial_has_failed_with_its_reason_and_the_log_lines(tmp_path: Path) -> None:
    study = HandDriven(tmp_path, faults={"restarts_per_trial": 0})
    number = study.begin()
    study.report(number, 1, 0.5)
    reason = "rank 1 raised ValueError: no\nLast lines of trial-00000-rank-1.log:\nreading row 7\nValueError: no"
    assert not study.fail(number, reason)
    trial = study.trial(number)
    assert (trial.state, trial.reason, trial.restarts) == ("failed", reason, 0)
    assert [report.epoch for report in trial.reports] == [1]
    assert optuna_trials(study.folder)[number].state == OptunaState.FAIL


def test_whatever_comes_after_a_trials_end_changes_nothing(tmp_path: Path) -> None:
    study = HandDriven(tmp_path)
    number = study.run(0.5)
    before = study.trial(number)
    assert not study.report(number, 2, 0.9)
    assert not study.fail(number, "late")
    study.driver.supervisor_lost(number, "late")
    assert study.trial(number) == before


def test_nothing_stays_running(tmp_path: Path) -> None:
    study = HandDriven(tmp_path, scheduler=ASHA, budget={"trials": 12}, training={"max_epochs": 3})
    ends: list[Callable[[], int]] = [
        lambda: study.run(0.9, 0.9, 0.9),
        lambda: study.run(0.1),
        lambda: study.run(math.nan),
        lambda: study.crash("x" * len(study.params())),
    ]
    for number in range(12):
        assert ends[number % 4]() == number
    assert study.driver.ask() is None
    states = Counter(trial.state for trial in optuna_trials(study.folder))
    assert states == {OptunaState.COMPLETE: 3, OptunaState.PRUNED: 6, OptunaState.FAIL: 3}
    study.end()
    assert study.record.status().state == "completed"


def test_the_first_trial_is_the_specs_own(tmp_path: Path) -> None:
    study = HandDriven(tmp_path, training={"max_epochs": 9, "x": 0.25, "depth": 2}, budget={"trials": 2})
    asked = study.driver.ask()
    assert asked is not None and (asked.number, asked.params) == (0, {"x": 0.25, "depth": 2})
    assert study.driver.ask() is not None
    assert study.driver.ask() is None  # the first one counts


def test_the_budget_counts_every_trial_that_got_a_number(tmp_path: Path) -> None:
    study = HandDriven(tmp_path, budget={"trials": 4}, scheduler=ASHA, faults={"restarts_per_trial": 0})
    study.run(0.9, 0.9, 0.9)
    study.run(0.1)
    study.run(math.nan)
    study.crash("rank 0 died")
    assert study.driver.ask() is None
    study.end()
    assert study.record.status().state == "completed"
    study.resume(budget=5)
    assert study.run(0.1) == 4
    assert study.driver.ask() is None


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_the_same_spec_and_seed_give_the_same_trials(tmp_path: Path, sampler: str) -> None:
    found = []
    for folder, seed in [("a", 5), ("b", 5), ("c", 6)]:
        study = HandDriven(tmp_path / folder, sampler={"name": sampler, "seed": seed})
        play(study, until=16)
        found.append(study.params())
    assert found[0] == found[1] != found[2]
    assert len({params["x"] for params in found[0]}) == 16  # and none of them twice


@pytest.mark.parametrize("sampler", ["tpe", "random"])
@pytest.mark.parametrize("reopened_at", [(1,), (6, 13)])
def test_a_study_reopened_half_way_gives_the_same_further_trials(
    tmp_path: Path, sampler: str, reopened_at: tuple[int, ...]
) -> None:
    undisturbed = HandDriven(tmp_path / "undisturbed", sampler={"name": sampler})
    play(undisturbed, until=16)
    study = HandDriven(tmp_path / "reopened", sampler={"name": sampler})
    for until in reopened_at:
        play(study, until)
        study.kill()
        study.resume()
    play(study, until=16)
    assert study.params() == undisturbed.params()


@pytest.mark.parametrize("killed_with", [3, 17, 31])
def test_trials_that_were_running_at_the_kill_change_no_later_trial(tmp_path: Path, killed_with: int) -> None:
    undisturbed = HandDriven(tmp_path / "undisturbed", budget={"trials": 40})
    play_in_pairs(undisturbed, until=40)
    study = HandDriven(tmp_path / "killed", budget={"trials": 40})
    play_in_pairs(study, until=40, killed_with=killed_with)
    assert study.params() == undisturbed.params()


@pytest.mark.parametrize("left", ["nothing", "a trial without params"])
def test_a_trial_whose_driver_was_killed_before_it_had_params_gets_those_of_an_undisturbed_study(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: str
) -> None:
    undisturbed, study = HandDriven(tmp_path / "undisturbed"), HandDriven(tmp_path / "killed")
    for each in (undisturbed, study):
        play(each, until=12)
        each.begin()
    if left == "nothing":
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr("tune_service.record.create_trial", lambda **_: (_ for _ in ()).throw(KeyboardInterrupt))
            study.driver.ask()
    else:
        study.record._study.enqueue_trial({})  # as earlier versions did, and other tools of Optuna's do
    study.kill()
    waiting = [] if left == "nothing" else ["waiting"]
    assert [trial.state for trial in study.record.trials()][12:] == ["paused", *waiting]
    study.resume()
    assert study.begin() == 12
    for each in (undisturbed, study):
        assert each.begin() == 13
        for number in (12, 13):
            each.report(number, 1, score_of(each.params()[number]))
            each.finish(number)
        play(each, until=16)
    assert study.params() == undisturbed.params()


GRID = {"depth": {"choice": [1, 2]}, "name": {"choice": ["x", "y"]}}


def test_a_grid_starts_with_the_specs_own_point_then_goes_in_order_and_ends(tmp_path: Path) -> None:
    study = HandDriven(
        tmp_path,
        sampler={"name": "grid"},
        search_space=GRID,
        training={"max_epochs": 1, "depth": 2, "name": "x"},
    )
    assert (study.driver.num_open, study.record.budget_trials) == (4, 4), "though the spec's budget is 16"
    for _ in range(4):
        study.run(0.5)
    assert study.driver.ask() is None
    assert study.params() == [
        {"depth": 2, "name": "x"},
        {"depth": 1, "name": "x"},
        {"depth": 1, "name": "y"},
        {"depth": 2, "name": "y"},
    ]
    study.end()
    assert study.record.status().state == "completed"


def test_trials_that_wait_count_as_ones_that_could_run_though_the_budget_is_less_by_now(tmp_path: Path) -> None:
    study = HandDriven(tmp_path, budget={"trials": 9})
    for _ in range(3):
        study.run(0.5)
    study.begin()
    study.begin()
    study.resume(budget=1)
    assert study.driver.num_open == 2


def test_a_grid_that_is_resumed_goes_on_at_its_next_point(tmp_path: Path) -> None:
    study = HandDriven(tmp_path, sampler={"name": "grid"}, search_space=GRID, budget={"trials": 2})
    study.run(0.5)
    study.run(0.5)
    assert study.driver.ask() is None
    study.end()
    assert study.record.status().state == "completed"
    study.resume(budget=16)
    assert study.record.status().state == "running"
    study.run(0.5)
    study.kill()
    assert study.record.status().state == "interrupted"
    study.resume()
    study.run(0.5)
    assert study.driver.ask() is None
    assert [tuple(params.values()) for params in study.params()] == [(1, "x"), (1, "y"), (2, "x"), (2, "y")]


def test_status_is_json_without_nan(tmp_path: Path) -> None:
    study = HandDriven(tmp_path)
    study.run(0.5)
    study.run(math.nan)
    study.begin()
    document = json.dumps(study.record.status().to_json(), allow_nan=False)
    assert json.loads(document)["trials"][1]["reports"][0]["metrics"] == {"score": None}
