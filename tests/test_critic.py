"""What memory makes of an actor-critic: its policy is remembered, its values where `critic` gives them a weight."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import Tensor
from torch.testing import assert_close

import crl
from agents.ppo import PPO
from crl import build, config, plan
from crl.core import CrlError, Experience, Interface, Rules, Visit
from crl.estimate import Estimate
from crl.methods.anchors import EWC, MAS, OnlineEWC
from crl.methods.memory import AGEM, DER, Clone, LwF
from crl.methods.method import Method

pytestmark = pytest.mark.usefixtures("one_thread")

INPUTS, CLASSES, SCALE = 4, 3, 300.0  # rewards of hundreds
Weights = dict[str, Tensor]
SPACES = {"discrete": spaces.Discrete(CLASSES), "box": spaces.Box(-1, 1, (2,))}


class Seen:
    """A task that gives the same rollout whenever it is asked."""

    def __init__(self, name: str, seed: int, box: bool = False) -> None:
        self.name, self.seed, self.box = name, seed, box

    def sample(self, agent: Any, seed: int, size: int) -> Experience:
        rng = np.random.default_rng(self.seed)
        obs = rng.normal(size=(4, 4, INPUTS)).astype(np.float32)
        action = rng.normal(size=(4, 4, 2)).astype(np.float32) if self.box else rng.integers(CLASSES, size=(4, 4))
        reward = SCALE * rng.normal(size=(4, 4)).astype(np.float32)
        none = np.zeros((4, 4), bool)
        return Experience(obs, action, reward, obs[::-1].copy(), none, none)


def player(kind: str = "discrete") -> PPO:
    """A small PPO whose policy prefers something."""
    interface = Interface(spaces.Box(-9, 9, (INPUTS,)), SPACES[kind], envs=4)
    agent = PPO(interface, 0, "cpu", net={"hidden": [6]}, n_steps=8, batch_size=16, n_epochs=2)
    shake(agent, 1, 0.5)
    return agent


def shake(agent: Any, seed: int, by: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in agent.model.parameters():
            value.add_(by * torch.randn(value.shape, generator=generator))


def visit(index: int, task: Any) -> Visit:
    return Visit(index, task, 64, seed=7, total=64, rules=Rules())


def live(agent: Any, steps: int, seed: int = 0) -> None:
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    np.random.seed(seed)
    obs = rng.normal(size=(4, INPUTS)).astype(np.float32)
    for _ in range(steps):
        action, _, note = agent.act(obs, None, False)
        after = rng.normal(size=(4, INPUTS)).astype(np.float32)
        reward, none = SCALE * rng.normal(size=4).astype(np.float32), np.zeros(4, bool)
        agent.observe(Experience(obs, action, reward, after, none, none, note))
        agent.update()
        obs = after


def critics(agent: Any) -> set[str]:
    """The parameters that only the values hang on."""
    return {name for name, _ in agent.model.named_parameters() if "value_net" in name}


def squares(agent: Any, scalar: Tensor, take: Any) -> Weights:
    names, values = zip(*agent.model.named_parameters(), strict=True)
    found = torch.autograd.grad(scalar, values, retain_graph=True, allow_unused=True)
    return {n: take(torch.zeros_like(p) if g is None else g) for n, p, g in zip(names, values, found, strict=True)}


def total(parts: list[Weights], count: int) -> Weights:
    return {name: sum(part[name] for part in parts) / count for name in parts[0]}  # type: ignore[misc]


def oracle(agent: Any, obs: Tensor, name: str, variance: float | None, kind: str = "discrete") -> Weights:
    """The definition, with SB3's own distribution and values, a sample at a time."""
    parts = []
    for row in obs:
        policy, value = agent.algo.policy.get_distribution(row[None]), agent.algo.policy.predict_values(row[None])[0, 0]
        if name == "mas":
            answer = (
                policy.distribution.loc if kind == "box" else agent.algo.policy.action_net(latent(agent, row[None]))
            )
            size = answer.square().sum()
            size = size + policy.distribution.scale.log().square().sum() if kind == "box" else size
            size = size + value.square() / variance if variance else size
            parts.append(squares(agent, size, torch.abs))
            continue
        if kind == "box":  # a Gaussian's: 1 / s^2 for the mean, 2 for the logarithm of s
            mean, scale = policy.distribution.loc[0], policy.distribution.scale[0]
            for i in range(2):
                parts.append(squares(agent, mean[i] / scale[i].detach(), torch.square))
                parts.append(squares(agent, scale[i].log() * 2**0.5, torch.square))
        else:
            for c in range(CLASSES):
                log = policy.log_prob(torch.tensor([c]))[0]
                parts.append(squares(agent, log * log.detach().exp().sqrt(), torch.square))
        if variance:
            parts.append(squares(agent, value / variance**0.5, torch.square))
    return total(parts, len(obs))


