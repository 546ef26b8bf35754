"""Everything that is wrong comes out at once, before anything is written or costs money."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hand_driven import toy_spec

from trainables.errors import UserError
from tune_service.check import Check, baseline, problems_of, run_checks
from tune_service.cli import _checks_here, _load
from tune_service.demo import write_pairs, write_tokenizer
from tune_service.errors import SpecError
from tune_service.machine import Machine
from tune_service.model_look import built, changed_models
from tune_service.output import print_check
from tune_service.spec import parse_spec
from tune_service.storage import Storage

GIB = 1024**3
SMALL = Machine(cpus=2, gpus=0, memory_bytes=4 * GIB)


@pytest.fixture
def finetune(tmp_path: Path) -> dict[str, Any]:
    """A sound spec with data and tokenizer of its own."""
    write_pairs(tmp_path / "data", num_train=8, num_validation=4)
    write_tokenizer(tmp_path / "tokenizer")
    return {
        "name": "toy",
        "model": {"name": "./tokenizer", "from_scratch": True, "config": {"model_type": "gpt2"}},
        "data": {"path": "data", "text": ["sentence1", "sentence2"]},
        "search_space": {"learning_rate": {"log_uniform": [1e-4, 1e-2]}},
        "resources": {"gpus_per_worker": 0},
    }


def checks(spec: dict[str, Any], folder: Path, machine: Machine = SMALL) -> dict[str, Check]:
    found = run_checks(parse_spec(spec, folder), Storage(folder / "studies"), machine)
    return {check.name: check for check in found}


def load_problems(spec: dict[str, Any], folder: Path) -> dict[str, str]:
    """Place -> what was found, of the one refusal of a spec file; the file and line are left out of the place."""
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(spec))
    with pytest.raises(SpecError) as refusal:
        _load(path, [], None, Storage(folder / "studies"))
    return {problem.place.partition(" ")[2] or problem.place: problem.found for problem in refusal.value.problems}


def test_a_sound_spec_passes_every_check_and_each_says_what_it_found(finetune: dict[str, Any], tmp_path: Path) -> None:
    found = checks(finetune, tmp_path)
    assert list(found) == ["storage", "resources", "model", "data", "checkpoints"]
    assert all(check.ok and not check.advice for check in found.values())
    assert found["storage"].found == f"{tmp_path / 'studies'} can be written"
    assert found["resources"].found == "2 CPUs, 0 GPUs: 2 trials at once"
    assert found["model"].found == str(tmp_path / "tokenizer")
    assert found["data"].found.startswith("8 train, 4 validation rows; train: 0 ")
    assert found["data"].to_json() == {"name": "data", "ok": True, "found": found["data"].found, "advice": ""}


def test_a_budget_too_small_for_the_checkpoints_of_one_trial_is_refused(
    finetune: dict[str, Any], tmp_path: Path
) -> None:
    """Weights and AdamW's two moments in fp32: 12 bytes a parameter, and four checkpoints at one moment."""
    finetune["model"]["config"] |= {"n_layer": 2, "n_embd": 128}
    tokens = json.loads((tmp_path / "tokenizer" / "tokenizer.json").read_text())["model"]["vocab"]
    each = (len(tokens) * 128 + 2 * 8 * 128**2) * 12
    finetune["checkpoints"] = {"budget_gib": 4 * each / GIB * 1.001}
    assert checks(finetune, tmp_path)["checkpoints"].ok
    finetune["checkpoints"] = {"budget_gib": 4 * each / GIB * 0.99}
    found = checks(finetune, tmp_path)["checkpoints"]
    assert not found.ok and [problem.place for problem in found.problems] == ["checkpoints.budget_gib"]
    assert load_problems(finetune, tmp_path).keys() == {"checkpoints.budget_gib"}


