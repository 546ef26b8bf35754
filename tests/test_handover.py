"""What comes from a cluster is unpacked as plain files in one folder."""

from __future__ import annotations

import io
import os
import shutil
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from signal import SIGTERM, getsignal, signal
from typing import Any

import pytest
from hand_driven import HandDriven

from trainables.checkpoint import sha256
from tune_service.errors import CommandError
from tune_service.handover import exported, fetch, unpack
from tune_service.spec import load_spec
from tune_service.storage import StudyFolder
from tune_service.terminal import output_to


def packed(package: Path, *members: tuple[str, bytes]) -> Path:
    with tarfile.open(package, "w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return package


@contextmanager
def offered(study: HandDriven, folder: Path) -> Iterator[dict[str, Any]]:
    """What `exported` offers in a job whose log is in that folder."""
    before = getsignal(SIGTERM)
    try:
        with output_to(folder / "job.log"), exported("toy", "word", study.storage) as found:
            yield found
    finally:
        signal(SIGTERM, before)


def test_a_folder_comes_out_as_it_went_in(tmp_path: Path) -> None:
    (tmp_path / "best" / "model").mkdir(parents=True)
    (tmp_path / "best" / "empty").mkdir()
    (tmp_path / "best" / "config.yaml").write_text("name: bread\n")
    (tmp_path / "best" / "model" / "model.safetensors").write_bytes(bytes(range(256)) * 300)
    with tarfile.open(tmp_path / "best.tar", "w") as tar:
        tar.add(tmp_path / "best", arcname=".")
    unpack(tmp_path / "best.tar", tmp_path / "out")
    for name in ("config.yaml", "model/model.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "best" / name).read_bytes()
    assert (tmp_path / "out" / "empty").is_dir()


@pytest.mark.parametrize("name", ["../outside", "/tmp/../../outside", "model/../../outside"])
def test_a_file_that_would_lie_elsewhere_is_refused(tmp_path: Path, name: str) -> None:
    package = packed(tmp_path / "best.tar", (name, b"oops"))
    with pytest.raises(CommandError) as refusal:
        unpack(package, tmp_path / "out")
    assert refusal.value.problems[0].found in (name, name.lstrip("/"))
    assert not (tmp_path / "outside").exists()


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])
def test_what_is_no_file_or_folder_is_refused_not_left_out(tmp_path: Path, kind: bytes) -> None:
    with tarfile.open(tmp_path / "best.tar", "w") as tar:
        member = tarfile.TarInfo("model")
        member.type, member.linkname = kind, str(tmp_path / "secret")
        tar.addfile(member)
    with pytest.raises(CommandError) as refusal:
        unpack(tmp_path / "best.tar", tmp_path / "out")
    assert refusal.value.problems[0].found == "model"
    assert not (tmp_path / "out" / "model").exists()


# ---- on the head


@pytest.mark.parametrize("home", ["/home/ann/mrpc", "/home/ann/data #2/mrpc", "/home/ann/it: data/mrpc"])
def test_config_yaml_names_the_users_folder_whatever_that_is_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: str
) -> None:
    there = tmp_path / "work" / "data"
    there.mkdir(parents=True)
    monkeypatch.setattr(StudyFolder, "origins", lambda *_: {str(there): home})
    data = {"path": str(there), "text": ["a"]}
    space = {"learning_rate": {"log_uniform": [1e-5, 1e-3]}}
    own = {"trainable": "finetune", "model": {"name": "gpt2"}, "objective": {"metric": "eval_accuracy"}}
    study = HandDriven(tmp_path / "work", data=data, search_space=space, training={}, **own)
    number = study.begin()
    study.report(number, 1, 0.5, num_bytes=1, eval_accuracy=0.5)
    study.finish(number)
    with offered(study, tmp_path) as found:
        unpack(tmp_path / found["file"], tmp_path / "best")
    spec = load_spec(tmp_path / "best" / "config.yaml", here=False)
    assert (spec.data, spec.model) == (study.spec.data.model_copy(update={"path": home}), study.spec.model)


def test_what_a_killed_export_left_is_removed_after_hours_and_one_that_ends_meanwhile_is_no_hindrance(
    tmp_path: Path,
) -> None:
    study = HandDriven(tmp_path / "work")
    study.run(0.5)
    exports = study.storage.exports
    for name in (".export-old", ".export-new"):
        (exports / name).mkdir()
    os.utime(exports / ".export-old", (0, 0))
    (exports / ".export-gone").symlink_to("nowhere")  # has a name, and no more a folder
    with offered(study, tmp_path) as found:
        unpack(tmp_path / found["file"], tmp_path / "best")
    assert (tmp_path / "best" / "metrics.json").is_file()
    assert sorted(path.name for path in exports.glob(".export-*")) == [".export-gone", ".export-new"]


# ---- on the laptop


class Far:
    """A dashboard that hands out one file."""

    def __init__(self, package: Path) -> None:
        self._package = package

    def patiently(self, ask: Callable[[], str]) -> str:
        return ask()

    def download(self, node_id: str, name: str, to: Path, num_bytes: int) -> str:
        shutil.copy(self._package, to)
        return sha256(to)


@pytest.mark.parametrize("is_new", [True, False])
def test_out_holds_what_was_fetched_and_not_how_it_came(tmp_path: Path, is_new: bool) -> None:
    package = packed(tmp_path / "best.tar", ("metrics.json", b"{}"), ("model/config.json", b"{}"))
    out = tmp_path / "out"
    if not is_new:
        out.mkdir()
    found = {"file": "best.tar", "bytes": package.stat().st_size, "sha256": sha256(package)}
    with pytest.raises(CommandError, match="what arrives is what was sent"):
        fetch(Far(package), "node", found | {"sha256": "0"}, out)
    assert not out.exists() if is_new else not list(out.iterdir())
    fetch(Far(package), "node", found, out)
    assert sorted(str(path.relative_to(out)) for path in out.rglob("*")) == [
        "metrics.json",
        "model",
        "model/config.json",
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best.tar", "out"]
