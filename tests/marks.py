"""Which cases are left to the long tests (`pytest -m slow`): the same test, of more agents, signals or configs."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest

SLOW = pytest.mark.slow


def quickly(cases: Iterable[Any], quick: Callable[[Any], bool]) -> list[Any]:
    """The cases of a `parametrize`, of which those that are not quick are marked slow."""
    return [case if quick(case) else pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=SLOW)
            for case in cases]  # fmt: skip
