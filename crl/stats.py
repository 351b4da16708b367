"""Numbers over seeds, and what goes with what over runs: every random function takes its generator."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

Array = np.ndarray[Any, np.dtype[Any]]

ROUNDING = 1e-13  # a variance below this share of what it was computed from
SURE = 1 - 1e-9  # Fisher's scale ends here
ENOUGH = 4  # runs of which a middle half can be told
# By the number of runs, the least percent of cases in which `interval` held the mean: on symmetric data (two-valued
# data from 5 runs on), on exponential and lognormal data, and where each run is 1 with chance .2 and else 0.
HELD = {3: (95, 89, 47), 5: (93, 89, 67), 10: (96, 92, 88), 20: (95, 93, 97)}  # crl/bench/results/coverage.json
# The same of `iqm_interval` and the interquartile mean: of one task, and of five of one walk, whose scores correlate.
HELD_IQM = {4: (86, 82), 5: (93, 86), 10: (96, 92), 20: (94, 92)}


@dataclass(frozen=True)
class Interval:
    """A mean over runs and the interval around it; where nothing is known of it, as of one run, the bounds are NaN."""

    mean: float
    low: float
    high: float
    runs: int


def interval(values: ArrayLike, share: float = 0.95, possible: tuple[float, float] = (-math.inf, math.inf)) -> Interval:
    """The mean over runs, and an interval that holds the mean of all runs that there could be.

    Its ends are those of `wider_of_t_and_hall`, which was chosen by simulation: `crl bench coverage` shows it beside
    what it was compared with. On normal, t(3), uniform and 50/50 two-valued data of 3 (two-valued: 5) to 20 runs it
    holds the mean in at least 93 % of cases; on normal data it is 1.6 times as wide as Student's t with 3 and 5 runs,
    1.2 with 10 and 1.04 with 20. It is too narrow on skewed data, and most of all where few runs differ from the rest
    and none of them may be among those seen: `HELD` has by how much.

    It can reach beyond what is `possible`, such as an accuracy of 100 %, unless that is said. Runs that are all alike
    make it a point, for they show no spread. Of one run, or with a value that is not finite, there is no interval:
    its ends are NaN.

    >>> found = interval([1.0, 2.0, 3.0])
    >>> found.mean, round(found.low, 3), round(found.high, 3)
    (2.0, -0.484, 4.484)
    """
    runs = np.asarray(values, dtype=float).ravel()
    if not len(runs):
        return Interval(math.nan, math.nan, math.nan, 0)
    if len(runs) < 2 or not np.isfinite(runs).all():
        return Interval(float(runs.mean()), math.nan, math.nan, len(runs))
    low, high = np.clip(wider_of_t_and_hall(runs, share), *possible)
    return Interval(float(runs.mean()), float(low), float(high), len(runs))


def caption(runs: int, middle: bool = False) -> str:
    """The line below a table of so many runs: what its 95 % intervals hold. Empty where that was not simulated.

    With `middle` the table has interquartile means too.

    >>> caption(2), caption(7)[:43]
    ('', '95 % intervals: simulated with 5 runs, they')
    """
    simulated = max((count for count in HELD if count <= runs), default=0)
    if not simulated:
        return ""
    even, skewed, rare = HELD[simulated]
    two = " (of more than two values)" if simulated < 5 else ""  # three runs of 50/50 are alike in a quarter of cases
    said = (
        f"95 % intervals: simulated with {simulated} runs, they held the mean in at least {even} % of cases on "
        f"symmetric data{two}, {skewed} % on skewed data, and {rare} % where one run in five differs from the rest"
    )
    simulated = max((count for count in HELD_IQM if count <= runs), default=0)
    if middle and simulated:
        one, several = HELD_IQM[simulated]
        said += (
            f"; with {simulated} runs the interquartile mean of one task in {one} %, of five together in {several} %"
        )
    return f"{said}."


def wider_of_t_and_hall(samples: Array, share: float = 0.95) -> tuple[Array, Array]:
    """(low, high) for the mean along the last axis: on each side the wider of Student's interval and Hall's.

    Student's T = (mean of the runs - true mean) / standard error leans against the long tail of skewed runs. Hall
    (1992, J. R. Statist. Soc. B 54, 221) makes g(T) symmetric with g(T) = T + G T^2 / 3 + G^2 T^3 / 27 + G / 6,
    where G is the skewness over the root of the number of runs. Taken alone, his interval is the shorter one on the
    side without a tail, where a few symmetric runs that look skewed by chance need it least. Quantiles are Student's.
    """
    runs = samples.shape[-1]
    mean, spread = samples.mean(axis=-1), samples.std(axis=-1, ddof=1) * (np.ptp(samples, axis=-1) > 0)
    t = t_quantile((1 + share) / 2, runs - 1)
    lean = skewness(samples) / math.sqrt(runs)
    below, above = np.maximum(t, unlean(t, lean)), np.maximum(t, -unlean(-t, lean))
    error = spread / math.sqrt(runs)
    return mean - below * error, mean + above * error


def unlean(value: float, lean: Array) -> Array:
    """The T at which g(T) = T + lean T^2 / 3 + lean^2 T^3 / 27 + lean / 6 is `value`: g is a cube, and rises.

    >>> unlean(2.0, np.array([0.0, 0.6])).round(3).tolist()
    [2.0, 1.443]
    """
    straight = np.abs(lean) < 1e-6
    a = np.where(straight, 1.0, lean)
    found: Array = np.where(straight, value, 3 * (np.cbrt(1 + a * (value - a / 6)) - 1) / a)
    return found


def skewness(samples: Array) -> Array:
    """The third moment over the cube of the spread along the last axis, both unbiased; 0 of two or of equal values.

    >>> skewness(np.array([[0.0, 0.0, 1.0], [0.0, 1.0, 2.0]])).round(3).tolist()
    [1.732, 0.0]
    """
    runs = samples.shape[-1]
    spread = samples.std(axis=-1, ddof=1, keepdims=True)
    away = (samples - samples.mean(axis=-1, keepdims=True)) / np.where(spread > 0, spread, 1.0)
    found: Array = (away**3).sum(axis=-1) * runs / ((runs - 1) * max(runs - 2, 1))
    return found


@functools.lru_cache
def t_quantile(chance: float, freedom: int) -> float:
    """What Student's t with so many degrees of freedom stays below with this chance, at least one half.

    >>> [round(t_quantile(0.975, freedom), 3) for freedom in (1, 2, 4, 9, 19)]
    [12.706, 4.303, 2.776, 2.262, 2.093]
    """
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, freedom) < 2 * chance - 1 else (low, middle)
    return math.sqrt(freedom) * math.tan(low)


def _within(angle: float, freedom: int) -> float:
    """The chance of |t| < sqrt(freedom) tan(angle): the finite sums of Abramowitz & Stegun 26.7.3 and 26.7.4."""
    odd, total = freedom % 2, 0.0
    term = math.cos(angle) if odd else 1.0
    for power in range(odd, freedom - 1, 2):
        total += term
        term *= (power + 1) / (power + 2) * math.cos(angle) ** 2
    total *= math.sin(angle)
    return (angle + total) * 2 / math.pi if odd else total


def iqm(scores: ArrayLike) -> float:
    """The interquartile mean (Agarwal et al. 2021): without the lowest and the highest quarter, rounded down.

    A table of runs and tasks is taken as one list, so that all tasks need one scale.

    >>> iqm([0.0, 1.0, 2.0, 100.0])
    1.5
    """
    each = np.asarray(scores, dtype=float).ravel()
    return float(_iqms(each)) if len(each) and not np.isnan(each).any() else math.nan


def _iqms(scores: Array) -> Array:
    """The interquartile mean along the last axis."""
    cut = scores.shape[-1] // 4
    found: Array = np.sort(scores, axis=-1)[..., cut : scores.shape[-1] - cut].mean(axis=-1)
    return found


def iqm_interval(
    scores: ArrayLike, generator: np.random.Generator, whole: bool = True, share: float = 0.95
) -> Interval:
    """The interquartile mean and its interval by the stratified bootstrap (Agarwal et al. 2021).

    `scores` has a row a run and, with several tasks, a column a task. Each draw has as many scores of each task as
    there are. With `whole` it takes runs with all of their scores, as it must where one run learns all tasks: with
    scores of one run that correlate by half, 20 runs held the truth in 92 % of cases, and in 78 % where each task's
    scores were drawn for themselves. Not `whole` is as published, for tasks that are learned by runs of their own.

    Percentiles are widened as Hesterberg (2015, The American Statistician 69, 371) does for few runs: as much as
    makes the bootstrap's interval for a mean as wide as Student's. With 4 and 5 runs of correlated tasks it is too
    narrow all the same (`HELD_IQM`, `crl bench coverage`). Fewer than `ENOUGH` runs have no interval.

    >>> found = iqm_interval([0.0, 1.0, 2.0, 3.0, 40.0], np.random.default_rng(0))
    >>> found.mean, found.low >= 0.0, found.high <= 40.0
    (2.0, True, True)
    """
    table = np.asarray(scores, dtype=float)
    table = table.reshape(len(table), -1)
    if len(table) < ENOUGH or not np.isfinite(table).all():
        return Interval(iqm(table), math.nan, math.nan, len(table))
    low, high = np.quantile(iqm_draws(table, generator, whole), [*widened(len(table), share)])
    return Interval(iqm(table), float(low), float(high), len(table))


def iqm_draws(table: Array, generator: np.random.Generator, whole: bool, draws: int = 2000) -> Array:
    """The interquartile mean of so many draws of a table's runs."""
    runs, tasks = table.shape
    taken = generator.integers(runs, size=(draws, runs, 1 if whole else tasks))
    return _iqms(table[taken, np.arange(tasks)].reshape(draws, -1))


