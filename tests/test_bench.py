"""The benchmarks' own sides run, on cases small enough for a test."""

import importlib.util
import json
from typing import Any

import pytest
import torch
from torch import nn

from crl.bench import curvature, rl
from crl.core import CrlError


@pytest.mark.parametrize("side", ["bare", "suite"])
@pytest.mark.parametrize("agent", ["ppo", "dqn"])
def test_both_sides_of_the_walks_bench_run(side: str, agent: str, capsys: pytest.CaptureFixture[str]) -> None:
    env = "MiniGrid-Empty-5x5-v0" if agent == "ppo" else "CartPole-v1"
    rl.child(side, agent, env, 2_048 if agent == "ppo" else 1_600)
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["steps_per_second"] > 0 and figures["peak_mib"] > 0


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
