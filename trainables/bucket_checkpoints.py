"""Checkpoints in a bucket: files under a name of their own, then a manifest, which is the commit.

    CHECKPOINTS/trial-00003/epoch-0002-UPLOAD/...            the files
    CHECKPOINTS/manifests/00003-0002-BYTES-UPLOAD.json       what belongs to it, put there last

What is read once there are manifests is whole: no two writers ever write to one name. One list of the manifests' names
tells trials, epochs and sizes; it is remembered for a moment.
"""

from __future__ import annotations

import json
import re
import secrets
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from trainables.bucket import Bucket, at_once, get_tree, is_url, put_tree
from trainables.checkpoint import CheckpointStore, Manifest, finite_or_none, sha256, sizes_and_hashes
from trainables.errors import CheckpointError
from trainables.far import own_files, scratch_place
from trainables.fault_points import fault_point
from trainables.stores import Checkpoints

MANIFESTS = "manifests"
REMEMBERED_S = 1.0


@dataclass(frozen=True)
class _Commit:
    """What a manifest's name says."""

    trial: int
    epoch: int
    num_bytes: int
    upload: str

    @staticmethod
    def of(name: str) -> _Commit | None:
        """None for a name that is not ours."""
        found = re.fullmatch(r"([0-9]{5,9})-([0-9]{4,9})-([0-9]{1,18})-([0-9a-f]{16})\.json", name)
        return _Commit(int(found[1]), int(found[2]), int(found[3]), found[4]) if found else None

    @property
    def name(self) -> str:
        return f"{MANIFESTS}/{self.trial:05d}-{self.epoch:04d}-{self.num_bytes}-{self.upload}.json"

    @property
    def folder(self) -> str:
        return f"{_trial_folder(self.trial)}/epoch-{self.epoch:04d}-{self.upload}"


def open_store(where: str, budget_bytes: int | None = None, lease: tuple[str, str] | None = None) -> Checkpoints:
    """The store at a folder or a URL."""
    if is_url(where):
        return BucketCheckpoints(Bucket.open(where), budget_bytes, lease)
    return CheckpointStore(Path(where), budget_bytes, lease)


