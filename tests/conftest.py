"""What tests share. Real data and models are looked for in two folders; a test that needs one is skipped without it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


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
