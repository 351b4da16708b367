"""Engines: processes give the same bits as one; EnvPool is the same tasks, and its late reset is never learned from."""

import importlib.util
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from agents.dqn import DQN
from agents.ppo import PPO
from crl import run
from crl.core import Array, CrlError, Visit
from crl.failing import Failed
from envs.engines import Engine
from envs.gym import GymTask, build, join
from envs.pool import Pool

absent = importlib.util.find_spec("envpool") is None
needs_envpool = pytest.mark.skipif(absent, reason="EnvPool, the extra `fast`, is absent")
WALK = {
    "tasks": [
        {"env": "CartPole-v1", "steps": 128, "change": {"gravity": [9.8, 20.0]}},
    ],
    "agent": {"use": "ppo", "n_steps": 16, "batch_size": 32, "n_epochs": 1, "net": {"hidden": [8]}},
    "monitors": [],
    "evaluation": {"episodes": 1},
}


def weights(path: Path) -> list[torch.Tensor]:
    state = torch.load(path, weights_only=True)["agent"]["modules"]["policy"]
    return [state[name] for name in sorted(state)]


def test_processes_walk_as_one(tmp_path: Path) -> None:
    runs = [
        run.train({**WALK, "engine": {"kind": kind, "envs": 4, "threads": 2}}, out=tmp_path / kind)
        for kind in ("sync", "async")
    ]
    ends = [weights(sorted((done.path / "checkpoints").glob("*.pt"))[-1]) for done in runs]
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
    assert np.array_equal(runs[0].matrix, runs[1].matrix)


def test_a_worker_goes_on_where_it_was_and_says_what_failed() -> None:
    task = build(env="CartPole-v1", name="c", envs=3, engine="async", threads=1, setting={"gravity": 9.8})
    engines: list[Any] = [task._training(5), task._training(5)]
    try:
        engines[0].reset()
        for _ in range(7):
            engines[0].step(np.array([0, 1, 0]))
        engines[0].change("gravity", 15.0)
        engines[0].step(np.array([1, 1, 0]))
        engines[1].load_state_dict(engines[0].state_dict())
        assert np.array_equal(engines[0].obs, engines[1].obs)
        after = [engine.step(np.array([1, 0, 1])).obs for engine in engines]
        assert np.array_equal(*after)
        with pytest.raises(Failed, match="environment CartPoleEnv failed: AssertionError") as caught:
            engines[0].step(np.array([1, 0, 9]))
        assert "Traceback (most recent call last)" in caught.value.trace, "the worker's own"
        os.kill(engines[0].processes[0].pid, signal.SIGKILL)
        with pytest.raises(Failed, match=r"engine: worker 1 of 1 was killed by SIGKILL; .* want of memory"):
            engines[0].step(np.array([1, 0, 1]))
    finally:
        for engine in engines:
            engine.close()


# EnvPool.


def pooled(env: str, envs: int = 16, **options: Any) -> GymTask:
    task = build(env=env, name=env, envs=envs, engine="envpool", threads=1, **options)
    join([task])
    return task


