"""What the parts of the soak share: tiny walks, and what must be equal after them."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
SB3 = {"learning_starts": 50, "buffer_size": 400, "batch_size": 16}
ROLLOUT = {"n_steps": 16}
AGENTS: list[dict[str, Any]] = [
    {"use": "ppo", "n_steps": 16, "batch_size": 16, "n_epochs": 1},
    {"use": "dqn", **SB3, "train_freq": 4},
    {"use": "stable_baselines3.A2C", **ROLLOUT},
    {"use": "stable_baselines3.SAC", **SB3},
    {"use": "stable_baselines3.TD3", **SB3},
    {"use": "stable_baselines3.DDPG", **SB3},
    {"use": "sb3_contrib.TRPO", **ROLLOUT, "batch_size": 16},
    {"use": "sb3_contrib.QRDQN", **SB3},
    {"use": "sb3_contrib.TQC", **SB3},
    {"use": "sb3_contrib.CrossQ", **SB3},
    {"use": "classifier", "net": {"use": "mlp", "hidden": [8]}},
]
CONTINUOUS = ("SAC", "TD3", "DDPG", "TQC", "CrossQ")


def tiny(number: int) -> dict[str, Any]:
    """A walk of a few hundred steps: every agent in turn, with one method of all that it can do with."""
    from crl.named import METHODS

    agent = copy.deepcopy(AGENTS[number % len(AGENTS)])  # whoever asks may change it
    env = "Pendulum-v1" if agent["use"].endswith(CONTINUOUS) else "CartPole-v1"
    method = sorted(METHODS)[(number // len(AGENTS)) % len(METHODS)]
    data: dict[str, Any] = {
        "name": f"tiny-{number}",
        "agent": agent,
        "methods": [method],
        "monitors": ["norms"],
        "evaluation": {"episodes": 1, "samples": 20},
        "checkpoint": {"every": [0, 50][number % 2]},
        "threads": 1,
    }
    if agent["use"] == "classifier":
        data["stream"] = {"use": "split", "data": "tests.tiny_images.real", "tasks": 2, "samples": 96, "batch": 16}
    else:
        task = {"env": env, "steps": 256, "kwargs": {"max_episode_steps": 40}}
        data |= {"tasks": [{**task, "name": name} for name in ("one", "two")], "engine": {"envs": 2}}
    return data


def accepted(number: int) -> dict[str, Any]:
    """The tiny walk, without its method where agent and method do not go together."""
    from crl import build, config
    from crl.core import CrlError

    data = tiny(number)
    try:
        build.build(config.read(data))
    except CrlError:
        data["methods"] = []
    return data


def command(data: dict[str, Any], folder: Path, out: str, *flags: str) -> list[str]:
    """The public command that walks it."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "c.yaml"
    path.write_text(yaml.safe_dump(data))
    seq = "--data-seq" if "stream" in data else "--env-seq"
    return ["train", seq, str(path), "--out", str(folder / out), "-q", *flags]


def here(argv: list[str]) -> tuple[int, str]:
    """(exit code, what it said) of a command in this process; a traceback is raised."""
    from crl.cli import main

    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        try:
            code = main(argv)
        except SystemExit as error:
            code = int(error.code or 0)
    return code, said.getvalue()


def apart(argv: list[str], before: str = "", **options: Any) -> subprocess.Popen[str]:
    """The command in a process of its own, which does `before` first."""
    code = f"import sys\n{before}\nfrom crl.cli import main\nsys.exit(main(sys.argv[1:]))"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-c", code, *argv], cwd=ROOT, env=env, text=True, stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL, **options,
    )  # fmt: skip


def run_of(folder: Path, out: str) -> Path | None:
    """The run's folder below an output folder, if one was begun."""
    return next((path.parent for path in (folder / out).glob("*/*/seed-*/manifest.json")), None)


def kept(run: Path) -> tuple[Any, ...]:
    """All that must be equal: records but for times, the matrix, and every tensor of the last checkpoint."""
    from crl.opened import Run
    from crl.store import RunFolder
    from tests.test_resume import fingerprint

    opened, folder = Run(run), RunFolder(run)
    records = [repr(record) for record in opened.records if not record.name.startswith("time/")]
    state = folder.load(folder.latest(), opened.experiment.digest)
    return records, (run / "matrix.csv").read_bytes(), repr(fingerprint({**state, "offset": 0}))


def finished(run: Path) -> bool:
    """Whether the run's manifest says so."""
    return bool(json.loads((run / "manifest.json").read_text())["status"] == "finished")


def dice(part: str, number: int) -> random.Random:
    """A case's own chance."""
    return random.Random(f"{part} {number}")
