"""Studies in a folder. The only file that joins their paths."""

from __future__ import annotations

import os
import secrets
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainables.bucket import is_url
from trainables.checkpoint import CheckpointStore
from trainables.errors import Problem, UserError
from trainables.log_names import prefix_of
from tune_service.errors import (
    RecordUnavailableError,
    StorageError,
    StudyExistsError,
    StudyNotFoundError,
)
from tune_service.home import STUDY_NAME
from tune_service.lease import Lease, is_held, left_behind, taken

if TYPE_CHECKING:
    from optuna.study import StudyDirection

    from tune_service.home import RecordStorage

RECORDS = ("record.journal", "record.json")
"""A folder with one of these is a study: the record itself, or where it is."""

_DOOMED = ".deleted-"
_HALF_MADE = {"driver.lock", "record.lock", "record.new", "shipped"}
"""All that there may be of a study before its record."""


@dataclass(frozen=True)
class FileLog:
    """A rank's log."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    def read(self, begin: int) -> bytes:
        with self.path.open("rb") as file:
            file.seek(begin)
            return file.read()


class StudyFolder:
    """The folder of one study, `STORAGE/NAME/`."""

    poll_s = 0.5

    def __init__(self, path: Path, name: str | None = None) -> None:
        self.path = path
        self.name = path.name if name is None else name
        self.journal, self.pointer = (path / name for name in RECORDS)
        """Where the record lies that is in a database; the study has no journal then."""
        self.journal_lock = path / "record.lock"
        self.driver_lock = path / "driver.lock"
        self._driver_log = path / "driver.log"
        self.logs = path / "logs"
        self._shipped = path / "shipped"
        self.checkpoints = CheckpointStore(path / "checkpoints")
        self.where = str(path)
        self.logs_where = str(self.logs)

    def is_doomed(self) -> bool:
        """Whether its deletion has begun: it lies out of sight."""
        return self.path.name != self.name

    def open_record(self, lease: Lease | None = None) -> tuple[RecordStorage, str]:
        if self.is_doomed():
            expected = f"`tune-service delete {self.name}`, which goes on with that"
            raise StorageError(Problem(self.name, "is a study that is there whole", "it is being deleted", expected))
        if not self.pointer.exists():
            from tune_service.journal import Journal

            return Journal(self.journal, self.journal_lock, lease), self.name
        from tune_service.postgres import Database  # SQLAlchemy loads only where it is needed

        database = Database(self.pointer, lease)
        return database, database.study_name

    def create_record(self, direction: StudyDirection, attrs: Mapping[str, Any], lease: Lease | None = None) -> None:
        """A journal is written beside and renamed."""
        url = attrs["spec"].get("record")
        if url is not None:
            from tune_service.database import create_record

            create_record(url, self.pointer, direction, attrs)
            return
        from tune_service.journal import Journal, begin_study

        unfinished = self.journal.with_suffix(".new")
        begin_study(Journal(unfinished, self.journal_lock), self.name, direction, attrs)
        unfinished.replace(self.journal)

    @property
    def record_where(self) -> str:
        return str(self.pointer if self.pointer.exists() else self.journal)

    def rank_logs(self, trial: int | None = None) -> list[FileLog]:
        paths = sorted(self.logs.glob(f"{prefix_of(trial)}*.log"))
        return [FileLog(path) for path in paths]

    def driver_is_alive(self) -> bool:
        return is_held(self.driver_lock)

    def driving(self, tell: Callable[[str], None] = lambda line: None) -> AbstractContextManager[Lease]:
        return taken(self.driver_lock, self.journal_lock, tell)

    def driver_log(self) -> AbstractContextManager[Path]:
        return nullcontext(self._driver_log)

    def keep_shipped(self, folder: Path) -> Path:
        shutil.copytree(folder, self._shipped)
        return self._shipped

    def shipped(self) -> Path | None:
        return self._shipped if self._shipped.is_dir() else None

    def origins(self, shipped: Path) -> Mapping[str, str]:
        from tune_service.parcel import origins

        return origins(self._shipped)

    def is_half_made(self) -> bool:
        """Whether a process was killed while it made this study: there is nothing but its beginning."""
        try:
            is_begun = not self.path.is_symlink() and self._holds_a_beginning()
            return is_begun and self.driver_lock.stat().st_size > 0 and not self.driver_is_alive()
        except OSError:  # no folder, or another process makes the study anew at this moment
            return False

    def _holds_a_beginning(self) -> bool:
        return {path.name for path in self.path.iterdir()} <= _HALF_MADE

    def give_way(self) -> bool:
        """Makes a half-made study's name free. False: it is another one's now, who makes a study of that name."""
        doomed = _doomed_place(self.path)
        with left_behind(self.driver_lock) as is_left:
            if not (is_left and self._holds_a_beginning()):
                return False
            self.path.rename(doomed)
            with suppress(OSError):
                _removed(doomed)
        return True

    def abandon(self) -> None:
        with suppress(RecordUnavailableError, StorageError):
            self.erase_record()
        shutil.rmtree(self.path, ignore_errors=True)

    def erase_record(self) -> None:
        """Removes what of it lies outside of this folder. RecordUnavailableError."""
        if self.pointer.exists():
            from tune_service.database import erase

            erase(self.pointer)

    def remove(self) -> int:
        if self.is_doomed():
            return _removed(self.path)
        if self.path.is_symlink():
            target = self.path.resolve()
            expected = f"`tune-service delete {target.name} --storage {target.parent}`, then `rm {self.path}`"
            raise StorageError(Problem(self.name, "is a folder where it is deleted", f"a link to {target}", expected))
        self.erase_record()
        doomed = _doomed_place(self.path)
        self.path.rename(doomed)  # out of sight first: the name is free again, whatever is left
        return _removed(doomed)


class Storage:
    """A folder of studies."""

    def __init__(self, root: Path) -> None:
        if is_url(str(root)):  # it would become a folder named `s3:`
            raise StorageError(Problem("--storage", "this is written into a folder", str(root), "--storage FOLDER"))
        self.root = expanded(root, "--storage").absolute()
        self.where = str(self.root)
        self.exports = self.root

    def studies(self) -> list[StudyFolder]:
        """All studies, by name. StorageError where the storage is no folder."""
        if self.root.exists() and not self.root.is_dir():
            raise StorageError(Problem("--storage", "is a folder", f"{self.root} is a file", "--storage FOLDER"))
        found = {path.parent for name in RECORDS for path in self.root.glob(f"*/{name}")}
        return [StudyFolder(path) for path in sorted(found) if not path.name.startswith(".")]

    def study(self, name: str) -> StudyFolder:
        """An existing study. StudyNotFoundError otherwise."""
        # Among those that are there: a name such as `..` would lead to another folder.
        studies = {study.name: study for study in self.studies()}
        if name not in studies and (doomed := self._doomed(name)):
            return doomed[0]
        if name not in studies:
            raise StudyNotFoundError.among(name, self.root, studies)
        return studies[name]

    def check_free(self, name: str) -> StudyFolder:
        """The folder for a new study, nothing written yet. StudyExistsError when the name is taken."""
        folder = StudyFolder(self.root / name)
        if folder.path.exists() and not folder.is_half_made():
            is_study = any((folder.path / record).exists() for record in RECORDS)
            raise StudyExistsError.of(name, folder.path, is_study)
        return folder

    def check_writable(self) -> None:
        """StorageError unless a folder can be made here; makes none."""
        place = self._place()
        found = None
        if not _is_utf_8(self.root):
            found = f"{os.fsencode(self.root).decode(errors='backslashreplace')} is not UTF-8"
        elif not place.is_dir():
            found = f"{place} is a file"
        elif _read_only(place):
            found = f"{place} is on a disk that is read-only"
        elif not os.access(place, os.W_OK | os.X_OK):
            found = f"this user may not write in {place}"
        if found is not None:
            raise StorageError(Problem("--storage", "is a folder that can be written", found, "another --storage"))

    @property
    def disk(self) -> Path:
        return self._place()

    def check_record(self, url: str) -> None:
        """They may."""

    def free_bytes(self) -> int:
        return shutil.disk_usage(self.disk).free

    def speeds(self, num_bytes: int) -> tuple[float, float]:
        path, data = self._place() / f".check-{os.getpid()}", os.urandom(num_bytes)
        try:
            started = time.monotonic()
            with path.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
                written_s = time.monotonic() - started
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # else it is read from memory
            started = time.monotonic()
            if path.read_bytes() != data:
                raise OSError("it gave back another content")
            return num_bytes / written_s, num_bytes / (time.monotonic() - started)
        finally:
            path.unlink(missing_ok=True)

    def _place(self) -> Path:
        """The root, or where it would be made."""
        place = self.root
        while not os.path.exists(place):  # noqa: PTH110  (no error where this user may not look)
            place = place.parent
        return place

    def _doomed(self, name: str) -> list[StudyFolder]:
        """What killed deleters have left of studies of this name."""
        places = sorted(self.root.glob(f"{_DOOMED}{name}~*")) if STUDY_NAME.fullmatch(name) else []
        # What a link leads to may be anybody's.
        return [StudyFolder(place, name) for place in places if place.is_dir() and not place.is_symlink()]

    def create(self, name: str) -> StudyFolder:
        folder = self.check_free(name)
        for doomed in self._doomed(name):
            # What cannot be removed, or is just being, is in nobody's way.
            with suppress(UserError, OSError), doomed.driving() as lease, lease.beating(lambda why: None):
                doomed.remove()
        try:
            if folder.path.exists() and not folder.give_way():
                raise StudyExistsError.of(name, folder.path, is_study=True)
            folder.path.mkdir(parents=True)
        except OSError as error:
            self.check_free(name)  # another process may have made it at this moment
            raise StorageError(
                Problem("--storage", "is a folder that can be written", str(error), "another --storage")
            ) from error
        return folder


def _doomed_place(path: Path) -> Path:
    """Where a study's folder lies while it is deleted, out of sight; no study's name has a ~."""
    return path.with_name(f"{_DOOMED}{path.name}~{secrets.token_hex(4)}")


def _removed(folder: Path) -> int:
    """Removes a study that is out of sight. Returns its size in bytes."""
    elsewhere = CheckpointStore(folder / "checkpoints").elsewhere()
    files = (path for place in (folder, *elsewhere) for path in place.rglob("*") if path.is_file())
    num_bytes = sum(path.stat().st_size for path in files)
    large = [path for path in folder.iterdir() if path.is_dir() and not path.is_symlink()]
    for place in (*elsewhere, *large, folder):  # the lock at the end: it keeps a second deleter out
        shutil.rmtree(place)
    return num_bytes


def expanded(path: Path, option: str) -> Path:
    """A path whose `~` is a home folder: a shell puts it only at the start of a word. UserError where there is none."""
    try:
        return path.expanduser()
    except RuntimeError as error:
        rule = "begins with ~ only where that is a home folder"
        raise UserError(Problem(option, rule, str(path), "a path without ~")) from error


def _is_utf_8(path: Path) -> bool:
    """Ray takes no other path."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def _read_only(place: Path) -> bool:
    return bool(os.statvfs(place).f_flag & os.ST_RDONLY)
