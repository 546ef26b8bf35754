"""What the user wrote: the spec of a study, checked as a whole before anything starts.

`load_spec` reads a file, `parse_spec` a mapping; both return a sound StudySpec or raise one SpecError with every fault.
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, ValidationError
from pydantic_core import ErrorDetails

from search_spaces import RECIPES, Choice, Domain, IntUniform, SearchSpace, Value, parse_domain
from search_spaces.domains import EXAMPLES
from trainables.config import DataConfig, FinetuneConfig, ModelConfig, Settings, TrainingConfig
from trainables.errors import Problem
from trainables.glue import default_metric, metric_names
from tune_service.errors import SpecError

FINETUNE = "finetune"
MODEL_PREFIX = "model.config."
SAME_FOR_ALL_TRIALS = ("max_epochs", "seed", "precision")
TUNABLE_FIELDS = tuple(name for name in TrainingConfig.model_fields if name not in SAME_FOR_ALL_TRIALS)

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
_FUNCTION = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


class Objective(Settings):
    metric: Annotated[str, Field(min_length=1)] = "eval_accuracy"
    """What trials are compared by. Without one: stsb eval_pearson, cola eval_matthews, others eval_accuracy."""
    mode: Literal["max", "min"] = "max"
    """Which way is better. Without one: min for a metric that ends with `loss`, else max."""


class SamplerSpec(Settings):
    name: Literal["tpe", "random", "grid"] = "tpe"
    """How the next parameters are chosen. grid needs finite domains."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0


class SchedulerSpec(Settings):
    name: Literal["asha", "none"] = "asha"
    """none: every trial runs all its epochs."""
    grace_period: PositiveInt = 1
    """Epochs that a trial runs before asha may stop it."""
    reduction_factor: Annotated[float, Field(gt=1)] = 3.0
    """About 1 / reduction_factor of the trials pass each rung."""


class BudgetSpec(Settings):
    trials: PositiveInt = 64
    """Every trial that got a number counts, also one that failed."""
    concurrent_trials: PositiveInt | None = None
    """null: as many as fit."""


class ResourcesSpec(Settings):
    workers: PositiveInt = 1
    """Ranks of one trial."""
    gpus_per_worker: NonNegativeFloat = 1.0
    """0: gloo on CPU. A fraction shares a GPU between trials of one worker."""
    cpus_per_worker: PositiveFloat = 1.0


class CheckpointSpec(Settings):
    budget_gib: PositiveFloat = 20.0
    """For all checkpoints of the study together, optimizer state included."""


class FaultSpec(Settings):
    restarts_per_trial: NonNegativeInt = 2
    step_timeout_s: PositiveFloat | None = None
    """Longest wait for one epoch's report. null: 5 times the slowest epoch so far, at least 60 s; first one 15 min."""
    same_error_limit: PositiveInt = 3
    """So many trials that fail alike end the study."""


