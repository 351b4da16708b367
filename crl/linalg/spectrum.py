"""The spectrum of a matrix and what it comes to: counts and sums with proved bounds, never a smoothed curve.

Stochastic Lanczos quadrature (Golub and Welsch 1969; Ubaru, Chen and Saad 2017). A count between two Ritz values is not
known, and neither its spread over probes nor more probes show by how much: every probe makes the same mistake. So each
count has a bracket (`crl.linalg.brackets`), and is NaN, with the reason, where the bracket is wide.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from crl.core import Array
from crl.linalg.brackets import SIGMAS, beyond, integral, reach, with_chance
from crl.linalg.lanczos import Tridiagonal
from crl.linalg.problem import CurvatureError

EPS = (1e-3, 1e-2, 1e-1)  # absolute thresholds of the epsilon-rank
RELATIVE = (1e-3, 1e-2)  # and thresholds relative to the largest eigenvalue by magnitude
RESOLUTION = 0.05  # a count whose bracket is wider than this is not known
VISIBLE = 1e-5  # a bracket that is narrower, as a share of what the number is measured by, is not spoken of
EARLIER = "was written by an earlier version, without what bounds are made of: look again with `crl probe`"


@dataclass(frozen=True)
class Estimate:
    """A number and what is known about it: the truth is between `low` and `high`, at four standard errors of chance.

    `error` is one standard error over probe vectors. Not resolved means that the bracket is too wide to speak of a
    number: `value` is then NaN and `reason` says why. Exact numbers have low = value = high, where
    rounding has moved them by no more than a few parts in a million.
    """

    value: float
    low: float
    high: float
    error: float = 0.0
    reason: str = ""

    @property
    def resolved(self) -> bool:
        """Whether there is a number."""
        return not self.reason

    def numbers(self, name: str) -> dict[str, float]:
        """As records: the value, and its bracket and standard error where it is not exact."""
        found = {name: self.value}
        if self.low < self.high:
            found |= {f"{name}/low": self.low, f"{name}/high": self.high}
        if self.error > 0:
            found[f"{name}/error"] = self.error
        return found


@dataclass(frozen=True)
class Block:
    """A diagonal block of the matrix: its eigenvalues, or what each probe vector saw of it."""

    size: int
    eigenvalues: Array | None = None  # equally many times each: a single one stands for a block of equal ones
    seen: tuple[Tridiagonal, ...] = ()
    blur: float = 0.0  # how far rounding in the products may have moved an eigenvalue
    null: bool = False  # zero eigenvalues that are no zero rows: directions, not parameters

    @property
    def zero_rows(self) -> int:
        """Rows that are zero themselves."""
        return self.size if self.eigenvalues is not None and not self.eigenvalues.any() and not self.null else 0

    @property
    def trials(self) -> float:
        """Rows x probes: what chance falls with."""
        return float(self.size * len(self.seen))

    @cached_property
    def nodes(self) -> list[tuple[Array, Array]]:
        """(values, weights that sum to 1): of each probe, or the eigenvalues."""
        if self.eigenvalues is not None:
            return [(self.eigenvalues, np.full(len(self.eigenvalues), 1 / len(self.eigenvalues)))]
        return [each.ritz() for each in self.seen]

    def mean(self, function: Callable[[Array], Array]) -> float:
        """The mean of a function over the spectrum, by quadrature."""
        return float(np.mean([float(weights @ function(values)) for values, weights in self.nodes]))

    @cached_property
    def reach(self) -> tuple[float, float]:
        """The largest eigenvalue by magnitude: (as far as it was seen, the most that it can be)."""
        if self.eigenvalues is None:
            return reach(self.seen, self.size)
        top = float(np.abs(self.eigenvalues).max())
        return top, top

    def share_beyond(self, eps: float, most: float) -> tuple[float, float, float]:
        """(value, low, high) of the share of eigenvalues beyond eps by magnitude, before chance.

        The threshold may be as large as `most`, which `low` allows for.
        """
        if self.eigenvalues is None:
            found = np.mean([beyond(each, eps, self.blur, most) for each in self.seen], axis=0)
            return float(found[0]), float(found[1]), float(found[2])
        sizes = np.abs(self.eigenvalues)
        low, value = float((sizes > most + self.blur).mean()), float((sizes > eps).mean())
        return value, low, float((sizes > eps - self.blur).mean())

    def squares(self, function: Callable[[Array], Array]) -> float:
        """The sum of a function's squares over the eigenvalues, which is what chance depends on; never less than known.

        A probe can miss a far eigenvalue's weight but not its place: within its residual of each Ritz value there is an
        eigenvalue, so the sum is at least that over Ritz values moved so far towards zero.
        """
        guess = self.size * self.mean(lambda x: function(x) ** 2)
        known = [float((function(each.nearest_to_zero()) ** 2).sum()) for each in self.seen]
        return max(guess, *known)

    def total(self, function: Callable[[Array], Array], turns: Sequence[float]) -> tuple[float, float, float]:
        """(value, low, high) of the sum of a function over the eigenvalues, with chance; `turns` as for `integral`.

        The function is 0 at 0, and nowhere steeper than there: rounding moves it by no more than its value at `blur`.
        """
        value = self.size * self.mean(function)
        moved = self.size * float(np.abs(function(np.array([-self.blur, self.blur]))).max())
        if self.eigenvalues is not None:
            return value, value - moved, value + moved
        bounds = self.size * np.mean([integral(each, function, turns) for each in self.seen], axis=0)
        chance = SIGMAS * math.sqrt(2 * self.squares(function) / len(self.seen))
        return value, float(bounds[0]) - chance - moved, float(bounds[1]) + chance + moved


@dataclass(frozen=True)
class Spectrum:
    """The eigenvalues of a matrix as far as they are known: those of its diagonal blocks, together."""

    blocks: tuple[Block, ...] = field(repr=False)
    settings: Mapping[str, Any] = field(default_factory=dict)
    resolution: float = RESOLUTION

    def __post_init__(self) -> None:
        if not self.blocks:
            raise CurvatureError("a matrix without rows has no spectrum")

    @property
    def size(self) -> int:
        """Rows of the matrix."""
        return sum(block.size for block in self.blocks)

    @property
    def zero_rows(self) -> int:
        """Rows of the matrix that are zero: inputs never seen, dead units."""
        return sum(block.zero_rows for block in self.blocks)

    @property
    def exact(self) -> bool:
        """Whether these are the eigenvalues themselves."""
        return all(block.eigenvalues is not None for block in self.blocks)

    @cached_property
    def _merged(self) -> tuple[Array, Array]:
        count = max(len(block.nodes) for block in self.blocks)
        width = sum(max(len(values) for values, _ in block.nodes) for block in self.blocks)
        values, weights = np.zeros((count, width)), np.zeros((count, width))
        start = 0
        for block in self.blocks:
            for row in range(count):
                own, shares = block.nodes[row % len(block.nodes)]
                values[row, start : start + len(own)] = own
                weights[row, start : start + len(own)] = shares * (block.size / self.size)
            start += max(len(own) for own, _ in block.nodes)
        return values, weights

    @property
    def values(self) -> Array:
        """For pictures: eigenvalues or Ritz values, a row a probe; padded with zeros of weight 0."""
        return self._merged[0]

    @property
    def weights(self) -> Array:
        """Their weights, which sum to 1 in each row."""
        return self._merged[1]

    def _extreme(self, pick: Callable[..., Any]) -> Estimate:
        """The furthest that any probe found; an eigenvalue lies within `error` of it, and one may lie further out.

        Where it is an eigenvalue, it is known up to rounding.
        """
        found, low, high = [], [], []
        for block in self.blocks:
            blur = block.blur if block.eigenvalues is not None else 0.0
            for row, (values, _) in enumerate(block.nodes):
                value = float(pick(values))
                found.append((value, 0.0 if block.eigenvalues is not None else _residual(block.seen[row], pick)))
                low.append(value - blur)
                high.append(value + blur)
        value, error = pick(found)
        return _known(value, pick(low), pick(high), self.magnitude, error)

    @property
    def lambda_max(self) -> Estimate:
        """The largest eigenvalue."""
        return self._extreme(max)

    @property
    def lambda_min(self) -> Estimate:
        """The smallest eigenvalue."""
        return self._extreme(min)

    @property
    def reach(self) -> tuple[float, float]:
        """The largest eigenvalue by magnitude: (as far as it was seen, the most that it can be)."""
        return max(block.reach[0] for block in self.blocks), max(block.reach[1] for block in self.blocks)

    @property
    def magnitude(self) -> float:
        """The largest eigenvalue by magnitude, as far as it was seen."""
        return self.reach[0]

    @property
    def trace(self) -> Estimate:
        """The sum of eigenvalues: Hutchinson's estimate, whose variance is at most 2 (|A|_F^2 - tr^2 / n) / probes."""
        value = scale = variance = moved = 0.0
        for block in self.blocks:
            mean = block.mean(lambda x: x)
            value, scale = value + block.size * mean, scale + block.size * block.mean(np.abs)
            moved += block.size * block.blur
            if block.eigenvalues is None:
                spread = max(block.squares(lambda x: x) - block.size * mean**2, 0.0)
                variance += 2 * spread / len(block.seen)
        error = math.sqrt(variance)
        wide = SIGMAS * error + moved
        return _known(value, value - wide, value + wide, scale, error)

    def epsilon_rank(self, eps: float) -> Estimate:
        """The share of eigenvalues beyond eps by magnitude."""
        return self._count(eps, eps)

    def relative_rank(self, share: float) -> Estimate:
        """The share of eigenvalues beyond a share of the largest by magnitude.

        The largest is known between a Ritz value and a bound (`crl.linalg.brackets.reach`), so the count is bracketed
        by those at both.
        """
        return self._count(*share_of(self.reach, share))

    def _count(self, eps: float, most: float) -> Estimate:
        value = low = high = wide = variance = 0.0
        for block in self.blocks:
            share = block.size / self.size
            middle, least, upper = block.share_beyond(eps, most)
            value, wide = value + share * middle, wide + share * (upper - least)
            if block.eigenvalues is None:
                chance = with_chance(least, upper, block.trials)
                least, upper = max(least - chance, 0.0), min(upper + chance, 1.0)
                variance += (share * math.sqrt(2 * middle * (1 - middle) / block.trials)) ** 2
            low, high = low + share * least, high + share * upper
        if self.exact and not wide:
            return Estimate(value, value, value)
        reason = ""
        if high - low > self.resolution:
            reason = f"between {low:.3g} and {high:.3g}: {self._obstacle(eps, most, wide)}"
        return Estimate(math.nan if reason else value, low, high, math.sqrt(variance), reason)

    def _obstacle(self, eps: float, most: float, wide: float) -> str:
        """Why a count is not resolved, and what would help."""
        blur = max(block.blur for block in self.blocks)
        if eps <= 2 * blur:
            return f"the products are precise to {blur:.1g} only"
        if math.isinf(most):
            return "it takes more steps to bound the largest eigenvalue"
        if wide <= self.resolution / 2:
            return "it takes more probes"
        return "it takes more steps to tell eigenvalues apart there"

    def _total(self, function: Callable[[Array], Array], turns: Sequence[float]) -> tuple[float, float, float]:
        value, low, high = np.sum([block.total(function, turns) for block in self.blocks], axis=0)
        return float(value), max(float(low), 0.0), float(high)

    @property
    def negative_mass(self) -> Estimate:
        """The share of negative eigenvalues in the sum of magnitudes."""
        value, low, high = self._total(lambda x: np.clip(-x, 0, None), (0.0,))
        other, least, most = self._total(lambda x: np.clip(x, 0, None), (0.0,))
        if not value + other > 0:
            return Estimate(0.0, 0.0, 0.0)
        found = value / (value + other)
        low, high = low / max(low + most, 1e-300), high / max(high + least, 1e-300)
        reason = f"between {low:.3g} and {high:.3g}" if high - low > 2 * self.resolution else ""
        return _known(found if not reason else math.nan, low, high, 1.0, reason=reason)

    @property
    def effective_rank(self) -> Estimate:
        """exp of the entropy of magnitudes as shares of their sum, over all eigenvalues (not over Ritz values).

        With x the magnitudes over the largest, A = sum x and B = sum x ln(1/x), it is A exp(B / A). Of eigenvalues that
        rounding moves, the shares move by T = n blur / sum in total variation, and their entropy by no more than
        T ln(n - 1) + h(T) (Audenaert 2007). Resolved where the bracket is within a tenth.
        """
        top = self.magnitude
        if not top > 0:
            return Estimate(0.0, 0.0, 0.0)
        turn = top / math.e
        value, low, high = self._total(lambda x: np.abs(x) / top, (0.0,))
        other, least, most = self._total(lambda x: _surprise(np.abs(x) / top), (-turn, 0.0, turn))
        found = value * math.exp(min(other / value, 700.0))
        if self.exact:
            factor = math.exp(self._entropy_moved(top * value))
            low, high = found / factor, found * factor
        else:
            low, high = max(low, 1.0), max(high, 1.0)  # the largest alone makes 1
            ends = [a * math.exp(min(least / a, 700.0)) for a in (low, high, min(max(least, low), high))]
            low, high = min(ends), max(a * math.exp(min(most / a, 700.0)) for a in (low, high))
        low, high = max(low, 1.0), min(high, float(self.size))
        reason = f"between {low:.3g} and {high:.3g}" if high > (1 + 2 * RESOLUTION) * low else ""
        return _known(found if not reason else math.nan, low, high, found, reason=reason)

    def _entropy_moved(self, total: float) -> float:
        """How far rounding may have moved the entropy of eigenvalues whose magnitudes have this sum."""
        size = sum(block.size for block in self.blocks if block.reach[0] > 0)
        moved = sum(block.size * block.blur for block in self.blocks) / total
        if size < 2 or moved >= 1 - 1 / size:
            return math.log(max(size, 1))
        both = np.array([moved, 1 - moved])
        return moved * math.log(size - 1) + float(_surprise(both).sum())

    def trainable(self, rho: float, eps: float) -> bool | None:
        """The necessary condition of tau-trainability, rank(H) >= rho, by the normalised rank (arXiv 2509.22335 v1).

        None where rho lies inside the bracket.
        """
        rank = self.epsilon_rank(eps)
        return True if rank.low >= rho else False if rank.high < rho else None

    def estimates(self, eps: Sequence[float] = EPS, relative: Sequence[float] = RELATIVE) -> dict[str, Estimate]:
        """Everything above by name."""
        return {
            "lambda_max": self.lambda_max,
            "lambda_min": self.lambda_min,
            "trace": self.trace,
            "negative_mass": self.negative_mass,
            "effective_rank": self.effective_rank,
            **{f"epsilon_rank_{value:g}": self.epsilon_rank(value) for value in eps},
            **{f"relative_rank_{value:g}": self.relative_rank(value) for value in relative},
        }

    def numbers(self, eps: Sequence[float] = EPS, relative: Sequence[float] = RELATIVE) -> dict[str, float]:
        """The same as numbers: `/low` and `/high` are the bracket, `/error` the standard error over probes."""
        found = {"zero_rows": self.zero_rows / self.size}
        for name, estimate in self.estimates(eps, relative).items():
            found |= estimate.numbers(name)
        return found

    def save(self, path: Path | str) -> None:
        """Write an `.npz` of plain arrays."""
        Path(path).write_bytes(self.packed())

    def packed(self) -> bytes:
        """The content of such a file."""
        arrays: dict[str, Array] = {"values": self.values, "weights": self.weights}
        for i, block in enumerate(self.blocks):
            if block.eigenvalues is not None:
                arrays[f"eigenvalues_{i}"] = block.eigenvalues
            for j, each in enumerate(block.seen):
                arrays[f"probe_{i}_{j}"] = np.stack([each.diagonal, each.off])
        blocks = [[block.size, block.blur, len(block.seen), block.null] for block in self.blocks]
        head = {"blocks": blocks, "resolution": self.resolution, "settings": dict(self.settings)}
        file = io.BytesIO()
        np.savez_compressed(file, head=np.array(json.dumps(head)), **arrays)  # type: ignore[arg-type]
        return file.getvalue()

    @classmethod
    def load(cls, path: Path | str) -> Spectrum:
        """Read what `save` wrote; no content of the file is run."""
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as data:
            if "head" not in data:
                raise ValueError(f"{path} {EARLIER}")
            head = json.loads(str(data["head"]))
            blocks = []
            for i, (size, blur, count, *null) in enumerate(head["blocks"]):
                eigenvalues = data.get(f"eigenvalues_{i}")
                seen = tuple(Tridiagonal(*data[f"probe_{i}_{j}"]) for j in range(count))
                blocks.append(Block(size, eigenvalues, seen, blur, *null))
            return cls(tuple(blocks), head["settings"], head["resolution"])