def test_a_disk_without_room_for_one_trial_is_refused(
    finetune: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finetune["model"]["config"] |= {"n_layer": 2, "n_embd": 128}
    monkeypatch.setattr(Storage, "free_bytes", lambda self: 1_000_000)
    found = checks(finetune, tmp_path)["checkpoints"]
    assert not found.ok and "are free at" in found.found


def test_nothing_is_written_by_looking(finetune: dict[str, Any], tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    checks(finetune, tmp_path)
    assert sorted(tmp_path.rglob("*")) == before


def test_faults_of_spec_data_model_and_machine_come_in_one_refusal(finetune: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "tokenizer" / "tokenizer.json").unlink()
    finetune["data"] |= {"label": "lable"}
    finetune["resources"] |= {"workers": 4096}
    finetune["training"] = {"batch_size": 4096}
    finetune["budget"] = {"trials": 0}
    finetune["budgte"] = {}
    before = sorted(tmp_path.rglob("*"))
    found = load_problems(finetune, tmp_path)
    assert found.keys() == {"budgte", "budget.trials", "resources.workers", "model.name", "data.label"}
    assert "4096" in found["resources.workers"]
    assert sorted(tmp_path.rglob("*")) == sorted([*before, tmp_path / "study.yaml"])


def test_every_problem_has_the_line_of_its_key(finetune: dict[str, Any], tmp_path: Path) -> None:
    finetune["data"] |= {"label": "lable"}
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(finetune))
    line = 1 + path.read_text().splitlines().index("  label: lable")
    with pytest.raises(SpecError) as refusal:
        _load(path, [], None, Storage(tmp_path / "studies"))
    assert {problem.place for problem in refusal.value.problems} == {f"{path}:{line} data.label"}


def test_the_longest_rows_of_the_search_space_must_fit_the_model(finetune: dict[str, Any], tmp_path: Path) -> None:
    finetune["model"]["config"] |= {"n_positions": 64}
    finetune["training"] = {"max_length": 32}
    assert checks(finetune, tmp_path)["model"].ok
    finetune["search_space"] |= {"max_length": {"int_uniform": [16, 65]}}
    assert load_problems(finetune, tmp_path) == {"training.max_length": "65"}


def test_what_is_wrong_by_itself_is_not_reported_a_second_time(finetune: dict[str, Any], tmp_path: Path) -> None:
    finetune["data"] |= {"path": "nowhere"}
    finetune["model"] |= {"name": "./nowhere"}
    found = load_problems(finetune, tmp_path)
    assert found == {"data.path": '"nowhere"', "model.name": '"./nowhere"'}
    finetune["data"] = {"path": "data", "task": "mprc"}  # without a task a path would need its text columns
    assert load_problems(finetune, tmp_path) == {"data.task": '"mprc"', "model.name": '"./nowhere"'}


@pytest.mark.parametrize(
    ("name", "domain", "shown"),
    [
        ("lr", {"log_uniform": [1e-5, 1e-3]}, '"lr"'),
        ("model.config", {"choice": [1]}, '"model.config"'),
        (3, {"choice": [1, 2]}, "3"),
        ("learning_rate", {"choice": ["fast", "slow"]}, '["fast", "slow"]'),
        ("batch_size", {"choice": ["a", "b"]}, '["a", "b"]'),
        ("batch_size", {"uniform": [8.0, 32.0]}, '{"uniform": [8.0, 32.0]}'),
    ],
)
def test_what_no_trial_could_take_from_a_search_space_is_refused_with_the_faults_of_data_and_model(
    finetune: dict[str, Any], tmp_path: Path, name: object, domain: object, shown: str
) -> None:
    finetune["data"] |= {"label": "lable"}
    finetune["model"]["config"] |= {"n_positions": 64}
    finetune["search_space"] = {name: domain, "max_length": {"choice": [64, 65]}}
    found = load_problems(finetune, tmp_path)
    assert found.pop("data.label") and found.pop("training.max_length") == "65"
    assert found == {f"search_space.{name}": shown}


def test_faults_of_the_data_all_come_with_their_advice(finetune: dict[str, Any], tmp_path: Path) -> None:
    finetune["data"] |= {"text": ["sentence1", "sentence3"], "label": "lable"}
    check = checks(finetune, tmp_path)["data"]
    assert not check.ok
    assert {problem.place for problem in check.problems} == {"data.text", "data.label"}
    assert "sentence3" in check.found and "lable" in check.found and "sentence2" in check.advice


def test_a_storage_that_cannot_be_written_is_found(finetune: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "studies").write_text("a file")
    check = checks(finetune, tmp_path)["storage"]
    assert not check.ok and "--storage" in check.found
    assert [problem.place for problem in problems_of([check])] == ["--storage"]


def test_more_than_the_machine_has_is_found(finetune: dict[str, Any], tmp_path: Path) -> None:
    finetune["resources"] = {"gpus_per_worker": 1, "workers": 1}
    check = checks(finetune, tmp_path)["resources"]
    assert not check.ok and check.problems[0].place == "resources.gpus_per_worker"
    assert checks(finetune, tmp_path, Machine(cpus=8, gpus=2, memory_bytes=GIB))["resources"].found == (
        "8 CPUs, 2 GPUs: 2 trials at once"
    )


def test_of_auto_is_told_what_is_known_before_the_study_runs(finetune: dict[str, Any], tmp_path: Path) -> None:
    finetune["resources"] = {"gpus_per_worker": "auto"}
    assert not checks(finetune, tmp_path)["resources"].ok, "without a GPU"
    assert checks(finetune, tmp_path, Machine(cpus=32, gpus=2, memory_bytes=GIB))["resources"].found == (
        "32 CPUs, 2 GPUs: 16 trials at once at most; how many share a GPU is found while they run"
    )


# ---- changes of a model's config


def test_only_a_changed_config_is_looked_at_at_each_end_of_the_search_space(
    finetune: dict[str, Any], tmp_path: Path
) -> None:
    finetune["model"] = {"name": "gpt2"}
    assert changed_models(parse_spec(finetune, tmp_path)) == []
    finetune["model"] = {"name": "gpt2", "config": {"n_layer": 2}}
    assert [model.config for model, _ in changed_models(parse_spec(finetune, tmp_path))] == [{"n_layer": 2}]
    finetune["search_space"] |= {
        "model.config.n_head": {"choice": [2, 3]},
        "model.config.n_layer": {"int_uniform": [1, 9]},
    }
    found = [
        tuple(model.config[key] for key in ("n_head", "n_layer"))
        for model, _ in changed_models(parse_spec(finetune, tmp_path))
    ]
    assert found == [(2, 2), (3, 2), (2, 1), (2, 2), (2, 9)]


def test_a_config_that_makes_no_model_is_found_without_training(finetune: dict[str, Any], tmp_path: Path) -> None:
    config = {"model_type": "gpt2", "n_layer": 1, "n_head": 2}
    finetune["model"]["config"] = config | {"n_embd": 16}
    sound = parse_spec(finetune, tmp_path)
    assert built(changed_models(sound)) == "built"
    faults = [{"n_embd": 16, "n_layers": 3}, {"n_embd": "wide"}, {"n_embd": 15}]
    assert sound.model is not None
    models = [sound.model.model_copy(update={"config": config | fault}) for fault in faults]
    with pytest.raises(UserError) as refused:
        built([(model, 64) for model in [*models, sound.model]] + [(sound.model, 1025)])
    unknown, word, uneven, short = refused.value.problems
    assert (short.place, short.found, short.expected) == ("training.max_length", "1025", "at most 1024")  # GPT-2's own
    assert (unknown.place, unknown.found) == ("model.config.n_layers", "n_layers") and "n_layer" in unknown.expected
    assert "expected int, got str" in word.found and "divisible" in uneven.found


def test_a_spec_without_data_is_told_so_whatever_else_it_has(finetune: dict[str, Any], tmp_path: Path) -> None:
    del finetune["data"]
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(finetune))
    with pytest.raises(SpecError, match="`finetune` needs data"):
        list(_checks_here(path, [], None, Storage(tmp_path / "studies")))


