"""Each method does what its paper says: small cases, against oracles of a few lines written here."""

import copy
import io
import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div
from torch.testing import assert_close

import crl
from agents.classifier import Classifier
from agents.dqn import DQN
from agents.layers import CReLU, Fourier, Heads, Shape
from agents.optimizers import Muon, Trac, erfi, orthogonal
from agents.ppo import PPO
from crl import boundary
from crl.core import CrlError, Experience, Interface, Rules, Visit, facing
from crl.core import Pairs as Labelled
from crl.linalg import effective_rank, ranks
from crl.linalg.ranks import effective_rank_to_raise
from crl.methods.anchors import EWC, MAS, SI, OnlineEWC, factor
from crl.methods.columns import Columns, PackNet, Progressive
from crl.methods.erank import L2ER, ERank
from crl.methods.generative import VAE, GenerativeReplay
from crl.methods.injection import Beside, PlasticityInjection
from crl.methods.memory import AGEM, DER, LwF, Replay, Reservoir
from crl.methods.renew import CBP, HeadReset, ReDo, Reset, ShrinkPerturb
from crl.methods.shape import (
    L2,
    L2Init,
    NormalizeAndProject,
    Parseval,
    Spectral,
    SpectralNorm,
    Wasserstein,
    WeightClip,
    WeightDecay,
    hidden_weights,
)
from crl.methods.units import Young
from crl.monitors import features

pytestmark = pytest.mark.usefixtures("one_thread")

Weights = dict[str, Tensor]
INPUTS, CLASSES = 4, 3
STILL = {"use": "sgd"}  # with a learning rate of 0 a step computes gradients, and methods act, but nothing else moves


# Agents driven by hand, and what is asked of them.


class Pairs:
    """A task that gives the same labelled pairs whenever it is asked."""

    def __init__(self, name: str, seed: int, count: int = 12) -> None:
        self.name, self.seed, self.count = name, seed, count

    def sample(self, agent: Any, seed: int, size: int) -> Labelled:
        return pairs(self.seed, self.count)


A, B, C = Pairs("a", 1), Pairs("b", 2), Pairs("c", 3)


def pairs(seed: int = 0, count: int = 16, inputs: int = INPUTS) -> Labelled:
    rng = np.random.default_rng(seed)
    obs = rng.normal(size=(count, inputs)).astype(np.float32)
    return labelled(obs, rng.integers(CLASSES, size=count))


def labelled(obs: Any, labels: Any) -> Labelled:
    return Labelled(torch.as_tensor(obs), torch.as_tensor(np.asarray(labels)).long())


def classifier(
    hidden: tuple[int, ...] = (6,), lr: float = 0.0, optimizer: Mapping[str, Any] = STILL, seed: int = 0, **net: Any
) -> Classifier:
    interface = Interface(spaces.Box(-np.inf, np.inf, (INPUTS,)), spaces.Discrete(CLASSES))
    net = {"hidden": list(hidden), **net}
    return Classifier(interface, seed, "cpu", net=net, optimizer=optimizer, learning_rate=lr)


class Bare:
    """An agent of the least that methods need, around any model of images and labels."""

    def __init__(self, model: nn.Module, lr: float = 0.0, **interface: Any) -> None:
        self.model, self.optimizers = model, [torch.optim.SGD(model.parameters(), lr=lr)]
        self.minibatch: Weights = {}
        self.interface = SimpleNamespace(**interface)

    def outputs(self, batch: Mapping[str, Tensor]) -> Tensor:
        answer: Tensor = self.model(batch["obs"])
        return answer

    def learn(self, obs: Tensor, labels: Tensor) -> None:
        self.minibatch = {"obs": obs, "label": labels}
        loss = cross_entropy(self.outputs(self.minibatch), labels)
        self.optimizers[0].zero_grad()
        loss.backward()
        self.optimizers[0].step()

    remembers = ("obs", "label")

    def rehearse(self, batch: Mapping[str, Tensor]) -> Tensor:
        return cross_entropy(self.outputs(batch), batch["label"])

    def rebuilt(self) -> None:
        pass


def put(method: Any, agent: Any) -> Any:
    method.attach(agent)
    return method


def learn(agent: Any, *seeds: int, count: int = 16) -> None:
    """One step for each seed."""
    for seed in seeds:
        agent.observe(pairs(seed, count))
        agent.update()


def visit(index: int, task: Any = A, steps: int = 64, **rules: Any) -> Visit:
    return Visit(index, task, steps, seed=7, total=steps, rules=Rules(**rules))


def enter(agent: Any, methods: Any, step: Visit) -> None:
    agent.enter(step)
    for method in methods if isinstance(methods, list) else [methods]:
        method.enter(step)


def weights(agent: Any) -> Weights:
    return {name: value.detach().clone() for name, value in agent.model.named_parameters()}


def gradients(agent: Any) -> Weights:
    return {name: value.grad.clone() for name, value in agent.model.named_parameters() if value.grad is not None}


def slopes(agent: Any, loss: Tensor) -> Weights:
    names, values = zip(*[(n, p) for n, p in agent.model.named_parameters() if p.requires_grad], strict=True)
    found = torch.autograd.grad(loss, values, allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for n, p, g in zip(names, values, found, strict=True)}


def own(agent: Classifier, seed: int = 0, count: int = 16) -> Weights:
    """The gradient of the agent's own loss."""
    batch = agent.prepare(pairs(seed, count))
    return slopes(agent, cross_entropy(agent.model(batch["obs"]), batch["label"]))


def added(agent: Classifier, seed: int = 0) -> Weights:
    """What a method adds to the gradient of a step that moves nothing."""
    before = own(agent, seed)
    learn(agent, seed)
    return {name: value - before[name] for name, value in gradients(agent).items()}


def shake(agent: Any, seed: int = 5, by: float = 0.3) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in agent.model.parameters():
            value.add_(by * torch.randn(value.shape, generator=generator))


