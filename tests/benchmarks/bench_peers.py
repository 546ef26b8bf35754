"""One study through the product and through what people use today: given configurations, all epochs, no early stop.

    TUNE_SERVICE_TEST_DATA=DATA python tests/benchmarks/bench_peers.py [--trials 8] [--epochs 2] [--only NAME ...]
    TUNE_SERVICE_TEST_DATA=DATA python tests/benchmarks/bench_peers.py --gpu

DATA holds gpt2-tokenizer/ and glue/mrpc. On a CPU: a GPT-2 of 2 layers from scratch on the first 1,024 rows of MRPC,
fp32, one thread a trial. With --gpu: GPT-2 124M from random weights on all of MRPC, bf16, 16 trials of 3 epochs (the
Trainer evaluates in bf16 too, the product in fp32).

tune-documented is `Trainer.hyperparameter_search(backend="ray")` as documented, tune-best a Trainer in a Tune function
with its best settings, optuna `hyperparameter_search(backend="optuna")` in one process on all cores. All get the same
token ids, first weights, batch, learning rates and schedule. The peers write a checkpoint (model, optimizer, random
state) each epoch. Ours writes the model of each epoch that is a trial's best so far, and a whole checkpoint once in ten
times as long as it takes; it alone is hashed, and synced to the disk.

Makespan: the whole command, from its start to its exit. Steady epoch: the median of a contender's epochs (training and
evaluation) but for each trial's first. Ideal: all epochs at that pace, as many at a time as the contender runs. Wants
a quiet machine: optuna's threads wait for each other, and beside other work its epochs took up to 20 times as long.
`others_cores` says what other work took of the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import meter
import pyarrow.parquet as pq
import yaml
from machine import has_gpu, show
from peers_study import CPU_ROWS, Ran, Study, noted
from record_times import trial_times

HERE = Path(__file__).parent
PRODUCT = "tune-service"
CONTENDERS = {
    PRODUCT: ["-m", "tune_service.cli", "run", "SPEC", "--json", "--storage", "FOLDER"],
    "tune-documented": [str(HERE / "peers_tune.py"), "documented", "STUDY"],
    "tune-best": [str(HERE / "peers_tune.py"), "best", "STUDY"],
    "optuna": [str(HERE / "peers_optuna.py"), "STUDY"],
}
NOISE = {"accuracy": 0.03, "eval_loss": 0.05, "train_loss": 0.05}
"""How far a contender's mean over the trials may be from the product's: the rows come in another order."""


def run(name: str, study: Study, log: Path) -> tuple[dict[str, Any], list[Ran]]:
    spec = Path(study.folder) / "spec.yaml"
    spec.write_text(yaml.safe_dump(study.spec))
    files = {"SPEC": str(spec), "STUDY": str(study.write()), "FOLDER": study.folder}
    command = [sys.executable, *(files.get(part, part) for part in CONTENDERS[name])]
    environment = os.environ | {"PYTHONPATH": f"{HERE}:{HERE.parent.parent}:{os.environ.get('PYTHONPATH', '')}"}
    if not study.gpu:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    cost = meter.run(command, environment, log)
    trials = (
        of_product(json.loads(cost.output), Path(study.folder) / "peers" / "record.journal")
        if name == PRODUCT
        else noted(study)
    )
    whole = [len(trial.epoch_s) for trial in trials] == [study.epochs] * study.trials
    if cost.status or not whole:
        found = f"exit {cost.status}, epochs of its trials: {[len(trial.epoch_s) for trial in trials]}"
        raise SystemExit(f"bench_peers: {name}: {found}\n{log.read_text()[-4000:]}")
    epochs = [epoch_s for trial in trials for epoch_s in trial.epoch_s]
    steady_s = statistics.median([epoch_s for trial in trials for epoch_s in trial.epoch_s[1:]] or epochs)
    ideal_s = steady_s * len(epochs) / concurrent_of(name, study)
    first_step_s = min(trial.ended - sum(trial.epoch_s) for trial in trials) - cost.began
    return {
        "makespan_s": round(cost.wall_s, 1),
        "cpu_s": round(cost.cpu_s, 1),
        "others_cores": round(cost.others_cores, 2),
        "steady_epoch_s": round(steady_s, 3),
        "ideal_s": round(ideal_s, 1),
        "overhead": round(cost.wall_s / ideal_s, 2),
        "first_step_after_s": round(first_step_s, 1),  # at the latest: the first trial's checkpoints are in it
        "overhead_after_first_step": round((cost.wall_s - first_step_s) / ideal_s, 2),
        "all_processes_mb": round(cost.most_bytes / 1024**2),
    }, sorted(trials, key=lambda trial: (trial.learning_rate, trial.weight_decay))


def of_product(status: dict[str, Any], record: Path) -> list[Ran]:
    """The trials of `tune-service run --json`."""
    times = trial_times(record)
    ran = []
    for trial in status["trials"]:
        metrics = [report["metrics"] for report in trial["reports"]]
        last = metrics[-1]
        ran.append(
            Ran(
                **trial["params"],
                ended=times[trial["number"]][1],
                epoch_s=[each["epoch_s"] for each in metrics],
                accuracy=last["eval_accuracy"],
                eval_loss=last["eval_loss"],
                train_loss=last["train_loss"],
            )
        )
    return ran


def concurrent_of(name: str, study: Study) -> int:
    if name == "optuna" or (study.gpu and name == "tune-documented"):
        return 1  # a Trainer's default is a whole GPU
    return study.concurrent


def side_by_side(ran: dict[str, list[Ran]]) -> dict[str, Any]:
    """What the trials came to. `agrees`: whether each contender trained the same."""
    found: dict[str, Any] = {}
    ours = ran.get(PRODUCT)
    for name, trials in ran.items():
        means = {field: statistics.mean(getattr(trial, field) for trial in trials) for field in NOISE}
        found[name] = {field: [round(getattr(trial, field), 3) for trial in trials] for field in NOISE}
        found[name] |= {f"mean_{field}": round(value, 4) for field, value in means.items()}
        if ours is not None:
            found[name]["agrees"] = all(
                abs(value - statistics.mean(getattr(trial, field) for trial in ours)) <= NOISE[field]
                for field, value in means.items()
            ) and [(each.learning_rate, each.weight_decay) for each in trials] == [
                (each.learning_rate, each.weight_decay) for each in ours
            ]
    return found


def data_folder(folder: Path, rows: int | None) -> str:
    source = Path(os.environ["TUNE_SERVICE_TEST_DATA"]) / "glue" / "mrpc"
    folder.mkdir()
    for split in ("train", "validation"):
        table = pq.read_table(source / f"{split}.parquet")
        pq.write_table(table.slice(0, rows) if split == "train" else table, folder / f"{split}.parquet")
    return str(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, help="an even number; 8, on a GPU 16")
    parser.add_argument("--epochs", type=int, help="2, on a GPU 3")
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--concurrent", type=int, help="trials at a time: one a core, on a GPU 4")
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--keep-logs", type=Path, help="folder for what the contenders print")
    options = parser.parse_args()
    if (options.trials or 0) % 2:
        parser.error(f"--trials is an even number, half of them with each weight decay, but got {options.trials}")
    if "TUNE_SERVICE_TEST_DATA" not in os.environ:
        raise SystemExit("bench_peers: TUNE_SERVICE_TEST_DATA names no folder with gpt2-tokenizer/ and glue/mrpc")
    if options.gpu and not has_gpu():
        raise SystemExit("bench_peers: no GPU here, nothing measured")
    results: dict[str, dict[str, Any]] = {}
    ran: dict[str, list[Ran]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        data = data_folder(root / "data", None if options.gpu else CPU_ROWS)
        logs = options.keep_logs or root
        logs.mkdir(parents=True, exist_ok=True)
        for name in options.only:
            with tempfile.TemporaryDirectory(dir=root) as folder:  # a GPU study's checkpoints are 24 GB
                study = Study(
                    folder=folder,
                    tokenizer=str(Path(os.environ["TUNE_SERVICE_TEST_DATA"]) / "gpt2-tokenizer"),
                    data=data,
                    trials=options.trials or (16 if options.gpu else 8),
                    epochs=options.epochs or (3 if options.gpu else 2),
                    gpu=options.gpu,
                    concurrent=options.concurrent or (4 if options.gpu else len(os.sched_getaffinity(0))),
                )
                log = logs / f"{name}.log"
                results[name], ran[name] = run(name, study, log)
            print(json.dumps({name: results[name]}), file=sys.stderr, flush=True)
    if PRODUCT in results:
        for found in results.values():
            for unit in ("makespan_s", "cpu_s"):
                found[f"{unit.removesuffix('_s')}_over_ours"] = round(found[unit] / results[PRODUCT][unit], 2)
    outcome = side_by_side(ran)
    show(
        "peers",
        trials=study.trials,
        epochs=study.epochs,
        concurrent=study.concurrent,
        contenders=results,
        outcome=outcome,
    )
    if not all(found.get("agrees", True) for found in outcome.values()):
        raise SystemExit("bench_peers: the contenders did not train the same, so their times say nothing")
