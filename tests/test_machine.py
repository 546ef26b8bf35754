"""What the machine offers is what it has less what the process was denied; trials fit or the reason is told."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal, NoReturn

import pytest

from tune_service import machine
from tune_service.errors import CommandError, exit_code
from tune_service.machine import Machine, fit, resource_problems, this_machine, visible_gpus
from tune_service.spec import ResourcesSpec, parse_spec
from tune_service.this_machine import ThisMachine

TWO_GPUS = """\
GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-aaaa1111-0000-0000-0000-000000000000)
GPU 1: NVIDIA H100 80GB HBM3 (UUID: GPU-bbbb2222-0000-0000-0000-000000000000)
"""
MIG = """\
GPU 0: NVIDIA A100-SXM4-40GB (UUID: GPU-aaaa1111-0000-0000-0000-000000000000)
  MIG 3g.20gb Device 0: (UUID: MIG-cccc3333-0000-0000-0000-000000000000)
  MIG 3g.20gb Device 1: (UUID: MIG-dddd4444-0000-0000-0000-000000000000)
"""


@pytest.mark.parametrize(
    ("variable", "listing", "gpus"),
    [
        (None, TWO_GPUS, 2),
        (None, "", 0),
        ("", TWO_GPUS, 0),
        ("-1", TWO_GPUS, 0),
        ("NoDevFiles", TWO_GPUS, 0),
        ("0", TWO_GPUS, 1),
        ("1,0", TWO_GPUS, 2),
        (" 0 , 1 ", TWO_GPUS, 2),
        ("0,0", TWO_GPUS, 1),
        ("0,1,2,3", TWO_GPUS, 2),
        ("0,-1,1", TWO_GPUS, 1),  # CUDA stops at the first entry that is no device
        ("5,0", TWO_GPUS, 0),
        ("0,1", "", 0),
        ("GPU-bbbb2222", TWO_GPUS, 1),
        ("GPU-", TWO_GPUS, 0),  # means both, so neither
        ("GPU-ffff", TWO_GPUS, 0),
        ("MIG-cccc3333-0000-0000-0000-000000000000,MIG-dddd4444", MIG, 2),
    ],
)
def test_visible_gpus_are_those_that_cuda_would_show(variable: str | None, listing: str, gpus: int) -> None:
    assert visible_gpus(variable, listing) == gpus


@pytest.mark.parametrize(
    ("files", "membership", "cpus", "memory_bytes"),
    [
        ({}, "0::/\n", None, None),
        ({"cpu.max": "max 100000", "memory.max": "max"}, "0::/\n", None, None),
        ({"cpu.max": "100000 100000", "memory.max": "1000000"}, "0::/\n", 1, 1_000_000),
        ({"cpu.max": "50000 100000"}, "0::/\n", 1, None),  # half a CPU is still one for Ray
        # A group inside another may use no more than the one around it.
        ({"a/cpu.max": "100000 100000", "a/b/cpu.max": "max 100000"}, "0::/a/b\n", 1, None),
        # A container that sees the host's path of its group, which is not in its own file system.
        ({"memory.max": "2000000"}, "0::/docker/0123\n", None, 2_000_000),
        (
            {"cpu,cpuacct/x/cpu.cfs_quota_us": "1", "cpu/x/cpu.cfs_quota_us": "100000",
             "cpu/x/cpu.cfs_period_us": "100000", "memory/x/memory.limit_in_bytes": "3000000"},
            "4:memory:/x\n3:cpu,cpuacct:/x\n1:name=systemd:/\n0::/\n",
            1,
            3_000_000,
        ),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, "3:cpu:/\n", None, None),
    ],
)  # fmt: skip
def test_the_limits_of_a_container_count(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    files: dict[str, str],
    membership: str,
    cpus: int | None,
    memory_bytes: int | None,
) -> None:
    groups, own = tmp_path / "cgroup", tmp_path / "own"
    own.write_text(membership)
    groups.mkdir()
    for name, content in files.items():
        (groups / name).parent.mkdir(parents=True, exist_ok=True)
        (groups / name).write_text(content + "\n")
    monkeypatch.setattr(machine, "_CGROUPS", groups)
    monkeypatch.setattr(machine, "_OWN_CGROUP", own)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    found = this_machine()
    assert found.cpus == (cpus or 4)
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert found.memory_bytes == (memory_bytes or physical)


def test_a_user_without_a_home_is_told_before_a_study_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container that runs as a number of no user."""

    def unknown(uid: int) -> NoReturn:
        raise KeyError(uid)

    monkeypatch.setattr("pwd.getpwuid", unknown)
    monkeypatch.setenv("HOME", "/any")
    assert this_machine().cpus
    monkeypatch.delenv("HOME")
    with pytest.raises(CommandError, match="HOME: names a folder; found it is not set") as refusal:
        this_machine()
    assert exit_code(refusal.value) == 1


def test_a_machine_without_a_driver_has_no_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert this_machine().gpus == 0


