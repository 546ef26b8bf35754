"""A spec is read as a whole: every fault at once, each with its place, and what is written reads back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from test_search_spaces import domains

from search_spaces import Choice, Domain, IntUniform, LogUniform, Uniform
from search_spaces.domains import SearchSpace
from trainables.config import TrainingConfig
from trainables.errors import Problem
from trainables.redaction import names_secret
from tune_service.errors import SpecError, error_json, exit_code
from tune_service.spec import (
    TUNABLE_FIELDS,
    Objective,
    StudySpec,
    dump_yaml,
    load_spec,
    parse_spec,
    spec_for_trial,
)

FINETUNE: dict[str, Any] = {
    "name": "mrpc-gpt2",
    "model": {"name": "gpt2"},
    "data": {"task": "mrpc"},
    "search_space": "gpt2",
}
OWN: dict[str, Any] = {
    "name": "toy",
    "trainable": "my_module:train",
    "search_space": {"x": {"uniform": [0, 1]}, "depth": {"choice": [1, 2]}},
}


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`base` with dotted keys changed; a value of ... takes the key out."""
    spec: dict[str, Any] = yaml.safe_load(yaml.safe_dump(base))
    for key, value in changes.items():
        *sections, last = key.split("/")
        target = spec
        for section in sections:
            target = target.setdefault(section, {})
        target.pop(last, None)
        if value is not ...:
            target[last] = value
    return spec


def problems(spec: dict[str, Any]) -> tuple[Problem, ...]:
    with pytest.raises(SpecError) as refusal:
        parse_spec(spec)
    return refusal.value.problems


def write(folder: Path, text: str) -> Path:
    path = folder / "study.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def load_problems(path: Path, *overrides: str, name: str | None = None) -> list[Problem]:
    with pytest.raises(SpecError) as refusal:
        load_spec(path, overrides, name)
    return list(refusal.value.problems)


# ---- defaults


def test_a_spec_of_four_keys_has_the_defaults_of_the_contract() -> None:
    spec = parse_spec(FINETUNE)
    assert spec.to_mapping() == {
        "name": "mrpc-gpt2",
        "model": {"name": "gpt2", "from_scratch": False, "config": {}},
        "data": {"task": "mrpc", "path": None, "text": None, "label": "label"},
        "training": {
            "max_epochs": 9,
            "batch_size": 32,
            "micro_batch_size": None,
            "max_length": 128,
            "learning_rate": 2.4e-5,
            "weight_decay": 0.01,
            "warmup_fraction": 0.1,
            "schedule": "linear",
            "max_grad_norm": 1.0,
            "precision": "bf16",
            "seed": 42,
            "compile": "auto",
        },
        "search_space": "gpt2",
        "objective": {"metric": "eval_accuracy", "mode": "max"},
        "sampler": {"name": "tpe", "seed": 0},
        "scheduler": {"name": "asha", "grace_period": 1, "reduction_factor": 3},
        "budget": {"trials": 64, "concurrent_trials": None},
        "resources": {"workers": 1, "gpus_per_worker": 1, "cpus_per_worker": 1},
        "checkpoints": {"budget_gib": 20},
        "faults": {
            "restarts_per_trial": 2,
            "step_timeout_s": None,
            "start_timeout_s": 900.0,
            "same_error_limit": 3,
            "on_oom": "fail",
        },
        "record": None,
        "trainable": "finetune",
    }


@pytest.mark.parametrize("word", ["on", "off", "auto"])
def test_compile_is_written_without_quotes(tmp_path: Path, word: str) -> None:
    """YAML 1.1 reads a bare `on` as true."""
    file = tmp_path / "spec.yaml"
    file.write_text(yaml.safe_dump(FINETUNE) + f"training: {{compile: {word}}}\n")
    assert load_spec(file).training_values["compile"] == word
    assert load_spec(file, ["training.compile=off"]).training_values["compile"] == "off"


def test_a_section_that_is_empty_or_null_has_its_defaults() -> None:
    assert parse_spec(FINETUNE | {"training": None, "budget": {}}) == parse_spec(FINETUNE)


@pytest.mark.parametrize(
    ("task", "given_keys", "objective"),
    [
        ("stsb", {}, Objective(metric="eval_pearson", mode="max")),
        ("cola", {}, Objective(metric="eval_matthews", mode="max")),
        ("mnli", {}, Objective(metric="eval_accuracy", mode="max")),
        ("mrpc", {"metric": "eval_loss"}, Objective(metric="eval_loss", mode="min")),
        ("mrpc", {"metric": "eval_loss", "mode": "max"}, Objective(metric="eval_loss", mode="max")),
        ("cola", {"mode": "min"}, Objective(metric="eval_matthews", mode="min")),
    ],
)
def test_the_objective_suits_the_task(task: str, given_keys: dict[str, str], objective: Objective) -> None:
    assert parse_spec(FINETUNE | {"data": {"task": task}, "objective": given_keys}).objective == objective


