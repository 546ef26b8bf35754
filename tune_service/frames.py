"""How an answer travels in a job's log: one line of JSON each, behind a word that nothing else can print by chance."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any


def encode(word: str, document: Any) -> str:
    """A line for the log; the break before it ends whatever a library left unfinished."""
    return f"\n{word} {json.dumps(document, allow_nan=False)}\n"


def decode(word: str, log: str, start: int) -> Iterator[tuple[Any, int]]:
    """(document, end of its line) for each whole line of `log` from `start` on that is an answer."""
    mark = f"\n{word} "
    while (begin := log.find(mark, start)) != -1:
        end = log.find("\n", begin + len(mark))
        if end == -1:
            return
        yield json.loads(log[begin + len(mark) : end]), end
        start = end
