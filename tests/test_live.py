"""A study as people see it: one line a trial in a terminal, one line an event in a log file."""

from __future__ import annotations

import io
import math
import os
import re
import subprocess
import sys
import termios
import threading
import time
import tty
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hand_driven import ASHA, HandDriven
from optuna.trial import FrozenTrial
from rich.console import Console, RenderableType

from tune_service.live import StudyDisplay, best_line, console, failure_lines, study_table
from tune_service.output import print_status
from tune_service.record import Record
from tune_service.status import TrialStatus
from tune_service.terminal import patient_stream
from tune_service.words import shown_value

SPACE = {
    "learning_rate": {"log_uniform": [1e-5, 2e-4]},
    "batch_size": {"choice": [16, 32, 64]},
    "weight_decay": {"uniform": [0.0, 0.1]},
    "warmup_fraction": {"uniform": [0.0, 0.2]},
    "model.config.resid_pdrop": {"uniform": [0.0, 0.3]},
    "max_length": {"int_uniform": [64, 128]},
}


def large_study(folder: Path) -> HandDriven:
    """64 trials, as many parameters as a recipe has, every state and long reasons."""
    study = HandDriven(folder, search_space=SPACE, scheduler=ASHA, budget={"trials": 70}, sampler={"name": "random"})
    for number in range(60):
        study.run(math.nan) if number % 20 == 7 else study.run(0.5, 0.6, 0.7) if number == 0 else study.run(0.4)
    for rank in range(2):
        study.crash(f"rank {rank} raised OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 MiB\nits log")
    study.begin()
    study.driver.ask()
    return study


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> HandDriven:
    return large_study(tmp_path_factory.mktemp("study"))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds of the display's clock, to be set."""
    now = [100.0]
    monkeypatch.setattr("tune_service.live.time.monotonic", lambda: now[0])
    return now


def lines(renderable: RenderableType, width: int) -> list[str]:
    """What a terminal of this width shows."""
    out = io.StringIO()
    Console(file=out, width=width, color_system=None).print(renderable)
    return out.getvalue().splitlines()


@pytest.mark.parametrize("width", [80, 100, 200])
def test_each_of_64_trials_has_one_line_that_fits(study: HandDriven, width: int) -> None:
    shown = lines(study_table(study.record.status()), width)
    assert max(map(len, shown)) <= width
    rows = [line.split() for line in shown if re.match(r" *\*?\d+ ", line)]
    assert [row[0].lstrip("*") for row in rows] == [str(number) for number in range(64)]
    assert len(shown) <= 64 + 2  # and the header
    assert {row[1] for row in rows} == {"completed", "pruned", "failed", "running", "waiting"}


def test_a_narrow_terminal_cuts_params_and_reason_and_nothing_else(study: HandDriven) -> None:
    shown = lines(study_table(study.record.status()), 80)
    assert shown[0].split() == ["best"]
    assert shown[1].split() == ["trial", "state", "epoch", "last", "score", "params", "reason"]
    assert re.match(r" *\*0  completed      3  0\.7000  0\.7000  learning_rate=\S+…", shown[2])
    failed = next(line for line in shown if " failed " in line)
    assert re.search(r" -  +-  +-  learning_rate=.*…  rank 0 raised.*…", failed)


def test_in_a_file_nothing_is_cut_but_a_long_reason(study: HandDriven) -> None:
    out = io.StringIO()
    console(out).print(study_table(study.record.status()))
    row = next(line for line in out.getvalue().splitlines() if " pruned " in line)
    for name in ("learning_rate", "batch_size", "weight_decay", "warmup_fraction", "resid_pdrop", "max_length"):
        assert f"{name}=" in row
    assert "asha: epoch 1, rank 2 of 2" in row


def test_where_there_is_not_room_for_all_the_best_are_shown_and_the_rest_counted(study: HandDriven) -> None:
    shown = lines(study_table(study.record.status(), max_rows=3), 80)
    assert [line.split()[0] for line in shown[2:5]] == ["*0", "1", "2"]
    assert shown[5].split() == "and 61 more trials".split()


def test_the_live_table_fits_the_terminal_with_what_runs_and_what_is_best(study: HandDriven) -> None:
    terminal = Console(file=io.StringIO(), force_terminal=True, width=80, height=24, color_system=None)
    with StudyDisplay(terminal) as display:
        display.show(study.record)
        assert display._live is not None
        shown = lines(display._live.get_renderable(), 80)
    assert len(shown) < 24 and max(map(len, shown)) <= 80
    assert any(re.match(r" *\*0 ", line) for line in shown)
    assert any(re.match(r" *62  running ", line) for line in shown)
    assert any("62 of 70 trials ended | best 0.7000 (trial 0, epoch 3)" in line for line in shown)