def close(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], atol: float = 1e-6) -> None:
    assert set(found) == set(wanted)
    for name in wanted:
        assert_close(found[name], wanted[name], atol=atol, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def same(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    assert [n for n in wanted if not torch.equal(found[n], wanted[n])] == []


def live(agent: Any, steps: int, seed: int = 0) -> None:
    """Random observations and rewards for PPO and DQN."""
    rng, envs = np.random.default_rng(seed), agent.interface.envs
    torch.manual_seed(seed)
    np.random.seed(seed)
    obs = rng.normal(size=(envs, INPUTS)).astype(np.float32)
    for _ in range(steps):
        action, _, note = agent.act(obs, None, False)
        after = rng.normal(size=(envs, INPUTS)).astype(np.float32)
        reward, ended = rng.normal(size=envs).astype(np.float32), rng.random(envs) < 0.1
        agent.observe(Experience(obs, action, reward, after, ended, np.zeros(envs, bool), note))
        agent.update()
        obs = after


def player(kind: str, **options: Any) -> Any:
    """A small PPO or DQN."""
    interface = Interface(spaces.Box(-9, 9, (INPUTS,)), spaces.Discrete(CLASSES), envs=4)
    net = options.pop("net", {"hidden": [8, 8]})
    if kind == "ppo":
        return PPO(interface, 0, "cpu", net=net, **{"n_steps": 8, "batch_size": 16, "n_epochs": 2, **options})
    rest = {"learning_starts": 16, "batch_size": 16, "buffer_size": 400, "target_update_interval": 20, **options}
    return DQN(interface, 0, "cpu", net=net, **rest)


def rows(count: int = 32, seed: int = 3) -> dict[str, Tensor]:
    return {"obs": torch.randn(count, INPUTS, generator=torch.Generator().manual_seed(seed))}


@torch.no_grad()
def answers(agent: Any, task: Any = None) -> Tensor:
    if task is None:
        return agent.outputs(rows()).clone()
    with facing(agent, task):
        return agent.outputs(rows()).clone()


# Weights in shape.


def check_l2() -> None:
    """In the gradient, of an agent that adds it by itself (in a step written out, or with momentum) and of another."""
    lr, strength = 0.1, 0.3
    for optimizer in ({"use": "sgd"}, {"use": "sgd", "momentum": 0.5}, None):
        agent: Any = classifier(lr=lr, optimizer=optimizer or STILL)
        batch = agent.prepare(pairs(0))
        before, slope = weights(agent), own(agent)
        agent = agent if optimizer else Bare(agent.model, lr)
        put(L2(strength), agent)
        if optimizer:
            learn(agent, 0)
        else:
            agent.learn(batch["obs"], batch["label"])
        close(weights(agent), {n: w - lr * (slope[n] + strength * w) for n, w in before.items()}, 1e-7)


def test_l2_is_coupled_and_holds_biases_too() -> None:
    check_l2()


def test_l2_without_biases_would_be_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(L2, "slope", lambda self, name, value: value if value.ndim > 1 else None)
    with pytest.raises(AssertionError):
        check_l2()


def test_l2_with_adam_is_coupled() -> None:
    def twins(method: Any) -> tuple[Weights, Weights]:
        ours = classifier(lr=0.01, optimizer={"use": "adam"})
        theirs = classifier(lr=0.01, optimizer={"use": "adam", "weight_decay": method.strength})
        put(method, ours)
        for agent in (ours, theirs):
            learn(agent, *range(6))
        return weights(ours), weights(theirs)

    close(*twins(L2(0.2)), atol=1e-7)
    with pytest.raises(AssertionError):
        close(*twins(WeightDecay(0.2)), atol=1e-7)


def test_weight_decay_is_adamw() -> None:
    for strength in (0.01, 0.5):
        ours = classifier(lr=0.01, optimizer={"use": "adam"})
        theirs = classifier(lr=0.01, optimizer={"use": "adamw", "weight_decay": strength})
        put(WeightDecay(strength), ours)
        for agent in (ours, theirs):
            learn(agent, *range(8))
        close(weights(ours), weights(theirs), 1e-7)
    assert WeightDecay().strength == torch.optim.AdamW([torch.ones(1)]).defaults["weight_decay"]


def penalised(method: Any, formula: Callable[[str, Tensor, Tensor], Any], **net: Any) -> None:
    """The gradient and the value of a penalty are those of a formula of a parameter and its first values."""
    agent = classifier((6, 5), **net)
    first = weights(agent)
    put(method, agent)
    shake(agent)
    for _ in range(400 if isinstance(method, Spectral) else 1):
        change = added(agent)
    penalty = method.strength * sum(formula(n, p, first[n]) for n, p in agent.model.named_parameters())
    close(change, slopes(agent, penalty), 2e-6)
    assert method.numbers()["penalty"] == pytest.approx(float(penalty.detach()), rel=1e-4)


def test_l2_init() -> None:
    penalised(L2Init(0.2), lambda name, w, first: (w - first).square().sum())
    agent = classifier()
    put(L2Init(0.5), agent)
    first = weights(agent)
    shake(agent)
    close(added(agent), {n: 2 * 0.5 * (w - first[n]) for n, w in weights(agent).items()})


def test_wasserstein() -> None:
    penalised(Wasserstein(0.1), lambda n, w, first: (w.flatten().sort()[0] - first.flatten().sort()[0]).square().sum())


def test_wasserstein_of_a_permutation_is_zero() -> None:
    agent = classifier()
    method = put(Wasserstein(1.0), agent)
    with torch.no_grad():
        for value in agent.model.parameters():
            order = torch.randperm(value.numel(), generator=torch.Generator().manual_seed(1))
            value.copy_(value.flatten()[order].view_as(value))
    assert method.numbers()["penalty"] == 0
    assert max(float(change.abs().max()) for change in added(agent).values()) == 0


def test_spectral() -> None:
    def formula(name: str, w: Tensor, first: Tensor) -> Tensor:
        if w.ndim > 1:
            return (torch.linalg.svdvals(w)[0] ** 2 - 1) ** 2
        gain = name in ("1.weight", "4.weight")
        return (w - float(gain)).square().sum()

    penalised(Spectral(0.05), formula, norm="layer")
    assert {"1.weight", "4.weight"} <= set(weights(classifier((6, 5), norm="layer")))


def test_parseval() -> None:
    def formula(name: str, w: Tensor, first: Tensor) -> Any:
        if name not in ("0.weight", "2.weight"):
            return 0.0 * w.sum()
        return (w @ w.T - 2.0 * torch.eye(len(w))).square().sum()

    penalised(Parseval(0.02), formula)


def test_parseval_is_zero_on_scaled_orthogonal_rows() -> None:
    agent = classifier((3, 3))
    put(Parseval(1.0), agent)
    with torch.no_grad():
        for layer in (agent.model[0], agent.model[2]):
            layer.weight.copy_(2**0.5 * torch.linalg.qr(torch.randn(4, 4))[0][:3, : layer.in_features])
        agent.model[2].weight.copy_(2**0.5 * torch.linalg.qr(torch.randn(3, 3))[0])
    assert max(float(change.abs().max()) for change in added(agent).values()) < 1e-5


def test_spectral_norm() -> None:
    agent = classifier((6, 5))
    method = put(SpectralNorm(), agent)
    head = agent.model[4].weight.detach().clone()
    enter(agent, method, visit(1))
    learn(agent, *range(60))
    for layer in (agent.model[0], agent.model[2]):
        assert float(torch.linalg.svdvals(layer.weight.detach())[0]) == pytest.approx(1, abs=1e-5)
    assert torch.equal(agent.model[4].weight, head)
    moving = classifier((6, 5), lr=0.05)
    put(SpectralNorm(), moving)
    learn(moving, *range(40))
    for layer in (moving.model[0], moving.model[2]):
        assert float(torch.linalg.svdvals(layer.weight.detach())[0]) == pytest.approx(1, abs=0.02)


def test_weight_clip() -> None:
    kappa, lr = 0.5, 0.2
    agent = classifier((6, 5), lr=lr, norm="layer")
    put(WeightClip(kappa), agent)
    before, slope = weights(agent), own(agent)
    learn(agent, 0)
    bounds = {"0": kappa / INPUTS**0.5, "3": kappa / 6**0.5, "6": kappa / 5**0.5}
    moved = {n: w - lr * slope[n] for n, w in before.items()}
    clipped = {n: w.clamp(-bounds[n[0]], bounds[n[0]]) if n[0] in bounds else w for n, w in moved.items()}
    assert any((clipped[n] != moved[n]).any() for n in moved)
    close(weights(agent), clipped, 1e-7)
    assert WeightClip().kappa == 2


def test_normalize_and_project() -> None:
    agent = classifier((6, 5), lr=0.3, norm="layer")
    method = NormalizeAndProject()
    method.accepts(agent)
    put(method, agent)
    norms = {n: float(w.norm()) for n, w in weights(agent).items() if w.ndim > 1}
    vectors = {n: w for n, w in weights(agent).items() if w.ndim == 1}
    learn(agent, *range(5))
    found = {name: float(weights(agent)[name].norm()) for name in norms}
    assert list(norms) == ["0.weight", "3.weight", "6.weight"]
    assert [found[name] == pytest.approx(norm, rel=1e-5) for name, norm in norms.items()] == [True, True, False]
    assert all(not torch.equal(weights(agent)[n], w) for n, w in vectors.items())
    with pytest.raises(CrlError, match="norm"):
        NormalizeAndProject().accepts(classifier())


@pytest.mark.parametrize("kind", ["ppo", "dqn"])
@pytest.mark.parametrize("heads", ["shared", "per_task"])
def test_the_scale_of_what_answers_is_free(kind: str, heads: str) -> None:
    agent = player(kind, net={"hidden": [8, 8], "norm": "layer"})
    method = put(NormalizeAndProject(), agent)
    for index, task in enumerate((A, B), 1):
        enter(agent, method, visit(index, task, head=heads))
    answering = ("action_net", "value_net") if kind == "ppo" else ("q_net.q_net.6",)
    assert method.norms and not any(name.startswith(answering) for name in method.norms)
    bodies = 4 if kind == "ppo" else 2
    assert len(method.norms) == bodies


def balance(tmp_path: Any) -> float:
    """The mean return of PPO after 8,192 steps of CartPole; of one that acts at random it is some 22."""
    agent = {"use": "ppo", "learning_rate": 3e-3, "n_steps": 64, "net": {"hidden": [32], "norm": "layer"}}
    tasks, looks = [{"env": "CartPole-v1", "steps": 8192}], {"episodes": 5}
    data = {"tasks": tasks, "agent": agent, "methods": ["normalize_and_project"], "monitors": [], "evaluation": looks}
    return float(crl.train(data, out=tmp_path, overwrite=True).matrix[-1, 0])


def test_learning_survives_normalize_and_project(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A policy whose scale is pinned at the hundredth that it begins with does not come to prefer any action."""
    assert balance(tmp_path) > 100
    monkeypatch.setattr(NormalizeAndProject, "answering", lambda self: ("no layer",))
    assert balance(tmp_path) < 60


def test_hidden_layers_are_all_but_the_last_layer_of_weights() -> None:
    parts = [nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)]
    assert hidden_weights(Bare(nn.Sequential(*parts))) == {"0.weight"}
    assert hidden_weights(Bare(nn.Sequential(*parts, nn.LogSoftmax(1)))) == {"0.weight"}


# Features of high rank.


def numpy_rank(matrix: Any) -> float:
    s = np.linalg.svd(np.asarray(matrix, float), compute_uv=False)
    p = s[s > 1e-12 * s[0]] / s.sum()
    return float(np.exp(-(p * np.log(p)).sum()))


def test_rank_to_raise_is_the_effective_rank() -> None:
    generator = torch.Generator().manual_seed(0)
    for shape in ((20, 5), (5, 20), (7, 7), (40, 1), (256, 30)):
        matrix = torch.randn(shape, generator=generator).relu() + 0.01
        raised = float(effective_rank_to_raise(matrix))
        assert raised == pytest.approx(effective_rank(matrix), abs=1e-6)
        assert raised == pytest.approx(numpy_rank(matrix), abs=1e-6)


def awkward() -> dict[str, Tensor]:
    torch.manual_seed(0)
    dead = torch.randn(12, 5).relu()
    dead[:, 1] = 0
    repeated = torch.linalg.qr(torch.randn(12, 5))[0] * torch.tensor([3.0, 3.0, 1.0, 1.0, 1.0])
    return {
        "rank one": torch.outer(torch.arange(1.0, 13.0), torch.arange(1.0, 6.0)),
        "zero": torch.zeros(12, 5),
        "identity": torch.eye(5),
        "repeated": repeated,
        "dead unit": dead,
        "twins": torch.randn(12, 2).repeat(1, 3),
        "wide": torch.ones(3, 9),
    }


@pytest.mark.parametrize("name", awkward())
def test_rank_has_a_finite_gradient(name: str) -> None:
    matrix = awkward()[name].requires_grad_()
    (slope,) = torch.autograd.grad(effective_rank_to_raise(matrix), matrix)
    assert torch.isfinite(slope).all()
    wanted = {"rank one": 1, "zero": 0, "identity": 5, "dead unit": None, "repeated": None, "twins": None, "wide": 1}
    if wanted[name] is not None:
        assert float(effective_rank_to_raise(matrix.detach())) == pytest.approx(wanted[name], abs=1e-5)


def check_rise() -> None:
    """A step moves weights by lr times a numerical gradient of the rank of features, which numpy works out."""
    lr = 0.5
    agent = classifier()
    method = put(ERank(lr=lr, every=1), agent)
    before, obs = weights(agent), pairs(0).obs.double().numpy()
    learn(agent, 0)

    def rank(w: Any, b: Any) -> float:
        return numpy_rank(np.maximum(obs @ w.T + b, 0))

    w, b = before["0.weight"].double().numpy(), before["0.bias"].double().numpy()
    moved = {n: (weights(agent)[n] - before[n]).double().numpy() for n in before}
    size = 1e-5
    for i, j in itertools.product(range(6), range(INPUTS)):
        nudge = np.zeros_like(w)
        nudge[i, j] = size
        slope = (rank(w + nudge, b) - rank(w - nudge, b)) / (2 * size)
        assert moved["0.weight"][i, j] == pytest.approx(lr * slope, abs=2e-5)
    assert np.abs(moved["0.weight"]).max() > 1e-3
    assert not moved["2.weight"].any() and not moved["2.bias"].any()
    assert method.done["steps"] == 1


def test_erank_steps_along_the_gradient_of_the_rank() -> None:
    check_rise()


def test_erank_of_squared_singular_values_would_be_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = ranks.entropy_rank
    monkeypatch.setattr(ranks, "entropy_rank", lambda values: plain(values.square()))
    with pytest.raises(AssertionError):
        check_rise()


def test_rank_gradient_equals_finite_differences() -> None:
    torch.manual_seed(0)
    for shape in ((9, 4), (4, 9)):
        matrix = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(effective_rank_to_raise, (matrix,))


@pytest.mark.parametrize("layers", ["all", "last"])
def test_erank_raises_what_the_monitor_reads(layers: str) -> None:
    torch.manual_seed(0)
    for agent in (classifier((6, 5)), player("ppo"), player("dqn")):
        method = put(ERank(layers=layers), agent)
        method.block = [rows()]
        seen = features.ERank(layers=layers).look(SimpleNamespace(agent=agent, batch=rows()))
        networks = {name.partition("/")[0] for name in seen}
        means = [np.mean([v for n, v in seen.items() if n.startswith(f"{network}/")]) for network in networks]
        assert float(method.rank().detach()) == pytest.approx(sum(means), abs=1e-6)
        assert len(networks) == (2 if isinstance(agent, PPO) else 1)
        assert len(seen) == len(networks) * (2 if layers == "all" else 1)


def test_one_erank_step_raises_the_rank() -> None:
    agent = classifier((6, 5))
    method = put(ERank(lr=1e-3, every=1), agent)
    learn(agent, 0)
    before = method.numbers()["rank"]
    assert float(method.rank().detach()) > before + 1e-7


def test_moments_do_not_see_erank() -> None:
    ours, plain = (classifier((6, 5), lr=0.01, optimizer={"use": "adam"}) for _ in range(2))
    put(ERank(lr=0.1, every=3, samples=256), ours)
    for agent in (ours, plain):
        learn(agent, 0, 1, 2)
    for left, right in zip(ours.optimizers[0].state.values(), plain.optimizers[0].state.values(), strict=True):
        assert all(torch.equal(left[key], right[key]) for key in ("step", "exp_avg", "exp_avg_sq"))
    assert not torch.equal(ours.model[0].weight, plain.model[0].weight)
    assert torch.equal(ours.model[4].weight, plain.model[4].weight)


def test_erank_skips_and_counts_what_is_not_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, plain = classifier(lr=0.1), classifier(lr=0.1)
    method = put(ERank(lr=0.1, every=1), ours)
    monkeypatch.setattr(method, "rank", lambda: sum(p.sum() for p in ours.model.parameters()) * math.nan)
    for agent in (ours, plain):
        learn(agent, 0, 1)
    same(weights(ours), weights(plain))
    assert method.numbers()["skipped"] == 2
    assert "skipped" not in method.numbers()


def test_erank_on_features_that_are_all_dead() -> None:
    agent = classifier()
    method = put(ERank(lr=0.1, every=1), agent)
    with torch.no_grad():
        agent.model[0].bias.fill_(-100)
    before = weights(agent)
    learn(agent, 0)
    same(weights(agent), before)
    assert method.numbers().get("rank", 0) == 0


def test_erank_every_and_samples() -> None:
    agent = classifier(lr=0.01)
    method = put(ERank(lr=0.1, every=3, samples=20), agent)
    learn(agent, *range(10), count=8)
    assert method.numbers()["steps"] == 3
    stream = np.concatenate([pairs(seed, 8).obs for seed in range(10)])
    assert np.array_equal(torch.cat([part["obs"] for part in method.block]).numpy(), stream[-20:])
    ours, plain = classifier(lr=0.01), classifier(lr=0.01)
    put(ERank(lr=0.1, every=3, samples=256), ours)
    for agent in (ours, plain):
        learn(agent, 0, 1)
    same(weights(ours), weights(plain))


@pytest.mark.parametrize(
    ("kind", "l2_er", "alone"),
    [
        ("classifier", (1e-3, 5, 500), 1e-4),  # incremental CIFAR-100: five batches of 100
        ("ppo", (1e-6, 2, 2048), 1e-7),  # Slippery Ant: the rollout, once an epoch
        ("dqn", (1e-6, 64, 2048), 1e-7),  # 2,048 rows in batches of 32
    ],
)
def test_what_is_not_said_of_l2_er_is_the_authors_for_the_agent(
    kind: str, l2_er: tuple[Any, ...], alone: float
) -> None:
    """The authors' code: er_lr, er_batch and wd of arXiv 2509.22335 on Slippery Ant and incremental CIFAR-100."""
    for accepts in (True, False):
        both, one, told = L2ER(), ERank(), L2ER(l2=0.5, lr=0.1, every=7, samples=9)
        agents = [learner(kind) for _ in range(3)]
        for method, agent in zip((both, one, told), agents, strict=True):
            if accepts:
                method.accepts(agent)
            put(method, agent)
        assert (both.erank.lr, both.erank.every, both.erank.samples) == l2_er
        assert (one.lr, one.every, one.samples) == (alone, *l2_er[1:])
        assert (told.erank.lr, told.erank.every, told.erank.samples) == (0.1, 7, 9)
        assert both.parts["l2"].strength == 1e-3 and told.parts["l2"].strength == 0.5


def test_erank_once_an_epoch_asks_the_agent() -> None:
    method = ERank(every="epoch")
    method.accepts(player("ppo"))
    assert method.every == 2  # 8 steps of 4 copies, in minibatches of 16
    with pytest.raises(CrlError, match="epoch"):
        ERank(every="epoch").accepts(classifier())


@pytest.mark.parametrize("samples", [100, 20])
def test_erank_as_a_term_of_the_loss(samples: int) -> None:
    agent = classifier((6, 5))
    lr = 0.2
    method = put(ERank(lr=lr, every=2, how="loss", samples=samples), agent)
    assert max(float(change.abs().max()) for change in added(agent, 0).values()) == 0
    change = added(agent, 1)
    latest = torch.from_numpy(np.concatenate([pairs(0).obs, pairs(1).obs])[-samples:])
    first = agent.model[:2](latest)
    second = agent.model[2:4](first)
    rank = (effective_rank_to_raise(first) + effective_rank_to_raise(second)) / 2
    close(change, {n: -lr * g for n, g in slopes(agent, rank).items()})
    assert method.numbers()["rank"] == pytest.approx(float(rank.detach()))


def test_l2_er_is_l2_and_erank() -> None:
    one, two, plain = (classifier((6, 5), lr=0.01, optimizer={"use": "adam"}) for _ in range(3))
    put(L2ER(l2=0.1, lr=0.05, every=2), one)
    put(L2(0.1), two)
    put(ERank(0.05, every=2), two)
    put(L2ER(l2=0.0, lr=0.0), plain)
    bare = classifier((6, 5), lr=0.01, optimizer={"use": "adam"})
    for agent in (one, two, plain, bare):
        learn(agent, *range(6))
    same(weights(one), weights(two))
    same(weights(plain), weights(bare))
    assert not torch.equal(one.model[0].weight, bare.model[0].weight)


# Renewal.


def test_shrink_perturb_has_the_right_moments() -> None:
    keep, noise, draws = 0.6, 0.5, 400
    agent = classifier((10,))
    method = put(ShrinkPerturb(keep, noise), agent)
    first = weights(agent)
    shake(agent)
    old = weights(agent)
    enter(agent, method, visit(1))
    same(weights(agent), old)
    found: dict[str, list[Tensor]] = {name: [] for name in old}
    for _ in range(draws):
        agent.model.load_state_dict(old)
        enter(agent, method, visit(2))
        for name, value in weights(agent).items():
            found[name].append(value)
    for name, values in found.items():
        drawn, w0 = torch.stack(values).double(), first[name].double()
        spread = noise * w0.std(correction=0)
        wanted = keep * old[name].double() + noise * w0.mean()
        assert float((drawn.mean(0) - wanted).abs().max()) < 5.5 * float(spread) / draws**0.5
        centred = (w0 - w0.mean()) / w0.std(correction=0)
        error = float(((centred**4).mean() - 1) / drawn.numel()) ** 0.5
        variance = float((drawn - wanted).square().mean() / spread**2)
        assert abs(variance - 1) < 5 * error + 1e-6
    assert (ShrinkPerturb().keep, ShrinkPerturb().noise) == (0.4, 0.1)


def test_shrink_perturb_every_step_without_noise() -> None:
    agent = classifier()
    put(ShrinkPerturb(0.9, 0.0, every="step"), agent)
    before = weights(agent)
    learn(agent, 0, 1)
    close(weights(agent), {n: 0.81 * w for n, w in before.items()}, 1e-7)


def renewed(
    before: Weights, after: Weights, into: str, out: str, units: list[int], columns: Any, first: Weights
) -> None:
    """Of a layer and the one that reads it: new incoming weights, no outgoing ones, all else as it was."""
    rest = [i for i in range(len(before[f"{into}.weight"])) if i not in units]
    for kind in ("weight", "bias"):
        assert torch.equal(after[f"{into}.{kind}"][rest], before[f"{into}.{kind}"][rest])
    drawn = after[f"{into}.weight"][units]
    assert torch.isin(drawn, first[f"{into}.weight"]).all()
    assert not torch.equal(drawn, before[f"{into}.weight"][units])
    assert torch.equal(after[f"{into}.bias"][units], first[f"{into}.bias"][units])
    gone = [c for unit in units for c in columns(unit)]
    stay = [c for c in range(before[f"{out}.weight"].shape[1]) if c not in gone]
    assert not after[f"{out}.weight"][:, gone].any()
    assert torch.equal(after[f"{out}.weight"][:, stay], before[f"{out}.weight"][:, stay])


def test_redo_renews_dormant_units_and_no_others() -> None:
    agent = classifier((8, 7))
    method = put(ReDo(tau=0.1, every=2), agent)
    first = weights(agent)
    with torch.no_grad():
        agent.model[0].bias[[1, 4]] = -100
        agent.model[0].weight[6] *= 1e-4
        agent.model[0].bias[6] = 1e-4
        agent.model[2].bias += 2
    learn(agent, 0)
    before = weights(agent)
    batch = agent.prepare(pairs(1))
    h = agent.model[:2](batch["obs"]).abs().mean(0)
    deep = agent.model[:4](batch["obs"]).abs().mean(0)
    units = torch.nonzero(h / h.mean() <= 0.1)[:, 0].tolist()
    below = torch.nonzero(deep / deep.mean() <= 0.1)[:, 0].tolist()
    assert {1, 4, 6} <= set(units) and not below
    share = features.Dormant(tau=0.1).look(SimpleNamespace(agent=agent, batch=batch))["model/dormant"]
    assert share * 15 == pytest.approx(len(units))
    learn(agent, 1)
    after = weights(agent)
    renewed(before, after, "0", "2", units, lambda unit: [unit], first)
    same(after, {n: before[n] for n in ("2.bias", "4.weight", "4.bias")})
    assert method.numbers()["renewed"] == len(units)
    assert (ReDo().tau, ReDo().every) == (0.025, 1000)


def test_redo_through_a_convolution_and_a_flattening() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 9, 6), nn.ReLU(), nn.Linear(6, CLASSES)
    )
    agent = Bare(model)
    method = put(ReDo(every=1), agent)
    first = weights(agent)
    with torch.no_grad():
        model[0].bias[2] = -100
        model[3].bias += 1
    before = weights(agent)
    images, labels = torch.randn(10, 1, 5, 5), torch.arange(10) % CLASSES
    h = model[:2](images).abs().mean((0, 2, 3))
    deep = model[:5](images).abs().mean(0)
    assert torch.nonzero(h / h.mean() <= 0.025)[:, 0].tolist() == [2]
    assert (deep / deep.mean() > 0.025).all()
    agent.learn(images, labels)
    after = weights(agent)
    renewed(before, after, "0", "3", [2], lambda unit: range(9 * unit, 9 * unit + 9), first)
    same(after, {n: before[n] for n in ("3.bias", "5.weight", "5.bias")})
    assert method.numbers()["renewed"] == 1


def test_redo_where_activations_double() -> None:
    agent = classifier((16,), activation="crelu")
    put(ReDo(every=1), agent)
    first = weights(agent)
    with torch.no_grad():
        agent.model[0].weight[3], agent.model[0].bias[3] = 0, 0  # dead both ways
        agent.model[0].bias[5] = -3  # dead one way only
    before = weights(agent)
    learn(agent, 0)
    renewed(before, weights(agent), "0", "2", [3], lambda unit: [unit, unit + 8], first)


def test_what_is_renewed_moves_as_a_new_adam_would() -> None:
    torch.manual_seed(0)
    whole, twin = (nn.Parameter(torch.zeros(3, 4)) for _ in range(2))
    adam, other = torch.optim.Adam([whole], lr=0.01), torch.optim.Adam([twin], lr=0.01)
    young = Young()

    def step(parameter: nn.Parameter, optimizer: Any, slope: Tensor, held: bool) -> None:
        parameter.grad = slope.clone()
        with torch.no_grad():
            if held:
                young.before({"w": parameter})
            optimizer.step()
            if held:
                young.after({"w": parameter}, optimizer)

    for _ in range(60):
        slope = torch.randn(3, 4)
        step(whole, adam, slope, True)
        step(twin, other, slope, False)
    with torch.no_grad():
        whole[0] = 0.5
        young.begin("w", whole, torch.tensor([0]), adam)
    fresh = nn.Parameter(torch.full((1, 4), 0.5))
    new = torch.optim.Adam([fresh], lr=0.01)
    for _ in range(30):
        slope = torch.randn(3, 4)
        step(whole, adam, slope, True)
        step(twin, other, slope, False)
        step(fresh, new, slope[:1], False)
        assert_close(whole[:1], fresh, atol=2e-6, rtol=0)
    assert torch.equal(whole[1:], twin[1:])


class Dohare:
    """Continual backprop's utility, age and mean of one hidden layer, in numpy."""

    def __init__(self, units: int, decay: float, kind: str = "contribution") -> None:
        self.kind = kind
        self.decay, self.u, self.f, self.a = decay, np.zeros(units), np.zeros(units), np.zeros(units)

    def see(self, h: Any, made: Any, read: Any) -> None:
        self.a += 1
        self.f = self.decay * self.f + (1 - self.decay) * h.mean(0)
        if self.kind == "contribution":  # equation 1 of the Nature paper
            worth = np.array(
                [np.mean([abs(row[i]) for row in h]) * sum(map(abs, read[:, i])) for i in range(len(made))]
            )
        else:
            worth = np.abs(read).mean(0) * np.abs(h - self.mean).mean(0) / np.abs(made).mean(1)
        self.u = self.decay * self.u + (1 - self.decay) * worth

    @property
    def mean(self) -> Any:
        return self.f / (1 - self.decay**self.a)

    @property
    def worth(self) -> Any:
        return self.u / (1 - self.decay**self.a)


def follow(agent: Classifier, oracle: Dohare, seed: int) -> None:
    h = agent.model[:2](agent.prepare(pairs(seed))["obs"]).detach().double().numpy()
    learn(agent, seed)
    layers = [agent.model[i].weight.detach().double().numpy() for i in (0, 2)]
    oracle.see(h, *layers)


@pytest.mark.parametrize("kind", ["contribution", "adaptable"])
def test_cbp_utility(kind: str) -> None:
    agent = classifier((8,), lr=0.2)
    said = {} if kind == "contribution" else {"utility": kind}
    method = put(CBP(rate=1e-9, maturity=3, decay=0.9, **said), agent)
    oracle = Dohare(8, 0.9, kind)
    for seed in range(7):
        follow(agent, oracle, seed)
        assert method.utility["0"].numpy() == pytest.approx(oracle.u, rel=1e-4, abs=1e-7)
        assert method.corrected_mean("0")[:, 0].numpy() == pytest.approx(oracle.mean, rel=1e-4, abs=1e-6)
    assert (CBP().rate, CBP().maturity, CBP().decay) == (1e-4, 1000, 0.99)


def check_fold() -> None:
    """At a replacement the output changes by what folding predicts."""
    agent = classifier((8,))
    method = put(CBP(rate=1 / 8, maturity=4, decay=0.9), agent)
    oracle, before = Dohare(8, 0.9), weights(agent)
    for seed in range(4):
        follow(agent, oracle, seed)
        same(weights(agent), before)  # units are young
    h = agent.model[:2](agent.prepare(pairs(4))["obs"]).detach().double().numpy()
    oracle.see(h, before["0.weight"].double().numpy(), before["2.weight"].double().numpy())
    unit = int(oracle.worth.argmin())
    with torch.no_grad():
        seen = agent.model[:2](rows()["obs"])
        seen[:, unit] = float(oracle.mean[unit])
        predicted = agent.model[2](seen)
    learn(agent, 4)
    assert method.done["renewed"] == 1
    assert method.age["0"][unit] == 0 and not weights(agent)["2.weight"][:, unit].any()
    assert float((weights(agent)["2.bias"] - before["2.bias"]).abs().max()) > 1e-4
    assert_close(answers(agent), predicted, atol=1e-6, rtol=0)


def test_cbp_replaces_the_unit_of_least_contribution() -> None:
    """A unit that is far from zero but hardly varies: by equation 1 it stays, by the adaptable utility it goes."""
    for kind, gone in (("contribution", 1), ("adaptable", 0)):
        agent = classifier((2,))
        method = put(CBP(rate=0.5, maturity=0, utility=kind), agent)
        with torch.no_grad():
            agent.model[0].weight.copy_(torch.tensor([[0.01] * 4, [0.1, 0.0, 0.0, 0.0]]))
            agent.model[0].bias.copy_(torch.tensor([5.0, 0.5]))
            agent.model[2].weight.fill_(1.0)
        learn(agent, 0)
        assert method.age["0"].tolist() == [float(i != gone) for i in range(2)], kind


def test_cbp_folds_the_mean_of_what_it_replaces() -> None:
    check_fold()


@pytest.mark.parametrize("wrong", ["mean not corrected", "nothing folded", "the most useful"])
def test_wrong_folds_would_be_caught(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, least = CBP.renew, CBP.renew_least
    if wrong == "mean not corrected":
        monkeypatch.setattr(CBP, "corrected_mean", lambda self, name: self.mean[name])
    elif wrong == "nothing folded":
        monkeypatch.setattr(CBP, "renew", lambda self, layer, units, fold: plain(self, layer, units))
    else:

        def most(self: Any, layer: Any) -> None:
            self.utility = {name: -value for name, value in self.utility.items()}
            least(self, layer)
            self.utility = {name: -value for name, value in self.utility.items()}

        monkeypatch.setattr(CBP, "renew_least", most)
    with pytest.raises(AssertionError):
        check_fold()


def test_cbp_replaces_its_share_of_the_mature() -> None:
    rate, maturity = 0.013, 5
    agent = classifier((10,), lr=0.01)
    method = put(CBP(rate, maturity), agent)
    ages, due, total = [0] * 10, 0.0, 0
    for seed in range(150):
        learn(agent, seed % 7, count=4)
        ages = [age + 1 for age in ages]
        mature = [i for i in range(10) if ages[i] > maturity]
        due += rate * len(mature)
        while due - total >= 1:
            ages[mature.pop()] = 0
            total += 1
        assert abs(method.done.get("renewed", 0) - due) < 1 + 1e-9
        assert sorted(method.age["0"].tolist()) == sorted(ages)
    assert total > 10


@pytest.mark.parametrize("layers", [1, 2])
def test_head_reset(layers: int) -> None:
    agent = classifier((6, 5), lr=0.01, optimizer={"use": "adam"})
    first = weights(agent)
    method = put(HeadReset(layers, same=True), agent)
    enter(agent, method, visit(1))
    learn(agent, 0, 1, 2)
    trained = weights(agent)
    enter(agent, method, visit(2))
    last = ("4.",) if layers == 1 else ("2.", "4.")
    same(weights(agent), {n: first[n] if n.startswith(last) else w for n, w in trained.items()})
    state = agent.optimizers[0].state
    for name, value in agent.model.named_parameters():
        assert (value in state) != name.startswith(last)
        assert not torch.equal(trained[name], first[name])
    learn(agent, 3)
    assert {float(state[p]["step"]) for p in agent.model[4].parameters()} == {1.0}


def test_reset_makes_a_new_learner() -> None:
    agent, new = (classifier((6, 5), lr=0.01, optimizer={"use": "adam"}) for _ in range(2))
    method = put(Reset(same=True), agent)
    enter(agent, method, visit(1))
    learn(agent, 0, 1)
    enter(agent, method, visit(2))
    assert not agent.optimizers[0].state
    for learner in (agent, new):
        learn(learner, 5, 6)
    same(weights(agent), weights(new))


def test_head_reset_of_actor_and_critic() -> None:
    agent = player("ppo")
    first = weights(agent)
    method = put(HeadReset(same=True), agent)
    enter(agent, method, visit(1))
    live(agent, 16)
    trained = weights(agent)
    enter(agent, method, visit(2))
    heads = ("action_net.", "value_net.")
    same(weights(agent), {n: first[n] if n.startswith(heads) else w for n, w in trained.items()})


@pytest.mark.parametrize("kind", ["classifier", "ppo"])
def test_resets_draw_other_weights_each_time(kind: str) -> None:
    """Seeded, from the first weights' own distribution: an orthogonal matrix stays one, and a norm layer's stay 1."""

    def drawn(seed: int) -> list[Weights]:
        agent = learner(kind)
        found = [weights(agent)]
        method = put(Reset(), agent)
        method.reseed(seed)
        for index in (1, 2, 3):
            enter(agent, method, visit(index))
            found.append(weights(agent))
        same(found[1], found[0])
        return [found[0], *found[2:]]

    one, again, other = drawn(5), drawn(5), drawn(6)
    for mine, equal in zip(one, again, strict=True):
        same(mine, equal)
    for name, first in one[0].items():
        draws = [one[1][name], one[2][name], other[1][name]]
        if first.ndim > 1:
            assert all(not torch.equal(a, b) for a, b in itertools.combinations([first, *draws], 2)), name
        for value in draws:
            assert_close(value.abs().flatten().sort().values, first.abs().flatten().sort().values)
            if first.ndim > 1:
                spectra = torch.linalg.svdvals(value.flatten(1)), torch.linalg.svdvals(first.flatten(1))
                assert_close(*spectra, atol=1e-5, rtol=1e-5)


def test_reset_makes_the_target_network_anew() -> None:
    agent = player("dqn")
    method = put(Reset(), agent)
    enter(agent, method, visit(1))
    live(agent, 16)
    enter(agent, method, visit(2))
    q, target = (net.state_dict() for net in (agent.algo.q_net, agent.algo.q_net_target))
    same(target, q)


def learner(kind: str) -> Any:
    return classifier((6, 5), lr=0.1) if kind == "classifier" else player(kind)


def train(agent: Any, seed: int = 0) -> None:
    if isinstance(agent, Classifier):
        learn(agent, *range(seed, seed + 4))
    else:
        live(agent, 16, seed)


@pytest.mark.parametrize("kind", ["classifier", "dqn", "ppo"])
def test_plasticity_injection_changes_nothing_at_first(kind: str) -> None:
    agent = learner(kind)
    method = PlasticityInjection()
    method.accepts(agent)
    put(method, agent)
    enter(agent, method, visit(1))
    train(agent)
    before = answers(agent)
    enter(agent, method, visit(2))
    assert float((answers(agent) - before).abs().max()) < 1e-6
    parts = [part for part in agent.model.modules() if isinstance(part, Beside)]
    assert len(parts) >= 2
    held = [copy.deepcopy(part.state_dict()) for part in parts]
    for part in parts:
        same(part.still.state_dict(), part.live.state_dict())
        assert not torch.equal(part.live.weight, part.old.weight)
    train(agent, 7)
    learned = [part for part in agent.model.modules() if isinstance(part, Beside)]
    for part, then in zip(parts, held, strict=True):
        assert any(part is other for other in learned)
        now = part.state_dict()
        same({n: now[n] for n in now if not n.startswith("live")}, {n: then[n] for n in then if n[:4] != "live"})
    assert any(not torch.equal(part.live.weight, then["live.weight"]) for part, then in zip(parts, held, strict=True))
    assert float((answers(agent) - before).abs().max()) > 1e-5


def test_plasticity_injection_where_the_answer_is_squashed() -> None:
    torch.manual_seed(0)
    agent = Bare(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3), nn.Tanh()))
    method = put(PlasticityInjection(), agent)
    before = answers(agent)
    method.enter(visit(2))
    assert_close(answers(agent), before, atol=1e-6, rtol=0)


