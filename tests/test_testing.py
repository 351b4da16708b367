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
from crl.core import Visit
from crl.optional import check_optional
from crl.testing import check_agent, check_method, check_monitor, check_task
from envs.gym import build, join
from tests.full_agent import FullAgent
from tests.my_agent import MyAgent
from tests.recurrent_agent import RecurrentAgent
from tests.test_properties import Curious, Decay

SMALL_PPO = {"n_steps": 16, "batch_size": 64, "n_epochs": 1}
SMALL_DQN = {"learning_starts": 64, "train_freq": 8, "buffer_size": 500}


@pytest.mark.parametrize(
    ("cls", "options"), [(MyAgent, {}), (FullAgent, {}), (RecurrentAgent, {}), (PPO, SMALL_PPO), (DQN, SMALL_DQN)]
)
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


class Chancy(MyAgent):
    """It asks chance even where it is to do its best."""

    def act(self, obs: Any, carry: Any, greedy: bool) -> Any:
        return super().act(obs, carry, False)


class Lacking:
    def __init__(self, interface: Any, seed: int, device: str) -> None: ...

    def act(self, obs: Any, carry: Any, greedy: bool) -> Any: ...


class Blots(MyAgent):
    """act() changes the observations that it is shown"""

    def act(self, obs: Any, carry: Any, greedy: bool) -> Any:
        found = super().act(obs, carry, greedy)
        obs[:] = 0
        return found


class Column(MyAgent):
    """for 16 observations: it must be an array of one action of Discrete(3) for each"""

    def act(self, obs: Any, carry: Any, greedy: bool) -> Any:
        return super().act(obs, carry, greedy)[0][:, None], None, None


class Imaginary(MyAgent):
    """update() returns 1j for 'losses/loss': it must be a finite number under a name"""

    def update(self) -> Any:
        return {"losses/loss": 1j}


class Stateless(MyAgent):
    """state_dict() returns None: it must be a dictionary"""

    def state_dict(self) -> Any:
        return None


class Endless(MyAgent):
    """state_dict() returns something that holds itself"""

    def state_dict(self) -> Any:
        state = super().state_dict()
        state["self"] = [state]
        return state


@pytest.mark.parametrize("cls", [Blots, Column, Imaginary, Stateless, Endless])
def test_wrong_answers_are_named(cls: Any) -> None:
    with pytest.raises(AssertionError) as error:
        check_agent(cls)
    assert cls.__doc__ in str(error.value) and len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("cls", [NoOptimizer, Talker, Learner, OutOfRange, Arrays, Chancy, Lacking])
def test_mutants_are_caught(cls: Any) -> None:
    with pytest.raises(AssertionError) as error:
        check_agent(cls)
    assert len(str(error.value).splitlines()) == 1 and len(str(error.value)) > 30, "one sentence"


class Summed(FullAgent):
    """a mean"""

    def objective(self, outputs: Any, batch: Any) -> Any:
        return super().objective(outputs, batch) * len(outputs)


class Flat(FullAgent):
    """a row for each"""

    def outputs(self, batch: Any) -> Any:
        return super().outputs(batch).flatten()


class Cut(FullAgent):
    """without a graph"""

    def outputs(self, batch: Any) -> Any:
        return super().outputs(batch).detach()


class Dropping(FullAgent):
    """must be pure"""

    def outputs(self, batch: Any) -> Any:
        return torch.nn.functional.dropout(super().outputs(batch))


class Unnamed(FullAgent):
    """lacks 'obs'"""

    def prepare(self, experience: Any) -> Any:
        return {"state": super().prepare(experience)["obs"]}


class Moving(FullAgent):
    """tensor that is constant"""

    def prepare(self, experience: Any) -> Any:
        batch = super().prepare(experience)
        return {**batch, "gain": self.model(batch["obs"])[:, 0]}


class Foreign(FullAgent):
    """no such parameter"""

    networks: Any = {"actor": ["policy.weight"]}  # noqa: RUF012


class Hungry(FullAgent):
    """outputs fails with KeyError: 'first'"""

    def outputs(self, batch: Any) -> Any:
        return super().outputs(batch) * batch["first"]


class Half(FullAgent):
    """lacks outputs, objective"""

    outputs: Any = property()
    objective: Any = property()


MUTANTS = [Summed, Flat, Cut, Dropping, Unnamed, Moving, Foreign, Hungry, Half]


@pytest.mark.parametrize("cls", MUTANTS)
def test_optional_parts_are_asked_too(cls: Any) -> None:
    """An agent that only acts and learns does not need them; one that offers them, offers what monitors can use."""
    task = build(env="CartPole-v1", name="pole", envs=4)
    join([task])
    agents = [kind(task.interface, 0, "cpu") for kind in (FullAgent, cls)]
    seen = task.sample(agents[0], 7, 64)
    for agent in agents:
        agent.enter(Visit(1, task, 64, 0))
        agent.minibatch = FullAgent.prepare(agent, seen)
    check_optional(agents[0], seen)
    with pytest.raises(AssertionError) as error:
        check_optional(agents[1], seen)
    assert cls.__doc__ in str(error.value) and len(str(error.value).splitlines()) == 1


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