def merged(parts: Sequence[Spectrum]) -> Spectrum:
    """The spectrum of a block-diagonal matrix from those of its blocks."""
    blocks = tuple(block for part in parts for block in part.blocks)
    exact = all(part.exact for part in parts)
    products = sum(int(part.settings.get("products", 0)) for part in parts)
    settings = {**parts[0].settings, "exact": exact, "products": products}
    return Spectrum(blocks, settings, parts[0].resolution)


def _known(value: float, low: float, high: float, scale: float, error: float = 0.0, reason: str = "") -> Estimate:
    """An estimate without its bracket where that is too narrow to speak of."""
    if high - low <= VISIBLE * scale:
        low = high = value
    return Estimate(value, low, high, error, reason)


def share_of(reach: tuple[float, float], share: float) -> tuple[float, float]:
    """A share of both, which is 0 of what is infinite if it is 0."""
    return share * reach[0], share * reach[1] if share else 0.0


def _residual(seen: Tridiagonal, pick: Callable[..., Any]) -> float:
    """How near an eigenvalue is to the largest or smallest Ritz value."""
    values, apart = seen.decomposed[0], seen.residuals()
    return float(apart[list(values).index(pick(values))])


def _surprise(x: Array) -> Array:
    """x ln(1/x), and 0 at 0."""
    found: Array = -x * np.log(np.where(x > 0, x, 1.0))
    return found
