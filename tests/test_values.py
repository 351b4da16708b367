"""What a config may say: numbers in their ranges, names that name something, and no mistake that costs time."""

from __future__ import annotations

import csv
import io
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import crl
from crl import build, config
from crl.core import CrlError
from crl.store import RunFolder
from tests.full_agent import FullAgent

NAN, INF = float("nan"), float("inf")
CARTPOLE = {"env": "CartPole-v1", "steps": 64}
SMALL = {"use": "ppo", "n_steps": 16, "batch_size": 16}
PARTS: dict[str, Any] = {"engine": {"envs": 2}, "evaluation": {"episodes": 1}, "agent": SMALL, "monitors": []}
STREAM: dict[str, Any] = {"data": "tests.tiny_images.tiny", "tasks": 3, "batch": 8}


def said(*changes: tuple[str, Any], **parts: Any) -> str:
    """Why a config is refused, in one line."""
    with pytest.raises(CrlError) as error:
        build.build(config.read({"tasks": [CARTPOLE], **PARTS, **parts}, changes))
    assert len(str(error.value).splitlines()) == 1 and len(str(error.value)) < 400
    return str(error.value)


def said_of_a_stream(*changes: tuple[str, Any], **parts: Any) -> str:
    learner = {"use": "classifier", "net": {"hidden": [4]}}
    return said(*changes, **{"tasks": [], "stream": STREAM, "threads": 1, "agent": learner, **parts})


# YAML.

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
BOMB += "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12))
MERGED = "a0: &a0 {x: 1}\n"
MERGED += "".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 10)}]}}\n" for i in range(1, 12))


@pytest.mark.parametrize("text", [BOMB, MERGED], ids=["lists", "merged"])
def test_aliases_do_not_multiply(text: str) -> None:
    began = time.perf_counter()
    with pytest.raises(CrlError, match="not valid YAML: more than 1,000,000 values"):
        config.parse_yaml(text, "c.yaml")
    assert time.perf_counter() - began < 1


def test_aliases_are_still_of_use() -> None:
    assert config.parse_yaml("a: &a {x: 1}\nb: [*a, *a]\nc: {<<: *a, y: 2}\n", "c.yaml")["c"] == {"x": 1, "y": 2}


@pytest.mark.parametrize(
    "value",
    ["!!bool maybe", "!!map x", "!!map [1]", "!!int ''", "!!timestamp x", "!!null {a: b}", "!!set x", "!!omap {a: b}"],
)
def test_a_tag_on_another_node(value: str) -> None:
    with pytest.raises(CrlError, match=r"^c.yaml, line 1, column 4: not valid YAML: "):
        config.parse_yaml(f"a: {value}\n", "c.yaml")


# Numbers.


