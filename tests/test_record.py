"""The record says what happened, to us, to Optuna's own tools, and to whoever opens it after a crash."""

from __future__ import annotations

import json
import math
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hand_driven import HandDriven, budget_of, optuna_trials
from optuna.trial import TrialState as OptunaState

from trainables.checkpoint import MANIFEST
from tune_service.errors import StorageError, exit_code
from tune_service.record import FORMAT, Record
from tune_service.storage import Storage

TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ")


# ---- the states of trials


def test_a_trial_is_waiting_then_running_then_ended(tmp_path: Path) -> None:
    study = HandDriven(tmp_path)
    asked = study.driver.ask()
    assert asked is not None
    trial = study.trial(0)
    assert (trial.state, trial.params, trial.started_at, trial.ended_at) == ("waiting", asked.params, None, None)
    study.driver.started(0)
    trial = study.trial(0)
    assert (trial.state, trial.ended_at) == ("running", None)
    assert TIME.fullmatch(str(trial.started_at))
    study.report(0, 1, 0.5)
    study.finish(0)
    trial = study.trial(0)
    assert (trial.state, trial.reason) == ("completed", None)
    assert TIME.fullmatch(str(trial.ended_at)) and str(trial.ended_at) >= str(trial.started_at)


def test_a_trial_that_waits_has_the_params_it_was_planned_with(tmp_path: Path) -> None:
    study = HandDriven(tmp_path, training={"x": 0.25})
    study.record._study.enqueue_trial({"x": 0.25})  # a driver that was killed before it asked
    study.kill()
    assert (study.trial(0).state, study.trial(0).params) == ("waiting", {"x": 0.25})
    assert study.record.status().state == "interrupted"


def test_a_trial_that_waits_still_waits_after_the_study_was_stopped(tmp_path: Path) -> None:
    study = HandDriven(tmp_path)
    study.driver.ask()
    study.record.request_stop(False)
    study.end()
    assert (study.trial(0).state, study.trial(0).reason) == ("waiting", None)


def test_without_a_living_driver_nothing_runs(tmp_path: Path) -> None:
    study = HandDriven(tmp_path)
    number = study.begin()
    assert study.trial(number).state == "running"
    study.kill()
    assert (study.trial(number).state, study.trial(number).reason) == ("paused", "interrupted: the driver is gone")


def test_nothing_is_running_for_optuna_once_the_driver_has_ended(tmp_path: Path) -> None:
    study = HandDriven(tmp_path)
    study.run(0.5)
    study.begin()
    study.driver.ask()
    study.end()
    assert [trial.state for trial in optuna_trials(study.folder)] == [
        OptunaState.COMPLETE,
        OptunaState.WAITING,
        OptunaState.WAITING,
    ]


# ---- the states of a study


def test_a_study_is_running_while_its_driver_lives_and_interrupted_after(tmp_path: Path) -> None:
    study = HandDriven(tmp_path, budget={"trials": 2})
    assert study.record.status().state == "running"
    study.run(0.5)
    study.kill()
    assert study.record.status().state == "interrupted"  # all trials have ended, but one is still to come
    study.resume()
    study.run(0.5)
    assert study.record.status().state == "running"
    study.kill()
    assert study.record.status().state == "completed"


def test_a_notice_is_told_only_while_its_driver_lives(tmp_path: Path) -> None:
    study = HandDriven(tmp_path)
    study.record.set_notice("trials wait for nodes")
    assert study.record.status().notice == "trials wait for nodes"
    study.kill()
    assert study.record.status().notice is None


def test_reports_come_in_the_order_of_their_epochs_in_whatever_order_they_were_written(tmp_path: Path) -> None:
    study = HandDriven(tmp_path)
    number = study.begin()
    study.report(number, 2, 0.5)
    study.fail(number, "rank 0 died")
    for epoch in (1, 3, 9):
        study.report(number, epoch, 0.5)
    assert [report.epoch for report in study.trial(number).reports] == [1, 2, 3, 9]


def test_a_stopped_study_that_had_nothing_left_to_do_is_completed(tmp_path: Path) -> None:
    study = HandDriven(tmp_path, budget={"trials": 1})
    study.run(0.5)
    study.record.request_stop(False)
    study.end()
    assert study.record.status().state == "completed"


def test_a_study_whose_trials_all_failed_has_failed_and_one_with_another_end_has_not(tmp_path: Path) -> None:
    study = HandDriven(tmp_path, budget={"trials": 2}, faults={"restarts_per_trial": 0})
    study.crash("a")
    study.crash("b")
    study.end()
    assert study.record.status().state == "failed"
    study.resume(budget=3)
    study.run(math.nan)
    study.end()
    assert study.record.status().state == "completed"