def test_check_tells_of_a_wrong_config_beside_a_machine_that_is_too_small(
    finetune: dict[str, Any], tmp_path: Path
) -> None:
    finetune["model"]["config"] |= {"n_layers": 3}
    finetune["resources"] |= {"workers": 4096}
    finetune["training"] = {"batch_size": 4096}
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(finetune))
    found = {check.name: check for check in _checks_here(path, [], None, Storage(tmp_path / "studies"))}
    assert not found["resources"].ok and found["model"].ok
    assert not found["model.config"].ok and "n_layers" in found["model.config"].found


def test_check_says_where_the_file_or_an_option_has_what_is_wrong_with_model_data_and_machine(
    finetune: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    finetune["data"] |= {"label": "lable"}
    finetune["model"]["config"] |= {"n_positions": 64}
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(finetune))
    line = 1 + path.read_text().splitlines().index("  label: lable")
    monkeypatch.setattr(Storage, "free_bytes", lambda self: 7)
    storage = Storage(tmp_path / "studies")
    options = ["resources.workers=32", "training.max_length=65"]
    found = {check.name: check for check in _checks_here(path, options, None, storage)}
    places = {name: [problem.place for problem in check.problems] for name, check in found.items() if not check.ok}
    assert places == {
        "resources": ["--set resources.workers"],
        "model": ["--set training.max_length"],
        "data": [f"{path}:{line} data.label"] * 2,
        "checkpoints": ["--storage"],
    }
    print_check(found["data"])
    assert capsys.readouterr().out == "".join(
        f"FAIL data: {path}:{line} data.label: the columns exist in every split\n"
        f"     found:    {split} has no lable\n"
        "     expected: some of sentence1, sentence2, label\n"
        for split in ("train", "validation")
    )


