"""Whether a spec's changes of a model's config make models: for each key, at the ends of its domain too."""

from __future__ import annotations

import json

from trainables.config import ModelConfig
from trainables.errors import Problem, UserError
from trainables.model_files import ANSWER
from tune_service.check import in_a_process
from tune_service.spec_checks import ends
from tune_service.spec_sections import MODEL_PREFIX, StudySpec


def changed_models(spec: StudySpec) -> list[tuple[ModelConfig, int]]:
    """Models that stand for all that the trials have, with the largest `max_length`; empty where the config stays."""
    if not spec.is_finetune or spec.model is None:
        return []
    largest, settings = spec.largest_params(), spec.trial_settings()
    changes = [
        {name: value}
        for name, domain in spec.domains.items()
        if name.startswith(MODEL_PREFIX)
        for value in ends(domain)
    ]
    if not changes and not spec.model.config:
        return []
    found = [settings.with_params(largest | change) for change in changes or [{}]]
    return [(each.model, each.training.max_length) for each in found]


def built(models: list[tuple[ModelConfig, int]]) -> str:
    """Builds each, without its weights, in a process of its own. UserError with what is wrong."""
    sections = json.dumps([(model.model_dump(), max_length) for model, max_length in models])
    out, why = in_a_process(["-m", "trainables.model_check"], sections)
    answer = next((line.removeprefix(ANSWER) for line in out.splitlines() if line.startswith(ANSWER)), None)
    if answer is None:
        expected = "torch and Transformers that can be imported, a hub that answers"
        raise UserError(Problem("model.config", "can be looked at", why or "no answer", expected))
    problems = [Problem(**each) for each in json.loads(answer)]
    if problems:
        raise UserError(list(dict.fromkeys(problems)))
    return f"{len(models)} built" if len(models) > 1 else "built"
