"""What one parameter may be, and what a search space is. Knows neither Ray nor Optuna nor torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeGuard

Value = str | int | float | bool | None


@dataclass(frozen=True)
class Uniform:
    """Any number between low and high, both ends included."""

    low: float
    high: float

    def __post_init__(self) -> None:
        _require_finite("uniform", self.low, self.high)
        if not self.low < self.high:
            raise ValueError(f"uniform needs low < high, but got {_pair(self)}")

    def contains(self, value: object) -> bool:
        return _is_number(value) and self.low <= value <= self.high

    def grid(self) -> None:
        """None: it has no end of values."""

    def to_mapping(self) -> dict[str, list[Value]]:
        return {"uniform": [self.low, self.high]}


@dataclass(frozen=True)
class LogUniform:
    """Any number between low and high, both ends included; each factor of ten is as likely as the next."""

    low: float
    high: float

    def __post_init__(self) -> None:
        _require_finite("log_uniform", self.low, self.high)
        if not 0 < self.low < self.high:
            raise ValueError(f"log_uniform needs 0 < low < high, but got {_pair(self)}")

    def contains(self, value: object) -> bool:
        return _is_number(value) and self.low <= value <= self.high

    def grid(self) -> None:
        """None: it has no end of values."""

    def to_mapping(self) -> dict[str, list[Value]]:
        return {"log_uniform": [self.low, self.high]}


@dataclass(frozen=True)
class IntUniform:
    """Any whole number between low and high, both ends included."""

    low: int
    high: int
    kind: ClassVar[str] = "int_uniform"

    def __post_init__(self) -> None:
        if not (_is_int(self.low) and _is_int(self.high)):
            raise ValueError(f"{self.kind} needs whole numbers, but got {_pair(self)}")
        if not self.low < self.high:
            raise ValueError(f"{self.kind} needs low < high, but got {_pair(self)}")

    def contains(self, value: object) -> bool:
        return _is_int(value) and self.low <= value <= self.high

    def grid(self) -> Sequence[Value]:
        """Every value in order. A range, because a tuple of a wide domain would fill the memory."""
        return range(self.low, self.high + 1)

    def to_mapping(self) -> dict[str, list[Value]]:
        return {self.kind: [self.low, self.high]}


@dataclass(frozen=True)
class LogIntUniform(IntUniform):
    """Any whole number between low and high, both ends included; each factor of ten is as likely as the next."""

    kind: ClassVar[str] = "log_int_uniform"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.low < 1:
            raise ValueError(f"{self.kind} needs low of 1 or more, but got {_pair(self)}")


@dataclass(frozen=True)
class Choice:
    """One of some values that have no order."""

    values: tuple[Value, ...]

    def __post_init__(self) -> None:
        if not self.values:
            raise ValueError("choice needs at least one value, but got none")
        for value in self.values:
            if not (value is None or isinstance(value, str | int | float)):
                raise ValueError(f"choice needs plain values (string, number, true, false, null), but got {value!r}")
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"choice needs finite numbers, but got {value!r}")
        # By ==, as Optuna finds a choice again: 1, 1.0 and true would all be the first of them.
        twice = [value for place, value in enumerate(self.values) if value in self.values[:place]]
        if twice:
            rule = "choice needs values that all differ (1, 1.0 and true are equal)"
            raise ValueError(f"{rule}, but got {twice[0]!r} twice")

    def contains(self, value: object) -> bool:
        return any(isinstance(value, bool) == isinstance(own, bool) and value == own for own in self.values)

    def grid(self) -> Sequence[Value]:
        """Every value, in the order that the user gave."""
        return self.values

    def to_mapping(self) -> dict[str, list[Value]]:
        return {"choice": list(self.values)}


Domain = Uniform | LogUniform | IntUniform | Choice


@dataclass(frozen=True)
class SearchSpace(Mapping[str, Domain]):
    """Parameters and what each may be; a mapping from name to domain."""

    domains: Mapping[str, Domain]
    defaults: Mapping[str, Value] = field(default_factory=dict)
    """Where the first trial starts when the spec's own value lies outside. Need not name every parameter."""

    def __post_init__(self) -> None:
        for name, value in self.defaults.items():
            if name not in self.domains or not self.domains[name].contains(value):
                raise ValueError(f"a default needs to lie in its domain, but got {name}={value!r}")

    def __getitem__(self, name: str) -> Domain:
        return self.domains[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.domains)

    def __len__(self) -> int:
        return len(self.domains)

    @property
    def num_points(self) -> int | None:
        """How many different trials there can be; None where some domain has no end of values."""
        sizes = [_size(domain) for domain in self.domains.values()]
        return None if None in sizes else math.prod(size for size in sizes if size is not None)

    def __or__(self, other: Mapping[str, Domain]) -> SearchSpace:
        """This space with some domains added or replaced. Defaults that then lie outside are dropped."""
        domains = {**self.domains, **other}
        defaults = {**self.defaults, **(other.defaults if isinstance(other, SearchSpace) else {})}
        return SearchSpace(domains, {name: value for name, value in defaults.items() if domains[name].contains(value)})


EXAMPLES: Mapping[str, str] = {
    "log_uniform": "{log_uniform: [1.0e-5, 2.0e-4]}",
    "uniform": "{uniform: [0.0, 0.1]}",
    "int_uniform": "{int_uniform: [64, 128]}",
    "log_int_uniform": "{log_int_uniform: [8, 512]}",
    "choice": "{choice: [16, 32, 64]}",
}
"""Each kind of domain as a user writes it."""


def parse_domain(mapping: object) -> Domain:
    """Reads what a user wrote, such as `{log_uniform: [1e-5, 2e-4]}`. ValueError: the rule, then what was given."""
    if not isinstance(mapping, Mapping) or len(mapping) != 1 or next(iter(mapping)) not in EXAMPLES:
        raise ValueError(f"a domain is a mapping with one key of {', '.join(EXAMPLES)}, but got {mapping!r}")
    ((kind, values),) = mapping.items()
    if not isinstance(values, list | tuple):
        raise ValueError(f"{kind} needs a list, but got {values!r}")
    if kind == "choice":
        return Choice(tuple(values))
    if len(values) != 2:
        raise ValueError(f"{kind} needs a list of two numbers, low and high, but got {list(values)!r}")
    if kind == IntUniform.kind:
        return IntUniform(*values)
    if kind == LogIntUniform.kind:
        return LogIntUniform(*values)
    make: Callable[[float, float], Domain] = LogUniform if kind == "log_uniform" else Uniform
    return make(*(_number(kind, value) for value in values))


def _number(kind: str, value: Any) -> float:
    """YAML 1.1 reads `1e-5` as a string, for it has no dot: a string that spells a number is meant as one."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            raise ValueError(f"{kind} needs numbers, but got {value!r}") from None
    if not _is_number(value):
        raise ValueError(f"{kind} needs numbers, but got {value!r}")
    return float(value)


def _size(domain: Domain) -> int | None:
    if isinstance(domain, IntUniform):
        return domain.high - domain.low + 1  # `len` of a wide range overflows
    values = domain.grid()
    return None if values is None else len(values)


def _is_int(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)  # bool is an int in Python, but not to a user


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _require_finite(kind: str, *ends: float) -> None:
    if not all(_is_number(end) and math.isfinite(end) for end in ends):
        raise ValueError(f"{kind} needs finite numbers, but got {', '.join(map(repr, ends))}")


def _pair(domain: Uniform | LogUniform | IntUniform) -> str:
    return f"low={domain.low!r}, high={domain.high!r}"
