"""A trial that trains next to nothing: what it finds out says whether trials will run, how fast and in what memory.

The ranks run it as any trainable, in the worker group that a trial would have. Report 1 is an all-reduce; report 2,
where there is something to fine-tune, some steps.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator

import numpy as np
import torch

from trainables import parallel
from trainables.batches import epoch_batches, eval_batches
from trainables.config import FinetuneConfig
from trainables.finetune import EVAL_FACTOR, Run
from trainables.optimizer import rates_of
from trainables.report import Context, Report
from trainables.steps import split_logits

REDUCED_BYTES = 16 * 1024**2
NUM_REDUCED = 3
TIMED_S = 10.0
"""About so long each thing is repeated that is timed; what takes longer is done once."""
NUM_TIMED = 20
"""So often at most."""


def probe(context: Context) -> Iterator[Report]:
    device = torch.device("cuda", 0) if context.device == "cuda" else torch.device("cpu")
    parallel.launch(context.rank, context.world_size, device)
    yield Report(1, {"all_reduce_s": _all_reduce_s(device), "all_reduce_bytes": float(REDUCED_BYTES)})
    if context.settings:
        run = Run(context, FinetuneConfig(**context.settings))
        try:
            yield Report(2, _steps(run))
        finally:
            run.close()


def _all_reduce_s(device: torch.device) -> float:
    """The fastest of some, after one that opens the connections."""
    values = torch.ones(REDUCED_BYTES // 4, device=device)
    seconds = []
    for _ in range(1 + NUM_REDUCED):
        parallel.barrier()
        started = time.perf_counter()
        parallel.sum_over_ranks(values)
        values[0].item()  # the device has done it then
        seconds.append(time.perf_counter() - started)
        values.fill_(1.0)
    return min(seconds[1:])


def _steps(run: Run) -> dict[str, float]:
    """Trains on the longest rows there are, which shows the most memory, then on an epoch's first batches."""
    training, lengths = run.config.training, run.data.train.lengths
    longest = np.argsort(-lengths, kind="stable")[: training.batch_size]
    run.learner.network.train()
    cold_s = _train_s(run, [longest])
    step_s = min(_train_s(run, [longest]) for _ in range(_repeats(cold_s)))
    some = epoch_batches(lengths, training.batch_size, training.seed, 1)[: _repeats(step_s)]
    for _ in range(2 if run.device.type == "cuda" else 0):  # the second time a width is met its step is captured
        _train_s(run, some)
    train_row_s = _train_s(run, some) / sum(map(len, some))
    validation_rows = sum(len(labels) for _, labels in run.data.validation.values())
    return {
        "step_s": step_s,
        "train_row_s": train_row_s,
        "train_rows": float(len(lengths)),
        "eval_row_s": _eval_row_s(run),
        "eval_rows": float(validation_rows),
        "parameters": float(sum(each.numel() for each in run.learner.network.parameters())),
        **_memory(run.device),
    }


def _train_s(run: Run, batches: list[np.ndarray]) -> float:
    """How long the steps of some batches took, by the slowest rank. The learning rate is 0."""
    rates = rates_of(0.0, run.config.training.weight_decay, run.config.training.max_grad_norm)
    started = time.perf_counter()
    run.ready.steps.epoch(batches, [rates] * len(batches)).tolist()  # waits for the device
    return _largest(time.perf_counter() - started)


def _eval_row_s(run: Run) -> float:
    """Seconds for each row of the validation split, over all ranks; a batch of the longest rows comes first."""
    training = run.config.training
    name, (encoded, _) = next(iter(run.data.validation.items()))
    rows = run.ready.validation[name]
    batches = eval_batches(encoded.lengths, EVAL_FACTOR * (training.micro_batch_size or training.batch_size))
    run.learner.network.eval()
    with run.learner.uncompiled():
        split_logits(run.learner.network, rows, batches[-1:], training.max_length).sum().item()
        middle = batches[len(batches) // 2]
        started = time.perf_counter()
        split_logits(run.learner.network, rows, [middle], training.max_length).sum().item()
    return _largest(time.perf_counter() - started) / len(middle) / run.world_size


def _repeats(seconds: float) -> int:
    """How often what takes so long is done again: on every rank as often, or one would wait for ever."""
    return int(min(NUM_TIMED, max(1, TIMED_S / seconds)))


def _largest(value: float) -> float:
    return float(parallel.largest_over_ranks(torch.tensor(value, dtype=torch.float64)))


def _memory(device: torch.device) -> dict[str, float]:
    """The most that a rank had taken, and what its GPU has (0: none, then it is the process's memory)."""
    if device.type == "cuda":
        peak, total = torch.cuda.max_memory_reserved(device), torch.cuda.get_device_properties(device).total_memory
    else:
        peak, total = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, 0
    return {"peak_bytes": _largest(float(peak)), "gpu_bytes": float(total)}
