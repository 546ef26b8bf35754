"""Reading data, and what is wrong with it, on files small enough to check by eye."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.csv as pcsv
import pyarrow.parquet as pq
import pytest

from trainables.config import DataConfig
from trainables.data import read_texts
from trainables.errors import DataError, Problem


def write(folder: Path, split: str = "train", suffix: str = "parquet", **columns: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{split}.{suffix}"
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    if suffix == "parquet":
        pq.write_table(pa.table(columns), file)
    elif suffix == "jsonl":
        file.write_text("\n".join(json.dumps(row) for row in rows))
    else:
        lines = [",".join(columns), *(",".join(str(value) for value in row.values()) for row in rows)]
        file.write_text("\n".join(lines))


def both(folder: Path, **columns: Any) -> Path:
    write(folder, "train", **columns)
    write(folder, "validation", **columns)
    return folder


def own(folder: Path, *text: str, label: str = "label") -> DataConfig:
    return DataConfig(path=str(folder), text=text or ("text",), label=label)


def problems_of(config: DataConfig) -> list[Problem]:
    with pytest.raises(DataError) as caught:
        read_texts(config)
    return list(caught.value.problems)


# --- Reading ---


@pytest.mark.parametrize("suffix", ["parquet", "csv", "jsonl"])
def test_every_format_gives_the_same_rows_even_where_texts_look_like_numbers_or_dates(
    tmp_path: Path, suffix: str
) -> None:
    for split in ("train", "validation"):
        write(tmp_path, split, suffix, one=["2020-01-02", "2020-01-01"], two=["12", "7.0"], label=[1, 0])
    data = read_texts(own(tmp_path, "one", "two"))
    assert list(data.splits) == ["train", "validation"]
    assert data.splits["train"].texts == [("2020-01-02", "12"), ("2020-01-01", "7.0")]
    assert data.splits["train"].labels.tolist() == [1, 0]
    assert data.splits["train"].labels.dtype == np.int64


def test_a_glue_task_knows_its_columns_and_class_names(tmp_path: Path) -> None:
    both(tmp_path, sentence1=["p", "q"], sentence2=["r", "s"], label=[1, 0], idx=[7, 8])
    data = read_texts(DataConfig(task="mrpc", path=str(tmp_path)))
    assert data.splits["validation"].texts == [("p", "r"), ("q", "s")]
    assert data.label_names == ("not_equivalent", "equivalent")


def test_a_glue_task_also_takes_its_class_names_as_labels(tmp_path: Path) -> None:
    both(tmp_path, sentence1=["p", "q"], sentence2=["r", "s"], label=["not_entailment", "entailment"])
    assert read_texts(DataConfig(task="rte", path=str(tmp_path))).splits["train"].labels.tolist() == [1, 0]


def test_mnli_reads_both_validation_splits(tmp_path: Path) -> None:
    columns: dict[str, Any] = {"premise": ["p", "q"], "hypothesis": ["r", "s"], "label": [2, 0]}
    for split in ("train", "validation_matched", "validation_mismatched"):
        write(tmp_path, split, **columns)
    data = read_texts(DataConfig(task="mnli", path=str(tmp_path)))
    assert list(data.splits) == ["train", "validation_matched", "validation_mismatched"]


def test_stsb_has_float_scores_and_no_class_names(tmp_path: Path) -> None:
    both(tmp_path, sentence1=["p", "q"], sentence2=["r", "s"], label=[4.5, 0.0])
    data = read_texts(DataConfig(task="stsb", path=str(tmp_path)))
    assert data.splits["train"].labels.dtype == np.float32
    assert data.splits["train"].labels.tolist() == [4.5, 0.0]
    assert data.label_names == ()


def test_string_labels_are_numbered_in_sorted_order_of_the_train_split(tmp_path: Path) -> None:
    write(tmp_path, "train", text=["p", "q", "r"], label=["spam", "ham", "eggs"])
    write(tmp_path, "validation", text=["p"], label=["ham"])
    data = read_texts(own(tmp_path))
    assert data.label_names == ("eggs", "ham", "spam")
    assert data.splits["train"].labels.tolist() == [2, 1, 0]
    assert data.splits["validation"].labels.tolist() == [1]


def test_integer_labels_are_numbered_in_the_order_of_numbers(tmp_path: Path) -> None:
    both(tmp_path, text=["p", "q", "r"], label=[10, 9, -1])
    data = read_texts(own(tmp_path))
    assert data.label_names == ("-1", "9", "10")
    assert data.splits["train"].labels.tolist() == [2, 1, 0]


def test_categories_large_strings_and_booleans_are_read_as_what_they_mean(tmp_path: Path) -> None:
    texts = pa.array(["p", "q"], type=pa.large_string())
    both(tmp_path, text=texts, kind=pa.array(["x", "w"]).dictionary_encode(), flag=[True, False])
    assert read_texts(own(tmp_path, label="kind")).label_names == ("w", "x")
    assert read_texts(own(tmp_path, label="flag")).label_names == ("false", "true")


def test_shards_under_data_are_read_in_order(tmp_path: Path) -> None:
    write(tmp_path / "data", "train-00001-of-00002", text=["c"], label=[1])
    write(tmp_path / "data", "train-00000-of-00002", text=["a", "b"], label=[0, 0])
    write(tmp_path / "data", "validation-00000-of-00001", text=["d"], label=[0])
    assert read_texts(own(tmp_path)).splits["train"].texts == [("a",), ("b",), ("c",)]


def test_the_test_split_is_never_opened(tmp_path: Path) -> None:
    both(tmp_path, text=["p", "q"], label=[0, 1])
    (tmp_path / "test.parquet").write_bytes(b"not a parquet file")
    assert list(read_texts(own(tmp_path)).splits) == ["train", "validation"]


def test_a_csv_keeps_quotes_line_breaks_and_empty_texts(tmp_path: Path) -> None:
    content = 'text,label\n"one, ""two""\nthree",0\n,1\nNA,1\n'
    for split in ("train", "validation"):
        (tmp_path / f"{split}.csv").write_text(content)
    assert read_texts(own(tmp_path)).splits["train"].texts == [('one, "two"\nthree',), ("",), ("NA",)]


# --- Faults ---


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    (problem,) = problems_of(own(tmp_path / "nowhere"))
    assert problem.place == "data.path"
    assert problem.found == f"{tmp_path / 'nowhere'} does not exist"


def test_a_missing_split_is_reported_with_the_files_that_are_there(tmp_path: Path) -> None:
    write(tmp_path, "train", text=["p", "q"], label=[0, 1])
    write(tmp_path, "dev", text=["p", "q"], label=[0, 1])
    (problem,) = problems_of(own(tmp_path))
    assert "validation" in problem.rule
    assert problem.found == "only dev.parquet, train.parquet"


def test_a_split_in_two_formats_is_refused_as_ambiguous(tmp_path: Path) -> None:
    both(tmp_path, text=["p", "q"], label=[0, 1])
    write(tmp_path, "train", "csv", text=["p", "q"], label=[0, 1])
    (problem,) = problems_of(own(tmp_path))
    assert problem.rule.endswith("holds the split train once")


def test_a_missing_shard_is_counted(tmp_path: Path) -> None:
    write(tmp_path, "train-00000-of-00003", text=["p", "q"], label=[0, 1])
    write(tmp_path, "validation", text=["p"], label=[0])
    (problem,) = problems_of(own(tmp_path))
    assert problem.found == "1 of 3"


@pytest.mark.parametrize(
    ("train", "validation", "classes"),
    [
        (["007", "7", "8"], ["7"], ("007", "7", "8")),  # two classes, not one
        (["True", "False"], ["True"], ("False", "True")),  # as they are written
        (["0", "1", "unknown"], ["0", "1"], ("0", "1", "unknown")),
        (["2020-01-01", "2020-01-02"], ["2020-01-01"], ("2020-01-01", "2020-01-02")),
        (["v1.0", "v1.10"], ["v1.10"], ("v1.0", "v1.10")),
        (["pos ", " neg"], ["neg"], ("neg", "pos")),
        (["yes", "NA"], ["NA"], ("NA", "yes")),
        (["nan", "inf"], ["inf"], ("inf", "nan")),
        (["10", "9", "-1"], ["9"], ("-1", "9", "10")),  # numbers, in their order
    ],
)
def test_classes_in_a_csv_file_are_what_is_written_there(
    train: list[str], validation: list[str], classes: tuple[str, ...], tmp_path: Path
) -> None:
    write(tmp_path, "train", "csv", text=train, label=train)
    write(tmp_path, "validation", "csv", text=validation, label=validation)
    data = read_texts(own(tmp_path))
    assert data.label_names == classes
    for split in data.splits.values():
        assert [(classes[label],) for label in split.labels] == [(text.strip(),) for (text,) in split.texts]


def test_shards_of_a_csv_file_need_not_look_alike(tmp_path: Path) -> None:
    write(tmp_path, "train-00000-of-00002", "csv", text=["p", "q"], label=["1", "0"])
    write(tmp_path, "train-00001-of-00002", "csv", text=["r"], label=["maybe"])
    write(tmp_path, "validation", "csv", text=["p"], label=["1"])
    data = read_texts(own(tmp_path))
    assert (data.label_names, data.splits["train"].labels.tolist()) == (("0", "1", "maybe"), [1, 0, 2])


@pytest.mark.parametrize("other", [["0", "1"], [0, 1]])
def test_numbers_in_a_csv_file_are_what_the_other_split_has(other: list[Any], tmp_path: Path) -> None:
    write(tmp_path, "train", "csv", text=["p", "q"], label=[1, 0])
    write(tmp_path, "validation", "parquet", text=["p", "q"], label=other)
    assert read_texts(own(tmp_path)).splits["validation"].labels.tolist() == [0, 1]


@pytest.mark.parametrize("labels", [["a", "", ""], ["1", "NA", "nan"]])
def test_an_empty_label_in_a_csv_file_is_none(labels: list[str], tmp_path: Path) -> None:
    write(tmp_path, "train", "csv", text=["p", "q", "r"], label=labels)
    write(tmp_path, "validation", "csv", text=["p"], label=labels[:1])
    (problem,) = problems_of(own(tmp_path))
    assert problem.found == "2 rows without one, the first is row 2"


def test_scores_in_a_csv_file_are_no_classes(tmp_path: Path) -> None:
    for split in ("train", "validation"):
        write(tmp_path, split, "csv", text=["p", "q"], label=["1", "0.5"])
    assert [problem.found for problem in problems_of(own(tmp_path))] == ["numbers such as 0.5"] * 2


def test_the_splits_of_a_task_in_csv_files_may_have_ids_or_names(tmp_path: Path) -> None:
    mrpc = DataConfig(task="mrpc", path=str(tmp_path))
    texts = {"sentence1": ["p", "q"], "sentence2": ["r", "s"]}
    write(tmp_path, "train", "csv", **texts, label=["0", "1"])
    write(tmp_path, "validation", "csv", **texts, label=["equivalent", "not_equivalent"])
    assert [split.labels.tolist() for split in read_texts(mrpc).splits.values()] == [[0, 1], [1, 0]]
    write(tmp_path, "train", "csv", **texts, label=["0", ""])
    write(tmp_path, "validation", "csv", **texts, label=["1", "-1"])
    missing, hidden = problems_of(mrpc)
    assert missing.found == "1 rows without one, the first is row 2"
    assert hidden.found == "-1 in 1 rows (-1 marks the hidden labels of a test split)"


def test_scores_in_a_csv_file_are_numbers(tmp_path: Path) -> None:
    columns = {"sentence1": ["p", "q"], "sentence2": ["r", "s"], "label": ["3", "4.25"]}
    write(tmp_path, "train", "csv", **columns)
    write(tmp_path, "validation", "csv", **columns)
    assert read_texts(DataConfig(task="stsb", path=str(tmp_path))).splits["train"].labels.tolist() == [3.0, 4.25]


def test_a_file_of_another_name_is_not_a_part_of_a_split(tmp_path: Path) -> None:
    both(tmp_path, text=["p", "q"], label=[0, 1])
    write(tmp_path, "train-backup", text=["x"] * 10, label=[0] * 10)
    write(tmp_path, "validation-old", text=["x"] * 10, label=[0] * 10)
    assert [len(split) for split in read_texts(own(tmp_path)).splits.values()] == [2, 2]


def test_a_shard_that_is_there_twice_does_not_make_up_for_another(tmp_path: Path) -> None:
    write(tmp_path, "validation", text=["p"], label=[0])
    for name in ("aa", "bb"):  # as the hub named them for a while
        write(tmp_path, f"train-00000-of-00002-{name}", text=["p", "q"], label=[0, 1])
    (problem,) = problems_of(own(tmp_path))
    assert "every shard of train is there once" in problem.rule
    assert "train-00000-of-00002-bb.parquet" in problem.found


def test_large_rows_and_large_numbers_are_read(tmp_path: Path) -> None:
    long = "x" * 3_000_000
    write(tmp_path, "train", "csv", text=[long, "q"], label=[0, 1])
    write(tmp_path, "validation", "csv", text=["p"], label=[0])
    assert read_texts(own(tmp_path)).splits["train"].texts[0] == (long,)
    for split in ("train", "validation"):
        labels = pa.array([2**63 + 1, 3], pa.uint64())
        (tmp_path / f"{split}.csv").unlink()
        pq.write_table(pa.table({"text": ["p", "q"], "label": labels}), tmp_path / f"{split}.parquet")
    assert read_texts(own(tmp_path)).label_names == ("3", str(2**63 + 1))


def test_a_number_that_no_column_holds_is_told(tmp_path: Path) -> None:
    write(tmp_path, "train", "jsonl", text=["p", "q"], label=[10**30, 1])
    write(tmp_path, "validation", "jsonl", text=["p"], label=[1])
    problem = problems_of(own(tmp_path))[0]
    assert "train.jsonl can be read" in problem.rule and "too large" in problem.found


@pytest.mark.parametrize("suffix", ["parquet", "csv"])
def test_two_columns_of_one_name_are_refused_where_it_is_asked_for(tmp_path: Path, suffix: str) -> None:
    columns = [pa.array(values) for values in (["p", "q"], ["r", "s"], ["t", "u"], [0, 1])]
    for split in ("train", "validation"):
        table = pa.Table.from_arrays(columns, names=["text", "note", "note", "label"])
        write_table = pcsv.write_csv if suffix == "csv" else pq.write_table
        write_table(table, tmp_path / f"{split}.{suffix}")
    assert read_texts(own(tmp_path)).splits["train"].texts == [("p",), ("q",)]
    problems = problems_of(own(tmp_path, "note"))
    assert [problem.found for problem in problems] == ["2 of that name"] * 2
    assert problems[0].rule.endswith(f"train.{suffix} has one column 'note'")


@pytest.mark.parametrize("suffix", ["parquet", "csv", "jsonl"])
def test_an_unreadable_file_is_named(tmp_path: Path, suffix: str) -> None:
    write(tmp_path, "validation", text=["p"], label=[0])
    (tmp_path / f"train.{suffix}").write_bytes(b'text,label\n"open,1\n\xff\xfe\x00')
    (problem,) = problems_of(own(tmp_path))
    assert problem.place == "data.path"
    assert f"train.{suffix}" in problem.rule


def test_a_folder_that_may_not_be_read_is_named_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(self: Path) -> NoReturn:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))

    monkeypatch.setattr(Path, "iterdir", refused)  # a test that runs as root may read everything
    (problem,) = problems_of(own(tmp_path))
    assert problem.place == "data.path" and problem.found == f"[Errno 13] Permission denied: '{tmp_path}'"


def test_a_broken_json_line_is_numbered(tmp_path: Path) -> None:
    write(tmp_path, "validation", text=["p"], label=[0])
    (tmp_path / "train.jsonl").write_text('{"text": "p", "label": 0}\n{"text": "p", "la')
    (problem,) = problems_of(own(tmp_path))
    assert "line 2" in problem.found


@pytest.mark.parametrize("suffix", ["parquet", "csv", "jsonl"])
def test_unknown_columns_are_reported_with_the_ones_that_exist(tmp_path: Path, suffix: str) -> None:
    for split in ("train", "validation"):
        write(tmp_path, split, suffix, sentence=["p", "q"], gold=[0, 1])
    problems = problems_of(own(tmp_path, "text"))
    assert {(problem.place, problem.found) for problem in problems} == {
        ("data.text", "train has no text"),
        ("data.text", "validation has no text"),
        ("data.label", "train has no label"),
        ("data.label", "validation has no label"),
    }
    assert {problem.expected for problem in problems} == {"some of sentence, gold"}


def test_every_fault_of_every_split_is_reported_at_once(tmp_path: Path) -> None:
    write(tmp_path, "train", text=["p", None, None], label=["x", None, "x"])
    write(tmp_path, "validation", text=[1, 2], label=[0.5, 1.0])
    problems = problems_of(own(tmp_path))
    assert [(problem.place, problem.found) for problem in problems] == [
        ("data.text", "2 rows without one, the first is row 2"),
        ("data.text", "int64"),
        ("data.label", "1 rows without one, the first is row 2"),
        ("data.label", "double, such as 0.5"),
    ]


def test_an_empty_split_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "train", text=["p", "q"], label=[0, 1])
    write(tmp_path, "validation", text=pa.array([], pa.string()), label=pa.array([], pa.int64()))
    (problem,) = problems_of(own(tmp_path))
    assert problem.rule == "the split validation has rows"


def test_train_with_a_single_class_is_refused(tmp_path: Path) -> None:
    both(tmp_path, text=["p", "q"], label=["x", "x"])
    (problem,) = problems_of(own(tmp_path))
    assert (problem.place, problem.found) == ("data.label", "only 'x', in all 2 rows")


def test_hidden_labels_of_a_glue_task_are_refused(tmp_path: Path) -> None:
    both(tmp_path, sentence=["p", "q", "r"], label=[0, 1, 1])
    write(tmp_path, "validation", sentence=["p", "q", "r"], label=[-1, -1, 1])
    (problem,) = problems_of(DataConfig(task="cola", path=str(tmp_path)))
    assert problem.found.startswith("-1 in 2 rows (-1 marks the hidden labels")
    assert problem.expected == "0, 1"


def test_a_label_that_train_does_not_have_is_refused(tmp_path: Path) -> None:
    both(tmp_path, text=["p", "q"], label=["x", "y"])
    write(tmp_path, "validation", text=["p", "q", "r"], label=["x", "z", "z"])
    (problem,) = problems_of(own(tmp_path))
    assert (problem.found, problem.expected) == ("z in 2 rows", "x, y")


def test_a_split_whose_labels_are_of_another_kind_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "train", text=["p", "q"], label=[0, 1])
    write(tmp_path, "validation", text=["p", "q"], label=["0", "1"])
    (problem,) = problems_of(own(tmp_path))
    assert problem.found == "0, 1 in 2 rows"


def test_scores_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    both(tmp_path, sentence1=["p", "q"], sentence2=["r", "s"], label=[1.0, 2.0])
    write(tmp_path, "train", sentence1=["p", "q"], sentence2=["r", "s"], label=[1.0, float("nan")])
    (problem,) = problems_of(DataConfig(task="stsb", path=str(tmp_path)))
    assert (problem.place, problem.found) == ("data.label", "1 that are not, the first in row 2: nan")


def test_the_label_cannot_be_one_of_the_texts(tmp_path: Path) -> None:
    both(tmp_path, text=["p", "q"], label=["x", "y"])
    (problem,) = problems_of(own(tmp_path, "text", label="text"))
    assert problem.place == "data.label"


def test_a_path_without_a_task_needs_text_columns(tmp_path: Path) -> None:
    (problem,) = problems_of(DataConfig(path=str(tmp_path)))
    assert problem.place == "data.text"


def test_neither_task_nor_path_is_refused() -> None:
    (problem,) = problems_of(DataConfig())
    assert problem.place == "data"


def test_a_hub_that_cannot_be_reached_is_a_problem_of_the_task(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*_: object, **__: object) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    (problem,) = problems_of(DataConfig(task="mrpc"))
    assert (problem.place, problem.found) == ("data.task", "ConnectionError: no route")


def test_the_hub_is_asked_for_train_and_validation_only(monkeypatch: pytest.MonkeyPatch) -> None:
    from datasets import Dataset

    asked: list[object] = []

    def load_dataset(name: str, task: str, split: list[str]) -> list[Dataset]:
        asked.extend([name, task, *split])
        return [Dataset.from_dict({"sentence": ["p", "q"], "label": [0, 1]}) for _ in split]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    data = read_texts(DataConfig(task="sst2"))
    assert asked == ["nyu-mll/glue", "sst2", "train", "validation"]
    assert data.splits["train"].texts == [("p",), ("q",)]


# --- Real data ---


@pytest.mark.parametrize("task", ["cola", "sst2", "mrpc", "stsb", "rte", "wnli"])
def test_real_glue_folders_have_no_problem(data_dir: Path, task: str) -> None:
    data = read_texts(DataConfig(task=task, path=str(data_dir / "glue" / task)))  # type: ignore[arg-type]
    assert min(len(split) for split in data.splits.values()) >= 71
