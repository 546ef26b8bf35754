"""Whether a spec's changes of a model's config make models, at the ends of the search space too."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from trainables.config import ModelConfig
from trainables.errors import Problem, UserError
from tune_service.spec_checks import ends
from tune_service.spec_sections import MODEL_PREFIX, StudySpec

TIMEOUT_S = 120


def changed_models(spec: StudySpec) -> list[ModelConfig]:
    """Models that stand for all that the trials have; empty where the config stays as it is."""
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
    return [settings.with_params(largest | change).model for change in changes or [{}]]


def built(models: list[ModelConfig]) -> str:
    """Builds each, without its weights, in a process of its own. UserError with what is wrong."""
    command = [sys.executable, "-P", "-m", "trainables.model_check"]
    sections = json.dumps([model.model_dump() for model in models])
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    try:
        run = subprocess.run(
            command, input=sections, capture_output=True, text=True, timeout=TIMEOUT_S, env=environment, check=True
        )
    except subprocess.SubprocessError as error:
        words = str(getattr(error, "stderr", "") or error).strip().splitlines()
        found, expected = words[-1] if words else str(error), "torch and Transformers that can be imported"
        raise UserError(Problem("model.config", "can be looked at", found, expected)) from error
    problems = [Problem(**each) for each in json.loads(run.stdout.splitlines()[-1])]
    if problems:
        raise UserError(list(dict.fromkeys(problems)))
    return f"{len(models)} built" if len(models) > 1 else "built"