def test_gpus_are_those_that_nvidia_smi_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n[ \"$1\" = -L ] && printf '%s' '{TWO_GPUS}'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert this_machine().gpus == 2
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert this_machine().gpus == 1


def test_each_gpu_has_the_name_that_cuda_knows_it_by(monkeypatch: pytest.MonkeyPatch) -> None:
    two = Machine(cpus=8, gpus=2, memory_bytes=10**9)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert two.cards == ("0", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, GPU-5ab,none,7")
    assert two.cards == ("3", "GPU-5ab")


def resources(workers: int = 1, gpus: float | Literal["auto"] = 0.0, cpus: float = 1.0) -> ResourcesSpec:
    return ResourcesSpec(workers=workers, gpus_per_worker=gpus, cpus_per_worker=cpus)


@pytest.mark.parametrize(
    ("asked", "cpus", "gpus", "concurrent_trials", "trials"),
    [
        (resources(), 8, 0, None, 8),
        (resources(), 8, 0, 3, 3),
        (resources(), 8, 0, 20, 8),
        (resources(workers=2), 8, 0, None, 4),
        (resources(workers=3), 8, 0, None, 2),
        (resources(cpus=0.5), 2, 0, None, 4),
        (resources(cpus=0.1), 1, 0, None, 10),
        (resources(workers=3, cpus=0.1), 3, 0, None, 10),
        (resources(gpus=1), 8, 2, None, 2),
        (resources(workers=2, gpus=1), 8, 4, None, 2),
        (resources(gpus=2), 8, 4, None, 2),
        (resources(gpus=0.25), 8, 1, None, 4),
        (resources(gpus=0.4), 8, 2, None, 4),  # 2 on each GPU; the two rests of 0.2 make no share
        (resources(gpus=0.05), 64, 1, None, 20),
        (resources(gpus=0.25), 2, 4, None, 2),  # CPUs are the narrower limit
        (resources(gpus="auto"), 64, 1, None, 8),
        (resources(gpus="auto", cpus=2), 8, 2, None, 4),
        (resources(gpus="auto"), 64, 2, 3, 3),
        (resources(gpus=1), 8, 0, None, 0),
        (resources(workers=9), 8, 0, None, 0),
    ],
)
def test_as_many_trials_run_at_once_as_fit(
    asked: ResourcesSpec, cpus: int, gpus: int, concurrent_trials: int | None, trials: int
) -> None:
    assert fit(asked, Machine(cpus, gpus, 10**9), concurrent_trials) == trials


@pytest.mark.parametrize(
    ("asked", "place", "found", "expected"),
    [
        (resources(workers=9), "resources.workers", "9 workers", "at most 8"),
        (resources(cpus=16), "resources.cpus_per_worker", "16 CPUs", "at most 8"),
        (resources(workers=4, gpus=1), "resources.workers", "4 GPUs", "at most 2"),
        (resources(gpus=3), "resources.gpus_per_worker", "3 GPUs", "at most 2"),
    ],
)
def test_what_does_not_fit_is_told_with_what_would(asked: ResourcesSpec, place: str, found: str, expected: str) -> None:
    (problem,) = resource_problems(asked, Machine(cpus=8, gpus=2, memory_bytes=10**9))
    assert problem.place == place
    assert found in problem.found
    assert expected in problem.expected
    assert "CPUs: 8, GPUs: 2" in problem.rule


@pytest.mark.parametrize("asked", [1, "auto"])
def test_gpus_where_there_are_none_are_refused_and_the_cpu_is_offered(asked: float | Literal["auto"]) -> None:
    (problem,) = resource_problems(resources(gpus=asked), Machine(cpus=8, gpus=0, memory_bytes=10**9))
    assert (problem.place, problem.found) == ("resources.gpus_per_worker", f"{asked}")
    assert problem.expected.startswith("0,")


def test_what_fits_has_no_problems() -> None:
    here = Machine(cpus=8, gpus=2, memory_bytes=10**9)
    assert resource_problems(resources(workers=2, gpus=1), here) == []
    assert resource_problems(resources(gpus=0.25), here) == []


@pytest.mark.parametrize(
    ("cpus", "gpus", "asked", "planned"),
    [
        (128, 8, {"gpus_per_worker": 1}, 16),  # eight trials: a supervisor and a rank each
        (128, 8, {"gpus_per_worker": 1, "workers": 4}, 10),  # two trials, four ranks each
        (128, 8, {"gpus_per_worker": 1, "cpus_per_worker": 12}, 96),
        (64, 1, {"gpus_per_worker": 0.25}, 8),
        (2, 0, {"gpus_per_worker": 0}, 2),  # a process for each core, the others as they are needed
    ],
)
def test_ray_is_told_of_as_many_cpus_as_a_study_needs(
    cpus: int, gpus: int, asked: dict[str, float], planned: int
) -> None:
    """It starts so many processes with itself."""
    place = ThisMachine()
    place.room = Machine(cpus=cpus, gpus=gpus, memory_bytes=2**40)
    written = {"name": "plans", "resources": asked, "budget": {"trials": 99}}
    model, data = {"name": "gpt2"}, {"task": "mrpc"}
    finetune = parse_spec(written | {"model": model, "data": data, "search_space": "gpt2"})
    assert place.planned_cpus(finetune) == planned
    space, objective = {"x": {"uniform": [0.0, 1.0]}}, {"metric": "x", "mode": "max"}
    own = parse_spec(written | {"trainable": "toys:train", "search_space": space, "objective": objective})
    assert place.planned_cpus(own) == cpus  # which may have tasks for Ray
