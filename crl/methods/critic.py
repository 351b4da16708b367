"""The critic's part in memory: its outputs estimate returns, so in raw units they would outweigh the policy's.

A method that remembers answers leaves the critic out unless its option `critic` gives it a weight, and then divides its
squared errors by the variance of the returns. The agent names those outputs in `critic_columns`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from crl.core import CrlError


def values_of(agent: Any, outputs: Tensor) -> Tensor:
    """Which numbers of an answer are the critic's, (numbers,); none where the agent does not name any."""
    chosen = torch.zeros(outputs.shape[-1], dtype=torch.bool, device=outputs.device)
    chosen[list(getattr(agent, "critic_columns", ()))] = True
    return chosen


def per_variance(returns: Tensor) -> float:
    """1 / the variance of returns, or 0 where they do not vary, since nothing is known of their size then.

    >>> per_variance(torch.tensor([100.0, 300.0])), per_variance(torch.ones(3))
    (0.0001, 0.0)
    """
    variance = float(returns.double().var(correction=0))
    return 1 / variance if variance > 1e-12 else 0.0


def value_distance(agent: Any, outputs: Tensor, teacher: Tensor, returns: Tensor) -> Tensor:
    """The mean squared distance of the critic's estimates, in variances of the returns."""
    chosen = values_of(agent, outputs)
    distance: Tensor = (outputs - teacher)[:, chosen].square().sum(1).mean()
    return distance * per_variance(returns)


def refuse_without_critic(critic: float, agent: Any) -> None:
    """A weight of the critic's part is for agents that have one."""
    if critic and not getattr(agent, "critic_columns", ()):
        name = type(agent).__name__
        raise CrlError(f"critic: {critic:g} weighs a critic's outputs, and {name} names none (`critic_columns`)")
