"""DQN (Mnih et al. 2015): Stable-Baselines3's, and its loss as pure functions of the network's outputs.

Outputs are the values of all actions, one row a sample; the target network's answer is a constant of the batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import stable_baselines3 as sb3
import torch
from torch import Tensor, nn

from agents.layers import bare_copy
from agents.off_policy import OffPolicy
from agents.sb3 import SB3Agent, named
from crl.core import Experience

Batch = Mapping[str, Tensor]


def targets(reward: Tensor, following: Tensor, discount: Tensor) -> Tensor:
    """The one-step target: the reward, and the best value of the next state, discounted (by 0 where there is none)."""
    return reward + discount * following.max(1).values


def objective(outputs: Tensor, batch: Batch) -> Tensor:
    """Huber's loss of the temporal difference of the actions taken."""
    difference = outputs.gather(1, batch["action"].long())[:, 0] - batch["target"]
    size = difference.abs()
    return torch.where(size < 1, 0.5 * difference.square(), size - 0.5).mean()


def divergence(before: Tensor, after: Tensor) -> dict[str, Tensor]:
    """How far each sample's answer moved: is the greedy action another one, and the squared change of values."""
    flips = (before.argmax(1) != after.argmax(1)).to(before.dtype)
    return {"greedy_flips": flips, "value_change": (after - before).square().mean(1)}


class DQN(OffPolicy):
    """Deep Q-learning (Mnih et al. 2015), with settings that learn the smallest MiniGrid tasks."""

    algorithm = sb3.DQN
    defaults: ClassVar[Mapping[str, Any]] = {
        "learning_rate": 3e-4,
        "buffer_size": 50_000,
        "learning_starts": 1_000,
        "batch_size": 64,
        "train_freq": 1,
        "gradient_steps": 2,
        "target_update_interval": 1_000,
        "exploration_fraction": 0.5,
    }

    @property
    def networks(self) -> dict[str, dict[str, nn.Parameter]]:
        """The parameters that answer now; the target network's are not plastic."""
        last = len(self.algo.q_net.q_net) - 1
        idle = [f"q_net.q_net.{last}.heads.{i}." for i in range(len(self.heads)) if i != self._current_head()]
        found = named(self.model, ["q_net"])
        return {"q": {name: value for name, value in found.items() if not name.startswith(tuple(idle))}}

    @property
    def chains(self) -> list[list[str]]:
        """The modules from what is seen to the values of actions, by name and in order."""
        return [[f"q_net.q_net.{i}" for i in range(len(self.algo.q_net.q_net))]]

    @property
    def minibatch(self) -> dict[str, torch.Tensor]:
        """The batch whose step is about to happen, as `train()` sees it."""
        seen = self.algo.replay_buffer.last
        batch = {"obs": seen.observations, "action": seen.actions, "next_obs": seen.next_observations}
        discount = self.algo.gamma if seen.discounts is None else seen.discounts[:, 0]
        discount = discount * (1 - seen.dones[:, 0])
        return self._aimed({**batch, "reward": seen.rewards[:, 0], "discount": discount})

    def prepare(self, experience: Experience) -> dict[str, torch.Tensor]:
        """Transitions as a replayed batch, with the target network's answer."""
        reward = experience.reward if self.normalizer is None else self.normalizer.normalize_reward(experience.reward)
        terminated = self._tensor(experience.terminated).float().flatten()
        batch = {
            "obs": self._tensor(self._seen(experience.obs)).flatten(0, 1),
            "action": self._tensor(experience.action).reshape(-1, 1),
            "next_obs": self._tensor(self._seen(experience.next_obs)).flatten(0, 1),
            "reward": self._tensor(reward).float().flatten(),
        }
        return self._aimed({**batch, "discount": self.algo.gamma * (1 - terminated)})

    def _aimed(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """With the target that the target network gives now."""
        with torch.no_grad():
            answer = self.algo.q_net_target(batch["next_obs"])
        return {**batch, "target": targets(batch["reward"], answer, batch["discount"])}

    def outputs(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The values of all actions."""
        answer: torch.Tensor = self.algo.q_net(batch["obs"])
        return answer

    def objective(self, outputs: torch.Tensor, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Huber's loss of the temporal difference."""
        return objective(outputs, batch)

    def divergence(self, before: torch.Tensor, after: torch.Tensor) -> dict[str, torch.Tensor]:
        """How far the answers moved."""
        return divergence(before, after)

    remembers = ("obs", "action", "next_obs", "reward", "discount")

    def rehearse(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The loss of replayed transitions, with today's target network."""
        return self.objective(self.outputs(batch), self._aimed(dict(batch)))

    def distill(self, outputs: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        """The loss of answering otherwise than a teacher: half the squared error of the values."""
        return 0.5 * (outputs - teacher).square().mean()

    def rebuilt(self) -> None:
        """The network has grown: the target network is made anew from it."""
        SB3Agent.rebuilt(self)  # the target network may be of another structure yet
        policy = self.algo.policy
        policy.q_net_target = self.algo.q_net_target = bare_copy(policy.q_net)
        policy.q_net_target.set_training_mode(False)

    def _plastic(self) -> Iterator[nn.Parameter]:
        return iter(self.algo.q_net.parameters())

    def _bodies(self) -> list[tuple[Any, str]]:
        return [(net, "q_net") for net in (self.algo.q_net, self.algo.q_net_target)]

    def _head_slots(self) -> list[tuple[Any, str | int]]:
        return [(net.q_net, len(net.q_net) - 1) for net in (self.algo.q_net, self.algo.q_net_target)]

    def _learns(self, owner: Any) -> bool:
        return owner is self.algo.q_net.q_net
