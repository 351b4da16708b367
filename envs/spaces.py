"""One interface for tasks whose own spaces differ.

The rule, which the README states too:

- every observation is flat: either numbers (`Box`) or categories (`MultiDiscrete`); `Discrete`, `Dict` and `Tuple`
  spaces are flattened, MiniGrid's symbols stay categories;
- where all tasks agree, nothing is added;
- categories of different lengths or kinds: each place gets as many kinds as the richest task has there, and one more,
  "absent", where some task has no such place;
- numbers of different lengths, or numbers beside categories: categories become one-hot numbers, all are padded with
  zeros to the longest, and a mask of the same length says which places are real;
- discrete actions: the largest set, and an action `a` outside a task's own `n` is played as `a mod n`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.spaces.utils import flatten, flatten_space

from crl.core import Array, CrlError

Space = spaces.Space[Any]


def is_flat(space: Space) -> bool:
    """Whether observations are float32 vectors as they are."""
    return isinstance(space, spaces.Box) and space.dtype == np.float32 and len(space.shape) == 1


class Flat(gymnasium.ObservationWrapper[Any, Any, Any]):
    """Any observation as one vector: a `Discrete` stays one category, everything else becomes float32 numbers."""

    def __init__(self, env: gymnasium.Env[Any, Any]) -> None:
        super().__init__(env)
        self.source = env.observation_space
        if isinstance(self.source, spaces.Discrete):
            self.observation_space = spaces.MultiDiscrete([int(self.source.n)], dtype=np.int64)
        elif isinstance(self.source, spaces.MultiDiscrete):
            self.observation_space = spaces.MultiDiscrete(self.source.nvec.reshape(-1), dtype=np.int64)
        else:
            box = flatten_space(self.source)
            assert isinstance(box, spaces.Box)
            self.observation_space = spaces.Box(
                box.low.astype(np.float32).reshape(-1), box.high.astype(np.float32).reshape(-1), dtype=np.float32
            )

    def observation(self, observation: Any) -> Array:
        """The vector of an observation."""
        if isinstance(self.source, spaces.Discrete):
            return np.array([int(observation) - int(self.source.start)], dtype=np.int64)
        if isinstance(self.source, spaces.MultiDiscrete):
            return np.asarray(observation - self.source.start, dtype=np.int64).reshape(-1)
        with np.errstate(over="ignore"):  # what float32 does not hold is infinite then, and refused as such
            return np.asarray(flatten(self.source, observation), dtype=np.float32).reshape(-1)


class Joined(gymnasium.Wrapper[Any, Any, Any, Any]):
    """An environment seen through the shared spaces of its sequence."""

    def __init__(self, env: gymnasium.Env[Any, Any], observation: Space, action: Space) -> None:
        super().__init__(env)
        self.own, self.own_action = env.observation_space, env.action_space
        self.observation_space, self.action_space = observation, action

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Array, dict[str, Any]]:
        """The environment's own reset, seen through the shared space."""
        obs, info = self.env.reset(seed=seed, options=options)
        return join_observation(obs, self.own, self.observation_space), info

    def step(self, action: Any) -> tuple[Array, Any, bool, bool, dict[str, Any]]:
        """The environment's own step, with the action remapped."""
        obs, reward, terminated, truncated, info = self.env.step(play(action, self.own_action))
        return join_observation(obs, self.own, self.observation_space), reward, terminated, truncated, info


def play(action: Any, own: Space) -> Any:
    """What an action of the shared space is to an environment, or many actions at once."""
    if not isinstance(own, spaces.Discrete):
        return action
    played = own.start + action % own.n
    return played if isinstance(action, np.ndarray) and action.ndim else int(played)


def join_observation(obs: Array, own: Space, shared: Space) -> Array:
    """One observation of the space `own` as one of the space `shared`, or rows of them."""
    *rows, length = obs.shape
    if (length,) != own.shape:
        raise ValueError(f"an observation of shape {obs.shape} came; its space has {own.shape}")
    if isinstance(shared, spaces.MultiDiscrete):
        assert isinstance(own, spaces.MultiDiscrete)
        absent = np.empty((*rows, len(shared.nvec)), dtype=shared.dtype)
        absent[...] = shared.nvec - 1
        absent[..., :length] = obs
        return absent
    if isinstance(own, spaces.MultiDiscrete):
        obs = one_hot(obs, own)
        length = obs.shape[-1]
    assert shared.shape is not None
    if shared.shape[0] == length:
        return np.asarray(obs, dtype=np.float32)
    width = shared.shape[0] // 2
    out = np.zeros((*rows, 2 * width), dtype=np.float32)
    out[..., :length] = obs
    out[..., width : width + length] = 1.0
    return out


def one_hot(obs: Array, space: spaces.MultiDiscrete) -> Array:
    """Categories as numbers, of one observation or of rows of them.

    >>> one_hot(np.array([1, 0]), spaces.MultiDiscrete([2, 3])).tolist()
    [0.0, 1.0, 1.0, 0.0, 0.0]
    """
    first = np.concatenate([[0], np.cumsum(space.nvec)[:-1]]).astype(np.int64)
    out = np.zeros((*obs.shape[:-1], int(space.nvec.sum())), dtype=np.float32)
    np.put_along_axis(out, first + obs, 1.0, -1)
    return out


def shared_observation(own: Sequence[Space]) -> Space:
    """The observation space that all tasks share."""
    if all(space == own[0] for space in own):
        return own[0]
    categories = [space for space in own if isinstance(space, spaces.MultiDiscrete)]
    if len(categories) == len(own):
        length = max(len(space.nvec) for space in categories)
        padded = np.array([np.pad(space.nvec, (0, length - len(space.nvec))) for space in categories])
        kinds = padded.max(axis=0) + (padded == 0).any(axis=0)
        dtype = np.uint8 if kinds.max() <= 256 else np.int64
        return spaces.MultiDiscrete(kinds, dtype=dtype)
    widths = [int(s.nvec.sum()) if isinstance(s, spaces.MultiDiscrete) else int(np.prod(s.shape or ())) for s in own]
    if len(categories) == 0 and len(set(widths)) == 1:
        boxes = [space for space in own if isinstance(space, spaces.Box)]
        low, high = np.min([box.low for box in boxes], 0), np.max([box.high for box in boxes], 0)
        return spaces.Box(low, high, dtype=np.float32)
    return spaces.Box(-np.inf, np.inf, (2 * max(widths),), dtype=np.float32)


def shared_action(own: Sequence[Space], names: Sequence[str]) -> Space:
    """The action space that all tasks share, or one sentence why there is none."""
    for space, name in zip(own, names, strict=True):
        if not isinstance(space, spaces.Discrete | spaces.Box | spaces.MultiDiscrete | spaces.MultiBinary):
            raise CrlError(f"tasks: {name} has actions of kind {type(space).__name__}, which no agent here can answer")
        if type(space) is not type(own[0]):
            raise CrlError(
                f"tasks: {names[0]} has {_kind(own[0])} actions and {name} has {_kind(space)} ones; "
                "one agent cannot answer both, so give each kind a sequence of its own"
            )
    if isinstance(own[0], spaces.Discrete):
        return spaces.Discrete(max(int(space.n) for space in own if isinstance(space, spaces.Discrete)))
    for space, name in zip(own, names, strict=True):
        if space != own[0]:
            raise CrlError(f"tasks: the actions of {names[0]} ({own[0]}) and of {name} ({space}) cannot be joined")
    return own[0]


def _kind(space: Space) -> str:
    return {"Box": "continuous", "Discrete": "discrete"}.get(type(space).__name__, type(space).__name__)