def test_a_look_at_a_long_study_costs_what_has_changed_in_it(
    study: HandDriven, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked_at = []
    status = Record._status

    def noted(record: Record, trial: FrozenTrial, *others: Any) -> TrialStatus:
        looked_at.append(trial.number)
        return status(record, trial, *others)

    monkeypatch.setattr(Record, "_status", noted)
    _, moment = study.record.changed(())
    assert looked_at == list(range(64))
    looked_at.clear()
    study.report(62, 1, 0.4)
    changed, moment = study.record.changed(moment)
    assert looked_at == [62] and [trial.reports[0].metrics["score"] for trial in changed] == [0.4]
    assert study.record.changed(moment)[0] == []


def test_a_display_keeps_the_best_and_the_newest_trials_and_no_more(
    tmp_path: Path, clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tune_service.live.NUM_NEWEST", 8)
    study = HandDriven(tmp_path, budget={"trials": 60}, sampler={"name": "random"})
    terminal = Console(file=io.StringIO(), force_terminal=True, width=80, height=24, color_system=None)
    with StudyDisplay(terminal) as display:
        first = study.begin()
        for number in range(1, 40):
            study.run(0.9 if number == 7 else 0.5 + number / 1000)
            clock[0] += 1.0
            display.show(study.record)
        assert display._live is not None
        shown = lines(display._live.get_renderable(), 80)
        assert sorted(display._study.kept) == [first, 7, *range(32, 40)]
    numbers = [line.split()[0] for line in shown if re.match(r" *\*?\d+  ", line)]
    assert numbers == ["0", "*7", *(str(number) for number in range(32, 40))]
    assert any("and 30 more trials" in line for line in shown)
    assert any("39 of 60 trials ended | best 0.9000 (trial 7, epoch 1)" in line for line in shown)


def test_the_last_line_names_the_best_trial_with_its_params(tmp_path: Path) -> None:
    study = HandDriven(tmp_path, training={"x": 0.25, "depth": 2})
    assert best_line(study.record.status()) == (
        "no best trial: none has ended with a finite value and a whole checkpoint"
    )
    study.run(0.5, 0.75)
    assert best_line(study.record.status()) == "best trial 0, epoch 2: score 0.7500 with x=0.25, depth=2"


def test_why_trials_failed_is_told_in_full_and_once_for_those_that_failed_alike(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = HandDriven(tmp_path, faults={"restarts_per_trial": 0, "same_error_limit": 9}, budget={"trials": 9})
    assert failure_lines(study.record.status()) == []
    reason = "rank 0 raised RuntimeError: a long reason that no table has room for, [bold] at 0x7f and :key: "
    for number in range(2):
        study.crash(f"{reason}{number}\nits log")
    study.crash("rank 1 died")
    status = study.record.status()
    assert failure_lines(status) == [f"2 trials failed: {reason}0", "1 trial failed: rank 1 died"]
    print_status(status, as_json=False)
    assert capsys.readouterr().out.splitlines()[-3:] == [*failure_lines(status), best_line(status)]


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.84375, "0.8438"),
        (0.0, "0.0000"),
        (-2.5, "-2.5000"),
        (3.2e-7, "3.2e-07"),
        (2.0963e34, "2.096e+34"),
        (None, "-"),
    ],
)
def test_a_value_is_shown_with_digits_that_say_something(value: float | None, shown: str) -> None:
    assert shown_value(value) == shown


# ---- log files


