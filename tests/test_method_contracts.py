"""Every method on every agent: idle it changes nothing, on it acts, stopped and resumed it goes on as if never so."""

import copy
import functools
import io
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from gymnasium import spaces

import crl
from agents.optimizers import Muon
from crl import boundary, build, config
from crl.cli import main
from crl.core import CrlError, Interface, Score, Tick, aside, derive, random_state, set_random_state
from crl.core import Pairs as Labelled
from crl.methods.columns import Columns
from crl.methods.injection import Beside
from crl.methods.units import NORMS, Young
from crl.named import METHODS
from crl.opened import restore
from tests.full_agent import FullAgent
from tests.marks import SLOW, quickly

pytestmark = pytest.mark.usefixtures("one_thread", "short_ticks")

NET = {"hidden": [8, 8], "activation": "tanh"}
AGENTS: dict[str, dict[str, Any]] = {
    "ppo": {"use": "ppo", "n_steps": 8, "batch_size": 8, "n_epochs": 2, "net": NET},
    "dqn": {"use": "dqn", "learning_starts": 10, "train_freq": 3, "gradient_steps": 2, "batch_size": 8,
            "buffer_size": 64, "target_update_interval": 10, "learning_rate": 3e-2, "net": NET},
    "classifier": {"use": "agents.classifier.Classifier", "net": NET},
    "full": {"use": "tests.full_agent.FullAgent", "net": {"hidden": [8, 8]}},
}  # fmt: skip
A = {"env": "CartPole-v1", "name": "a", "steps": 48}
B = {"env": "CartPole-v1", "name": "b", "steps": 48, "kwargs": {"sutton_barto_reward": True}}

# Defaults but for what keeps them from acting in a walk of some forty steps. No interval divides a tick.
REMEMBERED = {"size": 40, "batch": 8, "every": 3}
SMALL: dict[str, dict[str, Any]] = {
    "erank": {"lr": 1e-3, "every": 3, "samples": 16},
    "l2_er": {"l2": 1e-4, "lr": 1e-3, "every": 3, "samples": 16},
    "weight_clip": {"kappa": 0.5},
    "redo": {"every": 7, "tau": 1.0},
    "cbp": {"rate": 0.07, "maturity": 5},
    "ewc": {"samples": 8},
    "online_ewc": {"samples": 8},
    "mas": {"samples": 8},
    "replay": REMEMBERED,
    "clone": REMEMBERED,
    "der": REMEMBERED,
    "agem": REMEMBERED,
    "generative_replay": {"batch": 8, "latent": 2, "hidden": 8},
}
IDLE = {  # idle by their options, though their classes do not say so
    "weight_clip": {"kappa": 1e9},
    "agem": {"every": 10**9},
}
NEVER_IDLE = {"spectral_norm", "normalize_and_project", "reset", "progressive", "packnet"}


class Pairs:
    """Labelled pairs as a task: the label is the largest of a few mixtures, which are a task's own."""

    def __init__(self, name: str, own: int) -> None:
        self.name, self.steps = name, 0
        self.mix = np.random.default_rng(own).normal(size=(4, 3))
        self.interface = Interface(spaces.Box(-9, 9, (4,)), spaces.Discrete(3), envs=2)

    def pairs(self, seed: int, size: int) -> Labelled:
        obs = np.random.default_rng(seed).normal(size=(size, 4)).astype(np.float32)
        return Labelled(torch.from_numpy(obs), torch.from_numpy((obs @ self.mix).argmax(1)))

    def train(self, agent: Any, visit: Any) -> Any:
        while self.steps < visit.steps:
            agent.observe(self.pairs(derive(visit.seed, self.steps), 4))
            learned = agent.update()
            self.steps += 4
            if self.steps % 20 == 0 or self.steps >= visit.steps:
                yield Tick(self.steps, learned)
        self.steps = 0

    def evaluate(self, agent: Any, seed: int, episodes: int, greedy: bool) -> Score:
        with aside(seed):
            seen = self.pairs(seed, episodes)
            right = agent.act(seen.obs, None, greedy)[0] == seen.action
        return Score(tuple(map(float, right)), (1,) * episodes)

    def sample(self, agent: Any, seed: int, size: int) -> Labelled:
        return self.pairs(seed, size)

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]


# One walk, a, b, a, as the walk of a run goes about it, with a checkpoint at every safe point.


def planned(agent: str | Mapping[str, Any], *methods: Mapping[str, Any], **parts: Any) -> build.Plan:
    """The plan of a small walk; the classifier's is of labelled pairs."""
    spec = dict(AGENTS[agent] if isinstance(agent, str) else agent)
    data = {"tasks": [A, B, A], "engine": {"envs": 2}, "monitors": [], "agent": spec, "methods": list(methods)}
    experiment = config.read({**data, **parts})
    if spec["use"] != AGENTS["classifier"]["use"]:
        return build.build(experiment)
    tasks: list[Any] = [Pairs("a", 0), Pairs("b", 1)]
    torch.set_num_threads(1)
    learner = build.build_agent(replace(experiment, stream={"use": "split"}), tasks[0].interface, "cpu")
    found = build.build_methods(experiment, learner)
    return build.Plan(experiment, tasks, [0, 1, 0], [48] * 3, tasks[0].interface, learner, found, {}, "cpu")


