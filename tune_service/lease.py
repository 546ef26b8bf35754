"""Who drives a study: one process at a time, by a lease that its death or its silence ends, and that fences it off.

The lease is a lock file. Its holder has the kernel's lock on it, which goes with the process, and touches it every
second. One that is silent (stopped, asleep, cut off) loses the lease to whoever puts a new file in its place, under
the journal's lock; every write looks under that lock whether the file is still its own. So whoever wakes up again
writes nothing more. Between machines the silence is told by the file's time: their clocks must agree to some seconds.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from trainables.errors import Problem
from trainables.stores import lease_holds
from tune_service.errors import LeaseLostError, RecordHeldError, StorageError, StudyRunningError
from tune_service.threads import beside

LOOK_PATIENCE_S = 1.0
"""`status` holds a driver's lock for a moment, to look."""
WRITE_PATIENCE_S = 30.0
"""A write of another process takes as long as its disk."""
BEAT_S = 1.0
SILENT_S = 15.0
"""Without a beat for so long, a holder may be gone; whoever wants to drive the study then may."""
STUCK_S = 60.0
"""Without a sign of the holder's main loop for so long, the beats end, and the holder is told."""
STARTING_S = 300.0
"""The same for the time before its first round: a cold start of Ray on a busy machine."""


SILENT = "this process was silent, and another one has taken the study over"


class Lease(ABC):
    """This process's hold on a study."""

    def __init__(self, study: str) -> None:
        self._study = study
        self._sign = time.monotonic()

    @property
    def beat_s(self) -> float:
        return BEAT_S

    @property
    @abstractmethod
    def identity(self) -> tuple[str, str]:
        """What `lease_holds` knows it by, in another process."""

    @property
    @abstractmethod
    def lost(self) -> bool: ...

    @abstractmethod
    def _found(self) -> str:
        """How it was lost."""

    @abstractmethod
    def _touch(self) -> None:
        """One beat."""

    @abstractmethod
    def close(self) -> None: ...

    def check(self) -> None:
        """LeaseLostError when another process has taken the study over."""
        if self.lost:
            expected = "one of the two; this one ends and writes nothing more"
            raise LeaseLostError(Problem(self._study, "a study has one driver", self._found(), expected))

    def sign_of_life(self) -> None:
        """The holder's main loop goes round: to be called several times a minute. LeaseLostError when it need not."""
        self._sign = time.monotonic()
        self.check()

    @contextmanager
    def beating(self, on_stuck: Callable[[str], None]) -> Iterator[None]:
        """Beats, in a thread, as long as there are signs of life. Without them calls `on_stuck` with what is wrong."""
        self._sign = time.monotonic() + STARTING_S - STUCK_S
        with beside(lambda end: self._beat(end, on_stuck), "lease"):
            yield

    def _beat(self, end: threading.Event, on_stuck: Callable[[str], None]) -> None:
        before, is_stuck = time.monotonic(), False
        while not end.wait(self.beat_s):
            now = time.monotonic()
            if now - before > 5 * self.beat_s:
                self._sign = now  # the whole process stood still: no word on its main loop
            before = now
            if now - self._sign <= STUCK_S:
                with suppress(OSError):  # a disk that is away for a moment
                    self._touch()
            elif not is_stuck:
                is_stuck = True
                on_stuck(f"the driver has been stuck for {STUCK_S:.0f} s")


class FileLease(Lease):
    """A lock file that ends with this one's token."""

    def __init__(self, path: Path, descriptor: int, token: str) -> None:
        super().__init__(path.parent.name)
        self._path = path
        self._descriptor = descriptor
        self._token = token

    @property
    def identity(self) -> tuple[str, str]:
        return str(self._path), self._token

    @property
    def lost(self) -> bool:
        return not lease_holds(self.identity)

    def _found(self) -> str:
        return SILENT if self._path.exists() else f"{self._path} is gone"

    def _touch(self) -> None:
        os.utime(self._descriptor)

    def close(self) -> None:
        os.close(self._descriptor)


def is_held(path: Path) -> bool:
    """Whether some process drives the study and is not silent."""
    try:
        with path.open("rb") as file:
            return not _lock(file.fileno(), fcntl.LOCK_SH) and (abs(_age_s(path)) <= SILENT_S or _beats(path))
    except FileNotFoundError:
        return False
    except PermissionError as error:
        raise _others(path, "read", error) from error


def _beats(path: Path) -> bool:
    """Whether a holder that looks silent beats all the same: it slept with its machine, and has just woken."""
    before, end = path.stat().st_mtime_ns, time.monotonic() + 3 * BEAT_S
    while time.monotonic() < end:
        time.sleep(BEAT_S / 5)
        if path.stat().st_mtime_ns != before:
            return True
    return False


@contextmanager
def taken(path: Path, journal_lock: Path, tell: Callable[[str], None]) -> Iterator[Lease]:
    """Makes this process the study's driver. StudyRunningError while another one is, and is not silent."""
    lease = _take(path, journal_lock, tell)
    while lease.lost:  # replaced between its opening and the lock
        lease.close()
        lease = _take(path, journal_lock, tell)
    try:
        yield lease
    finally:
        lease.close()