def widened(runs: int, share: float = 0.95) -> tuple[float, float]:
    """The chances whose percentiles Hesterberg takes: Phi(-t sqrt(n / (n - 1))) and one less that.

    >>> [round(chance, 4) for chance in widened(5)]
    [0.001, 0.999]
    """
    t = t_quantile((1 + share) / 2, runs - 1)
    tail = NormalDist().cdf(-t * math.sqrt(runs / (runs - 1)))
    return tail, 1 - tail


@dataclass(frozen=True)
class Correlation:
    """A coefficient between -1 and 1 and the interval around it; NaN where there is none."""

    value: float
    low: float = math.nan
    high: float = math.nan

    def __str__(self) -> str:
        if math.isnan(self.value):
            return "–"
        return f"{self.value:z.2f} [{'–' if math.isnan(self.low) else f'{self.low:z.2f}, {self.high:z.2f}'}]"


@dataclass(frozen=True)
class Line:
    """A least-squares line and the share of the variance that it explains."""

    slope: float
    intercept: float
    r2: float


# A coefficient of points in many resamples at once: `counts` has a row a point and a column a resample, and says how
# often each point is taken in it. NaN in those in which something does not vary.
Coefficient = Callable[[Array, Array, Array], Array]


def pearson(x: ArrayLike, y: ArrayLike) -> float:
    """Pearson's r: the covariance over the product of the standard deviations; NaN where one of them is zero.

    >>> pearson([1, 2, 3], [1, 3, 2])
    0.5
    """
    return _once(pearsons, x, y)


