"""Can a model be opened at all? Looks at files and the hub, and imports neither torch nor transformers."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trainables.config import ModelConfig
from trainables.errors import Problem

HUB_TIMEOUT_S = 5.0
ANSWER = "model_check: "
"""What the line begins with that `trainables.model_check` answers in: libraries print beside it."""
FOLLOWING = frozenset({"num_labels", "id2label", "label2id", "problem_type", "pad_token_id", "vocab_size", "dtype"})
"""Config keys that follow from the data, the tokenizer and the training: an override would contradict them."""

_TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "vocab.txt", "tokenizer.model", "spiece.model")
_INDEX = "model.safetensors.index.json"
_PLACE = "model.name"


def local_folder(name: str) -> Path | None:
    """The folder that `model.name` means; None: it is a name on the hub."""
    folder = Path(name).expanduser()
    return folder if folder.is_dir() else None


def least_parameters(model: ModelConfig) -> int:
    """How many parameters the model has at least, by its files: 0 when they tell nothing, as of a hub model before it
    is fetched.

    By the weights' headers; from scratch by the sizes that all transformers have, with 8 matrices of hidden size a
    layer (GPT-2 and BERT have 12), and by the tokenizer, which says how many rows the embedding gets.
    """
    folder = local_folder(model.name)
    if folder is None:
        return 0
    if not model.from_scratch:
        return sum(_num_elements(file) for file in folder.glob("model*.safetensors"))
    config = (_read(folder / "config.json") if (folder / "config.json").is_file() else {}) | model.config
    usual = {"gpt2": (768, 12), "bert": (768, 12), "llama": (4096, 32)}.get(str(config.get("model_type")), (0, 0))
    hidden = config.get("n_embd") or config.get("hidden_size") or usual[0]
    layers = config.get("n_layer") or config.get("num_hidden_layers") or usual[1]
    return int((_num_tokens(folder) or config.get("vocab_size", 0)) * hidden + 8 * layers * hidden**2)


def _num_tokens(folder: Path) -> int:
    """Of the tokenizer, its added ones apart; 0 when its files do not say so plainly."""
    if (folder / "vocab.json").is_file():
        return len(_read(folder / "vocab.json"))
    if (folder / "tokenizer.json").is_file():
        return len(_read(folder / "tokenizer.json").get("model", {}).get("vocab", ()))
    return 0


def _num_elements(file: Path) -> int:
    """Of all tensors of a safetensors file, by its header: its length in 8 bytes, then JSON."""
    with file.open("rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    return sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")


def check_model_files(model: ModelConfig) -> list[Problem]:
    """What keeps the model from being opened; empty when nothing was found."""
    if problems := check_local(model):
        return problems
    return [] if local_folder(model.name) else _check_hub(model.name, model.from_scratch)


def check_config(model: ModelConfig, max_length: int) -> list[Problem]:
    """What the model's config, with the overrides in it, cannot be: as far as that shows without Transformers."""
    folder = local_folder(model.name)
    file = folder / "config.json" if folder is not None else None
    configs = model.config, _read(file) if file is not None and file.is_file() else {}
    rule, expected = "it follows from the rest of the spec", "no such key"
    problems = [Problem(f"model.config.{key}", rule, key, expected) for key in model.config if key in FOLLOWING]
    kind = next((config["model_type"] for config in configs if "model_type" in config), "gpt2")
    also = ["n_positions"] if str(kind).startswith("gpt") else []  # T5 has it too, and no limit
    positions = _size(configs, *also, "max_position_embeddings")
    if 0 < positions < max_length:
        rule = "max_length is at most the model's positions"
        problems.append(Problem("training.max_length", rule, str(max_length), f"at most {positions}"))
    width, heads = _size(configs, "n_embd", "hidden_size"), _size(configs, "n_head", "num_attention_heads")
    if width and heads and width % heads and not _size(configs, "head_dim"):
        rule = "the width is a multiple of the number of heads"
        problems.append(Problem("model.config", rule, f"{width} and {heads}", "such as 64 and 4"))
    return problems


def _size(configs: Sequence[Mapping[str, Any]], *names: str) -> int:
    """What the first of some configs says that has one of the names; 0 where none has, or it is no whole number."""
    value = next((config[name] for config in configs for name in names if name in config), 0)
    return value if isinstance(value, int) else 0


