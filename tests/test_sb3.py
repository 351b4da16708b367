"""The learning is Stable-Baselines3's own: bit for bit what bare `learn()` gives on the same episodes."""

from typing import Any

import numpy as np
import pytest
import stable_baselines3 as sb3
import torch
from gymnasium import spaces
from stable_baselines3.common.vec_env import VecEnv

from agents.adapt import adapt
from agents.dqn import DQN
from agents.layers import OneHot
from agents.off_policy import OffPolicy
from agents.on_policy import OnPolicy
from agents.ppo import PPO
from crl.build import build_agent
from crl.config import Experiment, parse
from crl.core import Rules, Visit
from envs.engines import Sync
from envs.gym import build, join

CUT = {"max_episode_steps": 40}  # so that truncated episodes are many


class Bare(VecEnv):
    """The walk's own episodes, as the vector of environments that SB3 expects."""

    def __init__(self, engine: Sync) -> None:
        env = engine.envs[0]
        seen = env.observation_space
        if isinstance(seen, spaces.MultiDiscrete):
            seen = spaces.Box(0, (seen.nvec - 1).astype(np.uint8), dtype=np.uint8)
        super().__init__(len(engine.envs), seen, env.action_space)
        self.engine = engine

    def reset(self) -> Any:
        return self.engine.reset().copy()

    def step_async(self, actions: Any) -> None:
        self.actions = actions

    def step_wait(self) -> Any:
        step = self.engine.step(self.actions)
        infos: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
        for i in np.flatnonzero(step.terminated | step.truncated):
            cut = bool(step.truncated[i] and not step.terminated[i])
            infos[i] = {"terminal_observation": step.next_obs[i], "TimeLimit.truncated": cut}
        return step.obs.copy(), step.reward.copy(), step.terminated | step.truncated, infos

    def close(self) -> None: ...

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        return [None] * self.num_envs

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None: ...

    def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> list[Any]:
        return [None] * self.num_envs

    def env_is_wrapped(self, wrapper_class: Any, indices: Any = None) -> list[bool]:
        return [False] * self.num_envs


def walked(agent_class: Any, env: str, envs: int, steps: int, options: dict[str, Any]) -> Any:
    task = build(env=env, name=env, kwargs=CUT, envs=envs)
    agent = agent_class(join([task]), 0, "cpu", **options)
    visit = Visit(1, task, steps, seed=7, total=steps, rules=Rules())
    agent.enter(visit)
    for _ in task.train(agent, visit):
        pass
    return agent.algo


def bare(algorithm: Any, env: str, envs: int, steps: int, options: dict[str, Any]) -> Any:
    task = build(env=env, name=env, kwargs=CUT, envs=envs)
    kwargs = {}
    if isinstance(task.interface.observation, spaces.MultiDiscrete):
        kinds = [int(kind) for kind in task.interface.observation.nvec]
        kwargs = {"features_extractor_class": OneHot, "features_extractor_kwargs": {"kinds": kinds}}
    algo = algorithm("MlpPolicy", Bare(Sync(task.make, envs, 7)), seed=0, device="cpu", policy_kwargs=kwargs, **options)
    return algo.learn(steps, log_interval=None)


def difference(a: Any, b: Any) -> float:
    mine, theirs = a.policy.state_dict(), b.policy.state_dict()
    return max(float((mine[name] - theirs[name]).abs().max()) for name in theirs)


PPO_OPTIONS = {"n_steps": 64, "batch_size": 64, "n_epochs": 3, "learning_rate": 1e-3}
DQN_OPTIONS = {"learning_starts": 100, "target_update_interval": 130, "train_freq": 3, "gradient_steps": 2,
               "buffer_size": 700, "batch_size": 32, "learning_rate": 1e-3}  # fmt: skip


