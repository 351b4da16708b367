"""The classifier's walk beside Avalanche, JAX and plain PyTorch: the same images, network and steps, in turns.

Each run is a process of its own, one after another, and only its training is timed. For crl that is the walk's own
loop: tasks make batches, the agent learns, numbers are gathered for the log. Avalanche's plain fine-tuning runs in two
forms: datasets of tensors, as its documentation has it, and of a list of tensors, the fastest that we found.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from crl import boundary, build, config
from crl.bench import peers, turns
from crl.core import Array, CrlError

MNIST = [[i, i + 1] for i in range(0, 10, 2)]
CIFAR = [[*range(i, i + 10)] for i in range(0, 100, 10)]
IN_BATCHES = ("crl", "avalanche", "avalanche, of a list", "bare")
CASES: dict[str, dict[str, Any]] = {  # the mark is the least ratio of times that was asked for
    "Split-MNIST, MLP 400-400, batch 128": {
        "data": "mnist",
        "tasks": MNIST,
        "net": {"use": "mlp", "hidden": [400, 400], "init": "kaiming"},
        "batch": 128,
        "steps": 0,
        "sides": IN_BATCHES,
        "mark": {"avalanche": 1.4},
    },
    "Split-CIFAR-100, ResNet-18, batch 100": {
        "data": "cifar100",
        "tasks": CIFAR,
        "net": {"use": "resnet18"},
        "batch": 100,
        "steps": 1,
        "sides": IN_BATCHES,
        "mark": {"avalanche": 1.0},
    },
    "Split-CIFAR-100, ResNet-18 of width 16, batch 100": {
        "data": "cifar100",
        "tasks": CIFAR,
        "net": {"use": "resnet18", "width": 16},
        "batch": 100,
        "steps": 5,
        "sides": IN_BATCHES,
        "mark": {"avalanche": 1.0},
    },
    "Online Permuted MNIST, MLP 784-1000-1000-1000-10, one sample a step": {
        "data": "mnist",
        "tasks": [[*range(10)]],
        "net": {"use": "mlp", "hidden": [1000, 1000, 1000], "init": "kaiming"},
        "batch": 1,
        "steps": 4_000,
        "threads": 1,
        "sides": ("crl", "jax", "jax, two threads", "jax, 100 steps at once", "torch"),
        "mark": {"jax": 1.0, "jax, two threads": 1.0},
    },
}
RATE = 0.01


def one(side: str, case: str, threads: int) -> None:
    """One side of one case, in this process: prints its figures."""
    setting = CASES[case]
    arrays = importlib.import_module("envs.datasets").load(setting["data"])
    threads = setting.get("threads", threads)
    if side == "crl":
        found = _crl(setting, threads)
    elif setting["batch"] == 1:
        found = _online(side, setting, arrays, threads)
    else:
        nets = importlib.import_module("agents.nets")
        torch.manual_seed(0)
        shape = arrays.train_x.shape[1:]
        model = nets.build(setting["net"], shape, arrays.count)
        model = torch.nn.Sequential(torch.nn.Flatten(), model) if setting["net"]["use"] == "mlp" else model
        run: Any = peers.bare if side == "bare" else functools.partial(peers.avalanche, listed=side != "avalanche")
        how = peers.How(RATE, batch=setting["batch"], steps=setting["steps"], threads=threads)
        trained = run(model, arrays.train_x, arrays.train_y, setting["tasks"], how)
        found = {"seconds": trained.seconds, "samples": trained.samples, "accuracy": trained.accuracy}
    print(json.dumps(found))


def _online(side: str, setting: Mapping[str, Any], arrays: Any, threads: int) -> dict[str, float]:
    import numpy as np

    order = np.random.default_rng(0).permutation(784)
    images: Array = np.take(arrays.train_x.reshape(-1, 784), order, 1)
    steps = setting["steps"]
    if side == "torch":
        online = peers.torch_online(images, arrays.train_y, steps, RATE, threads=threads)
    else:
        own = 2 if side.endswith("two threads") else threads
        online = peers.jax_online(images, arrays.train_y, steps, RATE, threads=own, scan=side.endswith("at once"))
    return {"seconds": online.seconds * steps, "samples": steps, "accuracy": online.accuracy}


def _crl(setting: Mapping[str, Any], threads: int) -> dict[str, float]:
    """The walk's own loop over the same tasks, and what its data alone take."""
    online = setting["batch"] == 1
    stream = {"use": "permuted" if online else "split", "data": setting["data"], "tasks": len(setting["tasks"])}
    stream |= {"batch": setting["batch"], "samples": setting["steps"] * setting["batch"]}
    stream |= {} if online else {"order": "as_is"}
    agent = {"use": "classifier", "net": setting["net"], "optimizer": {"use": "sgd"}, "learning_rate": RATE}
    plan = build.build(config.read({"stream": stream, "agent": agent, "monitors": [], "threads": threads}))
    seconds, right = 0.0, []
    for visit in plan.visits:
        boundary.enter(plan, visit)
        began = time.perf_counter()
        for tick in visit.task.train(plan.agent, visit):
            right += [tick.numbers["train/accuracy"]] if tick.numbers else []
        seconds += time.perf_counter() - began
    share = _data_alone(plan) / seconds
    return {"seconds": seconds, "samples": sum(plan.steps), "accuracy": statistics.mean(right), "data_share": share}