def test_a_trainable_of_the_users_own_needs_neither_model_nor_data() -> None:
    spec = parse_spec(OWN | {"training": {"anything": [1, "two"], "max_epochs": 3}})
    assert spec.training_values == {"max_epochs": 3, "seed": 42, "anything": [1, "two"]}
    assert (spec.max_epochs, spec.seed) == (3, 42)
    assert (spec.model, spec.data) == (None, None)


# ---- faults

WRONG: list[tuple[dict[str, Any], dict[str, Any], str, str, str]] = [
    # base, changes, place, part of found, part of expected
    (FINETUNE, {"name": "Has Spaces"}, "name", "Has Spaces", "has-spaces"),
    (FINETUNE, {"name": 7}, "name", "7", '"7"'),
    (FINETUNE, {"name": "a" * 64}, "name", "aaa", "a" * 63),
    (FINETUNE, {"name": ...}, "name", "null", "mrpc-gpt2"),
    (FINETUNE, {"trainning": {}}, "trainning", "trainning", "training (of"),
    (FINETUNE, {"loggers": []}, "loggers", "loggers", "one of name, model"),
    (FINETUNE, {"training/plugin": "x"}, "training.plugin", "plugin", "one of max_epochs"),
    (FINETUNE, {"training/bacth_size": 8}, "training.bacth_size", "bacth_size", "batch_size (of"),
    (FINETUNE, {"training": 5}, "training", "5", "the keys max_epochs"),
    (FINETUNE, {"training/batch_size": True}, "training.batch_size", "true", "a whole number, such as 32"),
    (FINETUNE, {"training/batch_size": "32"}, "training.batch_size", '"32"', "a whole number"),
    (FINETUNE, {"training/max_epochs": 0}, "training.max_epochs", "0", "greater than 0"),
    (FINETUNE, {"training/max_length": 2}, "training.max_length", "2", "4 or more"),
    (FINETUNE, {"training/learning_rate": float("nan")}, "training.learning_rate", "NaN", "such as 2.4e-05"),
    (FINETUNE, {"training/schedule": "step"}, "training.schedule", "step", "'linear', 'cosine'"),
    (FINETUNE, {"training/seed": 2**32}, "training.seed", "4294967296", "less than 4294967296"),
    (FINETUNE, {"model": ...}, "model", "null", "{name: gpt2}"),
    (FINETUNE, {"model": "gpt2"}, "model", "gpt2", "the keys name"),
    (FINETUNE, {"model/name": ...}, "model.name", "nothing", "a value"),
    (FINETUNE, {"model/name": "./gone"}, "model.name", "./gone", "a folder"),
    (FINETUNE, {"model/config": {"born": {1, 2}}}, "model.config.born", "{1, 2}", '"'),
    (FINETUNE, {"data": ...}, "data", "null", "{task: mrpc}"),
    (FINETUNE, {"data/task": "mprc"}, "data.task", "mprc", "'mrpc'"),
    (FINETUNE, {"data/task": ...}, "data", "null", "path: FOLDER"),
    (FINETUNE, {"data/text": ["a"]}, "data.text", '["a"]', "no `text`"),
    (FINETUNE, {"data": {"path": "."}}, "data.text", "null", "[sentence]"),
    (FINETUNE, {"data": {"path": ".", "text": ["a", "b", "c"]}}, "data.text", "", "a list of 2 or less"),
    (FINETUNE, {"data": {"path": ".", "text": "a"}}, "data.text", "a", "a list of strings"),
    (FINETUNE, {"data": {"path": ".", "text": ["label"]}}, "data.label", "label", "another column"),
    (FINETUNE, {"data/path": "gone"}, "data.path", "gone", "a folder that holds"),
    (FINETUNE, {"search_space": "gtp2"}, "search_space", "gtp2", "gpt2 (of gpt2"),
    (FINETUNE, {"search_space": ...}, "search_space", "null", "one of gpt2"),
    (FINETUNE, {"search_space": [1]}, "search_space", "[1]", "a mapping such as"),
    (FINETUNE, {"search_space": {"seed": {"choice": [1]}}}, "search_space.seed", "choice", "training.seed"),
    (FINETUNE, {"search_space": {"compile": {"choice": ["on"]}}}, "search_space.compile", "choice", "training.compile"),
    (FINETUNE, {"training/compile": "max"}, "training.compile", "max", "'auto'"),
    (FINETUNE, {"search_space": {"n_layer": {"choice": [1]}}}, "search_space.n_layer", "", "model.config.n_layer"),
    (FINETUNE, {"search_space": {"lerning_rate": {"choice": [1.0]}}}, "search_space.lerning_rate", "", "learning_rate"),
    (FINETUNE, {"search_space": {"model.config.": {"choice": [1]}}}, "search_space.model.config.", "", "one of"),
    (FINETUNE, {"search_space": {"weight_decay": 0.1}}, "search_space.weight_decay", "0.1", "{uniform: [0.0, 0.1]}"),
    (
        FINETUNE,
        {"search_space": {"learning_rate": {"log_uniform": [0, 1]}}},
        "search_space.learning_rate",
        '{"log_uniform": [0, 1]}',
        "{log_uniform: [1.0e-5, 2.0e-4]}",
    ),
    (
        FINETUNE,
        {"search_space": {"weight_decay": {"uniform": [-0.5, 1]}}},
        "search_space.weight_decay",
        '{"uniform": [-0.5, 1.0]}',
        "0.0 or more",
    ),
    (
        FINETUNE,
        {"search_space": {"batch_size": {"uniform": [16, 64]}}},
        "search_space.batch_size",
        "[16.0, 64.0]",
        "a whole number",
    ),
    (
        FINETUNE,
        {"search_space": {"schedule": {"choice": ["linear", "cubic"]}}},
        "search_space.schedule",
        '["cubic"]',
        "'cosine'",
    ),
    (FINETUNE, {"search_space": {}}, "budget.trials", "64", "1"),
    (FINETUNE, {"objective/metric": "eval_acc"}, "objective.metric", "eval_acc", "eval_accuracy (of"),
    (FINETUNE, {"objective/metric": "eval_pearson"}, "objective.metric", "eval_pearson", "eval_f1"),
    (FINETUNE, {"objective/mode": "best"}, "objective.mode", "best", "'max' or 'min'"),
    (FINETUNE, {"sampler/name": "gp"}, "sampler.name", "gp", "'grid'"),
    (FINETUNE, {"sampler/name": "cmaes"}, "sampler.name", "cmaes", "'tpe', 'random'"),
    (
        FINETUNE,
        {"sampler/name": "grid", "search_space": {"weight_decay": {"uniform": [0, 1]}, "batch_size": {"choice": [8]}}},
        "search_space.weight_decay",
        "uniform",
        "int_uniform",
    ),
    (FINETUNE, {"scheduler/name": "halving"}, "scheduler.name", "halving", "'asha' or 'none'"),
    (FINETUNE, {"scheduler/grace_period": 10}, "scheduler.grace_period", "10", "1 to 9"),
    (FINETUNE, {"scheduler/reduction_factor": 1}, "scheduler.reduction_factor", "1", "greater than 1"),
    (FINETUNE, {"budget/trials": 0}, "budget.trials", "0", "such as 64"),
    (FINETUNE, {"budget/time_s": 60}, "budget.time_s", "time_s", "one of trials"),
    (FINETUNE, {"resources/workers": "auto"}, "resources.workers", "auto", "a whole number"),
    (FINETUNE, {"resources/gpus_per_worker": 1.5}, "resources.gpus_per_worker", "1.5", "0.5"),
    (FINETUNE, {"resources/gpus_per_worker": -1}, "resources.gpus_per_worker", "-1", "0.0 or more"),
    (FINETUNE, {"resources": {"workers": 2, "gpus_per_worker": 0.5}}, "resources.gpus_per_worker", "0.5", "workers: 1"),
    (
        FINETUNE,
        {"resources": {"workers": 2, "gpus_per_worker": "auto"}},
        "resources.gpus_per_worker",
        "auto with workers: 2",
        "1, or workers: 1",
    ),
    (FINETUNE, {"resources/gpus_per_worker": "all"}, "resources.gpus_per_worker", "all", "0.0 or more, or auto"),
    (FINETUNE, {"resources/gpus_per_worker": True}, "resources.gpus_per_worker", "true", "0.0 or more, or auto"),
    (FINETUNE, {"resources/cpus_per_worker": 0}, "resources.cpus_per_worker", "0", "greater than 0"),
    (FINETUNE, {"checkpoints/budget_gib": 0}, "checkpoints.budget_gib", "0", "greater than 0"),
    (FINETUNE, {"faults/restarts_per_trial": -1}, "faults.restarts_per_trial", "-1", "0 or more"),
    (FINETUNE, {"record": "postgresql://x"}, "record", "postgresql://x", "null"),
    (FINETUNE, {"trainable": "module.function"}, "trainable", "module.function", "package.module:function"),
    (OWN, {"trainable": "my_module.train"}, "trainable", "my_module.train", "package.module:function"),
    (OWN, {"search_space": "gpt2"}, "search_space", "gpt2", "a mapping such as"),
    (OWN, {"search_space": ...}, "search_space", "null", "a mapping such as"),
    (OWN, {"search_space/x": {"uniform": [1, 0]}}, "search_space.x", "[1, 0]", "{uniform:"),
    (OWN, {"training/max_epochs": 0}, "training.max_epochs", "0", "greater than 0"),
    (OWN, {"training/seed": "x"}, "training.seed", "x", "a whole number"),
    (OWN, {"training/classes": {1, 2}}, "training.classes", "{1, 2}", '"'),
    (OWN, {"training/sizes": [1, float("inf")]}, "training.sizes[1]", "Infinity", '"inf"'),
    (OWN, {"scheduler/grace_period": 10}, "scheduler.grace_period", "10", "1 to 9"),
]


