"""Where studies lie: no name leads out of the folder, none is taken twice, and a study has one driver."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from trainables.errors import UserError
from tune_service.errors import StorageError, StudyExistsError, StudyNotFoundError, StudyRunningError, exit_code
from tune_service.record import Record
from tune_service.storage import Storage, StudyFolder
from tune_service.storages import open_storage
from tune_service.study import delete_study


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(tmp_path / "studies")


def create(storage: Storage, name: str) -> StudyFolder:
    """A study as far as a storage can tell: a folder with a record in it."""
    folder = storage.create(name)
    folder.journal.write_text("{}\n")
    return folder


def half_made(storage: Storage, name: str) -> StudyFolder:
    """What SIGKILL leaves of a study that has no record yet."""
    folder = storage.create(name)
    folder.driver_lock.write_text("1234 on node 0123456789abcdef\n")
    return folder


def test_a_storage_that_does_not_exist_yet_has_no_studies(storage: Storage) -> None:
    assert storage.studies() == []
    with pytest.raises(StudyNotFoundError, match="no study yet"):
        storage.study("toy")
    assert not storage.root.exists()


def test_studies_come_by_name_and_a_folder_without_a_record_is_none(storage: Storage) -> None:
    for name in ("b", "a"):
        create(storage, name)
    storage.create("in-database").pointer.write_text("{}\n")
    storage.create("empty")
    (storage.root / "file").write_text("")
    assert [study.name for study in storage.studies()] == ["a", "b", "in-database"]
    assert storage.study("a").path == storage.root / "a"
    with pytest.raises(StudyNotFoundError, match="one of: a, b, in-database"):
        storage.study("empty")


@pytest.mark.parametrize(
    "name", ["..", ".", "", "../outer", "inner/toy", "{root}/toy", "toy/", "toy/.", "../inner/toy"]
)
def test_a_name_that_is_no_study_of_the_folder_is_not_found_whatever_lies_there(tmp_path: Path, name: str) -> None:
    create(Storage(tmp_path), "outer")
    create(Storage(tmp_path / "outer"), "toy")
    create(Storage(tmp_path / "outer" / "inner"), "toy")
    storage = Storage(tmp_path / "outer" / "inner")
    (storage.root / "record.journal").write_text("{}\n")
    with pytest.raises(StudyNotFoundError):
        storage.study(name.format(root=storage.root))
    assert storage.study("toy").name == "toy"


def test_a_taken_name_is_refused_and_the_refusal_tells_how_to_go_on(storage: Storage) -> None:
    create(storage, "toy")
    with pytest.raises(StudyExistsError) as refusal:
        storage.create("toy")
    assert exit_code(refusal.value) == 2
    assert "tune-service resume toy" in refusal.value.problems[0].expected


def test_a_name_that_another_process_takes_at_this_moment_is_taken(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    mkdir = Path.mkdir

    def too_late(self: Path, parents: bool = False) -> None:
        for each in (self.parent, self):
            mkdir(each, exist_ok=True)
        raise FileExistsError(self)

    monkeypatch.setattr(Path, "mkdir", too_late)
    with pytest.raises(StudyExistsError):
        storage.create("toy")


def test_a_folder_of_someone_elses_is_a_taken_name_too(storage: Storage) -> None:
    (storage.root / "toy").mkdir(parents=True)
    with pytest.raises(StudyExistsError):
        storage.check_free("toy")


def test_a_name_is_free_again_when_its_study_was_killed_before_it_had_a_record(storage: Storage) -> None:
    folder = storage.create("toy")
    with driven(folder) as process:
        with pytest.raises(StudyExistsError):
            storage.create("toy")
        process.kill()
        process.wait()
    for name in ("record.lock", "record.new"):
        (folder.path / name).write_text("")
    (folder.path / "shipped").mkdir()
    storage.check_free("toy")
    assert folder.driver_lock.exists(), "who looks removes nothing"
    assert list(storage.create("toy").path.iterdir()) == []
    assert [path.name for path in storage.root.iterdir()] == ["toy"]


@pytest.mark.parametrize("name", ["record.journal", "record.json", "checkpoints", "logs", "thesis.txt"])
def test_a_folder_that_holds_more_than_a_beginning_is_never_taken(storage: Storage, name: str) -> None:
    folder = half_made(storage, "toy")
    (folder.path / name).write_text("years of work")
    with pytest.raises(StudyExistsError):
        storage.create("toy")
    assert not folder.give_way(), "it came after the first look"
    assert (folder.path / name).read_text() == "years of work"


def test_a_study_that_is_just_being_made_is_in_nobodys_reach(storage: Storage, tmp_path: Path) -> None:
    folder = storage.create("toy")
    folder.driver_lock.write_text("")  # its maker is about to lock it
    half_made(Storage(tmp_path), "other")
    (storage.root / "link").symlink_to(tmp_path / "other")
    for name in ("toy", "link"):
        with pytest.raises(StudyExistsError):
            storage.create(name)
    assert not folder.give_way()


def test_of_two_that_make_a_half_made_study_anew_one_gets_it(storage: Storage) -> None:
    command = [sys.executable, "-c", MAKE, str(storage.root)]
    makers = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    try:
        for number in range(20):
            half_made(storage, f"toy-{number}")
            for maker in makers:
                assert maker.stdin is not None
                print(f"toy-{number}", file=maker.stdin, flush=True)
            answers = [maker.stdout.readline().strip() for maker in makers if maker.stdout is not None]
            assert sorted(answers) == ["StudyExistsError", "made"]
            assert storage.study(f"toy-{number}").driver_is_alive()
    finally:
        for maker in makers:
            maker.kill()
            maker.communicate()


def test_looking_whether_a_storage_can_be_written_writes_nothing(storage: Storage) -> None:
    storage.check_writable()
    assert not storage.root.exists()
    storage.check_free("toy")
    assert not storage.root.exists()


def test_a_storage_below_a_file_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    storage = Storage(tmp_path / "file" / "studies")
    with pytest.raises(StorageError, match=f"is a folder that can be written; found {tmp_path / 'file'} is a file"):
        storage.check_writable()
    with pytest.raises(StorageError):
        storage.create("toy")


def test_a_storage_below_the_users_home_is_the_same_for_every_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert open_storage("~/studies").where == str(tmp_path / "studies")
    assert Storage(Path("~/studies")).root == tmp_path / "studies"
    assert Storage(tmp_path / "~").root == tmp_path / "~"
    with pytest.raises(UserError, match="--storage: begins with ~ only where that is a home folder"):
        open_storage("~nobody-here/studies")


def test_a_storage_whose_path_is_not_utf_8_is_refused(tmp_path: Path) -> None:
    storage = Storage(tmp_path / os.fsdecode(b"st\xff"))
    with pytest.raises(StorageError, match=r"can be written; found .*/st\\xff is not UTF-8"):
        storage.check_writable()
    Storage(tmp_path / "stüdies").check_writable()


def test_a_relative_storage_stays_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    storage = Storage(Path("studies"))
    create(storage, "toy")
    monkeypatch.chdir("/")
    assert storage.study("toy").path == tmp_path / "studies" / "toy"


def test_a_removed_study_is_gone_whole_and_says_how_large_it_was(storage: Storage) -> None:
    folder = create(storage, "toy")
    folder.logs.mkdir()
    (folder.logs / "trial-00000-rank-0.log").write_bytes(b"x" * 97)
    assert folder.remove() == 100
    assert not folder.path.exists() and storage.studies() == []


def test_a_study_that_is_removed_in_part_is_no_study_any_more_and_its_name_is_free(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = create(storage, "toy")
    monkeypatch.setattr("tune_service.storage.shutil.rmtree", lambda path, ignore_errors=False: ignore_errors or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        folder.remove()
    assert storage.studies() == []
    assert not storage.check_free("toy").path.exists()


def test_a_deletion_that_was_cut_off_is_gone_on_with(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = create(storage, "toy")
    (folder.path / "rest").write_bytes(b"x" * 97)
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr("tune_service.storage.shutil.rmtree", lambda path: 1 / 0)
        folder.remove()
    assert storage.studies() == []
    with pytest.raises(StorageError, match="toy: is a study that is there whole; found it is being deleted"):
        Record.open(storage.study("toy"))
    assert delete_study("toy", storage) == 100 + len(f"{os.getpid()} on {os.uname().nodename} {'x' * 16}\n")
    assert list(storage.root.iterdir()) == []
    with pytest.raises(StudyNotFoundError):
        storage.study("toy")


def test_a_new_study_removes_what_is_left_of_the_one_that_had_its_name(storage: Storage) -> None:
    create(storage, "toy").path.rename(storage.root / ".deleted-toy~1")
    create(storage, "other").path.rename(storage.root / ".deleted-other~1")
    assert list(storage.create("toy").path.iterdir()) == []
    assert sorted(path.name for path in storage.root.iterdir()) == [".deleted-other~1", "toy"]


def test_a_new_study_leaves_what_another_process_is_just_deleting(storage: Storage) -> None:
    create(storage, "toy").path.rename(storage.root / ".deleted-toy~1")
    with StudyFolder(storage.root / ".deleted-toy~1", "toy").driving():
        storage.create("toy")
        assert sorted(path.name for path in storage.root.iterdir()) == [".deleted-toy~1", "toy"]


def test_the_lock_of_a_study_that_is_removed_goes_after_its_checkpoints(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, rmtree, seen = create(storage, "toy"), shutil.rmtree, []
    (folder.path / "checkpoints" / "trial-00000").mkdir(parents=True)
    monkeypatch.setattr("tune_service.storage.shutil.rmtree", lambda path: (seen.append(path.name), rmtree(path)))
    folder.remove()
    assert "checkpoints" in seen[:-1] and seen[-1].startswith(".deleted-toy~")


def test_a_removed_study_takes_the_checkpoints_along_that_lie_on_another_disk(storage: Storage, tmp_path: Path) -> None:
    folder, disk = create(storage, "toy"), tmp_path / "disk"
    (disk / "trial-00000" / "epoch-0001").mkdir(parents=True)
    (disk / "trial-00000" / "epoch-0001" / "model").write_bytes(b"x" * 97)
    for name in ("trial-notes", "thesis"):
        (disk / name).write_text("someone else's")
    (disk / "trial-00001").symlink_to(tmp_path)
    folder.checkpoints.root.symlink_to(disk)
    assert folder.remove() == 100
    assert sorted(path.name for path in disk.iterdir()) == ["thesis", "trial-00001", "trial-notes"]
    assert list(storage.root.iterdir()) == []


def test_a_study_that_is_a_link_is_not_deleted_and_the_way_is_told(storage: Storage, tmp_path: Path) -> None:
    create(Storage(tmp_path / "disk"), "large")
    storage.root.mkdir()
    (storage.root / "toy").symlink_to(tmp_path / "disk" / "large")
    with pytest.raises(StorageError, match=f"tune-service delete large --storage {tmp_path}/disk`, then `rm "):
        storage.study("toy").remove()
    assert storage.study("toy").journal.exists()


def test_a_link_in_the_place_of_a_cut_off_deletion_is_not_followed(storage: Storage, tmp_path: Path) -> None:
    create(Storage(tmp_path), "other").logs.mkdir()
    storage.root.mkdir()
    (storage.root / ".deleted-toy~1").symlink_to(tmp_path / "other")
    storage.create("toy")
    with pytest.raises(StudyNotFoundError):
        storage.study("toy")
    assert Storage(tmp_path).study("other").logs.is_dir()


def test_logs_come_by_trial_and_rank(storage: Storage) -> None:
    folder = create(storage, "toy")
    folder.logs.mkdir()
    for name in ("trial-00010-rank-0.log", "trial-00001-rank-1.log", "trial-00001-rank-0.log"):
        (folder.logs / name).write_text("")
    names = [path.name for path in folder.rank_logs()]
    assert names == ["trial-00001-rank-0.log", "trial-00001-rank-1.log", "trial-00010-rank-0.log"]
    assert [path.name for path in folder.rank_logs(1)] == names[:2]
    assert folder.rank_logs(7) == []


# ---- the lease

MAKE = """
import sys
from contextlib import ExitStack
from pathlib import Path
from tune_service.errors import UserError
from tune_service.storage import Storage
with ExitStack() as driving:
    for line in sys.stdin:
        try:
            folder = Storage(Path(sys.argv[1])).create(line.strip())
            driving.enter_context(folder.driving())
            folder.journal.write_text("{}\\n")
            print("made", flush=True)
        except UserError as error:
            print(type(error).__name__, flush=True)