def _data_alone(plan: build.Plan) -> float:
    """Seconds of the same loop where nothing is learned: rows gathered, shuffled, cut and made numbers."""
    plan.agent.update = dict  # type: ignore[method-assign]
    began = time.perf_counter()
    for visit in plan.visits:
        for _ in visit.task.train(plan.agent, visit):
            pass
    return time.perf_counter() - began


def measure(case: str, pairs: int, threads: int) -> dict[str, Any]:
    """Every side in turns, so often."""

    def env(side: str) -> dict[str, str]:
        own = str(2 if side.endswith("two threads") else CASES[case].get("threads", threads))
        return {**os.environ, "OPENBLAS_NUM_THREADS": own, "OMP_NUM_THREADS": own}

    sides = CASES[case]["sides"]
    found = turns.in_turns(
        case, sides, pairs, lambda side: ("crl.bench.supervised", side, case, str(threads)), _rate, env
    )
    ratios = turns.ratios(found, lambda run: run["seconds"])
    return {"case": case, "mark": CASES[case]["mark"], "runs": found, "ratios": ratios}


def main(pairs: int = 5, steps: int = 0, as_json: bool = False, threads: int = 2) -> str:
    """Run every case and say how the sides compare."""
    for name, package in (("avalanche", "avalanche-lib"), ("jax", "jax")):
        if importlib.util.find_spec(name) is None:
            raise CrlError(f"bench supervised compares with {name}: pip install {package}")
    version = importlib.import_module("importlib.metadata").version
    head = {
        "machine": {"processor": platform.processor() or platform.machine(), "python": platform.python_version()},
        "threads": threads,
        "versions": {name: version(name) for name in ("torch", "avalanche-lib", "jax")},
        "pairs": pairs,
    }
    result = {**head, "results": [measure(case, pairs, threads) for case in CASES]}
    return json.dumps(result, indent=1) if as_json else table(result)


def table(result: Mapping[str, Any]) -> str:
    """A Markdown table: medians, and ratios with their spread."""

    def cells(runs: Sequence[turns.Figures]) -> list[str]:
        return [_rate(sorted(runs, key=lambda run: run["seconds"])[len(runs) // 2])]

    return turns.table(
        ("samples/s or time a step", "time, theirs / crl: median (min to max)"), result["results"], cells
    )


def _rate(run: Mapping[str, float]) -> str:
    rate = run["samples"] / run["seconds"]
    own = f", of which data {run['data_share']:.1%}" if "data_share" in run else ""
    return f"{rate:,.0f} samples/s ({1000 / rate:.3f} ms each{own})"


if __name__ == "__main__":
    one(sys.argv[1], sys.argv[2], int(sys.argv[3]))
