"""The journal of a record, and its file: Optuna's, with a lock that dies with its process, a report in one append."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.storages.journal._storage import JournalOperation
from optuna.study import StudyDirection

from tune_service.lease import Lease, locked


class StudyJournal(JournalStorage):
    """Optuna's journal storage. What it writes, every tool of Optuna's reads."""

    def update_trial(
        self, trial_id: int, attrs: Mapping[str, Any], intermediate_values: Mapping[int, float] | None = None
    ) -> None:
        """Sets attributes and intermediate values of a trial with one wait for the disk, where Optuna has one for each.

        They are in the file in this order: values, then attributes in theirs. A kill may leave the first of them alone.
        """
        value, attr = JournalOperation.SET_TRIAL_INTERMEDIATE_VALUE, JournalOperation.SET_TRIAL_USER_ATTR
        logs: list[dict[str, Any]] = [
            {"op_code": value, "step": step, "intermediate_value": each}
            for step, each in (intermediate_values or {}).items()
        ]
        logs += [{"op_code": attr, "user_attr": {name: each}} for name, each in attrs.items()]
        with self._thread_lock:
            common = {"worker_id": self._replay_result.worker_id, "trial_id": trial_id}
            self._backend.append_logs([log | common for log in logs])
            self._sync_with_backend()


def begin_study(journal: StudyJournal, name: str, direction: StudyDirection, attrs: Mapping[str, Any]) -> None:
    """Makes a study without trials."""
    study = optuna.create_study(storage=journal, study_name=name, direction=direction)
    for key, value in attrs.items():
        study.set_user_attr(key, value)


class Journal(StudyJournal):
    """One in a file."""

    def __init__(self, file: Path, lock: Path, lease: Lease | None = None) -> None:
        super().__init__(JournalFileBackend(str(file), _KernelLock(lock, file, lease)))


class _KernelLock(JournalFileOpenLock):
    """A lock that the kernel releases when its holder is killed; Optuna's own then cost the next opener 30 s.

    Whoever takes it cuts off a last line that a killed writer left unfinished: what is appended to that is unreadable.
    A driver's is refused once its lease is lost.
    """

    def __init__(self, path: Path, journal: Path, lease: Lease | None) -> None:
        super().__init__(str(path))
        self._path = path
        self._journal = journal
        self._lease = lease
        self._held = ExitStack()

    def acquire(self) -> bool:
        with ExitStack() as held:
            held.enter_context(locked(self._path))
            if self._lease is not None:
                self._lease.check()
            _trim(self._journal)
            self._held = held.pop_all()
        return True

    def release(self) -> None:
        self._held.close()


def _trim(journal: Path) -> None:
    """Cuts the journal back to its last whole line."""
    with journal.open("r+b") as file:
        size = file.seek(0, os.SEEK_END)
        if size == 0:
            return
        file.seek(size - 1)
        if file.read(1) == b"\n":
            return
        file.seek(0)
        whole = file.read().rfind(b"\n") + 1
        print(f"{journal}: cut off {size - whole} bytes of an unfinished line", file=sys.stderr)
        file.truncate(whole)