@pytest.mark.parametrize(
    ("base", "changes", "place", "found", "expected"),
    [pytest.param(*row, id=f"{row[2]}-{number}") for number, row in enumerate(WRONG)],
)
def test_a_wrong_spec_is_refused_for_that_fault_alone(
    base: dict[str, Any], changes: dict[str, Any], place: str, found: str, expected: str
) -> None:
    (problem,) = problems(merged(base, changes))
    assert problem.place == place
    assert found in problem.found
    assert expected in problem.expected
    assert problem.rule


@pytest.mark.parametrize(
    ("changes", "place", "found", "expected"),
    [
        ({"training/batch_size": 33, "search_space": {}}, "training.batch_size", "[33]", "such as 32"),
        ({"search_space": {"batch_size": {"choice": [16, 17]}}}, "search_space.batch_size", "[17]", "a multiple of 2"),
        ({"search_space": {"batch_size": {"int_uniform": [16, 32]}}}, "search_space.batch_size", "[17]", "such as 16"),
        ({"training/micro_batch_size": 32, "search_space": {}}, "training.micro_batch_size", "32", "16, or null"),
        ({"training/micro_batch_size": 6, "search_space": {}}, "training.micro_batch_size", "6", "4, or null"),
        (
            {"search_space": {"micro_batch_size": {"choice": [None, 8, 12]}}},
            "search_space.micro_batch_size",
            "12",
            "8, or null",
        ),
    ],
)
def test_with_two_workers_every_batch_size_that_a_trial_can_get_divides(
    changes: dict[str, Any], place: str, found: str, expected: str
) -> None:
    (problem,) = problems(merged(FINETUNE, changes | {"resources/workers": 2, "budget/trials": 1}))
    assert (problem.place, problem.found) == (place, found)
    assert expected in problem.expected


