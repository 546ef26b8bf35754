"""From a draft to the sections of a spec, each read on its own."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from search_spaces import RECIPES, Domain, SearchSpace, parse_domain
from search_spaces.domains import EXAMPLES
from trainables.config import DataConfig, ModelConfig, Settings, TrainingConfig
from trainables.errors import Problem
from trainables.glue import default_metric
from tune_service.home import STUDY_NAME
from tune_service.record_url import fault_of
from tune_service.spec_draft import Draft, nearest, show
from tune_service.spec_sections import (
    FINETUNE,
    KEYS,
    MODEL_PREFIX,
    SAME_FOR_ALL_TRIALS,
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

_FUNCTION = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")

_SECTIONS: Mapping[str, type[Settings]] = {
    "objective": Objective,
    "sampler": SamplerSpec,
    "scheduler": SchedulerSpec,
    "budget": BudgetSpec,
    "resources": ResourcesSpec,
    "checkpoints": CheckpointSpec,
    "faults": FaultSpec,
}
"""The sections that are read alike for every kind of trainable."""


def read_sections(draft: Draft, folder: Path, here: bool) -> StudySpec:
    """Every section with what is valid in it. Defaults stand in for what is broken, so that all checks can run."""
    for key in draft.raw:
        if key not in KEYS:
            draft.unknown(str(key), key, KEYS, "a spec")
    trainable = draft.raw.get("trainable") or FINETUNE
    if trainable != FINETUNE and not (isinstance(trainable, str) and _FUNCTION.fullmatch(trainable)):
        rule = "a trainable is `finetune` or a function of the user's own"
        draft.fault("trainable", rule, trainable, "finetune, or package.module:function")
        trainable = FINETUNE if {"model", "data"} & draft.raw.keys() else ""
    is_finetune = trainable == FINETUNE
    model, data = _read_model(draft, folder, here), _read_data(draft, folder, here)
    sections: dict[str, Any] = {key: _section(draft, key, kind) for key, kind in _SECTIONS.items()}
    sections["objective"] = _with_defaults(sections["objective"], data.task if data else None)
    return StudySpec(
        name=_read_name(draft),
        model=model,
        data=data,
        training=_section(draft, "training", TrainingConfig) if is_finetune else _own_training(draft),
        search_space=_read_search_space(draft, is_finetune),
        record=_read_record(draft),
        trainable=trainable,
        folder=folder,
        **sections,
    )


S = TypeVar("S", bound=Settings)


def _section(draft: Draft, key: str, kind: type[S], **stand_in: Any) -> S:
    """One section. What is wrong in it is noted and replaced by its default, or by `stand_in` where it has none."""
    values = _mapping(draft, key, kind.model_fields)
    if isinstance(values.get("text"), list):
        values["text"] = tuple(values["text"])  # strict validation takes no list for a tuple, and YAML has only lists
    errors = refusals(kind, values)
    for error in errors if draft.sound(key) else ():  # a section that stands twice has its fault already
        name = str(error["loc"][0])
        if error["type"] == "extra_forbidden":
            draft.unknown(f"{key}.{name}", name, kind.model_fields, f"`{key}`")
        else:
            inner = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in error["loc"])
            draft.fault(key + inner, *explain(kind, name, error))
            draft.broken.add(f"{key}.{name}")
    refused = {error["loc"][0] for error in errors}
    return kind.model_validate(
        stand_in | {name: value for name, value in values.items() if name not in refused}, strict=True
    )


def _mapping(draft: Draft, key: str, names: Iterable[str]) -> dict[Any, Any]:
    """A section as written; empty when it is absent or null, or is no mapping, which is a fault."""
    raw = draft.raw.get(key)
    if isinstance(raw, Settings):
        return raw.model_dump(exclude_unset=True)
    if raw is not None and not isinstance(raw, Mapping):
        draft.fault(key, f"`{key}` is a mapping", raw, f"the keys {', '.join(names)}")
        return {}
    return dict(raw or {})


def refusals(kind: type[Settings], values: Mapping[Any, Any]) -> list[ErrorDetails]:
    """What the class refuses. Strict, for otherwise true would be 1 and "32" would be 32."""
    try:
        kind.model_validate(values, strict=True)
    except ValidationError as error:
        return error.errors(include_url=False)
    return []


_WANTED: Mapping[str, str] = {
    "int_type": "a whole number",
    "float_type": "a number",
    "string_type": "a string (in quotes, if it looks like a number)",
    "bool_type": "true or false",
    "dict_type": "a mapping",
    "tuple_type": "a list of strings",
    "finite_number": "a finite number",
    "greater_than": "a number greater than {gt}",
    "greater_than_equal": "a number of {ge} or more",
    "less_than": "a number less than {lt}",
    "less_than_equal": "a number of {le} or less",
    "literal_error": "{expected}",
    "string_too_short": "a string that is not empty",
    "too_short": "a list of {min_length} or more",
    "too_long": "a list of {max_length} or less",
    "missing": "a value",
    "invalid_key": "a string as key",
}


def explain(kind: type[Settings], name: str, error: ErrorDetails) -> tuple[str, object, str]:
    """Rule, found and expected for what pydantic says of one field."""
    wanted = _WANTED.get(error["type"], error["msg"]).format_map(error.get("ctx", {}))
    default = kind.model_fields[name].get_default() if name in kind.model_fields else None
    example = f", such as {show(default)}" if isinstance(default, int | float) else ""
    if error["type"] == "missing":
        return f"`{name}` is needed", "nothing", wanted
    return f"`{name}` is {wanted}", error["input"], wanted + example


def _read_name(draft: Draft) -> str:
    name = draft.raw.get("name")
    problem = name_problem(name, draft.place("name"))
    if problem is None:
        return str(name)
    draft.problems.append(problem)
    return "unnamed"


def _read_model(draft: Draft, folder: Path, here: bool) -> ModelConfig | None:
    if draft.raw.get("model") is None:
        return None
    model = _section(draft, "model", ModelConfig, name="unnamed")
    _require_plain(draft, "model.config", model.config)
    found = _existing_folder(model.name, folder)
    if found is None and here and model.name.startswith(("/", "./", "../", "~")):
        draft.fault("model.name", "a local model is a folder that exists", model.name, "a folder, or a name of the hub")
    return model.model_copy(update={"name": str(found)}) if found else model


def _read_data(draft: Draft, folder: Path, here: bool) -> DataConfig | None:
    if draft.raw.get("data") is None:
        return None
    data = _section(draft, "data", DataConfig)
    if data.path is None:
        return data
    found = _existing_folder(data.path, folder)
    if found is None and here:
        rule = f"`path` is a folder that exists, beside the spec ({folder}) or in the working directory"
        draft.fault("data.path", rule, data.path, "a folder that holds train and validation")
    return data.model_copy(update={"path": str(found or folder / data.path)})


def _read_record(draft: Draft) -> str | None:
    url = draft.raw.get("record") if draft.sound("record") else None
    fault = fault_of(url) if url is not None else None
    if fault is None:
        return url
    draft.fault("record", fault.rule, fault.found, fault.expected)
    return None


def _existing_folder(written: str, folder: Path) -> Path | None:
    """Where a written path leads: from the spec's folder, or else from the working directory."""
    try:
        candidates = (base / Path(written).expanduser() for base in (folder, Path.cwd()))
        return next((candidate.resolve() for candidate in candidates if candidate.is_dir()), None)
    except (OSError, RuntimeError, ValueError):  # too long, no such home, a null character: not a folder
        return None


