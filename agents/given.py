"""What Stable-Baselines3 is given in the place of environments and of its buffers."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.type_aliases import RolloutBufferSamples
from stable_baselines3.common.vec_env import VecEnv

from crl.core import Interface


def remember_rollouts(base: Any) -> Any:
    """A rollout buffer that knows in `last` which minibatch it gave last."""

    class Rollouts(base):  # type: ignore[misc]
        last: Any = None

        def get(self, batch_size: int | None = None) -> Iterator[Any]:
            for self.last in super().get(batch_size):  # the name is what this is for
                yield self.last

    return _moved_once(Rollouts) if base is RolloutBuffer else Rollouts


def _moved_once(base: Any) -> Any:
    """A rollout goes to the device once, and minibatches are cut there: SB3 moves each of them."""

    class Moved(base):  # type: ignore[misc]
        rows: list[torch.Tensor] | None = None

        def reset(self) -> None:
            super().reset()
            self.rows = None

        def _get_samples(self, batch_inds: Any, env: Any = None) -> RolloutBufferSamples:
            if self.rows is None:
                actions = self.actions.astype(np.float32, copy=False)
                numbers = (self.values, self.log_probs, self.advantages, self.returns)
                parts = (self.observations, actions, *(part.flatten() for part in numbers))
                self.rows = [self.to_torch(part) for part in parts]
            chosen = torch.as_tensor(batch_inds, device=self.device)
            return RolloutBufferSamples(*(rows[chosen] for rows in self.rows))

    return Moved


def remember_replays(base: Any) -> Any:
    """A replay buffer that knows in `last` which minibatch it gave last."""

    class Replays(base):  # type: ignore[misc]
        last: Any = None

        def sample(self, *args: Any, **kwargs: Any) -> Any:
            self.last = super().sample(*args, **kwargs)
            return self.last

    return Replays


class Spaces(VecEnv):
    """The right spaces for SB3's constructor, and an environment that is never stepped."""

    def __init__(self, interface: Interface) -> None:
        self.seen = stored(interface.observation)
        super().__init__(interface.envs, self.seen, copy.deepcopy(interface.action))

    def reset(self) -> Any:
        raise RuntimeError("the walk steps the environments")

    def step_async(self, actions: Any) -> None:
        self.reset()

    def step_wait(self) -> Any:
        self.reset()

    def close(self) -> None:
        return

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        return [None] * self.num_envs

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        self.reset()

    def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> list[Any]:
        return [None] * self.num_envs

    def env_is_wrapped(self, wrapper_class: Any, indices: Any = None) -> list[bool]:
        return [False] * self.num_envs


def stored(space: spaces.Space[Any]) -> spaces.Space[Any]:
    if isinstance(space, spaces.MultiDiscrete):
        return spaces.Box(0, (space.nvec - 1).astype(np.uint8), dtype=np.uint8)
    return space
