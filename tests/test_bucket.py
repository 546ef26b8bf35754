"""What a bucket's URL may say, and what a folder of one does with objects."""

from __future__ import annotations

import copy
import errno
from pathlib import Path
from types import SimpleNamespace

import pytest
from bucket_double import keep_buckets_in

from trainables.bucket import Bucket, is_url
from trainables.errors import BucketError, Problem, UserError
from trainables.worker import storage_is_away
from tune_service.errors import exit_code


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    keep_buckets_in(tmp_path / "store", monkeypatch)
    return Bucket.open("s3://lab/a/b")


def test_a_folder_is_no_url() -> None:
    assert all(map(is_url, ("s3://lab/x", "gs://lab", "s3:/lab", "S3://lab", "file:///x")))
    assert not any(map(is_url, ("studies", "./a:b/c", "/data/s3://x", "~/x", "C:")))


@pytest.mark.parametrize(
    ("url", "found"),
    [
        ("hdfs://lab/x", "hdfs://"),
        ("s3:///x", "''"),
        ("s3://lab/x?endpoint=here", "endpoint"),
        ("gs://lab/x?region=eu", "region"),
        ("s3://lab/x?scheme=ftp", "ftp"),
    ],
)
def test_a_url_that_cannot_be_one_is_refused_as_input(url: str, found: str) -> None:
    with pytest.raises(UserError) as refusal:
        Bucket.open(url)
    assert refusal.value.problems[0].found == found
    assert exit_code(refusal.value) == 2


@pytest.mark.parametrize(
    "url",
    [
        "s3://AKIAX:tops3cret@lab/x",
        "s3://lab/x?secret_key=tops3cret",
        "s3://tops3cret@lab/x",
        "s3://AKIAX:to/tops3cret@lab/x",
        "s3://lab/x?endpoint_override=http://me:tops3cret@host",
    ],
)
def test_credentials_in_a_url_are_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(UserError) as refusal:
        Bucket.open(url)
    assert "tops3cret" not in str(refusal.value)
    assert "environment" in str(refusal.value)


def test_an_object_is_read_as_it_was_written_and_from_any_byte_on(bucket: Bucket) -> None:
    bucket.put("c/d", b"hello")
    assert [bucket.get("c/d", begin) for begin in (0, 2, 5, 9)] == [b"hello", b"llo", b"", b""]
    assert bucket.at("c").get("d") == Bucket.open("s3://lab/a").get("b/c/d") == b"hello"
    with pytest.raises(FileNotFoundError):
        bucket.get("c/e")


def test_a_file_is_stored_as_it_is_whatever_its_name_says(bucket: Bucket, tmp_path: Path) -> None:
    (tmp_path / "vocab.gz").write_bytes(b"not compressed")
    bucket.put_file("vocab.gz", tmp_path / "vocab.gz")
    assert bucket.objects()["vocab.gz"].num_bytes == 14
    bucket.get_file("vocab.gz", tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == b"not compressed"


def test_a_list_tells_names_from_here_on_and_sizes(bucket: Bucket) -> None:
    assert (bucket.objects(), bucket.folders()) == ({}, [])
    bucket.put("c/d", b"hello")
    bucket.put("e", b"")
    assert {name: found.num_bytes for name, found in bucket.objects().items()} == {"c/d": 5, "e": 0}
    assert list(bucket.objects("c")) == ["c/d"]
    assert bucket.folders() == ["c"]
    bucket.delete("c/d")
    bucket.delete("c/d")
    bucket.delete_all("c")
    bucket.delete_all("c")
    assert list(bucket.objects()) == ["e"]


def test_a_folder_of_a_bucket_keeps_what_stands_behind_the_question_mark(bucket: Bucket) -> None:
    inner = Bucket.open("s3://lab/a/?region=eu-west-1").at("b").at("c")
    assert inner.url == "s3://lab/a/b/c?region=eu-west-1"
    assert inner.where == "s3://lab/a/b/c"
    inner.put("d", b"1")
    assert bucket.get("c/d") == b"1"


def test_a_bucket_that_is_not_there_is_the_users_fault(bucket: Bucket) -> None:
    bucket.check_writable()
    assert bucket.objects() == {}
    with pytest.raises(BucketError, match="no bucket other") as refusal:
        Bucket.open("s3://other/x").check()
    assert exit_code(refusal.value) == 2


class _GoneMeanwhile:
    """A file of pyarrow's: there when it was opened, and deleted before it is read."""

    def __enter__(self) -> _GoneMeanwhile:
        return self

    def __exit__(self, *error: object) -> None: ...

    def size(self) -> int:
        return 10

    def seek(self, place: int) -> None: ...

    def read(self) -> bytes:
        raise OSError("When reading information for key 'b' in bucket 'lab': AWS Error NO_SUCH_KEY during GetObject")


def test_an_object_that_goes_while_it_is_read_is_not_there(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bucket, "_filesystem", SimpleNamespace(open_input_file=lambda path: _GoneMeanwhile()))
    with pytest.raises(FileNotFoundError):
        bucket.get("b")


def test_a_store_that_is_away_is_to_a_study_what_a_full_disk_is() -> None:
    problem = Problem("s3://lab", "the store answers", "a cut connection", "a store")
    away = BucketError(problem, is_away=True)
    for error in (away, copy.copy(away)):  # copied as it is on its way to another process
        assert storage_is_away(error)
        assert storage_is_away(RuntimeError(f"a traceback\n{error}")), "as Tune hands it on"
        assert error.errno == errno.EREMOTEIO
        assert exit_code(error) == 1
