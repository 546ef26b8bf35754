"""What the sections of a spec must be together. A check passes over what is broken by itself."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

from search_spaces import Choice, Domain, IntUniform, Value
from search_spaces.domains import EXAMPLES
from trainables.config import TrainingConfig
from trainables.glue import metric_names
from tune_service.spec_draft import Draft, nearest
from tune_service.spec_reading import explain, refusals
from tune_service.spec_sections import TUNABLE_FIELDS, StudySpec

_DATA_EXAMPLE = "{task: mrpc}, or {path: FOLDER, text: [COLUMN]}"


def _check_needed(spec: StudySpec, draft: Draft) -> None:
    if not spec.is_finetune:
        return
    if spec.model is None:
        draft.fault("model", "`finetune` needs a model", None, "{name: gpt2}")
    if spec.data is None:
        draft.fault("data", "`finetune` needs data", None, _DATA_EXAMPLE)


def _check_data(spec: StudySpec, draft: Draft) -> None:
    data = spec.data
    if data is None or not draft.sound("data.task", "data.path", "data.text"):
        return
    if data.task is None and data.path is None:
        draft.fault("data", "data needs a task or a path", None, _DATA_EXAMPLE)
    elif data.task is None and data.text is None:
        draft.fault("data.text", "data without a task needs the names of its text columns", None, "[sentence]")
    elif data.task is not None and data.text is not None:
        expected = f"no `text`: the task {data.task} has its own columns"
        draft.fault("data.text", "text columns are only for a path without a task", list(data.text), expected)
    if data.text and data.label in data.text and draft.sound("data.label"):
        draft.fault("data.label", "the label is not one of the texts", data.label, "another column than data.text")


def _check_values(spec: StudySpec, draft: Draft) -> None:
    """Whether the training fields take every value that the search space can give."""
    if not spec.is_finetune:
        return
    for name, domain in spec.domains.items():
        if name not in TUNABLE_FIELDS:
            continue
        refused = [(value, errors[0]) for value in ends(domain) if (errors := refusals(TrainingConfig, {name: value}))]
        if refused:
            rule, _, expected = explain(TrainingConfig, name, refused[0][1])
            found = [value for value, _ in refused] if isinstance(domain, Choice) else domain.to_mapping()
            draft.fault(f"search_space.{name}", rule, found, expected)


def _check_batch_size(spec: StudySpec, draft: Draft) -> None:
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
        near = max(1, round(uneven[0] / workers)) * workers
        draft.fault(batch_key, rule, uneven, f"a multiple of {workers}, such as {near}")
        return
    for batch, micro in itertools.product(batch_sizes, micro_sizes):
        rank_batch = batch // workers
        if rank_batch % micro:
            rule = f"a rank's share of the batch ({batch} rows over {workers} workers: {rank_batch}) divides by it"
            divisors = [size for size in range(1, min(rank_batch, micro) + 1) if rank_batch % size == 0]
            draft.fault(micro_key, rule, micro, f"{divisors[-1]}, or null for no accumulation")
            return


def _check_resources(spec: StudySpec, draft: Draft) -> None:
    resources = spec.resources
    share = resources.gpu_share
    if not draft.sound("resources.gpus_per_worker", "resources.workers") or share.is_integer():
        return
    if share > 1:
        rule = "a worker has whole GPUs, or a fraction of one"
        draft.fault("resources.gpus_per_worker", rule, share, f"{int(share)}, or a fraction such as 0.5")
    elif resources.workers > 1:
        rule = "only a trial of one worker shares a GPU: two ranks on one GPU cannot form a group"
        found = f"{resources.gpus_per_worker} with workers: {resources.workers}"
        draft.fault("resources.gpus_per_worker", rule, found, "1, or workers: 1")


def _check_sampler(spec: StudySpec, draft: Draft) -> None:
    if spec.sampler.name != "grid" or not draft.sound("sampler.name", "search_space"):
        return
    for name, domain in spec.domains.items():
        if domain.grid() is None:
            expected = f"{EXAMPLES['choice']} or {EXAMPLES['int_uniform']}; or sampler: {{name: tpe}}"
            draft.fault(f"search_space.{name}", "sampler grid needs finite domains", domain.to_mapping(), expected)


def _check_scheduler(spec: StudySpec, draft: Draft) -> None:
    grace_period, max_epochs = spec.scheduler.grace_period, spec.max_epochs
    if spec.scheduler.name == "none" or not draft.sound("scheduler.grace_period", "training.max_epochs"):
        return
    if grace_period > max_epochs:
        rule = f"the grace period ends within training.max_epochs ({max_epochs})"
        draft.fault("scheduler.grace_period", rule, grace_period, f"1 to {max_epochs}, or {{name: none}}")


def _check_objective(spec: StudySpec, draft: Draft) -> None:
    if not spec.is_finetune or spec.data is None or not draft.sound("objective.metric", "data.task"):
        return
    names = metric_names(spec.data.task)
    if spec.objective.metric not in names:
        rule = f"`finetune` reports this metric for {spec.data.task or 'data without a task'}"
        draft.fault("objective.metric", rule, spec.objective.metric, nearest(spec.objective.metric, names))


def _check_budget(spec: StudySpec, draft: Draft) -> None:
    if draft.raw.get("search_space") or not draft.sound("budget.trials", "search_space"):
        return
    if spec.budget.trials != 1:
        draft.fault("budget.trials", "an empty search space has one trial", spec.budget.trials, "1")


CHECKS: Sequence[Callable[[StudySpec, Draft], None]] = (
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


def ends(domain: Domain) -> Sequence[Value]:
    """Values that stand for all of a domain: rules of divisibility or of range that hold for these hold for all."""
    if isinstance(domain, Choice):
        return domain.values
    if isinstance(domain, IntUniform):
        return sorted({domain.low, domain.low + 1, domain.high})
    return domain.low, domain.high


def _possible(spec: StudySpec, name: str) -> tuple[str, list[int]]:
    """Where a whole-number field gets its value, and the values that it can have (null left out)."""
    if name in spec.domains:
        values = [value for value in ends(spec.domains[name]) if isinstance(value, int) and value > 0]
        return f"search_space.{name}", values
    value = spec.training_values[name]
    return f"training.{name}", [] if value is None else [value]