@dataclass(frozen=True, kw_only=True)
class StudySpec:
    """A checked spec: `load_spec` and `parse_spec` make it, and nothing in here checks again."""

    name: str
    """Of the study: it becomes a folder and part of actor names."""
    model: ModelConfig | None = None
    """None only for a trainable of the user's own."""
    data: DataConfig | None = None
    """None only for a trainable of the user's own."""
    training: TrainingConfig | Mapping[str, Any] = field(default_factory=TrainingConfig)
    """Fixed values. A plain mapping for a trainable of the user's own, which may name anything; it always holds
    max_epochs and seed."""
    search_space: str | SearchSpace
    """As written: the name of a recipe, or the domains themselves."""
    objective: Objective = field(default_factory=Objective)
    sampler: SamplerSpec = field(default_factory=SamplerSpec)
    scheduler: SchedulerSpec = field(default_factory=SchedulerSpec)
    budget: BudgetSpec = field(default_factory=BudgetSpec)
    resources: ResourcesSpec = field(default_factory=ResourcesSpec)
    checkpoints: CheckpointSpec = field(default_factory=CheckpointSpec)
    faults: FaultSpec = field(default_factory=FaultSpec)
    record: None = None
    trainable: str = FINETUNE
    """`finetune`, or package.module:function."""
    folder: Path = field(default_factory=Path.cwd, compare=False)
    """Where the spec was: a module of the user's own may lie there. Not a key of the spec."""

    @property
    def is_finetune(self) -> bool:
        return self.trainable == FINETUNE

    @property
    def domains(self) -> SearchSpace:
        """What is tuned: a mapping from parameter to domain."""
        return RECIPES[self.search_space]() if isinstance(self.search_space, str) else self.search_space

    @property
    def training_values(self) -> dict[str, Any]:
        """What `training` says, as a mapping for every kind of trainable."""
        return self.training.model_dump() if isinstance(self.training, TrainingConfig) else dict(self.training)

    @property
    def max_epochs(self) -> int:
        return int(self.training_values["max_epochs"])

    @property
    def seed(self) -> int:
        """Of every trial, so that trials differ by their parameters alone."""
        return int(self.training_values["seed"])

    def first_params(self) -> dict[str, Value]:
        """Where the first trial starts: the spec's own values where they lie in the space, else the recipe's defaults.

        A parameter that has neither is left out and the sampler fills it in; on a grid it gets its first value, so that
        the first trial is a point of the grid.
        """
        own = self.training_values
        if self.model is not None:
            own |= {MODEL_PREFIX + name: value for name, value in self.model.config.items()}
        space, params = self.domains, dict[str, Value]()
        for name, domain in space.items():
            if name in own and domain.contains(own[name]):
                params[name] = own[name]
            elif name in space.defaults:
                params[name] = space.defaults[name]
            elif self.sampler.name == "grid" and (values := domain.grid()) is not None:
                params[name] = values[0]
        return params

    def trial_settings(self) -> FinetuneConfig:
        """What every trial of `finetune` starts from; `with_params` puts its sampled values in."""
        assert self.model is not None and self.data is not None and isinstance(self.training, TrainingConfig)
        return FinetuneConfig(model=self.model, data=self.data, training=self.training)

    def to_mapping(self) -> dict[str, Any]:
        """Plain values that `parse_spec` reads back to an equal spec."""
        mapping: dict[str, Any] = {}
        for key in KEYS:
            value = getattr(self, key)
            if isinstance(value, Settings):
                mapping[key] = value.model_dump(mode="json")
            elif isinstance(value, SearchSpace):
                mapping[key] = {name: domain.to_mapping() for name, domain in value.items()}
            else:
                mapping[key] = dict(value) if isinstance(value, Mapping) else value
        return mapping


KEYS = tuple(each.name for each in dataclasses.fields(StudySpec) if each.name != "folder")
"""The top-level keys of a spec, in the order of the contract."""

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
    draft = _Draft(file=str(path))
    draft.read(_file_text(path))
    draft.override(overrides)
    if name is not None:
        draft.raw["name"] = name
        draft.options["name"] = "--name"
    return _build(draft, Path(path).resolve().parent, here, also)


def parse_spec(mapping: Mapping[str, Any], base_dir: str | Path = ".", *, here: bool = True) -> StudySpec:
    """Checks a spec given as a Python object; `base_dir` stands for the spec file's folder. Raises one SpecError.

    `here=False` for a spec that was checked before, such as a record's: its folders may be gone by now.
    """
    if not isinstance(mapping, Mapping):
        raise SpecError(Problem("spec", "a spec is a mapping", _show(mapping), f"the keys {', '.join(KEYS)}"))
    return _build(_Draft(raw=dict(mapping)), Path(base_dir).resolve(), here)


def dump_yaml(spec: StudySpec) -> str:
    """A spec as YAML that loads to an equal spec."""
    return yaml.dump(spec.to_mapping(), Dumper=_SpecDumper, sort_keys=False, allow_unicode=True)