def check_local(model: ModelConfig) -> list[Problem]:
    """The part of `check_model_files` that asks no hub."""
    if folder := local_folder(model.name):
        return _check_folder(folder, model.from_scratch)
    if _looks_like_a_path(model.name):
        return [Problem(_PLACE, "a local model is a folder", f"no folder {model.name}", "a folder, or a hub name")]
    return []


def _check_folder(folder: Path, from_scratch: bool) -> list[Problem]:
    """Problems of a local model folder. From scratch it needs a tokenizer only: its class names a config."""
    problems = []
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        expected = f"one of {', '.join(_TOKENIZER_FILES)}"
        problems.append(Problem(_PLACE, f"{folder} holds a tokenizer", _names(folder), expected))
    if (folder / "config.json").is_file():
        problems += _check_json(folder / "config.json")
    elif not from_scratch:
        problems.append(Problem(_PLACE, f"{folder} holds config.json", _names(folder), "a model saved by Transformers"))
    return problems if from_scratch else problems + _check_weights(folder)


def _check_weights(folder: Path) -> list[Problem]:
    if (folder / "model.safetensors").is_file():
        return []
    if (folder / _INDEX).is_file():
        problems = _check_json(folder / _INDEX)
        shards = set() if problems else set(_read(folder / _INDEX).get("weight_map", {}).values())
        missing = sorted(shard for shard in shards if not (folder / shard).is_file())
        if missing:
            found = f"{len(missing)} of {len(shards)} missing: {', '.join(missing[:5])}"
            problems.append(Problem(_PLACE, f"every file that {_INDEX} names is there", found, "all of them"))
        return problems
    # Not *.bin: PyTorch's own files are pickles, which run code when they are opened.
    rule = f"{folder} holds weights as safetensors"
    return [Problem(_PLACE, rule, _names(folder), "model.safetensors, or from_scratch: true for random weights")]


def _check_json(file: Path) -> list[Problem]:
    try:
        _read(file)
    except (OSError, ValueError) as error:
        return [Problem(_PLACE, f"{file} is a JSON object", str(error), "a whole file")]
    return []


def _read(file: Path) -> dict[str, Any]:
    content = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"a {type(content).__name__}")
    return content


def _names(folder: Path) -> str:
    return ", ".join(sorted(file.name for file in folder.iterdir())[:20]) or "an empty folder"


def _looks_like_a_path(name: str) -> bool:
    return name.startswith(("/", ".", "~")) or "\\" in name or name.count("/") > 1 or Path(name).exists()


def _check_hub(name: str, from_scratch: bool) -> list[Problem]:
    from huggingface_hub import HfApi, constants, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    try:
        needed = ["config.json"] if from_scratch else ["config.json", "model.safetensors"]
        if all(isinstance(try_to_load_from_cache(name, file), str) for file in needed):
            return []
        if constants.HF_HUB_OFFLINE:
            rule = "a hub model is in the cache when the hub is switched off (HF_HUB_OFFLINE)"
            return [Problem(_PLACE, rule, f"no {name} in the cache", "a local folder, or a download before")]
        info = HfApi().model_info(name, timeout=HUB_TIMEOUT_S)
    except HFValidationError as error:
        return [Problem(_PLACE, "a hub name is NAME or OWNER/NAME", str(error), "such as openai-community/gpt2")]
    except RepositoryNotFoundError:
        rule = "the hub has this model and lets you read it"
        return [Problem(_PLACE, rule, f"no {name}", "a name on the hub, HF_TOKEN set for a private one")]
    # Every way in which a network can fail means the same here.
    except Exception as error:
        found = f"{type(error).__name__}: {str(error)[:200]}"
        return [
            Problem(_PLACE, f"{name} is in the cache, or the hub can be reached", found, "a local folder, a network")
        ]
    files = [sibling.rfilename for sibling in info.siblings or []]
    if not from_scratch and not any(file.endswith(".safetensors") for file in files):
        found = f"{name} on the hub has none"
        return [Problem(_PLACE, "the weights are safetensors", found, "another model, or from_scratch: true")]
    return []
