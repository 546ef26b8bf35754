"""What integration tests share: the program in a folder of its own, which must leave nothing running."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from cluster import Cluster
from object_store import Store, install_moto, running_moto
from program import Program, opened


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    """One for all tests of a file; after them no process and no scratch file of it may be left."""
    with opened(tmp_path_factory.mktemp("program")) as found:
        yield found


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A head without CPUs and one worker of 2 that does not see its disk; one for all tests, for it takes a while."""
    found = Cluster()
    try:
        found.add_worker(cpus=2)
        yield found
    finally:
        found.close()


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    folder = tmp_path_factory.mktemp("store") / "moto"
    install_moto(folder)
    with running_moto(folder) as port:
        found = Store(port)
        yield found
        found.door.close()
