"""What a study does at each event, with no Ray: the tests hand the driver what supervisors would."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.samplers._tpe.sampler import _split_trials
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial
from optuna.trial import TrialState as OptunaState

from trainables.stores import GIB
from tune_service.driver import STOP_POLL_S, USER_STOP, Driver
from tune_service.failures import MAX_IN_VAIN
from tune_service.record import Record, direction_of
from tune_service.searcher import StudySampler
from tune_service.sharing import Sharing
from tune_service.spec import StudySpec, parse_spec
from tune_service.status import TrialStatus
from tune_service.storage import Storage, StudyFolder

PAUSED = "interrupted: the driver was gone"


def toy_spec(folder: Path, **sections: Any) -> StudySpec:
    """A trainable of one's own, 9 epochs, no scheduler; `sections` replace these."""
    spec = {
        "name": "toy",
        "trainable": "toy_module:train",
        "training": {"max_epochs": 9},
        "search_space": {"x": {"uniform": [0.0, 1.0]}, "depth": {"choice": [1, 2, 4]}},
        "objective": {"metric": "score"},
        "scheduler": {"name": "none"},
        "budget": {"trials": 16},
    }
    return parse_spec(spec | sections, folder)


class HandDriven:
    """A study whose supervisors are played by the test."""

    def __init__(self, root: Path, **sections: Any) -> None:
        self.spec = toy_spec(root, **sections)
        self.storage = Storage(root / "studies")
        self.folder = self.storage.create(self.spec.name)
        self.told: list[str] = []
        self._lease = ExitStack()
        self._lease.enter_context(self.folder.driving())
        stored = self.spec.to_mapping() | {"folder": str(root)}
        self.record = Record.create(self.folder, stored, self._sampler())
        self.driver = Driver(self.spec, self.record, self.told.append)

    def _sampler(self) -> StudySampler:
        sampler = self.spec.sampler
        return StudySampler(sampler.name, sampler.seed, direction_of(self.spec.objective.mode))

    def kill(self) -> None:
        """The driver's process is gone, at whatever it was."""
        self._lease.close()

    def end(self, reason: str = USER_STOP) -> None:
        """The driver ends in order."""
        self.record.pause_all(reason)
        self.kill()

    def resume(self, budget: int | None = None) -> None:
        """What `tune-service resume` does before the first trial."""
        self.kill()
        self._lease.enter_context(self.folder.driving())
        self.record = Record.open(self.folder, self._sampler())
        if budget is not None:
            self.record.set_budget(budget)
        self.record.clear_stop()
        self.record.set_failure(None)
        self.record.pause_all(PAUSED)
        self.driver = Driver(self.spec, self.record, self.told.append)

    def begin(self) -> int:
        """Starts the next trial, which must exist."""
        asked = self.driver.ask()
        assert asked is not None
        self.driver.started(asked.number)
        return asked.number

    def report(
        self,
        number: int,
        epoch: int,
        score: float,
        num_bytes: int | None = None,
        resumable: bool = True,
        **others: float,
    ) -> bool:
        """One report; with a checkpoint of `num_bytes` bytes when that is given. Whether the trial goes on."""
        metrics, is_last = {"score": score} | others, epoch >= self.spec.max_epochs
        if num_bytes is not None and is_last:
            self.commit(number, epoch, num_bytes, metrics)
        goes_on = self.driver.result(
            {
                "number": number,
                "next_within_s": 60.0,
                "epoch": epoch,
                "metrics": list(metrics.items()),
                "saves": num_bytes is not None and not is_last,
                "owes": num_bytes is not None and not is_last,
                "checkpoint_bytes": num_bytes if is_last else None,
                "finished": is_last,
            }
        )
        if num_bytes is None or not goes_on:
            return goes_on
        self.commit(number, epoch, num_bytes, metrics, resumable)
        return self.saved(number, epoch, num_bytes, resumable)

    def commit(
        self, number: int, epoch: int, num_bytes: int, metrics: Mapping[str, float], resumable: bool = True
    ) -> None:
        (self.folder.checkpoints.stage(number, epoch) / "weights").write_bytes(b"w" * num_bytes)
        self.folder.checkpoints.commit(number, epoch, metrics, resumable)

    def saved(
        self, number: int, epoch: int, num_bytes: int, resumable: bool = True, whole_bytes: int | None = None
    ) -> bool:
        """The checkpoint of the last report is whole. Whether the trial goes on."""
        result = {"number": number, "next_within_s": 60.0, "finished": False, "owes": not resumable}
        result |= {"saved": epoch, "checkpoint_bytes": num_bytes, "resumable": resumable}
        return self.driver.result(result | {"whole_bytes": num_bytes if whole_bytes is None else whole_bytes})

    def finish(self, number: int) -> bool:
        """The trainable came to its end before its last epoch."""
        return self.driver.result({"number": number, "next_within_s": 60.0, "finished": True})

    def fail(self, number: int, reason: str) -> bool:
        return self.driver.result({"number": number, "next_within_s": 60.0, "failure": reason})

    def run(self, *scores: float, num_bytes: int | None = None) -> int:
        """A whole trial: reports `scores` from epoch 1 on, then ends if it was not stopped."""
        number = self.begin()
        goes_on = True
        for epoch, score in enumerate(scores, start=1):
            assert goes_on
            goes_on = self.report(number, epoch, score, num_bytes)
        if goes_on:
            self.finish(number)
        return number

    def crash(self, reason: str) -> int:
        """A whole trial that fails each time it is started."""
        number = self.begin()
        while self.fail(number, reason):
            pass
        return number

    def trial(self, number: int) -> TrialStatus:
        return self.record.status().trials[number]

    def params(self) -> list[dict[str, Any]]:
        return [trial.params for trial in self.record.trials()]


