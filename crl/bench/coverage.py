"""How often 95 % intervals hold the truth: `crl bench coverage`, on samples of distributions whose mean is known.

Candidates see the same samples. Chosen for `crl.stats.interval` is, of those that hold the mean in at least 93 % of
cases on symmetric data (two-valued data from 5 runs on), the one that holds it most often on the rest. Widths stand
beside, since an interval without ends always holds.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Mapping
from statistics import NormalDist
from typing import Any

import numpy as np

from crl import stats
from crl.core import Array

MARK = 93.0  # percent
RUNS = (3, 5, 10, 20)
DRAWS = 1000  # of the bootstraps
CHOSEN = "the wider of t and Hall"

Bounds = tuple[Array, Array]
Draw = Callable[[np.random.Generator, tuple[int, ...]], Array]


def two_values(high: float, noise: float = 0.0) -> Draw:
    """0 or 1, which is drawn so often; with noise around both, as of returns where runs fail or do not."""
    return lambda rng, shape: (rng.random(shape) < high) + (noise * rng.normal(size=shape) if noise else 0.0)


# Each with its mean. The first five are symmetric.
DISTRIBUTIONS: dict[str, tuple[Draw, float]] = {
    "normal": (lambda rng, shape: rng.normal(size=shape), 0.0),
    "t(3)": (lambda rng, shape: rng.standard_t(3, size=shape), 0.0),
    "uniform": (lambda rng, shape: rng.uniform(size=shape), 0.5),
    "50/50": (two_values(0.5), 0.5),
    "50/50, noise": (two_values(0.5, 0.1), 0.5),
    "exponential": (lambda rng, shape: rng.exponential(size=shape), 1.0),
    "lognormal": (lambda rng, shape: rng.lognormal(size=shape), math.exp(0.5)),
    "80/20": (two_values(0.2), 0.2),
    "80/20, noise": (two_values(0.2, 0.1), 0.2),
}
SYMMETRIC = tuple(DISTRIBUTIONS)[:5]
SKEWED, RARE = ("exponential", "lognormal"), ("80/20", "80/20, noise")


class Samples:
    """Samples, a row each, and what candidates ask of them: the same resamples serve all."""

    def __init__(self, rows: Array, rng: np.random.Generator, draws: int) -> None:
        self.rows, self.runs = rows, rows.shape[1]
        self.mean, self.error = rows.mean(1), rows.std(1, ddof=1) / math.sqrt(self.runs)
        self.t = stats.t_quantile(0.975, self.runs - 1)
        taken = rng.integers(self.runs, size=(draws, self.runs))
        parts = [rows[i : i + 100][:, taken] for i in range(0, len(rows), 100)]
        self.means = np.concatenate([part.mean(2) for part in parts])
        self.errors = np.concatenate([part.std(2, ddof=1) for part in parts]) / math.sqrt(self.runs)

    def around(self, below: Any, above: Any) -> Bounds:
        """From so many standard errors below the mean to so many above it."""
        return self.mean - below * self.error, self.mean + above * self.error

    def percentiles(self, low: Any, high: Any) -> Bounds:
        """Of the resamples' means, at chances that may differ from row to row."""
        ordered = np.sort(self.means, axis=1)
        rows, last = np.arange(len(ordered)), ordered.shape[1] - 1
        low, high = (np.broadcast_to(chance, rows.shape) * last for chance in (low, high))
        return ordered[rows, np.floor(low).astype(int)], ordered[rows, np.ceil(high).astype(int)]


def student(seen: Samples) -> Bounds:
    """Student's t."""
    return seen.around(seen.t, seen.t)


def johnson(seen: Samples) -> Bounds:
    """Student's t around a mean that is corrected for skewness (Johnson 1978)."""
    moved = stats.skewness(seen.rows) / (6 * math.sqrt(seen.runs))
    return seen.around(seen.t - moved, seen.t + moved)


def hall(seen: Samples) -> Bounds:
    """Student's t, its skewness removed by a transformation (Hall 1992)."""
    lean = stats.skewness(seen.rows) / math.sqrt(seen.runs)
    return seen.around(stats.unlean(seen.t, lean), -stats.unlean(-seen.t, lean))


def percentile(seen: Samples) -> Bounds:
    """The percentile bootstrap (Efron 1979)."""
    return seen.percentiles(0.025, 0.975)


def widened(seen: Samples) -> Bounds:
    """The percentile bootstrap, its percentiles widened for few runs (Hesterberg 2015)."""
    return seen.percentiles(*stats.widened(seen.runs))


