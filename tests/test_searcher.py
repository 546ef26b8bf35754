"""Search spaces become Optuna's, and what is tried next depends on the record and the seed alone."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from hand_driven import HandDriven, play, play_in_pairs
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler, TPESampler
from optuna.samplers._tpe.sampler import _split_trials, default_gamma
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, create_trial
from optuna.trial import TrialState as OptunaState

from search_spaces import Choice, IntUniform, LogIntUniform, LogUniform, Uniform
from search_spaces.domains import SearchSpace
from tune_service.searcher import NUM_GOOD, SamplerView, StudySampler, distributions, grid_points, suggest

SPACE = SearchSpace(
    {
        "rate": LogUniform(1e-5, 1e-3),
        "decay": Uniform(0.0, 0.1),
        "length": IntUniform(64, 128),
        "width": LogIntUniform(8, 512),
        "batch": Choice((16, 32)),
    }
)


def test_each_domain_is_the_distribution_that_means_the_same() -> None:
    assert distributions(SPACE) == {
        "rate": FloatDistribution(1e-5, 1e-3, log=True),
        "decay": FloatDistribution(0.0, 0.1),
        "length": IntDistribution(64, 128),  # both ends included
        "width": IntDistribution(8, 512, log=True),
        "batch": CategoricalDistribution((16, 32)),
    }


# ---- grids


def test_a_grid_goes_through_all_combinations_the_last_name_fastest() -> None:
    space = SearchSpace({"a": IntUniform(1, 2), "b": Choice(("x", "y"))})
    points = grid_points(space, first={"a": 1, "b": "x"}, limit=99)
    assert [tuple(point.values()) for point in points] == [(1, "x"), (1, "y"), (2, "x"), (2, "y")]


def test_a_grid_begins_with_the_given_point_and_has_none_twice() -> None:
    space = SearchSpace({"a": IntUniform(1, 2), "b": Choice(("x", "y"))})
    points = grid_points(space, first={"a": 2, "b": "x"}, limit=99)
    assert [tuple(point.values()) for point in points] == [(2, "x"), (1, "x"), (1, "y"), (2, "y")]


def test_a_grid_is_as_long_as_its_limit_however_wide_it_is() -> None:
    space = SearchSpace({"a": IntUniform(1, 10**12), "b": IntUniform(1, 10**12)})
    points = grid_points(space, first={"a": 5, "b": 5}, limit=3)
    assert points == [{"a": 5, "b": 5}, {"a": 1, "b": 1}, {"a": 1, "b": 2}]


# ---- what is suggested


def test_tpe_looks_for_parameters_that_differ_also_where_all_trials_were_stopped(tmp_path: Path) -> None:
    space = {"x": {"uniform": [0.0, 1.0]}, "depth": {"choice": [1, 2]}, "fixed": {"choice": [7]}}
    study = HandDriven(tmp_path, search_space=space)
    study.run(math.nan), study.run(math.nan)
    record = study.record._study
    found = record.sampler.infer_relative_search_space(record, record.trials[0])
    assert found.keys() == {"x", "depth"}


def first_params(study: HandDriven, count: int) -> list[dict[str, Any]]:
    asked = [study.driver.ask() for _ in range(count)]
    return [each.params for each in asked if each is not None]


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_every_suggestion_lies_in_its_domain(tmp_path: Path, sampler: str) -> None:
    space = {name: domain.to_mapping() for name, domain in SPACE.items()}
    study = HandDriven(tmp_path, search_space=space, sampler={"name": sampler}, budget={"trials": 20})
    for _ in range(20):
        study.run(0.5)
    for params in study.params():
        assert params.keys() == SPACE.keys()
        assert all(SPACE[name].contains(value) for name, value in params.items())


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_parameters_with_the_same_range_get_values_of_their_own(tmp_path: Path, sampler: str) -> None:
    space = {name: {"uniform": [0.0, 1.0]} for name in "ab"}
    study = HandDriven(tmp_path, search_space=space, sampler={"name": sampler})
    assert all(abs(params["a"] - params["b"]) > 1e-9 for params in first_params(study, 8))


def test_two_seeds_give_two_studies_and_all_trials_differ(tmp_path: Path) -> None:
    found = [
        first_params(HandDriven(tmp_path / str(seed), sampler={"name": "random", "seed": seed}), 8) for seed in (0, 1)
    ]
    assert len({params["x"] for trials in found for params in trials}) == 16


@pytest.mark.parametrize("seed", [1, 3])
def test_tpe_comes_closer_to_the_optimum_than_chance(tmp_path: Path, seed: int) -> None:
    # The optimum is x = 0.3 (see `score_of`); at random, |x - 0.3| is 0.29 in the mean.
    study = HandDriven(tmp_path, budget={"trials": 40}, sampler={"name": "tpe", "seed": seed})
    play(study, until=40)
    assert np.mean([abs(params["x"] - 0.3) for params in study.params()[20:]]) < 0.2


def test_tpe_is_optunas_multivariate_one_with_a_constant_liar() -> None:
    space: dict[str, BaseDistribution] = {"x": FloatDistribution(0.0, 1.0), "y": FloatDistribution(0.0, 1.0)}
    points = np.random.default_rng(0).random((20, 2))
    points[14:] /= 10  # those that run are where the best is

    def study_with(sampler: BaseSampler) -> optuna.Study:
        study = optuna.create_study(sampler=sampler)
        for number, (x, y) in enumerate(points.tolist()):
            state = OptunaState.COMPLETE if number < 14 else OptunaState.RUNNING
            value = x + y if state == OptunaState.COMPLETE else None
            study.add_trial(create_trial(state=state, params={"x": x, "y": y}, distributions=space, value=value))
        return study

    def of_optuna(**options: bool) -> dict[str, Any]:
        seed = int(np.random.SeedSequence([5, 20, 0]).generate_state(1)[0])
        sampler = TPESampler(seed=seed, **options)
        study = study_with(sampler)
        return sampler.sample_relative(study, study._storage.get_trial(study.ask()._trial_id), space)

    found = suggest(study_with(StudySampler("tpe", 5, StudyDirection.MINIMIZE)), 20, {}, space)
    assert found == of_optuna(multivariate=True, constant_liar=True)
    assert found != of_optuna(multivariate=True, constant_liar=False), "running trials keep it away"


def test_the_view_holds_every_trial_that_says_something_with_its_number_params_and_end(tmp_path: Path) -> None:
    study = HandDriven(tmp_path, faults={"restarts_per_trial": 0})
    pair = [study.begin(), study.begin()]
    study.report(pair[1], 1, 0.5)
    study.finish(pair[1])
    study.crash("rank 0 died")  # says nothing of its parameters
    study.begin()
    study.kill()
    study.resume()
    assert [study.begin(), study.begin()] == [0, 3]
    study.driver.ask()
    view = study.record._study.sampler._view.trials
    assert [trial.number for trial in view] == [0, 1, 3]  # 4 is being asked for
    assert [trial.params for trial in view] == [study.params()[number] for number in (0, 1, 3)]
    running, complete = OptunaState.RUNNING, OptunaState.COMPLETE
    assert [trial.state for trial in view] == [running, complete, running]
    assert view[1].value == 0.5


# ---- what a long study's sampler is shown

DISTRIBUTIONS = {"x": FloatDistribution(0.0, 1.0)}


def ended(number: int, state: OptunaState, values: dict[int, float]) -> FrozenTrial:
    value = max(values.values()) if state == OptunaState.COMPLETE else None
    trial = create_trial(
        state=state,
        params={"x": (number * 0.37) % 1},
        distributions=DISTRIBUTIONS,
        value=value,
        intermediate_values=values,
    )
    trial.number = trial._trial_id = number
    return trial


def some_study(num_trials: int, num_complete: int, seed: int) -> list[FrozenTrial]:
    """Trials that were completed, or pruned at one of 3 epochs; some values are equal, some there are not."""
    rng = np.random.default_rng(seed)
    complete = set(rng.permutation(num_trials)[:num_complete].tolist())
    trials = []
    for number in range(num_trials):
        epochs = int(rng.integers(0, 4)) if number not in complete else 3
        values = {epoch: round(float(rng.random()), 2) for epoch in range(1, epochs + 1)}
        trials.append(ended(number, OptunaState.COMPLETE if number in complete else OptunaState.PRUNED, values))
    return trials


def shown(trials: list[FrozenTrial], direction: StudyDirection, bound: int, at_once: bool) -> list[FrozenTrial]:
    """What a view of `bound` shows of a record; not `at_once`: that saw trials begin, and end from the last one on."""
    view = SamplerView(direction, bound)
    if not at_once:
        running = [ended(trial.number, OptunaState.COMPLETE, {1: 0.0}) for trial in trials]
        for trial in running:
            trial.state = OptunaState.RUNNING
        for number in reversed(range(len(trials))):
            running[number] = trials[number]
            view.refresh(running)
    view.refresh(trials)
    return view.get_all_trials(0)


@pytest.mark.parametrize("direction", [StudyDirection.MAXIMIZE, StudyDirection.MINIMIZE])
@pytest.mark.parametrize("num_complete", [0, 10, 200])
def test_a_bounded_view_holds_what_tpe_calls_good_and_the_newest_of_the_others(
    direction: StudyDirection, num_complete: int
) -> None:
    trials = some_study(400, num_complete, seed=num_complete)
    study = optuna.create_study(direction=direction)
    good_of_all = [trial.number for trial in _split_trials(study, trials, NUM_GOOD)[0]]
    view = shown(trials, direction, bound=100, at_once=True)
    assert len(view) == 100
    assert [trial.number for trial in _split_trials(study, view, default_gamma(400))[0]] == good_of_all
    others = [trial.number for trial in trials if trial.number not in good_of_all]
    assert sorted({trial.number for trial in view} - set(good_of_all)) == others[-75:]


def test_a_bounded_view_depends_on_the_record_alone_and_not_on_when_it_looked() -> None:
    trials = some_study(300, 40, seed=7)
    views = [shown(trials, StudyDirection.MAXIMIZE, 60, at_once) for at_once in (True, False)]
    assert [trial.number for trial in views[0]] == [trial.number for trial in views[1]]


def test_a_view_within_its_bound_leaves_nothing_out() -> None:
    trials = some_study(100, 20, seed=3)
    assert [trial.number for trial in shown(trials, StudyDirection.MINIMIZE, 100, True)] == list(range(100))


@pytest.mark.parametrize("killed_with", [45, 67])
def test_a_study_beyond_the_bound_goes_on_after_a_kill_as_if_there_had_been_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_with: int
) -> None:
    monkeypatch.setattr("tune_service.searcher.MAX_TRIALS_SHOWN", 40)
    undisturbed = HandDriven(tmp_path / "undisturbed", budget={"trials": 80})
    play_in_pairs(undisturbed, until=80)
    study = HandDriven(tmp_path / "killed", budget={"trials": 80})
    play_in_pairs(study, until=80, killed_with=killed_with)
    assert study.params() == undisturbed.params()
    assert len(study.record._study.sampler._view.trials) == 40 + 1
