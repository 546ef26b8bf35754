"""Tiny models of each family, made here: what they read, what they are made of, and how they come back."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    CTRLTokenizer,
    GPTNeoXTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from trainables.batches import Encoded, encode, separate_pairs
from trainables.config import DataConfig, ModelConfig
from trainables.data import read_texts
from trainables.errors import ModelError, Problem
from trainables.model import build_model, check_max_length, load_tokenizer
from trainables.steps import DeviceRows

WORDS = ("apple", "bread", "cheese", "dates", "eggs", "figs")
LABELS = ("no", "yes", "maybe")
TEXTS = [("apple bread", "cheese"), ("dates", "eggs figs apple bread cheese"), ("figs", "")]
# Weights 25 times as large as usual: at 0.02 a tiny model hardly looks at its input, and no test would notice padding.
_WIDE = {"initializer_range": 0.5}
_BERT = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
SIZES: dict[str, dict[str, object]] = {
    "gpt2": {"n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 64, **_WIDE},
    "bert": {**_BERT, **_WIDE},
    "llama": {**_BERT, **_WIDE, "model_type": "llama"},
}


def gpt2_files(folder: Path) -> None:
    """GPT-2's kind of tokenizer without merges: a token a byte, no padding token, no separator."""
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    end = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer", **end}))


def bert_files(folder: Path) -> None:
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))


