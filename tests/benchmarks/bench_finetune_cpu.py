"""One trial, and two side by side on one core each: MiniLM on the first 64 rows of MRPC, batch 32, fp32.

    TUNE_SERVICE_TEST_DATA=DATA TUNE_SERVICE_TEST_MODELS=MODELS python tests/benchmarks/bench_finetune_cpu.py

DATA holds glue/mrpc, MODELS the folder minilm. The peers are a plain loop (dynamic padding, SDPA, fused AdamW,
clipping) and Hugging Face's Trainer. All run on one thread and are compared by the CPU time of an epoch with its
evaluation, the best one of each, so that other work on the machine hardly counts. Tokens are real ones.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from machine import show

ROWS, EPOCHS = {"train": 64, "validation": 16}, 3


def settings(data: Path) -> dict[str, Any]:
    return {
        "model": {"name": str(Path(os.environ["TUNE_SERVICE_TEST_MODELS"]) / "minilm")},
        "data": {"task": "mrpc", "path": str(data)},
        "training": {"max_epochs": EPOCHS, "batch_size": 32, "precision": "fp32"},
    }


def measured(name: str, data: Path) -> dict[str, float]:
    import torch
    import transformers
    from finetune_peers import hugging_face, plain_loop, product

    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)

    if name == "tune-service":
        times = product(settings(data), "cpu")
    elif name == "plain loop":
        times = plain_loop(settings(data), "cpu", width=None, attention="sdpa", fused=True, clip=1.0)
    else:
        with tempfile.TemporaryDirectory() as folder:
            times = hugging_face(settings(data), "cpu", folder)
    return {
        "tokens_per_cpu_s": round(times.tokens / min(times.cpu_s), 1),
        "tokens_per_s": round(times.tokens / min(times.train_s), 1),
    }


def running_threads(processes: list[subprocess.Popen[str]]) -> int:
    """Threads of some processes that run or want to, at this moment."""
    found = 0
    for process in processes:
        for stat in Path(f"/proc/{process.pid}/task").glob("*/stat"):
            try:
                found += stat.read_text().rpartition(")")[2].split()[0] == "R"
            except OSError:
                continue  # the thread has ended
    return found


def side_by_side(data: Path, num_cores: int) -> dict[str, float]:
    """A trial a core, as ranks with one CPU each run."""
    command = [sys.executable, __file__, "tune-service", str(data)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # what Ray sets for `cpus_per_worker: 1`
    processes = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(num_cores)
    ]
    samples = []
    while all(process.poll() is None for process in processes):
        samples.append(running_threads(processes))
        time.sleep(0.05)
    found = [json.loads(process.communicate()[0].rpartition("RESULT")[2]) for process in processes]
    return {
        "tokens_per_s_together": round(sum(each["tokens_per_s"] for each in found)),
        "mean_running_threads": round(sum(samples) / len(samples), 2),
        "samples_with_more_than_the_cores": sum(sample > num_cores for sample in samples) / len(samples),
    }


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print("RESULT" + json.dumps(measured(sys.argv[1], Path(sys.argv[2]))), flush=True)
        sys.exit()
    os.environ |= {"TUNE_SERVICE_DEVICE": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for split, size in ROWS.items():
            source = Path(os.environ["TUNE_SERVICE_TEST_DATA"]) / "glue" / "mrpc" / f"{split}.parquet"
            pq.write_table(pq.read_table(source).slice(0, size), folder / f"{split}.parquet")
        results = {name: measured(name, folder) for name in ("tune-service", "plain loop", "Hugging Face Trainer")}
        print(json.dumps(results), file=sys.stderr, flush=True)
        rate = {name: found["tokens_per_cpu_s"] for name, found in results.items()}
        show(
            "finetune on a CPU",
            **results,
            times_the_plain_loop=round(rate["tune-service"] / rate["plain loop"], 2),
            times_the_trainer=round(rate["tune-service"] / rate["Hugging Face Trainer"], 2),
            side_by_side=side_by_side(folder, cores),
        )