@pytest.mark.parametrize(
    ("place", "value", "why"),
    [
        ("agent.n_epochs", 10**30, "agent.n_epochs: 1000000000000000000000000000000 is too large"),
        ("agent.gamma", 5, "agent.gamma: 5 is too large; the most is 1"),
        ("agent.gamma", -1, "agent.gamma: -1 is too small; the least is 0"),
        ("agent.clip_range", 1e12, "agent.clip_range: 1000000000000.0 is too large; the most is 10"),
        ("agent.clip_range", {"from": 1e12, "to": 0}, "agent.clip_range: 1000000000000.0 is too large"),
        ("agent.clip_range_vf", 1e300, "agent.clip_range_vf: 1e+300 is too large"),
        ("agent.clip_range_vf", "x", "agent.clip_range_vf: 'x' is not a number"),
        ("agent.vf_coef", 1e300, "agent.vf_coef: 1e+300 is too large"),
        ("agent.target_kl", NAN, "agent.target_kl: nan is not a finite number"),
        ("agent.learning_rate", INF, "agent.learning_rate: inf is not a finite number"),
        ("agent.normalize_advantage", "no", "agent.normalize_advantage: 'no' is not true or false"),
        ("agent.normalize", {"reward": 1}, "agent.normalize.reward: 1 is not true or false"),
        ("agent.net.hidden", [0], "agent.net.hidden: 0 is not a whole number of at least 1"),
        ("agent.net.hidden", [2.5], "agent.net.hidden: 2.5 is not a whole number of at least 1"),
        ("agent.net.hidden", ["64"], "agent.net.hidden: '64' is not a whole number of at least 1"),
        ("agent.net.hidden", 64, "agent.net.hidden: 64 is not a list of whole numbers"),
        ("agent.optimizer", {"use": "sgd", "weight_decay": 1e300}, "agent.optimizer.weight_decay: 1e+300 is too large"),
        ("tasks.0.steps", 1e99, "tasks.0.steps: 99999999999999"),
        ("tasks.0.steps", 10**200, "tasks.0.steps: a whole number of more than"),
        ("evaluation.episodes", 10**9, "evaluation.episodes: 1000000000 is too large"),
        (
            "tasks.0.change",
            {"gravity": {"uniform": [-1e308, 1e308], "count": 2}},
            "tasks.0.change.gravity.uniform.0: -1e+308 is too large",
        ),
        ("tasks.0.change", {"gravity": {"uniform": [-1e38, 1e38], "count": 2}}, "expected [LEAST, MOST], not "),
        ("tasks.0.change", {"gravity": [INF]}, "tasks.0.change.gravity.0: inf is not a finite number"),
        ("tasks.0.change", {"masscart": [0]}, "tasks.0: change: masscart: 0 is not above 0"),
        ("tasks.0.change", {"tau": [-1]}, "tasks.0: change: tau: -1 is not above 0"),
        ("monitors", [{"use": "hessian", "eps": INF}], "monitors.0.eps: inf is not a finite number"),
        ("monitors", [{"use": "hessian", "eps": 1e20}], "monitors.0: eps: 1e+20 is not a number from 0 to 1e+12"),
        ("monitors", [{"use": "hessian", "steps": 10**12}], "monitors.0: steps: 1000000000000 is too large"),
        ("methods", [{"use": "l2", "strength": 1e300}], "methods.0.strength: 1e+300 is too large"),
        ("methods", [{"use": "l2", "strength": 1e30}], "methods.0: strength: 1e+30 is not a number from 0 to 1e+12"),
        ("methods", [{"use": "replay", "size": 10**12}], "methods.0: size: 1000000000000 is too large"),
        ("methods", [{"use": "der", "batch": 10**12}], "methods.0: batch: 1000000000000 is too large"),
        ("methods", [{"use": "plasticity_injection", "visit": 99}], "methods.0.visit: plasticity_injection waits for"),
        ("methods", [{"use": "plasticity_injection", "visit": 1}], "methods.0: visit: 1 is the first"),
    ],
)
def test_a_number_out_of_its_range(place: str, value: Any, why: str) -> None:
    tasks = [CARTPOLE, {**CARTPOLE, "env": "Acrobot-v1"}] if "plasticity" in why else [CARTPOLE]
    assert why in said((place, value), tasks=tasks)


def test_what_is_kept_must_fit_into_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("crl.methods.memory.available", lambda device: 2**20)
    assert "methods.0: size: 1,000,000 rows take 0.015 GiB" in said(methods=[{"use": "agem", "size": 10**6}])
    assert "methods.0: batch: 1,000,000 rows take" in said(methods=[{"use": "agem", "batch": 10**6}])


def test_the_time_limit_of_minigrid() -> None:
    task = {"env": "MiniGrid-Empty-5x5-v0", "steps": 64, "kwargs": {"max_steps": -3}}
    assert "tasks.0: kwargs.max_steps: -3 is not a whole number of at least 1" in said(tasks=[task])


def test_somebody_elses_class_may_take_infinity() -> None:
    experiment = config.read({"tasks": [CARTPOLE], "monitors": [{"use": "my.Monitor", "bound": INF}]})
    assert experiment.monitors[0]["bound"] == INF
    with pytest.raises(CrlError, match=r"monitors.0.bound: inf is not"):
        config.read({"tasks": [CARTPOLE], "monitors": [{"use": "norms", "bound": INF}]})


# Names, and what is empty.


@pytest.mark.parametrize("part", ["methods", "monitors"])
@pytest.mark.parametrize("name", ["", 0, [], "..", ".", "a/b", "a" * 61])
def test_a_part_has_a_name(part: str, name: Any) -> None:
    use = {"methods": "l2", "monitors": "norms"}[part]
    assert f"{part}.0.name: {name!r}"[:60] in said((part, [{"use": use, "name": name}]))


