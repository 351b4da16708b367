"""Small changes to a task, by name: what is seen permuted, shifted or noisy, actions remapped, rewards turned.

They act on the flat observation, after the environment's own wrappers (given by import path) and before sequences
are joined. Each keeps its spaces, and draws what it draws from the episode's seed or from a `seed` of its own.

What changes rewards alone (`scale_reward`, `sign_reward`, any `gymnasium.RewardWrapper`) is for learning: training
returns, evaluation and the matrix report the environment's own rewards, unless its options say `evaluate: true`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from crl.core import Array, CrlError
from envs.answers import number

Env = gymnasium.Env[Any, Any]


class PermuteObservation(gymnasium.ObservationWrapper[Any, Any, Any]):
    """Places of the observation in another, fixed order."""

    def __init__(self, env: Env, seed: int = 0) -> None:
        super().__init__(env)
        space = env.observation_space
        self.order = np.random.default_rng(seed).permutation(int(np.prod(space.shape or ())))
        if isinstance(space, spaces.MultiDiscrete):
            self.observation_space = spaces.MultiDiscrete(space.nvec[self.order], dtype=space.dtype)  # type: ignore[arg-type]
        elif isinstance(space, spaces.Box):
            self.observation_space = spaces.Box(space.low[self.order], space.high[self.order], dtype=np.float32)

    def observation(self, observation: Array) -> Array:
        """The same numbers, elsewhere."""
        return observation[self.order]


class ShiftObservation(gymnasium.ObservationWrapper[Any, Any, Any]):
    """A constant added to every number that is seen, or a list of them, one for each."""

    def __init__(self, env: Env, by: float | list[float] = 1.0) -> None:
        super().__init__(env)
        box = _numbers(env, "shift_observation")
        self.by = np.asarray(by, dtype=np.float32)
        if self.by.shape not in ((), box.shape):
            raise CrlError(f"wrappers: shift_observation.by must be a number or {box.shape[0]} of them, not {by!r}")
        self.observation_space = spaces.Box(box.low + self.by, box.high + self.by, dtype=np.float32)

    def observation(self, observation: Array) -> Array:
        """Shifted numbers."""
        return np.asarray(observation + self.by, dtype=np.float32)


class NoiseObservation(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Gaussian noise on every number that is seen, drawn from the episode's own seed."""

    def __init__(self, env: Env, scale: float = 0.1) -> None:
        super().__init__(env)
        _numbers(env, "noise_observation")
        self.observation_space = spaces.Box(-np.inf, np.inf, env.observation_space.shape, dtype=np.float32)
        self.scale = scale
        self.noise = np.random.default_rng(0)

    def _noisy(self, obs: Array) -> Array:
        with np.errstate(over="ignore"):  # what float32 does not hold is infinite then, and refused as such
            return (obs + self.scale * self.noise.standard_normal(obs.shape)).astype(np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Array, dict[str, Any]]:
        """A new episode, with noise of its own."""
        if seed is not None:
            self.noise = np.random.default_rng([seed, 1])
        obs, info = self.env.reset(seed=seed, options=options)
        return self._noisy(obs), info

    def step(self, action: Any) -> tuple[Array, float, bool, bool, dict[str, Any]]:
        """A step whose observation is noisy."""
        obs, reward, terminated, truncated, info = self.env.step(action)
        return self._noisy(obs), number(self, reward), terminated, truncated, info


class RemapAction(gymnasium.ActionWrapper[Any, Any, Any]):
    """Discrete actions under other numbers: `order` lists what each now does, or `seed` shuffles them."""

    def __init__(self, env: Env, order: list[int] | None = None, seed: int = 0) -> None:
        super().__init__(env)
        if not isinstance(env.action_space, spaces.Discrete):
            raise CrlError("wrappers: remap_action needs discrete actions")
        n = int(env.action_space.n)
        self.order = list(order) if order is not None else np.random.default_rng(seed).permutation(n).tolist()
        if sorted(self.order) != list(range(n)):
            raise CrlError(f"wrappers: remap_action.order must hold each of 0..{n - 1} once, not {self.order}")

    def action(self, action: Any) -> Any:
        """The environment's own number of an action."""
        return self.env.action_space.start + self.order[int(action)]  # type: ignore[attr-defined]


class ScaleReward(gymnasium.RewardWrapper[Any, Any]):
    """Every reward times a number."""

    def __init__(self, env: Env, by: float = 1.0) -> None:
        super().__init__(env)
        self.by = by

    def reward(self, reward: Any) -> float:
        """The scaled reward."""
        return float(number(self, reward)) * self.by


class SignReward(gymnasium.RewardWrapper[Any, Any]):
    """Every reward times -1: what was good is bad."""

    def reward(self, reward: Any) -> float:
        """The reward's opposite."""
        return -float(number(self, reward))


class Earned(gymnasium.Wrapper[Any, Any, Any, Any]):
    """What the environment gave, noted in `info` below whatever changes it for learning."""

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """A step whose reward is noted."""
        obs, reward, terminated, truncated, info = self.env.step(action)
        return obs, reward, terminated, truncated, {**info, EARNED: float(number(self, reward))}


EARNED = "crl.earned"  # a key of `info`


def reported(use: Any, options: Mapping[str, Any]) -> bool:
    """Whether what a wrapper does to rewards is reported: not if it changes nothing else, unless its options say so."""
    told: bool = options.get("evaluate", not rewarding(use))
    return told


def rewarding(use: Any) -> bool:
    """Whether a wrapper changes rewards and nothing else."""
    cls = BY_NAME.get(use) if isinstance(use, str) else use
    return isinstance(cls, type) and issubclass(cls, gymnasium.RewardWrapper | gymnasium.wrappers.NormalizeReward)


BY_NAME: dict[str, Callable[..., Env]] = {
    "permute_observation": PermuteObservation,
    "shift_observation": ShiftObservation,
    "noise_observation": NoiseObservation,
    "remap_action": RemapAction,
    "scale_reward": ScaleReward,
    "sign_reward": SignReward,
}


def _numbers(env: Env, name: str) -> spaces.Box:
    if not isinstance(env.observation_space, spaces.Box):
        raise CrlError(f"wrappers: {name} needs numbers to act on, and these observations are categories")
    return env.observation_space