def test_a_fixed_batch_size_that_no_trial_can_get_is_not_judged() -> None:
    spec = FINETUNE | {"search_space": {"batch_size": {"choice": [24, 48]}}, "resources": {"workers": 3}}
    assert parse_spec(spec).training_values["batch_size"] == 32


SIX_FAULTS = """\
name: Six Faults
model: {name: gpt2}
data:
  task: mrpc
  text: [sentence1]
training:
  bacth_size: 31
  batch_size: 33
search_space:
  learning_rate: {log_uniform: [2e-4, 1e-5]}
  weight_decay: {uniform: [-1, 1]}
resources:
  workers: 2
objective: {metric: eval_acc}
"""


def test_all_six_faults_of_a_spec_are_told_at_once_each_with_its_line(tmp_path: Path) -> None:
    path = write(tmp_path, SIX_FAULTS.replace("text: [sentence1]", "label: label"))
    assert sorted(problem.place for problem in load_problems(path)) == sorted(
        f"{path}:{line}"
        for line in (
            "1 name",
            "7 training.bacth_size",
            "8 training.batch_size",
            "10 search_space.learning_rate",
            "11 search_space.weight_decay",
            "14 objective.metric",
        )
    )


def test_a_fault_in_a_section_hides_no_fault_that_the_rest_of_the_section_has(tmp_path: Path) -> None:
    path = write(tmp_path, SIX_FAULTS)
    places = [problem.place.partition(" ")[2] for problem in load_problems(path, "training.learning_rate=-1")]
    assert {"data.text", "training.learning_rate", "training.batch_size"} <= set(places)