@pytest.mark.parametrize(
    ("place", "value", "why"),
    [
        ("agent", [], "agent: expected a name or a mapping with `use:`, not a list"),
        ("agent", "", "agent: unknown ''"),
        ("methods", 0, "methods: expected a list, not a number"),
        ("monitors", {}, "monitors: expected a list, not a mapping"),
        ("stream", [], "stream: expected a name or a mapping with `use:`, not a list"),
        ("name", 0, "name: expected text, not a number (0)"),
    ],
)
def test_what_is_empty_is_not_the_default(place: str, value: Any, why: str) -> None:
    assert why in said((place, value))


@pytest.mark.parametrize("name", ["x" * 240, "é" * 61])
def test_a_tasks_name_names_files(name: str) -> None:
    assert "tasks.0.name: " in (why := said(("tasks.0.name", name))) and "is too long; the most is 120" in why


def test_a_tasks_name_in_the_matrix(tmp_path: Path) -> None:
    """The table is read back by Python's own reader and by ours, whatever is in a name."""
    names = ['a"b', "a,b", "a/b", "a;'b", " "]
    folder = RunFolder(tmp_path)
    folder.write_matrix(names, [[0.5] * 5, [NAN] * 5])
    text = (tmp_path / "matrix.csv").read_bytes().decode("utf-8")
    assert next(csv.reader(io.StringIO(text)))[1:] == names == folder.read_matrix()[0]


def test_python_may_say_numbers_of_numpy_and_classes(tmp_path: Path) -> None:
    agent = {**SMALL, "learning_rate": np.float64(1e-3), "policy_kwargs": {"activation_fn": torch.nn.ReLU}}
    data = {"tasks": [{**CARTPOLE, "steps": np.int64(32)}], **PARTS, "agent": agent}
    run = crl.train(data, out=tmp_path, seed=np.int64(3))
    assert isinstance(run.agent.algo.policy.mlp_extractor.policy_net[1], torch.nn.ReLU)  # type: ignore[attr-defined]
    with pytest.raises(CrlError, match=r"agent.hook: <function .* cannot be written into a YAML"):
        crl.train({**data, "agent": {"use": "ppo", "hook": lambda: 0}}, out=tmp_path)


@pytest.mark.parametrize("use", ["ppo", "dqn", "stable_baselines3.A2C"])
def test_greedy_is_greedy_and_wants_a_batch(use: str) -> None:
    agent: Any = build.build(config.read({"tasks": [CARTPOLE], "monitors": [], "agent": use})).agent
    obs = np.random.default_rng(0).normal(size=(1, 4)).astype(np.float32).repeat(200, 0)
    assert len(set(agent.act(obs, None, True)[0].tolist())) == 1
    with pytest.raises(CrlError, match=r"make it: obs\[None\]"):
        agent.act(obs[0], None, True)


def test_a_stranger_brings_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    from crl.cli import main

    monkeypatch.chdir(tmp_path)
    (tmp_path / "stranger.py").write_text("from pathlib import Path\nPath('ran').touch()\nclass A: ...\n")
    (tmp_path / "c.yaml").write_text("tasks: [{env: CartPole-v1, steps: 64}]\nagent: {use: stranger.A}\n")
    assert main(["--installed-only", "check", "c.yaml"]) == 2
    assert "stranger is in no installed package" in capsys.readouterr().err and not (tmp_path / "ran").exists()
    assert main(["check", "c.yaml"]) == 2 and (tmp_path / "ran").exists()


