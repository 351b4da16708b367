import numpy as np
import torch
from torch import nn


class MyAgent:
    """Advantage actor-critic: learn from the last 16 steps of every copy, then forget them."""

    stride = 16

    def __init__(self, interface, seed, device, learning_rate=3e-3, gamma=0.98):
        torch.manual_seed(seed)
        self.kinds = int(np.max(getattr(interface.observation, "nvec", 0)))  # categories become one-hot
        inputs = interface.observation.shape[0] * max(self.kinds, 1)
        self.model = nn.Sequential(nn.Linear(inputs, 64), nn.Tanh(), nn.Linear(64, interface.action.n + 1)).to(device)
        self.optimizer = torch.optim.Adam(self.model.parameters(), learning_rate)
        self.gamma, self.device, self.rollout = gamma, device, []

    def look(self, obs):
        x = torch.as_tensor(obs, device=self.device)
        out = self.model(nn.functional.one_hot(x.long(), self.kinds).flatten(-2).float() if self.kinds else x)
        return torch.distributions.Categorical(logits=out[..., :-1]), out[..., -1]

    def act(self, obs, carry, greedy):
        with torch.no_grad():
            policy, _ = self.look(obs)
        return (policy.mode if greedy else policy.sample()).cpu().numpy(), None, None

    def observe(self, experience):
        self.rollout.append(experience)

    def update(self):
        if len(self.rollout) < self.stride:
            return {}
        loss, target, count = 0.0, None, len(self.rollout)
        for e in reversed(self.rollout):
            policy, value = self.look(e.obs)
            ...
        return {}
