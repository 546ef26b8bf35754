"""Checkpoints on a local file system: a folder that is whole or absent, with a manifest of what belongs to it.

Where one lies only this file knows, and for buckets `bucket_checkpoints.py`. Nothing in a checkpoint is a pickle.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainables.errors import CheckpointError, InputError, Problem
from trainables.fault_points import fault_point
from trainables.stores import Checkpoints

MANIFEST = "manifest.json"
FORMAT, MODEL_ALONE = 1, 2
"""Of manifests. A version that knows nothing of models alone passes over them, and goes on from none."""


@dataclass(frozen=True)
class Manifest:
    """What a committed checkpoint consists of."""

    trial: int
    epoch: int
    metrics: dict[str, float | None]
    """The report of this epoch; None where the number was not finite."""
    files: dict[str, tuple[int, str]]
    """Path inside the folder -> (bytes, sha256)."""
    resumable: bool = True
    """Whether the trial can go on from here; else it holds the model alone."""

    @property
    def num_bytes(self) -> int:
        return sum(size for size, _ in self.files.values())

    def to_json(self) -> dict[str, Any]:
        files = {name: {"bytes": size, "sha256": digest} for name, (size, digest) in self.files.items()}
        return {
            "format": FORMAT if self.resumable else MODEL_ALONE,
            "trial": self.trial,
            "epoch": self.epoch,
            "metrics": self.metrics,
            "files": files,
        }

    @staticmethod
    def read(folder: Path) -> Manifest:
        """The manifest of a committed checkpoint. CheckpointError when it is missing or not one of ours."""
        try:
            text = (folder / MANIFEST).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{folder}: no readable {MANIFEST}: {error}") from error
        return Manifest.parse(text, str(folder))

    @staticmethod
    def parse(text: str | bytes, where: str) -> Manifest:
        """The manifest in the text of `where`'s. CheckpointError when it is not one of ours."""
        try:
            raw = json.loads(text)
            if raw["format"] not in (FORMAT, MODEL_ALONE):
                raise CheckpointError(
                    f"{where}: format {raw['format']} is none that this version reads: {FORMAT} or {MODEL_ALONE}"
                )
            files = {name: (int(entry["bytes"]), str(entry["sha256"])) for name, entry in raw["files"].items()}
            outside = sorted(name for name in files if not _is_inner(name))
            if outside:
                raise CheckpointError(f"{where}: {MANIFEST} names a file that is not one of the folder: {outside[0]!r}")
            metrics = {str(name): None if value is None else float(value) for name, value in raw["metrics"].items()}
            return Manifest(int(raw["trial"]), int(raw["epoch"]), metrics, files, raw["format"] == FORMAT)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{where}: no readable {MANIFEST}: {error}") from error


