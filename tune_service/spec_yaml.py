"""YAML as specs have it: the lines of keys and keys written twice are not lost, and what is written reads back."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import yaml

MAX_VALUES = 100_000
"""More than any spec has. A few lines of aliases of aliases can stand for billions."""


class Key(NamedTuple):
    """One key of a mapping, or one item of a list."""

    path: str
    """`search_space.batch_size`, `data.text[0]`"""
    line: int
    twice: str | None = None
    """Its name, where the same mapping has it already."""


class _Loader(yaml.SafeLoader):
    """Reads `1e-5` as the number it is (YAML 1.1 wants a dot and a sign)."""


class _Dumper(yaml.SafeDumper):
    """Quotes the strings that `_Loader` would read as numbers, and writes no aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_str(self, data: str) -> yaml.ScalarNode:
        # Outside of double quotes a NEL is written as it is, and read back as another line break.
        return self.represent_scalar("tag:yaml.org,2002:str", data, style='"' if "\x85" in data else None)


_Dumper.add_representer(str, _Dumper.represent_str)

for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)[eE][-+]?[0-9]+$"),
        list("-+.0123456789"),
    )


def write_yaml(mapping: Mapping[str, Any]) -> str:
    return yaml.dump(mapping, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def read_yaml(text: str) -> tuple[Any, list[Key]]:
    """The one document of a text, and its keys in order. Raises YAMLError, ValueError (a date such as 2026-13-01) or
    RecursionError."""
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None, []
        keys = list(_keys(node, "", set(), ()))
        if _num_values(node, {}) > MAX_VALUES:
            raise yaml.MarkedYAMLError(problem="aliases that stand for too much", problem_mark=node.start_mark)
        return loader.construct_document(node), keys
    finally:
        loader.dispose()


def _keys(node: yaml.Node, path: str, seen: set[int], around: tuple[int, ...]) -> Iterator[Key]:
    """Walks a document before it becomes plain values, which know neither lines nor repeated keys."""
    if id(node) in around:
        raise yaml.MarkedYAMLError(problem="an alias that holds itself", problem_mark=node.start_mark)
    if id(node) in seen:
        return  # an alias: its lines are where its anchor is
    seen.add(id(node))
    around = (*around, id(node))
    if isinstance(node, yaml.SequenceNode):
        for place, item in enumerate(node.value):
            inner = f"{path}[{place}]"
            yield Key(inner, item.start_mark.line + 1)
            yield from _keys(item, inner, seen, around)
    elif isinstance(node, yaml.MappingNode):
        names: set[str] = set()
        for name_node, value in node.value:
            name = str(name_node.value)
            inner = f"{path}.{name}" if path else name
            is_repeated = name in names and not name_node.tag.endswith(":merge")
            yield Key(inner, name_node.start_mark.line + 1, name if is_repeated else None)
            names.add(name)
            yield from _keys(value, inner, seen, around)


def _num_values(node: yaml.Node, known: dict[int, int]) -> int:
    """How many values a document has when each alias is written out."""
    if id(node) not in known:
        inner: list[yaml.Node] = []
        if isinstance(node, yaml.SequenceNode):
            inner = list(node.value)
        elif isinstance(node, yaml.MappingNode):
            inner = [value for _, value in node.value]
        known[id(node)] = 1 + sum(_num_values(each, known) for each in inner)
    return known[id(node)]
