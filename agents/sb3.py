"""Stable-Baselines3 agents: the learning is SB3's own unmodified `train()`, the loop is the walk's.

`observe` fills SB3's rollout or replay buffer just as SB3's `collect_rollouts` does, and `update` calls `train()`
when it is time to; a test holds the result equal to bare `learn()` bit for bit.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import math
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from gymnasium import spaces
from gymnasium.utils import seeding
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.buffers import ReplayBuffer, RolloutBuffer
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.type_aliases import TrainFrequencyUnit
from stable_baselines3.common.vec_env import VecEnv
from torch import nn

from agents.nets import Heads, Shape
from agents.normalize import Normalizer
from agents.options import check_options, known, line, policy_kwargs
from crl.core import Array, CrlError, Experience, Interface, NotYet, Rules, State, Task, Visit

COUNTERS = (
    "num_timesteps",
    "_n_updates",
    "_n_calls",
    "exploration_rate",
    "_episode_num",
    "_current_progress_remaining",
)


class SB3Agent:
    """What the on-policy and off-policy agents share: construction, boundaries, state."""

    algorithm: ClassVar[type[BaseAlgorithm]]
    defaults: ClassVar[Mapping[str, Any]] = {}

    def __init__(
        self,
        interface: Interface,
        seed: int,
        device: str,
        *,
        net: Mapping[str, Any] | None = None,
        optimizer: Mapping[str, Any] | None = None,
        normalize: Mapping[str, bool] | None = None,
        **options: Any,
    ) -> None:
        self.interface = interface
        settings = {**self.defaults, **options}
        check_options(self.algorithm, settings)
        shape = {**policy_kwargs(interface, net or {}, optimizer or {}), **settings.pop("policy_kwargs", {})}
        self._remember_batches(settings)
        for name in ("learning_rate", "clip_range"):
            if isinstance(settings.get(name), Mapping):
                settings[name] = line(name, settings[name])
        self.algo: Any = self.algorithm(  # type: ignore[call-arg]  # checked against its signature above
            "MlpPolicy",  # type: ignore[arg-type]
            _Spaces(interface),
            seed=seed,
            device=device,
            policy_kwargs=shape,
            **settings,
        )
        self._reshape(Shape.of(net or {}))
        self.algo.set_logger(Logger(folder=None, output_formats=[]))
        self.algo.policy.set_training_mode(False)
        self.normalizer = self._normalizer(normalize or {})
        self.heads: list[str] = []  # the tasks that have one, where heads are per task
        self._schedule = (0, 1)
        self._entered_at = 0
        self._visit_steps = 1
        self._evaluating = False

    # What methods and monitors work on.

    @property
    def model(self) -> nn.Module:
        """Every plastic parameter."""
        policy: nn.Module = self.algo.policy
        return policy

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        """Whatever steps the model."""
        return [self._get(name) for name in self.algo._get_torch_save_params()[0] if name.endswith("optimizer")]

    @property
    def progress(self) -> float:
        """The share of the visit that is over."""
        return min(1.0, float(self.algo.num_timesteps - self._entered_at) / self._visit_steps)

    def rebuilt(self) -> None:
        """The model has grown: its new parameters are to be learned."""
        known = {
            id(value) for optimizer in self.optimizers for group in optimizer.param_groups for value in group["params"]
        }
        new = [value for value in self._plastic() if value.requires_grad and id(value) not in known]
        if new:
            self.algo.policy.optimizer.add_param_group({"params": new})

    def _plastic(self) -> Iterator[nn.Parameter]:
        return self.model.parameters()

    # Boundaries.

    def enter(self, visit: Visit) -> None:
        """An announced boundary: keep or reset what the rules say, face the task, set the schedules."""
        rules = visit.rules
        if rules.head == "per_task":
            self._face(visit.task, grow=True)
        if rules.optimizer == "reset" and visit.index > 1:
            for optimizer in self.optimizers:
                optimizer.state.clear()
        if rules.normalizer == "reset" and self.normalizer is not None:
            self.normalizer.reset()
        self._schedule = visit.schedule
        self._entered_at = self.algo.num_timesteps
        self._visit_steps = visit.steps
        self._progress()

    def accepts(self, rules: Rules) -> None:
        """Refuse, in one line, a rule about something that this algorithm does not have."""
        if rules.head == "per_task":
            self._head_slots()
        has = {"buffer": hasattr(self.algo, "replay_buffer"), "normalizer": self.normalizer is not None}
        for name, there in has.items():
            if getattr(rules, name) == "reset" and not there:
                raise CrlError(f"boundary.{name}: reset, but agent {type(self).__name__} has no {name} to reset")

    def _progress(self) -> None:
        start, length = self._schedule
        done = start + self.algo.num_timesteps - self._entered_at
        self.algo._current_progress_remaining = 1.0 - float(done) / float(max(length, 1))

    @contextlib.contextmanager
    def facing(self, task: Task) -> Iterator[None]:
        """Evaluating `task`: its head answers, and no random stream or counter of training moves."""
        space, head, before = self.algo.action_space, self._current_head(), self._evaluating
        generator = space._np_random
        space._np_random, _ = seeding.np_random(int(np.random.randint(2**31)))
        if self.heads:
            self._face(task, grow=False)
        self._evaluating = True
        try:
            yield
        finally:
            self._evaluating = before
            space._np_random = generator
            for module in self._head_modules():
                module.current = head

    # Heads: one output layer per task.

    def _head_slots(self) -> list[tuple[Any, str | int]]:
        raise CrlError(f"boundary.head: per_task works with PPO, A2C, TRPO and DQN, not with {self.algorithm.__name__}")

    def _head_modules(self) -> list[Heads]:
        if not self.heads:
            return []
        return [owner[key] if isinstance(key, int) else getattr(owner, key) for owner, key in self._head_slots()]

    def _current_head(self) -> int:
        return next((module.current for module in self._head_modules()), 0)

    def _face(self, task: Task, *, grow: bool) -> None:
        if task.name not in self.heads:
            if not grow:
                raise NotYet("no head for this task yet")
            self._add_head(task.name)
        for module in self._head_modules():
            module.current = self.heads.index(task.name)

    def _add_head(self, name: str) -> None:
        self.heads.append(name)
        for owner, key in self._head_slots():
            if len(self.heads) == 1:
                first = owner[key] if isinstance(key, int) else getattr(owner, key)
                if isinstance(key, int):
                    owner[key] = Heads(first)
                else:
                    setattr(owner, key, Heads(first))
                continue
            module = owner[key] if isinstance(key, int) else getattr(owner, key)
            new = [parameter for parameter in module.grow() if parameter.requires_grad]
            if self._learns(owner):
                self.algo.policy.optimizer.add_param_group({"params": new})

    def _learns(self, owner: Any) -> bool:
        return True

    # State.

    def _get(self, name: str) -> Any:
        return functools.reduce(getattr, name.split("."), self.algo)

    def state_dict(self) -> State:
        """SB3's modules, optimizers, tensors and counters; ours on top."""
        modules, tensors = self.algo._get_torch_save_params()
        return {
            "heads": list(self.heads),
            "head": self._current_head(),
            "modules": {name: self._get(name).state_dict() for name in modules},
            "tensors": {name: self._get(name).detach().clone() for name in tensors},
            "counters": {name: getattr(self.algo, name) for name in COUNTERS if hasattr(self.algo, name)},
            "action_space": self.algo.action_space.np_random.bit_generator.state,
            "normalizer": self.normalizer.state_dict() if self.normalizer is not None else {},
            "schedule": [*self._schedule, self._entered_at, self._visit_steps],
        }

    def load_state_dict(self, state: State) -> None:
        """The inverse of `state_dict`: the structure first, then what fills it."""
        for name in state["heads"]:
            self._add_head(name)
        for module in self._head_modules():
            module.current = state["head"]
        for name, value in state["modules"].items():
            self._get(name).load_state_dict(value)
        for name, value in state["tensors"].items():
            self._get(name).data.copy_(value)
        for name, value in state["counters"].items():
            setattr(self.algo, name, value)
        self.algo.action_space.np_random.bit_generator.state = state["action_space"]
        if self.normalizer is not None:
            self.normalizer.load_state_dict(state["normalizer"])
        *schedule, self._entered_at, self._visit_steps = state["schedule"]
        self._schedule = (schedule[0], schedule[1])

    # Small parts.

    def _remember_batches(self, settings: dict[str, Any]) -> None:
        """Let the buffer be one that remembers the batch it last gave: `train()` is as ever, and is watched so."""
        for name, remembering, default in (
            ("rollout_buffer_class", remember_rollouts, RolloutBuffer),
            ("replay_buffer_class", remember_replays, ReplayBuffer),
        ):
            if name in inspect.signature(self.algorithm.__init__).parameters:
                settings[name] = remembering(settings.get(name) or default)

    def _reshape(self, shape: Shape) -> None:
        """Norm layers and activations that double, which SB3's own networks do not have."""
        if not shape.changes:
            return
        for owner, name in self._bodies():
            setattr(owner, name, shape.remake(getattr(owner, name)))
        policy = self.algo.policy
        policy.to(self.algo.device)
        rate = self.algo.lr_schedule(1)
        policy.optimizer = policy.optimizer_class(self._plastic(), lr=rate, **policy.optimizer_kwargs)

    def _bodies(self) -> list[tuple[Any, str]]:
        raise CrlError(
            f"agent.net: norm, crelu and fourier work with PPO, A2C, TRPO and DQN, not with {self.algorithm.__name__}"
        )

    def _normalizer(self, wanted: Mapping[str, bool]) -> Normalizer | None:
        known("agent.normalize", wanted, ("observation", "reward"))
        if not any(wanted.values()):
            return None
        if wanted.get("observation") and isinstance(self.interface.observation, spaces.MultiDiscrete):
            raise CrlError("agent.normalize.observation: these observations are categories, which have no mean")
        return Normalizer(
            self.interface.observation.shape or (),
            self.interface.envs,
            self.algo.gamma,
            bool(wanted.get("observation")),
            bool(wanted.get("reward")),
        )

    def _tensor(self, values: Array) -> torch.Tensor:
        return torch.as_tensor(values, device=self.algo.device)

    def _seen(self, obs: Array) -> Array:
        return obs if self.normalizer is None else self.normalizer.normalize_obs(obs)

    def _learn(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """SB3's own `train()`, and what it logged; SB3 raises where weights turn NaN, we report it as a loss."""
        try:
            self.algo.train(*args, **kwargs)
        except ValueError:
            if all(torch.isfinite(parameter).all() for parameter in self.model.parameters()):
                raise
            return {"losses/loss": float("nan")}
        self.algo.policy.set_training_mode(False)
        return self._numbers()

    def _numbers(self) -> dict[str, float]:
        logged = self.algo.logger.name_to_value
        numbers = {
            f"losses/{name.split('/')[-1]}": float(value)
            for name, value in logged.items()
            if name.startswith(("train/", "rollout/")) and not name.endswith("n_updates")
            if not (name.endswith("explained_variance") and np.isnan(value))  # returns that do not vary have none
        }
        logged.clear()
        self.algo.logger.name_to_count.clear()
        self.algo.logger.name_to_excluded.clear()
        return numbers


class OnPolicy(SB3Agent):
    """PPO, A2C and TRPO: a rollout is collected, learned from, and dropped."""

    def __init__(self, interface: Interface, seed: int, device: str, **options: Any) -> None:
        super().__init__(interface, seed, device, **options)
        self.stride: int = self.algo.n_steps
        self._starts = np.ones(interface.envs, dtype=bool)
        self._last: Experience | None = None

    def act(self, obs: Array, carry: Any, greedy: bool) -> tuple[Array, Any, Any]:
        """Sample from the policy; the note is what the rollout buffer will want to know of it."""
        obs = self._seen(obs)
        seen = torch.as_tensor(obs, device=self.algo.device)
        with torch.no_grad():
            if self._evaluating:
                raw = self.algo.policy._predict(seen, deterministic=greedy).cpu().numpy()
                return self._bounded(raw), carry, raw
            chosen, values, log_probs = self.algo.policy(seen)
        raw = chosen.cpu().numpy()
        return self._bounded(raw), carry, (obs, raw, values, log_probs)

    def _bounded(self, raw: Array) -> Array:
        """What the environment is told of a sampled action."""
        space = self.algo.action_space
        return np.clip(raw, space.low, space.high) if isinstance(space, spaces.Box) else raw

    def observe(self, experience: Experience) -> None:
        """Add a vector step to the rollout; a truncated episode is continued by the value of its last state."""
        buffer: RolloutBuffer = self.algo.rollout_buffer
        if buffer.pos == 0 or buffer.full:
            buffer.reset()
        obs, raw, values, log_probs = experience.note
        ended = experience.terminated | experience.truncated
        reward = experience.reward
        if self.normalizer is not None:
            self.normalizer.update(experience.obs, reward, ended)
            reward = self.normalizer.normalize_reward(reward)
        for copy_ in np.flatnonzero(experience.truncated & ~experience.terminated):
            last = self.algo.policy.obs_to_tensor(self._seen(experience.next_obs[copy_]))[0]
            with torch.no_grad():
                value = self.algo.policy.predict_values(last)[0]
            reward = reward.copy() if reward is experience.reward else reward
            reward[copy_] += (self.algo.gamma * value).item()  # in float32, as SB3 does
        if isinstance(self.algo.action_space, spaces.Discrete):
            raw = raw.reshape(-1, 1)
        buffer.add(obs, raw, reward, self._starts, values, log_probs)
        self._starts = ended
        self._last = experience
        self.algo.num_timesteps += len(ended)

    def update(self) -> dict[str, float]:
        """Learn once the rollout is full."""
        buffer: RolloutBuffer = self.algo.rollout_buffer
        if not buffer.full:
            return {}
        assert self._last is not None
        with torch.no_grad():
            following = torch.as_tensor(self._seen(self._last.next_obs), device=self.algo.device)
            values = self.algo.policy.predict_values(following)
        buffer.compute_returns_and_advantage(last_values=values, dones=self._starts)
        self._progress()
        numbers = self._learn()
        buffer.reset()
        return numbers

    def enter(self, visit: Visit) -> None:
        """New episodes begin."""
        super().enter(visit)
        self._starts = np.ones(self.interface.envs, dtype=bool)

    @property
    def chains(self) -> list[list[str]]:
        """The modules from what is seen to the action, and to the value, by name and in order."""
        body = self.algo.policy.mlp_extractor
        return [
            [*(f"mlp_extractor.{side}.{i}" for i in range(len(getattr(body, side)))), head]
            for side, head in (("policy_net", "action_net"), ("value_net", "value_net"))
        ]

    @property
    def epoch(self) -> int:
        """Steps of the optimizer that go once through a rollout."""
        return math.ceil(int(self.algo.n_steps) * self.interface.envs / int(getattr(self.algo, "batch_size", 10**9)))

    def _bodies(self) -> list[tuple[Any, str]]:
        return [(self.algo.policy.mlp_extractor, "policy_net"), (self.algo.policy.mlp_extractor, "value_net")]

    def _head_slots(self) -> list[tuple[Any, str | int]]:
        return [(self.algo.policy, "action_net"), (self.algo.policy, "value_net")]

    def state_dict(self) -> State:
        """Taken between rollouts, so none is stored."""
        return {**super().state_dict(), "starts": torch.from_numpy(self._starts.copy())}

    def load_state_dict(self, state: State) -> None:
        """The inverse of `state_dict`."""
        super().load_state_dict(state)
        self._starts = state["starts"].numpy().copy()
        self.algo.rollout_buffer.reset()


class OffPolicy(SB3Agent):
    """DQN, QR-DQN, SAC, TD3, DDPG, TQC and CrossQ: every step goes to a replay buffer, learned from at intervals."""

    def __init__(self, interface: Interface, seed: int, device: str, **options: Any) -> None:
        super().__init__(interface, seed, device, **options)
        self.algo._convert_train_freq()
        if self.algo.train_freq.unit is not TrainFrequencyUnit.STEP or self.algo.optimize_memory_usage:
            raise CrlError(
                "agent: train_freq in episodes and optimize_memory_usage are not supported: use train_freq: N"
            )
        self.algo._vec_normalize_env = self.normalizer
        self.stride: int = self.algo.train_freq.frequency
        self._since_train = 0
        self._filled_from = 0  # num_timesteps when the buffer was last emptied

    def rebuilt(self) -> None:
        """The model is another: its new parameters are to be learned, and target networks begin from it."""
        super().rebuilt()
        for name, target in self.algo.policy.named_children():
            if name.endswith("_target"):
                target.load_state_dict(getattr(self.algo.policy, name.removesuffix("_target")).state_dict())

    def _plastic(self) -> Iterator[nn.Parameter]:
        return (value for name, value in self.model.named_parameters() if "_target." not in name)

    def act(self, obs: Array, carry: Any, greedy: bool) -> tuple[Array, Any, Any]:
        """SB3's exploration while training, its `predict` while evaluating."""
        seen = self._seen(obs)
        if self._evaluating:
            action, _ = self.algo.predict(seen, deterministic=greedy)
            return action, carry, None
        self.algo._last_obs = seen
        action, stored = self.algo._sample_action(self.algo.learning_starts, self.algo.action_noise, len(obs))
        return action, carry, stored

    def observe(self, experience: Experience) -> None:
        """Add a vector step to the replay buffer and let the schedules and target networks move on."""
        ended = experience.terminated | experience.truncated
        algo = self.algo
        algo.num_timesteps += len(ended)
        if self.normalizer is not None:
            self.normalizer.update(experience.obs, experience.reward, ended)
        cut = experience.truncated & ~experience.terminated
        infos = [{"TimeLimit.truncated": bool(flag)} for flag in cut]
        buffer: ReplayBuffer = algo.replay_buffer
        buffer.add(experience.obs, experience.next_obs, experience.note, experience.reward, ended, infos)
        self._progress()
        algo._on_step()
        algo._episode_num += int(ended.sum())
        self._since_train += 1

    def update(self) -> dict[str, float]:
        """Learn every `train_freq` vector steps, once `learning_starts` steps are stored."""
        algo = self.algo
        if self._since_train < self.stride:
            return {}
        self._since_train = 0
        if algo.num_timesteps - self._filled_from <= algo.learning_starts:
            return {}
        steps = algo.gradient_steps if algo.gradient_steps >= 0 else self.stride * self.interface.envs
        return self._learn(batch_size=algo.batch_size, gradient_steps=steps) if steps > 0 else {}

    def enter(self, visit: Visit) -> None:
        """Empty the buffer where the rules say so; its learning then waits for `learning_starts` again."""
        super().enter(visit)
        if visit.rules.buffer == "reset" and visit.index > 1:
            self.algo.replay_buffer.reset()
            self._filled_from = self.algo.num_timesteps
        if hasattr(self.algo, "exploration_schedule"):
            self.algo.exploration_rate = self.algo.exploration_schedule(self.algo._current_progress_remaining)

    def state_dict(self) -> State:
        """With the filled rows of the replay buffer."""
        buffer: Any = self.algo.replay_buffer
        size = buffer.size()
        rows = {
            name: torch.from_numpy(value[:size]).clone()
            for name, value in vars(buffer).items()
            if isinstance(value, np.ndarray) and value.shape[:1] == (buffer.buffer_size,)
        }
        return {
            **super().state_dict(),
            "buffer": {"rows": rows, "pos": buffer.pos, "full": buffer.full},
            "since_train": self._since_train,
            "filled_from": self._filled_from,
        }

    def load_state_dict(self, state: State) -> None:
        """The inverse of `state_dict`."""
        super().load_state_dict(state)
        buffer: Any = self.algo.replay_buffer
        for name, rows in state["buffer"]["rows"].items():
            getattr(buffer, name)[: len(rows)] = rows.numpy()
        buffer.pos, buffer.full = state["buffer"]["pos"], state["buffer"]["full"]
        self._since_train, self._filled_from = state["since_train"], state["filled_from"]


def remember_rollouts(base: Any) -> Any:
    """A rollout buffer that knows in `last` which minibatch it gave last."""

    class Rollouts(base):  # type: ignore[misc]
        last: Any = None

        def get(self, batch_size: int | None = None) -> Iterator[Any]:
            for self.last in super().get(batch_size):  # the name is what this is for
                yield self.last

    return Rollouts


def remember_replays(base: Any) -> Any:
    """A replay buffer that knows in `last` which minibatch it gave last."""

    class Replays(base):  # type: ignore[misc]
        last: Any = None

        def sample(self, *args: Any, **kwargs: Any) -> Any:
            self.last = super().sample(*args, **kwargs)
            return self.last

    return Replays


class _Spaces(VecEnv):
    """The right spaces for SB3's constructor, and an environment that is never stepped."""

    def __init__(self, interface: Interface) -> None:
        self.seen = _stored(interface.observation)
        super().__init__(interface.envs, self.seen, copy.deepcopy(interface.action))

    def reset(self) -> Any:
        raise RuntimeError("the walk steps the environments")

    def step_async(self, actions: Any) -> None:
        self.reset()

    def step_wait(self) -> Any:
        self.reset()

    def close(self) -> None:
        return

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        return [None] * self.num_envs

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        self.reset()

    def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> list[Any]:
        return [None] * self.num_envs

    def env_is_wrapped(self, wrapper_class: Any, indices: Any = None) -> list[bool]:
        return [False] * self.num_envs


def _stored(space: spaces.Space[Any]) -> spaces.Space[Any]:
    if isinstance(space, spaces.MultiDiscrete):
        return spaces.Box(0, (space.nvec - 1).astype(np.uint8), dtype=np.uint8)
    return space


def named(module: nn.Module, prefixes: list[str]) -> dict[str, nn.Parameter]:
    """The trainable parameters whose names begin so."""
    starts = tuple(f"{prefix}." for prefix in prefixes)
    return {n: p for n, p in module.named_parameters() if p.requires_grad and f"{n}.".startswith(starts)}
