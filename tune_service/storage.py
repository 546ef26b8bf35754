"""Where studies lie. The only file that joins their paths, and that knows how one driver keeps another out."""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trainables.checkpoint import CheckpointStore
from trainables.errors import Problem
from tune_service.errors import StorageError, StudyExistsError, StudyNotFoundError, StudyRunningError


class StudyFolder:
    """The folder of one study, `STORAGE/NAME/`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = path.name
        self.journal = path / "record.journal"
        self.journal_lock = path / "record.lock"
        self.driver_lock = path / "driver.lock"
        self.driver_log = path / "driver.log"
        self.logs = path / "logs"
        self.checkpoints = CheckpointStore(path / "checkpoints")

    def rank_logs(self, trial: int | None = None) -> list[Path]:
        """What the ranks wrote, by trial and rank."""
        return sorted(self.logs.glob("*.log" if trial is None else f"trial-{trial:05d}-*.log"))

    def driver_is_alive(self) -> bool:
        """Whether some process holds the study. The kernel lets go of the lock when that process is gone."""
        try:
            with self.driver_lock.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except BlockingIOError:
            return True
        return False

    @contextmanager
    def driving(self) -> Iterator[None]:
        """Makes this process the study's driver. StudyRunningError while another one is."""
        descriptor = os.open(self.driver_lock, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if not _lock(descriptor, patience_s=1.0):
                holder = os.pread(descriptor, 100, 0).decode(errors="replace").strip()
                raise StudyRunningError(
                    Problem(self.name, "a study has one driver", f"process {holder} runs it", "wait for it, or stop it")
                )
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()} on {os.uname().nodename}\n".encode(), 0)
            yield
        finally:
            os.close(descriptor)


class Storage:
    """A folder of studies."""

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()

    def studies(self) -> list[StudyFolder]:
        """All studies, by name."""
        found = (path.parent for path in sorted(self.root.glob("*/record.journal")))
        return [StudyFolder(path) for path in found if not path.name.startswith(".")]

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
        place = self.root
        while not place.exists():
            place = place.parent
        if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK) or _read_only(place):
            raise StorageError(
                Problem("--storage", "is a folder that can be written", f"{place} cannot", "another --storage DIR")
            )

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


def _lock(descriptor: int, patience_s: float) -> bool:
    """Takes the exclusive lock. Patient, since `status` holds a shared one for a moment to look."""
    end = time.monotonic() + patience_s
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > end:
                return False
            time.sleep(0.05)
        else:
            return True


def _read_only(place: Path) -> bool:
    return bool(os.statvfs(place).f_flag & os.ST_RDONLY)
