"""How an answer travels in a job's log: one line of JSON each, behind a word that nothing else can print by chance.

The lines are numbered, and behind each stands its number once more, alone: so the last line of a log tells whether
there is anything new, however long the answer before it is.
"""

from __future__ import annotations

import json
from typing import Any


def encode(word: str, number: int, document: Any) -> str:
    """Lines for the log; the break before them ends whatever a library left unfinished. Numbers count from 1."""
    return f"\n{word} {number} {json.dumps(document, allow_nan=False)}\n{word} {number}\n"


def decode(word: str, log: str, after: int = 0) -> tuple[list[Any], int]:
    """(the answers after the one of this number, the number of the last) in a log, or a later part of it.

    Answers that do not follow on without a gap are left out, with all behind them.
    """
    documents = []
    for line in log.split("\n")[:-1]:  # the last one may not be whole yet
        mark, _, rest = line.partition(" ")
        number, _, text = rest.partition(" ")
        if mark == word and text and number == str(after + 1):
            documents.append(json.loads(text))
            after += 1
    return documents, after


def newest(word: str, tail: str) -> int | None:
    """The number that the end of a log tells of; None: something else stands there."""
    words = tail.rstrip("\n").rpartition("\n")[2].split(" ")
    return int(words[1]) if len(words) == 2 and words[0] == word and words[1].isdecimal() else None