class Story:
    """What a walk left: its last state, what the methods said at each tick, and its checkpoints."""

    def __init__(self, plan: build.Plan) -> None:
        self.plan, self.agent = plan, plan.agent
        self.methods = plan.methods
        self.said: list[str] = []
        self.kept: dict[tuple[int, int], tuple[bytes, int]] = {}

    def go(self, visit_index: int = 0, done: int = 0) -> "Story":
        if not visit_index and not done:
            for method in self.methods.values():
                method.attach(self.agent)
        for visit in self.plan.visits[visit_index:]:
            if not done:
                boundary.enter(self.plan, visit)
            for tick in visit.task.train(self.agent, replace(visit, done=done)):
                self.listen()
                if tick.steps < visit.steps:
                    self.keep(visit.index - 1, tick.steps)
            done = 0
            for method in self.methods.values():
                if visit.rules.announced:
                    method.leave(visit)
            self.keep(visit.index, 0)
        self.listen()
        return self

    def listen(self) -> None:
        for name, method in self.methods.items():
            numbers = {key: value for key, value in method.numbers().items() if key != "seconds"}
            self.said.append(f"{name} {numbers!r}")

    def keep(self, visit: int, done: int) -> None:
        file = io.BytesIO()
        torch.save(self.state(), file)
        self.kept[visit, done] = file.getvalue(), len(self.said)

    def state(self) -> dict[str, Any]:
        return {
            "agent": self.agent.state_dict(),
            "tasks": {task.name: task.state_dict() for task in self.plan.tasks},
            "methods": {name: method.state_dict() for name, method in self.methods.items()},
            "random": random_state(),
        }

    def load(self, saved: bytes) -> "Story":
        state = torch.load(io.BytesIO(saved), weights_only=True)
        restore(self.plan, state)
        for task in self.plan.tasks:
            task.load_state_dict(state["tasks"][task.name])
        set_random_state(state["random"])
        return self

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        return {name: value.clone() for name, value in self.agent.model.state_dict().items()}  # type: ignore[attr-defined]


def difference(a: Any, b: Any, place: str = "state") -> str:
    """Where two states differ first; nothing where they agree bit for bit."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        if list(a) != list(b):
            return f"{place}: {[*a]} and {[*b]}"
        return next(filter(None, (difference(a[key], b[key], f"{place}.{key}") for key in a)), "")
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        if len(a) != len(b):
            return f"{place}: {len(a)} and {len(b)}"
        return next(
            filter(None, (difference(x, y, f"{place}.{i}") for i, (x, y) in enumerate(zip(a, b, strict=True)))), ""
        )
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        same = a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
        return (
            "" if same else f"{place}: by {float((a.double() - b.double()).abs().max()) if a.shape == b.shape else a}"
        )
    return "" if repr(a) == repr(b) else f"{place}: {a!r} and {b!r}"


def spec_of(agent: str, method: str = "") -> dict[str, Any]:
    """The agent as a method wants it: one method goes with norm layers only."""
    spec = copy.deepcopy(AGENTS[agent])
    if method == "normalize_and_project":
        spec["net"]["norm"] = "layer"
    return spec


@functools.cache
def whole(agent: str, method: str = "", normed: bool = False, head: str = "shared") -> Story:
    """A walk that was never stopped, with one method or none."""
    spec = spec_of(agent, "normalize_and_project" if normed else method)
    methods = [{"use": method, **SMALL.get(method, {})}] if method else []
    with aside(1):
        return Story(planned(spec, *methods, boundary={"head": head})).go()


@pytest.fixture(scope="module")
def short_ticks() -> Any:
    """Safe points in the middle of a short visit."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("envs.gym.TICK", 20)
        yield


EVERY = pytest.mark.parametrize("name", METHODS)
ALL = pytest.mark.parametrize("agent", AGENTS)
GO = [(agent, name) for agent in AGENTS for name in METHODS if (agent, name) != ("ppo", "replay")]
EACH = pytest.mark.parametrize(("agent", "name"), quickly(GO, lambda case: case[0] in ("ppo", "classifier")))


# Idle.


def idle_options(name: str) -> dict[str, Any]:
    module, _, cls = METHODS[name].rpartition(".")
    return dict(getattr(__import__(module, fromlist=[cls]), cls).idle) or IDLE.get(name, {})


@EACH
def test_idle_changes_nothing(agent: str, name: str) -> None:
    options = idle_options(name)
    assert bool(options) != (name in NEVER_IDLE)
    if not options:
        pytest.skip(f"{name} has no options with which it does nothing")
    small = {key: value for key, value in SMALL.get(name, {}).items() if key not in options}
    with aside(1):
        story = Story(planned(agent, {"use": name, **small, **options})).go()
    assert not difference(story.agent.state_dict(), whole(agent).agent.state_dict())
    last, plain = (torch.load(io.BytesIO(s.kept[3, 0][0]), weights_only=True)["random"] for s in (story, whole(agent)))
    assert not difference(last, plain), "it drew from a global stream"


# On.


@EACH
def test_on_it_acts(agent: str, name: str) -> None:
    plain = whole(agent, normed=name == "normalize_and_project")
    story = whole(agent, name)
    assert difference(story.weights, plain.weights)
    assert all(torch.isfinite(value).all() for value in story.weights.values())


NEED_NORM = {"normalize_and_project"}
NEED_PLAIN = {"progressive", "plasticity_injection"}
ONE_HEAD = {*NEED_PLAIN, "head_reset"}
NEED_BATCHES = {"erank", "l2_er", "lwf", "replay", "clone", "generative_replay", "agem", "der"}
OLD = {name: {"replay"} if name == "ppo" else set() for name in AGENTS}  # whose old experience says nothing
NEED_SAMPLES = {"ewc", "online_ewc", "mas"}
NEED_CHAINS = {"spectral_norm", "parseval", "redo", "cbp", "head_reset", "packnet", *NEED_NORM, *NEED_PLAIN}
MINIGRID = [{"env": "MiniGrid-Empty-5x5-v0", "steps": 48}]
PENDULUM = [{"env": "Pendulum-v1", "steps": 48}]
SAC = {"use": "stable_baselines3.SAC", "learning_starts": 8, "batch_size": 8, "buffer_size": 64,
       "policy_kwargs": {"net_arch": [8, 8]}}  # fmt: skip
