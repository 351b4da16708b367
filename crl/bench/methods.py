"""What each method costs: PPO with it and PPO without, side by side in one process, a tick of each in turn.

Both walk two MiniGrid visits of half the steps each, so that what acts at boundaries and on earlier tasks is counted.
Turns of a tick (2,048 steps) make the pairs; a machine that drifts, drifts for both. Idle methods are on with options
that do nothing, or (the anchors and rehearsals) have nothing to remember yet.
"""

from __future__ import annotations

import importlib
import json
import platform
import statistics
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from crl import build, config, named
from crl.bench import turns
from crl.boundary import enter

TASKS = ("MiniGrid-Empty-Random-5x5-v0", "MiniGrid-DoorKey-5x5-v0")
NET = {"hidden": [64, 64]}
NEEDED: dict[str, dict[str, Any]] = {  # what a method asks of the agent, on both sides
    "normalize_and_project": {"net": {**NET, "norm": "layer"}},
    "replay": {"use": "dqn"},  # PPO cannot learn again from old experience
}
NUMBERS = ("CartPole-v1", "CartPole-v1")  # for what does not go with categories
OPTIMIZERS = ("muon", "trac")


def plan(methods: list[dict[str, Any]], agent: Mapping[str, Any], steps: int, envs: Any = TASKS) -> build.Plan:
    """Two visits with PPO at the settings of configs/minigrid.yaml."""
    tasks = [{"env": env, "steps": steps // 2} for env in envs]
    data = {"tasks": tasks, "agent": {"use": "ppo", "net": NET, **agent}, "methods": methods, "monitors": []}
    return build.build(config.read(data))


def walk(built: build.Plan) -> Iterator[None]:
    """The walk without its records."""
    for method in built.methods.values():
        method.attach(built.agent)
    for visit in built.visits:
        enter(built, visit)
        for _ in visit.task.train(built.agent, visit):
            yield
        for method in built.methods.values():
            method.leave(visit)
    yield


def side_by_side(plans: Mapping[str, build.Plan]) -> dict[str, float]:
    """Seconds of each walk, which take turns."""
    walks = {name: walk(built) for name, built in plans.items()}
    spent = dict.fromkeys(walks, 0.0)
    turn = 0
    while walks:
        for name in list(walks) if turn % 2 == 0 else list(walks)[::-1]:
            began = time.perf_counter()
            if next(walks[name], 0) is not None:
                del walks[name]
            spent[name] += time.perf_counter() - began
        turn += 1
    return spent


def cases() -> list[tuple[str, list[dict[str, Any]], dict[str, Any], dict[str, Any]]]:
    """(name, methods, the agent with, the agent without) of all that is compared."""
    found = []
    for name, where in named.METHODS.items():
        module, _, cls = where.rpartition(".")
        idle = dict(getattr(importlib.import_module(module), cls).idle)
        agent = NEEDED.get(name, {})
        found.append((name, [{"use": name}], agent, agent))
        if idle:
            found.append((f"{name}, idle", [{"use": name, **idle}], agent, agent))
    for name in OPTIMIZERS:
        found.append((f"optimizer {name}", [], {"optimizer": {"use": name}}, {}))
    found.append(("norm: layer", [], {"net": {**NET, "norm": "layer"}}, {}))
    found.append(("activation: crelu", [], {"net": {**NET, "activation": "crelu"}}, {}))
    return [*found, ("nothing", [], {}, {})]


def compare(case: Any, steps: int, pairs: int) -> dict[str, Any]:
    """Time with over time without, of each pair."""
    name, methods, agent, without = case
    ratios, rates = [], []
    for _ in range(pairs):
        torch.manual_seed(0)
        envs = NUMBERS if name.startswith("generative_replay") else TASKS
        spent = side_by_side({"without": plan([], without, steps, envs), "with": plan(methods, agent, steps, envs)})
        ratios.append(spent["with"] / spent["without"])
        rates.append(steps / spent["with"])
    print(f"{name}: {statistics.median(ratios):.3f}", file=sys.stderr, flush=True)
    return {"method": name, "steps": steps, "steps_per_second": rates, "time_ratio": ratios}


def main(pairs: int = 5, steps: int = 20_000, as_json: bool = False) -> str:
    """All methods, as a table or JSON."""
    side_by_side({"warm": plan([], {}, 4096)})
    results = [compare(case, steps, pairs) for case in cases()]
    machine = {"processor": platform.processor() or platform.machine(), "python": platform.python_version()}
    result = {"machine": machine, "torch": torch.__version__, "steps": steps, "pairs": pairs, "results": results}
    return json.dumps(result, indent=1) if as_json else table(result)


def table(result: Mapping[str, Any]) -> str:
    """A Markdown table: time with a method over time without, and the same while it is idle."""
    ratios = {found["method"]: found["time_ratio"] for found in result["results"]}
    lines = ["| | time, with / without | while idle |", "|---|---|---|"]
    for name in [name for name in ratios if not name.endswith(", idle")]:
        idle = ratios.get(f"{name}, idle")
        lines.append(f"| {name} | {turns.spread(ratios[name], 3)} | {turns.spread(idle, 3) if idle else ''} |")
    return "\n".join(lines)