def optuna_trials(folder: StudyFolder) -> list[FrozenTrial]:
    """The trials as Optuna's own tools read them."""
    storage = optuna.storages.JournalStorage(JournalFileBackend(str(folder.journal)))
    return optuna.load_study(study_name=folder.name, storage=storage).trials


ASHA = {"name": "asha", "grace_period": 1, "reduction_factor": 3}


# ---- how trials end


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


# ---- restarts


def test_a_restart_counts_its_epochs_on_and_writes_a_repeated_one_once(tmp_path: Path) -> None:
    study = HandDriven(tmp_path)
    number = study.begin()
    for epoch, score in [(1, 0.5), (2, 0.6)]:
        assert study.report(number, epoch, score, num_bytes=10)
    assert study.fail(number, "rank 0 died: killed")
    assert "starting again after epoch 2" in study.told[-1]
    assert study.report(number, 2, 0.6, num_bytes=10)  # the supervisor's first: where it goes on
    assert study.report(number, 3, 0.7, num_bytes=10)
    trial = study.trial(number)
    assert [(report.epoch, report.metrics["score"]) for report in trial.reports] == [(1, 0.5), (2, 0.6), (3, 0.7)]
    assert trial.restarts == 1 and trial.state == "running" and trial.reason is None
    assert study.folder.journal.read_text().count('"report:2"') == 1


def test_a_trial_without_checkpoints_begins_again_at_epoch_1_and_says_so(tmp_path: Path) -> None:
    study = HandDriven(tmp_path)
    number = study.begin()
    study.report(number, 1, 0.5)
    assert study.fail(number, "rank 0 raised ValueError: no\nits log")
    assert study.told[-1] == (
        "trial 0: rank 0 raised ValueError: no; starting again at epoch 1: it has no checkpoint to go on from"
    )


def test_every_start_after_the_first_counts_as_a_restart(tmp_path: Path) -> None:
    study = HandDriven(tmp_path, faults={"restarts_per_trial": 9})
    number = study.begin()
    assert study.trial(number).restarts == 0
    study.fail(number, "rank 0 died")
    study.driver.supervisor_lost(number, "node gone")
    assert study.begin() == number
    assert study.trial(number).restarts == 2
    study.resume()
    assert study.begin() == number
    assert study.trial(number).restarts == 3


def test_a_trial_that_crashes_once_more_than_its_restarts_has_failed(tmp_path: Path) -> None:
    study = HandDriven(tmp_path, faults={"restarts_per_trial": 2})
    number = study.begin()
    assert [study.fail(number, "rank 0 died") for _ in range(3)] == [True, True, False]
    assert (study.trial(number).state, study.trial(number).restarts) == ("failed", 2)
    study.run(0.5)  # and the study goes on


def test_resumes_use_up_no_restarts(tmp_path: Path) -> None:
    study = HandDriven(tmp_path, faults={"restarts_per_trial": 1})
    number = study.begin()
    for _ in range(3):
        study.resume()
        assert study.begin() == number
    assert study.fail(number, "rank 0 died")
    assert not study.fail(number, "rank 0 died")
    assert study.trial(number).restarts == 4


