"""The benchmarks' own sides run, on cases small enough for a test."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from agents import layers
from crl import named, stats
from crl.bench import curvature, methods, rl, studies, study, supervised, tables
from crl.core import CrlError


@pytest.mark.parametrize(
    ("side", "agent"), [("bare SB3", "ppo"), ("bare SB3", "dqn"), ("sync", "ppo"), ("sync", "dqn"), ("one file", "ppo")]
)
def test_the_sides_of_the_walks_bench_run(
    side: str, agent: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    env = "MiniGrid-Empty-5x5-v0" if agent == "ppo" else "CartPole-v1"
    settings = rl.DQN if agent == "dqn" else {**rl.PPO, "n_steps": 64}
    case = {
        "agent": agent,
        "env": env,
        "envs": 16,
        "settings": settings,
        "width": 8,
        "threads": 1,
        "steps": 1_600,
        "sides": (side,),
    }
    monkeypatch.setattr(rl, "CASES", (case,))
    monkeypatch.setattr(layers, "MANY", layers.MANY)  # which bare SB3 goes without
    threads = torch.get_num_threads()
    rl.one(0, side)
    torch.set_num_threads(threads)
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["steps_per_second"] > 0 and figures["peak_mib"] > 0 and figures["steps"] >= 1_024


def small() -> tuple[nn.Module, nn.Module, torch.Tensor, torch.Tensor]:
    return nn.Linear(3, 2), nn.CrossEntropyLoss(), torch.randn(9, 3), torch.randint(2, (9,))


def test_our_side_of_the_curvature_bench_runs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(curvature, "mlp", small)
    monkeypatch.setattr(curvature, "CASES", {"tiny": {"build": "mlp", "probes": 2, "steps": 3, "mark": 1.0}})
    threads = torch.get_num_threads()
    curvature.one("crl", "tiny", threads, "cpu")
    found = json.loads(capsys.readouterr().out)
    assert found["seconds"] > 0 and found["lambda_max"] > 0


def test_the_agents_case_has_the_loss_that_is_trained() -> None:
    model, loss, inputs, targets = curvature.agent()
    outputs = model(inputs)
    batch: dict[str, Any] = {"obs": inputs, "action": targets[:, :1], "log_prob": targets[:, 1]}
    batch |= {"advantage": targets[:, 2], "value": targets[:, 3], "return": targets[:, 4]}
    logs = outputs[:, :7].log_softmax(1)
    ratio = (logs.gather(1, targets[:, :1].long())[:, 0] - targets[:, 1]).exp()
    assert torch.allclose(ratio, torch.ones(512), atol=1e-5)
    entropy = -(logs.exp() * logs).sum(1).mean()
    error = (targets[:, 4] - outputs[:, 7]).square().mean()
    assert torch.allclose(loss(outputs, targets), -batch["advantage"].mean() + 0.5 * error - 0.01 * entropy, atol=1e-5)


@pytest.mark.skipif(importlib.util.find_spec("curvlinops") is not None, reason="the peer is installed here")
def test_a_missing_peer_is_one_line() -> None:
    with pytest.raises(CrlError, match="pip install curvlinops-for-pytorch"):
        curvature.main()


def test_the_methods_bench_compares_side_by_side() -> None:
    found = methods.compare(("l2", [{"use": "l2"}], {}, {}), 4_096, 1)
    assert len(found["time_ratio"]) == 1 and 0.3 < found["time_ratio"][0] < 3
    assert {name for name, *_ in methods.cases()} > {*named.METHODS, "l2_er, idle", "optimizer trac"}


def test_a_study_runs_what_is_missing_and_makes_its_table(tmp_path: Path) -> None:
    source = tmp_path / "forgetting.yaml"
    tasks = [{"env": "CartPole-v1", "steps": 64, "name": name} for name in ("one", "two")]
    small = {"use": "ppo", "n_steps": 16, "batch_size": 16, "net": {"hidden": [4]}}
    source.write_text(yaml.safe_dump({"tasks": [tasks[0], {**tasks[1], "wrappers": ["permute_observation"]}],
                                      "agent": small, "engine": {"envs": 2}, "monitors": [],
                                      "evaluation": {"episodes": 1}}))  # fmt: skip
    arms = {"plain": study.Arm(), "clone": study.Arm([{"use": "clone"}])}
    columns = (study.Column("average", "all tasks"), study.Column("end_two", "the second"))
    small_one = study.Study(str(source), arms, studies.forgetting, columns, differences=(("clone", "plain"),))
    first = json.loads(study.main("small", small_one, seeds=2, out=str(tmp_path), as_json=True))
    assert [len(runs) for runs in first["arms"].values()] == [2, 2]
    assert {"average", "forgetting", "after_one", "end_one"} <= set(first["arms"]["clone"][0])
    before = sorted(path.stat().st_mtime_ns for path in tmp_path.rglob("metrics.jsonl"))
    shown = study.main("small", small_one, seeds=2, out=str(tmp_path))
    assert sorted(path.stat().st_mtime_ns for path in tmp_path.rglob("metrics.jsonl")) == before
    assert shown.splitlines()[0].startswith("| | all tasks") and len(shown.splitlines()) == 5
    values = [run["average"] for run in first["arms"]["plain"]]
    found = stats.interval(values)
    assert f"| plain | {found.mean:.0f} [{found.low:.0f}, {found.high:.0f}] |" in shown
    five = {**first, "seeds": 5, "arms": {arm: runs * 2 + runs[:1] for arm, runs in first["arms"].items()}}
    assert study.table(small_one, five).splitlines()[-1] == stats.caption(5)


@pytest.mark.parametrize("side", ["crl", "bare", "torch"])
def test_the_sides_without_peers_of_the_supervised_bench_run(
    side: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = {"data": "shapes_grey", "tasks": [[0, 1], [2, 3]], "net": {"use": "mlp", "hidden": [8]}, "batch": 4}
    online = {"batch": 1, "tasks": [[*range(100)]]} if side == "torch" else {}
    monkeypatch.setattr(supervised, "CASES", {"tiny": {**case, **online, "steps": 3}})
    threads = torch.get_num_threads()
    supervised.one(side, "tiny", threads)
    found = json.loads(capsys.readouterr().out)
    assert found["seconds"] > 0 and 0 <= found["accuracy"] <= 1
    assert found["samples"] == {"crl": 24, "bare": 24, "torch": 3}[side]
    assert side != "crl" or found["data_share"] > 0


@pytest.mark.skipif(importlib.util.find_spec("avalanche") is not None, reason="the peer is installed here")
def test_a_missing_peer_of_the_supervised_bench_is_one_line() -> None:
    with pytest.raises(CrlError, match="pip install avalanche-lib"):
        supervised.main()


def test_the_readmes_tables_are_those_of_the_published_results() -> None:
    readme = (Path(__file__).resolve().parent.parent / "README.md").read_text()
    shown = {name for _, name, _ in tables.MARKED.findall(readme)}
    assert shown == {path.stem for path in tables.RESULTS.glob("*.json")}
    assert tables.fill(readme) == readme, "python -m crl.bench.tables README.md"
