"""Tokenising and batching, on rows small enough to check by eye and on MRPC."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from trainables.batches import Encoded, bucket_width, encode, epoch_batches, eval_batches, separate_pairs
from trainables.config import DataConfig
from trainables.data import read_texts
from trainables.errors import DataError

WORDS = ("a", "b", "c", "d", "x", "y", "z")


# --- Rows ---


def word_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """One token a word; with the special tokens of GPT-2 (none), Llama (a BOS) or BERT (its pair template)."""
    special = {"gpt2": ["<end>"], "llama": ["<unk>", "<s>", "</s>"], "bert": ["[UNK]", "[CLS]", "[SEP]"]}[kind]
    vocab = {token: index for index, token in enumerate(["[PAD]", *special, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token=special[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if kind == "bert":
        template = {"single": "[CLS] $A [SEP]", "pair": "[CLS] $A [SEP] $B:1 [SEP]:1"}
        names = {"unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    elif kind == "llama":
        template = {"single": "<s> $A", "pair": "<s> $A <s>:1 $B:1"}
        names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    else:
        template = {"single": "$A", "pair": "$A $B:1"}
        names = {"unk_token": "<end>", "bos_token": "<end>", "eos_token": "<end>"}
    tokens = [(token, vocab[token]) for token in special]
    tokenizer.post_processor = processors.TemplateProcessing(**template, special_tokens=tokens)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", **names)
    if kind == "bert":
        fast.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    else:
        fast.add_special_tokens({"sep_token": "[SEP]"})
    separate_pairs(fast)
    return fast


def tokens_of(kind: str, *texts: tuple[str, ...], max_length: int = 32) -> list[str]:
    tokenizer = word_tokenizer(kind)
    encoded = encode(tokenizer, texts, max_length)
    return [" ".join(tokenizer.convert_ids_to_tokens(row)) for row in np.split(encoded.ids, encoded.offsets[1:-1])]


@pytest.mark.parametrize(
    ("kind", "single", "pair"),
    [
        ("gpt2", "a b", "a b [SEP] x"),
        ("llama", "<s> a b", "<s> a b [SEP] x"),
        ("bert", "[CLS] a b [SEP]", "[CLS] a b [SEP] x [SEP]"),
    ],
)
def test_each_family_marks_texts_and_pairs_in_its_own_way(kind: str, single: str, pair: str) -> None:
    assert tokens_of(kind, ("a b",)) == [single]
    assert tokens_of(kind, ("a b", "x")) == [pair]


def test_bert_pairs_tell_the_first_from_the_second_sentence() -> None:
    encoded = encode(word_tokenizer("bert"), [("a b", "x"), ("a", "x y")], 32)
    assert encoded.token_type_ids is not None
    assert encoded.token_type_ids.tolist() == [0, 0, 0, 0, 1, 1, 0, 0, 0, 1, 1, 1]
    assert encode(word_tokenizer("gpt2"), [("a", "x")], 32).token_type_ids is None


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (("a b c d", "x"), "a b c [SEP] x"),
        (("a", "x y z x y"), "a [SEP] x y z"),
        (("a b c d", "x y z"), "a b [SEP] x y"),
        (("a b c", "x"), "a b c [SEP] x"),
        (("a b c d", ""), "a b c d [SEP]"),
    ],
)
def test_a_long_pair_loses_tokens_of_its_longer_text_first(texts: tuple[str, str], expected: str) -> None:
    assert tokens_of("gpt2", texts, max_length=5) == [expected]


def test_llamas_bos_counts_towards_the_length_and_stays() -> None:
    assert tokens_of("llama", ("a b c d", "x y z"), max_length=6) == ["<s> a b [SEP] x y"]
    assert tokens_of("llama", ("a b c d",), max_length=4) == ["<s> a b c"]


@pytest.mark.parametrize(("kind", "expected"), [("gpt2", "<end>"), ("llama", "<s>"), ("bert", "[CLS] [SEP]")])
def test_an_empty_text_still_has_a_token(kind: str, expected: str) -> None:
    assert tokens_of(kind, ("",), ("  ",)) == [expected, expected]


def test_the_token_of_an_empty_text_is_not_the_one_that_pads() -> None:
    tokenizer = word_tokenizer("gpt2")
    tokenizer.pad_token = tokenizer.eos_token
    encoded = encode(tokenizer, [("",)], 8)
    assert encoded.ids.tolist() == [tokenizer.sep_token_id]


def test_an_empty_text_has_a_type_for_its_token() -> None:
    tokenizer = word_tokenizer("gpt2")
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    encoded = encode(tokenizer, [("a b",), ("",), ("c",)], 8)
    assert encoded.token_type_ids is not None
    assert (len(encoded.ids), encoded.token_type_ids.tolist()) == (4, [0, 0, 0, 0])


def test_an_empty_pair_is_its_separator() -> None:
    assert tokens_of("gpt2", ("", "")) == ["[SEP]"]


@pytest.mark.parametrize(("kind", "shortest"), [("gpt2", 3), ("llama", 4), ("bert", 5)])
def test_a_max_length_without_room_for_both_texts_is_refused(kind: str, shortest: int) -> None:
    encode(word_tokenizer(kind), [("a", "x")], shortest)
    with pytest.raises(DataError) as caught:
        encode(word_tokenizer(kind), [("a", "x")], shortest - 1)
    assert caught.value.problems[0].place == "training.max_length"


def test_rows_are_the_same_whatever_the_size_of_the_tokenizers_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [(" ".join(WORDS[: 1 + i % 7]), " ".join(WORDS[: 1 + i % 3])) for i in range(10)]
    whole = encode(word_tokenizer("bert"), texts, 8)
    monkeypatch.setattr("trainables.batches.TOKENIZE_ROWS", 3)
    parts = encode(word_tokenizer("bert"), texts, 8)
    assert parts.ids.tolist() == whole.ids.tolist()
    assert parts.offsets.tolist() == whole.offsets.tolist()
    assert parts.token_type_ids is not None and whole.token_type_ids is not None
    assert parts.token_type_ids.tolist() == whole.token_type_ids.tolist()


# --- Batches ---


def rows_of(batches: list[np.ndarray]) -> list[int]:
    return [int(row) for row in np.concatenate(batches)]


@pytest.mark.parametrize("num_rows", [1, 7, 8, 9, 1000])
def test_an_epoch_holds_every_row_exactly_once(num_rows: int) -> None:
    batches = epoch_batches(np.arange(num_rows) % 13 + 1, 8, seed=0, epoch=1)
    assert sorted(rows_of(batches)) == list(range(num_rows))
    assert [len(batch) for batch in batches] == [8] * (num_rows // 8) + [num_rows % 8] * (num_rows % 8 > 0)


def test_an_epoch_is_the_same_again_for_its_seed_and_number_only() -> None:
    lengths = np.arange(100) % 13 + 1
    first = rows_of(epoch_batches(lengths, 8, seed=3, epoch=1))
    assert rows_of(epoch_batches(lengths, 8, seed=3, epoch=1)) == first
    assert rows_of(epoch_batches(lengths, 8, seed=3, epoch=2)) != first
    assert rows_of(epoch_batches(lengths, 8, seed=4, epoch=1)) != first


def test_batches_do_not_come_in_the_order_of_their_lengths() -> None:
    lengths = np.arange(1, 401)
    means = [lengths[batch].mean() for batch in epoch_batches(lengths, 10, seed=0, epoch=1)]
    assert means != sorted(means)
    assert abs(np.corrcoef(means, range(40))[0, 1]) < 0.4


def test_a_batch_holds_rows_of_about_one_length() -> None:
    lengths = np.random.default_rng(0).integers(1, 101, size=1600)
    spans = [np.ptp(lengths[batch]) for batch in epoch_batches(lengths, 32, seed=0, epoch=1)]
    assert max(spans) <= 6  # one window of 50 batches: each spans about 2 of 100 lengths


def test_the_smaller_batch_left_over_is_not_the_longest_rows() -> None:
    lengths = np.arange(1, 104)
    means = [lengths[epoch_batches(lengths, 50, seed=0, epoch=epoch)[-1]].mean() for epoch in range(200)]
    assert np.mean(means) == pytest.approx(52, abs=6)


def test_evaluation_goes_from_short_to_long_over_every_row() -> None:
    batches = eval_batches(np.array([5, 1, 4, 2, 3]), 2)
    assert [batch.tolist() for batch in batches] == [[1, 3], [4, 2], [0]]


def test_widths_are_multiples_of_the_step_up_to_max_length() -> None:
    assert [bucket_width(length, 30) for length in (1, 8, 9, 24, 25, 30)] == [8, 8, 16, 24, 30, 30]


# --- Real data ---


@pytest.fixture(scope="module")
def mrpc(data_dir: Path) -> Encoded:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(data_dir / "gpt2-tokenizer")
    tokenizer.add_special_tokens({"pad_token": "[PAD]", "sep_token": "[SEP]"})
    separate_pairs(tokenizer)
    data = read_texts(DataConfig(task="mrpc", path=str(data_dir / "glue" / "mrpc")))
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 3668, "validation": 408}
    return encode(tokenizer, data.splits["train"].texts, 128)


def test_mrpc_is_padded_by_at_most_12_percent(mrpc: Encoded) -> None:
    lengths = mrpc.lengths
    for epoch in (1, 2):
        batches = epoch_batches(lengths, 32, seed=42, epoch=epoch)
        padded = sum(len(batch) * bucket_width(int(lengths[batch].max()), 128) for batch in batches)
        assert padded / lengths.sum() <= 1.12


def test_mrpc_rows_hold_exactly_one_separator(mrpc: Encoded) -> None:
    separators = np.add.reduceat(mrpc.ids == 50258, mrpc.offsets[:-1])
    assert separators.tolist() == [1] * 3668
