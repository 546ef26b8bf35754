"""The best trial as a folder of its own: model, config, metrics."""

from __future__ import annotations

import shutil
from pathlib import Path

from trainables.checkpoint import CheckpointStore, Manifest, fsync_tree, write_json
from trainables.errors import Problem
from tune_service.errors import CommandError
from tune_service.record import Record
from tune_service.spec import StudySpec, dump_yaml, spec_for_trial
from tune_service.status import BestTrial, StudyStatus
from tune_service.storage import Storage, check_out
from tune_service.study import stored_spec

PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"}


def export_best(name: str, out: Path, storage: Storage) -> BestTrial:
    """Writes the best trial of a study to `out`, which is whole or absent whenever this process is killed.

    `model/` opens with `from_pretrained` (a trainable of the user's own: `checkpoint/`, when it saved one),
    `config.yaml` is a spec that trains this trial again, `metrics.json` is what it reached. Raises OutputNotEmptyError,
    and CommandError when the study has no best trial or `out` cannot be written.
    """
    folder = storage.study(name)
    check_out(out)
    record = Record.open(folder)
    status = record.status(deep=True)
    if status.best is None:
        found = f"no completed or pruned trial with a finite {status.objective.metric} and a whole checkpoint"
        raise CommandError(Problem(name, "has a best trial", found, "a study with at least one trial that ended"))
    spec = stored_spec(record)
    out = out.absolute()
    partial = out.with_name(f".{out.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        _write(partial, spec, status, status.best, folder.checkpoints)
        fsync_tree(partial)
        partial.replace(out)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        expected = "a folder on a disk with room"
        raise CommandError(Problem("--out", "can be written", f"{type(error).__name__}: {error}", expected)) from error
    return status.best


def _write(out: Path, spec: StudySpec, status: StudyStatus, best: BestTrial, checkpoints: CheckpointStore) -> None:
    checkpoint = checkpoints.folder(best.number, best.epoch)
    if checkpoint.exists():
        _copy(checkpoint, out if spec.is_finetune else out / "checkpoint", only_model=spec.is_finetune)
    retrain = spec_for_trial(spec, best.params, name=f"{spec.name[:50]}-best")
    (out / "config.yaml").write_text(dump_yaml(retrain))
    trial = status.trials[best.number]
    report = next(report for report in trial.reports if report.epoch == best.epoch)
    document = {
        "study": status.study,
        "objective": status.objective.model_dump(),
        **best.model_dump(),
        "metrics": report.metrics,
        "reports": [each.model_dump() for each in trial.reports],
    }
    write_json(out / "metrics.json", document)


def _copy(checkpoint: Path, out: Path, only_model: bool) -> None:
    """Copies what the manifest names and so was verified; of a model nothing that could be a pickle."""
    for name in Manifest.read(checkpoint).files:
        path = Path(name)
        if only_model and (path.parts[0] != "model" or path.suffix in PICKLES):
            continue
        (out / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(checkpoint / path, out / path)
