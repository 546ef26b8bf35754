"""The best trial's way from a cluster's storage to a laptop: one tar file, fetched over the dashboard, checked whole.

The dashboard hands out what lies in the log folder of a node's Ray, links too, to whoever has the token. So the head
puts a link to the file there for as long as it is fetched.
"""

from __future__ import annotations

import shutil
import tarfile
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from signal import SIGTERM, signal
from types import FrameType
from typing import Any

from trainables.checkpoint import sha256
from trainables.errors import Problem
from tune_service.dashboard import Dashboard
from tune_service.errors import CommandError
from tune_service.home import StudyStorage
from tune_service.out_folder import written_whole
from tune_service.parcel import FOLDER_KEYS
from tune_service.spec_yaml import read_yaml, write_yaml

_PREFIX = ".export-"
_STALE_S = 3 * 3600.0


@contextmanager
def exported(name: str, word: str, storage: StudyStorage) -> Iterator[dict[str, Any]]:
    """On the head: the best trial of a study as a file to be fetched, and what the laptop must know of it.

    The file is there as long as the block runs; SIGTERM ends that like an error does.
    """
    # With Optuna, which a question from a laptop need not wait for.
    from tune_service.best import export_best
    from tune_service.record import Record
    from tune_service.study import stored_spec

    study = storage.study(name)
    _sweep(storage.exports)
    signal(SIGTERM, _end)
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=storage.exports))
    # This process's output is the job's log, so that its folder is the one the dashboard hands files out of.
    link = Path("/proc/self/fd/1").readlink().parent / f"tune-service-{word}.tar"
    try:
        best = export_best(name, folder / "best", storage)
        _bring_home(folder / "best" / "config.yaml", study.origins(Path(stored_spec(Record.open(study)).folder)))
        package = folder / "best.tar"
        with tarfile.open(package, "w") as tar:
            tar.add(folder / "best", arcname=".")
        shutil.rmtree(folder / "best")
        link.symlink_to(package)
        yield {
            "best": best.model_dump(mode="json"),
            "file": link.name,
            "bytes": package.stat().st_size,
            "sha256": sha256(package),
        }
    finally:
        link.unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)


def _bring_home(config: Path, origins: Mapping[str, str]) -> None:
    """A spec for the user's machine names its folders. YAML may have to quote those where it did not the cluster's."""
    mapping, _ = read_yaml(config.read_text(encoding="utf-8"))
    for section, key in FOLDER_KEYS:
        if mapping[section] is not None:
            named = mapping[section][key]
            mapping[section][key] = origins.get(named, named)
    config.write_text(write_yaml(mapping), encoding="utf-8")


def fetch(dashboard: Dashboard, node_id: str, found: Mapping[str, Any], out: Path) -> None:
    """On the laptop: fetches what `exported` offers to `out`, whole or not at all (see `written_whole`)."""
    with written_whole(out) as folder:
        package = folder.with_name("best.tar")
        digest = dashboard.patiently(lambda: dashboard.download(node_id, found["file"], package, found["bytes"]))
        if digest != found["sha256"]:
            rule = "what arrives is what was sent, by its sha256"
            raise CommandError(Problem(found["file"], rule, digest, f"{found['sha256']}: try again"))
        unpack(package, folder)


def unpack(package: Path, folder: Path) -> None:
    """Unpacks a tar file of plain files and folders. Raises CommandError for anything else, or one that lies elsewhere.

    (tarfile's own `filter` is not in Python 3.11.0 to 3.11.3, of which Debian 12 has one.)
    """
    folder = folder.resolve()
    with tarfile.open(package) as tar:
        for member in tar:
            target = (folder / member.name).resolve()
            if not target.is_relative_to(folder) or not (member.isfile() or member.isdir()):
                rule = "what it holds are plain files and folders, in one folder"
                raise CommandError(Problem(package.name, rule, member.name, "what the cluster packed: try again"))
            source = tar.extractfile(member)  # None: a folder
            if source is None:
                target.mkdir(parents=True, exist_ok=True)
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            with source, target.open("wb") as file:
                shutil.copyfileobj(source, file)


def _sweep(exports: Path) -> None:
    """Removes what a killed export left."""
    for folder in exports.glob(f"{_PREFIX}*"):
        with suppress(FileNotFoundError):  # another export has ended since, and has removed its own
            if time.time() - folder.stat().st_mtime > _STALE_S:
                shutil.rmtree(folder, ignore_errors=True)


def _end(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
