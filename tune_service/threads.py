"""A thread beside a block."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def beside(run: Callable[[threading.Event], None], name: str) -> Iterator[None]:
    """Runs `run` in a thread while the block runs. It is given the event that ends it, and is waited for at the end."""
    end = threading.Event()
    thread = threading.Thread(target=run, args=(end,), name=name, daemon=True)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join()
