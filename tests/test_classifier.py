"""The classifier: which classes can be the answer, heads, the step written out, and whole walks over a dataset."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import Tensor, nn
from torch.nn import functional

import crl
from agents.classifier import TEMPERATURE, Classifier
from agents.direct import Direct
from crl import build, config, named
from crl.cli import main
from crl.core import CrlError, Interface, NotYet, Pairs, Rules, Visit, facing
from crl.opened import Run
from crl.probe import probe
from envs.images import ImageTask, Settings
from envs.slices import Slice
from tests.small_data import refused
from tests.test_images import tiny, whole

pytestmark = pytest.mark.usefixtures("one_thread")

SEEN = Interface(spaces.Box(0, 255, (1, 4, 4), np.uint8), spaces.Discrete(6))
SGD = {"use": "sgd"}


def learner(**options: Any) -> Classifier:
    return Classifier(SEEN, 0, "cpu", **{"net": {"hidden": [8]}, "learning_rate": 0.1, **options})


def task(name: str = "one", answers: tuple[int, ...] = (), told: bool = False) -> Any:
    return SimpleNamespace(name=name, answers=answers, told=told)


ONE, TWO, THREE = (task(n, a, True) for n, a in (("one", (0, 3)), ("two", (5, 1)), ("three", (2, 4))))
FIRST, SECOND, THIRD = (task(t.name, t.answers) for t in (ONE, TWO, THREE))


def enter(agent: Classifier, index: int, at: Any, **rules: Any) -> Classifier:
    agent.enter(Visit(index, at, 100, 0, rules=Rules(**rules)))
    return agent


def pairs(count: int = 10, labels: tuple[int, ...] = (0, 3), seed: int = 0, **more: Any) -> Pairs:
    generator = torch.Generator().manual_seed(seed)
    obs = torch.randint(0, 256, (count, 1, 4, 4), generator=generator, dtype=torch.uint8)
    chosen = torch.randint(len(labels), (count,), generator=generator)
    return Pairs(obs, torch.tensor(labels)[chosen], **more)


def step(agent: Classifier, batch: Pairs) -> Mapping[str, Any]:
    agent.observe(batch)
    return agent.update()


def weights(agent: Any) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in agent.model.state_dict().items()}


def equal(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def answered(agent: Classifier, at: Any = None, count: int = 64) -> set[int]:
    """Which classes it answers with over many inputs, drawn, when all are about as likely."""
    with torch.no_grad():
        for parameter in agent.model.parameters():
            parameter.mul_(0.01)
    obs = pairs(count).obs
    if at is None:
        return set(agent.act(obs, None, False)[0].tolist())
    with facing(agent, at):
        return set(agent.act(obs, None, False)[0].tolist())


# Which classes can be the answer.


def test_told_it_chooses_among_the_tasks_classes() -> None:
    agent = learner()
    assert answered(agent) == set(range(6)) and answered(agent, TWO) == {1, 5}, "also before the first visit"
    enter(agent, 1, ONE)
    assert answered(agent) == {0, 3} and answered(agent, TWO) == {1, 5}
    enter(agent, 2, TWO)
    assert answered(agent) == {1, 5} and answered(agent, ONE) == {0, 3} and answered(agent, THREE) == {2, 4}
    assert answered(agent, SimpleNamespace(name="one")) == {0, 3}, "methods face tasks by name"


def test_not_told_it_chooses_among_the_classes_so_far() -> None:
    agent = learner()
    assert answered(agent) == answered(agent, THIRD) == set(range(6)), "there is nothing to go by yet"
    enter(agent, 1, FIRST)
    assert answered(agent) == {0, 3}
    enter(agent, 2, SECOND)
    assert answered(agent) == answered(agent, FIRST) == {0, 1, 3, 5} == answered(agent, SECOND)
    enter(agent, 3, FIRST)
    assert answered(agent) == {0, 1, 3, 5}


def test_classes_that_were_not_seen_are_not_answered_for_yet() -> None:
    agent = enter(learner(), 1, FIRST)
    for unseen in (SECOND, task("some", (0, 1))):
        with pytest.raises(NotYet, match="not all of its classes have been seen"), facing(agent, unseen):
            pass
    with facing(enter(agent, 2, SECOND), SECOND):
        pass


def test_facing_a_task_is_over_when_it_is_over() -> None:
    agent = enter(enter(learner(), 1, ONE, head="per_task"), 2, TWO, head="per_task")
    with pytest.raises(ZeroDivisionError), facing(agent, ONE):
        assert answered(agent) == {0, 3} and agent.model[-1].current == 0
        raise ZeroDivisionError
    assert answered(agent) == {1, 5} and agent.model[-1].current == 1


def test_unannounced_boundaries_leave_all_classes() -> None:
    agent = enter(learner(), 1, ONE, announced=False)
    assert answered(agent) == answered(agent, ONE) == answered(agent, TWO) == set(range(6))
    assert "answers" not in agent.prepare(pairs()) and agent.remembers == ("obs", "label")


def test_unannounced_boundaries_leave_all_classes_from_the_start() -> None:
    agent = learner()
    agent.accepts(Rules(announced=False))
    assert answered(agent, ONE) == set(range(6))


def test_the_likeliest_class_is_the_greedy_answer() -> None:
    agent = enter(learner(), 1, ONE)
    obs = pairs(50).obs
    with torch.no_grad():
        logits = agent.model(obs.flatten(1) / 255)
    chosen, carry, note = agent.act(obs, "carry", True)
    assert chosen.tolist() == torch.tensor([0, 3])[logits[:, [0, 3]].argmax(1)].tolist()
    assert isinstance(chosen, np.ndarray) and carry == "carry" and note is None
    assert len({tuple(agent.act(obs, None, False)[0]) for _ in range(3)}) == 3, "drawn otherwise"


# The loss.


def test_the_objective_is_the_cross_entropy_among_the_answers() -> None:
    agent = enter(learner(), 1, TWO)
    batch = agent.prepare(pairs(20, (5, 1)))
    assert torch.allclose(batch["obs"], pairs(20, (5, 1)).obs.flatten(1) / 255)
    outputs = torch.randn(20, 6, requires_grad=True)
    loss = agent.objective(outputs, batch)
    own = torch.tensor([1, 5])
    expected = functional.cross_entropy(outputs[:, own], (batch["label"] == 5).long())
    assert torch.allclose(loss, expected) and torch.equal(
        agent.rehearse(batch), agent.objective(agent.outputs(batch), batch)
    )
    (slope,) = torch.autograd.grad(loss, outputs)
    assert slope[:, own].abs().min() > 0 and not slope[:, [0, 2, 3, 4]].any()
    free = {name: value for name, value in batch.items() if name != "answers"}
    assert torch.allclose(agent.objective(outputs, free), functional.cross_entropy(outputs, batch["label"]))


def test_each_row_may_have_answers_of_its_own() -> None:
    own = torch.zeros(8, 6, dtype=torch.bool)
    own[:4, [0, 3]], own[4:, [1, 5]] = True, True
    agent, free = enter(learner(), 1, ONE), enter(learner(), 1, ONE, announced=False)
    labels = torch.tensor([0, 3, 0, 3, 1, 5, 1, 5])
    given = Pairs(pairs(8).obs, labels, own)
    assert torch.equal(agent.prepare(given)["answers"], own) and "answers" not in free.prepare(given)
    outputs = torch.randn(8, 6)
    halves = [functional.cross_entropy(outputs[:4, [0, 3]], torch.tensor([0, 1, 0, 1]))]
    halves += [functional.cross_entropy(outputs[4:, [1, 5]], torch.tensor([0, 1, 0, 1]))]
    assert torch.allclose(agent.objective(outputs, agent.prepare(given)), sum(halves) / 2)


@pytest.mark.parametrize("optimizer", [SGD, {"use": "adam"}], ids=["direct", "general"])
def test_a_step_tells_of_before_it(optimizer: dict[str, Any]) -> None:
    agent = enter(learner(optimizer=optimizer), 1, ONE)
    batch = pairs(40)
    logits = agent.outputs(agent.prepare(batch)).detach()[:, [0, 3]]
    label = (batch.label == 3).long()
    numbers = step(agent, batch)
    assert float(numbers["losses/loss"]) == pytest.approx(float(functional.cross_entropy(logits, label)))
    assert float(numbers["train/accuracy"]) == pytest.approx(float((logits.argmax(1) == label).float().mean()))
    assert agent.update() == {}, "once for each batch"
    assert agent.progress == 0.4 and enter(agent, 2, TWO).progress == 0.0


@pytest.mark.parametrize("net", [{"hidden": [16]}, {"use": "conv", "channels": [4], "hidden": [8], "norm": "batch"}])
def test_it_learns(net: dict[str, Any]) -> None:
    seen = Interface(spaces.Box(0, 255, (1, 8, 8), np.uint8), spaces.Discrete(3))
    agent = Classifier(seen, 0, "cpu", net=net, learning_rate=0.02)
    obs = torch.randint(0, 100, (60, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    label = torch.arange(60) % 3
    obs[torch.arange(60), 0, 2 * label + 1] += 100
    for _ in range(30):
        numbers = step(agent, Pairs(obs, label))
    assert (agent.act(obs, None, True)[0] == label.numpy()).mean() > 0.95 and float(numbers["losses/loss"]) < 0.3


def test_distilling_is_among_the_tasks_classes_or_the_earlier_ones() -> None:
    student, teacher = torch.randn(9, 6, requires_grad=True), torch.randn(9, 6)

    def expected(classes: list[int]) -> Tensor:
        old, new = ((logits[:, classes] / TEMPERATURE).log_softmax(1) for logits in (teacher, student))
        return TEMPERATURE**2 * functional.kl_div(new, old, reduction="batchmean", log_target=True)

    told = enter(enter(learner(), 1, ONE), 2, TWO)
    assert torch.allclose(told.distill(student, teacher), expected([1, 5]))
    with facing(told, ONE):
        assert torch.allclose(told.distill(student, teacher), expected([0, 3]))
    untold = enter(enter(learner(), 1, FIRST), 2, SECOND)
    assert torch.allclose(untold.distill(student, teacher), expected([0, 3])), "all that the teacher knows"
    (slope,) = torch.autograd.grad(untold.distill(student, teacher), student)
    assert slope[:, [0, 3]].any() and not slope[:, [1, 2, 4, 5]].any()
    assert torch.allclose(enter(untold, 3, THIRD).distill(student, teacher), expected([0, 1, 3, 5]))
    assert torch.allclose(learner().distill(student, teacher), expected(list(range(6))))
    assert float(told.distill(teacher, teacher)) == pytest.approx(0, abs=1e-6)
    assert (told.apart, untold.apart, enter(learner(), 1, FIRST, head="per_task").apart) == (True, False, True)


def test_metric_and_divergence_are_of_the_answers() -> None:
    agent = enter(learner(), 1, ONE)
    batch, outputs = agent.prepare(pairs(3)), torch.randn(3, 6)

    def loss(logits: Tensor, i: int) -> Tensor:
        return agent.objective(logits[None], {name: value[i : i + 1] for name, value in batch.items()})

    for i, found in enumerate(agent.metric(outputs, batch)):
        expected = torch.autograd.functional.hessian(lambda logits, i=i: loss(logits, i), outputs[i])
        assert torch.allclose(found, expected, atol=1e-6) and found.any()
    other = outputs.clone()
    other[:, [1, 2]] += 100
    assert not any(value.any() for value in agent.divergence(outputs, other).values())
    other[0, 0] += 50 * (1 if outputs[0, 0] < outputs[0, 3] else -1)
    moved = agent.divergence(outputs, other)
    old, new = outputs[:, [0, 3]], other[:, [0, 3]]
    kl = functional.kl_div(new.log_softmax(1), old.log_softmax(1), reduction="none", log_target=True).sum(1)
    assert moved["flips"].tolist() == [1, 0, 0] and torch.allclose(moved["kl"], kl, rtol=1e-4, atol=1e-6)


# Heads.


def test_each_task_has_a_head_and_only_its_own_learns() -> None:
    for optimizer in (SGD, {"use": "adam"}):
        agent = enter(learner(optimizer=optimizer), 1, ONE, head="per_task")
        agent.decay = 0.1
        fresh = weights(agent)
        step(agent, pairs())
        enter(agent, 2, TWO, head="per_task")
        before = weights(agent)
        heads = [{n[len(f"2.heads.{i}.") :]: v for n, v in before.items() if f"heads.{i}." in n} for i in (0, 1)]
        assert not equal(*heads) and all(torch.equal(v, fresh[f"2.heads.0.{n}"]) for n, v in heads[1].items())
        stepped = {id(p) for group in agent.optimizers[0].param_groups for p in group["params"]}
        assert stepped == {id(p) for p in agent.model.parameters()}, "its parameters are the optimizer's"
        for _ in range(2):
            step(agent, pairs(labels=(5, 1)))
        moved = {name for name, value in weights(agent).items() if not torch.equal(value, before[name])}
        assert moved == {"0.weight", "0.bias", "2.heads.1.weight", "2.heads.1.bias"}
        enter(agent, 3, ONE, head="per_task")
        assert agent.heads == ["one", "two"] and agent.model[-1].current == 0 and len(agent.model[-1].heads) == 2


def test_a_task_without_a_head_is_not_answered_for() -> None:
    agent = enter(learner(), 1, task("one"), head="per_task")
    with pytest.raises(NotYet, match="no head for this task yet"), facing(agent, task("two")):
        pass
    with facing(learner(), task("two")):
        pass


@pytest.mark.parametrize(
    "net", [{"use": "resnet18", "width": 2}, {"use": "convgru", "hidden": 2, "dense": 4}], ids=lambda net: net["use"]
)
def test_nets_by_part_have_heads_too(net: dict[str, Any]) -> None:
    agent = Classifier(Interface(spaces.Box(0, 255, (1, 8, 8), np.uint8), SEEN.action), 0, "cpu", net=net)
    enter(enter(agent, 1, ONE, head="per_task"), 2, TWO, head="per_task")
    before = weights(agent)
    obs = torch.randint(0, 256, (6, 1, 8, 8), dtype=torch.uint8)
    step(agent, Pairs(obs, torch.tensor([1, 5, 1, 5, 1, 5])))
    moved = [name for name, value in weights(agent).items() if not torch.equal(value, before[name])]
    assert "head.heads.1.weight" in moved and "head.heads.0.weight" not in moved and len(moved) > 4
    assert agent.chains is not None and agent.chains[0][-1] == "head"


# What a checkpoint holds.


@pytest.mark.parametrize("head", ["shared", "per_task"])
@pytest.mark.parametrize("optimizer", [SGD, {"use": "sgd", "momentum": 0.9}, {"use": "adam"}], ids=str)
@pytest.mark.parametrize("told", [True, False], ids=["told", "not told"])
def test_an_agent_goes_on_from_its_state(tmp_path: Path, head: str, optimizer: dict[str, Any], told: bool) -> None:
    walk = (ONE, TWO, ONE) if told else (FIRST, SECOND, FIRST)
    agent = learner(optimizer=optimizer)
    for index, at in enumerate(walk, start=1):
        enter(agent, index, at, head=head)
        for i in range(3):
            step(agent, pairs(7 - 6 * (i % 2), at.answers, i))
    torch.save(agent.state_dict(), tmp_path / "state.pt")
    again = learner(optimizer=optimizer)
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    logits, teacher = torch.randn(4, 6), torch.randn(4, 6)
    for k in range(3):
        assert equal(weights(agent), weights(again)) and agent.progress == again.progress > 0
        assert torch.equal(agent.distill(logits, teacher), again.distill(logits, teacher))
        for at in walk:
            with facing(agent, at), facing(again, at):
                same = [one.outputs(one.prepare(pairs(9, at.answers, 30))) for one in (agent, again)]
                assert torch.equal(*same)
                objectives = [
                    one.objective(o, one.prepare(pairs(9, at.answers, 30)))
                    for one, o in zip((agent, again), same, strict=True)
                ]
                assert torch.equal(*objectives)
        if k == 1:
            last = task("three", (2, 4), told)
            enter(agent, 4, last, head=head), enter(again, 4, last, head=head)
        labels = (0, 3) if k == 0 else (2, 4)
        found = [step(one, pairs(9, labels, 50 + k)) for one in (agent, again)]
        assert found[0] == found[1]
    assert repr(agent.state_dict()) == repr(again.state_dict())


def test_a_state_is_a_copy_and_loading_drops_what_came_after() -> None:
    agent = enter(learner(optimizer=SGD), 1, ONE)
    for i in range(5):
        step(agent, pairs(1, (0, 3), i))
    state = {
        name: {k: v.clone() for k, v in value.items()} if name == "model" else value
        for name, value in agent.state_dict().items()
    }
    for i in range(5):
        step(agent, pairs(1, (0, 3), 9 + i))
    assert not equal(weights(agent), state["model"])
    for i in range(3):
        step(agent, pairs(1, (0, 3), 20 + i))
    agent.load_state_dict(state)
    assert equal(weights(agent), state["model"])


def test_an_optimizer_reset() -> None:
    agent = enter(learner(), 1, ONE, optimizer="reset")
    step(agent, pairs())
    assert len(agent.optimizers[0].state) == 4
    enter(agent, 1, ONE, optimizer="keep")
    assert len(agent.optimizers[0].state) == 4
    assert not enter(agent, 2, TWO, optimizer="reset").optimizers[0].state


@pytest.mark.parametrize("path", ["direct", "general"])
@pytest.mark.parametrize("rows", [1, 12])
@pytest.mark.parametrize("optimizer", [SGD, {"use": "adam"}], ids=lambda o: o["use"])
def test_decay_is_weight_decay_in_the_gradient(path: str, rows: int, optimizer: dict[str, Any]) -> None:
    agent, plain = learner(optimizer=optimizer), learner(optimizer={**optimizer, "weight_decay": 0.3})
    agent.decay = 0.3
    free = learner(optimizer=optimizer)
    if path == "general":
        agent._direct.layers, plain._direct.layers = [], []
    for i in range(5):
        for one in (agent, plain, free):
            step(one, pairs(rows, (0, 3), i))
    for name, value in weights(agent).items():
        assert torch.allclose(value, weights(plain)[name], rtol=1e-5, atol=1e-6), name
        assert not torch.allclose(value, weights(free)[name], rtol=1e-3)


# What it refuses.


@pytest.mark.parametrize(
    ("seen", "answers"),
    [
        (spaces.Box(-1, 1, (4,)), spaces.Box(-1, 1, (2,))),
        (spaces.MultiDiscrete([3, 4]), spaces.Discrete(3)),
        (spaces.Box(-1, 1, (4,)), spaces.MultiDiscrete([3, 2])),
    ],
)
def test_other_spaces_are_refused(seen: Any, answers: Any) -> None:
    refused(lambda: Classifier(Interface(seen, answers), 0, "cpu"), "agent classifier", "one of several classes")


STREAM = {"use": "split", "data": "tests.test_images.tiny", "tasks": 4, "batch": 4}
CART = {"tasks": [{"env": "CartPole-v1", "steps": 32}]}


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"stream": STREAM, "agent": "ppo"}, ("agent: PPO learns from transitions", "use classifier")),
        ({"stream": STREAM, "agent": "dqn"}, ("agent: DQN learns from transitions", "use classifier")),
        ({**CART, "agent": "classifier"}, ("agent: Classifier learns from pairs", "use ppo or dqn")),
        ({**CART, "stream": STREAM}, ("both `tasks:` and `stream:`",)),
        ({"agent": "classifier"}, ("neither `tasks:` nor `stream:`",)),
        ({"stream": {"use": "split"}}, ("stream: `data` is missing", "mnist")),
        ({"stream": {**STREAM, "data": "mnits"}}, ("stream: ", "mnits")),
        ({"stream": {**STREAM, "cumulative": True}}, ("stream.cumulative", "no such option", "scenario")),
        ({"stream": STREAM, "agent": {"nett": {}}}, ("agent.nett", "net")),
        ({"stream": STREAM, "agent": {"learning_rate": -1}}, ("agent.learning_rate", "-1")),
        ({"stream": STREAM, "agent": {"learning_rate": True}}, ("agent.learning_rate", "True")),
        ({"stream": STREAM, "agent": {"optimizer": {"use": "sgdd"}}}, ("agent.optimizer.use", "sgd")),
        ({"stream": STREAM, "agent": {"net": {"use": "resnet"}}}, ("agent.net.use", "resnet18")),
        ({"stream": STREAM, "boundary": {"buffer": "reset"}}, ("boundary.buffer: reset", "has none")),
        ({"stream": STREAM, "boundary": {"normalizer": "reset"}}, ("boundary.normalizer: reset", "has none")),
        ({"stream": STREAM, "evaluation": {"of": "none"}}, ("evaluation.of", "all, seen, own")),
        ({"stream": STREAM, "evaluation": {"samples": -1}}, ("evaluation.samples", "-1 is too small")),
        ({"stream": STREAM, "checkpoint": {"keep": -1}}, ("checkpoint.keep", "-1 is too small")),
        (
            {"stream": STREAM, "boundary": {"announced": False, "head": "per_task"}},
            ("boundary", "head: per_task cannot happen"),
        ),
    ],
    ids=str,
)
def test_a_walk_that_cannot_be_is_refused_in_one_line(data: dict[str, Any], words: tuple[str, ...]) -> None:
    refused(lambda: build.build(config.read({"threads": 1, **data})), *words)


def test_a_stream_has_a_classifier_and_its_threads_written_out() -> None:
    read = config.read({"stream": STREAM})
    assert read.agent["use"] == "classifier" and read.plain()["threads"] >= 1
    assert config.read({"stream": {**STREAM, "use": "permuted"}}).stream["use"] == "permuted"


# The step written out.


class Double(Classifier):
    """In float64."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.model.double()
        self._direct = Direct(self.model, self.optimizers[0])

    def _inputs(self, obs: Any) -> Tensor:
        return torch.as_tensor(obs).double().mul_(1 / 255).flatten(1)