def test_a_broken_value_brings_no_faults_of_checks_that_rely_on_it() -> None:
    (problem,) = problems(merged(FINETUNE, {"training/batch_size": "x", "resources/workers": 3, "search_space": {}})
                          | {"budget": {"trials": 1}})  # fmt: skip
    assert problem.place == "training.batch_size"


def test_of_the_given_values_those_that_the_first_trial_cannot_have_are_known() -> None:
    space = {
        "learning_rate": {"log_uniform": [1e-5, 1e-4]},
        "weight_decay": {"uniform": [0.5, 0.6]},
        "model.config.n_layer": {"choice": [2, 4]},
    }
    spec = parse_spec(
        FINETUNE
        | {"training": {"learning_rate": 5e-4}, "search_space": space}
        | {"model": {"name": "gpt2", "config": {"n_layer": 3}}}
    )
    assert spec.remarks() == [
        f"trial 0 does not start at {value}: that lies outside its domain"
        for value in ("learning_rate 0.0005", "model.config.n_layer 3")
    ], "and no default"
    assert spec.first_params() == {}
    own = parse_spec(OWN | {"training": {"x": 7.0, "depth": 2}, "search_space": {"x": {"uniform": [0, 1]}}})
    assert own.remarks() == ["trial 0 does not start at x 7.0: that lies outside its domain"]


def test_a_grid_that_the_budget_cuts_off_is_told() -> None:
    changes = {"search_space": {"x": {"choice": [1, 2, 3]}, "y": {"int_uniform": [0, 10**30]}}}
    (remark,) = parse_spec(OWN | changes | {"sampler": {"name": "grid"}, "budget": {"trials": 5}}).remarks()
    assert remark.startswith(f"of the grid's {3 * (10**30 + 1)} points the budget takes 5: ")
    assert parse_spec(OWN | changes | {"sampler": {"name": "random"}, "budget": {"trials": 5}}).remarks() == []
    small = OWN | {"search_space": {"x": {"choice": [1, 2, 3]}}, "sampler": {"name": "grid"}}
    assert parse_spec(small | {"budget": {"trials": 3}}).remarks() == []
    assert len(parse_spec(small | {"budget": {"trials": 2}}).remarks()) == 1


def test_a_field_that_is_named_with_its_section_is_told_its_own_name_alone() -> None:
    (problem,) = problems(merged(FINETUNE, {"search_space": {"training.max_length": {"choice": [64]}}}))
    assert (problem.found, problem.expected) == ('"training.max_length"', "max_length")


def test_a_spec_error_is_the_users_and_its_json_lists_every_fault() -> None:
    with pytest.raises(SpecError) as refusal:
        parse_spec(FINETUNE | {"name": "", "budget": {"trials": 0}})
    assert exit_code(refusal.value) == 2
    document = error_json(refusal.value)
    assert [set(each) for each in document["errors"]] == [{"rule", "found", "place", "expected"}] * 2


# ---- YAML


@pytest.mark.parametrize(
    ("text", "place", "found"),
    [
        ("name: [", ":1", "expected the node content"),
        ("a: 1\n b: 2", ":2", "mapping values are not allowed"),
        ("", "", "null"),
        ("- a", "", '["a"]'),
        ("name: a\n---\nname: b", ":2", "another document"),
        ("name: !!python/object:os.system x", ":1", "could not determine a constructor"),
        ("model: &a {name: *a}", ":1", "holds itself"),
        ("name: 2026-13-01", "", "month"),
    ],
)
def test_what_is_no_yaml_mapping_is_refused_with_its_line(tmp_path: Path, text: str, place: str, found: str) -> None:
    path = write(tmp_path, text)
    (problem,) = load_problems(path)
    assert problem.place == f"{path}{place}"
    assert found in problem.found


def test_a_file_that_cannot_be_read_is_a_fault_of_the_spec(tmp_path: Path) -> None:
    assert "No such file" in load_problems(tmp_path / "gone.yaml")[0].found
    assert "directory" in load_problems(tmp_path)[0].found
    (tmp_path / "binary.yaml").write_bytes(b"name: \xff")
    assert "UTF-8" in load_problems(tmp_path / "binary.yaml")[0].rule


def test_a_key_that_stands_twice_is_refused_where_it_stands_again(tmp_path: Path) -> None:
    path = write(tmp_path, dump_yaml(parse_spec(FINETUNE)) + "name: other\n")
    (problem,) = load_problems(path)
    assert problem.place.endswith(" name")
    assert problem.found == "name twice"


