"""The record of a study in a bucket: Optuna's journal in numbered segments, one put for each append.

    RECORD/GGGGGG-RRRR-TOKEN/SSSSSSSS.jsonl     generation of the driver, its roll, number of the segment
    RECORD/requests/TIME-TOKEN.jsonl            what others than the driver have to say; the driver takes it in

Read is the highest of the folders that have their segment 0, from there on without a gap. Segment 0 holds all that was
before. So a driver begins a folder of its own with its first write, and whatever an earlier one still writes into its
own is read by nobody. A driver with many segments begins another roll; what was before is deleted.
"""

from __future__ import annotations

import json
import secrets
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from optuna.storages.journal import BaseJournalBackend
from optuna.storages.journal._storage import JournalStorageReplayResult

from trainables.bucket import Bucket, Object, at_once
from trainables.errors import BucketError, Problem
from tune_service.bucket_lease import DELETED, BucketLease
from tune_service.errors import StorageError
from tune_service.journal import StudyJournal

REQUESTS = "requests"
LOOK_S = 1.0
"""A reader looks no more often; a driver looks for requests no more often than twice this."""
MANY_SEGMENTS = 200
MOST_SEGMENTS = 1000
TRIES = 5


class BucketJournal(StudyJournal):
    """One in a bucket."""

    def __init__(self, record: Bucket, lease: BucketLease | None = None, is_new: bool = False) -> None:
        self._segments = Segments(record, lease, is_new)
        super().__init__(self._segments)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Writes all that is appended in the block with its end, in one object; nothing when it does not end well."""
        with self._segments.held():
            yield

    def _sync_with_backend(self) -> None:
        if self._segments.look():
            self._replay_result = JournalStorageReplayResult(self._worker_id_prefix)
        super()._sync_with_backend()


class Segments(BaseJournalBackend):
    """Reads what there is, or, for the driver with its lease, what there was when it began and what it writes."""

    def __init__(self, record: Bucket, lease: BucketLease | None, is_new: bool) -> None:
        self._record, self._lease = record, lease
        self._folder: str | None = None
        """Which is read, or, once the driver has written, its own."""
        self._next = 0
        """Number of the next segment."""
        self._owns_folder = False
        self._is_held = is_new
        self._history: list[bytes] = []
        """The driver's: all that the next segment 0 holds."""
        self._tail_bytes = 0
        self._unread: list[dict[str, Any]] = []
        self._taken: set[str] = set()
        """Requests that are in what was read."""
        self._was_read, self._begins_anew = False, False
        self._next_look_s = -LOOK_S
        if lease is not None and not is_new:
            self._read(self._record.objects())

    # Optuna's interface

    def look(self) -> bool:
        """Looks for news, now and then. Whether all that was read before is to be forgotten."""
        if time.monotonic() >= self._next_look_s and not self._is_held:
            if self._lease is None:
                self._look()
                self._next_look_s = time.monotonic() + LOOK_S
            else:
                self._take_in_requests()
                self._next_look_s = time.monotonic() + 2 * LOOK_S
        begins, self._begins_anew = self._begins_anew, False
        return begins

    def read_logs(self, log_number_from: int) -> list[dict[str, Any]]:
        """What came since the last call; all, when `look` said so."""
        unread, self._unread = self._unread, []
        self._was_read = True
        return unread

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        data = _text(logs)
        if self._lease is None:
            name = f"{REQUESTS}/{time.time_ns():020d}-{secrets.token_hex(4)}.jsonl"
            self._record.put(name, data)
            self._taken.add(name)
        elif self._is_held:
            self._history.append(data)
        else:
            self._write(data)
        self._unread += _parsed(data)  # as a reader has it

    # The driver's part

    @contextmanager
    def held(self) -> Iterator[None]:
        yield
        self._begin_folder()
        self._is_held = False

    def _write(self, data: bytes) -> None:
        assert self._lease is not None
        self._lease.check()
        is_much = self._tail_bytes * 10 > sum(map(len, self._history))
        rolls = self._next >= MOST_SEGMENTS or (self._next >= MANY_SEGMENTS and is_much)
        before = self._history
        try:
            self._history = [*before, data]
            if rolls or not self._owns_folder:
                self._begin_folder()
            else:
                self._record.put(_segment(self._folder, self._next), data)
                self._next += 1
                self._tail_bytes += len(data)
        except BaseException:  # Ctrl-C too, at any line
            # Perhaps it is there all the same, or will be: so nothing more is written behind it.
            self._history, self._owns_folder = before, False
            raise

    def _begin_folder(self) -> None:
        assert self._lease is not None
        folder = f"{self._lease.generation:06d}-{next(self._lease.rolls):04d}-{self._lease.token}"
        whole = b"".join(self._history)
        self._record.put(_segment(folder, 0), whole)
        self._history = [whole]
        self._folder, self._owns_folder, self._next, self._tail_bytes = folder, True, 1, 0
        with suppress(BucketError):  # another time
            for name in self._record.folders():
                if name != REQUESTS and name < folder:
                    self._record.delete_all(name)

    def _take_in_requests(self) -> None:
        """Makes what others have written the driver's own. A kill in between takes it in twice, which is the same."""
        with suppress(BucketError):  # a write says that the store is away
            for name in sorted(self._record.at(REQUESTS).objects()):
                try:
                    request = _parsed(self._record.get(f"{REQUESTS}/{name}"))
                    if not all(isinstance(log, dict) and isinstance(log.get("op_code"), int) for log in request):
                        raise ValueError("no request")
                except ValueError as error:
                    print(f"left out {self._record.where}/{REQUESTS}/{name}: {error}", file=sys.stderr)
                    self._record.delete(f"{REQUESTS}/{name}")
                    continue
                self._write(_text(request))
                self._unread += request
                self._record.delete(f"{REQUESTS}/{name}")

    # The reader's part

    def _look(self) -> None:
        for _ in range(TRIES):
            try:
                self._read(self._record.objects())
                return
            except FileNotFoundError as error:  # a driver has begun another folder meanwhile, and deleted this one
                missing = error
                self._folder = None
        raise self._deleted() from missing

    def _deleted(self) -> StorageError:
        rule, found = "has a record that can be read", f"{self._record.where}: it was deleted meanwhile"
        expected = "a study that stays; `tune-service delete` goes on with a deletion that was cut off"
        return StorageError(Problem("STUDY", rule, found, expected))

    def _read(self, found: dict[str, Object]) -> None:
        if DELETED in found:
            raise self._deleted()
        # An empty one is of a writer that was interrupted between opening and writing it.
        firsts = (name for name, each in found.items() if name.endswith(_segment("", 0)) and each.num_bytes)
        folders = {name.partition("/")[0] for name in firsts} - {REQUESTS}
        if not folders:
            raise FileNotFoundError(f"{self._record.where} holds no record")
        newest = max(folders)
        if newest != self._folder:
            self._begins_anew = self._was_read
            self._folder, self._next = newest, 0
            self._unread, self._taken = [], set()
        names: list[str] = []
        while (name := _segment(newest, self._next + len(names))) in found:
            names.append(name)
        requests = sorted(name for name in found if name.startswith(f"{REQUESTS}/") and name not in self._taken)
        if self._lease is not None:
            requests = []  # they are taken in
        data, came = at_once(self._record.get, names), set[str]()
        if self._lease is not None:
            self._history = list(data)
        for request in requests:
            with suppress(FileNotFoundError):  # the driver has just taken it in
                data.append(self._record.get(request))
                came.add(request)
        self._unread += [log for each in data for log in _parsed(each)]
        self._next += len(names)
        self._taken |= came


def _segment(folder: str | None, number: int) -> str:
    return f"{folder}/{number:08d}.jsonl"


def _text(logs: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(log, separators=(",", ":")).encode() + b"\n" for log in logs)


def _parsed(data: bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in data.splitlines()]