REFUSED: list[tuple[str, dict[str, Any], dict[str, Any], set[str]]] = [
    *((name, spec, {}, NEED_NORM | OLD[name]) for name, spec in AGENTS.items()),
    *((f"{name} with norm", spec_of(name, "normalize_and_project"), {}, NEED_PLAIN | OLD[name]) for name in AGENTS),
    *((f"{name} with crelu", {**AGENTS[name], "net": {"hidden": [8, 8], "activation": "crelu"}}, {},
       NEED_PLAIN | NEED_NORM | OLD[name]) for name in ("ppo", "dqn", "classifier")),
    ("ppo on categories", AGENTS["ppo"], {"tasks": MINIGRID}, {"generative_replay"} | NEED_NORM | OLD["ppo"]),
    ("a bare agent", {"use": "tests.my_agent.MyAgent"}, {},
     NEED_NORM | NEED_BATCHES | NEED_SAMPLES | NEED_PLAIN | {"packnet"}),
    ("a2c", {"use": "stable_baselines3.A2C"}, {}, NEED_NORM | NEED_BATCHES | NEED_SAMPLES),
    ("sac", SAC, {"tasks": PENDULUM}, NEED_NORM | NEED_BATCHES | NEED_SAMPLES | NEED_CHAINS),
]  # fmt: skip


@pytest.mark.parametrize(("agent", "parts", "expected"), [r[1:] for r in REFUSED], ids=[r[0] for r in REFUSED])
def test_who_is_refused(agent: dict[str, Any], parts: dict[str, Any], expected: set[str]) -> None:
    plan = planned(agent, **parts)
    refused = set()
    for name in METHODS:
        experiment = replace(plan.experiment, methods=[{"use": name}])
        try:
            build.build_methods(experiment, plan.agent)
        except CrlError as error:
            assert str(error).startswith("methods.0: ") and len(str(error).splitlines()) == 1
            refused.add(name)
    assert refused == expected


OTHERS = {
    "SAC": SAC,
    "TD3": {**SAC, "use": "stable_baselines3.TD3"},
    "QRDQN": {**SAC, "use": "sb3_contrib.QRDQN"},
    "CrossQ": {**SAC, "use": "sb3_contrib.CrossQ", "policy_kwargs": {"net_arch": {"pi": [8], "qf": [8]}}},
}


TRIED = [("SAC", name) for name in METHODS if name not in REFUSED[-1][-1]]
TRIED += [(agent, name) for agent in ("TD3", "QRDQN", "CrossQ") for name in ("reset", "l2")]


@pytest.mark.parametrize(("agent", "name"), TRIED)
def test_what_other_agents_accept_acts_and_resumes(agent: str, name: str) -> None:
    env = A if agent == "QRDQN" else PENDULUM[0]
    tasks = [{**env, "steps": 24, "name": name} for name in ("a", "b", "c")]
    spec, method = OTHERS[agent], {"use": name, **SMALL.get(name, {})}
    with aside(1):
        story = Story(planned(spec, method, tasks=tasks)).go()
    assert difference(story.weights, bare_walk(agent).weights)
    resumes(story, lambda: planned(spec, method, tasks=tasks))


@functools.cache
def bare_walk(agent: str) -> Story:
    env = A if agent == "QRDQN" else PENDULUM[0]
    with aside(1):
        return Story(
            planned(OTHERS[agent], tasks=[{**env, "steps": 24, "name": name} for name in ("a", "b", "c")])
        ).go()


# Young: what begins anew is learned, and has no past.


def moments(agent: Any, parameter: Any) -> list[torch.Tensor]:
    """An optimizer's memory of a parameter, where it has the parameter's shape; it must be known to one optimizer."""
    owners = [o for o in agent.optimizers if any(parameter is p for g in o.param_groups for p in g["params"])]
    assert len(owners) == 1, "no optimizer steps it"
    state = owners[0].state.get(parameter, {})
    return [value for value in state.values() if torch.is_tensor(value) and value.shape == parameter.shape]


@ALL
@pytest.mark.parametrize("name", ["redo", "cbp"])
def test_renewed_units_are_young(agent: str, name: str) -> None:
    with aside(1):
        plan = planned(agent, {"use": name, **SMALL[name]})
        method, learner, steps, events, checked = plan.methods[name], plan.agent, [0], [], []
        renew = method.renew

        def spy(layer: Any, units: Any, fold: Any = None) -> None:
            renew(layer, units, fold)
            if not len(units):
                return
            assert all((m[units] == 0).all() for m in moments(learner, layer.into.weight))
            columns = layer.columns[units].flatten()
            for reader in layer.out:
                assert (reader.weight[:, columns] == 0).all(), "it is read with zero"
                assert all((m[:, columns] == 0).all() for m in moments(learner, reader.weight))
            first = method.first[f"{layer.name}.weight"].flatten()
            assert torch.isin(layer.into.weight[units], first).all(), "its weights are drawn from the first ones"
            events.append((steps[0], layer, units, layer.into.weight[units].clone(), columns))

        def look(*_: Any) -> None:
            steps[0] += 1
            for begun, layer, units, before, columns in events:
                if steps[0] == begun + 4:
                    checked.append(layer.name)
                    assert (layer.into.weight[units] != before).any(1).all(), "it is learned"
                    assert all((reader.weight[:, columns] != 0).any() for reader in layer.out)

        method.renew = spy
        story = Story(plan)
        for item in plan.methods.values():
            item.attach(learner)
        for optimizer in learner.optimizers:  # type: ignore[attr-defined]
            optimizer.register_step_post_hook(look)
        boundary.enter(plan, plan.visits[0])
        list(plan.visits[0].task.train(learner, plan.visits[0]))
    assert checked and story.agent is learner


