"""What a study costs as it grows: trials that wait, so that what is left is the service's own.

    python tests/benchmarks/bench_growth.py [--trials 100 1000] [--concurrent 2 32] [--epoch-s 0.5] [--plot growth.html]
    python tests/benchmarks/bench_growth.py --trials 1000 --concurrent 32 --epoch-s 1    # where a wide study's CPU goes
    python tests/benchmarks/bench_growth.py --trials 10 100 1000 10000 --concurrent 1 2 8 32 --epoch-s 0.1 --plot FILE

A study for each pair of the two lists; a pair with more trials at a time than trials is left out. A trial is 2 epochs
that wait. Ideal is what the trials wait, as many at a time as run. What a study pays once is told apart from what it
pays for each trial: `start` is from the moment when the first trial was handed out until every slot has begun one,
`steady` from there to the last trial's end. Memory is the driver's, from its 50th ended trial on; CPU is the whole
command's, Ray's start included, by process.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import meter
import yaml
from machine import describe, show
from record_times import trial_times

EPOCHS = 2
WARM_TRIALS = 50


def spec(trials: int, concurrent: int, epoch_s: float, log: Path) -> dict[str, Any]:
    return {
        "name": "growth",
        "trainable": "waiting:train",
        "training": {"max_epochs": EPOCHS, "epoch_s": epoch_s, "log": str(log)},
        "search_space": {"x": {"uniform": [0.0, 1.0]}, "y": {"log_uniform": [1e-5, 1e-1]}},
        "objective": {"metric": "score", "mode": "max"},
        "scheduler": {"name": "none"},
        "budget": {"trials": trials, "concurrent_trials": concurrent},
        "resources": {"workers": 1, "gpus_per_worker": 0, "cpus_per_worker": min(1.0, 2 / concurrent)},
    }


def measure(trials: int, concurrent: int, epoch_s: float) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as temporary:
        file, log = Path(temporary) / "spec.yaml", Path(temporary) / "begun.log"
        file.write_text(yaml.safe_dump(spec(trials, concurrent, epoch_s, log)))
        (Path(temporary) / "waiting.py").write_text((Path(__file__).parent / "waiting.py").read_text())
        command = [sys.executable, "-m", "tune_service.cli", "run", str(file), "--storage", temporary, "--json"]
        cost = meter.run(command)
        record = Path(temporary) / "growth" / "record.journal"
        record_bytes = record.stat().st_size
        begun = _begun(log, cost.began)
        times = [(start - cost.began, end - cost.began) for start, end in trial_times(record)]
    ran = json.loads(cost.output)["trials"]
    starts, ends = (sorted(moments) for moments in zip(*times, strict=True))
    took_s = ends[-1] - starts[0]
    ideal_s = trials * EPOCHS * epoch_s / concurrent
    cpu_s = cost.samples[-1].cpu_s
    return {
        "trials": trials,
        "concurrent": concurrent,
        "completed": sum(trial["state"] == "completed" for trial in ran),
        "ideal_s": ideal_s,
        "took_s": round(took_s, 2),
        "over_ideal": round(took_s / ideal_s, 3) if ideal_s else None,
        "seconds_a_trial": round(took_s / trials, 4),
        "whole_command_s": round(cost.wall_s, 1),
        "first_start_after_s": round(starts[0], 1),
        **_phases(cost, times, begun, concurrent, epoch_s),
        "others_cores": round(cost.others_cores, 2),
        "cpu_s": _rounded(cpu_s),
        "processes_started": cost.num_started,
        "driver_cpu_ms_a_trial": round(1000 * cpu_s["command"] / trials, 1),
        "driver_kb_a_trial": _kb_per_trial(cost, ends),
        "driver_mb_at_end": round(cost.samples[-1].memory_bytes / 1024**2),
        "all_processes_mb": round(cost.most_bytes / 1024**2),
        "most_processes": max(sample.num_processes for sample in cost.samples),
        "record_bytes_a_trial": round(record_bytes / trials),
    }


def _phases(
    cost: meter.Cost, times: list[tuple[float, float]], begun: list[float], concurrent: int, epoch_s: float
) -> dict[str, Any]:
    """What is paid once, until every slot has begun a trial, and what is paid from then on.

    `begun`: when each rank's process began its first trial, in order.
    """
    first = min(start for start, _ in times)
    found: dict[str, Any] = {"slots": len(begun), "first_slot_after_s": round(begun[0] - first, 2)}
    if len(begun) < concurrent:  # the study was over before
        return found
    ready = begun[concurrent - 1]
    ended = sum(end <= ready for _, end in times)
    start_cpu_s = next((sample.cpu_s for sample in cost.samples if sample.at_s >= ready), cost.samples[-1].cpu_s)
    found |= {
        "start_s": round(ready - first, 2),
        "start_trials": ended,
        "start_cpu_s": _rounded(start_cpu_s),
    }
    if later := len(times) - ended:
        steady_s = max(end for _, end in times) - ready
        ideal_s = later * EPOCHS * epoch_s / concurrent
        spent = {kind: seconds - start_cpu_s.get(kind, 0.0) for kind, seconds in cost.samples[-1].cpu_s.items()}
        found |= {
            "steady_trials": later,
            "steady_s_a_trial": round(steady_s / later, 4),
            "steady_over_ideal": round(steady_s / ideal_s, 3) if ideal_s else None,
            "steady_cpu_ms_a_trial": {kind: round(1000 * seconds / later, 1) for kind, seconds in spent.items()},
        }
    return found


def _begun(log: Path, began: float) -> list[float]:
    """When each process in the log of `waiting` began its first trial, in order."""
    first: dict[str, float] = {}
    for line in log.read_text().splitlines():
        moment, pid = line.split()
        first.setdefault(pid, float(moment) - began)
    return sorted(first.values())


def _rounded(cpu_s: Mapping[str, float]) -> dict[str, float]:
    return {kind: round(seconds, 1) for kind, seconds in sorted(cpu_s.items())}


def _kb_per_trial(cost: meter.Cost, ends: list[float]) -> float | None:
    """Growth of the driver's memory, from the moment when everything is warm; `ends` in order."""
    if len(ends) <= WARM_TRIALS:
        return None
    warm = [sample for sample in cost.samples if ends[WARM_TRIALS - 1] <= sample.at_s <= ends[-1]]
    before = sum(end <= warm[0].at_s for end in ends) if warm else len(ends)
    after = sum(end <= warm[-1].at_s for end in ends) if warm else len(ends)
    if after <= before:
        return None
    return round((warm[-1].memory_bytes - warm[0].memory_bytes) / 1024 / (after - before), 1)