def spearman(x: ArrayLike, y: ArrayLike) -> float:
    """Spearman's rho: Pearson's r of the ranks; what is equal shares the mean of its ranks.

    >>> spearman([1, 2, 30], [1, 8, 9])
    1.0
    """
    return _once(spearmans, x, y)


def kendall(x: ArrayLike, y: ArrayLike) -> float:
    """Kendall's tau-b (Kendall 1945): pairs in the same order less pairs in opposite order, over sqrt(p_x p_y).

    p_x and p_y are the numbers of pairs that are not equal in x and in y; without ties both are all pairs.

    >>> round(kendall([1, 2, 3], [1, 3, 2]), 9)
    0.333333333
    """
    return _once(kendalls, x, y)


def _once(coefficient: Coefficient, x: ArrayLike, y: ArrayLike) -> float:
    """A coefficient of all points, each taken once."""
    a, b = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    if a.ndim != 1 or a.shape != b.shape:
        raise ValueError(f"x and y must be two lists of one length, got shapes {a.shape} and {b.shape}")
    return float(coefficient(a, b, np.ones((len(a), 1)))[0]) if len(a) > 1 else math.nan


def line(x: ArrayLike, y: ArrayLike) -> Line:
    """The least-squares line of y on x, and its R2; all NaN where x does not vary, R2 where y does not.

    >>> line([0, 1, 2], [1, 3, 5])
    Line(slope=2.0, intercept=1.0, r2=1.0)
    """
    a, b = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    r = pearson(a, b)
    if len(a) < 2 or not np.ptp(a) > 0:
        return Line(math.nan, math.nan, math.nan)
    away = a - a.mean()
    slope = float(away @ (b - b.mean()) / (away @ away))
    return Line(slope, float(b.mean() - slope * a.mean()), r * r)


