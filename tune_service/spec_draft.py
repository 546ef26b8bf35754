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
from trainables.redaction import HIDDEN, redacted, secret_places
from tune_service.errors import SpecError
from tune_service.record_url import NO_PASSWORD
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
        draft, text = cls(file=str(path)), _file_text(path)
        try:
            document, keys = read_yaml(text)
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

    def fault(self, key: str, rule: str, found: object, expected: str) -> None:
        self.problems.append(Problem(self.place(key), rule, show(found), expected))
        self.broken.add(key)

    def unknown(self, key: str, name: object, allowed: Iterable[str], where: str) -> None:
        self.problems.append(Problem(self.place(key), f"{where} has no such key", show(name), nearest(name, allowed)))

    def refuse_secrets(self) -> None:
        """A fault for each secret in the spec, which is then gone from it: no later message can show it."""
        for key in list(secret_places(self.raw)):
            expected = "an environment variable, which the ranks see too; the trainable reads it there"
            expected = NO_PASSWORD if key == "record" else expected
            self.fault(key, "a spec holds no secret: its study keeps and exports it", "one (not shown)", expected)
        self.raw = _without_secrets(self.raw)

    def sound(self, *keys: str) -> bool:
        """Whether none of these keys, nor a section around them, is broken."""
        return not any(key == broken or key.startswith(f"{broken}.") for key in keys for broken in self.broken)

    def place(self, key: str) -> str:
        """`study.yaml:12 training.batch_size`. A key that the file lacks has the line of its section; what is no key,
        such as `--storage` or a path, stays as it is."""
        around = key
        while around:
            if around in self.options:
                return f"{self.options[around]} {key}"
            if around in self.lines:
                return f"{self.file}:{self.lines[around]} {key}"
            around = around[: max(around.rfind("."), around.rfind("["), 0)]
        is_key = not key.startswith(("-", "/"))
        return f"{self.file} {key}" if self.file and is_key else key

    def set_name(self, name: str) -> None:
        """Puts in what `--name` says."""
        self.raw["name"] = name
        self.options["name"] = "--name"

    def override(self, overrides: Iterable[str]) -> None:
        """Puts in what `--set a.b=c` says."""
        for text in overrides:
            key, equals, written = text.partition("=")
            if not (key and equals):
                self.problems.append(Problem("--set", "--set takes key=value", text, "training.batch_size=64"))
                continue
            try:
                value, _ = read_yaml(written)
            except _UNREADABLE:
                rule = "a value of --set is read as YAML"
                self.problems.append(Problem(f"--set {key}", rule, written, f"{key}='...', quoted for the shell"))
                continue
            path, value = _override_path(self.raw, key, value)
            if not _put(self.raw, path, value):
                rule = "--set sets keys of mappings"
                self.problems.append(Problem(f"--set {key}", rule, text, f"a mapping at {'.'.join(path[:-1])}"))
            self.options[key] = "--set"


def _without_secrets(raw: Mapping[Any, Any]) -> dict[Any, Any]:
    places = set(secret_places(raw))

    def hidden(value: Any, place: str) -> Any:
        if isinstance(value, Mapping):
            return {name: hidden(inner, f"{place}.{name}" if place else str(name)) for name, inner in value.items()}
        if isinstance(value, list | tuple):
            return [hidden(inner, f"{place}[{number}]") for number, inner in enumerate(value)]
        return HIDDEN if place in places else value

    found: dict[Any, Any] = hidden(raw, "") if places else dict(raw)
    return found


def _file_text(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        found = error.strerror or str(error)
        raise SpecError(Problem(str(path), "a spec is a file that can be read", found, "a YAML file")) from error
    except UnicodeDecodeError as error:
        raise SpecError(Problem(str(path), "a spec is text in UTF-8", str(error), "a YAML file")) from error


def _whole(document: object, place: str) -> dict[Any, Any]:
    if not isinstance(document, Mapping):
        raise SpecError(Problem(place, "a spec is a mapping", show(document), f"the keys {', '.join(KEYS)}"))
    return dict(document)


def _override_path(raw: Mapping[Any, Any], key: str, value: Any) -> tuple[list[str], Any]:
    """Splits a dotted key. The longest name wins that its mapping has; under `search_space` all of it is one name.

    `search_space.model.config.n_layer.choice=[2, 4]` may also end with a kind of domain, and then is the whole domain.
    """
    section, _, rest = key.partition(".")
    if section == "search_space" and rest:
        name, _, kind = rest.rpartition(".")
        return (["search_space", name], {kind: value}) if name and kind in EXAMPLES else (["search_space", rest], value)
    path, parts, target = list[str](), key.split("."), raw
    while parts:
        lengths = (length for length in range(len(parts), 0, -1) if ".".join(parts[:length]) in target)
        length = next(lengths, 1)
        name, parts = ".".join(parts[:length]), parts[length:]
        path.append(name)
        inner = target.get(name)
        target = inner if isinstance(inner, Mapping) else {}
    return path, value


def _put(raw: dict[Any, Any], path: Sequence[str], value: Any) -> bool:
    """Sets one key, making the mappings around it; False when something else is in the way."""
    target = raw
    for name in path[:-1]:
        inner = target.get(name)
        if inner is not None and not isinstance(inner, dict):
            return False
        # A copy, for a YAML anchor may have put the same mapping elsewhere too.
        target[name] = dict(inner or {})
        target = target[name]
    target[path[-1]] = value
    return True


def show(value: object) -> str:
    """A value as the user would write it, cut to a line."""
    if isinstance(value, Settings | Domain):
        value = value.model_dump() if isinstance(value, Settings) else value.to_mapping()
    try:
        text = value if isinstance(value, str) and " " in value else json.dumps(value, default=str, ensure_ascii=False)
    except (TypeError, ValueError):  # keys that JSON has not, a list that holds itself
        text = repr(value)
    text = redacted(text)  # before it is cut, which may be in the middle of one
    return text if len(text) <= 120 else f"{text[:117]}..."


def nearest(name: object, allowed: Iterable[str]) -> str:
    """`batch_size (of a, b, c)` for bacth_size; all names where none is near."""
    names = list(allowed)
    near = difflib.get_close_matches(str(name), names, n=1)
    return f"{near[0]} (of {', '.join(names)})" if near else f"one of {', '.join(names)}"