def returns(engine: Engine, policy: Any, episodes: int) -> tuple[Array, Array, set[tuple[int, ...]]]:
    """(return and length of the first episodes of each copy, in equal numbers; the cells that were seen)."""
    generator, obs = np.random.default_rng(1), engine.reset()
    total, length = np.zeros(engine.copies), np.zeros(engine.copies, dtype=int)
    found: list[list[tuple[float, int]]] = [[] for _ in range(engine.copies)]
    cells: set[tuple[int, ...]] = set()
    while min(map(len, found)) < episodes // engine.copies:
        step = engine.step(policy(generator, obs))
        total += step.reward
        length += 1
        for copy in np.flatnonzero(step.terminated | step.truncated):
            found[copy].append((total[copy], length[copy]))
            total[copy], length[copy] = 0, 0
        cells |= {tuple(cell) for cell in obs[0, : obs.shape[1] // 3 * 3].reshape(-1, 3).tolist()}
        obs = step.obs
    rows = np.array([pair for own in found for pair in own[: episodes // engine.copies]])
    return rows[:, 0], rows[:, 1], cells


@needs_envpool
@pytest.mark.parametrize("env", ["Empty-Random-5x5", "Dynamic-Obstacles-5x5", "LavaGapS5"])
def test_minigrid_is_the_same_in_c(env: str) -> None:
    env = f"MiniGrid-{env}-v0"

    def policy(generator: Any, obs: Array) -> Array:
        return generator.choice(3, len(obs), p=[0.2, 0.2, 0.6])

    task, python = pooled(env), build(env=env, name=env, envs=16)
    assert task.interface.observation == python.interface.observation
    (ours, long, seen), (theirs, lengths, cells) = (returns(t._copies(16, 3), policy, 384) for t in (task, python))
    assert seen == cells
    limit = python.make.alone().unwrapped.max_steps  # type: ignore[attr-defined]
    for values, steps in ((ours, long), (theirs, lengths)):
        won = values > 0
        assert np.allclose(values[won], 1 - 0.9 * steps[won] / limit)  # MiniGrid's reward
        assert set(values[~won]) <= {0.0, -1.0} and max(steps) <= limit
    for a, b in ((ours, theirs), (long, lengths)):
        spread = np.sqrt(a.var() / len(a) + b.var() / len(b))
        assert abs(a.mean() - b.mean()) < 4 * spread  # wrong once in 16,000 tries


@needs_envpool
def test_a_layout_that_never_changes_is_the_same_step_for_step() -> None:
    task, python = pooled("MiniGrid-Empty-5x5-v0", 2), build(env="MiniGrid-Empty-5x5-v0", name="e", envs=2)
    engines = [task._copies(2, 0), python._copies(2, 0)]
    assert np.array_equal(*[engine.reset() for engine in engines])
    for action in [2, 0, 1, 2, 1, 2, 6, 2, 2, 0]:
        a, b = (engine.step(np.full(2, action)) for engine in engines)
        for one, other in zip(a, b, strict=True):
            assert np.array_equal(one, other)
    assert a.obs.dtype == b.obs.dtype == np.uint8


@needs_envpool
def test_sequences_are_joined_in_c_as_in_python() -> None:
    for names in (["MiniGrid-Empty-5x5-v0", "MiniGrid-Dynamic-Obstacles-5x5-v0"], ["CartPole-v1", "Acrobot-v1"]):
        ours = [build(env=name, name=name, envs=2, engine="envpool") for name in names]
        theirs = [build(env=name, name=name, envs=2) for name in names]
        assert join(ours) == join(theirs)
        for a, b in zip(ours, theirs, strict=True):
            left, right = (task._copies(2, 0).reset() for task in (a, b))
            assert left.shape == right.shape and left.dtype == right.dtype
            assert a.interface.observation == b.interface.observation
            masks = [np.isin(rows, (0, 1)) for rows in (left, right)]
            if "CartPole-v1" in names:
                assert np.array_equal(masks[0][:, 6:], masks[1][:, 6:])


@needs_envpool
@pytest.mark.parametrize(
    ("env", "kwargs", "limit"),
    [
        ("MiniGrid-Empty-5x5-v0", {"max_episode_steps": 20}, 20),
        ("MiniGrid-Empty-5x5-v0", {"max_steps": 30}, 30),
        ("MiniGrid-Empty-5x5-v0", {"size": 6}, 144),
        ("CartPole-v1", {"max_episode_steps": 7}, 7),
        ("MountainCar-v0", {"max_episode_steps": -1}, 10**9),  # none
    ],
)
def test_an_episode_is_as_long_as_in_python(env: str, kwargs: dict[str, int], limit: int) -> None:
    for engine in (pooled(env, 1, kwargs=kwargs)._copies(1, 0), build(env=env, name="p", kwargs=kwargs)._copies(1, 0)):
        engine.reset()
        ends = [engine.step(np.zeros(1, dtype=int)) for _ in range(min(limit, 300))]
        cut = [i for i, step in enumerate(ends, start=1) if step.truncated.any()]
        assert cut == ([limit] if limit <= 300 else [])


def learn(agent: Any, task: GymTask, steps: int) -> None:
    visit = Visit(1, task, steps, seed=2, total=steps)
    agent.enter(visit)
    for _ in task.train(agent, visit):
        pass


class Late(Pool):
    """The mutant: episodes begin when EnvPool begins them, a step late."""

    def step(self, actions: Array) -> Any:
        reset, self.pool.reset = self.pool.reset, lambda ended: (self.pool_obs[ended], {})
        forward = self.pool.step

        def remember(played: Array) -> Any:
            found = forward(played)
            self.pool_obs = found[0]
            return found

        self.pool.step = remember
        try:
            return super().step(actions)
        finally:
            self.pool.reset, self.pool.step = reset, forward


@needs_envpool
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("kind", ["ppo", "dqn"])
def test_no_false_step_is_learned_from(kind: str, late: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if late:
        monkeypatch.setattr("envs.gym.Pool", Late)
    task = pooled("CartPole-v1", 8, kwargs={"max_episode_steps": 30})
    rows: dict[str, Array]
    if kind == "ppo":
        agent: Any = PPO(task.shared, 0, "cpu", n_steps=128, batch_size=64, n_epochs=1)  # type: ignore[arg-type]
        monkeypatch.setattr(agent, "update", dict)  # the rollout stays to be looked at
        learn(agent, task, 128 * 8)
        buffer = agent.algo.rollout_buffer
        rows = {"reward": buffer.rewards, "obs": buffer.observations, "starts": buffer.episode_starts}
        begin = rows["obs"][rows["starts"].astype(bool)]
    else:
        agent = DQN(task.shared, 0, "cpu", learning_starts=10**6, buffer_size=1024)  # type: ignore[arg-type]
        learn(agent, task, 128 * 8)
        memory = agent.algo.replay_buffer
        rows = {"reward": memory.rewards, "obs": memory.observations, "next": memory.next_observations}
        begin = rows["obs"][1:][memory.dones[:-1].astype(bool)]
        going = ~memory.dones[:-1].astype(bool)
        assert np.array_equal(rows["next"][:-1][going], rows["obs"][1:][going])
    real = bool((rows["reward"] > 0.5).all())  # a step pays 1, and a little else where a cut episode is continued
    fresh = bool((np.abs(begin) <= 0.05).all())  # where CartPole's episodes begin
    assert len(begin) > 20
    assert (real and fresh) is not late


@needs_envpool
def test_a_pool_comes_back_to_the_middle_of_a_visit(tmp_path: Path) -> None:
    data = {
        **WALK,
        "tasks": [{"env": "MiniGrid-Empty-Random-5x5-v0", "steps": 128}],
        "engine": {"kind": "envpool", "envs": 4, "threads": 1},
        "checkpoint": {"every": 64},
    }
    whole = run.train(data, out=tmp_path / "whole")
    engines = [pooled("MiniGrid-DoorKey-5x5-v0", 4)._training(3) for _ in range(2)]
    engines[0].reset()
    generator = np.random.default_rng(0)
    for _ in range(300):
        engines[0].step(generator.integers(0, 7, 4))
    engines[1].load_state_dict(engines[0].state_dict())
    assert np.array_equal(engines[0].obs, engines[1].obs)
    actions = generator.integers(0, 7, (300, 4))
    for row in actions:
        a, b = (engine.step(row) for engine in engines)
        assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))
    assert whole.manifest["engine"].startswith("envpool ")


MISTAKES = {
    "engine: envpool has no Taxi-v4": {"env": "Taxi-v4"},
    "engine: envpool cannot change gravity while the environment goes on": {
        "env": "CartPole-v1",
        "setting": {"gravity": 20.0},
    },
    "engine: envpool steps without wrappers, and sign_reward is asked for": {
        "env": "CartPole-v1",
        "wrappers": [("sign_reward", {})],
    },
    "engine: envpool's CartPole-v1 takes no 'sutton_barto_reward'": {
        "env": "CartPole-v1",
        "kwargs": {"sutton_barto_reward": True},
    },
}


@needs_envpool
@pytest.mark.parametrize("line", MISTAKES)
def test_what_envpool_lacks_is_refused(line: str) -> None:
    with pytest.raises(CrlError) as caught:
        build(**{"name": "x", "envs": 2, **MISTAKES[line]}, engine="envpool")
    assert str(caught.value) == f"{line}; use engine: sync"


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "envpool", None)
    with pytest.raises(CrlError) as caught:
        build(env="CartPole-v1", name="x", engine="envpool")
    assert str(caught.value) == "engine: envpool needs an extra: pip install envpool"
