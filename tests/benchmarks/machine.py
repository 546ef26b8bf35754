"""What a benchmark prints beside its numbers."""

from __future__ import annotations

import json
import os
import platform
import shutil
import statistics
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any


def describe() -> dict[str, Any]:
    """The machine, its load, the versions and the date."""
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "cpu": models[0].partition(":")[2].strip() if models else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "load_before": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("ray", "optuna", "torch", "transformers", "colossalai")},
    }


def has_gpu() -> bool:
    """Whether NVIDIA's driver answers."""
    return shutil.which("nvidia-smi") is not None and not subprocess.run(["nvidia-smi"], capture_output=True).returncode


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """Minimum, median and maximum, in seconds."""
    return {
        "min_s": round(min(seconds), 3),
        "median_s": round(statistics.median(seconds), 3),
        "max_s": round(max(seconds), 3),
    }


def show(name: str, **results: Any) -> None:
    print(json.dumps({"benchmark": name, **describe(), **results}, indent=1), flush=True)