def test_a_resumed_study_is_neither_stopped_nor_failed(tmp_path: Path) -> None:
    study = HandDriven(tmp_path)
    study.record.request_stop(True)
    study.record.set_failure("no")
    study.end()
    assert study.record.status().state == "failed"
    study.resume()
    assert study.record.stop_request is None and study.record.failure is None
    study.kill()
    assert study.record.status().state == "interrupted"


# ---- the best trial and its checkpoint


def test_the_best_trial_is_one_whose_checkpoint_still_verifies(tmp_path: Path) -> None:
    study = HandDriven(tmp_path)
    for score in (0.9, 0.8, 0.7):
        study.run(score, num_bytes=10)
    store = study.folder.checkpoints
    (store.folder(0, 1) / "weights").unlink()
    best = study.record.status().best
    assert best is not None and best.number == 1
    (store.folder(1, 1) / "weights").write_bytes(b"x" * 10)  # the size is right, the bytes are not
    shallow, deep = study.record.status().best, study.record.status(deep=True).best
    assert shallow is not None and shallow.number == 1
    assert deep is not None and deep.number == 2
    (store.folder(2, 1) / MANIFEST).write_text("{}")
    assert study.record.status(deep=True).best is None


def test_a_trainable_without_checkpoints_has_a_best_trial_too(tmp_path: Path) -> None:
    study = HandDriven(tmp_path)
    study.run(0.9)
    study.run(0.8, num_bytes=10)
    best = study.record.status(deep=True).best
    assert best is not None and best.number == 0
    assert study.trial(0).checkpoint is None


def test_a_running_trial_is_not_the_best_however_good(tmp_path: Path) -> None:
    study = HandDriven(tmp_path)
    study.run(0.5)
    study.report(study.begin(), 1, 0.9)
    best = study.record.status().best
    assert best is not None and best.number == 0


def test_the_checkpoint_is_the_last_of_a_running_trial_and_the_best_of_an_ended_one(tmp_path: Path) -> None:
    study = HandDriven(tmp_path)
    number = study.begin()
    assert study.trial(number).checkpoint is None
    study.report(number, 1, 0.9, num_bytes=10)
    study.report(number, 2, 0.5, num_bytes=20)
    store = study.folder.checkpoints
    checkpoint = study.trial(number).checkpoint
    assert checkpoint is not None
    assert (checkpoint.epoch, checkpoint.bytes, checkpoint.path) == (2, 20, str(store.folder(number, 2)))
    assert Path(checkpoint.path).is_absolute()
    study.record.complete(number)  # and before the driver has deleted the last one
    checkpoint = study.trial(number).checkpoint
    assert checkpoint is not None and (checkpoint.epoch, checkpoint.bytes) == (1, 10)


def test_a_checkpoint_that_was_deleted_for_the_budget_is_not_shown(tmp_path: Path) -> None:
    study = HandDriven(tmp_path, checkpoints=budget_of(100))
    study.run(0.5, num_bytes=100)
    study.run(0.6, num_bytes=100)
    assert study.trial(0).checkpoint is None and study.trial(1).checkpoint is not None
    assert study.record.status().best is not None


# ---- what is on disk


def test_the_spec_and_the_baseline_come_back_as_they_were(tmp_path: Path) -> None:
    study = HandDriven(tmp_path)
    study.record.set_baseline(0.68)
    found = Record.open(study.folder)
    assert found.spec == study.record.spec and found.spec["search_space"]["x"] == {"uniform": [0.0, 1.0]}
    assert (found.budget_trials, found.baseline, found.objective.metric) == (16, 0.68, "score")


def test_a_record_of_a_newer_format_is_refused_with_both_formats_named(tmp_path: Path) -> None:
    study = HandDriven(tmp_path)
    study.record._study.set_user_attr("format", FORMAT + 1)
    with pytest.raises(StorageError) as refusal:
        Record.open(study.folder)
    problem = refusal.value.problems[0]
    assert (problem.place, problem.rule) == ("toy", f"has a record of format {FORMAT}")
    assert (problem.found, problem.expected) == (f"a record of format {FORMAT + 1}", "a newer tune-service")
    assert exit_code(refusal.value) == 2


@pytest.mark.parametrize("text", ["", "no JSON\n", '{"op_code": 0}\n{"op_code"\n{"op_code": 1}\n'])
def test_a_record_that_cannot_be_read_is_refused_with_its_path(tmp_path: Path, text: str) -> None:
    study = HandDriven(tmp_path)
    study.folder.journal.write_text(text)
    with pytest.raises(StorageError) as refusal:
        Record.open(study.folder)
    assert str(study.folder.journal) in refusal.value.problems[0].found


