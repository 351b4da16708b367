"""Stable-Baselines3's off-policy algorithms without their loop: every step goes to a replay buffer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.type_aliases import TrainFrequencyUnit
from torch import nn

from agents.sb3 import SB3Agent
from crl.core import Array, CrlError, Experience, Interface, State, Visit


class OffPolicy(SB3Agent):
    """DQN, QR-DQN, SAC, TD3, DDPG, TQC and CrossQ: every step goes to a replay buffer, learned from at intervals."""

    def __init__(self, interface: Interface, seed: int, device: str, **options: Any) -> None:
        super().__init__(interface, seed, device, **options)
        self.algo._convert_train_freq()
        if self.algo.train_freq.unit is not TrainFrequencyUnit.STEP or self.algo.optimize_memory_usage:
            raise CrlError(
                "agent: train_freq in episodes and optimize_memory_usage are not supported: use train_freq: N"
            )
        self.algo._vec_normalize_env = self.normalizer
        self.stride: int = self.algo.train_freq.frequency
        self._since_train = 0
        self._filled_from = 0  # num_timesteps when the buffer was last emptied

    def rebuilt(self) -> None:
        """The model is another: its new parameters are to be learned, and target networks begin from it."""
        super().rebuilt()
        for name, target in self.algo.policy.named_children():
            if name.endswith("_target"):
                target.load_state_dict(getattr(self.algo.policy, name.removesuffix("_target")).state_dict())

    def _plastic(self) -> Iterator[nn.Parameter]:
        return (value for name, value in self.model.named_parameters() if "_target." not in name)

    def act(self, obs: Array, carry: Any, greedy: bool) -> tuple[Array, Any, Any]:
        """SB3's exploration while training, its `predict` while evaluating."""
        self._check_batch(obs)
        seen = self._seen(obs)
        if self._evaluating or greedy:
            action, _ = self.algo.predict(seen, deterministic=greedy)
            return action, carry, None
        self.algo._last_obs = seen
        action, stored = self.algo._sample_action(self.algo.learning_starts, self.algo.action_noise, len(obs))
        return action, carry, stored

    def observe(self, experience: Experience) -> None:
        """Add a vector step to the replay buffer and let the schedules and target networks move on."""
        ended = experience.terminated | experience.truncated
        algo = self.algo
        algo.num_timesteps += len(ended)
        if self.normalizer is not None:
            self.normalizer.update(experience.obs, experience.reward, ended)
        cut = experience.truncated & ~experience.terminated
        infos = [{"TimeLimit.truncated": bool(flag)} for flag in cut]
        buffer: ReplayBuffer = algo.replay_buffer
        buffer.add(experience.obs, experience.next_obs, experience.note, experience.reward, ended, infos)
        self._progress()
        algo._on_step()
        algo._episode_num += int(ended.sum())
        self._since_train += 1

    def update(self) -> dict[str, float]:
        """Learn every `train_freq` vector steps, once `learning_starts` steps are stored."""
        algo = self.algo
        if self._since_train < self.stride:
            return {}
        self._since_train = 0
        if algo.num_timesteps - self._filled_from <= algo.learning_starts:
            return {}
        steps = algo.gradient_steps if algo.gradient_steps >= 0 else self.stride * self.interface.envs
        return self._learn(batch_size=algo.batch_size, gradient_steps=steps) if steps > 0 else {}

    def enter(self, visit: Visit) -> None:
        """Empty the buffer where the rules say so; its learning then waits for `learning_starts` again."""
        super().enter(visit)
        if visit.rules.buffer == "reset" and visit.index > 1:
            self.algo.replay_buffer.reset()
            self._filled_from = self.algo.num_timesteps
        if hasattr(self.algo, "exploration_schedule"):
            self.algo.exploration_rate = self.algo.exploration_schedule(self.algo._current_progress_remaining)

    def state_dict(self) -> State:
        """With the filled rows of the replay buffer."""
        buffer: Any = self.algo.replay_buffer
        size = buffer.size()
        rows = {
            name: torch.from_numpy(value[:size]).clone()
            for name, value in vars(buffer).items()
            if isinstance(value, np.ndarray) and value.shape[:1] == (buffer.buffer_size,)
        }
        return {
            **super().state_dict(),
            "buffer": {"rows": rows, "pos": buffer.pos, "full": buffer.full},
            "since_train": self._since_train,
            "filled_from": self._filled_from,
        }

    def load_state_dict(self, state: State) -> None:
        """The inverse of `state_dict`."""
        super().load_state_dict(state)
        buffer: Any = self.algo.replay_buffer
        for name, rows in state["buffer"]["rows"].items():
            getattr(buffer, name)[: len(rows)] = rows.numpy()
        buffer.pos, buffer.full = state["buffer"]["pos"], state["buffer"]["full"]
        self._since_train, self._filled_from = state["since_train"], state["filled_from"]