def test_lost_supervisors_and_failed_ranks_use_up_the_same_restarts(tmp_path: Path) -> None:
    study = HandDriven(tmp_path, faults={"restarts_per_trial": 2})
    number = study.begin()
    assert study.fail(number, "rank 0 died")
    study.driver.supervisor_lost(number, "node gone")
    assert (study.trial(number).state, study.trial(number).reason) == (
        "paused",
        "the trial's supervisor was lost: node gone",
    )
    assert study.begin() == number, "it is the next in line"
    assert study.trial(number).state == "running"
    assert not study.fail(number, "rank 0 died")
    assert (study.trial(number).state, study.trial(number).restarts) == ("failed", 2)


def test_a_supervisor_that_is_lost_once_too_often_ends_its_trial_as_failed(tmp_path: Path) -> None:
    study = HandDriven(tmp_path, faults={"restarts_per_trial": 1})
    number = study.begin()
    study.driver.supervisor_lost(number, "node gone")
    assert study.begin() == number
    study.driver.supervisor_lost(number, "node gone")
    trial = study.trial(number)
    assert (trial.state, trial.reason) == ("failed", "the trial's supervisor was lost: node gone")


def test_a_supervisor_that_was_lost_before_it_took_its_trial_costs_a_restart_and_no_number(tmp_path: Path) -> None:
    """Tune does not start a trial again that is handed to a warm supervisor which has died."""
    study = HandDriven(tmp_path)
    asked = study.driver.ask()
    assert asked is not None
    study.driver.handed_over(asked.number)
    study.driver.supervisor_lost(asked.number, "node gone")
    assert study.begin() == asked.number
    assert study.trial(asked.number).restarts == 0, "it had not begun"
    assert study.params() == [asked.params]


def test_a_supervisor_that_is_silent_for_longer_than_it_said_is_overdue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = HandDriven(tmp_path)
    now = 1000.0
    monkeypatch.setattr("tune_service.driver.time.monotonic", lambda: now)
    number, other = study.begin(), study.begin()
    study.report(number, 1, 0.5)  # the next one within 60 s, and 30 s for the way
    now += 89
    assert study.driver.poll() == []
    now += 2
    assert study.driver.poll() == [number]  # and not `other`, which is still being set up
    study.driver.supervisor_lost(number, "killed: overdue")
    assert study.driver.poll() == []
    assert study.trial(other).state == "running"


# ---- trials that fail alike


def test_three_trials_that_fail_alike_end_the_study_as_failed(tmp_path: Path) -> None:
    study = HandDriven(tmp_path, faults={"restarts_per_trial": 0, "same_error_limit": 3})
    running = study.begin()
    study.run(0.5)
    for address, line in [("0x7f3a", "log a"), ("0x11bc", "log b")]:
        study.crash(f"rank 0 raised OSError: cannot open {address} of row {len(address)}\n{line}")
    assert not study.driver.stopping
    study.crash("rank 0 raised OSError: cannot open 0xffff of row 99\nlog c")
    assert study.driver.stopping and study.driver.stopping_now
    assert study.driver.ask() is None
    assert not study.report(running, 1, 0.5)
    study.end("the study failed")
    status = study.record.status()
    assert status.state == "failed"
    assert [trial.state for trial in status.trials] == ["paused", "completed", "failed", "failed", "failed"]
    assert str(study.record.failure).startswith("3 trials failed alike: rank 0 raised OSError: cannot open")


def test_trials_that_fail_in_different_ways_do_not_end_the_study(tmp_path: Path) -> None:
    study = HandDriven(tmp_path, faults={"restarts_per_trial": 0})
    for name in "abcdef":
        study.crash(f"rank 0 raised {name}")
    assert study.driver.ask() is not None


@pytest.mark.parametrize("end", ["no report", "no objective", "supervisor lost"])
def test_whatever_way_three_trials_fail_alike_the_study_ends(tmp_path: Path, end: str) -> None:
    study = HandDriven(tmp_path)
    for _ in range(3):
        number = study.begin()
        if end == "no report":
            study.finish(number)
        elif end == "no objective":
            study.driver.result(
                {
                    "number": number,
                    "next_within_s": 1.0,
                    "epoch": 1,
                    "metrics": [],
                    "saves": False,
                    "checkpoint_bytes": None,
                    "finished": False,
                }
            )
        else:
            for _ in range(1 + study.spec.faults.restarts_per_trial):
                study.driver.supervisor_lost(number, "node gone")
                if study.trial(number).ended_at is None:
                    assert study.begin() == number
    assert study.driver.ask() is None and study.record.failure is not None


