"""A Hugging Face Trainer for one trial of the study, with a clock in it."""

from __future__ import annotations

import os
import time
from dataclasses import fields
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from finetune_peers import encoded, examples
from peers_study import BATCH, SEED, Ran, Study
from transformers import DataCollatorWithPadding, Trainer, TrainerCallback, TrainingArguments

from trainables.config import ModelConfig
from trainables.model import build_model


@lru_cache(maxsize=1)
def prepared(study: Study) -> tuple[Any, dict[str, list[dict[str, Any]]]]:
    """(tokenizer, split -> rows), with the very token ids that the product trains on."""
    tokenizer, splits = encoded({name: study.spec[name] for name in ("model", "data", "training")})
    return tokenizer, {name: list(examples(data, labels)) for name, (data, labels) in splits.items()}


def accuracy(predicted: Any) -> dict[str, float]:
    return {"accuracy": float((np.argmax(predicted.predictions, axis=-1) == predicted.label_ids).mean())}


def trainer(study: Study, params: dict[str, float], best_settings: bool, callbacks: list[TrainerCallback]) -> Trainer:
    """The batch, precision, schedule and checkpoint each epoch of the product, else Transformers' defaults.

    Best settings: rows of like length together, as in the product, and evaluation in larger batches.
    """
    os.environ.pop("LOCAL_RANK", None)  # else it looks for other ranks
    tokenizer, rows = prepared(study)
    options: dict[str, Any] = {}
    if best_settings:
        options["per_device_eval_batch_size"] = 4 * BATCH
        # Transformers 5 has renamed it on its way.
        if "train_sampling_strategy" in {each.name for each in fields(TrainingArguments)}:
            options["train_sampling_strategy"] = "group_by_length"
        else:
            options["group_by_length"] = True
    arguments = TrainingArguments(
        output_dir=str(Path(study.folder) / "trainer"),
        per_device_train_batch_size=BATCH,
        num_train_epochs=study.epochs,
        bf16=study.gpu,
        use_cpu=not study.gpu,
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=1,
        logging_strategy="epoch",
        seed=SEED,
        report_to=[],
        disable_tqdm=True,
        **{name: params[name] for name in ("learning_rate", "weight_decay") if name in params},
        **options,
    )
    model = ModelConfig(**study.spec["model"])
    return Trainer(
        model_init=lambda: build_model(model, tokenizer, ("not_equivalent", "equivalent")),
        args=arguments,
        train_dataset=rows["train"],
        eval_dataset=rows["validation"],
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=accuracy,
        callbacks=[Clock(study), *callbacks],
    )


class Clock(TrainerCallback):  # type: ignore[misc]
    """Notes how long epochs took and what the trial came to."""

    def __init__(self, study: Study) -> None:
        self._study = study
        self._epoch_s: list[float] = []
        self._started = 0.0

    def on_train_begin(self, *arguments: Any, **options: Any) -> None:
        self._epoch_s = []

    def on_epoch_begin(self, *arguments: Any, **options: Any) -> None:
        self._started = time.perf_counter()

    def on_evaluate(self, *arguments: Any, **options: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._epoch_s.append(time.perf_counter() - self._started)

    def on_train_end(self, args: Any, state: Any, control: Any, **options: Any) -> None:
        last = {name: value for entry in state.log_history for name, value in entry.items()}
        Ran(
            args.learning_rate,
            args.weight_decay,
            time.time(),
            self._epoch_s,
            last["eval_accuracy"],
            last["eval_loss"],
            last["loss"],
        ).note(self._study)
