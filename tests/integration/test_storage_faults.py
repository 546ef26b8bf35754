"""A disk that is full, or takes no writes for a time: the study waits with a word, and loses nothing but the epoch.

On a file system of its own, of 8 MB; a checkpoint of the toy takes 1 MB.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from program import Command, Program, opened, scores, wait_until
from toys import curve

from trainables.checkpoint import verify

pytestmark = pytest.mark.slow

MB = 1_000_000
EPOCHS = 4
CHANGES: dict[str, Any] = {
    "training": {"max_epochs": EPOCHS, "ballast_bytes": MB},
    "budget": {"trials": 2, "concurrent_trials": 1},
}


class SmallDisk:
    """A file system in memory, which can be filled and made read-only."""

    def __init__(self, place: Path) -> None:
        self.place = place
        place.mkdir()
        _mount("-t", "tmpfs", "-o", "size=8m", "tmpfs", str(place))

    def fill(self, free_bytes: int) -> None:
        found = os.statvfs(self.place)
        (self.place / "filler").write_bytes(bytes(found.f_bavail * found.f_frsize - free_bytes))

    def make_room(self) -> None:
        (self.place / "filler").unlink()

    def make_read_only(self) -> None:
        """By a second, read-only way to the same place: files that are open do not keep that from being."""
        _mount("--bind", str(self.place), str(self.place))
        _mount("-o", "remount,bind,ro", str(self.place))

    def make_writable(self) -> None:
        subprocess.run(["umount", "--lazy", str(self.place)], check=True)

    def close(self) -> None:
        while self.place.is_mount():
            subprocess.run(["umount", "--lazy", str(self.place)], check=True)


def _mount(*arguments: str) -> None:
    run = subprocess.run(["mount", *arguments], capture_output=True, text=True, check=False)
    if run.returncode != 0:
        pytest.skip(f"a file system can be mounted only by root: {run.stderr.strip()}")


@pytest.fixture
def program(tmp_path: Path) -> Iterator[Program]:
    with opened(tmp_path / "program") as found:
        yield found


@pytest.fixture
def disk(program: Program) -> Iterator[SmallDisk]:
    """Holds the program's storage."""
    found = SmallDisk(program.storage)
    try:
        yield found
    finally:
        found.close()


def hold(x: int, epoch: int) -> dict[str, Any]:
    return CHANGES | {"training": CHANGES["training"] | {"faults": [{"x": x, "epoch": epoch, "does": "hold"}]}}


def start_held(program: Program) -> Command:
    """A study that waits in the second trial's second epoch, after its first checkpoint."""
    command = program.start("run", program.spec("full", hold(1, 2)), "--json")
    program.wait_for_note("full", "hold", 1, 2)
    wait_until(lambda: program.json("status", "full")["trials"][1]["checkpoint"], 30, "the first checkpoint")
    return command


def check_halted(program: Program, error: Any, why: str) -> None:
    """The command has said why, and the study waits."""
    assert list(error) == ["error"]
    assert why in error["error"]["found"], error
    assert "tune-service resume full" in error["error"]["expected"]
    status = program.json("status", "full")
    assert status["state"] == "interrupted"
    assert [trial["state"] for trial in status["trials"]] == ["completed", "paused"]
    assert status["best"]["number"] == 0
    folders = list((program.storage / "full" / "checkpoints").glob("trial-*/epoch-*"))
    assert folders and all(verify(folder) for folder in folders)


def check_gone_on(program: Program) -> None:
    status = program.json("resume", "full")
    assert status["state"] == "completed"
    for trial in status["trials"]:
        assert (trial["state"], trial["reason"]) == ("completed", None)
        assert scores(trial) == curve(trial["params"]["x"], EPOCHS)


def test_a_full_disk_stops_the_study_until_there_is_room(program: Program, disk: SmallDisk) -> None:
    command = start_held(program)
    disk.fill(free_bytes=MB // 2)
    program.release("full")
    found = command.wait()
    assert found.code == 1
    check_halted(program, found.json, "No space left on device")
    assert "MB free at" in found.json["error"]["found"], "it was seen before anything was written"
    assert program.json("status", "full")["trials"][1]["checkpoint"]["epoch"] == 1

    again = program.run("resume", "full", "--json")
    assert again.code == 1, "there is still no room"
    check_halted(program, again.json, "No space left on device")

    disk.make_room()
    check_gone_on(program)


def test_a_disk_without_room_for_one_more_line_of_the_record_stops_it_too(program: Program, disk: SmallDisk) -> None:
    command = start_held(program)
    disk.fill(free_bytes=0)
    program.release("full")
    found = command.wait()
    assert found.code == 1
    check_halted(program, found.json, "No space left on device")
    disk.make_room()
    check_gone_on(program)


def test_a_storage_that_is_read_only_for_a_time_loses_nothing(program: Program, disk: SmallDisk) -> None:
    command = start_held(program)
    disk.make_read_only()
    program.release("full")
    found = command.wait()
    assert found.code == 1
    check_halted(program, found.json, "Read-only file system")
    refused = program.run("resume", "full", "--json")
    assert (refused.code, list(refused.json)) == (2, ["errors"])
    assert "can be written" in refused.out
    disk.make_writable()
    check_gone_on(program)


def test_a_study_does_not_begin_on_a_full_disk(program: Program, disk: SmallDisk) -> None:
    disk.fill(free_bytes=0)
    found = program.run("run", program.spec("full", CHANGES), "--json")
    assert found.code == 1
    assert "No space left on device" in found.out
    assert program.json("list") == {"studies": []}
    disk.make_room()
    status = program.json("run", program.spec("full", CHANGES))
    assert status["state"] == "completed"


# ---- a writer that stands still


def test_a_record_that_a_frozen_writer_holds_ends_the_study_with_that_one_s_number_and_resume_goes_on(
    program: Program,
) -> None:
    fault = {"x": 0, "epoch": 3, "does": "hold"}
    changes = CHANGES | {"training": {"max_epochs": EPOCHS, "faults": [fault]}, "search_space": {"x": {"choice": [0]}}}
    command = program.start("run", program.spec("held", changes | {"budget": {"trials": 1}}), "--json")
    program.wait_for_note("held", "hold", 0, epoch=3)
    lock = program.storage / "held" / "record.lock"
    with lock.open("r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # as a `stop` that is frozen in the midst of its request
        program.release("held")
        found = command.wait()
    assert found.code == 1
    assert found.json["error"]["found"].startswith(f"process {os.getpid()} has held {lock} for 30 s")
    status = program.json("resume", "held")
    assert (status["state"], scores(status["trials"][0])) == ("completed", curve(0, EPOCHS))
