"""Lanczos's method: a large symmetric matrix, seen from a few vectors, as small tridiagonal ones.

Full re-orthogonalisation, since counting eigenvalues needs Ritz values without ghosts; the small problems are solved
in float64. A matrix of low rank ends the recursion early (a breakdown), with nothing lost.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from crl.core import Array
from crl.linalg.operators import Operator
from crl.linalg.problem import CurvatureError

BREAKDOWN = {
    torch.float32: 1e-6,
    torch.float64: 1e-12,
}  # of the largest entry of T so far: nothing is left
TOO_LARGE = "a product with the matrix is not finite: the curvature is too large, or not a number"


def breakdown(dtype: torch.dtype) -> float:
    """What counts as nothing in a dtype; a sentence about those that have too few digits, or are complex."""
    if dtype not in BREAKDOWN:
        raise CurvatureError(f"curvature is taken in float32 or float64, not in {str(dtype).removeprefix('torch.')}")
    return BREAKDOWN[dtype]


@dataclass(frozen=True)
class Tridiagonal:
    """What a probe vector found after m steps: the diagonal and the off-diagonal of T, and the norm of what is left.

    `off` has m entries: the last one leads out of T, and is 0 where the probe has seen all that it can.
    """

    diagonal: Array
    off: Array

    @cached_property
    def decomposed(self) -> tuple[Array, Array]:
        """(Ritz values, rising; the eigenvectors of T, a column each)."""
        inner = self.off[:-1]
        small = np.diag(self.diagonal) + np.diag(inner, 1) + np.diag(inner, -1)
        values, vectors = torch.linalg.eigh(torch.from_numpy(small))  # numpy's own threads fight torch's
        return values.numpy(), vectors.numpy()

    def ritz(self) -> tuple[Array, Array]:
        """(Ritz values, weights that sum to 1): a quadrature of the probe's spectral density."""
        values, vectors = self.decomposed
        return values, vectors[0] ** 2

    def residuals(self) -> Array:
        """How near an eigenvalue is to each Ritz value."""
        found: Array = float(self.off[-1]) * np.abs(self.decomposed[1][-1])
        return found

    def nearest_to_zero(self) -> Array:
        """Of each of those eigenvalues, the value of least magnitude that it can have."""
        values = self.decomposed[0]
        found: Array = np.sign(values) * np.clip(np.abs(values) - self.residuals(), 0, None)
        return found


class Recursion:
    """Lanczos's recursion from a block of start vectors (k, size), which can be taken further later.

    All vectors go through the operator as one block; each has a basis of its own.
    """

    def __init__(self, operator: Operator, start: Tensor, longest: int) -> None:
        count, size = start.shape
        self.operator, self.longest = operator, min(longest, size)
        self._basis = start.new_empty(count, self.longest, size)  # memory is taken when it is written to
        self._diagonal, self._off = np.zeros((count, self.longest)), np.zeros((count, self.longest))
        self._vectors = start / start.norm(dim=1, keepdim=True)
        self._going = list(range(count))
        self._lengths = [0] * count

    def extend(self, steps: int) -> list[Tridiagonal]:
        """Go on until every vector has taken so many steps or its basis spans all there is; what each has found."""
        while self._going and self._lengths[self._going[0]] < min(steps, self.longest):
            self._step(self._lengths[self._going[0]])
        return [Tridiagonal(self._diagonal[i, :n], self._off[i, :n]) for i, n in enumerate(self._lengths)]

    def _step(self, step: int) -> None:
        self._basis[self._going, step] = self._vectors
        images = self.operator.rows(self._vectors)
        if not torch.isfinite(images).all():
            raise CurvatureError(TOO_LARGE)
        rest, going = [], []
        for image, vector, index in zip(images, self._vectors, self._going, strict=True):
            self._diagonal[index, step] = float(image.double() @ vector.double())
            _orthogonalise(image, self._basis[index, : step + 1])
            norm = float(image.norm())
            if not math.isfinite(norm):
                raise CurvatureError(TOO_LARGE)
            self._lengths[index] = step + 1
            scale = max(np.abs(self._diagonal[index, : step + 1]).max(), self._off[index, :step].max(initial=0.0))
            if norm > breakdown(image.dtype) * scale and scale > 0.0:
                self._off[index, step] = norm
                rest.append(image / norm)
                going.append(index)
        self._going = going
        self._vectors = torch.stack(rest) if rest else self._vectors[:0]


