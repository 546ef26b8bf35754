"""Studies in a folder. The only file that joins their paths."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from trainables.bucket import is_url
from trainables.checkpoint import CheckpointStore
from trainables.errors import Problem
from tune_service.errors import OutputNotEmptyError, StorageError, StudyExistsError, StudyNotFoundError
from tune_service.lease import Lease, is_held, taken

if TYPE_CHECKING:
    from tune_service.journal import Journal


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

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = path.name
        self.journal = path / "record.journal"
        self.journal_lock = path / "record.lock"
        self.driver_lock = path / "driver.lock"
        self._driver_log = path / "driver.log"
        self.logs = path / "logs"
        self._shipped = path / "shipped"
        self.checkpoints = CheckpointStore(path / "checkpoints")
        self.where, self.record_where = str(path), str(self.journal)
        self.logs_where = str(self.logs)

    def open_journal(self, lease: Lease | None = None) -> Journal:
        from tune_service.journal import Journal

        return Journal(self.journal, self.journal_lock, lease)

    @contextmanager
    def new_journal(self, lease: Lease | None = None) -> Iterator[Journal]:
        """Written beside and renamed."""
        from tune_service.journal import Journal

        unfinished = self.journal.with_suffix(".new")
        yield Journal(unfinished, self.journal_lock)
        unfinished.replace(self.journal)

    def rank_logs(self, trial: int | None = None) -> list[FileLog]:
        paths = sorted(self.logs.glob("*.log" if trial is None else f"trial-{trial:05d}-*.log"))
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

    def abandon(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)

    def remove(self) -> int:
        num_bytes = sum(path.stat().st_size for path in self.path.rglob("*") if path.is_file())
        doomed = self.path.with_name(f".deleted-{self.path.name}")
        shutil.rmtree(doomed, ignore_errors=True)
        self.path.rename(doomed)  # out of sight first: the name is free again, whatever is left
        shutil.rmtree(doomed)
        return num_bytes


class Storage:
    """A folder of studies."""

    def __init__(self, root: Path) -> None:
        if is_url(str(root)):  # it would become a folder named `s3:`
            raise StorageError(Problem("--storage", "this is written into a folder", str(root), "--storage FOLDER"))
        self.root = root.absolute()
        self.where = str(self.root)
        self.exports = self.root

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
        place = self._place()
        if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK) or _read_only(place):
            raise StorageError(
                Problem("--storage", "is a folder that can be written", f"{place} cannot", "another --storage DIR")
            )

    @property
    def disk(self) -> Path:
        return self._place()

    def free_bytes(self) -> int:
        return shutil.disk_usage(self.disk).free

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


def check_out(out: Path) -> None:
    """OutputNotEmptyError unless `out` is a new or an empty folder."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise OutputNotEmptyError(
            Problem("--out", "is a new or an empty folder", f"{out} holds something", "a new name")
        )


def _read_only(place: Path) -> bool:
    return bool(os.statvfs(place).f_flag & os.ST_RDONLY)
