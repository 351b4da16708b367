"""Points and their coefficients: how each predictor goes with each target, in three ways of taking the values.

As they are (`pooled`), or less the mean of their own run (`within`), or less the mean over runs at the same visit of
the same task (`same visit`). Every row of a target uses the same resamples of runs, then of boundaries within them.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from crl import stats
from crl.core import Array
from crl.stats import Correlation, Line

TARGETS = {
    "learning": "area under the visit's training curve, from what was seen before its first update",
    "after": "return on the visit's task after it, from what was seen before its first update",
    "forgetting": "mean drop of the other tasks from their best, from what was seen at the end of the visit",
}
KINDS = ("pooled", "within", "same visit")  # how values are taken: as they are, or less the mean of their group
FEWEST = 4  # points that a coefficient is computed from
PAIRS = 1e9  # of points, times resamples, that Kendall's interval may cost: above it has fewer resamples, at least 200
NOTHING = Correlation(math.nan)
NO_LINE = Line(math.nan, math.nan, math.nan)


@dataclass(frozen=True)
class Point:
    """One boundary of one run: what a monitor saw there, x, and what came of it, y."""

    run: str
    visit: int
    task: str
    target: str
    predictor: str
    x: float
    y: float


@dataclass(frozen=True)
class Row:
    """How one predictor goes with one target; `beside` are Spearman's coefficients of the values taken otherwise."""

    target: str
    predictor: str
    n: int
    runs: int
    spearman: Correlation = NOTHING
    pearson: Correlation = NOTHING
    kendall: Correlation = NOTHING
    line: Line = NO_LINE
    beside: Mapping[str, Correlation] = field(default_factory=dict)
    holds: bool = False
    reason: str = ""  # why there are no coefficients

    @property
    def clear(self) -> bool:
        """Whether the interval, taken alone, leaves out zero."""
        return self.spearman.low > 0 or self.spearman.high < 0


def rows_of(points: Sequence[Point], resamples: int, within: bool, tell: Callable[[str], None]) -> list[Row]:
    """One target's rows, the largest |Spearman| first; each has its part of the same resamples."""
    places = {place: i for i, place in enumerate(dict.fromkeys((p.run, p.visit) for p in points))}
    if not places:
        return []
    counts = stats.resampled([run for run, _ in places], resamples, np.random.default_rng(0))
    by: dict[str, list[Point]] = defaultdict(list)
    for point in points:
        by[point.predictor].append(point)
    found = []
    for count, own in enumerate(by.values(), start=1):
        tell(f"{points[0].target}: predictor {count} of {len(by)}")
        found.append(_row(own, counts[[places[p.run, p.visit] for p in own]], within))
    held = stats.hold_together([row.spearman.value for row, _ in found], np.stack([drawn for _, drawn in found], 1))
    rows = [replace(row, holds=holds and row.clear) for (row, _), holds in zip(found, held, strict=True)]
    return sorted(rows, key=lambda row: (-_size(row.spearman), row.predictor))


def _row(points: Sequence[Point], counts: Array, within: bool) -> tuple[Row, Array]:
    """A predictor's row, and Spearman's coefficient in each resample."""
    main, *others = kinds(within)
    x, y, kept = taken(points, main)
    runs = len({points[i].run for i in kept})
    nothing = dict.fromkeys(others, NOTHING)
    row = Row(points[0].target, points[0].predictor, len(kept), runs, beside=nothing, reason=_reason(x, y))
    if row.reason:
        return row, np.full(counts.shape[1], math.nan)
    used = counts[kept]
    fewer = used[:, : max(200, int(PAIRS / len(x) ** 2))]
    drawn = stats.draws(stats.spearmans, x, y, used)
    row = replace(
        row,
        spearman=stats.percentile_interval(stats.spearman(x, y), drawn),
        pearson=stats.percentile_interval(stats.pearson(x, y), stats.draws(stats.pearsons, x, y, used)),
        kendall=stats.percentile_interval(stats.kendall(x, y), stats.draws(stats.kendalls, x, y, fewer)),
        line=stats.line(x, y),
        beside={kind: _beside(points, counts, kind) for kind in others},
    )
    return row, drawn


def kinds(within: bool) -> tuple[str, ...]:
    """How values are taken: first for the table's columns, then for what stands beside them."""
    return ("within", "pooled", "same visit") if within else KINDS


def _beside(points: Sequence[Point], counts: Array, kind: str) -> Correlation:
    """Spearman's coefficient of the values taken otherwise."""
    x, y, kept = taken(points, kind)
    if _reason(x, y):
        return NOTHING
    return stats.percentile_interval(stats.spearman(x, y), stats.draws(stats.spearmans, x, y, counts[kept]))


def taken(points: Sequence[Point], kind: str) -> tuple[Array, Array, list[int]]:
    """(x, y, which points): as they are, or less the mean of their group, without the points that are alone in it.

    The means are taken once, from all points, and not again in each resample.
    """
    x, y = (np.array([getattr(p, axis) for p in points], dtype=float) for axis in ("x", "y"))
    if kind == "pooled":
        return x, y, list(range(len(points)))
    groups: dict[object, list[int]] = defaultdict(list)
    for i, point in enumerate(points):
        groups[point.run if kind == "within" else (point.visit, point.task)].append(i)
    for own in groups.values():
        x[own], y[own] = _deviations(x[own]), _deviations(y[own])
    kept = sorted(i for own in groups.values() if len(own) > 1 for i in own)
    return x[kept], y[kept], kept


def _deviations(values: Array) -> Array:
    """Values less their mean; what rounding alone leaves is zero, for ranks would make much of it."""
    away = values - values.mean()
    found: Array = np.where(np.abs(away) > 1e-12 * np.abs(values).max(), away, 0.0)
    return found


def _reason(x: Array, y: Array) -> str:
    """Why there is no coefficient, if so."""
    if len(x) < FEWEST:
        return f"fewer than {FEWEST} points"
    return next((f"the {name} does not vary" for name, v in (("number", x), ("target", y)) if not np.ptp(v) > 0), "")


def _size(found: Correlation) -> float:
    return -1.0 if math.isnan(found.value) else abs(found.value)
