"""MiniGrid's symbols as what they are: categories. The grid, the direction and, where wanted, the mission.

A cell is (object, colour, state), three symbols of 11, 6 and 3 kinds (agent and direction are a symbol too): their
codes mean no order and no brightness, so they are never divided by 255. An agent makes them one-hot.
"""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from minigrid.core.constants import COLOR_TO_IDX, OBJECT_TO_IDX, STATE_TO_IDX
from minigrid.minigrid_env import MiniGridEnv

from crl.core import Array

KINDS = (max(OBJECT_TO_IDX.values()) + 1, max(COLOR_TO_IDX.values()) + 1, max(max(STATE_TO_IDX.values()) + 1, 4))
WORDS = 16  # the longest mission that is kept whole
PHRASES = (
    "a after and avoid behind closed cross fetch find front get go green in left locked matching must near next of "
    "on open opening or out pick put reach right room the then through to traverse turn two up use using you your"
)
VOCABULARY = ("", "other", *sorted({*COLOR_TO_IDX, *OBJECT_TO_IDX, *PHRASES.split()}))
CODE = {word: code for code, word in enumerate(VOCABULARY)}


def is_symbolic(env: gymnasium.Env[Any, Any]) -> bool:
    """Whether these are MiniGrid's own symbols, not pixels rendered from them."""
    if not isinstance(env.unwrapped, MiniGridEnv):
        return False
    layer: Any = env
    while isinstance(layer, gymnasium.Wrapper):
        if type(layer).__name__.startswith("RGB"):
            return False
        layer = layer.env
    return isinstance(env.observation_space, spaces.Dict) and "image" in env.observation_space.spaces


class Symbols(gymnasium.ObservationWrapper[Any, Any, Any]):
    """A flat vector of categories: every cell's three symbols, then the direction, then the mission's words."""

    def __init__(self, env: gymnasium.Env[Any, Any], mission: bool = False) -> None:
        super().__init__(env)
        assert isinstance(env.observation_space, spaces.Dict)
        shape = env.observation_space["image"].shape
        assert shape is not None
        self.cells = int(np.prod(shape))
        self.mission = mission
        words = [len(VOCABULARY)] * WORDS if mission else []
        self.observation_space = spaces.MultiDiscrete([*KINDS] * (self.cells // 3) + [4] + words, dtype=np.uint8)

    def observation(self, observation: Any) -> Array:
        """The vector of an observation."""
        row = np.zeros(self.observation_space.shape or (), dtype=np.uint8)
        row[: self.cells] = observation["image"].reshape(-1)
        row[self.cells] = observation["direction"]
        if self.mission:
            words = [CODE.get(word.strip(",."), CODE["other"]) for word in observation["mission"].split()][:WORDS]
            row[self.cells + 1 : self.cells + 1 + len(words)] = words
        return row
