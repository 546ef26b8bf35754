"""Keeps what libraries print away from what we show, and a study from waiting for whoever reads that."""

from __future__ import annotations

import io
import locale
import os
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Condition, Thread
from typing import TextIO

LAST_WORDS_S = 5.0
"""How long the last words wait for a reader that stands still."""


class PatientStream(io.TextIOBase):
    """A way to a file descriptor on which no write waits for its reader: a thread does.

    Nothing tells beforehand how much a terminal or a pipe takes, and one that a sleeping laptop reads takes nothing.
    """

    encoding = locale.getpreferredencoding(False)

    def __init__(self, descriptor: int) -> None:
        self._descriptor = os.dup(descriptor)
        self._untaken: list[bytes] = []
        self._changed = Condition()
        self._reader_is_gone = False
        Thread(target=self._write_all, name="output", daemon=True).start()

    @property
    def is_idle(self) -> bool:
        """Whether all that was written has been taken."""
        with self._changed:
            return not self._untaken

    def write(self, text: str) -> int:
        """Takes `text` for later. BrokenPipeError once the reader is known to be gone."""
        with self._changed:
            if self._reader_is_gone:
                raise BrokenPipeError
            self._untaken.append(text.encode(self.encoding, errors="replace"))
            self._changed.notify_all()
        return len(text)

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def drain(self) -> bool:
        """Waits until all has been taken, some seconds at most. Whether it has."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._untaken, LAST_WORDS_S)

    def finish(self) -> None:
        """Closes it, after the last words; where nobody takes those, the end of the process does."""
        if self.drain():
            with self._changed:
                self._reader_is_gone = True
                self._changed.notify_all()

    def _write_all(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._untaken or self._reader_is_gone)
                if self._reader_is_gone:
                    os.close(self._descriptor)
                    return
                text = self._untaken[0]
            taken, is_gone = 0, False
            try:
                taken = os.write(self._descriptor, text)
            except BlockingIOError:  # another program that has it too made it so
                select.select([], [self._descriptor], [])
            except OSError:
                is_gone = True
            with self._changed:
                self._reader_is_gone |= is_gone
                self._untaken[:1] = [text[taken:]] if taken < len(text) else []
                if self._reader_is_gone:
                    self._untaken.clear()
                self._changed.notify_all()


Shown = TextIO | PatientStream


@contextmanager
def patient_stream(descriptor: int) -> Iterator[PatientStream]:
    """Our own way to what is file descriptor 1 or 2 now, on which nobody waits."""
    stream = PatientStream(descriptor)
    try:
        yield stream
    finally:
        stream.finish()


@contextmanager
def shown_stream(descriptor: int) -> Iterator[TextIO]:
    """Our own way to what is file descriptor 1 or 2 now, whatever that is led to later."""
    with os.fdopen(os.dup(descriptor), "w", buffering=1) as stream:
        yield stream


@contextmanager
def output_to(log: Path) -> Iterator[None]:
    """Sends file descriptors 1 and 2, of C libraries and child processes too, to the end of a log file."""
    sys.stdout.flush()
    sys.stderr.flush()
    saved = {number: os.dup(number) for number in (1, 2)}
    try:
        with log.open("ab") as file:
            for number in saved:
                os.dup2(file.fileno(), number)
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):  # the log's disk may be full
                stream.flush()
        for number, descriptor in saved.items():
            os.dup2(descriptor, number)
            os.close(descriptor)
