"""What comes from a cluster is unpacked as plain files in one folder."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest

from tune_service.errors import CommandError
from tune_service.handover import unpack


def packed(package: Path, *members: tuple[str, bytes]) -> Path:
    with tarfile.open(package, "w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return package


def test_a_folder_comes_out_as_it_went_in(tmp_path: Path) -> None:
    (tmp_path / "best" / "model").mkdir(parents=True)
    (tmp_path / "best" / "config.yaml").write_text("name: bread\n")
    (tmp_path / "best" / "model" / "model.safetensors").write_bytes(bytes(range(256)) * 300)
    with tarfile.open(tmp_path / "best.tar", "w") as tar:
        tar.add(tmp_path / "best", arcname=".")
    unpack(tmp_path / "best.tar", tmp_path / "out")
    for name in ("config.yaml", "model/model.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "best" / name).read_bytes()


@pytest.mark.parametrize("name", ["../outside", "/tmp/../../outside", "model/../../outside"])
def test_a_file_that_would_lie_elsewhere_is_refused(tmp_path: Path, name: str) -> None:
    package = packed(tmp_path / "best.tar", (name, b"oops"))
    with pytest.raises(CommandError) as refusal:
        unpack(package, tmp_path / "out")
    assert refusal.value.problems[0].found in (name, name.lstrip("/"))
    assert not (tmp_path / "outside").exists()


def test_a_link_is_left_out_and_so_leads_nowhere(tmp_path: Path) -> None:
    (tmp_path / "secret").mkdir()
    with tarfile.open(tmp_path / "best.tar", "w") as tar:
        link = tarfile.TarInfo("model")
        link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path / "secret")
        tar.addfile(link)
    packed_too = packed(tmp_path / "more.tar", ("model/weights", b"plain"))
    unpack(tmp_path / "best.tar", tmp_path / "out")
    unpack(packed_too, tmp_path / "out")
    assert (tmp_path / "out" / "model" / "weights").read_bytes() == b"plain"
    assert not list((tmp_path / "secret").iterdir())
