"""One trial's epoch on a GPU: GPT-2 124M (random weights) on MRPC, batch 32, with the evaluation of 408 rows.

    TUNE_SERVICE_TEST_DATA=DATA python tests/benchmarks/bench_finetune_gpu.py

DATA holds gpt2-tokenizer/ and glue/mrpc. The peers are a plain loop in fp32 (rows padded to 128, eager attention,
torch's AdamW) and Hugging Face's Trainer (bf16, SDPA, dynamic padding), each in a process of its own. Medians of later
epochs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from machine import has_gpu, show


def settings(max_epochs: int, **training: Any) -> dict[str, Any]:
    data = Path(os.environ["TUNE_SERVICE_TEST_DATA"])
    return {
        "model": {"name": str(data / "gpt2-tokenizer"), "from_scratch": True},
        "data": {"task": "mrpc", "path": str(data / "glue" / "mrpc")},
        "training": {"max_epochs": max_epochs, "batch_size": 32} | training,
    }


def ours(compile_: str, boosts: bool) -> dict[str, Any]:
    """A first trial, and a second one with other values in the process that is warm by then."""
    from finetune_peers import product

    from trainables import learner, parallel

    learner._kept.clear()
    parallel.BOOST_ONE_RANK = boosts
    found = product(settings(6, compile=compile_), "cuda").summary(skip=3)
    second = product(settings(3, compile=compile_, learning_rate=1e-4, weight_decay=0.1, seed=1), "cuda")
    return found | {"next_trial_epoch_s": [round(epoch_s, 3) for epoch_s in second.epoch_s]}


def contender(name: str) -> dict[str, Any]:
    import torch
    from finetune_peers import hugging_face, plain_loop

    if name == "tune-service":
        return {
            "tune-service": ours("auto", boosts=False),
            "tune-service, TorchDDPPlugin": ours("auto", boosts=True),
            "tune-service, compile: on": ours("on", boosts=False),
            "tune-service, compile: on, TorchDDPPlugin": ours("on", boosts=True),
            "gpu": torch.cuda.get_device_name(),
        }
    if name == "plain":
        times = plain_loop(settings(3), "cuda", width=128, attention="eager", fused=None, clip=None)
        return {"plain loop, fp32, padded to 128": times.summary(skip=1)}
    with tempfile.TemporaryDirectory() as folder:
        return {"Hugging Face Trainer, bf16": hugging_face(settings(3), "cuda", folder).summary(skip=1)}


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print("RESULT" + json.dumps(contender(sys.argv[1])), flush=True)
    elif not has_gpu():
        print("bench_finetune_gpu: no GPU here, nothing measured")
    else:
        results: dict[str, Any] = {}
        for name in ("tune-service", "plain", "trainer"):
            command = [sys.executable, __file__, name]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            results |= json.loads(done.stdout.rpartition("RESULT")[2])
        plain_s = results["plain loop, fp32, padded to 128"]["epoch_s"]
        ratios = {
            name: round(plain_s / found["epoch_s"], 2) for name, found in results.items() if isinstance(found, dict)
        }
        show("finetune on a GPU", **results, times_the_plain_loop=ratios)
