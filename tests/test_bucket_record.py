"""The record of a study in a bucket: numbered segments, of which only the last driver's are read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from bucket_double import keep_buckets_in
from optuna.samplers import RandomSampler

from trainables.bucket import Bucket
from trainables.errors import BucketError, Problem
from tune_service import bucket_journal, bucket_lease, bucket_storage
from tune_service.bucket_lease import BucketLease
from tune_service.bucket_storage import BucketStorage, StudyBucket
from tune_service.errors import LeaseLostError, StorageError, StudyExistsError, StudyNotFoundError
from tune_service.record import Record
from tune_service.studies import LocalStudies
from tune_service.study import delete_study

Driven = tuple[StudyBucket, BucketLease]
SPEC = {"objective": {"metric": "score", "mode": "max"}, "search_space": {}, "budget": {"trials": 4}}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every look is a new one."""
    monkeypatch.setattr(bucket_journal, "LOOK_S", 0.0)
    monkeypatch.setattr(bucket_lease, "LOOK_S", 0.0)


@pytest.fixture
def storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> BucketStorage:
    keep_buckets_in(tmp_path / "store", monkeypatch)
    return BucketStorage(Bucket.open("s3://lab/studies"))


@pytest.fixture
def record_bucket(storage: BucketStorage) -> Bucket:
    return Bucket.open("s3://lab/studies/toy/record")


@pytest.fixture
def driven(storage: BucketStorage) -> Iterator[Driven]:
    study = storage.create("toy")
    with study.driving() as lease:
        Record.create(study, SPEC, RandomSampler(seed=0), lease)
        yield study, lease


def another(storage: BucketStorage) -> StudyBucket:
    """The same study, as another process sees it."""
    return storage.study("toy")


def segments(record_bucket: Bucket) -> list[str]:
    return sorted(name.partition("/")[2] for name in record_bucket.objects() if "requests" not in name)


def test_a_study_is_there_with_its_first_segment(storage: BucketStorage, record_bucket: Bucket, driven: Driven) -> None:
    assert [study.name for study in storage.studies()] == ["toy"]
    assert segments(record_bucket) == ["00000000.jsonl"], "all that makes a record is one object"
    with pytest.raises(StudyNotFoundError, match="toy"):
        storage.study("../toy")
    with pytest.raises(StudyExistsError, match="s3://lab/studies/toy exists"):
        storage.create("toy")


def test_a_new_record_that_fails_halfway_is_no_study(storage: BucketStorage) -> None:
    study = storage.create("toy")
    with study.driving() as lease:
        with pytest.raises(TypeError, match="not JSON serializable"):
            Record.create(study, SPEC | {"odd": object()}, RandomSampler(seed=0), lease)
        assert storage.studies() == []
        study.abandon()
    storage.create("toy")


def test_a_driver_that_was_killed_before_its_record_leaves_the_name_free(storage: BucketStorage) -> None:
    study = storage.create("toy")
    with study.driving() as lease:
        Bucket.open("s3://lab/studies/toy").put("checkpoints/manifests/x.json", b"{}")  # of a deletion that was killed
    assert storage.studies() == []
    with storage.create("toy").driving() as lease:
        Record.create(storage._study("toy"), SPEC, RandomSampler(seed=0), lease)
    assert Bucket.open("s3://lab/studies/toy/checkpoints").objects() == {}


def test_a_new_study_that_finds_its_name_taken_meanwhile_leaves_the_other_as_it_is(
    storage: BucketStorage, driven: Driven
) -> None:
    _, lease = driven
    late = storage._study("toy")
    lease.close()
    with late.driving() as own:
        with pytest.raises(StudyExistsError):
            Record.create(late, SPEC, RandomSampler(seed=0), own)
        late.abandon()
    assert Record.open(another(storage)).budget_trials == 4