@contextmanager
def left_behind(path: Path) -> Iterator[bool]:
    """Whether a driver had this lock file and has it no more; nobody else has it then, nor takes it for a silent one's.

    One without a name in it is about to be locked by the process that has just made it.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
    except OSError:
        yield False
        return
    try:
        is_left = _lock_patiently(descriptor, LOOK_PATIENCE_S) and _is_named(descriptor, path)
        if is_left:
            os.utime(descriptor)
        yield is_left
    finally:
        os.close(descriptor)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds the kernel's lock on a file, which ends with its holder."""
    descriptor = _open(path)
    try:
        if not _lock_patiently(descriptor, WRITE_PATIENCE_S):
            who = _holder(descriptor)
            held = f"{who or 'a process'} has held {path} for {WRITE_PATIENCE_S:.0f} s"
            found = f"{held}: it was stopped in the midst of a write"
            expected = f"`kill -CONT`, or `kill -9`, of {who or 'it; it may be on another machine, or in a container'}"
            raise RecordHeldError(Problem(path.parent.name, "its record has one writer at a time", found, expected))
        yield
    finally:
        os.close(descriptor)


def _holder(descriptor: int) -> str | None:
    """The process of this machine that has a file locked, by the kernel's list."""
    own = os.fstat(descriptor)
    file = f"{os.major(own.st_dev):02x}:{os.minor(own.st_dev):02x}:{own.st_ino}"
    try:
        held = [words for line in Path("/proc/locks").read_text().splitlines() if file in (words := line.split())]
    except OSError:
        return None
    return next((f"process {words[4]}" for words in held if words[1] == "FLOCK" and words[4] != "0"), None)


def _open(path: Path) -> int:
    """Opens a lock file. Not one that is a symbolic link: in a stranger's study it may lead to any file."""
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    except PermissionError as error:
        raise _others(path, "write", error) from error
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        found = "a symbolic link"
        raise StorageError(Problem(str(path), "is a file of this study's folder", found, "a plain file")) from error


def _is_named(descriptor: int, path: Path) -> bool:
    """Whether a lock file names a driver, and is still the one at its path."""
    own = os.fstat(descriptor)
    try:
        return own.st_size > 0 and os.path.samestat(own, path.stat())
    except FileNotFoundError:
        return False


def _others(path: Path, what: str, error: OSError) -> StorageError:
    found, expected = error.strerror or str(error), f"the user whose study it is, or the right to {what} there"
    return StorageError(Problem(str(path), f"is a file that this user may {what}", found, expected))


def _take(path: Path, journal_lock: Path, tell: Callable[[str], None]) -> FileLease:
    descriptor = _open(path)
    try:
        if not _lock_patiently(descriptor, LOOK_PATIENCE_S):
            descriptor = _take_over(path, descriptor, journal_lock, tell)
        os.ftruncate(descriptor, 0)
        token = secrets.token_hex(8)  # not the inode: who follows a dead holder has the same file
        os.pwrite(descriptor, f"{os.getpid()} on {os.uname().nodename} {token}\n".encode(), 0)
    except BaseException:
        os.close(descriptor)
        raise
    return FileLease(path, descriptor, token)


def _take_over(path: Path, silent: int, journal_lock: Path, tell: Callable[[str], None]) -> int:
    """Puts a new lock file in the place of a silent holder's. Returns its descriptor, locked."""
    holder = os.pread(silent, 200, 0).decode(errors="replace").strip().rpartition(" ")[0]
    silent_s, last_ns = _silence(path)
    new = path.with_name(f".{path.name}.{secrets.token_hex(8)}")  # in containers numbers of processes repeat
    descriptor = os.open(new, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        with locked(journal_lock):
            now = path.stat()
            if silent_s <= SILENT_S or now.st_mtime_ns != last_ns or now.st_ino != os.fstat(silent).st_ino:
                expected = f"wait for it, or stop it; it is taken over when it is silent for {SILENT_S:.0f} s"
                raise StudyRunningError(
                    Problem(path.parent.name, "a study has one driver", f"process {holder} runs it", expected)
                )
            new.replace(path)
    except BaseException:
        os.close(descriptor)
        new.unlink(missing_ok=True)
        raise
    os.close(silent)
    tell(f"process {holder} has been silent for {silent_s:.0f} s: taking the study over")
    return descriptor


def _silence(path: Path) -> tuple[float, int]:
    """For how many seconds there was no beat, and the time of the last one.

    Where that lies in the future, a clock was set back: whether another one comes is seen by a clock that nobody sets.
    """
    last_ns = path.stat().st_mtime_ns
    silent_s = time.time() - last_ns / 1e9
    if silent_s < 0:
        began = time.monotonic()
        while (silent_s := time.monotonic() - began) <= SILENT_S and path.stat().st_mtime_ns == last_ns:
            time.sleep(BEAT_S / 5)
    return silent_s, last_ns


def _age_s(path: Path) -> float:
    return time.time() - path.stat().st_mtime


def _lock_patiently(descriptor: int, patience_s: float) -> bool:
    """Takes the exclusive lock, as soon as nobody has it."""
    end = time.monotonic() + patience_s
    while not _lock(descriptor, fcntl.LOCK_EX):
        if time.monotonic() > end:
            return False
        time.sleep(0.005)
    return True


def _lock(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
