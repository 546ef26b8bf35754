"""One rank's part of one trial: fine-tunes a sequence classifier and yields a Report after every epoch. No Ray."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional

from trainables import parallel
from trainables.batches import Encoded, bucket_width, encode, epoch_batches, eval_batches, pad
from trainables.checkpoint import read_json, write_json
from trainables.config import DataConfig, FinetuneConfig, ModelConfig
from trainables.data import TextData, read_texts
from trainables.glue import eval_metrics
from trainables.model import build_model, check_max_length, load_tokenizer, lr_lambda, make_optimizer
from trainables.report import Context, Report


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
            yield Report(epoch, metrics, save=run.save)
    finally:
        # The next trial of a warm group needs the memory before this frame is collected.
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
    texts = _texts(data_json)
    encoded = {name: encode(tokenizer, split.texts, max_length) for name, split in texts.splits.items()}
    train_labels = torch.as_tensor(texts.splits["train"].labels)
    validation = {name: (encoded[name], split.labels) for name, split in texts.splits.items() if name != "train"}
    return tokenizer, Prepared(encoded["train"], train_labels, validation, texts.label_names)


class Run:
    """The state of one trial on one rank."""

    def __init__(self, context: Context, config: FinetuneConfig) -> None:
        self.config = config
        self.rank, self.world_size = context.rank, context.world_size
        # A rank sees its own GPU only, as device 0; `set_device` and NCCL want the number.
        self.device = torch.device("cuda", 0) if context.device == "cuda" else torch.device("cpu")
        self.epoch = 0
        self._learning_rate = 0.0
        self.step = 0
        """Optimizer steps done."""
        training = config.training
        parallel.launch(self.rank, self.world_size, self.device)
        tokenizer_source = config.model.model_copy(update={"config": {}})
        self.tokenizer, self.data = _prepared(
            tokenizer_source.model_dump_json(), config.data.model_dump_json(), training.max_length
        )
        torch.manual_seed(context.seed)
        model = build_model(config.model, self.tokenizer, self.data.label_names).to(self.device)
        check_max_length(model, training.max_length)
        self.parallel = parallel.Parallel(model, make_optimizer(model, training.learning_rate, training.weight_decay))
        # Every rank builds the same model; after that, each draws its own dropout masks.
        torch.manual_seed(context.seed + 1 + self.rank)
        num_batches = -(-len(self.data.train_labels) // training.batch_size)
        self.schedule = lr_lambda(training.schedule, num_batches * training.max_epochs, training.warmup_fraction)
        self.train_labels = self.data.train_labels.to(self.device)

    def close(self) -> None:
        del self.parallel, self.train_labels
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    # Training

    def train_epoch(self, epoch: int) -> dict[str, float]:
        """One pass over the training split. All ranks return the same numbers, but for rounding of the clock."""
        training, encoded = self.config.training, self.data.train
        self.parallel.module.train()
        started = time.perf_counter()
        totals = torch.zeros(2, dtype=torch.float64, device=self.device)  # loss sum, correct rows
        for batch in epoch_batches(encoded.lengths, training.batch_size, training.seed, epoch):
            totals += self._train_step(batch)
        loss_sum, correct = parallel.sum_over_ranks(totals).tolist()
        train_s = time.perf_counter() - started
        self.epoch = epoch
        rows = len(encoded.lengths)
        metrics = {"train_loss": loss_sum / rows, "learning_rate": self._learning_rate}
        if self.data.label_names:
            metrics["train_accuracy"] = correct / rows
        return metrics | {"tokens_per_s": float(encoded.lengths.sum()) / train_s}

    def _train_step(self, batch: np.ndarray) -> torch.Tensor:
        """One optimizer step over the global batch `batch` (row numbers). Returns this rank's (loss sum, correct)."""
        training = self.config.training
        self._learning_rate = training.learning_rate * self.schedule(self.step)
        for group in self.parallel.optimizer.param_groups:
            group["lr"] = self._learning_rate
        own = batch[self.rank :: self.world_size]
        rank_rows = -(-len(batch) // self.world_size)
        size = training.micro_batch_size or rank_rows
        totals = torch.zeros(2, dtype=torch.float64, device=self.device)
        for begin in range(0, rank_rows, size):
            micro = own[begin : begin + size]
            last = begin + size >= rank_rows
            with self.parallel.gradients(sync=last):
                # Every rank takes part in the last all-reduce, also one that is left without a row.
                loss, part = self._loss(self.parallel.model, micro if len(micro) else batch[:1], counts=len(micro) > 0)
                # DDP averages over ranks; together with this factor the step follows the mean over the global batch.
                self.parallel.backward(loss * (self.world_size / len(batch)))
            totals += part
        self.parallel.step(training.max_grad_norm)
        self.step += 1
        return totals

    def _loss(self, model: Any, rows: np.ndarray, counts: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """The summed loss of some training rows, and (loss sum, correct) for the metrics; zeros unless `counts`."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.training.precision == "bf16"):
            logits = self._logits(model, self.data.train, rows).float()
        labels = self.train_labels[torch.as_tensor(rows, device=self.device)]
        if self.data.label_names:
            loss = functional.cross_entropy(logits, labels, reduction="sum")
            correct = (logits.argmax(dim=-1) == labels).sum()
        else:
            loss = functional.mse_loss(logits[:, 0], labels, reduction="sum")
            correct = torch.zeros((), device=self.device)
        if not counts:
            return loss * 0.0, torch.zeros(2, dtype=torch.float64, device=self.device)
        return loss, torch.stack([loss.detach().double(), correct.double()])

    def _logits(self, model: Any, encoded: Encoded, rows: np.ndarray) -> torch.Tensor:
        """Shape (rows, classes)."""
        training = self.config.training
        width = bucket_width(int(encoded.lengths[rows].max()), training.max_length)
        arrays = pad(encoded, rows, self.tokenizer.pad_token_id, width)
        inputs = {name: torch.from_numpy(array).to(self.device) for name, array in arrays.items()}
        logits: torch.Tensor = model(**inputs).logits
        return logits

    # Evaluation

    def evaluate(self) -> dict[str, float]:
        """The validation metrics, exact over the ranks: each row counts once, on one of them."""
        metrics: dict[str, float] = {}
        self.parallel.module.eval()
        for name, (encoded, labels) in self.data.validation.items():
            logits = self._eval_logits(encoded)
            suffix = "_mismatched" if name == "validation_mismatched" else ""
            metrics |= eval_metrics(self.config.data.task, logits, labels, suffix)
        return metrics

    @torch.inference_mode()
    def _eval_logits(self, encoded: Encoded) -> np.ndarray:
        """The logits of a whole split on every rank, shape (rows, classes).

        In fp32 whatever the training's precision: what is recorded is what the exported model scores when it is opened.
        """
        # Evaluation holds no gradients, so that several micro batches of training fit at once.
        training = self.config.training
        batches = eval_batches(encoded.lengths, 2 * (training.micro_batch_size or training.batch_size))
        num_classes = max(1, len(self.data.label_names))
        logits = torch.zeros(len(encoded.lengths), num_classes, device=self.device)
        for rows in batches[self.rank :: self.world_size]:
            logits[torch.as_tensor(rows, device=self.device)] = self._logits(self.parallel.module, encoded, rows)
        found: np.ndarray = parallel.sum_over_ranks(logits).cpu().numpy()
        return found

    # Checkpoints

    def save(self, folder: Path) -> None:
        """Writes this moment into `folder`: rank 0 model and optimizer, each rank its random state."""
        save_file({"cpu": torch.get_rng_state(), **self._cuda_rng()}, folder / f"rng-{self.rank}.safetensors")
        if self.rank == 0:
            model: Any = self.parallel.module
            model.save_pretrained(folder / "model", max_shard_size="1000GB")
            self.tokenizer.save_pretrained(folder / "model")
            save_file(_optimizer_tensors(self.parallel.optimizer), folder / "optimizer.safetensors")
            write_json(folder / "progress.json", {"epoch": self.epoch, "step": self.step})

    def load(self, folder: Path) -> None:
        """Goes back to the moment that `save` wrote."""
        progress = read_json(folder / "progress.json")
        self.epoch, self.step = int(progress["epoch"]), int(progress["step"])
        weights = load_file(folder / "model" / "model.safetensors", device=str(self.device))
        missing, unexpected = self.parallel.module.load_state_dict(weights, strict=False)
        tied = set(getattr(self.parallel.module, "all_tied_weights_keys", ()))
        assert not unexpected and set(missing) <= tied, f"{folder}: {unexpected=} {missing=}"
        _load_optimizer(self.parallel.optimizer, load_file(folder / "optimizer.safetensors", device=str(self.device)))
        rng = load_file(folder / f"rng-{self.rank}.safetensors")
        torch.set_rng_state(rng["cpu"])
        if "cuda" in rng and self.device.type == "cuda":
            torch.cuda.set_rng_state(rng["cuda"], self.device)

    def _cuda_rng(self) -> dict[str, torch.Tensor]:
        return {"cuda": torch.cuda.get_rng_state(self.device)} if self.device.type == "cuda" else {}


def _optimizer_tensors(optimizer: Any) -> dict[str, torch.Tensor]:
    """AdamW's state as a flat mapping `PARAMETER.KEY` -> tensor."""
    state = optimizer.state_dict()["state"]
    return {f"{index}.{key}": value.contiguous() for index, entry in state.items() for key, value in entry.items()}


def _load_optimizer(optimizer: Any, tensors: dict[str, torch.Tensor]) -> None:
    state: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
