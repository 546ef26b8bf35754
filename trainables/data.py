"""From files or the hub to batches of token ids. numpy and pyarrow only: torch is never loaded here."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pcsv
import pyarrow.parquet as pq

from trainables.config import DataConfig
from trainables.errors import DataError, Problem
from trainables.glue import TASKS, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HUB_NAME = "nyu-mll/glue"
TOKENIZE_ROWS = 1024
"""Texts handed to the tokenizer at once: its answer is Python lists, 20 times the size of the arrays kept of it."""
WINDOW_BATCHES = 50
"""Batches among which rows may be exchanged to bring equal lengths together. More: less padding, less shuffling."""

Text = tuple[str, ...]
Column: TypeAlias = "pa.ChunkedArray[Any]"


# --- Texts and labels ---


@dataclass(frozen=True)
class Split:
    texts: list[Text]
    """One or two columns."""
    labels: np.ndarray
    """Class ids (int64), or scores (float32) for a regression."""

    def __len__(self) -> int:
        return len(self.texts)


@dataclass(frozen=True)
class TextData:
    """Train and validation. The test split is never opened: what chose the settings cannot judge them."""

    splits: dict[str, Split]
    label_names: tuple[str, ...]
    """Names by class id; empty for a regression."""


def read_texts(config: DataConfig) -> TextData:
    """Reads train and the validation split(s). Raises one DataError with every fault that was found."""
    task = TASKS[config.task] if config.task else None
    problems = _config_problems(config)
    if problems:
        raise DataError(problems)
    columns = task.text if task else config.text or ()
    names = ("train", *(task.validation if task else ("validation",)))
    wanted = (*columns, config.label)
    tables = _folder_tables(config.path, names, wanted, columns, problems) if config.path else _hub_tables(task, names)
    tables = {name: table for name, table in tables.items() if _has_rows(name, table, problems)}
    texts = {name: _texts(name, table, columns, task, problems) for name, table in tables.items()}
    labels, label_names = _labels(
        {name: _column(table, config.label) for name, table in tables.items()}, task, problems
    )
    for name, table in tables.items():
        if config.label not in table.column_names:
            problems.append(_unknown_columns("data.label", name, [config.label], table))
    if problems:
        raise DataError(problems)
    return TextData({name: Split(texts[name], labels[name]) for name in names}, label_names)


def _config_problems(config: DataConfig) -> list[Problem]:
    problems = []
    if config.task is None and config.path is None:
        problems.append(
            Problem(
                "data", "names a GLUE task, a folder, or both", "neither", f"task: one of {' '.join(sorted(TASKS))}"
            )
        )
    elif config.task is None and config.text is None:
        problems.append(
            Problem("data.text", "a path without a task needs its text columns", "null", "text: [COLUMN] or [A, B]")
        )
    if config.text and config.label in config.text:
        problems.append(
            Problem(
                "data.label", "the label is not one of the texts", repr(config.label), "another column than data.text"
            )
        )
    return problems


def _has_rows(split: str, table: pa.Table, problems: list[Problem]) -> bool:
    # A table in which no wanted column was found counts no rows either; that is reported as unknown columns.
    has_rows = table.num_rows > 0 or not table.column_names
    if not has_rows:
        problems.append(Problem("data.path", f"the split {split} has rows", "none", "at least one row"))
    return has_rows


def _texts(
    split: str, table: pa.Table, columns: Sequence[str], task: Task | None, problems: list[Problem]
) -> list[Text]:
    place = "data.path" if task else "data.text"
    missing = [column for column in columns if column not in table.column_names]
    if missing:
        problems.append(_unknown_columns(place, split, missing, table))
    values = []
    for column in columns:
        texts = _column(table, column)
        if texts is None:
            continue
        if texts.null_count:
            problems.append(_nulls(place, f"the text column {column!r} of {split}", texts))
        elif not pa.types.is_string(texts.type):
            problems.append(
                Problem(
                    place, f"the text column {column!r} of {split} holds text", str(texts.type), "a column of strings"
                )
            )
        else:
            values.append(texts.to_pylist())
    return list(zip(*values, strict=True))


def _labels(
    columns: Mapping[str, Column | None], task: Task | None, problems: list[Problem]
) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """Labels of each split as numbers, and the classes' names."""
    whole: dict[str, Column] = {}
    for split, labels in columns.items():
        if labels is not None and labels.null_count:
            problems.append(_nulls("data.label", f"the labels of {split}", labels))
        elif labels is not None and _right_kind(split, labels, task, problems):
            whole[split] = labels
    if task and task.is_regression:
        return {split: _scores(split, labels, problems) for split, labels in whole.items()}, ()
    if task is None and "train" not in whole:
        return {}, ()  # without train nothing says which labels there are
    return _class_ids(whole, task, problems)


