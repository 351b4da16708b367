"""Running observation and reward normalisation that lives in the agent, so that no task switch resets it silently."""

from __future__ import annotations

import numpy as np
import torch

from crl.core import Array, State


class Moments:
    """Running mean and variance over rows (Chan et al. 1979, the parallel form).

    >>> m = Moments((1,)); m.update(np.array([[0.0], [2.0]])); float(m.mean[0])
    1.0
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.mean = np.zeros(shape)
        self.var = np.ones(shape)
        self.count = 0

    def update(self, rows: Array) -> None:
        """Take in a batch of rows."""
        mean, var, count = rows.mean(0), rows.var(0), len(rows)
        total = self.count + count
        delta = mean - self.mean
        self.var = (self.var * self.count + var * count + delta**2 * self.count * count / total) / total
        self.mean = self.mean + delta * count / total
        self.count = total

    def state_dict(self) -> State:
        """Mean, variance and count."""
        return {"mean": torch.tensor(self.mean), "var": torch.tensor(self.var), "count": self.count}

    def load_state_dict(self, state: State) -> None:
        """The inverse of `state_dict`."""
        self.mean, self.var, self.count = state["mean"].numpy().copy(), state["var"].numpy().copy(), state["count"]


class Normalizer:
    """Observations to zero mean and unit variance, rewards to unit variance of the discounted return; both clipped.

    Its two methods are the ones that a Stable-Baselines3 replay buffer calls while sampling.
    """

    def __init__(self, shape: tuple[int, ...], envs: int, gamma: float, observation: bool, reward: bool) -> None:
        self.shape, self.envs, self.gamma = shape, envs, gamma
        self.observation, self.reward = observation, reward
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.obs_moments, self.return_moments = Moments(self.shape), Moments(())
        self.returns = np.zeros(self.envs)

    def update(self, obs: Array, reward: Array, ended: Array) -> None:
        """Take in one vector step."""
        if self.observation:
            self.obs_moments.update(obs)
        self.returns = self.returns * self.gamma + reward
        self.return_moments.update(self.returns)
        self.returns[ended] = 0.0

    def normalize_obs(self, obs: Array) -> Array:
        """Observations as the network sees them."""
        if not self.observation or not self.obs_moments.count:
            return obs
        scaled = (obs - self.obs_moments.mean) / np.sqrt(self.obs_moments.var + 1e-8)
        return np.clip(scaled, -10.0, 10.0).astype(np.float32)

    def normalize_reward(self, reward: Array) -> Array:
        """Rewards as the loss sees them."""
        if not self.reward or not self.return_moments.count:
            return reward
        return np.clip(reward / np.sqrt(self.return_moments.var + 1e-8), -10.0, 10.0).astype(np.float32)

    def state_dict(self) -> State:
        """Both moments and the running returns."""
        return {
            "obs": self.obs_moments.state_dict(),
            "return": self.return_moments.state_dict(),
            "returns": torch.tensor(self.returns),
        }

    def load_state_dict(self, state: State) -> None:
        """The inverse of `state_dict`."""
        self.obs_moments.load_state_dict(state["obs"])
        self.return_moments.load_state_dict(state["return"])
        self.returns = state["returns"].numpy().copy()