def test_a_last_line_that_a_killed_writer_left_unfinished_is_cut_off(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = HandDriven(tmp_path)
    study.run(0.5)
    study.kill()
    whole = study.folder.journal.read_bytes()
    study.folder.journal.write_bytes(whole + whole.splitlines()[-1][:-7])
    assert len(Record.open(study.folder).trials()) == 1  # a reader reads on
    assert study.folder.journal.read_bytes() != whole  # and changes nothing: the writer may be alive
    study.resume()
    study.run(0.6)
    assert study.folder.journal.read_bytes().startswith(whole)
    assert "unfinished line" in capsys.readouterr().err
    assert len(Record.open(study.folder).trials()) == len(optuna_trials(study.folder)) == 2
    assert all(json.loads(line) for line in study.folder.journal.read_text().splitlines())


def test_of_a_report_that_a_killed_writer_left_half_written_optuna_has_the_value_too(tmp_path: Path) -> None:
    """Its attribute comes last: by that we know the report, and would not write its value again."""
    study = HandDriven(tmp_path)
    number = study.begin()
    study.report(number, 1, 0.5)
    lines = study.folder.journal.read_bytes().splitlines(keepends=True)
    study.folder.journal.write_bytes(b"".join(lines[:-1]))
    study.resume()
    assert study.begin() == number
    study.report(number, 1, 0.5)
    assert [report.epoch for report in study.trial(number).reports] == [1]
    assert optuna_trials(study.folder)[number].intermediate_values == {1: 0.5}


def test_a_request_to_stop_survives_a_last_line_that_was_left_unfinished(tmp_path: Path) -> None:
    study = HandDriven(tmp_path)
    study.run(0.5)
    study.kill()
    with study.folder.journal.open("ab") as journal:
        journal.write(b'{"op_code":8,"wor')
    Record.open(study.folder).request_stop(now=False)
    again = Record.open(study.folder)
    assert again.stop_request is not None and len(again.trials()) == 1


def test_a_trial_that_was_killed_between_the_note_of_its_end_and_the_end_goes_on(tmp_path: Path) -> None:
    study = HandDriven(tmp_path)
    number = study.begin()
    study.report(number, 1, 0.5)
    study.record._set(study.record._trial(number), "ended_at", "2026-01-01T00:00:00Z")
    study.kill()
    assert study.trial(number).ended_at is None
    study.resume()
    assert study.begin() == number
    study.finish(number)
    assert study.record.trial(number).state == "completed"


def test_a_record_that_is_being_made_is_no_study_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tune_service.storage.Path.replace", lambda self, target: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        HandDriven(tmp_path)
    assert Storage(tmp_path).studies() == []


HOLD_LOCK = """
import sys, time
from pathlib import Path
from tune_service.journal import Journal
from tune_service.storage import StudyFolder
folder = StudyFolder(Path(sys.argv[1]))
lock = Journal(folder.journal, folder.journal_lock)._backend._lock
lock.acquire()
print("held", flush=True)
time.sleep(600)
"""


def test_the_journal_lock_of_a_killed_process_delays_nobody(tmp_path: Path) -> None:
    study = HandDriven(tmp_path)
    command = [sys.executable, "-c", HOLD_LOCK, str(study.folder.path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    started = time.monotonic()
    study.run(0.5)
    assert time.monotonic() - started < 5  # Optuna's own lock waits 30 s


def test_while_one_process_appends_the_others_wait(tmp_path: Path) -> None:
    study = HandDriven(tmp_path)
    mine, theirs = (Record.open(study.folder)._storage._backend._lock for _ in range(2))
    mine.acquire()
    waiting = threading.Thread(target=theirs.acquire, daemon=True)
    waiting.start()
    waiting.join(0.2)
    assert waiting.is_alive()
    mine.release()
    waiting.join(5)
    assert not waiting.is_alive()
    theirs.release()


def test_every_value_is_json_also_the_ones_that_are_not_finite(tmp_path: Path) -> None:
    study = HandDriven(tmp_path)
    study.run(0.5)
    study.run(math.inf)
    trial = study.begin()
    study.report(trial, 1, 0.5, eval_f1=math.nan)
    study.record.set_baseline(0.5)
    text = json.dumps(study.record.status().to_json(), allow_nan=False)
    reports = [trial["reports"][0]["metrics"] for trial in json.loads(text)["trials"]]
    assert reports == [{"score": 0.5}, {"score": None}, {"score": 0.5, "eval_f1": None}]