def test_what_a_study_came_with_stays_when_another_finds_its_name_taken(
    storage: BucketStorage, driven: Driven, tmp_path: Path
) -> None:
    _, lease = driven
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "spec.yaml").write_text(name)
    Bucket.open("s3://lab/studies/toy/shipped").put_file("spec.yaml", tmp_path / "first/spec.yaml")
    lease.close()
    late = storage._study("toy")
    with late.driving():
        with pytest.raises(StudyExistsError):
            late.keep_shipped(tmp_path / "second")
        late.abandon()
    copy = another(storage).shipped()
    assert copy is not None and (copy / "spec.yaml").read_text() == "first"


def test_every_append_is_one_object_and_read_by_others_in_order(
    storage: BucketStorage, record_bucket: Bucket, driven: Driven
) -> None:
    study, lease = driven
    record, reader = Record.open(study, lease=lease), Record.open(another(storage))
    for budget in (5, 6, 7):
        record.set_budget(budget)
        assert reader.budget_trials == record.budget_trials == budget
    assert segments(record_bucket) == ["00000000.jsonl", "00000001.jsonl", "00000002.jsonl"]
    assert Record.open(another(storage)).budget_trials == 7


def test_what_an_earlier_driver_still_writes_is_read_by_nobody(
    storage: BucketStorage,
    record_bucket: Bucket,
    driven: Driven,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Even where it does not look at its lease, as between the look and the write."""
    study, lease = driven
    old = Record.open(study, lease=lease)
    old.set_budget(5)
    monkeypatch.setattr(BucketLease, "check", lambda self: None)
    monkeypatch.setattr(bucket_lease, "SILENT_S", 0.0)
    reader = Record.open(another(storage))
    with another(storage).driving() as newer:
        record = Record.open(another(storage), lease=newer)
        old.set_budget(6)
        assert reader.budget_trials == 6, "so far it is the only one that has written"
        record.set_budget(7)
        old.set_budget(99)
        assert reader.budget_trials == record.budget_trials == Record.open(another(storage)).budget_trials == 7
        folders = {name.partition("/")[0] for name in record_bucket.objects()}
        record.set_budget(8)
        assert max(folders).startswith("000002-")
        record_bucket.put("000001-0009-left/00000000.jsonl", b"{}\n")  # which it writes when it has much to say
        assert reader.budget_trials == 8


def test_a_driver_that_lost_its_lease_writes_nothing(
    storage: BucketStorage, driven: Driven, monkeypatch: pytest.MonkeyPatch
) -> None:
    study, lease = driven
    old = Record.open(study, lease=lease)
    monkeypatch.setattr(bucket_lease, "SILENT_S", 0.0)
    with another(storage).driving():
        with pytest.raises(LeaseLostError, match="has taken the study over"):
            old.set_budget(99)
        assert Record.open(another(storage)).budget_trials == 4


def test_many_segments_become_one(
    storage: BucketStorage,
    record_bucket: Bucket,
    driven: Driven,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bucket_journal, "MANY_SEGMENTS", 4)
    study, lease = driven
    record, reader = Record.open(study, RandomSampler(seed=0), lease), Record.open(another(storage))
    assert record.ask({}, lambda number: {}) is not None
    most = 0
    for budget in range(5, 25):
        record.set_budget(budget)
        most = max(most, len(segments(record_bucket)))
        assert reader.budget_trials == budget, "a reader follows over the change"
        assert Record.open(another(storage)).budget_trials == budget
        assert [trial.number for trial in reader.trials()] == [0], "nothing is read twice"
    assert 4 <= most <= 8
    assert len({name.partition("/")[0] for name in record_bucket.objects()}) == 1, "what was before is deleted"


def test_a_roll_that_ctrl_c_cuts_off_loses_nothing(
    storage: BucketStorage, driven: Driven, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also not when the driver, on its way out, says that its trials wait."""
    monkeypatch.setattr(bucket_journal, "MANY_SEGMENTS", 4)
    study, lease = driven
    record = Record.open(study, RandomSampler(seed=0), lease)
    asked = [record.ask({}, lambda number: {}) for _ in range(2)]
    delete_all = Bucket.delete_all

    def interrupted(self: Bucket, under: str = "") -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Bucket, "delete_all", interrupted)
    with pytest.raises(KeyboardInterrupt):
        for budget in range(5, 25):
            record.set_budget(budget)
    monkeypatch.setattr(Bucket, "delete_all", delete_all)
    record.pause_all("interrupted by the user")
    trials = Record.open(another(storage)).status().trials
    assert [trial.number for trial in trials] == [each.number for each in asked if each is not None] == [0, 1]
    assert record.budget_trials == Record.open(another(storage)).budget_trials == budget - 1


