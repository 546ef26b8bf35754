"""What a spec can say: its sections, what each key means, and what stands where the user wrote nothing.

A StudySpec is checked: `load_spec` and `parse_spec` of `tune_service.spec` make it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from pydantic_core import PydanticCustomError

from search_spaces import RECIPES, Choice, Domain, IntUniform, SearchSpace, Value
from trainables.config import DataConfig, FinetuneConfig, ModelConfig, Settings, TrainingConfig

FINETUNE = "finetune"
MODEL_PREFIX = "model.config."
SAME_FOR_ALL_TRIALS = ("max_epochs", "seed", "precision", "compile")
MOST_SHARING = 8
"""The most trials that `gpus_per_worker: auto` puts on one GPU."""
TUNABLE_FIELDS = tuple(name for name in TrainingConfig.model_fields if name not in SAME_FOR_ALL_TRIALS)


class Objective(Settings):
    metric: Annotated[str, Field(min_length=1)] = "eval_accuracy"
    """What trials are compared by. Without one: stsb eval_pearson, cola eval_matthews, others eval_accuracy."""
    mode: Literal["max", "min"] = "max"
    """Which way is better. Without one: min for a metric that ends with `loss`, else max."""


class SamplerSpec(Settings):
    name: Literal["tpe", "random", "grid"] = "tpe"
    """How the next parameters are chosen. grid needs finite domains."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """The same seed suggests the same parameters, where results are the same and come in the same order."""


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


def _number_or_auto(value: object) -> object:
    """One fault for both kinds; of a union pydantic tells one for each."""
    if value == "auto":
        return value
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf:
        return value
    raise PydanticCustomError("number_or_auto", "a number of 0.0 or more, or auto")


class ResourcesSpec(Settings):
    workers: PositiveInt = 1
    """Ranks of one trial."""
    gpus_per_worker: Annotated[NonNegativeFloat | Literal["auto"], BeforeValidator(_number_or_auto)] = 1.0
    """0: gloo on CPU. A fraction shares a GPU between trials of one worker. auto: they share it too, and the study
    finds out how many by memory and throughput; on this machine alone."""
    cpus_per_worker: PositiveFloat = 1.0
    """CPUs of one rank, and so its threads."""

    @property
    def finds_share(self) -> bool:
        """Whether the study finds out how many trials share a GPU."""
        return self.gpus_per_worker == "auto"

    @property
    def gpu_share(self) -> float:
        """How much of a GPU each worker asks Ray for; with `auto` so little that the study's own bound is narrower."""
        return 1 / MOST_SHARING if self.gpus_per_worker == "auto" else self.gpus_per_worker

    @property
    def ranks_on_a_gpu(self) -> int:
        """How many share one, at most."""
        return max(1, int(1 / self.gpu_share + 1e-9)) if self.gpu_share else 1


class CheckpointSpec(Settings):
    budget_gib: PositiveFloat = 20.0
    """For all checkpoints of the study together, optimizer state included."""

    @property
    def budget_bytes(self) -> int:
        return int(self.budget_gib * 1024**3)


class FaultSpec(Settings):
    restarts_per_trial: NonNegativeInt = 2
    """So often a trial is started again for a fault of its own, before it counts as failed."""
    step_timeout_s: PositiveFloat | None = None
    """Longest wait for one epoch's report, or one checkpoint. null: 5 times the slowest so far, at least 60 s; for the
    first one 15 min, or `start_timeout_s` where that is longer."""
    start_timeout_s: PositiveFloat = 15 * 60.0
    """Longest wait for the processes of a trial, from their start until they have imported what they need."""
    same_error_limit: PositiveInt = 3
    """So many trials that fail alike end the study."""
    on_oom: Literal["fail", "shrink"] = "fail"
    """A trial that runs out of memory fails, or (finetune alone) is tried again with half the micro batch."""


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
    record: str | None = None
    """postgresql://user@host:port/database, without a password; null: a file in the storage."""
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
        own, space, params = self._own_values(), self.domains, dict[str, Value]()
        for name, domain in space.items():
            if name in own and domain.contains(own[name]):
                params[name] = own[name]
            elif name in space.defaults:
                params[name] = space.defaults[name]
            elif self.sampler.name == "grid" and (values := domain.grid()) is not None:
                params[name] = values[0]
        return params

    def remarks(self) -> list[str]:
        """What is allowed and may not be what was meant. Of a spec as its file says it: one that was stored gives the
        defaults too."""
        outside = [
            f"trial 0 does not start at {name} {value}: that lies outside its domain"
            for name, value in self._outside_space().items()
        ]
        points, trials = self.domains.num_points, self.budget.trials
        if self.sampler.name != "grid" or points is None or points <= trials:
            return outside
        return [
            *outside,
            f"of the grid's {points} points the budget takes {trials}: trial 0's, then the first ones in order, "
            "the last parameter fastest (sampler: {name: random} takes them from everywhere)",
        ]

    def _outside_space(self) -> dict[str, Value]:
        """The given values that the first trial cannot have."""
        own, space = self._own_values(), self.domains
        defaults = set[str]()
        if isinstance(self.training, TrainingConfig):
            defaults = self.training_values.keys() - self.training.model_fields_set
        given = [name for name in space if name in own and name not in defaults]
        return {name: own[name] for name in given if not space[name].contains(own[name])}

    def _own_values(self) -> dict[str, Any]:
        """What the spec itself says, by the names that a search space has."""
        config = self.model.config if self.model is not None else {}
        return self.training_values | {MODEL_PREFIX + name: value for name, value in config.items()}

    def largest_params(self) -> dict[str, Value]:
        """Those of the first trial, with the largest batches and lengths of the search space."""
        first, domains = self.first_params(), self.domains
        params = {name: first.get(name, _smallest(domain)) for name, domain in domains.items()}
        for name in ("batch_size", "micro_batch_size", "max_length"):
            if self.is_finetune and name in domains:
                params[name] = _largest(domains[name])
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


def _smallest(domain: Domain) -> Value:
    return domain.values[0] if isinstance(domain, Choice) else domain.low


def _largest(domain: Domain) -> Value:
    """Of a choice that has null, null: no limit."""
    if isinstance(domain, IntUniform):
        return domain.high
    values = domain.grid() or ()
    numbers = [value for value in values if isinstance(value, int | float)]
    return None if None in values else max(numbers)
