"""Whether a spec's changes of a model's config make models: for each key, at the ends of its domain too."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from trainables.config import ModelConfig
from trainables.errors import Problem, UserError
from trainables.model_files import ANSWER
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
    sections = json.dumps([model.model_dump() for model in models]).encode()
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    try:
        run = subprocess.run(
            command, input=sections, capture_output=True, timeout=TIMEOUT_S, env=environment, check=False
        )
    except subprocess.TimeoutExpired as error:
        found, expected = f"it took more than {TIMEOUT_S} s", "a model that is here, or a hub that answers"
        raise UserError(Problem("model.config", "can be looked at", found, expected)) from error
    lines = run.stdout.decode(errors="replace").splitlines()
    answer = next((line.removeprefix(ANSWER) for line in lines if line.startswith(ANSWER)), None)
    if answer is None:
        words = run.stderr.decode(errors="replace").strip().splitlines()
        found, expected = words[-1] if words else f"exit code {run.returncode}", "torch and Transformers that work"
        raise UserError(Problem("model.config", "can be looked at", found, expected))
    problems = [Problem(**each) for each in json.loads(answer)]
    if problems:
        raise UserError(list(dict.fromkeys(problems)))
    return f"{len(models)} built" if len(models) > 1 else "built"
