"""What a study costs as it grows: trials that wait, so that what is left is the service's own.

    python tests/benchmarks/bench_growth.py [--trials 100 1000] [--concurrent 2 32] [--epoch-s 0.5] [--out growth.html]

A study for each pair of the two lists. Wall time is from the first trial's start to the last one's end; ideal is what
the trials wait. Memory is the driver's, from its 50th ended trial on; CPU is the whole command's, Ray's start included,
by process. `--out FILE.html` gets the curves.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil
import yaml
from machine import show

EPOCHS = 2
WARM_TRIALS = 50
SAMPLE_S = 0.5


def spec(trials: int, concurrent: int, epoch_s: float) -> dict[str, Any]:
    return {
        "name": "growth",
        "trainable": "waiting:train",
        "training": {"max_epochs": EPOCHS, "epoch_s": epoch_s},
        "search_space": {"x": {"uniform": [0.0, 1.0]}, "y": {"log_uniform": [1e-5, 1e-1]}},
        "objective": {"metric": "score", "mode": "max"},
        "scheduler": {"name": "none"},
        "budget": {"trials": trials, "concurrent_trials": concurrent},
        "resources": {"workers": 1, "gpus_per_worker": 0, "cpus_per_worker": min(1.0, 2 / concurrent)},
    }


class Meter(threading.Thread):
    """Samples a command and what it started: CPU by kind of process, and the command's own memory by ended trials."""

    def __init__(self, pid: int, journal: Path) -> None:
        super().__init__(daemon=True)
        self._driver = psutil.Process(pid)
        self._journal = journal
        self._cpu_s: dict[int, tuple[str, float]] = {}
        self.memory: list[tuple[int, int]] = []
        """(ended trials, bytes of the driver)"""
        self.most_bytes = 0
        """Of all processes together, shared pages divided."""

    def run(self) -> None:
        ended, offset = 0, 0
        slow = 0
        while self._driver.is_running() and self._driver.status() != psutil.STATUS_ZOMBIE:
            with suppress(psutil.Error):
                processes = [self._driver, *self._driver.children(recursive=True)]
                for process in processes:
                    with suppress(psutil.Error):
                        times = process.cpu_times()
                        kind = kind_of(process, self._driver.pid)  # an idle worker becomes a rank
                        self._cpu_s[process.pid] = (kind, times.user + times.system)
                if self._journal.exists():
                    with self._journal.open("rb") as file:
                        file.seek(offset)
                        new = file.read()
                    ended, offset = ended + new.count(b'"datetime_complete":'), offset + len(new)
                self.memory.append((ended, self._driver.memory_info().rss))
                if slow % 20 == 0:  # reading shared pages takes long
                    self.most_bytes = max(self.most_bytes, sum(pss_of(process) for process in processes))
            slow += 1
            time.sleep(SAMPLE_S)

    def cpu_s(self) -> dict[str, float]:
        total: Counter[str] = Counter()
        for kind, seconds in self._cpu_s.values():
            total[kind] += seconds  # type: ignore[assignment]
        return {kind: round(seconds, 1) for kind, seconds in sorted(total.items())}

    def kb_per_trial(self) -> float | None:
        """Growth of the driver's memory, from the moment when everything is warm."""
        warm = [each for each in self.memory if each[0] >= WARM_TRIALS]
        if not warm or warm[-1][0] <= warm[0][0]:
            return None
        (first, before), (last, after) = warm[0], warm[-1]
        return round((after - before) / 1024 / (last - first), 1)


def kind_of(process: psutil.Process, driver: int) -> str:
    if process.pid == driver:
        return "driver"
    command = " ".join(process.cmdline())
    # Tune wraps the supervisor's class, and a process has now this and now that name of it.
    parts = {
        "ResourceTrai": "supervisors",
        "TrialSupervisor": "supervisors",
        "RankActor": "ranks",
        "ray::": "idle workers",
    }
    return next((kind for part, kind in parts.items() if part in command), "ray")  # raylet, GCS and their agents


def pss_of(process: psutil.Process) -> int:
    try:
        return int(process.memory_full_info().pss)
    except psutil.Error:
        return 0


def measure(trials: int, concurrent: int, epoch_s: float) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary) / "spec.yaml"
        file.write_text(yaml.safe_dump(spec(trials, concurrent, epoch_s)))
        (Path(temporary) / "waiting.py").write_text((Path(__file__).parent / "waiting.py").read_text())
        command = [sys.executable, "-m", "tune_service.cli", "run", str(file), "--storage", temporary, "--json"]
        began = time.monotonic()
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as driver:
            meter = Meter(driver.pid, Path(temporary) / "growth" / "record.journal")
            meter.start()
            document = driver.communicate()[0]
        whole_s = time.monotonic() - began
        record_bytes = (Path(temporary) / "growth" / "record.journal").stat().st_size
        meter.join()
    ended = json.loads(document)["trials"]
    starts = [datetime.fromisoformat(trial["started_at"]) for trial in ended]
    ends = [datetime.fromisoformat(trial["ended_at"]) for trial in ended]
    took_s = (max(ends) - min(starts)).total_seconds()
    ideal_s = trials * EPOCHS * epoch_s / concurrent
    cpu_s = meter.cpu_s()
    return {
        "trials": trials,
        "concurrent": concurrent,
        "completed": sum(trial["state"] == "completed" for trial in ended),
        "ideal_s": ideal_s,
        "took_s": took_s,
        "over_ideal": round(took_s / ideal_s, 3) if ideal_s else None,
        "seconds_a_trial": round(took_s / trials, 4),
        "whole_command_s": round(whole_s, 1),
        "cpu_s": cpu_s,
        "driver_cpu_ms_a_trial": round(1000 * cpu_s["driver"] / trials, 1),
        "driver_kb_a_trial": meter.kb_per_trial(),
        "driver_mb_at_end": round(meter.memory[-1][1] / 1024**2),
        "all_processes_mb": round(meter.most_bytes / 1024**2),
        "record_bytes_a_trial": round(record_bytes / trials),
    }


def plot(results: list[dict[str, Any]], out: Path) -> None:
    from plotly import graph_objects, subplots

    curves = ["over_ideal", "driver_cpu_ms_a_trial", "driver_kb_a_trial", "seconds_a_trial"]
    figure = subplots.make_subplots(rows=2, cols=2, subplot_titles=curves)
    for concurrent in sorted({result["concurrent"] for result in results}):
        rows = [result for result in results if result["concurrent"] == concurrent]
        for place, name in enumerate(curves):
            x, y = [row["trials"] for row in rows], [row[name] for row in rows]
            line = graph_objects.Scatter(x=x, y=y, name=f"{concurrent} at a time: {name}", mode="lines+markers")
            figure.add_trace(line, row=1 + place // 2, col=1 + place % 2)
    figure.update_xaxes(type="log", title="trials")
    figure.write_html(out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, nargs="+", default=[100, 1000])
    parser.add_argument("--concurrent", type=int, nargs="+", default=[2])
    parser.add_argument("--epoch-s", type=float, default=0.5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    found = []
    for concurrent in options.concurrent:
        for trials in options.trials:
            found.append(measure(trials, concurrent, options.epoch_s))
            show("growth", epoch_s=options.epoch_s, **found[-1])
    if options.out is not None:
        plot(found, options.out)
