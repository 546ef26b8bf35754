"""What a command and all that it started cost: CPU by kind of process, memory, over time."""

from __future__ import annotations

import ctypes
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

Key = tuple[int, float]
"""Of a process: its pid and when it began, since pids come again."""
SAMPLE_S = 0.5
PR_SET_CHILD_SUBREAPER = 36
KINDS = {
    "raylet/raylet": "raylet",  # its own command line names those of the workers that it starts
    # Tune wraps the supervisor's class, and a process has now this and now that name of it.
    "ResourceTrai": "supervisors",
    "TrialSupervisor": "supervisors",
    "RankActor": "ranks",
    "ray::DashboardAgent": "agents",
    "ray::RuntimeEnvAgent": "agents",
    "ray::": "idle workers",
    "_worker.py": "idle workers",  # one that has no name yet
    "gcs_server": "gcs",
    "log_monitor": "log monitor",
    "dashboard": "dashboard",
    "autoscaler": "autoscaler",
}
"""Part of a command line -> kind, the first one that is found; what is none of them is `other`."""


@dataclass(frozen=True)
class Sample:
    """One moment of a command's life."""

    at_s: float
    """Since the command's start."""
    cpu_s: Mapping[str, float]
    """By kind of process, since the start."""
    memory_bytes: int
    """Of the command's own process."""
    num_processes: int


@dataclass
class Cost:
    """What a command cost."""

    output: str
    """Its standard output."""
    status: int
    began: float
    """time.time() of its start."""
    wall_s: float
    cpu_s: float
    """User and system, of all processes. What a process used in its last half second may be missing."""
    others_cores: float
    """What other work took of the machine meanwhile: with half a core or more, wall times say little."""
    samples: list[Sample] = field(default_factory=list)
    most_bytes: int = 0
    """Of all processes together, shared pages divided."""
    num_started: Mapping[str, int] = field(default_factory=dict)
    """Processes that there ever were, by kind."""


def run(command: Sequence[str], environment: Mapping[str, str] | None = None, log: Path | None = None) -> Cost:
    """Runs a command to its end. Its standard error goes to `log`."""
    # What Ray's processes leave behind when they end becomes a child of this one, and stays in sight.
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    began, began_at, busy_before_s = time.monotonic(), time.time(), _busy_s()
    with (log or Path("/dev/null")).open("w") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment)
        meter = _Meter(process.pid, began)
        meter.start()
        output = process.communicate()[0]
    wall_s, busy_s = time.monotonic() - began, _busy_s() - busy_before_s
    meter.join()
    samples = meter.samples()
    cpu_s = sum(samples[-1].cpu_s.values()) if samples else 0.0
    others_cores = max(0.0, busy_s - cpu_s) / wall_s
    return Cost(
        output,
        process.returncode,
        began_at,
        wall_s,
        cpu_s,
        others_cores,
        samples,
        meter.most_bytes,
        meter.num_started(),
    )


def _busy_s() -> float:
    """CPU seconds of the whole machine since its start."""
    times = psutil.cpu_times()
    return float(times.user + times.nice + times.system)  # `user` has no `nice` in it on Linux


class _Meter(threading.Thread):
    def __init__(self, pid: int, began: float) -> None:
        super().__init__(daemon=True)
        self._command, self._began = psutil.Process(pid), began
        self._kinds: dict[Key, str] = {}
        self._cpu_s: dict[Key, float] = {}
        self._looks: list[tuple[float, dict[Key, float], int, int]] = []
        self.most_bytes = 0

    def run(self) -> None:
        with suppress(psutil.Error):
            while self._command.is_running() and self._command.status() != psutil.STATUS_ZOMBIE:
                self._look()
                time.sleep(SAMPLE_S)

    def samples(self) -> list[Sample]:
        """A process counts as what it became in the end: an idle worker becomes a rank."""
        found = []
        for at_s, cpu_s, memory_bytes, num_processes in self._looks:
            total: Counter[str] = Counter()
            for key, seconds in cpu_s.items():
                total[self._kinds[key]] += seconds  # type: ignore[assignment]
            found.append(Sample(at_s, dict(total), memory_bytes, num_processes))
        return found

    def num_started(self) -> dict[str, int]:
        return dict(Counter(self._kinds.values()))

    def _look(self) -> None:
        processes = psutil.Process().children(recursive=True)
        for process in processes:
            with suppress(psutil.Error):
                key, times, command = (process.pid, process.create_time()), process.cpu_times(), process.cmdline()
                self._cpu_s[key] = times.user + times.system
                if any(command) or key not in self._kinds:  # one that has ended and waits to be seen has no name
                    self._kinds[key] = "command" if process == self._command else kind_of(" ".join(command))
        at_s, memory_bytes = time.monotonic() - self._began, self._command.memory_info().rss
        if len(self._looks) % 20 == 0:  # reading shared pages takes long
            self.most_bytes = max(self.most_bytes, sum(map(_pss_of, processes)))
        self._looks.append((at_s, dict(self._cpu_s), memory_bytes, len(processes)))


def kind_of(command: str) -> str:
    return next((kind for part, kind in KINDS.items() if part in command), "other")


def _pss_of(process: psutil.Process) -> int:
    try:
        return int(process.memory_full_info().pss)
    except psutil.Error:
        return 0
