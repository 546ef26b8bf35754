"""The tokenizer and the classifier."""

from __future__ import annotations

import dataclasses
import difflib
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.activations import NewGELUActivation

from trainables.batches import separate_pairs
from trainables.config import ModelConfig
from trainables.errors import ModelError, Problem
from trainables.model_files import FOLLOWING, check_local, local_folder

# In a rank's log a bar is a line for every epoch that says nothing, and hides what a failure says.
transformers.utils.logging.disable_progress_bar()

_FAMILIES = {"GPT2Tokenizer": "gpt2", "BertTokenizer": "bert", "LlamaTokenizer": "llama"}
"""The model type of a tokenizer class, for a folder that holds a tokenizer and no config."""


def load_tokenizer(model: ModelConfig) -> PreTrainedTokenizerFast:
    """The tokenizer of `model.name`, with a padding token of its own and a separator between two texts.

    GPT-2 has neither. Where padding is the end-of-text token, the classifier could not tell where a text ends.
    """
    _refuse_broken_files(model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(_source(model))
    # What Transformers raises for a missing, cut or foreign file is anything from KeyError to OSError.
    except Exception as error:
        raise _cannot_open("tokenizer", model, error) from error
    shared = {tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.unk_token_id}
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id in shared:
        tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    if tokenizer.sep_token_id is None:
        tokenizer.add_special_tokens({"sep_token": "[SEP]"})
    if separate_pairs(tokenizer) and not _opens_as_it_is(tokenizer):
        names = {name: getattr(tokenizer, name) for name in tokenizer.special_tokens_map}
        names |= {"model_input_names": tokenizer.model_input_names}
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, **names)
    # `encode` cuts and `pad` fills on the right; the saved tokenizer must do the same.
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    return tokenizer