def test_a_log_file_gets_one_line_an_event(tmp_path: Path, clock: list[float]) -> None:
    study = HandDriven(tmp_path, faults={"restarts_per_trial": 0}, budget={"trials": 4})
    out = io.StringIO()
    with StudyDisplay(console(out)) as display:

        def show() -> None:
            clock[0] += 10.0
            display.show(study.record)

        show()
        first = study.begin()
        show()
        show()  # nothing new
        study.report(first, 1, 0.5)
        show()
        study.report(first, 2, 0.75)
        study.finish(first)
        show()
        study.report(study.begin(), 1, math.nan)
        study.crash("rank 0 raised ValueError: no\nits log")
        show()
        display.tell("trial 3: its supervisor was lost (node gone); starting again")

    stamped = out.getvalue().splitlines()
    assert all(re.match(r"\d\d:\d\d:\d\d ", line) for line in stamped)
    said = [line[9:] for line in stamped]
    assert said[:2] == ["trial 0 running", "trial 0 running after epoch 1, score 0.5000"]
    assert said[2] == (
        "trial 0 completed after epoch 2, score 0.7500 | 1 of 4 trials ended | "
        "best 0.7500 (trial 0, epoch 2) | about 2 min left"  # 50 s for one trial, 3 to come
    )
    assert said[3].startswith("trial 1 pruned after epoch 1: diverged: score is nan at epoch 1 | 3 of 4 trials ended")
    assert said[4].startswith("trial 2 failed: rank 0 raised ValueError: no | 3 of 4")
    assert said[5:] == ["trial 3: its supervisor was lost (node gone); starting again"]


def test_a_line_has_the_value_of_its_epoch_and_the_best_one_where_that_is_another(
    tmp_path: Path, clock: list[float]
) -> None:
    study = HandDriven(tmp_path, budget={"trials": 1}, training={"max_epochs": 3})
    out = io.StringIO()
    with StudyDisplay(console(out)) as display:
        number = study.begin()
        for epoch, score in enumerate([0.5, 0.4, math.nan], start=1):
            clock[0] += 10.0
            study.report(number, epoch, score)
            display.show(study.record)
    said = [line[9:] for line in out.getvalue().splitlines()]
    assert said[:2] == [
        "trial 0 running after epoch 1, score 0.5000",
        "trial 0 running after epoch 2, score 0.4000, best 0.5000 (epoch 1)",
    ]
    assert said[2].startswith(
        "trial 0 pruned after epoch 3, best 0.5000 (epoch 1): diverged: score is nan at epoch 3 | 1 of 1"
    )
    last = best_line(study.record.status())
    assert last.startswith("best trial 0, epoch 1: score 0.5000 with x=")
    assert last.endswith("; later it diverged: score is nan at epoch 3")


def test_a_resumed_study_tells_nothing_twice_and_takes_the_time_of_its_own_trials(
    tmp_path: Path, clock: list[float]
) -> None:
    study = HandDriven(tmp_path, budget={"trials": 4})
    study.run(0.5)
    study.run(0.6)
    study.resume()
    out = io.StringIO()
    with StudyDisplay(console(out)) as display:
        display.show(study.record)
        study.run(0.7)
        clock[0] += 20.0
        display.show(study.record)
    said = [line[9:] for line in out.getvalue().splitlines()]
    assert said == [
        "trial 2 completed after epoch 1, score 0.7000 | 3 of 4 trials ended | "
        "best 0.7000 (trial 2, epoch 1) | about 20 s left"
    ]


def test_the_record_is_read_twice_a_second_at_most(tmp_path: Path, clock: list[float]) -> None:
    study = HandDriven(tmp_path)
    out = io.StringIO()
    display = StudyDisplay(console(out))
    display.show(study.record)
    study.begin()
    clock[0] += 0.4
    display.show(study.record)
    assert out.getvalue() == ""
    clock[0] += 0.2
    display.show(study.record)
    assert out.getvalue().endswith("trial 0 running\n")


def test_accuracy_is_shown_beside_what_the_majority_class_would_reach(tmp_path: Path, clock: list[float]) -> None:
    study = HandDriven(tmp_path, objective={"metric": "eval_accuracy"})
    study.record.set_baseline(0.684)
    out = io.StringIO()
    with StudyDisplay(console(out)) as display:
        display.show(study.record)
        study.report(study.begin(), 1, 0.0, eval_accuracy=0.7)
        study.finish(0)
        clock[0] += 1.0
        display.show(study.record)
    assert "majority class 0.6840" in out.getvalue()


def test_what_keeps_trials_waiting_is_told_once_and_so_is_its_end(tmp_path: Path) -> None:
    study = HandDriven(tmp_path)
    output = io.StringIO()
    display = StudyDisplay(Console(file=output, width=200))
    for notice in (None, "trials wait for nodes", "trials wait for nodes", None, None):
        study.driver.notice(notice)
        display._next = 0.0
        display.show(study.record)
    lines = [line.partition(" ")[2] for line in output.getvalue().splitlines()]
    assert lines == ["trials wait for nodes", "no longer: trials wait for nodes"]