def _right_kind(split: str, labels: Column, task: Task | None, problems: list[Problem]) -> bool:
    is_whole = pa.types.is_integer(labels.type)
    if task and task.is_regression:
        fits, expected = is_whole or pa.types.is_floating(labels.type), "numbers"
    else:
        fits, expected = is_whole or pa.types.is_string(labels.type), "integers or strings (only stsb has scores)"
    if not fits:
        rule = f"the labels of {split} are {'scores' if task and task.is_regression else 'classes'}"
        problems.append(Problem("data.label", rule, f"{labels.type}, such as {labels[0].as_py()!r}", expected))
    return fits


def _scores(split: str, labels: Column, problems: list[Problem]) -> np.ndarray:
    scores = labels.to_numpy().astype(np.float32)
    bad = np.flatnonzero(~np.isfinite(scores))
    if len(bad):
        found = f"{len(bad)} that are not, the first in row {bad[0] + 1}: {scores[bad[0]]}"
        problems.append(Problem("data.label", f"the scores of {split} are finite", found, "a number in every row"))
    return scores


def _class_ids(
    columns: Mapping[str, Column], task: Task | None, problems: list[Problem]
) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    ids = {}
    values: list[Any] = [] if task else sorted(columns["train"].unique().to_pylist())
    for split, labels in columns.items():
        if task:  # GLUE's own files hold the ids, other copies the names
            values = list(task.labels) if pa.types.is_string(labels.type) else list(range(len(task.labels)))
        same_kind = pa.array(values).type == labels.type
        found = pc.index_in(labels, pa.array(values)).to_numpy() if same_kind else np.full(len(labels), np.nan)
        unknown = np.isnan(found)  # pyarrow's null
        if unknown.any():
            problems.append(_unknown_labels(split, labels.filter(pa.array(unknown)), values))
        ids[split] = np.where(unknown, -1, found).astype(np.int64)
        if split == "train" and len(np.unique(ids[split])) < 2 and not unknown.any():
            only = f"only {labels[0].as_py()!r}, in all {len(labels)} rows"
            problems.append(Problem("data.label", "train has at least two classes", only, "rows of another class"))
    return ids, task.labels if task else tuple(str(value) for value in values)


def _unknown_labels(split: str, labels: Column, known: Sequence[object]) -> Problem:
    unknown = labels.unique().to_pylist()
    hidden = " (-1 marks the hidden labels of a test split)" if -1 in unknown else ""
    return Problem(
        "data.label",
        f"every label of {split} is one of the task's or of train's classes",
        f"{_some(unknown)} in {len(labels)} rows{hidden}",
        _some(known),
    )


def _unknown_columns(place: str, split: str, missing: Sequence[str], table: pa.Table) -> Problem:
    found = f"{split} has no {_some(missing)}"
    return Problem(place, "the columns exist in every split", found, f"some of {_some(_all_columns(table))}")


def _nulls(place: str, what: str, column: Column) -> Problem:
    first = int(np.flatnonzero(column.is_null().to_numpy())[0]) + 1
    found = f"{column.null_count} rows without one, the first is row {first}"
    return Problem(place, f"{what} has a value in every row", found, "no nulls")


def _some(values: Sequence[object], most: int = 20) -> str:
    """The values for a message, without flooding it."""
    shown = ", ".join(str(value)[:80] for value in values[:most])
    return f"{shown}, and {len(values) - most} more" if len(values) > most else shown


def _column(table: pa.Table, name: str) -> Column | None:
    """A column with its storage tricks undone: categories are values, every kind of string is `string`."""
    if name not in table.column_names:
        return None
    column = table[name]
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if (
        pa.types.is_large_string(column.type)
        or pa.types.is_string_view(column.type)
        or pa.types.is_boolean(column.type)
    ):
        return column.cast(pa.string())
    return column.cast(pa.int64()) if pa.types.is_integer(column.type) else column


# --- Files and the hub ---

_UNREADABLE = (OSError, ValueError, pa.ArrowException)  # UnicodeError and JSONDecodeError are ValueErrors


