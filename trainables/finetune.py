"""One rank's part of one trial: fine-tunes a sequence classifier and yields a Report after every epoch. No Ray."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from trainables import parallel
from trainables.batches import Encoded, encode, epoch_batches, eval_batches
from trainables.checkpoint import read_json, write_json
from trainables.config import DataConfig, FinetuneConfig, ModelConfig
from trainables.data import TextData, read_texts
from trainables.glue import eval_metrics
from trainables.learner import Kind, give_back, take
from trainables.model import check_max_length, load_tokenizer
from trainables.optimizer import lr_lambda, one_pass_soon, rates_of
from trainables.report import Context, Report
from trainables.steps import DeviceRows, Steps, split_logits

COMPILE_STEPS = 60_000
"""A trial of so many steps compiles its kernels: that took 18 s and saved 0.3 ms a step (GPT-2, batch 32, H200)."""
EVAL_FACTOR = 4
"""Rows of an evaluation batch for each row of a training batch."""


def finetune(context: Context) -> Iterator[Report]:
    """Trains from `context.resume_from`, or from the start, up to `context.max_epochs`.

    The global batch, and so the curve, does not depend on the number of ranks.
    """
    run = Run(context, FinetuneConfig(**context.settings))
    try:
        if context.resume_from is not None:
            run.load(context.resume_from)
        for epoch in range(run.epoch + 1, context.max_epochs + 1):
            started = time.perf_counter()
            metrics = run.train_epoch(epoch) | run.evaluate()
            metrics["epoch_s"] = time.perf_counter() - started
            yield Report(epoch, metrics, run.save, run.save_model, run.num_bytes())
    finally:
        run.close()


@dataclass(frozen=True)
class Prepared:
    """A data set as token ids; the same for every trial with the same model, data and `max_length`."""

    train: Encoded
    train_labels: torch.Tensor
    validation: dict[str, tuple[Encoded, np.ndarray]]
    label_names: tuple[str, ...]


@lru_cache(maxsize=1)
def _texts(data_json: str) -> TextData:
    return read_texts(DataConfig.model_validate_json(data_json))


@lru_cache(maxsize=4)
def _prepared(model_json: str, data_json: str, max_length: int) -> tuple[Any, Prepared]:
    """(tokenizer, data). Cached over the trials that a warm worker group runs."""
    tokenizer = load_tokenizer(ModelConfig.model_validate_json(model_json))
    tokenizer.model_max_length = max_length  # where it is exported, `truncation=True` cuts as training did
    texts = _texts(data_json)
    encoded = {name: encode(tokenizer, split.texts, max_length) for name, split in texts.splits.items()}
    train_labels = torch.as_tensor(texts.splits["train"].labels)
    validation = {name: (encoded[name], split.labels) for name, split in texts.splits.items() if name != "train"}
    return tokenizer, Prepared(encoded["train"], train_labels, validation, texts.label_names)


@dataclass(frozen=True)
class Ready:
    """What lies on the device, and was captured there, for one data set and shape of batches."""

    steps: Steps
    validation: dict[str, DeviceRows]


class Run:
    """The state of one trial on one rank."""

    def __init__(self, context: Context, config: FinetuneConfig) -> None:
        self.config = config
        self.rank, self.world_size = context.rank, context.world_size
        # A rank sees its own GPU only, as device 0; `set_device` and NCCL want the number.
        self.device = torch.device("cuda", 0) if context.device == "cuda" else torch.device("cpu")
        self.epoch = 0
        self.step = 0
        """Optimizer steps done."""
        training = config.training
        parallel.launch(self.rank, self.world_size, self.device)
        one_pass_soon(self.device)  # beside the data and the model
        tokenizer_source = config.model.model_copy(update={"config": {}})
        data_key = tokenizer_source.model_dump_json(), config.data.model_dump_json(), training.max_length
        self.tokenizer, self.data = _prepared(*data_key)
        num_steps = -(-len(self.data.train_labels) // training.batch_size) * training.max_epochs
        self.schedule = lr_lambda(training.schedule, num_steps, training.warmup_fraction)
        kind = Kind(config.model, self.data.label_names, self.device, self._compiles(num_steps))
        self.learner = take(kind, self.tokenizer, context.seed)
        check_max_length(self.learner.network, training.max_length)
        shape = (training.batch_size, training.micro_batch_size, training.precision, training.compile)
        self.ready = self.learner.ready((data_key, shape), self._get_ready)
        # Every rank has the same weights; now each draws its own dropout masks.
        torch.manual_seed(context.seed + 1 + self.rank)

    def _compiles(self, num_steps: int) -> bool:
        choice = self.config.training.compile
        pays = self.device.type == "cuda" and num_steps >= COMPILE_STEPS
        # The compiled kernels are C and C++ at their edges.
        return choice == "on" or (choice == "auto" and pays and any(map(shutil.which, ("cc", "gcc", "clang"))))

    def _get_ready(self) -> Ready:
        training, pad_token_id = self.config.training, self.tokenizer.pad_token_id
        # Several micro batches add their gradients up, for which bf16 is too coarse.
        copies = self.learner.bf16_copies() if training.precision == "bf16" and not training.micro_batch_size else {}
        steps = Steps(
            self.learner.parallel,
            self.learner.optimizer,
            DeviceRows(self.data.train, pad_token_id, self.device),
            self.data.train_labels.to(self.device),
            num_classes=len(self.data.label_names),
            max_length=training.max_length,
            batch_size=training.batch_size,
            micro_batch_size=training.micro_batch_size,
            precision=training.precision,
            captures=self.device.type == "cuda" and training.compile != "off",
            copies=copies,
        )
        validation = self.data.validation.items()
        return Ready(steps, {name: DeviceRows(rows, pad_token_id, self.device) for name, (rows, _) in validation})

    def close(self) -> None:
        give_back(self.learner)
        del self.learner, self.ready

    # Training

    def train_epoch(self, epoch: int) -> dict[str, float]:
        """One pass over the training split. All ranks return the same numbers, but for rounding of the clock."""
        training, lengths = self.config.training, self.data.train.lengths
        started = time.perf_counter()
        batches = epoch_batches(lengths, training.batch_size, training.seed, epoch)
        learning_rates = [training.learning_rate * self.schedule(self.step + number) for number in range(len(batches))]
        rates = [rates_of(rate, training.weight_decay, training.max_grad_norm) for rate in learning_rates]
        self.learner.network.train()
        totals = self.ready.steps.epoch(batches, rates)
        loss_sum, correct = parallel.sum_over_ranks(totals).tolist()
        train_s = time.perf_counter() - started
        self.epoch, self.step = epoch, self.step + len(batches)
        metrics = {"train_loss": loss_sum / len(lengths), "learning_rate": learning_rates[-1]}
        if self.data.label_names:
            # Where the loss is no number, the weights are none either, and the rows before say nothing of them.
            metrics["train_accuracy"] = correct / len(lengths) if math.isfinite(loss_sum) else math.nan
        return metrics | {"tokens_per_s": float(lengths.sum()) / train_s}

    # Evaluation

    def evaluate(self) -> dict[str, float]:
        """The validation metrics, exact over the ranks: each row counts once, on one of them."""
        training = self.config.training
        metrics: dict[str, float] = {}
        self.learner.network.eval()
        for name, (encoded, labels) in self.data.validation.items():
            # Evaluation holds no gradients, so that several micro batches of training fit at once.
            batches = eval_batches(encoded.lengths, EVAL_FACTOR * (training.micro_batch_size or training.batch_size))
            own = batches[self.rank :: self.world_size]
            with self.learner.uncompiled():
                logits = split_logits(self.learner.network, self.ready.validation[name], own, training.max_length)
            found = parallel.sum_over_ranks(logits).cpu().numpy()
            suffix = "_mismatched" if name == "validation_mismatched" else ""
            metrics |= eval_metrics(self.config.data.task, found, labels, suffix)
        return metrics

    # Checkpoints

    def save(self, folder: Path) -> None:
        """Writes this moment into `folder`: rank 0 model and optimizer, each rank its random state."""
        self.save_model(folder)
        save_file({"cpu": torch.get_rng_state(), **self._cuda_rng()}, folder / f"rng-{self.rank}.safetensors")
        if self.rank == 0:
            save_file(self.learner.optimizer.tensors(), folder / "optimizer.safetensors")
            write_json(folder / "progress.json", {"epoch": self.epoch, "step": self.step})

    def num_bytes(self) -> int:
        """What `save` writes, but for some kilobytes."""
        moments = self.learner.optimizer.tensors().values()
        return sum(tensor.nbytes for tensor in [*self.learner.network.parameters(), *moments])

    def save_model(self, folder: Path) -> None:
        """Writes the model and its tokenizer, a third of the bytes: rank 0."""
        if self.rank == 0:
            model: Any = self.learner.network
            state = self.learner.state_on_host()
            model.save_pretrained(folder / "model", state_dict=state, max_shard_size="1000GB")
            self.tokenizer.save_pretrained(folder / "model")

    def load(self, folder: Path) -> None:
        """Goes back to the moment that `save` wrote."""
        progress = read_json(folder / "progress.json")
        self.epoch, self.step = int(progress["epoch"]), int(progress["step"])
        weights = load_file(folder / "model" / "model.safetensors", device=str(self.device))
        missing, unexpected = self.learner.network.load_state_dict(weights, strict=False)
        tied = set(getattr(self.learner.network, "all_tied_weights_keys", ()))
        assert not unexpected and set(missing) <= tied, f"{folder}: {unexpected=} {missing=}"
        self.learner.optimizer.load(load_file(folder / "optimizer.safetensors", device=str(self.device)))
        rng = load_file(folder / f"rng-{self.rank}.safetensors")
        torch.set_rng_state(rng["cpu"])
        if "cuda" in rng and self.device.type == "cuda":
            torch.cuda.set_rng_state(rng["cuda"], self.device)

    def _cuda_rng(self) -> dict[str, torch.Tensor]:
        return {"cuda": torch.cuda.get_rng_state(self.device)} if self.device.type == "cuda" else {}
