"""What the user wrote: the spec of a study, checked as a whole before anything starts.

`load_spec` reads a file, `parse_spec` a mapping; both return a sound StudySpec or raise one SpecError with every fault.
The keys and what they mean are in spec_sections.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from search_spaces import Choice, SearchSpace, Value
from trainables.config import TrainingConfig
from trainables.errors import Problem
from tune_service.errors import SpecError
from tune_service.spec_checks import CHECKS
from tune_service.spec_draft import Draft
from tune_service.spec_reading import name_problem, read_sections
from tune_service.spec_sections import (
    MODEL_PREFIX,
    TUNABLE_FIELDS,
    BudgetSpec,
    CheckpointSpec,
    FaultSpec,
    Objective,
    ResourcesSpec,
    SamplerSpec,
    SchedulerSpec,
    StudySpec,
)
from tune_service.spec_yaml import write_yaml

__all__ = [
    "TUNABLE_FIELDS",
    "BudgetSpec",
    "CheckpointSpec",
    "FaultSpec",
    "Objective",
    "ResourcesSpec",
    "SamplerSpec",
    "SchedulerSpec",
    "StudySpec",
    "beside",
    "dump_yaml",
    "load_spec",
    "moved",
    "name_problem",
    "parse_spec",
    "spec_for_trial",
]


def load_spec(
    path: str | Path,
    overrides: Sequence[str] = (),
    name: str | None = None,
    *,
    here: bool = True,
    also: Callable[[StudySpec], Iterable[Problem]] | None = None,
) -> StudySpec:
    """Reads a spec file. Raises one SpecError with every fault.

    `overrides` are `--set` options (`training.batch_size=64`); `name` replaces the spec's. `here=False`: the folders
    that it names are on another machine, so they are not looked for. `also` finds faults that need more than the file,
    of data or machine; what it says of a part that is wrong by itself is left out.
    """
    draft = _draft(path, overrides, name)
    draft.refuse_secrets()
    return _build(draft, Path(path).resolve().parent, here, also)


def places(path: str | Path, overrides: Sequence[str], name: str | None) -> Callable[[str], str]:
    """What tells where a spec that `load_spec` reads has a dotted key: `study.yaml:12 training.batch_size`."""
    return _draft(path, overrides, name).place


def _draft(path: str | Path, overrides: Sequence[str], name: str | None) -> Draft:
    draft = Draft.of_file(path)
    draft.override(overrides)
    if name is not None:
        draft.set_name(name)
    return draft


def parse_spec(mapping: Mapping[str, Any], base_dir: str | Path = ".", *, here: bool = True) -> StudySpec:
    """Checks a spec given as a Python object; `base_dir` stands for the spec file's folder. Raises one SpecError.

    `here=False` for a spec that was checked before, such as a record's: its folders may be gone by now.
    """
    draft = Draft.of_mapping(mapping)
    if here:
        draft.refuse_secrets()
    return _build(draft, Path(base_dir).resolve(), here)


def dump_yaml(spec: StudySpec) -> str:
    """A spec as YAML that loads to an equal spec."""
    return write_yaml(spec.to_mapping())


def spec_for_trial(spec: StudySpec, params: Mapping[str, Value], name: str | None = None) -> StudySpec:
    """A spec whose only trial is one that was: the same parameters, and no scheduler that could end it early.

    The values stand both in `training` (to be read by people) and as domains of one value (so that the trial's `params`
    have the names they had).
    """
    overrides = {key.removeprefix(MODEL_PREFIX): v for key, v in params.items() if key.startswith(MODEL_PREFIX)}
    fields = {key: value for key, value in params.items() if not (spec.is_finetune and key.startswith(MODEL_PREFIX))}
    # A trainable of the user's own may tune what it calls max_epochs or seed; the study's are what they were.
    own = spec.training_values
    values = own | fields | {key: own[key] for key in ("max_epochs", "seed")}
    model = spec.model
    if model is not None and spec.is_finetune:
        model = model.model_copy(update={"config": {**model.config, **overrides}})
    return dataclasses.replace(
        spec,
        name=name or spec.name,
        model=model,
        training=TrainingConfig(**values) if spec.is_finetune else values,
        search_space=SearchSpace({key: Choice((value,)) for key, value in params.items()}),
        scheduler=SchedulerSpec(name="none"),
        budget=BudgetSpec(trials=1),
        record=None,  # whoever trains it again has a file, not a place in somebody's database
    )


def beside(spec: StudySpec, root: Path) -> StudySpec:
    """The spec as a process sees it whose working directory is a copy of `root`: paths in there are relative."""
    model, data = spec.model, spec.data
    if model is not None and (name := _relative(model.name, root)):
        model = model.model_copy(update={"name": name})
    if data is not None and data.path is not None and (path := _relative(data.path, root)):
        data = data.model_copy(update={"path": path})
    return dataclasses.replace(spec, model=model, data=data)


def moved(spec: StudySpec, root: Path, to: Path) -> StudySpec:
    """The spec after the folder `root`, in which it lies with what it names, was copied to `to`."""
    spec, model, data = beside(spec, root), spec.model, spec.data
    if model is not None and spec.model is not None and spec.model.name != model.name:
        model = model.model_copy(update={"name": str(to / spec.model.name)})
    if data is not None and spec.data is not None and spec.data.path is not None and spec.data.path != data.path:
        data = data.model_copy(update={"path": str(to / spec.data.path)})
    return dataclasses.replace(spec, model=model, data=data, folder=to)


def _relative(path: str, root: Path) -> str | None:
    """`path` from `root` on; None when it does not lie in there."""
    return str(Path(path).relative_to(root)) if Path(path).is_relative_to(root) else None


def _build(
    draft: Draft, folder: Path, here: bool, also: Callable[[StudySpec], Iterable[Problem]] | None = None
) -> StudySpec:
    """The spec, or SpecError with every fault of the draft."""
    spec = read_sections(draft, folder, here)
    for check in CHECKS:
        check(spec, draft)
    for problem in also(_sound_part(spec, draft)) if also else ():
        if not any(_related(problem.place, broken) for broken in draft.broken):
            draft.problems.append(dataclasses.replace(problem, place=draft.place(problem.place)))
    if draft.problems:
        raise SpecError(draft.problems)
    return spec


def _sound_part(spec: StudySpec, draft: Draft) -> StudySpec:
    """The spec without the domains that no trial could take its values from, and without data of an unknown task."""
    if not draft.sound("data.task"):
        spec = dataclasses.replace(spec, data=None)
    if isinstance(spec.search_space, str):
        return spec
    domains = {name: domain for name, domain in spec.domains.items() if draft.sound(f"search_space.{name}")}
    return dataclasses.replace(spec, search_space=SearchSpace(domains))


def _related(key: str, other: str) -> bool:
    """Whether one of two dotted keys is the other or lies in it."""
    return f"{key}.".startswith(f"{other}.") or f"{other}.".startswith(f"{key}.")
