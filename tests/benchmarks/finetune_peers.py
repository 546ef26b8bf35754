"""One fine-tuning trial through the product and through what one would write without it, over the same token ids."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    get_linear_schedule_with_warmup,
)

from trainables import Context
from trainables.batches import Encoded, encode
from trainables.config import DataConfig, FinetuneConfig
from trainables.data import read_texts
from trainables.model import load_tokenizer

BATCH = 32


@dataclass
class Times:
    """Of each epoch, in seconds."""

    train_s: list[float]
    epoch_s: list[float]
    """With the evaluation."""
    tokens: int
    """Real ones, of one epoch's training."""
    cpu_s: list[float] = field(default_factory=list)
    """Of all threads of this process, as `epoch_s`; other work on the machine does not count."""

    def summary(self, skip: int) -> dict[str, Any]:
        """Medians without the first `skip` epochs."""
        return {
            "epoch_s": round(statistics.median(self.epoch_s[skip:]), 3),
            "tokens_per_s": round(self.tokens / statistics.median(self.train_s[skip:])),
            "first_epoch_s": round(self.epoch_s[0], 2),
        }


def product(settings: dict[str, Any], device: str) -> Times:
    from trainables.finetune import finetune

    times = Times([], [], int(encoded(settings)[1]["train"][0].lengths.sum()))
    context = Context({}, device=device, max_epochs=settings["training"]["max_epochs"], settings=settings)
    cpu_s = time.process_time()
    for report in finetune(context):
        times.cpu_s.append(time.process_time() - cpu_s)
        times.train_s.append(times.tokens / report.metrics["tokens_per_s"])
        times.epoch_s.append(report.metrics["epoch_s"])
        cpu_s = time.process_time()
    return times


def encoded(settings: dict[str, Any]) -> tuple[Any, dict[str, tuple[Encoded, np.ndarray]]]:
    """(tokenizer, split -> rows and labels), as the product has them."""
    config = FinetuneConfig(**settings)
    tokenizer = load_tokenizer(config.model)
    splits = read_texts(DataConfig(**settings["data"])).splits
    length = config.training.max_length
    return tokenizer, {name: (encode(tokenizer, split.texts, length), split.labels) for name, split in splits.items()}


def plain_model(settings: dict[str, Any], tokenizer: Any, attention: str) -> Any:
    name = settings["model"]["name"]
    if settings["model"].get("from_scratch"):
        config = AutoConfig.for_model("gpt2", vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id)
        return AutoModelForSequenceClassification.from_config(config, attn_implementation=attention)
    return AutoModelForSequenceClassification.from_pretrained(name, attn_implementation=attention)


def plain_loop(
    settings: dict[str, Any], device: str, *, width: int | None, attention: str, fused: bool | None, clip: float | None
) -> Times:
    """A loop of forty lines in fp32. `width` None: each batch as wide as its longest row."""
    tokenizer, splits = encoded(settings)
    model = plain_model(settings, tokenizer, attention).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2.4e-5, weight_decay=0.01, fused=fused)
    rows, epochs = len(splits["train"][0]), settings["training"]["max_epochs"]
    schedule = get_linear_schedule_with_warmup(optimizer, 0, epochs * -(-rows // BATCH))

    def batches(split: str, order: np.ndarray) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        data, labels = splits[split]
        for start in range(0, len(order), BATCH):
            chosen = order[start : start + BATCH]
            texts = [data.ids[data.offsets[row] : data.offsets[row + 1]] for row in chosen]
            padding = {"padding": "max_length", "max_length": width} if width else {"padding": True}
            inputs = tokenizer.pad({"input_ids": texts}, return_tensors="pt", **padding).to(device)
            yield inputs, torch.from_numpy(labels[chosen]).to(device)

    times = Times([], [], int(splits["train"][0].lengths.sum()))
    for _ in range(epochs):
        started, cpu_s = time.perf_counter(), time.process_time()
        model.train()
        total = torch.zeros((), device=device)
        for inputs, labels in batches("train", np.random.permutation(rows)):
            loss = functional.cross_entropy(model(**inputs).logits, labels)
            loss.backward()  # type: ignore[no-untyped-call]
            if clip is not None:
                torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            total += loss.detach()
        total.item()
        times.train_s.append(time.perf_counter() - started)
        model.eval()
        correct = 0
        with torch.no_grad():
            for inputs, labels in batches("validation", np.arange(len(splits["validation"][0]))):
                correct += int((model(**inputs).logits.argmax(-1) == labels).sum())
        times.epoch_s.append(time.perf_counter() - started)
        times.cpu_s.append(time.process_time() - cpu_s)
    return times


def examples(data: Encoded, labels: np.ndarray) -> Iterator[dict[str, Any]]:
    for row in range(len(data)):
        part = slice(data.offsets[row], data.offsets[row + 1])
        example = {"input_ids": data.ids[part].tolist(), "attention_mask": [1] * int(data.lengths[row])}
        if data.token_type_ids is not None:
            example["token_type_ids"] = data.token_type_ids[part].tolist()
        yield example | {"labels": int(labels[row])}


class _Clock(TrainerCallback):  # type: ignore[misc]  # Transformers has no types
    def __init__(self, times: Times) -> None:
        self._times = times
        self._started = self._cpu_s = 0.0

    def on_epoch_begin(self, *arguments: Any, **options: Any) -> None:
        self._started, self._cpu_s = time.perf_counter(), time.process_time()

    def on_epoch_end(self, *arguments: Any, **options: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._times.train_s.append(time.perf_counter() - self._started)

    def on_evaluate(self, *arguments: Any, **options: Any) -> None:
        self._times.epoch_s.append(time.perf_counter() - self._started)
        self._times.cpu_s.append(time.process_time() - self._cpu_s)


def hugging_face(settings: dict[str, Any], device: str, folder: str) -> Times:
    """Trainer with dynamic padding; bf16 on a GPU. Its evaluation is in bf16 there too."""
    os.environ.pop("LOCAL_RANK", None)  # else it looks for other ranks
    tokenizer, splits = encoded(settings)
    rows = {name: list(examples(data, labels)) for name, (data, labels) in splits.items()}
    times = Times([], [], int(splits["train"][0].lengths.sum()))
    arguments = TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=BATCH,
        per_device_eval_batch_size=2 * BATCH,
        num_train_epochs=settings["training"]["max_epochs"],
        learning_rate=2.4e-5,
        weight_decay=0.01,
        bf16=device == "cuda",
        use_cpu=device == "cpu",
        eval_strategy="epoch",
        logging_strategy="epoch",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    Trainer(
        model=plain_model(settings, tokenizer, "sdpa"),
        args=arguments,
        train_dataset=rows["train"],
        eval_dataset=rows["validation"],
        data_collator=DataCollatorWithPadding(tokenizer),
        callbacks=[_Clock(times)],
    ).train()
    return times
