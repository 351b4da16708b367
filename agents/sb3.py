"""Stable-Baselines3 agents: the learning is SB3's own unmodified `train()`, the loop is the walk's.

`observe` fills SB3's rollout or replay buffer just as SB3's `collect_rollouts` does, and `update` calls `train()`
when it is time to; a test holds the result equal to bare `learn()` bit for bit.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from gymnasium import spaces
from gymnasium.utils import seeding
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.buffers import ReplayBuffer, RolloutBuffer
from stable_baselines3.common.logger import Logger
from torch import nn

from agents.given import Spaces, remember_replays, remember_rollouts
from agents.layers import INITS, Heads, Shape
from agents.normalize import Normalizer
from agents.optimizers import leave_ends
from agents.options import check_options, known, line, policy_kwargs, with_classes
from crl.checked import truth
from crl.core import Array, CrlError, Interface, NotYet, Rules, State, Task, Visit

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

    learns_from = "transitions"
    pause = 1  # it can be stopped between updates, with a rollout that is not whole
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
        settings = with_classes(settings)
        shape = {**policy_kwargs(interface, net or {}, optimizer or {}), **settings.pop("policy_kwargs", {})}
        self._remember_batches(settings)
        for name in ("learning_rate", "clip_range"):
            if isinstance(settings.get(name), Mapping):
                settings[name] = line(name, settings[name])
        self.algo: Any = self.algorithm(  # type: ignore[call-arg]  # checked against its signature above
            "MlpPolicy",  # type: ignore[arg-type]
            Spaces(interface),
            seed=seed,
            device=device,
            policy_kwargs=shape,
            **settings,
        )
        self._reshape(Shape.of(net or {}))
        if (init := (net or {}).get("init")) in INITS:
            self.algo.policy.apply(INITS[init])
            self.rebuilt()
        for optimizer_ in self.optimizers:
            leave_ends(optimizer_, ends_of(self.model))
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
    def largest_gradient(self) -> float | None:
        """The norm that gradients are clipped to, all of the policy's together; None where they are not."""
        return getattr(self.algo, "max_grad_norm", None)

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
        for name, value in wanted.items():
            truth(f"agent.normalize.{name}", value)
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

    def _check_batch(self, obs: Array) -> None:
        """One observation alone has no row for its answer to stand in."""
        if np.ndim(obs) != 1 + len(self.interface.observation.shape or ()):
            raise CrlError(f"act() takes a batch of observations; of one of shape {np.shape(obs)} make it: obs[None]")

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


def ends_of(model: nn.Module) -> list[nn.Parameter]:
    """Parameters of the layers that read observations and that answer, in SB3's networks.

    The first layer of a sequence reads them; its last answers where no activation follows, and so does a layer outside.
    """
    inside = {id(part) for one in model.modules() if isinstance(one, nn.Sequential) for part in one}
    ends: list[nn.Module] = [p for p in model.modules() if isinstance(p, nn.Linear) and id(p) not in inside]
    for one in model.modules():
        layers = [part for part in one if isinstance(part, nn.Linear)] if isinstance(one, nn.Sequential) else []
        ends += layers[:1] + [part for part in layers[-1:] if part is one[-1]]  # type: ignore[index]
    return [value for part in ends for value in part.parameters()]


def named(module: nn.Module, prefixes: list[str]) -> dict[str, nn.Parameter]:
    """The trainable parameters whose names begin so."""
    starts = tuple(f"{prefix}." for prefix in prefixes)
    return {n: p for n, p in module.named_parameters() if p.requires_grad and f"{n}.".startswith(starts)}
