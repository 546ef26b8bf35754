"""Optuna with Hugging Face's Trainer, one trial after the other in one process on all cores: `peers_optuna.py STUDY`.

`Trainer.hyperparameter_search(backend="optuna")`, and the same best settings that Tune's best way has.
"""

from __future__ import annotations

import sys

import optuna
from peers_study import Study
from peers_trainer import trainer

if __name__ == "__main__":
    study = Study.read(sys.argv[1])
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    trainer(study, {}, best_settings=True, callbacks=[]).hyperparameter_search(
        hp_space=lambda trial: {name: trial.suggest_categorical(name, values) for name, values in study.grid.items()},
        compute_objective=lambda metrics: metrics["eval_accuracy"],
        backend="optuna",
        direction="maximize",
        n_trials=study.trials,
        sampler=optuna.samplers.GridSampler(study.grid),
        pruner=optuna.pruners.NopPruner(),  # else the default one stops trials
    )
