"""One driver at a time: refused beside a living one, at once after a dead one, in the place of a silent one.

The other driver is a process of its own, which writes to the record when it is told to.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from trainables.checkpoint import CheckpointStore
from trainables.errors import CheckpointError
from tune_service import lease
from tune_service.errors import LeaseLostError, StorageError, StudyRunningError, exit_code
from tune_service.record import Record
from tune_service.storage import Storage, StudyFolder

SPEC = {
    "objective": {"metric": "score", "mode": "max"},
    "search_space": {},
    "budget": {"trials": 4},
}
OTHER = """
import os, sys
from pathlib import Path
from tune_service.record import Record
from tune_service.storage import StudyFolder
folder = StudyFolder(Path(sys.argv[1]))
with folder.driving() as lease, lease.beating(print):
    record = Record.open(folder, lease=lease)
    print("driving", flush=True)
    for line in sys.stdin:
        try:
            record.set_budget(int(line))
            print("written", flush=True)
        except Exception as error:
            print(type(error).__name__, flush=True)
"""


@pytest.fixture
def folder(tmp_path: Path) -> StudyFolder:
    from optuna.samplers import RandomSampler

    found = Storage(tmp_path).create("toy")
    Record.create(found, SPEC, RandomSampler(seed=0))
    return found


@contextmanager
def other_driver(folder: StudyFolder) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", OTHER, str(folder.path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert said(process) == "driving"
            yield process
        finally:
            process.kill()


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def write(process: subprocess.Popen[str], budget: int) -> str:
    assert process.stdin is not None
    print(budget, file=process.stdin, flush=True)
    return said(process)


def make_silent(folder: StudyFolder, process: subprocess.Popen[str]) -> None:
    """Stops the holder, and sets its last beat back as far as a long wait would."""
    process.send_signal(signal.SIGSTOP)
    while psutil.Process(process.pid).status() != psutil.STATUS_STOPPED:  # a beat of it may be under way
        time.sleep(0.01)
    then = time.time() - lease.SILENT_S - 1
    os.utime(folder.driver_lock, (then, then))


def test_a_study_of_another_user_is_told_without_a_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(path: Path, *mode: int) -> int:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    folder = Storage(tmp_path).create("toy")
    monkeypatch.setattr(lease.os, "open", refused)  # a test that runs as root may write everything
    with pytest.raises(StorageError, match=r"driver.lock: is a file that this user may write; found Permission denied"):
        folder.driving().__enter__()


def test_a_living_driver_keeps_others_out_however_long_it_lives(
    folder: StudyFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "SILENT_S", 2.5)
    with other_driver(folder) as process:
        time.sleep(4)
        assert folder.driver_is_alive()
        before = sorted(folder.path.iterdir())
        with pytest.raises(StudyRunningError, match=f"process {process.pid} on ") as refusal, folder.driving():
            pass
        assert exit_code(refusal.value) == 2
        assert sorted(folder.path.iterdir()) == before, "whoever was refused leaves nothing"
        assert write(process, 7) == "written"


def test_a_driver_that_was_silent_for_a_moment_goes_on(folder: StudyFolder) -> None:
    with other_driver(folder) as process:
        make_silent(folder, process)
        process.send_signal(signal.SIGCONT)
        assert write(process, 7) == "written"
        time.sleep(2.5)
        assert folder.driver_is_alive(), "it beats again"
        assert Record.open(folder).budget_trials == 7


def test_a_driver_that_slept_with_its_machine_is_alive_when_it_wakes(folder: StudyFolder) -> None:
    """`watch` and `stop` would end at once, when its next beat is a second away."""
    with other_driver(folder):
        os.utime(folder.driver_lock, (0, 0))
        assert folder.driver_is_alive()


def test_a_lock_file_that_was_replaced_while_it_was_taken_is_taken_anew(
    folder: StudyFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    take, taken = lease._take, []

    def late(path: Path, *others: Any) -> lease.FileLease:
        taken.append(take(path, *others))
        if len(taken) == 1:
            path.unlink()
        return taken[-1]

    monkeypatch.setattr(lease, "_take", late)
    with folder.driving() as own:
        assert len(taken) == 2 and not own.lost


def test_a_disk_that_is_away_for_a_moment_ends_no_beats(folder: StudyFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "BEAT_S", 0.05)
    touch, errors = lease.FileLease._touch, [OSError(errno.EIO, os.strerror(errno.EIO))]

    def fails_once(own: lease.FileLease) -> None:
        if errors:
            raise errors.pop()
        touch(own)

    monkeypatch.setattr(lease.FileLease, "_touch", fails_once)
    with folder.driving() as own, own.beating(pytest.fail):
        os.utime(folder.driver_lock, (0, 0))
        end = time.monotonic() + 10
        while folder.driver_lock.stat().st_mtime == 0 and time.monotonic() < end:
            time.sleep(0.01)
        assert not errors and folder.driver_lock.stat().st_mtime > 0


def test_a_silent_driver_is_taken_over_only_when_its_write_is_over(
    folder: StudyFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "WRITE_PATIENCE_S", 0.5)
    with other_driver(folder) as process:
        make_silent(folder, process)
        before = folder.driver_lock.read_text()
        with (
            lease.locked(folder.journal_lock),
            pytest.raises(StorageError, match="one writer at a time"),
            folder.driving(),
        ):
            pass
        assert folder.driver_lock.read_text() == before
        with folder.driving() as own:
            assert not own.lost


def test_whoever_holds_up_the_writes_of_a_record_is_named(folder: StudyFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "WRITE_PATIENCE_S", 0.2)
    holds = (
        "import fcntl, sys; file = open(sys.argv[1], 'a'); fcntl.flock(file, fcntl.LOCK_EX); print(); sys.stdin.read()"
    )
    command = [sys.executable, "-c", holds, str(folder.journal_lock)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None and holder.stdin is not None
        holder.stdout.readline()
        with pytest.raises(StorageError) as refusal, lease.locked(folder.journal_lock):
            pass
        holder.stdin.close()
    (problem,) = refusal.value.problems
    assert problem.found.startswith(f"process {holder.pid} has held {folder.journal_lock}")
    assert problem.expected == f"`kill -CONT`, or `kill -9`, of process {holder.pid}"


def test_a_main_loop_hears_at_its_next_round_that_its_study_was_taken_over(folder: StudyFolder) -> None:
    with folder.driving() as own:
        own.sign_of_life()
        folder.driver_lock.write_text("1 on another-machine 0123456789abcdef\n")
        with pytest.raises(LeaseLostError):
            own.sign_of_life()


@pytest.mark.timeout(30)
def test_nothing_of_a_longer_name_of_the_holder_before_is_left(folder: StudyFolder) -> None:
    folder.driver_lock.write_text("4194304 on " + "a-long-name-" * 20 + " 0123456789abcdef\n")
    with folder.driving() as own:
        assert not own.lost
        assert folder.driver_lock.read_text().count("\n") == 1


def test_a_driver_whose_whole_process_stood_still_is_not_stuck(
    folder: StudyFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "BEAT_S", 0.05)
    monotonic, slept_s, calls = time.monotonic, [0.0], list[str]()
    monkeypatch.setattr(lease.time, "monotonic", lambda: monotonic() + slept_s[0])
    with folder.driving() as own, own.beating(calls.append):
        own.sign_of_life()
        os.utime(folder.driver_lock, (0, 0))
        slept_s[0] = 10 * lease.STUCK_S
        end = monotonic() + 10
        while folder.driver_lock.stat().st_mtime == 0 and not calls and monotonic() < end:
            time.sleep(0.01)
        assert calls == [] and folder.driver_lock.stat().st_mtime > 0


def test_what_a_killed_taker_left_is_in_nobodys_way(folder: StudyFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """In containers two processes often have one number."""
    replace = Path.replace

    def killed(self: Path, target: Path) -> Path:
        shutil.copy(self, f"{self}.kept")
        raise KeyboardInterrupt

    with other_driver(folder) as process:
        make_silent(folder, process)
        monkeypatch.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt), folder.driving(print):
            pass
        monkeypatch.setattr(Path, "replace", replace)
        (kept,) = folder.path.glob(".driver.lock.*.kept")
        kept.rename(str(kept).removesuffix(".kept"))  # what SIGKILL would have left
        with folder.driving(print) as own:
            assert not own.lost


def test_a_silent_driver_is_taken_over_and_writes_nothing_more_when_it_wakes_up(folder: StudyFolder) -> None:
    told: list[str] = []
    with other_driver(folder) as process:
        assert write(process, 7) == "written"
        make_silent(folder, process)
        assert not folder.driver_is_alive()
        with folder.driving(told.append) as own:
            (line,) = told
            holder = re.escape(f"process {process.pid} on {os.uname().nodename}")
            assert re.fullmatch(holder + r" has been silent for \d\d s: taking the study over", line)
            record = Record.open(folder, lease=own)
            record.set_budget(8)
            process.send_signal(signal.SIGCONT)
            assert write(process, 9) == "LeaseLostError"
            assert write(process, 9) == "LeaseLostError"
            time.sleep(2.5)  # its beats go to a file that nobody looks at
            assert folder.driver_is_alive()
            assert Record.open(folder).budget_trials == 8
            record.set_budget(10)
        assert not folder.driver_is_alive()
        assert write(process, 9) == "LeaseLostError", "also when nobody drives"
    assert Record.open(folder).budget_trials == 10


def test_a_clock_that_was_set_back_lengthens_no_silence(folder: StudyFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "SILENT_S", 2.5)
    told: list[str] = []
    in_an_hour = time.time() + 3600
    with other_driver(folder) as process:
        os.utime(folder.driver_lock, (in_an_hour, in_an_hour))
        assert folder.driver_is_alive()
        os.utime(folder.driver_lock, (in_an_hour, in_an_hour))
        with pytest.raises(StudyRunningError, match=f"process {process.pid} on "), folder.driving():
            pass
        process.send_signal(signal.SIGSTOP)
        os.utime(folder.driver_lock, (in_an_hour, in_an_hour))
        assert not folder.driver_is_alive()
        started = time.monotonic()
        with folder.driving(told.append) as own:
            assert not own.lost
        took_s = time.monotonic() - started
        assert 2.5 < took_s < 6
    (line,) = told
    silent = re.search(r" has been silent for (\d+) s: taking the study over$", line)
    assert silent and 3 <= int(silent[1]) <= round(took_s)


@pytest.mark.parametrize("how", ["silent", "dead"])
def test_a_trial_of_a_driver_that_lost_its_lease_commits_no_checkpoint(folder: StudyFolder, how: str) -> None:
    with other_driver(folder) as process:
        identity = (str(folder.driver_lock), folder.driver_lock.read_text().split()[-1])
        store = CheckpointStore(folder.checkpoints.root, lease=identity)
        store.check_room(0)
        store.stage(0, 1)
        store.commit(0, 1, {})
        store.stage(0, 2)
        if how == "silent":
            make_silent(folder, process)
        else:
            process.kill()
            process.wait()
        with folder.driving() as own:
            new = CheckpointStore(folder.checkpoints.root, lease=own.identity)
            (new.stage(0, 2) / "half").write_text("of a checkpoint")
            for late in (lambda: store.commit(0, 2, {}), lambda: store.check_room(0)):
                with pytest.raises(CheckpointError, match="another driver has taken the study over"):
                    late()
            store.discard(0, 2)
            new.commit(0, 2, {})
    assert store.kept() == {0: [1, 2]}, "the new driver's, which the old one's trial left alone"


def test_a_process_that_was_stopped_in_the_midst_of_a_write_is_named_after_a_time(
    folder: StudyFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "WRITE_PATIENCE_S", 0.5)
    with lease.locked(folder.journal_lock), pytest.raises(StorageError, match=r"stopped in the midst of a write"):
        Record.open(folder).set_budget(9)
    Record.open(folder).set_budget(10)


def test_of_two_that_want_a_silent_drivers_place_one_gets_it(folder: StudyFolder) -> None:
    with other_driver(folder) as process:
        make_silent(folder, process)
        first = subprocess.Popen([sys.executable, "-c", OTHER, str(folder.path)], stdin=subprocess.PIPE, stdout=-1)
        second = subprocess.Popen([sys.executable, "-c", OTHER, str(folder.path)], stdin=subprocess.PIPE, stdout=-1)
        try:
            end = time.monotonic() + 30
            while first.poll() is None and second.poll() is None and time.monotonic() < end:
                time.sleep(0.1)
            time.sleep(2)
            states = [each.poll() for each in (first, second)]
            assert sorted(state is None for state in states) == [False, True], states
        finally:
            for each in (first, second):
                each.kill()
                each.communicate()


def test_a_main_loop_that_is_stuck_ends_the_beats_and_what_it_waits_for(
    folder: StudyFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "BEAT_S", 0.4)
    monkeypatch.setattr(lease, "STUCK_S", 1.5)
    calls: list[str] = []
    with folder.driving() as own, own.beating(calls.append):
        time.sleep(2.0)
        assert calls == [], "its start may take longer"
        for _ in range(20):
            time.sleep(0.1)
            own.sign_of_life()
        assert calls == []
        end = time.monotonic() + 60
        while not calls and time.monotonic() < end:
            time.sleep(0.1)
        last_beat = folder.driver_lock.stat().st_mtime
        assert calls == ["the driver has been stuck for 2 s"]
        time.sleep(1.0)
        assert folder.driver_lock.stat().st_mtime == last_beat
        own.check()


def test_the_lease_of_a_study_that_is_deleted_is_lost(folder: StudyFolder) -> None:
    with folder.driving() as own:
        record = Record.open(folder, lease=own)
        folder.path.rename(folder.path.with_name("gone"))
        with pytest.raises((LeaseLostError, FileNotFoundError)):
            record.set_budget(3)
    assert not folder.path.exists()
