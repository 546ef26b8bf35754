"""Files of a rank that does not see the study's folder: found out by a mark, carried in pieces, whole or not at all."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from trainables import far
from trainables.far import FarFiles, Mark, fetch, marked, send


def test_a_mark_is_seen_where_its_folder_is_and_only_as_long(tmp_path: Path) -> None:
    with marked(tmp_path / "staging") as mark:
        assert mark.is_seen()
        assert not Mark(str(tmp_path / "elsewhere" / Path(mark.path).name), mark.content).is_seen()
    assert not mark.is_seen()
    assert list((tmp_path / "staging").iterdir()) == []


def test_a_file_of_the_same_name_on_another_disk_is_no_mark(tmp_path: Path) -> None:
    with marked(tmp_path) as mark:
        assert not Mark(mark.path, "0" * 32).is_seen()


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 16])
def test_a_folder_arrives_as_it_was_sent(size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(far, "PIECE_BYTES", 8)
    source = tmp_path / "source"
    (source / "model").mkdir(parents=True)
    (source / "model" / "weights").write_bytes(bytes(range(size)))
    files = FarFiles()
    files.emptied("resume")
    send(lambda name, data: files.write("resume", name, data), source)
    assert files.listing("resume") == [("model/weights", size)]
    fetch(lambda name, offset: files.read("resume", name, offset), files.listing("resume"), tmp_path / "back")
    assert (tmp_path / "back" / "model" / "weights").read_bytes() == bytes(range(size))


def test_a_file_that_ends_early_is_an_error(tmp_path: Path) -> None:
    pieces = {0: b"abc"}
    with pytest.raises(OSError, match="ended after 3 of 5 bytes"):
        fetch(lambda name, offset: pieces.get(offset, b""), [("weights", 5)], tmp_path)


def test_what_a_killed_rank_left_is_removed_by_the_next_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    code = "import os; from trainables.far import FarFiles; FarFiles().folder('saved'); os.kill(os.getpid(), 9)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == -9
    monkeypatch.setattr(far.tempfile, "tempdir", None)
    left = list(tmp_path.glob("tune-rank-*"))
    assert len(left) == 1
    living = FarFiles()
    living.folder("saved")
    other = FarFiles()
    other.folder("saved")
    assert left[0] not in tmp_path.iterdir()
    assert len(list(tmp_path.glob("tune-rank-*"))) == 2
