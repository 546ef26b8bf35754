"""A spec while it is read: what the user wrote, where each key stands, and the faults so far."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from search_spaces import Domain
from search_spaces.domains import EXAMPLES
from trainables.config import Settings
from trainables.errors import Problem
from tune_service.errors import SpecError
from tune_service.spec_sections import KEYS
from tune_service.spec_yaml import read_yaml

_UNREADABLE = (yaml.YAMLError, ValueError, RecursionError)


@dataclass
class Draft:
    """What the user wrote, what is wrong with it so far, and which keys no further check may rely on."""

    file: str | None = None
    raw: dict[Any, Any] = field(default_factory=dict)
    lines: dict[str, int] = field(default_factory=dict)
    """Line of each dotted key in the file."""
    options: dict[str, str] = field(default_factory=dict)
    """Dotted keys that a command line option set, and that option."""
    problems: list[Problem] = field(default_factory=list)
    broken: set[str] = field(default_factory=set)

    @classmethod
    def of_file(cls, path: str | Path) -> Draft:
        """What a spec file says. Raises SpecError when that is no YAML mapping at all."""
        draft = cls(file=str(path))
        try:
            document, keys = read_yaml(_file_text(path))
        except _UNREADABLE as error:
            mark = getattr(error, "problem_mark", None)
            place = f"{path}:{mark.line + 1}" if mark else str(path)
            found = str(getattr(error, "problem", None) or error)
            raise SpecError(Problem(place, "a spec is valid YAML", found, "a mapping of keys to values")) from error
        draft.raw = _whole(document, str(path))
        for key in keys:
            draft.lines[key.path] = key.line
            if key.twice is not None:
                draft.fault(key.path, "a key stands once in its mapping", f"{key.twice} twice", "one of the two")
        return draft

    @classmethod
    def of_mapping(cls, mapping: object) -> Draft:
        """A spec given as a Python object. Raises SpecError when that is no mapping."""
        return cls(raw=_whole(mapping, "spec"))

    def set_option(self, option: str, key: str, path: Sequence[str], value: object) -> bool:
        ...
