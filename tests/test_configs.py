"""Every shipped config builds and runs shrunk; what the README shows is what the tests run."""

import gc
import re
import weakref
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import stable_baselines3 as sb3
from gymnasium import spaces

import crl
from agents.adapt import adapt
from agents.classifier import Classifier
from agents.dqn import DQN
from agents.ppo import PPO
from crl import build, config, named
from crl.cli import main
from crl.core import CrlError, Interface
from crl.metrics import summary
from crl.testing import check_method
from tests.marks import quickly
from tests.my_agent import MyAgent
from tests.my_method import Prune

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = sorted(config.CONFIGS.rglob("*.yaml"))
STREAMS = [path for path in SHIPPED if config.read(path).stream]
SEQUENCES = [path for path in SHIPPED if path not in STREAMS]
QUICK = ("minigrid", "classic", "mixed", "split_mnist", "split_cifar100")  # the others walk in the long tests
TINY = [("agent.n_steps", 16), ("agent.batch_size", 32), ("engine.envs", 2), ("evaluation.episodes", 1)]
TINY += [("evaluation.of", "all"), ("threads", 1)]
LONG = ("long", "cora_cycles", "papers/slippery_ant_short")  # looked at, they take ten seconds each
HESSIAN = [("monitors.0.probes", 1), ("monitors.0.steps", 3), ("monitors.0.samples", 32)]


def stem(path: Path) -> str:
    return str(path.relative_to(config.CONFIGS).with_suffix(""))