def grey(kind: type[Classifier] = Classifier, **options: Any) -> tuple[Classifier, Classifier]:
    """An agent on grey shapes, and one that takes the general path."""
    seen = Interface(spaces.Box(0, 255, (1, 28, 28), np.uint8), spaces.Discrete(10))
    given = {"net": {"hidden": [100, 100]}, "optimizer": SGD, "learning_rate": 0.01, **options}
    agent, general = (kind(seen, 0, "cpu", **given) for _ in range(2))
    general._direct.layers = []
    assert agent._direct.ready() and not general._direct.ready()
    return agent, general


def greys(count: int, labels: tuple[int, ...] = tuple(range(10))) -> Pairs:
    """Pictures of the built-in shapes, of a few classes."""
    from envs.datasets import load

    arrays = load("shapes_grey")
    rows = np.flatnonzero(np.isin(arrays.train_y, labels))
    rows = np.random.default_rng(0).permutation(rows)[:count]
    return Pairs(torch.from_numpy(arrays.train_x[rows]), torch.from_numpy(arrays.train_y[rows]))


def apart(a: Classifier, b: Classifier) -> float:
    """The root of the mean squared difference of the layer that differs most."""
    other = weights(b)
    return max(float((value - other[name]).square().mean().sqrt()) for name, value in weights(a).items())


