"""The best trial as a folder of its own: model, config, metrics."""

from __future__ import annotations

from pathlib import Path

from trainables.checkpoint import write_json
from trainables.errors import CheckpointError, DamagedCheckpointError, Problem
from trainables.stores import Checkpoints
from tune_service.errors import CommandError
from tune_service.home import StudyStorage
from tune_service.out_folder import check_out, written_whole
from tune_service.record import Record
from tune_service.spec import StudySpec, dump_yaml, spec_for_trial
from tune_service.status import BestTrial, StudyStatus
from tune_service.study import stored_spec

TRIES = 3
PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"}


def export_best(name: str, out: Path, storage: StudyStorage) -> BestTrial:
    """Writes the best trial of a study to `out`, a new or an empty folder, whole or not at all (see `written_whole`).

    `model/` opens with `from_pretrained` (a trainable of the user's own: `checkpoint/`, when it saved one),
    `config.yaml` is a spec that trains this trial again, `metrics.json` is what it reached. Raises OutputNotEmptyError,
    and CommandError when the study has no best trial or `out` cannot be written.
    """
    check_out(out)
    folder = storage.study(name)
    record = Record.open(folder)
    tries, damaged = 0, set[tuple[int, int]]()
    while tries < TRIES:
        status = record.status(deep=True, damaged=damaged)
        try:
            return _export(name, record, status, out, folder.checkpoints)
        except DamagedCheckpointError:  # a bucket's, whose bytes are hashed as they come
            assert status.best is not None, "it was copied"
            damaged.add((status.best.number, status.best.epoch))
        except CheckpointError:  # the driver of a running study has a better one, and has deleted this
            tries += 1
    found = f"{TRIES} times it was gone before it was copied"
    raise CommandError(Problem(name, "has a best trial that stays for a moment", found, "another try"))


def _export(name: str, record: Record, status: StudyStatus, out: Path, checkpoints: Checkpoints) -> BestTrial:
    if status.best is None:
        found = f"no completed or pruned trial with a finite {status.objective.metric} and a whole checkpoint"
        raise CommandError(Problem(name, "has a best trial", found, "a study with at least one trial that ended"))
    spec = stored_spec(record)
    with written_whole(out) as folder:
        if record.saves(status.best.number):
            to, wanted = (folder, _is_model) if spec.is_finetune else (folder / "checkpoint", _is_any)
            checkpoints.copy(status.best.number, status.best.epoch, to, wanted)
        _write(folder, spec, status, status.best)
    return status.best


def _write(out: Path, spec: StudySpec, status: StudyStatus, best: BestTrial) -> None:
    retrain = spec_for_trial(spec, best.params, name=f"{spec.name[:50]}-best")
    (out / "config.yaml").write_text(dump_yaml(retrain), encoding="utf-8")
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


def _is_model(path: Path) -> bool:
    """Of a model nothing that could be a pickle."""
    return path.parts[0] == "model" and path.suffix not in PICKLES


def _is_any(path: Path) -> bool:
    return True
