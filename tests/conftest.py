"""What tests share. Real data and models are looked for in two folders; a test that needs one is skipped without it."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
from postgres_server import Server

from tune_service.local_ray import prepare_environment

# Ray reads these settings when it is imported, by whichever test comes first. They are a study's: no stranger's Ray is
# joined, and nobody reaches the tests' own.
prepare_environment(concurrent=2)


def _folder(variable: str, holds: str) -> Path:
    value = os.environ.get(variable)
    if not value:
        pytest.skip(f"{variable} is not set: it names the folder with {holds}")
    folder = Path(value)
    if not folder.is_dir():
        pytest.skip(f"{variable} names {folder}, which is no folder")
    return folder


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder with `glue/` (a folder of parquet files for each task) and `gpt2-tokenizer/`."""
    return _folder("TUNE_SERVICE_TEST_DATA", "glue/ and gpt2-tokenizer/")


@pytest.fixture(scope="session")
def models_dir() -> Path:
    """The folder with `minilm/` (BERT) and `smollm2/` (Llama) as Transformers saves them."""
    return _folder("TUNE_SERVICE_TEST_MODELS", "the models minilm/ and smollm2/")


@pytest.fixture
def as_a_rank() -> Iterator[None]:
    """The test may take its process as a rank does: environment and the descriptors 1 and 2 are put back after it."""
    environment = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(environment)


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, object, object]:
    """The part of `as_a_rank` that goes round the test itself: outside of it pytest exchanges the streams."""
    if "as_a_rank" not in pyfuncitem.fixturenames:
        return (yield)
    streams, saved = (sys.stdout, sys.stderr), (os.dup(1), os.dup(2))
    # pytest's own streams do not write to descriptors 1 and 2; a rank redirects those. Never closed: a thread of Ray's
    # may write to them later.
    sys.stdout, sys.stderr = (io.TextIOWrapper(io.FileIO(n, "w", closefd=False), write_through=True) for n in (1, 2))
    try:
        return (yield)
    finally:
        sys.stdout, sys.stderr = streams
        for number, descriptor in zip((1, 2), saved, strict=True):
            os.dup2(descriptor, number)
            os.close(descriptor)


@pytest.fixture(scope="session")
def postgres() -> Iterator[Server]:
    """A PostgreSQL server; each test makes a database of its own."""
    found = Server()
    try:
        yield found
    finally:
        found.close()
