"""What a large checkpoint costs a trial: from report to report, and what the rank does meanwhile.

    python tests/benchmarks/bench_checkpoint.py [--mb 300] [--epoch-s 2] [--epochs 8] [--busy] [--folder DIR]

One trial at a time. An epoch waits, as for a GPU (with --busy it keeps a core busy), and its report saves a checkpoint
of safetensors in three files. Report to report is from one epoch's begin to the next one's, in the rank; medians
without the first epoch. Of that the rank trains, writes, or waits: for the supervisor to ask (`to_save_s`), and from
its last byte to the next epoch's begin (`to_next_epoch_s`). `commit_s`: from the rank's first byte to the moment when
the checkpoint stands, hashed, synced and renamed. `over_sum`: report to report over epoch + commit, the least where the
rank waits for the commit. `over_max`: over max(epoch, commit), the least there could be. `over_overlap`: over write +
max(epoch, rest of the commit), the least where the rank writes by itself and then trains on. The same with checkpoints
of 1 KB shows what is the service's own way there and back, and `bare` what the machine takes for the same files.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import saving
import yaml
from machine import show

HERE = Path(__file__).parent
LOOK_S, BARE_RUNS = 0.005, 3


def spec(mb: float, epoch_s: float, epochs: int, busy: bool, log: Path) -> dict[str, Any]:
    return {
        "name": "checkpoints",
        "trainable": "saving:train",
        "training": {
            "max_epochs": epochs,
            "epoch_s": epoch_s,
            "checkpoint_mb": mb,
            "busy": busy,
            "log": str(log),
        },
        "search_space": {"x": {"uniform": [0.0, 1.0]}},
        "objective": {"metric": "score", "mode": "max"},
        "scheduler": {"name": "none"},
        "budget": {"trials": 1, "concurrent_trials": 1},
        "resources": {"workers": 1, "gpus_per_worker": 0},
    }


class Watch(threading.Thread):
    """When each epoch's checkpoint came to stand."""

    def __init__(self, store: Path) -> None:
        super().__init__(daemon=True)
        self._store = store
        self._end = threading.Event()
        self.stood: dict[int, float] = {}

    def run(self) -> None:
        while not self._end.wait(LOOK_S):
            for folder in self._store.glob("trial-*/epoch-*"):
                self.stood.setdefault(int(folder.name.removeprefix("epoch-")), time.time())

    def end(self) -> None:
        self._end.set()
        self.join()


def measure(mb: float, epoch_s: float, epochs: int, busy: bool, root: Path | None) -> dict[str, float]:
    with tempfile.TemporaryDirectory(dir=root) as temporary:
        folder = Path(temporary)
        log, file = folder / "log", folder / "spec.yaml"
        file.write_text(yaml.safe_dump(spec(mb, epoch_s, epochs, busy, log)))
        (folder / "saving.py").write_text((HERE / "saving.py").read_text())
        command = [sys.executable, "-m", "tune_service.cli", "run", str(file), "--storage", temporary, "--json"]
        watch = Watch(folder / "checkpoints" / "checkpoints")
        watch.start()
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True)
        watch.end()
        assert json.loads(done.stdout)["trials"][0]["state"] == "completed"
        at = {(event, int(epoch)): float(moment) for moment, event, epoch in map(str.split, log.open())}
    later = range(2, epochs)  # the first one is cold, the last one has no next

    def median(begin: str, end: str, shift: int = 0) -> float:
        return statistics.median(at[end, epoch + shift] - at[begin, epoch] for epoch in later)

    return {
        "report_to_report_s": median("begin", "begin", 1),
        "epoch_s": median("begin", "end"),
        "to_save_s": median("end", "save"),
        "write_s": median("save", "saved"),
        "to_next_epoch_s": median("saved", "begin", 1),
        "commit_s": statistics.median(watch.stood[epoch] - at["save", epoch] for epoch in later),
    }


def bare(mb: float, root: Path | None) -> dict[str, float]:
    """The same files written, hashed and synced by one thread, one thing after the other. Medians."""
    found = [_bare(mb, root) for _ in range(BARE_RUNS)]
    return {name: statistics.median(each[name] for each in found) for name in found[0]}


def _bare(mb: float, root: Path | None) -> dict[str, float]:
    with tempfile.TemporaryDirectory(dir=root) as temporary:
        folder = Path(temporary)
        num_bytes = int(mb * saving.MB)
        saving.tensors(num_bytes // saving.PARTS)
        moments = [time.perf_counter()]
        saving.save(folder, num_bytes)
        moments.append(time.perf_counter())
        for path in folder.iterdir():
            with path.open("rb") as file:
                hashlib.file_digest(file, "sha256")
        moments.append(time.perf_counter())
        for path in folder.iterdir():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
        moments.append(time.perf_counter())
    write_s, hash_s, sync_s = (end - begin for begin, end in pairwise(moments))
    return {"write_s": write_s, "hash_s": hash_s, "sync_s": sync_s}


def rounded(seconds: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 3) for name, value in seconds.items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mb", type=float, default=300.0)
    parser.add_argument("--epoch-s", type=float, default=2.0)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--busy", action="store_true")
    parser.add_argument("--folder", type=Path, help="on the disk to be measured")
    options = parser.parse_args()
    if options.epochs < 3:
        raise SystemExit("bench_checkpoint: --epochs is at least 3: the first and the last one do not count")
    large = measure(options.mb, options.epoch_s, options.epochs, options.busy, options.folder)
    tiny = measure(0.001, options.epoch_s, options.epochs, options.busy, options.folder)
    alone = bare(options.mb, options.folder)
    whole_s, epoch_s, commit_s = large["report_to_report_s"], large["epoch_s"], large["commit_s"]
    show(
        "checkpoint",
        mb=options.mb,
        busy=options.busy,
        **rounded(large),
        trains=round(epoch_s / whole_s, 3),
        writes=round(large["write_s"] / whole_s, 3),
        waits=round((large["to_save_s"] + large["to_next_epoch_s"]) / whole_s, 3),
        over_max=round(whole_s / max(epoch_s, commit_s), 3),
        over_overlap=round(whole_s / (large["write_s"] + max(epoch_s, commit_s - large["write_s"])), 3),
        over_sum=round(whole_s / (epoch_s + commit_s), 3),
        tiny_checkpoint=rounded(tiny),
        bare=rounded(alone),
        commit_over_bare=round(commit_s / sum(alone.values()), 2),
    )
