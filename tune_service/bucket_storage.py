"""Studies in an object store, `s3://BUCKET/FOLDER` or `gs://BUCKET/FOLDER`. The only file that joins their names."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainables.bucket import Bucket, at_once, get_tree, put_tree
from trainables.bucket_checkpoints import BucketCheckpoints
from trainables.errors import Problem
from trainables.far import own_files, scratch_place
from trainables.log_names import prefix_of
from trainables.stores import generation_of
from tune_service.bucket_lease import DELETED, BucketLease, is_held, taken
from tune_service.errors import LeaseLostError, StorageError, StudyExistsError, StudyNotFoundError
from tune_service.home import STUDY_NAME
from tune_service.lease import Lease

if TYPE_CHECKING:
    from optuna.study import StudyDirection

    from tune_service.bucket_journal import BucketJournal

ALIVE_S = 1.0
"""For so long it is remembered whether a driver lives."""


@dataclass(frozen=True)
class BucketLog:
    """A rank's log, as it was put there last."""

    name: str
    num_bytes: int
    bucket: Bucket

    def read(self, begin: int) -> bytes:
        try:
            return self.bucket.get(self.name, begin) if begin < self.num_bytes else b""
        except FileNotFoundError as error:
            rule = "is there while it is read"
            raise StorageError(
                Problem(f"{self.bucket.where}/{self.name}", rule, "it was deleted meanwhile", "a study that stays")
            ) from error


class StudyBucket:
    """One study, `STORAGE/NAME/`."""

    poll_s = 2.0

    def __init__(self, bucket: Bucket, name: str) -> None:
        self.name = name
        self._bucket = bucket
        self._record, self._claims = bucket.at("record"), bucket.at("lease")
        self._logs, self._shipped = bucket.at("logs"), bucket.at("shipped")
        self._lease: BucketLease | None = None
        self._is_new = False
        """This process has made it, or was about to."""
        self._was_alive, self._asked_s = False, -ALIVE_S

    @property
    def where(self) -> str:
        return self._bucket.where

    @property
    def record_where(self) -> str:
        return self._record.where

    @property
    def logs_where(self) -> str:
        return self._logs.url

    @cached_property
    def checkpoints(self) -> BucketCheckpoints:
        return BucketCheckpoints(self._bucket.at("checkpoints"))

    def open_record(self, lease: Lease | None = None) -> tuple[BucketJournal, str]:
        from tune_service.bucket_journal import BucketJournal

        assert lease is None or isinstance(lease, BucketLease), "it is this study's own"
        return BucketJournal(self._record, lease), self.name

    def create_record(self, direction: StudyDirection, attrs: Mapping[str, Any], lease: Lease | None = None) -> None:
        from tune_service.bucket_journal import BucketJournal
        from tune_service.journal import begin_study

        assert isinstance(lease, BucketLease), "a bucket has no other way to tell two writers apart"
        if self.exists():
            raise _taken(self)
        self._is_new = True
        for leftovers in ("checkpoints", "logs"):  # of a supervisor that a deleted study had lost
            self._bucket.delete_all(leftovers)
        journal = BucketJournal(self._record, lease, is_new=True)
        with journal.held():
            begin_study(journal, self.name, direction, attrs)

    def exists(self) -> bool:
        """Whether there is a record, the beginning of one, or one that is being deleted."""
        return bool(self._record.names())

    def is_listed(self) -> bool:
        """Whether it exists and is not being deleted."""
        names = self._record.names()
        return bool(names) and DELETED not in names

    def is_doomed(self) -> bool:
        """Whether its deletion has begun."""
        return DELETED in self._record.names()

    def driver_is_alive(self) -> bool:
        if self._lease is not None:
            return True
        now = time.monotonic()
        if now - self._asked_s >= ALIVE_S:
            self._was_alive, self._asked_s = is_held(self._claims), now
        return self._was_alive

    @contextmanager
    def driving(self, tell: Callable[[str], None] = lambda line: None) -> Iterator[BucketLease]:
        least = max(map(generation_of, self._record.folders()), default=0)
        with taken(self.name, self._claims, least, tell) as lease:
            self._lease = lease
            try:
                yield lease
            finally:
                self._lease = None
                self._asked_s = -ALIVE_S

    @contextmanager
    def driver_log(self) -> Iterator[Path]:
        """One for each driver, put away at its end: a killed one's is lost."""
        path = own_files.folder("driver") / "driver.log"
        path.unlink(missing_ok=True)
        try:
            yield path
        finally:
            with suppress(OSError):
                if self._lease is not None and not self._lease.lost:
                    self._bucket.put_file(f"driver-{self._lease.generation:06d}.log", path)
            own_files.remove()

    def rank_logs(self, trial: int | None = None) -> Sequence[BucketLog]:
        prefix = prefix_of(trial)
        found = self._logs.objects()
        names = sorted(name for name in found if name.startswith(prefix) and name.endswith(".log") and "/" not in name)
        return [BucketLog(name, found[name].num_bytes, self._logs) for name in names]

    def keep_shipped(self, folder: Path) -> Path:
        if self.exists():  # it was made since somebody looked whether the name is free
            raise _taken(self)
        names = [str(path.relative_to(folder)) for path in sorted(folder.rglob("*")) if path.is_file()]
        self._shipped.delete_all()
        put_tree(self._shipped, folder, names)
        copy = self.shipped()
        assert copy is not None, "a study comes with its spec at least"
        return copy

    def shipped(self) -> Path | None:
        names = list(self._shipped.objects())
        copy = own_files.emptied("shipped")
        if any({"", ".", ".."} & set(name.split("/")) for name in names):  # of a stranger's study
            found = f"{self._shipped.where} names a file outside"
            raise StorageError(Problem(self.name, "what it came with lies in its folder", found, "a whole study"))
        get_tree(self._shipped, names, copy)
        return copy if names else None

    def origins(self, shipped: Path) -> Mapping[str, str]:
        from tune_service.parcel import origins

        copy = self.shipped()
        found = origins(copy) if copy is not None else {}
        return {str(shipped / Path(there).relative_to(str(copy))): here for there, here in found.items()}

    def abandon(self) -> None:
        with suppress(OSError, LeaseLostError):
            if self._lease is not None and not self._lease.lost and (self._is_new or not self.exists()):
                self.remove()

    def remove(self) -> int:
        """Out of sight first, the record last: what a kill leaves is found, and removed by the same call again."""
        lease = self._lease
        assert lease is not None, "nobody else begins a study of this name meanwhile"
        lease.check()
        num_bytes = sum(found.num_bytes for found in self._bucket.objects().values())
        self._record.put(DELETED, b"")

        def delete(folder: Bucket) -> None:
            lease.sign_of_life()
            lease.check()
            folder.delete_all()

        places = [self._bucket.at(name) for name in self._bucket.folders() if name not in ("record", "lease")]
        at_once(delete, [place.at(name) for place in places for name in place.folders()])
        at_once(delete, places)
        at_once(delete, [self._record.at(name) for name in self._record.folders()])
        lease.check()
        self._record.delete_all()
        lease.give_up()
        self._bucket.delete_all()
        return num_bytes


