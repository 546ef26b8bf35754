"""Where studies lie, as all other files see it: `storage.py` has it for folders, `bucket_storage.py` for buckets."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from trainables.stores import Checkpoints
from tune_service.lease import Lease

if TYPE_CHECKING:
    from optuna.study import StudyDirection

    from tune_service.journal import StudyJournal
    from tune_service.postgres import Database

    RecordStorage = StudyJournal | Database


STUDY_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")


class LogFile(Protocol):
    """What one rank of one trial wrote."""

    @property
    def name(self) -> str: ...

    def read(self, begin: int) -> bytes:
        """From that byte on."""


class StudyHome(Protocol):
    """Where one study lies."""

    @property
    def name(self) -> str: ...

    @property
    def where(self) -> str:
        """A path, or a URL, for people."""

    @property
    def record_where(self) -> str:
        """The same of its record."""

    @property
    def checkpoints(self) -> Checkpoints: ...

    @property
    def logs_where(self) -> str:
        """The folder or the URL of the ranks' logs."""

    @property
    def poll_s(self) -> float:
        """How often it is worth a look."""

    def is_doomed(self) -> bool:
        """Whether its deletion has begun."""

    def open_record(self, lease: Lease | None = None) -> tuple[RecordStorage, str]:
        """The record, and the name that the study has in there.

        A driver gives its lease: once that is lost, every write raises LeaseLostError.
        """

    def create_record(self, direction: StudyDirection, attrs: Mapping[str, Any], lease: Lease | None = None) -> None:
        """A record of a study without trials, there whole or not at all. `attrs` are the study's."""

    def driver_is_alive(self) -> bool:
        """Whether some process drives the study; not one that is gone or has been silent for some time."""

    def driving(self, tell: Callable[[str], None] = lambda line: None) -> AbstractContextManager[Lease]:
        """Makes this process the study's driver. StudyRunningError while another one is.

        `tell` hears of a silent driver that this one takes the place of.
        """

    def driver_log(self) -> AbstractContextManager[Path]:
        """A file for what the driver's libraries print."""

    def rank_logs(self, trial: int | None = None) -> Sequence[LogFile]:
        """What the ranks wrote, by trial and rank."""

    def keep_shipped(self, folder: Path) -> Path:
        """Keeps what a study of a cluster came with, the user's code and data. Returns a copy of it on this machine."""

    def shipped(self) -> Path | None:
        """A copy of it on this machine; None: it came with nothing."""

    def origins(self, shipped: Path) -> Mapping[str, str]:
        """Folder that a spec names in `shipped` -> where it was on the user's own machine."""

    def abandon(self) -> None:
        """Removes what this process has begun to write of a new study."""

    def remove(self) -> int:
        """Removes the study whole, for its driver. Returns its size in bytes."""


class StudyStorage(Protocol):
    """Where studies lie."""

    @property
    def where(self) -> str: ...

    @property
    def disk(self) -> Path:
        """The folder of this machine that a checkpoint is first written to."""

    @property
    def exports(self) -> Path:
        """The folder for exports that are fetched from elsewhere."""

    def speeds(self, num_bytes: int) -> tuple[float, float]:
        """Bytes a second that it takes and gives back, by a file of that size. OSError."""

    def free_bytes(self) -> int:
        """Of that disk."""

    def studies(self) -> Sequence[StudyHome]:
        """All studies, by name."""

    def study(self, name: str) -> StudyHome:
        """An existing study; one too whose deletion was cut off, to go on with that. StudyNotFoundError otherwise."""

    def check_free(self, name: str) -> StudyHome:
        """The place of a new study, nothing written yet. StudyExistsError when the name is taken."""

    def check_writable(self) -> None:
        """An error unless a study can be made here; makes none."""

    def check_record(self, url: str) -> None:
        """StorageError unless the records of studies in here may lie in a database."""

    def create(self, name: str) -> StudyHome: ...