def pearsons(x: Array, y: Array, counts: Array) -> Array:
    """Pearson's r in each resample, from the sums that it needs: they are products of a matrix with `counts`."""
    x, y = _scaled(x), _scaled(y)
    total, sx, sy, xx, yy, xy = np.stack([np.ones_like(x), x, y, x * x, y * y, x * y]) @ counts
    total = np.maximum(total, 1.0)
    vx, vy = xx - sx * sx / total, yy - sy * sy / total
    return _ratio(xy - sx * sy / total, vx * (vx > ROUNDING * xx), vy * (vy > ROUNDING * yy))


def spearmans(x: Array, y: Array, counts: Array) -> Array:
    """Spearman's rho in each resample, ranked anew; ranks are whole or half, so that the sums are exact."""
    rx, ry = midranks(x, counts), midranks(y, counts)
    total = counts.sum(axis=0)
    mean = total * ((total + 1) / 2) ** 2
    xx, yy, xy = (np.einsum("pr,pr,pr->r", counts, a, b) - mean for a, b in ((rx, rx), (ry, ry), (rx, ry)))
    return _ratio(xy, xx, yy)


def kendalls(x: Array, y: Array, counts: Array) -> Array:
    """Kendall's tau-b in each resample: with S the signs of all pairs, c S c counts those that c takes.

    Counts and signs are whole and small: single precision is exact until a resample takes 16 million points.
    """
    taken = counts.astype(np.float32)
    ordered = np.zeros(counts.shape[1])
    for start in range(0, len(x), 512):  # rows of S: the whole of it need not fit into memory
        part = slice(start, start + 512)
        signs = np.sign(x[part, None] - x) * np.sign(y[part, None] - y)
        ordered += (signs.astype(np.float32) @ taken * taken[part]).sum(axis=0, dtype=float)
    total = counts.sum(axis=0) ** 2
    unequal = (total - (_by_value(values, counts)[0] ** 2).sum(axis=0) for values in (x, y))
    return _ratio(ordered, *unequal)


def midranks(values: Array, counts: Array) -> Array:
    """The rank of each value among those taken in each resample: what is equal shares its mean rank.

    >>> midranks(np.array([5.0, 3.0, 5.0]), np.ones((3, 1))).ravel().tolist()
    [2.5, 1.0, 2.5]
    """
    taken, place = _by_value(values, counts)
    ranks = np.cumsum(taken, axis=0) - taken / 2 + 0.5
    found: Array = ranks[place]
    return found


def _by_value(values: Array, counts: Array) -> tuple[Array, Array]:
    """(how often each distinct value is taken, in order; which of them each point has)."""
    distinct, place = np.unique(values, return_inverse=True)
    order = np.argsort(place, kind="stable")
    taken = counts[order]
    if len(distinct) < len(values):
        taken = np.add.reduceat(taken, np.searchsorted(place[order], np.arange(len(distinct))), axis=0)
    return taken, place


