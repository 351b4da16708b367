"""How many directions a matrix has: every definition under its own name, since they disagree and are often mixed up.

A matrix of features is samples x units. Unless said otherwise it is taken as it is (uncentred), in float64. A zero
matrix has rank 0, and one that is not finite has rank NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor


def singular_values(matrix: Tensor, centred: bool = False) -> Tensor:
    """Singular values in float64, largest first; `centred` takes each column's mean off first."""
    matrix = matrix.double()
    if centred:
        matrix = matrix - matrix.mean(0, keepdim=True)
    if not torch.isfinite(matrix).all():
        return matrix.new_full((min(matrix.shape),), float("nan"))
    values: Tensor = torch.linalg.svdvals(matrix)
    return values


def entropy_rank(values: Tensor) -> Tensor:
    """The exponential of the entropy of non-negative values, as shares of their sum.

    >>> round(entropy_rank(torch.ones(5)).item(), 6)
    5.0
    """
    values = values.double()
    total = values.sum()
    if not total > 0:
        return total  # 0, or NaN
    shares = values / total
    return torch.exp(-torch.xlogy(shares, shares).sum())


def effective_rank(matrix: Tensor, centred: bool = False) -> float:
    """exp of the entropy of the singular values (not squared) as shares: Roy and Vetterli 2007.

    >>> round(effective_rank(torch.eye(4)), 6), round(effective_rank(torch.ones(6, 4)), 6)
    (4.0, 1.0)
    """
    return float(entropy_rank(singular_values(matrix, centred)))


def effective_rank_to_raise(matrix: Tensor) -> Tensor:
    """`effective_rank` of a matrix as it is, with a gradient that is finite where singular values repeat or vanish.

    Through the eigenvalues of the smaller of A^T A and A A^T, whose gradient has no differences of eigenvalues in it;
    singular values below 1e-7 of the largest are taken for zero, and what they would add to the gradient for nothing.

    >>> flat = torch.ones(6, 4, requires_grad=True)
    >>> rank = effective_rank_to_raise(flat)
    >>> round(rank.item(), 6), bool(torch.autograd.grad(rank, flat)[0].isfinite().all())
    (1.0, True)
    """
    matrix = matrix.double()
    if not torch.isfinite(matrix).all():
        return matrix.sum() * float("nan")
    gram = matrix.T @ matrix if matrix.shape[0] >= matrix.shape[1] else matrix @ matrix.T
    powers = torch.linalg.eigvalsh(gram)
    return entropy_rank(powers[powers > 1e-14 * powers.detach().max()].sqrt())


def stable_rank(matrix: Tensor, centred: bool = False) -> float:
    """The squared Frobenius norm over the squared spectral norm. Not `srank`, which some libraries call so.

    >>> stable_rank(torch.diag(torch.tensor([2.0, 1.0, 1.0])))
    1.5
    """
    squares = singular_values(matrix, centred).square()
    return float(squares.sum() / squares.max()) if squares.max() != 0 else 0.0


def srank(matrix: Tensor, delta: float = 0.01, centred: bool = False) -> float:
    """The least number of singular values that hold 1 - delta of their sum: Kumar et al. 2020 (arXiv 2010.14498).

    >>> srank(torch.diag(torch.tensor([98.0, 1.0, 1.0, 0.0])))
    2.0
    """
    values = singular_values(matrix, centred)
    if not torch.isfinite(values).all():
        return float("nan")
    if values.sum() == 0:
        return 0.0
    short_of = torch.cumsum(values, 0) < (1 - delta) * values.sum() * (1 - 1e-12)
    return float(short_of.sum() + 1)


def participation_ratio(matrix: Tensor, centred: bool = True) -> float:
    """tr(C)^2 / tr(C^2) of the covariance C; centred by default, as a covariance is.

    >>> participation_ratio(torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]]))
    2.0
    """
    powers = singular_values(matrix, centred).square()
    return float(powers.sum().square() / powers.square().sum()) if powers.sum() != 0 else 0.0


def feature_rank(matrix: Tensor, eps: float = 0.01, centred: bool = False) -> float:
    """How many singular values of F / sqrt(samples) exceed eps: Lyle et al. 2022 (arXiv 2204.09560).

    >>> feature_rank(2 * torch.eye(4) * torch.tensor([1.0, 1.0, 0.001, 0.0]))
    2.0
    """
    values = singular_values(matrix, centred) / matrix.shape[0] ** 0.5
    return float("nan") if torch.isnan(values).any() else float((values > eps).sum())


RANKS = {
    "effective_rank": effective_rank,
    "stable_rank": stable_rank,
    "srank": srank,
    "participation_ratio": participation_ratio,
    "feature_rank": feature_rank,
}
