"""What the order of the rows does to a trial: train losses of the product and of two Trainers, from the same weights.

    TUNE_SERVICE_TEST_DATA=DATA python tests/benchmarks/bench_order.py

DATA holds gpt2-tokenizer/ and glue/mrpc. A GPT-2 of 2 layers on all of MRPC, fp32, a learning rate of 1e-3 that falls
to 0 over six epochs. The product puts rows of like length into one batch and shuffles the batches; the Trainer takes
its rows at random, or with its `group_by_length`, which gives the long rows of each 50 batches before the short ones.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from typing import Any

import torch
from machine import show
from peers_study import SEED, Study

EPOCHS, RATE = 6, 1e-3


def product(study: Study) -> Iterator[float]:
    from trainables import Context
    from trainables.finetune import finetune

    spec: dict[str, Any] = study.spec
    settings = {"model": spec["model"], "data": spec["data"], "training": spec["training"] | {"learning_rate": RATE}}
    for report in finetune(Context({}, seed=SEED, max_epochs=EPOCHS, settings=settings)):
        yield report.metrics["train_loss"]


def hugging_face(study: Study, groups: bool) -> list[float]:
    from peers_trainer import trainer
    from transformers import PrinterCallback

    made = trainer(study, {"learning_rate": RATE}, best_settings=groups, callbacks=[])
    made.remove_callback(PrinterCallback)
    made.train()
    return [float(entry["loss"]) for entry in made.state.log_history if "loss" in entry]


def main() -> None:
    torch.set_num_threads(1)
    data = os.environ["TUNE_SERVICE_TEST_DATA"]
    with tempfile.TemporaryDirectory() as folder:
        study = Study(folder, f"{data}/gpt2-tokenizer", f"{data}/glue/mrpc", 2, EPOCHS, gpu=False, concurrent=1)
        losses = {
            "tune-service": list(product(study)),
            "Trainer, at random": hugging_face(study, groups=False),
            "Trainer, group_by_length": hugging_face(study, groups=True),
        }
    show("order", train_loss={name: [round(loss, 3) for loss in each] for name, each in losses.items()})


if __name__ == "__main__":
    main()
