"""What the walk costs, and what engines gain: the same environment, settings and steps on every side, in turns.

Each run is a process of its own. Its clock starts after the imports: bare SB3 runs `learn()` on its own vector of
monitored environments, the single file is a PPO without anything around it; the suite runs the whole walk with its
default logging, checkpoints and TensorBoard. Evaluation is set to one episode, since the peers have none.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import platform
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any

from crl import build, config, run
from crl.bench import turns
from crl.core import CrlError

PPO = {"learning_rate": 5e-4, "n_steps": 128, "batch_size": 256, "n_epochs": 4, "ent_coef": 0.01}
DQN = {"learning_starts": 1_000, "buffer_size": 50_000, "batch_size": 64, "train_freq": 1, "gradient_steps": 2}
GRID = "MiniGrid-DoorKey-5x5-v0"
FAST = {
    **PPO,
    "learning_rate": 2e-3,
    "n_steps": 64,
    "batch_size": 4_096,
    "n_epochs": 3,
}  # those of configs/minigrid_fast.yaml
FUSED = {
    "optimizer": {"use": "adam", "fused": True}
}  # an Adam of one pass, for the walk; the peers have their defaults
SHARE = {"async": 0.5, "envpool": 5.0}  # steps of a run beside the other sides', so that each takes some seconds


def _case(name: str, sides: tuple[str, ...], steps: int, envs: int, **other: Any) -> dict[str, Any]:
    own = {"agent": "ppo", "env": GRID, "settings": PPO, "width": 64, "threads": 2}
    return {"case": name, "sides": sides, "steps": steps, "envs": envs, **own, **other}


def _large(envs: int) -> dict[str, Any]:
    """Minibatches of a quarter of a rollout, at most 2,048."""
    return {**PPO, "batch_size": min(2_048, envs * 32)}


PAIR = ("sync", "bare SB3")
PEERS = ("envpool", "sync", "bare SB3", "one file")
CASES = (
    _case("PPO, MiniGrid-DoorKey-5x5, 16 copies", PAIR, 60_000, 16, threads=1),
    _case("PPO, CartPole, 16 copies", PAIR, 120_000, 16, env="CartPole-v1", threads=1),
    _case("DQN, MiniGrid-DoorKey-5x5, 16 copies", PAIR, 30_000, 16, agent="dqn", settings=DQN, threads=1),
    _case("PPO, `minigrid_fast` (256 copies, minibatches of 4,096)", PEERS, 98_304, 256, settings=FAST),
    *(
        _case(f"PPO, DoorKey, copies: {envs}", (*PEERS[:2], "async", *PEERS[2:]), steps, envs, settings=_large(envs))
        for envs, steps in ((1, 8_192), (16, 32_768), (64, 49_152), (512, 65_536))
    ),
    *(
        _case(f"PPO, DoorKey, 64 copies, width: {width}", PEERS, 32_768, 64, settings=_large(64), width=width)
        for width in (256, 1_024)
    ),
)


def bare(case: Mapping[str, Any], steps: int) -> None:
    """Stable-Baselines3 alone, used as its documentation does."""
    sb3 = importlib.import_module("stable_baselines3")
    vectors = importlib.import_module("stable_baselines3.common.env_util")
    nets: Any = importlib.import_module("agents.layers")
    agents = importlib.import_module("agents.given")
    task = importlib.import_module("envs.gym").build(env=case["env"], name="bare", envs=case["envs"])
    nets.MANY = sys.maxsize  # all one-hot rows are written out: that equal ones are shared is ours
    net = {"hidden": [case["width"]] * 2}
    kwargs = importlib.import_module("agents.options").policy_kwargs(task.interface, net, {})
    vector = vectors.make_vec_env(task.make, n_envs=case["envs"], seed=0)
    if kwargs.get("features_extractor_class") is nets.OneHot:
        vector.observation_space = agents.stored(task.interface.observation)
    algorithm = {"ppo": sb3.PPO, "dqn": sb3.DQN}[case["agent"]]
    algorithm("MlpPolicy", vector, seed=0, device="cpu", policy_kwargs=kwargs, **case["settings"]).learn(steps)


def suite(case: Mapping[str, Any], steps: int, engine: str) -> None:
    """The same as one visit of a walk."""
    data = {
        "tasks": [{"env": case["env"], "steps": steps}],
        "agent": {
            "use": case["agent"],
            "net": {"hidden": [case["width"]] * 2},
            **(FUSED if "envpool" in case["sides"] else {}),
            **case["settings"],
        },
        "engine": {"kind": engine, "envs": case["envs"], "threads": case["threads"]},
        "threads": case["threads"],
        "evaluation": {"episodes": 1},
        "monitors": [],
    }
    with tempfile.TemporaryDirectory() as folder:
        run.train(data, out=folder)


def one(number: int, side: str, steps: int = 0) -> None:
    """One timed run, of whole rollouts; prints its figures as JSON."""
    case = CASES[number]
    rollout = case["envs"] * case["settings"].get("n_steps", 1)
    steps = max(1, round((steps or case["steps"]) * SHARE.get(side, 1.0) / rollout)) * rollout
    first = {"tasks": [{"env": case["env"], "steps": 1}], "agent": case["agent"], "threads": case["threads"]}
    build.build(config.read(first))  # every import, before the clock, and the number of threads
    for module in ("torch.utils.tensorboard", "matplotlib.figure", "crl.bench.single_file"):
        importlib.import_module(module)
    wall, cpu = time.perf_counter(), time.process_time()
    if side == "bare SB3":
        bare(case, steps)
    elif side == "one file":
        make = importlib.import_module("envs.gym").build(env=case["env"], name="one", envs=1).make
        importlib.import_module("crl.bench.single_file").train(
            make, case["envs"], steps, case["width"], **case["settings"]
        )
    else:
        suite(case, steps, side)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # not children's: a fork's begins as its parent's
    found = {"steps_per_second": steps / wall, "steps": steps, "peak_mib": peak}
    print(json.dumps({**found, "cpu_seconds": cpu + children.ru_utime + children.ru_stime}))


def measure(number: int, pairs: int, steps: int) -> dict[str, Any]:
    """Every side in turns, so often."""
    case = {name: value for name, value in CASES[number].items() if name != "sides"}
    found = turns.in_turns(
        case["case"],
        CASES[number]["sides"],
        pairs,
        lambda side: ("crl.bench.rl", str(number), side, str(steps)),
        lambda run: f"{run['steps_per_second']:,.0f} steps/s",
    )
    return {**case, "runs": found, "ratios": turns.ratios(found, lambda run: 1 / run["steps_per_second"])}


def main(pairs: int = 3, steps: int = 0, as_json: bool = False, only: str = "") -> str:
    """All cases (or those whose name holds `only`), as a table or JSON; `steps` shortens every run."""
    if importlib.util.find_spec("envpool") is None:
        raise CrlError("bench rl compares engines, and needs an extra: pip install envpool")
    machine = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    names = ("torch", "stable-baselines3", "envpool", "gymnasium", "minigrid")
    version = importlib.import_module("importlib.metadata").version
    versions = {"python": platform.python_version(), **{name: version(name) for name in names}}
    results = [measure(number, pairs, steps) for number, case in enumerate(CASES) if only in case["case"]]
    result = {"machine": machine, "versions": versions, "pairs": pairs, "results": results}
    return json.dumps(result, indent=1) if as_json else table(result)


def table(result: Mapping[str, Any]) -> str:
    """A Markdown table: medians, and how many times as fast the first side is as the others, with the spread."""

    def cells(runs: Sequence[turns.Figures]) -> list[str]:
        cpu = statistics.median(run["cpu_seconds"] / run["steps"] * 1e5 for run in runs)
        return [
            f"{turns.middle(runs, 'steps_per_second'):,.0f}",
            f"{cpu:.1f}",
            f"{turns.middle(runs, 'peak_mib'):,.0f}",
        ]

    titles = (
        "steps/s",
        "CPU seconds per 100,000 steps",
        "peak MiB, without workers",
        "times as fast as this: median (min to max)",
    )
    return turns.table(titles, result["results"], cells)


if __name__ == "__main__":
    one(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