def _own_training(draft: Draft) -> dict[str, Any]:
    """`training` for a trainable of the user's own: anything, beside the two keys that the service itself reads."""
    names = ("max_epochs", "seed")
    values = _mapping(draft, "training", names)
    _require_plain(draft, "training", values)
    ours = {name: values.pop(name) for name in names if name in values}
    for error in refusals(TrainingConfig, ours):
        name = str(error["loc"][0])
        draft.fault(f"training.{name}", *explain(TrainingConfig, name, error))
        del ours[name]
    return TrainingConfig(**ours).model_dump(include=set(names)) | values


def _require_plain(draft: Draft, key: str, value: object) -> None:
    """Only what JSON can hold, for the record keeps it as JSON: no dates, sets or bytes."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            if not isinstance(name, str):
                draft.fault(f"{key}.{name}", "keys are strings", name, f'"{name}"')
            _require_plain(draft, f"{key}.{name}", inner)
    elif isinstance(value, list | tuple):
        for place, inner in enumerate(value):
            _require_plain(draft, f"{key}[{place}]", inner)
    elif (
        not (value is None or isinstance(value, str | int | float)) or value in (math.inf, -math.inf) or value != value
    ):
        rule = "values are strings, finite numbers, true, false, null, lists or mappings"
        draft.fault(key, rule, value, f'"{value}"')


def _with_defaults(objective: Objective, task: str | None) -> Objective:
    """The metric by task, and a mode that suits the metric, where the user left them open."""
    metric = objective.metric if "metric" in objective.model_fields_set else default_metric(task)
    mode: Literal["max", "min"] = "min" if metric.endswith("loss") else "max"
    return Objective(metric=metric, mode=objective.mode if "mode" in objective.model_fields_set else mode)


def _read_search_space(draft: Draft, is_finetune: bool) -> str | SearchSpace:
    raw = draft.raw.get("search_space")
    example = f"a mapping such as {{learning_rate: {EXAMPLES['log_uniform']}}}"
    if isinstance(raw, str) and is_finetune:
        if raw in RECIPES:
            return raw
        draft.fault("search_space", "there is no such recipe", raw, f"{nearest(raw, RECIPES)}; or {example}")
    elif isinstance(raw, Mapping):
        return SearchSpace(_read_domains(draft, raw, is_finetune))
    elif is_finetune:
        expected = f"one of {', '.join(RECIPES)}; or {example}"
        draft.fault("search_space", "`search_space` is the name of a recipe or a mapping", raw, expected)
    else:
        draft.fault("search_space", "a trainable of the user's own has its own search space", raw, example)
    return SearchSpace({})


def _read_domains(draft: Draft, raw: Mapping[Any, Any], is_finetune: bool) -> dict[str, Domain]:
    domains: dict[str, Domain] = {}
    for name, written in raw.items():
        key = f"search_space.{name}"
        if not isinstance(name, str) or not name:
            draft.fault(key, "a parameter's name is a string", name, f'"{name}"')
        elif is_finetune and name in SAME_FOR_ALL_TRIALS:
            rule = f"{', '.join(SAME_FOR_ALL_TRIALS)} are the same for all trials"
            draft.fault(key, rule, written, f"a fixed value: training.{name}")
        elif is_finetune and name not in TUNABLE_FIELDS and not re.match(rf"{re.escape(MODEL_PREFIX)}.", name):
            rule = f"a search space names fields of `training`, or {MODEL_PREFIX}X"
            field = name.removeprefix("training.")
            near = f"{nearest(name, TUNABLE_FIELDS)}; or {MODEL_PREFIX}{name}"
            draft.fault(key, rule, name, field if field in TUNABLE_FIELDS else near)
        try:
            domains[str(name)] = written if isinstance(written, Domain) else parse_domain(written)
        except ValueError as error:
            kind = next(iter(written), "") if isinstance(written, Mapping) else ""
            examples = [EXAMPLES[kind]] if kind in EXAMPLES else EXAMPLES.values()
            draft.fault(key, str(error).partition(", but got ")[0], written, " or ".join(examples))
    return domains


def name_problem(name: object, place: str = "name") -> Problem | None:
    """What is wrong with a study's name; None when it is one."""
    if isinstance(name, str) and STUDY_NAME.fullmatch(name):
        return None
    slug = re.sub(r"[^a-z0-9._-]+", "-", str(name or "").lower()).lstrip("._-")[:63] or "mrpc-gpt2"
    rule = "a study's name has 1 to 63 of the characters a-z 0-9 . _ - and begins with a letter or a digit"
    return Problem(place, rule, show(name), f'"{slug}"')