# A part of the network for each task.


def test_progressive_columns_never_change() -> None:
    agent = classifier((6, 5), lr=0.05, optimizer={"use": "adam"})
    method = put(Progressive(), agent)
    kept: dict[str, Tensor] = {}
    for index, task in enumerate((A, B, C), 1):
        enter(agent, method, visit(index, task))
        learn(agent, *range(index, index + 5))
        for earlier in (A, B, C)[: index - 1]:
            assert torch.equal(answers(agent, earlier), kept[earlier.name])
        kept[task.name] = answers(agent, task)
        assert torch.equal(answers(agent), kept[task.name])
    assert len({tuple(value.flatten().tolist()) for value in kept.values()}) == 3
    columns = [part for part in agent.model.modules() if isinstance(part, Columns)]
    assert [tuple(column.weight.shape) for column in columns[1].columns] == [(5, 6), (5, 12), (5, 18)]


def test_progressive_reads_earlier_columns() -> None:
    agent = classifier((6, 5), lr=0.05)
    method = put(Progressive(), agent)
    enter(agent, method, visit(1, A))
    learn(agent, 0, 1)
    enter(agent, method, visit(2, B))
    layers = [part for part in agent.model.modules() if isinstance(part, Columns)]
    for layer, width in ((layers[1], 6), (layers[2], 5)):
        assert not layer.columns[1].weight[:, :width].any()
        assert torch.isin(layer.columns[1].weight[:, width:], layer.columns[1].weight.new_tensor(0)).sum() == 0
    learn(agent, 2)
    for layer, width in ((layers[1], 6), (layers[2], 5)):
        assert float(layer.columns[1].weight.grad[:, :width].abs().max()) > 0
    assert all(p.grad is None for p in layers[0].columns[0].parameters())