@pytest.mark.parametrize("decay", [0.0, 1e-2], ids=["", "decay"])
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize(
    ("kind", "rows", "steps", "far"),
    [(Classifier, 1, 1000, 1e-5), (Classifier, 32, 100, 5e-5), (Double, 1, 150, 1e-10), (Double, 32, 60, 1e-10)],
    ids=["online", "float32", "online float64", "float64"],
)
def test_written_out_it_is_the_same_step(
    kind: type[Classifier], rows: int, steps: int, far: float, masked: bool, decay: float
) -> None:
    """To 1e-10 in float64. In float32 processors sum in unlike orders, and a ReLU near zero falls either way."""
    agent, general = grey(kind)
    classes = (2, 7, 8) if masked else tuple(range(10))
    data = greys(min(rows * steps, 600), classes)
    start = weights(agent)
    for one in (agent, general):
        one.decay = decay
        if masked:
            one.enter(Visit(1, task("some", classes, True), steps, 0))
    for i in range(steps):
        at = (i * rows) % (len(data.label) - rows + 1)
        part = Pairs(data.obs[at : at + rows], data.label[at : at + rows])
        numbers = [step(one, part) for one in (agent, general)]
        assert abs(float(numbers[0]["losses/loss"]) - float(numbers[1]["losses/loss"])) < 1e-4
        if i in (0, 46, 47, 48, 100):
            assert apart(agent, general) < far, "whenever it is looked at"
    assert apart(agent, general) < far
    moved = {name: float((value - start[name]).square().mean().sqrt()) for name, value in weights(agent).items()}
    assert min(moved.values()) > 2 * far and all(type(p.grad) is type(None) for p in agent.model.parameters())
    one, other = (each.act(data.obs, None, True)[0] for each in (agent, general))
    assert (one != other).mean() < (1e-2 if kind is Classifier else 1e-9), "a tie may fall either way"


