"""The splits of a data set as Arrow tables: from a folder of parquet, csv or jsonl files, or from the hub."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv as pcsv
import pyarrow.parquet as pq

from trainables.config import DataConfig
from trainables.errors import DataError, Problem
from trainables.glue import TASKS, Task
from trainables.model_files import HUB_TIMEOUT_S

HUB_NAME = "nyu-mll/glue"
MOST_SHOWN = 20
CSV_BLOCK_BYTES = 1 << 26
"""A row has to fit into one."""

# UnicodeError and JSONDecodeError are ValueErrors.
_UNREADABLE = (OSError, ValueError, OverflowError, pa.ArrowException)


def folder_tables(
    path: str, names: Sequence[str], wanted: Sequence[str], as_strings: Sequence[str], problems: list[Problem]
) -> dict[str, pa.Table]:
    """The wanted columns of each split that can be read; what is wrong goes to `problems`.

    Columns of a csv file have no type: `as_strings` are read as they are written there.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        found = f"{folder} is a file" if folder.exists() else f"{folder} does not exist"
        problems.append(Problem("data.path", "the data is a folder", found, "a folder with train and validation files"))
        return {}
    tables = {}
    for name in names:
        try:
            parts = [_read_file(file, wanted, as_strings) for file in _split_files(folder, name)]
            tables[name] = pa.concat_tables(parts, promote_options="permissive")
        except DataError as error:
            problems.extend(error.problems)
        except PermissionError as error:
            rule = "the data is a folder that can be read"
            problems.append(Problem("data.path", rule, str(error), "a folder that this user may read"))
            break  # the same again for each split
        except pa.ArrowException as error:
            rule = f"the parts of {name} have the same columns"
            problems.append(Problem("data.path", rule, str(error), "equal column types"))
    return tables


def _split_files(folder: Path, name: str) -> list[Path]:
    """The file of a split, or its shards in order; in the folder itself or in its `data`. Else raises DataError."""
    # The hub put a hash behind the numbers of a shard.
    pattern = re.compile(rf"{re.escape(name)}(?:-(\d{{5}})-of-(\d{{5}})(?:-\w+)?)?\.(parquet|csv|jsonl)")
    found: dict[tuple[Path, str, str], list[tuple[int, Path]]] = {}
    files = sorted(file for place in (folder, folder / "data") if place.is_dir() for file in place.iterdir())
    for file in files:
        match = pattern.fullmatch(file.name)
        if match and file.is_file():
            found.setdefault((file.parent, match[3], match[2] or "1"), []).append((int(match[1] or 0), file))
    there = some([str(file.relative_to(folder)) for file in files]) or "nothing"
    if not found:
        expected = f"{name}.parquet, {name}.csv or {name}.jsonl"
        raise DataError(Problem("data.path", f"{folder} holds the split {name}", f"only {there}", expected))
    if len(found) > 1:
        raise DataError(Problem("data.path", f"{folder} holds the split {name} once", there, f"one file for {name}"))
    (((_, _, shards), parts),) = found.items()
    if [number for number, _ in parts] != list(range(int(shards))):
        counted = f"{len(parts)} of {int(shards)}" if len(parts) != int(shards) else there
        expected = f"{int(shards)} files, numbered from 0"
        raise DataError(Problem("data.path", f"every shard of {name} is there once", counted, expected))
    return [file for _, file in parts]


def _read_file(file: Path, wanted: Sequence[str], as_strings: Sequence[str]) -> pa.Table:
    """The wanted columns of one file, as far as it has them. The others are named in the table's metadata."""
    try:
        match file.suffix:
            case ".parquet":
                with pq.ParquetFile(file) as parquet:  # `read_table` would import pandas
                    names = parquet.schema_arrow.names
                    _check_single(names, wanted, file)
                    table = parquet.read(columns=[name for name in names if name in wanted])
            case ".csv":
                table = _read_csv(file, as_strings)
                names = table.column_names
                _check_single(names, wanted, file)
                table = table.select([name for name in names if name in wanted])
            case _:
                table, names = _read_jsonl(file, wanted)
    except _UNREADABLE as error:
        found, expected = f"{type(error).__name__}: {str(error)[:300]}", f"a whole {file.suffix[1:]} file"
        raise DataError(Problem("data.path", f"{file} can be read", found, expected)) from error
    return table.replace_schema_metadata({"columns": json.dumps(names), "suffix": file.suffix})


def is_untyped(table: pa.Table) -> bool:
    """Whether the split was read from csv files."""
    return (table.schema.metadata or {}).get(b"suffix") == b".csv"


def _check_single(names: Sequence[str], wanted: Sequence[str], file: Path) -> None:
    """DataError where two columns have the name of a wanted one."""
    for name in wanted:
        if names.count(name) > 1:
            rule = f"{file} has one column {name!r}"
            raise DataError(
                Problem("data.path", rule, f"{names.count(name)} of that name", "another name for the others")
            )


def all_columns(table: pa.Table) -> list[str]:
    """Names of the columns of a split, also of those that nobody wanted."""
    metadata = table.schema.metadata or {}
    return list(json.loads(metadata[b"columns"])) if b"columns" in metadata else table.column_names


def _read_csv(file: Path, as_strings: Sequence[str]) -> pa.Table:
    return pcsv.read_csv(
        file,
        read_options=pcsv.ReadOptions(block_size=CSV_BLOCK_BYTES),
        parse_options=pcsv.ParseOptions(newlines_in_values=True),
        # A text is a text even where every row looks like a number or a date; an empty field is an empty text.
        convert_options=pcsv.ConvertOptions(column_types=dict.fromkeys(as_strings, pa.string())),
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


def hub_tables(task: Task | None, names: Sequence[str]) -> dict[str, pa.Table]:
    """Every split of a GLUE task. Raises DataError when the hub cannot be reached."""
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


def check_reachable(config: DataConfig) -> list[Problem]:
    """What keeps a machine from reading the data, as far as that shows without reading it."""
    if config.path is not None:
        folder = Path(config.path).expanduser()
        rule = "the data is a folder"
        return [] if folder.is_dir() else [Problem("data.path", rule, f"no folder {folder}", "the folder, there too")]
    from huggingface_hub import HfApi, constants

    name = TASKS[str(config.task)].name
    try:
        if constants.HF_HUB_OFFLINE:
            raise ConnectionError("the hub is switched off (HF_HUB_OFFLINE)")
        HfApi().dataset_info(HUB_NAME, timeout=HUB_TIMEOUT_S)
    except Exception as error:  # every way in which a network can fail means the same here
        from datasets import config as places

        if any(Path(places.HF_DATASETS_CACHE).glob(f"{HUB_NAME.replace('/', '___')}/{name}/*/*")):
            return []
        found = f"{type(error).__name__}: {str(error)[:200]}"
        rule = f"{HUB_NAME} ({name}) is in the cache, or the hub can be reached"
        return [Problem("data.task", rule, found, "a network, or data.path with the task's files")]
    return []


def some(values: Sequence[object]) -> str:
    """The values for a message, without flooding it."""
    shown = ", ".join(str(value)[:80] for value in values[:MOST_SHOWN])
    return f"{shown}, and {len(values) - MOST_SHOWN} more" if len(values) > MOST_SHOWN else shown