def llama_files(folder: Path) -> None:
    """A BOS before every text, and the end of a text as padding: so it is for many Llamas."""
    vocab = {token: index for index, token in enumerate(["<unk>", "<s>", "</s>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 1)]
    )
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)


FILES: dict[str, Callable[[Path], None]] = {"gpt2": gpt2_files, "bert": bert_files, "llama": llama_files}
FAMILIES = pytest.mark.parametrize("family", list(FILES))


@pytest.fixture
def tokenizer_folder(tmp_path: Path) -> Callable[[str], Path]:
    def make(family: str) -> Path:
        folder = tmp_path / family
        folder.mkdir()
        FILES[family](folder)
        return folder

    return make


MakeFolder = Callable[[str], Path]


def scratch(folder: Path, **overrides: object) -> ModelConfig:
    return ModelConfig(name=str(folder), from_scratch=True, config=SIZES[folder.name] | overrides)


def opened(
    model: ModelConfig, labels: tuple[str, ...] = LABELS, seed: int = 0
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    torch.manual_seed(seed)
    tokenizer = load_tokenizer(model)
    return build_model(model, tokenizer, labels).eval(), tokenizer


def saved(family: str, make: MakeFolder, target: Path) -> Path:
    """A model of someone else's: no rows for our tokens, and the end of a text as padding, or none."""
    folder = make(family)
    network, tokenizer = opened(scratch(folder))
    config = network.config
    config.vocab_size = len(AutoTokenizer.from_pretrained(folder))
    config.pad_token_id = {"gpt2": None, "bert": tokenizer.pad_token_id, "llama": tokenizer.eos_token_id}[family]
    type(network)(config).save_pretrained(target)
    FILES[family](target)
    return target


def pad(encoded: Encoded, rows: Sequence[int], pad_token_id: int, width: int) -> dict[str, torch.Tensor]:
    return DeviceRows(encoded, pad_token_id, torch.device("cpu")).inputs(torch.tensor(rows), width)


def logits(network: PreTrainedModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = network(**batch).logits
    return result


def problems_of(model: ModelConfig) -> list[Problem]:
    with pytest.raises(ModelError) as caught:
        opened(model)
    return list(caught.value.problems)


# --- What the classifier reads ---


@FAMILIES
def test_a_batch_gives_the_logits_of_its_rows_one_by_one(family: str, tokenizer_folder: MakeFolder) -> None:
    network, tokenizer = opened(scratch(tokenizer_folder(family)))
    encoded = encode(tokenizer, TEXTS, 64)
    whole = logits(network, pad(encoded, range(3), tokenizer.pad_token_id, 48))
    for row in range(3):
        alone = pad(encoded, [row], tokenizer.pad_token_id, int(encoded.lengths[row]))
        torch.testing.assert_close(logits(network, alone)[0], whole[row], rtol=1e-4, atol=1e-4)


@FAMILIES
def test_wider_padding_changes_no_logits(family: str, tokenizer_folder: MakeFolder) -> None:
    network, tokenizer = opened(scratch(tokenizer_folder(family)))
    encoded = encode(tokenizer, TEXTS, 64)
    narrow, wide = (logits(network, pad(encoded, range(3), tokenizer.pad_token_id, width)) for width in (48, 60))
    torch.testing.assert_close(narrow, wide, rtol=1e-4, atol=1e-4)


@FAMILIES
def test_the_padding_tokens_own_embedding_changes_no_logits(family: str, tokenizer_folder: MakeFolder) -> None:
    network, tokenizer = opened(scratch(tokenizer_folder(family)))
    batch = pad(encode(tokenizer, TEXTS, 64), range(3), tokenizer.pad_token_id, 48)
    before = logits(network, batch)
    with torch.no_grad():
        network.get_input_embeddings().weight[tokenizer.pad_token_id] += 10.0
    torch.testing.assert_close(logits(network, batch), before, rtol=1e-4, atol=1e-4)


@FAMILIES
def test_the_last_real_token_changes_the_logits(family: str, tokenizer_folder: MakeFolder) -> None:
    network, tokenizer = opened(scratch(tokenizer_folder(family)))
    encoded = encode(tokenizer, TEXTS, 64)
    batch = pad(encoded, range(3), tokenizer.pad_token_id, 48)
    before = logits(network, batch)
    batch["input_ids"][range(3), torch.from_numpy(encoded.lengths - 1)] = int(encoded.ids[1])
    assert (logits(network, batch) - before).abs().amax(dim=1).min() > 1e-3


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_decoders_logits_are_its_head_over_the_last_real_token(family: str, tokenizer_folder: MakeFolder) -> None:
    network, tokenizer = opened(scratch(tokenizer_folder(family)))
    encoded = encode(tokenizer, TEXTS, 64)
    batch = pad(encoded, range(3), tokenizer.pad_token_id, 48)
    with torch.no_grad():
        states = network.base_model(**batch).last_hidden_state
        expected = network.score(states[torch.arange(3), torch.from_numpy(encoded.lengths - 1)])
    torch.testing.assert_close(logits(network, batch), expected)


def test_a_text_that_ends_with_the_end_of_text_token_is_read_to_its_end(tokenizer_folder: MakeFolder) -> None:
    network, tokenizer = opened(scratch(tokenizer_folder("llama")))
    assert tokenizer.pad_token_id not in (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.unk_token_id)
    encoded = encode(tokenizer, [("apple",), ("apple </s>",)], 64)
    assert encoded.lengths.tolist() == [2, 3]
    short, long = logits(network, pad(encoded, range(2), tokenizer.pad_token_id, 8))
    assert (short - long).abs().max() > 1e-3


# --- The tokenizer ---


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_decoders_get_a_padding_token_of_their_own_and_a_separator(family: str, tokenizer_folder: MakeFolder) -> None:
    folder = tokenizer_folder(family)
    old = len(AutoTokenizer.from_pretrained(folder))
    tokenizer = load_tokenizer(scratch(folder))
    assert (tokenizer.pad_token, tokenizer.sep_token) == ("[PAD]", "[SEP]")
    assert (tokenizer.pad_token_id, tokenizer.sep_token_id) == (old, old + 1)


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert"])
def test_an_exported_tokenizer_gives_the_rows_that_were_trained_on(
    family: str, tokenizer_folder: MakeFolder, tmp_path: Path
) -> None:
    """`tokenizer([a], [b], truncation=True)`, with nothing of ours."""
    tokenizer = load_tokenizer(scratch(tokenizer_folder(family)))
    tokenizer.model_max_length = 8
    tokenizer.save_pretrained(tmp_path)
    exported = AutoTokenizer.from_pretrained(tmp_path)
    pairs = [("apple bread", "figs"), ("apple bread " * 5, "figs bread"), ("apple", "")]
    for texts in [*pairs, ("figs",), ("apple bread " * 5,)]:
        trained = list(encode(tokenizer, [texts], 8).ids)
        assert exported(*([text] for text in texts), truncation=True)["input_ids"] == [trained]
        assert trained.count(tokenizer.sep_token_id) == len(texts) - 1 + (family == "bert")


def test_a_tokenizer_whose_class_puts_its_own_template_back_is_exported_as_a_plain_one(
    tokenizer_folder: MakeFolder, tmp_path: Path
) -> None:
    """As Pythia's does, and CodeLlama's."""
    folder = tokenizer_folder("gpt2")
    own = AutoTokenizer.from_pretrained(folder)
    GPTNeoXTokenizer(vocab=own.get_vocab(), merges=[], unk_token=own.eos_token).save_pretrained(tmp_path / "neox")
    (tmp_path / "neox" / "config.json").write_text('{"model_type": "gpt_neox"}')
    tokenizer = load_tokenizer(ModelConfig(name=str(tmp_path / "neox"), from_scratch=True))
    tokenizer.save_pretrained(tmp_path / "exported")
    exported = AutoTokenizer.from_pretrained(tmp_path / "exported")
    trained = list(encode(tokenizer, [("apple", "figs")], 32).ids)
    assert exported("apple", "figs")["input_ids"] == trained
    assert trained.count(tokenizer.sep_token_id) == 1
    assert (exported.pad_token, exported.sep_token) == (tokenizer.pad_token, tokenizer.sep_token)


def test_a_tokenizer_that_separates_pairs_by_itself_or_is_written_in_python_is_left_alone(
    tokenizer_folder: MakeFolder, tmp_path: Path
) -> None:
    bert = AutoTokenizer.from_pretrained(tokenizer_folder("bert"))
    before = str(bert.backend_tokenizer.post_processor)
    assert not separate_pairs(bert)
    assert str(bert.backend_tokenizer.post_processor) == before
    (tmp_path / "vocab.json").write_text('{"<unk>": 0, "a</w>": 1, "b</w>": 2}')
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    ctrl = CTRLTokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"), sep_token="[SEP]")
    assert not ctrl.is_fast and not separate_pairs(ctrl)


def test_special_tokens_may_have_the_signs_of_a_template(tokenizer_folder: MakeFolder) -> None:
    folder = tokenizer_folder("gpt2")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"sep_token": "$A:1 |"})
    separate_pairs(tokenizer)
    assert tokenizer("apple", "figs")["input_ids"].count(tokenizer.sep_token_id) == 1


def test_berts_tokenizer_stays_as_it_is(tokenizer_folder: MakeFolder) -> None:
    tokenizer = load_tokenizer(scratch(tokenizer_folder("bert")))
    assert len(tokenizer) == 5 + len(WORDS)
    assert (tokenizer.pad_token_id, tokenizer.sep_token_id) == (0, 3)


def test_bert_pairs_have_token_types_0_and_1(tokenizer_folder: MakeFolder) -> None:
    tokenizer = load_tokenizer(scratch(tokenizer_folder("bert")))
    batch = pad(encode(tokenizer, [("apple bread", "figs")], 16), [0], 0, 8)
    assert tokenizer.convert_ids_to_tokens(batch["input_ids"][0]) == [
        *("[CLS]", "apple", "bread", "[SEP]", "figs", "[SEP]", "[PAD]", "[PAD]")
    ]
    assert batch["token_type_ids"].tolist() == [[0, 0, 0, 0, 1, 1, 0, 0]]


# --- The model ---


@FAMILIES
def test_labels_become_the_heads_size_and_names(family: str, tokenizer_folder: MakeFolder) -> None:
    network, tokenizer = opened(scratch(tokenizer_folder(family)))
    assert network.config.num_labels == 3
    assert network.config.id2label == {0: "no", 1: "yes", 2: "maybe"}
    assert network.config.label2id == {"no": 0, "yes": 1, "maybe": 2}
    assert network.config.problem_type == "single_label_classification"
    assert network.config.pad_token_id == tokenizer.pad_token_id
    assert network.config._attn_implementation == "sdpa"
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}