def test_it_may_change_between_the_two_ways() -> None:
    agent, general = grey()
    data, handle = greys(300), None
    for i, rows in enumerate([1] * 5 + [3] + [1] * 5 + [32] + [1] * 60):
        if i == 20:
            handle = agent.model[0].register_forward_hook(lambda *args: None)
        if i == 25:
            assert handle is not None and not agent._direct.ready()
            handle.remove()
        for one in (agent, general):
            if i == 40:
                one.optimizers[0].param_groups[0]["lr"] = 0.02
            if i == 50:
                one.decay = 0.05
            step(one, Pairs(data.obs[i * 3 : i * 3 + rows], data.label[i * 3 : i * 3 + rows]))
    assert agent._direct.ready() and apart(agent, general) < 1e-5


def attached(**settings: Any) -> tuple[Classifier, build.Plan]:
    data = {"threads": 1, "stream": STREAM, "monitors": [], **settings}
    data["agent"] = {"net": {"hidden": [6]}, "optimizer": SGD, "learning_rate": 0.1, **settings.get("agent", {})}
    plan = build.build(config.read(data))
    for method in plan.methods.values():
        method.attach(plan.agent)
    return plan.agent, plan  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("settings", "ready"),
    [
        ({}, True),
        ({"agent": {"optimizer": {"use": "sgd", "weight_decay": 0.01}}}, True),
        ({"methods": ["l2"]}, True),
        ({"methods": ["erank"]}, True),
        ({"methods": ["l2_er"]}, True),
        ({"methods": ["l2", "erank"]}, True),
        ({"agent": {"optimizer": {"use": "sgd", "momentum": 0.9}}}, False),
        ({"agent": {"optimizer": {"use": "sgd", "maximize": True}}}, False),
        ({"agent": {"optimizer": {"use": "adam"}}}, False),
        ({"methods": ["l2_init"]}, False),
        ({"methods": ["agem"]}, False),
        ({"methods": ["weight_decay"]}, False),
        ({"methods": ["weight_clip"]}, False),
        ({"methods": ["cbp"]}, False),
        ({"methods": ["redo"]}, False),
        ({"methods": ["si"]}, False),
        ({"methods": ["l2", "replay"]}, False),
        ({"methods": [{"use": "l2_er", "how": "loss"}]}, False),
        ({"agent": {"net": {"hidden": [6], "activation": "crelu"}}}, False),
        ({"agent": {"net": {"hidden": [6], "activation": "tanh"}}}, False),
        ({"agent": {"net": {"hidden": [6], "norm": "layer"}}}, False),
        ({"agent": {"net": {"use": "conv", "channels": [], "hidden": [6]}}}, False),
    ],
    ids=str,
)
def test_when_a_step_may_be_written_out(settings: dict[str, Any], ready: bool) -> None:
    agent, _ = attached(**settings)
    assert agent._direct.ready() == ready


