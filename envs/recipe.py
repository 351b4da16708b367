"""How one copy of an environment is made: its id, keyword arguments, wrappers and settings, and what it is joined to.

A recipe is plain data, so that it can be sent to another process.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import gymnasium

from crl.checked import whole
from crl.core import CrlError, Interface
from envs.minigrid import Symbols, is_symbolic
from envs.physics import put
from envs.registered import find
from envs.spaces import Flat, Joined, is_flat
from envs.wrappers import BY_NAME, Earned, reported, rewarding

Env = gymnasium.Env[Any, Any]


@dataclass
class Recipe:
    """One environment as the agent sees it; calling it makes a copy."""

    env: str
    kwargs: dict[str, Any] = field(default_factory=dict)
    wrappers: list[tuple[Any, dict[str, Any]]] = field(default_factory=list)
    setting: dict[str, Any] = field(default_factory=dict)
    own: Interface | None = None  # the spaces of this environment alone
    shared: Interface | None = None  # those of its sequence
    limit: int = 0  # steps after which an episode that has no end is ended; 0: never

    def __call__(self, render: bool = False) -> Env:
        """One copy, as the agent sees it."""
        env = self.alone(render)
        if self.joined:
            assert self.shared is not None
            env = Joined(env, self.shared.observation, self.shared.action)
        return env

    @property
    def joined(self) -> bool:
        """Whether the sequence's spaces are other than the environment's own."""
        if self.shared is None or self.own is None:
            return False
        return self.own.observation != self.shared.observation or self.own.action != self.shared.action

    def alone(self, render: bool = False) -> Env:
        """One copy with spaces of its own: flat, and under the wrappers that were asked for."""
        find(self.env)
        if self.kwargs.get("max_steps") is not None:  # MiniGrid would end each episode at once
            whole("kwargs.max_steps", self.kwargs["max_steps"])
        kwargs = {name: _place(value) for name, value in self.kwargs.items()}
        extra: dict[str, Any] = {"render_mode": "rgb_array"} if render else {}
        env: Env = gymnasium.make(self.env, disable_env_checker=True, **{**kwargs, **extra})
        mission = any(use == "mission" for use, _ in self.wrappers)
        first, second = self._in_order()
        for wrap, options in first:
            env = wrap(env, **options)
        if mission and not is_symbolic(env):
            raise CrlError(f"wrappers: mission is a part of MiniGrid's observations, which {self.env} has not")
        if is_symbolic(env):
            env = Symbols(env, mission=mission)
        elif not is_flat(env.observation_space):
            env = Flat(env)
        for wrap, options in second:
            env = wrap(env, **options)
        for name, value in self.setting.items():
            put(env, name, value)
        return env

    def _in_order(self) -> tuple[list[Any], list[Any]]:
        """(wrappers by import path, and those by name, which act on what is flat), with `Earned` where it belongs."""
        parts: tuple[list[Any], list[Any]] = ([], [])
        learning = False  # whether rewards are no longer what is reported
        for use, options in sorted(self.wrappers, key=lambda wrapper: isinstance(wrapper[0], str)):
            if use == "mission":
                continue
            named, seen = isinstance(use, str), reported(use, options)
            if seen and learning and rewarding(use):
                name = use if named else use.__name__
                raise CrlError(f"wrappers: {name} with evaluate: true must come before what is for learning only")
            if not seen and not learning:
                parts[named].append((Earned, {}))
                learning = True
            own = {name: value for name, value in options.items() if name != "evaluate"}
            parts[named].append((BY_NAME[use] if named else use, own))
        return parts


def _place(value: Any) -> Any:
    """A YAML has lists where environments want places: `agent_start_pos: [1, 1]`."""
    return tuple(value) if isinstance(value, list) and all(isinstance(part, int) for part in value) else value


def mission(env: Env) -> Env:
    """The wrapper of that name takes no options: it only lets MiniGrid's words be seen."""
    return env