# ---- a trainable of the user's own


def own(folder: Path, module: str, text: str) -> Check:
    (folder / f"{module}.py").write_text(text)
    spec = toy_spec(folder, trainable=f"{module}:train")
    found = {check.name: check for check in run_checks(spec, Storage(folder / "studies"), SMALL)}
    assert "model" not in found and "data" not in found
    return found["trainable"]


def test_a_trainable_beside_the_spec_is_imported_and_not_run(tmp_path: Path) -> None:
    check = own(tmp_path, "sound", "def train(context):\n    raise SystemExit('ran')\n    yield\n")
    assert (check.ok, check.found) == (True, "sound:train")
    assert "sound" not in sys.modules


def test_a_trainable_that_may_yield_nothing_is_told(tmp_path: Path) -> None:
    check = own(tmp_path, "returning", "print('loading')\ndef train(context):\n    return []\n")
    expected = "returning:train, which is no generator function itself: what it returns has to yield Reports"
    assert (check.ok, check.found) == (True, expected)


@pytest.mark.parametrize(
    ("module", "text", "found"),
    [
        ("broken", "def train(context:\n", "SyntaxError"),
        ("lacking", "import no_such_module\n", "No module named 'no_such_module'"),
        ("other", "def fit(context): ...\n", "module other has no function 'train'"),
        ("ending", "import sys\nsys.exit(3)\n", "exit code 3"),
        ("killed", "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n", "exit code -9"),
        ("latin", "import sys\nsys.stderr.buffer.write(b'\\xe9t\\xe9\\n')\nsys.exit(3)\n", "\ufffdt\ufffd"),
    ],
)
def test_a_trainable_that_cannot_be_imported_is_found_with_the_reason(
    tmp_path: Path, module: str, text: str, found: str
) -> None:
    check = own(tmp_path, module, text)
    assert not check.ok and found in check.found
    assert [problem.place for problem in check.problems] == ["trainable"]
    assert str(tmp_path) in check.advice


def test_an_import_that_hangs_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tune_service.check.IMPORT_TIMEOUT_S", 1)
    check = own(tmp_path, "hanging", "import time\ntime.sleep(60)\n")
    assert not check.ok and "more than 1 s" in check.found


def test_a_trainable_sees_no_gpu_while_it_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    text = "import os\nassert os.environ['CUDA_VISIBLE_DEVICES'] == ''\ndef train(context): ...\n"
    assert own(tmp_path, "looking", text).ok


# ---- what it costs


def test_the_baseline_is_the_share_of_the_commonest_validation_class(finetune: dict[str, Any], tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {"sentence1": ["a"] * 5, "sentence2": ["b"] * 5, "label": [1, 0, 1, 1, 0]}
    pq.write_table(pa.table(columns), tmp_path / "data" / "validation.parquet")
    assert baseline(parse_spec(finetune, tmp_path)) == 0.6
    assert baseline(toy_spec(tmp_path)) is None


def test_checks_load_neither_torch_nor_ray(finetune: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(finetune))
    code = (
        "import sys; from pathlib import Path; from tune_service.cli import _load, _storage;"
        f"_load(Path({str(tmp_path / 'study.yaml')!r}), [], None, _storage({str(tmp_path / 'studies')!r}));"
        "print(sorted({'torch', 'ray', 'transformers', 'optuna'} & sys.modules.keys()))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"
