"""From texts to rows of token ids, and from rows to padded batches. numpy only: torch is never loaded here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np

from trainables.data import Text
from trainables.errors import DataError, Problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

TOKENIZE_ROWS = 1024
"""Texts handed to the tokenizer at once: its answer is Python lists, 20 times the size of the arrays kept of it."""
WINDOW_BATCHES = 50
"""Batches among which rows may be exchanged to bring equal lengths together. More: less padding, less shuffling."""


# --- Rows ---


@dataclass(frozen=True)
class Encoded:
    """Rows of unequal length, one after the other: row i is ids[offsets[i]:offsets[i + 1]]."""

    ids: np.ndarray
    """int32"""
    offsets: np.ndarray
    """int64, one more than rows"""
    token_type_ids: np.ndarray | None = None
    """As `ids`, for tokenizers that tell first from second sentence."""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row, at least 1."""
        return np.diff(self.offsets)


def separate_pairs(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Has `tokenizer(a, b)` put its separator between two texts. Whether it did not do so by itself, as BERT's does.

    GPT-2's and Llama's would run the last word of the first text into the second one. One that is written in Python has
    no template, and stays as it is.
    """
    from tokenizers.processors import TemplateProcessing

    if not tokenizer.is_fast or tokenizer.sep_token_id in tokenizer("a", "b")["input_ids"]:
        return False
    whole, bare = tokenizer("a")["input_ids"], tokenizer("a", add_special_tokens=False)["input_ids"]
    start = next(i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)
    before, after, between = whole[:start], whole[start + len(bare) :], [tokenizer.sep_token_id]
    # By names of ours: a template has a meaning of its own for some signs that special tokens may have.
    named = {name: ids for name, ids in (("before", before), ("between", between), ("after", after)) if ids}
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=[each for each in ("before", "$A", "after") if each in named or each[0] == "$"],
        pair=[each for each in ("before", "$A", "between", "$B", "after") if each in named or each[0] == "$"],
        special_tokens=[
            {"id": name, "ids": ids, "tokens": tokenizer.convert_ids_to_tokens(ids)} for name, ids in named.items()
        ],
    )
    return True


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[Text], max_length: int) -> Encoded:
    """Token ids of every row, special tokens included, none longer than `max_length`: of two texts the longer one is
    cut first.

    They are what `tokenizer([a], [b], truncation=True, max_length=max_length)` gives; only an empty text, which has no
    token there, gets one, for the classifier reads a last token.
    """
    is_pair = len(texts[0]) == 2
    specials = tokenizer.num_special_tokens_to_add(pair=is_pair)
    shortest = specials + len(texts[0])
    if max_length < shortest:
        rule = "max_length leaves at least one token for each text"
        raise DataError(
            Problem("training.max_length", rule, str(max_length), f"at least {shortest} for this tokenizer")
        )
    ids: list[np.ndarray] = []
    lengths: list[int] = []
    types: list[np.ndarray] = []
    for start in range(0, len(texts), TOKENIZE_ROWS):
        batch = texts[start : start + TOKENIZE_ROWS]
        encoded = tokenizer(*map(list, zip(*batch, strict=True)), truncation=True, max_length=max_length)
        rows = [row or [filler(tokenizer)] for row in encoded["input_ids"]]
        if "token_type_ids" in encoded:
            types.append(_flat([row or [0] for row in encoded["token_type_ids"]]))
        ids.append(_flat(rows))
        lengths += map(len, rows)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return Encoded(np.concatenate(ids), offsets, np.concatenate(types) if types else None)


def filler(tokenizer: PreTrainedTokenizerBase) -> int:
    """The one token of an empty text; padding is none."""
    choices = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.sep_token_id, tokenizer.unk_token_id)
    return int(next(token for token in choices if token is not None and token != tokenizer.pad_token_id))


def _flat(rows: Iterable[Sequence[int]]) -> np.ndarray:
    return np.fromiter(chain.from_iterable(rows), dtype=np.int32)


# --- Batches ---


def epoch_batches(lengths: np.ndarray, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """Row numbers of each step of one epoch: every row once, the same for any number of ranks.

    Rows are shuffled, sorted by length inside windows of some batches, cut, and the batches shuffled, so that the
    rows of a batch are about equally long and no batch says how far the epoch is. The smaller batch that may be left
    over comes last and holds rows of any length: sorted too, it would hold the longest ones and give them more weight.
    """
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(lengths))
    num_full = len(order) // batch_size
    full, rest = order[: num_full * batch_size], order[num_full * batch_size :]
    window = WINDOW_BATCHES * batch_size
    for start in range(0, len(full), window):
        part = full[start : start + window]
        full[start : start + window] = part[np.argsort(lengths[part], kind="stable")]
    batches = [full.reshape(num_full, batch_size)[i] for i in rng.permutation(num_full)]
    return [*batches, rest] if len(rest) else batches


def eval_batches(lengths: np.ndarray, batch_size: int) -> list[np.ndarray]:
    """Row numbers of each batch, every row once, from the shortest to the longest."""
    order = np.argsort(lengths, kind="stable")
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


WIDTH_STEP = 8


def bucket_width(max_len: int, max_length: int) -> int:
    """The width a batch is padded to: few different ones, since each costs a compiled step or new kernels."""
    return min(-(-max_len // WIDTH_STEP) * WIDTH_STEP, max_length)