@FAMILIES
def test_no_labels_make_a_regression_of_one_number(family: str, tokenizer_folder: MakeFolder) -> None:
    network, tokenizer = opened(scratch(tokenizer_folder(family)), labels=())
    batch = pad(encode(tokenizer, TEXTS, 64), range(3), tokenizer.pad_token_id, 48)
    assert logits(network, batch).shape == (3, 1)
    assert network.config.problem_type == "regression"


@FAMILIES
def test_the_same_seed_gives_the_same_weights(family: str, tokenizer_folder: MakeFolder) -> None:
    model = scratch(tokenizer_folder(family))
    first, again, other = (opened(model, seed=seed)[0].state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


@FAMILIES
def test_the_same_seed_gives_a_pretrained_model_the_same_new_head(
    family: str, tokenizer_folder: MakeFolder, tmp_path: Path
) -> None:
    model = ModelConfig(name=str(saved(family, tokenizer_folder, tmp_path)))
    first, again, other = (opened(model, labels=("no", "yes"), seed=seed)[0].state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    changed = {name for name in first if not torch.equal(first[name], other[name])}
    assert changed == ({"classifier.weight"} if family == "bert" else {"score.weight"})


@FAMILIES
def test_a_saved_model_comes_back_with_equal_logits_and_its_tokenizer(
    family: str, tokenizer_folder: MakeFolder, tmp_path: Path
) -> None:
    network, tokenizer = opened(scratch(tokenizer_folder(family)))
    network.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    assert not list((tmp_path / "saved").glob("*.bin"))
    batch = pad(encode(tokenizer, TEXTS, 64), range(3), tokenizer.pad_token_id, 48)

    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved").eval()
    torch.testing.assert_close(logits(plain, batch), logits(network, batch), rtol=0, atol=0)
    ours, reopened = opened(ModelConfig(name=str(tmp_path / "saved")))
    torch.testing.assert_close(logits(ours, batch), logits(network, batch), rtol=0, atol=0)
    assert encode(reopened, TEXTS, 64).ids.tolist() == encode(tokenizer, TEXTS, 64).ids.tolist()
    assert len(reopened) == len(tokenizer)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_rows_for_new_tokens_are_the_mean_of_the_old_ones(
    family: str, tokenizer_folder: MakeFolder, tmp_path: Path
) -> None:
    folder = saved(family, tokenizer_folder, tmp_path)
    old = AutoModelForSequenceClassification.from_pretrained(folder).get_input_embeddings().weight
    network, tokenizer = opened(ModelConfig(name=str(folder)))
    new = network.get_input_embeddings().weight
    assert len(new) == len(old) + 2 == len(tokenizer) == network.config.vocab_size
    assert torch.equal(new[: len(old)], old)
    torch.testing.assert_close(new[len(old) :], old.mean(dim=0).expand(2, -1))


def test_embeddings_never_shrink(tokenizer_folder: MakeFolder, tmp_path: Path) -> None:
    folder = saved("bert", tokenizer_folder, tmp_path)
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "apple"]))
    network, tokenizer = opened(ModelConfig(name=str(folder)))
    assert len(tokenizer) == 6
    assert network.get_input_embeddings().num_embeddings == 5 + len(WORDS)


