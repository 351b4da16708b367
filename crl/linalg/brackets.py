"""What a few Lanczos steps prove about a spectrum: bounds on counts and sums, not only estimates.

A probe vector v turns a matrix into a distribution on the line: weight (u_i . v)^2 at eigenvalue i. After m steps
only the moments of that distribution are known, as its Jacobi matrix T. Every distribution with the same moments has
at least `low` and at most `high` of its weight below a threshold, and both bounds are reached: the inequalities of
Chebyshev, Markov and Stieltjes (Akhiezer 1965, The Classical Moment Problem, section 2.5; Golub and
Meurant 2010, chapter 6).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch

from crl.core import Array
from crl.linalg.lanczos import Tridiagonal

SIGMAS = 4.0  # standard errors that chance is allowed
CHANCE = math.erfc(SIGMAS / math.sqrt(2))  # how often a normal number is further out, on either side
FAR = 1e4  # times the largest Ritz value: no node is put further out, where it would take digits from the others


def below(seen: Tridiagonal, thresholds: Sequence[float]) -> Array:
    """(low, high) for each threshold t: the least weight strictly below t, and the most at or below it.

    The quadrature with one more node, placed at t itself (Gauss-Radau), reaches both: the weight of its nodes before t
    is the least, and the weight at t is the difference. A recursion that ended early knows the distribution itself.

    >>> coin = Tridiagonal(np.array([0.0]), np.array([1.0]))  # mean 0 and variance 1, nothing else
    >>> below(coin, [1.0]).round(6).tolist()
    [[0.5, 1.0]]
    """
    diagonal, off = seen.diagonal, seen.off
    size, last = len(diagonal), float(off[-1])
    ritz, vectors = seen.decomposed
    scale = max(float(np.abs(ritz).max()), abs(last), 1e-300)
    if last <= 1e-14 * scale:
        weights = vectors[0] ** 2
        return np.array([[weights[ritz < t].sum(), weights[ritz <= t].sum()] for t in thresholds])
    small = np.zeros((len(thresholds), size + 1, size + 1))
    inner = np.arange(size)
    small[:, inner, inner] = diagonal
    small[:, inner, inner + 1] = small[:, inner + 1, inner] = off
    for row, threshold in enumerate(thresholds):
        pull, gaps = (last * vectors[-1]) ** 2, threshold - ritz
        least = np.maximum(pull / (FAR * scale), 1e-15 * scale)
        gaps = np.where(np.abs(gaps) < least, least, gaps)  # at a Ritz value the threshold moves a little to the right
        small[row, size, size] = threshold - float((pull / gaps).sum())
    nodes, axes = (part.numpy() for part in torch.linalg.eigh(torch.from_numpy(small)))
    weights = axes[:, 0, :] ** 2
    found = np.empty((len(thresholds), 2))
    for row, threshold in enumerate(thresholds):
        own = int(np.abs(nodes[row] - threshold).argmin())
        found[row] = weights[row, :own].sum(), weights[row, : own + 1].sum()
    return np.clip(found, 0.0, 1.0)


def beyond(seen: Tridiagonal, threshold: float, blur: float, most: float) -> tuple[float, float, float]:
    """(value, low, high) of the share of weight beyond +-threshold, where nodes may be off by `blur`.

    The threshold may be as large as `most`, which `low` allows for. The value is the middle of the two bounds at the
    threshold itself.
    """
    inner, outer, last = threshold - blur, threshold + blur, most + blur
    edges = [-outer, -inner, inner, outer] + [-last, last] * (outer < last < math.inf)
    bounds = below(seen, edges)
    middle = max(float(bounds[0, 0] + 1 - bounds[3, 1]), 0.0)
    high = min(float(bounds[1, 1] + 1 - bounds[2, 0]), 1.0) if inner > 0 else 1.0
    high = max(middle, high)
    low = 0.0 if math.isinf(last) else min(max(float(bounds[-2, 0] + 1 - bounds[-1, 1]), 0.0), middle)
    return (middle + high) / 2, low, high


def reach(seen: Sequence[Tridiagonal], size: int) -> tuple[float, float]:
    """The largest eigenvalue by magnitude of so many rows: (of the Ritz values, the most that it can be).

    A Ritz value is a lower bound only. From a random vector, after k steps, the largest misses the largest eigenvalue
    by more than e times the spread of all with probability at most 1.648 sqrt(n) exp(-sqrt(e) (2k - 1)), and so does
    the smallest (Kuczynski and Wozniakowski 1992). With e such that both together happen as seldom as
    four standard errors, the spread is at most that of the Ritz values / (1 - 2e); from e = 1/2 on nothing is known,
    and the bound is infinite. A recursion that ended early knows the ends themselves.

    That is of vectors uniform on the sphere. A vector of signs can be orthogonal to an eigenvector of very few and
    equal entries, (e_i - e_j) in one probe of two, and then nothing that it does can show it: no bound here sees that.

    >>> reach([Tridiagonal(np.array([1.0, 2.0]), np.array([0.5, 0.5]))], 1000)[1]
    inf
    """
    ends = np.array([[each.ritz()[0][0], each.ritz()[0][-1]] for each in seen])
    low, high = float(ends[:, 0].min()), float(ends[:, 1].max())
    rare = math.log(2 * 1.648 * math.sqrt(size) / CHANCE)
    missed = min((rare / (2 * len(each.diagonal) - 1)) ** 2 if each.off[-1] > 0 else 0.0 for each in seen)
    more = missed * (high - low) / (1 - 2 * missed) if missed < 0.5 else math.inf
    return max(abs(low), abs(high)), max(high + more, more - low)


def integral(seen: Tridiagonal, function: Callable[[Array], Array], turns: Sequence[float]) -> tuple[float, float]:
    """Bounds on the mean of a function over the distribution; between `turns` the function rises or falls throughout.

    By parts: the mean is f(end) minus the integral of f' F, where F, the weight below, has its bounds in each gap
    between two Ritz values: the weights before the gap's left end, and those up to its right one.
    """
    nodes, vectors = seen.decomposed
    weights = vectors[0] ** 2
    apart = seen.residuals()
    left, right = float(nodes[0] - apart[0]), float(nodes[-1] + apart[-1])
    knots = np.unique(np.concatenate([[left, right], nodes, [t for t in turns if left < t < right]]))
    before = np.concatenate([[0.0, 0.0], np.cumsum(weights)])  # [k]: of the nodes before node k, counted from 1
    gap = np.searchsorted(nodes, (knots[:-1] + knots[1:]) / 2)  # nodes left of each piece
    least = before[gap]
    most = np.concatenate([np.cumsum(weights), [1.0]])[gap]
    if float(seen.off[-1]) <= 1e-14 * max(np.abs(nodes).max(), 1e-300):
        least = most = np.concatenate([[0.0], np.cumsum(weights)])[gap]
    rises = np.diff(function(knots))
    end = float(function(knots[-1:])[0])
    high = end - float(np.where(rises > 0, rises * least, rises * most).sum())
    low = end - float(np.where(rises > 0, rises * most, rises * least).sum())
    return low, high


def student(freedom: int) -> float:
    """How many standard errors of so many degrees of freedom are exceeded as seldom as four known ones.

    Student's t is sqrt(f) / tan(a), where the angle a has a density that rises with sin(a)^(f - 1).

    >>> round(student(9), 1), round(student(100), 2)
    (7.0, 4.18)
    """
    freedom = min(freedom, 10_000)  # nothing changes from there on
    angles = np.geomspace(1e-9, math.pi / 2, 200_000)
    density = np.sin(angles) ** (freedom - 1)
    sums = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2 * np.diff(angles))])
    return math.sqrt(freedom) / math.tan(float(np.interp(CHANCE, sums / sums[-1], angles)))


def with_chance(low: float, high: float, trials: float) -> float:
    """What chance adds to both sides of a share that probes found between `low` and `high`.

    Over random signs the share of weight beyond a threshold has variance at most 2 p (1 - p) / trials, with trials =
    rows x probes: the projection P on those eigenvectors has variance 2 (tr P - sum P_ii^2) / n^2, and the sum is at
    least n p^2. p is not known, so it is the worst one within four standard errors (Wilson's interval).

    >>> round(with_chance(0.5, 0.5, 3200), 3)
    0.05
    """
    spread = 2 * SIGMAS**2 / trials
    least, most = _wilson(low, spread, -1), _wilson(high, spread, 1)
    worst = min(max(0.5, least), most)
    return SIGMAS * math.sqrt(2 * worst * (1 - worst) / trials)


def _wilson(share: float, spread: float, sign: int) -> float:
    """The p furthest from `share` for which |p - share| is within sqrt(spread p (1 - p))."""
    root = math.sqrt(max(spread * share * (1 - share) + spread**2 / 4, 0.0))
    return min(max((share + spread / 2 + sign * root) / (1 + spread), 0.0), 1.0)
