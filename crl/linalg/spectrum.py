"""The spectrum of a matrix and what it comes to: counts from Ritz values and weights, never from a smoothed curve.

Stochastic Lanczos quadrature (Golub and Welsch 1969; Ubaru, Chen and Saad 2017) with several probe vectors, hence a
standard error for each number; every eigenvalue by `eigvalsh` where that is no dearer.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from crl.core import Array
from crl.linalg.lanczos import each_probe, probes
from crl.linalg.operators import Hessian, Operator, Restricted
from crl.linalg.problem import Problem

FLOOR = 500  # rows up to which every eigenvalue is computed in any case
DENSE = 3_000  # rows of the largest matrix that is ever written down
EPS = (1e-3, 1e-2, 1e-1)  # absolute thresholds of the epsilon-rank
RELATIVE = (1e-3, 1e-2)  # and thresholds relative to the largest eigenvalue by magnitude


@dataclass(frozen=True)
class Estimate:
    """A number, its standard error over probe vectors, and its change from half the steps; both 0 where it is exact.

    An extreme eigenvalue is the furthest that any probe found, its error that of the probes' own furthest.
    """

    value: float
    error: float = 0.0
    half: float = 0.0


@dataclass(frozen=True)
class Spectrum:
    """Eigenvalues, or Ritz values that stand for them: for each probe a row of values, and of weights that sum to 1."""

    values: Array = field(repr=False)  # (probes, steps), float64; padded with weight 0 where a probe ended early
    weights: Array = field(repr=False)
    size: int  # of the matrix
    half: tuple[Array, Array] | None = field(default=None, repr=False)  # after half the steps; None where exact
    settings: Mapping[str, Any] = field(default_factory=dict)
    zero_rows: int = 0  # rows of the matrix that are zero: inputs never seen, dead units

    @property
    def exact(self) -> bool:
        """Whether these are the eigenvalues themselves."""
        return self.half is None

    def _mean(self, number: Callable[[Array, Array], float]) -> Estimate:
        """A function of (values, weights), for each probe."""
        each = np.array([number(v, w) for v, w in zip(self.values, self.weights, strict=True)])
        if self.half is None:
            return Estimate(float(each.mean()))
        before = np.mean([number(v, w) for v, w in zip(*self.half, strict=True)])
        return Estimate(float(each.mean()), _error(each), float(each.mean() - before))

    def _extreme(self, pick: Callable[[Array], float]) -> Estimate:
        each = [float(pick(v[w > 0])) for v, w in zip(self.values, self.weights, strict=True)]
        found = float(pick(np.array(each)))
        if self.half is None:
            return Estimate(found)
        return Estimate(found, _error(each), found - float(pick(self.half[0][self.half[1] > 0])))

    @property
    def lambda_max(self) -> Estimate:
        """The largest eigenvalue."""
        return self._extreme(np.max)

    @property
    def lambda_min(self) -> Estimate:
        """The smallest eigenvalue."""
        return self._extreme(np.min)

    @property
    def trace(self) -> Estimate:
        """The sum of eigenvalues (Hutchinson's estimate over the probes)."""
        return self._mean(lambda v, w: self.size * float(v @ w))

    @property
    def magnitude(self) -> float:
        """The largest eigenvalue by magnitude."""
        return max(abs(self.lambda_max.value), abs(self.lambda_min.value))

    def epsilon_rank(self, eps: float) -> Estimate:
        """The share of eigenvalues beyond eps by magnitude."""
        return self._mean(lambda v, w: min(1.0, float(w[np.abs(v) > eps].sum() / w[w > 0].sum())))

    def relative_rank(self, share: float) -> Estimate:
        """The share of eigenvalues beyond a share of the largest by magnitude."""
        return self.epsilon_rank(share * self.magnitude)

    @property
    def negative_mass(self) -> Estimate:
        """The share of negative eigenvalues in the sum of magnitudes."""

        def share(v: Array, w: Array) -> float:
            total = float(np.abs(v) @ w)
            return float(np.abs(v[v < 0]) @ w[v < 0]) / total if total > 0 else 0.0

        return self._mean(share)

    @property
    def effective_rank(self) -> Estimate:
        """exp of the entropy of magnitudes as shares of their sum, over all eigenvalues (not over Ritz values)."""

        def rank(v: Array, w: Array) -> float:
            size = np.abs(v)
            total = self.size * float(size @ w)
            if total <= 0:
                return 0.0
            shares = size[size > 0] / total
            return float(np.exp(-self.size * (w[size > 0] * shares) @ np.log(shares)))

        return self._mean(rank)

    def trainable(self, rho: float, eps: float) -> bool:
        """The necessary condition of tau-trainability, rank(H) >= rho, by the normalised rank (arXiv 2509.22335 v1)."""
        return self.epsilon_rank(eps).value >= rho

    def numbers(self, eps: Sequence[float] = EPS, relative: Sequence[float] = RELATIVE) -> dict[str, float]:
        """Everything above by name; `/error` is the standard error, `/half` the change from half the steps."""
        estimates = {
            "lambda_max": self.lambda_max,
            "lambda_min": self.lambda_min,
            "trace": self.trace,
            "negative_mass": self.negative_mass,
            "effective_rank": self.effective_rank,
            **{f"epsilon_rank_{value:g}": self.epsilon_rank(value) for value in eps},
            **{f"relative_rank_{value:g}": self.relative_rank(value) for value in relative},
        }
        found = {"zero_rows": self.zero_rows / self.size}
        for name, estimate in estimates.items():
            found[name] = estimate.value
            if not self.exact:
                found[f"{name}/half"] = estimate.half
                found[f"{name}/error"] = estimate.error
        return found

    def save(self, path: Path | str) -> None:
        """Write an `.npz` of plain arrays."""
        Path(path).write_bytes(self.packed())

    def packed(self) -> bytes:
        """The content of such a file."""
        arrays: dict[str, Any] = {"values": self.values, "weights": self.weights}
        if self.half is not None:
            arrays |= {"half_values": self.half[0], "half_weights": self.half[1]}
        file = io.BytesIO()
        np.savez_compressed(
            file,
            settings=np.array(json.dumps({**self.settings, "size": self.size, "zero_rows": self.zero_rows})),
            **arrays,
        )
        return file.getvalue()

    @classmethod
    def load(cls, path: Path | str) -> Spectrum:
        """Read what `save` wrote; no content of the file is run."""
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as data:
            settings = json.loads(str(data["settings"]))
            half = (data["half_values"], data["half_weights"]) if "half_values" in data else None
            size, none = settings.pop("size"), settings.pop("zero_rows")
            return cls(data["values"], data["weights"], size, half, settings, none)


def spectrum(
    operator: Operator,
    count: int = 10,
    steps: int = 100,
    seed: int = 0,
    dense: int | None = None,
    tell: Callable[[str], None] = lambda what: None,
) -> Spectrum:
    """The spectrum of a symmetric operator, by `count` probe vectors and `steps` Lanczos steps.

    Rows that are zero are set aside first. Up to `dense` rows every eigenvalue is computed instead: by default where
    that takes no more products. Where many eigenvalues crowd around a threshold, too few steps miscount them, which no
    probe's standard error shows: the change from half the steps usually does, but is no bound.
    """
    places = live(operator, seed)
    none = operator.size - len(places)
    settings = {"probes": count, "steps": steps, "seed": seed}
    zeros = Spectrum(np.zeros((1, 1)), np.ones((1, 1)), none, None, {**settings, "exact": True}, none)
    if none == operator.size:
        return zeros
    matrix = Restricted(operator, places) if none else operator
    if matrix.size <= (min(max(count * steps, FLOOR), DENSE) if dense is None else dense):
        tell("every eigenvalue")
        values = torch.linalg.eigvalsh(matrix.dense().double().cpu()).numpy()[None]
        found = Spectrum(values, np.full(values.shape, 1 / matrix.size), matrix.size, None, zeros.settings)
    else:
        each = each_probe(matrix, probes(matrix.size, count, seed, matrix.like), steps, tell)
        whole, half = _padded([t.ritz() for t in each]), _padded([t.ritz(max(1, steps // 2)) for t in each])
        found = Spectrum(*whole, matrix.size, half, {**settings, "exact": False})
    return merged([found, zeros]) if none else found


def live(operator: Operator, seed: int) -> Tensor:
    """The rows that are not zero: those of inputs never seen and of dead units are, and are counted without error.

    A row that leaves a vector of random numbers at exactly zero is one.
    """
    mark = torch.randn(operator.size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (operator.rows(mark.to(operator.like)[None])[0] != 0).nonzero()[:, 0]


def hutchinson(operator: Operator, count: int = 10, seed: int = 0) -> Estimate:
    """The trace, from random sign vectors, with its standard error (Hutchinson 1989)."""
    each = [
        float((start @ operator.rows(start[None])[0]).double())
        for start in probes(operator.size, count, seed, operator.like)
    ]
    return Estimate(float(np.mean(each)), _error(each))


def _error(each: Sequence[float] | Array) -> float:
    """The standard error of a mean; NaN of a single one."""
    return float(np.std(each, ddof=1) / math.sqrt(len(each))) if len(each) > 1 else math.nan


def merged(parts: Sequence[Spectrum]) -> Spectrum:
    """The spectrum of a block-diagonal matrix from those of its blocks."""
    size = sum(part.size for part in parts)
    count = max(len(part.values) for part in parts)

    def join(pairs: Sequence[tuple[Array, Array]]) -> tuple[Array, Array]:
        wide = [(np.resize(v, (count, v.shape[1])), np.resize(w, (count, w.shape[1]))) for v, w in pairs]
        weights = [w * (part.size / size) for (_, w), part in zip(wide, parts, strict=True)]
        return np.concatenate([v for v, _ in wide], 1), np.concatenate(weights, 1)

    values, weights = join([(part.values, part.weights) for part in parts])
    exact = all(part.exact for part in parts)
    half = None if exact else join([part.half or (part.values, part.weights) for part in parts])
    none = sum(part.zero_rows for part in parts)
    return Spectrum(values, weights, size, half, {**parts[0].settings, "exact": exact}, none)


def hessian_spectrum(
    model: nn.Module,
    loss: Callable[[Tensor, Any], Tensor],
    batch: Sequence[Any],
    *,
    probes: int = 10,
    steps: int = 100,
    seed: int = 0,
    parameters: Mapping[str, nn.Parameter] | None = None,
    chunk: int | None = None,
) -> Spectrum:
    """The Hessian spectrum of `loss(model(inputs), targets)`, a mean over the samples of `batch = (inputs, targets)`.

    >>> import torch
    >>> _ = torch.manual_seed(0)
    >>> net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))
    >>> inputs, targets = torch.randn(64, 3), torch.randint(2, (64,))
    >>> found = hessian_spectrum(net, nn.functional.cross_entropy, (inputs, targets))
    >>> found.size, found.exact, 0 < found.epsilon_rank(1e-3).value < 1
    (50, True, True)
    """
    if probes < 1 or steps < 2:
        raise ValueError(f"at least 1 probe and 2 steps are needed, not {probes} and {steps}")
    problem = supervised(model, loss, batch, parameters=parameters, chunk=chunk)
    problem.check()
    return spectrum(Hessian(problem), probes, steps, seed)


def supervised(
    model: nn.Module,
    loss: Callable[[Tensor, Any], Tensor],
    batch: Sequence[Any],
    *,
    parameters: Mapping[str, nn.Parameter] | None = None,
    chunk: int | None = None,
) -> Problem:
    """The problem of a model, a loss of (outputs, targets), and a batch of (inputs, targets)."""
    if parameters is None:
        parameters = {name: value for name, value in model.named_parameters() if value.requires_grad}
    return Problem(model, lambda b: model(b[0]), lambda out, b: loss(out, b[1]), tuple(batch), parameters, chunk=chunk)


def _padded(pairs: Sequence[tuple[Array, Array]]) -> tuple[Array, Array]:
    width = max(len(values) for values, _ in pairs)
    values, weights = np.zeros((len(pairs), width)), np.zeros((len(pairs), width))
    for row, (value, weight) in enumerate(pairs):
        values[row, : len(value)], weights[row, : len(weight)] = value, weight
    return values, weights
