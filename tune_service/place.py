"""Where trials run: on this machine or on a cluster. The one seam between a study and the Ray that serves it."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from trainables.errors import Problem
from tune_service.spec import ResourcesSpec, StudySpec
from tune_service.storage import StudyFolder


class Room(Protocol):
    """What there is to run trials on."""

    def offer(self) -> str:
        """In words."""

    def fit(self, resources: ResourcesSpec, concurrent_trials: int | None = None) -> int:
        """How many trials run at once; 0 when not even one has room."""

    def problems(self, resources: ResourcesSpec) -> list[Problem]:
        """Why not even one trial of a study fits; empty when one does, or may later."""


class Session(Protocol):
    """A Ray, for as long as one study runs."""

    @property
    def scratch(self) -> Path:
        """A folder for what Tune writes; nothing of it is read back."""

    @property
    def supervisor_bundle(self) -> dict[str, float]:
        """What a supervisor asks for, so that it lies where the study's folder is."""

    def slots(self, holds: int, wants: int) -> int:
        """How many trials the study may run at once by now, of which it runs `holds` and could run `wants`."""

    def notice(self, waits: bool) -> str | None:
        """What keeps trials waiting, in words, when some have been waiting; None: nothing to say."""


class Place(Protocol):
    """Somewhere a study can run."""

    @property
    def room(self) -> Room: ...

    def settled(self, spec: StudySpec, folder: StudyFolder) -> StudySpec:
        """The spec of a new study, with what it needs beside it in the study's folder where it came from far."""

    def session(self, spec: StudySpec, concurrent: int) -> AbstractContextManager[Session]:
        """Gets Ray ready. At its end nothing of the study is left in it."""

    def end_all(self) -> None:
        """Ends every process that this one waits for, frozen or not."""
