"""One study on a cluster: what its job runs on the head."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from tune_service.check import refuse_faulty
from tune_service.cluster_ray import joined
from tune_service.errors import exit_code
from tune_service.home import StudyStorage
from tune_service.live import StudyDisplay, console
from tune_service.parcel import SPEC
from tune_service.spec import parse_spec
from tune_service.status import StudyView
from tune_service.study import resume_study, run_study
from tune_service.terminal import shown_stream

if TYPE_CHECKING:
    from tune_service.head import Answer
    from tune_service.metrics import StudyMetrics


def run_here(storage: StudyStorage, answer: Answer) -> None:
    """Runs the study that lies in the working directory, which Ray has unpacked on this node and will on the others."""
    root = Path.cwd()
    spec = parse_spec(json.loads((root / SPEC).read_text(encoding="utf-8")), root)
    storage.check_free(spec.name)
    with _display(spec.name, answer) as display, joined(spec.name, came_with=root) as place:
        refuse_faulty(spec, storage, place.room)
        run_study(spec, storage, display, place)


def resume_here(name: str, trials: str | None, storage: StudyStorage, answer: Answer) -> None:
    """Goes on with a study of this storage; what it came with lies in its folder."""
    came_with = storage.study(name).shipped()  # None: it was begun on the head itself
    with _display(name, answer) as display, joined(name, came_with, working_dir=came_with) as place:
        resume_study(name, trials, storage, display, place)


@contextmanager
def _display(study: str, answer: Answer) -> Iterator[_JobDisplay]:
    with shown_stream(1) as stream, StudyDisplay(console(stream)) as display:
        yield _JobDisplay(study, display, answer)


class _JobDisplay:
    """Prints events into the job's log, publishes the study's numbers, and says once that the study has begun."""

    def __init__(self, study: str, display: StudyDisplay, answer: Answer) -> None:
        self._study, self._display, self._answer = study, display, answer
        self._metrics: StudyMetrics | None = None
        self._has_begun = False

    def tell(self, line: str) -> None:
        self._display.tell(line)

    def abort(self, error: BaseException) -> None:
        self._answer.fail(error)
        os._exit(exit_code(error))

    def show(self, view: StudyView) -> None:
        if not self._has_begun:
            self._has_begun = True
            self._answer.send({"begun": True})
        if self._metrics is None:
            from tune_service.metrics import StudyMetrics  # imports Ray, which is joined by now

            self._metrics = StudyMetrics()
        self._metrics.publish(self._study, view)
        self._display.show(view)