def latent(agent: Any, obs: Tensor) -> Tensor:
    policy = agent.algo.policy
    found: Tensor = policy.mlp_extractor.forward_actor(policy.extract_features(obs))
    return found


@pytest.mark.parametrize("critic", [0.0, 1.0], ids=["policy", "policy and values"])
@pytest.mark.parametrize("name", ["ewc", "online_ewc", "mas"])
@pytest.mark.parametrize("kind", SPACES)
def test_importance_is_of_the_policy(kind: str, name: str, critic: float) -> None:
    """With rewards of hundreds; values come in where they are asked for, in units of the returns' spread."""
    agent, task = player(kind), Seen("a", 1, kind == "box")
    method = {"ewc": EWC, "online_ewc": OnlineEWC, "mas": MAS}[name](critic=critic)
    method.attach(agent)
    method.enter(visit(1, task))
    method.leave(visit(1, task))
    found = next(iter(method.anchors.values()))["importance"]
    batch = agent.prepare(task.sample(agent, 0, 0))
    variance = float(batch["return"].var(correction=0)) if critic else None
    assert float(batch["return"].var()) > SCALE**2 / 4
    wanted = oracle(agent, batch["obs"], "mas" if name == "mas" else "ewc", variance, kind)
    assert critics(agent) & set(found) == (critics(agent) if critic else set())
    for key, value in wanted.items():
        assert_close(found.get(key, torch.zeros_like(value)), value, atol=1e-7, rtol=1e-4, msg=key)
    assert any((wanted[key] > 0).any() for key in wanted if key not in critics(agent))


def test_returns_that_do_not_vary_say_nothing_of_the_values(monkeypatch: pytest.MonkeyPatch) -> None:
    agent, task = player(), Seen("a", 1)
    prepare = agent.prepare
    monkeypatch.setattr(agent, "prepare", lambda seen: {**prepare(seen), "return": torch.ones(16)})
    method = EWC(critic=1.0)
    method.attach(agent)
    method.leave(visit(1, task))
    found = method.anchors["a"]["importance"]
    assert found and not critics(agent) & set(found)


def remembering(method: Any) -> PPO:
    """In the second visit, away from what was answered in the first."""
    agent = player()
    method.accepts(agent)
    method.attach(agent)
    for index, task in enumerate((Seen("a", 1), Seen("b", 2)), 1):
        agent.enter(visit(index, task))
        method.enter(visit(index, task))
        if index == 1:
            live(agent, 32)
            method.leave(visit(index, task))
    shake(agent, 2, 0.1)
    live(agent, 8, 5)
    return agent


def policy_kl(agent: Any, batch: Mapping[str, Tensor]) -> Tensor:
    then = torch.distributions.Categorical(logits=batch["outputs"][:, :-1])
    now = agent.algo.policy.get_distribution(batch["obs"]).distribution
    return torch.distributions.kl_divergence(then, now).mean()


def values_apart(agent: Any, batch: Mapping[str, Tensor], returns: Tensor) -> Tensor:
    now = agent.algo.policy.predict_values(batch["obs"])[:, 0]
    return (now - batch["outputs"][:, -1]).square().mean() / returns.var(correction=0)


def rows_of(method: Any) -> tuple[Weights, Tensor]:
    held = {name: value[: len(method.reservoir)] for name, value in method.reservoir.rows.items()}
    return {name: value[:50] for name, value in held.items()}, held["return"]


def test_clone_weighs_as_clear_does() -> None:
    """.01 for the policy and .005 for the values, these over the variance of the returns."""
    method = Clone()
    agent = remembering(method)
    batch, returns = rows_of(method)
    loss = method.strength * method.row_loss(batch)
    assert_close(loss, 0.01 * policy_kl(agent, batch) + 0.005 * values_apart(agent, batch, returns))
    assert method.done["steps"] > 0
    assert policy_kl(agent, batch) > 1e-3 and values_apart(agent, batch, returns) > 1e-12


def test_der_is_of_the_policys_numbers() -> None:
    method = DER()
    agent = remembering(method)
    batch, returns = rows_of(method)
    apart = (agent.outputs(batch) - batch["outputs"])[:, :-1].square().mean()
    assert_close(method.row_loss(batch), apart)
    method.critic = 2.0
    assert_close(method.row_loss(batch), apart + 2 * values_apart(agent, batch, returns))


def test_lwf_holds_the_policy() -> None:
    for critic in (0.0, 0.5):
        method = LwF(critic=critic)
        agent = remembering(method)
        minibatch = agent.minibatch
        with torch.no_grad():
            batch = {**minibatch, "outputs": method.taught(minibatch)}
        loss = method.loss()
        wanted = policy_kl(agent, batch) + critic * values_apart(agent, batch, minibatch["return"])
        assert_close(loss, wanted)
        assert policy_kl(agent, batch) > 1e-4


