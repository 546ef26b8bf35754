"""On the head of a cluster: answers one question of a laptop, or runs one study. It is a Ray job's entrypoint.

`remote.py` is the other side. Documents go out as frames of the job's log; a failure goes out as the problems that it
is made of. A question that waits ends after ANSWER_S, and the laptop asks again: what a laptop leaves behind that has
gone away is over in a minute.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from trainables.bucket import is_url
from trainables.errors import Problem, UserError
from trainables.redaction import redacted
from tune_service import __version__
from tune_service.errors import CommandError, error_json, exit_code
from tune_service.frames import encode
from tune_service.home import StudyStorage
from tune_service.status import StudyView
from tune_service.storage import expanded
from tune_service.storages import open_storage
from tune_service.studies import LocalStudies, to_ranges
from tune_service.terminal import shown_stream
from tune_service.threads import beside
from tune_service.views import ViewNews

ANSWER_S = 60.0
ALIVE_S = 20.0
"""Between two signs of life; `remote.QUIET_S` is how long a laptop waits for one."""
FETCH_S = 2 * 3600.0
"""How long an export waits to be fetched."""
DEFAULT_STORAGE = "~/studies"


class Answer:
    """Where documents go."""

    def __init__(self, word: str, stream: TextIO) -> None:
        self._word, self._stream = word, stream
        self._sent = 0
        self._turn = threading.Lock()

    def send(self, document: Mapping[str, Any]) -> None:
        with self._turn:
            self._sent += 1
            self._stream.write(encode(self._word, self._sent, document))
            self._stream.flush()

    @contextmanager
    def signs_of_life(self) -> Iterator[None]:
        """Sends one at once, and then now and then, for whoever waits for a long answer and has asked for them."""

        def send(end: threading.Event) -> None:
            self.send({"alive": True})
            while not end.wait(ALIVE_S):
                self.send({"alive": True})

        with beside(send, "signs-of-life"):
            yield

    def fail(self, error: BaseException) -> None:
        """Why there is no answer, as the command there would say it."""
        self.send({"failure": error_json(error), "code": exit_code(error)})


def main() -> None:
    """The program: `python -m tune_service.head REQUEST`, a JSON document."""
    request = json.loads(sys.argv[1])
    with shown_stream(1) as stream:
        answer = Answer(request["word"], stream)
        answer.send({"version": __version__})
        try:
            _same_version(request)
            with answer.signs_of_life() if request.get("signs") else nullcontext():
                QUESTIONS[request["what"]](request, storage_of(request), answer)
        except BaseException as error:
            answer.fail(error)
            if not isinstance(error, UserError | KeyboardInterrupt):
                sys.stderr.write(redacted(traceback.format_exc()))  # goes into the job's log, which Ray keeps
            sys.exit(exit_code(error))
        answer.send({"end": True})


def _same_version(request: Mapping[str, Any]) -> None:
    """Only for what starts a study: another version may read its spec otherwise. Answers are a contract."""
    if request["what"] in ("run", "resume") and request["version"] != __version__:
        found = f"{request['version']} on this machine, {__version__} on the cluster"
        raise CommandError(Problem("tune-service", "is the same here and on the cluster", found, "one version on both"))


def storage_of(request: Mapping[str, Any]) -> StudyStorage:
    """What the laptop says, else what the head's environment says, else a folder of the head's user."""
    root = request.get("storage") or os.environ.get("TUNE_SERVICE_STORAGE") or DEFAULT_STORAGE
    return open_storage(root if is_url(root) else str(Path.home() / expanded(Path(root), "--storage")))


def _list(request: Mapping[str, Any], storage: StudyStorage, answer: Answer) -> None:
    for row in LocalStudies(storage).list():
        answer.send({"row": row.to_json(), "metric": row.metric})


def _status(request: Mapping[str, Any], storage: StudyStorage, answer: Answer) -> None:
    status = LocalStudies(storage).status(request["study"])
    answer.send({"status": status.to_json(), "notice": status.notice})


def _views(request: Mapping[str, Any], storage: StudyStorage, answer: Answer) -> None:
    news = ViewNews(request["known"])

    def look(view: StudyView) -> None:
        if (document := news.of(view)) is not None:
            answer.send(document)

    more = _until(time.monotonic() + ANSWER_S, LocalStudies(storage).views(request["study"]), look)
    answer.send({"more": more})


def _logs(request: Mapping[str, Any], storage: StudyStorage, answer: Answer) -> None:
    studies, name = LocalStudies(storage), request["study"]
    ended = studies.ended(name)  # by now: at the end of this answer their logs have been read to the end
    pieces = studies.logs(name, request["trial"], request["since"], request["done"])
    more = _until(time.monotonic() + ANSWER_S, pieces, lambda piece: answer.send({"piece": asdict(piece)}))
    answer.send({"more": more, "done": to_ranges(ended)})


def _until(end: float, source: Iterator[Any], send: Callable[[Any], None]) -> bool:
    """Sends what comes, for a time. Whether there is more to come."""
    for each in source:
        send(each)
        if time.monotonic() > end:
            return True
    return False


def _stop(request: Mapping[str, Any], storage: StudyStorage, answer: Answer) -> None:
    from tune_service.study import request_stop

    request_stop(request["study"], request["now"], storage)


def _where(request: Mapping[str, Any], storage: StudyStorage, answer: Answer) -> None:
    answer.send({"where": LocalStudies(storage).where(request["study"])})


def _delete(request: Mapping[str, Any], storage: StudyStorage, answer: Answer) -> None:
    answer.send({"bytes": LocalStudies(storage).delete(request["study"])})


def _best(request: Mapping[str, Any], storage: StudyStorage, answer: Answer) -> None:
    from tune_service.handover import exported

    with exported(request["study"], request["word"], storage) as found:
        answer.send(found)
        time.sleep(FETCH_S)  # the laptop ends this job when it has the file


def _run(request: Mapping[str, Any], storage: StudyStorage, answer: Answer) -> None:
    from tune_service.cluster_study import run_here

    run_here(storage, answer)


def _check(request: Mapping[str, Any], storage: StudyStorage, answer: Answer) -> None:
    from tune_service.doctor import check_here

    check_here(storage, request["start_nodes"], request["versions"], answer)


def _resume(request: Mapping[str, Any], storage: StudyStorage, answer: Answer) -> None:
    from tune_service.cluster_study import resume_here

    resume_here(request["study"], request["trials"], storage, answer)


QUESTIONS: Mapping[str, Callable[[Mapping[str, Any], StudyStorage, Answer], None]] = {
    "list": _list,
    "status": _status,
    "views": _views,
    "logs": _logs,
    "stop": _stop,
    "where": _where,
    "delete": _delete,
    "best": _best,
    "check": _check,
    "run": _run,
    "resume": _resume,
}


if __name__ == "__main__":
    main()