CURVES = ("over_ideal", "steady_over_ideal", "start_s", "seconds_a_trial", "driver_mb_at_end", "driver_cpu_ms_a_trial")


def plot(results: list[dict[str, Any]], out: Path) -> None:
    """Each number over the trials of a study, a line for each number of trials at a time."""
    from plotly import graph_objects, subplots

    figure = subplots.make_subplots(rows=3, cols=2, subplot_titles=CURVES)
    colours = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b")
    for order, concurrent in enumerate(sorted({result["concurrent"] for result in results})):
        rows = [result for result in results if result["concurrent"] == concurrent]
        for place, name in enumerate(CURVES):
            line = graph_objects.Scatter(
                x=[row["trials"] for row in rows],
                y=[row.get(name) for row in rows],
                name=f"{concurrent} at a time",
                mode="lines+markers",
                line={"color": colours[order % len(colours)]},
                legendgroup=str(concurrent),
                showlegend=place == 0,
            )
            figure.add_trace(line, row=1 + place // 2, col=1 + place % 2)
    figure.update_xaxes(type="log", title="trials")
    figure.update_layout(height=1100, title=json.dumps(describe()))
    figure.write_html(out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, nargs="+", default=[100, 1000])
    parser.add_argument("--concurrent", type=int, nargs="+", default=[2])
    parser.add_argument("--epoch-s", type=float, default=0.5)
    parser.add_argument("--plot", type=Path, metavar="FILE.html")
    options = parser.parse_args()
    found = []
    for concurrent in options.concurrent:
        for trials in options.trials:
            if trials < concurrent:
                continue
            found.append(measure(trials, concurrent, options.epoch_s))
            show("growth", epoch_s=options.epoch_s, **found[-1])
            if options.plot is not None:  # after each: a long grid that is cut off has its plot too
                plot(found, options.plot)