@ALL
@pytest.mark.parametrize("name", ["head_reset", "reset"])
def test_reset_weights_are_young(agent: str, name: str) -> None:
    with aside(1):
        story = begun(agent, {"use": name, "same": True})
        method, before = story.methods[name], copy.deepcopy(story.methods[name].first)
        chosen = method.chosen()
        assert any(difference(method.parameters[n].detach(), before[n]) for n in chosen), "there is what to reset"
        boundary.enter(story.plan, story.plan.visits[1])
        rest = [n for n in method.parameters if n not in chosen]
        assert bool(rest) == (name == "head_reset")
        for n in chosen:
            assert torch.equal(method.parameters[n], before[n])
            assert not any(m.any() for m in moments(story.agent, method.parameters[n]))
        assert all(any(m.any() for m in moments(story.agent, method.parameters[n])) for n in rest)
        list(story.plan.visits[1].task.train(story.agent, story.plan.visits[1]))
        assert all(not torch.equal(method.parameters[n], before[n]) for n in chosen)


def begun(agent: str, *methods: Mapping[str, Any]) -> Story:
    """A walk whose first visit is over."""
    story = Story(planned(agent, *methods))
    for method in story.methods.values():
        method.attach(story.agent)
    visit = story.plan.visits[0]
    boundary.enter(story.plan, visit)
    list(visit.task.train(story.agent, visit))
    for method in story.methods.values():
        method.leave(visit)
    return story


@ALL
@pytest.mark.parametrize("name", ["plasticity_injection", "progressive"])
def test_grown_layers_are_young(agent: str, name: str) -> None:
    kind, own = {"plasticity_injection": (Beside, "live"), "progressive": (Columns, "columns.1")}[name]
    with aside(1):
        story = begun(agent, {"use": name})
        batch = {"obs": torch.randn(5, 4)}
        before = answer(story, batch)
        boundary.enter(story.plan, story.plan.visits[1])
        if name == "plasticity_injection":
            torch.testing.assert_close(answer(story, batch), before)
        parts = [(n, p) for n, p in story.agent.model.named_modules() if isinstance(p, kind) and "target" not in n]  # type: ignore[attr-defined]
        new = [v for _, part in parts for v in part.get_submodule(own).parameters()]
        old = [v for _, part in parts for v in part.parameters() if not any(v is other for other in new)]
        assert len(new) >= 4 and all(v.requires_grad for v in new)
        assert not any(m.any() for v in new for m in moments(story.agent, v))
        first = [v.detach().clone() for v in new], [v.detach().clone() for v in old]
        list(story.plan.visits[1].task.train(story.agent, story.plan.visits[1]))
        assert not any(torch.equal(v, w) for v, w in zip(new, first[0], strict=True)), "what is new is learned"
        assert all(torch.equal(v, w) for v, w in zip(old, first[1], strict=True)), "what was there rests"


def answer(story: Story, batch: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = story.agent.outputs(batch)  # type: ignore[attr-defined]
        return found.clone()


@pytest.mark.parametrize("age", [1, 3, 50, 2000])
@pytest.mark.parametrize(
    ("make", "options", "size"),
    [
        (torch.optim.Adam, {}, 1.0),
        (torch.optim.Adam, {"betas": (0.5, 0.9)}, 1.0),
        (torch.optim.Adam, {"eps": 1e-5}, 1e-3),  # PPO's, and gradients of its size
        (torch.optim.Adam, {"amsgrad": True}, 1.0),
        (torch.optim.AdamW, {"weight_decay": 0.1}, 1.0),
        (Muon, {"hidden": False, "adam_share": 1.0}, 1.0),
    ],
    ids=["adam", "betas", "eps", "amsgrad", "adamw", "muon"],
)
def test_young_rows_move_as_in_a_new_adam(make: Any, options: dict[str, Any], size: float, age: int) -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    rows = torch.tensor([1, 3])
    old = torch.nn.Parameter(draw(6, 4))
    optimizer, young = make([old], lr=1e-2, **options), Young()
    for _ in range(age):
        old.grad = size * draw(6, 4)
        optimizer.step()
    with torch.no_grad():
        old[rows] = draw(2, 4)
        young.begin("w", old, rows, optimizer)
    new = torch.nn.Parameter(old.detach()[rows].clone())
    plain = torch.nn.Parameter(old.detach().clone())
    fresh, other = make([new], lr=1e-2, **options), make([plain], lr=1e-2, **options)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    rest = [0, 2, 4, 5]
    for _ in range(12):
        slope = size * draw(6, 4)
        old.grad, new.grad, plain.grad = slope.clone(), slope[rows].clone(), slope.clone()
        with torch.no_grad():
            young.before({"w": old})
        for each in (optimizer, fresh, other):
            each.step()
        with torch.no_grad():
            young.after({"w": old}, optimizer)
        torch.testing.assert_close(old[rows], new, rtol=0, atol=1e-6)
        assert torch.equal(old[rest], plain[rest]), "the others do not notice"


# Stop and resume.


def resumes(story: Story, plan: Any) -> None:
    """From the middle of a visit, and from a boundary, it ends as if it had never been stopped."""
    end = story.state()
    middle = [place for place in story.kept if place[0] == 1 and place[1]]
    for place in (*middle[:1], (2, 0)):
        saved, heard = story.kept[place]
        with aside(99):  # other streams than before
            twin = Story(plan()).load(saved).go(*place)
            found = twin.state()
        assert not difference(found["agent"], end["agent"]), f"agent, from {place}"
        assert not difference(found["methods"], end["methods"]), f"methods, from {place}"
        assert twin.said == story.said[heard:], f"what the methods say, from {place}"


@EACH
def test_resumed_is_never_stopped(agent: str, name: str) -> None:
    spec = spec_of(agent, name)
    resumes(whole(agent, name), lambda: planned(spec, {"use": name, **SMALL.get(name, {})}))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("shrink_perturb", {"every": "step", "keep": 0.99, "noise": 0.01}),
        ("erank", {"every": 3, "samples": 11, "how": "loss"}),
        ("erank", {"every": "epoch"}),
        ("l2_er", {"every": "epoch", "layers": "last"}),
    ],
)
def test_other_ways_resume(name: str, options: dict[str, Any]) -> None:
    def plan() -> build.Plan:
        return planned("ppo", {"use": name, **options})

    with aside(1):
        story = Story(plan()).go()
    resumes(story, plan)


