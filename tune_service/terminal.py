"""Keeps what libraries print away from what we show."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO


@contextmanager
def captured_output(log: Path, shown: int) -> Iterator[TextIO]:
    """Sends file descriptors 1 and 2, of C libraries too, to a log; yields the real one of number `shown` to write on.

    The log is appended to `log` at the end, if its folder exists by then.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    saved = {number: os.dup(number) for number in (1, 2)}
    with tempfile.TemporaryFile() as captured, os.fdopen(os.dup(saved[shown]), "w", buffering=1) as stream:
        try:
            for number in saved:
                os.dup2(captured.fileno(), number)
            yield stream
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for number, descriptor in saved.items():
                os.dup2(descriptor, number)
                os.close(descriptor)
            if log.parent.is_dir():
                captured.seek(0)
                with log.open("ab") as file:
                    file.write(captured.read())
