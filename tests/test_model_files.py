"""What can be known of a model before torch is loaded."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from trainables.config import ModelConfig
from trainables.model_files import check_config, check_model_files, least_parameters


def folder_with(folder: Path, **files: str) -> Path:
    """A folder with these files; a double underscore stands for the dot of a name."""
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(content)
    return folder


def found(folder: Path | str, from_scratch: bool = False) -> list[str]:
    return [problem.found for problem in check_model_files(ModelConfig(name=str(folder), from_scratch=from_scratch))]


def test_a_whole_folder_has_no_problem(tmp_path: Path) -> None:
    assert found(folder_with(tmp_path, config__json="{}", tokenizer__json="{}", model__safetensors="")) == []


def test_the_parameters_of_saved_weights_are_counted_by_their_headers(tmp_path: Path) -> None:
    save_file({"a": np.zeros((30, 4), np.float16), "b": np.zeros(7, np.float32)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    assert least_parameters(ModelConfig(name=str(tmp_path))) == 127
    assert least_parameters(ModelConfig(name="openai-community/gpt2")) == 0, "nothing is known before it is fetched"


def test_the_parameters_of_a_model_from_scratch_are_estimated_by_its_sizes(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"n_layer": 12, "n_embd": 768, "vocab_size": 50257}')
    gpt2 = ModelConfig(name=str(tmp_path), from_scratch=True)
    assert least_parameters(gpt2) == 50257 * 768 + 12 * 8 * 768**2  # 95 million; it has 124
    (tmp_path / "vocab.json").write_text('{"a": 0, "b": 1}')
    assert least_parameters(gpt2) == 2 * 768 + 12 * 8 * 768**2, "as many rows as the tokenizer has tokens"
    (tmp_path / "vocab.json").unlink()
    smaller = ModelConfig(name=str(tmp_path), from_scratch=True, config={"n_layer": 2})
    assert least_parameters(smaller) == 50257 * 768 + 2 * 8 * 768**2


def test_everything_an_empty_folder_lacks_is_named_at_once(tmp_path: Path) -> None:
    rules = [problem.rule for problem in check_model_files(ModelConfig(name=str(tmp_path)))]
    assert rules == [
        f"{tmp_path} holds a tokenizer",
        f"{tmp_path} holds config.json",
        f"{tmp_path} holds weights as safetensors",
    ]


def test_from_scratch_needs_a_tokenizer_only(tmp_path: Path) -> None:
    assert found(folder_with(tmp_path, vocab__json="{}", merges__txt=""), from_scratch=True) == []


def test_a_pickle_does_not_count_as_weights(tmp_path: Path) -> None:
    folder_with(tmp_path, config__json="{}", tokenizer__json="{}", pytorch_model__bin="")
    (problem,) = check_model_files(ModelConfig(name=str(tmp_path)))
    assert problem.rule.endswith("holds weights as safetensors")
    assert "pytorch_model.bin" in problem.found


@pytest.mark.parametrize("content", ["{", "[]", ""])
def test_a_config_that_does_not_parse_is_a_problem(tmp_path: Path, content: str) -> None:
    folder_with(tmp_path, config__json=content, tokenizer__json="{}", model__safetensors="")
    (problem,) = check_model_files(ModelConfig(name=str(tmp_path)))
    assert "config.json" in problem.rule


def test_a_missing_shard_of_the_weights_is_named(tmp_path: Path) -> None:
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors", "c": "two.safetensors"}}
    folder_with(tmp_path, config__json="{}", tokenizer__json="{}", one__safetensors="")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert found(tmp_path) == ["1 of 2 missing: two.safetensors"]
    (tmp_path / "two.safetensors").write_text("")
    assert found(tmp_path) == []


@pytest.mark.parametrize("name", ["/nowhere/gpt2", "./nowhere", "~/nowhere", "a/b/c", "nowhere\\gpt2"])
def test_a_path_that_does_not_exist_is_not_looked_for_on_the_hub(name: str) -> None:
    assert found(name) == [f"no folder {name}"]


def test_a_file_is_not_a_model(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_text("")
    assert found(tmp_path / "model.safetensors") == [f"no folder {tmp_path / 'model.safetensors'}"]


class FakeHub:
    """Answers `model_info` with these files, or raises."""

    def __init__(self, answer: list[str] | Exception) -> None:
        self.answer = answer

    def __call__(self) -> FakeHub:
        return self

    def model_info(self, name: str, timeout: float) -> object:
        assert timeout <= 10
        if isinstance(self.answer, Exception):
            raise self.answer
        return SimpleNamespace(id=name, siblings=[SimpleNamespace(rfilename=file) for file in self.answer])


@pytest.fixture
def _empty_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)


@pytest.mark.usefixtures("_empty_cache")
@pytest.mark.parametrize(
    ("answer", "from_scratch", "expected"),
    [
        (["config.json", "model-00001-of-00002.safetensors"], False, []),
        (["config.json", "pytorch_model.bin"], False, ["owner/model on the hub has none"]),
        (["config.json", "pytorch_model.bin"], True, []),
        (ConnectionError("no route"), False, ["ConnectionError: no route"]),
    ],
)
def test_a_hub_model_needs_safetensors(
    monkeypatch: pytest.MonkeyPatch, answer: list[str] | Exception, from_scratch: bool, expected: list[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.HfApi", FakeHub(answer))
    assert found("owner/model", from_scratch) == expected


@pytest.mark.usefixtures("_empty_cache")
def test_a_hub_that_is_switched_off_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.HfApi", FakeHub(AssertionError("asked")))
    assert found("owner/model") == ["no owner/model in the cache"]


def test_a_model_in_the_cache_needs_no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: "/cache/file")
    monkeypatch.setattr("huggingface_hub.HfApi", FakeHub(AssertionError("asked")))
    assert found("owner/model") == []


def test_a_name_the_hub_could_never_have_is_a_problem() -> None:
    (problem,) = check_model_files(ModelConfig(name="two words"))
    assert problem.rule == "a hub name is NAME or OWNER/NAME"


@pytest.mark.parametrize(
    ("config", "max_length", "places"),
    [
        ({}, 64, []),
        ({}, 65, ["training.max_length"]),
        ({"n_positions": 128}, 65, []),
        ({"max_position_embeddings": 128}, 65, []),  # GPT-2 knows it by both names
        ({"vocab_size": 10, "num_labels": 7}, 64, ["model.config.vocab_size", "model.config.num_labels"]),
        ({"n_head": 3}, 64, ["model.config"]),
        ({"n_head": 3, "n_embd": 48}, 64, []),
        ({"n_head": "three"}, 64, []),  # Transformers knows what it says to that
        ({"model_type": "t5"}, 65, []),  # whose positions are relative
    ],
)
def test_what_a_config_cannot_be_shows_before_a_trial(
    tmp_path: Path, config: dict[str, Any], max_length: int, places: list[str]
) -> None:
    folder = folder_with(tmp_path, config__json='{"n_positions": 64, "n_embd": 64, "n_head": 4}')
    found = check_config(ModelConfig(name=str(folder), config=config), max_length)
    assert [problem.place for problem in found] == places


def test_asking_loads_neither_torch_nor_transformers(tmp_path: Path) -> None:
    code = f"""
import sys
from trainables.config import ModelConfig
from trainables.model_files import check_model_files
check_model_files(ModelConfig(name={str(tmp_path)!r}))
check_model_files(ModelConfig(name="two words"))
print(sorted({{"torch", "transformers"}} & set(sys.modules)))
"""
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
