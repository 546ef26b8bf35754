"""Which checkpoints go. Ten bytes each where nothing else is said."""

from __future__ import annotations

import dataclasses
import math

from hypothesis import given
from hypothesis import strategies as st

from tune_service.retention import Kept, to_delete

ONE = Kept(trial=0, epoch=1, num_bytes=10, open=False, stopped=False, last=True, value=0.5)


def kept(trial: int, epoch: int, **changes: object) -> Kept:
    return dataclasses.replace(ONE, trial=trial, epoch=epoch, **changes)


def test_an_ended_trial_keeps_its_best_epoch_alone() -> None:
    trial = [kept(0, 1, last=False, value=None), kept(0, 2, last=False), kept(0, 3, value=None)]
    assert to_delete(trial, 1.0, budget_bytes=1000, num_writers=0) == [(0, 1), (0, 3)]


def test_a_trial_without_an_end_keeps_its_last_one_too() -> None:
    trial = [kept(0, 1, last=False, value=None), kept(0, 2, last=False), kept(0, 3, value=None)]
    running = [dataclasses.replace(one, open=True) for one in trial]
    assert to_delete(running, 1.0, budget_bytes=1000, num_writers=0) == [(0, 1)]


def test_when_room_is_short_the_worst_go_first() -> None:
    trials = [kept(0, 1, value=0.3), kept(1, 1, value=0.5), kept(2, 1, value=0.4), kept(3, 1, value=0.2)]
    assert to_delete(trials, 1.0, budget_bytes=25, num_writers=0) == [(3, 1), (0, 1)]
    assert to_delete(trials, -1.0, budget_bytes=25, num_writers=0) == [
        (1, 1),
        (2, 1),
    ]  # a loss: the largest is the worst


def test_room_is_left_for_the_next_checkpoint_of_each_trial_that_runs() -> None:
    trials = [kept(0, 1, value=0.9), kept(1, 1, value=0.8), kept(2, 1, open=True, value=0.7)]
    assert to_delete(trials, 1.0, budget_bytes=40, num_writers=1) == []
    assert to_delete(trials, 1.0, budget_bytes=39, num_writers=1) == [(1, 1)]
    assert to_delete(trials[:2], 1.0, budget_bytes=39, num_writers=2) == [(1, 1)], "a trial's first one needs room too"


def test_room_is_left_for_a_whole_checkpoint_where_only_models_lie() -> None:
    models = [kept(trial, 1, value=0.1 * trial) for trial in range(9)]
    assert to_delete(models, 1.0, budget_bytes=100, num_writers=1, largest_bytes=30) == [(0, 1), (1, 1)]


def test_a_stopped_trial_keeps_none_unless_it_is_the_best() -> None:
    trials = [kept(0, 3, stopped=True, value=0.9), kept(1, 1, stopped=True, value=0.8), kept(2, 9, value=0.7)]
    assert to_delete(trials, 1.0, budget_bytes=1000, num_writers=0) == [(1, 1)]
    assert to_delete(trials, -1.0, budget_bytes=1000, num_writers=0) == [(0, 3), (1, 1)]
    better = kept(3, 1, open=True, value=0.95)  # it may still fail
    assert to_delete([*trials, better], 1.0, budget_bytes=1000, num_writers=1) == [(1, 1)]


def test_the_best_of_all_stays_even_when_it_is_larger_than_the_budget() -> None:
    trials = [kept(0, 1, value=0.9, num_bytes=100), kept(1, 1, value=0.8, num_bytes=1)]
    assert to_delete(trials, 1.0, budget_bytes=50, num_writers=0) == [(1, 1)]


def test_of_equal_values_the_lowest_number_is_the_best_and_stays() -> None:
    trials = [kept(3, 1, value=0.7), kept(1, 1, value=0.7), kept(2, 1, value=0.7)]
    assert sorted(to_delete(trials, 1.0, budget_bytes=10, num_writers=0)) == [(2, 1), (3, 1)]


def test_the_best_that_has_ended_stays_while_a_better_one_may_still_fail() -> None:
    trials = [kept(0, 1, value=0.7), kept(1, 1, open=True, value=0.9)]
    assert to_delete(trials, 1.0, budget_bytes=1, num_writers=0) == []


def test_nothing_is_deleted_of_nothing() -> None:
    assert to_delete([], 1.0, budget_bytes=1, num_writers=0) == []


@st.composite
def studies(draw: st.DrawFn) -> list[Kept]:
    """Any checkpoints that a study can have: one best epoch a trial at most, the newest is the last."""
    found = []
    for trial in range(draw(st.integers(0, 5))):
        epochs = sorted(draw(st.sets(st.integers(1, 9), min_size=1, max_size=4)))
        best = draw(st.sampled_from([*epochs, None]))
        is_open, stopped, value = draw(st.booleans()), draw(st.booleans()), draw(st.sampled_from([0.1, 0.5, 0.9]))
        found += [
            Kept(
                trial=trial,
                epoch=epoch,
                num_bytes=draw(st.integers(0, 50)),
                open=is_open,
                stopped=stopped and not is_open,
                last=epoch == epochs[-1],
                value=value if epoch == best else None,
            )
            for epoch in epochs
        ]
    return draw(st.permutations(found))


@given(kept=studies(), sign=st.sampled_from([1.0, -1.0]), budget=st.integers(0, 500), writers=st.integers(0, 3))
def test_what_must_stay_stays_and_the_budget_is_kept_whenever_that_leaves_room(
    kept: list[Kept], sign: float, budget: int, writers: int
) -> None:
    gone = to_delete(kept, sign, budget, writers)
    assert len(set(gone)) == len(gone)
    assert set(gone) <= {(one.trial, one.epoch) for one in kept}
    left = [one for one in kept if (one.trial, one.epoch) not in set(gone)]

    assert [one for one in kept if one.open and one.last and one not in left] == []
    best = max((sign * one.value for one in kept if one.value is not None), default=-math.inf)
    assert best == max((sign * one.value for one in left if one.value is not None), default=-math.inf)

    assert not [one for one in left if one.stopped and one.value is None]

    ended = [one for one in kept if one.value is not None and not one.open]
    best_ended = max((sign * one.value for one in ended if one.value is not None), default=None)
    must = [one for one in left if (one.open and one.last) or (one.value is not None and sign * one.value == best)]
    must += [one for one in left if one in ended and sign * (one.value or 0.0) == best_ended]
    if {(one.trial, one.epoch) for one in left} > {(one.trial, one.epoch) for one in must}:
        room = budget - writers * max(one.num_bytes for one in kept)
        assert sum(one.num_bytes for one in left) <= room  # something could still have gone
