"""Holds the imports to the design: what is lower knows nothing of what is higher; few files know a heavy library."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("search_spaces", "trainables", "tune_service")
FILES = [str(path.relative_to(ROOT)) for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]

FORBIDDEN = {
    "search_spaces": {"trainables", "tune_service", "ray", "torch", "optuna", "transformers", "colossalai", "pydantic"},
    "trainables": {"tune_service", "search_spaces", "optuna"},
    "tune_service": {"torch", "transformers", "colossalai"},
}
"""What no file of a package imports."""

ONLY_IN = {
    "colossalai": {"trainables/parallel.py"},
    "grpc": {"tune_service/node_look.py"},
    "boto3": {"tune_service/cluster_firewall.py"},
    "botocore": {"tune_service/cluster_firewall.py", "tune_service/cluster_keys.py"},
    "psycopg": set(),
    "sqlalchemy": {"tune_service/database.py", "tune_service/postgres.py"},
    "ray": {
        "trainables/rank_actor.py",
        "trainables/trial.py",
        "trainables/worker_group.py",
        "tune_service/address.py",
        "tune_service/autoscaler.py",
        "tune_service/cluster_check.py",
        "tune_service/cluster_ray.py",
        "tune_service/doctor.py",
        "tune_service/doctor_nodes.py",
        "tune_service/local_ray.py",
        "tune_service/metrics.py",
        "tune_service/ray_start.py",
        "tune_service/tuner.py",
    },
    "pyarrow": {
        "trainables/bucket.py",
        "trainables/data.py",
        "trainables/tables.py",
        "tune_service/demo.py",
    },
    "torch": {
        "trainables/adamw_kernel.py",
        "trainables/finetune.py",
        "trainables/learner.py",
        "trainables/model.py",
        "trainables/optimizer.py",
        "trainables/parallel.py",
        "trainables/probe.py",
        "trainables/products.py",
        "trainables/score.py",
        "trainables/steps.py",
    },
}
"""Libraries that a few files know; psycopg is SQLAlchemy's alone."""

LIGHT = (
    "search_spaces",
    "trainables",
    "trainables.batches",
    "trainables.data",
    "trainables.glue",
    "tune_service",
    "tune_service.spec",
    "tune_service.machine",
    "tune_service.cli",
    "tune_service.checkup",
    "tune_service.cluster_cli",
    "tune_service.cluster_init",
    "tune_service.record",
    "tune_service.remote",
    "tune_service.sharing",
    "tune_service.submit",
    "tune_service.views",
)
"""Modules that load neither torch nor ray, nor a database's libraries: a spec is checked, and a command answers,
before anything heavy loads."""


WITHOUT_PYARROW = ("tune_service.cli", "tune_service.cluster_cli", "tune_service.storages", "tune_service.studies")
"""Modules that load no pyarrow: a fifth of a second, for a storage that may be a folder."""


def imported(file: str) -> Iterator[str]:
    """Top-level names of all that a file imports, inside functions too."""
    for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: imports are absolute, so that this test can read them"
            yield str(node.module).partition(".")[0]


@pytest.mark.parametrize("file", FILES)
def test_a_file_imports_only_what_its_package_may_know(file: str) -> None:
    assert not FORBIDDEN[file.partition("/")[0]] & set(imported(file))


@pytest.mark.parametrize("library", ONLY_IN)
def test_a_library_is_known_to_a_few_files(library: str) -> None:
    assert {file for file in FILES if library in imported(file)} <= ONLY_IN[library]


@pytest.mark.parametrize("module", LIGHT)
def test_a_light_module_loads_nothing_heavy(module: str) -> None:
    heavy = "{'torch', 'ray', 'transformers', 'colossalai', 'sqlalchemy', 'psycopg'}"
    code = f"import sys, {module}; print(*sorted({heavy} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.split() == []


@pytest.mark.parametrize("module", WITHOUT_PYARROW)
def test_a_storage_is_opened_without_pyarrow(module: str) -> None:
    code = f"import sys, {module}; print('pyarrow' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["False"]


@pytest.mark.parametrize(("world_size", "is_imported"), [(1, False), (2, True)])
def test_colossalai_is_imported_at_the_start_of_two_ranks_or_more(world_size: int, is_imported: bool) -> None:
    """A rank alone has no use for it, and every cold start would wait for it."""
    code = "import sys, trainables.finetune, trainables.probe; print('colossalai' in sys.modules)"
    environment = os.environ | {"WORLD_SIZE": str(world_size), "TUNE_SERVICE_DEVICE": "cpu"}
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert run.stdout.split() == [str(is_imported)]


def test_classes_in_parquet_are_read_without_pandas(tmp_path: Path) -> None:
    """A rank has no other use for it, and every cold start would wait for it."""
    for split in ("train", "validation"):
        pq.write_table(pa.table({"text": ["p", "q"], "label": ["no", "yes"]}), tmp_path / f"{split}.parquet")
    config = f"DataConfig(path={str(tmp_path)!r}, text=('text',), label='label')"
    read = f"from trainables.data import *; print(read_texts({config}).splits['train'].labels.tolist())"
    code = f"import sys; {read}; print('pandas' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.split("\n")[:2] == ["[0, 1]", "False"]
