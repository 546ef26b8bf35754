"""Domains check themselves and read back what they write; recipes hold what a spec may tune."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from search_spaces import (
    RECIPES,
    Choice,
    Domain,
    IntUniform,
    LogIntUniform,
    LogUniform,
    SearchSpace,
    Uniform,
    Value,
    parse_domain,
)
from search_spaces.bert import bert, bert_large

finite = st.floats(allow_nan=False, allow_infinity=False)
plain = st.none() | st.booleans() | st.integers() | finite | st.text(max_size=5)


def ordered(numbers: st.SearchStrategy[Any]) -> st.SearchStrategy[tuple[Any, Any]]:
    return st.tuples(numbers, numbers).filter(lambda pair: pair[0] < pair[1])


domains: st.SearchStrategy[Domain] = (
    ordered(finite).map(lambda ends: Uniform(*ends))
    | ordered(st.floats(min_value=1e-300, max_value=1e300)).map(lambda ends: LogUniform(*ends))
    | ordered(st.integers()).map(lambda ends: IntUniform(*ends))
    | ordered(st.integers(min_value=1)).map(lambda ends: LogIntUniform(*ends))
    | st.lists(plain, min_size=1, max_size=5, unique_by=lambda value: value).map(lambda values: Choice(tuple(values)))
)


@given(domains)
def test_a_domain_reads_back_what_it_writes(domain: Domain) -> None:
    assert parse_domain(domain.to_mapping()) == domain


@given(domains)
def test_a_domain_holds_its_ends_and_every_point_of_its_grid(domain: Domain) -> None:
    ends = domain.values if isinstance(domain, Choice) else (domain.low, domain.high)
    assert all(domain.contains(value) for value in ends)
    grid = domain.grid()
    assert all(domain.contains(value) for value in (grid or ())[:20])
    assert (grid is None) == isinstance(domain, Uniform | LogUniform)


@pytest.mark.parametrize(
    ("mapping", "rule", "found"),
    [
        ({"uniform": [1, 1]}, "low < high", "low=1.0, high=1.0"),
        ({"uniform": [0, math.inf]}, "finite", "inf"),
        ({"uniform": [0, True]}, "needs numbers", "True"),
        ({"uniform": [0]}, "two numbers", "[0]"),
        ({"uniform": "0-1"}, "needs a list", "'0-1'"),
        ({"log_uniform": [0, 1]}, "0 < low < high", "low=0.0"),
        ({"log_uniform": ["a", 1]}, "needs numbers", "'a'"),
        ({"int_uniform": [1.0, 2]}, "whole numbers", "low=1.0"),
        ({"int_uniform": [False, 2]}, "whole numbers", "low=False"),
        ({"int_uniform": [2, 1]}, "low < high", "low=2, high=1"),
        ({"log_int_uniform": [1, 2.0]}, "log_int_uniform needs whole numbers", "high=2.0"),
        ({"log_int_uniform": [0, 8]}, "log_int_uniform needs low of 1 or more", "low=0, high=8"),
        ({"choice": []}, "at least one", "none"),
        ({"choice": [1, 2, 1]}, "all differ", "1 twice"),
        ({"choice": [1, True]}, "all differ", "True twice"),
        ({"choice": [[1]]}, "plain values", "[1]"),
        ({"choice": [math.nan]}, "finite", "nan"),
        ({"uniform": [0, 1], "choice": [1]}, "one key", "uniform"),
        ({"normal": [0, 1]}, "one key", "normal"),
        ([0, 1], "one key", "[0, 1]"),
        (None, "one key", "None"),
    ],
)
def test_a_wrong_domain_is_refused_with_the_rule_and_what_was_given(mapping: object, rule: str, found: str) -> None:
    with pytest.raises(ValueError, match="but got") as refusal:
        parse_domain(mapping)
    said_rule, _, said_found = str(refusal.value).partition(", but got ")
    assert rule in said_rule
    assert found in said_found


def test_a_range_reads_numbers_that_yaml_left_as_strings() -> None:
    assert parse_domain({"log_uniform": ["1e-5", "2e-4"]}) == LogUniform(1e-5, 2e-4)
    assert parse_domain({"choice": ["1e-5"]}) == Choice(("1e-5",)), "a string may be meant in a choice"


@pytest.mark.parametrize(
    ("domain", "value", "inside"),
    [
        (IntUniform(1, 3), 3, True),
        (IntUniform(1, 3), 2.0, False),
        (IntUniform(0, 3), True, False),
        (Uniform(0, 1), 1, True),
        (Uniform(0, 1), True, False),
        (Uniform(0, 1), math.nan, False),
        (Uniform(0, 1), "0.5", False),
        (Choice((0, 0.1)), 0.0, True),
        (Choice((0, 1)), False, False),
        (Choice((None, 1.0)), None, True),
    ],
)
def test_what_lies_in_a_domain(domain: Domain, value: object, inside: bool) -> None:
    assert domain.contains(value) is inside


def test_a_wide_domain_has_a_grid_that_takes_no_memory() -> None:
    grid = IntUniform(0, 10**15).grid()
    assert len(grid) == 10**15 + 1


def test_the_points_of_a_space_are_counted_unless_they_have_no_end() -> None:
    space = SearchSpace({"a": IntUniform(1, 10**30), "b": LogIntUniform(1, 4), "c": Choice((1, 2, 3))})
    assert space.num_points == 12 * 10**30
    assert (space | {"d": Uniform(0, 1)}).num_points is None
    assert SearchSpace({}).num_points == 1


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_names_only_training_fields_and_its_defaults_lie_inside(name: str) -> None:
    space = RECIPES[name]()
    assert set(space.defaults) == set(space), "a first trial outside the recipe needs a place to start"
    assert all(space[parameter].contains(value) for parameter, value in space.defaults.items())


def test_a_derived_space_replaces_domains_and_drops_defaults_that_lie_outside() -> None:
    space = bert() | {"batch_size": Choice((8, 16))}
    assert space["batch_size"] == Choice((8, 16))
    assert "batch_size" not in space.defaults
    assert space.defaults["learning_rate"] == bert().defaults["learning_rate"]
    assert bert()["batch_size"] == Choice((16, 32)), "the space it came from is as before"


def test_a_derived_space_takes_the_other_ones_defaults() -> None:
    assert bert_large().defaults["learning_rate"] == 2e-5


@pytest.mark.parametrize("defaults", [{"a": 3}, {"b": 1}])
def test_a_default_outside_its_domain_is_refused(defaults: dict[str, Value]) -> None:
    with pytest.raises(ValueError, match="lie in its domain"):
        SearchSpace({"a": Choice((1, 2))}, defaults)
