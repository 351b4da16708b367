"""Stable-Baselines3 agents: the learning is SB3's own unmodified `train()`, the loop is the walk's.

`observe` fills SB3's rollout or replay buffer just as SB3's `collect_rollouts` does, and `update` calls `train()`
when it is time to; a test holds the result equal to bare `learn()` bit for bit.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import numpy as np
import stable_baselines3 as sb3
import torch
from gymnasium import spaces
from gymnasium.utils import seeding
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.buffers import ReplayBuffer, RolloutBuffer
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.type_aliases import TrainFrequencyUnit
from stable_baselines3.common.vec_env import VecEnv
from torch import nn

from agents import dqn, ppo
from agents.nets import Heads
from agents.normalize import Normalizer
from agents.options import check_options, known, line, policy_kwargs
from crl.core import Array, CrlError, Experience, Interface, NotYet, Rules, State, Task, Visit

SUPPORTED = ("PPO", "A2C", "TRPO", "DQN", "QRDQN", "SAC", "TD3", "DDPG", "TQC", "CrossQ")
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
        self.algo.set_logger(Logger(folder=None, output_formats=[]))
        self.algo.policy.set_training_mode(False)
        self.normalizer = self._normalizer(normalize or {})
        self.heads: list[str] = []  # the tasks that have one, where heads are per task
        self._schedule = (0, 1)
        self._entered_at = 0
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
            "schedule": [*self._schedule, self._entered_at],
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
        *schedule, self._entered_at = state["schedule"]
        self._schedule = (schedule[0], schedule[1])

    # Small parts.

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

    def _head_slots(self) -> list[tuple[Any, str | int]]:
        if not isinstance(self.algo, sb3.DQN):
            return super()._head_slots()
        return [(net.q_net, len(net.q_net) - 1) for net in (self.algo.q_net, self.algo.q_net_target)]

    def _learns(self, owner: Any) -> bool:
        return owner is self.algo.q_net.q_net

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


class PPO(OnPolicy):
    """Proximal policy optimisation (Schulman et al. 2017), with settings that learn small MiniGrid tasks."""

    algorithm = sb3.PPO
    defaults: ClassVar[Mapping[str, Any]] = {
        "learning_rate": 5e-4,
        "n_steps": 128,
        "batch_size": 256,
        "n_epochs": 4,
        "ent_coef": 0.01,
    }

    @property
    def networks(self) -> dict[str, dict[str, nn.Parameter]]:
        """The parameters that answer now, of the actor and of the critic."""
        actor, critic = ["mlp_extractor.policy_net", "log_std"], ["mlp_extractor.value_net", "vf_features_extractor"]
        actor.append("features_extractor")
        critic += ["features_extractor"] if self.algo.policy.share_features_extractor else []
        head = f".heads.{self._current_head()}" if self.heads else ""
        parts = {"actor": [*actor, f"action_net{head}"], "critic": [*critic, f"value_net{head}"]}
        return {name: _named(self.model, prefixes) for name, prefixes in parts.items()}

    def prepare(self, experience: Experience) -> dict[str, torch.Tensor]:
        """A rollout, (time, copies, ...), as minibatches see it, with everything that is constant while learning."""
        policy, algo = self.algo.policy, self.algo
        obs = self._tensor(self._seen(experience.obs)).flatten(0, 1)
        reward = experience.reward if self.normalizer is None else self.normalizer.normalize_reward(experience.reward)
        gains = self._tensor(reward).float().clone()
        action = self._tensor(experience.action if experience.note is None else np.stack(experience.note))
        cut = self._tensor(experience.truncated & ~experience.terminated)
        following = self._tensor(self._seen(experience.next_obs))
        with torch.no_grad():
            answer = ppo.outputs(policy, obs)
            value = answer[:, -1].reshape(gains.shape)
            if cut.any():
                gains[cut] += algo.gamma * policy.predict_values(following[cut])[:, 0]
            last = policy.predict_values(following[-1])[:, 0]
            ended = self._tensor(experience.terminated | experience.truncated).float()
            gain = ppo.advantages(gains, value, last, ended, algo.gamma, algo.gae_lambda).flatten()
            action = action.reshape(len(obs), -1)
            log_prob, _ = ppo.log_probability(answer[:, :-1], action, algo.action_space)
        returns, value = gain + value.flatten(), value.flatten()
        if algo.normalize_advantage and len(gain) > 1:
            gain = (gain - gain.mean()) / (gain.std() + 1e-8)
        batch = {"obs": obs, "action": action, "advantage": gain, "log_prob": log_prob}
        return {**batch, "value": value, "return": returns}

    def outputs(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The action distribution's parameters and the value."""
        return ppo.outputs(self.algo.policy, batch["obs"])

    def objective(self, outputs: torch.Tensor, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The loss of a minibatch, as `train()` has it (SB3 normalises advantages within each minibatch)."""
        remaining = self.algo._current_progress_remaining
        return ppo.objective(
            outputs,
            batch,
            self.algo.action_space,
            clip=self.algo.clip_range(remaining),
            clip_value=self.algo.clip_range_vf(remaining) if self.algo.clip_range_vf else None,
            value_weight=self.algo.vf_coef,
            entropy_weight=self.algo.ent_coef,
        )

    def error(self, outputs: torch.Tensor, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The part of the loss that is an error, which 0 is the least of: the value's."""
        return ppo.value_error(outputs, batch, None)

    def metric(self, outputs: torch.Tensor, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """What outputs matter by where the surrogate is not convex in them."""
        return ppo.metric(outputs, self.algo.action_space, self.algo.vf_coef)

    def divergence(self, before: torch.Tensor, after: torch.Tensor) -> dict[str, torch.Tensor]:
        """How far the answers moved."""
        return ppo.divergence(before, after, self.algo.action_space)


class DQN(OffPolicy):
    """Deep Q-learning (Mnih et al. 2015), with settings that learn the smallest MiniGrid tasks."""

    algorithm = sb3.DQN
    defaults: ClassVar[Mapping[str, Any]] = {
        "learning_rate": 3e-4,
        "buffer_size": 50_000,
        "learning_starts": 1_000,
        "batch_size": 64,
        "train_freq": 1,
        "gradient_steps": 2,
        "target_update_interval": 1_000,
        "exploration_fraction": 0.5,
    }

    @property
    def networks(self) -> dict[str, dict[str, nn.Parameter]]:
        """The parameters that answer now; the target network's are not plastic."""
        last = len(self.algo.q_net.q_net) - 1
        idle = [f"q_net.q_net.{last}.heads.{i}." for i in range(len(self.heads)) if i != self._current_head()]
        found = _named(self.model, ["q_net"])
        return {"q": {name: value for name, value in found.items() if not name.startswith(tuple(idle))}}

    def prepare(self, experience: Experience) -> dict[str, torch.Tensor]:
        """Transitions as a replayed batch, with the target network's answer."""
        reward = experience.reward if self.normalizer is None else self.normalizer.normalize_reward(experience.reward)
        following = self._tensor(self._seen(experience.next_obs)).flatten(0, 1)
        with torch.no_grad():
            answer = self.algo.q_net_target(following)
        terminated = self._tensor(experience.terminated).float().flatten()
        target = dqn.targets(self._tensor(reward).float().flatten(), answer, terminated, self.algo.gamma)
        obs = self._tensor(self._seen(experience.obs)).flatten(0, 1)
        return {"obs": obs, "action": self._tensor(experience.action).reshape(-1, 1), "target": target}

    def outputs(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The values of all actions."""
        answer: torch.Tensor = self.algo.q_net(batch["obs"])
        return answer

    def objective(self, outputs: torch.Tensor, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Huber's loss of the temporal difference."""
        return dqn.objective(outputs, batch)

    def divergence(self, before: torch.Tensor, after: torch.Tensor) -> dict[str, torch.Tensor]:
        """How far the answers moved."""
        return dqn.divergence(before, after)


def adapt(algorithm: type[BaseAlgorithm]) -> type[SB3Agent]:
    """An agent from any supported algorithm class of Stable-Baselines3 or sb3-contrib, with its own defaults."""
    if algorithm.__name__ not in SUPPORTED:
        raise CrlError(f"agent.use: {algorithm.__name__} is not supported; supported are {', '.join(SUPPORTED)}")
    bases = {sb3.PPO: PPO, sb3.DQN: DQN, OnPolicyAlgorithm: OnPolicy, OffPolicyAlgorithm: OffPolicy}
    base: Any = next(ours for theirs, ours in bases.items() if issubclass(algorithm, theirs))
    return type(algorithm.__name__, (base,), {"algorithm": algorithm, "defaults": {}, "__doc__": algorithm.__doc__})


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


def _named(module: nn.Module, prefixes: list[str]) -> dict[str, nn.Parameter]:
    """The trainable parameters whose names begin so."""
    starts = tuple(f"{prefix}." for prefix in prefixes)
    return {n: p for n, p in module.named_parameters() if p.requires_grad and f"{n}.".startswith(starts)}
