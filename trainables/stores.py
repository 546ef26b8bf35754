"""What a study's checkpoint store offers, in a folder or in a bucket, and the room that it looks for."""

from __future__ import annotations

import errno
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from trainables.bucket import Bucket, is_url
from trainables.errors import CheckpointBudgetError, CheckpointError

if TYPE_CHECKING:
    from trainables.checkpoint import Manifest

GIB = 1024**3
CLAIM = ".json"
"""What the names of drivers' claims end with; beside them lie the wishes of those who would drive."""
RECORD_ROOM_BYTES = 1_000_000
"""Left free beside a checkpoint, so that the record still has room to say how it went."""


class Checkpoints(ABC):
    """The checkpoints of one study, by trial and epoch. One is whole or absent."""

    def __init__(self, where: str, budget_bytes: int | None, lease: tuple[str, str] | None) -> None:
        """With `lease`, the driver's, nothing is committed any more once another driver has taken the study over."""
        self.where = where
        """The folder or the URL, by which it is opened again."""
        self._budget_bytes = budget_bytes
        self._lease = lease

    def check_room(self, trial: int, least_bytes: int = 0) -> None:
        """Before a checkpoint is written: is there room for one like those that there are, and for `least_bytes`?

        Raises OSError (ENOSPC) when the disk has none, CheckpointBudgetError when the study's budget has none.
        """
        self._check_lease()  # before anything of the other driver's is touched
        trials = {trial: self.epochs(trial)}
        if not trials[trial]:  # its first one: as large as the others'
            trials = self.kept()
        expected = max([least_bytes, *(self.num_bytes(number, epoch) for number in trials for epoch in trials[number])])
        self._check_budget(expected)
        disk = self._disk()
        free = shutil.disk_usage(disk).free
        if free < expected + RECORD_ROOM_BYTES:
            found = f"{free / 1e6:.1f} MB free at {disk}, a checkpoint takes {expected / 1e6:.1f} MB"
            raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {found}")

    def kept(self) -> dict[int, list[int]]:
        """Trial -> its epochs that have a committed checkpoint, for the trials that have any."""
        return {trial: epochs for trial in self._trials() if (epochs := self.epochs(trial))}

    @abstractmethod
    def epochs(self, trial: int) -> list[int]:
        """Epochs of a trial that have a committed checkpoint."""

    @abstractmethod
    def num_bytes(self, trial: int, epoch: int) -> int:
        """Size by the manifest; 0 when that cannot be read."""

    @abstractmethod
    def total_bytes(self) -> int:
        """All that counts for the budget."""

    @abstractmethod
    def path(self, trial: int, epoch: int) -> str:
        """Where it is, for people: absolute, or a URL."""

    @abstractmethod
    def stage(self, trial: int, epoch: int) -> Path:
        """An empty folder to write the checkpoint into. What killed writers of this trial left is removed."""

    @abstractmethod
    def commit(self, trial: int, epoch: int, metrics: Mapping[str, float], resumable: bool = True) -> Manifest:
        """Makes the staged folder the checkpoint of this epoch. After a crash at any line it is whole or absent.

        An existing checkpoint of the same epoch (a repeated epoch after a restart) is replaced.
        """

    @abstractmethod
    def drop_unfinished(self, trial: int) -> None:
        """Removes what a trial's writer, which is gone, left of a checkpoint, where that counts for the budget."""

    @abstractmethod
    def discard(self, trial: int, epoch: int) -> None:
        """Drops a staged checkpoint that will not be committed; not another driver's of the same name."""

    @abstractmethod
    def latest(self, trial: int) -> Manifest | None:
        """The newest checkpoint that a trial can go on from whose bytes are all there."""

    @abstractmethod
    def resumable(self, trial: int, epoch: int) -> bool:
        """Whether a trial can go on from this one, by its manifest; False when that cannot be read."""

    @abstractmethod
    def local(self, trial: int, epoch: int) -> Path:
        """A folder of this machine that holds the checkpoint; of a bucket's, till the next one is asked for."""

    @abstractmethod
    def is_whole(self, trial: int, epoch: int, deep: bool) -> bool:
        """Whether every file of the manifest is there with its size and, when `deep`, its content."""

    @abstractmethod
    def copy(self, trial: int, epoch: int, to: Path, wanted: Callable[[Path], bool]) -> None:
        """Copies the wanted ones of the files that the manifest names. CheckpointError when one is not there whole."""

    @abstractmethod
    def delete(self, trial: int, epoch: int) -> None:
        """Removes a checkpoint; out of sight first, so that a kill in between leaves no half of it."""

    @abstractmethod
    def sweep(self) -> None:
        """Removes what killed writers and deleters left. Only for the one driver, while no trial runs."""

    @abstractmethod
    def _trials(self) -> list[int]:
        """Those that may have a checkpoint."""

    @abstractmethod
    def _disk(self) -> Path:
        """The folder that a checkpoint is written into."""

    def _check_lease(self) -> None:
        if not self._holds_lease():
            raise CheckpointError(f"{self.where}: another driver has taken the study over")

    def _holds_lease(self) -> bool:
        return self._lease is None or lease_holds(self._lease)

    def _check_budget(self, more_bytes: int) -> None:
        used = self.total_bytes()
        if self._budget_bytes is not None and used + more_bytes > self._budget_bytes:
            raise CheckpointBudgetError(
                f"checkpoints.budget_gib is too small: {used / GIB:.4g} GiB are in use and must be kept, one more "
                f"checkpoint makes {(used + more_bytes) / GIB:.4g}, the budget is {self._budget_bytes / GIB:.4g}"
            )


def lease_holds(lease: tuple[str, str]) -> bool:
    """Whether the study's driver is still that one: a lock file and its last word, or the URL of the claims and one."""
    place, token = lease
    if is_url(place):
        return claim_holds(Bucket.open(place), token)
    try:
        return Path(place).read_text(encoding="utf-8", errors="replace").split()[-1:] == [token]
    except FileNotFoundError:
        return False


def claim_holds(claims: Bucket, own: str) -> bool:
    """Whether a driver's claim is there and none of a higher generation. Names begin with the generation.

    Two of one generation are of a study and of an earlier one of its name: at most one of them holds.
    """
    return own == newest_claim(claims.objects())


def newest_claim(names: Iterable[str]) -> str | None:
    """Of the objects of a lease, the claim that counts; None: there is none."""
    claims = (name for name in names if name.endswith(CLAIM))
    return max(claims, key=lambda name: (generation_of(name), name), default=None)


def generation_of(name: str) -> int:
    """The number that the names of a driver's claim, and of what it writes, begin with; 0 for other names."""
    number = name.partition("-")[0]
    return int(number) if number.isascii() and number.isdecimal() else 0
