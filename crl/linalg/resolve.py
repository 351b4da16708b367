"""Taking a spectrum: every eigenvalue where that is cheap, otherwise Lanczos until the counts asked for are resolved.

How far to go is decided by what has been found and by a budget of products and memory, never by a clock: the same seed
gives the same numbers on a slow machine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from crl.linalg.brackets import student, with_chance
from crl.linalg.lanczos import TOO_LARGE, Recursion, Tridiagonal, breakdown, each_probe
from crl.linalg.lanczos import probes as signs
from crl.linalg.memory import room_for_gram
from crl.linalg.operators import GGN, Gram, Hessian, Operator, Restricted, loss_weight
from crl.linalg.problem import CurvatureError, Problem
from crl.linalg.spectrum import EPS, RELATIVE, RESOLUTION, Block, Estimate, Spectrum, share_of

FLOOR = 1_000  # rows up to which every eigenvalue is computed in any case
DENSE = 3_000  # rows of the largest matrix that is written down for its sake
PRODUCTS = 300  # with the matrix, if that many are needed
MEMORY = 2**31  # bytes of a Lanczos basis
STRIDE = 25  # steps between two looks at what is resolved
MOST = 32  # probes that are worth taking against chance


@dataclass(frozen=True)
class Effort:
    """What is wanted of a spectrum, and what may be spent on it.

    Steps are added until every count at `eps`, and at `relative` shares of the largest eigenvalue, is resolved, then
    probes while chance is what keeps a count from being so. Where `probes` or `steps` are given, they are what is
    taken, no more and no less.
    """

    probes: int | None = None
    steps: int | None = None
    eps: Sequence[float] = EPS
    relative: Sequence[float] = RELATIVE
    resolution: float = RESOLUTION
    products: int = PRODUCTS
    memory: int = MEMORY

    def __post_init__(self) -> None:
        for name, least in (("probes", 1), ("steps", 2), ("products", 2), ("memory", 1)):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, int) and value >= least):
                raise ValueError(f"{name}: {value!r} is not a whole number of at least {least}")
        if not 0 < self.resolution <= 1:
            raise ValueError(f"resolution: {self.resolution!r} is not a share between 0 and 1")
        for name in ("eps", "relative"):
            if not all(0 <= value < math.inf for value in getattr(self, name)):
                raise ValueError(f"{name}: {getattr(self, name)!r} is not a list of numbers of at least 0")

    @property
    def fixed(self) -> tuple[int, int] | None:
        """(probes, steps), where they are given."""
        if self.probes is None and self.steps is None:
            return None
        count = self.probes or 1
        return count, self.steps or max(self.products // count, 2)

    @property
    def most(self) -> int:
        """Products that may be taken."""
        return math.prod(self.fixed) if self.fixed else self.products


def spectrum(
    operator: Operator,
    effort: Effort = Effort(),
    seed: int = 0,
    dense: int | None = None,
    tell: Callable[[str], None] = lambda what: None,
) -> Spectrum:
    """The spectrum of a symmetric operator.

    Rows that are zero are set aside first. Up to `dense` rows every eigenvalue is computed: by default where that takes
    no more products, and up to 1,000 rows in any case.
    """
    mark, noise = _marks(operator, seed)
    places = (mark != 0).nonzero()[:, 0]
    none = operator.size - len(places)
    zeros = [Block(none, np.zeros(1))] if none else []
    settings = {"seed": seed, "products": MARKS, "exact": True}
    if none == operator.size:
        return Spectrum(tuple(zeros), settings, effort.resolution)
    matrix = Restricted(operator, places) if none else operator
    if matrix.size <= (min(max(effort.most, FLOOR), DENSE) if dense is None else dense):
        tell("every eigenvalue")
        whole = matrix.dense().double().cpu()
        _finite(whole)
        values = torch.linalg.eigvalsh(whole).numpy()
        blur = _blur(values, noise, matrix.like.dtype)
        settings |= {"products": MARKS + matrix.size}
        return Spectrum((Block(matrix.size, values, (), blur), *zeros), settings, effort.resolution)
    each = _resolved(matrix, effort, noise, seed, tell) if effort.fixed is None else each_probe(
        matrix, signs(matrix.size, effort.fixed[0], seed, matrix.like), effort.fixed[1], tell
    )  # fmt: skip
    blur = _blur(np.concatenate([one.ritz()[0] for one in each]), noise, matrix.like.dtype)
    taken = [len(one.diagonal) for one in each]
    settings |= {"exact": False, "probes": len(each), "steps": max(taken), "products": MARKS + sum(taken)}
    return Spectrum((Block(matrix.size, None, tuple(each), blur), *zeros), settings, effort.resolution)


MARKS = 4  # products that tell which rows are zero, and how precise products are


def _marks(operator: Operator, seed: int) -> tuple[Tensor, float]:
    """(the image of a random vector; the norm of the rounding error in the image of a unit vector).

    A row that leaves random numbers at exactly zero is zero: an input never seen, a dead unit. A symmetric matrix has
    x'Ay = y'Ax; what they differ by, times sqrt(n / 2), is about the norm of the error of a product.
    """
    breakdown(operator.like.dtype)
    generator = torch.Generator().manual_seed(seed)
    block = torch.randn(MARKS, operator.size, generator=generator, dtype=torch.float64).to(operator.like)
    block = block / block.norm(dim=1, keepdim=True)
    images = operator.rows(block)
    _finite(images)
    cross = block.double() @ images.double().T
    apart = (cross - cross.T)[*torch.triu_indices(MARKS, MARKS, 1)]
    return images[0], float(apart.square().mean().sqrt()) * math.sqrt(operator.size / 2)


def _finite(products: Tensor) -> None:
    if not torch.isfinite(products).all():
        raise CurvatureError(TOO_LARGE)


def _blur(values: np.ndarray[Any, Any], noise: float, dtype: torch.dtype) -> float:
    """How far rounding may have moved an eigenvalue: the norm of the errors of all products together."""
    return max(2 * noise, breakdown(dtype) * float(np.abs(values).max()))


def _resolved(
    matrix: Operator, effort: Effort, noise: float, seed: int, tell: Callable[[str], None]
) -> list[Tridiagonal]:
    """One probe as far as it takes, then as many more as chance asks for, each of the best length found for the first.

    Where the matrix is so small that one probe can never be enough, half of the products are left for the others.
    """

    def resolved(seen: Sequence[Tridiagonal], probes: int) -> int:
        """How many counts would be resolved if so many probes saw the same."""
        blur = _blur(np.concatenate([each.ritz()[0] for each in seen]), noise, matrix.like.dtype)
        block = Block(matrix.size, None, tuple(seen), blur)
        wanted = [(eps, eps) for eps in effort.eps] + [share_of(block.reach, share) for share in effort.relative]
        bounds = [block.share_beyond(*thresholds)[1:] for thresholds in wanted]
        widths = [high - low + 2 * with_chance(low, high, matrix.size * probes) for low, high in bounds]
        return sum(width <= effort.resolution for width in widths)

    alone = 2 * with_chance(0.1, 0.1, matrix.size) <= effort.resolution / 2
    room = effort.memory // (matrix.size * matrix.like.element_size())
    longest = max(min(effort.products // (1 if alone else 2), room), 2)
    starts = signs(matrix.size, MOST, seed, matrix.like[:0])
    run = Recursion(matrix, starts[:1].to(matrix.like), longest)
    steps, best = 0, (0, 0, 0, 1)  # (counts resolved, products saved, steps, probes): the more the better
    total = len(effort.eps) + len(effort.relative)
    while not steps or (steps < longest and best[0] < total):
        steps = min(longest, max(steps + STRIDE, steps * 3 // 2))
        tell(f"{steps} steps")
        each = run.extend(steps)
        taken = len(each[0].diagonal)
        for probes in range(1, min(1 + (effort.products - taken) // taken, MOST) + 1):
            best = max(best, (resolved(each, probes), -probes * taken, taken, probes))
        if taken < steps:
            break  # the probe has seen all that it can
    del run  # and its basis
    hoped, _, length, probes = best
    more, spent = probes - 1, len(each[0].diagonal)
    while more and spent + more * length <= effort.products and len(each) + more <= MOST:
        each += each_probe(matrix, starts[len(each) : len(each) + more].to(matrix.like), length, tell)
        spent, more = spent + more * length, int(resolved(each, len(each)) < hoped)
    return each


def exact_spectrum(matrix: Tensor, made_in: torch.dtype, settings: Mapping[str, Any]) -> Spectrum:
    """Every eigenvalue of a matrix that is written down, from products of a dtype."""
    breakdown(made_in)
    _finite(matrix)
    live = (matrix != 0).any(1)
    values = torch.linalg.eigvalsh(matrix[live][:, live].double()).cpu().numpy()
    none = len(matrix) - len(values)
    blocks = [Block(len(values), values, (), _blur(values, 0.0, made_in))] if len(values) else []
    zeros = [Block(none, np.zeros(1))] if none else []
    return Spectrum((*blocks, *zeros), {**settings, "exact": True})


def ggn_spectrum(problem: Problem, effort: Effort = Effort(), seed: int = 0) -> Spectrum:
    """Every eigenvalue of the GGN J'LJ through the Gram matrix K = JJ', of samples x outputs rows.

    With K = R R, the eigenvalues of J'LJ that are not zero are those of R L R, also where L is indefinite (PPO). The
    two differ in how many zeros they have: where R L R is the larger, its smallest by magnitude are left out, and where
    it is the smaller, the others of J'LJ are zero though its rows are not.
    """
    room_for_gram(problem)
    mark, noise = _marks(GGN(problem), seed)
    gram = Gram(problem, "none")
    kernel = gram.dense().double()
    _finite(kernel)
    values, vectors = torch.linalg.eigh(kernel)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    weight = loss_weight(problem).double()
    samples, numbers = weight.shape[:2]
    weighted = torch.einsum("nij,njk->nik", weight, root.reshape(samples, numbers, -1)).reshape(len(root), -1)
    found = torch.linalg.eigvalsh(root.T @ weighted).cpu().numpy()
    live = int((mark != 0).sum())
    kept = np.sort(found[np.argsort(-np.abs(found))[:live]])
    blur = _blur(found, noise, problem.like.dtype)
    blocks = (
        Block(len(kept), kept, (), blur),
        Block(live - len(kept), np.zeros(1), null=True),
        Block(problem.size - live, np.zeros(1)),
    )
    settings = {"seed": seed, "products": MARKS + 2 * gram.size, "through": "gram", "exact": True}
    return Spectrum(tuple(block for block in blocks if block.size), settings, effort.resolution)


def hutchinson(operator: Operator, count: int = 10, seed: int = 0) -> Estimate:
    """The trace, from random sign vectors, with its standard error (Hutchinson 1989).

    The error is itself estimated, from few vectors badly: the bracket is Student's.
    """
    each = [
        float((start @ operator.rows(start[None])[0]).double())
        for start in signs(operator.size, count, seed, operator.like)
    ]
    value = float(np.mean(each))
    error = float(np.std(each, ddof=1) / math.sqrt(count)) if count > 1 else math.inf
    wide = student(count - 1) * error if count > 1 else math.inf
    return Estimate(value, value - wide, value + wide, error)


def hessian_spectrum(
    model: nn.Module,
    loss: Callable[[Tensor, Any], Tensor],
    batch: Sequence[Any],
    *,
    probes: int | None = None,
    steps: int | None = None,
    seed: int = 0,
    parameters: Mapping[str, nn.Parameter] | None = None,
    chunk: int | None = None,
    **wanted: Any,
) -> Spectrum:
    """The Hessian spectrum of `loss(model(inputs), targets)`, a mean over the samples of `batch = (inputs, targets)`.

    `wanted` are the other fields of `Effort`: `eps`, `relative`, `resolution`, `products`, `memory`.

    >>> import torch
    >>> _ = torch.manual_seed(0)
    >>> net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))
    >>> inputs, targets = torch.randn(64, 3), torch.randint(2, (64,))
    >>> found = hessian_spectrum(net, nn.functional.cross_entropy, (inputs, targets))
    >>> found.size, found.exact, 0 < found.epsilon_rank(1e-3).value < 1
    (50, True, True)
    """
    effort = Effort(probes, steps, **wanted)
    problem = supervised(model, loss, batch, parameters=parameters, chunk=chunk)
    for parameter in problem.parameters.values():
        breakdown(parameter.dtype)
    problem.check()
    return spectrum(Hessian(problem), effort, seed)


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
