"""What of an environment can be changed while it goes on: attributes by name, and what hangs on them.

The agent's side of an environment stays: its actions keep their space, so a motor can be weakened, not strengthened.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from crl.checked import FAR
from crl.core import Array, CrlError

Env = gymnasium.Env[Any, Any]
PLAIN = (bool, int, float, str, tuple, list, np.ndarray)  # what can be written in a YAML
MADE_OF = {  # what an environment computes once from other attributes: change those
    "total_mass": "masscart and masspole",
    "polemass_length": "masspole and length",
    "low_state": "min_position and max_speed",
    "high_state": "max_position and max_speed",
}
POSITIVE = {  # of Gymnasium's classic environments: a world with none of it, or less, is no world
    "CartPoleEnv": ("masscart", "masspole", "length", "tau", "x_threshold", "theta_threshold_radians"),
    "AcrobotEnv": ("dt", "LINK_LENGTH_1", "LINK_LENGTH_2", "LINK_MASS_1", "LINK_MASS_2", "MAX_VEL_1", "MAX_VEL_2"),
    "MountainCarEnv": ("max_speed",),
    "Continuous_MountainCarEnv": ("max_speed", "power"),
    "PendulumEnv": ("dt", "m", "l", "max_speed"),
}
STRONGEST = {"max_torque": 1, "max_action": 1, "min_action": -1}  # these bound actions: from above, or from below


def put(env: Env, name: str, value: Any) -> None:
    """Set an attribute of an environment (under its wrappers), and what it has derived from that attribute."""
    bare = env.unwrapped
    if name == "friction" and _mujoco(bare):
        _put_friction(bare, value)
        return
    if name in MADE_OF and hasattr(bare, name):
        raise CrlError(f"change: {name} is made of {MADE_OF[name]}; change those")
    if not hasattr(bare, name):
        near = difflib.get_close_matches(name, changeable(bare), 1, 0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(changeable(bare))}"
        raise CrlError(f"change: {_called(bare)} has no attribute {name!r}; {hint}")
    value = _like(getattr(bare, name), value, name, bare)
    above = any(name in POSITIVE.get(kind.__name__, ()) for kind in type(bare).__mro__)
    if above and not 0 < value <= FAR:
        raise CrlError(f"change: {name}: {value} is not above 0 (and at most {FAR:g})")
    if name in STRONGEST and isinstance(bare.action_space, spaces.Box):
        bound = float(bare.action_space.high.max() if STRONGEST[name] > 0 else bare.action_space.low.min())
        if STRONGEST[name] * value > STRONGEST[name] * bound:
            raise CrlError(f"change: {name}: {value} is beyond the actions that the agent has, which end at {bound:g}")
    setattr(bare, name, value)
    for kind in type(bare).__mro__:
        DERIVED.get(kind.__name__, lambda env: None)(bare)


def changeable(env: Env) -> list[str]:
    """The names that `change:` can name, of an environment."""
    bare = env.unwrapped
    own = [*vars(bare), *(name for kind in type(bare).__mro__[:-2] for name in vars(kind))]
    known = {name for name in own if not name.startswith("_") and name not in MADE_OF and _can(bare, name)}
    return sorted(known | ({"friction"} if _mujoco(bare) else set()))


def _can(env: Env, name: str) -> bool:
    held = getattr(type(env), name, None)
    if isinstance(held, property) and held.fset is None:
        return False
    return isinstance(getattr(env, name), PLAIN)


def _like(old: Any, value: Any, name: str, env: Env) -> Any:
    """The value in the kind that the environment keeps it in, or one line about why it is none."""
    if old is None:
        return value
    if not _can(env, name):
        raise CrlError(f"change: {name} of {_called(env)} cannot be changed: it is no plain value")
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if isinstance(old, bool | str):
        fits, wanted = type(value) is type(old), "text" if isinstance(old, str) else "true or false"
    elif isinstance(old, int | float):
        fits, wanted = number, "a number"
    else:
        fits = isinstance(value, list | tuple) and np.shape(value) == np.shape(old)
        wanted = f"a list like {np.asarray(old).tolist()}"
    if not fits:
        raise CrlError(f"change: {name}: expected {wanted}, not {value!r}")
    if isinstance(old, np.ndarray):
        return np.asarray(value, dtype=old.dtype)
    return type(old)(value) if isinstance(old, tuple | list) else value


def _called(env: Env) -> str:
    return env.spec.id if env.spec is not None else type(env).__name__


# MuJoCo.


def _mujoco(env: Env) -> bool:
    return hasattr(getattr(env, "model", None), "geom_friction")


def _put_friction(env: Any, value: Any) -> None:
    """The sliding friction of all geoms (a contact has the larger of its two)."""
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not number or value < 0:
        raise CrlError(f"change: friction: expected a number of at least 0, not {value!r}")
    env.model.geom_friction[:, 0] = value


# What Gymnasium's classic environments compute when they are made.


def _cartpole(env: Any) -> None:
    env.total_mass = env.masspole + env.masscart
    env.polemass_length = env.masspole * env.length
    high = np.array([2 * env.x_threshold, np.inf, 2 * env.theta_threshold_radians, np.inf])
    env.observation_space = _box(-high, high)


def _acrobot(env: Any) -> None:
    high = np.array([1, 1, 1, 1, env.MAX_VEL_1, env.MAX_VEL_2])
    env.observation_space = _box(-high, high)


def _mountain_car(env: Any) -> None:
    env.observation_space = _box(*_ends(env))
    env.low, env.high = env.observation_space.low, env.observation_space.high


def _continuous_mountain_car(env: Any) -> None:
    env.observation_space = _box(*_ends(env))
    env.low_state, env.high_state = env.observation_space.low, env.observation_space.high


def _pendulum(env: Any) -> None:
    high = np.array([1, 1, env.max_speed])
    env.observation_space = _box(-high, high)


def _ends(env: Any) -> tuple[Array, Array]:
    return np.array([env.min_position, -env.max_speed]), np.array([env.max_position, env.max_speed])


def _box(low: Array, high: Array) -> spaces.Box:
    return spaces.Box(low.astype(np.float32), high.astype(np.float32), dtype=np.float32)


DERIVED: dict[str, Callable[[Any], None]] = {
    "CartPoleEnv": _cartpole,
    "AcrobotEnv": _acrobot,
    "MountainCarEnv": _mountain_car,
    "Continuous_MountainCarEnv": _continuous_mountain_car,
    "PendulumEnv": _pendulum,
}
