"""A checkpoint is whole or absent, whenever its writer is killed, and nothing in it is ever executed."""

from __future__ import annotations

import errno
import itertools
import json
import math
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from trainables.checkpoint import MANIFEST, CheckpointStore, Manifest, verify, write_json
from trainables.errors import CheckpointError

HELLO_SHA256 = "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "checkpoints")


def write(store: CheckpointStore, trial: int = 0, epoch: int = 1, text: str = "hello") -> Manifest:
    """A checkpoint of two files, one in a folder of its own."""
    staging = store.stage(trial, epoch)
    (staging / "model").mkdir()
    (staging / "model" / "weights.safetensors").write_text(text)
    (staging / "progress.json").write_text("{}")
    return store.commit(trial, epoch, {"eval_accuracy": 0.5})


def leftovers(store: CheckpointStore) -> list[str]:
    return sorted(path.name for path in store.root.glob("trial-*/.*"))


# ---- what a checkpoint is


def test_the_manifest_names_every_file_with_its_size_and_sha256(store: CheckpointStore) -> None:
    manifest = write(store, trial=3, epoch=2)
    folder = store.folder(3, 2)
    assert folder == store.root / "trial-00003" / "epoch-0002"
    assert json.loads((folder / MANIFEST).read_text()) == {
        "format": 1,
        "trial": 3,
        "epoch": 2,
        "metrics": {"eval_accuracy": 0.5},
        "files": {
            "model/weights.safetensors": {"bytes": 5, "sha256": HELLO_SHA256},
            "progress.json": {
                "bytes": 2,
                "sha256": "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a",
            },
        },
    }
    assert Manifest.read(folder) == manifest
    assert manifest.num_bytes == store.num_bytes(3, 2) == 7


def test_a_metric_that_is_not_finite_is_null_in_the_manifest(store: CheckpointStore) -> None:
    store.stage(0, 1)
    store.commit(0, 1, {"eval_loss": math.nan, "train_loss": math.inf, "eval_accuracy": 1})
    text = (store.folder(0, 1) / MANIFEST).read_text()
    assert json.loads(text)["metrics"] == {"eval_loss": None, "train_loss": None, "eval_accuracy": 1.0}
    assert "NaN" not in text and "Infinity" not in text
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(store.folder(0, 1) / "x.json", {"value": math.nan})


def test_the_latest_checkpoint_is_the_one_of_the_last_epoch(store: CheckpointStore) -> None:
    for epoch in (9, 10, 2):
        write(store, epoch=epoch)
    write(store, trial=1, epoch=11)
    latest = store.latest(0)
    assert latest is not None and latest.epoch == 10
    assert store.epochs(0) == [2, 9, 10]
    assert store.kept() == {0: [2, 9, 10], 1: [11]}
    assert store.latest(7) is None and store.epochs(7) == []


def test_a_trial_goes_on_from_no_checkpoint_that_holds_the_model_alone(store: CheckpointStore) -> None:
    write(store, trial=0, epoch=1)
    (store.stage(0, 2) / "model").write_text("hello")
    store.commit(0, 2, {}, resumable=False)
    assert store.epochs(0) == [1, 2] and store.is_whole(0, 2, deep=True)
    assert [store.resumable(0, epoch) for epoch in (1, 2, 3)] == [True, False, False]
    formats = [json.loads((store.folder(0, epoch) / MANIFEST).read_text())["format"] for epoch in (1, 2)]
    assert formats == [1, 2], "a version that knows of none passes over it"
    latest = store.latest(0)
    assert latest is not None and latest.epoch == 1


def test_the_latest_checkpoint_is_one_whose_bytes_are_all_there(store: CheckpointStore) -> None:
    for epoch in (1, 2, 3, 4):
        write(store, epoch=epoch)
    (store.folder(0, 4) / "progress.json").unlink()
    (store.folder(0, 3) / "model" / "weights.safetensors").write_text("jello")
    latest = store.latest(0)
    assert latest is not None and latest.epoch == 2


def test_a_checkpoint_that_lies_in_the_place_of_another_is_not_gone_on_from(store: CheckpointStore) -> None:
    write(store, trial=0, epoch=1)
    shutil.copytree(store.folder(0, 1), store.folder(0, 2))
    shutil.copytree(store.folder(0, 1), store.folder(1, 1))
    latest = store.latest(0)
    assert latest is not None and latest.epoch == 1
    assert store.latest(1) is None


def test_an_epoch_that_is_repeated_replaces_the_checkpoint_before(store: CheckpointStore) -> None:
    write(store, text="before")
    write(store, text="after a restart")
    assert (store.folder(0, 1) / "model" / "weights.safetensors").read_text() == "after a restart"
    assert store.epochs(0) == [1] and leftovers(store) == []


