"""Words that messages share."""

from __future__ import annotations


def counted(number: int, noun: str) -> str:
    """`1 trial`, `2 trials`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def shown_value(value: float | None) -> str:
    """A metric for people: four decimals, or four digits where those would show nothing or too much."""
    if value is None:
        return "-"
    return f"{value:.4f}" if value == 0 or 1e-3 <= abs(value) < 1e6 else f"{value:.4g}"
