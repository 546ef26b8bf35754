"""The place where a study runs when nobody names another: a Ray of its own on this machine."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tune_service.home import StudyHome
from tune_service.local_ray import end_children, local_ray, prepare_environment, scratch_folder
from tune_service.machine import this_machine
from tune_service.mps import SideBySide, side_by_side
from tune_service.place import Usage
from tune_service.sharing import Sharing
from tune_service.spec import StudySpec, moved


class ThisMachine:
    """This machine, as a place for a study."""

    def __init__(self) -> None:
        self.room = this_machine()

    def settled(self, spec: StudySpec, folder: StudyHome) -> StudySpec:
        return spec

    def found_again(self, spec: StudySpec, folder: StudyHome) -> StudySpec:
        came_with = None if spec.folder.is_dir() else folder.shipped()  # of a cluster, and in a bucket
        return spec if came_with is None else moved(spec, spec.folder, came_with)

    def sharing(self, spec: StudySpec) -> Sharing | None:
        return Sharing(self.room.gpus, self._concurrent(spec)) if spec.resources.finds_share else None

    def prepare(self, spec: StudySpec) -> None:
        prepare_environment(self._concurrent(spec))

    @contextmanager
    def session(self, spec: StudySpec, on_lost: Callable[[str], None]) -> Iterator[LocalSession]:
        concurrent, cards = self._concurrent(spec), self._cards(spec)
        with scratch_folder() as scratch, ExitStack() as services:
            shared = None
            if self.some_share_a_gpu(spec):
                on_one = min(concurrent, spec.resources.ranks_on_a_gpu)
                shared = services.enter_context(side_by_side(scratch / "mps", self.room.cards, on_one))
            cpus = self.planned_cpus(spec)
            services.enter_context(local_ray(scratch, cpus, self.room.gpus, spec.name, on_lost))
            yield LocalSession(scratch, concurrent, self.room.cpus, cards=cards, shared=shared)

    def planned_cpus(self, spec: StudySpec) -> int:
        """How many CPUs Ray is told of, which starts a process for each with itself: as many as the study needs.

        One is a supervisor's, and one a rank's. A trainable of the user's own may have tasks for Ray, and so all.
        """
        if not spec.is_finetune:
            return self.room.cpus
        concurrent, resources = self._concurrent(spec), spec.resources
        processes = concurrent * (1 + resources.workers)
        asked = math.ceil(concurrent * resources.workers * resources.cpus_per_worker)
        return min(self.room.cpus, max(processes, asked))

    def some_share_a_gpu(self, spec: StudySpec) -> bool:
        """Whether two trials may run on one GPU. Ray, where it is left to it, fills one before it begins the next."""
        return 0 < spec.resources.gpu_share < 1 and self._concurrent(spec) > (len(self._cards(spec)) or 1)

    def _cards(self, spec: StudySpec) -> tuple[str, ...]:
        return self.room.cards if spec.resources.finds_share and self.room.gpus > 1 else ()

    def end_all(self) -> None:
        end_children()

    def _concurrent(self, spec: StudySpec) -> int:
        return self.room.fit(spec.resources, spec.budget.concurrent_trials)


@dataclass(frozen=True)
class LocalSession:
    """A Ray that serves one study: it has all of it, and nothing to wait for."""

    scratch: Path
    concurrent: int
    cpus: int = 1
    supervisor_bundle: Mapping[str, float] = field(default_factory=dict)
    root: Path | None = None
    cards: Sequence[str] = ()
    shared: SideBySide | None = None
    """None: no two trials share a GPU."""

    def slots(self, usage: Usage) -> int:
        # No more start at a time than there are cores: the first is at work while the last are on their way, and none
        # is still on its way when a warm group comes free, for which Tune would end it.
        return min(self.concurrent, usage.running + self.cpus)

    def notice(self, waits: bool) -> str | None:
        why_not = None if self.shared is None else self.shared.why_not
        return None if why_not is None else f"trials that share a GPU take turns: {why_not}"

    def failed(self, reason: str) -> None:
        if self.shared is not None:
            self.shared.failed(reason)