def spec_for_trial(spec: StudySpec, params: Mapping[str, Value], name: str | None = None) -> StudySpec:
    """A spec whose only trial is one that was: the same parameters, and no scheduler that could end it early.

    The values stand both in `training` (to be read by people) and as domains of one value (so that the trial's `params`
    have the names they had).
    """
    overrides = {key.removeprefix(MODEL_PREFIX): v for key, v in params.items() if key.startswith(MODEL_PREFIX)}
    fields = {key: value for key, value in params.items() if not (spec.is_finetune and key.startswith(MODEL_PREFIX))}
    values = spec.training_values | fields
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
    )


def name_problem(name: object, place: str = "name") -> Problem | None:
    """What is wrong with a study's name; None when it is one."""
    if isinstance(name, str) and _NAME.fullmatch(name):
        return None
    slug = re.sub(r"[^a-z0-9._-]+", "-", str(name or "").lower()).lstrip("._-")[:63] or "mrpc-gpt2"
    rule = "a study's name has 1 to 63 of the characters a-z 0-9 . _ - and begins with a letter or a digit"
    return Problem(place, rule, _show(name), f'"{slug}"')


# ---- a spec being read


@dataclass
class _Draft:
    """What the user wrote, what is wrong with it so far, and which keys no further check may rely on."""

    file: str | None = None
    raw: dict[Any, Any] = field(default_factory=dict)
    lines: dict[str, int] = field(default_factory=dict)
    """Line of each dotted key in the file."""
    options: dict[str, str] = field(default_factory=dict)
    """Dotted keys that a command line option set, and that option."""
    problems: list[Problem] = field(default_factory=list)
    broken: set[str] = field(default_factory=set)

    def fault(self, key: str, rule: str, found: object, expected: str) -> None:
        self.problems.append(Problem(self.place(key), rule, _show(found), expected))
        self.broken.add(key)

    def unknown(self, key: str, name: object, allowed: Iterable[str], where: str) -> None:
        self.problems.append(Problem(self.place(key), f"{where} has no such key", _show(name), _nearest(name, allowed)))

    def sound(self, *keys: str) -> bool:
        """Whether none of these keys, nor a section around them, is broken."""
        return not any(key == broken or key.startswith(f"{broken}.") for key in keys for broken in self.broken)

    def place(self, key: str) -> str:
        """`study.yaml:12 training.batch_size`. A key that the file lacks has the line of its section."""
        around = key
        while around:
            if around in self.options:
                return f"{self.options[around]} {key}"
            if around in self.lines:
                return f"{self.file}:{self.lines[around]} {key}"
            around = around[: max(around.rfind("."), around.rfind("["), 0)]
        return f"{self.file} {key}" if self.file else key

    def read(self, text: str) -> None:
        """Fills in what a spec file says. Raises SpecError when that is no YAML mapping at all."""
        try:
            document = _read_yaml(text, self)
        except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date such as 2026-13-01
            mark = getattr(error, "problem_mark", None)
            place = f"{self.file}:{mark.line + 1}" if mark else str(self.file)
            found = str(getattr(error, "problem", None) or error)
            raise SpecError(Problem(place, "a spec is valid YAML", found, "a mapping of keys to values")) from error
        if not isinstance(document, dict):
            expected = f"the keys {', '.join(KEYS)}"
            raise SpecError(Problem(str(self.file), "a spec is a mapping", _show(document), expected))
        self.raw = document

    def override(self, overrides: Iterable[str]) -> None:
        """Puts in what `--set a.b=c` says."""
        for text in overrides:
            key, equals, written = text.partition("=")
            if not (key and equals):
                self.problems.append(Problem("--set", "--set takes key=value", text, "training.batch_size=64"))
                continue
            try:
                value = _read_yaml(written)
            except (yaml.YAMLError, ValueError, RecursionError):
                rule = "a value of --set is read as YAML"
                self.problems.append(Problem(f"--set {key}", rule, written, f"{key}='...', quoted for the shell"))
                continue
            path, value = _override_path(self.raw, key, value)
            if not _put(self.raw, path, value):
                rule = "--set sets keys of mappings"
                self.problems.append(Problem(f"--set {key}", rule, text, f"a mapping at {'.'.join(path[:-1])}"))
            self.options[key] = "--set"