def test_a_study_that_failed_can_be_resumed(tmp_path: Path) -> None:
    study = HandDriven(tmp_path, faults={"restarts_per_trial": 0})
    for _ in range(3):
        study.crash("rank 0 raised OSError: disk full")
    study.end()
    assert study.record.status().state == "failed"
    study.resume()
    assert study.record.status().state == "running"
    assert study.run(0.5) == 3
    study.crash("rank 0 raised OSError: disk full")
    assert not study.driver.stopping  # counted anew


# ---- stop and resume


@pytest.mark.parametrize("now", [False, True])
def test_a_request_to_stop_pauses_trials_at_their_next_report(tmp_path: Path, now: bool) -> None:
    study = HandDriven(tmp_path)
    done, running = study.run(0.9), study.begin()
    study.report(running, 1, 0.5)
    Record.open(study.folder).request_stop(now)  # as another process does
    assert not study.driver.stopping
    study.driver.poll()
    assert study.driver.stopping and study.driver.stopping_now == now
    assert study.told == ["stopping: running trials end " + ("at once" if now else "at their next report")]
    assert study.driver.ask() is None
    assert not study.report(running, 2, 0.6)
    study.end()
    status = study.record.status()
    assert status.state == "stopped"
    assert [trial.state for trial in status.trials] == ["completed", "paused"]
    trial = status.trials[running]
    assert (trial.reason, trial.ended_at, len(trial.reports)) == ("stopped by the user", None, 2)
    assert status.best is not None and status.best.number == done


@pytest.mark.parametrize(("now", "epochs"), [(False, [2]), (True, [1])])
def test_a_trial_that_a_stop_ends_has_the_checkpoint_of_its_last_report_but_not_at_once(
    tmp_path: Path, now: bool, epochs: list[int]
) -> None:
    study = HandDriven(tmp_path)
    running = study.begin()
    assert study.report(running, 1, 0.5, num_bytes=10)
    study.record.request_stop(now)
    study.driver.poll()
    assert not study.report(running, 2, 0.6, num_bytes=10)
    study.end()
    assert study.folder.checkpoints.epochs(running) == epochs
    assert [report.epoch for report in study.trial(running).reports] == [1, 2]


def test_a_request_to_stop_is_looked_for_often_but_not_at_every_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = HandDriven(tmp_path)
    now = 1000.0
    monkeypatch.setattr("tune_service.driver.time.monotonic", lambda: now)
    study.driver.poll()
    Record.open(study.folder).request_stop(False)
    study.driver.poll()
    assert not study.driver.stopping
    now += STOP_POLL_S
    study.driver.poll()
    assert study.driver.stopping


def test_a_last_epoch_that_comes_while_the_study_stops_still_completes_its_trial(tmp_path: Path) -> None:
    study = HandDriven(tmp_path, training={"max_epochs": 2}, scheduler=ASHA)
    numbers = [study.begin() for _ in range(3)]
    study.record.request_stop(False)
    study.driver.poll()
    assert not study.report(numbers[0], 2, 0.9)
    assert not study.report(numbers[1], 1, math.nan)
    assert not study.fail(numbers[2], "rank 0 died")
    study.end()
    assert [trial.state for trial in study.record.trials()] == ["completed", "pruned", "paused"]


def test_resume_asks_for_paused_trials_first_with_their_numbers_and_params(tmp_path: Path) -> None:
    study = HandDriven(tmp_path)
    study.run(0.5)
    paused = [study.begin(), study.begin()]
    study.report(paused[1], 1, 0.7)
    before = study.params()
    study.end()
    assert [trial.state for trial in study.record.trials()] == ["completed", "paused", "paused"]
    study.resume()
    asked = [study.driver.ask() for _ in range(3)]
    assert [each and each.number for each in asked] == [1, 2, 3]
    assert [each and each.params for each in asked[:2]] == before[1:]
    study.driver.started(2)
    assert study.report(2, 2, 0.8)
    assert [report.epoch for report in study.trial(2).reports] == [1, 2]
    assert (study.trial(2).state, study.trial(2).restarts, study.trial(2).reason) == ("running", 1, None)


