"""Where studies lie. The only file that joins their paths."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from trainables.checkpoint import CheckpointStore
from trainables.errors import Problem
from tune_service.errors import OutputNotEmptyError, StorageError, StudyExistsError, StudyNotFoundError
from tune_service.lease import Lease, is_held, taken

RECORDS = ("record.journal", "record.json")
"""A folder with one of these is a study: the record itself, or where it is."""


class StudyFolder:
    """The folder of one study, `STORAGE/NAME/`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = path.name
        self.journal, self.pointer = (path / name for name in RECORDS)
        """Where the record lies that is in a database; the study has no journal then."""
        self.journal_lock = path / "record.lock"
        self.driver_lock = path / "driver.lock"
        self.driver_log = path / "driver.log"
        self.logs = path / "logs"
        self.shipped = path / "shipped"
        """What a study of a cluster came with: the user's code and data."""
        self.checkpoints = CheckpointStore(path / "checkpoints")

    def rank_logs(self, trial: int | None = None) -> list[Path]:
        """What the ranks wrote, by trial and rank."""
        return sorted(self.logs.glob("*.log" if trial is None else f"trial-{trial:05d}-*.log"))

    def driver_is_alive(self) -> bool:
        """Whether some process drives the study; not one that is gone or has been silent for some time."""
        return is_held(self.driver_lock)

    def driving(self, tell: Callable[[str], None] = lambda line: None) -> AbstractContextManager[Lease]:
        """Makes this process the study's driver. StudyRunningError while another one is.

        `tell` hears of a silent driver that this one takes the place of.
        """
        return taken(self.driver_lock, self.journal_lock, tell)


class Storage:
    """A folder of studies."""

    def __init__(self, root: Path) -> None:
        if re.search(r"(?:^|/)[a-z0-9]+:/", str(root)):  # it would become a folder named `s3:`
            rule = "a storage is a folder: object stores are not supported yet"
            raise StorageError(
                Problem("--storage", rule, str(root), "a folder of this machine, or of a cluster's head")
            )
        self.root = root.absolute()

    def studies(self) -> list[StudyFolder]:
        """All studies, by name."""
        found = {path.parent for name in RECORDS for path in self.root.glob(f"*/{name}")}
        return [StudyFolder(path) for path in sorted(found) if not path.name.startswith(".")]

    def study(self, name: str) -> StudyFolder:
        """An existing study. StudyNotFoundError otherwise."""
        # Among those that are there: a name such as `..` would lead to another folder.
        studies = {study.name: study for study in self.studies()}
        if name not in studies:
            known = ", ".join(studies) or "no study yet"
            raise StudyNotFoundError(
                Problem("STUDY", f"is a study of the storage {self.root}", repr(name), f"one of: {known}")
            )
        return studies[name]

    def check_free(self, name: str) -> StudyFolder:
        """The folder for a new study, nothing written yet. StudyExistsError when the name is taken."""
        folder = StudyFolder(self.root / name)
        if folder.path.exists():
            raise StudyExistsError(
                Problem(
                    "name",
                    "is not taken in the storage",
                    f"{folder.path} exists",
                    f"another name (--name), or `tune-service resume {name}`",
                )
            )
        return folder

    def check_writable(self) -> None:
        """StorageError unless a folder can be made here; makes none."""
        place = self._place()
        if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK) or _read_only(place):
            raise StorageError(
                Problem("--storage", "is a folder that can be written", f"{place} cannot", "another --storage DIR")
            )

    def free_bytes(self) -> int:
        return shutil.disk_usage(self._place()).free

    def _place(self) -> Path:
        """The root, or where it would be made."""
        place = self.root
        while not place.exists():
            place = place.parent
        return place

    def create(self, name: str) -> StudyFolder:
        folder = self.check_free(name)
        try:
            folder.path.mkdir(parents=True)
        except OSError as error:
            raise StorageError(
                Problem("--storage", "is a folder that can be written", str(error), "another --storage DIR")
            ) from error
        return folder


def remove(folder: StudyFolder) -> int:
    """Removes a study whole. Returns its size in bytes."""
    num_bytes = sum(path.stat().st_size for path in folder.path.rglob("*") if path.is_file())
    doomed = folder.path.with_name(f".deleted-{folder.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    folder.path.rename(doomed)  # out of sight first: the name is free again, whatever is left
    shutil.rmtree(doomed)
    return num_bytes


def check_out(out: Path) -> None:
    """OutputNotEmptyError unless `out` is a new or an empty folder."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise OutputNotEmptyError(
            Problem("--out", "is a new or an empty folder", f"{out} holds something", "a new name")
        )


def _read_only(place: Path) -> bool:
    return bool(os.statvfs(place).f_flag & os.ST_RDONLY)