def _override_path(raw: Mapping[Any, Any], key: str, value: Any) -> tuple[list[str], Any]:
    """Splits a dotted key. The longest name wins that its mapping has; under `search_space` all of it is one name.

    `search_space.model.config.n_layer.choice=[2, 4]` may also end with a kind of domain, and then is the whole domain.
    """
    section, _, rest = key.partition(".")
    if section == "search_space" and rest:
        name, _, kind = rest.rpartition(".")
        return (["search_space", name], {kind: value}) if name and kind in EXAMPLES else (["search_space", rest], value)
    path, parts, target = list[str](), key.split("."), raw
    while parts:
        lengths = (length for length in range(len(parts), 0, -1) if ".".join(parts[:length]) in target)
        length = next(lengths, 1)
        name, parts = ".".join(parts[:length]), parts[length:]
        path.append(name)
        inner = target.get(name)
        target = inner if isinstance(inner, Mapping) else {}
    return path, value


def _put(raw: dict[Any, Any], path: Sequence[str], value: Any) -> bool:
    """Sets one key, making the mappings around it; False when something else is in the way."""
    target = raw
    for name in path[:-1]:
        inner = target.get(name)
        if inner is not None and not isinstance(inner, dict):
            return False
        # A copy, for a YAML anchor may have put the same mapping elsewhere too.
        target[name] = dict(inner or {})
        target = target[name]
    target[path[-1]] = value
    return True


# ---- the sections, each on its own


def _build(
    draft: _Draft, folder: Path, here: bool, also: Callable[[StudySpec], Iterable[Problem]] | None = None
) -> StudySpec:
    """The spec, or SpecError with every fault of the draft."""
    spec = _read(draft, folder, here)
    for check in _CHECKS:
        check(spec, draft)
    for problem in also(spec) if also else ():
        if not any(_related(problem.place, broken) for broken in draft.broken):
            draft.problems.append(dataclasses.replace(problem, place=draft.place(problem.place)))
    if draft.problems:
        raise SpecError(draft.problems)
    return spec


def _related(key: str, other: str) -> bool:
    """Whether one of two dotted keys is the other or lies in it."""
    return f"{key}.".startswith(f"{other}.") or f"{other}.".startswith(f"{key}.")


def _read(draft: _Draft, folder: Path, here: bool) -> StudySpec:
    """Every section with what is valid in it. Defaults stand in for what is broken, so that all checks can run."""
    for key in draft.raw:
        if key not in KEYS:
            draft.unknown(str(key), key, KEYS, "a spec")
    if draft.raw.get("record") is not None:
        draft.fault("record", "a study's record is a file in its storage", draft.raw["record"], "null")
    trainable = draft.raw.get("trainable") or FINETUNE
    if trainable != FINETUNE and not (isinstance(trainable, str) and _FUNCTION.fullmatch(trainable)):
        rule = "a trainable is `finetune` or a function of the user's own"
        draft.fault("trainable", rule, trainable, "finetune, or package.module:function")
        trainable = FINETUNE
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
        trainable=trainable,
        folder=folder,
        **sections,
    )


S = TypeVar("S", bound=Settings)