def test_a_new_stage_is_empty_whatever_a_killed_writer_left_there(store: CheckpointStore) -> None:
    (store.stage(0, 1) / "half").write_text("x")
    assert list(store.stage(0, 1).iterdir()) == []


# ---- verify


def damage_size(folder: Path) -> None:
    (folder / "progress.json").write_text("{}\n")


def damage_byte(folder: Path) -> None:
    (folder / "model" / "weights.safetensors").write_text("jello")


def lose_file(folder: Path) -> None:
    (folder / "progress.json").unlink()


def lose_manifest(folder: Path) -> None:
    (folder / MANIFEST).unlink()


def cut_manifest(folder: Path) -> None:
    text = (folder / MANIFEST).read_text()
    (folder / MANIFEST).write_text(text[: len(text) // 2])


def lose_folder(folder: Path) -> None:
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("damage", "shallow"),
    [
        (damage_size, False),
        (damage_byte, True),  # sizes alone do not show it
        (lose_file, False),
        (lose_manifest, False),
        (cut_manifest, False),
        (lose_folder, False),
    ],
)
def test_damage_is_seen_by_sizes_or_by_sha256(
    store: CheckpointStore, damage: Callable[[Path], None], shallow: bool
) -> None:
    write(store)
    folder = store.folder(0, 1)
    assert verify(folder, deep=False) and verify(folder, deep=True)
    damage(folder)
    assert (verify(folder, deep=False), verify(folder, deep=True)) == (shallow, False)


@pytest.mark.parametrize("text", ["", "[]", "{}", "null", '{"format": 1}', "\x80\x04"])
def test_a_manifest_that_is_not_ours_is_refused_with_its_folder(store: CheckpointStore, text: str) -> None:
    store.stage(0, 1)
    store.commit(0, 1, {})
    (store.folder(0, 1) / MANIFEST).write_text(text, encoding="latin-1")
    with pytest.raises(CheckpointError, match="epoch-0001"):
        Manifest.read(store.folder(0, 1))
    assert store.num_bytes(0, 1) == 0


def test_a_manifest_of_another_format_is_refused_with_both_formats_named(store: CheckpointStore) -> None:
    write(store)
    manifest = store.folder(0, 1) / MANIFEST
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"format": 3}))
    with pytest.raises(CheckpointError, match="format 3 is none that this version reads: 1 or 2"):
        Manifest.read(store.folder(0, 1))
    assert store.latest(0) is None


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