@pytest.mark.parametrize("env", ["CartPole-v1", "MiniGrid-Empty-5x5-v0", "Pendulum-v1"])
def test_ppo_is_bare_ppo(env: str) -> None:
    mine = walked(adapt(sb3.PPO), env, 4, 1024, PPO_OPTIONS)
    theirs = bare(sb3.PPO, env, 4, 1024, PPO_OPTIONS)
    assert mine.num_timesteps == theirs.num_timesteps
    assert difference(mine, theirs) == 0.0


@pytest.mark.parametrize("envs", [1, 4])
def test_dqn_is_bare_dqn(envs: int) -> None:
    steps = 400 * 3 * envs if envs == 1 else 1200
    mine = walked(adapt(sb3.DQN), "CartPole-v1", envs, steps, DQN_OPTIONS)
    theirs = bare(sb3.DQN, "CartPole-v1", envs, steps, DQN_OPTIONS)
    assert mine.num_timesteps == theirs.num_timesteps and mine._n_updates == theirs._n_updates > 50
    assert mine.exploration_rate == theirs.exploration_rate
    assert difference(mine, theirs) == 0.0


def test_sac_is_bare_sac() -> None:
    options = {"learning_starts": 50, "batch_size": 32, "buffer_size": 500, "train_freq": 2}
    mine = walked(adapt(sb3.SAC), "Pendulum-v1", 2, 200, options)
    assert difference(mine, bare(sb3.SAC, "Pendulum-v1", 2, 200, options)) == 0.0


def test_the_comparison_can_fail() -> None:
    other = {**PPO_OPTIONS, "clip_range": 0.1}
    mine = walked(adapt(sb3.PPO), "CartPole-v1", 4, 512, other)
    assert difference(mine, bare(sb3.PPO, "CartPole-v1", 4, 512, PPO_OPTIONS)) > 0.0


def test_forgetting_the_truncation_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mutant that treats a truncated episode as a terminated one gives other weights."""
    observe = OnPolicy.observe

    def blind(self: Any, experience: Any) -> None:
        ended = experience.terminated | experience.truncated
        observe(self, type(experience)(**{**vars(experience), "terminated": ended}))

    monkeypatch.setattr(OnPolicy, "observe", blind)
    mine = walked(adapt(sb3.PPO), "CartPole-v1", 4, 1024, PPO_OPTIONS)
    monkeypatch.undo()
    assert difference(mine, bare(sb3.PPO, "CartPole-v1", 4, 1024, PPO_OPTIONS)) > 0.0


@pytest.mark.parametrize(
    ("path", "env"),
    [("stable_baselines3.A2C", "CartPole-v1"), ("stable_baselines3.TD3", "Pendulum-v1"),
     ("stable_baselines3.DDPG", "Pendulum-v1"), ("sb3_contrib.TRPO", "CartPole-v1"),
     ("sb3_contrib.QRDQN", "CartPole-v1"), ("sb3_contrib.TQC", "Pendulum-v1"),
     ("sb3_contrib.CrossQ", "Pendulum-v1")],
)  # fmt: skip
def test_every_supported_algorithm_walks(path: str, env: str) -> None:
    module, _, name = path.rpartition(".")
    algorithm = getattr(__import__(module), name)
    options: dict[str, Any] = {} if name in ("A2C", "TRPO") else {"learning_starts": 20, "buffer_size": 300}
    options |= {"n_steps": 32, "batch_size": 32} if name == "TRPO" else {}
    agent_class = adapt(algorithm)
    assert issubclass(agent_class, OnPolicy if name in ("A2C", "TRPO") else OffPolicy)
    algo = walked(agent_class, env, 2, 128, options)
    assert algo.num_timesteps >= 128 and algo._n_updates > 0


class Mine(sb3.PPO):
    """One's own, which learns as PPO does."""


class Other(sb3.PPO):
    """One's own, which learns in another way."""

    def train(self) -> None:
        super().train()


