"""How fast commands answer: `--help`, and `status` of a study of 1,000 trials.

python tests/benchmarks/bench_cli.py
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from machine import show, spread

from search_spaces import parse_domain
from tune_service.record import Record, direction_of
from tune_service.searcher import StudySampler, distributions
from tune_service.storage import Storage

NUM_TRIALS = 1000
NUM_RUNS = 7


def seconds_of(*command: str) -> list[float]:
    taken = []
    for _ in range(NUM_RUNS):
        started = time.perf_counter()
        subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)
        taken.append(time.perf_counter() - started)
    return taken


def write_study(root: Path) -> None:
    """A study of 1,000 trials with 3 reports each, through the record as a driver would."""
    domains = {"x": {"uniform": [0.0, 1.0]}, "y": {"log_uniform": [1e-5, 1e-1]}}
    spec = {"objective": {"metric": "score", "mode": "max"}, "search_space": domains, "budget": {"trials": NUM_TRIALS}}
    folder = Storage(root).create("large")
    record = Record.create(folder, spec, StudySampler("random", 0, direction_of("max")))
    space = distributions({name: parse_domain(domain) for name, domain in domains.items()})  # type: ignore[arg-type]
    for number in range(NUM_TRIALS):
        record.ask(space, lambda _: {})
        record.start(number)
        for epoch in (1, 2, 3):
            record.report(number, epoch, {"score": number + epoch / 10, "loss": 1 / epoch}, lambda: None)
        record.complete(number)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        write_study(Path(temporary))
        program = ("-m", "tune_service.cli")
        show(
            "cli",
            bare_python=spread(seconds_of("-c", "")),
            help=spread(seconds_of(*program, "--help")),
            status_of_1000_trials=spread(seconds_of(*program, "status", "large", "--storage", temporary, "--json")),
        )