@pytest.mark.parametrize("kind", ["dqn", "ppo"])
def test_progressive_players(kind: str) -> None:
    agent = player(kind)
    method = put(Progressive(), agent)
    enter(agent, method, visit(1, A))
    live(agent, 16)
    kept = answers(agent, A)
    enter(agent, method, visit(2, B))
    live(agent, 16, 1)
    assert torch.equal(answers(agent, A), kept)
    assert not torch.equal(answers(agent, B), kept)


def test_packnet_keeps_earlier_tasks_to_the_bit() -> None:
    agent = classifier((10, 8), lr=0.02, optimizer={"use": "adam"}, norm="layer")
    method = put(PackNet(share=0.4, prune_at=0.75), agent)
    kept: dict[str, Tensor] = {}
    free = {n: w.numel() for n, w in weights(agent).items() if w.ndim > 1}
    for index, task in enumerate((A, B, C), 1):
        step = visit(index, task, steps=8 * 16)
        enter(agent, method, step)
        for seed in range(8):
            learn(agent, 10 * index + seed)
            assert method.pruned == (seed >= 5)
        method.leave(step)
        for name, count in free.items():
            held = round(0.4 * count)
            assert int((method.owner[name] == index).sum()) == held
            free[name] = count - held
        for earlier in (A, B, C)[: index - 1]:
            assert torch.equal(answers(agent, earlier), kept[earlier.name])
        kept[task.name] = answers(agent, task)
    assert not torch.equal(kept["a"], kept["b"])
    total = sum(w.numel() for w in weights(agent).values() if w.ndim > 1)
    assert method.numbers()["free"] == pytest.approx(sum(free.values()) / total)


