"""Checkpoints in a bucket: there with their manifest, and not before."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path

import pytest
from bucket_double import keep_buckets_in
from pyarrow.fs import FileInfo

from trainables import bucket_checkpoints
from trainables.bucket import Bucket
from trainables.bucket_checkpoints import BucketCheckpoints, open_store
from trainables.bucket_logs import TrialLogs
from trainables.checkpoint import CheckpointStore, Manifest
from trainables.errors import BucketError, CheckpointBudgetError, CheckpointError, DamagedCheckpointError, Problem
from trainables.stores import GIB

URL = "s3://lab/toy/checkpoints"


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> BucketCheckpoints:
    keep_buckets_in(tmp_path / "store", monkeypatch)
    monkeypatch.setattr(bucket_checkpoints, "REMEMBERED_S", 0.0)
    return BucketCheckpoints(Bucket.open(URL))


def write(store: BucketCheckpoints, trial: int = 0, epoch: int = 1, text: str = "hello") -> Manifest:
    folder = store.stage(trial, epoch)
    (folder / "model").mkdir()
    (folder / "model" / "weights").write_text(text)
    (folder / "state").write_text("7")
    return store.commit(trial, epoch, {"score": 0.5})


def objects() -> list[str]:
    return sorted(Bucket.open(URL).objects())


def test_the_place_says_which_store_it_is(store: BucketCheckpoints, tmp_path: Path) -> None:
    assert isinstance(open_store(URL), BucketCheckpoints)
    assert isinstance(open_store(str(tmp_path)), CheckpointStore)
    assert open_store(f"{URL}?region=eu-west-1").where == f"{URL}?region=eu-west-1"


def test_a_checkpoint_is_its_files_and_a_manifest_that_names_them(store: BucketCheckpoints) -> None:
    manifest = write(store, 3, 2)
    assert manifest.files["model/weights"][0] == 5 and manifest.num_bytes == 6
    assert store.kept() == {3: [2]} and store.epochs(3) == [2] and store.epochs(4) == []
    assert store.num_bytes(3, 2) == store.total_bytes() == 6
    names = objects()
    assert len(names) == 3
    assert names[0].startswith("manifests/00003-0002-6-")
    assert [name.partition("/")[2] for name in names[1:]] == ["model/weights", "state"]
    assert store.path(3, 2) == f"{URL}/{names[1].removesuffix('/model/weights')}"
    assert store.is_whole(3, 2, deep=True)
    assert open_store(URL).kept() == {3: [2]}


def test_a_trial_goes_on_from_no_checkpoint_that_holds_the_model_alone(store: BucketCheckpoints) -> None:
    write(store, 0, 1)
    (store.stage(0, 2) / "model").write_text("hello")
    store.commit(0, 2, {}, resumable=False)
    assert store.epochs(0) == [1, 2] and store.is_whole(0, 2, deep=True)
    assert [store.resumable(0, epoch) for epoch in (1, 2, 3)] == [True, False, False]
    latest = store.latest(0)
    assert latest is not None and latest.epoch == 1 and (store.local(0, 1) / "state").read_text() == "7"


def test_what_has_no_manifest_is_no_checkpoint_and_is_swept(
    store: BucketCheckpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A writer that is killed before the manifest leaves its upload."""
    write(store, 0, 1)
    whole, put = objects(), Bucket.put

    def killed(self: Bucket, name: str, data: bytes) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Bucket, "put", killed)
    with pytest.raises(KeyboardInterrupt):
        write(store, 0, 2)
    monkeypatch.setattr(Bucket, "put", put)
    assert len(objects()) == len(whole) + 2
    assert store.kept() == {0: [1]} and store.epochs(0) == [1]
    BucketCheckpoints(Bucket.open(URL)).sweep()
    assert objects() == whole


def test_the_next_writer_of_the_trial_removes_an_upload_that_was_left_and_no_other_trials(
    store: BucketCheckpoints,
) -> None:
    bucket = Bucket.open(URL)
    bucket.put("trial-00000-epoch-0002-dead/state", b"7")
    bucket.put("trial-00001-epoch-0002-live/state", b"7")
    write(store, 0, 3)
    names = objects()
    assert not any("dead" in name for name in names)
    assert any("live" in name for name in names)


def test_an_epoch_that_is_repeated_takes_the_place_of_the_first(store: BucketCheckpoints, tmp_path: Path) -> None:
    write(store, 0, 1, "first")
    write(store, 0, 1, "second")
    assert len(objects()) == 3
    store.copy(0, 1, tmp_path / "out", lambda path: True)
    assert (tmp_path / "out/model/weights").read_text() == "second"