HEADS = [go for go in GO if go[0] in ("ppo", "dqn") and go[1] not in ONE_HEAD]


@pytest.mark.parametrize(
    ("agent", "name"),
    quickly(HEADS, lambda case: case[0] == "dqn" and case[1] in ("l2_er", "cbp", "ewc", "der", "agem")),
)
def test_heads_per_task(agent: str, name: str) -> None:
    """With a head for each task a method acts on all of them, and resumes so."""
    spec, rules = spec_of(agent, name), {"head": "per_task"}
    story = whole(agent, name, head="per_task")
    resumes(story, lambda: planned(spec, {"use": name, **SMALL.get(name, {})}, boundary=rules))


@pytest.mark.parametrize("name", ["ewc", "online_ewc", "mas", "si", "l2_init", "lwf", "replay", "clone"])
def test_a_head_of_its_own_is_held(name: str) -> None:
    """The first head is known to hooks by the name that it has once there are several."""
    story = begun_with_heads("dqn", {"use": name, **SMALL.get(name, {})})
    method = story.methods[name]
    names: list[str] = []
    push = method.push
    method.push = lambda key, parameter: (names.append(key), push(key, parameter))[-1]
    for visit in story.plan.visits[1:]:
        boundary.enter(story.plan, visit)
        list(visit.task.train(story.agent, visit))
    assert set(names) <= set(method.parameters)


def begun_with_heads(agent: str, *methods: Mapping[str, Any]) -> Story:
    plan = planned(agent, *methods, boundary={"head": "per_task"})
    for method in plan.methods.values():
        method.attach(plan.agent)
    visit = plan.visits[0]
    boundary.enter(plan, visit)
    list(visit.task.train(plan.agent, visit))
    for method in plan.methods.values():
        method.leave(visit)
    return Story(plan)


def test_a_unit_is_worth_what_the_answering_head_reads() -> None:
    """Continual backprop weighs by the head in use, not by the first task's."""
    story = begun_with_heads("dqn", {"use": "cbp", **SMALL["cbp"]})
    boundary.enter(story.plan, story.plan.visits[1])
    method: Any = story.methods["cbp"]
    layer = method.layers[-1]
    with torch.no_grad():
        layer.out[0].weight.zero_()
        method.utility[layer.name].zero_()
        method._update(layer, torch.randn(8, layer.count, 1, generator=torch.Generator().manual_seed(0)))
    assert (method.utility[layer.name] > 0).all()


@ALL
def test_packnet_learns_nothing_more_of_an_earlier_task(agent: str) -> None:
    def weights(tasks: list[Any]) -> dict[str, torch.Tensor]:
        with aside(1):
            plan = planned(agent, {"use": "packnet"}, tasks=tasks)
            if agent == "classifier":
                order = [["a", "b"].index(task["name"]) for task in tasks]
                plan = replace(plan, order=order, steps=[48] * len(tasks))
            return Story(plan).go().weights

    once, again = weights([A, B]), weights([A, B, A])
    named = [name for name in once if "target" not in name]
    assert not difference({n: again[n] for n in named}, {n: once[n] for n in named})


# Order.