@pytest.mark.parametrize("critic", [0.0, 0.5])
def test_the_reference_gradient_of_agem_is_of_the_policy(critic: float) -> None:
    method = AGEM(every=1, critic=critic)
    agent = remembering(method)
    seen: list[Weights] = []

    def look(*_: Any) -> None:
        with torch.enable_grad():
            found = squares(agent, method.rehearsed(), lambda slope: slope)  # type: ignore[arg-type]
        seen.append(found)

    agent.optimizers[0].register_step_pre_hook(look)
    live(agent, 8, 6)
    assert seen
    for found in seen:
        there = {name for name, slope in found.items() if slope.any()}
        assert bool(there & critics(agent)) == bool(critic) and there - critics(agent)
        sizes = {part: sum(float(found[n].square().sum()) for n in names) ** 0.5 for part, names in
                 (("critic", critics(agent)), ("actor", set(found) - critics(agent)))}  # fmt: skip
        assert sizes["critic"] < 10 * sizes["actor"]


def test_the_values_part_has_no_unit() -> None:
    """Returns and values a thousand times as large: the same loss."""
    from crl.methods.critic import value_distance

    agent = player()
    outputs, teacher, returns = torch.randn(8, 4), torch.randn(8, 4), torch.randn(8)
    one = value_distance(agent, outputs, teacher, returns)
    assert_close(value_distance(agent, 1000 * outputs, 1000 * teacher, 1000 * returns), one)
    assert one > 0


def built(method: Any, **parts: Any) -> build.Plan:
    tasks = [{"env": "CartPole-v1", "steps": 32, "name": name, "wrappers": [{"use": "shift_observation", "by": by}]}
             for name, by in (("a", 0.0), ("b", 1.0))]  # fmt: skip
    agent = {"use": "ppo", "n_steps": 8, "batch_size": 8, "net": {"hidden": [4]}}
    data = {"tasks": tasks, "agent": agent, "engine": {"envs": 2}, "monitors": [], "evaluation": {"episodes": 1}}
    return build.build(config.read({**data, "methods": [method], **parts}))


@pytest.mark.parametrize(
    ("method", "agent", "said"),
    [
        ("replay", "ppo", "replay needs an agent with `rehearse`, which PPO lacks; clone holds its old answers"),
        ({"use": "ewc", "critic": 1.0}, "dqn", "critic: 1 weighs a critic's outputs, and DQN names none"),
        ({"use": "agem", "critic": 0.5}, "dqn", "critic: 0.5 weighs a critic's outputs, and DQN names none"),
    ],
)
def test_what_cannot_be_is_refused(method: Any, agent: str, said: str) -> None:
    with pytest.raises(CrlError) as refused:
        built(method, agent={"use": agent})
    assert str(refused.value).startswith("methods.0: ") and said in str(refused.value)


# Where learning without forgetting contradicts learning.

SPLIT = {"use": "split", "data": "tests.tiny_images.tiny", "tasks": 3}


@pytest.mark.parametrize(
    ("method", "parts", "warned"),
    [
        ("lwf", {}, True),
        ("lwf", {"boundary": {"head": "per_task"}}, False),
        ({"use": "lwf", "strength": 0.0}, {}, False),
        ("ewc", {}, False),
        ("lwf", {"stream": {**SPLIT, "scenario": "task"}}, False),
        ("lwf", {"stream": {**SPLIT, "scenario": "class"}}, False),
        ("lwf", {"stream": {"use": "permuted", "data": "tests.tiny_images.tiny", "tasks": 2}}, True),
    ],
)
def test_lwf_with_one_head_is_warned_of(method: Any, parts: dict[str, Any], warned: bool) -> None:
    if "stream" in parts:
        data = {"agent": {"use": "classifier", "net": {"hidden": [4]}}, "monitors": [], "methods": [method], **parts}
        found = build.build(config.read(data)).warnings
    else:
        found = built(method, **parts).warnings
    assert [said.partition(" with")[0] for said in found] == ["methods.0: lwf"] * warned
    assert not any("\n" in said for said in found)


def test_check_and_train_say_the_warning(
    tmp_path: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "estimate", lambda built: Estimate(1.0, 0.0, 0.0))
    data = built("lwf").experiment.plain()
    assert "\nwarning   methods.0: lwf with one head" in plan.describe(data)
    crl.train(data, out=tmp_path, verbosity=0)
    heard = capsys.readouterr()
    assert (heard.out + heard.err).count("warning: methods.0: lwf with one head") == 1


def test_a_method_of_ones_own_may_warn() -> None:
    class Wary(Method):
        def warns(self, tasks: Any, rules: Any) -> str:
            return f"{len(tasks)} tasks"

    assert [*build._warnings({"wary": Wary()}, [1, 2], Rules())] == ["methods.0: 2 tasks"]  # type: ignore[list-item]