def bca(seen: Samples) -> Bounds:
    """The bias-corrected and accelerated bootstrap (Efron 1987); ties count half."""
    gap = seen.means - seen.mean[:, None]
    near = np.abs(gap) < 1e-12
    below = ((gap < 0) & ~near).mean(1) + near.mean(1) / 2
    normal = NormalDist()
    bias = np.array([normal.inv_cdf(share) for share in below.clip(1e-4, 1 - 1e-4)])
    away = seen.rows - seen.mean[:, None]
    total = (away**2).sum(1) ** 1.5
    speed = (away**3).sum(1) / np.where(total > 0, 6 * total, 1.0)
    ends = [bias + (bias + z) / (1 - speed * (bias + z)) for z in (-1.96, 1.96)]
    return seen.percentiles(*(np.array([normal.cdf(z) for z in end]) for end in ends))


def _studentised(seen: Samples) -> Array:
    """(resample's mean - mean) / resample's standard error; NaN in resamples of one value."""
    varies = seen.errors > 1e-9 * seen.error[:, None]
    found: Array = (seen.means - seen.mean[:, None]) / np.where(varies, seen.errors, 1.0)
    found[~varies | (seen.error == 0)[:, None]] = math.nan
    found[np.isnan(found).all(1)] = 0.0  # runs that are all alike
    return found


def bootstrap_t(seen: Samples) -> Bounds:
    """The studentised bootstrap (Efron 1982); resamples of one value, which have no t, are left out."""
    low, high = np.nanquantile(_studentised(seen), [0.025, 0.975], axis=1)
    return seen.around(high, -low)


def symmetric_bootstrap_t(seen: Samples) -> Bounds:
    """The studentised bootstrap of |t|, the same on both sides (Hall 1988)."""
    width = np.nanquantile(np.abs(_studentised(seen)), 0.95, axis=1)
    return seen.around(width, width)


def t_or_bootstrap_t(seen: Samples) -> Bounds:
    """On each side the wider of Student's t and the studentised bootstrap."""
    (low, high), (lower, higher) = student(seen), bootstrap_t(seen)
    return np.minimum(low, lower), np.maximum(high, higher)


def t_or_cornish_fisher(seen: Samples) -> Bounds:
    """Student's t, on the side of the long tail wider by the Cornish-Fisher term of T, skewness (2 t^2 + 1) / 6."""
    more = stats.skewness(seen.rows) * (2 * seen.t**2 + 1) / (6 * math.sqrt(seen.runs))
    return seen.around(seen.t + np.maximum(-more, 0), seen.t + np.maximum(more, 0))


def chosen(seen: Samples) -> Bounds:
    """What `crl.stats.interval` is."""
    return stats.wider_of_t_and_hall(seen.rows)


CANDIDATES: dict[str, Callable[[Samples], Bounds]] = {
    "t": student,
    "Johnson's t": johnson,
    "Hall's t": hall,
    CHOSEN: chosen,
    "percentile bootstrap": percentile,
    "percentile, widened": widened,
    "BCa bootstrap": bca,
    "bootstrap-t": bootstrap_t,
    "bootstrap-t, symmetric": symmetric_bootstrap_t,
    "the wider of t and bootstrap-t": t_or_bootstrap_t,
    "the wider of t and Cornish-Fisher": t_or_cornish_fisher,
}


def held(bounds: Bounds, truth: float) -> float:
    """In how many percent of cases the truth is between the bounds, rounding aside."""
    low, high = bounds
    return float(100 * ((low <= truth + 1e-9) & (truth - 1e-9 <= high)).mean())


def measure(runs: int, name: str, samples: int, draws: int = DRAWS) -> dict[str, dict[str, float]]:
    """Each candidate's coverage on one distribution, and its mean width in widths of t's."""
    draw, truth = DISTRIBUTIONS[name]
    rng = np.random.default_rng([runs, list(DISTRIBUTIONS).index(name)])
    ends: dict[str, list[Bounds]] = {candidate: [] for candidate in CANDIDATES}
    for start in range(0, samples, 1000):  # all the resamples of all would not fit into memory
        seen = Samples(draw(rng, (min(1000, samples - start), runs)), rng, draws)
        for candidate, bounds in CANDIDATES.items():
            ends[candidate].append(bounds(seen))
    whole = {name: (np.concatenate([low for low, _ in parts]), np.concatenate([high for _, high in parts]))
             for name, parts in ends.items()}  # fmt: skip
    width = {name: float((high - low).mean()) for name, (low, high) in whole.items()}
    return {name: {"held": held(found, truth), "width": width[name] / width["t"]} for name, found in whole.items()}


# The interquartile mean, of one task or of five whose scores are on one scale.

TASKS: dict[str, tuple[int, float]] = {  # how many, and how far a run's scores on them correlate
    "one task": (1, 0.0),
    "five tasks, independent": (5, 0.0),
    "five tasks, correlated": (5, 0.5),
}
WAYS: dict[str, tuple[bool, bool]] = {  # whether runs are drawn whole, and whether percentiles are widened
    "as published": (False, False),
    "widened": (False, True),
    "whole runs": (True, False),
    "whole runs, widened": (True, True),
}