def one_step(*methods: Mapping[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The weights before and after one step of plain SGD, away from the first weights."""
    spec = {**AGENTS["classifier"], "optimizer": {"use": "sgd"}, "learning_rate": 0.1}
    plan = planned(spec, *methods)
    learner: Any = plan.agent
    for method in plan.methods.values():
        method.attach(learner)
    boundary.enter(plan, plan.visits[0])
    with torch.no_grad():
        for value in learner.model.parameters():
            value.add_(0.1)
    before = {name: value.detach().clone() for name, value in learner.model.named_parameters()}
    learner.observe(plan.tasks[0].pairs(0, 16))  # type: ignore[attr-defined]
    learner.update()
    return before, {name: value.detach().clone() for name, value in learner.model.named_parameters()}


def test_penalties_are_a_sum() -> None:
    l2, l2_init = {"use": "l2", "strength": 0.3}, {"use": "l2_init", "strength": 0.2}
    before, plain = one_step()
    moved = [one_step(*methods)[1] for methods in ([l2], [l2_init], [l2, l2_init], [l2_init, l2])]
    for name, start in before.items():
        first, second, both, swapped = (weights[name] - plain[name] for weights in moved)
        torch.testing.assert_close(first, -0.1 * 0.3 * start, rtol=0, atol=1e-6)
        torch.testing.assert_close(second, torch.full_like(start, -0.1 * 0.2 * 2 * 0.1), rtol=0, atol=1e-6)
        torch.testing.assert_close(both, first + second, rtol=0, atol=1e-6)
        torch.testing.assert_close(swapped, both, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"use": "l2_init", "strength": 0.1}, {"use": "generative_replay", **SMALL["generative_replay"]}),
        ({"use": "ewc", "samples": 8}, {"use": "si", "strength": 5.0}),
        ({"use": "generative_replay", **SMALL["generative_replay"]}, {"use": "si", "strength": 5.0}),
    ],
    ids=["weighed", "read", "weighed and read"],
)
def test_what_is_added_is_a_sum_in_any_order(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Who weighs the agent's own gradient, or reads it, comes before who adds to it, whatever the YAML says."""
    ends = []
    for methods in ([one, other], [other, one]):
        with aside(1):
            story = Story(planned("full", *methods))
            for name, method in story.methods.items():
                method.reseed(len(name))  # chance is by place in the YAML
            ends.append(story.go().agent.state_dict())
    assert not difference(*ends)


@ALL
def test_after_a_step_methods_act_in_order(agent: str) -> None:
    shaken, clip = {"use": "shrink_perturb", "every": "step", "keep": 1.0, "noise": 2.0}, {"use": "weight_clip"}

    def outside(*methods: Mapping[str, Any]) -> bool:
        story = begun(agent, *methods)
        model: Any = story.agent.model  # type: ignore[attr-defined]
        names = story.methods["weight_clip"].parameters
        layers = [part for n, part in model.named_modules() if f"{n}.weight" in names and not isinstance(part, NORMS)]
        bounds = [2.0 / layer.weight[0].numel() ** 0.5 + 1e-6 for layer in layers]
        return any(bool((layer.weight.abs() > bound).any()) for layer, bound in zip(layers, bounds, strict=True))

    assert not outside(shaken, clip)
    assert outside(clip, shaken)


@ALL
def test_l2_er_is_l2_and_erank(agent: str) -> None:
    with aside(1):
        parts = [{"use": "l2", "strength": 1e-4}, {"use": "erank", **SMALL["erank"]}]
        story = Story(planned(agent, *parts)).go()
    assert not difference(story.agent.state_dict(), whole(agent, "l2_er").agent.state_dict())


@pytest.mark.parametrize("grown", ["progressive", "plasticity_injection"])
@pytest.mark.parametrize("agent", ["ppo", "dqn"])
def test_what_grows_is_known_to_methods_before_it(agent: str, grown: str) -> None:
    """In either order a penalty pulls at new parameters in the visit that they come with, and a resume agrees."""
    l2 = {"use": "l2", "strength": 1e-2}
    for methods in ([{"use": grown}, l2], [l2, {"use": grown}]):
        story = begun(agent, *methods)
        boundary.enter(story.plan, story.plan.visits[1])
        known, model = story.methods["l2"].parameters, story.agent.model  # type: ignore[attr-defined]
        new = {
            n for n, p in model.named_parameters() if p.requires_grad and n.rpartition(".")[0].endswith(GROWN[grown])
        }
        assert new and {n for n in new if "target" not in n} <= set(known)


GROWN = {"progressive": "columns.1", "plasticity_injection": "live"}


@pytest.mark.parametrize("first", [True, False], ids=["after", "before"])
@pytest.mark.parametrize("grown", GROWN)
@EVERY
def test_every_method_goes_with_growth(name: str, grown: str, first: bool) -> None:
    """Beside a method that grows the network each either walks and resumes or is refused."""
    spec = spec_of("classifier", name)
    methods = [{"use": grown}, {"use": name, **SMALL.get(name, {})}][:: 1 if first else -1]
    try:
        plan = planned(spec, *methods)
    except CrlError:
        return
    with aside(1):
        story = Story(plan).go()
    assert all(torch.isfinite(value).all() for value in story.weights.values())
    resumes(story, lambda: planned(spec, *methods))


# Random streams.


@pytest.mark.parametrize("agent", ["full", pytest.param("dqn", marks=SLOW)])
@EVERY
def test_no_method_draws_from_the_global_streams(agent: str, name: str) -> None:
    spec = spec_of(agent, name)
    with aside(1):
        plan = planned(spec, {"use": name, **SMALL.get(name, {})})
        moved: list[str] = []
        calls = [0]

        def watched(of: Any, part: str) -> Any:
            act = getattr(of, part)

            def acted(*args: Any) -> Any:
                before = torch.get_rng_state().numpy().tobytes(), np.random.get_state()
                found = act(*args)
                after = torch.get_rng_state().numpy().tobytes(), np.random.get_state()
                calls[0] += 1
                same = before[0] == after[0] and before[1][2] == after[1][2] and (before[1][1] == after[1][1]).all()
                moved.extend([] if same else [part])
                return found

            return acted

        method = plan.methods[name]
        for one in getattr(method, "parts", {"": method}).values():
            for part in ("attach", "enter", "leave", "before_step", "after_step", "push"):
                if hasattr(one, part):
                    setattr(one, part, watched(one, part))
        Story(plan).go()
    assert calls[0] > 3
    assert not moved


# Weights that methods move from outside stay moved, whatever steps them.


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "rmsprop", "muon", "trac"])
@pytest.mark.parametrize("name", ["redo", "cbp", "head_reset", "reset"])
def test_what_begins_anew_stays_so(name: str, optimizer: str) -> None:
    """A step begins at the renewed weights, not at what an optimizer remembers: it goes no further than its rate."""
    spec = {**AGENTS["classifier"], "optimizer": {"use": optimizer}, "learning_rate": 1e-6}
    plan = planned(spec, {"use": name, **SMALL.get(name, {})})
    learner: Any = plan.agent
    before: list[torch.Tensor] = []
    moved: list[float] = []

    def after(*_: Any) -> None:
        pairs = zip(learner.model.parameters(), before, strict=True)
        moved.append(max(float((p.detach() - old).abs().max()) for p, old in pairs))

    learner.optimizers[0].register_step_post_hook(after)  # the first to be called, so before the method acts
    plan.methods[name].attach(learner)
    learner.optimizers[0].register_step_pre_hook(
        lambda *_: before.__setitem__(slice(None), [p.detach().clone() for p in learner.model.parameters()])
    )
    did: dict[str, float] = {}
    for visit in plan.visits[:2]:
        boundary.enter(plan, visit)
        list(visit.task.train(learner, visit))
        did |= plan.methods[name].numbers()
    assert did.get("renewed") or did.get("reset")
    assert max(moved) < 1e-3