def test_not_with_several_heads() -> None:
    agent = enter(enter(learner(optimizer=SGD), 1, ONE, head="per_task"), 2, TWO, head="per_task")
    assert not agent._direct.ready()
    assert not enter(agent, 3, ONE, head="per_task")._direct.ready()


@pytest.mark.parametrize("net", [{"hidden": [8]}, {"hidden": [8, 8]}], ids=str)
def test_with_one_head_both_ways_are_the_same(net: dict[str, Any]) -> None:
    agents = [enter(learner(optimizer=SGD, net=net), 1, ONE, head="per_task") for _ in range(2)]
    agents[1]._direct.layers = []
    for i in range(20):
        for one in agents:
            step(one, pairs(1 + i % 3, (0, 3), i))
    assert apart(*agents) < 1e-6


WATCH: dict[str, Callable[[Classifier], Any]] = {
    "forward": lambda agent: agent.model[0].register_forward_hook(lambda *args: None),
    "before forward": lambda agent: agent.model[1].register_forward_pre_hook(lambda *args: None),
    "backward": lambda agent: agent.model[0].register_full_backward_hook(lambda *args: None),
    "gradient": lambda agent: agent.model[0].weight.register_hook(lambda grad: None),
    "whole gradient": lambda agent: agent.model[0].bias.register_post_accumulate_grad_hook(lambda value: None),
    "before step": lambda agent: agent.optimizers[0].register_step_pre_hook(lambda *args: None),
    "after step": lambda agent: agent.optimizers[0].register_step_post_hook(lambda *args: None),
    "before backward": lambda agent: agent.model[0].register_full_backward_pre_hook(lambda *args: None),
}


