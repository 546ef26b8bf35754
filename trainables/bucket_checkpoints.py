"""Checkpoints in a bucket: files under a name of their own, then a manifest, which is the commit.

    CHECKPOINTS/trial-00003-epoch-0002-UPLOAD/...                  the files
    CHECKPOINTS/manifests/00003-0002-BYTES-GENERATION-UPLOAD.json  what belongs to it, put there last

What is read once there are manifests is whole: no two writers ever write to one name. One list of the manifests' names
tells trials, epochs and sizes; it is remembered for a moment. Of two of one epoch that of the higher generation of the
driver counts: a supervisor that slept between its look at the lease and its manifest commits files that may be gone.
(No folder for each trial: the store's client leaves an object for every folder that something was deleted from.)
"""

from __future__ import annotations

import json
import re
import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from trainables.bucket import Bucket, Object, at_once, get_tree, is_url, put_tree
from trainables.checkpoint import CheckpointStore, Manifest, finite_or_none, sha256, sizes_and_hashes
from trainables.errors import CheckpointError, DamagedCheckpointError
from trainables.far import own_files, scratch_place
from trainables.fault_points import fault_point
from trainables.stores import Checkpoints, generation_of

MANIFESTS = "manifests"
REMEMBERED_S = 1.0


@dataclass(frozen=True)
class _Commit:
    """What a manifest's name says."""

    trial: int
    epoch: int
    num_bytes: int
    generation: int
    """Of the driver."""
    upload: str

    @staticmethod
    def of(name: str) -> _Commit | None:
        """None for a name that is not ours."""
        found = re.fullmatch(r"([0-9]{5,9})-([0-9]{4,9})-([0-9]{1,18})-([0-9]{6,12})-([0-9a-f]{16})\.json", name)
        return _Commit(int(found[1]), int(found[2]), int(found[3]), int(found[4]), found[5]) if found else None

    @property
    def name(self) -> str:
        what = f"{self.trial:05d}-{self.epoch:04d}-{self.num_bytes}-{self.generation:06d}"
        return f"{MANIFESTS}/{what}-{self.upload}.json"

    @property
    def folder(self) -> str:
        return f"{_trial(self.trial)}-epoch-{self.epoch:04d}-{self.upload}"


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
        self._generation = generation_of(lease[1]) if lease is not None else 0
        self._commits: dict[tuple[int, int], list[_Commit]] = {}
        """Trial and epoch -> its commits; the last one counts."""
        self._listed_s = -REMEMBERED_S
        self._upload: _Commit | None = None
        """What is being written here; its size is not known yet."""
        self._swept: set[int] = set()
        self._local: tuple[int, int] | None = None

    # What there is

    def _all(self) -> dict[tuple[int, int], list[_Commit]]:
        """Two of one epoch are a repeated one whose writer was killed before it removed the first, or a late one."""
        if time.monotonic() - self._listed_s >= REMEMBERED_S:
            self._take(self._bucket.at(MANIFESTS).objects())
        return self._commits

    def _take(self, manifests: Mapping[str, Object]) -> None:
        found = {commit: each.written_s for name, each in manifests.items() if (commit := _Commit.of(name)) is not None}
        self._commits, self._listed_s = {}, time.monotonic()
        for commit in sorted(found, key=lambda commit: (commit.generation, found[commit], commit.upload)):
            self._commits.setdefault((commit.trial, commit.epoch), []).append(commit)

    def _forget(self) -> None:
        self._listed_s = -REMEMBERED_S

    def _commit_of(self, trial: int, epoch: int) -> _Commit | None:
        found = self._all().get((trial, epoch))
        return found[-1] if found else None

    def _trials(self) -> list[int]:
        return sorted({trial for trial, _ in self._all()})

    def kept(self) -> dict[int, list[int]]:
        found: dict[int, list[int]] = {}
        for trial, epoch in sorted(self._all()):
            found.setdefault(trial, []).append(epoch)
        return found

    def epochs(self, trial: int) -> list[int]:
        return sorted(epoch for number, epoch in self._all() if number == trial)

    def num_bytes(self, trial: int, epoch: int) -> int:
        commit = self._commit_of(trial, epoch)
        return commit.num_bytes if commit is not None else 0

    def total_bytes(self) -> int:
        """Of what was committed: an upload counts with its manifest, not before."""
        return sum(commit.num_bytes for commits in self._all().values() for commit in commits)

    def path(self, trial: int, epoch: int) -> str:
        commit = self._commit_of(trial, epoch)
        return f"{self._bucket.where}/{commit.folder if commit is not None else _trial(trial)}"

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
            folders = [name for name in self._bucket.folders() if name.startswith(f"{_trial(trial)}-")]
            self._forget()  # the folders were listed before the manifests are: a new one is not among them
            self._all()
            self._remove_uploads(folders)
            self._swept.add(trial)
        self._upload = _Commit(trial, epoch, 0, self._generation, secrets.token_hex(8))
        return own_files.emptied("staged")

    def commit(self, trial: int, epoch: int, metrics: Mapping[str, float], resumable: bool = True) -> Manifest:
        upload, staging = self._upload, own_files.folder("staged")
        assert upload is not None and (upload.trial, upload.epoch) == (trial, epoch), "stage comes first"
        with ThreadPoolExecutor() as pool:
            files = sizes_and_hashes(staging, pool)
        manifest = Manifest(trial, epoch, finite_or_none(metrics), files, resumable)
        self._check_budget(manifest.num_bytes)
        put_tree(self._bucket.at(upload.folder), staging, list(manifest.files))
        fault_point(f"committing-{trial}-{epoch}")
        self._check_lease()
        self._forget()  # others have committed during the upload
        self._check_budget(manifest.num_bytes)
        new = replace(upload, num_bytes=manifest.num_bytes)
        self._bucket.put(new.name, json.dumps(manifest.to_json(), indent=1, allow_nan=False).encode())
        self._upload = None
        others = [commit for commit in self._all().get((trial, epoch), []) if commit != new]
        self._remove([commit for commit in others if commit.generation <= new.generation])
        newer = [commit for commit in others if commit.generation > new.generation]
        self._commits[trial, epoch] = [new, *newer]
        own_files.emptied("staged")
        return manifest

    def drop_unfinished(self, trial: int) -> None:
        """Nothing: an upload counts with its manifest."""

    def discard(self, trial: int, epoch: int) -> None:
        upload, self._upload = self._upload, None
        with suppress(OSError):  # why there was no commit is what is to be told; a sweep finds the rest
            own_files.emptied("staged")
            if upload is not None and self._holds_lease():
                self._bucket.delete_all(upload.folder)

    def delete(self, trial: int, epoch: int) -> None:
        self._forget()  # another process has just committed it
        self._remove(self._all().get((trial, epoch), []))

    def sweep(self) -> None:
        found = self._bucket.objects()  # one list of everything, however many trials there are
        num_bytes = Counter[str]()
        for name, each in found.items():
            num_bytes[name.partition("/")[0]] += each.num_bytes
        prefix = f"{MANIFESTS}/"
        self._take({name.removeprefix(prefix): each for name, each in found.items() if name.startswith(prefix)})
        doomed: list[_Commit] = []
        for commits in self._commits.values():
            whole = [commit for commit in commits if num_bytes[commit.folder] == commit.num_bytes]
            best = (whole or commits)[-1]
            doomed += [commit for commit in commits if commit != best]
            if best.num_bytes > 0 == num_bytes[best.folder]:  # a late manifest, of files that were swept
                doomed.append(best)
        self._remove(doomed)
        self._remove_uploads(set(num_bytes))

    def _remove(self, commits: Iterable[_Commit]) -> None:
        doomed = list(commits)
        at_once(self._bucket.delete, [commit.name for commit in doomed])
        for commit in doomed:
            self._commits[commit.trial, commit.epoch].remove(commit)
            if not self._commits[commit.trial, commit.epoch]:
                del self._commits[commit.trial, commit.epoch]
        at_once(self._bucket.delete_all, [commit.folder for commit in doomed])

    def _remove_uploads(self, folders: Iterable[str]) -> None:
        """Those without a manifest, by the manifests that there are now."""
        whole = {commit.folder for commits in self._commits.values() for commit in commits}
        at_once(self._bucket.delete_all, sorted(name for name in folders if _is_upload(name) and name not in whole))

    # Reading

    def latest(self, trial: int) -> Manifest | None:
        for epoch in reversed(self.epochs(trial)):
            with suppress(CheckpointError):
                commit = self._commit_of(trial, epoch)
                if commit is not None and (manifest := self._manifest(commit)).resumable:
                    self.local(trial, epoch)
                    return manifest
        return None

    def resumable(self, trial: int, epoch: int) -> bool:
        """A late manifest, of files that were swept, is none to go on from: what is before it must stay."""
        commit = self._commit_of(trial, epoch)
        try:
            return commit is not None and self._manifest(commit).resumable and self.is_whole(trial, epoch, False)
        except CheckpointError:
            return False

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
                raise DamagedCheckpointError(f"{self.path(trial, epoch)}/{name} is not what was written, by its sha256")

    def _disk(self) -> Path:
        return scratch_place()


def _trial(number: int) -> str:
    return f"trial-{number:05d}"


def _is_upload(name: str) -> bool:
    return re.match(r"trial-[0-9]+-epoch-", name) is not None
