"""Stable-Baselines3's on-policy algorithms without their loop: a rollout is collected, learned from, and dropped."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.buffers import RolloutBuffer

from agents.clipped import crowded_out
from agents.sb3 import SB3Agent
from crl.core import Array, Experience, Interface, State, Visit


class OnPolicy(SB3Agent):
    """PPO, A2C and TRPO: a rollout is collected, learned from, and dropped."""

    def __init__(self, interface: Interface, seed: int, device: str, **options: Any) -> None:
        super().__init__(interface, seed, device, **options)
        self.stride: int = self.algo.n_steps
        self._starts = np.ones(interface.envs, dtype=bool)
        self._last: Experience | None = None
        self.remark: str | None = None  # one line about the first rollout, empty where there is nothing to say

    def act(self, obs: Array, carry: Any, greedy: bool) -> tuple[Array, Any, Any]:
        """Sample from the policy; the note is what the rollout buffer will want to know of it."""
        self._check_batch(obs)
        obs = self._seen(obs)
        seen = torch.as_tensor(obs, device=self.algo.device)
        with torch.no_grad():
            if self._evaluating or greedy:
                raw = self.algo.policy._predict(seen, deterministic=greedy).cpu().numpy()
                return self._bounded(raw), carry, raw
            chosen, values, log_probs = self.algo.policy(seen)
        raw = chosen.cpu().numpy()
        return self._bounded(raw), carry, (obs, raw, values, log_probs)

    def _bounded(self, raw: Array) -> Array:
        """What the environment is told of a sampled action."""
        space = self.algo.action_space
        return np.clip(raw, space.low, space.high) if isinstance(space, spaces.Box) else raw

    def observe(self, experience: Experience) -> None:
        """Add a vector step to the rollout; a truncated episode is continued by the value of its last state."""
        buffer: RolloutBuffer = self.algo.rollout_buffer
        if buffer.pos == 0 or buffer.full:
            buffer.reset()
        obs, raw, values, log_probs = experience.note
        ended = experience.terminated | experience.truncated
        reward = experience.reward
        if self.normalizer is not None:
            self.normalizer.update(experience.obs, reward, ended)
            reward = self.normalizer.normalize_reward(reward)
        for copy_ in np.flatnonzero(experience.truncated & ~experience.terminated):
            last = self.algo.policy.obs_to_tensor(self._seen(experience.next_obs[copy_]))[0]
            with torch.no_grad():
                value = self.algo.policy.predict_values(last)[0]
            reward = reward.copy() if reward is experience.reward else reward
            reward[copy_] += (self.algo.gamma * value).item()  # in float32, as SB3 does
        if isinstance(self.algo.action_space, spaces.Discrete):
            raw = raw.reshape(-1, 1)
        buffer.add(obs, raw, reward, self._starts, values, log_probs)
        self._starts = ended
        self._last = experience
        self.algo.num_timesteps += len(ended)

    def update(self) -> dict[str, float]:
        """Learn once the rollout is full."""
        buffer: RolloutBuffer = self.algo.rollout_buffer
        if not buffer.full:
            return {}
        assert self._last is not None
        with torch.no_grad():
            following = torch.as_tensor(self._seen(self._last.next_obs), device=self.algo.device)
            values = self.algo.policy.predict_values(following)
        buffer.compute_returns_and_advantage(last_values=values, dones=self._starts)
        self._progress()
        if self.remark is None:
            scaled = self.normalizer is not None and self.normalizer.reward
            self.remark = "" if scaled else crowded_out(self.algo)
        numbers = self._learn()
        buffer.reset()
        return numbers

    def enter(self, visit: Visit) -> None:
        """New episodes begin."""
        super().enter(visit)
        self._starts = np.ones(self.interface.envs, dtype=bool)

    @property
    def chains(self) -> list[list[str]]:
        """The modules from what is seen to the action, and to the value, by name and in order."""
        body = self.algo.policy.mlp_extractor
        return [
            [*(f"mlp_extractor.{side}.{i}" for i in range(len(getattr(body, side)))), head]
            for side, head in (("policy_net", "action_net"), ("value_net", "value_net"))
        ]

    @property
    def epoch(self) -> int:
        """Steps of the optimizer that go once through a rollout."""
        return math.ceil(int(self.algo.n_steps) * self.interface.envs / int(getattr(self.algo, "batch_size", 10**9)))

    def _bodies(self) -> list[tuple[Any, str]]:
        return [(self.algo.policy.mlp_extractor, "policy_net"), (self.algo.policy.mlp_extractor, "value_net")]

    def _head_slots(self) -> list[tuple[Any, str | int]]:
        return [(self.algo.policy, "action_net"), (self.algo.policy, "value_net")]

    def state_dict(self) -> State:
        """With the rollout as far as it is collected."""
        buffer: Any = self.algo.rollout_buffer
        rows = {name: torch.from_numpy(value[: buffer.pos].copy()) for name, value in self._rollout()}
        return {
            **super().state_dict(),
            "starts": torch.from_numpy(self._starts.copy()),
            "rollout": {"rows": rows if buffer.pos else {}, "pos": buffer.pos},
        }

    def load_state_dict(self, state: State) -> None:
        """The inverse of `state_dict`."""
        super().load_state_dict(state)
        self._starts = state["starts"].numpy().copy()
        buffer: Any = self.algo.rollout_buffer
        buffer.reset()
        for name, rows in state["rollout"]["rows"].items():
            getattr(buffer, name)[: len(rows)] = rows.numpy()
        buffer.pos = state["rollout"]["pos"]

    def _rollout(self) -> list[tuple[str, Array]]:
        """The arrays of the rollout buffer, a row a vector step."""
        buffer: Any = self.algo.rollout_buffer
        shape = (buffer.buffer_size, buffer.n_envs)
        return [(n, v) for n, v in vars(buffer).items() if isinstance(v, np.ndarray) and v.shape[:2] == shape]
