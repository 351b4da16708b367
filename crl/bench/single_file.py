"""A PPO in one file, as researchers write it for one paper: a peer for the benchmark, with nothing around it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from torch import nn
from torch.distributions import Categorical

GAMMA, TRACE, CLIP, VALUE, NORM = 0.99, 0.95, 0.2, 0.5, 0.5


class Net(nn.Module):
    """Actor and critic, of two layers each."""

    def __init__(self, kinds: list[int], width: int, actions: int) -> None:
        super().__init__()
        self.first = torch.tensor([0, *kinds[:-1]]).cumsum(0)
        self.inputs = sum(kinds)
        self.actor, self.critic = self._chain(width, actions), self._chain(width, 1)

    def _chain(self, width: int, out: int) -> nn.Sequential:
        inner = nn.Linear(width, width)
        return nn.Sequential(nn.Linear(self.inputs, width), nn.Tanh(), inner, nn.Tanh(), nn.Linear(width, out))

    def forward(self, codes: torch.Tensor) -> tuple[Categorical, torch.Tensor]:
        """The action's distribution and the value of rows of codes."""
        x = torch.zeros(len(codes), self.inputs).scatter_(1, codes.long() + self.first, 1.0)
        return Categorical(logits=self.actor(x)), self.critic(x)[:, 0]


def train(
    make: Any,
    envs: int,
    steps: int,
    width: int,
    *,
    n_steps: int,
    batch_size: int,
    n_epochs: int,
    learning_rate: float,
    ent_coef: float,
) -> None:
    """Collect, learn, repeat."""
    vector = SyncVectorEnv([make] * envs, autoreset_mode=AutoresetMode.SAME_STEP)
    space: Any = vector.single_observation_space
    action_space: Any = vector.single_action_space
    net = Net([int(kind) for kind in space.nvec], width, int(action_space.n))
    optimizer = torch.optim.Adam(net.parameters(), lr=learning_rate, eps=1e-5)
    shape = (n_steps, envs)
    obs = torch.zeros((*shape, len(space.nvec)), dtype=torch.uint8)
    actions, ended = torch.zeros(shape, dtype=torch.long), torch.zeros(shape)
    logs, rewards, values = (torch.zeros(shape) for _ in range(3))
    seen, _ = vector.reset(seed=0)
    for _ in range(max(1, steps // (n_steps * envs))):
        for t in range(n_steps):
            obs[t] = torch.as_tensor(seen)
            with torch.no_grad():
                answer, values[t] = net(obs[t])
                actions[t] = answer.sample()
                logs[t] = answer.log_prob(actions[t])
            seen, reward, terminated, truncated, info = vector.step(actions[t].numpy())
            rewards[t] = torch.as_tensor(reward)
            ended[t] = torch.as_tensor(terminated | truncated).float()
            cut = truncated & ~terminated
            if cut.any():
                last = torch.as_tensor(np.stack(info["final_obs"][cut]))
                with torch.no_grad():
                    rewards[t][torch.as_tensor(cut)] += GAMMA * net(last)[1]
        with torch.no_grad():
            following = net(torch.as_tensor(seen))[1]
        gains, running = torch.zeros(shape), torch.zeros(envs)
        for t in reversed(range(n_steps)):
            alive = 1 - ended[t]
            running = rewards[t] + GAMMA * following * alive - values[t] + GAMMA * TRACE * alive * running
            gains[t], following = running, values[t]
        rows = [part.flatten(0, 1) for part in (obs, actions, logs, gains, gains + values)]
        for _ in range(n_epochs):
            for chosen in torch.randperm(n_steps * envs).split(batch_size):  # type: ignore[no-untyped-call]
                _step(net, optimizer, [part[chosen] for part in rows], ent_coef)
    vector.close()


def _step(net: Net, optimizer: torch.optim.Optimizer, batch: list[torch.Tensor], ent_coef: float) -> None:
    obs, action, log, gain, target = batch
    answer, value = net(obs)
    ratio = (answer.log_prob(action) - log).exp()
    gain = (gain - gain.mean()) / (gain.std() + 1e-8)
    surrogate = torch.min(gain * ratio, gain * ratio.clamp(1 - CLIP, 1 + CLIP)).mean()
    loss = -surrogate + VALUE * (target - value).square().mean() - ent_coef * answer.entropy().mean()
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(net.parameters(), NORM)
    optimizer.step()