def _folder_tables(
    path: str, names: Sequence[str], wanted: Sequence[str], texts: Sequence[str], problems: list[Problem]
) -> dict[str, pa.Table]:
    folder = Path(path).expanduser()
    if not folder.is_dir():
        found = f"{folder} is a file" if folder.exists() else f"{folder} does not exist"
        problems.append(Problem("data.path", "the data is a folder", found, "a folder with train and validation files"))
        return {}
    tables = {}
    for name in names:
        try:
            parts = [_read_file(file, wanted, texts) for file in _split_files(folder, name)]
            tables[name] = pa.concat_tables(parts, promote_options="permissive")
        except DataError as error:
            problems.extend(error.problems)
        except pa.ArrowException as error:
            problems.append(
                Problem("data.path", f"the parts of {name} have the same columns", str(error), "equal column types")
            )
    return tables


def _split_files(folder: Path, name: str) -> list[Path]:
    """The file of a split, or its shards in order; in the folder itself or in its `data`. Else raises DataError."""
    pattern = re.compile(rf"{re.escape(name)}(?:-(\d{{5}})-of-(\d{{5}}))?(?:-\w+)?\.(parquet|csv|jsonl)")
    found: dict[tuple[Path, str, str], list[Path]] = {}
    files = sorted(file for place in (folder, folder / "data") if place.is_dir() for file in place.iterdir())
    for file in files:
        match = pattern.fullmatch(file.name)
        if match and file.is_file():
            found.setdefault((file.parent, match[3], match[2] or ""), []).append(file)
    there = _some([str(file.relative_to(folder)) for file in files]) or "nothing"
    if not found:
        expected = f"{name}.parquet, {name}.csv or {name}.jsonl"
        raise DataError(Problem("data.path", f"{folder} holds the split {name}", f"only {there}", expected))
    if len(found) > 1:
        raise DataError(Problem("data.path", f"{folder} holds the split {name} once", there, f"one file for {name}"))
    (((_, _, shards), parts),) = found.items()
    if shards and len(parts) != int(shards):
        raise DataError(
            Problem(
                "data.path", f"every shard of {name} is there", f"{len(parts)} of {int(shards)}", f"{int(shards)} files"
            )
        )
    return parts


def _read_file(file: Path, wanted: Sequence[str], texts: Sequence[str]) -> pa.Table:
    """The wanted columns of one file, as far as it has them. The others are named in the table's metadata."""
    try:
        match file.suffix:
            case ".parquet":
                names = pq.read_schema(file).names
                table = pq.read_table(file, columns=[name for name in names if name in wanted])
            case ".csv":
                table = _read_csv(file, texts)
                names = table.column_names
                table = table.select([name for name in names if name in wanted])
            case _:
                table, names = _read_jsonl(file, wanted)
    except _UNREADABLE as error:
        found = f"{type(error).__name__}: {str(error)[:300]}"
        raise DataError(
            Problem("data.path", f"{file} can be read", found, f"a whole {file.suffix[1:]} file")
        ) from error
    return table.replace_schema_metadata({"columns": json.dumps(names)})


def _all_columns(table: pa.Table) -> list[str]:
    metadata = table.schema.metadata or {}
    return list(json.loads(metadata[b"columns"])) if b"columns" in metadata else table.column_names


def _read_csv(file: Path, texts: Sequence[str]) -> pa.Table:
    return pcsv.read_csv(
        file,
        parse_options=pcsv.ParseOptions(newlines_in_values=True),
        # A text is a text even where every row looks like a number; an empty field is an empty text.
        convert_options=pcsv.ConvertOptions(column_types=dict.fromkeys(texts, pa.string())),
    )


def _read_jsonl(file: Path, wanted: Sequence[str]) -> tuple[pa.Table, list[str]]:
    """One JSON object a line. Not pyarrow's reader: it turns texts that look like dates into dates."""
    names: dict[str, None] = {}
    columns: dict[str, list[Any]] = {name: [] for name in wanted}
    with file.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"line {number}: {error}") from error
            if not isinstance(row, dict):
                raise ValueError(f"line {number} is not an object")
            names |= dict.fromkeys(row)
            for name, values in columns.items():
                values.append(row.get(name))
    return pa.table({name: pa.array(values) for name, values in columns.items() if name in names}), list(names)


