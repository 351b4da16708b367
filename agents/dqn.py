"""DQN's loss (Mnih et al. 2015) as pure functions of the network's outputs, as Stable-Baselines3 trains on it.

Outputs are the values of all actions, one row a sample; the target network's answer is a constant of the batch.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

Batch = Mapping[str, Tensor]


def targets(reward: Tensor, following: Tensor, terminated: Tensor, discount: float) -> Tensor:
    """The one-step target: the reward, and the discounted best value of the next state unless there is none."""
    return reward + discount * (1 - terminated) * following.max(1).values


def objective(outputs: Tensor, batch: Batch) -> Tensor:
    """Huber's loss of the temporal difference of the actions taken."""
    difference = outputs.gather(1, batch["action"].long())[:, 0] - batch["target"]
    size = difference.abs()
    return torch.where(size < 1, 0.5 * difference.square(), size - 0.5).mean()


def divergence(before: Tensor, after: Tensor) -> dict[str, Tensor]:
    """How far each sample's answer moved: is the greedy action another one, and the squared change of values."""
    flips = (before.argmax(1) != after.argmax(1)).to(before.dtype)
    return {"greedy_flips": flips, "value_change": (after - before).square().mean(1)}
