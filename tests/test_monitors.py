"""Each monitor measures what it says, on weights made by hand and on real agents, and where there is nothing to see."""

import copy
import itertools
import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, relu

import crl
from agents.dqn import DQN
from agents.optimizers import Trac
from agents.ppo import PPO
from crl.boundary import look
from crl.build import build_monitors
from crl.cli import main
from crl.config import BY_DEFAULT, read
from crl.core import Boundary, CrlError, Experience, Visit
from crl.hidden import networks
from crl.linalg import (
    CurvatureError,
    Effort,
    Estimate,
    Hessian,
    Problem,
    Spectrum,
    effective_rank,
    hessian_spectrum,
    spectrum,
)
from crl.linalg.memory import needed
from crl.monitors import curvature
from crl.monitors.drift import Churn, Drift, PolicyDrift, cka
from crl.monitors.features import Capacity, Dormant, ERank, Interference, features, subspace, used
from crl.monitors.gradients import Conflict, GradientNorm, Readiness, SamplePlasticity
from crl.monitors.look import View
from crl.monitors.weights import Norms, WeightRank
from crl.named import MONITORS
from crl.opened import Run
from crl.pictures import SMALL as OFF_ZERO
from crl.store import RunFolder
from crl.testing import _small, _Trial, check_monitor
from crl.walk import Walk
from envs.gym import build, join
from tests.my_agent import MyAgent
from tests.my_monitor import Silence

ROOT = Path(__file__).resolve().parent.parent
POLE = {"env": "CartPole-v1", "steps": 128}
HEAVY = {"env": "CartPole-v1", "steps": 128, "name": "heavy", "kwargs": {"max_episode_steps": 20}}
PARTS: dict[str, Any] = {"name": "walk", "engine": {"envs": 4}, "evaluation": {"episodes": 1}}
LITTLE = {"probes": 2, "steps": 8, "samples": 32}
SMALL: dict[str, dict[str, Any]] = {"hessian": LITTLE, "ggn": LITTLE, "gram": {"samples": 16}, "ntk": {"samples": 16}}
ALWAYS_EARLIER = ("interference", "conflict", "drift", "policy_drift")
PPO_SMALL = {"use": "ppo", "n_steps": 32, "batch_size": 32, "n_epochs": 1}
DQN_SMALL = {"use": "dqn", "learning_starts": 32, "buffer_size": 200}
AGENTS: dict[str, dict[str, Any]] = {
    "ppo": {"agent": {**PPO_SMALL, "normalize": {"observation": True, "reward": True}}},
    "dqn": {"agent": DQN_SMALL},
    "ppo, heads": {"agent": PPO_SMALL, "boundary": {"head": "per_task"}},
    "dqn, heads": {"agent": DQN_SMALL, "boundary": {"head": "per_task", "optimizer": "reset"}},
}


pytestmark = pytest.mark.usefixtures("one_thread")


# An agent and a task made by hand.


class Hand:
    """An agent of any model and objective: inputs are the observations, targets the actions."""

    def __init__(
        self,
        model: nn.Module,
        objective: Callable[[Tensor, Any], Tensor],
        parts: dict[str, dict[str, nn.Parameter]] | None = None,
        optimizers: tuple[torch.optim.Optimizer, ...] = (),
        **more: Any,
    ) -> None:
        vars(self).update(more)
        self.model, self.objective, self.optimizers = model, objective, list(optimizers)
        if parts is not None:
            self.networks = parts

    def prepare(self, experience: Experience) -> dict[str, Tensor]:
        return {
            "x": torch.as_tensor(experience.obs).flatten(0, 1),
            "y": torch.as_tensor(experience.action).flatten(0, 1),
        }

    def outputs(self, batch: dict[str, Tensor]) -> Tensor:
        found: Tensor = self.model(batch["x"])
        return found


class Fixed:
    """A task whose experience is always the same."""

    def __init__(self, x: Tensor, y: Tensor | None = None, name: str = "new") -> None:
        self.name, self.x = name, x
        self.y = torch.zeros(len(x), 1) if y is None else y

    def sample(self, agent: Any, seed: int, size: int) -> Experience:
        reward = np.zeros((len(self.x), 1), np.float32)
        obs = self.x.numpy()[:, None]
        return Experience(obs, self.y.numpy()[:, None], reward, obs, reward > 0, reward > 0)


def at(agent: Any, task: Any, phase: str = "init", earlier: tuple[Any, ...] = ()) -> Boundary:
    return Boundary(Visit(1, task, 10, 0), phase, 0, agent, earlier, seed=0)


def error(outputs: Tensor, batch: Any) -> Tensor:
    return (outputs - batch["y"]).square().mean()


def pull(outputs: Tensor, batch: Any) -> Tensor:
    """Linear in the outputs: the sign of a target is the sign of its gradient."""
    return (outputs * batch["y"]).sum(1).mean()


def right(outputs: Tensor, batch: Any) -> Tensor:
    return cross_entropy(outputs, batch["y"])


def passing(units: int, activation: nn.Module | None = None, *, outputs: int = 1) -> nn.Sequential:
    """A net whose hidden layer holds its inputs, or an activation of them."""
    net = nn.Sequential(nn.Linear(units, units), activation or nn.ReLU(), nn.Linear(units, outputs))
    with torch.no_grad():
        net[0].weight.copy_(torch.eye(units))
        net[0].bias.zero_()
    return net


