"""What an environment answers, checked at every step: a wrong answer is named at once, and never made to fit."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np

from crl.core import Array
from crl.failing import Failed

Env = gymnasium.Env[Any, Any]
RESET, STEP = "(observation, info)", "(observation, reward, terminated, truncated, info)"


def begun(env: Env, found: Any, shape: tuple[int, ...]) -> Array:
    """The observation of a reset."""
    if not isinstance(found, tuple) or len(found) != 2:
        raise wrong(env, f"reset() returned {_several(found)}; right is {RESET}")
    return _observed(env, found[0], shape)


def stepped(env: Env, found: Any, shape: tuple[int, ...]) -> tuple[Array, float, bool, bool]:
    """(observation, reward, terminated, truncated) of a step."""
    if not isinstance(found, tuple) or len(found) != 5:
        raise wrong(env, f"step() returned {_several(found)}; right is {STEP}")
    obs, reward, terminated, truncated, _ = found
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
        raise wrong(env, f"step() returned the reward {reward!r}; right is one number")
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
            raise wrong(env, f"step() returned {flag!r} for {name}; right is true or false")
    return bool(flag)


def _several(found: Any) -> str:
    return f"{len(found)} values" if isinstance(found, tuple) else f"a {type(found).__name__}"
