"""The studies of a storage, as every command but `run` sees them. `remote.py` has the same for those of a cluster."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from trainables.errors import Problem, UserError
from trainables.log_names import trial_of
from tune_service.errors import RecordUnavailableError, StorageError
from tune_service.home import StudyHome, StudyStorage
from tune_service.status import BestTrial, Display, StudyState, StudyStatus, StudyView


@dataclass(frozen=True)
class StudyRow:
    """One study in a list."""

    study: str
    state: StudyState
    trials: int
    best: BestTrial | None
    metric: str

    def to_json(self) -> dict[str, Any]:
        best = self.best.model_dump(mode="json") if self.best else None
        return {"study": self.study, "state": self.state, "trials": self.trials, "best": best}


@dataclass(frozen=True)
class LogPiece:
    """Lines of a rank's log."""

    file: str
    lines: tuple[str, ...]
    end: int
    """Where the next piece begins, in bytes."""


class Studies(Protocol):
    """What can be asked and told of studies, wherever they are."""

    def list(self) -> Iterator[StudyRow]: ...

    def status(self, name: str) -> StudyStatus: ...

    def views(self, name: str) -> Iterator[StudyView]:
        """The study as it goes on, until it ends. The last view is of after its end."""

    def logs(self, name: str, trial: int | None) -> Iterator[LogPiece]:
        """What the ranks wrote, and write, until the study ends."""

    def stop(self, name: str, now: bool) -> StudyStatus:
        """Ends the trials and waits until they have ended."""

    def where(self, name: str) -> str:
        """Where the study lies, for a question."""

    def delete(self, name: str) -> int:
        """Returns the study's size in bytes."""

    def best(self, name: str, out: Path) -> BestTrial: ...

    def resume(self, name: str, trials: str | None, display: Display) -> StudyStatus: ...


class LocalStudies:
    """Those of a storage. What is heavy is imported by the question that needs it."""

    def __init__(self, storage: StudyStorage) -> None:
        self._storage = storage

    def list(self) -> Iterator[StudyRow]:
        from tune_service.record import Record

        for folder in self._storage.studies():
            try:
                found = Record.open(folder).status()
            except (StorageError, RecordUnavailableError) as error:  # one broken record hides no other study
                print(f"left out {error}", file=sys.stderr)
                continue
            yield StudyRow(found.study, found.state, len(found.trials), found.best, found.objective.metric)

    def status(self, name: str) -> StudyStatus:
        from tune_service.record import Record

        return Record.open(self._storage.study(name)).status(deep=True)

    def views(self, name: str) -> Iterator[StudyView]:
        from tune_service.record import Record

        record = Record.open(self._storage.study(name))
        while record.folder.driver_is_alive():
            yield record
            time.sleep(record.folder.poll_s)
        yield record

    def ended(self, name: str) -> Sequence[int]:
        """The trials that have ended."""
        from tune_service.record import Record

        trials, _ = Record.open(self._storage.study(name)).changed(())
        return [trial.number for trial in trials if trial.ended_at is not None]

    def logs(
        self,
        name: str,
        trial: int | None,
        since: Mapping[str, int] | None = None,
        done: Sequence[Sequence[int]] = (),
    ) -> Iterator[LogPiece]:
        """With `since`, file by file from that byte on; without the trials in the ranges `done`."""
        folder = self._storage.study(name)
        if trial is not None and not folder.rank_logs(trial):
            _check_trial(folder, trial)
        shown = dict(since or {})
        while True:
            alive = folder.driver_is_alive()
            for path in folder.rank_logs(trial):
                if done and is_in(done, trial_of(path.name)):
                    continue
                begin = shown.get(path.name, 0)
                text = path.read(begin)
                if alive:  # the last line may not be whole yet
                    text = text[: text.rfind(b"\n") + 1]
                if text:
                    shown[path.name] = begin + len(text)
                    lines = tuple(text.decode(errors="replace").splitlines())
                    yield LogPiece(path.name, lines, shown[path.name])
            if not alive:
                return
            time.sleep(folder.poll_s)

    def stop(self, name: str, now: bool) -> StudyStatus:
        from tune_service.study import stop_study

        return stop_study(name, now, self._storage)

    def where(self, name: str) -> str:
        return self._storage.study(name).where

    def delete(self, name: str) -> int:
        from tune_service.study import delete_study

        return delete_study(name, self._storage)

    def best(self, name: str, out: Path) -> BestTrial:
        from tune_service.best import export_best

        return export_best(name, out, self._storage)

    def resume(self, name: str, trials: str | None, display: Display) -> StudyStatus:
        from tune_service.study import resume_study

        return resume_study(name, trials, self._storage, display)


def _check_trial(folder: StudyHome, trial: int) -> None:
    """UserError unless the study has this trial, or may get it while it runs."""
    from tune_service.record import Record

    record = Record.open(folder)
    number = record.budget_trials if folder.driver_is_alive() else len(record.trials())
    if not 0 <= trial < number:
        expected = f"0 to {number - 1}" if number else "a study that has begun"
        raise UserError(Problem("--trial", f"is a trial of {folder.name}", str(trial), expected))


def to_ranges(numbers: Iterable[int]) -> list[list[int]]:
    """[first, last] of each run of numbers that follow one another: short however many there are."""
    ranges: list[list[int]] = []
    for number in sorted(numbers):
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return ranges


def is_in(ranges: Sequence[Sequence[int]], number: int) -> bool:
    return any(first <= number <= last for first, last in ranges)