def test_a_trial_of_a_killed_driver_goes_on_first_too(tmp_path: Path) -> None:
    study = HandDriven(tmp_path)
    number = study.begin()
    study.report(number, 1, 0.7)
    study.kill()
    status = study.record.status()
    assert status.state == "interrupted"
    assert (status.trials[0].state, status.trials[0].reason) == ("paused", "interrupted: the driver is gone")
    study.resume()
    assert (study.trial(number).state, study.trial(number).reason) == ("paused", PAUSED)
    assert study.begin() == number


def test_asha_knows_after_a_resume_what_it_knew_before(tmp_path: Path) -> None:
    study = HandDriven(tmp_path, scheduler=ASHA)
    study.run(0.8, 0.8, 0.8)
    study.run(0.7)
    study.kill()
    study.resume()
    number = study.begin()
    assert not study.report(number, 1, 0.75)
    assert study.trial(number).reason == "asha: epoch 1, rank 2 of 3"


def test_asha_does_not_stop_a_trial_at_its_last_epoch(tmp_path: Path) -> None:
    study = HandDriven(tmp_path, scheduler=ASHA, training={"max_epochs": 4})
    study.run(0.9, 0.9, 0.9, 0.9)
    number = study.begin()
    assert not study.driver.result(
        {
            "number": number,
            "next_within_s": 1.0,
            "epoch": 3,
            "metrics": [("score", 0.1)],
            "saves": False,
            "checkpoint_bytes": None,
            "finished": True,
        }
    )
    assert study.trial(number).state == "completed"


# ---- which trials


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


def score_of(params: dict[str, Any]) -> float:
    return 1.0 - (params["x"] - 0.3) ** 2 - 0.01 * params["depth"]


def play(study: HandDriven, until: int) -> None:
    """Runs whole trials, one after the other, until the study has `until` of them."""
    while len(study.params()) < until:
        number = study.begin()
        study.report(number, 1, score_of(study.params()[number]))
        study.finish(number)


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


def play_in_pairs(study: HandDriven, until: int, killed_with: int | None = None) -> None:
    """Two trials at a time, the second one ends first; the driver is killed when trial `killed_with` has begun."""
    while len(study.params()) < until:
        pair = [study.begin(), study.begin()]
        if killed_with in pair:
            study.kill()
            study.resume()
            assert [study.begin(), study.begin()] == pair
        for number in reversed(pair):
            study.report(number, 1, score_of(study.params()[number]))
            study.finish(number)


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


# ---- checkpoints


def test_a_trial_keeps_its_best_and_last_checkpoint_while_it_runs_and_then_its_best(tmp_path: Path) -> None:
    study = HandDriven(tmp_path, training={"max_epochs": 5})
    number = study.begin()
    kept = []
    for epoch, score in enumerate([0.5, 0.8, 0.6, 0.7, 0.75], start=1):
        study.report(number, epoch, score, num_bytes=10)
        kept.append(study.folder.checkpoints.epochs(number))
    assert kept == [[1], [2], [2, 3], [2, 4], [2]]
    checkpoint = study.trial(number).checkpoint
    assert checkpoint is not None and (checkpoint.epoch, checkpoint.bytes) == (2, 10)


def budget_of(num_bytes: int) -> dict[str, float]:
    return {"budget_gib": num_bytes / GIB}


def test_when_room_is_short_the_worst_trials_checkpoints_go(tmp_path: Path) -> None:
    study = HandDriven(tmp_path, checkpoints=budget_of(400))
    for score in (0.5, 0.7, 0.6):
        study.run(score, num_bytes=100)
    assert study.folder.checkpoints.kept() == {0: [1], 1: [1], 2: [1]}
    study.report(study.begin(), 1, 0.4, num_bytes=100)  # 400 are full, and its next one needs 100
    assert study.folder.checkpoints.kept() == {1: [1], 2: [1], 3: [1]}


def test_room_is_kept_for_a_whole_checkpoint_before_there_is_one(tmp_path: Path) -> None:
    study = HandDriven(tmp_path, checkpoints=budget_of(400))
    for score in (0.5, 0.7):
        study.run(score, num_bytes=50)
    number = study.begin()
    study.report(number, 1, 0.6, num_bytes=50, resumable=False)
    assert study.folder.checkpoints.kept() == {0: [1], 1: [1], 2: [1]}
    study.saved(number, 1, 50, resumable=False, whole_bytes=300)
    assert study.folder.checkpoints.kept() == {1: [1], 2: [1]}, "150 and 300 are more than 400"
    assert not study.driver.has_room
    study.report(number, 2, 0.6, num_bytes=60)
    assert study.driver.has_room, "it was not so large"


