"""Numbers over seeds: every random function takes its generator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Interval:
    """A mean over runs and the interval around it."""

    mean: float
    low: float
    high: float
    runs: int

    def __str__(self) -> str:
        return f"{self.mean:.0f} [{self.low:.0f}, {self.high:.0f}]"


def bootstrap(values: Sequence[float], generator: np.random.Generator, share: float = 0.95) -> Interval:
    """The mean, and the percentile bootstrap interval of it (Efron 1979): runs are drawn anew with replacement.

    With few runs it is too narrow: five runs, drawn so, vary by a tenth less than new runs would.

    >>> found = bootstrap([1.0, 2.0, 3.0], np.random.default_rng(0))
    >>> found.mean, 1.0 <= found.low < 2.0 < found.high <= 3.0
    (2.0, True)
    """
    runs = np.asarray(values, dtype=float)
    if not len(runs):
        return Interval(float("nan"), float("nan"), float("nan"), 0)
    drawn = runs[generator.integers(len(runs), size=(10_000, len(runs)))].mean(1)
    low, high = np.quantile(drawn, [(1 - share) / 2, (1 + share) / 2])
    return Interval(float(runs.mean()), float(low), float(high), len(runs))
