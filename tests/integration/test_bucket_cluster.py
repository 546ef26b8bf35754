"""A cluster whose studies lie in a bucket: its head's jobs have the URL, and what a study came with is there too."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cluster import Cluster
from object_store import BUCKET, Store
from program import Program, scores
from toys import curve

pytestmark = pytest.mark.slow

URL = f"s3://{BUCKET}/studies"


@pytest.fixture
def with_bucket(store: Store) -> Iterator[Cluster]:
    """A cluster whose head knows the bucket, as one from `cluster init --bucket` does."""
    store.door.set("open")
    found = Cluster(store.door.environment() | {"TUNE_SERVICE_STORAGE": URL})
    try:
        found.add_worker(cpus=2)
        yield found
    finally:
        found.close()


def shipped_copies() -> set[Path]:
    """What studies came with, where a node has a copy of it; also those of runs before that were cut off."""
    return set(Path(tempfile.gettempdir()).glob("tune-rank-*/shipped"))


def test_a_clusters_study_lives_in_the_bucket_and_goes_on_from_there(
    program: Program, with_bucket: Cluster, store: Store
) -> None:
    def ask(*arguments: str, code: int = 0) -> Any:
        found = program.run(*arguments, "--address", with_bucket.url, "--json", env=with_bucket.env(), timeout_s=240)
        assert found.code == code, f"exit code {found.code}\n{found.out}\n{found.err}"
        return found.json

    before = shipped_copies()
    changes = {"training": {"max_epochs": 3}, "resources": {"workers": 2}, "budget": {"trials": 1}}
    spec = program.spec("rolls", changes)
    assert ask("submit", spec, "--wait") == {"study": "rolls", "job": "rolls-1"}
    assert {"shipped/toys.py", "shipped/.tune-service/spec.json"} <= set(store.names("rolls"))
    status = ask("status", "rolls")
    assert (status["state"], scores(status["trials"][0])) == ("completed", curve(0, 3))
    assert status["trials"][0]["checkpoint"]["path"].startswith(f"{URL}/rolls/checkpoints/")
    more = ask("resume", "rolls", "--trials", "2")
    assert [scores(trial) for trial in more["trials"]] == [curve(0, 3), curve(1, 3)], "its code came from the bucket"
    out = program.folder / "best-rolls"
    assert ask("best", "rolls", "--out", str(out))["number"] == 1
    state = [json.loads((out / "checkpoint" / f"state-{rank}.json").read_text())["epoch"] for rank in (0, 1)]
    assert state == [3, 3]
    assert ask("delete", "rolls", "--yes")["bytes"] > 1000
    assert store.names("rolls") == []
    assert shipped_copies() <= before