@pytest.mark.parametrize(
    "method", [{"use": "shrink_perturb", "every": "step"}, {"use": "weight_clip"}, {"use": "spectral_norm"}]
)
def test_trac_is_not_put_back_after_every_step(method: dict[str, Any]) -> None:
    with pytest.raises(CrlError, match="trac would take for its own"):
        planned({**AGENTS["classifier"], "optimizer": {"use": "trac"}}, method)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_step_from_outside_is_not_taken_back(optimizer: str) -> None:
    """Where an optimizer works from an offset of its own, what a method adds to the weights is kept all the same."""
    spec = {**AGENTS["classifier"], "optimizer": {"use": optimizer}, "learning_rate": 1e-6}
    plan = planned(spec, {"use": "shrink_perturb", "every": "step", "keep": 0.5, "noise": 0.0})
    learner: Any = plan.agent
    plan.methods["shrink_perturb"].attach(learner)
    boundary.enter(plan, plan.visits[0])
    first = [p.detach().clone() for p in learner.model.parameters()]
    for i in range(3):
        learner.observe(plan.tasks[0].pairs(i, 4))  # type: ignore[attr-defined]
        learner.update()
    for parameter, start in zip(learner.model.parameters(), first, strict=True):
        torch.testing.assert_close(parameter.detach(), start / 8, rtol=1e-2, atol=1e-4)


# Mistakes.


