"""Any Gymnasium environment as a Task: the vector loop, evaluation and sampled experience."""

from __future__ import annotations

import itertools
import math
import re
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.vector.utils import batch_space

from crl.core import (
    Agent,
    Array,
    CrlError,
    Experience,
    Interface,
    NotYet,
    Score,
    State,
    Tick,
    Visit,
    aside,
    brief,
    derive,
    facing,
)
from envs import pool
from envs.engines import Engine, Step, Sync
from envs.minigrid import Symbols
from envs.pool import Pool
from envs.recipe import Recipe
from envs.spaces import shared_action, shared_observation
from envs.tally import Tally
from envs.workers import Async

TICK = 2_048  # steps between two ticks, rounded up to the agent's stride


@dataclass
class World:
    """The copies that training steps. Tasks made by one `change:` share one, so the environment goes on."""

    goes_on: bool = False
    engine: Engine | None = None
    seed: int = 0
    returns: Array = field(default_factory=lambda: np.zeros(0))
    lengths: Array = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    carry: Any = None
    steps: int = 0  # taken in the visit that is under way


class GymTask:
    """One environment id with its keyword arguments, wrappers and settings, stepped by an engine."""

    measure = "return"

    def __init__(
        self,
        env: str,
        name: str,
        kwargs: dict[str, Any] | None = None,
        wrappers: Sequence[tuple[Any, dict[str, Any]]] = (),
        setting: dict[str, Any] | None = None,
        envs: int = 1,
        world: World | None = None,
        engine: str = "sync",
        threads: int = 0,
    ) -> None:
        self.name, self.world, self.engine, self.threads = name, world or World(), engine, threads
        self.make = Recipe(env, kwargs or {}, list(wrappers), setting or {})
        probe = self.make.alone()
        with aside(0):  # what an environment cannot do, it should not do now
            probe.reset(seed=0)
            probe.action_space.seed(0)
            probe.step(probe.action_space.sample())
        self.interface = self.make.own = Interface(probe.observation_space, probe.action_space, envs)
        untouched = isinstance(probe, Symbols) and not self.make.wrappers
        self.best = 1.0 if untouched else None  # the largest possible return, where it is known
        probe.close()
        if engine == "envpool":
            pool.check(self.make)

    @property
    def shared(self) -> Interface | None:
        """The spaces of the sequence, once it is known."""
        return self.make.shared

    @property
    def setting(self) -> dict[str, Any]:
        """What is changed in the environment while it goes on."""
        return self.make.setting

    def _copies(self, copies: int, seed: int) -> Engine:
        """Copies for evaluating and looking: here, or in C++."""
        return (
            Pool(self.make, copies, seed, self.threads) if self.engine == "envpool" else Sync(self.make, copies, seed)
        )

    def _training(self, seed: int) -> Engine:
        copies = self.interface.envs
        if self.engine == "envpool":
            return Pool(self.make, copies, seed, self.threads)
        if self.engine == "async":
            return Async(self.make, copies, seed, self.setting, self.threads)
        return Sync(self.make, copies, seed, self.setting)

    # The walk's side.

    def train(self, agent: Agent, visit: Visit) -> Iterator[Tick]:
        """Step, let the agent observe and update, and report every so often."""
        world = self.world
        engine = self._engine(visit)
        stride = getattr(agent, "stride", 1) * engine.copies
        every = stride * math.ceil(TICK / stride)
        tally = Tally()
        obs = engine.obs
        while world.steps < visit.steps:
            action, world.carry, note = self._act(agent, obs, world.carry)
            step = self._sound(engine.step(action))
            experience = Experience(obs, action, step.reward, step.next_obs, step.terminated, step.truncated, note)
            agent.observe(experience)
            learned = agent.update()
            tally.add(learned)
            world.returns += step.reward
            world.lengths += 1
            world.steps += len(step.reward)
            ended = step.terminated | step.truncated
            if ended.any():
                tally.episodes(world.returns[ended], world.lengths[ended])
                world.returns[ended], world.lengths[ended] = 0.0, 0
                world.carry = _restart(world.carry, ended)
            obs = step.obs
            broken = not all(map(math.isfinite, learned.values()))  # told at once, before anything trips over it
            if broken or world.steps % every == 0 or world.steps >= visit.steps:
                yield Tick(world.steps, tally.numbers())
                tally = Tally()
        world.steps = 0
        if not world.goes_on:
            engine.close()
            world.engine = None

    def _act(self, agent: Agent, obs: Array, carry: Any, greedy: bool = False) -> tuple[Array, Any, Any]:
        try:
            return agent.act(obs, carry, greedy)
        except ValueError:  # torch's distributions
            if np.isfinite(obs).all():
                raise
            raise CrlError(f"{self.name}: an observation is not finite") from None

    def _sound(self, step: Step) -> Step:
        """A step whose numbers are finite: others are refused before they are learned from, or lie in a buffer."""
        for what, values in (
            ("a reward", step.reward),
            ("an observation", step.next_obs),
            ("an observation", step.obs),
        ):
            if values.dtype.kind == "f" and not np.isfinite(values).all():
                raise CrlError(f"{self.name}: {what} is not finite")
        return step

    def _engine(self, visit: Visit) -> Engine:
        world = self.world
        if world.engine is None:
            world.seed = visit.seed
            world.engine = self._training(visit.seed)
            world.engine.reset()
            world.returns = np.zeros(self.interface.envs)
            world.lengths = np.zeros(self.interface.envs, dtype=np.int64)
            world.carry = None
        elif world.steps == 0:
            for name, value in self.setting.items():
                world.engine.change(name, value)
        return world.engine

    def evaluate(self, agent: Agent, seed: int, episodes: int, greedy: bool) -> Score:
        """Mean return over a fixed number of episodes of each copy, so that short episodes are not favoured."""
        copies = min(episodes, 64 if self.engine == "envpool" else 16)
        quota = [episodes // copies + (copy < episodes % copies) for copy in range(copies)]
        returns: list[list[float]] = [[] for _ in range(copies)]
        lengths: list[list[int]] = [[] for _ in range(copies)]
        engine = self._copies(copies, seed)
        try:
            with aside(derive(seed, copies)), facing(agent, self):
                obs, carry = engine.reset(), None
                total, length = np.zeros(copies), np.zeros(copies, dtype=np.int64)
                while any(len(done) < wanted for done, wanted in zip(returns, quota, strict=True)):
                    action, carry, _ = self._act(agent, obs, carry, greedy)
                    step = self._sound(engine.step(action))
                    total += step.reward
                    length += 1
                    ended = step.terminated | step.truncated
                    for copy in np.flatnonzero(ended):
                        if len(returns[copy]) < quota[copy]:
                            returns[copy].append(float(total[copy]))
                            lengths[copy].append(int(length[copy]))
                        total[copy], length[copy] = 0.0, 0
                    if ended.any():
                        carry = _restart(carry, ended)
                    obs = step.obs
        except NotYet as reason:
            return Score(reason=str(reason))
        finally:
            engine.close()
        return Score(tuple(itertools.chain(*returns)), tuple(itertools.chain(*lengths)))

    def sample(self, agent: Agent, seed: int, size: int) -> Experience:
        """At least `size` transitions, of the agent acting as in training, stacked as (time, copies, ...)."""
        engine = self._copies(self.interface.envs, seed)
        rows: list[Experience] = []
        try:
            with aside(derive(seed, size)), facing(agent, self):
                obs, carry = engine.reset(), None
                for _ in range(math.ceil(size / self.interface.envs)):
                    action, carry, note = self._act(agent, obs, carry)
                    step = self._sound(engine.step(action))
                    ended = (step.terminated, step.truncated)
                    rows.append(Experience(obs, action, step.reward, step.next_obs, *ended, note))
                    carry = _restart(carry, ended[0] | ended[1])
                    obs = step.obs
        finally:
            engine.close()
        names = ("obs", "action", "reward", "next_obs", "terminated", "truncated")
        stacked = {name: np.stack([getattr(row, name) for row in rows]) for name in names}
        return Experience(**stacked, note=[row.note for row in rows])

    def film(self, agent: Agent, seed: int, greedy: bool, frames: int = 500) -> list[Array]:
        """Pictures of one episode."""
        env = self.make(render=True)
        pictures: list[Array] = []
        with aside(derive(seed, 1)), facing(agent, self):
            obs, _ = env.reset(seed=derive(seed, 0, 0))
            carry, ended = None, False
            pictures.append(np.asarray(env.render()))
            while not ended and len(pictures) < frames:
                action, carry, _ = agent.act(np.asarray(obs)[None], carry, greedy)
                obs, _, terminated, truncated, _ = env.step(action[0])
                pictures.append(np.asarray(env.render()))
                ended = terminated or truncated
        env.close()
        return pictures

    def speed(self, seconds: float = 0.3) -> float:
        """Environment steps per second with random actions, measured now."""
        if self.engine == "envpool":
            return self._pooled_speed(seconds)
        env = self.make()
        env.reset(seed=0)
        env.action_space.seed(0)
        count, begin = 0, time.perf_counter()
        while time.perf_counter() - begin < seconds:
            _, _, terminated, truncated, _ = env.step(env.action_space.sample())
            count += 1
            if terminated or truncated:
                env.reset()
        env.close()
        return count / (time.perf_counter() - begin)

    def _pooled_speed(self, seconds: float) -> float:
        engine = self._copies(self.interface.envs, 0)
        engine.reset()
        space = batch_space(self.interface.action, engine.copies)
        space.seed(0)
        count, begin = 0, time.perf_counter()
        while time.perf_counter() - begin < seconds:
            engine.step(np.asarray(space.sample()))
            count += engine.copies
        engine.close()
        return count / (time.perf_counter() - begin)

    # State: nothing between visits, unless the environment goes on; all of the visit in the middle of one.

    def state_dict(self) -> State:
        """The world that this task's training goes on in."""
        world = self.world
        if world.engine is None:
            return {}
        return {
            "engine": world.engine.state_dict(),
            "seed": world.seed,
            "returns": torch.from_numpy(world.returns).clone(),
            "lengths": torch.from_numpy(world.lengths).clone(),
            "carry": world.carry,
            "steps": world.steps,
        }

    def load_state_dict(self, state: State) -> None:
        """The inverse of `state_dict`."""
        world = self.world
        world.engine = None
        if not state:
            return
        world.seed, world.steps, world.carry = state["seed"], state["steps"], state["carry"]
        world.returns, world.lengths = state["returns"].numpy().copy(), state["lengths"].numpy().copy()
        world.engine = self._training(world.seed)
        world.engine.load_state_dict(state["engine"])


def _restart(carry: Any, ended: Array) -> Any:
    """A recurrent state whose rows are zero where an episode ended."""
    if carry is None:
        return None
    if isinstance(carry, tuple):
        return tuple(_restart(part, ended) for part in carry)
    fresh = carry.clone() if isinstance(carry, torch.Tensor) else carry.copy()
    fresh[ended.nonzero()[0]] = 0
    return fresh


def join(tasks: Sequence[GymTask]) -> Interface:
    """One interface for all tasks; each is told of it."""
    observation = shared_observation([task.interface.observation for task in tasks])
    action = shared_action([task.interface.action for task in tasks], [task.name for task in tasks])
    shared = Interface(observation, action, tasks[0].interface.envs)
    for task in tasks:
        task.make.shared = shared
    return shared


def build(**options: Any) -> GymTask:
    """A task, or one line about what is missing or refused; it has been reset and stepped once."""
    env = options["env"]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they are shown when it is made to be trained on
            return GymTask(**options)
    except CrlError:
        raise
    except ImportError as error:
        raise CrlError(f"{env} needs a package that is not installed: {brief(error)}") from None
    except gymnasium.error.DependencyNotInstalled as error:
        lines = re.findall(r"pip install [^`]+", str(error))
        raise CrlError(f"{env} needs an extra: {lines[-1] if lines else brief(error)}") from None
    except Exception as error:  # an environment may fail in any way
        wrappers = [use if isinstance(use, str) else use.__name__ for use, _ in options.get("wrappers", ())]
        parts = {"kwargs": options.get("kwargs"), "wrappers": wrappers, "change": options.get("setting")}
        asked = ", ".join(f"{name} {part}" for name, part in parts.items() if part)
        said = brief(error).partition(" was raised from the environment creator")[0]
        raise CrlError(f"{env} cannot be made or stepped with {asked or 'its defaults'}: {said}") from error
