"""The conformance kit passes what keeps the contracts and names what does not; the README's agent runs and learns."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import crl
from agents.dqn import DQN
from agents.ppo import PPO
from crl.cli import main
from crl.testing import check_agent, check_method, check_monitor, check_task
from envs.gym import build, join
from tests.my_agent import MyAgent
from tests.recurrent_agent import RecurrentAgent
from tests.test_properties import Curious, Decay

SMALL_PPO = {"n_steps": 16, "batch_size": 64, "n_epochs": 1}
SMALL_DQN = {"learning_starts": 64, "train_freq": 8, "buffer_size": 500}


@pytest.mark.parametrize(("cls", "options"), [(MyAgent, {}), (RecurrentAgent, {}), (PPO, SMALL_PPO), (DQN, SMALL_DQN)])
def test_good_agents_pass(cls: Any, options: dict[str, Any]) -> None:
    check_agent(cls, **options)


def test_good_parts_pass() -> None:
    task = build(env="CartPole-v1", name="pole", envs=4)
    join([task])
    check_task(task)
    check_monitor(Curious())
    check_method(Decay())


class NoOptimizer(MyAgent):
    """Its checkpoint lacks what the next update depends on."""

    def state_dict(self) -> Any:
        return {**super().state_dict(), "optimizer": None}

    def load_state_dict(self, state: Any) -> None:
        self.model.load_state_dict(state["model"])


class Talker(MyAgent):
    def update(self) -> Any:
        return {"losses/loss": "small"}


class Learner(MyAgent):
    """It moves its weights whenever it acts, evaluation included."""

    def act(self, obs: Any, carry: Any, greedy: bool) -> Any:
        with torch.no_grad():
            next(iter(self.model.parameters())).add_(1e-3)
        return super().act(obs, carry, greedy)


class OutOfRange(MyAgent):
    def act(self, obs: Any, carry: Any, greedy: bool) -> Any:
        return np.full(len(obs), 99), None, None


class Arrays(MyAgent):
    """A checkpoint of numpy arrays needs pickled code to load."""

    def state_dict(self) -> Any:
        return {**super().state_dict(), "extra": np.zeros(2)}


class Lacking:
    def __init__(self, interface: Any, seed: int, device: str) -> None: ...

    def act(self, obs: Any, carry: Any, greedy: bool) -> Any: ...


@pytest.mark.parametrize("cls", [NoOptimizer, Talker, Learner, OutOfRange, Arrays, Lacking])
def test_mutants_are_caught(cls: Any) -> None:
    with pytest.raises(AssertionError) as error:
        check_agent(cls)
    assert len(str(error.value).splitlines()) == 1 and len(str(error.value)) > 30, "one sentence"


class Meddler:
    """A monitor that moves a weight."""

    def measure(self, boundary: Any) -> dict[str, float]:
        with torch.no_grad():
            next(iter(boundary.agent.model.parameters())).add_(1.0)
        return {"x": 1.0}


class Forgetful(Decay):
    def state_dict(self) -> Any:
        return {"visits": object()}


def test_bad_parts_are_caught() -> None:
    with pytest.raises(AssertionError):
        check_monitor(Meddler())
    with pytest.raises(AssertionError):
        check_method(Forgetful())


def test_the_readmes_agent_is_small_and_learns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file beside the user, by import path, from the command line."""
    source = Path(__file__).with_name("my_agent.py")
    assert len(source.read_text().splitlines()) < 40
    shutil.copy(source, tmp_path / "own_agent.py")
    (tmp_path / "pole.yaml").write_text("tasks: [{env: CartPole-v1, steps: 50_000}]\nevaluation: {episodes: 20}\n")
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--env-seq", "pole.yaml", "--agent", "own_agent.MyAgent", "-q"]) == 0
    run = crl.load("runs/pole/MyAgent/seed-0")
    assert type(run.agent).__name__ == "MyAgent"
    assert run.matrix[1, 0] > 3 * run.matrix[0, 0] > 0