def of_generation(number: int) -> BucketCheckpoints:
    """Of a driver whose lease nobody looks at: as between the look and the manifest."""
    store = BucketCheckpoints(Bucket.open(URL), lease=("unused", f"{number:06d}-token.json"))
    store._holds_lease = lambda: True  # type: ignore[method-assign]
    return store


def test_a_late_manifest_of_an_earlier_driver_takes_no_place_and_is_swept(
    store: BucketCheckpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put, late = Bucket.put, ExitStack()

    def asleep(self: Bucket, name: str, data: bytes) -> None:
        late.callback(put, self, name, data)

    with monkeypatch.context() as patch:
        patch.setattr(Bucket, "put", asleep)
        write(of_generation(1), 0, 1, "early")
    new = of_generation(2)
    new.sweep()
    write(new, 0, 1, "whole")
    whole = objects()
    late.close()
    assert len(objects()) == len(whole) + 1
    again = of_generation(3)
    assert again.latest(0) is not None and (again.local(0, 1) / "model/weights").read_text() == "whole"
    again.sweep()
    assert objects() == whole and again.kept() == {0: [1]}


def test_nobody_goes_on_from_a_late_manifest_whose_files_were_swept(
    store: BucketCheckpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the checkpoint before it, which is whole, would be one that nothing needs any more."""
    put, late = Bucket.put, ExitStack()

    def asleep(self: Bucket, name: str, data: bytes) -> None:
        late.callback(put, self, name, data)

    write(of_generation(1), 0, 3)
    with monkeypatch.context() as patch:
        patch.setattr(Bucket, "put", asleep)
        write(of_generation(1), 0, 4)
    new = of_generation(2)
    new.sweep()
    late.close()
    assert new.epochs(0) == [3, 4]
    assert (new.resumable(0, 3), new.resumable(0, 4)) == (True, False)


def test_an_earlier_driver_that_commits_late_removes_nothing_of_the_next_one(store: BucketCheckpoints) -> None:
    write(of_generation(2), 0, 1, "newer")
    write(of_generation(1), 0, 1, "older")
    assert (store.local(0, 1) / "model/weights").read_text() == "newer"


def test_of_two_commits_of_an_epoch_the_sweep_keeps_the_one_that_is_whole(store: BucketCheckpoints) -> None:
    write(of_generation(2), 0, 1, "newer")
    write(of_generation(1), 0, 1, "older")
    newer = store.path(0, 1).rpartition("/")[2]
    Bucket.open(URL).delete(f"{newer}/model/weights")
    store.sweep()
    assert (store.local(0, 1) / "model/weights").read_text() == "older"
    assert not any(name.startswith(newer) for name in objects())


def test_a_manifest_whose_files_were_swept_is_swept_too(store: BucketCheckpoints) -> None:
    write(store, 0, 1)
    Bucket.open(URL).delete_all(store.path(0, 1).rpartition("/")[2])
    store.sweep()
    assert objects() == [] and store.kept() == {}


def test_a_sweep_asks_for_one_list_however_many_trials_there_are(
    store: BucketCheckpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    for trial in range(5):
        write(store, trial, 1)
    asked, infos = list[str](), Bucket._infos

    def counted(self: Bucket, under: str, recursive: bool) -> list[FileInfo]:
        asked.append(self.url)
        return infos(self, under, recursive)

    monkeypatch.setattr(Bucket, "_infos", counted)
    BucketCheckpoints(Bucket.open(URL)).sweep()
    assert asked == [URL]


def test_deleted_checkpoints_leave_no_folder(store: BucketCheckpoints) -> None:
    write(store, 0, 1)
    write(store, 3, 2)
    store.delete(0, 1)
    store.delete(3, 2)
    assert [name for name in Bucket.open(URL).folders() if name != "manifests"] == []


def test_going_on_downloads_and_checks_and_falls_back_to_the_checkpoint_before(store: BucketCheckpoints) -> None:
    write(store, 0, 1, "first")
    write(store, 0, 2, "other")
    found = store.latest(0)
    assert found is not None and found.epoch == 2
    assert (store.local(0, 2) / "model/weights").read_text() == "other"
    bucket = Bucket.open(URL)
    (damaged,) = (name for name in objects() if "epoch-0002" in name and name.endswith("weights"))
    bucket.put(damaged, b"0ther")  # of the same size
    again = BucketCheckpoints(bucket)
    found = again.latest(0)
    assert found is not None and found.epoch == 1
    assert (again.local(0, 1) / "model/weights").read_text() == "first"
    with pytest.raises(DamagedCheckpointError):
        again.local(0, 2)
    bucket.delete(damaged)
    assert not again.is_whole(0, 2, deep=False)


def test_only_what_is_wanted_is_copied(store: BucketCheckpoints, tmp_path: Path) -> None:
    write(store)
    store.copy(0, 1, tmp_path / "out", lambda path: path.parts[0] == "model")
    assert [path.name for path in (tmp_path / "out").rglob("*") if path.is_file()] == ["weights"]
    with pytest.raises(CheckpointError, match="no checkpoint of epoch 2"):
        store.copy(0, 2, tmp_path / "none", lambda path: True)


def test_a_manifest_that_leads_outside_is_refused(store: BucketCheckpoints, tmp_path: Path) -> None:
    write(store)
    bucket = Bucket.open(URL)
    (name,) = (name for name in objects() if name.startswith("manifests/"))
    raw = json.loads(bucket.get(name))
    raw["files"]["../../../evil"] = raw["files"].pop("state")
    bucket.put(name, json.dumps(raw).encode())
    with pytest.raises(CheckpointError, match="not one of the folder"):
        store.copy(0, 1, tmp_path / "out", lambda path: True)
    assert store.latest(0) is None and not store.is_whole(0, 1, deep=False)


def test_what_another_process_has_just_committed_is_deleted_too(
    store: BucketCheckpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bucket_checkpoints, "REMEMBERED_S", 60.0)
    driver = BucketCheckpoints(Bucket.open(URL))
    assert driver.kept() == {}
    write(store, 0, 1)
    driver.delete(0, 1)
    assert objects() == []
    driver.delete(0, 1)


def test_the_budget_counts_what_all_have_committed(store: BucketCheckpoints) -> None:
    write(store, 0, 1)
    small = BucketCheckpoints(Bucket.open(URL), budget_bytes=11)
    with pytest.raises(CheckpointBudgetError, match="budget_gib is too small"):
        small.check_room(1)
    with pytest.raises(CheckpointBudgetError):
        write(small, 1, 1)
    assert store.kept() == {0: [1]}
    BucketCheckpoints(Bucket.open(URL), budget_bytes=12).check_room(1)
    BucketCheckpoints(Bucket.open(URL), budget_bytes=GIB).check_room(1)


def test_the_budget_counts_what_others_have_committed_during_an_upload(
    store: BucketCheckpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    small, put_file = BucketCheckpoints(Bucket.open(URL), budget_bytes=11), bucket_checkpoints.put_tree

    def slowly(bucket: Bucket, folder: Path, names: list[str]) -> None:
        put_file(bucket, folder, names)
        Bucket.open(URL).put(f"manifests/00001-0001-6-000000-{'0' * 16}.json", b"{}")

    monkeypatch.setattr(bucket_checkpoints, "REMEMBERED_S", 60.0)
    monkeypatch.setattr(bucket_checkpoints, "put_tree", slowly)
    with pytest.raises(CheckpointBudgetError):
        write(small, 0, 1)
    small.discard(0, 1)
    assert objects() == [f"manifests/00001-0001-6-000000-{'0' * 16}.json"]


def test_a_failed_upload_leaves_nothing_when_it_is_dropped(
    store: BucketCheckpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(self: Bucket, name: str, data: bytes) -> None:
        raise BucketError(Problem(URL, "the store answers", "silence", "a store"), is_away=True)

    put = Bucket.put
    monkeypatch.setattr(Bucket, "put", away)
    with pytest.raises(BucketError):
        write(store)
    monkeypatch.setattr(Bucket, "put", put)
    store.discard(0, 1)
    assert objects() == []


def test_logs_are_put_whole_when_they_have_grown_and_are_there_again_for_the_next_supervisor(
    store: BucketCheckpoints,
) -> None:
    bucket = Bucket.open("s3://lab/toy/logs")
    logs = TrialLogs(bucket.url, 3)
    log = logs.folder() / "trial-00003-rank-0.log"
    log.write_text("one\n")
    logs.put()
    log.write_text("one\ntwo\n")
    logs.put(in_time=True)
    assert bucket.get(log.name) == b"one\n", "there is time"
    logs.put()
    bucket.put("trial-00004-rank-0.log", b"another's\n")
    again = TrialLogs(bucket.url, 3).folder()
    assert {path.name: path.read_text() for path in again.iterdir()} == {log.name: "one\ntwo\n"}
