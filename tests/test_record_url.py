"""What the URL of a record may say, and the file that holds it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hand_driven import toy_spec

from tune_service.errors import SpecError, StorageError
from tune_service.record_url import Pointer, fault_of
from tune_service.spec import dump_yaml, load_spec, spec_for_trial


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://user@host:5432/database",
        "postgresql://host/tune",
        "postgresql:///tune?host=/run/postgresql",
        "postgresql://user@[::1]:5432/tune-2.old?sslmode=verify-full",
        "postgresql://some.one%40example@db.example.org/tune?target_session_attrs=read-write",
    ],
)
def test_a_url_that_a_record_may_have(url: str) -> None:
    assert fault_of(url) is None


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://user@host:5432",
        "postgres://user@host/tune",
        "postgresql+psycopg://user@host/tune",
        "mysql://user@host/tune",
        "sqlite:///tune.db",
        "postgresql://host/tune{SCHEMA_VERSION}",
        "postgresql://host/tune\n",
        "postgresql://host/a/b",
        "postgresql://host/tune#x",
        "",
        5,
        {"url": "postgresql://host/tune"},
    ],
)
def test_a_url_that_is_none_is_refused_with_one_that_is(url: object) -> None:
    fault = fault_of(url)
    assert fault is not None and "postgresql://user@host:5432/database" in fault.expected


@pytest.mark.parametrize(
    "parameter", ["passfile=/etc/secret", "sslkey=/root/key", "options=-c%20x", "service=a", "nix"]
)
def test_a_url_names_no_file_and_no_option_that_it_need_not(parameter: str) -> None:
    assert fault_of(f"postgresql://host/tune?sslmode=require&{parameter}") is not None


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://user:Cr0issant@host/tune",
        "postgresql://user:Cr0issant@host",
        "postgresql://user:Cr0@issant@host/tune",
        "postgresql://user:Cr0/issant@host/tune",
        "postgresql://user@host/tune?password=Cr0issant",
        "postgresql://user@host/tune?sslmode=require&sslpassword=Cr0issant",
    ],
)
def test_a_password_in_a_url_is_refused_and_not_repeated(url: str, tmp_path: Path) -> None:
    with pytest.raises(SpecError) as refusal:
        toy_spec(tmp_path, record=url)
    (problem,) = refusal.value.problems
    assert problem.place == "record"
    assert "PGPASSWORD" in problem.expected and "~/.pgpass" in problem.expected
    assert "Cr0" not in str(problem) and "issant" not in str(problem)


def test_a_spec_with_a_record_is_read_back_equal(tmp_path: Path) -> None:
    spec = toy_spec(tmp_path, record="postgresql://user@host/tune")
    (tmp_path / "study.yaml").write_text(dump_yaml(spec))
    assert load_spec(tmp_path / "study.yaml") == spec


def test_a_spec_that_trains_a_trial_again_names_nobodys_database(tmp_path: Path) -> None:
    spec = toy_spec(tmp_path, record="postgresql://user@host/tune")
    assert spec_for_trial(spec, {"x": 0.5, "depth": 2}).record is None


def test_a_pointer_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    pointer = Pointer("postgresql://user@host/tune", "toy-0a1b2c3d")
    pointer.write(tmp_path / "record.json")
    assert Pointer.read(tmp_path / "record.json") == pointer
    assert [path.name for path in tmp_path.iterdir()] == ["record.json"]


@pytest.mark.parametrize(
    "document",
    [
        b"",
        b"[]",
        b"\x00\xff",
        b"[" * 100_000,
        {"format": 1, "url": "postgresql://host/tune"},
        {"format": 1, "url": "postgresql://host/tune", "study": 5},
        {"format": 2, "url": "postgresql://host/tune", "study": "toy"},
        {"format": 1, "url": "postgresql://host/tune?passfile=/root/.pgpass", "study": "toy"},
        {"format": 1, "url": "sqlite:////etc/passwd", "study": "toy"},
        {"format": 1, "url": None, "study": "toy"},
    ],
)
def test_a_pointer_that_is_not_ours_leads_nowhere(document: Any, tmp_path: Path) -> None:
    text = document if isinstance(document, bytes) else json.dumps(document).encode()
    (tmp_path / "record.json").write_bytes(text)
    with pytest.raises(StorageError):
        Pointer.read(tmp_path / "record.json")
