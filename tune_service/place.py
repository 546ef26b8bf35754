"""Where trials run: on this machine or on a cluster. The one seam between a study and the Ray that serves it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from trainables.errors import Problem
from tune_service.home import StudyHome
from tune_service.sharing import Sharing
from tune_service.spec import ResourcesSpec, StudySpec


class Room(Protocol):
    """What there is to run trials on."""

    def offer(self) -> str:
        """In words."""

    def fit(self, resources: ResourcesSpec, concurrent_trials: int | None = None) -> int:
        """How many trials run at once; 0 when not even one has room."""

    def problems(self, resources: ResourcesSpec) -> list[Problem]:
        """Why not even one trial of a study fits; empty when one does, or may later."""


@dataclass(frozen=True)
class Usage:
    """What a study takes of its place, and could take."""

    running: int
    """Trials that hold room: those that run, and worker groups kept warm for the next."""
    wants: int
    """Trials that it could run now if there were room for all."""


class Session(Protocol):
    """A Ray, for as long as one study runs."""

    @property
    def scratch(self) -> Path:
        """A folder for what Tune writes; nothing of it is read back."""

    @property
    def supervisor_bundle(self) -> Mapping[str, float]:
        """What a supervisor asks for, so that it lies where the study's folder is."""

    @property
    def root(self) -> Path | None:
        """The folder that each rank finds a copy of as its working directory; None: it sees the folder itself."""

    @property
    def cards(self) -> Sequence[str]:
        """GPUs of which each trial takes the one that fewest use; empty: Ray chooses, and fills one after the other."""

    def slots(self, usage: Usage) -> int:
        """How many trials the study may run at once by now."""

    def notice(self, waits: bool) -> str | None:
        """What people should know of the place, above all why trials wait when they do; None: nothing to say."""

    def failed(self, reason: str) -> None:
        """A trial failed: the place may have a part in it."""


class Place(Protocol):
    """Somewhere a study can run."""

    @property
    def room(self) -> Room: ...

    def settled(self, spec: StudySpec, folder: StudyHome) -> StudySpec:
        """The spec of a new study, with what it came with in the study's folder."""

    def found_again(self, spec: StudySpec, folder: StudyHome) -> StudySpec:
        """The spec of a study that goes on, with the paths that what it came with has now."""

    def sharing(self, spec: StudySpec) -> Sharing | None:
        """What finds out how many trials share a GPU, where the spec leaves that open."""

    def prepare(self, spec: StudySpec) -> None:
        """Before anything imports Ray."""

    def session(self, spec: StudySpec, on_lost: Callable[[str], None]) -> AbstractContextManager[Session]:
        """Gets Ray ready. At its end nothing of the study is left in it.

        `on_lost` is called when a Ray of the study's own is gone.
        """

    def end_all(self) -> None:
        """Ends every process of this machine that this one waits for, frozen or not."""