@pytest.fixture
def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """The one line that a config is refused with, before anything is written."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.dont_write_bytecode", True)

    def refused(*methods: Any, agent: Any = AGENTS["ppo"], **parts: Any) -> str:
        short: dict[str, Any] = {"tasks": [A, B], "engine": {"envs": 2}, "evaluation": {"episodes": 1}, "monitors": []}
        data = agent["use"] == AGENTS["classifier"]["use"]
        short = {"stream": {"data": "shapes_grey"}, "monitors": []} if data else short
        text = yaml.safe_dump({**short, "agent": agent, "methods": list(methods), **parts}, sort_keys=False)
        Path("c.yaml").write_text(text)
        code = main(["train", "--data-seq" if data else "--env-seq", "c.yaml", "-q"])
        said = capsys.readouterr()
        assert code == 2, said.err
        assert said.out == ""
        assert len(said.err.splitlines()) == 1, said.err
        assert [*tmp_path.iterdir()] == [tmp_path / "c.yaml"], said.err
        return said.err

    return refused


@pytest.mark.parametrize(
    ("method", "part"),
    [
        ("l2er", "unknown 'l2er'; did you mean 'l2_er'?"),
        ({"use": "l2", "strenght": 1.0}, "strenght: L2 takes no such option; did you mean 'strength'?"),
        ({"use": "l2", "strength": -1}, "strength: -1 is not a number of at least 0"),
        ({"use": "l2", "strength": float("nan")}, "strength: nan is not a finite number"),
        ({"use": "l2", "strength": float("inf")}, "strength: inf is not a finite number"),
        ({"use": "l2", "strength": "much"}, "strength: 'much' is not a number of at least 0"),
        ({"use": "l2", "strength": True}, "strength: True is not a number of at least 0"),
        ({"use": "l2", "strength": None}, "strength: None is not a number of at least 0"),
        ({"use": "redo", "every": 0}, "every: 0 is not a whole number of at least 1"),
        ({"use": "redo", "every": 1.5}, "every: 1.5 is not a whole number of at least 1"),
        ({"use": "erank", "how": "twice"}, "how: 'twice' is not step or loss"),
        ({"use": "erank", "every": "epcoh"}, "every: 'epcoh' is not"),
        ({"use": "packnet", "share": 1.5}, "share (equal, or a number): 1.5 is not a number from 0.001 to 1"),
        ("normalize_and_project", "normalize_and_project needs a network with norm layers"),
        ({"use": "plasticity_injection", "layers": 4}, "4 layers are asked for, and a chain has 3"),
        ({"use": "redo", "name": "l2_er/x"}, "is no name: at most 60 letters"),
        ({"use": "ewc", "critic": -1}, "critic: -1 is not a number of at least 0"),
    ],
)
def test_a_mistaken_method(refused: Any, method: Any, part: str) -> None:
    said = refused(method)
    assert "methods.0" in said and part in said


@pytest.mark.parametrize(
    ("methods", "part"),
    [
        (["reset", "packnet"], "reset does not go with packnet"),
        (["packnet", "reset"], "does not go with"),
        (["progressive", "ewc"], "progressive does not go with ewc"),
        (["plasticity_injection", "redo"], "plasticity_injection does not go with redo"),
        ([METHODS["reset"], METHODS["packnet"]], "does not go with"),
        (["l2", "l2"], "another method is called 'l2' already"),
    ],
)
def test_methods_that_do_not_go_together(refused: Any, methods: list[str], part: str) -> None:
    assert part in refused(*methods)


@pytest.mark.parametrize("name", [name for name in METHODS if name in ("lwf", "ewc", "si", "mas", "reset", "packnet")])
def test_methods_that_need_boundaries(refused: Any, name: str) -> None:
    said = refused(name, boundary={"announced": False})
    assert f"boundary.announced: false hides boundaries, which method '{name}' needs" in said


@pytest.mark.parametrize("name", sorted(ONE_HEAD))
def test_one_head_only(refused: Any, name: str) -> None:
    assert "head: per_task" in refused(name, boundary={"head": "per_task"})


@pytest.mark.parametrize(
    ("method", "parts", "what"),
    [
        ("cbp", {"agent": {"use": "tests.test_method_contracts.Unchained"}}, "cbp needs an agent with `chains`"),
        ("cbp", {"agent": SAC, "tasks": PENDULUM}, "cbp needs an agent with `chains`, which SAC lacks"),
        ("generative_replay", {"tasks": MINIGRID}, "these observations are categories"),
        ("progressive", {"agent": spec_of("ppo", "normalize_and_project")}, "progressive grows linear layers"),
        ("progressive", {"agent": {"use": "dqn", "net": {"activation": "crelu"}}}, "progressive grows linear layers"),
        ({"use": "erank", "every": "epoch"}, {"agent": {"use": "dqn"}}, "epoch"),
        ("generative_replay", {"agent": {"use": "tests.test_method_contracts.Blind"}}, "which Blind lacks"),
        *((name, {"agent": {"use": "tests.test_method_contracts.Bare"}}, "which Bare lacks") for name in METHODS),
    ],
)  # fmt: skip
def test_an_agent_that_lacks_a_part(refused: Any, method: Any, parts: dict[str, Any], what: str) -> None:
    said = refused(method, **parts)
    assert "methods.0: " in said and what in said


class Blind(FullAgent):
    """One that does not say what it sees."""

    def __init__(self, interface: Interface, seed: int, device: str) -> None:
        super().__init__(interface, seed, device)
        del self.interface


class Bare:
    """An agent with nothing but the contract."""

    def __init__(self, interface: Interface, seed: int, device: str) -> None:
        self.action = interface.action

    def act(self, obs: Any, carry: Any, greedy: bool) -> Any:
        return np.zeros(len(obs), dtype=int), carry, None

    def observe(self, experience: Any) -> None: ...

    def update(self) -> dict[str, float]:
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Unchained(Bare):
    """One whose model is no `nn.Sequential`."""

    def __init__(self, interface: Interface, seed: int, device: str) -> None:
        super().__init__(interface, seed, device)
        self.model = torch.nn.Bilinear(4, 4, 2)
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.1)


@pytest.mark.parametrize("agent", ["ppo", "dqn", AGENTS["classifier"]["use"]], ids=["ppo", "dqn", "classifier"])
@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"optimizer": {"use": "adm"}}, "agent.optimizer.use: unknown 'adm'; did you mean 'adam'?"),
        ({"optimizer": {"use": "trac", "base": "trac"}}, "trac goes around another optimizer, not around itself"),
        ({"optimizer": {"use": "trac", "base": "sdg"}}, "agent.optimizer.base: unknown 'sdg'; did you mean 'sgd'?"),
        ({"optimizer": {"use": "torch.nn.Linear"}}, "torch.nn.Linear is not a torch optimizer"),
        ({"optimizer": {"use": "adam", "bettas": [0.9, 0.9]}}, "bettas"),
        ({"net": {"norm": "batch"}}, "agent.net.norm: unknown 'batch'"),
        ({"net": {"activation": "rleu"}}, "agent.net.activation: unknown 'rleu'; did you mean 'relu'?"),
        ({"net": {"hidden": [7, 7], "activation": "crelu"}}, "agent.net.hidden: 7 cannot be halved"),
    ],
    ids=["optimizer", "trac around trac", "base", "no optimizer", "option", "norm", "activation", "odd"],
)
def test_a_mistaken_network_or_optimizer(refused: Any, agent: str, options: dict[str, Any], part: str) -> None:
    assert part in refused(agent={"use": agent, **options})


SHALLOW = {"net": {"hidden": []}}


@pytest.mark.parametrize(
    ("agent", "methods", "part"),
    [
        (SHALLOW, ["redo"], "redo acts on hidden layers, and this network has none"),
        (SHALLOW, ["erank"], "erank acts on hidden layers, and this network has none"),
        (SHALLOW, ["parseval"], "parseval acts on hidden layers, and this network has none"),
        ({"normalize": {"observation": True}}, ["packnet"], "packnet freezes weights, but agent.normalize.observation"),
        ({}, ["packnet", "spectral_norm"], "packnet does not go with spectral_norm"),
        ({}, ["l2_er", "erank"], "l2_er does not go with erank"),
        ({}, [{"use": "weight_decay", "strength": 1e6}], "strength: 1e+06 times the learning rate"),
    ],
)
def test_what_cannot_work_is_refused(agent: dict[str, Any], methods: list[Any], part: str) -> None:
    with pytest.raises(CrlError) as refused:
        planned(
            {"use": "ppo", "n_steps": 16, "batch_size": 16, **agent},
            *[m if isinstance(m, dict) else {"use": m} for m in methods],
        )
    assert part in str(refused.value)


def test_the_generator_survives_what_stood_still() -> None:
    """A number that did not vary in the first task may vary in the next."""
    from crl.methods.generative import VAE

    torch.manual_seed(0)
    stream, vae = torch.Generator().manual_seed(0), VAE(3, 4, 16)
    still = torch.randn(64, 3) * torch.tensor([1.0, 0.0, 1e-5])
    assert torch.isfinite(vae.loss(still, stream))
    loss = vae.loss(still + torch.tensor([0.0, 500.0, 1.0]), stream)
    loss.backward()
    assert torch.isfinite(loss) and all(torch.isfinite(p.grad).all() for p in vae.parameters() if p.grad is not None)


def test_hessians_are_taken_of_the_column_that_answers(tmp_path: Path) -> None:
    tasks = [
        {"env": "CartPole-v1", "steps": 64},
        {"env": "CartPole-v1", "steps": 64, "name": "b", "wrappers": ["permute_observation"]},
    ]
    agent = {"use": "ppo", "n_steps": 16, "batch_size": 16, "net": {"hidden": [4, 4]}}
    look = [{"use": "hessian", "probes": 1, "steps": 3, "samples": 32, "at": ["init", "end"], "earlier": True}]
    data = {"tasks": tasks, "agent": agent, "engine": {"envs": 2}, "monitors": look, "evaluation": {"episodes": 1}}
    run = crl.train({**data, "methods": ["progressive"]}, out=tmp_path)
    assert not [record for record in run.records if record.name == "hessian"]
    seen = {(record.visit, record.phase) for record in run.records if record.name == "hessian/actor/lambda_max"}
    assert seen == {(1, "init"), (1, "end"), (2, "init"), (2, "end")}
    assert [record for record in run.records if record.name == "hessian/actor/lambda_max/on/CartPole-v1"]
