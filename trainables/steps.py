"""Training steps and forward passes on one rank, without a word from the host to the device that is not needed.

On a GPU the host is the slow part: a step of a small transformer is over a thousand kernels of some microseconds each.
So the data set lies on the device, a step reads only tensors that stay at one place, and from the second batch of a
width on the whole step (forward, backward, all-reduce, clipping, AdamW) is one CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any
from weakref import WeakSet

import numpy as np
import torch
from torch.func import functional_call
from torch.nn import functional

from trainables.batches import Encoded, bucket_width
from trainables.errors import ModelError, Problem
from trainables.optimizer import AdamW
from trainables.parallel import Parallel

SHORT_ROWS = 128
"""Tokens. In rows no longer than that cuDNN's attention takes 1.4 times as long as torch's own (H200, 64 tokens)."""


class DeviceRows:
    """A tokenised split on the device, from which a batch is cut there."""

    def __init__(self, encoded: Encoded, pad_token_id: int, device: torch.device) -> None:
        self.lengths = encoded.lengths
        """Tokens of each row, on the host."""
        self._pad_token_id = pad_token_id
        self._starts = torch.from_numpy(encoded.offsets[:-1]).to(device)
        self._lengths = torch.from_numpy(self.lengths).to(device)
        columns = {"input_ids": encoded.ids, "token_type_ids": encoded.token_type_ids}
        self._columns = {name: torch.from_numpy(ids).to(device) for name, ids in columns.items() if ids is not None}

    def inputs(self, rows: torch.Tensor, width: int) -> dict[str, torch.Tensor]:
        """What a model is given, padded on the right, shape (rows, width)."""
        positions = torch.arange(width, device=rows.device)
        real = positions < self._lengths[rows, None]
        # Positions beyond a row's end point at its first token, which the mask then replaces.
        index = self._starts[rows, None] + torch.where(real, positions, 0)
        fillers = {"input_ids": self._pad_token_id}
        inputs = {
            name: torch.where(real, ids[index], fillers.get(name, 0)).long() for name, ids in self._columns.items()
        }
        return inputs | {"attention_mask": real.long()}


_graphs: WeakSet[torch.cuda.CUDAGraph] = WeakSet()
"""All of this process. One runs at a time and keeps nothing for later, so that all use the same memory."""


class Graphs:
    """Runs functions over tensors that stay at one place: as they are, or, from the second time on, as a CUDA graph.

    The first time is a real run too. It loads kernels and fills caches, which a capture must not do.
    """

    def __init__(self, enabled: bool, num_eager: int) -> None:
        """`num_eager`: so many runs come before the first capture."""
        self.enabled = enabled
        self._num_eager = num_eager
        self._graphs: dict[int, torch.cuda.CUDAGraph | None] = {}

    def run(self, key: int, function: Callable[[], None]) -> None:
        if not self.enabled or key not in self._graphs or self._num_eager > 0:
            function()
            self._graphs[key] = None
            self._num_eager -= 1
            return
        graph = self._graphs[key]
        if graph is None:
            graph = self._graphs[key] = self._capture(function)
        graph.replay()

    def _capture(self, function: Callable[[], None]) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        pool = next((other.pool() for other in _graphs), None)
        torch.cuda.synchronize()
        try:
            # thread_local: NCCL's watchdog asks for the state of events while this thread captures.
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                function()
            finally:
                graph.capture_end()
        except RuntimeError as error:
            cause = error.__context__ or error  # the end of a broken capture only says that it is broken
            if isinstance(cause, torch.OutOfMemoryError):
                raise cause from None
            rule, found = "a training step of the model can be captured as a CUDA graph", f"{cause}".partition("\n")[0]
            raise ModelError(Problem("training.compile", rule, found, "compile: off for this model")) from error
        _graphs.add(graph)
        return graph


class Steps:
    """The steps of trials that share model, data, `max_length`, batch size, precision: they may differ in all else."""

    def __init__(
        self,
        parallel: Parallel,
        optimizer: AdamW,
        train: DeviceRows,
        labels: torch.Tensor,
        *,
        num_classes: int,
        max_length: int,
        batch_size: int,
        micro_batch_size: int | None,
        precision: str,
        captures: bool,
        copies: dict[str, torch.Tensor],
    ) -> None:
        """`num_classes` 0: a regression. `copies` take the place of the model's parameters of those names."""
        self._parallel, self._optimizer, self._train = parallel, optimizer, train
        self._device = labels.device
        self._labels = labels
        self._num_classes, self._max_length = num_classes, max_length
        self._micro_batch_size, self._precision = micro_batch_size, precision
        self._copies = copies
        self._graphs = Graphs(captures, parallel.num_eager_steps)
        rank_rows = -(-batch_size // parallel.world_size)
        # What a captured step reads and writes.
        self._rows = torch.zeros(rank_rows, dtype=torch.int64, device=self._device)
        self._weights = torch.zeros(rank_rows, device=self._device)
        self._totals = torch.zeros(2, dtype=torch.float64, device=self._device)

    def epoch(self, batches: Sequence[np.ndarray], rates: Sequence[tuple[float, float, float]]) -> torch.Tensor:
        """An optimizer step for each batch (row numbers over all ranks) with its `AdamW.rates`.

        Returns this rank's (loss sum, correct rows), on the device: the host has not waited for it.
        """
        torch.backends.cuda.enable_cudnn_sdp(self._max_length > SHORT_ROWS)
        shares = [self._share(batch) for batch in batches]
        ends = np.cumsum([len(rows) for rows, _ in shares])
        # One transfer for the epoch.
        all_rows, all_weights = (
            torch.from_numpy(np.concatenate(column)).to(self._device) for column in zip(*shares, strict=True)
        )
        all_rates = torch.tensor(rates).to(self._device)
        self._optimizer.renew_copies()
        self._totals.zero_()
        for number, batch in enumerate(batches):
            width = bucket_width(int(self._train.lengths[batch].max()), self._max_length)
            self._optimizer.rates.copy_(all_rates[number])
            part = slice(ends[number] - len(shares[number][0]), ends[number])
            rows, weights = all_rows[part], all_weights[part]
            if self._graphs.enabled:
                rows, weights = self._rows.copy_(rows), self._weights.copy_(weights)
            self._graphs.run(width, partial(self._step, width, rows, weights))
        return self._totals

    def _share(self, batch: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """This rank's rows of a batch and their weights in the loss.

        Filled up, with a row of weight 0, to as many as every rank has: all take part in each all-reduce. A captured
        step has one number of rows, also for the smaller batch at the end of an epoch.
        """
        world_size = self._parallel.world_size
        own = batch[self._parallel.rank :: world_size]
        size = len(self._rows) if self._graphs.enabled else -(-len(batch) // world_size)
        weights = np.zeros(size, dtype=np.float32)
        # DDP averages over ranks; with this factor the step follows the mean over the global batch.
        weights[: len(own)] = world_size / len(batch)
        return np.concatenate([own, np.repeat(batch[:1], size - len(own))]), weights

    def _step(self, width: int, rows: torch.Tensor, weights: torch.Tensor) -> None:
        size = self._micro_batch_size or len(rows)
        for begin in range(0, len(rows), size):
            part = slice(begin, begin + size)
            with self._parallel.gradients(sync=begin + size >= len(rows)):
                self._parallel.backward(self._loss(width, rows[part], weights[part]))
        self._parallel.step()

    def _loss(self, width: int, rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """The weighted sum of the rows' losses; adds to the epoch's totals."""
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._precision == "bf16"):
            logits = self._model(self._train.inputs(rows, width)).logits.float()
        labels = self._labels[rows]
        if self._num_classes:
            losses = functional.cross_entropy(logits, labels, reduction="none")
            correct = logits.argmax(dim=-1) == labels
        else:
            losses = functional.mse_loss(logits[:, 0], labels, reduction="none")
            correct = torch.zeros_like(losses)
        counts = (weights > 0).double()
        self._totals += torch.stack([(losses.detach() * counts).sum(), (correct * counts).sum()])
        return (losses * weights).sum()

    def _model(self, inputs: dict[str, torch.Tensor]) -> Any:
        model: Any = self._parallel.model
        return functional_call(model, self._copies, kwargs=inputs) if self._copies else model(**inputs)


@torch.no_grad()
def split_logits(module: Any, split: DeviceRows, batches: Sequence[np.ndarray], max_length: int) -> torch.Tensor:
    """The logits of some batches of a split, as (rows, classes) of the whole split; 0 in rows of no batch.

    In fp32 whatever the training's precision: what is recorded is what the exported model scores when it is opened.
    """
    device = module.device
    logits = torch.zeros(len(split.lengths), module.config.num_labels, device=device)
    for batch in batches:
        rows = torch.from_numpy(batch).to(device)
        width = bucket_width(int(split.lengths[batch].max()), max_length)
        logits[rows] = module(**split.inputs(rows, width)).logits
    return logits