def test_a_first_segment_that_ctrl_c_left_empty_is_read_by_nobody(
    storage: BucketStorage, record_bucket: Bucket, driven: Driven, monkeypatch: pytest.MonkeyPatch
) -> None:
    study, lease = driven
    record, put = Record.open(study, lease=lease), Bucket.put

    def interrupted(self: Bucket, name: str, data: bytes) -> None:
        put(self, name, b"")  # what is closed is committed
        raise KeyboardInterrupt

    monkeypatch.setattr(Bucket, "put", interrupted)
    with pytest.raises(KeyboardInterrupt):
        record.set_budget(5)
    monkeypatch.setattr(Bucket, "put", put)
    assert 0 in [each.num_bytes for each in record_bucket.objects().values()]
    assert Record.open(another(storage)).budget_trials == 4
    record.set_budget(6)
    assert Record.open(another(storage)).budget_trials == 6


def test_a_reader_that_a_request_failed_for_has_everything_at_its_next_look(
    storage: BucketStorage, driven: Driven, monkeypatch: pytest.MonkeyPatch
) -> None:
    study, lease = driven
    record, reader = Record.open(study, lease=lease), Record.open(another(storage))
    record.set_budget(5)
    Record.open(another(storage)).request_stop(now=False)
    get = Bucket.get

    def fails(self: Bucket, name: str, begin: int = 0) -> bytes:
        if name.startswith("requests/"):
            raise BucketError(Problem("s3://lab", "the store answers", "silence", "a store"), is_away=True)
        return get(self, name, begin)

    monkeypatch.setattr(Bucket, "get", fails)
    with pytest.raises(BucketError):
        reader.trials()
    monkeypatch.setattr(Bucket, "get", get)
    assert (reader.budget_trials, reader.stop_request is not None) == (5, True)


def test_a_request_of_another_process_is_seen_by_all_and_taken_in_once(
    storage: BucketStorage, record_bucket: Bucket, driven: Driven
) -> None:
    study, lease = driven
    record = Record.open(study, lease=lease)
    Record.open(another(storage)).request_stop(now=True)
    assert Record.open(another(storage)).stop_request is not None, "before the driver has seen it, too"
    assert record.stop_request is not None and record.stop_request["now"] is True
    assert not any("requests" in name for name in record_bucket.objects())
    record.clear_stop()
    assert Record.open(another(storage)).stop_request is None


def test_an_object_that_is_no_request_is_left_out_and_deleted(
    record_bucket: Bucket, driven: Driven, capsys: pytest.CaptureFixture[str]
) -> None:
    study, lease = driven
    record = Record.open(study, lease=lease)
    record_bucket.put("requests/1-x.jsonl", b"{")
    record_bucket.put("requests/2-x.jsonl", b"[1]")
    assert record.budget_trials == 4
    assert not any("requests" in name for name in record_bucket.objects())
    assert capsys.readouterr().err.count("left out s3://lab/studies/toy/record/requests/") == 2


def test_a_request_without_a_driver_waits_for_the_next_one(storage: BucketStorage, driven: Driven) -> None:
    _, lease = driven
    lease.close()
    Record.open(another(storage)).request_stop(now=False)
    assert Record.open(another(storage)).status().state == "stopped"
    study = another(storage)
    with study.driving() as own:
        record = Record.open(study, lease=own)
        record.clear_stop()
        assert record.stop_request is None
    assert Record.open(another(storage)).status().state == "interrupted"


