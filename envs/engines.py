"""How copies of an environment are stepped: what an engine is, and the one that steps them in turn, in this process.

Every episode is seeded from (seed, copy, episode), so an engine can be put back into the middle of an episode by
seeding it again and replaying its actions: no environment is ever pickled. Resets are same-step: the row after an
end is the first of a new episode, and the true successor is returned beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import gymnasium
import numpy as np
import torch

from crl.core import Array, State, derive
from envs.physics import put
from envs.wrappers import EARNED

Env = gymnasium.Env[Any, Any]


class Step(NamedTuple):
    """One vector step. `obs` is what is acted on next, `next_obs` the true successor; they differ at an end.

    `reward` is learned from, `earned` is what the environment gave, before wrappers that change it for learning.
    """

    obs: Array
    reward: Array
    terminated: Array
    truncated: Array
    next_obs: Array
    earned: Array


class Engine(Protocol):
    """Several copies, stepped together. Its state is that of a walk in the middle of a visit."""

    copies: int
    obs: Array  # what is acted on next

    def reset(self) -> Array:
        """Begin an episode in every copy."""
        ...

    def step(self, actions: Array) -> Step:
        """Step every copy once; one whose episode ends begins its next."""
        ...

    def change(self, name: str, value: Any) -> None:
        """Set an attribute of every copy; the episodes go on."""
        ...

    def state_dict(self) -> State:
        """Where each copy is."""
        ...

    def load_state_dict(self, state: State) -> None:
        """The inverse of `state_dict`."""
        ...

    def close(self) -> None:
        """Close every copy."""
        ...


@dataclass
class Episode:
    """The unfinished episode of one copy: its number and what was done to it since it began."""

    number: int = 0
    settings: dict[str, Any] = field(default_factory=dict)  # attributes that had been set when it began
    log: list[Any] | None = None  # actions, and {"set": [name, value]} where the environment was changed


class Sync:
    """`copies` environments stepped in turn; the first of them is number `first` of all there are."""

    def __init__(
        self,
        make: Callable[[], Env],
        copies: int,
        seed: int,
        settings: Mapping[str, Any] | None = None,
        first: int = 0,
    ) -> None:
        self.copies, self.first = copies, first
        self.settings = dict(settings or {})  # attributes that `make` has set, and that `change` goes on to set
        self.envs = [make() for _ in range(copies)]
        self.seed = seed
        self.episodes = [Episode() for _ in range(copies)]
        self.obs: Array = np.empty(0)

    def _begin(self, copy: int) -> Array:
        episode = self.episodes[copy]
        episode.log, episode.settings = [], dict(self.settings)
        obs, _ = self.envs[copy].reset(seed=derive(self.seed, self.first + copy, episode.number))
        return np.asarray(obs)

    def reset(self) -> Array:
        """Begin an episode in every copy."""
        self.obs = np.stack([self._begin(copy) for copy in range(len(self.envs))])
        return self.obs

    def step(self, actions: Array) -> Step:
        """Step every copy once; one whose episode ends begins its next."""
        count = len(self.envs)
        following = np.empty_like(self.obs)
        reward = np.empty(count, dtype=np.float32)
        earned = np.empty(count, dtype=np.float32)
        terminated = np.zeros(count, dtype=bool)
        truncated = np.zeros(count, dtype=bool)
        for copy, env in enumerate(self.envs):
            action = actions[copy]
            self.episodes[copy].log.append(action)  # type: ignore[union-attr]  # _begin made it
            following[copy], reward[copy], terminated[copy], truncated[copy], info = env.step(action)
            earned[copy] = info.get(EARNED, reward[copy])
        ended = terminated | truncated
        obs = following
        if ended.any():
            obs = following.copy()
            for ending in np.flatnonzero(ended).tolist():
                self.episodes[ending].number += 1
                obs[ending] = self._begin(ending)
        self.obs = obs
        return Step(obs, reward, terminated, truncated, following, earned)

    def change(self, name: str, value: Any) -> None:
        """Set an attribute of every copy; the episodes go on."""
        self.settings[name] = value
        for env, episode in zip(self.envs, self.episodes, strict=True):
            put(env, name, value)
            if episode.log is not None:
                episode.log.append({"set": [name, value]})

    def state_dict(self) -> State:
        """Where each copy is: its episode's number and actions."""
        return {
            "settings": self.settings,
            "episodes": [episode.number for episode in self.episodes],
            "began_with": [episode.settings for episode in self.episodes],
            "logs": [[_plain(entry) for entry in episode.log or []] for episode in self.episodes],
        }

    def load_state_dict(self, state: State) -> None:
        """Seed each unfinished episode again and replay what was done to it."""
        rows = []
        for copy, (number, log) in enumerate(zip(state["episodes"], state["logs"], strict=True)):
            self.episodes[copy].number = number
            self.settings = dict(state["began_with"][copy])
            for name, value in self.settings.items():
                put(self.envs[copy], name, value)
            obs = self._begin(copy)
            for entry in log:
                if isinstance(entry, dict):
                    put(self.envs[copy], *entry["set"])
                    action = entry
                else:
                    action = entry.numpy() if entry.ndim else entry.numpy()[()]
                    obs = np.asarray(self.envs[copy].step(action)[0])
                self.episodes[copy].log.append(action)  # type: ignore[union-attr]
            rows.append(obs)
        self.obs, self.settings = np.stack(rows), dict(state["settings"])

    def close(self) -> None:
        """Close every copy."""
        for env in self.envs:
            env.close()


def _plain(entry: Any) -> Any:
    return entry if isinstance(entry, dict) else torch.as_tensor(np.array(entry))