def lanczos(operator: Operator, start: Tensor, steps: int) -> list[Tridiagonal]:
    """A tridiagonal matrix for each row of `start`, (k, size), after so many steps."""
    return Recursion(operator, start, steps).extend(steps)


def each_probe(
    operator: Operator, starts: Tensor, steps: int, tell: Callable[[str], None] = lambda what: None
) -> list[Tridiagonal]:
    """`lanczos` from each row on its own: as many at once as torch may use threads, each on a single one.

    A probe's result does not depend on how many run beside it.
    """
    threads, found = torch.get_num_threads(), []
    twins = [operator]
    while len(twins) < min(threads, len(starts)) and (twin := operator.twin()) is not None:
        twins.append(twin)
    if len(twins) == 1:
        for i, start in enumerate(starts, 1):
            tell(f"probe {i} of {len(starts)}")
            found += lanczos(operator, start[None], steps)
        return found
    tell(f"{len(starts)} probes, {len(twins)} at once")
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(len(twins)) as pool:
            shares = [pool.submit(_some, twin, starts[i :: len(twins)], steps) for i, twin in enumerate(twins)]
            done = [share.result() for share in shares]
    finally:
        torch.set_num_threads(threads)
    return [done[i % len(twins)][i // len(twins)] for i in range(len(starts))]


def _some(operator: Operator, starts: Tensor, steps: int) -> list[Tridiagonal]:
    return [lanczos(operator, start[None], steps)[0] for start in starts]


def _orthogonalise(image: Tensor, basis: Tensor) -> None:
    """Take off what lies in the span of the basis, in place; a second time where the first left little."""
    for _ in range(2):
        before = float(image.norm())
        image -= (basis @ image) @ basis
        if float(image.norm()) > 0.7 * before:
            return


def extremes(operator: Operator, count: int = 5, steps: int = 100, seed: int = 0) -> tuple[Array, Array]:
    """(the largest eigenvalues, falling; the smallest, rising), by block Lanczos: repeated ones are found too."""
    size = operator.size
    count = min(count, size)
    generator = torch.Generator().manual_seed(seed)
    block = torch.randn(size, count, generator=generator, dtype=torch.float64).to(operator.like)
    basis = torch.linalg.qr(block)[0].T.contiguous()
    images = operator.rows(basis)
    tops, bottoms = np.full(count, np.inf), np.full(count, -np.inf)
    for _ in range(steps):
        small = (basis.double() @ images.double().T).cpu()
        values = torch.linalg.eigvalsh((small + small.T) / 2).numpy()
        largest, smallest = values[::-1][:count], values[:count]
        scale = max(abs(values[0]), abs(values[-1]), 1e-300)
        settled = max(np.abs(largest - tops[: len(largest)]).max(), np.abs(smallest - bottoms[: len(smallest)]).max())
        tops, bottoms = largest.copy(), smallest.copy()
        if settled <= 1e-7 * scale or len(basis) >= size:
            break
        fresh = images[-count:].clone()
        for _ in range(2):
            fresh -= (fresh @ basis.T) @ basis
        fresh = torch.linalg.qr(fresh.T)[0].T[: size - len(basis)].contiguous()
        fresh -= (fresh @ basis.T) @ basis  # QR of a deficient block brings old directions back
        fresh = fresh[fresh.norm(dim=1) > 0.5]
        if not len(fresh):
            break
        fresh = torch.linalg.qr(fresh.T)[0].T.contiguous()
        basis, images = torch.cat([basis, fresh]), torch.cat([images, operator.rows(fresh)])
    return tops, bottoms


def probes(size: int, count: int, seed: int, like: Tensor) -> Tensor:
    """Vectors of random signs, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (count, size), generator=generator, dtype=torch.int8)
    return (signs.to(like.device) * 2 - 1).to(like.dtype)