def test_nothing_is_written_behind_a_put_whose_end_nobody_knows(
    storage: BucketStorage,
    record_bucket: Bucket,
    driven: Driven,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It may arrive later: then its name must be one that nobody reads."""
    study, lease = driven
    record, reader = Record.open(study, lease=lease), Record.open(another(storage))
    record.set_budget(5)
    put, late = Bucket.put, ExitStack()

    def lost(self: Bucket, name: str, data: bytes) -> None:
        late.callback(put, self, name, data)
        raise BucketError(Problem("s3://lab", "the store answers", "silence", "a store"), is_away=True)

    monkeypatch.setattr(Bucket, "put", lost)
    with pytest.raises(BucketError):
        record.set_budget(6)
    monkeypatch.setattr(Bucket, "put", put)
    record.set_budget(7)
    late.close()
    assert reader.budget_trials == Record.open(another(storage)).budget_trials == 7


def test_a_segment_that_is_no_journal_is_refused_with_its_place(
    storage: BucketStorage, record_bucket: Bucket, driven: Driven
) -> None:
    (name,) = record_bucket.objects()
    record_bucket.put(name, b"\x80\x04 not a journal")
    with pytest.raises(StorageError, match="s3://lab/studies/toy"):
        Record.open(another(storage))


def test_a_deleted_study_leaves_no_object(storage: BucketStorage, driven: Driven) -> None:
    study, lease = driven
    record = Record.open(study, lease=lease)
    record.set_budget(5)
    Bucket.open("s3://lab/studies/toy").put("driver-000001.log", b"a line")
    lease.close()
    assert delete_study("toy", storage) > 100
    assert Bucket.open("s3://lab/studies").objects() == {}
    assert storage.studies() == []


@pytest.mark.parametrize("killed_at", range(1, 7))
def test_a_deletion_that_is_killed_is_gone_on_with_and_its_name_is_not_free(
    storage: BucketStorage, driven: Driven, monkeypatch: pytest.MonkeyPatch, killed_at: int
) -> None:
    _, lease = driven
    lease.close()
    bucket, delete_all, calls = Bucket.open("s3://lab/studies/toy"), Bucket.delete_all, 0
    bucket.put("checkpoints/trial-00000-epoch-0001-x/weights", b"large")
    bucket.put("logs/trial-00000-rank-0.log", b"a line")

    def killed(self: Bucket, under: str = "") -> None:
        nonlocal calls
        calls += 1
        if calls >= killed_at:
            raise KeyboardInterrupt
        delete_all(self, under)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(bucket_storage, "at_once", lambda work, items: [work(item) for item in items])
        patch.setattr(Bucket, "delete_all", killed)
        delete_study("toy", storage)
    assert list(LocalStudies(storage).list()) == []
    if killed_at < 6:
        with pytest.raises(StudyExistsError, match="tune-service delete toy"):
            storage.create("toy")
        with pytest.raises(StorageError, match="deleted"):
            LocalStudies(storage).status("toy")
        delete_study("toy", storage)
        assert bucket.objects() == {}
    else:
        assert all(name.startswith("lease/") for name in bucket.objects()), "all else is gone, and the name free"
        storage.create("toy")


def test_who_reads_a_study_while_it_is_deleted_is_told_so(
    storage: BucketStorage, driven: Driven, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, lease = driven
    lease.close()
    reader, listed = Record.open(another(storage)), storage.studies()
    delete_study("toy", storage)
    with pytest.raises(StorageError, match="deleted meanwhile"):
        reader.status()
    monkeypatch.setattr(storage, "studies", lambda: listed)
    assert list(LocalStudies(storage).list()) == []
    assert "deleted meanwhile" in capsys.readouterr().err


def test_a_study_that_fails_right_after_its_record_leaves_its_name_free(storage: BucketStorage) -> None:
    study = storage.create("toy")
    with study.driving() as lease:
        Record.create(study, SPEC, RandomSampler(seed=0), lease)
        study.abandon()
    assert Bucket.open("s3://lab/studies").objects() == {}
    storage.create("toy")
