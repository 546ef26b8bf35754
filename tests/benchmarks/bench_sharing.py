"""What a GPU gives when several trials share it: epochs a second of 1, 2, 4 and 8 trials side by side.

    TUNE_SERVICE_TEST_DATA=DATA python tests/benchmarks/bench_sharing.py [--trials 8] [--epochs 6] [--only turns|mps]

DATA holds gpt2-tokenizer/ and glue/mrpc. GPT-2 124M from random weights, batch 32, bf16, each trial in a process of its
own, evaluation included, no checkpoints: first as the card's driver shares it (turns of some milliseconds), then under
NVIDIA's Multi-Process Service where its server is installed. All processes are warm before the first number is taken.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench_finetune_gpu import settings
from machine import has_gpu, show

from tune_service.mps import side_by_side

WARM_EPOCHS = 3
"""A step of each width has been captured by then."""
MOST_EPOCHS = 150
"""Too few for compiling to pay."""


def trial(epochs: int) -> None:
    """One process: an answer on standard output for each line of standard input."""
    import torch

    from trainables import Context
    from trainables.finetune import finetune

    reports = finetune(Context({}, device="cuda", max_epochs=MOST_EPOCHS, settings=settings(MOST_EPOCHS)))
    for _ in range(WARM_EPOCHS):
        next(reports)
    free, total = torch.cuda.mem_get_info()
    print("RESULT" + json.dumps({"used_gib": (total - free) / 2**30}), flush=True)
    for _ in sys.stdin:
        taken = [next(reports).metrics["epoch_s"] for _ in range(epochs)]
        print("RESULT" + json.dumps({"epoch_s": sorted(taken)[len(taken) // 2]}), flush=True)


def answer(process: subprocess.Popen[str]) -> dict[str, Any]:
    assert process.stdout is not None
    for line in process.stdout:
        _, is_result, found = line.rpartition("RESULT")
        if is_result:
            return dict(json.loads(found))
    raise SystemExit(f"bench_sharing: a trial ended with {process.wait()} and without an answer")


def throughput(num_trials: int, epochs: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--trial", "--epochs", str(epochs)]
    processes = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(num_trials)
    ]
    try:
        used_gib = max(answer(process)["used_gib"] for process in processes)
        found: dict[str, Any] = {"used_gib_of_all": round(used_gib, 1)}
        together = 1
        while together <= num_trials:
            started = time.monotonic()
            for process in processes[:together]:
                assert process.stdin is not None
                process.stdin.write("go\n")
                process.stdin.flush()
            epoch_s = [answer(process)["epoch_s"] for process in processes[:together]]
            took_s = time.monotonic() - started
            shown = found[f"{together} at a time"] = {
                "epochs_per_s": round(together * epochs / took_s, 2),
                "epoch_s": round(max(epoch_s), 3),
            }
            print(together, shown, file=sys.stderr, flush=True)
            together *= 2
        return found
    finally:
        for process in processes:
            process.kill()
            process.wait()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=8, help="the most at a time")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--only", choices=["turns", "mps"], nargs="+", default=["turns", "mps"])
    parser.add_argument("--trial", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if WARM_EPOCHS + options.epochs * options.trials.bit_length() > MOST_EPOCHS:
        parser.error(f"--epochs is at most {(MOST_EPOCHS - WARM_EPOCHS) // options.trials.bit_length()}")
    if options.trial:
        trial(options.epochs)
    elif not has_gpu():
        print("bench_sharing: no GPU here, nothing measured")
    else:
        results: dict[str, Any] = {}
        if "turns" in options.only:
            results["in turns"] = throughput(options.trials, options.epochs)
        if "mps" in options.only:
            with (
                tempfile.TemporaryDirectory() as folder,
                side_by_side(Path(folder) / "mps", ["0"], options.trials) as shared,
            ):
                results["under MPS"] = shared.why_not or throughput(options.trials, options.epochs)
        show("sharing a GPU", **results)