def mlp(*widths: int, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def near(found: float, wanted: float, tolerance: float = 1e-5) -> bool:
    return math.isclose(found, wanted, rel_tol=tolerance, abs_tol=tolerance)


def named(**modules: nn.Module) -> dict[str, dict[str, nn.Parameter]]:
    return {name: {f"{name}.{n}": p for n, p in module.named_parameters()} for name, module in modules.items()}


# On real agents.


@pytest.mark.parametrize("name", MONITORS)
@pytest.mark.parametrize("earlier", [False, True])
def test_every_monitor_keeps_the_contract(name: str, earlier: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if earlier and name in ALWAYS_EARLIER:
        return
    monkeypatch.setattr("crl.testing.TICK", 256)
    options = {**SMALL.get(name, {}), **({"earlier": True} if earlier else {})}
    check_monitor(build_monitors([{"use": name, **options}])[name])


@pytest.fixture(scope="module", params=AGENTS)
def watched(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A walk with every monitor, on old tasks too."""
    monitors = [
        {"use": name, **SMALL.get(name, {}), **({} if name in ALWAYS_EARLIER else {"earlier": True})}
        for name in MONITORS
    ]
    data = {**PARTS, "tasks": [POLE, HEAVY], **AGENTS[request.param], "monitors": monitors}
    with pytest.MonkeyPatch.context() as patch:  # pictures take longer than the walk
        patch.setattr("crl.sinks.TensorBoard.spectrum", lambda *args: None)
        return crl.train(data, out=tmp_path_factory.mktemp("watched"))


def test_every_monitor_finds_finite_numbers(watched: Run) -> None:
    """A number whose bracket is wide is none, and says so; its bracket is finite."""
    for name in MONITORS:
        seen = [r for r in watched.records if r.name.startswith(f"{name}/")]
        assert seen, name
        assert all(np.isfinite(r.value).all() for r in seen if not r.note.startswith("between ")), name
        old = [r for r in seen if r.name.endswith(("/on/CartPole-v1", "/with/CartPole-v1"))]
        assert any(r.visit == 2 and r.task == "heavy" for r in old), f"{name} looks at the earlier task too"
    assert {r.note.split()[0] for r in watched.records if r.note} <= {"between"}


def test_a_look_at_every_boundary(watched: Run) -> None:
    for name in MONITORS:
        seen = {(r.visit, r.phase) for r in watched.records if r.name.startswith(f"{name}/")}
        only = {"hessian": "init", "ggn": "init", "gram": "init", "ntk": "init", "kfac": "init"}
        only["policy_drift"] = "end"
        wanted = {(visit, phase) for visit in (1, 2) for phase in ("init", "end") if only.get(name, phase) == phase}
        late = {"interference": {v for v in wanted if v[0] == 2}, "conflict": {v for v in wanted if v[0] == 2}}
        late["drift"] = wanted - {(1, "init")}  # nothing to compare with
        assert seen == late.get(name, wanted), name


def test_a_monitor_may_have_any_name_and_be_there_twice(tmp_path: Path) -> None:
    monitors = [{"use": "norms"}, {"use": "norms", "name": "early", "at": "init"}]
    run = crl.train({**PARTS, "tasks": [POLE], "agent": PPO_SMALL, "monitors": monitors}, out=tmp_path)
    assert {r.phase for r in run.records if r.name == "early/actor/weight_norm"} == {"init"}
    assert {r.phase for r in run.records if r.name == "norms/actor/weight_norm"} == {"init", "end"}


# Features.


def test_dormant_and_dead_units_are_counted() -> None:
    net = passing(4)
    with torch.no_grad():
        net[0].weight[2], net[0].bias[2] = 0.0, -10.0  # dead
        net[0].weight[3] = net[0].weight[0] * 1e-3  # alive, and of no weight
    found = Dormant().measure(at(Hand(net, error), Fixed(torch.ones(8, 4))))
    assert (found["model/dormant"], found["model/dead"], found["model/active"]) == (0.5, 0.25, 0.75)
    assert Dormant(tau=0.001).measure(at(Hand(net, error), Fixed(torch.ones(8, 4))))["model/dormant"] == 0.25


@pytest.mark.parametrize(
    "middle",
    [
        [nn.Tanh()],
        [nn.Tanh(), nn.Flatten()],
        [nn.Tanh(), nn.Identity()],
        [nn.Tanh(), nn.Dropout(0.0)],
        [nn.Sigmoid()],
    ],
    ids=["tanh", "tanh, flattened", "tanh, then nothing", "tanh, dropout", "sigmoid"],
)
def test_a_saturated_unit_is_not_active(middle: list[nn.Module]) -> None:
    first = nn.Linear(3, 3)
    net = nn.Sequential(first, *middle, nn.Linear(3, 1))
    with torch.no_grad():
        first.weight.copy_(torch.diag(torch.tensor([0.5, 10.0, -10.0])))
        first.bias.zero_()
    found = Dormant().measure(at(Hand(net, error), Fixed(torch.ones(6, 3))))
    assert near(found["model/active"], 1 / 3) and found["model/dead"] == 0


def test_relu_is_active_where_it_is_not_zero() -> None:
    x = torch.tensor([[1.0, -1.0, 2.0, 3.0], [-1.0, -1.0, 2.0, -3.0]])
    found = Dormant().measure(at(Hand(passing(4), error), Fixed(x)))
    assert (found["model/active"], found["model/dead"]) == (0.5, 0.25)


def test_used_capacity_is_the_units_that_vary() -> None:
    torch.manual_seed(0)
    x = torch.rand(64, 4) * torch.tensor([1.0, 1.0, 1e-3, 0.0]) + 1
    found = Capacity().measure(at(Hand(passing(4), error), Fixed(x)))
    assert (found["model/units"], found["model/share"]) == (2.0, 0.5)
    assert used(torch.full((500, 4), 0.1), 0.99) == 0


def test_subspaces_that_are_one_and_that_share_nothing() -> None:
    torch.manual_seed(0)
    one, other, both = (torch.tensor(mask) for mask in ([1.0, 1, 0, 0], [0.0, 0, 1, 1], [0.0, 1, 1, 0]))
    x = torch.rand(64, 4)
    earlier = (Fixed(x.flip(0) * one, name="same"), Fixed(x * other, name="apart"), Fixed(x * both, name="half"))
    found = Interference(share=1.0).measure(at(Hand(passing(4), error), Fixed(x * one), earlier=earlier))
    assert near(found["model/overlap/with/same"], 1) and near(found["model/angle/with/same"], 0, 1e-3)
    assert near(found["model/overlap/with/apart"], 0) and near(found["model/angle/with/apart"], 90, 1e-3)
    assert near(found["model/overlap/with/half"], 0.5) and near(found["model/angle/with/half"], 45, 1e-3)


def test_a_dead_layer_overlaps_with_nothing() -> None:
    earlier = (Fixed(-torch.ones(16, 3), name="dead"),)
    x = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]).repeat(8, 1)
    found = Interference().measure(at(Hand(passing(3), error), Fixed(x), earlier=earlier))
    assert found == {}, "features that are all zero span no subspace"


def test_a_subspace_holds_its_share() -> None:
    values = torch.diag(torch.tensor([3.0, 1.0, 0.1]))
    assert [subspace(values, share).shape[1] for share in (0.5, 0.95, 0.9999)] == [1, 2, 3]


class Functional(nn.Module):
    """No module but the linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(3, 6), nn.Linear(6, 5), nn.Linear(5, 2)

    def hidden(self, x: Tensor) -> list[Tensor]:
        one = relu(self.first(x))
        return [one, relu(self.second(one))]

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.last(self.hidden(x)[-1])
        return found


class Memory(nn.Module):
    """A recurrent layer, read at its last step."""

    def __init__(self) -> None:
        super().__init__()
        self.gru, self.last = nn.GRU(3, 6, batch_first=True), nn.Linear(6, 2)

    def hidden(self, x: Tensor) -> list[Tensor]:
        return [self.gru(x)[0][:, -1]]

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.last(self.hidden(x)[-1])
        return found


class Plain(nn.Sequential):
    def hidden(self, x: Tensor) -> list[Tensor]:
        one = self[1](self[0](x))
        return [one, self[3](self[2](one))]


def plain() -> Plain:
    return Plain(nn.Linear(3, 6), nn.ReLU(inplace=True), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2))


@pytest.mark.parametrize("make", [Functional, Memory, plain])
def test_the_rank_is_that_of_what_hidden_layers_hand_on(make: Callable[[], Any]) -> None:
    torch.manual_seed(0)
    model = make()
    x = torch.randn(40, 4, 3) if make is Memory else torch.randn(40, 3)
    boundary = at(Hand(model, error), Fixed(x, torch.zeros(40, 2)))
    with torch.no_grad():
        hidden = model.hidden(x)
    found = ERank(layers="all", ranks=["effective_rank", "srank"]).measure(boundary)
    for i, values in enumerate(hidden, 1):
        assert near(found[f"model/hidden-{i}/effective_rank"], effective_rank(values))
    assert len(found) == 2 * len(hidden)
    last = ERank(centred=True).measure(boundary)
    assert list(last) == ["model/last/effective_rank"]
    assert near(last["model/last/effective_rank"], effective_rank(hidden[-1], centred=True))


def test_a_convolutions_units_are_its_channels() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 16, 2)
    )
    x = torch.randn(5, 1, 8, 8)
    agent = Hand(net, error)
    (layers,) = features(View(at(agent, Fixed(x)), Fixed(x), 5)).values()
    with torch.no_grad():
        one = net[:2](x)
        two = net[:5](x)
    assert torch.equal(layers[0].values, torch.cat([image.flatten(1).T for image in one]))
    assert torch.equal(layers[1].values, two) and [layer.name for layer in layers] == ["2", "5"]


