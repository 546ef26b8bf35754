"""Moments at which a test can hold a process, to kill or to freeze it just there."""

from __future__ import annotations

import os
import time
from pathlib import Path

VARIABLE = "TUNE_SERVICE_FAULT_POINTS"


def fault_point(name: str) -> None:
    """Waits here when a test has armed this point; otherwise does nothing.

    TUNE_SERVICE_FAULT_POINTS names a folder. A file NAME in it arms the point once: it becomes NAME.reached, which
    holds this process's id, and the process waits until there is a file NAME.go.
    """
    folder = os.environ.get(VARIABLE)
    if folder is None:
        return
    armed, reached = Path(folder, name), Path(folder, f"{name}.reached")
    try:
        armed.rename(Path(folder, f"{name}.taken"))  # one process alone
    except FileNotFoundError:
        return
    part = reached.with_suffix(".part")
    part.write_text(str(os.getpid()), encoding="ascii")
    part.rename(reached)
    while not Path(folder, f"{name}.go").exists():
        time.sleep(0.02)
