"""A bucket in a folder of this machine's disk, through pyarrow's own doors: for tests without a server."""

from __future__ import annotations

from pathlib import Path

import pytest
from fsspec.implementations.local import LocalFileSystem
from pyarrow import fs

from trainables import bucket


def keep_buckets_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`s3://NAME/...` lies in `folder/NAME/...` for this process, and the bucket `lab` exists."""
    (folder / "lab").mkdir(parents=True)
    local = fs.PyFileSystem(fs.FSSpecHandler(LocalFileSystem(auto_mkdir=True)))
    monkeypatch.setattr(bucket, "filesystem", lambda kind, **options: fs.SubTreeFileSystem(str(folder), local))