def test_a_terminal_that_stands_still_holds_up_nobody_and_gets_all_when_it_goes_on(tmp_path: Path) -> None:
    ours, its = os.openpty()
    with patient_stream(its) as terminal, os.fdopen(ours, "rb") as reader:
        display = StudyDisplay(console(terminal))
        termios.tcflow(its, termios.TCOOFF)  # Ctrl-S
        telling = threading.Thread(target=lambda: [display.tell(f"line {number}") for number in range(3)], daemon=True)
        telling.start()
        telling.join(30)
        was_held_up = telling.is_alive()
        termios.tcflow(its, termios.TCOON)
        assert not was_held_up
        display.tell("the last one")
        shown = ""
        while "the last one" not in shown:
            shown += os.read(reader.fileno(), 10_000).decode()
    assert re.findall(r"line \d|the last one", shown) == ["line 0", "line 1", "line 2", "the last one"]


def pseudo_terminal() -> tuple[int, int]:
    ours, its = os.openpty()
    tty.setraw(its)
    return ours, its


def impatient_pipe() -> tuple[int, int]:
    """As some programs make the pipes that they read others by."""
    ours, its = os.pipe()
    os.set_blocking(its, False)
    return ours, its


@pytest.mark.parametrize(
    "way", [os.pipe, impatient_pipe, pseudo_terminal], ids=["pipe", "pipe that does not block", "terminal"]
)
def test_a_reader_that_stops_in_the_midst_holds_up_nobody_and_gets_all_when_it_goes_on(
    way: Callable[[], tuple[int, int]],
) -> None:
    """A laptop that sleeps, `less`: what is on its way fills up, and what was asked for room has room for a part."""
    ours, its = way()
    with patient_stream(its) as stream, os.fdopen(ours, "rb") as reader:
        display = StudyDisplay(console(stream))
        display.tell("line 0")
        os.read(reader.fileno(), 5)
        began = time.monotonic()
        for number in range(1, 3000):
            display.tell(f"line {number}, which is as long as a line of a study with its best trial and the time left")
        assert time.monotonic() - began < 60, "nobody was waited for"
        assert not stream.is_idle
        shown = b""
        while b"line 2999" not in shown:
            shown += os.read(reader.fileno(), 1 << 16)
    assert [int(number) for number in re.findall(rb"line (\d+)", shown)] == list(range(3000))


def test_a_display_whose_reader_stands_still_for_good_ends_after_its_last_words(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tune_service.terminal.LAST_WORDS_S", 0.5)
    ours, its = os.pipe()
    began = time.monotonic()
    with patient_stream(its) as stream, StudyDisplay(console(stream)) as display:
        display.tell("x" * (1 << 20))
    assert 0.5 <= time.monotonic() - began < 5
    os.close(ours)


@pytest.mark.parametrize("place", ["a pipe whose reader is gone", "a disk that is full"])
def test_a_display_that_nobody_can_read_goes_on_all_the_same(place: str) -> None:
    if place == "a disk that is full":
        its = os.open("/dev/full", os.O_WRONLY)
    else:
        ours, its = os.pipe()
        os.close(ours)
    with patient_stream(its) as stream, StudyDisplay(console(stream)) as display:
        for _ in range(3):
            display.tell("is anybody there?")
            stream.drain(10)
            assert stream.is_idle
    os.close(its)


ABORTS = """
import sys
from tune_service.errors import StudyHaltedError
from tune_service.output import display
from trainables.errors import Problem
with display(False) as shown:
    if sys.argv[1] == "speechless":
        def fails(*words): raise ValueError("no words")
        shown._last_words = fails
    shown._live.update("a table\\n" * 20, refresh=True)
    shown.abort(StudyHaltedError(Problem("toy", "a study goes on", "Ray died", "another try")))
"""


@pytest.mark.parametrize("way", ["in words", "speechless"])
def test_a_process_that_must_end_at_once_does_and_its_last_words_stay_on_the_terminal(way: str) -> None:
    ours, its = os.openpty()
    termios.tcsetwinsize(its, (24, 80))
    environment = os.environ | {"TERM": "xterm"}
    process = subprocess.Popen([sys.executable, "-c", ABORTS, way], stdout=its, stderr=its, env=environment)
    os.close(its)
    shown = b""
    with os.fdopen(ours, "rb") as reader, suppress(OSError):  # EIO: the last one who had the other side has ended
        while piece := os.read(reader.fileno(), 1 << 16):
            shown += piece
    assert process.wait(60) == 1
    if way == "in words":
        words = shown.index(b"error: toy: a study goes on")
        assert shown.rindex(b"\x1b[2K") < words, "no line is taken away after them"
