"""A rank in a process of Ray's, on a node that may or may not see the study's folder."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import ray

from trainables.cards import is_crowded, take_card
from trainables.errors import WorkerLostError
from trainables.far import SCRATCH, FarFiles, Mark, scratch_place
from trainables.redaction import redacted
from trainables.worker import RankReport, RankWorker, Task

_LOGS, _RESUME, SAVED = "logs", "resume", "saved"
MOST_SHOWN_BYTES = 1 << 18
"""Of a rank's log between two reports, at most, in the dashboard."""


class RankActor(RankWorker):
    """A RankWorker that shows its log lines to Ray's dashboard too, and keeps its files here where it must."""

    def __init__(self, rank: int, world_size: int, uses_gpu: bool, cards: Sequence[str] = ()) -> None:
        """`cards`: GPUs of which it takes the one that fewest use; empty: the one that Ray chose."""
        super().__init__(rank, world_size, uses_gpu)
        self._cards = cards
        if cards:
            os.environ["CUDA_VISIBLE_DEVICES"] = take_card(cards, scratch_place())
        self._stdout = os.dup(1)  # Ray's own log file; the rank's output goes to the trial's
        self._files = FarFiles()
        self._is_far = False
        self._task: Task | None = None
        self._shown = 0
        self._sent = 0

    def endpoint(self) -> tuple[str, int]:
        """(address, port) of this rank's node, where it listens."""
        host = ray.util.get_node_ip_address()
        return host, self.listen(host)

    def look(self, mark: Mark) -> bool:
        """Whether this node sees the study's folder. If not, what this rank writes waits here to be fetched."""
        self._is_far = not mark.is_seen()
        if self._is_far:
            self._files.emptied(_RESUME)
        return not self._is_far

    def rendezvous_at(self, host: str, port: int) -> str:
        """Takes the place where rank 0 will listen; returns the id of this rank's node."""
        self.rendezvous(host, port)
        return str(ray.get_runtime_context().get_node_id())

    def begin(self, task: Task) -> None:
        """WorkerLostError, too, when another GPU has more room by now: its trials have ended, and a process stays where
        it is."""
        is_warm = self._task is not None
        if is_warm and self._cards and is_crowded(os.environ["CUDA_VISIBLE_DEVICES"], self._cards, scratch_place()):
            raise WorkerLostError("another GPU has fewer trials")
        if self._is_far:
            resume_from = str(self._files.folder(_RESUME)) if task.resume_from else None
            task = replace(task, logs=str(self._files.emptied(_LOGS)), resume_from=resume_from)
        self._task = task
        path = task.log_file(self._rank)
        # A trial that goes on writes to the end of its log.
        self._shown = self._sent = path.stat().st_size if path.exists() else 0
        try:
            super().begin(task)
        finally:
            self._show_log()

    def next_report(self) -> RankReport | None:
        try:
            return super().next_report()
        finally:
            self._show_log()

    def save_where(self, folder: str, model_alone: bool, mark: Mark) -> list[tuple[str, int]]:
        """Saves into `folder` where this node sees it, else here. What is to be fetched: (path, bytes) of each file."""
        if mark.is_seen():
            self.save(folder, model_alone)
            return []
        self.save(str(self._files.emptied(SAVED)), model_alone)
        return self._files.listing(SAVED)

    def read_saved(self, path: str, offset: int) -> bytes:
        """A piece of a saved file, from `offset` on."""
        return self._files.read(SAVED, path, offset)

    def drop_saved(self) -> None:
        self._files.emptied(SAVED)

    def write_resume(self, path: str, data: bytes) -> None:
        """A piece of the checkpoint that this trial goes on from."""
        self._files.write(_RESUME, path, data)

    def log_piece(self) -> bytes:
        """What this rank's log has got since it was last asked for, where it lies here."""
        if self._task is None or not self._is_far:
            return b""
        piece = _read(self._task.log_file(self._rank), self._sent)
        self._sent += len(piece)
        return piece

    def _show_log(self) -> None:
        """Copies new lines to the log that the dashboard shows, with the trial and the rank before each.

        Of very many only the last, for the trial's own log has them all. A disk that is full costs the trial nothing.
        """
        if self._task is None or SCRATCH in os.environ:  # a study's own Ray has no dashboard
            return
        path = self._task.log_file(self._rank)
        begin = max(self._shown, (path.stat().st_size if path.exists() else 0) - MOST_SHOWN_BYTES)
        text = _read(path, begin)
        is_cut, self._shown = begin > self._shown, begin + len(text)
        if is_cut:
            text = text.partition(b"\n")[2]  # of half a line nobody knows whether it is half a secret
        name = f"trial {self._task.number} rank {self._rank} | "
        lines = "".join(f"{name}{line}\n" for line in redacted(text.decode(errors="replace")).splitlines())
        with suppress(OSError):
            os.write(self._stdout, lines.encode())


def _read(path: Path, offset: int) -> bytes:
    try:
        with path.open("rb") as file:
            file.seek(offset)
            return file.read()
    except OSError:
        return b""
