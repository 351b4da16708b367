"""Options of monitors and methods, checked: each returns the value, or says in one line what would be right."""

from __future__ import annotations

from typing import Any

from crl.core import CrlError


def truth(name: str, value: Any) -> bool:
    """What is true or false."""
    if not isinstance(value, bool):
        raise CrlError(f"{name}: {value!r} is not true or false")
    return value


def whole(name: str, value: Any, least: int = 1, most: float = float("inf")) -> int:
    """A whole number of at least so much (and at most so much)."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise CrlError(f"{name}: {value!r} is not a whole number of at least {least}")
    if value > most:
        raise CrlError(f"{name}: {value} is too large; the most is {most}")
    return value


def number(name: str, value: Any, least: float, most: float = float("inf")) -> float:
    """A finite number in a range."""
    fits = isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= most
    if not fits or value == float("inf"):
        limit = f"of at least {least:g}" if most == float("inf") else f"from {least:g} to {most:g}"
        raise CrlError(f"{name}: {value!r} is not a number {limit}")
    return float(value)


def one_of(name: str, value: Any, choices: tuple[str, ...]) -> str:
    """One of a few words."""
    if value not in choices:
        raise CrlError(f"{name}: {value!r} is not {' or '.join(choices)}")
    return str(value)
