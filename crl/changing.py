"""The visits of an environment that changes: `change: {gravity: [9.8, 20.0]}` makes two."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from crl.checked import FAR
from crl.config import TaskSpec
from crl.core import CrlError

DRAWN: dict[str, tuple[Any, Any]] = {"log_uniform": (math.log, math.exp), "uniform": (float, float)}  # and the way back


def spread(spec: TaskSpec, place: str) -> list[tuple[str, dict[str, Any]]]:
    """(name, setting) of each visit of an entry: `change: {gravity: [9.8, 20.0]}` makes two."""
    base = spec.name or spec.env.rpartition(":")[2]
    if not spec.change:
        return [(base, {})]
    columns = {key: _values(value, f"{place}.change.{key}") for key, value in spec.change.items()}
    lengths = {len(values) for values in columns.values()}
    if len(lengths) != 1 or 0 in lengths:
        raise CrlError(f"{place}.change: every attribute needs the same number of values, at least one")
    settings = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    return [(f"{base}[{', '.join(f'{key}={value}' for key, value in s.items())}]", s) for s in settings]


def _values(given: Any, place: str) -> list[Any]:
    """The values of an attribute, visit by visit: as listed, one, or drawn: `{log_uniform: [0.02, 2], count: 5}`."""
    if not isinstance(given, dict):
        return given if isinstance(given, list) else [given]
    kind = next((kind for kind in DRAWN if kind in given), "")
    said = f"{place}: values are drawn by {{log_uniform: [LEAST, MOST], count: N, seed: N}} or by uniform"
    if not kind or not set(given) <= {kind, "count", "seed"}:
        raise CrlError(said)
    drawn, count, seed = given[kind], given.get("count", 0), given.get("seed", 0)
    whole = all(isinstance(n, int) and not isinstance(n, bool) for n in (count, seed))
    if not whole or not 1 <= count <= 10_000 or seed < 0:
        raise CrlError(f"{said}, with a count from 1 to 10,000")
    pair = isinstance(drawn, list) and len(drawn) == 2 and all(map(_is_number, drawn))
    if not pair or not drawn[0] < drawn[1] or (kind == "log_uniform" and drawn[0] <= 0):
        raise CrlError(f"{place}.{kind}: expected [LEAST, MOST]{', both above 0' * (kind != 'uniform')}, not {drawn!r}")
    ends = [float(end) for end in drawn]
    transform, back = DRAWN[kind]
    found = np.random.default_rng(seed).uniform(transform(ends[0]), transform(ends[1]), count)
    return [min(max(float(f"{back(value):.3g}"), ends[0]), ends[1]) for value in found]  # as the column's name has it


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -FAR <= value <= FAR
