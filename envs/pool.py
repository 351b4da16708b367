"""EnvPool's environments, which are stepped in C++: ten to thirty times as fast, with random streams of their own.

EnvPool begins a new episode one step late, and that step would be learned from though nothing happens in it. So an
episode that ended is reset at once, by name, and its copy never makes the false step.

No episode has a seed of its own there: a pool comes back to where it was by doing again all that was done to it,
which takes as many seconds as it takes to step it.
"""

from __future__ import annotations

import importlib
import os
import warnings
from typing import Any

import gymnasium
import numpy as np
import torch

from crl.core import Array, CrlError, NotTheSame, State
from envs.engines import Step
from envs.recipe import Recipe
from envs.spaces import join_observation, play

LIMITS = {"max_steps": "max_episode_steps"}  # a keyword of an environment, and EnvPool's name for it


class Pool:
    """`copies` environments of a recipe, stepped by `threads` threads (0: as many as there are cores)."""

    def __init__(self, recipe: Recipe, copies: int, seed: int, threads: int = 0) -> None:
        self.recipe, self.copies = recipe, copies
        threads = min(threads or os.cpu_count() or 1, copies)
        options = {**settings(recipe), "num_envs": copies, "num_threads": threads, "seed": seed}
        self.pool = _package().make_gymnasium(recipe.env, **options)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of bounds rounded to float32, once
            self.pool.observation_space  # noqa: B018  # EnvPool makes it at its first step otherwise
        self.log: list[Array] = []
        self.obs: Array = np.empty(0)

    def reset(self) -> Array:
        """Begin an episode in every copy."""
        self.obs = self._seen(self.pool.reset()[0])
        return self.obs

    def step(self, actions: Array) -> Step:
        """Step every copy once; one whose episode ends begins its next."""
        self.log.append(_small(actions))
        assert self.recipe.own is not None
        found, reward, terminated, truncated, _ = self.pool.step(play(actions, self.recipe.own.action))
        following = self._seen(found)
        self.obs, ended = following, np.flatnonzero(terminated | truncated)
        if len(ended):
            self.obs = following.copy()
            self.obs[ended] = self._seen(self.pool.reset(ended.astype(np.int32))[0])
        reward = reward.astype(np.float32, copy=False)
        return Step(self.obs, reward, terminated, truncated, following, reward)

    def _seen(self, found: Any) -> Array:
        """EnvPool's observations, all copies at once, as `recipe` has them of one."""
        recipe = self.recipe
        assert recipe.own is not None
        if isinstance(found, dict):
            image, direction = found["image"], found["direction"]
            rows = np.empty((len(image), image[0].size + 1), dtype=np.uint8)
            rows[:, :-1] = image.reshape(len(image), -1)
            rows[:, -1] = direction
        else:
            rows = found.reshape(len(found), -1).astype(recipe.own.observation.dtype)
        if not recipe.joined:
            return rows
        assert recipe.shared is not None
        return join_observation(rows, recipe.own.observation, recipe.shared.observation)

    def change(self, name: str, value: Any) -> None:
        """Not in C++; `check` says so before."""
        raise CrlError(f"change: EnvPool cannot change {name!r} while an environment goes on")

    def state_dict(self) -> State:
        """All that was done."""
        if not self.log:
            return {}
        return {"actions": torch.from_numpy(np.stack(self.log)), "obs": torch.from_numpy(self.obs.copy())}

    def load_state_dict(self, state: State) -> None:
        """Do it again, in a new pool."""
        self.reset()
        for actions in state["actions"].numpy() if state else ():
            self.step(actions)
        if state and not np.array_equal(self.obs, state["obs"].numpy()):
            raise NotTheSame(f"EnvPool's {self.recipe.env} does not come back to where it was when it is replayed")

    def close(self) -> None:
        """Let go of the copies."""
        self.pool.close()


def check(recipe: Recipe) -> None:
    """Refuse, in one line, what EnvPool does not have or what would be another task there."""
    package, other = _package(), "use engine: sync"
    if recipe.env not in package.list_all_envs():
        raise CrlError(f"engine: envpool has no {recipe.env}; {other}")
    if recipe.setting:
        raise CrlError(
            f"engine: envpool cannot change {', '.join(recipe.setting)} while the environment goes on; {other}"
        )
    if recipe.wrappers:
        use = recipe.wrappers[0][0]
        raise CrlError(f"engine: envpool steps without wrappers, and {_name(use)} is asked for; {other}")
    known = package.make_spec(recipe.env).config._fields
    for name in recipe.kwargs:
        if LIMITS.get(name, name) not in known:
            raise CrlError(f"engine: envpool's {recipe.env} takes no {name!r}; {other}")
    assert recipe.own is not None
    try:
        pool = Pool(recipe, 1, 0, 1)
    except (TypeError, ValueError):
        raise CrlError(f"engine: envpool's {recipe.env} does not take {recipe.kwargs}; {other}") from None
    rows = pool.reset()
    pool.close()
    space = (recipe.shared if recipe.joined and recipe.shared else recipe.own).observation
    if rows[0].shape != space.shape or rows.dtype != space.dtype:
        raise CrlError(f"engine: envpool's {recipe.env} is seen as {rows[0].shape}, and not as {space.shape}; {other}")


def settings(recipe: Recipe) -> dict[str, Any]:
    """A recipe's keyword arguments under EnvPool's names, and the same limit to an episode as in Python."""
    options = {LIMITS.get(name, name): value for name, value in recipe.kwargs.items()}
    env = gymnasium.make(recipe.env, disable_env_checker=True, **recipe.kwargs)
    own = (getattr(env.unwrapped, "max_steps", None), env.spec.max_episode_steps if env.spec else None)
    env.close()
    ends = [limit for limit in (*own, recipe.limit) if limit and limit > 0]
    return {**options, "max_episode_steps": min(ends, default=2**31 - 1)}  # whichever comes first, as in Python


def version() -> str:
    """Which EnvPool this is."""
    return str(_package().__version__)


def _package() -> Any:
    try:
        return importlib.import_module("envpool")
    except ImportError:
        raise CrlError("engine: envpool needs an extra: pip install envpool") from None


def _small(actions: Array) -> Array:
    """Actions as they are kept: whole numbers below 256 in a byte each."""
    if actions.dtype.kind in "iu" and actions.min() >= 0 and actions.max() < 256:
        return actions.astype(np.uint8)
    return actions.copy()


def _name(use: Any) -> str:
    return use if isinstance(use, str) else str(use.__name__)