def test_a_pickle_in_place_of_a_file_is_never_executed(store: CheckpointStore, tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    bomb = pickle.dumps(Bomb(marker))
    pickle.loads(bomb)  # noqa: S301  (it does what it says)
    marker.unlink()
    write(store)
    (store.folder(0, 1) / "model" / "weights.safetensors").write_bytes(bomb)
    assert store.latest(0) is None
    (store.folder(0, 1) / MANIFEST).write_bytes(bomb)
    assert store.latest(0) is None and store.kept() == {0: [1]}
    store.delete(0, 1)
    store.sweep()
    assert not marker.exists()


# ---- killed at any point

KILLED_IN = ("mkdir", "open", "fsync", "rename", "replace", "unlink", "rmdir")
"""Every call of the operating system through which the store changes or reads anything."""


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


def killed_before_call(number: int, monkeypatch: pytest.MonkeyPatch, act: Callable[[], None]) -> bool:
    """Runs `act`, killed before its system call of this number (from 0). False when it makes fewer."""
    calls = 0

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            if calls == number:
                raise Killed
            calls += 1
            return call(*args, **kwargs)

        return run

    with monkeypatch.context() as patch:
        for name in KILLED_IN:
            patch.setattr(os, name, counted(getattr(os, name)))
        try:
            act()
        except Killed:
            return True
    assert calls > 3, "the calls are not the ones that are counted"
    return False


def at_each_point(
    monkeypatch: pytest.MonkeyPatch, prepare: Callable[[], None], act: Callable[[], None]
) -> Iterator[int]:
    """Runs `act` on a fresh `prepare`, killed before each of its system calls in turn."""
    for number in itertools.count():
        prepare()
        if not killed_before_call(number, monkeypatch, act):
            return
        yield number


def test_a_checkpoint_is_whole_or_absent_after_a_kill_at_any_point(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = set()
    for _ in at_each_point(monkeypatch, lambda: shutil.rmtree(store.root, ignore_errors=True), lambda: write(store)):
        for epoch in store.epochs(0):
            assert verify(store.folder(0, epoch))
        seen.add(tuple(store.epochs(0)))
        store.sweep()
        assert leftovers(store) == []
        write(store)  # and the restarted trial can write it
        assert store.epochs(0) == [1] and verify(store.folder(0, 1))
    assert seen == {(), (1,)}


def test_a_repeated_epoch_is_the_old_one_the_new_one_or_absent_after_a_kill_at_any_point(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def prepare() -> None:
        shutil.rmtree(store.root, ignore_errors=True)
        write(store, epoch=1, text="epoch one")
        write(store, epoch=2, text="old")

    seen = set()
    for _ in at_each_point(monkeypatch, prepare, lambda: write(store, epoch=2, text="new")):
        latest = store.latest(0)
        assert latest is not None  # epoch 1 at the least
        assert all(verify(store.folder(0, epoch)) for epoch in store.epochs(0))
        seen.add((store.folder(0, latest.epoch) / "model" / "weights.safetensors").read_text())
        store.sweep()
        assert leftovers(store) == []
    assert seen == {"old", "new", "epoch one"}


def test_a_deleted_checkpoint_is_out_of_sight_before_its_first_file_goes(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def prepare() -> None:
        shutil.rmtree(store.root, ignore_errors=True)
        write(store)

    seen = []
    for _ in at_each_point(monkeypatch, prepare, lambda: store.delete(0, 1)):
        seen.append(store.epochs(0))
        assert not store.epochs(0) or verify(store.folder(0, 1))
        store.sweep()
        assert leftovers(store) == []
    assert seen[0] == [1] and seen[-1] == []


# ---- when the power fails


def test_all_of_a_checkpoint_is_on_the_disk_before_it_has_its_name_and_then_its_name_is(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[Path | str] = []
    fsync, replace = os.fsync, os.replace

    def noted_fsync(descriptor: int) -> None:
        events.append(Path(f"/proc/self/fd/{descriptor}").readlink())
        fsync(descriptor)

    def noted_replace(source: Path, target: Path) -> None:
        assert (source / MANIFEST).exists()
        assert {source, *source.rglob("*")} <= set(events), "what is not synced may be empty after a power cut"
        events.append("replaced")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    write(store)
    assert {store.folder(0, 1).parent, store.root} <= set(events[events.index("replaced") :])


def test_an_error_that_a_disk_tells_once_is_not_overlooked(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel tells of a write that it lost at the first fsync after that, and forgets it."""
    fsync, errors = os.fsync, [OSError(errno.EIO, os.strerror(errno.EIO))]

    def fails_once(descriptor: int) -> None:
        if errors:
            raise errors.pop()
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fails_once)
    with pytest.raises(OSError, match="Input/output error"):
        write(store)
    assert store.kept() == {}


def test_deleting_what_is_not_there_does_nothing(store: CheckpointStore) -> None:
    store.delete(0, 1)
    assert store.kept() == {}


def test_a_delete_goes_on_where_a_killed_one_stopped(store: CheckpointStore) -> None:
    write(store)
    store.folder(0, 1).rename(store.folder(0, 1).with_name(".deleted-epoch-0001"))
    write(store)
    store.delete(0, 1)
    assert store.epochs(0) == [] and leftovers(store) == []


def test_a_sweep_leaves_what_was_committed(store: CheckpointStore) -> None:
    write(store, trial=0, epoch=1)
    store.stage(0, 2)
    store.stage(5, 1)
    store.sweep()
    assert store.kept() == {0: [1]} and leftovers(store) == [] and verify(store.folder(0, 1))


ENDLESS_WRITER = """
import sys
from pathlib import Path
from trainables.checkpoint import CheckpointStore
store = CheckpointStore(Path(sys.argv[1]))
for number in range(10**9):
    epoch = 1 + number % 7
    staging = store.stage(0, epoch)
    for name in "abc":
        (staging / name).write_bytes(bytes([number % 256]) * 300_000)
    store.commit(0, epoch, {})
    print(epoch, flush=True)
"""


def test_every_checkpoint_of_a_process_killed_with_sigkill_is_whole(store: CheckpointStore) -> None:
    for delay_s in (0.0, 0.004, 0.011):
        command = [sys.executable, "-c", ENDLESS_WRITER, str(store.root)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdout is not None
            for _ in range(9):  # past the first repeated epoch
                assert writer.stdout.readline()
            time.sleep(delay_s)
            writer.send_signal(signal.SIGKILL)
            assert writer.wait() == -signal.SIGKILL
        epochs = store.epochs(0)
        assert len(epochs) >= 6  # all but the one that was being replaced
        assert all(verify(store.folder(0, epoch)) for epoch in epochs)
    store.sweep()
    assert leftovers(store) == []
