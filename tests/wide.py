"""An environment whose observations are wide, and a monitor that keeps what it sees: for the test of memory."""

from typing import Any

import gymnasium
import numpy as np

from crl.core import Boundary

SEEN = 400


class Wide(gymnasium.Env[Any, Any]):
    """Episodes of twenty steps of noise; the first action is worth one."""

    observation_space = gymnasium.spaces.Box(-1.0, 1.0, (SEEN,))
    action_space = gymnasium.spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.taken = 0
        return self._see(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.taken += 1
        return self._see(), float(action == 0), False, self.taken == 20, {}

    def _see(self) -> Any:
        return self.np_random.uniform(-1, 1, SEEN).astype(np.float32)


gymnasium.register("Wide-v0", "tests.wide:Wide")


class Keeps:
    """A monitor with a leak."""

    def __init__(self) -> None:
        self.kept: list[Any] = []

    def measure(self, boundary: Boundary) -> dict[str, float]:
        self.kept.append(boundary.experience())
        return {}
