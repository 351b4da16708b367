"""What must not matter does not: looking, evaluating and logging leave the learned weights bit for bit alone."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import crl
from crl.named import MONITORS
from tests.marks import quickly

DATA: dict[str, Any] = {
    "name": "walk",
    "tasks": [
        {"env": "CartPole-v1", "steps": 512},
        {"env": "Acrobot-v1", "steps": 512, "kwargs": {"max_episode_steps": 60}},
    ],
    "engine": {"envs": 4},
    "evaluation": {"episodes": 2},
    "monitors": [],
}
SMALL = {"probes": 2, "steps": 6, "samples": 24}
CURVATURE = ("hessian", "ggn")
EVERY = [
    {"use": name, "earlier": True, **(SMALL if name in CURVATURE else {})}
    for name in MONITORS
    if name != "policy_drift"
]
EVERY += ["policy_drift"]
AGENTS: dict[str, dict[str, Any]] = {
    "ppo": {"use": "ppo", "n_steps": 32, "batch_size": 32},
    "dqn": {"use": "dqn", "learning_starts": 50, "buffer_size": 400},
}


class Curious:
    """A monitor that looks at everything, and draws from every random stream while it does."""

    def measure(self, boundary: Any) -> dict[str, Any]:
        seen = boundary.experience()
        others = [task.sample(boundary.agent, 1, 32).reward.mean() for task in boundary.earlier]
        noise = torch.rand(1).item() + np.random.random()
        norm = sum(float(p.detach().square().sum()) for p in boundary.agent.model.parameters())
        return {
            "look/norm": norm,
            "look/obs": seen.obs.mean(0).ravel(),
            "look/noise": noise,
            "look/earlier": len(others),
        }


class Decay:
    """A method: an L2 penalty in the gradient, through torch's own hooks."""

    def __init__(self, strength: float = 1e-2) -> None:
        self.strength, self.visits = strength, 0

    def attach(self, agent: Any) -> None:
        for parameter in agent.model.parameters():
            parameter.register_post_accumulate_grad_hook(self.pull)

    def pull(self, parameter: Any) -> None:
        parameter.grad.add_(parameter.detach(), alpha=self.strength)

    def enter(self, visit: Any) -> None:
        self.visits += 1

    def leave(self, visit: Any) -> None: ...

    def state_dict(self) -> dict[str, Any]:
        return {"visits": self.visits}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.visits = state["visits"]


def weights(out: Path, agent: str, **settings: Any) -> dict[str, torch.Tensor]:
    run = crl.train({**DATA, "agent": AGENTS[agent]}, out=out, overwrite=True, **settings)
    return {name: value.clone() for name, value in run.agent.model.state_dict().items()}  # type: ignore[attr-defined]


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("agent", quickly(AGENTS, lambda agent: agent == "ppo"))
@pytest.mark.parametrize(
    "settings",
    [
        {"monitors": ["tests.test_properties.Curious"]},
        {"monitors": EVERY},
        {"evaluation": {"episodes": 5, "every": 256, "greedy": True}},
    ],
    ids=["curious", "every monitor", "evaluation"],
)
def test_looking_changes_nothing(tmp_path: Path, agent: str, settings: dict[str, Any]) -> None:
    assert equal(weights(tmp_path / "plain", agent), weights(tmp_path / "seen", agent, **settings))


def test_a_monitor_writes_at_both_phases(tmp_path: Path) -> None:
    run = crl.train({**DATA, "agent": AGENTS["ppo"], "monitors": ["tests.test_properties.Curious"]}, out=tmp_path)
    found = [(r.visit, r.phase, r.value) for r in run.records if r.name == "Curious/look/earlier"]
    assert found == [(1, "init", 0.0), (1, "end", 0.0), (2, "init", 1.0), (2, "end", 1.0)]
    assert any(isinstance(r.value, list) for r in run.records if r.name == "Curious/look/obs")
    assert any(r.name == "time/monitor/Curious" for r in run.records), "its cost is on record"


@pytest.mark.parametrize("agent", AGENTS)
def test_a_method_acts_inside_sb3(tmp_path: Path, agent: str) -> None:
    plain = weights(tmp_path / "plain", agent)
    method = "tests.test_properties.Decay"
    assert equal(plain, weights(tmp_path / "zero", agent, methods=[{"use": method, "strength": 0.0}]))
    assert not equal(plain, weights(tmp_path / "some", agent, methods=[{"use": method}]))
    assert (tmp_path / "some" / "walk" / f"{agent}+Decay" / "seed-0" / "matrix.csv").is_file()
