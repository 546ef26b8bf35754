"""What Linux does when a process ends whose children go on."""

from __future__ import annotations

import ctypes
from signal import SIGKILL

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
_libc = ctypes.CDLL(None)


def end_with_parent() -> None:
    """In a new process, before it runs its program: whatever ends the parent ends this one too."""
    _libc.prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0)


def adopt_orphans() -> None:
    """What this process's children leave behind when they are killed becomes its own child, and is ended with them."""
    _libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
