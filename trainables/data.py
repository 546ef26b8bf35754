"""From a folder or the hub to checked texts and labels. numpy and pyarrow only: torch is never loaded here."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa

from trainables.config import DataConfig
from trainables.errors import DataError, Problem
from trainables.glue import TASKS, Task
from trainables.tables import all_columns, folder_tables, hub_tables, is_untyped, some

_WHOLE = re.compile(r"0|-?[1-9][0-9]{0,18}")
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
_NO_VALUE = {"", "NA", "N/A", "#N/A", "NaN", "nan", "null", "NULL", "None"}
"""Fields of a csv file; those with letters only where all others are numbers."""
Text = tuple[str, ...]
Column: TypeAlias = "pa.ChunkedArray[Any]"


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
    has_classes = not (task and task.is_regression)
    as_strings = wanted if has_classes else columns
    tables = folder_tables(config.path, names, wanted, as_strings, problems) if config.path else hub_tables(task, names)
    tables = {name: table for name, table in tables.items() if _has_rows(name, table, problems)}
    texts = {name: _texts(name, table, columns, task, problems) for name, table in tables.items()}
    columns_of_labels = {name: _column(table, config.label) for name, table in tables.items()}
    if has_classes:
        untyped = {name for name, table in tables.items() if is_untyped(table)}
        _type_labels(columns_of_labels, untyped, task, problems)
    labels, label_names = _labels(columns_of_labels, task, problems)
    for name, table in tables.items():
        if config.label not in table.column_names:
            problems.append(_unknown_columns("data.label", name, [config.label], table))
    if problems:
        raise DataError(problems)
    return TextData({name: Split(texts[name], labels[name]) for name in names}, label_names)


def _config_problems(config: DataConfig) -> list[Problem]:
    problems = []
    if config.task is None and config.path is None:
        expected = f"task: one of {' '.join(sorted(TASKS))}"
        problems.append(Problem("data", "names a GLUE task, a folder, or both", "neither", expected))
    elif config.task is None and config.text is None:
        rule = "a path without a task needs its text columns"
        problems.append(Problem("data.text", rule, "null", "text: [COLUMN] or [A, B]"))
    if config.text and config.label in config.text:
        rule = "the label is not one of the texts"
        problems.append(Problem("data.label", rule, repr(config.label), "another column than data.text"))
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
            rule = f"the text column {column!r} of {split} holds text"
            problems.append(Problem(place, rule, str(texts.type), "a column of strings"))
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


def _type_labels(
    columns: dict[str, Column | None], untyped: set[str], task: Task | None, problems: list[Problem]
) -> None:
    """Labels from csv files are numbers where all are whole numbers, as one writes them; else texts, to the letter.

    007 and 7 are two classes. Of data of the user's own all splits are alike; those of a task may differ.
    """
    found: dict[str, list[str | None]] = {}
    for split, labels in columns.items():
        if labels is None or split not in untyped:
            continue
        found[split] = [text and text.strip() for text in labels.to_pylist()]
        if problem := _no_labels(split, found[split]):
            problems.append(problem)
            columns[split] = None
            del found[split]
    are_whole = {split: all(map(_is_whole, set(texts))) for split, texts in found.items()}
    if task is None:
        others = [labels for split, labels in columns.items() if labels is not None and split not in untyped]
        is_whole = all(are_whole.values()) and all(pa.types.is_integer(labels.type) for labels in others)
        are_whole = dict.fromkeys(found, is_whole)
    for split, texts in found.items():
        labels = columns[split]
        assert labels is not None
        if texts != labels.to_pylist():
            labels = pa.chunked_array([pa.array(texts, pa.string())])
        columns[split] = labels.cast(pa.int64()) if are_whole[split] else labels


def _no_labels(split: str, texts: Sequence[str | None]) -> Problem | None:
    """What keeps the fields of a csv file from being labels of classes."""
    known = [text for text in texts if text is not None and text not in _NO_VALUE]
    are_numbers = bool(known) and all(map(_NUMBER.fullmatch, known))
    missing = [row for row, text in enumerate(texts, 1) if text == "" or (are_numbers and text in _NO_VALUE)]
    if missing:
        found = f"{len(missing)} rows without one, the first is row {missing[0]}"
        return Problem("data.label", f"each row of {split} has a label", found, "a label in each row")
    score = next((text for text in known if not text.isdigit() and not _is_whole(text)), None)
    if score is None or not are_numbers:
        return None
    expected = "integers or strings (only stsb has scores)"
    return Problem("data.label", f"the labels of {split} are classes", f"numbers such as {score}", expected)


def _is_whole(text: str | None) -> bool:
    return text is not None and bool(_WHOLE.fullmatch(text)) and -(2**63) <= int(text) < 2**63


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
        # Not by `pa.array`, which would import pandas: that takes a rank a quarter of a second.
        numbers = {value: number for number, value in enumerate(values)}
        ids[split] = np.array([numbers.get(label, -1) for label in labels.to_pylist()], dtype=np.int64)
        unknown = ids[split] < 0
        if unknown.any():
            problems.append(_unknown_labels(split, labels.filter(pa.array(unknown)), values))
        if split == "train" and len(np.unique(ids[split])) < 2 and not unknown.any():
            only = f"only {labels[0].as_py()!r}, in all {len(labels)} rows"
            problems.append(Problem("data.label", "train has at least two classes", only, "rows of another class"))
    return ids, task.labels if task else tuple(str(value) for value in values)


def _unknown_labels(split: str, labels: Column, known: Sequence[object]) -> Problem:
    unknown = labels.unique().to_pylist()
    hidden = " (-1 marks the hidden labels of a test split)" if {-1, "-1"} & set(unknown) else ""
    return Problem(
        "data.label",
        f"every label of {split} is one of the task's or of train's classes",
        f"{some(unknown)} in {len(labels)} rows{hidden}",
        some(known),
    )


def _unknown_columns(place: str, split: str, missing: Sequence[str], table: pa.Table) -> Problem:
    found = f"{split} has no {some(missing)}"
    return Problem(place, "the columns exist in every split", found, f"some of {some(all_columns(table))}")


def _nulls(place: str, what: str, column: Column) -> Problem:
    first = int(np.flatnonzero(column.is_null().to_numpy())[0]) + 1
    found = f"{column.null_count} rows without one, the first is row {first}"
    return Problem(place, f"{what} has a value in every row", found, "no nulls")


def _column(table: pa.Table, name: str) -> Column | None:
    """A column with its storage tricks undone: categories are values, every kind of string is `string`."""
    if name not in table.column_names:
        return None
    column = table[name]
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    kinds = (pa.types.is_large_string, pa.types.is_string_view, pa.types.is_boolean)
    if any(is_kind(column.type) for is_kind in kinds):
        return column.cast(pa.string())
    return column