def test_a_failed_trial_keeps_no_checkpoint_that_the_best_one_needs_room_for(tmp_path: Path) -> None:
    study = HandDriven(tmp_path, checkpoints=budget_of(150), faults={"restarts_per_trial": 0})
    study.run(0.7, num_bytes=100)
    number = study.begin()
    study.report(number, 1, 0.9, num_bytes=100)
    study.fail(number, "rank 0 died")
    study.run(0.6, num_bytes=100)
    assert study.folder.checkpoints.kept() == {0: [1]}
    study.kill()
    study.resume()
    study.run(0.8, num_bytes=100)
    best = study.record.status(deep=True).best
    assert best is not None and (best.number, best.value) == (3, 0.8)
    assert study.folder.checkpoints.kept() == {3: [1]}


def test_a_trial_that_failed_just_before_its_driver_was_killed_keeps_none_either(tmp_path: Path) -> None:
    study = HandDriven(tmp_path, checkpoints=budget_of(150))
    study.run(0.7, num_bytes=100)
    number = study.begin()
    study.report(number, 1, 0.9, num_bytes=100)
    study.record.fail(number, "rank 0 died")
    study.kill()
    study.resume()
    study.run(0.6, num_bytes=100)
    assert study.folder.checkpoints.kept() == {0: [1]}


def test_the_checkpoints_of_a_resumed_study_are_the_ones_that_are_there(tmp_path: Path) -> None:
    study = HandDriven(tmp_path, checkpoints=budget_of(250))
    study.run(0.5, num_bytes=100)
    number = study.begin()
    study.report(number, 1, 0.6, num_bytes=100)
    store = study.folder.checkpoints
    store.stage(number, 2)  # half a checkpoint of a killed writer
    store.stage(99, 1)
    store.commit(99, 1, {})  # and one of a trial that the record does not know
    study.kill()
    study.resume()
    assert store.kept() == {0: [1], 1: [1]}
    assert list(store.root.glob("trial-*/.*")) == []
    study.begin()
    study.report(number, 2, 0.7, num_bytes=100)
    study.finish(number)
    study.run(0.55, num_bytes=100)
    assert store.kept() == {1: [2], 2: [1]}


def test_an_epoch_that_the_killed_driver_never_saw_is_in_the_record_after_a_resume(tmp_path: Path) -> None:
    study = HandDriven(tmp_path)
    number = study.begin()
    study.report(number, 1, 0.5, num_bytes=10)
    store = study.folder.checkpoints
    (store.stage(number, 2) / "weights").write_bytes(b"w")
    store.commit(number, 2, {"score": 0.6})
    study.kill()
    study.resume()
    assert study.begin() == number
    assert study.report(number, 2, 0.6, num_bytes=1)  # the supervisor's first result is its checkpoint's
    assert [report.metrics["score"] for report in study.trial(number).reports] == [0.5, 0.6]


def test_status_is_json_without_nan(tmp_path: Path) -> None:
    study = HandDriven(tmp_path)
    study.run(0.5)
    study.run(math.nan)
    study.begin()
    document = json.dumps(study.record.status().to_json(), allow_nan=False)
    assert json.loads(document)["trials"][1]["reports"][0]["metrics"] == {"score": None}


def test_of_a_trial_that_saves_some_epochs_the_best_saved_one_is_kept_and_exported(tmp_path: Path) -> None:
    study = HandDriven(tmp_path, scheduler={"name": "none"}, budget={"trials": 1})
    number = study.begin()
    study.report(number, 1, 0.9)
    study.report(number, 2, 0.5, num_bytes=10)
    study.report(number, 3, 0.4, num_bytes=10)
    study.finish(number)
    best = study.record.best()
    assert best is not None and (best.number, best.epoch, best.value) == (number, 2, 0.5)
    assert study.record.folder.checkpoints.epochs(number) == [2]


def test_a_running_trial_keeps_what_it_goes_on_from_and_the_model_of_its_best_epoch(tmp_path: Path) -> None:
    study = HandDriven(tmp_path, scheduler={"name": "none"}, budget={"trials": 1})
    number = study.begin()
    study.report(number, 1, 0.5, num_bytes=30)
    study.report(number, 2, 0.9, num_bytes=10, resumable=False)
    study.report(number, 3, 0.6, num_bytes=10, resumable=False)
    assert study.record.folder.checkpoints.epochs(number) == [1, 2]
    study.fail(number, "rank 0 died")
    assert study.told[-1] == "trial 0: rank 0 died; starting again after epoch 1"
    study.resume()
    study.begin()
    study.report(number, 2, 0.9, num_bytes=10, resumable=False)
    assert study.record.folder.checkpoints.epochs(number) == [1, 2], "another driver keeps the same"
    study.report(number, 3, 0.7, num_bytes=30)
    assert study.record.folder.checkpoints.epochs(number) == [2, 3]


