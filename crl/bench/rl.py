"""What the walk costs: bare Stable-Baselines3 and `crl train`, the same environment, settings and steps, in turns.

Each run is a process of its own. Its clock starts after the imports: bare SB3 runs `learn()` on its own vector of
monitored environments; the suite runs the whole walk with its default logging, checkpoints and TensorBoard.
Evaluation is set to one episode, since bare SB3 has none.
"""

from __future__ import annotations

import importlib
import json
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

from crl import build, config, run

ENVS = 16
SETTINGS: dict[str, dict[str, Any]] = {
    "ppo": {"learning_rate": 5e-4, "n_steps": 128, "batch_size": 256, "n_epochs": 4, "ent_coef": 0.01},
    "dqn": {"learning_starts": 1_000, "buffer_size": 50_000, "batch_size": 64, "train_freq": 1, "gradient_steps": 2},
}
CASES = (  # agent, environment, and the share of --steps that it runs
    ("ppo", "MiniGrid-DoorKey-5x5-v0", 1.0),
    ("ppo", "CartPole-v1", 2.0),
    ("dqn", "MiniGrid-DoorKey-5x5-v0", 0.4),
)


def bare(agent: str, env: str, steps: int) -> None:
    """Stable-Baselines3 alone, used as its documentation does."""
    sb3 = importlib.import_module("stable_baselines3")
    vectors = importlib.import_module("stable_baselines3.common.env_util")
    nets, agents = importlib.import_module("agents.layers"), importlib.import_module("agents.given")
    task = importlib.import_module("envs.gym").build(env=env, name=env, envs=ENVS)
    kwargs = importlib.import_module("agents.options").policy_kwargs(task.interface, {}, {})
    vector = vectors.make_vec_env(task.make, n_envs=ENVS, seed=0)
    if kwargs.get("features_extractor_class") is nets.OneHot:
        vector.observation_space = agents.stored(task.interface.observation)
    algorithm = {"ppo": sb3.PPO, "dqn": sb3.DQN}[agent]
    algorithm("MlpPolicy", vector, seed=0, device="cpu", policy_kwargs=kwargs, **SETTINGS[agent]).learn(steps)


def suite(agent: str, env: str, steps: int) -> None:
    """The same as one visit of a walk."""
    data = {
        "tasks": [{"env": env, "steps": steps}],
        "agent": {"use": agent, **SETTINGS[agent]},
        "engine": {"envs": ENVS},
        "evaluation": {"episodes": 1},
        "monitors": [],
    }
    with tempfile.TemporaryDirectory() as folder:
        run.train(data, out=folder)


def child(side: str, agent: str, env: str, steps: int) -> None:
    """One timed run; prints its figures as JSON."""
    build.build(config.read({"tasks": [{"env": env, "steps": 1}], "agent": agent}))  # every import, before the clock
    importlib.import_module("torch.utils.tensorboard")
    importlib.import_module("matplotlib.figure")
    wall, cpu = time.perf_counter(), time.process_time()
    {"bare": bare, "suite": suite}[side](agent, env, steps)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"steps_per_second": steps / wall, "cpu_seconds": cpu, "peak_mib": peak}))


def compare(agent: str, env: str, steps: int, pairs: int) -> dict[str, Any]:
    """Both sides in turns; the ratio of each pair, so that a drifting machine does not decide."""
    sides: dict[str, list[dict[str, float]]] = {"bare": [], "suite": []}
    for pair in range(pairs):
        for side in ("bare", "suite") if pair % 2 == 0 else ("suite", "bare"):
            code = f"from crl.bench.rl import child; child({side!r}, {agent!r}, {env!r}, {steps})"
            done = subprocess.run(
                [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False
            )
            if done.returncode:
                raise RuntimeError(done.stderr)
            sides[side].append(json.loads(done.stdout.splitlines()[-1]))
            rate = sides[side][-1]["steps_per_second"]
            print(f"{agent} {env} pair {pair + 1}/{pairs} {side}: {rate:,.0f} steps/s", file=sys.stderr)
    speeds = {side: [figures["steps_per_second"] for figures in found] for side, found in sides.items()}
    ratios = [b / s for b, s in zip(speeds["bare"], speeds["suite"], strict=True)]
    return {"agent": agent, "env": env, "steps": steps, "runs": sides, "time_ratio": ratios}


def main(pairs: int = 5, steps: int = 100_000, as_json: bool = False) -> str:
    """All cases, as a table or JSON."""
    results = [compare(agent, env, int(share * steps), pairs) for agent, env, share in CASES]
    machine = {"processor": platform.processor() or platform.machine(), "python": platform.python_version()}
    if as_json:
        return json.dumps({"machine": machine, "results": results}, indent=2)
    lines = [f"{'':<32}{'bare SB3':>12}{'crl train':>12}   time crl/bare: median (min to max), {pairs} pairs"]
    for result in results:
        middle = {s: statistics.median(f["steps_per_second"] for f in found) for s, found in result["runs"].items()}
        ratios = result["time_ratio"]
        lines.append(
            f"{result['agent']} {result['env']:<28}{middle['bare']:>12,.0f}{middle['suite']:>12,.0f}   "
            f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
        )
    return "\n".join(lines)
