"""Ray Train's TorchTrainer inside a Ray Tune function, as documented: `stock_trainer.py LOG TRIALS EPOCHS`."""

from __future__ import annotations

import os
import secrets
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


def note(log: str, event: str) -> None:
    with Path(log).open("a") as file:
        file.write(f"{time.monotonic()} {event}\n")


def train_worker(config: dict[str, Any]) -> None:
    """A plain loop over random rows of the demo's shape; only its start matters here."""
    import ray.train
    import ray.train.torch
    import torch
    from transformers import GPT2Config, GPT2ForSequenceClassification

    model_config = GPT2Config(n_layer=2, n_embd=64, n_head=2, n_positions=64, vocab_size=80, pad_token_id=1)
    model = ray.train.torch.prepare_model(GPT2ForSequenceClassification(model_config))
    optimizer = torch.optim.AdamW(model.parameters(), lr=config["learning_rate"])
    for epoch in range(config["epochs"]):
        for step in range(8):
            if epoch == step == 0:
                note(config["log"], "first step")
            rows = torch.randint(2, 80, (32, 24))
            loss = model(input_ids=rows, labels=rows[:, 0] % 2).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        note(config["log"], "report")
        ray.train.report({"loss": loss.item(), "epoch": epoch})


def trial(config: dict[str, Any]) -> None:
    import ray.train
    from ray.train.torch import TorchTrainer
    from ray.tune.integration.ray_train import TuneReportCallback

    TorchTrainer(
        train_worker,
        train_loop_config=config,
        scaling_config=ray.train.ScalingConfig(num_workers=1),
        run_config=ray.train.RunConfig(storage_path=config["folder"], callbacks=[TuneReportCallback()]),
    ).fit()


if __name__ == "__main__":
    # On loopback, with a token that is not left in the user's home.
    os.environ |= {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_AUTH_MODE": "token"}
    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    import ray
    from ray import tune

    with tempfile.TemporaryDirectory(prefix="s-") as folder:
        ray.init(address="local", num_cpus=4, include_dashboard=False, _temp_dir=folder)
        space = {"learning_rate": tune.loguniform(1e-4, 1e-2), "epochs": int(sys.argv[3]), "log": sys.argv[1]}
        tune.Tuner(
            trial,
            param_space=space | {"folder": folder},
            tune_config=tune.TuneConfig(num_samples=int(sys.argv[2]), max_concurrent_trials=1),
            run_config=tune.RunConfig(storage_path=folder, verbose=0),
        ).fit()
        ray.shutdown()