@pytest.mark.parametrize("path", quickly(SEQUENCES, lambda path: path.stem in QUICK), ids=stem)
def test_shipped_config_walks_shrunk(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("spectrum", "matrix"):  # pictures take longer than the walk
        monkeypatch.setattr(f"crl.sinks.TensorBoard.{name}", lambda *args: None)
    read = config.read(path)
    if any(task.env.startswith("Ant-") for task in read.tasks) and find_spec("mujoco") is None:
        pytest.skip('needs MuJoCo: pip install "gymnasium[mujoco]"')
    count = len(read.tasks)
    look = HESSIAN if read.monitors[0]["use"] == "hessian" else []
    look += [(f"monitors.{i}.samples", 32) for i, monitor in enumerate(read.monitors) if "samples" in monitor]
    kwargs = [(f"tasks.{i}.kwargs", {"max_episode_steps": 20}) for i in range(count)]
    steps = [(f"tasks.{i}.steps", 32) for i in range(count)]
    if stem(path) in LONG:
        look = [("monitors", [])]
    run = crl.train(path, out=tmp_path, changes=(*TINY, *look, *kwargs, *steps))
    visits = len(build.build(run.experiment).order)
    assert run.matrix.shape == (visits + 1, len(run.tasks)) and np.isfinite(run.matrix).all()
    assert run.manifest["status"] == "finished" and len(list((run.path / "checkpoints").iterdir())) == visits + 1


def test_both_kinds_are_shipped() -> None:
    assert {stem(path) for path in SEQUENCES} >= {"minigrid", "classic", "mixed"}
    assert {stem(path) for path in STREAMS} >= {"split_mnist", "split_cifar100", "papers/continual_imagenet"}


SMALLER: dict[str, dict[str, Any]] = {
    "mlp": {"hidden": [8, 8]},
    "conv": {"channels": [4, 4, 4], "hidden": [8]},
    "resnet18": {"width": 4},
}


def shrunk(path: Path) -> list[tuple[str, Any]]:
    """What makes a stream's walk short: other data, few tasks, one epoch, a tiny net, little looking."""
    read = config.read(path)
    net = {**read.agent["net"], **SMALLER[read.agent["net"]["use"]]}
    net |= {"dense": [8] * len(net["dense"])} if "dense" in net else {}
    colour = read.stream["data"] not in ("mnist", "fashion_mnist", "shapes_grey")
    stream = {"data": f"tests.tiny_images.{'colour' if colour else 'grey'}", "tasks": 3, "epochs": 1, "samples": 16}
    changes = [(f"stream.{name}", value) for name, value in stream.items()] + [("agent.net", net), ("threads", 1)]
    for i, monitor in enumerate(read.monitors):
        changes.append((f"monitors.{i}.samples", 16))
        changes += [(f"monitors.{i}.{n}", v) for n, v in (("probes", 1), ("steps", 3)) if monitor["use"] == "hessian"]
    return [*changes, ("evaluation.samples", 10)]


@pytest.mark.parametrize("path", quickly(STREAMS, lambda path: path.stem in QUICK), ids=stem)
def test_shipped_stream_walks_shrunk(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    for name in ("spectrum", "matrix"):  # pictures take longer than the walk
        monkeypatch.setattr(f"crl.sinks.TensorBoard.{name}", lambda *args: None)
    read, run = config.read(path), crl.train(path, out=tmp_path, changes=(*shrunk(path),))
    assert run.manifest["status"] == "finished"
    assert run.matrix.shape == (4, 3)
    own = [run.matrix[i + 1, i] for i in range(3)]
    assert np.isfinite(own).all() and np.isfinite(run.matrix).all() == (read.evaluation.of == "all")
    notes = [(record.name, record.note) for record in run.records if record.note]
    assert [note for note in notes if not note[1].startswith("between ")] == [], "but for what is not resolved"
    for monitor in read.monitors:
        assert any(record.name.startswith(f"{monitor['use']}/") for record in run.records), monitor
    keep = read.checkpoint.keep or 4
    assert len(list((run.path / "checkpoints").glob("boundary-*.pt"))) == min(keep, 4)


@pytest.mark.parametrize("path", STREAMS, ids=stem)
def test_shipped_stream_builds_whole_without_downloads(path: Path) -> None:
    """As the README says: `--data shapes` runs without."""
    read = config.read(path)
    plan = build.build(config.read(path, [("stream.data", "shapes"), ("threads", 1)]))
    assert len(plan.order) == len(plan.tasks) == read.stream["tasks"]
    batch, epochs = read.stream.get("batch", 128), read.stream.get("epochs", 1)
    assert all(steps % epochs == 0 and steps >= batch for steps in plan.steps)
    assert list(plan.monitors) == [monitor["use"] for monitor in read.monitors]


def test_minigrid_has_four_tasks_and_a_revisit() -> None:
    plan = build.build(config.read("minigrid"))
    assert len(plan.tasks) >= 4 and len(plan.order) > len(plan.tasks)


def test_configs_arrive_in_the_objects() -> None:
    plan = build.build(config.read("minigrid", [("agent.learning_rate", 3e-4), ("tasks.0.steps", 20_000)]))
    algo = plan.agent.algo  # type: ignore[attr-defined]
    assert (algo.n_envs, algo.n_steps, algo.ent_coef, algo.learning_rate) == (16, 128, 0.01, 3e-4)
    assert plan.steps[0] == 20_480, "rounded up to whole updates"


def test_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(
        "tasks:\n  - {env: MiniGrid-Empty-5x5-v0, steps: 32, kwargs: {max_episode_steps: 9}}\n"
        "agent: {n_steps: 16, batch_size: 32}\nengine: {envs: 2}\nevaluation: {episodes: 2}\nbaseline: fresh\n"
    )
    assert main(["check", "tiny.yaml"]) == 0
    plan = capsys.readouterr().out
    assert "1 tasks, 1 visits, 32 steps" in plan and "time " in plan and not (tmp_path / "runs").exists()
    assert main(["train", "--env-seq", "tiny.yaml"]) == 0
    folder = capsys.readouterr().out.strip()
    assert folder == "runs/tiny/ppo/seed-0"
    run = crl.load(folder)
    names = {record.name for record in run.records if record.phase == "baseline"}
    assert names == {"metrics/fresh_area", "metrics/forward_transfer_ratio", "metrics/forward_transfer"}
    assert main(["eval", folder, "--visit", "0", "--episodes", "3", "--render", "out.gif"]) == 0
    assert "MiniGrid-Empty-5x5-v0" in capsys.readouterr().out
    assert (tmp_path / "out.gif").read_bytes().startswith(b"GIF8")
    for what, expected in (("agents", "ppo"), ("envs", "MiniGrid-DoorKey-5x5-v0"), ("configs", "minigrid_quick")):
        assert main(["list", what]) == 0
        assert expected in capsys.readouterr().out


def test_eval_repeats_the_matrix(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = crl.train({"tasks": [{"env": "CartPole-v1", "steps": 32}]}, out=tmp_path, changes=(*TINY, *HESSIAN))
    assert main(["eval", str(run.path)]) == 0
    assert f"{run.matrix[1, 0]:.3f}" in capsys.readouterr().out


def test_unannounced_boundaries_are_not_heard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from agents.sb3 import SB3Agent

    heard: list[int] = []
    enter = SB3Agent.enter
    monkeypatch.setattr(SB3Agent, "enter", lambda self, visit: (heard.append(visit.index), enter(self, visit))[1])
    tasks = [{"env": "CartPole-v1", "steps": 32}, {"env": "Acrobot-v1", "steps": 32}]
    for announced, expected in ((True, [1, 2]), (False, [1])):
        heard.clear()
        data = {"name": str(announced), "tasks": tasks, "boundary": {"announced": announced}}
        crl.train(data, out=tmp_path, changes=(*TINY, *HESSIAN))
        assert heard == expected


def test_records_hold_the_metrics_of_the_matrix(tmp_path: Path) -> None:
    data = {"tasks": [{"env": "CartPole-v1", "steps": 32}, {"env": "Acrobot-v1", "steps": 32}], "repeat": 2}
    run = crl.train(data, out=tmp_path, changes=(*TINY, *HESSIAN))
    last = {record.name: record.value for record in run.records if record.visit == 4}
    for name, metric in summary(run.matrix, [0, 1, 0, 1]).items():
        assert last[f"metrics/{name}"] == pytest.approx(metric.value, nan_ok=True)


def test_the_readme_shows_the_tested_agent() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert (ROOT / "tests" / "my_agent.py").read_text() in blocks


def test_the_readme_yaml_is_valid() -> None:
    whole, monitors, stream = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    data = config.parse_yaml(whole, "README")
    assert build.build(config.read(data)).order == [0, 1, 2, 3]
    data |= config.parse_yaml(monitors, "README")
    assert list(build.build(config.read(data)).monitors) == ["hessian", "heads", "erank", "conflict"]
    shapes = [("stream.data", "shapes"), ("threads", 1)]
    plan = build.build(config.read(config.parse_yaml(stream, "README"), shapes))
    assert len(plan.tasks) == 10 and plan.interface.action.n == 100  # type: ignore[attr-defined]


def test_the_readmes_spectrum_runs(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (block,) = [block for block in blocks if "hessian_spectrum" in block]
    exec(block, {})
    assert "Estimate(value=" in capsys.readouterr().out


def test_the_readme_shows_the_tested_method() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert (ROOT / "tests" / "my_method.py").read_text() in blocks
    check_method(Prune())


def test_the_readmes_table_of_methods_is_what_agents_accept() -> None:
    text = (ROOT / "README.md").read_text()
    rows = re.search(r"\| \| PPO \| DQN .*?\n\n", text, re.DOTALL)
    assert rows
    table = {
        tuple(re.findall("`([a-z0-9_]+)`", row.split("|")[1])): row.split("|")[2:] for row in rows[0].split("\n")[2:-2]
    }
    assert sorted(name for names in table for name in names) == sorted(named.METHODS)
    seen = Interface(spaces.Box(-1, 1, (4,)), spaces.Discrete(3), envs=4)
    others = {"chains": sb3.A2C, "none": sb3.SAC}
    agents = [PPO(seen, 0, "cpu"), DQN(seen, 0, "cpu"), Classifier(seen, 0, "cpu"), MyAgent(seen, 0, "cpu")]
    for names, cells in table.items():
        for name in names:
            needed = re.findall("`([a-z]+)`", cells[3])
            goes = [not cell.strip().startswith("no:") and "with `net" not in cells[0] for cell in cells[:3]]
            wanted = [
                *goes,
                set(needed) <= {"model", "optimizer", "chains"} and "norm" not in cells[3],
            ]
            assert [accepted(name, agent) for agent in agents] == wanted, name
            for part, algorithm in others.items():
                box = Interface(seen.observation, spaces.Box(-1, 1, (2,)), envs=1) if part == "none" else seen
                said = wanted[3] and (part == "chains" or "chains" not in needed)
                if "rebuilt" not in needed and "progress" not in needed:
                    assert accepted(name, adapt(algorithm)(box, 0, "cpu")) == said, (name, part)


def accepted(name: str, agent: Any) -> bool:
    experiment = config.read({"tasks": [{"env": "CartPole-v1", "steps": 1}], "methods": [name]})
    try:
        return bool(build.build_methods(experiment, agent))
    except CrlError as error:
        assert str(error).startswith("methods.0: ") and "\n" not in str(error)
        return False


def test_methods_are_listed_with_source_and_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "methods"]) == 0
    said = capsys.readouterr().out
    for name, where in named.METHODS.items():
        source = named.locate(where, {}, "methods").__doc__.split("\n\n")[0]
        assert re.search(r"(19|20)\d\d|arXiv", source), f"{name} names no source"
        assert re.search(rf"^{name} +\[[a-z]+\] ", said, re.MULTILINE), name
    assert "strength: 0.001" in said and "Kirkpatrick" in said and "trac" in said


def test_ci_runs_the_readmes_test_line() -> None:
    line = 'pip install -c constraints.txt -e ".[dev]" && pytest -n 2'
    assert line in (ROOT / "README.md").read_text()
    script = (ROOT / ".ci" / "run").read_text()
    assert 'pip install -q -c constraints.txt -e ".[dev]"' in script and "\npytest -n 2" in script


@pytest.mark.parametrize("method", ["l2", "clone", "cbp", "packnet"])
def test_an_agent_with_a_method_is_let_go(method: str) -> None:
    data = {"tasks": [{"env": "CartPole-v1", "steps": 64}], "methods": [method], "engine": {"envs": 2}}
    built = build.build(config.read({**data, "agent": {"use": "ppo", "n_steps": 16, "batch_size": 16}}))
    for part in built.methods.values():
        part.attach(built.agent)
    agent = weakref.ref(built.agent)
    del built, part
    gc.collect()
    assert agent() is None