def test_the_input_is_no_hidden_layer_of_a_second_branch() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.actor, self.critic = passing(3), passing(3)

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.actor(x), self.critic(x)], 1)

    x = torch.tensor([[1.0, 1.0, 0.0]]).repeat(6, 1)
    model = Two()
    with torch.no_grad():
        for part in (model.actor, model.critic):
            part[0].bias.fill_(1.0)
    found = Dormant().measure(at(Hand(model, error), Fixed(x, torch.zeros(6, 2))))
    assert found["model/dead"] == 0, "no hidden unit is dead: only an input is always 0"


def test_a_model_of_one_layer_has_no_features() -> None:
    with pytest.raises(CurvatureError, match="no hidden layer was found"):
        ERank().measure(at(Hand(nn.Sequential(nn.Linear(3, 1)), error), Fixed(torch.ones(4, 3))))


def test_features_that_are_no_numbers_are_not_called_healthy() -> None:
    net = passing(3)
    with torch.no_grad():
        net[0].bias.fill_(math.nan)
    boundary = at(Hand(net, error), Fixed(torch.ones(8, 3)))
    for monitor in (ERank(), Capacity(), Dormant()):
        seen, problem = look("it", monitor, boundary)
        assert problem or all(math.isnan(value) for value in seen.values()), type(monitor).__name__


def test_no_hook_is_left_behind_by_a_model_that_fails() -> None:
    net = passing(3)
    with pytest.raises(RuntimeError):
        ERank().measure(at(Hand(net, error), Fixed(torch.ones(4, 7))))
    assert all(not part._forward_hooks for part in net.modules())


# Weights.


def test_weight_rank_falls_from_its_peak_and_remembers_it() -> None:
    net = passing(4, outputs=4)
    monitor, boundary = WeightRank(), at(Hand(net, error), Fixed(torch.ones(2, 4)))
    before = monitor.measure(boundary)
    assert near(before["model/0.weight"], 4) and near(before["model/0.weight/of_peak"], 1)
    assert near(before["model/mean"], (4 + effective_rank(net[2].weight.detach())) / 2)
    with torch.no_grad():
        net[0].weight.fill_(1.0)
    heir, newcomer = WeightRank(), WeightRank()
    heir.load_state_dict(copy.deepcopy(monitor.state_dict()))
    for looking in (monitor, heir):
        after = looking.measure(boundary)
        assert near(after["model/0.weight"], 1) and near(after["model/0.weight/of_peak"], 0.25)
        assert near(after["model/mean/of_peak"], (0.25 + 1) / 2)
    assert near(newcomer.measure(boundary)["model/0.weight/of_peak"], 1)


def test_a_kernel_is_a_matrix_and_a_gate_has_its_own() -> None:
    torch.manual_seed(0)
    conv, gru = nn.Conv2d(3, 5, 3), nn.GRU(3, 6)
    model = nn.ModuleDict({"conv": conv, "gru": gru, "lstm": nn.LSTMCell(2, 4)})
    found = WeightRank().measure(at(Hand(model, error), Fixed(torch.ones(2, 3))))
    assert near(found["model/conv.weight"], effective_rank(conv.weight.detach().reshape(5, 27)))
    for i in range(3):
        gate = gru.weight_hh_l0.detach()[6 * i : 6 * i + 6]
        assert near(found[f"model/gru.weight_hh_l0/gate-{i + 1}"], effective_rank(gate))
    gates = {name.split("/")[1] for name in found if "/gate-" in name}
    assert gates == {"gru.weight_ih_l0", "gru.weight_hh_l0", "lstm.weight_ih", "lstm.weight_hh"}
    assert near(found["model/gru.weight_ih_l0"], effective_rank(gru.weight_ih_l0.detach()))


def test_a_projection_has_no_gates() -> None:
    model = nn.ModuleDict({"lstm": nn.LSTM(3, 8, proj_size=2)})
    found = WeightRank().measure(at(Hand(model, error), Fixed(torch.ones(2, 3))))
    assert "model/lstm.weight_hr_l0" in found and "model/lstm.weight_ih_l0/gate-4" in found
    assert "model/lstm.weight_hr_l0/gate-1" not in found, "it maps 8 units to 2, and holds no gates"


def test_norms_and_the_way_from_the_first_weights() -> None:
    net = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    with torch.no_grad():
        for parameter, value in zip(net.parameters(), (3.0, 0.0, 0.0, 4.0), strict=True):
            parameter.fill_(value)
    monitor, boundary = Norms(), at(Hand(net, error), Fixed(torch.ones(2, 1)))
    assert monitor.measure(boundary) == {"model/weight_norm": 5.0, "model/distance_from_init": 0.0}
    with torch.no_grad():
        net[0].weight.add_(6.0)
        net[1].weight.add_(-8.0)
    heir = Norms()
    heir.load_state_dict(copy.deepcopy(monitor.state_dict()))
    for looking in (monitor, heir):
        assert looking.measure(boundary)["model/distance_from_init"] == 10.0


# Gradients.


def test_the_gradients_norm_is_autograds() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(33, 3), torch.randn(33, 2)
    net = mlp(3, 5, 2)
    found = GradientNorm().measure(at(Hand(net, error), Fixed(x, y)))
    gradient = torch.autograd.grad((net(x) - y).square().mean(), list(net.parameters()))
    assert near(found["model"], math.sqrt(sum(float(part.square().sum()) for part in gradient)))
    assert all(parameter.grad is None for parameter in net.parameters())


def test_opposite_tasks_pull_apart() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(32, 3), torch.ones(32, 1)
    earlier = (Fixed(x, y, "same"), Fixed(x, -y, "opposite"))
    found = Conflict(minibatches=1).measure(at(Hand(mlp(3, 5, 1), pull), Fixed(x, y), earlier=earlier))
    assert near(found["model/cosine/with/same"], 1) and near(found["model/cosine/with/opposite"], -1)
    assert found["model/below_zero/with/same"] == 0 and found["model/below_zero/with/opposite"] == 1


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.heads, self.now = nn.Linear(1, 1, bias=False), nn.ModuleList(), 0
        self.heads.extend(nn.Linear(1, 1, bias=False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.heads[self.now](self.trunk(x))
        return found


class Facing(Hand):
    """An agent with a head for each task."""

    @property
    def networks(self) -> Any:
        model: Any = self.model
        own = (f"heads.{model.now}.", "trunk.")
        return {"net": {name: p for name, p in model.named_parameters() if name.startswith(own)}}

    @contextmanager
    def facing(self, task: Any) -> Iterator[None]:
        model: Any = self.model
        before, model.now = model.now, int(task.name)
        try:
            yield
        finally:
            model.now = before


def test_heads_of_two_tasks_are_not_taken_for_one() -> None:
    """The trunk is pulled to both sides; each task's own head is pulled hard, and the other task does not mind."""
    model = TwoHeads()
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), (10.0, 1.0, -1.0), strict=True):
            parameter.fill_(value)
    x = torch.ones(8, 1)
    boundary = at(Facing(model, pull), Fixed(x, x, "1"), earlier=(Fixed(x, x, "0"),))
    assert Conflict().measure(boundary)["net/cosine/with/0"] <= 0