def _scaled(values: Array) -> Array:
    """Values between -1 and 1 around their mean: sums of squares lose no digits. Zeros where they are all equal."""
    if not np.ptp(values) > 0:
        return np.zeros(len(values))
    away = values - values.mean()
    found: Array = away / np.abs(away).max()
    return found


def _ratio(both: Array, one: Array, other: Array) -> Array:
    """both / sqrt(one * other); NaN where that is not above zero."""
    found, varies = np.full(len(both), math.nan), one * other > 0
    found[varies] = np.clip(both[varies] / np.sqrt(one[varies] * other[varies]), -1.0, 1.0)
    return found


def resampled(runs: Sequence[str], resamples: int, generator: np.random.Generator) -> Array:
    """How often each point is taken, a row a point and a column a resample: runs are drawn, then points within them.

    `runs` names the run of each point. With several it is the two-stage cluster bootstrap (Davison & Hinkley 1997,
    3.8): points of one run resemble each other, and only new runs show by how much. Points are drawn anew as well, so
    that it errs to the wide side. Simulated with 2 to 12 runs, alike or very different, of variables that have
    nothing to do with each other, 95 % intervals held zero in 93 to 100 % of cases; resampling points alone, in half.
    With a single run only its points are drawn, as if they were independent, and nothing is said of other runs.
    A run that is drawn k times gives k times as many points as it has, drawn from its own.

    >>> resampled(["a", "a", "b"], 1000, np.random.default_rng(0)).mean(1).round(1).tolist()
    [1.0, 1.0, 1.0]
    """
    names, of = np.unique(np.asarray(runs), return_inverse=True)
    drawn = generator.multinomial(len(names), np.full(len(names), 1 / len(names)), size=resamples)
    counts = np.zeros((len(of), resamples))
    for run in range(len(names)):
        own = np.flatnonzero(of == run)
        counts[own] = generator.multinomial(drawn[:, run] * len(own), np.full(len(own), 1 / len(own))).T
    return counts


def draws(coefficient: Coefficient, x: Array, y: Array, counts: Array) -> Array:
    """The coefficient in each resample, a part of them at a time, so that many points fit into memory."""
    parts = np.array_split(counts, max(1, counts.size // 4_000_000), axis=1)
    return np.concatenate([coefficient(x, y, part) for part in parts])


def percentile_interval(value: float, drawn: Array, share: float = 0.95) -> Correlation:
    """The percentile interval. There is none where too many resamples have no coefficient, since something is constant.

    >>> percentile_interval(0.0, np.array([-1.0, -0.5, 0.0, 0.5, 1.0]), share=0.5)
    Correlation(value=0.0, low=-0.5, high=0.5)
    """
    finite = drawn[np.isfinite(drawn)]
    if len(finite) < share * len(drawn):
        return Correlation(value)
    low, high = np.quantile(finite, [(1 - share) / 2, (1 + share) / 2])
    return Correlation(value, float(low), float(high))


def hold_together(values: Sequence[float], drawn: Array, share: float = 0.95) -> list[bool]:
    """Which coefficients differ from zero if all are to be believed at once: the bootstrap of the largest |t|.

    `drawn` has a column a coefficient and a row a resample, the same resample for all, so that coefficients which
    move together are not counted twice (Romano & Wolf 2005, their first step). On Fisher's scale, where spreads are
    alike. What is NaN holds nothing and costs nothing.

    >>> hold_together([0.9, 0.0, math.nan], np.array([[0.9, 0.3, 0.0], [0.91, -0.3, 0.0], [0.89, 0.1, 0.0]]))
    [True, False, False]
    """
    found = np.arctanh(np.clip(np.asarray(values, dtype=float), -SURE, SURE))
    again = np.arctanh(np.clip(drawn, -SURE, SURE))
    again = np.where(np.isfinite(again), again, found)
    spread = np.maximum(again.std(axis=0), 1e-9)
    limit = np.quantile(np.nan_to_num(np.abs(again - found) / spread).max(axis=1), share)
    return [bool(t > limit) for t in np.abs(found) / spread]
