"""Files of a rank whose node does not see the study's folder: kept on its own disk, carried to and fro in pieces.

Whether a node sees a folder is found out, not configured: a file with random content is put there, and the rank looks
for it. No Ray here: who carries the pieces is given as functions.
"""

from __future__ import annotations

import atexit
import errno
import fcntl
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

PIECE_BYTES = 8 * 1024**2
SCRATCH = "TUNE_SERVICE_SCRATCH"
"""Names the scratch folder in the environment of every process of a Ray of a study's own."""
_PREFIX = "tune-rank-"
_OURS = b"tune-service\n"
"""What a lock holds."""


@dataclass(frozen=True)
class Mark:
    """A file that can be seen wherever its folder can."""

    path: str
    content: str

    def is_seen(self) -> bool:
        """Whether this process sees the very file, not one of the same name on another disk."""
        try:
            return Path(self.path).read_text(encoding="ascii") == self.content
        except (OSError, UnicodeDecodeError):
            return False


@contextmanager
def marked(folder: Path) -> Iterator[Mark]:
    """Puts a mark into `folder` for as long as the block runs."""
    folder.mkdir(parents=True, exist_ok=True)
    content = secrets.token_hex(16)
    path = folder / f".mark-{content}"
    path.write_text(content, encoding="ascii")
    try:
        yield Mark(str(path), content)
    finally:
        path.unlink(missing_ok=True)


def scratch_place() -> Path:
    """Where a process keeps what is its own."""
    return Path(os.environ.get(SCRATCH) or tempfile.gettempdir())


class FarFiles:
    """A process's own folder on its node: a rank's, or a supervisor's. A killed one's is removed by the next there."""

    def __init__(self) -> None:
        self._root: Path | None = None

    def folder(self, name: str) -> Path:
        """A folder in there, made when it is not there."""
        folder = self._made() / name
        folder.mkdir(exist_ok=True)
        return folder

    def emptied(self, name: str) -> Path:
        """The same, with nothing in it."""
        shutil.rmtree(self._made() / name, ignore_errors=True)
        return self.folder(name)

    def remove(self) -> None:
        """All of it. A later use makes another."""
        root, self._root = self._root, None
        if root is not None:
            shutil.rmtree(root, ignore_errors=True)

    def listing(self, name: str) -> list[tuple[str, int]]:
        """(path inside, bytes) of every file of a folder."""
        root = self.folder(name)
        paths = (path for path in sorted(root.rglob("*")) if path.is_file())
        return [(str(path.relative_to(root)), path.stat().st_size) for path in paths]

    def read(self, name: str, path: str, offset: int) -> bytes:
        with (self.folder(name) / path).open("rb") as file:
            file.seek(offset)
            return file.read(PIECE_BYTES)

    def write(self, name: str, path: str, data: bytes) -> None:
        """Adds a piece to the end of a file."""
        file = self.folder(name) / path
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("ab") as target:
            target.write(data)

    def _remove_at_exit(self, pid: int) -> None:
        if os.getpid() == pid:  # not of a fork
            self.remove()

    def _made(self) -> Path:
        if self._root is None:
            place = scratch_place()
            for other in place.glob(f"{_PREFIX}*"):
                _remove_unheld(other)
            self._root, _ = held_folder(place, _PREFIX, "lock")
            atexit.register(self._remove_at_exit, os.getpid())
        return self._root


own_files = FarFiles()
"""Of this process, where it has one thing at a time in there."""


def fetch(read: Callable[[str, int], bytes], listing: Sequence[tuple[str, int]], to: Path) -> None:
    """Brings files here, into `to`. OSError when one does not come whole."""
    for name, size in listing:
        path = to / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            while (offset := file.tell()) < size:
                piece = read(name, offset)
                if not piece:
                    raise OSError(f"{name} ended after {offset} of {size} bytes")
                file.write(piece)


def send(write: Callable[[str, bytes], None], folder: Path) -> None:
    """Takes all files of `folder` there, in pieces in their order."""
    for path in sorted(each for each in folder.rglob("*") if each.is_file()):
        name = str(path.relative_to(folder))
        with path.open("rb") as file:
            write(name, file.read(PIECE_BYTES))  # an empty file, too
            while piece := file.read(PIECE_BYTES):
                write(name, piece)


def _remove_unheld(folder: Path) -> None:
    try:
        with left_lock(folder / "lock"):
            shutil.rmtree(folder, ignore_errors=True)
    except OSError:  # it is held, or just being made
        return


def held_folder(place: Path, prefix: str, lock: str) -> tuple[Path, int]:
    """A new folder, with a lock in it that this process holds until it closes the descriptor or is gone, however it
    went."""
    new = Path(tempfile.mkdtemp(prefix=f".{prefix}", dir=place))
    try:
        descriptor = os.open(new / lock, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        os.write(descriptor, _OURS)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        return new.rename(place / new.name[1:]), descriptor  # others see it only when it is held
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise


def left_lock(path: Path) -> BinaryIO:
    """The lock of a process that is gone. OSError where one holds it, and where it is none that this user's processes
    made by `held_folder`: others keep files of that name in the temporary folder too."""
    file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW), "rb")
    try:
        found = os.fstat(file.fileno())
        is_ours = stat.S_ISREG(found.st_mode) and found.st_uid == os.getuid() and file.read(100) == _OURS
        if not is_ours or path.parent.is_symlink():
            raise FileNotFoundError(errno.ENOENT, "no lock of ours", str(path))
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        file.close()
        raise
    return file
