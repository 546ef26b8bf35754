"""Search spaces become Optuna's, and what is tried next depends on the record and the seed alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState as OptunaState
from test_driver import HandDriven, play

from search_spaces import Choice, IntUniform, LogUniform, Uniform
from search_spaces.domains import SearchSpace
from tune_service.searcher import distributions, grid_points

SPACE = SearchSpace(
    {
        "rate": LogUniform(1e-5, 1e-3),
        "decay": Uniform(0.0, 0.1),
        "length": IntUniform(64, 128),
        "batch": Choice((16, 32)),
    }
)


def test_each_domain_is_the_distribution_that_means_the_same() -> None:
    assert distributions(SPACE) == {
        "rate": FloatDistribution(1e-5, 1e-3, log=True),
        "decay": FloatDistribution(0.0, 0.1),
        "length": IntDistribution(64, 128),  # both ends included
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


def test_the_view_holds_every_trial_with_its_number_params_and_end(tmp_path: Path) -> None:
    study = HandDriven(tmp_path, faults={"restarts_per_trial": 0})
    pair = [study.begin(), study.begin()]
    study.report(pair[1], 1, 0.5)
    study.finish(pair[1])
    study.crash("rank 0 died")
    study.begin()
    study.kill()
    study.resume()
    assert [study.begin(), study.begin()] == [0, 3]
    study.driver.ask()
    view = study.record._study.sampler._view.trials
    assert [trial.number for trial in view] == [0, 1, 2, 3, 4]
    assert [trial.params for trial in view[:4]] == study.params()[:4]
    assert [trial.state for trial in view] == [
        OptunaState.RUNNING,
        OptunaState.COMPLETE,
        OptunaState.FAIL,
        OptunaState.RUNNING,
        OptunaState.RUNNING,
    ]
    assert view[1].value == 0.5
