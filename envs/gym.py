"""Any Gymnasium environment as a Task: the vector loop, evaluation and sampled experience."""

from __future__ import annotations

import itertools
import math
import re
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
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
    NotTheSame,
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
from envs import answers, pool
from envs.alarm import Alarm
from envs.engines import Engine, Step, Sync
from envs.minigrid import Symbols
from envs.pool import Pool
from envs.recipe import Recipe
from envs.spaces import shared_action, shared_observation
from envs.tally import Tally
from envs.workers import Async
from envs.wrappers import reported

TICK = 2_048  # at most so many steps between two lines of the log, rounded up to the agent's stride
LINES = 20  # at least so many lines of the log a visit


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
    tally: Tally = field(default_factory=Tally)  # since the last line of the log


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
        timeout: float = 0,
        max_episode_steps: int = 0,
    ) -> None:
        self.name, self.world, self.engine, self.threads = name, world or World(), engine, threads
        self.make = Recipe(env, kwargs or {}, list(wrappers), setting or {}, limit=max_episode_steps)
        self.alarm = Alarm(timeout, f"task {name}: one call has taken longer than")
        late = "engine: the workers did not start within"
        self.starting = Alarm(timeout, late, "they import for long") if engine == "async" else self.alarm
        probe = self.make.alone()
        with aside(0), self.alarm:  # what an environment cannot do, it should not do now
            trial = Sync(lambda: probe, 1, 0)
            trial.reset()
            probe.action_space.seed(0)
            trial.step(np.asarray(probe.action_space.sample())[None])
        self.interface = self.make.own = Interface(probe.observation_space, probe.action_space, envs)
        untouched = isinstance(probe, Symbols) and not any(reported(*wrapper) for wrapper in wrappers)
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
        if self.engine == "envpool":
            return Pool(self.make, copies, seed, self.threads)
        return Sync(self.make, copies, seed, limit=self.make.limit)

    def _training(self, seed: int) -> Engine:
        copies, limit = self.interface.envs, self.make.limit
        if self.engine == "envpool":
            return Pool(self.make, copies, seed, self.threads)
        if self.engine == "async":
            return Async(self.make, copies, seed, self.setting, self.threads, limit)
        return Sync(self.make, copies, seed, self.setting, limit=limit)

    # The walk's side.

    def train(self, agent: Agent, visit: Visit) -> Iterator[Tick]:
        """Step, let the agent observe and update, and report every so often; in between it is safe to stop."""
        world = self.world
        engine = self._engine(visit)
        pause = getattr(agent, "pause", getattr(agent, "stride", 1)) * engine.copies
        every = self._every(agent, visit, pause)
        while world.steps < visit.steps:
            learned = self._learn(agent, engine)
            broken = not all(map(math.isfinite, learned.values()))  # told at once, before anything trips over it
            if broken or world.steps % every == 0 or world.steps >= visit.steps:
                ended = float(world.tally.counts.get("train/return", 0))
                numbers, world.tally = {**world.tally.numbers(), "train/episodes": ended}, Tally()
                yield Tick(world.steps, numbers)
            elif world.steps % pause == 0:
                yield Tick(world.steps, {})
        world.steps = 0
        if not world.goes_on:
            engine.close()
            world.engine = None

    def _every(self, agent: Agent, visit: Visit, pause: int) -> int:
        """Steps between two lines of the log. A detector of boundaries reads those, in its own measure."""
        stride = getattr(agent, "stride", 1) * self.interface.envs
        most = stride * math.ceil(TICK / stride)
        return most if visit.rules.announced == "detected" else min(most, pause * max(visit.steps // pause // LINES, 1))

    def _learn(self, agent: Agent, engine: Engine) -> Mapping[str, float]:
        """One vector step, and what the agent learned from it."""
        world, obs = self.world, engine.obs
        action, world.carry, note = self._act(agent, obs, world.carry)
        step = self._step(agent, engine, action)
        agent.observe(Experience(obs, action, step.reward, step.next_obs, step.terminated, step.truncated, note))
        learned = answers.learned(agent, agent.update())
        world.tally.add(learned)
        world.returns += step.earned
        world.lengths += 1
        world.steps += len(step.reward)
        ended = step.terminated | step.truncated
        if ended.any():
            world.tally.episodes(world.returns[ended], world.lengths[ended])
            if (cut := self._cut(step, world.lengths)).any():
                world.tally.add({"train/cut": float(cut.mean())})
            world.returns[ended], world.lengths[ended] = 0.0, 0
            world.carry = _restart(world.carry, ended)
        return learned

    def _cut(self, step: Step, lengths: Array) -> Array:
        """Which episodes ended at the engine's limit."""
        return step.truncated & (lengths >= (self.make.limit or math.inf))

    def so_far(self) -> dict[str, float]:
        """The numbers since the last line of the log."""
        return self.world.tally.numbers()

    def _act(self, agent: Agent, obs: Array, carry: Any, greedy: bool = False) -> tuple[Array, Any, Any]:
        try:
            found = agent.act(obs, carry, greedy)
        except ValueError:  # torch's distributions
            if np.isfinite(obs).all():
                raise
            raise CrlError(f"{self.name}: an observation is not finite") from None
        return answers.acted(agent, found, (self.shared or self.interface).action, len(obs))

    def _step(self, agent: Agent, engine: Engine, action: Array) -> Step:
        """One vector step, whose failure is the agent's where its actions were none."""
        try:
            with self.alarm:
                return self._sound(engine.step(action))
        except Exception:
            answers.refuse_outside(agent, action, (self.shared or self.interface).action)
            raise

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
            with self.starting:
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
        engine, cut = self._copies(copies, seed), 0
        try:
            with aside(derive(seed, copies)), facing(agent, self):
                with self.alarm:
                    obs, carry = engine.reset(), None
                total, length = np.zeros(copies), np.zeros(copies, dtype=np.int64)
                while any(len(done) < wanted for done, wanted in zip(returns, quota, strict=True)):
                    action, carry, _ = self._act(agent, obs, carry, greedy)
                    step = self._step(agent, engine, action)
                    total += step.earned
                    length += 1
                    ended = step.terminated | step.truncated
                    for copy in np.flatnonzero(ended):
                        if len(returns[copy]) < quota[copy]:
                            returns[copy].append(float(total[copy]))
                            lengths[copy].append(int(length[copy]))
                            cut += int(self._cut(step, length)[copy])
                        total[copy], length[copy] = 0.0, 0
                    if ended.any():
                        carry = _restart(carry, ended)
                    obs = step.obs
        except NotYet as reason:
            return Score(reason=str(reason))
        finally:
            engine.close()
        return Score(tuple(itertools.chain(*returns)), tuple(itertools.chain(*lengths)), cut=cut)

    def sample(self, agent: Agent, seed: int, size: int) -> Experience:
        """At least `size` transitions, of the agent acting as in training, stacked as (time, copies, ...)."""
        engine = self._copies(self.interface.envs, seed)
        rows: list[Experience] = []
        try:
            with aside(derive(seed, size)), facing(agent, self):
                obs, carry = engine.reset(), None
                for _ in range(math.ceil(size / self.interface.envs)):
                    action, carry, note = self._act(agent, obs, carry)
                    step = self._step(agent, engine, action)
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
        try:
            env = self.make(render=True)
        except Exception as error:  # an environment may fail in any way
            raise CrlError(f"{self.name} makes no pictures: {brief(error)}") from error
        pictures: list[Array] = []
        with aside(derive(seed, 1)), facing(agent, self):
            obs, _ = env.reset(seed=derive(seed, 0, 0))
            carry, ended = None, False
            pictures.append(self._picture(env.render()))
            while not ended and len(pictures) < frames:
                action, carry, _ = self._act(agent, np.asarray(obs)[None], carry, greedy)
                obs, _, terminated, truncated, _ = env.step(action[0])
                pictures.append(self._picture(env.render()))
                ended = terminated or truncated
        env.close()
        return pictures

    def _picture(self, seen: Any) -> Array:
        """Red, green and blue from 0 to 255; floats are from 0 to 1."""
        picture = np.asarray(seen)
        if picture.dtype.kind == "f" and picture.size and picture.min() >= 0 and picture.max() <= 1:
            picture = (255 * picture).round().astype(np.uint8)
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] not in (3, 4):
            what = f"{picture.dtype} of shape {picture.shape}"
            raise CrlError(f"{self.name} draws {what}: a picture is uint8, or floats from 0 to 1, (height, width, 3)")
        return picture[:, :, :3]

    def bring_back(self, steps: int = 600) -> None:
        """Step copies at random, bring others to the same place, and compare: refuses what does not come back."""
        seed, space = 7, batch_space((self.shared or self.interface).action, self.interface.envs)
        space.seed(seed)
        engines = [self._training(seed), self._training(seed)]
        try:
            with aside(seed), self.alarm:
                engines[0].reset()
                for _ in range(math.ceil(steps / engines[0].copies)):
                    engines[0].step(np.asarray(space.sample()))
                engines[1].load_state_dict(engines[0].state_dict())
                for _ in range(20):
                    actions = np.asarray(space.sample())
                    pair = [engine.step(actions) for engine in engines]
                    if not all(np.array_equal(a, b, equal_nan=True) for a, b in zip(*pair, strict=True)):
                        raise NotTheSame("an environment that was brought back goes on otherwise")
        finally:
            for engine in engines:
                engine.close()

    @property
    def alike(self) -> Any:
        """What it has in common with the tasks that take as long: all but its settings."""
        return repr((self.make.env, self.make.kwargs, self.make.wrappers))

    def pace(self, seconds: float = 0.3) -> tuple[float, float]:
        """(seconds a step, steps an episode) of random actions, measured now."""
        copies = self.interface.envs if self.engine == "envpool" else 1
        engine = self._copies(copies, 0)
        space = batch_space((self.shared or self.interface).action, copies)
        engine.reset()
        space.seed(0)
        count, ends, begin = 0, 0, time.perf_counter()
        while time.perf_counter() - begin < seconds or not count:
            step = engine.step(np.asarray(space.sample()))
            count += copies
            ends += int((step.terminated | step.truncated).sum())
        spent = time.perf_counter() - begin
        engine.close()
        return spent / count, count / ends if ends else self._limit(count)

    def _limit(self, longest: int) -> float:
        """How long an episode may be, where random actions end none: its limit, if it has one."""
        env = self.make.alone()
        env.close()
        steps = getattr(env.unwrapped, "max_steps", None) or (env.spec.max_episode_steps if env.spec else None)
        return float(steps or longest)

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
            "tally": world.tally.state_dict(),
        }

    def load_state_dict(self, state: State) -> None:
        """The inverse of `state_dict`."""
        world = self.world
        world.engine, world.steps, world.tally = None, 0, Tally()
        if not state:
            return
        world.tally.load_state_dict(state["tally"])
        world.seed, world.steps, world.carry = state["seed"], state["steps"], state["carry"]
        world.returns, world.lengths = state["returns"].numpy().copy(), state["lengths"].numpy().copy()
        engine = self._training(world.seed)
        try:
            engine.load_state_dict(state["engine"])
        except NotTheSame:
            engine.close()
            world.steps = 0
            raise
        world.engine = engine


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
    except (Exception, SystemExit) as error:  # an environment may fail in any way
        wrappers = [use if isinstance(use, str) else use.__name__ for use, _ in options.get("wrappers", ())]
        parts = {"kwargs": options.get("kwargs"), "wrappers": wrappers, "change": options.get("setting")}
        asked = ", ".join(f"{name} {part}" for name, part in parts.items() if part)
        said = brief(error).partition(" was raised from the environment creator")[0]
        raise CrlError(f"{env} cannot be made or stepped with {asked or 'its defaults'}: {said}") from error
