"""Checkpoints on a local file system: a folder that is whole or absent, with a manifest of what belongs to it.

The only file that knows where a checkpoint lies. Nothing in a checkpoint is a pickle.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainables.errors import CheckpointBudgetError, CheckpointError
from trainables.fault_points import fault_point

MANIFEST = "manifest.json"
FORMAT = 1
GIB = 1024**3
RECORD_ROOM_BYTES = 1_000_000
"""Left free beside a checkpoint, so that the record still has room to say how it went."""


@dataclass(frozen=True)
class Manifest:
    """What a committed checkpoint consists of."""

    trial: int
    epoch: int
    metrics: dict[str, float | None]
    """The report of this epoch; None where the number was not finite."""
    files: dict[str, tuple[int, str]]
    """Path inside the folder -> (bytes, sha256)."""

    @property
    def num_bytes(self) -> int:
        return sum(size for size, _ in self.files.values())

    def to_json(self) -> dict[str, Any]:
        files = {name: {"bytes": size, "sha256": digest} for name, (size, digest) in self.files.items()}
        return {
            "format": FORMAT,
            "trial": self.trial,
            "epoch": self.epoch,
            "metrics": self.metrics,
            "files": files,
        }

    @staticmethod
    def read(folder: Path) -> Manifest:
        """The manifest of a committed checkpoint. CheckpointError when it is missing or not one of ours."""
        try:
            raw = json.loads((folder / MANIFEST).read_text())
            if raw["format"] != FORMAT:
                raise CheckpointError(
                    f"{folder}: format {raw['format']} is not {FORMAT}, the one that this version reads"
                )
            files = {name: (int(entry["bytes"]), str(entry["sha256"])) for name, entry in raw["files"].items()}
            outside = sorted(name for name in files if not _is_inner(name))
            if outside:
                raise CheckpointError(
                    f"{folder}: {MANIFEST} names a file that is not one of the folder: {outside[0]!r}"
                )
            metrics = {str(name): None if value is None else float(value) for name, value in raw["metrics"].items()}
            return Manifest(int(raw["trial"]), int(raw["epoch"]), metrics, files)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{folder}: no readable {MANIFEST}: {error}") from error


class CheckpointStore:
    """The checkpoints of one study, `ROOT/trial-00003/epoch-0002/`."""

    def __init__(self, root: Path, budget_bytes: int | None = None, lease: tuple[str, str] | None = None) -> None:
        """With `lease`, the driver's, nothing is committed any more once another driver has taken the study over."""
        self.root = root
        self._budget_bytes = budget_bytes
        self._lease = lease

    def check_room(self, trial: int) -> None:
        """Before a checkpoint is written: is there room for one like those that there are?

        Raises OSError (ENOSPC) when the disk has none, CheckpointBudgetError when the study's budget has none.
        """
        self._check_lease()  # before anything of the other driver's is touched
        trials = {trial: self.epochs(trial)}
        if not trials[trial]:  # its first one: as large as the others'
            trials = self.kept()
        expected = max((self.num_bytes(number, epoch) for number in trials for epoch in trials[number]), default=0)
        self._check_budget(expected)
        self.root.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.root).free
        if free < expected + RECORD_ROOM_BYTES:
            found = f"{free / 1e6:.1f} MB free at {self.root}, a checkpoint takes {expected / 1e6:.1f} MB"
            raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {found}")

    def _check_lease(self) -> None:
        if self._lease is not None and not lease_holds(self._lease):
            raise CheckpointError(f"{self.root}: another driver has taken the study over")

    def _check_budget(self, more_bytes: int) -> None:
        used = self.total_bytes()
        if self._budget_bytes is not None and used + more_bytes > self._budget_bytes:
            raise CheckpointBudgetError(
                f"checkpoints.budget_gib is too small: {used / GIB:.4g} GiB are in use and must be kept, one more "
                f"checkpoint makes {(used + more_bytes) / GIB:.4g}, the budget is {self._budget_bytes / GIB:.4g}"
            )

    def total_bytes(self) -> int:
        """All that lies in the store, unfinished checkpoints too; their manifests, a few hundred bytes each, apart."""
        total = 0
        for folder, _, names in os.walk(self.root):  # which passes over folders that the driver deletes meanwhile
            for name in names:
                if name == MANIFEST:
                    continue
                with contextlib.suppress(FileNotFoundError):
                    total += Path(folder, name).stat().st_size
        return total

    def folder(self, trial: int, epoch: int) -> Path:
        return self.root / f"trial-{trial:05d}" / f"epoch-{epoch:04d}"

    def stage(self, trial: int, epoch: int) -> Path:
        """An empty folder to write the checkpoint into. What killed writers of this trial left is removed."""
        staging = self._staging(trial, epoch)
        for leftover in staging.parent.glob(".staging-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        staging.mkdir(parents=True)
        return staging

    def commit(self, trial: int, epoch: int, metrics: Mapping[str, float]) -> Manifest:
        """Makes the staged folder the checkpoint of this epoch. After a crash at any line it is whole or absent.

        An existing checkpoint of the same epoch (a repeated epoch after a restart) is replaced.
        """
        staging, final = self._staging(trial, epoch), self.folder(trial, epoch)
        with ThreadPoolExecutor() as pool:
            # To hash and to reach the disk take about as long as each other: at the same time.
            synced = pool.map(fsync, _files(staging))
            manifest = Manifest(trial, epoch, finite_or_none(metrics), sizes_and_hashes(staging, pool))
            list(synced)  # raises what went wrong
        write_json(staging / MANIFEST, manifest.to_json())
        self._check_budget(0)
        fsync_tree(staging)
        fault_point(f"committing-{trial}-{epoch}")
        self._check_lease()
        if final.exists():
            self.delete(trial, epoch)
        staging.replace(final)
        fsync(final.parent)
        fsync(self.root)
        return manifest

    def latest(self, trial: int) -> Manifest | None:
        """The newest checkpoint of a trial whose bytes are all there."""
        for epoch in sorted(self.epochs(trial), reverse=True):
            folder = self.folder(trial, epoch)
            if verify(folder) and (manifest := Manifest.read(folder)).epoch == epoch and manifest.trial == trial:
                return manifest
        return None

    def epochs(self, trial: int) -> list[int]:
        """Epochs of a trial that have a committed checkpoint."""
        return _numbers(self.folder(trial, 0).parent, "epoch-")

    def kept(self) -> dict[int, list[int]]:
        """Trial -> its epochs that have a committed checkpoint, for the trials that have any."""
        return {trial: epochs for trial in _numbers(self.root, "trial-") if (epochs := self.epochs(trial))}

    def num_bytes(self, trial: int, epoch: int) -> int:
        """Size by the manifest; 0 when that cannot be read."""
        try:
            return Manifest.read(self.folder(trial, epoch)).num_bytes
        except CheckpointError:
            return 0

    def delete(self, trial: int, epoch: int) -> None:
        """Removes a checkpoint; out of sight first, so that a kill in between leaves no half of it."""
        folder = self.folder(trial, epoch)
        doomed = folder.with_name(f".deleted-{folder.name}")
        shutil.rmtree(doomed, ignore_errors=True)
        try:
            folder.rename(doomed)
        except FileNotFoundError:
            return
        shutil.rmtree(doomed, ignore_errors=True)

    def sweep(self) -> None:
        """Removes what killed writers and deleters left. Only for the one driver, while no trial runs."""
        for pattern in (".staging-*", ".deleted-*"):
            for leftover in self.root.glob(f"trial-*/{pattern}"):
                shutil.rmtree(leftover, ignore_errors=True)

    def discard(self, trial: int, epoch: int) -> None:
        """Drops a staged checkpoint that will not be committed; not another driver's of the same name."""
        if self._lease is None or lease_holds(self._lease):
            shutil.rmtree(self._staging(trial, epoch), ignore_errors=True)

    def _staging(self, trial: int, epoch: int) -> Path:
        return self.folder(trial, epoch).with_name(f".staging-epoch-{epoch:04d}")


def lease_holds(lease: tuple[str, str]) -> bool:
    """Whether the lock file, (path, token), is still that driver's."""
    path, token = lease
    try:
        return Path(path).read_text(errors="replace").split()[-1:] == [token]
    except FileNotFoundError:
        return False


def verify(folder: Path, deep: bool = True) -> bool:
    """Whether every file of the manifest is there with its size and, when `deep`, its sha256."""
    try:
        manifest = Manifest.read(folder)
        root = os.path.realpath(folder)
        if any(os.path.realpath(f"{root}/{name}") != f"{root}/{name}" for name in manifest.files):
            return False  # a symbolic link: it may lead to any file
        sizes = all((folder / name).stat().st_size == size for name, (size, _) in manifest.files.items())
        return sizes and (
            not deep or all(sha256(folder / name) == digest for name, (_, digest) in manifest.files.items())
        )
    except (CheckpointError, OSError):
        return False


def _is_inner(name: str) -> bool:
    """Whether a manifest's name of a file is one inside its folder: `../x` and `/x` are not."""
    return bool(name) and not {"", ".", ".."} & set(name.split("/"))


def _numbers(folder: Path, prefix: str) -> list[int]:
    """The numbers of the folders that are named PREFIX and a number; whatever else is there is not ours."""
    named = (entry.name.removeprefix(prefix) for entry in folder.glob(f"{prefix}*") if not entry.is_symlink())
    return sorted(int(number) for number in named if number.isascii() and number.isdecimal())


def sizes_and_hashes(folder: Path, pool: Executor) -> dict[str, tuple[int, str]]:
    files = list(_files(folder))
    hashes = pool.map(sha256, files)
    return {
        str(path.relative_to(folder)): (path.stat().st_size, digest) for path, digest in zip(files, hashes, strict=True)
    }


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def finite_or_none(metrics: Mapping[str, float]) -> dict[str, float | None]:
    """JSON has no NaN and no infinity."""
    return {name: float(value) if math.isfinite(value) else None for name, value in metrics.items()}


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def fsync_tree(folder: Path) -> None:
    for path in (*_files(folder), *(p for p in folder.rglob("*") if p.is_dir()), folder):
        fsync(path)


def fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file())