class BucketCheckpoints(Checkpoints):
    """The checkpoints of one study. Written and read through this process's scratch folder."""

    def __init__(self, bucket: Bucket, budget_bytes: int | None = None, lease: tuple[str, str] | None = None) -> None:
        super().__init__(bucket.url, budget_bytes, lease)
        self._bucket = bucket
        self._commits: list[_Commit] = []
        self._listed_s = -REMEMBERED_S
        self._upload: _Commit | None = None
        """What is being written here; its size is not known yet."""
        self._swept: set[int] = set()
        self._local: tuple[int, int] | None = None

    # What there is

    def _all(self) -> list[_Commit]:
        """The oldest first. Two of one epoch are a repeated one whose writer was killed before it removed the first."""
        now = time.monotonic()
        if now - self._listed_s >= REMEMBERED_S:
            found = self._bucket.at(MANIFESTS).objects()
            names = sorted(found, key=lambda name: (found[name].written_s, name))
            self._commits = [commit for name in names if (commit := _Commit.of(name)) is not None]
            self._listed_s = now
        return self._commits

    def _forget(self) -> None:
        self._listed_s = -REMEMBERED_S

    def _commit_of(self, trial: int, epoch: int) -> _Commit | None:
        return next((each for each in reversed(self._all()) if (each.trial, each.epoch) == (trial, epoch)), None)

    def _trials(self) -> list[int]:
        return sorted({commit.trial for commit in self._all()})

    def kept(self) -> dict[int, list[int]]:
        found: dict[int, set[int]] = {}
        for commit in self._all():
            found.setdefault(commit.trial, set()).add(commit.epoch)
        return {trial: sorted(found[trial]) for trial in sorted(found)}

    def epochs(self, trial: int) -> list[int]:
        return sorted({commit.epoch for commit in self._all() if commit.trial == trial})

    def num_bytes(self, trial: int, epoch: int) -> int:
        commit = self._commit_of(trial, epoch)
        return commit.num_bytes if commit is not None else 0

    def total_bytes(self) -> int:
        """Of what was committed: an upload counts with its manifest, not before."""
        return sum(commit.num_bytes for commit in self._all())

    def path(self, trial: int, epoch: int) -> str:
        commit = self._commit_of(trial, epoch)
        return f"{self._bucket.where}/{commit.folder if commit is not None else _trial_folder(trial)}"

    def is_whole(self, trial: int, epoch: int, deep: bool) -> bool:
        """By the sizes: the store looks after the content itself, and whoever downloads it hashes it."""
        commit = self._commit_of(trial, epoch)
        try:
            files = self._manifest(commit).files if commit is not None else {}
        except CheckpointError:
            return False
        found = self._bucket.at(commit.folder).objects() if commit is not None else {}
        return bool(commit) and all(
            name in found and found[name].num_bytes == size for name, (size, _) in files.items()
        )

    def _manifest(self, commit: _Commit) -> Manifest:
        try:
            text = self._bucket.get(commit.name)
        except FileNotFoundError as error:
            raise CheckpointError(f"{self.path(commit.trial, commit.epoch)}: it is gone") from error
        manifest = Manifest.parse(text, self.path(commit.trial, commit.epoch))
        if (manifest.trial, manifest.epoch) != (commit.trial, commit.epoch):
            raise CheckpointError(f"{commit.name} is of trial {manifest.trial}, epoch {manifest.epoch}")
        return manifest

    # Writing

    def stage(self, trial: int, epoch: int) -> Path:
        if trial not in self._swept:
            self._remove_uploads(self._bucket.at(_trial_folder(trial)).folders(), trial)
            self._swept.add(trial)
        self._upload = _Commit(trial, epoch, 0, secrets.token_hex(8))
        return own_files.emptied("staged")

    def commit(self, trial: int, epoch: int, metrics: Mapping[str, float]) -> Manifest:
        upload, staging = self._upload, own_files.folder("staged")
        assert upload is not None and (upload.trial, upload.epoch) == (trial, epoch), "stage comes first"
        with ThreadPoolExecutor() as pool:
            manifest = Manifest(trial, epoch, finite_or_none(metrics), sizes_and_hashes(staging, pool))
        self._check_budget(manifest.num_bytes)
        put_tree(self._bucket.at(upload.folder), staging, list(manifest.files))
        fault_point(f"committing-{trial}-{epoch}")
        self._check_lease()
        new = _Commit(trial, epoch, manifest.num_bytes, upload.upload)
        self._bucket.put(new.name, json.dumps(manifest.to_json(), indent=1, allow_nan=False).encode())
        self._upload = None
        before = [commit for commit in self._all() if (commit.trial, commit.epoch) == (trial, epoch) and commit != new]
        self._remove(before)
        self._commits = [*(commit for commit in self._commits if commit != new), new]
        own_files.emptied("staged")
        return manifest

    def discard(self, trial: int, epoch: int) -> None:
        upload, self._upload = self._upload, None
        with suppress(OSError):  # why there was no commit is what is to be told; a sweep finds the rest
            own_files.emptied("staged")
            if upload is not None and self._holds_lease():
                self._bucket.delete_all(upload.folder)

    def delete(self, trial: int, epoch: int) -> None:
        self._forget()  # another process has just committed it
        self._remove([commit for commit in self._all() if (commit.trial, commit.epoch) == (trial, epoch)])

    def sweep(self) -> None:
        newest = {(commit.trial, commit.epoch): commit for commit in self._all()}
        self._remove([commit for commit in self._all() if commit not in newest.values()])
        for folder in self._bucket.folders():
            number = folder.removeprefix("trial-")
            if folder != number and number.isdecimal():
                self._remove_uploads(self._bucket.at(folder).folders(), int(number))

    def _remove(self, commits: list[_Commit]) -> None:
        for commit in commits:
            self._bucket.delete(commit.name)
            self._commits = [each for each in self._commits if each != commit]
        at_once(lambda commit: self._bucket.delete_all(commit.folder), commits)

    def _remove_uploads(self, names: list[str], trial: int) -> None:
        """Those without a manifest. The folders were listed before the manifests are: a new one is not among them."""
        self._forget()
        whole = {commit.folder for commit in self._all()}
        folders = [f"{_trial_folder(trial)}/{name}" for name in names]
        at_once(self._bucket.delete_all, [folder for folder in folders if folder not in whole])

    # Reading

    def latest(self, trial: int) -> Manifest | None:
        for epoch in reversed(self.epochs(trial)):
            with suppress(CheckpointError):
                self.local(trial, epoch)
                commit = self._commit_of(trial, epoch)
                return self._manifest(commit) if commit is not None else None
        return None

    def local(self, trial: int, epoch: int) -> Path:
        if self._local != (trial, epoch):
            self._local = None
            self.copy(trial, epoch, own_files.emptied("resume"), lambda path: True)
            self._local = trial, epoch
        return own_files.folder("resume")

    def copy(self, trial: int, epoch: int, to: Path, wanted: Callable[[Path], bool]) -> None:
        commit = self._commit_of(trial, epoch)
        if commit is None:
            raise CheckpointError(f"{self.path(trial, epoch)} has no checkpoint of epoch {epoch}")
        manifest = self._manifest(commit)
        names = [name for name in manifest.files if wanted(Path(name))]
        try:
            get_tree(self._bucket.at(commit.folder), names, to)
        except FileNotFoundError as error:
            raise CheckpointError(f"{self.path(trial, epoch)}: a file is gone: {error}") from error
        for name in names:
            if ((to / name).stat().st_size, sha256(to / name)) != manifest.files[name]:
                raise CheckpointError(f"{self.path(trial, epoch)}/{name} is not what was written, by its sha256")

    def _disk(self) -> Path:
        return scratch_place()


def _trial_folder(trial: int) -> str:
    return f"trial-{trial:05d}"
