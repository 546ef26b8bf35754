"""Keeps secrets out of what is kept and shown: errors, reasons, the log lines that are copied into them, and specs.

A secret is the value of an environment variable whose name says so, or a text that looks like one. What a trainable
itself prints goes into its own log as it is; only what is copied from there is redacted. A secret is found by its plain
text: one that was encoded or cut is not.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

HIDDEN = "***"
MIN_LENGTH = 8
"""Of a variable's value: a shorter one would be found by chance in the middle of words."""
_WORDS = re.compile(r"[A-Z]?[a-z0-9]+|[A-Z0-9]+")
_ALONE = {"password", "passwd", "passphrase", "secret", "secrets", "credential", "credentials", "apikey"}
_ALONE |= {"pgpassword", "sslpassword"}  # libpq's own
_KEYS = {"api", "access", "private", "secret", "auth", "account"}
"""What makes a secret of the word `key` behind it."""
_TOKENS = {"api", "access", "auth", "bearer", "refresh", "session", "login", "id", "bot", "app", "personal", "private"}
_TOKENS |= {
    "hf",
    "hub",
    "huggingface",
    "github",
    "gitlab",
    "gh",
    "git",
    "wandb",
    "openai",
    "slack",
    "user",
}
"""What makes a secret of the word `token` at the end, as it is alone; pad_token and eos_token are none."""
_LOOKS = re.compile(
    r"\bhf_[A-Za-z0-9]{16,}|\bsk-(?:[a-z]+[0-9]*-)?[A-Za-z0-9_]{16,}|\bgh[pousr]_[A-Za-z0-9]{16,}"
    r"|\bgithub_pat_\w{16,}|\bA[KS]IA[A-Z0-9]{16}\b|\bxox[abprs]-[\w-]{10,}"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----|(?<=://)[^\s/:@]*:(?!\d{1,5}/)[^\s@]+(?=@)"
)


def redacted(text: str) -> str:
    """The text with every secret replaced by `***`."""
    for value in sorted(environment_secrets(), key=len, reverse=True):
        text = text.replace(value, HIDDEN)
    return _LOOKS.sub(HIDDEN, text)


def environment_secrets() -> set[str]:
    """Values of this process's variables that are secrets by their names, but for names of files."""
    return {
        value
        for name, value in os.environ.items()
        if len(value) >= MIN_LENGTH
        and not name.endswith(("_PATH", "_FILE", "_DIR"))
        and (names_secret(name) or "TOKEN" in name.split("_"))
    }


def names_secret(name: str) -> bool:
    """Whether a key is plainly one of a secret: api_key, hfToken, password; not pad_token, max_tokens, sort_key."""
    words = [word.lower() for word in _WORDS.findall(name)]
    pairs = set(pairwise(words))
    return (
        bool(_ALONE & set(words))
        or any((before, "key") in pairs for before in _KEYS)
        or words == ["token"]
        or (len(words) > 1 and words[-1] == "token" and words[-2] in _TOKENS)
    )


def looks_secret(text: str) -> bool:
    """Whether a text holds something that looks like a secret, or is one of this process's environment."""
    return redacted(text) != text


def secret_places(value: Any, place: str = "", named: bool = False, around: tuple[int, ...] = ()) -> Iterator[str]:
    """Dotted places, within plain nested values, of the strings that are secrets by their key or by their looks."""
    inside = (*around, id(value))
    if id(value) in around:
        return  # a list that holds itself
    if isinstance(value, Mapping):
        for name, inner in value.items():
            inner_place = f"{place}.{name}" if place else str(name)
            yield from secret_places(inner, inner_place, named or names_secret(str(name)), inside)
    elif isinstance(value, list | tuple):
        for number, inner in enumerate(value):
            yield from secret_places(inner, f"{place}[{number}]", named, inside)
    elif isinstance(value, str) and value and (named or looks_secret(value)):
        yield place
