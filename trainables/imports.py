"""Imports of large libraries."""

from __future__ import annotations

import gc
import importlib
import sys
from types import ModuleType


def import_large(name: str) -> ModuleType:
    """A module of ours. Where it is not loaded yet, Python's collector passes over all that there is by then.

    What is imported stays; to look for garbage in it, a million objects, takes a sixth of the import's time, and as
    long again at each full collection later. Garbage that is there by then stays, too: so not for modules of others,
    and only in a process that has done nothing yet.
    """
    if name in sys.modules:
        return sys.modules[name]
    before = gc.get_threshold()
    gc.set_threshold(0)
    try:
        return importlib.import_module(name)
    finally:
        gc.freeze()
        gc.set_threshold(*before)