def _hub_tables(task: Task | None, names: Sequence[str]) -> dict[str, pa.Table]:
    assert task is not None, "without a path there is a task"
    try:
        from datasets import load_dataset  # seconds to import, and needed only here

        splits = load_dataset(HUB_NAME, task.name, split=list(names))
    # Whatever the network, the hub or its cache raises, the way out is the same.
    except Exception as error:
        found = f"{type(error).__name__}: {str(error)[:300]}"
        expected = "a network, a cache filled before, or data.path with the task's files"
        rule = f"{HUB_NAME} ({task.name}) can be had from the hub"
        raise DataError(Problem("data.task", rule, found, expected)) from error
    return {name: split.with_format("arrow")[:] for name, split in zip(names, splits, strict=True)}


# --- Tokens ---


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

    def row(self, index: int) -> list[int]:
        return [int(token) for token in self.ids[self.offsets[index] : self.offsets[index + 1]]]


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[Text], max_length: int) -> Encoded:
    """Token ids of every row, special tokens included, none longer than `max_length`.

    Two texts become what the tokenizer was made for: its own template where that separates them (BERT), else
    A [SEP] B, since GPT-2 and Llama would run the last word of A into the first of B. The longer one is cut first.
    """
    is_pair = len(texts[0]) == 2
    joins = is_pair and tokenizer.sep_token_id not in tokenizer("a", "b")["input_ids"]
    edges = _edges(tokenizer) if joins else ([], [])
    specials = len(edges[0]) + len(edges[1]) + 1 if joins else tokenizer.num_special_tokens_to_add(pair=is_pair)
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
        if joins:
            rows = list(_join_pairs(tokenizer, batch, max_length, edges))
        else:
            encoded = tokenizer(*map(list, zip(*batch, strict=True)), truncation=True, max_length=max_length)
            rows = [row or [_filler(tokenizer)] for row in encoded["input_ids"]]
            if "token_type_ids" in encoded:
                types.append(_flat(encoded["token_type_ids"]))
        ids.append(_flat(rows))
        lengths += map(len, rows)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return Encoded(np.concatenate(ids), offsets, np.concatenate(types) if types else None)


def _join_pairs(
    tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Text], max_length: int, edges: tuple[list[int], list[int]]
) -> Iterator[list[int]]:
    prefix, suffix = edges
    separator = tokenizer.sep_token_id
    assert separator is not None, "load_tokenizer gives a tokenizer without a separator one"
    budget = max_length - len(prefix) - len(suffix) - 1
    firsts, seconds = (
        tokenizer(list(column), add_special_tokens=False, truncation=True, max_length=budget)["input_ids"]
        for column in zip(*pairs, strict=True)
    )
    for a, b in zip(firsts, seconds, strict=True):
        keep = max(budget - len(b), (budget + 1) // 2)
        a = a[:keep]
        yield [*prefix, *a, separator, *b[: budget - len(a)], *suffix]


def _edges(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before and after one text, such as Llama's BOS."""
    whole, bare = tokenizer("a")["input_ids"], tokenizer("a", add_special_tokens=False)["input_ids"]
    start = next(i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)
    return whole[:start], whole[start + len(bare) :]


def _filler(tokenizer: PreTrainedTokenizerBase) -> int:
    """The one token of an empty text: the classifier needs a last token to read, and padding is none."""
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


def bucket_width(max_len: int, max_length: int, step: int = 8) -> int:
    """The width a batch is padded to: few different ones, since each costs a compiled step or new kernels."""
    return min(-(-max_len // step) * step, max_length)


def pad(encoded: Encoded, rows: np.ndarray, pad_id: int, width: int) -> dict[str, np.ndarray]:
    """One batch as int64 arrays (rows, width), padded on the right."""
    starts = encoded.offsets[rows]
    lengths = encoded.offsets[rows + 1] - starts  # not encoded.lengths, which looks at every row
    assert lengths.max() <= width, "a batch is at least as wide as its longest row"
    positions = np.arange(width)
    real = positions < lengths[:, None]
    # Positions beyond a row's end point at its first token, which the mask then replaces.
    index = starts[:, None] + np.where(real, positions, 0)
    batch = {
        "input_ids": np.where(real, encoded.ids[index], pad_id).astype(np.int64),
        "attention_mask": real.astype(np.int64),
    }
    if encoded.token_type_ids is not None:
        batch["token_type_ids"] = np.where(real, encoded.token_type_ids[index], 0).astype(np.int64)
    return batch