def test_the_old_padding_token_is_trained_once_it_is_a_real_one(tokenizer_folder: MakeFolder, tmp_path: Path) -> None:
    network, tokenizer = opened(ModelConfig(name=str(saved("llama", tokenizer_folder, tmp_path))))
    encoded = encode(tokenizer, [("apple </s>",)], 16)
    network(input_ids=torch.from_numpy(encoded.ids.astype(np.int64))[None]).logits.sum().backward()
    gradient = network.get_input_embeddings().weight.grad
    assert gradient is not None
    assert gradient[tokenizer.eos_token_id].abs().max() > 0


# --- Overrides ---


def test_overrides_change_the_config_under_either_of_its_names(tokenizer_folder: MakeFolder) -> None:
    network, _ = opened(scratch(tokenizer_folder("gpt2"), n_layer=1, resid_pdrop=0.3))
    assert (len(network.transformer.h), network.config.resid_pdrop) == (1, 0.3)


def test_sizes_that_follow_from_others_follow_the_overrides(tokenizer_folder: MakeFolder) -> None:
    folder = tokenizer_folder("llama")
    network, _ = opened(scratch(folder, hidden_size=64))
    assert network.config.head_dim == 32


@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("gpt2", {"resid_pdrop", "embd_pdrop", "attn_pdrop"}),
        ("bert", {"hidden_dropout_prob", "attention_probs_dropout_prob"}),
        ("llama", {"attention_dropout"}),
    ],
)
def test_dropout_is_one_word_for_every_family(family: str, names: set[str], tokenizer_folder: MakeFolder) -> None:
    network, tokenizer = opened(scratch(tokenizer_folder(family), dropout=0.0))
    assert {getattr(network.config, name) for name in names} == {0.0}
    batch = pad(encode(tokenizer, TEXTS, 64), range(3), tokenizer.pad_token_id, 48)
    network.train()
    torch.testing.assert_close(logits(network, batch), logits(network, batch))


def test_a_familys_own_dropout_name_wins_over_the_common_one(tokenizer_folder: MakeFolder) -> None:
    network, _ = opened(scratch(tokenizer_folder("gpt2"), dropout=0.0, attn_pdrop=0.5))
    assert (network.config.resid_pdrop, network.config.attn_pdrop) == (0.0, 0.5)


def test_unknown_overrides_are_all_reported_with_near_names(tokenizer_folder: MakeFolder) -> None:
    first, second = problems_of(scratch(tokenizer_folder("gpt2"), n_layers=1, num_labels=7))
    assert first.place == "model.config.n_layers"
    assert "n_layer" in first.expected.split(", ")
    assert second.place == "model.config.num_labels"


