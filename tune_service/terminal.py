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
    """A way to a file descriptor on which no write waits for its reader, and none raises: a thread does the writing.

    Nothing tells beforehand how much a terminal or a pipe takes, and one that a sleeping laptop reads takes nothing.
    What nobody reads any more is passed over, and so is what a full disk does not take.
    """

    encoding = locale.getpreferredencoding(False)

    def __init__(self, descriptor: int) -> None:
        self._descriptor = os.dup(descriptor)
        self._untaken = bytearray()
        self._changed = Condition()
        self._is_over = False
        Thread(target=self._write_all, name="output", daemon=True).start()

    @property
    def is_idle(self) -> bool:
        """Whether all that was written has been taken."""
        with self._changed:
            return not self._untaken

    def write(self, text: str) -> int:
        with self._changed:
            if not self._is_over:
                self._untaken += text.encode(self.encoding, errors="replace")
                self._changed.notify_all()
        return len(text)

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def drain(self, timeout_s: float) -> None:
        """Waits until all has been taken, but no longer than that."""
        with self._changed:
            self._changed.wait_for(lambda: not self._untaken, timeout_s)

    def finish(self) -> None:
        """Closes it, after the last words; those that nobody takes do not come after what others print there."""
        self.drain(LAST_WORDS_S)
        with self._changed:
            self._is_over = True
            self._changed.notify_all()

    def _write_all(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._untaken or self._is_over)
                if self._is_over:
                    self._untaken.clear()
                    os.close(self._descriptor)
                    return
                text = bytes(self._untaken)
            taken = self._write(text)
            with self._changed:
                del self._untaken[:taken]
                self._changed.notify_all()

    def _write(self, text: bytes) -> int:
        """How much of it has gone, somewhere or nowhere."""
        try:
            return os.write(self._descriptor, text)
        except BlockingIOError:  # another program that has it too made it so
            select.select([], [self._descriptor], [])
            return 0
        except OSError:
            return len(text)


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
