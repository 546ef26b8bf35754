"""The doctor of a cluster: `check --address` on real nodes, sound and broken, and that it leaves nothing behind."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cluster import Cluster
from program import Program, wait_until
from toys import read_notes

from tune_service.demo import demo_spec, write_pairs, write_tokenizer

pytestmark = pytest.mark.slow

SMALL = {"resources": {"workers": 2, "gpus_per_worker": 0, "cpus_per_worker": 1}}


@pytest.fixture(scope="module")
def inputs(program: Program) -> Path:
    write_pairs(program.specs / "data", num_train=64, num_validation=32)
    write_tokenizer(program.specs / "tokenizer")
    return program.specs


def finetune(program: Program, inputs: Path, **sections: Any) -> str:
    return program.write_spec(demo_spec(inputs) | SMALL | sections)


class Doctor:
    def __init__(self, program: Program, cluster: Cluster) -> None:
        self._program, self._cluster = program, cluster

    def checks(self, spec: str, *options: str, code: int = 0) -> dict[str, dict[str, Any]]:
        """Name -> the check; the command must end with `code`."""
        arguments = ("check", spec, "--address", self._cluster.url, "--json", *options)
        found = self._program.run(*arguments, env=self._cluster.env(), timeout_s=240)
        assert found.code == code, f"exit code {found.code}\n{found.out}\n{found.err}"
        checks = found.json["checks"]
        assert all(each.keys() == {"name", "ok", "found", "advice"} for each in checks)
        assert len({each["name"] for each in checks}) == len(checks)
        return {each["name"]: each for each in checks}


@pytest.fixture
def doctor(program: Program, cluster: Cluster) -> Doctor:
    return Doctor(program, cluster)


def failing(checks: dict[str, dict[str, Any]]) -> set[str]:
    return {name for name, check in checks.items() if not check["ok"]}


def test_a_sound_spec_passes_and_one_trials_group_was_really_tried(
    doctor: Doctor, program: Program, inputs: Path, cluster: Cluster
) -> None:
    before = sorted(cluster.storage.iterdir())
    checks = doctor.checks(finetune(program, inputs))
    assert failing(checks) == set()
    expected = (
        "spec dashboard token storage resources model data checkpoints versions nodes inputs all-reduce step memory"
    )
    assert list(checks) == [*expected.split(), "checkpoint size", "estimate", "ports", "reach"]
    assert re.match(r"2 ranks by gloo: 17 MB in \d+ ms, \d+ MB/s$", checks["all-reduce"]["found"])
    # The largest of the space, not the spec's own.
    assert "with batch_size 32, max_length 32" in checks["step"]["found"]
    assert re.search(r"writes \d+ MB/s, synced, reads \d+ MB/s, [\d.]+ GiB free", checks["storage"]["found"])
    assert "1 trial at once, 1 now" in checks["resources"]["found"]
    assert "96 epochs if nothing stops" in checks["estimate"]["found"]
    assert re.match(r"\d+ refuse who shows no token, \d+ tell Ray's metrics", checks["ports"]["found"])
    assert sorted(cluster.storage.iterdir()) == before
    wait_until(lambda: not cluster.actors(), 60.0, "the ranks to be gone")

    def states() -> set[str]:
        groups = cluster.get("/api/v0/placement_groups?limit=100&detail=1")["data"]["result"]["result"]
        return {group["state"] for group in groups}

    wait_until(lambda: states() == {"REMOVED"}, 60.0, "what it had reserved to be given back")


def test_a_trainable_of_ones_own_is_imported_on_the_nodes_and_not_run(doctor: Doctor, program: Program) -> None:
    checks = doctor.checks(program.spec("crumbs"))
    assert failing(checks) == set()
    assert checks["inputs"]["found"] == "can be opened on 1 node"
    assert checks["step"]["found"] == "not looked at: a trainable of your own is imported, not run"
    assert read_notes(program.notes("crumbs")) == []


def test_a_trainable_that_cannot_be_imported_is_told_with_its_own_words(doctor: Doctor, program: Program) -> None:
    checks = doctor.checks(program.spec("crumbs", {"trainable": "toys:nothing"}), code=2)
    assert failing(checks) == {"trainable", "inputs"}
    assert "has no function 'nothing'" in checks["inputs"]["found"]


def test_a_trial_too_big_for_any_node_is_told_and_nothing_is_tried(
    doctor: Doctor, program: Program, inputs: Path
) -> None:
    spec = finetune(program, inputs, resources={"workers": 1, "gpus_per_worker": 0, "cpus_per_worker": 64})
    checks = doctor.checks(spec, code=2)
    assert failing(checks) == {"resources"}
    assert (
        "a trial needs 1 worker of 64 CPUs each, the cluster has 1 x (2 CPUs, 0 GPUs)" in checks["resources"]["found"]
    )
    assert checks["step"]["found"] == "not looked at: no node up holds it"


def test_a_missing_model_is_told_of_the_head_and_of_each_worker(doctor: Doctor, program: Program, inputs: Path) -> None:
    checks = doctor.checks(finetune(program, inputs, model={"name": "/no/model"}), code=2)
    assert {"model", "inputs", "step"} <= failing(checks)
    assert "no folder /no/model" in checks["model"]["found"]
    assert "no folder /no/model" in checks["inputs"]["found"]


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    run = subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(tmp_path)], check=False)
    if run.returncode != 0:
        pytest.skip("a read-only disk needs the right to mount one")
    yield tmp_path
    subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)


def test_a_storage_that_cannot_be_written_is_told(doctor: Doctor, program: Program, read_only: Path) -> None:
    checks = doctor.checks(program.spec("crumbs"), "--storage", str(read_only / "studies"), code=2)
    assert failing(checks) == {"storage"}


def test_the_node_with_another_version_is_named(
    doctor: Doctor, program: Program, cluster: Cluster, tmp_path: Path
) -> None:
    other = tmp_path / "optuna-0.0.1.dist-info"
    other.mkdir()
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: optuna\nVersion: 0.0.1\n")
    pid = cluster.add_worker(cpus=1, path=str(tmp_path))
    try:
        checks = doctor.checks(program.spec("crumbs"), code=1)
    finally:
        cluster.end_node(pid)
    assert failing(checks) == {"versions"}
    assert re.search(r"^optuna: [\d.]+ on .* and 0\.0\.1 on |^optuna: 0\.0\.1 on ", checks["versions"]["found"])
    wait_until(lambda: cluster.num_nodes() == 2, 60.0, "the node to be missed")
