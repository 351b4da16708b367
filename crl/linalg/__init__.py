"""Curvature and ranks of networks: pure tensor mathematics, which knows no agent and no run.

from crl.linalg import hessian_spectrum
hessian_spectrum(model, loss, (inputs, targets)).numbers()
"""

from crl.linalg.kronecker import Factors, kronecker
from crl.linalg.lanczos import extremes, lanczos
from crl.linalg.operators import GGN, Gram, Hessian, Matrix, Operator
from crl.linalg.problem import CurvatureError, Problem
from crl.linalg.ranks import (
    RANKS,
    effective_rank,
    effective_rank_to_raise,
    entropy_rank,
    feature_rank,
    participation_ratio,
    singular_values,
    srank,
    stable_rank,
)
from crl.linalg.resolve import Effort, exact_spectrum, ggn_spectrum, hessian_spectrum, hutchinson, spectrum, supervised
from crl.linalg.spectrum import Block, Estimate, Spectrum, merged

__all__ = [
    "GGN",
    "RANKS",
    "Block",
    "CurvatureError",
    "Effort",
    "Estimate",
    "Factors",
    "Gram",
    "Hessian",
    "Matrix",
    "Operator",
    "Problem",
    "Spectrum",
    "effective_rank",
    "effective_rank_to_raise",
    "entropy_rank",
    "exact_spectrum",
    "extremes",
    "feature_rank",
    "ggn_spectrum",
    "hessian_spectrum",
    "hutchinson",
    "kronecker",
    "lanczos",
    "merged",
    "participation_ratio",
    "singular_values",
    "spectrum",
    "srank",
    "stable_rank",
    "supervised",
]
