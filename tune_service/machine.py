"""What this machine offers, and how many trials fit on it at once."""

from __future__ import annotations

import math
import os
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from trainables.errors import Problem
from tune_service.errors import CommandError
from tune_service.spec import ResourcesSpec

_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUP = Path("/proc/self/cgroup")


@dataclass(frozen=True)
class Machine:
    """What a study may use here: what the hardware has, less what the process was denied."""

    cpus: int
    gpus: int
    memory_bytes: int

    @property
    def cards(self) -> tuple[str, ...]:
        """What CUDA_VISIBLE_DEVICES calls each GPU here."""
        written = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = map(str, range(self.gpus)) if written is None else (name.strip() for name in written.split(","))
        return tuple(dict.fromkeys(names))[: self.gpus]

    def offer(self) -> str:
        """In words."""
        return f"{self.cpus} CPUs, {self.gpus} GPUs"

    def fit(self, resources: ResourcesSpec, concurrent_trials: int | None = None) -> int:
        """How many trials run at once; 0 when not even one has room."""
        return fit(resources, self, concurrent_trials)

    def problems(self, resources: ResourcesSpec) -> list[Problem]:
        """Why not even one trial of a study fits here; empty when one does."""
        return resource_problems(resources, self)


def this_machine() -> Machine:
    """Asks the operating system. A container's quota counts, for Ray would otherwise plan with the host's cores.

    CommandError where Ray could not even be imported.
    """
    _check_home()
    groups = list(_own_cgroups(_OWN_CGROUP, _CGROUPS))
    cores = len(os.sched_getaffinity(0))
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    quota = min((quota for group in groups if (quota := _cpu_quota(group)) is not None), default=math.inf)
    limit = min((limit for group in groups if (limit := _memory_limit(group)) is not None), default=physical)
    return Machine(
        cpus=int(max(1, min(cores, quota))),
        gpus=visible_gpus(os.environ.get("CUDA_VISIBLE_DEVICES"), _nvidia_smi()),
        memory_bytes=min(physical, limit),
    )


def fit(resources: ResourcesSpec, machine: Machine, concurrent_trials: int | None = None) -> int:
    """How many trials run at once; 0 when not even one has room."""
    by_cpus = _floor(machine.cpus / (resources.workers * resources.cpus_per_worker))
    limits = [by_cpus]
    gpus = resources.gpu_share
    if 0 < gpus < 1:
        limits.append(machine.gpus * resources.ranks_on_a_gpu)  # a share lies on one GPU: two rests make no share
    elif gpus:
        limits.append(_floor(machine.gpus / (resources.workers * gpus)))
    if concurrent_trials is not None:
        limits.append(concurrent_trials)
    return min(limits)


def resource_problems(resources: ResourcesSpec, machine: Machine) -> list[Problem]:
    """Why not even one trial of a study fits here; empty when one does."""
    return [*_cpu_problems(resources, machine), *_gpu_problems(resources, machine)]


def visible_gpus(cuda_visible_devices: str | None, listing: str) -> int:
    """How many GPUs CUDA shows to a process: `listing` is what `nvidia-smi -L` prints, the other the variable's value.

    As in CUDA, the first entry that names no device hides all that follow it.
    """
    indices = re.findall(r"^GPU (\d+):", listing, re.MULTILINE)
    if cuda_visible_devices is None:
        return len(indices)
    uuids = re.findall(r"UUID: ([^)\s]+)\)", listing)
    seen: set[str] = set()
    for entry in (entry.strip() for entry in cuda_visible_devices.split(",")):
        # An UUID may be cut short as long as it means one device.
        named = [uuid for uuid in uuids if entry.startswith(("GPU-", "MIG-")) and uuid.startswith(entry)]
        if not (entry in indices or len(named) == 1):
            break
        seen.add(named[0] if named else entry)
    return len(seen)


def _check_home() -> None:
    """Ray looks for it when it is imported, which is after a study was made."""
    try:
        Path.home()
    except RuntimeError as error:
        found = f"it is not set, and no user {os.getuid()} is known here"
        raise CommandError(Problem("HOME", "names a folder", found, "HOME=FOLDER in the environment")) from error


def _cpu_problems(resources: ResourcesSpec, machine: Machine) -> Iterator[Problem]:
    workers, each = resources.workers, resources.cpus_per_worker
    if _floor(machine.cpus / (workers * each)):
        return
    rule = f"one trial fits on the machine ({_offer(machine)})"
    found = f"{workers} workers with cpus_per_worker {each:g}: {workers * each:g} CPUs"
    room = _floor(machine.cpus / each)
    key = "resources.workers" if room else "resources.cpus_per_worker"
    yield Problem(key, rule, found, f"at most {room}" if room else f"at most {machine.cpus}")


def _gpu_problems(resources: ResourcesSpec, machine: Machine) -> Iterator[Problem]:
    workers, each = resources.workers, resources.gpu_share
    if workers * each <= machine.gpus:
        return
    if machine.gpus == 0:
        rule = (
            f"GPUs are asked for only where there are some ({_offer(machine)}, by CUDA_VISIBLE_DEVICES and nvidia-smi)"
        )
        found = "auto" if resources.finds_share else f"{each:g}"
        yield Problem("resources.gpus_per_worker", rule, found, "0, which trains on the CPU")
        return
    rule = f"one trial fits on the machine ({_offer(machine)})"
    found = f"{workers} workers with gpus_per_worker {each:g}: {workers * each:g} GPUs"
    room = _floor(machine.gpus / each)
    key = "resources.workers" if room else "resources.gpus_per_worker"
    yield Problem(key, rule, found, f"at most {room}" if room else f"at most {machine.gpus}")


def _offer(machine: Machine) -> str:
    return f"CPUs: {machine.cpus}, GPUs: {machine.gpus}"


def _floor(value: float) -> int:
    return math.floor(value + 1e-9)  # 3 CPUs hold 10 trials of 3 workers with 0.1 each, not 9.999999999999998


def _nvidia_smi() -> str:
    """The listing of the GPUs, which no environment variable narrows; empty where there is no driver."""
    try:
        run = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return run.stdout


def _own_cgroups(membership: Path, mount: Path) -> Iterator[Path]:
    """The folders that may hold a limit of ours, for cgroup v2 and v1: the process's own group and all around it.

    Inside a container the group's path is often the host's and is not there; the container's own limits then stand in
    the root of the mount.
    """
    for line in _read_text(membership).splitlines():
        _, controllers, path = line.split(":", 2)
        roots = [mount / name for name in controllers.split(",")] if controllers else [mount]
        for root in roots:
            group = root / path.lstrip("/")
            yield from (each for each in (group, *group.parents) if each.is_relative_to(root) and each.is_dir())


def _cpu_quota(group: Path) -> float | None:
    """CPUs that a group may use, by cpu.max (v2) or cpu.cfs_quota_us (v1); None: no limit."""
    quota, _, period = _read_text(group / "cpu.max").strip().partition(" ")
    if not quota:
        quota, period = _read_text(group / "cpu.cfs_quota_us").strip(), _read_text(group / "cpu.cfs_period_us").strip()
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() and int(period) else None


def _memory_limit(group: Path) -> int | None:
    """Bytes that a group may use, by memory.max (v2) or memory.limit_in_bytes (v1); None: no limit."""
    limit = _read_text(group / "memory.max").strip() or _read_text(group / "memory.limit_in_bytes").strip()
    return int(limit) if limit.isdigit() else None


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii")
    except OSError:
        return ""
