"""A study under any order of events, its driver killed in between: what must hold at every moment holds.

Checkpoints take 100 bytes each; supervisors are played as `TrialSupervisor` is: room is asked for before each write.
"""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

import pytest
from hand_driven import HandDriven, optuna_trials
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from optuna.trial import TrialState as OptunaState

from trainables.checkpoint import CheckpointStore, verify
from trainables.stores import GIB

SIZE = 100
BUDGET = 7 * SIZE
EPOCHS = 5
SCORES = st.sampled_from([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, math.nan])


class AnyOrder(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.root = tempfile.TemporaryDirectory()
        self.study = HandDriven(
            Path(self.root.name),
            scheduler={"name": "asha", "grace_period": 1, "reduction_factor": 2},
            training={"max_epochs": EPOCHS},
            budget={"trials": 30},
            faults={"restarts_per_trial": 2, "same_error_limit": 99},
            checkpoints={"budget_gib": BUDGET / GIB},
        )
        self.best = -math.inf
        self.epochs: dict[int, int] = {}
        """Trial with a supervisor -> its last epoch."""

    def teardown(self) -> None:
        self.study.kill()
        self.root.cleanup()

    @property
    def store(self) -> CheckpointStore:
        return CheckpointStore(self.study.folder.checkpoints.root, BUDGET)

    def a_trial(self, index: int) -> int:
        return sorted(self.epochs)[index % len(self.epochs)]

    def after(self, number: int, goes_on: bool) -> None:
        if not goes_on:
            del self.epochs[number]

    # Events

    @rule()
    def a_trial_begins(self) -> None:
        asked = self.study.driver.ask() if self.study.driver.has_room else None
        if asked is not None:
            self.study.driver.started(asked.number)
            last = self.store.latest(asked.number)
            self.epochs[asked.number] = last.epoch if last else 0
            if last is not None:  # a supervisor's first report is that of the checkpoint it goes on from
                result = self.result(asked.number, last.epoch, float(last.metrics["score"] or math.nan))
                self.after(asked.number, self.study.driver.result(result))

    def result(self, number: int, epoch: int, score: float, saved: bool = True) -> dict[str, object]:
        return {
            "number": number,
            "next_within_s": 60.0,
            "epoch": epoch,
            "metrics": [("score", score)],
            "saves": not saved,
            "owes": not saved,
            "checkpoint_bytes": SIZE if saved else None,
            "finished": epoch >= EPOCHS,
        }

    def reported(self, number: int, epoch: int, score: float) -> bool:
        """A report as far as its checkpoint, which comes before that of the last epoch. Whether the trial goes on."""
        if epoch == EPOCHS:
            self.save(number, epoch, score)
        return self.study.driver.result(self.result(number, epoch, score, saved=epoch == EPOCHS))

    def save(self, number: int, epoch: int, score: float) -> None:
        self.store.check_room(number)  # CheckpointBudgetError here is a failure of the driver's to leave room
        (self.store.stage(number, epoch) / "weights").write_bytes(bytes(SIZE))
        self.room_is_kept()
        self.store.commit(number, epoch, {"score": score})

    @precondition(lambda self: self.epochs)
    @rule(index=st.integers(0, 9), score=SCORES)
    def a_report(self, index: int, score: float) -> None:
        number = self.a_trial(index)
        self.epochs[number] += 1
        goes_on = self.reported(number, self.epochs[number], score)
        if goes_on:
            self.save(number, self.epochs[number], score)
            goes_on = self.study.saved(number, self.epochs[number], SIZE)
        self.after(number, goes_on)

    @precondition(lambda self: self.epochs)
    @rule(index=st.integers(0, 9))
    def a_rank_dies(self, index: int) -> None:
        number = self.a_trial(index)
        if self.study.fail(number, "rank 0 died"):
            last = self.store.latest(number)
            self.epochs[number] = last.epoch if last else 0
        else:
            del self.epochs[number]

    @precondition(lambda self: self.epochs)
    @rule(index=st.integers(0, 9))
    def a_supervisor_dies(self, index: int) -> None:
        number = self.a_trial(index)
        self.study.driver.supervisor_lost(number, "node gone")
        del self.epochs[number]

    @precondition(lambda self: self.epochs)
    @rule(index=st.integers(0, 9), score=SCORES, at=st.sampled_from(["reported", "staged", "committed"]))
    def the_driver_is_killed_while_a_trial_saves(self, index: int, score: float, at: str) -> None:
        number = self.a_trial(index)
        epoch = self.epochs[number] + 1
        goes_on = self.reported(number, epoch, score)
        if goes_on and at == "committed":
            self.save(number, epoch, score)
        elif goes_on and at == "staged":
            (self.store.stage(number, epoch) / "weights").write_bytes(bytes(SIZE // 2))
        self.the_driver_is_killed()

    @rule()
    def the_driver_is_killed(self) -> None:
        self.study.resume()
        self.epochs.clear()

    # What holds

    @invariant()
    def room_is_kept(self) -> None:
        assert self.store.total_bytes() <= BUDGET

    @invariant()
    def the_best_that_has_ended_is_never_lost(self) -> None:
        best = self.study.record.best(deep=True)
        value = best.value if best is not None else -math.inf
        assert value >= self.best
        self.best = value

    @invariant()
    def every_trial_without_an_end_has_its_last_checkpoint(self) -> None:
        for number, epoch in self.epochs.items():
            last = self.store.latest(number)
            assert (last.epoch if last else 0) == epoch

    @invariant()
    def every_checkpoint_is_whole(self) -> None:
        for number, epochs in self.store.kept().items():
            assert all(verify(self.store.folder(number, epoch)) for epoch in epochs)

    @invariant()
    def what_runs_in_the_record_has_a_supervisor(self) -> None:
        trials = optuna_trials(self.study.folder)
        running = {trial.number for trial in trials if trial.state == OptunaState.RUNNING}
        assert running == set(self.epochs)

    @invariant()
    def epochs_count_up_from_one(self) -> None:
        for trial in self.study.record.trials():
            assert [report.epoch for report in trial.reports] == list(range(1, len(trial.reports) + 1))


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(
    max_examples=60,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
TestAnyOrder.pytestmark = [pytest.mark.timeout(900)]