def test_packnet_gives_each_of_ten_tasks_a_tenth() -> None:
    agent = classifier((20, 30), lr=0.01, optimizer={"use": "adam"})
    method = put(PackNet(), agent)
    for index in range(1, 11):
        step = replace(visit(index, Pairs(f"task {index}", index)), tasks=10)
        enter(agent, method, step)
        learn(agent, index)
        method.leave(step)
    for name, owner in method.owner.items():
        shares = [float((owner == index).float().mean()) for index in range(1, 11)]
        assert shares == pytest.approx([0.1] * 10, abs=1.01 / owner.numel()), name
    with pytest.raises(CrlError, match="share: equal needs the number of tasks"):
        put(PackNet(), classifier()).enter(visit(1))


def test_packnet_prunes_the_optimizer_too() -> None:
    """The first step after pruning is a new Adam's on what was kept, and so is the next visit's first step."""
    agent = classifier((6, 5), lr=0.01, optimizer={"use": "adam"})
    method = put(PackNet(share=0.5, prune_at=0.5), agent)
    step = visit(1, A, steps=16 * 4)
    enter(agent, method, step)
    learn(agent, 0, 1)
    assert method.pruned
    new = torch.optim.Adam([nn.Parameter(value) for value in weights(agent).values()], lr=0.01)
    learn(agent, 2)
    for value, parameter in zip(new.param_groups[0]["params"], agent.model.parameters(), strict=True):
        value.grad = parameter.grad.clone()
    new.step()
    for value, (name, mine) in zip(new.param_groups[0]["params"], weights(agent).items(), strict=True):
        kept = method.owner[name] == 1 if name in method.owner else torch.ones_like(mine, dtype=torch.bool)
        assert_close(mine[kept], value[kept], atol=1e-7, rtol=0)
    method.leave(step)
    assert not any(value.any() for state in agent.optimizers[0].state.values() for value in state.values())


def test_packnet_keeps_the_largest() -> None:
    agent = classifier((10,), lr=0.1)
    method = put(PackNet(share=0.5), agent)
    step = visit(1, A, steps=10**6)
    enter(agent, method, step)
    learn(agent, 0, 1)
    trained = agent.model[0].weight.detach().clone()
    method.leave(step)
    least = trained.abs().flatten().sort(descending=True).values[19]
    assert torch.equal(agent.model[0].weight, torch.where(trained.abs() >= least, trained, 0.0))


@pytest.mark.parametrize("order", [[A, B, A], [A, A], [A, B, B]], ids=["a-b-a", "a-a", "a-b-b"])
def test_packnet_when_a_task_comes_again(order: list[Pairs]) -> None:
    """It learns on with its own weights if it is the latest; if later ones have been learned, nothing moves."""
    agent = classifier((10,), lr=0.1)
    method = put(PackNet(share=0.5, prune_at=0.0), agent)
    for index, task in enumerate(order, 1):
        before, owner = weights(agent), copy.deepcopy(method.owner)
        step = visit(index, task)
        enter(agent, method, step)
        first = answers(agent, A)
        learn(agent, *range(index, index + 4))
        method.leave(step)
    after, own_number = weights(agent), [A, B].index(order[-1]) + 1
    for name, then in before.items():
        moved = after[name] != then
        if name not in owner or order == [A, B, A]:
            assert not moved.any()
        else:
            assert moved.any() and not moved[owner[name] != own_number].any()
    same(method.owner, owner)
    assert torch.equal(answers(agent, A), first) == (order != [A, A])


# Anchors.


def fisher(agent: Classifier, task: Pairs) -> Weights:
    """The mean over samples of the sum over classes of p * (gradient of log p)^2."""
    obs = agent.prepare(task.sample(agent, 0, 0))["obs"]
    total = {name: torch.zeros_like(value) for name, value in weights(agent).items()}
    for row in obs:
        for c in range(CLASSES):
            logs = agent.model(row[None]).log_softmax(1)[0]
            slope = slopes(agent, logs[c])
            for name in total:
                total[name] += float(logs[c].detach().exp()) * slope[name].square() / len(obs)
    return total


def importance(method: Any, name: str) -> Weights:
    found: Weights = method.anchors[name]["importance"]
    return found


def check_fisher() -> None:
    agent = classifier((6, 5), activation="tanh", lr=0.1)
    method = put(EWC(), agent)
    enter(agent, method, visit(1))
    learn(agent, 0, 1)
    method.leave(visit(1))
    close(importance(method, "a"), fisher(agent, A), 1e-6)


def test_ewc_importance_is_the_fisher_information() -> None:
    check_fisher()


def test_the_fisher_information_of_many_classes_of_which_few_can_be_the_answer() -> None:
    """Against the sum over 200 classes in float64; float32's `eigh` does not converge on most of these matrices."""
    classes, active, rows = 200, 20, 6
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randperm(classes, generator=generator)[:active]
    answers = torch.zeros(classes, dtype=torch.bool).index_fill_(0, chosen, True)

    class Few(Pairs):
        def sample(self, agent: Any, seed: int, size: int) -> Labelled:
            return Labelled(3 * torch.randn(rows, INPUTS, generator=generator.manual_seed(1)), chosen[:rows], answers)

    interface = Interface(spaces.Box(-np.inf, np.inf, (INPUTS,)), spaces.Discrete(classes))
    agent = Classifier(interface, 0, "cpu", net={"hidden": [5], "activation": "tanh"})
    agent.met, task = chosen.tolist(), Few("few", 0)
    shake(agent, by=1.0)
    method = put(EWC(), agent)
    method.leave(visit(1, task))
    found, exact = importance(method, "few"), copy.deepcopy(agent.model).double()
    total = {name: torch.zeros_like(value) for name, value in exact.named_parameters()}
    for row in task.sample(agent, 0, 0).obs.double():
        logs = exact(row[None])[0].masked_fill(~answers, -torch.inf).log_softmax(0)
        for c in chosen.tolist():
            slope = torch.autograd.grad(logs[c], [*exact.parameters()], retain_graph=True)
            for name, part in zip(total, slope, strict=True):
                total[name] += float(logs[c].detach().exp()) * part.square() / rows
    assert set(found) == set(total)
    for name, wanted in total.items():
        assert_close(found[name].double(), wanted, rtol=1e-4, atol=1e-9, msg=name)
    assert (found["2.bias"] > 0).sum() == active


def test_a_factor_takes_as_many_steps_as_the_rank() -> None:
    generator = torch.Generator().manual_seed(0)
    for rank in (0, 1, 3, 7):
        root = torch.randn(7, rank, generator=generator, dtype=torch.float64)
        found = factor(root @ root.T)
        assert found.shape == (7, rank)
        assert_close(found @ found.T, root @ root.T)


