"""How an answer travels in a job's log: one line of JSON each, behind a word that nothing else can print by chance."""

from __future__ import annotations

import json
from typing import Any


def encode(word: str, document: Any) -> str:
    """A line for the log; the break before it ends whatever a library left unfinished."""
    return f"\n{word} {json.dumps(document, allow_nan=False)}\n"


def decode(word: str, log: str, start: int) -> tuple[list[Any], int]:
    """(documents, where to go on) of the whole lines of `log` from `start` on that are answers."""
    mark, documents = f"\n{word} ", []
    while (begin := log.find(mark, start)) != -1:
        end = log.find("\n", begin + len(mark))
        if end == -1:
            break
        documents.append(json.loads(log[begin + len(mark) : end]))
        start = end
    return documents, start