@pytest.mark.parametrize(("signs", "agreement"), [((1, 1), 1.0), ((1, -1), 0.0), ((1, 0), 0.5)])
def test_readiness_is_strength_times_agreement(signs: tuple[int, int], agreement: float) -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 3).repeat(2, 1)
    y = torch.cat([torch.full((8, 1), float(sign)) for sign in signs])
    found = Readiness(minibatches=2).measure(at(Hand(mlp(3, 5, 1), pull), Fixed(x, y)))
    assert near(found["model/agreement"], agreement)
    assert near(found["model/readiness"], found["model/strength"] * agreement)
    assert (found["model/strength"] > 1e-3) == (agreement > 0)


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, 1e-2, amsgrad=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 1e-3),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("trained", [0, 3])
def test_plasticity_is_what_the_optimizers_own_step_gains(name: str, trained: int) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(32, 3), torch.randn(32, 2)
    net = mlp(3, 8, 2)
    optimizer = OPTIMIZERS[name](net.parameters())
    for _ in range(trained):
        optimizer.zero_grad()
        (net(x.flip(0)) - y).square().mean().backward()
        optimizer.step()
    net[0].weight.grad = torch.ones_like(net[0].weight)
    twin = copy.deepcopy(net)
    twins = OPTIMIZERS[name](twin.parameters())
    twins.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    kept, moved = copy.deepcopy(net.state_dict()), copy.deepcopy(optimizer.state_dict())
    places = [parameter.data_ptr() for parameter in net.parameters()]
    found = SamplePlasticity().measure(at(Hand(net, error, optimizers=(optimizer,)), Fixed(x, y)))
    twins.zero_grad()
    (twin(x) - y).square().mean().backward()
    twins.step()
    with torch.no_grad():
        before, after = float((net(x) - y).square().mean()), float((twin(x) - y).square().mean())
    assert near(found["before"], before, 1e-6) and near(found["after"], after, 1e-6)
    assert near(found["plasticity"], max(0, 1 - after / before), 1e-6)
    assert all(torch.equal(kept[n], value) for n, value in net.state_dict().items())
    assert repr(optimizer.state_dict()) == repr(moved)
    assert [parameter.data_ptr() for parameter in net.parameters()] == places
    assert net[0].weight.grad is not None and bool((net[0].weight.grad == 1).all())


# What has moved.


def test_nothing_that_stays_has_drifted() -> None:
    torch.manual_seed(0)
    x = torch.randn(32, 3)
    net = mlp(3, 6, 1)
    first, second = Fixed(x, name="first"), Fixed(torch.randn(32, 3), name="second")
    monitor = Drift()
    assert monitor.measure(at(Hand(net, error), first)) == {}
    assert near(monitor.measure(at(Hand(net, error), first, "end"))["model/on/first"], 0)
    assert list(monitor.measure(at(Hand(net, error), second, earlier=(first,)))) == ["model/on/first"]
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn_like(parameter))
    heir = Drift()
    heir.load_state_dict(copy.deepcopy(monitor.state_dict()))
    moved = monitor.measure(at(Hand(net, error), second, "end", earlier=(first,)))
    assert 0.01 < moved["model/on/first"] <= 1 and 0.01 < moved["model/on/second"] <= 1
    other = Fixed(torch.randn(32, 3), name="first")  # the inputs are those of the first look
    assert heir.measure(at(Hand(net, error), second, "end", earlier=(other,))) == moved


def test_cka_does_not_mind_rotation_and_scale() -> None:
    torch.manual_seed(0)
    x = torch.randn(50, 6)
    turn = torch.linalg.qr(torch.randn(6, 6)).Q
    assert near(cka(x, 7 * x @ turn + 3), 1)
    assert 0 <= cka(x, torch.randn(50, 4)) < 0.5


@pytest.mark.parametrize("value", [0.0, 0.1, 0.7, 1.0])
def test_cka_of_what_does_not_vary_is_missing(value: float) -> None:
    torch.manual_seed(0)
    still = torch.full((100, 4), value)
    assert math.isnan(cka(still, torch.randn(100, 4))) and math.isnan(cka(still, still))


@pytest.mark.parametrize("cls", [PPO, DQN])
def test_policy_drift_is_how_far_the_answers_moved(cls: Any) -> None:
    task = build(env="CartPole-v1", name="pole", envs=4)
    join([task])
    own = {"n_steps": 32, "batch_size": 32} if cls is PPO else {"buffer_size": 100}
    agent = cls(task.shared, 0, "cpu", **own)
    monitor = PolicyDrift(samples=64)
    assert monitor.measure(at(agent, task)) == {}
    batch = monitor.inputs["pole"]
    with torch.no_grad():
        before = agent.outputs(batch).clone()
        for parameter in agent.model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        after = agent.outputs(batch)
    heir = PolicyDrift(samples=64)
    heir.load_state_dict(copy.deepcopy(monitor.state_dict()))
    found = heir.measure(at(agent, task, "end"))
    assert found == monitor.measure(at(agent, task, "end"))
    if cls is PPO:
        old, new = (torch.distributions.Categorical(logits=answer[:, :-1]) for answer in (before, after))
        assert near(found["kl"], float(torch.distributions.kl_divergence(old, new).mean()))
        assert near(found["value_change"], float((after[:, -1] - before[:, -1]).square().mean()))
    else:
        assert near(found["greedy_flips"], float((after.argmax(1) != before.argmax(1)).float().mean()))


@pytest.mark.parametrize("most", [None, 0.01])
def test_churn_is_what_one_update_does_to_other_samples(most: float | None) -> None:
    """Linear regression by SGD, by hand: the reference's outputs move by -lr x_ref . gradient, clipped as a whole."""
    torch.manual_seed(0)
    x, y, net, lr = torch.randn(40, 3), torch.randn(40, 1), nn.Linear(3, 1, bias=False), 0.1
    agent = Hand(net, lambda out, batch: (out - batch["y"]).square().mean(), largest_gradient=most,
                 divergence=lambda before, after: {"change": (after - before).square().sum(1)},
                 optimizers=(torch.optim.SGD(net.parameters(), lr=lr),))  # fmt: skip
    before, boundary = net.weight.detach().clone(), at(agent, Fixed(x, y))
    found = Churn(samples=40, minibatch=10, times=3).measure(boundary)
    generator, wanted = torch.Generator().manual_seed(boundary.seed), []
    for _ in range(3):
        order = torch.randperm(40, generator=generator)
        own, rest = order[:10], order[10:]
        gradient = (2 * (x[own] @ before.T - y[own]) * x[own]).mean(0)
        if most:
            gradient = gradient * min(1.0, most / float(gradient.norm()))
        wanted.append(float((lr * x[rest] @ gradient).square().mean()))
    assert found["change"] == pytest.approx(np.mean(wanted), rel=1e-3)
    assert torch.equal(net.weight, before)


@pytest.mark.parametrize("base", ["sgd", "rmsprop", "adamw"])
def test_a_trial_step_of_trac_is_around_its_own_base(base: str) -> None:
    """The trial's error after the step is that after a true step of an equal optimizer."""
    torch.manual_seed(0)
    x, y, options = torch.randn(40, 3), torch.randn(40, 1), {"momentum": 0.9} if base == "sgd" else {}

    def error(out: torch.Tensor, batch: Any) -> torch.Tensor:
        return (out - batch["y"]).square().mean()

    net = nn.Linear(3, 1)
    optimizer = Trac(net.parameters(), lr=0.05, base=base, **options)
    for _ in range(3):
        error(net(x), {"y": y}).backward()
        optimizer.step()
        optimizer.zero_grad()
    found = SamplePlasticity().measure(at(Hand(net, error, optimizers=(optimizer,)), Fixed(x, y)))
    error(net(x), {"y": y}).backward()
    optimizer.step()
    assert found["after"] == pytest.approx(float(error(net(x), {"y": y}).detach()), rel=1e-5)


# Curvature.