@pytest.mark.parametrize("wrong", ["metric", "batch"])
def test_wrong_fishers_would_be_caught(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if wrong == "metric":
        monkeypatch.setattr(Classifier, "metric", lambda self, out, batch: torch.diag_embed(out.softmax(1)))
    else:

        def squared(self: Any, visit: Any, directions: Any, take: Any) -> Weights:
            plain = EWC.__mro__[1].per_sample(self, visit, directions, lambda part: part)
            return {name: value.square() for name, value in plain.items()}

        monkeypatch.setattr(EWC, "per_sample", squared, raising=False)
    with pytest.raises(AssertionError):
        check_fisher()


def test_ewc_penalty_is_quadratic_and_anchors_add() -> None:
    agent = classifier((6, 5), activation="tanh")
    strength = 2.0
    method = put(EWC(strength), agent)
    wanted = {name: torch.zeros_like(value) for name, value in weights(agent).items()}
    anchors = []
    for index, task in enumerate((A, B), 1):
        enter(agent, method, visit(index, task))
        shake(agent, index)
        method.leave(visit(index, task))
        anchors.append((fisher(agent, task), weights(agent)))
        if index == 1:
            assert method.numbers()["penalty"] == 0
            assert max(float(change.abs().max()) for change in added(agent).values()) < 1e-8
    shake(agent, 9)
    now = weights(agent)
    for f, w in anchors:
        wanted = {n: wanted[n] + strength * f[n] * (now[n] - w[n]) for n in now}
    close(added(agent), wanted, 1e-5)
    value = sum(strength / 2 * float((f[n] * (now[n] - w[n]).square()).sum()) for f, w in anchors for n in now)
    assert method.numbers()["penalty"] == pytest.approx(value, rel=1e-4)
    seen = []
    direction = {n: torch.ones_like(w) for n, w in now.items()}
    for t in range(4):
        agent.model.load_state_dict({n: now[n] + 0.5 * t * direction[n] for n in now})
        seen.append(method.numbers()["penalty"])
    second = np.diff(seen, 2)
    assert second[0] == pytest.approx(second[1], rel=1e-3) and second[0] > 0
    assert EWC().strength == 100


def test_a_task_that_comes_again_moves_its_anchor() -> None:
    agent = classifier()
    method = put(EWC(1.0), agent)
    for index in (1, 2):
        enter(agent, method, visit(index))
        shake(agent, index)
        method.leave(visit(index))
    assert list(method.anchors) == ["a"]
    assert method.numbers()["penalty"] == 0


def test_online_ewc() -> None:
    agent = classifier((6, 5), activation="tanh")
    method = put(OnlineEWC(2.0, decay=0.7), agent)
    wanted = {name: torch.zeros_like(value) for name, value in weights(agent).items()}
    for index, task in enumerate((A, B, C), 1):
        enter(agent, method, visit(index, task))
        shake(agent, index)
        method.leave(visit(index, task))
        new = fisher(agent, task)
        wanted = {n: 0.7 * wanted[n] + new[n] for n in wanted}
        close(importance(method, "all"), wanted, 1e-5)
        same(method.anchors["all"]["values"], weights(agent))
    last = weights(agent)
    shake(agent, 8)
    close(added(agent), {n: 2.0 * wanted[n] * (w - last[n]) for n, w in weights(agent).items()}, 1e-5)


def test_mas() -> None:
    agent = classifier((6, 5), activation="tanh")
    method = put(MAS(), agent)
    enter(agent, method, visit(1))
    method.leave(visit(1))
    obs = agent.prepare(A.sample(agent, 0, 0))["obs"]
    each = [slopes(agent, agent.model(row[None]).square().sum()) for row in obs]
    close(importance(method, "a"), {n: sum(s[n].abs() for s in each) / len(each) for n in each[0]}, 1e-5)


def test_si() -> None:
    agent = classifier((6, 5), activation="tanh", lr=0.1, optimizer={"use": "adam"})
    strength, xi = 3.0, 0.05
    method = put(SI(strength, xi), agent)
    total = {name: torch.zeros_like(value) for name, value in weights(agent).items()}
    for index in (1, 2):
        enter(agent, method, visit(index))
        start = weights(agent)
        path = {name: torch.zeros_like(value) for name, value in start.items()}
        for seed in range(12):
            agent.optimizers[0].param_groups[0]["maximize"] = seed > 4  # so that some paths lead uphill
            before, slope = weights(agent), own(agent, seed)
            learn(agent, seed)
            after = weights(agent)
            path = {n: p - slope[n] * (after[n] - before[n]) for n, p in path.items()}
            if index == 2 and seed == 3:
                pull = {n: strength * total[n] * (w - start[n]) for n, w in before.items()}
                close(gradients(agent), {n: slope[n] + pull[n] for n in pull}, 1e-5)
        close(method.path, path, 1e-6)
        method.leave(visit(index))
        moved = weights(agent)
        total = {n: total[n] + path[n].clamp(min=0) / ((moved[n] - start[n]).square() + xi) for n in total}
        close(importance(method, "all"), total, 1e-5)
        uphill = torch.cat([p.flatten() < 0 for p in path.values()])
        assert uphill.any() and not uphill.all()
    assert (SI().xi, SI().strength) == (0.1, 30)


@pytest.mark.parametrize(
    "make", [SI, lambda: EWC(samples=16), L2Init, Spectral, LwF], ids=["si", "ewc", "l2_init", "spectral", "lwf"]
)
def test_anchors_and_penalties_where_each_task_has_a_head(make: Any) -> None:
    """A head that is wrapped when the first visit begins has another name from then on."""
    agent = player("ppo")
    method = put(make(), agent)
    rules = {"head": "per_task"}

    class Seen(Pairs):
        def sample(self, agent: Any, seed: int, size: int) -> Experience:
            rng = np.random.default_rng(seed)
            obs = rng.normal(size=(4, 4, INPUTS)).astype(np.float32)
            zero = np.zeros((4, 4), np.float32)
            return Experience(obs, zero.astype(int), zero, obs, zero > 0, zero > 0)

    tasks = [Seen("a", 1), Seen("b", 2)]
    for index, task in enumerate([*tasks, tasks[0]], 1):
        enter(agent, method, visit(index, task, **rules))
        live(agent, 8, index)
        if index == 3:
            break
        method.leave(visit(index, task, **rules))
    if isinstance(method, EWC):  # back at the first task, whose head is held as all else is
        assert "action_net.heads.0.weight" in importance(method, "a")
        free: list[str] = []
        plain = method.slope

        def slope(name: str, value: Tensor) -> Tensor | None:
            found: Tensor | None = plain(name, value)
            free.extend([name] if found is None else [])
            return found

        method.slope = slope
        live(agent, 8, 9)
        assert free and all("value_net" in name or "heads.1" in name for name in free)


# Rehearsal.


def test_a_reservoir_is_algorithm_r() -> None:
    size, chunks = 5, (3, 4, 1, 9, 20)
    reservoir = Reservoir(size, {})
    ours, theirs = (torch.Generator().manual_seed(3) for _ in range(2))
    held: list[int] = []
    start = 0
    for count in chunks:
        chosen, places = reservoir.places(count, ours)
        reservoir.put(places, {"row": torch.arange(start, start + count)[chosen]})
        numbers = torch.rand(count, generator=theirs, dtype=torch.float64).tolist()
        for row, chance in zip(range(start, start + count), numbers, strict=True):
            if row < size:
                held.append(row)
                continue
            place = int(chance * (row + 1))
            if place < size:
                held[place] = row
        start += count
        assert reservoir.rows["row"][: len(reservoir)].tolist() == held
        if start <= size:
            assert held == list(range(start))


def test_a_reservoir_is_uniform() -> None:
    size, stream, runs = 5, 30, 1500
    generator = torch.Generator().manual_seed(0)
    counts = np.zeros(stream)
    for _ in range(runs):
        reservoir = Reservoir(size, {})
        for start in range(0, stream, 10):
            chosen, places = reservoir.places(10, generator)
            reservoir.put(places, {"row": torch.arange(start, start + 10)[chosen]})
        counts[reservoir.rows["row"].numpy()] += 1
    share = size / stream
    error = (runs * share * (1 - share)) ** 0.5
    assert counts.sum() == runs * size
    assert np.abs(counts - runs * share).max() < 4.5 * error


def watched(owner: Any, name: str) -> list[Weights]:
    """The batches that a method of one argument is given."""
    seen: list[Weights] = []
    plain = getattr(owner, name)

    def call(batch: Any) -> Any:
        seen.append(dict(batch))
        return plain(batch)

    setattr(owner, name, call)
    return seen


def test_replay_adds_the_loss_of_earlier_rows() -> None:
    strength = 0.7
    agent = classifier((6, 5))
    method = put(Replay(strength, size=100, batch=32, every=1), agent)
    seen = watched(agent, "rehearse")
    enter(agent, method, visit(1, A))
    assert max(float(change.abs().max()) for change in added(agent, 0).values()) == 0
    learn(agent, 1)
    method.leave(visit(1, A))
    assert not seen and method.numbers()["rows"] == 32
    enter(agent, method, visit(2, B))
    learn(agent, 2, 3)  # rows of this visit are held, and not yet rehearsed
    change = added(agent, 4)
    assert method.numbers()["rows"] == 80
    earlier = {tuple(row) for row in np.concatenate([pairs(0).obs, pairs(1).obs]).tolist()}
    for batch in seen:
        assert {tuple(row) for row in batch["obs"].tolist()} <= earlier
    assert len(seen) == 3 and len(seen[-1]["obs"]) == 32
    loss = strength * cross_entropy(agent.model(seen[-1]["obs"]), seen[-1]["label"])
    close(change, slopes(agent, loss))


def test_der_rehearses_rows_of_the_present_visit_too() -> None:
    agent = classifier((6, 5))
    method = put(DER(size=100, batch=16, every=1), agent)
    seen = watched(method, "row_loss")
    enter(agent, method, visit(1, A))
    learn(agent, 0, 1)
    assert len(seen) == 1 and (seen[0]["visit"] == 1).all()


def test_replay_looks_at_every_nth_minibatch() -> None:
    agent = classifier()
    method = put(Replay(size=500, every=3), agent)
    enter(agent, method, visit(1))
    learn(agent, *range(7))
    stored = method.reservoir.rows["obs"][: len(method.reservoir)].numpy()
    assert np.array_equal(stored, np.concatenate([pairs(2).obs, pairs(5).obs]))


def test_ppo_rows_get_the_answers_of_the_visits_end() -> None:
    agent = player("ppo")
    method = put(Replay(size=200, every=1), agent)
    enter(agent, method, visit(1, A))
    live(agent, 32)
    held = method.reservoir.rows
    count = len(method.reservoir)
    with torch.no_grad():
        now = agent.outputs({"obs": held["obs"][:count]})
    assert float((held["outputs"][:count] - now).abs().max()) > 1e-5
    method.leave(visit(1, A))
    assert_close(method.reservoir.rows["outputs"][:count], now)
    enter(agent, method, visit(2, B))
    live(agent, 16, 2)
    rows_now = method.reservoir.rows
    assert set(rows_now["visit"][: len(method.reservoir)].tolist()) == {1, 2}
    late = rows_now["visit"][: len(method.reservoir)] == 1
    old = held["outputs"][: len(late)][late].clone()
    method.leave(visit(2, B))
    assert torch.equal(method.reservoir.rows["outputs"][: len(late)][late], old)


def test_der_stays_near_the_answers_of_the_moment() -> None:
    strength = 0.4
    agent = classifier((6, 5), lr=0.1)
    method = put(DER(strength, size=100, batch=16, every=1), agent)
    enter(agent, method, visit(1, A))
    learn(agent, 0)
    with torch.no_grad():
        then = agent.model(agent.prepare(pairs(0))["obs"]).clone()
    learn(agent, 1)
    method.leave(visit(1, A))
    assert_close(method.reservoir.rows["outputs"][:16], then)
    enter(agent, method, visit(2, B))
    agent.optimizers[0].param_groups[0]["lr"] = 0.0
    seen = watched(method, "row_loss")
    change = added(agent, 3)
    batch = seen[-1]
    distance = (agent.model(batch["obs"]) - batch["outputs"]).square().sum(1).mean() / CLASSES
    close(change, slopes(agent, strength * distance))
    assert DER().strength == 0.3


@pytest.mark.parametrize("against", [True, False])
def test_agem_takes_off_what_would_raise_the_earlier_loss(against: bool) -> None:
    agent = classifier((6, 5))
    found: list[Weights] = []
    agent.optimizers[0].register_step_pre_hook(lambda *_: found.append(gradients(agent)))
    method = put(AGEM(size=64, batch=64, every=1), agent)
    agent.optimizers[0].register_step_pre_hook(lambda *_: found.append(gradients(agent)))
    seen = watched(agent, "rehearse")
    enter(agent, method, visit(1, A))
    learn(agent, 0, 1)
    enter(agent, method, visit(2, B))
    old = pairs(0)
    agent.observe(labelled(old.obs, (old.label + against) % CLASSES))
    agent.update()
    g, after = found[-2:]
    batch = seen[-1]
    r = slopes(agent, cross_entropy(agent.model(batch["obs"]), batch["label"]))
    flat = [torch.cat([part[n].double().flatten() for n in r]) for part in (g, after, r)]
    along, size = float(flat[0] @ flat[2]), float(flat[2] @ flat[2])
    assert (along < 0) == against
    if not against:
        same(after, g)
        assert "projected" not in method.done
        return
    assert abs(float(flat[1] @ flat[2])) <= 1e-6 * (abs(along) + size)
    assert_close(flat[1] - flat[0], -along / size * flat[2], atol=1e-6, rtol=0)
    assert method.done["projected"] == 1


def test_remembering_is_not_counted_by_batch_norm() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))
    ours, plain = Bare(model), Bare(copy.deepcopy(model))
    method = put(Replay(every=1), ours)
    labels = torch.arange(32) % CLASSES
    for agent in (ours, plain):
        agent.learn(rows()["obs"], labels)
    method.visit = 1
    method.leave(visit(1))
    same(dict(ours.model.named_buffers()), dict(plain.model.named_buffers()))


