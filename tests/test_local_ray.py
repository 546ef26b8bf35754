"""The scratch folder of a study's own Ray: gone with it, or with the next study where its owner was killed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from trainables.far import SCRATCH, held_folder
from tune_service.errors import StudyHaltedError
from tune_service.local_ray import (
    LOCK,
    _end_all,
    _end_processes_of,
    _is_of,
    _tend_guards,
    local_ray,
    scratch_folder,
)
from tune_service.prctl import adopt_orphans

OWNER = """
import os, signal, subprocess, sys, time
import tune_service.local_ray as local_ray
local_ray._scratch_root = lambda: sys.argv[1]
start_guard = local_ray._guard
if sys.argv[2] == "alone":  # its guard is killed with it
    def guard(scratch):
        guard = start_guard(scratch)
        guard.kill()
        return guard
    local_ray._guard = guard
with local_ray.scratch_folder() as scratch:
    (scratch / "session").mkdir()
    (scratch / "session" / "log").write_text("a line")
    # As Ray's processes do: one starts another, in a session of its own.
    loop = "while :; do (sleep 60 &) ; echo > $0/session/$RANDOM; sleep 0.01; done"
    subprocess.Popen(["bash", "-c", loop, str(scratch)], start_new_session=True)
    print(scratch, flush=True)
    time.sleep(60)
