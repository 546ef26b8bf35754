"""What Ray Tune is kept from: remembering and looking through every trial that a study ever had."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from ray.tune.experiment import Trial

from tune_service.place import Usage
from tune_service.slots import WAITS_S, Slots
from tune_service.this_machine import LocalSession
from tune_service.tuner import NUM_ENDED_KEPT, _forget_ended, _StudyScheduler


class FakeTrial:
    """What is asked of a trial of Tune's; a real one needs a cluster."""

    def __init__(self, number: int, status: str) -> None:
        self.trial_id = str(number)
        self.status = status

    def is_finished(self) -> bool:
        return self.status in (Trial.TERMINATED, Trial.ERROR)


@dataclass
class FakeController:
    _trials: list[FakeTrial]
    _stopped_trials: set[FakeTrial] = field(default_factory=set)
    _failed_trials: set[FakeTrial] = field(default_factory=set)
    _trials_to_cache: set[FakeTrial] = field(default_factory=set)
    _trial_to_actor: dict[FakeTrial, str] = field(default_factory=dict)


def test_tune_forgets_the_trials_that_ended_long_ago_and_none_that_has_no_end() -> None:
    statuses = [Trial.RUNNING, Trial.ERROR, *[Trial.TERMINATED] * (2 * NUM_ENDED_KEPT), Trial.PENDING]
    trials = [FakeTrial(number, status) for number, status in enumerate(statuses)]
    listed = list(trials)
    controller = FakeController(listed)
    controller._trials_to_cache = set(trials)
    controller._failed_trials = {trials[1]}
    controller._stopped_trials = {trial for trial in trials if trial.status == Trial.TERMINATED}
    _forget_ended(controller)
    assert listed == [trials[0], *trials[-1 - NUM_ENDED_KEPT :]]  # the very list that Tune goes through
    assert controller._failed_trials == set()
    assert controller._stopped_trials == set(trials[-1 - NUM_ENDED_KEPT : -1])
    assert controller._trials_to_cache == set(listed)


def test_the_next_trial_is_the_first_that_waits_and_has_no_actor_on_its_way() -> None:
    scheduler = _StudyScheduler(driver=None)  # type: ignore[arg-type]
    trials: list[Any] = [FakeTrial(0, Trial.RUNNING), FakeTrial(1, Trial.PENDING), FakeTrial(2, Trial.PENDING)]
    scheduler.trials = {trial.trial_id: trial for trial in trials}
    controller = FakeController(trials)
    assert scheduler.choose_trial_to_run(controller) is trials[1]
    controller._trial_to_actor = {trials[1]: "starting"}
    assert scheduler.choose_trial_to_run(controller) is trials[2]
    controller._trial_to_actor[trials[2]] = "starting"
    assert scheduler.choose_trial_to_run(controller) is trials[1]
    trials[1].status = trials[2].status = Trial.RUNNING
    assert scheduler.choose_trial_to_run(controller) is None


def test_on_one_machine_as_many_trials_start_at_a_time_as_there_are_cores() -> None:
    session = LocalSession(Path(), concurrent=8, cpus=3)
    assert [session.slots(Usage(running, wants=20)) for running in (0, 1, 5, 8)] == [3, 4, 8, 8]


def test_a_study_runs_no_more_trials_than_were_found_to_share_a_gpu_well() -> None:
    session = LocalSession(Path(), concurrent=8, cpus=3)
    found = [2.0]
    slots = Slots(session, num_running=lambda: 2, wants=lambda: 20, most=lambda: found[0])
    assert slots.number() == 2
    found[0] = 4.0
    assert slots.number() == 4
    found[0] = 16.0
    assert slots.number() == 5, "two that run and one for each core"


class FakeSession:
    """A place that lets so many trials run at once as it is told."""

    def __init__(self, number: int) -> None:
        self.number = number

    def slots(self, usage: Usage) -> int:
        self.usage = usage
        return self.number

    def notice(self, waits: bool) -> str | None:
        return "trials wait" if waits else None


@dataclass
class FakeCache:
    """What is asked of Tune's cache of idle actors."""

    num_cached_objects: int
    width: int = 0
    _may_keep_one: bool | None = None

    def increase_max(self, kind: str, number: int) -> None:
        assert kind == "supervisor"
        self.width += number


def test_as_many_worker_groups_stay_warm_as_there_are_slots_and_idle_ones_go_when_there_are_fewer() -> None:
    session, cache = FakeSession(4), FakeCache(num_cached_objects=1)
    slots = Slots(session, num_running=lambda: 3, wants=lambda: 20)  # type: ignore[arg-type]
    slots.widen(cache, "supervisor")
    assert session.usage == Usage(running=4, wants=20), "one that is kept warm holds room too"
    slots.settle()
    slots.widen(FakeCache(num_cached_objects=9), "another")
    assert (cache.width, cache._may_keep_one) == (4, True)
    session.number = 3
    slots.settle()
    assert (cache.width, cache._may_keep_one) == (0, False), "three run, and the idle one's room is another study's"
    session.number = 5
    slots.settle()
    assert (cache.width, cache._may_keep_one) == (5, True)


def test_trials_are_said_to_wait_when_they_have_done_so_for_some_seconds_without_a_break(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now, running = [0.0], [2]
    monkeypatch.setattr("tune_service.slots.time.monotonic", lambda: now[0])
    slots = Slots(FakeSession(4), num_running=lambda: running[0], wants=lambda: 20)  # type: ignore[arg-type]

    def notice(at: float, num_running: int) -> str | None:
        now[0], running[0] = at, num_running
        return slots.notice(num_open=3)

    assert [notice(0.0, 2), notice(WAITS_S, 2), notice(WAITS_S + 1, 2)] == [None, None, "trials wait"]
    assert [notice(WAITS_S + 2, 3), notice(WAITS_S + 3, 2), notice(2 * WAITS_S, 2)] == [None] * 3