@pytest.mark.parametrize(
    "kind",
    [*WATCH],
)
def test_whoever_watches_is_not_left_out(kind: str) -> None:
    agent = learner(optimizer=SGD)
    assert agent._direct.ready()
    handle = WATCH[kind](agent)
    assert not agent._direct.ready()
    handle.remove()
    assert agent._direct.ready(), "and when it has gone the step is fast again"


def test_a_frozen_layer_is_not_stepped() -> None:
    agent = learner(optimizer=SGD)
    agent.model[0].weight.requires_grad_(False)
    before = weights(agent)
    step(agent, pairs())
    assert not agent._direct.ready() and torch.equal(before["0.weight"], weights(agent)["0.weight"])


L2ER = {"l2": 1e-3, "lr": 1e-4, "samples": 24}


@pytest.mark.parametrize(("rows", "every"), [(1, 5), (16, 3)])
def test_l2_er_acts_the_same_either_way(rows: int, every: int) -> None:
    """For as long as rounding does not grow: where a singular value vanishes the rank has a kink."""
    agents, data = (*grey(Double), *grey(Double)), greys(400)
    methods: list[Any] = [named.locate(named.METHODS["l2_er"], {}, "methods")(**L2ER, every=every) for _ in range(2)]
    methods += [named.locate(named.METHODS["l2"], {}, "methods")(L2ER["l2"])]
    for agent, method in zip(agents, methods, strict=False):
        method.attach(agent)
    assert agents[0]._direct.ready()
    for i in range(40):
        at = i * rows % (len(data.label) - rows)
        for agent in agents:
            step(agent, Pairs(data.obs[at : at + rows], data.label[at : at + rows]))
    assert apart(*agents[:2]) < 1e-9 and apart(agents[0], agents[2]) > 1e-6
    told = [method.numbers() for method in methods[:2]]
    for numbers in told:
        del numbers["seconds"]
    assert told[0] == pytest.approx(told[1], rel=1e-6) and told[0]["erank/steps"] == 40 // every


@pytest.mark.parametrize("batch", [1, 16])
def test_l2_er_walks_the_same_either_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch: int) -> None:
    data = {
        **DATA,
        "stream": {**DATA["stream"], "batch": batch, "epochs": 1, "samples": 8 * batch},
        "agent": {"net": {"hidden": [30, 20]}, "optimizer": SGD, "learning_rate": 0.01},
        "methods": [{"use": "l2_er", **L2ER, "every": 3}],
    }
    taken: list[bool] = []
    ready = Direct.ready
    monkeypatch.setattr(Direct, "ready", lambda self: (taken.append(ready(self)), taken[-1])[1])
    direct = crl.train(data, out=tmp_path / "direct")
    assert all(taken) and 28 <= len(taken) <= 32
    begin = Classifier.__init__

    def generally(self: Classifier, *args: Any, **options: Any) -> None:
        begin(self, *args, **options)
        self._direct.layers = []

    monkeypatch.setattr(Classifier, "__init__", generally)
    general = crl.train(data, out=tmp_path / "general")
    assert not any(taken[-28:]) and apart(direct.agent, general.agent) < 1e-5  # type: ignore[arg-type]
    risen = [[value for *_, value in logged(run, "method/l2_er/erank/steps")] for run in (direct, general)]
    assert risen[0] == risen[1] and 9 <= sum(risen[0]) <= 10


@pytest.mark.parametrize(
    "batch",
    [
        1,
        16,
    ],
)
def test_a_look_in_the_middle_of_a_visit_changes_nothing(batch: int) -> None:
    """What a checkpoint or an evaluation between two safe points asks for leaves the learned weights bit for bit."""
    rows = greys(300)
    slices = [Slice("all", *[np.arange(300)] * 2, *[rows.label.numpy()] * 2)]
    arrays = dataclasses.replace(tiny(), train_x=rows.obs.numpy(), test_x=rows.obs.numpy())

    def walked(look: bool) -> dict[str, Tensor]:
        task = ImageTask(arrays, slices, 10, Settings(batch))
        agent, visit = grey()[0], Visit(1, task, 300, 0)
        agent.enter(visit)
        for _ in task.train(agent, visit):
            if look:
                agent.state_dict()
        return weights(agent)

    assert equal(walked(False), walked(True))


# Walks.

DATA: dict[str, Any] = {
    "name": "walk",
    "stream": {"use": "split", "data": "shapes_grey", "tasks": 4, "samples": 128, "batch": 32, "epochs": 2},
    "threads": 1,
    "agent": {"net": {"hidden": [24, 16]}, "optimizer": {"use": "sgd", "momentum": 0.9}, "learning_rate": 0.05},
    "monitors": [],
    "evaluation": {"samples": 60},
}
LOOK: list[Any] = [{"use": "hessian", "probes": 1, "steps": 4, "samples": 24}, "erank", "dormant", "norms"]


