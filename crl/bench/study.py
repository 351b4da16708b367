"""Does it work: one config with every method, over seeds, and the table that the README shows.

Runs go to a folder, and those that are finished are not run again, so a study can be stopped and gone on with.
"""

from __future__ import annotations

import concurrent.futures
import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from crl import config, metrics
from crl.opened import Run, visit_areas
from crl.stats import bootstrap

LAST = 4  # visits


@dataclass(frozen=True)
class Arm:
    """What is compared: methods, and what the agent has otherwise."""

    methods: list[dict[str, Any]] = field(default_factory=list)
    agent: dict[str, Any] = field(default_factory=dict)


# Strengths were chosen among two or three each on seed 100, which is not one of a study's; all else is the config's.
STUDIES: dict[str, dict[str, Arm]] = {
    "plasticity": {
        "plain": Arm(),
        "reset": Arm([{"use": "reset"}]),
        "l2": Arm([{"use": "l2", "strength": 1e-3}]),
        "erank": Arm([{"use": "erank", "lr": 1e-2}]),
        "l2_er": Arm([{"use": "l2_er", "l2": 1e-4, "lr": 1e-2}]),
        "l2_init": Arm([{"use": "l2_init", "strength": 1e-3}]),
        "shrink_perturb": Arm([{"use": "shrink_perturb", "keep": 0.4, "noise": 0.6}]),
        "redo": Arm([{"use": "redo", "every": 100}]),
        "cbp": Arm([{"use": "cbp", "rate": 1e-3}]),
        "LayerNorm": Arm(agent={"net": {"norm": "layer"}}),
    },
    "forgetting": {
        "plain": Arm(),
        "ewc": Arm([{"use": "ewc"}]),
        "replay": Arm([{"use": "replay"}]),
        "lwf": Arm([{"use": "lwf", "strength": 0.1}]),
        "agem": Arm([{"use": "agem"}]),
    },
}


def main(study: str, seeds: int = 5, out: str = "runs/study", jobs: int = 0, as_json: bool = False) -> str:
    """Run what is missing, `jobs` at once (by default as many as there are cores), and show the table."""
    arms = STUDIES[study]
    wanted = [(name, seed) for seed in range(seeds) for name in arms]
    folder = Path(out) / study
    with concurrent.futures.ThreadPoolExecutor(jobs or os.cpu_count() or 1) as pool:
        for name, seed in pool.map(lambda one: _run(study, folder, *one), wanted):
            print(f"{study}: {name}, seed {seed}", file=sys.stderr, flush=True)
    found = {name: [_numbers(study, _place(study, folder, name, seed)) for seed in range(seeds)] for name in arms}
    result = {"study": study, "seeds": seeds, "arms": found}
    return json.dumps(result, indent=1) if as_json else table(result)


def _place(study: str, folder: Path, name: str, seed: int) -> Path:
    label = "+".join(["ppo", *(method["use"] for method in STUDIES[study][name].methods)])
    return folder / name / study / label / f"seed-{seed}"


def _run(study: str, folder: Path, name: str, seed: int) -> tuple[str, int]:
    """One run in a process of its own, unless it is there."""
    manifest = _place(study, folder, name, seed) / "manifest.json"
    if manifest.exists() and json.loads(manifest.read_text())["status"] == "finished":
        return name, seed
    arm = STUDIES[study][name]
    data = config.parse_yaml(config.find_config(study).read_text(encoding="utf-8"), study)
    net = {**data["agent"]["net"], **arm.agent.get("net", {})}
    data |= {"name": study, "seed": seed, "methods": arm.methods, "agent": {**data["agent"], **arm.agent, "net": net}}
    if study == "plasticity" and name == "plain":
        data["baseline"] = "fresh"
    folder.mkdir(parents=True, exist_ok=True)
    source = folder / f"{name}-{seed}.yaml"
    source.write_text(yaml.safe_dump(data), encoding="utf-8")
    command = [sys.executable, "-m", "crl", "train", "--env-seq", str(source), "--out", str(folder / name), "-q"]
    subprocess.run([*command, "--overwrite"], check=True)
    return name, seed


def _numbers(study: str, place: Path) -> dict[str, float]:
    """What a run comes to."""
    run = Run(place)
    if study == "forgetting":
        matrix, visits = run.matrix, list(range(len(run.tasks)))
        numbers = {f"after_{name}": float(matrix[i + 1, i]) for i, name in enumerate(run.tasks)}
        numbers |= {f"end_{name}": float(matrix[-1, i]) for i, name in enumerate(run.tasks)}
        lost = metrics.forgetting_per_task(matrix, visits)
        return {**numbers, "forgetting": float(lost[:-1].mean()), "average": float(matrix[-1].mean())}
    areas = [area.value for area in visit_areas(run)]
    numbers = {"first": float(np.mean(areas[:2])), "last": float(np.mean(areas[-LAST:]))}
    dead = [r.value for r in run.records if r.name == "dormant/actor/dead" and r.phase == "end"]
    rank = [r.value for r in run.records if r.name == "erank/actor/last/effective_rank" and r.phase == "end"]
    numbers |= {"dead": float(np.mean(dead[-LAST:])), "erank": float(np.mean(rank[-LAST:]))}
    fresh = [r.value for r in run.records if r.name == "metrics/fresh_area"]
    return {**numbers, **({"fresh": float(np.mean(fresh))} if fresh else {}), **_visits(areas)}


def _visits(areas: list[float]) -> dict[str, float]:
    return {f"visit_{i}": area for i, area in enumerate(areas, start=1)}


COLUMNS = {
    "plasticity": {
        "first": "first two visits",
        "last": f"last {LAST} visits",
        "dead": "dead units, actor",
        "erank": "effective rank, actor",
    },
    "forgetting": {
        "average": "all tasks, at the end",
        "forgetting": "forgotten of the first two",
        "after_exchanged": "the second, right after its visit",
        "end_exchanged": "the second, at the end",
    },
}


def table(result: dict[str, Any]) -> str:
    """A Markdown table: means over seeds, with 95 % bootstrap intervals."""
    study, generator = result["study"], np.random.default_rng(0)
    columns = COLUMNS[study]
    lines = [f"| | {' | '.join(columns.values())} |", f"|---|{'---|' * len(columns)}"]
    for name, runs in result["arms"].items():
        cells = []
        for key in columns:
            found = bootstrap([run[key] for run in runs], generator)
            digits = 2 if key in ("dead", "erank") else 0
            cells.append(f"{found.mean:.{digits}f} [{found.low:.{digits}f}, {found.high:.{digits}f}]")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    fresh = [run["fresh"] for run in result["arms"]["plain"] if "fresh" in run]
    if fresh:
        found = bootstrap(fresh, generator)
        lines.append(
            f"| a new agent for each task, once | {found.mean:.0f} [{found.low:.0f}, {found.high:.0f}] | | | |"
        )
    return "\n".join(lines)
