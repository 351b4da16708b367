"""What environments and agents answer, checked at every step: a wrong answer is named at once, and never made to fit.

Whether actions are any of the space's is asked only where a step has failed: it takes longer, and most are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from torch import Tensor

from crl.core import Agent, Array, printable
from crl.failing import Failed

Env = gymnasium.Env[Any, Any]
RESET, STEP = "(observation, info)", "(observation, reward, terminated, truncated, info)"
LARGEST = float(np.finfo(np.float32).max)  # of a reward


def begun(env: Env, found: Any, shape: tuple[int, ...]) -> Array:
    """The observation of a reset."""
    if not isinstance(found, tuple) or len(found) != 2:
        raise wrong(env, f"reset() returned {_several(found)}; right is {RESET}")
    return _observed(env, found[0], shape)


def stepped(env: Env, found: Any, shape: tuple[int, ...]) -> tuple[Array, float, bool, bool]:
    """(observation, reward, terminated, truncated) of a step."""
    if not isinstance(found, tuple) or len(found) != 5:
        raise wrong(env, f"step() returned {_several(found)}; right is {STEP}")
    obs, reward, terminated, truncated, info = found
    if type(info) is not dict and not isinstance(info, Mapping):
        raise wrong(env, f"step() returned {_shown(info)} for info; right is a dictionary")
    return (
        _observed(env, obs, shape),
        number(env, reward),
        _truth(env, "terminated", terminated),
        _truth(env, "truncated", truncated),
    )


def number(env: Env, reward: Any) -> Any:
    """A reward, which is one number."""
    if not isinstance(reward, int | float | np.number) and (
        np.ndim(reward) or np.asarray(reward).dtype.kind not in "biuf"
    ):
        raise wrong(env, f"step() returned the reward {_shown(reward)}; right is one number")
    if not -LARGEST <= reward <= LARGEST and _finite(reward):
        raise wrong(env, f"step() returned the reward {_shown(reward)}; right is a number that float32 can hold")
    return reward


def misread(env: Env, error: Exception, call: str) -> Exception:
    """An error of a call, or what it means: a wrapper of a library's fails to unpack what it was given."""
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    module = last.tb_frame.f_globals.get("__name__", "") if last is not None else ""
    if "unpack" in str(error) and module.startswith(("gymnasium.", "envs.")):
        return wrong(env, f"{call}() returned too few or too many values; right is {STEP if call == 'step' else RESET}")
    return error


def wrong(env: Env, what: str) -> Failed:
    """The line of a wrong answer."""
    return Failed(f"environment {type(env.unwrapped).__name__}: {what}", "")


def _observed(env: Env, obs: Any, shape: tuple[int, ...]) -> Array:
    seen = np.asarray(obs)
    if seen.shape != shape or seen.dtype.kind not in "biuf":
        what = f"of shape {seen.shape}" if seen.dtype.kind in "biuf" else f"that holds no numbers ({seen.dtype})"
        raise wrong(env, f"an observation {what} came; its space has {shape}")
    return seen


def _truth(env: Env, name: str, flag: Any) -> bool:
    if not isinstance(flag, bool | np.bool_):
        kind = np.asarray(flag).dtype.kind
        if np.ndim(flag) or kind not in "biu" or flag not in (0, 1):
            raise wrong(env, f"step() returned {_shown(flag)} for {name}; right is true or false")
    return bool(flag)


def acted(agent: Agent, found: Any, space: gymnasium.Space[Any], rows: int) -> tuple[Array, Any, Any]:
    """(actions, carry, note) of an agent for `rows` observations."""
    if not isinstance(found, tuple | list) or len(found) != 3:
        raise _misacted(agent, _several(found), space, rows)
    action, carry, note = found
    if isinstance(action, list):
        try:
            action = np.asarray(action)
        except ValueError:  # rows of unlike length
            raise _misacted(agent, _shown(action), space, rows) from None
    if space.shape is None:  # of several parts
        return action, carry, note
    fits = isinstance(action, np.ndarray) and action.shape == (rows, *space.shape)
    if not fits or action.dtype.kind not in _kinds(space):
        raise _misacted(agent, _described(action), space, rows)
    return action, carry, note


def refuse_outside(agent: Agent, action: Any, space: gymnasium.Space[Any]) -> None:
    """Where a step has failed: it is the agent's fault if an action is none of the space's."""
    if isinstance(space, spaces.Box):  # what is beyond its bounds is for the environment to clip
        outside = space.dtype.kind == "f" and not np.isfinite(action).all()
    elif isinstance(space, spaces.Discrete):
        outside = bool(((action < space.start) | (action >= space.start + space.n)).any())
    elif isinstance(space, spaces.MultiDiscrete | spaces.MultiBinary):
        outside = not all(space.contains(row.astype(space.dtype)) for row in action)
    else:
        outside = False
    if outside:
        raise _misacted(agent, _shown(action), space, len(action))


def learned(agent: Agent, found: Any) -> Mapping[str, float]:
    """What an update returns: numbers by name, which may be tensors on a GPU that nobody waits for here."""
    if type(found) is not dict and not isinstance(found, Mapping):
        raise _misled(agent, _shown(found))
    return {name: _one(agent, name, value) for name, value in found.items()}


def _one(agent: Agent, name: Any, value: Any) -> Any:
    if isinstance(name, str):
        if isinstance(value, float):
            return value
        if isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex():
            return value.detach()
        if np.size(value) == 1 and np.asarray(value).dtype.kind in "biuf":
            return float(np.asarray(value).item())
    raise _misled(agent, printable(f"{{{name!r}: {_shown(value)}}}"))


def _misacted(agent: Agent, what: str, space: gymnasium.Space[Any], rows: int) -> Failed:
    right = f"an array of shape {(rows, *space.shape)}" if space.shape is not None else "one for each"
    if isinstance(space, spaces.Discrete):
        right += f" of integers from {space.start} to {space.start + space.n - 1}"
    elif space.shape is not None:
        right += f" of {space}"
    must = f"it must be (actions, carry, note), the actions {right}"
    asked = f"{rows} observation{'s' * (rows != 1)}"
    return Failed(f"agent {type(agent).__name__}: act() returns {what} for {asked}: {must}", "")


def _misled(agent: Agent, what: str) -> Failed:
    must = "it must be a dictionary of numbers by name"
    return Failed(f"agent {type(agent).__name__}: update() returns {what}: {must}", "")


def _kinds(space: gymnasium.Space[Any]) -> str:
    """The kinds of numbers that actions may be."""
    if isinstance(space, spaces.MultiBinary):
        return "iubf"  # Stable-Baselines3 answers with 0.0 and 1.0
    return "fiu" if isinstance(space, spaces.Box) else "iu"


def _described(action: Any) -> str:
    if isinstance(action, np.ndarray):
        return f"actions {_shown(action)} of shape {action.shape} and type {action.dtype}"
    return f"actions that are a {type(action).__module__.partition('.')[0]}.{type(action).__name__}, {_shown(action)}"


def _finite(number: Any) -> bool:
    try:
        return math.isfinite(number)
    except OverflowError:  # an integer of more digits than a float has
        return True


def _shown(value: Any) -> str:
    """Anything, in part of a line."""
    try:
        text = repr(value)
    except Exception:  # anybody's __repr__, and integers of too many digits
        return f"something of type {type(value).__name__}"
    text = printable(" ".join(text.split()))
    return text if len(text) <= 60 else f"{text[:60]}..."


def _several(found: Any) -> str:
    return f"{len(found)} values" if isinstance(found, tuple | list) else f"a {type(found).__name__}"