def test_a_module_of_an_environment_beside_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "import gymnasium\ngymnasium.register('Beside-v0', 'gymnasium.envs.classic_control:CartPoleEnv')\n"
    (tmp_path / "beside_me.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [path for path in __import__("sys").path if path not in ("", str(tmp_path))])
    assert build.build(config.read({"tasks": [{"env": "beside_me:Beside-v0", "steps": 64}], **PARTS})).tasks


def test_films_are_gifs() -> None:
    from crl import plan

    with pytest.raises(CrlError, match=r"films are written as .gif alone"):
        plan.evaluate(".", None, None, True, "x.mp4")


def test_tasks_that_are_alike_are_stepped_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from crl.estimate import estimate
    from envs.gym import GymTask

    paces = []
    monkeypatch.setattr(GymTask, "pace", lambda self, seconds: (paces.append(self.name), (1e-4, 50.0))[1])
    tasks = [{**CARTPOLE, "name": "pole", "change": {"gravity": [float(i) for i in range(1, 31)]}}]
    found = estimate(build.build(config.read({"tasks": tasks, **PARTS})))
    assert len(paces) == 1 and found.monitors == 0 and found.evaluation >= 31 * 30 * 50 * 1e-4


class Slow:
    """A monitor that takes a while."""

    def measure(self, boundary: Any) -> dict[str, float]:
        time.sleep(0.05)
        return {"x": 1.0}


def test_the_estimate_counts_monitors() -> None:
    from crl.estimate import estimate

    data = {"tasks": [CARTPOLE], "repeat": 4, **PARTS, "monitors": ["tests.test_values.Slow"]}
    assert 8 * 0.05 <= estimate(build.build(config.read(data))).monitors < 8 * 0.15


class TwoInputs(FullAgent):
    """Its outputs read more of a batch than `obs`, and it has one `optimizer`."""

    def prepare(self, experience: Any) -> Any:
        batch = super().prepare(experience)
        return {**batch, "first": batch["obs"]}

    def outputs(self, batch: Any) -> Any:
        return self.model(batch["first"])


def test_the_method_erank_on_outputs_of_more_than_obs(tmp_path: Path) -> None:
    data = {"tasks": [CARTPOLE], **PARTS, "agent": "tests.test_values.TwoInputs", "methods": ["erank"]}
    run = crl.train(data, out=tmp_path)
    assert max(run.curve("method/erank/steps")[1]) > 0


def test_sample_plasticity_with_one_optimizer(tmp_path: Path) -> None:
    data = {"tasks": [CARTPOLE], **PARTS, "agent": "tests.test_values.OneOptimizer", "monitors": ["sample_plasticity"]}
    found = crl.train(data, out=tmp_path).curve("sample_plasticity/plasticity")[1]
    assert len(found) == 2 and np.isfinite(found).all()


class OneOptimizer(FullAgent):
    """What steps it is one optimizer."""

    def __getattribute__(self, name: str) -> Any:
        if name == "optimizers":
            raise AttributeError(name)
        return super().__getattribute__("optimizers")[0] if name == "optimizer" else super().__getattribute__(name)

    def update(self) -> Any:
        loss = self.objective(self.outputs(self.minibatch), self.minibatch)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return {"losses/loss": loss.item()}

    def state_dict(self) -> Any:
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: Any) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])


def test_an_anchor_pulls_no_weight_beyond_itself() -> None:
    """Plain gradient descent on the penalty diverges where rate * importance > 2; here a step ends at the anchor."""
    from types import SimpleNamespace

    from crl.methods.anchors import EWC

    model = torch.nn.Linear(2, 1, bias=False)
    agent: Any = SimpleNamespace(model=model, optimizers=[torch.optim.SGD(model.parameters(), lr=0.1)])
    method = EWC(strength=100.0)
    method.attach(agent)
    importance = torch.tensor([[5.0, 0.01]])  # 0.1 * 100 * 5 = 50 times too far; 0.1 * 100 * .01 is a tenth of the way
    method.anchors = {"a": {"importance": {"weight": importance}, "values": {"weight": torch.zeros(1, 2)}}}
    method._sum()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 1.0]]))
    model.weight.grad = torch.zeros(1, 2)
    method.push("weight", model.weight)
    agent.optimizers[0].step()
    assert model.weight.tolist()[0] == pytest.approx([0.0, 0.9], abs=1e-6)


def test_curvature_of_a_transformer_block() -> None:
    """The trace of the exact Hessian is the sum of second derivatives, by autograd on attention written out."""
    from crl.linalg import hessian_spectrum

    torch.manual_seed(0)
    net = torch.nn.TransformerEncoderLayer(4, 1, 8, dropout=0.0, batch_first=True)
    x = torch.randn(3, 5, 4)
    seen = hessian_spectrum(
        net, lambda out, y: (out - y).square().mean(), (x, torch.randn(3, 5, 4)), probes=1, steps=20
    )
    assert np.isfinite(seen.lambda_max.value) and seen.lambda_max.value > 0