@pytest.mark.parametrize("wrong", [{"n_layer": "two"}, {"n_head": 5}, {"activation_function": "nothing"}])
def test_an_override_with_a_wrong_value_is_a_model_error(
    wrong: dict[str, object], tokenizer_folder: MakeFolder
) -> None:
    (problem,) = problems_of(scratch(tokenizer_folder("gpt2"), **wrong))
    assert str(next(iter(wrong.values()))) in problem.rule


def test_overrides_that_leave_pretrained_weights_without_a_place_are_refused(
    tokenizer_folder: MakeFolder, tmp_path: Path
) -> None:
    name = str(saved("gpt2", tokenizer_folder, tmp_path))
    (deeper,) = problems_of(ModelConfig(name=name, config={"n_layer": 3}))
    assert "transformer.h.2." in deeper.found
    (wider,) = problems_of(ModelConfig(name=name, config={"n_embd": 64}))
    assert "another size" in wider.found
    network, _ = opened(ModelConfig(name=name, config={"n_layer": 1}))  # fewer layers are the first ones
    assert len(network.transformer.h) == 1


# --- What cannot be opened ---


def test_a_folder_without_weights_says_so(tokenizer_folder: MakeFolder) -> None:
    problems = problems_of(ModelConfig(name=str(tokenizer_folder("gpt2"))))
    assert any("from_scratch: true" in problem.expected for problem in problems)


def test_weights_as_a_pickle_are_refused(tokenizer_folder: MakeFolder, tmp_path: Path) -> None:
    folder = saved("gpt2", tokenizer_folder, tmp_path)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    (problem,) = problems_of(ModelConfig(name=str(folder)))
    assert "safetensors" in problem.rule


def test_a_cut_weight_file_is_a_model_error(tokenizer_folder: MakeFolder, tmp_path: Path) -> None:
    folder = saved("gpt2", tokenizer_folder, tmp_path)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    (problem,) = problems_of(ModelConfig(name=str(folder)))
    assert problem.place == "model"


def test_a_tokenizer_without_a_family_needs_the_model_type(tokenizer_folder: MakeFolder) -> None:
    folder = tokenizer_folder("llama")
    (problem,) = problems_of(ModelConfig(name=str(folder), from_scratch=True))
    assert "model_type" in problem.expected


def test_max_length_beyond_the_models_positions_is_refused(tokenizer_folder: MakeFolder) -> None:
    network, _ = opened(scratch(tokenizer_folder("gpt2")))
    check_max_length(network, 64)
    with pytest.raises(ModelError, match="at most 64"):
        check_max_length(network, 65)


def test_opening_a_model_says_nothing_and_leaves_the_log_level(
    tokenizer_folder: MakeFolder, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from transformers import logging

    folder = saved("gpt2", tokenizer_folder, tmp_path)
    level = logging.get_verbosity()
    capfd.readouterr()
    opened(ModelConfig(name=str(folder)), labels=("no", "yes"))
    assert "".join(capfd.readouterr()) == ""
    assert logging.get_verbosity() == level


# --- Real models ---


@pytest.mark.parametrize(("name", "vocabulary"), [("minilm", 30522), ("smollm2", 49154)])
def test_real_models_open_and_read_mrpc_rows_the_same_in_any_batch(
    data_dir: Path, models_dir: Path, name: str, vocabulary: int
) -> None:
    if not (models_dir / name).is_dir():
        pytest.skip(f"{models_dir} has no {name}")
    network, tokenizer = opened(ModelConfig(name=str(models_dir / name)), labels=("not_equivalent", "equivalent"))
    assert network.config.vocab_size == network.get_input_embeddings().num_embeddings == vocabulary
    texts = read_texts(DataConfig(task="mrpc", path=str(data_dir / "glue" / "mrpc"))).splits["validation"].texts[:2]
    encoded = encode(tokenizer, texts, 128)
    whole = logits(network, pad(encoded, range(2), tokenizer.pad_token_id, int(encoded.lengths.max()) + 8))
    alone = pad(encoded, [0], tokenizer.pad_token_id, int(encoded.lengths[0]))
    torch.testing.assert_close(logits(network, alone)[0], whole[0], rtol=1e-3, atol=1e-4)


def test_gpt2_from_the_real_tokenizer_alone_has_gpt2s_size(data_dir: Path) -> None:
    small = {"n_layer": 1, "n_embd": 16, "n_head": 2}
    model = ModelConfig(name=str(data_dir / "gpt2-tokenizer"), from_scratch=True, config=small)
    network, tokenizer = opened(model)
    assert (tokenizer.pad_token_id, tokenizer.sep_token_id) == (50257, 50258)
    assert network.config.vocab_size == 50259
    assert (network.config.model_type, network.config.n_positions) == ("gpt2", 1024)