def _section(draft: _Draft, key: str, kind: type[S], **stand_in: Any) -> S:
    """One section. What is wrong in it is noted and replaced by its default, or by `stand_in` where it has none."""
    values = _mapping(draft, key, kind.model_fields)
    if isinstance(values.get("text"), list):
        values["text"] = tuple(values["text"])  # strict validation takes no list for a tuple, and YAML has only lists
    errors = _errors(kind, values) if draft.sound(key) else []
    for error in errors:
        name = str(error["loc"][0])
        if error["type"] == "extra_forbidden":
            draft.unknown(f"{key}.{name}", name, kind.model_fields, f"`{key}`")
        else:
            draft.fault(key + _dotted(error["loc"]), *_explain(kind, name, error))
            draft.broken.add(f"{key}.{name}")
    refused = {error["loc"][0] for error in errors}
    return kind.model_validate(
        stand_in | {name: value for name, value in values.items() if name not in refused}, strict=True
    )


def _mapping(draft: _Draft, key: str, names: Iterable[str]) -> dict[Any, Any]:
    """A section as written; empty when it is absent or null, or is no mapping, which is a fault."""
    raw = draft.raw.get(key)
    if isinstance(raw, Settings):
        return raw.model_dump(exclude_unset=True)
    if raw is not None and not isinstance(raw, Mapping):
        draft.fault(key, f"`{key}` is a mapping", raw, f"the keys {', '.join(names)}")
        return {}
    return dict(raw or {})


def _errors(kind: type[Settings], values: Mapping[Any, Any]) -> list[ErrorDetails]:
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


def _explain(kind: type[Settings], name: str, error: ErrorDetails) -> tuple[str, object, str]:
    """Rule, found and expected for what pydantic says of one field."""
    wanted = _WANTED.get(error["type"], error["msg"]).format_map(error.get("ctx", {}))
    default = kind.model_fields[name].get_default() if name in kind.model_fields else None
    example = f", such as {_show(default)}" if isinstance(default, int | float) else ""
    if error["type"] == "missing":
        return f"`{name}` is needed", "nothing", wanted
    return f"`{name}` is {wanted}", error["input"], wanted + example


def _read_name(draft: _Draft) -> str:
    name = draft.raw.get("name")
    problem = name_problem(name, draft.place("name"))
    if problem is None:
        return str(name)
    draft.problems.append(problem)
    return "unnamed"


def _read_model(draft: _Draft, folder: Path, here: bool) -> ModelConfig | None:
    if draft.raw.get("model") is None:
        return None
    model = _section(draft, "model", ModelConfig, name="unnamed")
    _require_plain(draft, "model.config", model.config)
    found = _existing_folder(model.name, folder)
    if found is None and here and model.name.startswith(("/", "./", "../", "~")):
        draft.fault("model.name", "a local model is a folder that exists", model.name, "a folder, or a name of the hub")
    return model.model_copy(update={"name": str(found)}) if found else model


def _read_data(draft: _Draft, folder: Path, here: bool) -> DataConfig | None:
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


def _existing_folder(written: str, folder: Path) -> Path | None:
    """Where a written path leads: from the spec's folder, or else from the working directory."""
    try:
        candidates = (base / Path(written).expanduser() for base in (folder, Path.cwd()))
        return next((candidate.resolve() for candidate in candidates if candidate.is_dir()), None)
    except (OSError, RuntimeError, ValueError):  # too long, no such home, a null character: not a folder
        return None


def _own_training(draft: _Draft) -> dict[str, Any]:
    """`training` for a trainable of the user's own: anything, beside the two keys that the service itself reads."""
    values = _mapping(draft, "training", ("max_epochs", "seed"))
    _require_plain(draft, "training", values)
    ours = {name: values.pop(name) for name in ("max_epochs", "seed") if name in values}
    for error in _errors(TrainingConfig, ours):
        name = str(error["loc"][0])
        draft.fault(f"training.{name}", *_explain(TrainingConfig, name, error))
        del ours[name]
    return {"max_epochs": 9, "seed": 42} | ours | values


def _require_plain(draft: _Draft, key: str, value: object) -> None:
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