@pytest.mark.parametrize("way", ["failed", "supervisor lost", "resumed"])
def test_epochs_that_are_trained_again_count_with_their_new_values_alone(tmp_path: Path, way: str) -> None:
    """On a GPU they come out a little different. The models of the first time must not hold the place of the best."""
    study = HandDriven(tmp_path, scheduler={"name": "none"}, budget={"trials": 1})
    number = study.begin()
    for epoch, score, resumable in ((1, 0.5, True), (4, 0.860, False), (5, 0.862, False)):
        study.report(number, epoch, score, num_bytes=10, resumable=resumable)
    if way == "failed":
        assert study.fail(number, "rank 0 died")
    elif way == "supervisor lost":
        study.driver.supervisor_lost(number, "killed")
        study.begin()
    else:
        study.resume()
        study.begin()
    assert study.folder.checkpoints.epochs(number) == [1]
    study.report(number, 4, 0.861, num_bytes=10, resumable=False)
    study.report(number, 5, 0.859)
    study.finish(number)
    best = study.record.best()
    assert best is not None and (best.epoch, best.value) == (4, 0.861)
    assert study.folder.checkpoints.epochs(number) == [4]


def test_a_stop_lets_a_trial_go_on_that_owes_a_whole_checkpoint(tmp_path: Path) -> None:
    study = HandDriven(tmp_path)
    number = study.begin()
    assert study.report(number, 1, 0.5, num_bytes=30)
    assert study.report(number, 2, 0.6)
    study.record.request_stop(False)
    study.driver.poll()
    study.commit(number, 2, 10, {"score": 0.6}, resumable=False)
    assert study.saved(number, 2, 10, resumable=False), "a model alone, asked for just before the stop"
    assert not study.report(number, 3, 0.7, num_bytes=30)
    assert study.folder.checkpoints.epochs(number) == [3]


def test_a_trial_that_starts_again_is_not_judged_twice_at_a_rung_that_it_has_passed(tmp_path: Path) -> None:
    study = HandDriven(tmp_path, budget={"trials": 4, "concurrent_trials": 4})
    first = study.begin()
    assert study.report(first, 1, 0.1, num_bytes=10)  # the first at a rung goes on
    for score in (0.7, 0.8, 0.9):
        assert study.report(study.begin(), 1, score) is (score > 0.6)
    assert study.fail(first, "rank 0 died")
    assert study.report(first, 1, 0.1, num_bytes=10)  # handed in once more, from the checkpoint
    assert study.report(first, 2, 0.1)


def test_what_asha_said_is_done_after_a_kill_that_came_before_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = HandDriven(tmp_path, scheduler=ASHA)
    study.run(*[0.9] * 9, num_bytes=10)
    number = study.begin()
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(study.record, "prune", _killed)
        study.report(number, 1, 0.1, num_bytes=10)
    study.resume()
    assert study.begin() == number
    assert not study.report(number, 1, 0.1, num_bytes=10), "the checkpoint that it goes on from"
    assert (study.trial(number).state, study.trial(number).reason) == ("pruned", "asha: epoch 1, rank 2 of 2")


def _killed(*words: object, **more: object) -> None:
    raise KeyboardInterrupt


def test_trials_that_are_too_many_for_the_budget_wait_until_fewer_run(tmp_path: Path) -> None:
    """Nobody knows the size of the first checkpoint of a trainable of the user's own."""
    study = HandDriven(tmp_path, checkpoints=budget_of(500), budget={"trials": 4})
    numbers = [study.begin() for _ in range(4)]
    goes_on = [study.report(number, 1, 0.5, num_bytes=100) for number in numbers[:3]]
    assert goes_on == [True, True, True]
    result = {"number": 3, "next_within_s": 60.0, "failure": "checkpoints.budget_gib is too small", "fault": "budget"}
    assert not study.driver.result(result)
    assert (study.trial(3).state, study.driver.stopping) == ("paused", False)
    assert not study.driver.has_room
    for number in numbers[:3]:
        study.finish(number)
    assert study.driver.has_room and study.begin() == 3
    assert not study.driver.result(result), "alone, it has all the room that there is"
    assert study.trial(3).state == "failed"


