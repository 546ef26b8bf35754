"""How a study looks to people: a live table in a terminal, one line an event in a log file."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from typing import IO, TextIO, cast

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from tune_service.errors import exit_code
from tune_service.failures import alike, first_line
from tune_service.status import (
    BestTrial,
    Moment,
    ObjectiveStatus,
    StudyStatus,
    StudyView,
    TrialStatus,
    best_report,
    objective_value,
    ranked,
)
from tune_service.terminal import PatientStream, Shown
from tune_service.words import counted, shown_value

REFRESH_S = 0.5
NUM_BEST = 5
NUM_REASONS = 3
NUM_NEWEST = 200
"""More than a terminal has lines."""
FILE_WIDTH = 240
_STYLES = {"running": "cyan", "completed": "green", "pruned": "yellow", "failed": "red", "paused": "magenta"}


def console(stream: Shown) -> Console:
    """A console on `stream`; in a file, which has no width, lines are long."""
    width = None if stream.isatty() else FILE_WIDTH
    return Console(file=cast("TextIO", stream), width=width, highlight=False)


class StudyDisplay:
    """Shows a running study on `console`; in a terminal as a table that stays in place."""

    def __init__(self, console: Console, last_words: Callable[[BaseException], None] = lambda error: None) -> None:
        """`last_words` prints why the process ends at once, when it must."""
        self._console = console
        self._last_words = last_words
        self._live = _live(console) if console.is_terminal else None
        self._next = 0.0
        self._began = time.monotonic()
        self._study = _Seen()
        self._noticed: str | None = None

    def __enter__(self) -> StudyDisplay:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        with _reader_may_be_gone():
            if self._live is not None:
                self._live.stop()

    def tell(self, line: str) -> None:
        with _reader_may_be_gone():
            self._print(_stamped(line, "yellow"))

    def abort(self, error: BaseException) -> None:
        """Ends this process, from any of its threads: its main one hangs where no exception reaches it."""
        try:
            if self._live is not None:
                with _reader_may_be_gone():
                    self._live.stop()
            self._last_words(error)
        finally:
            os._exit(exit_code(error))

    def show(self, view: StudyView) -> None:
        now = time.monotonic()
        if now >= self._next:
            self._next = now + REFRESH_S
            with _reader_may_be_gone():
                self._show(view)

    def _show(self, view: StudyView) -> None:
        if _is_behind(self._console.file):
            return  # a terminal that stands still (Ctrl-S, a laptop asleep) is shown the latest when it goes on
        seen = self._study
        changed = seen.look(view)
        best = seen.leaders[0][1] if seen.leaders else None
        summary = self._summary(view, best)
        if self._live is not None:
            rows = max(8, self._console.height - 10)
            notice = [Text(view.notice, style="yellow")] if view.notice is not None else []
            self._live.update(Group(_live_table(view.objective, seen, rows), *notice, summary), refresh=True)
            return
        if view.notice != self._noticed:
            self._print(_stamped(view.notice or f"no longer: {self._noticed}", "yellow"))
            self._noticed = view.notice
        for trial in changed:
            if seen.is_news(trial):
                self._print(_stamped(_event(trial, view.objective, summary.plain if trial.ended_at else "")))

    def _print(self, line: Text) -> None:
        self._console.print(line, soft_wrap=True)

    def _summary(self, view: StudyView, best: BestTrial | None) -> Text:
        num_ended = self._study.num_ended
        parts = [f"{num_ended} of {view.budget_trials} trials ended"]
        if best is not None:
            parts.append(f"best {shown_value(best.value)} (trial {best.number}, epoch {best.epoch})")
        if view.baseline is not None and view.objective.metric == "eval_accuracy":
            parts.append(f"majority class {shown_value(view.baseline)}")
        here = num_ended - self._study.num_ended_before
        if here and num_ended < view.budget_trials:
            left_s = (time.monotonic() - self._began) / here * (view.budget_trials - num_ended)
            parts.append(f"about {_duration(left_s)} left")
        return Text(" | ".join(parts))


class _Seen:
    """What a display remembers of a study: enough to look at what has changed alone, and no trial for ever."""

    def __init__(self) -> None:
        self.num_trials = 0
        self.num_ended = 0
        self.num_ended_before = 0
        """At the first look."""
        self.leaders: list[tuple[float, BestTrial]] = []
        """The best of those that have ended, with what they are sorted by."""
        self.kept: dict[int, TrialStatus] = {}
        """Trials without an end, the leaders and the newest."""
        self._moment: Moment | None = None
        self._told: dict[int, tuple[str, int]] = {}
        """Trial without an end -> what was last told of it: state and number of reports."""

    def look(self, view: StudyView) -> list[TrialStatus]:
        """The trials that have changed since the last look; at the first one, those without an end."""
        is_first = self._moment is None
        changed, self._moment = view.changed(self._moment or ())
        self.num_trials = len(self._moment)
        ended = [trial for trial in changed if trial.ended_at is not None]
        self.num_ended += len(ended)
        if is_first:
            self.num_ended_before = self.num_ended
        sign = -1.0 if view.objective.mode == "max" else 1.0
        found = [(sign * best.value, best) for best in ranked(ended, view.objective)[:NUM_BEST]]
        self.leaders = sorted([*self.leaders, *found], key=lambda each: (each[0], each[1].number))[:NUM_BEST]
        self._keep(changed)
        return [trial for trial in changed if trial.ended_at is None or not is_first]

    def is_news(self, trial: TrialStatus) -> bool:
        """Whether there is something to tell of a trial that has changed. It counts as told then."""
        news = (trial.state, len(trial.reports))
        before = self._told.pop(trial.number, ("waiting", 0))
        if trial.ended_at is None:
            self._told[trial.number] = news
        return news != before

    def _keep(self, changed: list[TrialStatus]) -> None:
        leaders = {best.number for _, best in self.leaders}
        for trial in changed:
            self.kept[trial.number] = trial
        oldest = self.num_trials - NUM_NEWEST
        for number, trial in list(self.kept.items()):
            if number < oldest and number not in leaders and trial.ended_at is not None:
                del self.kept[number]


@contextmanager
def _reader_may_be_gone() -> Iterator[None]:
    """A pipe or a terminal that is closed ends no study. Rich answers the first with SystemExit."""
    with suppress(OSError, SystemExit):
        yield


def _stamped(line: str, style: str = "") -> Text:
    return Text(f"{datetime.now(UTC):%H:%M:%S} {line}", style=style)


def _is_behind(stream: IO[str]) -> bool:
    """Whether a reader has not taken all yet that was shown."""
    return isinstance(stream, PatientStream) and not stream.is_idle


def _live(console: Console) -> Live:
    """A table that stays in place. It leaves the process's own output alone: that goes to the study's log."""
    return Live(console=console, auto_refresh=False, transient=True, redirect_stdout=False, redirect_stderr=False)


def study_table(status: StudyStatus, max_rows: int | None = None) -> Table:
    """The trials of a study, for `status` and at the end of `run`: the best first when there is not room for all."""
    trials: list[TrialStatus] = list(status.trials)
    if max_rows is not None and len(trials) > max_rows:
        order = [best.number for best in ranked(trials, status.objective)]
        chosen = order[:max_rows] + [trial.number for trial in trials if trial.number not in order]
        trials = [trials[number] for number in sorted(chosen[:max_rows])]
    best = status.best.number if status.best else None
    return _table(status.objective, trials, best, len(status.trials) - len(trials))


def _live_table(objective: ObjectiveStatus, seen: _Seen, rows: int) -> Table:
    """What runs, the best, and the newest of the others, as far as there is room."""
    leaders = [best.number for _, best in seen.leaders]
    running = [trial.number for trial in seen.kept.values() if trial.state == "running"]
    newest = sorted(seen.kept, reverse=True)
    chosen = list(dict.fromkeys([*running, *leaders, *newest]))[:rows]
    shown = [seen.kept[number] for number in sorted(chosen)]
    return _table(objective, shown, leaders[0] if leaders else None, seen.num_trials - len(shown))


def _table(objective: ObjectiveStatus, trials: list[TrialStatus], best: int | None, hidden: int) -> Table:
    caption = f"and {counted(hidden, 'more trial')}" if hidden else None
    table = Table(box=None, pad_edge=False, header_style="bold", caption=caption, caption_justify="left")
    table.add_column("trial", justify="right", no_wrap=True)
    table.add_column("state", no_wrap=True)
    table.add_column("epoch", justify="right", no_wrap=True)
    table.add_column("last", justify="right", no_wrap=True)
    table.add_column(f"best\n{objective.metric}", justify="right", no_wrap=True)
    # These two give way where the terminal is narrow: a trial has one line, or the live table would not fit.
    table.add_column("params")
    table.add_column("reason", max_width=40)
    for trial in trials:
        last = trial.reports[-1] if trial.reports else None
        top = best_report(trial, objective)
        table.add_row(
            f"{'*' if trial.number == best else ''}{trial.number}",
            Text(trial.state, style=_STYLES.get(trial.state, "")),
            str(last.epoch) if last else "-",
            shown_value(objective_value(last, objective) if last else None),
            shown_value(objective_value(top, objective) if top else None),
            _cut(
                ", ".join(
                    f"{name.removeprefix('model.config.')}={_short(value)}" for name, value in trial.params.items()
                )
            ),
            _cut((trial.reason or "").partition("\n")[0]),
        )
    return table


def _cut(text: str) -> Text:
    """On one line, however narrow its column is."""
    return Text(text, no_wrap=True, overflow="ellipsis")


def best_line(status: StudyStatus) -> str:
    if status.best is None:
        return "no best trial: none has ended with a finite value and a whole checkpoint"
    best = status.best
    params = ", ".join(f"{name}={_short(value)}" for name, value in best.params.items())
    reason = status.trials[best.number].reason or ""
    later = f"; later it {reason}" if reason.startswith("diverged") else ""
    return (
        f"best trial {best.number}, epoch {best.epoch}: {status.objective.metric} {shown_value(best.value)} "
        f"with {params}{later}"
    )


def failure_lines(status: StudyStatus) -> list[str]:
    """Why trials failed, of which the table shows only the beginning: the commonest reasons, each by its first."""
    failed = [first_line(trial.reason or "-") for trial in status.trials if trial.state == "failed"]
    first = {alike(reason): reason for reason in reversed(failed)}
    commonest = Counter(map(alike, failed)).most_common(NUM_REASONS)
    return [f"{counted(count, 'trial')} failed: {first[kind]}" for kind, count in commonest]


def _event(trial: TrialStatus, objective: ObjectiveStatus, summary: str) -> str:
    top = best_report(trial, objective)
    best = objective_value(top, objective) if top else None
    last = objective_value(trial.reports[-1], objective) if trial.reports else None
    value = f", {objective.metric} {shown_value(last)}" if last is not None else ""
    if top is not None and best != last:
        value += f", best {shown_value(best)} (epoch {top.epoch})"
    reason = f": {trial.reason.partition(chr(10))[0]}" if trial.reason else ""
    epochs = f" after epoch {trial.reports[-1].epoch}" if trial.reports else ""
    return f"trial {trial.number} {trial.state}{epochs}{value}{reason}{' | ' if summary else ''}{summary}"


def _short(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
