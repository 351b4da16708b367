"""How copies of an environment are stepped: what an engine is, and the one that steps them in turn, in this process.

Every episode is seeded from (seed, copy, episode), so an engine can be put back into the middle of an episode by
seeding it again and replaying its actions: no environment is ever pickled. What it then shows is compared with what
was seen, since an environment may keep something over a reset. Resets are same-step: the row after an end is the first
of a new episode, and the true successor is returned beside it.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import gymnasium
import numpy as np
import torch

from crl.core import Array, NotTheSame, State, brief, derive
from envs.answers import begun, misread, number, stepped
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
    digest: int = 0  # of all observations since it began


class Sync:
    """`copies` environments stepped in turn; the first of them is number `first` of all there are.

    An episode that has no end is ended after `limit` steps (0: never), as if its time were up.
    """

    def __init__(
        self,
        make: Callable[[], Env],
        copies: int,
        seed: int,
        settings: Mapping[str, Any] | None = None,
        first: int = 0,
        limit: int = 0,
    ) -> None:
        self.copies, self.first, self.limit = copies, first, limit
        self.settings = dict(settings or {})  # attributes that `make` has set, and that `change` goes on to set
        self.envs = [make() for _ in range(copies)]
        self.shape: tuple[int, ...] = self.envs[0].observation_space.shape or ()
        self.seed = seed
        self.episodes = [Episode() for _ in range(copies)]
        self.obs: Array = np.empty(0)

    def _begin(self, copy: int) -> Array:
        episode, env = self.episodes[copy], self.envs[copy]
        episode.log, episode.settings = [], dict(self.settings)
        try:
            found = env.reset(seed=derive(self.seed, self.first + copy, episode.number))
        except (TypeError, ValueError) as error:
            raise misread(env, error, "reset") from error
        return begun(env, found, self.shape)

    def _step(self, copy: int, action: Any) -> tuple[Array, float, bool, bool, float]:
        env = self.envs[copy]
        self.episodes[copy].log.append(action)  # type: ignore[union-attr]  # _begin made it
        try:
            found = env.step(action)
        except (TypeError, ValueError) as error:
            raise misread(env, error, "step") from error
        obs, reward, terminated, truncated = stepped(env, found, self.shape)
        earned = found[4].get(EARNED, reward)
        return obs, reward, terminated, truncated, earned if earned is reward else number(env, earned)

    def reset(self) -> Array:
        """Begin an episode in every copy."""
        self.obs = np.stack([self._begin(copy) for copy in range(len(self.envs))])
        for row, episode in zip(self.obs, self.episodes, strict=True):
            episode.digest = zlib.crc32(row)
        return self.obs

    def step(self, actions: Array) -> Step:
        """Step every copy once; one whose episode ends begins its next."""
        count = len(self.envs)
        following = np.empty_like(self.obs)
        reward = np.empty(count, dtype=np.float32)
        earned = np.empty(count, dtype=np.float32)
        terminated = np.zeros(count, dtype=bool)
        truncated = np.zeros(count, dtype=bool)
        for copy, episode in enumerate(self.episodes):
            seen, reward[copy], terminated[copy], truncated[copy], earned[copy] = self._step(copy, actions[copy])
            if seen.dtype == following.dtype:
                following[copy] = seen
            else:
                with np.errstate(over="ignore"):  # what float32 does not hold is infinite then, and refused as such
                    following[copy] = seen
            episode.digest = zlib.crc32(following[copy], episode.digest)
            if self.limit and len(episode.log or ()) >= self.limit:
                truncated[copy] |= not terminated[copy]
        ended = terminated | truncated
        obs = following
        if ended.any():
            obs = following.copy()
            for ending in np.flatnonzero(ended).tolist():
                self.episodes[ending].number += 1
                obs[ending] = self._begin(ending)
                self.episodes[ending].digest = zlib.crc32(obs[ending])
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
        """Where each copy is: its episode's number and actions, and what was seen."""
        return {
            "settings": self.settings,
            "episodes": [episode.number for episode in self.episodes],
            "began_with": [episode.settings for episode in self.episodes],
            "logs": [[_plain(entry) for entry in episode.log or []] for episode in self.episodes],
            "digests": [episode.digest for episode in self.episodes],
            "obs": torch.from_numpy(self.obs.copy()),
        }

    def load_state_dict(self, state: State) -> None:
        """Seed each unfinished episode again and replay what was done to it."""
        seen = state["obs"].numpy().copy()
        for copy, (episode, log) in enumerate(zip(state["episodes"], state["logs"], strict=True)):
            self.episodes[copy].number = episode
            self.settings = dict(state["began_with"][copy])
            for name, value in self.settings.items():
                put(self.envs[copy], name, value)
            try:
                last = self._replay(copy, log, seen.dtype)
            except Exception as error:  # it is elsewhere, and takes ill what it is told
                raise self._astray(copy, brief(error)) from error
            if self.episodes[copy].digest != state["digests"][copy] or not np.array_equal(last, seen[copy]):
                raise self._astray(copy, "it shows other observations")
        self.obs, self.settings = seen, dict(state["settings"])

    def _replay(self, copy: int, log: list[Any], dtype: Any) -> Array:
        """The last observation of an episode that is done again."""
        obs = np.ascontiguousarray(self._begin(copy), dtype)
        digest = zlib.crc32(obs.data)
        for entry in log:
            if isinstance(entry, dict):
                put(self.envs[copy], *entry["set"])
                self.episodes[copy].log.append(entry)  # type: ignore[union-attr]
                continue
            obs = self._step(copy, entry.numpy() if entry.ndim else entry.numpy()[()])[0]
            obs = np.ascontiguousarray(obs, dtype)
            digest = zlib.crc32(obs.data, digest)
        self.episodes[copy].digest = digest
        return obs

    def _astray(self, copy: int, how: str) -> NotTheSame:
        name = type(self.envs[copy].unwrapped).__name__
        return NotTheSame(f"environment {name} does not come back to where it was when it is replayed ({how})")

    def close(self) -> None:
        """Close every copy."""
        for env in self.envs:
            env.close()


def _plain(entry: Any) -> Any:
    return entry if isinstance(entry, dict) else torch.as_tensor(np.array(entry))