class Pair(nn.Module):
    """Two networks side by side, or on one trunk."""

    def __init__(self, shared: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Linear(3, 3) if shared else nn.Identity()
        self.actor, self.critic = mlp(3, 4, 2), mlp(3, 3, 1, seed=1)

    def forward(self, x: Tensor) -> Tensor:
        base = self.trunk(x)
        return torch.cat([self.actor(base), self.critic(base)], 1)

    @property
    def parts(self) -> dict[str, dict[str, nn.Parameter]]:
        trunk = named(trunk=self.trunk)["trunk"]
        return {name: {**part, **trunk} for name, part in named(actor=self.actor, critic=self.critic).items()}


def mixed(outputs: Tensor, batch: Any) -> Tensor:
    """A loss in which the two networks meet."""
    return (outputs[:, 0] * outputs[:, 2] + outputs[:, 1]).square().mean()


def eigenvalues(seen: Spectrum) -> Any:
    return np.sort(seen.values[seen.weights > 0])


@pytest.mark.parametrize(("shared", "objective"), [(False, error), (True, error), (False, mixed)])
def test_all_is_the_hessian_of_everything(shared: bool, objective: Any) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(24, 3), torch.randn(24, 3)
    model = Pair(shared)
    agent = Hand(model, objective, model.parts)
    found = curvature.Hessian(probes=10, steps=50).measure(at(agent, Fixed(x, y)))
    everything = {name: p for part in model.parts.values() for name, p in part.items()}
    problem = Problem(model, agent.outputs, objective, {"x": x, "y": y}, everything)
    wanted = torch.linalg.eigvalsh(Hessian(problem).dense().double()).numpy()
    assert found["all"].exact and found["all"].size == problem.size
    assert np.allclose(eigenvalues(found["all"]), wanted, atol=1e-5)
    assert np.isclose(found["all"].weights.sum(), 1)
    for name, part in model.parts.items():
        alone = np.linalg.eigvalsh(Hessian(problem.of(part)).dense().double().numpy())
        assert np.allclose(eigenvalues(found[name]), alone, atol=1e-5)


def test_a_part_can_be_a_network_or_a_layer() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(24, 3), torch.randn(24, 3)
    model = Pair(False)
    boundary = at(Hand(model, error, model.parts), Fixed(x, y))
    found = curvature.Hessian(probes=5, steps=20, of=["actor", "critic.0", "all"]).measure(boundary)
    seen = {name: value.size for name, value in found.items() if isinstance(value, Spectrum)}
    assert seen == {"actor": 26, "critic.0": 12, "all": 42}
    assert curvature.Hessian(of="actor.0.weight").measure(boundary)["actor.0.weight"].size == 12


@pytest.mark.parametrize("name", ["acto", "actor.1", "", "actor.0.weigh"])
def test_a_part_that_is_not_there_is_named(name: str) -> None:
    model = Pair(False)
    boundary = at(Hand(model, error, model.parts), Fixed(torch.ones(4, 3), torch.zeros(4, 3)))
    with pytest.raises(CrlError, match=f"of: there is no network or layer '{name}'; here are actor, critic, actor.0"):
        curvature.Hessian(of=["actor", name]).measure(boundary)


def test_rho_asks_whether_the_rank_is_enough() -> None:
    torch.manual_seed(0)
    boundary = at(Hand(mlp(3, 4, 1), error), Fixed(torch.randn(16, 3), torch.randn(16, 1)))
    rank = curvature.Hessian().measure(boundary)["model/epsilon_rank_0.001"].value
    assert 0 < rank <= 1
    asked = [curvature.Hessian(rho=rho).measure(boundary)["model/tau_trainable"].value for rho in (rank - 0.01, 1.01)]
    assert asked == [1.0, 0.0]
    assert "model/tau_trainable" not in curvature.Hessian().measure(boundary)


def test_a_rho_inside_the_bracket_is_not_answered() -> None:
    torch.manual_seed(0)
    boundary = at(Hand(mlp(3, 250, 1), error), Fixed(torch.randn(16, 3), torch.randn(16, 1)))
    few = {"probes": 1, "steps": 3, "eps": [1e-2]}
    rank = curvature.Hessian(**few).measure(boundary)["model/epsilon_rank_0.01"]
    told = curvature.Hessian(**few, rho=(rank.low + rank.high) / 2).measure(boundary)["model/tau_trainable"]
    assert math.isnan(told.value) and told.reason.startswith("the rank is between")


def test_numbers_that_are_not_exact_say_how_sure_they_are() -> None:
    torch.manual_seed(0)
    boundary = at(Hand(mlp(3, 200, 1), error), Fixed(torch.randn(16, 3), torch.randn(16, 1)))
    found = curvature.Hessian(probes=2, steps=8, eps=[1e-4], relative=[0.5]).measure(boundary)
    rank = found["model/epsilon_rank_0.0001"]
    assert 0 <= rank.low < rank.high <= 1 and rank.error > 0 and "model/relative_rank_0.5" in found
    assert found["model/products"] == 20 and found["samples"] == 16, "two probes of eight, and four to begin with"
    same = curvature.Hessian(probes=2, steps=8, chunk=5).measure(boundary)
    assert near(same["model/lambda_max"].value, found["model/lambda_max"].value, 1e-4)


def test_exact_computes_every_eigenvalue(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    boundary = at(Hand(mlp(3, 250, 1), error), Fixed(torch.randn(16, 3), torch.randn(16, 1)))
    found = {use: use(exact=True).measure(boundary) for use in (curvature.Hessian, curvature.GGN)}
    assert all(seen["model"].exact for seen in found.values())
    assert not curvature.Hessian().measure(boundary)["model"].exact, "which it is not by default"
    ggn = found[curvature.GGN]
    assert ggn["model/rank_bound"] == 16 / 1251 and ggn["model/epsilon_rank_0.001"].value <= 16 / 1251
    monkeypatch.setattr("crl.linalg.memory.available", lambda device: 1000)
    with pytest.raises(CurvatureError, match=r"every eigenvalue of 1,251 rows need .* GiB and .* are free"):
        curvature.Hessian(exact=True).measure(boundary)


def problem_of(boundary: Boundary, samples: int) -> Problem:
    agent: Any = boundary.agent
    batch = {name: value[:samples] for name, value in agent.prepare(boundary.experience()).items()}
    return Problem(agent.model, agent.outputs, agent.objective, batch, networks(agent)["model"])


@pytest.mark.parametrize("monitor", [curvature.Hessian, curvature.GGN])
def test_what_does_not_fit_is_refused_or_made_smaller(monitor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    boundary = at(Hand(mlp(3, 30, 1), error), Fixed(torch.randn(128, 3), torch.randn(128, 1)))
    room = needed(problem_of(boundary, 32), 8)
    assert room < needed(problem_of(boundary, 64), 8)
    monkeypatch.setattr(curvature, "available", lambda device: room)
    with pytest.raises(CurvatureError, match=r"128 samples and 8 steps on 151 parameters need .* GiB and .* are free"):
        monitor(probes=2, steps=8).measure(boundary)
    found = monitor(probes=2, steps=8, fewer=True).measure(boundary)["model"]
    wanted = spectrum(monitor.operator(problem_of(boundary, 32)), Effort(2, 8), boundary.seed)
    assert np.allclose(found.values, wanted.values)
    monkeypatch.setattr(curvature, "available", lambda device: 10)
    with pytest.raises(CurvatureError, match="2 samples and 8 steps"):
        monitor(probes=2, steps=8, fewer=True).measure(boundary)
    monkeypatch.setattr(curvature, "available", lambda device: None)
    monitor(probes=2, steps=8).measure(boundary)


# A network that has really collapsed.


def labelled(seed: int) -> tuple[Tensor, Tensor]:
    """A task: which of five random directions, give or take some noise, points furthest along a sample."""
    chance = torch.Generator().manual_seed(seed)
    x, ways = torch.randn(256, 10, generator=chance), torch.randn(10, 5, generator=chance)
    return x, (x @ ways + 0.5 * torch.randn(256, 5, generator=chance)).argmax(1)


def trained(rate: float, seed: int) -> tuple[nn.Sequential, float]:
    """A ReLU net after 200 steps of plain SGD, and its loss."""
    torch.manual_seed(seed)
    layers = [nn.Linear(10, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 5)]
    net = nn.Sequential(*layers)
    x, y = labelled(seed)
    optimizer = torch.optim.SGD(net.parameters(), rate)
    for step in range(200):
        chosen = slice(step % 8 * 32, step % 8 * 32 + 32)
        optimizer.zero_grad()
        cross_entropy(net(x[chosen]), y[chosen]).backward()
        optimizer.step()
    with torch.no_grad():
        return net, float(cross_entropy(net(x), y))


def seen_on_a_new_task(net: nn.Sequential, seed: int) -> dict[str, float]:
    x, y = labelled(100 + seed)
    boundary = at(Hand(net, right), Fixed(x, y))
    monitors = {"hessian": curvature.Hessian(probes=10, steps=100), "erank": ERank(), "dormant": Dormant()}
    found: dict[str, Any] = {}
    for name, monitor in monitors.items():
        seen, problem = look(name, monitor, boundary)
        assert not problem
        found |= {key: value.value if isinstance(value, Estimate) else value for key, value in seen.items()}
    alone = hessian_spectrum(net, cross_entropy, (x, y))
    assert alone.exact and near(alone.epsilon_rank(1e-3).value, found["hessian/model/epsilon_rank_0.001"], 1e-2)
    return found


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_collapse_is_seen_and_health_is_not_taken_for_it(seed: int) -> None:
    """Trained at a rate fifty times too high, most units die: the rank for a new task is gone before it begins."""
    fresh = seen_on_a_new_task(trained(0.0, seed)[0], seed)
    well, loss = trained(0.1, seed)
    ill, worse = trained(5.0, seed)
    healthy, collapsed = seen_on_a_new_task(well, seed), seen_on_a_new_task(ill, seed)
    assert loss < 0.8 and worse > 1.2, "the one has learned its task, the other nothing"
    rank, last = "hessian/model/epsilon_rank_0.001", "erank/model/last/effective_rank"
    assert healthy[rank] > 0.8 * fresh[rank] and collapsed[rank] < 0.2 * fresh[rank]
    assert healthy[last] > 0.5 * fresh[last] and collapsed[last] < 0.25 * fresh[last]
    assert healthy["dormant/model/dead"] < 0.1 and collapsed["dormant/model/dead"] > 0.35
    assert healthy["dormant/model/dormant"] < 0.15 and collapsed["dormant/model/dormant"] > 0.35
    assert collapsed["dormant/model/active"] < 0.5 * healthy["dormant/model/active"]


# Where there is nothing to measure, the run goes on.


class Bag(nn.Module):
    """Observations as words of a bag."""

    def __init__(self) -> None:
        super().__init__()
        self.bag, self.last = nn.EmbeddingBag(10, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.last(self.bag((x.abs() * 10).long().clamp(max=9)).tanh())
        return found


class Faulty(MyAgent):
    """It learns as ever; what it says of its loss is of no use."""

    def __init__(self, interface: Any, seed: int, device: str, fault: str = "") -> None:
        super().__init__(interface, seed, device)
        self.fault = fault
        self.side = (Bag if fault == "bag" else nn.Identity)()
        self.optimizers = [self.optimizer]

    @property
    def networks(self) -> Any:
        side = self.side if self.fault == "bag" else self.model
        return {"net": dict(side.named_parameters())}

    def prepare(self, experience: Experience) -> dict[str, Tensor]:
        if self.fault == "raises":
            raise KeyError("no such thing")
        return {"x": torch.as_tensor(experience.obs).flatten(0, 1)}

    def outputs(self, batch: Any) -> Tensor:
        net = self.side if self.fault == "bag" else self.model
        found: Tensor = net(batch["x"])
        return found

    def objective(self, outputs: Tensor, batch: Any) -> Tensor:
        loss = outputs.square().mean()
        if self.fault == "gradient":
            loss = loss + (outputs * 0).abs().sqrt().sum()  # 0, with a derivative that is no number
        return loss * math.nan if self.fault == "loss" else loss


class Broken:
    """A monitor that fails in one of many ways."""

    def __init__(self, how: str = "ValueError") -> None:
        self.how = how

    def measure(self, boundary: Any) -> Any:
        answers = {
            "nothing": None,
            "text": {"x": "high"},
            "object": {"x": object()},
            "ragged": {"x": [[1.0], [1.0, 2.0]]},
        }
        answers["gradient"] = {"x": torch.ones(3, requires_grad=True)}
        answers["list"] = [1.0, 2.0]
        if self.how in answers:
            return answers[self.how]
        kinds: dict[str, type[Exception]] = {e.__name__: e for e in (ValueError, KeyError, AssertionError, MemoryError)}
        raise kinds[self.how]("it broke")


def walked(out: Path, agent: Any, *monitors: Any) -> Run:
    tasks = [{"env": "CartPole-v1", "steps": 16}]
    data = {"tasks": tasks, "engine": {"envs": 2}, "evaluation": {"episodes": 1}, "agent": agent}
    return crl.train({**data, "monitors": list(monitors)}, out=out, verbosity=0)


HESSIAN = {"use": "hessian", "at": ["init", "end"], **LITTLE}
FAULTS = {
    "loss": {
        "hessian": "the loss is not finite (nan)",
        "gradient_norm": "the gradient is not finite",
        "sample_plasticity": "not finite",
    },
    "gradient": {
        "hessian": "the gradient is not finite",
        "gradient_norm": "the gradient is not finite",
        "sample_plasticity": "not finite",
    },
    "bag": {"hessian": "an operation of this network has no second derivative"},
    "raises": {"hessian": "KeyError: 'no such thing'", "gradient_norm": "KeyError: 'no such thing'"},
}


@pytest.mark.parametrize(
    ("fault", "name"), [(fault, name) for fault, names in FAULTS.items() for name in names]
)  # fmt: skip
def test_a_loss_of_no_use_costs_a_note(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], fault: str, name: str
) -> None:
    agent = {"use": "tests.test_monitors.Faulty", "fault": fault}
    run = walked(tmp_path, agent, HESSIAN if name == "hessian" else name, "norms")
    missing = [r for r in run.records if r.name == name]
    assert [(r.phase, math.isnan(float(np.asarray(r.value)))) for r in missing] == [("init", True), ("end", True)]
    assert all(FAULTS[fault][name] in r.note for r in missing)
    assert {r.phase for r in run.records if r.name == "norms/net/weight_norm"} == {"init", "end"}
    assert run.manifest["status"] == "finished"
    said = capsys.readouterr().err
    assert said.count(f"monitor {name}: ") == 1 and FAULTS[fault][name] in said and "Traceback" not in said


def test_an_agent_that_says_nothing_of_its_loss(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = walked(tmp_path, {"use": "tests.my_agent.MyAgent"}, HESSIAN, "erank", "norms")
    for name, parts in (("hessian", "prepare or outputs or objective"), ("erank", "prepare or outputs")):
        notes = {r.note for r in run.records if r.name == name}
        assert notes == {f"MyAgent has no {parts}, so there is nothing to look at"}, name
    assert {r.phase for r in run.records if r.name == "norms/model/weight_norm"} == {"init", "end"}
    assert capsys.readouterr().err.count("so there is nothing to look at") == 2  # once a monitor, not once a boundary


@pytest.mark.parametrize("how", ["ValueError", "KeyError", "AssertionError", "MemoryError"])
def test_a_monitor_that_raises_ends_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str], how: str) -> None:
    run = walked(
        tmp_path, {"use": "tests.my_agent.MyAgent"}, {"use": "tests.test_monitors.Broken", "how": how}, "norms"
    )
    assert [how in r.note and "it broke" in r.note for r in run.records if r.name == "Broken"] == [True, True]
    assert len([r for r in run.records if r.name == "norms/model/weight_norm"]) == 2
    assert capsys.readouterr().err.count("monitor Broken: ") == 1


@pytest.mark.parametrize("how", ["nothing", "list", "text", "object", "ragged", "gradient"])
def test_a_monitor_that_returns_no_numbers_ends_no_run(tmp_path: Path, how: str) -> None:
    run = walked(
        tmp_path, {"use": "tests.my_agent.MyAgent"}, {"use": "tests.test_monitors.Broken", "how": how}, "norms"
    )
    assert run.manifest["status"] == "finished"
    assert len([r for r in run.records if r.name == "Broken" and r.note]) == 2
    assert len([r for r in run.records if r.name == "norms/model/weight_norm"]) == 2


@pytest.mark.parametrize("monitor", [curvature.Gram, curvature.NTK])
def test_a_gram_that_does_not_fit_is_refused_before_it_is_made(monitor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    boundary = at(Hand(mlp(3, 8, 2), error), Fixed(torch.randn(64, 3), torch.randn(64, 2)))
    monkeypatch.setattr("crl.linalg.memory.available", lambda device: 100_000)
    with pytest.raises(CurvatureError, match=r"64 samples of 2 outputs need .* GiB and .* are free: take fewer"):
        monitor().measure(boundary)


def test_a_parameter_that_is_no_number_is_named() -> None:
    net = mlp(3, 8, 1)
    with torch.no_grad():
        net[2].weight[0, 0] = float("nan")
    boundary = at(Hand(net, error), Fixed(torch.randn(16, 3), torch.randn(16, 1)))
    for monitor in (curvature.Hessian(), Dormant(), Drift(), SamplePlasticity()):
        with pytest.raises(CurvatureError, match=r"parameter '2\.weight' is not finite any more"):
            monitor.measure(boundary)


def test_a_look_is_a_draw_from_the_first_rollout() -> None:
    trial = _Trial(PPO, _small(), {"n_steps": 16, "batch_size": 64, "n_epochs": 1}).start()
    boundary = Boundary(trial.visit, "init", 0, trial.agent, (), seed=7)
    view = View(boundary, trial.task, 100)
    assert len(view.batch["obs"]) == 100 and view.experience.reward.size == 256  # 16 steps of 16 copies
    whole = trial.agent.prepare(view.experience)
    rows = [int((whole["obs"] == row).all(1).nonzero()[0, 0]) for row in view.batch["obs"]]
    assert rows == sorted(set(rows)) and len({row % 16 for row in rows}) == 16, "every copy, each sample once"
    assert torch.equal(whole["return"][rows], view.batch["return"])
    again = View(Boundary(trial.visit, "init", 0, trial.agent, (), seed=7), trial.task, 100)
    assert torch.equal(again.batch["obs"], view.batch["obs"])
    assert len(View(boundary, trial.task, 300).batch["obs"]) == 300


def test_no_room_ends_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(curvature, "available", lambda device: 1000)
    run = walked(tmp_path, {"use": "tests.test_monitors.Faulty"}, HESSIAN, "norms")
    assert all(
        "GiB and" in r.note and "take fewer samples or steps" in r.note for r in run.records if r.name == "hessian"
    )
    assert len([r for r in run.records if r.name == "hessian"]) == 2


# Options.


@pytest.mark.parametrize(
    ("spec", "option"),
    [
        ({"use": "hessian", "at": ["middle"]}, "at"),
        ({"use": "hessian", "at": []}, "at"),
        ({"use": "norms", "at": 3}, "at"),
        ({"use": "hessian", "samples": 1}, "samples"),
        ({"use": "erank", "samples": "many"}, "samples"),
        ({"use": "policy_drift", "samples": 1}, "samples"),
        ({"use": "churn", "minibatch": 0}, "minibatch"),
        ({"use": "hessian", "probes": 0}, "probes"),
        ({"use": "hessian", "probes": True}, "probes"),
        ({"use": "ggn", "steps": "x"}, "steps"),
        ({"use": "hessian", "chunk": 0}, "chunk"),
        ({"use": "hessian", "eps": [-1]}, "eps"),
        ({"use": "gram", "eps": []}, "eps"),
        ({"use": "hessian", "relative": "x"}, "relative"),
        ({"use": "hessian", "rho": "x"}, "rho"),
        ({"use": "hessian", "of": 3}, "of"),
        ({"use": "erank", "layers": "some"}, "layers"),
        ({"use": "erank", "ranks": ["x"]}, "ranks"),
        ({"use": "erank", "ranks": "srank"}, "ranks"),
        ({"use": "erank", "ranks": 3}, "ranks"),
        ({"use": "dormant", "tau": -1}, "tau"),
        ({"use": "dormant", "earlier": "maybe"}, "earlier"),
        ({"use": "capacity", "share": 2}, "share"),
        ({"use": "interference", "share": 2}, "share"),
        ({"use": "interference", "share": "x"}, "share"),
        ({"use": "readiness", "minibatches": 1}, "minibatches"),
        ({"use": "conflict", "minibatches": 0}, "minibatches"),
        ({"use": "norms", "zz": 1}, "zz"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(map(str, value.values())),
)
def test_a_bad_option_is_named_in_one_line(spec: dict[str, Any], option: str) -> None:
    with pytest.raises(CrlError) as caught:
        build_monitors([{"use": "norms", "name": "first"}, spec])
    said = str(caught.value)
    assert said.startswith("monitors.1") and option in said and len(said.splitlines()) == 1


class Stubborn:
    def __init__(self) -> None:
        raise ValueError("not today")

    def measure(self, boundary: Any) -> dict[str, float]:
        return {}


def test_a_monitor_that_cannot_be_built_is_named() -> None:
    with pytest.raises(CrlError, match=r"monitors\.0.*not today"):
        build_monitors([{"use": "tests.test_monitors.Stubborn"}])


def test_two_of_a_name_are_refused_and_a_name_of_its_own_resolves() -> None:
    with pytest.raises(CrlError, match=r"monitors\.1: another monitor is called 'norms' already.*`name:`"):
        build_monitors([{"use": "norms"}, {"use": "norms"}])
    assert list(build_monitors([{"use": "norms"}, {"use": "norms", "name": "again"}])) == ["norms", "again"]
    for name in ("a b", 3, "x/y", "x" * 61):
        with pytest.raises(CrlError, match=r"monitors\.0\.name"):
            build_monitors([{"use": "norms", "name": name}])


def test_which_monitors_there_are_by_default() -> None:
    tasks = {"tasks": [POLE]}
    assert [spec["use"] for spec in read(tasks).monitors] == list(BY_DEFAULT)
    assert read({**tasks, "monitors": []}).monitors == []
    changed = read(tasks, (("monitors.0.probes", 1),)).monitors
    assert changed[0] == {"use": "hessian", "probes": 1} and len(changed) == len(BY_DEFAULT)


def test_a_bad_option_on_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("c.yaml").write_text("tasks: [{env: CartPole-v1, steps: 32}]\n")
    assert main(["train", "--env-seq", "c.yaml", "-q", "--set", "monitors.0.probes=0"]) == 2
    said = capsys.readouterr().err
    assert said == "crl: monitors.0: probes: 0 is not a whole number of at least 1\n"
    assert not Path("runs").exists()


# What a run keeps of it.


@pytest.fixture(scope="module")
def default(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A walk with the monitors that everybody gets, the Hessian a small one."""
    changes = tuple((f"monitors.0.{name}", value) for name, value in LITTLE.items())
    data = {**PARTS, "tasks": [POLE, HEAVY], "agent": PPO_SMALL}
    return crl.train(data, out=tmp_path_factory.mktemp("default"), changes=changes)


def test_the_default_monitors_look_where_they_should(default: Run) -> None:
    seen = {name: {(r.visit, r.phase) for r in default.records if r.name.startswith(f"{name}/")} for name in BY_DEFAULT}
    every = {(visit, phase) for visit in (1, 2) for phase in ("init", "end")}
    assert seen == {"hessian": {(1, "init"), (2, "init")}, "erank": every, "dormant": every, "norms": every}
    names = {r.name for r in default.records}
    assert {f"hessian/{part}/epsilon_rank_0.001" for part in ("actor", "critic", "all")} <= names
    assert {"erank/actor/last/effective_rank", "dormant/critic/dead", "norms/actor/distance_from_init"} <= names
    for name in BY_DEFAULT:
        cost = {(r.visit, r.phase) for r in default.records if r.name == f"time/monitor/{name}"}
        assert cost == seen[name], "its cost is on record where it looked, and nowhere else"
    assert all(
        r.task == ("CartPole-v1", "heavy")[r.visit - 1] for r in default.records if r.name.startswith("hessian/")
    )


def test_a_look_is_logged_at_its_boundarys_step(default: Run) -> None:
    steps = {(r.visit, r.phase): r.step for r in default.records if r.name == "norms/actor/weight_norm"}
    assert steps == {(1, "init"): 0, (1, "end"): 128, (2, "init"): 128, (2, "end"): 256}


def test_spectra_are_files_that_hold_the_logs_numbers(default: Run) -> None:
    files = sorted(path.name for path in (default.path / "spectra").rglob("*.*"))
    assert files == [f"{visit}-init-{part}.npz" for visit in (1, 2) for part in ("actor", "all", "critic")]
    for file in files:
        visit, phase, part = file.removesuffix(".npz").split("-")
        seen = Spectrum.load(default.path / "spectra" / file)
        assert seen.settings["name"] == f"hessian/{part}" and seen.settings["probes"] == 2
        assert np.allclose(seen.weights.sum(1), 1)
        logged = {r.name: r.value for r in default.records if (r.visit, r.phase) == (int(visit), phase)}
        for name, value in seen.numbers().items():
            assert np.array_equal(logged[f"hessian/{part}/{name}"], value, equal_nan=True), name


def test_other_operators_have_a_folder_of_their_own(watched: Run) -> None:
    assert (watched.path / "spectra" / "ggn").is_dir() and (watched.path / "spectra" / "gram").is_dir()
    seen = {(visit, phase, each.settings["name"]) for visit, phase, each in RunFolder(watched.path).read_spectra()}
    assert len(seen) == len(list((watched.path / "spectra").rglob("*.npz"))), "each file is a spectrum of its own"
    assert any(name.endswith("/on/CartPole-v1") for _, _, name in seen)


def board_of(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder), size_guidance={"images": 0, "scalars": 0, "histograms": 0}).Reload()


def shown(board: EventAccumulator) -> dict[str, Any]:
    """What is drawn, without the times of it."""
    tags = board.Tags()
    scalars = {tag: [(e.step, repr(e.value)) for e in board.Scalars(tag)] for tag in tags["scalars"]}
    images = {tag: [(e.step, e.encoded_image_string) for e in board.Images(tag)] for tag in tags["images"]}
    bars = {
        tag: [(e.step, e.histogram_value.num, list(e.histogram_value.bucket)) for e in board.Histograms(tag)]
        for tag in tags["histograms"]
    }
    return {"scalars": scalars, "images": images, "histograms": bars}


def test_monitors_are_drawn_by_visit(default: Run) -> None:
    seen = shown(board_of(default.path / "tb"))
    curve = seen["scalars"]["hessian/actor/epsilon_rank_0.001/init"]
    logged = [r.value for r in default.records if r.name == "hessian/actor/epsilon_rank_0.001"]
    assert [step for step, _ in curve] == [1, 2]
    assert np.allclose([float(value) for _, value in curve], logged, equal_nan=True)
    assert len(seen["scalars"]["hessian/actor/epsilon_rank_0.001/low/init"]) == 2, "the bracket is drawn"
    for phase in ("init", "end"):
        assert [step for step, _ in seen["scalars"][f"norms/actor/weight_norm/{phase}"]] == [1, 2]
    assert not [name for name in seen["scalars"] if "/error" in name]
    assert any(r.name.endswith("/error") for r in default.records), "the standard error, the log has"


def test_spectra_are_drawn(default: Run) -> None:
    seen = shown(board_of(default.path / "tb"))
    for part in ("actor", "critic", "all"):
        assert [step for step, *_ in seen["images"][f"spectra/hessian/{part}"]] == [1, 2]
        bars = seen["histograms"][f"hessian/{part}/decades/init"]
        assert [step for step, *_ in bars] == [1, 2]
        for visit, num, counts in bars:
            found = Spectrum.load(default.path / "spectra" / f"{visit}-init-{part}.npz")
            beyond = found.size * found.weights[np.abs(found.values) > OFF_ZERO].sum() / len(found.values)
            assert near(num, beyond) and near(sum(counts), beyond), "as many as there are eigenvalues off zero"
        first, second = seen["images"][f"spectra/hessian/{part}"]
        assert first[1].startswith(b"\x89PNG") and first[1] != second[1]


def test_the_view_is_the_same_when_it_is_built_again(default: Run, tmp_path: Path) -> None:
    """As a resume does, from the last checkpoint."""
    copied = tmp_path / "run"
    shutil.copytree(default.path, copied)
    before = shown(board_of(copied / "tb"))
    plan, state = Run(copied).at(2)
    walk = Walk(plan, RunFolder(copied), -1, state["offset"])
    walk.restore(state)
    walk.close()
    after = shown(board_of(copied / "tb"))
    assert after["histograms"] == before["histograms"]
    spectra = [tag for tag in before["images"] if tag.startswith("spectra/")]
    assert spectra and all(after["images"][tag] == before["images"][tag] for tag in spectra)
    drawn = [tag for tag in before["scalars"] if not tag.startswith(("final/", "metrics/area", "metrics/plasticity"))]
    assert all(after["scalars"][tag] == before["scalars"][tag] for tag in drawn)


# A monitor of one's own.


def test_the_readmes_monitor_is_this_one_and_keeps_the_contract(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("crl.testing.TICK", 256)
    check_monitor(Silence())
    source = (ROOT / "tests" / "my_monitor.py").read_text().strip()
    assert f"```python\n{source}\n```" in (ROOT / "README.md").read_text()
    net = passing(3)
    x = torch.tensor([[1.0, -1.0, 0.0]]).repeat(4, 1)
    assert near(Silence().measure(at(Hand(net, error), Fixed(x)))["model"], 2 / 3)


def test_a_view_is_sampled_once_for_all_monitors() -> None:
    task = Fixed(torch.randn(8, 3))
    asked: list[int] = []
    sample = task.sample
    task.sample = lambda agent, seed, size: (asked.append(size), sample(agent, seed, size))[1]  # type: ignore[method-assign]
    boundary = at(Hand(mlp(3, 4, 1), error), task)
    for monitor in (ERank(samples=8), Dormant(samples=8), Capacity(samples=4)):
        monitor.measure(boundary)
    assert asked == [8, 4]


def test_evaluating_goes_on_after_a_look_inside_it() -> None:
    """`experience` faces the task a second time; a monitor that acts afterwards still must not train."""
    task = build(env="CartPole-v1", name="pole", envs=4)
    join([task])
    agent: Any = DQN(task.shared, 0, "cpu", buffer_size=100)
    agent.algo._last_obs = None
    with agent.facing(task):
        boundary = at(agent, task)
        seen = boundary.experience(size=8)
        agent.act(seen.obs[0], None, False)
    assert agent.algo._last_obs is None, "acting inside facing() is evaluation, also after sampling"
