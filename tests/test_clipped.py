"""The warning where the critic's gradient leaves the actor nothing under one clip."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from agents import clipped
from agents.on_policy import OnPolicy
from agents.ppo import PPO
from crl.cli import main
from crl.core import Rules, Visit
from envs.gym import build, join

SMALL = {"n_steps": 32, "batch_size": 256, "n_epochs": 1, "ent_coef": 0.0}


def learned(env: str, steps: int = 256, **options: Any) -> Any:
    task = build(env=env, name=env, envs=8)
    agent = PPO(join([task]), 0, "cpu", **{**SMALL, **options})
    visit = Visit(1, task, steps, seed=7, total=steps, rules=Rules())
    agent.enter(visit)
    for _ in task.train(agent, visit):
        pass
    return agent


@pytest.mark.parametrize(
    ("env", "options", "warned"),
    [
        ("CartPole-v1", {}, True),
        ("CartPole-v1", {"normalize": {"reward": True}}, False),
        ("CartPole-v1", {"normalize": {"observation": True}}, True),
        ("CartPole-v1", {"max_grad_norm": float("inf")}, False),
        ("Pendulum-v1", {}, True),
        ("FrozenLake-v1", {}, False),  # its rewards are at most 1 an episode
    ],
)
def test_large_rewards_clipped_with_the_actor_are_told(env: str, options: dict[str, Any], warned: bool) -> None:
    remark = learned(env, **options).remark
    assert ("agent.normalize.reward=true" in remark) == warned
    assert len(remark.splitlines()) == warned


@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1"])
def test_both_gradients_are_those_that_sb3_clips(env: str, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[tuple[float, float]] = []
    norms, clip, totals = clipped._norms, torch.nn.utils.clip_grad_norm_, []
    monkeypatch.setattr(clipped, "_norms", lambda algo: said.append(norms(algo)) or said[-1])
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *a, **k: totals.append(float(clip(*a, **k))))
    learned(env)
    learned(env, vf_coef=0.0)  # SB3's gradient is then the actor's alone
    (actor, critic), (alone, _) = said
    assert totals[0] == pytest.approx((actor**2 + critic**2) ** 0.5, rel=1e-4)
    assert totals[1] == pytest.approx(alone, rel=1e-4) == pytest.approx(actor, rel=1e-4)


def test_only_the_first_rollout_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr("agents.on_policy.crowded_out", lambda algo: asked.append(algo) or "")
    assert isinstance(learned("CartPole-v1", steps=1024), OnPolicy) and len(asked) == 1


@pytest.mark.parametrize("normalized", [False, True])
def test_check_and_train_say_it_in_one_line(
    normalized: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("crl.estimate.TRIAL", 1.0)
    agent = {"use": "ppo", **SMALL, "normalize": {"reward": normalized}}
    small = {"tasks": [{"env": "CartPole-v1", "steps": 256}], "engine": {"envs": 8}, "evaluation": {"episodes": 1}}
    Path("c.yaml").write_text(yaml.safe_dump({**small, "agent": agent, "monitors": []}))
    assert main(["check", "c.yaml"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "critic's gradient" in line]
    assert [line[:9] for line in lines] == ([] if normalized else ["warning  "])
    assert main(["train", "--env-seq", "c.yaml"]) == 0
    assert capsys.readouterr().err.count("critic's gradient") == (not normalized)
