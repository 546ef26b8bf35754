"""The ranks of one group whose node does not see the study's folder, and what is carried to them and back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from trainables.far import fetch, marked, send
from trainables.worker import Task


class Ask(Protocol):
    """Asks ranks (`RankActor`s) for something, all together; `only` names some of them, `what` it is, in a word."""

    def __call__(
        self, call: Callable[[Any], Any], deadline_s: float, only: Sequence[int] | None = None, what: str = "answer"
    ) -> list[Any]: ...


class FarRanks:
    """Knows which ranks are far once it has met them, for each trial anew."""

    def __init__(self, ask: Ask) -> None:
        self._ask = ask
        self._far: list[int] = []

    def __contains__(self, rank: int) -> bool:
        return rank in self._far

    def meet(self, task: Task, deadline_s: float) -> None:
        """Finds out which ranks are far, and takes to them what the trial goes on from."""
        with marked(Path(task.logs)) as mark:
            seen = self._ask(lambda rank: rank.look.remote(mark), deadline_s)
        self._far = [rank for rank, sees in enumerate(seen) if not sees]
        for far in self._far if task.resume_from else ():

            def write(path: str, data: bytes, far: int = far) -> None:
                self._ask(lambda rank: rank.write_resume.remote(path, data), deadline_s, only=[far])

            send(write, Path(str(task.resume_from)))

    def save(self, folder: Path, model_alone: bool, deadline_s: float) -> None:
        """Every rank saves, into `folder` or where it is; from there it is fetched."""
        with marked(folder) as mark:
            listings = self._ask(
                lambda rank: rank.save_where.remote(str(folder), model_alone, mark), deadline_s, what="checkpoint"
            )
        for far, listing in enumerate(listings):
            if not listing:
                continue

            def read(path: str, offset: int, far: int = far) -> bytes:
                piece: bytes = self._ask(lambda rank: rank.read_saved.remote(path, offset), deadline_s, only=[far])[0]
                return piece

            fetch(read, listing, folder)
            self._ask(lambda rank: rank.drop_saved.remote(), deadline_s, only=[far])

    def fetch_logs(self, task: Task, deadline_s: float) -> None:
        """Brings what far ranks have written since to where the study's logs are."""
        if self._far:
            pieces = self._ask(lambda rank: rank.log_piece.remote(), deadline_s, only=self._far)
            for rank, piece in zip(self._far, pieces, strict=True):
                add_to_log(task, rank, piece)


def add_to_log(task: Task, rank: int, piece: bytes) -> None:
    if piece:
        with task.log_file(rank).open("ab") as file:
            file.write(piece)
