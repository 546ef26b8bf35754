"""Keeps what libraries print away from what we show."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO


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
