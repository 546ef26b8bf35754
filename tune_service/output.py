"""What commands print: for people, or one JSON document. What is heavy is imported by what needs it."""

from __future__ import annotations

import json
import select
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from trainables.errors import Problem, UserError
from tune_service.errors import InterruptedCommandError, error_json
from tune_service.words import counted, shown_value

if TYPE_CHECKING:
    from rich.console import Console

    from tune_service.check import Check
    from tune_service.live import StudyDisplay
    from tune_service.status import StudyStatus
    from tune_service.studies import StudyRow
    from tune_service.terminal import Shown

MAX_ROWS = 20


def reader_is_gone() -> bool:
    """Whether standard output is a pipe that nobody reads any more: `tune-service list | head -1`."""
    poll = select.poll()
    poll.register(1, 0)
    return any(events & select.POLLERR for _, events in poll.poll(0))


def print_failure(error: BaseException, as_json: bool, out: Shown, err: Shown) -> None:
    """Why a command failed: on standard error for people, as its document with --json."""
    if isinstance(error, KeyboardInterrupt):
        print("interrupted", file=err)
    if isinstance(error, InterruptedCommandError):
        print(f"interrupted; {error.problems[0].expected}", file=err)
    if as_json:
        print(json.dumps(error_json(error), allow_nan=False), file=out, flush=True)
    elif isinstance(error, UserError) and not isinstance(error, InterruptedCommandError):
        for problem in error.problems:
            print(f"error: {_told(problem, indent='  ')}", file=err, flush=True)


def _told(problem: Problem, indent: str) -> str:
    rule = f"{problem.place}: {problem.rule}" if problem.place else problem.rule
    return f"{rule}\n{indent}found:    {problem.found}\n{indent}expected: {problem.expected}"


def print_check(check: Check) -> None:
    """One thing that was looked at, and what to do when it is not as it should be."""
    if check.problems:
        for problem in check.problems:
            print(f"FAIL {check.name}: {_told(problem, indent='     ')}", flush=True)
        return
    print(f"{'ok  ' if check.ok else 'FAIL'} {check.name}: {check.found}", flush=True)
    if check.advice:
        print(f"     {check.advice}", flush=True)


def print_rows(found: Sequence[StudyRow], where: str) -> None:
    """A list of studies."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("study", "state", "trials", "best", "metric"):
        table.add_column(column)
    for row in found:
        best = shown_value(row.best.value if row.best else None)
        table.add_row(row.study, row.state, str(row.trials), best, row.metric)
    _console().print(table if found else f"no studies in {where}")


def _console() -> Console:
    from tune_service.live import console

    return console(sys.stdout)


@contextmanager
def display(as_json: bool) -> Iterator[StudyDisplay]:
    """A display on standard output; with --json, which has that for its document, on standard error."""
    from tune_service.live import StudyDisplay, console
    from tune_service.terminal import LAST_WORDS_S, patient_stream

    with patient_stream(1) as out, patient_stream(2) as err:

        def last_words(error: BaseException) -> None:
            end = time.monotonic() + LAST_WORDS_S
            out.drain(LAST_WORDS_S)  # the end of a live table takes lines away, on the same terminal perhaps
            print_failure(error, as_json, out, err)
            for stream in (err, out):
                stream.drain(end - time.monotonic())

        with StudyDisplay(console(err if as_json else out), last_words) as display:
            yield display


def print_status(found: StudyStatus, as_json: bool) -> None:
    """One study."""
    if as_json:
        print_json(found.to_json())
        return
    from rich.text import Text

    from tune_service.live import best_line, failure_lines, study_table

    console = _console()
    console.print(study_table(found, MAX_ROWS if console.is_terminal else None))
    console.print(f"study {found.study}: {found.state}, {counted(len(found.trials), 'trial')}", highlight=False)
    for line in (*failure_lines(found), best_line(found)):
        console.print(Text(line), soft_wrap=True)
    if found.notice is not None:
        console.print(found.notice, style="yellow", highlight=False, soft_wrap=True)


def print_json(document: Any) -> None:
    """The one document of a command."""
    print(json.dumps(document, allow_nan=False))
