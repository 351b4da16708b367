"""Does it work: one config with several arms, over seeds, and the table that the README shows.

Runs go to a folder, and those that are finished are not run again, so a study can be stopped and gone on with.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from crl import config, stats
from crl.core import CrlError
from crl.opened import Run
from crl.seeds import Walk, walk


@dataclass(frozen=True)
class Arm:
    """What is compared: methods, and what else the config has otherwise, by its place."""

    methods: list[dict[str, Any]] = field(default_factory=list)
    changes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Column:
    """A column of a study's table: one of its numbers, as a mean over seeds."""

    number: str
    title: str
    digits: int = 0
    possible: tuple[float, float] = (-math.inf, math.inf)  # an interval ends where the number can go no further


@dataclass(frozen=True)
class Study:
    """A config, its arms, what a run comes to, and what of that is shown."""

    config: str
    arms: Mapping[str, Arm]
    numbers: Callable[[Run], dict[str, float]]
    columns: tuple[Column, ...]
    differences: tuple[tuple[str, str], ...] = ()  # pairs of arms, also compared seed by seed
    changes: Mapping[str, Any] = field(default_factory=dict)  # of the config, in every arm
    alone: tuple[str, str] | None = None  # a number that only some runs have: its row's name, and the number


def main(name: str, study: Study, seeds: int = 5, out: str = "runs/study", jobs: int = 0, as_json: bool = False) -> str:
    """Run what is missing, `jobs` at once (by default as many as there are cores), and show the table."""
    folder = Path(out) / name
    walks = {
        (arm, seed): Walk(f"{arm}, seed {seed}", _spec(study, arm, seed), folder / arm)
        for seed in range(seeds)
        for arm in study.arms
    }
    walk([*walks.values()], jobs or os.cpu_count() or 1, verbosity=0)
    for one in walks.values():
        if one.why:
            raise CrlError(f"{one.name}: {one.why}; the same command goes on from there")
    done = {key: Run(one.folder.path) for key, one in walks.items()}
    found = {arm: [study.numbers(done[arm, seed]) for seed in range(seeds)] for arm in study.arms}
    result = {"study": name, "seeds": seeds, "arms": found}
    return json.dumps(result, indent=1) if as_json else table(study, result)


def _spec(study: Study, arm: str, seed: int) -> config.Experiment:
    own = study.arms[arm]
    named = [("name", Path(study.config).name), ("seed", seed), ("methods", own.methods)]
    return config.read(study.config, [*named, *study.changes.items(), *own.changes.items()])


def table(study: Study, result: dict[str, Any]) -> str:
    """A Markdown table: means over seeds with 95 % intervals (`crl.stats.interval`), and below it what those hold."""
    titles = [column.title for column in study.columns]
    lines = [f"| | {' | '.join(titles)} |", f"|---|{'---|' * len(titles)}"]
    arms = result["arms"]
    for name, runs in arms.items():
        lines.append(_row(name, [_cell([run[c.number] for run in runs], c) for c in study.columns]))
    for one, other in study.differences:
        pairs = [(replace(c, possible=Column.possible), [a[c.number] - b[c.number] for a, b in
                  zip(arms[one], arms[other], strict=True)]) for c in study.columns]  # fmt: skip
        lines.append(_row(f"{one} less {other}", [_cell(values, column) for column, values in pairs]))
    if study.alone is not None:
        title, number = study.alone
        values = [run[number] for runs in arms.values() for run in runs if number in run]
        if values:
            empty = [""] * (len(titles) - 1)
            lines.append(_row(title, [_cell(values, study.columns[0]), *empty]).replace("  |", " |"))
    caption = stats.caption(result["seeds"])
    return "\n".join([*lines, *(["", caption] if caption else [])])


def _row(name: str, cells: list[str]) -> str:
    return f"| {name} | {' | '.join(cells)} |"


def _cell(values: list[float], column: Column) -> str:
    found = stats.interval([value for value in values if np.isfinite(value)], possible=column.possible)
    if np.isnan(found.low):
        return f"{found.mean:.{column.digits}f}"  # one run has no interval
    return f"{found.mean:.{column.digits}f} [{found.low:.{column.digits}f}, {found.high:.{column.digits}f}]"