def scores(rng: np.random.Generator, kind: str, tasks: str, runs: int) -> Array:
    """Runs by tasks; tasks differ by half a unit each."""
    count, shared = TASKS[tasks]
    draw, _ = DISTRIBUTIONS[kind]
    own, common = draw(rng, (runs, count)), draw(rng, (runs, 1))
    mixed = math.sqrt(shared) * common + math.sqrt(1 - shared) * own
    return mixed + np.arange(count) / 2


def measure_iqm(runs: int, kind: str, tasks: str, samples: int, draws: int = 500) -> dict[str, float]:
    """How often each way of drawing holds the interquartile mean of all runs that there could be."""
    rng = np.random.default_rng([runs, list(DISTRIBUTIONS).index(kind), *map(ord, tasks)])
    truth = stats.iqm(scores(rng, kind, tasks, 200_000))
    ends: dict[str, list[Array]] = {way: [] for way in WAYS}
    for _ in range(samples):
        table = scores(rng, kind, tasks, runs)
        drawn = {whole: stats.iqm_draws(table, rng, whole, draws) for whole in (False, True)}
        for way, (whole, wide) in WAYS.items():
            ends[way].append(np.quantile(drawn[whole], stats.widened(runs) if wide else (0.025, 0.975)))
    return {way: held((np.array(found)[:, 0], np.array(found)[:, 1]), truth) for way, found in ends.items()}


def main(samples: int = 10_000, as_json: bool = False) -> str:
    """All of it, as tables or JSON."""
    cells = {}
    for runs in RUNS:
        cells[str(runs)] = {name: measure(runs, name, samples) for name in DISTRIBUTIONS}
        print(f"{runs} runs", file=sys.stderr, flush=True)
    middle = {
        str(runs): {kind: {tasks: measure_iqm(runs, kind, tasks, samples // 10) for tasks in TASKS}
                    for kind in ("normal", "exponential", "80/20, noise")}
        for runs in (stats.ENOUGH, *RUNS[1:])
    }  # fmt: skip
    result = {"samples": samples, "draws": DRAWS, "mean": cells, "iqm": middle}
    return json.dumps(result, indent=1) if as_json else everything(result)


def best(cells: Mapping[str, Any]) -> str:
    """The candidate that the rule chooses."""
    holding = [
        candidate
        for candidate in CANDIDATES
        if all(
            cells[runs][name][candidate]["held"] >= MARK
            for runs in cells
            for name in SYMMETRIC
            if int(runs) >= 5 or not name.startswith("50/50")
        )
    ]
    skewed = {
        candidate: float(np.mean([cells[runs][name][candidate]["held"] for runs in cells for name in (*SKEWED, *RARE)]))
        for candidate in holding
    }
    return max(skewed, key=lambda candidate: skewed[candidate], default="none")


def everything(result: Mapping[str, Any]) -> str:
    """Every candidate, then the interquartile mean, then which one is chosen."""
    return "\n\n".join([_means(result, list(CANDIDATES)), _iqms(result), f"chosen: {best(result['mean'])}"])


def table(result: Mapping[str, Any]) -> str:
    """What the README shows: the chosen one beside the usual ones, and the interquartile mean."""
    return "\n\n".join([_means(result, [CHOSEN, "t", "percentile bootstrap", "BCa bootstrap"]), _iqms(result)])


def _means(result: Mapping[str, Any], shown: list[str]) -> str:
    """Coverage in percent, and mean width over that of t."""
    lines = [f"| runs | mean: | {' | '.join(DISTRIBUTIONS)} |", f"|---|---|{'---|' * len(DISTRIBUTIONS)}"]
    for runs, cells in result["mean"].items():
        for candidate in shown:
            found = [cells[name][candidate] for name in DISTRIBUTIONS]
            numbers = " | ".join(f"{each['held']:.1f} ({each['width']:.2f})" for each in found)
            lines.append(f"| {runs} | {candidate} | {numbers} |")
    return "\n".join(lines)


def _iqms(result: Mapping[str, Any]) -> str:
    """Coverage in percent of the interquartile mean, on the data where it is least."""
    lines = [f"| runs | interquartile mean: | {' | '.join(TASKS)} |", f"|---|---|{'---|' * len(TASKS)}"]
    for runs, kinds in result["iqm"].items():
        for way in WAYS:
            least = [min(cell[tasks][way] for cell in kinds.values()) for tasks in TASKS]
            lines.append(f"| {runs} | {way} | {' | '.join(f'{value:.1f}' for value in least)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(main(as_json="--json" in sys.argv[1:]))
