"""What is reported is the environment's own reward, whatever is learned from; unless it is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest

import crl
from crl import build, config
from crl.core import CrlError, Visit

SCALE = {"use": "scale_reward", "by": 0.05}
SIGN = {"use": "sign_reward"}


class Shaped(gymnasium.Wrapper[Any, Any, Any, Any]):
    """A shaping wrapper of one's own: it does not tell by its class that it is for rewards."""

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        obs, _, terminated, truncated, info = self.env.step(action)
        return obs, 7.0, terminated, truncated, info


class Halved(gymnasium.RewardWrapper[Any, Any]):
    def reward(self, reward: Any) -> float:
        return float(reward) / 2


class Right:
    """Steps to alternate sides, and remembers the rewards that it is to learn from."""

    def __init__(self) -> None:
        self.rewards: list[float] = []

    def act(self, obs: Any, carry: Any, greedy: bool) -> tuple[Any, Any, Any]:
        return (obs[:, 2] > 0).astype(np.int64), carry, None

    def observe(self, experience: Any) -> None:
        self.rewards += experience.reward.tolist()

    def update(self) -> dict[str, float]:
        return {}


def task_of(*wrappers: Any, engine: str = "sync") -> Any:
    spec = {"env": "CartPole-v1", "steps": 64, "wrappers": list(wrappers)}
    kind = {"kind": engine, "envs": 2, "threads": 1}
    return build.build_tasks(config.read({"tasks": [spec], "engine": kind}))[0][0]


CASES: list[tuple[list[Any], float, float]] = [
    ([], 1.0, 1.0),
    ([SCALE], 0.05, 1.0),
    ([SIGN], -1.0, 1.0),
    ([{**SCALE, "evaluate": True}], 0.05, 0.05),
    ([{**SIGN, "evaluate": True}, SCALE], -0.05, -1.0),
    ([{"use": "tests.test_rewards.Halved"}, SCALE], 0.025, 1.0),
    ([SCALE, {"use": "shift_observation", "by": 0.0}], 0.05, 1.0),
    ([{"use": "tests.test_rewards.Shaped"}], 7.0, 7.0),
    ([{"use": "tests.test_rewards.Shaped", "evaluate": False}], 7.0, 1.0),
]


@pytest.mark.parametrize(("wrappers", "learned", "told"), CASES)
def test_rewards_are_learned_from_and_reported(wrappers: list[Any], learned: float, told: float) -> None:
    task, agent = task_of(*wrappers), Right()
    score = task.evaluate(agent, 0, 3, True)
    assert np.array(score.returns) == pytest.approx(told * np.array(score.lengths), rel=1e-6)
    sampled = task.sample(agent, 0, 8)
    assert sampled.reward == pytest.approx(learned), "what monitors see is what is learned from"
    ticks = list(task.train(agent, Visit(1, task, 200, seed=0, total=200)))
    assert agent.rewards == pytest.approx([learned] * len(agent.rewards))
    numbers = next(tick.numbers for tick in reversed(ticks) if "train/return" in tick.numbers)
    assert numbers["train/return"] == pytest.approx(told * numbers["train/length"], rel=1e-5)


def test_workers_report_the_same() -> None:
    found = []
    for engine in ("sync", "async"):
        task, agent = task_of(SCALE, engine=engine), Right()
        ticks = list(task.train(agent, Visit(1, task, 200, seed=0, total=200)))
        found.append(([dict(tick.numbers) for tick in ticks if "train/return" in tick.numbers], agent.rewards))
    assert found[0] == found[1] and found[0][0][0]["train/return"] > 1


def test_the_matrix_is_the_environments(tmp_path: Path) -> None:
    """An episode that would be 20.0 if it were scaled is 400, as its length says."""
    data = {"tasks": [{"env": "CartPole-v1", "steps": 32, "wrappers": [SCALE]}], "monitors": [], "engine": {"envs": 2}}
    run = crl.train({**data, "agent": {"n_steps": 16, "batch_size": 16}, "evaluation": {"episodes": 2}}, out=tmp_path)
    lengths = [r.value for r in run.records if r.name == "eval/length"]
    assert run.matrix[:, 0] == pytest.approx(lengths)


def test_what_cannot_be_told_apart_is_refused() -> None:
    with pytest.raises(CrlError, match="sign_reward with evaluate: true must come before"):
        task_of(SCALE, {**SIGN, "evaluate": True})
    with pytest.raises(CrlError, match="evaluate: 3 is not true or false"):
        task_of({**SCALE, "evaluate": 3})