def _opens_as_it_is(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether one that is saved of it separates pairs like it: some classes put a template of their own back."""
    if type(tokenizer).__name__ in _FAMILIES:  # these do not, and to look takes time at every start
        return True
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        saved = AutoTokenizer.from_pretrained(folder)
    return bool(saved("a", "b")["input_ids"] == tokenizer("a", "b")["input_ids"])


def build_model(model: ModelConfig, tokenizer: PreTrainedTokenizerFast, label_names: Sequence[str]) -> PreTrainedModel:
    """A sequence classifier with fp32 weights; a regression where `label_names` is empty.

    New weights come from torch's generator, which the caller has seeded: the same seed, the same weights.
    """
    _refuse_broken_files(model)
    config = _model_config(model, tokenizer)
    _set_labels(config, label_names)
    config.use_cache = False  # a classifier reads each text once
    options = {"attn_implementation": "sdpa", "dtype": torch.float32}
    try:
        with _quiet():
            if model.from_scratch:
                config.vocab_size = max(config.vocab_size, len(tokenizer))
                config.pad_token_id = tokenizer.pad_token_id
                network = AutoModelForSequenceClassification.from_config(config, **options)
            else:
                network = _load_weights(model, config, options)
                _grow_embeddings(network, len(tokenizer))
    except ModelError:
        raise
    # As above: a wrong override shows as whatever line of the model first stumbles over it.
    except Exception as error:
        raise _cannot_open("model", model, error) from error
    _set_padding(network, tokenizer.pad_token_id)
    _fuse_gelu(network)
    return network


def check_builds(model: ModelConfig, max_length: int) -> None:
    """Raises ModelError where the config with its overrides makes no model that reads `max_length` tokens.

    Loads no weights and takes no memory.
    """
    config = _model_config(model, load_tokenizer(model))
    try:
        with _quiet(), torch.device("meta"):
            network = AutoModelForSequenceClassification.from_config(config)
    except Exception as error:
        raise _cannot_open("model", model, error) from error
    check_max_length(network, max_length)


def check_max_length(network: PreTrainedModel, max_length: int) -> None:
    """Raises ModelError where the model has fewer positions than `max_length`."""
    positions = getattr(network.config, "max_position_embeddings", None)
    tables = [module for name, module in network.named_modules() if name.endswith("position_embeddings")]
    if positions is not None and any(getattr(table, "padding_idx", None) is not None for table in tables):
        positions -= network.config.pad_token_id + 1  # RoBERTa counts its positions from behind the padding's
    if positions is not None and max_length > positions:
        rule = "max_length is at most the model's positions"
        raise ModelError(Problem("training.max_length", rule, str(max_length), f"at most {positions}"))


def _source(model: ModelConfig) -> str:
    return str(local_folder(model.name) or model.name)


def _refuse_broken_files(model: ModelConfig) -> None:
    if problems := check_local(model):
        raise ModelError(problems)


def _cannot_open(what: str, model: ModelConfig, error: Exception) -> ModelError:
    rule = f"the {what} of {model.name} can be opened" + (f" with {model.config}" if model.config else "")
    found = f"{type(error).__name__}: {str(error).strip()[:500]}"
    return ModelError(
        Problem("model", rule, found, "a GPT-2, BERT or Llama model with safetensors, or overrides it knows")
    )


def _model_config(model: ModelConfig, tokenizer: PreTrainedTokenizerFast) -> PreTrainedConfig:
    """The model's config with the overrides in it."""
    overrides = dict(model.config)
    folder = local_folder(model.name)
    try:
        if folder and not (folder / "config.json").is_file():
            config_class, values = _inferred_config(overrides.pop("model_type", None), tokenizer, folder.name)
        else:
            config_class = type(AutoConfig.from_pretrained(_source(model)))
            values, _ = PreTrainedConfig.get_config_dict(_source(model))
        overrides = _known_overrides(config_class, overrides)
        # Built anew and not changed afterwards: sizes that follow from others (Llama's head_dim) follow the overrides.
        return config_class.from_dict(values | overrides)
    except ModelError:
        raise
    except Exception as error:
        raise _cannot_open("config", model, error) from error


def _inferred_config(
    model_type: str | None, tokenizer: PreTrainedTokenizerFast, folder: str
) -> tuple[type[PreTrainedConfig], dict[str, Any]]:
    name = type(tokenizer).__name__
    model_type = model_type or _FAMILIES.get(name.removesuffix("Fast"))
    if model_type is None:
        rule = f"a folder without config.json says which model it is of ({folder})"
        expected = "model.config.model_type: gpt2, bert or llama"
        raise ModelError(Problem("model.config", rule, f"the tokenizer class {name}", expected))
    config = AutoConfig.for_model(model_type)
    values = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    return type(config), values


def _known_overrides(config_class: type[PreTrainedConfig], overrides: dict[str, Any]) -> dict[str, Any]:
    """The overrides under the names that this config class has for them. Raises ModelError for unknown ones."""
    fields = {field.name for field in dataclasses.fields(config_class) if not field.name.startswith("_")}
    aliases: dict[str, str] = config_class.attribute_map
    if "dropout" in overrides and "dropout" not in fields | aliases.keys():
        # One word for every family; each has several names of its own, which still win.
        value = overrides["dropout"]
        overrides = dict.fromkeys(_dropouts(fields), value) | {k: v for k, v in overrides.items() if k != "dropout"}
    problems = []
    for key in overrides:
        if key in FOLLOWING or key == "model_type":
            problems.append(Problem(f"model.config.{key}", "it follows from the rest of the spec", key, "no such key"))
        elif key not in fields | aliases.keys():
            near = difflib.get_close_matches(key, sorted(fields | aliases.keys()), n=5, cutoff=0.5)
            rule = f"{config_class.__name__} knows the key"
            problems.append(Problem(f"model.config.{key}", rule, key, ", ".join(near) or "a key of its config.json"))
    if problems:
        raise ModelError(problems)
    return {aliases.get(key, key): value for key, value in overrides.items()}


def _dropouts(fields: set[str]) -> list[str]:
    """GPT-2's resid_pdrop, BERT's hidden_dropout_prob, Llama's attention_dropout, ..."""
    return sorted(name for name in fields if name.endswith(("_pdrop", "_dropout", "_dropout_prob")))


def _set_labels(config: PreTrainedConfig, label_names: Sequence[str]) -> None:
    names = list(label_names) or ["score"]
    config.num_labels = len(names)
    config.id2label = dict(enumerate(names))
    config.label2id = {name: index for index, name in enumerate(names)}
    config.problem_type = "single_label_classification" if label_names else "regression"


def _load_weights(model: ModelConfig, config: PreTrainedConfig, options: dict[str, Any]) -> PreTrainedModel:
    network, loading = AutoModelForSequenceClassification.from_pretrained(
        _source(model),
        config=config,
        use_safetensors=True,  # never a pickle
        ignore_mismatched_sizes=True,  # for the head of a model that knew other classes; checked below
        output_loading_info=True,
        **options,
    )
    body = network.base_model_prefix + "."
    lost = [str(key) for key in loading["missing_keys"] if str(key).startswith(body) and ".pooler." not in str(key)]
    lost += [str(key[0]) for key in loading["mismatched_keys"] if str(key[0]).startswith(body)]
    if lost:
        rule = f"the weights of {model.name} fill the whole model below the classifier"
        found = f"{len(lost)} tensors missing or of another size: {', '.join(sorted(lost)[:3])}"
        expected = "overrides that keep the sizes, or from_scratch: true"
        raise ModelError(Problem("model.config" if model.config else "model.name", rule, found, expected))
    return network


def _grow_embeddings(network: PreTrainedModel, num_tokens: int) -> None:
    """Rows for added tokens. Never fewer rows: many models have more of them than their tokenizer has tokens."""
    embeddings = network.get_input_embeddings()
    old = embeddings.num_embeddings
    if num_tokens <= old:
        return
    network.resize_token_embeddings(num_tokens, mean_resizing=False)
    weight = network.get_input_embeddings().weight
    # The mean of the old rows: on the scale the model knows, and the same for every seed.
    with torch.no_grad():
        weight[old:] = weight[:old].mean(dim=0)


def _set_padding(network: PreTrainedModel, pad_token_id: int) -> None:
    """Tells the classifier which tokens to skip. Only after loading: the row may not exist before."""
    network.config.pad_token_id = pad_token_id
    embeddings = network.get_input_embeddings()
    if embeddings.padding_idx is not None:
        embeddings.padding_idx = pad_token_id  # else the old padding token, a real one now, would never be trained


class _GELU(NewGELUActivation):  # type: ignore[misc]  # Transformers has no types
    """In training one kernel, where Transformers takes eight steps of the same formula; elsewhere those, to the bit."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor
        found = nn.functional.gelu(inputs, approximate="tanh") if self.training else super().forward(inputs)
        return found


def _fuse_gelu(network: PreTrainedModel) -> None:
    for module in network.modules():
        for name, child in module.named_children():
            if type(child) is NewGELUActivation:
                setattr(module, name, _GELU())


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Transformers' report that the classifier's weights are new: they always are. What matters is checked."""
    verbosity, bars = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        if bars:
            transformers.logging.enable_progress_bar()