def _read_search_space(draft: _Draft, is_finetune: bool) -> str | SearchSpace:
    raw = draft.raw.get("search_space")
    example = f"a mapping such as {{learning_rate: {EXAMPLES['log_uniform']}}}"
    if isinstance(raw, str) and is_finetune:
        if raw in RECIPES:
            return raw
        draft.fault("search_space", "there is no such recipe", raw, f"{_nearest(raw, RECIPES)}; or {example}")
    elif isinstance(raw, Mapping):
        return SearchSpace(_read_domains(draft, raw, is_finetune))
    elif is_finetune:
        expected = f"one of {', '.join(RECIPES)}; or {example}"
        draft.fault("search_space", "`search_space` is the name of a recipe or a mapping", raw, expected)
    else:
        draft.fault("search_space", "a trainable of the user's own has its own search space", raw, example)
    return SearchSpace({})


def _read_domains(draft: _Draft, raw: Mapping[Any, Any], is_finetune: bool) -> dict[str, Domain]:
    domains: dict[str, Domain] = {}
    for name, written in raw.items():
        key = f"search_space.{name}"
        if not isinstance(name, str) or not name:
            draft.fault(key, "a parameter's name is a string", name, f'"{name}"')
        elif is_finetune and name in SAME_FOR_ALL_TRIALS:
            rule = f"{', '.join(SAME_FOR_ALL_TRIALS)} are the same for all trials"
            draft.fault(key, rule, written, f"a fixed value: training.{name}")
        elif is_finetune and name not in TUNABLE_FIELDS and not re.match(r"model\.config\..", name):
            rule = f"a search space names fields of `training`, or {MODEL_PREFIX}X"
            draft.fault(key, rule, name, f"{_nearest(name, TUNABLE_FIELDS)}; or {MODEL_PREFIX}{name}")
        try:
            domains[str(name)] = written if isinstance(written, Domain) else parse_domain(written)
        except ValueError as error:
            kind = next(iter(written), "") if isinstance(written, Mapping) else ""
            examples = [EXAMPLES[kind]] if kind in EXAMPLES else EXAMPLES.values()
            draft.fault(key, str(error).partition(", but got ")[0], written, " or ".join(examples))
    return domains


# ---- what sections must be together


def _check_needed(spec: StudySpec, draft: _Draft) -> None:
    if not spec.is_finetune:
        return
    if spec.model is None:
        draft.fault("model", "`finetune` needs a model", None, "{name: gpt2}")
    if spec.data is None:
        draft.fault("data", "`finetune` needs data", None, "{task: mrpc}, or {path: FOLDER, text: [COLUMN]}")


def _check_data(spec: StudySpec, draft: _Draft) -> None:
    data = spec.data
    if data is None or not draft.sound("data.task", "data.path", "data.text"):
        return
    if data.task is None and data.path is None:
        draft.fault("data", "data needs a task or a path", None, "{task: mrpc}, or {path: FOLDER, text: [COLUMN]}")
    elif data.task is None and data.text is None:
        draft.fault("data.text", "data without a task needs the names of its text columns", None, "[sentence]")
    elif data.task is not None and data.text is not None:
        expected = f"no `text`: the task {data.task} has its own columns"
        draft.fault("data.text", "text columns are only for a path without a task", list(data.text), expected)
    if data.text and data.label in data.text and draft.sound("data.label"):
        draft.fault("data.label", "the label is not one of the texts", data.label, "another column than data.text")


def _check_values(spec: StudySpec, draft: _Draft) -> None:
    """Whether the training fields take every value that the search space can give."""
    if not spec.is_finetune:
        return
    for name, domain in spec.domains.items():
        if name not in TUNABLE_FIELDS:
            continue
        refused = [(value, errors[0]) for value in _ends(domain) if (errors := _errors(TrainingConfig, {name: value}))]
        if refused:
            rule, _, expected = _explain(TrainingConfig, name, refused[0][1])
            draft.fault(f"search_space.{name}", rule, [value for value, _ in refused], expected)