"""


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The temporary folder, with a name short enough for sockets."""
    monkeypatch.setattr("tune_service.local_ray._scratch_root", lambda: str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.delenv(SCRATCH, raising=False)
    return tmp_path


def killed_owner(root: Path, has_guard: bool = False) -> Path:
    """The scratch folder of a driver that was killed, and whose processes run on."""
    arguments = [sys.executable, "-c", OWNER, str(root), "guarded" if has_guard else "alone"]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        scratch = Path(owner.stdout.readline().strip())
        os.kill(owner.pid, signal.SIGKILL)
    return scratch


def processes_of(scratch: Path) -> list[psutil.Process]:
    return [each for each in psutil.process_iter() if _is_of(each, scratch)]


def test_a_scratch_folder_goes_with_its_study(root: Path) -> None:
    with scratch_folder() as scratch:
        assert [each.name for each in scratch.iterdir()] == [LOCK]
        (scratch / "tune").mkdir()
        (scratch / "tune" / "state").write_text("1")
        with scratch_folder() as other:
            assert scratch.exists() and other != scratch, "a living study's stays"
    assert list(root.iterdir()) == []


def test_what_a_killed_driver_left_is_ended_and_removed_at_once(root: Path) -> None:
    """Though this process is one that orphans become children of, as a session's or a container's init is."""
    adopt_orphans()
    left = killed_owner(root, has_guard=True)
    try:
        end = time.monotonic() + 60
        while (left.exists() or processes_of(left)) and time.monotonic() < end:
            time.sleep(0.05)
        assert not left.exists()
        assert processes_of(left) == []
    finally:
        _end_processes_of(left)


def guards(scratch: Path) -> list[psutil.Process]:
    living = [each for each in psutil.Process().children() if each.status() != psutil.STATUS_ZOMBIE]
    commands = [(each, " ".join(each.cmdline())) for each in living]
    return [each for each, command in commands if "clear_up" in command and str(scratch) in command]


def test_a_guard_that_is_killed_has_a_successor_and_one_that_is_frozen_goes_on() -> None:
    with scratch_folder() as scratch:
        (guard,) = guards(scratch)
        guard.kill()
        guard.wait()
        _tend_guards()
        (successor,) = guards(scratch)
        assert successor.pid != guard.pid
        successor.suspend()
        while successor.status() != psutil.STATUS_STOPPED:
            time.sleep(0.01)
        _tend_guards()
        assert guards(scratch) == [successor] and successor.status() != psutil.STATUS_STOPPED
    assert guards(scratch) == []


def test_a_ray_that_does_not_start_is_told_in_a_line(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(**options: Any) -> None:
        raise RuntimeError("Some lines\nabout nothing\nTimed out waiting for file\x07\n")

    monkeypatch.setattr("ray.init", fails)
    with pytest.raises(StudyHaltedError) as halted, scratch_folder() as scratch, local_ray(scratch, 1, 0, "toy", print):
        pass
    (problem,) = halted.value.problems
    assert (problem.place, problem.found) == ("toy", "Ray did not start: Timed out waiting for file\\x07")
    assert "tune-service resume toy" in problem.expected


ENDS = """
import sys, time
import tune_service.local_ray as local_ray
local_ray.prepare_environment(1)
with local_ray.scratch_folder() as scratch:
    print(scratch)
    with local_ray.local_ray(scratch, 1, 0, "ends", lambda why: print(why, flush=True)):
        next(each for each in local_ray._children() if each.name() == "gcs_server").suspend()
        began = time.monotonic()
    print(round(time.monotonic() - began), flush=True)
    print([each for each in local_ray._children() if each.status() != "zombie"])
"""


@pytest.mark.slow
def test_a_ray_whose_server_is_frozen_ends_all_the_same() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TMPDIR"}  # a short one for sockets
    run = subprocess.run([sys.executable, "-c", ENDS], capture_output=True, text=True, timeout=120, env=environment)
    assert run.returncode == 0, run.stderr
    scratch, took_s, left = run.stdout.split()
    assert int(took_s) < 25 and left == "[]"
    assert not Path(scratch).exists()


def test_what_a_killed_driver_left_is_ended_and_removed_by_the_next_study(root: Path) -> None:
    left = killed_owner(root)
    try:
        assert processes_of(left)
        with scratch_folder():
            assert not left.exists()
            assert processes_of(left) == []
    finally:
        _end_processes_of(left)


@pytest.mark.parametrize("of_others", ["a lock of theirs", "a pipe"])
def test_nothing_else_in_the_temporary_folder_is_touched(root: Path, of_others: str) -> None:
    """Others make folders of such names there, with a file of that name in them: uv's environments have one."""
    other = root / "tune-notes123"
    other.mkdir()
    (other / "thesis.txt").write_text("kept")
    (other / LOCK).touch() if of_others == "a lock of theirs" else os.mkfifo(other / LOCK)
    far = root / "far"
    far.mkdir()
    place, descriptor = held_folder(far, "tune-", LOCK)
    os.close(descriptor)
    (root / "tune-link1234").symlink_to(place)
    with scratch_folder():
        pass
    assert (other / "thesis.txt").read_text() == "kept"
    assert place.exists(), "nobody's, but in another folder"


def test_a_process_whose_number_another_one_had_before_is_ended_too(root: Path) -> None:
    """psutil, which remembers the other one, passes over it at its next look."""
    left = killed_owner(root)
    try:
        for process in processes_of(left)[1:]:
            process._ident = (process.pid, 0.0)
        with scratch_folder():
            assert processes_of(left) == []
    finally:
        _end_processes_of(left)


def test_a_process_that_one_look_passes_over_is_ended_too() -> None:
    """One that is just being started has no environment yet, or comes after the list of all was made."""
    looks = iter([False, True, False, False])
    with subprocess.Popen(["sleep", "60"]) as process:
        _end_all(lambda: [psutil.Process(process.pid)] if next(looks) else [])
        assert not psutil.pid_exists(process.pid)
    assert list(looks) == []


def test_a_removal_that_was_cut_off_is_gone_on_with(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that somebody writes meanwhile, a kill: the lock is there as long as anything is."""
    rmtree = shutil.rmtree

    def stumbles(path: Path, ignore_errors: bool) -> None:
        """Something has just come to `session`."""
        for each in path.iterdir() if path.name != "session" else ():
            if each.name != "session":
                each.unlink()

    with scratch_folder() as scratch:
        (scratch / "session").mkdir()
        monkeypatch.setattr(shutil, "rmtree", stumbles)
    assert sorted(each.name for each in scratch.iterdir()) == [LOCK, "session"]
    monkeypatch.setattr(shutil, "rmtree", rmtree)
    with scratch_folder():
        assert not scratch.exists()
    assert SCRATCH not in os.environ
