"""Options, checked: each function returns the value, or says in one line what would be right.

What numbers an option may have is a `Range`, declared once where the option is: in the annotation of a field,
in the call that checks a constructor's argument, or in the table of what Stable-Baselines3 takes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from crl.core import CrlError

FAR = 1e12  # no number here is meant to be larger
MANY = 10**9  # nor any count


@dataclass(frozen=True)
class Range:
    """The numbers that an option may have, both ends included. NaN is in none, infinity only where it is an end."""

    least: float
    most: float = FAR

    def check(self, name: str, value: float) -> None:
        """Refuse a number outside."""
        if isinstance(value, float) and not math.isfinite(value) and value != self.most:
            raise CrlError(f"{name}: {value} is not a finite number")
        if value < self.least:
            raise CrlError(f"{name}: {shown(value)} is too small; the least is {_written(self.least)}")
        if value > self.most:
            raise CrlError(f"{name}: {shown(value)} is too large; the most is {_written(self.most)}")


def shown(value: Any, most: int = 60) -> str:
    """A value as a message shows it: not more than fits into a line.

    >>> shown("a" * 100, 10), shown(10**5000)
    ("'aaaaaaa...", 'a whole number of more than 100 digits')
    """
    if isinstance(value, int) and abs(value) >= 10**100:
        return "a whole number of more than 100 digits"
    text = repr(value)
    return text if len(text) <= most else f"{text[: most - 2]}..."


def _written(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:g}"


def truth(name: str, value: Any) -> bool:
    """What is true or false."""
    if not isinstance(value, bool):
        raise CrlError(f"{name}: {shown(value)} is not true or false")
    return value


def whole(name: str, value: Any, least: int = 1, most: int = MANY) -> int:
    """A whole number of at least so much (and at most so much)."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise CrlError(f"{name}: {shown(value)} is not a whole number of at least {least}")
    Range(least, most).check(name, value)
    return value


def number(name: str, value: Any, least: float, most: float = FAR) -> float:
    """A finite number in a range."""
    real = isinstance(value, int | float) and not isinstance(value, bool)
    if not real or not least <= value <= most:  # NaN is in no range
        limit = (
            f"of at least {least:g}" if most == FAR and not (real and value > most) else f"from {least:g} to {most:g}"
        )
        raise CrlError(f"{name}: {shown(value)} is not a number {limit}")
    return float(value)


def one_of(name: str, value: Any, choices: tuple[str, ...]) -> str:
    """One of a few words."""
    if not isinstance(value, str) or value not in choices:
        raise CrlError(f"{name}: {shown(value)} is not {' or '.join(choices)}")
    return value
