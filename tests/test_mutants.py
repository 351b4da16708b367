"""Mutants: each property that the conformance kit checks has something that lacks it, and is caught for it."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from crl.core import Score, Visit, aside
from crl.testing import check_agent, check_method, check_monitor, check_task
from envs.gym import GymTask, build, join
from tests.marks import SLOW
from tests.my_agent import MyAgent


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class ForgetsOptimizer(MyAgent):
    def state_dict(self) -> Any:
        return {"model": self.model.state_dict()}

    def load_state_dict(self, state: Any) -> None:
        self.model.load_state_dict(state["model"])


class Unseeded(MyAgent):
    def __init__(self, interface: Any, seed: int, device: str) -> None:
        super().__init__(interface, torch.seed() % 1000, device)


class OwnStream(MyAgent):
    """Draws from a generator that evaluation moves on, and that no checkpoint holds."""

    def __init__(self, interface: Any, seed: int, device: str) -> None:
        super().__init__(interface, seed, device)
        self.stream = np.random.default_rng(seed)

    def act(self, obs: Any, carry: Any, greedy: bool) -> Any:
        actions, carry, note = super().act(obs, carry, greedy)
        return np.where(self.stream.random(len(obs)) < 0.1, 0, actions), carry, note


class KeptStream(OwnStream):
    """The same, but kept in the checkpoint."""

    def state_dict(self) -> Any:
        return {**super().state_dict(), "stream": self.stream.bit_generator.state}

    def load_state_dict(self, state: Any) -> None:
        super().load_state_dict(state)
        self.stream.bit_generator.state = state["stream"]


class HiddenTrace(MyAgent):
    """Remembers how often it was asked, and learns differently for it: no checkpoint shows it."""

    asked = 0

    def act(self, obs: Any, carry: Any, greedy: bool) -> Any:
        self.asked += greedy
        return super().act(obs, carry, greedy)

    def update(self) -> Any:
        self.optimizer.param_groups[0]["lr"] = 1e-3 if self.asked else 5e-3
        return super().update()


class Talks(MyAgent):
    def update(self) -> Any:
        super().update()
        return {"losses/loss": "small"}


class Diverges(MyAgent):
    def update(self) -> Any:
        return {"losses/loss": float("nan")}


class Scalar(MyAgent):
    def act(self, obs: Any, carry: Any, greedy: bool) -> Any:
        return super().act(obs, carry, greedy)[0][:1], None, None


class Outside(MyAgent):
    def act(self, obs: Any, carry: Any, greedy: bool) -> Any:
        return super().act(obs, carry, greedy)[0] + 3 * greedy, None, None


class Idle(MyAgent):
    def update(self) -> Any:
        return {}


class SavesNumpy(MyAgent):
    def state_dict(self) -> Any:
        return {**super().state_dict(), "extra": np.zeros(3)}


class SavesItself(MyAgent):
    def state_dict(self) -> Any:
        return {"self": self}


class NoSeed(MyAgent):
    def __init__(self, interface: Any) -> None:
        super().__init__(interface, 0, "cpu")


class Short:
    def act(self) -> None: ...


@pytest.mark.parametrize(
    ("cls", "message"),
    [
        (ForgetsOptimizer, "a resumed agent differs .*optimizer"),
        (Unseeded, "two agents of one seed differ in model"),
        (OwnStream, "a resumed agent differs"),
        (KeptStream, "evaluation changes agent.stream"),
        (HiddenTrace, "an agent that was evaluated goes on differently"),
        (Talks, "returns 'small' for 'losses/loss': it must be a finite number"),
        (Diverges, "returns nan for 'losses/loss': it must be a finite number"),
        (Scalar, "for 16 observations: it must be an array of one action"),
        (Outside, r"act\(greedy=True\)"),
        (Idle, "nothing was learned"),
        (SavesNumpy, "tensors and plain values only"),
        (SavesItself, "tensors and plain values only"),
        (NoSeed, r"is built as NoSeed\(interface, seed, device"),
        (Short, "lacks observe, update, state_dict, load_state_dict"),
    ],
)
@SLOW
def test_an_agent_that_does_not_is_caught(cls: Any, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_agent(cls)


class Norm:
    def measure(self, boundary: Any) -> Any:
        with aside(boundary.seed):
            rows = boundary.experience().obs.reshape(-1, 4)
            noise = torch.randn(4)
        names = [task.name for task in boundary.earlier]
        return {"norm": np.abs(rows).mean(0), "noise": float(noise[0]), "earlier": len(names), "undefined": np.nan}


class Nudges(Norm):
    def measure(self, boundary: Any) -> Any:
        with torch.no_grad():
            next(boundary.agent.model.parameters()).add_(1e-6)
        return super().measure(boundary)


class ZeroesGradients(Norm):
    def measure(self, boundary: Any) -> Any:
        boundary.agent.model.zero_grad()
        return super().measure(boundary)


class LeavesTrainingMode(Norm):
    def measure(self, boundary: Any) -> Any:
        found = super().measure(boundary)
        boundary.agent.model.train()
        return found


class Words(Norm):
    def measure(self, boundary: Any) -> Any:
        return {"verdict": "fine"}


def test_a_monitor_keeps_the_contract() -> None:
    check_monitor(Norm())


@pytest.mark.parametrize(
    ("monitor", "message"),
    [
        (Nudges(), r"changes agent\.modules"),
        (ZeroesGradients(), "changes gradients"),
        (LeavesTrainingMode(), "changes modes"),
        (Words(), "must be a number, an array"),
    ],
)
def test_a_monitor_that_does_not_is_caught(monitor: Any, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_monitor(monitor)


class Anchor:
    """Pulls the first weights towards where they were when the visit began, by a hook on the gradient."""

    def attach(self, agent: Any) -> None:
        self.parameter = next(agent.model.parameters())
        self.start = torch.zeros_like(self.parameter)
        self.parameter.register_hook(lambda grad: grad + 0.1 * (self.parameter.detach() - self.start))

    def enter(self, visit: Visit) -> None:
        self.start = self.parameter.detach().clone()

    def leave(self, visit: Visit) -> None:
        return

    def state_dict(self) -> Any:
        return {"start": self.start}

    def load_state_dict(self, state: Any) -> None:
        self.start = state["start"]


class Forgetful(Anchor):
    def load_state_dict(self, state: Any) -> None:
        return


def test_a_method_keeps_the_contract() -> None:
    check_method(Anchor())


def test_a_method_that_forgets_is_caught() -> None:
    with pytest.raises(AssertionError, match="a resumed run differs"):
        check_method(Forgetful())


def task(cls: Any = GymTask) -> Any:
    made = cls(env="CartPole-v1", name="cart", envs=4)
    join([made])
    return made


class Restarts(GymTask):
    def load_state_dict(self, state: Any) -> None:
        if state:
            super().load_state_dict(state)
            assert self.world.engine is not None
            self.world.engine.reset()


class Unrepeatable(GymTask):
    def evaluate(self, agent: Any, seed: int, episodes: int, greedy: bool) -> Score:
        return super().evaluate(agent, int(torch.seed() % 2**31), episodes, greedy)


class Teaches(GymTask):
    def sample(self, agent: Any, seed: int, size: int) -> Any:
        found = super().sample(agent, seed, size)
        agent.observe(dataclasses.replace(found, obs=found.obs[0]))
        return found


class SameSample(GymTask):
    def sample(self, agent: Any, seed: int, size: int) -> Any:
        return super().sample(agent, 1, size)


class Miscounts(GymTask):
    def train(self, agent: Any, visit: Any) -> Any:
        for tick in super().train(agent, visit):
            yield dataclasses.replace(tick, steps=tick.steps - 1)


def test_a_task_keeps_the_contract() -> None:
    check_task(task())
    check_task(build(env="MiniGrid-Empty-5x5-v0", name="empty", envs=4))


@pytest.mark.parametrize(
    ("cls", "message"),
    [
        (Restarts, "a resumed visit differs"),
        (Unrepeatable, "changes random|two scores"),
        (Teaches, "changes agent.steps"),
        (SameSample, "the same for two seeds"),
        (Miscounts, "a tick tells of"),
    ],
)
def test_a_task_that_does_not_is_caught(cls: Any, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_task(task(cls))