def _check_batch_size(spec: StudySpec, draft: _Draft) -> None:
    names = ("batch_size", "micro_batch_size")
    keys = [f"{section}.{name}" for section in ("training", "search_space") for name in names]
    if not spec.is_finetune or not draft.sound("resources.workers", *keys):
        return
    workers = spec.resources.workers
    batch_key, batch_sizes = _possible(spec, "batch_size")
    micro_key, micro_sizes = _possible(spec, "micro_batch_size")
    uneven = [size for size in batch_sizes if size % workers]
    if uneven:
        rule = f"the batch size is over all ranks and divides by resources.workers ({workers})"
        draft.fault(batch_key, rule, uneven, f"a multiple of {workers}, such as {_multiple(uneven[0], workers)}")
        return
    for batch, micro in itertools.product(batch_sizes, micro_sizes):
        rank_batch = batch // workers
        if rank_batch % micro:
            rule = f"a rank's share of the batch ({batch} rows over {workers} workers: {rank_batch}) divides by it"
            divisors = [size for size in range(1, min(rank_batch, micro) + 1) if rank_batch % size == 0]
            draft.fault(micro_key, rule, micro, f"{divisors[-1]}, or null for no accumulation")
            return


def _check_resources(spec: StudySpec, draft: _Draft) -> None:
    resources = spec.resources
    gpus = resources.gpus_per_worker
    if not draft.sound("resources.gpus_per_worker", "resources.workers") or gpus.is_integer():
        return
    if gpus > 1:
        rule = "a worker has whole GPUs, or a fraction of one"
        draft.fault("resources.gpus_per_worker", rule, gpus, f"{int(gpus)}, or a fraction such as 0.5")
    elif resources.workers > 1:
        rule = "only a trial of one worker shares a GPU: two ranks on one GPU cannot form a group"
        draft.fault("resources.gpus_per_worker", rule, f"{gpus} with workers: {resources.workers}", "1, or workers: 1")


def _check_sampler(spec: StudySpec, draft: _Draft) -> None:
    if spec.sampler.name != "grid" or not draft.sound("sampler.name", "search_space"):
        return
    for name, domain in spec.domains.items():
        if domain.grid() is None:
            expected = f"{EXAMPLES['choice']} or {EXAMPLES['int_uniform']}; or sampler: {{name: tpe}}"
            draft.fault(f"search_space.{name}", "sampler grid needs finite domains", domain.to_mapping(), expected)


def _check_scheduler(spec: StudySpec, draft: _Draft) -> None:
    grace_period, max_epochs = spec.scheduler.grace_period, spec.max_epochs
    if spec.scheduler.name == "none" or not draft.sound("scheduler.grace_period", "training.max_epochs"):
        return
    if grace_period > max_epochs:
        rule = f"the grace period ends within training.max_epochs ({max_epochs})"
        draft.fault("scheduler.grace_period", rule, grace_period, f"1 to {max_epochs}, or {{name: none}}")


def _check_objective(spec: StudySpec, draft: _Draft) -> None:
    if not spec.is_finetune or spec.data is None or not draft.sound("objective.metric", "data.task"):
        return
    names = metric_names(spec.data.task)
    if spec.objective.metric not in names:
        rule = f"`finetune` reports this metric for {spec.data.task or 'data without a task'}"
        draft.fault("objective.metric", rule, spec.objective.metric, _nearest(spec.objective.metric, names))


def _check_budget(spec: StudySpec, draft: _Draft) -> None:
    if draft.raw.get("search_space") or not draft.sound("budget.trials", "search_space"):
        return
    if spec.budget.trials != 1:
        draft.fault("budget.trials", "an empty search space has one trial", spec.budget.trials, "1")


_CHECKS: Sequence[Callable[[StudySpec, _Draft], None]] = (
    _check_needed,
    _check_data,
    _check_values,
    _check_batch_size,
    _check_resources,
    _check_sampler,
    _check_scheduler,
    _check_objective,
    _check_budget,
)