def test_an_exponent_without_a_dot_is_a_number(tmp_path: Path) -> None:
    path = write(tmp_path, yaml.safe_dump(FINETUNE) + "training: {learning_rate: 1e-4, weight_decay: .5e-1}\n")
    assert load_spec(path).training_values["learning_rate"] == 1e-4
    assert load_spec(path).training_values["weight_decay"] == 0.05


def test_an_anchor_may_be_merged_and_its_keys_replaced(tmp_path: Path) -> None:
    text = yaml.safe_dump(FINETUNE) + "sampler: &s {name: tpe, seed: 3}\ntraining: {<<: {seed: 1}, max_epochs: 2}\n"
    assert load_spec(write(tmp_path, text)).seed == 1


# ---- overrides


@pytest.mark.parametrize(
    ("overrides", "place", "value"),
    [
        (["training.batch_size=64"], ("training", "batch_size"), 64),
        (["training.learning_rate=1e-4"], ("training", "learning_rate"), 1e-4),
        (["training.micro_batch_size="], ("training", "micro_batch_size"), None),
        (["budget={trials: 5}", "budget.trials=6"], ("budget", "trials"), 6),
        (["model.config.n_layer=3"], ("model", "config"), {"n_layer": 3}),
        (["model.config.rope.factor=2"], ("model", "config"), {"rope": {"factor": 2}}),
        (["search_space={}", "budget.trials=1"], ("budget", "trials"), 1),
    ],
)
def test_set_puts_a_value_in(tmp_path: Path, overrides: list[str], place: tuple[str, str], value: object) -> None:
    spec = load_spec(write(tmp_path, yaml.safe_dump(FINETUNE)), overrides)
    assert spec.to_mapping()[place[0]][place[1]] == value


def test_set_knows_parameters_whose_names_hold_dots(tmp_path: Path) -> None:
    space = {"learning_rate": {"uniform": [1e-5, 1e-4]}, "model.config.n_layer": {"choice": [2]}}
    path = write(tmp_path, yaml.safe_dump(FINETUNE | {"search_space": space}))
    overrides = [
        "search_space.model.config.n_layer.choice=[2, 4]",
        "search_space.model.config.n_head={choice: [1, 2]}",
        "search_space.learning_rate.log_uniform=[1e-6, 1e-4]",
    ]
    assert dict(load_spec(path, overrides).domains) == {
        "learning_rate": LogUniform(1e-6, 1e-4),
        "model.config.n_layer": Choice((2, 4)),
        "model.config.n_head": Choice((1, 2)),
    }


def test_set_finds_the_longest_name_that_is_there(tmp_path: Path) -> None:
    path = write(tmp_path, yaml.safe_dump(OWN | {"training": {"a.b": {"c": 1}}}))
    assert load_spec(path, ["training.a.b.c=2"]).training_values["a.b"] == {"c": 2}


def test_set_changes_no_other_place_that_a_yaml_anchor_put_the_same_mapping_in(tmp_path: Path) -> None:
    path = write(tmp_path, yaml.safe_dump(OWN) + "training: {a: &same {k: 1}, b: *same}\n")
    assert load_spec(path, ["training.a.k=2"]).training_values["b"] == {"k": 1}


def test_a_fault_that_set_brings_has_the_option_as_its_place(tmp_path: Path) -> None:
    path = write(tmp_path, yaml.safe_dump(FINETUNE))
    overrides = ["training.batch_size=x", "training.learning_rate", "search_space.a=1", "name=[", "budget={trials: 0}"]
    places = [problem.place for problem in load_problems(path, *overrides, name="A")]
    assert places == [
        "--set",
        "--set search_space.a",
        "--set name",
        "--set budget.trials",
        "--name name",
        "--set training.batch_size",
    ]


def test_the_name_option_replaces_the_specs_name(tmp_path: Path) -> None:
    assert load_spec(write(tmp_path, yaml.safe_dump(FINETUNE)), name="other").name == "other"


# ---- folders


def test_a_relative_folder_is_looked_for_beside_the_spec_and_then_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside, here = tmp_path / "beside", tmp_path / "here"
    for folder in (beside / "data", here / "data", here / "model"):
        folder.mkdir(parents=True)
    monkeypatch.chdir(here)
    own_data = {"path": "data", "text": ["a"]}
    spec = load_spec(write(beside, yaml.safe_dump(FINETUNE | {"model": {"name": "model"}, "data": own_data})))
    assert spec.data is not None
    assert spec.data.path == str(beside / "data")
    assert spec.model is not None
    assert spec.model.name == str(here / "model")
    assert spec.folder == beside