def taught() -> tuple[Classifier, Any]:
    agent = classifier((6, 5))
    method = put(LwF(0.8), agent)
    enter(agent, method, visit(1, A))
    assert max(float(change.abs().max()) for change in added(agent).values()) == 0
    shake(agent)
    enter(agent, method, visit(2, B))
    return agent, method


def check_lwf_at_the_teacher() -> None:
    agent, method = taught()
    assert max(float(change.abs().max()) for change in added(agent).values()) < 1e-7
    assert method.done["loss"] == pytest.approx(0, abs=1e-6)


def test_lwf_pulls_nowhere_at_the_teacher() -> None:
    check_lwf_at_the_teacher()


def test_a_wrong_temperature_would_be_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(self: Any, outputs: Tensor, teacher: Tensor) -> Tensor:
        return 4 * kl_div(outputs.log_softmax(1), (teacher / 2).softmax(1), reduction="batchmean")

    monkeypatch.setattr(Classifier, "distill", wrong)
    with pytest.raises(AssertionError):
        check_lwf_at_the_teacher()


def test_lwf_is_the_distillation_loss() -> None:
    agent, _ = taught()
    batch = agent.prepare(pairs(3))
    with torch.no_grad():
        soft = (agent.model(batch["obs"]) / 2).softmax(1)
    shake(agent, 11)
    before = weights(agent)
    change = added(agent, 3)
    same(weights(agent), before)
    loss = 4 * kl_div((agent.model(batch["obs"]) / 2).log_softmax(1), soft, reduction="batchmean")
    close(change, {n: 0.8 * g for n, g in slopes(agent, loss).items()})


@pytest.mark.parametrize("kind", ["ppo", "dqn"])
def test_distillation_is_least_at_the_teacher(kind: str) -> None:
    agent = player(kind)
    with torch.no_grad():
        teacher = agent.outputs(rows())
    loss = agent.distill(agent.outputs(rows()), teacher)
    assert float(loss.detach()) == pytest.approx(0, abs=1e-6)
    assert max(float(part.abs().max()) for part in slopes(agent, loss).values()) < 1e-6
    shake(agent)
    assert float(agent.distill(agent.outputs(rows()), teacher).detach()) > 1e-3


def mixture(count: int, generator: torch.Generator) -> Tensor:
    side = (torch.rand(count, 1, generator=generator) < 0.25).float()
    centre = side * torch.tensor([[4.0, -3.0]]) + (1 - side) * torch.tensor([[0.0, 1.0]])
    return centre + 0.3 * torch.randn(count, 2, generator=generator)


def test_the_generator_learns_a_mixture() -> None:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    vae = VAE(2, 4, 32)
    adam = torch.optim.Adam(vae.parameters(), 5e-3)
    bounds = []
    for _ in range(400):
        loss = vae.loss(mixture(128, generator), generator)
        adam.zero_grad()
        loss.backward()
        adam.step()
        bounds.append(float(loss.detach()))
    assert np.mean(bounds[-50:]) < np.mean(bounds[:10]) - 0.1
    made = vae.sample(2000, generator)
    wanted = 0.25 * torch.tensor([4.0, -3.0]) + 0.75 * torch.tensor([0.0, 1.0])
    assert float((made.mean(0) - wanted).abs().max()) < 0.35
    assert float(made[:, 0].std()) > 0.8  # both halves are there


def test_the_generator_begins_with_a_single_row() -> None:
    torch.manual_seed(0)
    vae = VAE(2, 4, 8)
    generator = torch.Generator().manual_seed(1)
    assert torch.isfinite(vae.loss(torch.tensor([[1.0, 2.0]]), generator))
    assert torch.isfinite(vae.sample(3, generator)).all()


def test_generative_replay() -> None:
    grid = SimpleNamespace(interface=Interface(spaces.MultiDiscrete([3, 4]), spaces.Discrete(3)))
    with pytest.raises(CrlError, match="categories"):
        GenerativeReplay().accepts(grid)
    agent = classifier((6, 5))
    method = GenerativeReplay(0.5, batch=32, latent=2, hidden=8)
    method.accepts(agent)
    put(method, agent)
    enter(agent, method, visit(1, A))
    assert max(float(change.abs().max()) for change in added(agent, 0).values()) == 0
    shake(agent)
    enter(agent, method, visit(2, B))
    lost = {n: -g / 2 for n, g in own(agent, 1).items()}  # of two tasks the new one counts half
    close(added(agent, 1), lost)  # it is its own teacher
    with torch.no_grad():
        teacher = copy.deepcopy(agent.model)
    shake(agent, 12)
    seen = watched(agent, "outputs")
    plain = own(agent, 2)
    change = added(agent, 2)
    made = seen[-1]["obs"]
    assert made.shape == (32, INPUTS)
    soft = (teacher(made) / 2).softmax(1).detach()
    loss = 4 * kl_div((agent.model(made) / 2).log_softmax(1), soft, reduction="batchmean")
    close(change, {n: 0.5 * 0.5 * g - plain[n] / 2 for n, g in slopes(agent, loss).items()})
    assert method.numbers()["generator_steps"] >= 3


def test_the_generator_weighs_each_of_six_tasks_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """1/k for what is seen, (k - 1)/k for what is made up: with half and half the first of six would have 1/32."""
    agent = classifier((4,))
    method = put(GenerativeReplay(1.0, batch=8, latent=2, hidden=8), agent)
    for index in range(1, 7):
        enter(agent, method, visit(index, Pairs(f"task {index}", index)))
        agent.minibatch = {"obs": torch.full((8, INPUTS), 1000.0)}
        method.done = {}
        worth = lambda vae, x, generator: vae.decoder[0].bias.sum() * 0 + float((x == 1000).all())  # noqa: E731
        monkeypatch.setattr(VAE, "loss", worth)
        method._timed(method.after_step, agent.optimizers[0])
        assert method.done["generator_loss"] == pytest.approx(1 / index)


def test_told_tasks_count_alike_too() -> None:
    """Heads or masks make one answer for each earlier task: of three tasks each counts a third, not two thirds."""
    agent = classifier((6, 5))
    method = put(GenerativeReplay(1.0, batch=32, latent=2, hidden=8), agent)
    for index in (1, 2, 3):
        enter(agent, method, visit(index, Pairs(f"task {index}", index)))
        shake(agent)
    parts: list[Tensor] = []

    def on_each(batch: Any, tasks: Any) -> Tensor:
        parts.extend(torch.ones(()) for _ in tasks)
        return torch.stack(parts).sum()

    agent.minibatch = {"obs": torch.zeros(8, INPUTS)}
    method.apart = lambda: True  # type: ignore[method-assign]
    method.on_each = on_each  # type: ignore[method-assign]
    with torch.no_grad():
        loss = method.loss()
    assert len(parts) == 2 and loss is not None and float(loss) == pytest.approx(2 / 3)


def test_what_lies_far_from_the_first_batch_is_made_too() -> None:
    """x + 4 of numbers that spread by 0.1: forty spreads away, and no clamp keeps them out."""
    torch.manual_seed(0)
    vae, generator = VAE(2, 2, 32), torch.Generator().manual_seed(1)
    adam = torch.optim.Adam(vae.parameters(), 5e-3)
    for visit_, shift in enumerate((0.0, 4.0)):
        vae.begun.fill_(0)
        for _ in range(300):
            loss = vae.loss(0.1 * torch.randn(64, 2, generator=generator) + shift, generator)
            adam.zero_grad()
            loss.backward()
            adam.step()
        made = vae.sample(500, generator)
        assert_close(made.mean(0), torch.full((2,), shift), atol=0.1, rtol=0, msg=f"visit {visit_ + 1}")


# Optimizers.


def test_muon_makes_steps_orthogonal() -> None:
    torch.manual_seed(0)
    for shape in ((32, 16), (16, 32), (64, 20)):
        matrix = torch.randn(shape)
        found = orthogonal(matrix)
        values = torch.linalg.svdvals(found)
        assert bool((values > 0.6).all() and (values < 1.3).all())
        left, _, right = torch.linalg.svd(matrix, full_matrices=False)
        assert float((left.T @ found @ right.T).diagonal().min()) > 0.6


def test_muon_step() -> None:
    torch.manual_seed(0)
    value = nn.Parameter(torch.randn(48, 16))
    first, slopes_ = value.detach().clone(), [torch.randn(48, 16) for _ in range(3)]
    muon = Muon([value])
    momentum, wanted = torch.zeros(48, 16), first
    for slope in slopes_:
        value.grad = slope
        muon.step()
        momentum = 0.95 * momentum + 0.05 * slope
        wanted = wanted - 0.02 * 3**0.5 * orthogonal(0.05 * slope + 0.95 * momentum)
        assert_close(value.detach(), wanted, atol=1e-5, rtol=0)


def test_muon_flattens_convolutions() -> None:
    torch.manual_seed(0)
    value, slope = nn.Parameter(torch.randn(40, 2, 3, 3)), torch.randn(40, 2, 3, 3)
    wanted = value.detach() - 0.02 * (40 / 18) ** 0.5 * orthogonal((0.05 + 0.95 * 0.05) * slope.view(40, 18)).view_as(
        slope
    )
    value.grad = slope
    Muon([value]).step()
    assert_close(value.detach(), wanted, atol=1e-5, rtol=0)


def test_muon_leaves_inputs_and_heads_to_adam() -> None:
    """However large they are, as published; and hidden layers are its own, however small."""
    muon = {"use": "muon"}
    wide = Interface(spaces.Box(-1, 1, (40,)), spaces.Discrete(30))
    conv = Interface(spaces.Box(0, 255, (3, 32, 32), np.uint8), spaces.Discrete(30))
    cases = [
        (Classifier(wide, 0, "cpu", net={"hidden": [20, 8]}, optimizer=muon), {"2.weight"}),
        (Classifier(wide, 0, "cpu", net={"hidden": [20]}, optimizer={"use": "trac", "base": "muon"}), set()),
        (PPO(wide, 0, "cpu", net={"hidden": [20, 8]}, optimizer=muon, n_steps=8, batch_size=4),
         {"mlp_extractor.policy_net.2.weight", "mlp_extractor.value_net.2.weight"}),
        (DQN(wide, 0, "cpu", net={"hidden": [20, 8], "norm": "layer"}, optimizer=muon, buffer_size=8),
         {"q_net.q_net.3.weight"}),
        (Classifier(conv, 0, "cpu", net="conv", optimizer=muon), None),
    ]  # fmt: skip
    for agent, wanted in cases:
        names = {id(p): name for name, p in agent.model.named_parameters()}
        (optimizer,) = agent.optimizers
        groups = optimizer.param_groups
        assert sum(len(group["params"]) for group in groups) == len({id(p) for g in groups for p in g["params"]})
        own = {names[id(p)] for g in groups if g["hidden"] for p in g["params"] if p.ndim > 1}
        if wanted is None:
            matrices = [name for name, p in agent.model.named_parameters() if p.ndim > 1]
            assert own == set(matrices[1:-1]) and any(agent.model.get_parameter(name).ndim == 4 for name in own)
        else:
            assert own == wanted