class BucketStorage:
    """The studies in one folder of a bucket."""

    def __init__(self, bucket: Bucket) -> None:
        self._bucket = bucket
        self.where = bucket.where
        self.disk = scratch_place()
        self.exports = Path(tempfile.gettempdir())

    def check_record(self, url: str) -> None:
        rule = "a study in a bucket has its record there, too"
        raise StorageError(Problem("record", rule, url, "record: null, or --storage FOLDER"))

    def speeds(self, num_bytes: int) -> tuple[float, float]:
        name, data = f".check-{os.getpid()}-{secrets.token_hex(4)}", os.urandom(num_bytes)
        started = time.monotonic()
        try:
            self._bucket.put(name, data)
            written_s = time.monotonic() - started
            started = time.monotonic()
            if self._bucket.get(name) != data:
                raise OSError("it gave back another content")
            return num_bytes / written_s, num_bytes / (time.monotonic() - started)
        finally:
            self._bucket.delete(name)

    def free_bytes(self) -> int:
        return shutil.disk_usage(self.disk).free

    def studies(self) -> list[StudyBucket]:
        self._bucket.check()
        places = [self._study(name) for name in self._bucket.folders() if STUDY_NAME.fullmatch(name)]
        return [study for study in places if study.is_listed()]

    def study(self, name: str) -> StudyBucket:
        self._bucket.check()
        if STUDY_NAME.fullmatch(name) and (study := self._study(name)).exists():
            return study
        raise StudyNotFoundError.among(name, self.where, [study.name for study in self.studies()])

    def check_free(self, name: str) -> StudyBucket:
        self._bucket.check()
        study = self._study(name)
        if study.exists():
            raise _taken(study)
        return study

    def check_writable(self) -> None:
        self._bucket.check_writable()

    def create(self, name: str) -> StudyBucket:
        """Nothing is written for it: two that create one name find each other by their claims."""
        return self.check_free(name)

    def _study(self, name: str) -> StudyBucket:
        return StudyBucket(self._bucket.at(name), name)


def _taken(study: StudyBucket) -> StudyExistsError:
    if study.is_doomed():
        found = f"{study.where} is being deleted"
        expected = f"another name (--name), or `tune-service delete {study.name}`, which goes on with that"
        return StudyExistsError(Problem("name", "is not taken in the storage", found, expected))
    return StudyExistsError.of(study.name, study.where)