def test_a_trial_that_begins_again_at_epoch_1_says_so_whoever_was_lost(tmp_path: Path) -> None:
    again = "trial 0 begins again at epoch 1: it has no checkpoint to go on from"
    study = HandDriven(tmp_path)
    study.report(study.begin(), 1, 0.5)
    study.driver.supervisor_lost(0, "node gone")
    study.begin()
    assert study.told[-1] == again
    study.report(0, 1, 0.5, num_bytes=10)
    study.resume()
    told = len(study.told)
    study.begin()
    assert again not in study.told[told:], "it goes on after epoch 1"


def test_checkpoints_that_never_fit_fail_their_trials_one_after_the_other(tmp_path: Path) -> None:
    """However many run side by side: one that waits for room is not handed out again beside as many."""
    study = HandDriven(tmp_path, checkpoints=budget_of(500), budget={"trials": 6}, faults={"same_error_limit": 5})
    failure = {"next_within_s": 60.0, "failure": "checkpoints.budget_gib is too small", "fault": "budget"}
    running = [study.begin() for _ in range(3)]
    most = []
    while running and len(most) < 50:
        most.append(len(running))
        number = running.pop()
        assert not study.driver.result(failure | {"number": number})
        while study.driver.has_room and (asked := study.driver.ask()) is not None:
            study.driver.started(asked.number)
            running.append(asked.number)
    assert [study.trial(number).state for number in range(5)] == ["failed"] * 5
    assert len(most) <= 12 and max(study.trial(number).restarts for number in range(5)) <= 3, most


def test_a_trial_that_did_not_fit_beside_others_leaves_their_number_as_it_was_once_it_fits(tmp_path: Path) -> None:
    study = HandDriven(tmp_path, checkpoints=budget_of(5000), budget={"trials": 6})
    failure = {"next_within_s": 60.0, "failure": "checkpoints.budget_gib is too small", "fault": "budget"}
    first, second, third = study.begin(), study.begin(), study.begin()
    study.driver.result(failure | {"number": third})
    assert not study.driver.has_room, "two run"
    study.report(first, 1, 0.5), study.report(second, 1, 0.5)
    study.finish(first)
    assert study.driver.has_room and study.begin() == third
    assert not study.driver.has_room
    study.report(third, 1, 0.6, num_bytes=100)
    assert study.driver.has_room


def test_a_trial_that_never_fitted_leaves_the_number_of_others_as_it_was(tmp_path: Path) -> None:
    study = HandDriven(tmp_path, checkpoints=budget_of(5000), budget={"trials": 6})
    failure = {"next_within_s": 60.0, "failure": "checkpoints.budget_gib is too small", "fault": "budget"}
    first, second = study.begin(), study.begin()
    study.driver.result(failure | {"number": second})
    study.report(first, 1, 0.5)
    study.finish(first)
    assert study.begin() == second and not study.driver.has_room, "it has all the room that there is"
    study.driver.result(failure | {"number": second})
    assert study.trial(second).state == "failed"
    study.begin()
    assert study.driver.has_room


def test_what_the_user_wrote_wrong_is_not_tried_again(tmp_path: Path) -> None:
    study = HandDriven(tmp_path, faults={"restarts_per_trial": 2})
    number = study.begin()
    reason = "rank 0 raised ModelError: model: can be opened"
    assert not study.driver.result({"number": number, "next_within_s": 60.0, "failure": reason, "fault": "input"})
    assert (study.trial(number).state, study.trial(number).restarts) == ("failed", 0)


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


def test_supervisors_that_died_idle_use_up_no_restart_of_the_trials_they_are_handed(tmp_path: Path) -> None:
    study = HandDriven(tmp_path, faults={"restarts_per_trial": 0})
    for _ in range(MAX_IN_VAIN):
        asked = study.driver.ask()
        assert asked is not None and asked.number == 0
        study.driver.supervisor_lost(0, "it was dead")
    assert study.begin() == 0
    assert study.trial(0).restarts == 0
    study.driver.supervisor_lost(0, "node gone")
    assert study.trial(0).state == "failed", "this one had taken it"
    for _ in range(MAX_IN_VAIN + 1):
        asked = study.driver.ask()
        assert asked is not None and asked.number == 1
        study.driver.supervisor_lost(1, "it does not start")
    assert study.trial(1).state == "failed", "and this is no accident"