def test_muon_is_adam_on_the_rest() -> None:
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(shape)) for shape in ((20,), (8, 40), (4, 3, 20, 20))]
    theirs = [nn.Parameter(value.detach().clone()) for value in ours]
    optimizers = [Muon(ours, lr=0.02, adam_share=0.1, hidden=False), torch.optim.Adam(theirs, lr=0.002)]
    for _ in range(20):
        for mine, other in zip(ours, theirs, strict=True):
            mine.grad = torch.randn(mine.shape)
            other.grad = mine.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
        for mine, other in zip(ours, theirs, strict=True):
            assert_close(mine.detach(), other.detach(), atol=1e-6, rtol=0)


def test_erfi_is_the_integral() -> None:
    for x in (0.1, -0.5, 1 / 2**0.5, 1.0, 2.0, 4.0):
        t = np.linspace(0, x, 20_001)
        y = np.exp(t**2)
        area = (x / 20_000) / 3 * (y[0] + y[-1] + 4 * y[1:-1:2].sum() + 2 * y[2:-1:2].sum())
        assert erfi(x) == pytest.approx(2 / math.sqrt(math.pi) * area, rel=1e-9)
    assert erfi(0.0) == 0


class Published:
    """TRAC around Adam, in numpy."""

    def __init__(self, first: Any, lr: float) -> None:
        self.first, self.w, self.lr, self.n = first.copy(), first.copy(), lr, 0
        self.m, self.s = np.zeros_like(first), np.zeros_like(first)
        self.offset = np.zeros_like(first)
        self.betas = np.array([0.9, 0.99, 0.999, 0.9999, 0.99999, 0.999999])
        self.sigma, self.v = np.full(6, 1e-8), np.zeros(6)

    def step(self, g: Any) -> None:
        self.n += 1
        h = float((g * self.offset).sum())
        self.m, self.s = 0.9 * self.m + 0.1 * g, 0.999 * self.s + 0.001 * g**2
        self.offset -= self.lr * self.m / (1 - 0.9**self.n) / (np.sqrt(self.s / (1 - 0.999**self.n)) + 1e-8)
        self.sigma, self.v = self.betas * self.sigma - h, self.betas**2 * self.v + h**2
        x = self.sigma / (math.sqrt(2) * np.sqrt(self.v) + 1e-8)
        scale = sum(1e-8 / erfi(1 / math.sqrt(2)) * erfi(float(each)) for each in x)
        self.w = self.first + max(scale, 0.0) * self.offset


def test_trac_is_the_published_algorithm() -> None:
    rng = np.random.default_rng(0)
    first, goal, curve = rng.normal(size=6), rng.normal(size=6), rng.uniform(0.5, 2, size=6)
    value = nn.Parameter(torch.from_numpy(first.copy()))
    parts = nn.ParameterList([nn.Parameter(value.data[:2].clone()), nn.Parameter(value.data[2:].clone())])
    ours, theirs = Trac(parts.parameters(), lr=0.05), Published(first, 0.05)
    for _ in range(200):
        loss = (torch.from_numpy(curve) * (torch.cat([*parts]) - torch.from_numpy(goal)).square()).sum() / 2
        ours.zero_grad()
        loss.backward()
        ours.step()
        theirs.step(curve * (theirs.w - goal))
        assert np.abs(torch.cat([*parts]).detach().numpy() - theirs.w).max() < 1e-6
    assert np.abs(theirs.w - first).max() > 0.1


def test_trac_goes_through_a_file() -> None:
    rng = np.random.default_rng(0)
    targets = torch.from_numpy(rng.normal(size=(60, 5)).astype(np.float32))
    ours = nn.Parameter(torch.zeros(5))
    optimizer = Trac([ours], lr=0.1)

    def step(value: nn.Parameter, opt: Any, target: Tensor) -> None:
        opt.zero_grad()
        (value - target).square().sum().backward()
        opt.step()

    for target in targets[:40]:
        step(ours, optimizer, target)
    file = io.BytesIO()
    torch.save({"w": ours.detach(), "opt": optimizer.state_dict()}, file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    again = nn.Parameter(state["w"].clone())
    other = Trac([again], lr=0.1)
    other.load_state_dict(state["opt"])
    for target in targets[40:]:
        step(ours, optimizer, target)
        step(again, other, target)
        assert torch.equal(ours, again)


@pytest.mark.parametrize("use", ["trac", "muon"])
def test_optimizers_with_ppo(use: str) -> None:
    ours, again = (player("ppo", optimizer={"use": use}) for _ in range(2))
    first = weights(ours)
    live(ours, 24)
    assert not torch.equal(ours.model.action_net.weight, first["action_net.weight"])
    file = io.BytesIO()
    torch.save(ours.state_dict(), file)
    file.seek(0)
    again.load_state_dict(torch.load(file, weights_only=True))
    for agent in (ours, again):
        live(agent, 16, 5)
    same(weights(again), weights(ours))


def test_trac_keeps_what_methods_do_to_weights() -> None:
    """Weights that a method has moved between two steps stay where it put them."""
    agent = classifier((6, 5), lr=0.01, optimizer={"use": "trac"})
    method = put(ShrinkPerturb(keep=0.5, noise=0.0), agent)
    enter(agent, method, visit(1))
    learn(agent, *range(5))
    enter(agent, method, visit(2))
    halved = weights(agent)
    learn(agent, 5)
    close(weights(agent), halved, 0.02)


def test_trac_keeps_what_redo_draws() -> None:
    agent = classifier((8,), lr=0.01, optimizer={"use": "trac"})
    put(ReDo(every=3), agent)
    with torch.no_grad():
        agent.model[0].bias[2] = -100
    learn(agent, 0, 1, 2)
    drawn = agent.model[0].weight[2].detach().clone()
    assert drawn.abs().min() > 0
    learn(agent, 3)
    assert_close(agent.model[0].weight[2].detach(), drawn, atol=0.02, rtol=0)


# The shapes of networks.


@pytest.mark.parametrize("activation", [None, CReLU, Fourier], ids=["plain", "crelu", "fourier"])
@pytest.mark.parametrize("norm", ["none", "layer"])
def test_a_chain_remade_reads_as_many_numbers(activation: Any, norm: str) -> None:
    torch.manual_seed(0)
    chain = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3))
    made = Shape(norm, activation).remake(chain)
    before, after = ([p for p in net if isinstance(p, nn.Linear)] for net in (chain, made))
    assert [p.in_features for p in after] == [p.in_features for p in before] == [4, 8, 6]
    assert [p.out_features for p in after] == ([8, 6, 3] if activation is None else [4, 3, 3])
    for old, new in zip(before, after, strict=True):
        assert torch.equal(new.weight, old.weight[: new.out_features])
    kinds = [type(part) for part in made]
    one = [nn.Linear, *([nn.LayerNorm] if norm == "layer" else []), activation or nn.Tanh]
    assert kinds == [*one, *one, nn.Linear]
    assert made(torch.randn(5, 4)).shape == (5, 3)
    x = torch.randn(5, 4)
    if activation is CReLU:
        assert torch.equal(CReLU()(x), torch.cat([x.clamp(min=0), (-x).clamp(min=0)], 1))
    if activation is Fourier:
        assert torch.equal(Fourier()(x), torch.cat([x.sin(), x.cos()], 1))


@pytest.mark.parametrize("kind", ["ppo", "dqn"])
@pytest.mark.parametrize(
    "net", [{"norm": "layer"}, {"activation": "crelu", "norm": "layer"}, {"activation": "fourier"}]
)
def test_players_train_with_each_shape(kind: str, net: dict[str, str]) -> None:
    agent = player(kind, net={"hidden": [8, 6], **net})
    first = {n: w for n, w in weights(agent).items() if "target" not in n}
    if kind == "dqn":
        same(agent.algo.q_net_target.state_dict(), agent.algo.q_net.state_dict())
    live(agent, 16)
    moved = weights(agent)
    assert all(not torch.equal(moved[n], w) for n, w in first.items())
    has = any(isinstance(part, nn.LayerNorm) for part in agent.model.modules())
    assert has == ("norm" in net)


@pytest.mark.parametrize("net", [{"norm": "layr"}, {"activation": "crelu", "hidden": [5]}])
def test_the_classifier_refuses_shapes_that_there_are_not(net: dict[str, Any]) -> None:
    with pytest.raises(CrlError):
        classifier(**{"hidden": [6], **net})


# Several at once, and heads.


@pytest.mark.parametrize(
    "other", [L2, lambda: ERank(every=1), LwF, lambda: Replay(every=1)], ids=["l2", "erank", "lwf", "replay"]
)
@pytest.mark.parametrize("order", ["before", "after"])
def test_methods_see_what_another_has_grown(other: Any, order: str) -> None:
    """Whichever comes first in the YAML, new layers are every method's."""
    agent = classifier((6, 5), lr=0.05)
    method, grows = other(), PlasticityInjection()
    parts = {"one": method, "two": grows} if order == "before" else {"one": grows, "two": method}
    plan: Any = SimpleNamespace(agent=agent, methods=parts)
    for part in parts.values():
        put(part, agent)
    boundary.enter(plan, visit(1, A))
    learn(agent, 0, 1)
    for part in parts.values():
        part.leave(visit(1, A))
    boundary.enter(plan, visit(2, B))
    learn(agent, 2)
    live_ones = [p for part in agent.model.modules() if isinstance(part, Beside) for p in part.live.parameters()]
    known = {id(p) for p in method.parameters.values()}
    assert all(id(p) in known for p in live_ones)


@pytest.mark.parametrize("kind", ["ppo", "dqn"])
def test_renewal_watches_whichever_head_answers(kind: str) -> None:
    agent = player(kind)
    method = put(CBP(rate=1e-9), agent)
    for index, task in enumerate((A, B), 1):
        enter(agent, method, visit(index, task, head="per_task"))
        before = {name: value.clone() for name, value in method.age.items()}
        live(agent, 16, index)
        assert any(isinstance(part, Heads) for part in agent.model.modules())
        assert all((method.age[name] > before[name]).all() for name in before), f"visit {index}"


def test_cbp_weighs_units_by_the_head_that_answers() -> None:
    agent = player("dqn")
    method = put(CBP(rate=1e-9), agent)
    for index, task in enumerate((A, B), 1):
        enter(agent, method, visit(index, task, head="per_task"))
        live(agent, 16, index)
    last = list(method.utility)[-1]
    (heads,) = {part for name, part in agent.algo.q_net.named_modules() if isinstance(part, Heads)}
    with torch.no_grad():
        heads.heads[0].weight.zero_()  # of the first task, which no longer matters
        method.utility[last].zero_()
    live(agent, 1, 5)
    assert float(method.utility[last].max()) > 0
