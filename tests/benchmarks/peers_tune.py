"""Ray Tune with Hugging Face's Trainer: `peers_tune.py documented|best STUDY.json`.

documented: `Trainer.hyperparameter_search(backend="ray")` with its defaults. best: a function with a Trainer in it, in
`tune.Tuner`, as many at a time as the product, whose processes stay from trial to trial, with rows kept in them, one
checkpoint an epoch and none of Tune's loggers.
"""

from __future__ import annotations

import os
import secrets
import sys
import tempfile
from pathlib import Path
from typing import Any

from peers_study import Study


def documented(study: Study) -> None:
    from peers_trainer import trainer
    from ray import tune

    trainer(study, {}, best_settings=False, callbacks=[]).hyperparameter_search(
        hp_space=lambda _: {name: tune.grid_search(values) for name, values in study.grid.items()},
        compute_objective=lambda metrics: metrics["eval_accuracy"],
        backend="ray",
        direction="maximize",
        n_trials=1,  # of the whole grid
        storage_path=study.folder,
        checkpoint_config=tune.CheckpointConfig(num_to_keep=1),
    )


def best(study: Study) -> None:
    from ray import tune

    share = {"cpu": 1.0, "gpu": 1 / study.concurrent if study.gpu else 0.0}
    tune.Tuner(
        tune.with_resources(tune.with_parameters(_trial, study=study), share),
        param_space={name: tune.grid_search(values) for name, values in study.grid.items()},
        tune_config=tune.TuneConfig(max_concurrent_trials=study.concurrent, reuse_actors=True),
        run_config=tune.RunConfig(
            storage_path=study.folder, checkpoint_config=tune.CheckpointConfig(num_to_keep=1), verbose=0
        ),
    ).fit()


def _trial(config: dict[str, Any], study: Study) -> None:
    from peers_trainer import trainer
    from ray import tune
    from transformers import TrainerCallback

    class Reports(TrainerCallback):  # type: ignore[misc]
        """Hands Tune each checkpoint that the Trainer has just written."""

        def on_save(self, args: Any, state: Any, control: Any, **options: Any) -> None:
            metrics = {name: value for entry in state.log_history for name, value in entry.items()}
            written = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            tune.report(metrics, checkpoint=tune.Checkpoint.from_directory(str(written)))

    with tempfile.TemporaryDirectory(dir=study.folder) as folder:
        made = trainer(study, config, best_settings=True, callbacks=[Reports()])
        made.args.output_dir = folder  # trials side by side
        made.train()


if __name__ == "__main__":
    way, given = sys.argv[1], Study.read(sys.argv[2])
    # On loopback, with a token that is not left in the user's home.
    os.environ |= {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_AUTH_MODE": "token"}
    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    if way == "best":
        os.environ |= {"TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1", "TUNE_GLOBAL_CHECKPOINT_S": str(10**9)}
    import ray

    with tempfile.TemporaryDirectory(prefix="p-") as scratch:  # a socket's path has room for 107 bytes
        ray.init(address="local", include_dashboard=False, log_to_driver=way != "best", _temp_dir=scratch)
        (best if way == "best" else documented)(given)
        ray.shutdown()
