"""What integration tests share: the program in a folder of its own, which must leave nothing running."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from program import Program


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    """One for all tests of a file; after them no process and no scratch file of it may be left."""
    found = Program(tmp_path_factory.mktemp("program"))
    try:
        yield found
        assert found.leftovers() == []
    finally:
        found.close()