class CheckpointStore(Checkpoints):
    """The checkpoints of one study, `ROOT/trial-00003/epoch-0002/`."""

    def __init__(self, root: Path, budget_bytes: int | None = None, lease: tuple[str, str] | None = None) -> None:
        super().__init__(str(root), budget_bytes, lease)
        self.root = root

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

    def elsewhere(self) -> list[Path]:
        """The trials' folders where the store is a link, as to a larger disk: whoever removes that leaves them there.

        Nothing else of the folder that it leads to: that may be any.
        """
        if not self.root.is_symlink():
            return []
        root = self.root.resolve()
        folders = (root / self.folder(trial, 0).parent.name for trial in self._trials())
        return [folder for folder in folders if folder.is_dir()]

    def folder(self, trial: int, epoch: int) -> Path:
        return self.root / f"trial-{trial:05d}" / f"epoch-{epoch:04d}"

    def path(self, trial: int, epoch: int) -> str:
        return str(self.folder(trial, epoch))

    def local(self, trial: int, epoch: int) -> Path:
        return self.folder(trial, epoch)

    def is_whole(self, trial: int, epoch: int, deep: bool) -> bool:
        return verify(self.folder(trial, epoch), deep)

    def copy(self, trial: int, epoch: int, to: Path, wanted: Callable[[Path], bool]) -> None:
        checkpoint = self.folder(trial, epoch)
        for path in filter(wanted, map(Path, Manifest.read(checkpoint).files)):
            (to / path).parent.mkdir(parents=True, exist_ok=True)
            if not (checkpoint / path).exists():
                raise CheckpointError(f"{checkpoint / path} is gone")
            shutil.copyfile(checkpoint / path, to / path)

    def stage(self, trial: int, epoch: int) -> Path:
        staging = self._staging(trial, epoch)
        self.drop_unfinished(trial)
        staging.mkdir(parents=True)
        return staging

    def commit(self, trial: int, epoch: int, metrics: Mapping[str, float], resumable: bool = True) -> Manifest:
        staging, final = self._staging(trial, epoch), self.folder(trial, epoch)
        with ThreadPoolExecutor() as pool:
            # To hash and to reach the disk take about as long as each other: at the same time.
            synced = pool.map(fsync, _files(staging))
            files = sizes_and_hashes(staging, pool)
            list(synced)  # raises what went wrong
        manifest = Manifest(trial, epoch, finite_or_none(metrics), files, resumable)
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
        for epoch in reversed(self.epochs(trial)):
            if not self.resumable(trial, epoch):
                continue
            folder = self.folder(trial, epoch)
            if verify(folder) and (manifest := Manifest.read(folder)).epoch == epoch and manifest.trial == trial:
                return manifest
        return None

    def resumable(self, trial: int, epoch: int) -> bool:
        try:
            return Manifest.read(self.folder(trial, epoch)).resumable
        except CheckpointError:
            return False

    def epochs(self, trial: int) -> list[int]:
        return _numbers(self.folder(trial, 0).parent, "epoch-")

    def _trials(self) -> list[int]:
        return _numbers(self.root, "trial-")

    def _disk(self) -> Path:
        self.root.mkdir(parents=True, exist_ok=True)
        return self.root

    def num_bytes(self, trial: int, epoch: int) -> int:
        try:
            return Manifest.read(self.folder(trial, epoch)).num_bytes
        except CheckpointError:
            return 0

    def delete(self, trial: int, epoch: int) -> None:
        folder = self.folder(trial, epoch)
        doomed = folder.with_name(f".deleted-{folder.name}")
        shutil.rmtree(doomed, ignore_errors=True)
        try:
            folder.rename(doomed)
        except FileNotFoundError:
            return
        shutil.rmtree(doomed, ignore_errors=True)

    def sweep(self) -> None:
        for pattern in (".staging-*", ".deleted-*"):
            for leftover in self.root.glob(f"trial-*/{pattern}"):
                shutil.rmtree(leftover, ignore_errors=True)

    def drop_unfinished(self, trial: int) -> None:
        for leftover in self.folder(trial, 0).parent.glob(".staging-*"):
            shutil.rmtree(leftover, ignore_errors=True)

    def discard(self, trial: int, epoch: int) -> None:
        if self._holds_lease():
            shutil.rmtree(self._staging(trial, epoch), ignore_errors=True)

    def _staging(self, trial: int, epoch: int) -> Path:
        return self.folder(trial, epoch).with_name(f".staging-epoch-{epoch:04d}")


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


def check_written(folder: Path) -> None:
    """Looks at what a trainable saved, when all ranks have. InputError for what cannot be vouched for: of a link nobody
    could say what it leads to, and one name is the manifest's."""
    for path in folder.rglob("*"):
        kind = "link" if path.is_symlink() else None if path.is_dir() or path.is_file() else "pipe or device"
        found = f"the {kind} {path.relative_to(folder)}" if kind else None
        if path == folder / MANIFEST:
            found = f"a file {MANIFEST}, which is the name of what lists them"
        if found is not None:
            expected = "a copy in a link's place, another name"
            raise InputError(str(Problem("trainable", "a checkpoint is files of its own", found, expected)))


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
    path.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


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