def test_folders_of_another_machine_are_not_looked_for() -> None:
    spec = FINETUNE | {"data": {"task": "mrpc", "path": "/gone"}, "model": {"name": "/gone/model"}}
    assert len(problems(spec)) == 2
    elsewhere = parse_spec(spec, here=False)
    assert elsewhere.data is not None
    assert elsewhere.data.path == "/gone"


# ---- the first trial


@pytest.mark.parametrize(
    ("changes", "first"),
    [
        # The spec's own values lie in the recipe's domains.
        ({}, {"learning_rate": 2.4e-5, "batch_size": 32, "weight_decay": 0.01, "warmup_fraction": 0.1}),
        # Two do not: the recipe's defaults stand in.
        (
            {"training/learning_rate": 1e-3, "training/batch_size": 7},
            {"learning_rate": 6.25e-5, "batch_size": 32, "weight_decay": 0.01, "warmup_fraction": 0.1},
        ),
        # A mapping has no defaults: what lies outside is left to the sampler.
        (
            {"search_space": {"batch_size": {"choice": [8, 16]}, "max_length": {"int_uniform": [64, 128]}}},
            {"max_length": 128},
        ),
        # On a grid it is the first value.
        (
            {"search_space": {"batch_size": {"choice": [8, 16]}, "weight_decay": {"choice": [0, 0.01]}},
             "sampler/name": "grid"},
            {"batch_size": 8, "weight_decay": 0.01},
        ),
        ({"search_space": {"model.config.n_layer": {"choice": [2, 4]}}, "model/config": {"n_layer": 4}},
         {"model.config.n_layer": 4}),
        ({"search_space": {"micro_batch_size": {"choice": [None, 8]}}}, {"micro_batch_size": None}),
    ],
)  # fmt: skip
def test_the_first_trial_has_the_specs_own_values_where_they_lie_in_the_search_space(
    changes: dict[str, Any], first: dict[str, Any]
) -> None:
    assert parse_spec(merged(FINETUNE, changes)).first_params() == first


def test_the_first_trial_of_a_trainable_of_the_users_own_starts_from_what_training_names() -> None:
    assert parse_spec(OWN | {"training": {"x": 0.5, "depth": 3}}).first_params() == {"x": 0.5}


# ---- writing a spec back

training_fields = st.fixed_dictionaries(
    {},
    optional={
        "max_epochs": st.integers(1, 100),
        "learning_rate": st.floats(1e-12, 1e3),
        "weight_decay": st.floats(0, 1),
        "warmup_fraction": st.floats(0, 1),
        "schedule": st.sampled_from(["linear", "cosine", "constant"]),
        "max_grad_norm": st.none() | st.floats(1e-3, 10),
        "seed": st.integers(0, 2**32 - 1),
        "compile": st.sampled_from(["auto", "on", "off"]),
    },
)
SPECIAL = ["1e-5", "1e5", "no", "~", "line\nbreaks\r\x85\u2028"]
text = (st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=8) | st.sampled_from(SPECIAL)).filter(
    lambda found: not names_secret(found)  # a spec with a key of that name is refused
)
plain_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=5,
)
finetune_specs = st.fixed_dictionaries(
    {
        "name": st.from_regex(r"[a-z0-9][a-z0-9._-]{0,62}", fullmatch=True),
        "model": st.fixed_dictionaries(
            {"name": st.just("gpt2"), "config": st.dictionaries(text, plain_values, max_size=3)}
        ),
        "data": st.fixed_dictionaries({"task": st.sampled_from(["mrpc", "cola", "stsb", "mnli"])}),
        "training": training_fields,
        "search_space": st.sampled_from(["gpt2", "bert", "llama"])
        | st.dictionaries(st.text("abc_", min_size=1).map(lambda name: f"model.config.{name}"), domains, min_size=1),
    },
    optional={
        "scheduler": st.just({"name": "none"}),
        "sampler": st.fixed_dictionaries({"name": st.sampled_from(["tpe", "random"]), "seed": st.integers(0, 99)}),
        "resources": st.sampled_from([{"workers": 4}, {"gpus_per_worker": 0.25}, {"gpus_per_worker": "auto"}]),
    },
)
own_specs = st.fixed_dictionaries(
    {
        "name": st.just("own"),
        "trainable": st.just("a.b:c"),
        "training": st.dictionaries(text.filter(lambda name: name not in ("seed", "max_epochs")), plain_values),
        "search_space": st.dictionaries(text.filter(bool), domains, min_size=1, max_size=3),
    }
)


