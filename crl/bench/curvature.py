"""Hessian-vector products beside curvlinops: the same network, batch, loss and Lanczos loop, in turns.

Each run is a process of its own. Its clock starts after the imports and the making of network and data, and includes
the making of the operator (its graph, tracing, and the check that the loss is deterministic) and the whole Lanczos
loop. curvlinops runs in both its forms: a vector at a time, as its own Lanczos does, and all probe vectors as one
block. It has no twin for a second thread (it fails when used by two at once), so that its products have all threads.
Needs `pip install curvlinops-for-pytorch`, which brings its own dependencies.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import platform
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from crl.bench import turns
from crl.core import CrlError
from crl.linalg import Hessian, Operator, lanczos, supervised
from crl.linalg.lanczos import each_probe, probes

SIDES = ("crl", "curvlinops", "curvlinops, ten at once")
CASES: dict[str, dict[str, Any]] = {  # the mark is the least ratio of times that was asked for
    "MLP, 14k parameters, 2,048 samples": {"build": "mlp", "probes": 10, "steps": 100, "mark": 2.0},
    "MiniGrid agent, 135k parameters, 512 samples": {"build": "agent", "probes": 10, "steps": 100, "mark": 1.5},
    "ResNet-18, 11m parameters, 32 images": {"build": "resnet", "probes": 1, "steps": 10, "mark": 1.2},
}


class Packed(nn.Module):
    """PPO's loss with its constants as the columns of a target, which is what curvlinops takes."""

    reduction = "mean"

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The clipped surrogate, value loss and entropy bonus."""
        ppo, spaces = importlib.import_module("agents.ppo"), importlib.import_module("gymnasium.spaces")
        names = ("action", "log_prob", "advantage", "value", "return")
        batch = dict(zip(names, targets.T, strict=True)) | {"action": targets[:, :1]}
        weights = {"clip": 0.2, "clip_value": None, "value_weight": 0.5, "entropy_weight": 0.01}
        loss: Tensor = ppo.objective(outputs, batch, spaces.Discrete(outputs.shape[1] - 1), **weights)
        return loss


class ActorCritic(nn.Module):
    """The MiniGrid agent's two networks on one-hot symbols."""

    def __init__(self) -> None:
        super().__init__()

        def net(outputs: int) -> nn.Sequential:
            return nn.Sequential(nn.Linear(984, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, outputs))

        self.actor, self.critic = net(7), net(1)

    def forward(self, obs: Tensor) -> Tensor:
        """Logits and value."""
        return torch.cat([self.actor(obs), self.critic(obs)], 1)


def mlp() -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    """A small classifier."""
    net = nn.Sequential(nn.Linear(64, 100), nn.Tanh(), nn.Linear(100, 70), nn.Tanh(), nn.Linear(70, 10))
    return net, nn.CrossEntropyLoss(), torch.randn(2048, 64), torch.randint(10, (2048,))


def agent() -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    """The agent on symbols drawn at random."""
    net = ActorCritic()
    obs = torch.zeros(512, 984).scatter_(1, torch.randint(984, (512, 148)), 1.0)
    with torch.no_grad():
        answer, action = net(obs), torch.randint(7, (512, 1))
        log_prob = answer[:, :-1].log_softmax(1).gather(1, action)
    value = answer[:, -1:]
    return net, Packed(), obs, torch.cat([action, log_prob, torch.randn(512, 1), value, value + torch.randn(512, 1)], 1)


def resnet() -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    """ResNet-18 for small images, evaluating."""
    net = importlib.import_module("agents.nets").ResNet18().eval()
    return net, nn.CrossEntropyLoss(), torch.randn(32, 3, 32, 32), torch.randint(10, (32,))


class Peer(Operator):
    """curvlinops's Hessian, as an operator of ours."""

    def __init__(self, model: nn.Module, loss: nn.Module, inputs: Tensor, targets: Tensor, at_once: bool) -> None:
        peer = importlib.import_module("curvlinops")
        parameters = [p for p in model.parameters() if p.requires_grad]
        self.matrix: Any = peer.HessianLinearOperator(model, loss, parameters, [(inputs, targets)])
        self.size, self.like, self.at_once = self.matrix.shape[0], inputs.new_empty(0), at_once

    def rows(self, block: Tensor) -> Tensor:
        """The Hessian times each row."""
        if self.at_once:
            product: Tensor = self.matrix @ block.T.contiguous()
            return product.T.contiguous()
        return torch.stack([self.matrix @ row for row in block])


def one(side: str, case: str, threads: int, device: str) -> None:
    """One run in this process: its seconds and its peak memory, printed as JSON."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    setting = CASES[case]
    builders: dict[str, Callable[[], Any]] = {"mlp": mlp, "agent": agent, "resnet": resnet}
    model, loss, inputs, targets = builders[setting["build"]]()
    model, inputs, targets = model.to(device), inputs.to(device), targets.to(device)
    if side != "crl":
        importlib.import_module("curvlinops")
    before = _memory(device)
    began = time.perf_counter()
    operator: Operator
    if side == "crl":
        problem = supervised(model, loss, (inputs, targets))
        problem.check()
        operator = Hessian(problem)
    else:
        operator = Peer(model, loss, inputs, targets, at_once=side != "curvlinops")
    starts = probes(operator.size, setting["probes"], 0, operator.like)
    loop = lanczos if side == SIDES[2] else each_probe
    found = loop(operator, starts, setting["steps"])
    seconds = time.perf_counter() - began
    largest = max(float(each.ritz()[0][-1]) for each in found)
    print(json.dumps({"seconds": seconds, "megabytes": _memory(device) - before, "lambda_max": largest}))


def _memory(device: str) -> float:
    if device != "cpu":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(case: str, pairs: int, threads: int, device: str) -> dict[str, Any]:
    """Every side in turns, so often."""
    sides = [side for side in SIDES if side != SIDES[2] or CASES[case]["probes"] > 1]
    found = turns.in_turns(
        case,
        sides,
        pairs,
        lambda side: ("crl.bench.curvature", side, case, str(threads), device),
        lambda run: f"{run['seconds']:.1f} s",
    )
    return {
        "case": case,
        "mark": CASES[case]["mark"],
        "runs": found,
        "ratios": turns.ratios(found, lambda run: run["seconds"]),
    }


def main(pairs: int = 5, steps: int = 0, as_json: bool = False, threads: int = 2, device: str = "cpu") -> str:
    """Run every case and say how the sides compare."""
    if importlib.util.find_spec("curvlinops") is None:
        raise CrlError("bench curvature compares with curvlinops: pip install curvlinops-for-pytorch")
    version = importlib.import_module("importlib.metadata").version("curvlinops-for-pytorch")
    results = [measure(case, pairs, threads, device) for case in CASES]
    processor, python = platform.processor() or platform.machine(), platform.python_version()
    machine = {"processor": processor, "python": python, "threads": threads, "device": device}
    head = {"machine": machine, "torch": torch.__version__, "curvlinops": version, "pairs": pairs}
    result = {**head, "results": results}
    return json.dumps(result, indent=1) if as_json else table(result)


def table(result: Mapping[str, Any]) -> str:
    """A Markdown table: medians, and ratios with their spread."""

    def cells(runs: Sequence[turns.Figures]) -> list[str]:
        return [f"{turns.middle(runs, 'seconds'):.1f}", f"{turns.middle(runs, 'megabytes'):,.0f}"]

    return turns.table(("seconds", "MB", "time, theirs / crl: median (min to max)"), result["results"], cells)


if __name__ == "__main__":
    one(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4])