def _ends(domain: Domain) -> Sequence[Value]:
    """Values that stand for all of a domain: rules of divisibility or of range that hold for these hold for all."""
    if isinstance(domain, Choice):
        return domain.values
    if isinstance(domain, IntUniform):
        return sorted({domain.low, domain.low + 1, domain.high})
    return domain.low, domain.high


def _possible(spec: StudySpec, name: str) -> tuple[str, list[int]]:
    """Where a whole-number field gets its value, and the values that it can have (null left out)."""
    if name in spec.domains:
        values = [value for value in _ends(spec.domains[name]) if isinstance(value, int) and value > 0]
        return f"search_space.{name}", values
    value = spec.training_values[name]
    return f"training.{name}", [] if value is None else [value]


# ---- words


def _show(value: object) -> str:
    """A value as the user would write it, cut to a line."""
    if isinstance(value, Settings | Domain):
        value = value.model_dump() if isinstance(value, Settings) else value.to_mapping()
    try:
        text = value if isinstance(value, str) and " " in value else json.dumps(value, default=str, ensure_ascii=False)
    except (TypeError, ValueError):  # keys that JSON has not, a list that holds itself
        text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


def _nearest(name: object, allowed: Iterable[str]) -> str:
    """`batch_size (of a, b, c)` for bacth_size; all names where none is near."""
    names = list(allowed)
    near = difflib.get_close_matches(str(name), names, n=1)
    return f"{near[0]} (of {', '.join(names)})" if near else f"one of {', '.join(names)}"


def _dotted(path: Iterable[str | int]) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)


def _multiple(size: int, workers: int) -> int:
    return max(1, round(size / workers)) * workers


# ---- YAML


class _SpecLoader(yaml.SafeLoader):
    """YAML that reads `1e-5` as the number it is (YAML 1.1 wants a dot and a sign)."""


class _SpecDumper(yaml.SafeDumper):
    """Quotes the strings that `_SpecLoader` would read as numbers, and writes no aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _class in (_SpecLoader, _SpecDumper):
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)[eE][-+]?[0-9]+$"),
        list("-+.0123456789"),
    )


def _file_text(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        found = error.strerror or str(error)
        raise SpecError(Problem(str(path), "a spec is a file that can be read", found, "a YAML file")) from error
    except UnicodeDecodeError as error:
        raise SpecError(Problem(str(path), "a spec is text in UTF-8", str(error), "a YAML file")) from error


def _read_yaml(text: str, draft: _Draft | None = None) -> Any:
    """The one document of a text; the lines of its keys, and keys written twice, go to the draft."""
    loader = _SpecLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _note_keys(node, "", draft or _Draft(), set(), ())
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _note_keys(node: yaml.Node, key: str, draft: _Draft, seen: set[int], around: tuple[int, ...]) -> None:
    """Walks a document before it becomes plain values, which know neither lines nor repeated keys."""
    if id(node) in around:
        raise yaml.MarkedYAMLError(problem="an alias that holds itself", problem_mark=node.start_mark)
    if id(node) in seen:
        return  # an alias: its lines are where its anchor is
    seen.add(id(node))
    around = (*around, id(node))
    if isinstance(node, yaml.SequenceNode):
        for place, item in enumerate(node.value):
            draft.lines[f"{key}[{place}]"] = item.start_mark.line + 1
            _note_keys(item, f"{key}[{place}]", draft, seen, around)
    elif isinstance(node, yaml.MappingNode):
        names: set[str] = set()
        for name, value in node.value:
            inner = f"{key}.{name.value}" if key else str(name.value)
            draft.lines[inner] = name.start_mark.line + 1
            if name.value in names and not name.tag.endswith(":merge"):
                draft.fault(inner, "a key stands once in its mapping", f"{name.value} twice", "one of the two")
            names.add(str(name.value))
            _note_keys(value, inner, draft, seen, around)