@settings(deadline=None)
@given(finetune_specs | own_specs)
def test_a_spec_that_is_written_loads_to_an_equal_spec(
    tmp_path_factory: pytest.TempPathFactory, written: dict[str, Any]
) -> None:
    spec = parse_spec(written)
    assert parse_spec(spec.to_mapping()) == spec
    assert load_spec(write(tmp_path_factory.mktemp("spec"), dump_yaml(spec))) == spec


def test_auto_asks_ray_for_an_eighth_of_a_gpu_and_stays_auto_in_the_file() -> None:
    spec = parse_spec(FINETUNE | {"resources": {"gpus_per_worker": "auto"}})
    assert (spec.resources.finds_share, spec.resources.gpu_share) == (True, 0.125)
    assert "gpus_per_worker: auto" in dump_yaml(spec)
    quarter = parse_spec(FINETUNE | {"resources": {"gpus_per_worker": 0.25}})
    assert (quarter.resources.finds_share, quarter.resources.gpu_share) == (False, 0.25)


def test_domains_may_be_given_as_objects() -> None:
    space: dict[str, Domain] = {"learning_rate": LogUniform(1e-5, 1e-4), "batch_size": Choice((8, 16))}
    space["max_length"] = IntUniform(64, 128)
    as_text = {name: domain.to_mapping() for name, domain in space.items()}
    assert parse_spec(FINETUNE | {"search_space": space}) == parse_spec(FINETUNE | {"search_space": as_text})
    assert parse_spec(FINETUNE | {"training": TrainingConfig(seed=7)}).seed == 7


# ---- a spec for one trial again


@pytest.mark.parametrize(
    ("base", "params"),
    [
        (FINETUNE, {"learning_rate": 1.234567e-5, "batch_size": 64, "weight_decay": 0.0, "warmup_fraction": 0.05}),
        (FINETUNE, {"model.config.n_layer": 2, "micro_batch_size": None}),
        (FINETUNE | {"resources": {"workers": 2}, "sampler": {"name": "random", "seed": 3}}, {"batch_size": 16}),
        (OWN | {"training": {"x": 1, "y": "1e-5"}}, {"x": 0.25, "depth": 2}),
        (FINETUNE, {}),
    ],
)
def test_a_spec_for_one_trial_loads_and_its_first_and_only_trial_has_those_params(
    tmp_path: Path, base: dict[str, Any], params: dict[str, Any]
) -> None:
    spec = parse_spec(base)
    again = load_spec(write(tmp_path, dump_yaml(spec_for_trial(spec, params))), name="again")
    assert again.first_params() == params
    assert (again.budget.trials, again.scheduler.name) == (1, "none")
    assert (again.resources, again.objective, again.seed) == (spec.resources, spec.objective, spec.seed)
    if spec.is_finetune:
        assert again.trial_settings() == spec.trial_settings().with_params(params)


def test_a_spec_for_one_trial_of_an_own_trainable_keeps_the_epochs_and_the_seed_of_its_study(tmp_path: Path) -> None:
    """Also where its parameters have these names: the trial ran as many epochs as the study says, with its seed."""
    space = {"max_epochs": {"choice": [1, 2]}, "seed": {"choice": [3, 4]}}
    spec = parse_spec(OWN | {"search_space": space, "training": {"max_epochs": 5, "seed": 7}})
    again = load_spec(write(tmp_path, dump_yaml(spec_for_trial(spec, {"max_epochs": 2, "seed": 3}))))
    assert (again.max_epochs, again.seed) == (5, 7)
    assert {name: domain.grid() for name, domain in again.domains.items()} == {"max_epochs": (2,), "seed": (3,)}


def test_every_training_field_can_be_tuned_but_three() -> None:
    assert set(TrainingConfig.model_fields) - set(TUNABLE_FIELDS) == {"max_epochs", "seed", "precision", "compile"}
    space = {"weight_decay": Uniform(0, 1)}
    assert isinstance(parse_spec(FINETUNE | {"search_space": space}).domains, SearchSpace)


def test_a_parsed_spec_is_not_changed_by_what_it_came_from() -> None:
    written = merged(OWN, {"training/x": 1})
    spec: StudySpec = parse_spec(written)
    written["training"]["x"] = 2
    assert spec.training_values["x"] == 1


def test_a_section_that_stands_twice_with_a_wrong_value_is_still_a_spec_error(tmp_path: Path) -> None:
    file = tmp_path / "spec.yaml"
    file.write_text("name: a\nbudget: {trials: 4}\nbudget: {trials: none, tirals: 3}\n")
    with pytest.raises(SpecError) as caught:
        load_spec(file)
    assert any("budget" in problem.place and "twice" in problem.found for problem in caught.value.problems)