"""
DRIVE = """
import sys, time
from pathlib import Path
from tune_service.storage import StudyFolder
with StudyFolder(Path(sys.argv[1])).driving():
    print("driving", flush=True)
    time.sleep(600)
"""


@contextmanager
def driven(folder: StudyFolder) -> Iterator[subprocess.Popen[str]]:
    """Another process that drives the study."""
    command = [sys.executable, "-c", DRIVE, str(folder.path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == "driving\n"
            yield process
        finally:
            process.kill()


def test_a_second_driver_is_refused_and_told_which_process_is_the_first(storage: Storage) -> None:
    folder = create(storage, "toy")
    with driven(folder) as process:
        assert folder.driver_is_alive()
        with pytest.raises(StudyRunningError, match=f"process {process.pid} on ") as refusal, folder.driving():
            pass
        assert isinstance(refusal.value, UserError) and exit_code(refusal.value) == 2
        assert folder.driver_is_alive()


def test_the_lease_of_a_driver_killed_with_sigkill_is_free_at_once(storage: Storage) -> None:
    folder = create(storage, "toy")
    with driven(folder) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not folder.driver_is_alive()
        with folder.driver_lock.open("a") as file:
            file.write("the rest of a longer name\n")
        started = time.monotonic()
        with folder.driving():
            assert folder.driver_is_alive()
            pid, on, node, token = folder.driver_lock.read_text().split()  # and nothing of what was there before
        assert (pid, on, node, len(token)) == (str(os.getpid()), "on", os.uname().nodename, 16)
        assert time.monotonic() - started < 0.5
    assert not folder.driver_is_alive()


def test_one_process_cannot_drive_a_study_twice(storage: Storage) -> None:
    folder = create(storage, "toy")
    with folder.driving(), pytest.raises(StudyRunningError), folder.driving():
        pass


def test_the_lease_is_free_after_an_error(storage: Storage) -> None:
    folder = create(storage, "toy")
    with pytest.raises(KeyboardInterrupt), folder.driving():
        raise KeyboardInterrupt
    assert not folder.driver_is_alive()


def test_whoever_only_looks_is_in_no_drivers_way(storage: Storage) -> None:
    folder = create(storage, "toy")
    assert not folder.driver_is_alive()  # and makes no file
    assert not folder.driver_lock.exists()
    with folder.driving():
        pass
    with folder.driver_lock.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_SH)  # as `status` does, for a moment
        threading.Timer(0.3, lambda: fcntl.flock(file, fcntl.LOCK_UN)).start()
        with folder.driving():
            assert folder.driver_is_alive()


def test_a_url_is_never_taken_for_a_folder() -> None:
    with pytest.raises(StorageError, match="is written into a folder"):
        Storage(Path("s3://my-studies/studies"))


def test_a_url_is_no_folder_of_the_heads_either(monkeypatch: pytest.MonkeyPatch) -> None:
    """The head puts what is not absolute under its home folder."""
    from tune_service.head import storage_of

    monkeypatch.setenv("TUNE_SERVICE_STORAGE", "s3://my-bucket/studies")
    assert storage_of({"storage": None}).where == "s3://my-bucket/studies"