def test_an_algorithm_of_ones_own_walks() -> None:
    assert issubclass(adapt(Mine), PPO)
    assert issubclass(adapt(Other), OnPolicy) and not issubclass(adapt(Other), PPO), "its loss is not known"
    small = {"n_steps": 32, "batch_size": 32, "n_epochs": 1}
    tasks = [{"env": "CartPole-v1", "steps": 64}]
    settings = {"use": "tests.test_sb3.Other", **small}
    interface = build(env="CartPole-v1", name="one", envs=2).interface
    agent = build_agent(parse(Experiment, {"tasks": tasks, "agent": settings}), interface, "cpu")
    assert isinstance(agent.algo, Other)  # type: ignore[attr-defined]
    assert walked(adapt(Other), "CartPole-v1", 2, 128, small)._n_updates > 0


def visits(agent_class: Any, rules: Rules, **options: Any) -> Any:
    tasks = [build(env="CartPole-v1", name=name, kwargs=CUT, envs=2) for name in ("a", "b")]
    agent = agent_class(join(tasks), 0, "cpu", **options)
    for i, task in enumerate(tasks, start=1):
        visit = Visit(i, task, 256, seed=i, start=256 * (i - 1), total=512, rules=rules)
        agent.enter(visit)
        yield agent, task, visit
        for _ in task.train(agent, visit):
            pass


def test_rules_reset_what_they_name() -> None:
    small = {"n_steps": 32, "batch_size": 32}
    for rules, kept in ((Rules(), True), (Rules(optimizer="reset"), False)):
        agent, *_ = list(visits(PPO, rules, **small))[1]
        walk = visits(PPO, rules, **small)
        next(walk)
        agent, _, _ = next(walk)
        assert bool(agent.optimizers[0].state) is kept
    for rules, size in ((Rules(), 128), (Rules(buffer="reset"), 0)):
        walk = visits(DQN, rules, learning_starts=50, buffer_size=1000)
        next(walk)
        agent, _, _ = next(walk)
        assert agent.algo.replay_buffer.size() == size
    for rules, count in ((Rules(), 256), (Rules(normalizer="reset"), 0)):
        walk = visits(PPO, rules, normalize={"observation": True, "reward": True}, **small)
        next(walk)
        agent, _, _ = next(walk)
        assert agent.normalizer.obs_moments.count == count


def test_schedules_restart_or_continue() -> None:
    for rules, expected in ((Rules(), 1.0), (Rules(schedules="continue"), 0.5)):
        walk = visits(DQN, rules, learning_starts=50, buffer_size=1000, exploration_fraction=1.0)
        next(walk)
        agent, _, _ = next(walk)
        assert agent.algo._current_progress_remaining == expected
        assert agent.algo.exploration_rate == pytest.approx(0.05 + 0.95 * expected)


@pytest.mark.parametrize(("agent_class", "options"), [(PPO, {"n_steps": 32, "batch_size": 32}), (DQN, DQN_OPTIONS)])
def test_heads_per_task(agent_class: Any, options: dict[str, Any]) -> None:
    walk = visits(agent_class, Rules(head="per_task"), **options)
    agent, a, _ = next(walk)
    heads = agent._head_modules()[0]
    before = heads.heads[0].weight.clone()
    agent, _, _ = next(walk)
    after_a = heads.heads[0].weight.clone()
    assert not torch.equal(before, after_a), "the first head learned on the first task"
    fresh = heads.heads[1].weight.clone()
    assert torch.equal(fresh, before), "a new head starts as the first one did"
    for _ in walk:
        pass
    assert torch.equal(heads.heads[0].weight, after_a), "the first head rests while the second task is learned"
    assert not torch.equal(heads.heads[1].weight, fresh), "a new head is known to the optimizer"
    other = build(env="CartPole-v1", name="c", envs=2)
    score = other.evaluate(agent, 0, 2, True)
    assert np.isnan(score.mean) and "no head" in score.reason
    twin = agent_class(agent.interface, 1, "cpu", **options)
    twin.load_state_dict(agent.state_dict())
    assert a.evaluate(twin, 0, 4, True) == a.evaluate(agent, 0, 4, True)