@pytest.fixture(scope="module", autouse=True)
def short_ticks() -> Iterator[None]:
    """Lines of the log that are near each other, so that short visits have several."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("envs.images.TICK", 64)
        yield


def walk(out: Path, **settings: Any) -> Run:
    return crl.train({**DATA, **settings}, out=out, overwrite=True)


def logged(run: Run, name: str) -> list[tuple[int, str, Any]]:
    return [(r.visit, r.task, r.value) for r in run.records if r.name == name]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return walk(tmp_path_factory.mktemp("plain"))


def test_a_walk_leaves_a_matrix_of_accuracies(plain: Run) -> None:
    assert plain.matrix.shape == (5, 4) and plain.tasks == ["task 1", "task 2", "task 3", "task 4"]
    assert ((plain.matrix >= 0) & (plain.matrix <= 1)).all()
    assert np.allclose(plain.matrix * 60, np.round(plain.matrix * 60)), "of 60 test images each"
    manifest = plain.manifest
    assert (manifest["measure"], manifest["status"]) == ("accuracy", "finished")
    assert list(manifest["about"]) == plain.tasks and " ... " in manifest["about"]["task 1"]
    assert [visit["steps"] for visit in manifest["visits"]] == [256] * 4
    assert len({visit["seed"] for visit in manifest["visits"]}) == 4


def test_a_walks_records(plain: Run) -> None:
    scores = logged(plain, "eval/accuracy")
    assert [value for _, _, value in scores] == plain.matrix.ravel().tolist()
    assert [visit for visit, _, _ in scores] == [i for i in range(5) for _ in range(4)]
    assert not logged(plain, "eval/return") and not logged(plain, "eval/length")
    learned = logged(plain, "train/accuracy")
    assert [(visit, name) for visit, name, _ in learned] == [(i, f"task {i}") for i in (1, 2, 3, 4) for _ in range(4)]
    areas = logged(plain, "metrics/area")
    assert [(visit, name) for visit, name, _ in areas] == [(i, f"task {i}") for i in (1, 2, 3, 4)]
    means = np.array([value for *_, value in learned]).reshape(4, 4).mean(1)
    assert [value for *_, value in areas] == pytest.approx(means), "accuracy while learning, over all samples"
    assert all(math.isfinite(value) for *_, value in logged(plain, "losses/loss"))


def test_a_walk_learns(tmp_path: Path) -> None:
    stream = {"data": "shapes_grey", "tasks": 20, "only": 3, "batch": 16, "epochs": 2, "augment": ["crop"]}
    net = {"use": "conv", "channels": [8, 8], "hidden": [16]}
    run = walk(tmp_path, stream=stream, agent={"net": net, "learning_rate": 3e-3}, evaluation={})
    assert run.tasks == ["task 3"] and run.matrix[0, 0] < 0.4 < 0.5 < run.matrix[1, 0]


def test_the_same_seed_walks_the_same(plain: Run, tmp_path: Path) -> None:
    again, other = walk(tmp_path / "again"), walk(tmp_path / "other", seed=1)
    assert equal(weights(plain.agent), weights(again.agent)) and np.array_equal(plain.matrix, again.matrix)
    kept = [[repr(r) for r in run.records if not r.name.startswith("time/")] for run in (plain, again)]
    assert kept[0] == kept[1]
    assert not equal(weights(plain.agent), weights(other.agent)) and other.manifest["about"] != plain.manifest["about"]


@pytest.mark.parametrize(
    "settings",
    [
        {"monitors": LOOK},
        {"evaluation": {"samples": 9, "every": 64}},
        {"evaluation": {"of": "own"}, "checkpoint": {"every": 96}},
    ],
    ids=["monitors", "evaluation", "checkpoints"],
)
def test_looking_changes_nothing(plain: Run, tmp_path: Path, settings: dict[str, Any]) -> None:
    run = walk(tmp_path, **settings)
    assert equal(weights(plain.agent), weights(run.agent))
    if "monitors" in settings:
        for start in ("hessian/", "erank/", "dormant/", "norms/"):
            assert any(r.name.startswith(start) for r in run.records), start
        assert all(r.note.startswith("between ") for r in run.records if r.note), "what is not resolved"
    elif settings["evaluation"].get("every"):
        during = [(r.visit, r.step) for r in run.records if r.phase == "during" and r.task == "task 1"]
        assert during == [(i, 256 * (i - 1) + 64 * k) for i in (1, 2, 3, 4) for k in (1, 2, 3)]


@pytest.mark.parametrize("of", ["own", "seen"])
def test_only_some_tasks_are_evaluated(plain: Run, tmp_path: Path, of: str) -> None:
    run = walk(tmp_path, evaluation={"samples": 60, "of": of})
    asked = np.eye(5, 4, -1, dtype=bool) if of == "own" else np.tri(5, 4, -1, dtype=bool)
    assert np.array_equal(np.isfinite(run.matrix), asked)
    assert np.array_equal(run.matrix[asked], plain.matrix[asked])
    assert len(logged(run, "eval/accuracy")) == asked.sum()


def test_of_classes_that_are_not_told_none_is_known_before_it_is_seen(tmp_path: Path) -> None:
    run = walk(tmp_path, stream={**DATA["stream"], "scenario": "class"})
    assert np.array_equal(np.isfinite(run.matrix[1:]), np.tri(4, 4, dtype=bool))
    assert np.isfinite(run.matrix[0]).all()
    replayed = walk(tmp_path / "joint", stream={**DATA["stream"], "scenario": "class", "joint": True, "epochs": 6})
    assert [visit["steps"] for visit in replayed.manifest["visits"]] == [768, 1536, 2304, 3072]
    assert replayed.matrix[4].mean() > run.matrix[4].mean() + 0.02, "joint learning does not forget"


def test_a_head_for_each_task(tmp_path: Path) -> None:
    run = walk(tmp_path, boundary={"head": "per_task"}, stream={**DATA["stream"], "use": "split", "epochs": 1})
    assert np.array_equal(np.isfinite(run.matrix[1:]), np.tri(4, 4, dtype=bool))
    assert len(run.agent.model[-1].heads) == 4  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "stream",
    [
        {"use": "permuted", "tasks": 2},
        {"use": "incremental", "tasks": 2},
        {"use": "random_label", "tasks": 2},
        {"use": "pairs", "tasks": 2},
    ],
    ids=str,
)
def test_every_stream_walks(tmp_path: Path, stream: dict[str, Any]) -> None:
    given = {"data": "shapes_grey", "samples": 64, "batch": 32, **stream}
    run = walk(tmp_path, stream=given, boundary={"announced": stream["use"] != "permuted"})
    unseen = stream["use"] == "incremental"
    assert run.matrix.shape == (3, 2) and np.isnan(run.matrix).sum() == unseen
    assert run.manifest["action"] == ("Discrete(2)" if stream["use"] == "pairs" else "Discrete(100)")


def test_the_latest_checkpoints_are_kept(tmp_path: Path) -> None:
    run = walk(tmp_path, checkpoint={"keep": 2, "every": 96})
    assert sorted(p.name for p in (run.path / "checkpoints").iterdir()) == ["boundary-03.pt", "boundary-04.pt"]
    assert run.at(3)[1]["visit"] == 3
    refused(lambda: run.at(1), "boundary-01.pt: no such checkpoint", "boundary-03, boundary-04")


def test_what_a_new_agent_learns_alone(tmp_path: Path) -> None:
    stream = {**DATA["stream"], "tasks": 2, "samples": 64}
    run = walk(tmp_path, stream=stream, baseline="fresh")
    assert run.manifest["status"] == "finished"
    found = {(r.name, r.task): r.value for r in run.records if r.phase == "baseline"}
    areas = {name: value for _, name, value in logged(run, "metrics/area")}
    for k, name in enumerate(run.tasks):
        alone = walk(tmp_path / name, stream={**stream, "only": k + 1})
        ((_, same, base),) = logged(alone, "metrics/area")
        assert same == name and alone.tasks == [name]
        assert found["metrics/fresh_area", name] == base
        assert found["metrics/forward_transfer", name] == pytest.approx((areas[name] - base) / (1 - base))
        assert found["metrics/forward_transfer_ratio", name] == pytest.approx(areas[name] / base - 1)
    assert len(found) == 6 and found["metrics/forward_transfer", "task 1"] == pytest.approx(0), (
        "its first visit is alone"
    )


@pytest.mark.parametrize(
    ("baseline", "alike"), [("fresh", []), ("fresh_with_methods", [{"use": "l2", "strength": 1.0}])]
)
def test_a_new_agent_alone_has_no_methods_unless_told(tmp_path: Path, baseline: str, alike: list[Any]) -> None:
    """Else a method that slows learning would slow its baseline too, and its forward transfer would be 0."""
    stream = {**DATA["stream"], "tasks": 1, "samples": 256, "epochs": 6}
    slow = [{"use": "l2", "strength": 1.0}]
    run = walk(tmp_path, stream=stream, methods=slow, baseline=baseline)
    (fresh,) = [r.value for r in run.records if r.name == "metrics/fresh_area"]
    alone = walk(tmp_path / "alone", stream=stream, methods=alike)
    assert fresh == logged(alone, "metrics/area")[0][2]
    assert (fresh != logged(run, "metrics/area")[0][2]) == (baseline == "fresh")


def test_tasks_are_visited_again(tmp_path: Path) -> None:
    run = walk(tmp_path, stream={**DATA["stream"], "tasks": 2}, repeat=2)
    assert run.matrix.shape == (5, 2)
    assert [visit["task"] for visit in run.manifest["visits"]] == ["task 1", "task 2"] * 2
    assert len(logged(run, "metrics/area")) == 4 and len(logged(run, "metrics/plasticity_ratio/task 1")) == 1


@pytest.mark.parametrize("head", ["shared", "per_task"])
def test_a_probe_repeats_the_log(tmp_path: Path, head: str) -> None:
    run = walk(tmp_path, stream={**DATA["stream"], "tasks": 2}, monitors=LOOK, boundary={"head": head})
    for visit, phase in itertools.product((1, 2), ("init", "end")):
        seen = probe(run.path, visit, phase)
        assert seen.numbers and seen.logged.keys() == seen.numbers.keys() and seen.differ == [] and not seen.problems
        assert any(name.startswith("hessian/") for name in seen.numbers) == (phase == "init")
    assert main(["probe", str(run.path), "--visit", "2"]) == 0


def test_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    import yaml

    Path("walk.yaml").write_text(yaml.safe_dump({**DATA, "stream": {**DATA["stream"], "data": "mnist"}}))
    common = ["--data", "shapes", "--set", "stream.samples=32", "--set", "evaluation.samples=5"]
    assert main(["check", "walk.yaml", *common]) == 0
    said = capsys.readouterr().out
    assert "4 tasks, 4 visits, 256 samples" in said and "on 5 of its test images" in said
    assert main(["train", "--data-seq", "walk.yaml", *common]) == 0
    folder = capsys.readouterr().out.strip()
    run = crl.load(folder)
    assert run.manifest["observation"].startswith("Box(0, 255, (3, 32, 32)") and run.matrix.shape == (5, 4)
    assert main(["eval", folder]) == 0
    assert f"{run.matrix[4, 3]:.3f}" in capsys.readouterr().out
    assert main(["train", "--env-seq", "classic", "--data", "shapes"]) == 2
    assert "--data names the dataset of a --data-seq" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_ends_the_walk(tmp_path: Path) -> None:
    with pytest.raises(CrlError, match=r"losses/loss is not finite any more: step (64|128), visit 1"):
        walk(tmp_path, agent={**DATA["agent"], "learning_rate": 1e12})


def test_whole_is_a_task_of_the_contract() -> None:
    """The kit for tasks holds for images as well: same visits, same scores, nothing disturbed."""
    task = whole(tiny(), Settings(8))
    agent = Classifier(task.interface, 0, "cpu", net={"hidden": [8]})
    before = nn.utils.parameters_to_vector(agent.model.parameters()).clone()
    list(task.train(agent, Visit(1, task, task.samples, 0)))
    assert not torch.equal(before, nn.utils.parameters_to_vector(agent.model.parameters()))
