"""Everything that can be known before money is spent. Imports neither torch nor ray, trains nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from trainables.config import DataConfig
from trainables.data import TextData, read_texts
from trainables.errors import Problem, UserError
from trainables.glue import majority_baseline
from trainables.model_files import check_config, check_model_files
from trainables.stores import GIB
from tune_service.errors import SpecError, exit_code
from tune_service.home import StudyStorage
from tune_service.kept import least_bytes, most_at_once
from tune_service.place import Room
from tune_service.prctl import end_with_parent
from tune_service.spec import StudySpec
from tune_service.words import counted

IMPORT_TIMEOUT_S = 120


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    name: str
    ok: bool
    found: str
    advice: str = ""
    problems: tuple[Problem, ...] = ()
    code: int = 0
    """The exit code that it makes for."""

    def to_json(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if key not in ("problems", "code")}


def run_checks(spec: StudySpec, storage: StudyStorage, room: Room) -> list[Check]:
    """Looks at all that a study of this spec needs. The name is not looked up: `check` serves existing studies too.

    What a half-read spec lacks, such as `data`, is passed over.
    """
    checks = [
        looked_at("storage", lambda: _storage(storage)),
        looked_at("resources", lambda: _resources(spec, room)),
    ]
    model, data = spec.model, spec.data
    if not spec.is_finetune and spec.trainable:
        checks.append(looked_at("trainable", lambda: import_trainable(spec.trainable, spec.folder)))
    if spec.is_finetune and model is not None and data is not None:
        checks.append(looked_at("model", lambda: _raised(_model_problems(spec)) or model.name))
    if spec.is_finetune and data is not None:
        checks.append(looked_at("data", lambda: _describe(_texts(data))))
    if (url := spec.record) is not None:
        checks.append(looked_at("record", lambda: _record(storage, url)))
    if spec.is_finetune and model is not None:
        checks.append(looked_at("checkpoints", lambda: room_for_checkpoints(spec, storage, least_bytes(spec))))
    return checks


def _model_problems(spec: StudySpec) -> list[Problem]:
    largest = spec.trial_settings().with_params(spec.largest_params())
    return check_model_files(largest.model) or check_config(largest.model, largest.training.max_length)


def problems_of(checks: Sequence[Check]) -> list[Problem]:
    return [problem for check in checks for problem in check.problems]


def refuse_faulty(spec: StudySpec, storage: StudyStorage, room: Room) -> None:
    """SpecError with all that `run_checks` finds wrong, before anything is written."""
    problems = problems_of(run_checks(spec, storage, room))
    if problems:
        raise SpecError(problems)


def baseline(spec: StudySpec) -> float | None:
    """Accuracy of always answering the commonest class of the validation split; None where it means nothing."""
    if not spec.is_finetune or spec.data is None:
        return None
    texts = _texts(spec.data)
    if not texts.label_names:
        return None
    return majority_baseline(next(split.labels for name, split in texts.splits.items() if name != "train"))


def looked_at(name: str, look: Callable[[], str]) -> Check:
    """What `look` found, or, in a UserError, what is wrong."""
    try:
        return Check(name, True, look())
    except UserError as error:
        return _faulty(name, error.problems, exit_code(error))


def with_lines(check: Check, place: Callable[[str], str]) -> Check:
    """`check`, whose problems say where in its file the spec has their keys: `place` tells it."""
    problems = tuple(replace(problem, place=place(problem.place)) for problem in check.problems)
    return _faulty(check.name, problems, check.code) if problems else check


def _faulty(name: str, problems: Sequence[Problem], code: int) -> Check:
    found = "; ".join(f"{problem.place}: {problem.found}" for problem in problems)
    advice = "; ".join(f"{problem.rule}: {problem.expected}" for problem in problems)
    return Check(name, False, found, advice, tuple(problems), code)


def _raised(problems: Sequence[Problem]) -> str:
    if problems:
        raise UserError(problems)
    return ""


def _storage(storage: StudyStorage) -> str:
    storage.check_writable()
    return f"{storage.where} can be written"


def _record(storage: StudyStorage, url: str) -> str:
    storage.check_record(url)
    from tune_service.database import look  # SQLAlchemy loads only where it is needed

    return look(url)


def _resources(spec: StudySpec, room: Room) -> str:
    _raised(room.problems(spec.resources))
    at_once = counted(room.fit(spec.resources, spec.budget.concurrent_trials), "trial")
    if spec.resources.finds_share:
        return f"{room.offer()}: {at_once} at once at most; how many share a GPU is found while they run"
    return f"{room.offer()}: {at_once} at once"


def room_for_checkpoints(spec: StudySpec, storage: StudyStorage, each: int) -> str:
    """Whether the budget, and the disk, hold the checkpoints that must be there at one moment for one trial to run.

    `each`: the bytes of one, as far as they are known.
    """
    number = most_at_once(running=1, waiting=0)
    needed, budget = number * each, spec.checkpoints.budget_bytes
    if needed > budget:
        raise UserError(
            Problem(
                "checkpoints.budget_gib",
                f"holds {number} checkpoints: a trial's last, its next, the best, the best that has ended",
                f"{spec.checkpoints.budget_gib:g}; one takes {each / GIB:.2g} GiB, optimizer state included",
                f"at least {1.01 * needed / GIB:.2g}",
            )
        )
    free = storage.free_bytes()
    if needed > free:
        found = f"{free / GIB:.2g} GiB are free at {storage.disk}, {needed / GIB:.2g} are needed at least"
        raise UserError(Problem("--storage", "has room for the checkpoints of one trial", found, "another --storage"))
    size = f"{each / GIB:.2g} GiB each at least, " if each else ""
    return f"{size}{spec.checkpoints.budget_gib:g} GiB in all, {free / GIB:.3g} GiB free"


@lru_cache(maxsize=1)
def _texts(data: DataConfig) -> TextData:
    return read_texts(data)


def _describe(texts: TextData) -> str:
    sizes = ", ".join(f"{len(split.labels)} {name}" for name, split in texts.splits.items())
    if not texts.label_names:
        return f"{sizes} rows, scores"
    shares = np.bincount(texts.splits["train"].labels, minlength=len(texts.label_names))
    classes = ", ".join(f"{name} {share}" for name, share in zip(texts.label_names, shares[:8], strict=False))
    return f"{sizes} rows; train: {classes}"


@lru_cache(maxsize=1)
def import_trainable(trainable: str, folder: Path) -> str:
    """Imports the user's module in a process of its own: it may import torch, or end the process."""
    code = "import inspect, sys; from trainables.worker import resolve; found = resolve(sys.argv[1], sys.argv[2])"
    out, found = in_a_process(
        ["-c", f"{code}; print(); print(inspect.isgeneratorfunction(found))", trainable, str(folder)]
    )
    if found:
        expected = f"a module on PYTHONPATH or in {folder} that can be imported"
        raise UserError(Problem("trainable", f"{trainable} can be imported", found, expected))
    if out.rstrip().endswith("False"):
        return f"{trainable}, which is no generator function itself: what it returns has to yield Reports"
    return trainable


def in_a_process(arguments: Sequence[str], given: str = "") -> tuple[str, str]:
    """What a Python of its own, without a GPU, prints with `given` as its input, and why it failed: empty if not.

    It may print what is no UTF-8, and go on for ever.
    """
    command = [sys.executable, "-P", *arguments]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    try:
        run = subprocess.run(
            command,
            input=given.encode(),
            capture_output=True,
            timeout=IMPORT_TIMEOUT_S,
            env=environment,
            check=False,
            preexec_fn=end_with_parent,
        )
    except subprocess.TimeoutExpired:
        return "", f"the import took more than {IMPORT_TIMEOUT_S} s"
    out, err = (stream.decode(errors="replace") for stream in (run.stdout, run.stderr))
    last = next((line for line in reversed(err.splitlines()) if line.strip()), f"exit code {run.returncode}")
    return out, last if run.returncode else ""
