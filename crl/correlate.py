"""`crl correlate`: does what a monitor sees predict forgetting, or how well the next task is learned?

The claim of arXiv 2509.22335 and 2603.04580, tested on runs. A point is one boundary of one run, visits counted i.

- `learning`, i >= 2: the area under visit i's training curve (`metrics/area`), against a monitor's number at phase
  `init` of visit i, before its first update. `after` is the same against R[i, task of i], the return it ended with.
- `forgetting`, i >= 2: the mean over tasks j visited before i, without the task of i, of max_{1 <= l < i} R[l, j] -
  R[i, j], against a monitor's number at phase `end` of visit i; and as a predictor of its own, `<name> (change)`,
  against that number less the one at the `end` of visit i - 1. The maximum starts at row 1, as in
  `crl.metrics.forgetting_max`: what was never trained is not forgotten. What is NaN is skipped.

Points of all runs are pooled as they are, as the papers do. That mixes runs, tasks and boundaries that differ, so two
more Spearman coefficients stand beside it. `within` has the mean of its own run taken from both variables: what is
left is not that some methods or seeds are better as a whole. `same visit` has the mean over runs at the same visit of
the same task taken from both: what is left is not that late tasks are hard and late networks of low rank. Large in
all three, a monitor predicts; pooled alone, it tells runs or tasks apart. None of it says what causes what: a method
may change both.

Intervals are of each row alone, from `crl.stats.resampled`: runs are drawn, then boundaries within them. A star says
that the row is told from zero even with all rows of its target believed at once (`crl.stats.hold_together`).
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from crl.coefficients import TARGETS, Point, Row, rows_of
from crl.core import Array, CrlError, brief
from crl.correlation_report import Report, reading, write
from crl.opened import Run, visit_areas
from crl.sinks import looked


def correlate(
    paths: Sequence[str | Path] | str | Path,
    out: str | Path = "correlation",
    resamples: int = 2000,
    within: bool = False,
) -> Report:
    """Read runs (folders, or folders of them), and write correlation.csv, points.csv and a figure for each target.

    `within` takes its own run's mean from both variables first; `pooled` then stands beside it. The random numbers
    are the same in every call.
    """
    if resamples < 100:
        raise CrlError(f"{resamples} resamples are too few for an interval: at least 100")
    patience = _Patience()
    points, notes = _read([paths] if isinstance(paths, str | Path) else paths, patience.tell)
    if not points:
        why = f" ({notes[0]})" if notes else ""
        raise CrlError(f"nothing to correlate: no run has a monitor's number and a second visit that is over{why}")
    rows: list[Row] = []
    for target in TARGETS:
        rows += rows_of([point for point in points if point.target == target], resamples, within, patience.tell)
    files = f"written to {out}: correlation.csv (also of the return after a visit, `after`), points.csv and two figures"
    report = Report(rows, points, [*reading(rows, points, within), *notes, files], Path(out))
    write(report, within)
    return report


# Runs and their points.


def find_runs(paths: Sequence[str | Path]) -> list[Path]:
    """The runs that are named, and those below folders that are named; runs within runs are baselines."""
    found: dict[Path, None] = {}
    for path in map(Path, paths):
        below = [run.resolve() for run in _runs_below(path)]
        if not below:
            raise CrlError(f"{path}: no run is here, nor below (there is no manifest.json)")
        found |= dict.fromkeys(below)
    if not found:
        raise CrlError("name at least one run's folder, or a folder with runs below it")
    return list(found)


def _runs_below(path: Path) -> Iterator[Path]:
    for folder, inner, files in os.walk(path):
        inner.sort()
        if "manifest.json" in files:
            inner.clear()
            yield Path(folder)


def _read(paths: Sequence[str | Path], tell: Callable[[str], None]) -> tuple[list[Point], list[str]]:
    """Every run's points, and a note on each run that has none."""
    runs = find_runs(paths)
    points, notes = [], []
    digests: dict[str, str] = {}
    for count, (path, label) in enumerate(zip(runs, labels(runs), strict=True), start=1):
        tell(f"reading run {count} of {len(runs)}")
        try:
            same = digests.setdefault(str(Run(path).manifest.get("digest", path)), label)
            if same != label:
                notes.append(f"left out: {label}: it has the config and seed of {same}, so it is the same run")
                continue
            found = points_of(Run(path), label)
        except (CrlError, OSError, ValueError, KeyError, TypeError, IndexError) as error:
            notes.append(f"left out: {label}: {_why(error)}")
            continue
        points += found
        if not found:
            notes.append(f"left out: {label}: no monitor's number at a boundary from the second visit on")
    return points, notes


def _why(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return f"it has no {Path(error.filename).name}"
    return str(error) if isinstance(error, CrlError) else brief(error)


def labels(paths: Sequence[Path]) -> list[str]:
    """Short names of runs, all different: their paths without the folders that all of them share.

    >>> labels([Path("/r/l2/plasticity/ppo/seed-0"), Path("/r/cbp/plasticity/ppo/seed-0")])
    ['l2', 'cbp']
    >>> labels([Path("/r/forgetting/ppo/seed-0")])
    ['forgetting/ppo/seed-0']
    """
    if len(paths) == 1:
        return ["/".join(paths[0].parts[-3:])]
    common = Path(os.path.commonpath(paths))
    parts = [path.relative_to(common).parts for path in paths]
    if len({len(each) for each in parts}) == 1:
        differ = [len(set(column)) > 1 for column in zip(*parts, strict=True)]
        parts = [tuple(part for part, kept in zip(each, differ, strict=True) if kept) for each in parts]
    return ["/".join(each) or "." for each in parts]


def points_of(run: Run, label: str) -> list[Point]:
    """Every boundary of a run at which a monitor saw a number and something came of it, from visit 2 on."""
    tasks = [visit["task"] for visit in run.manifest.get("visits", [])]
    matrix, columns = run.matrix, run.tasks
    tasks = tasks[: len(matrix) - 1]  # those that are over
    targets = {
        "learning": _areas(run, len(tasks)),
        "after": {i: float(matrix[i, columns.index(task)]) for i, task in enumerate(tasks, start=1)},
        "forgetting": forgotten(matrix, [columns.index(task) for task in tasks]),
    }
    seen = _seen(run)
    points = []
    for target, came in targets.items():
        for predictor, numbers in (_at_end(seen["end"]) if target == "forgetting" else seen["init"]).items():
            for i in range(2, len(tasks) + 1):
                x, y = numbers.get(i, math.nan), came.get(i, math.nan)
                if math.isfinite(x) and math.isfinite(y):
                    points.append(Point(label, i, tasks[i - 1], target, predictor, x, y))
    return points


def _areas(run: Run, visits: int) -> dict[int, float]:
    """The area of each visit that is over, as logged; a run that has not ended has logged none yet."""
    logged = {r.visit: r.value for r in run.records if r.name == "metrics/area" and isinstance(r.value, float)}
    if any(i not in logged for i in range(1, visits + 1)):
        logged = {i: area.value for i, area in enumerate(visit_areas(run), start=1)} | logged
    return logged


def forgotten(matrix: Array, visits: Sequence[int]) -> dict[int, float]:
    """For each visit from the second, how far the other tasks seen by then are below their best since the first.

    >>> forgotten(np.array([[9.0, 9.0], [4.0, 0.0], [1.0, 2.0]]), [0, 1])
    {2: 3.0}
    """
    found = {}
    for i in range(2, len(visits) + 1):
        lost = []
        for j in set(visits[: i - 1]) - {visits[i - 1]}:
            before = matrix[1:i, j][np.isfinite(matrix[1:i, j])]
            if before.size and math.isfinite(matrix[i, j]):
                lost.append(float(before.max() - matrix[i, j]))
        found[i] = float(np.mean(lost)) if lost else math.nan
    return found


def _seen(run: Run) -> dict[str, dict[str, dict[int, float]]]:
    """By phase, name and visit, each number that a monitor saw; not how sure it was of it, nor what it took."""
    found: dict[str, dict[str, dict[int, float]]] = {"init": defaultdict(dict), "end": defaultdict(dict)}
    for record in run.records:
        aside = record.name.startswith(("time/", "metrics/")) or record.name.endswith(("/low", "/high", "/error"))
        if looked(record) and not aside and isinstance(record.value, float) and math.isfinite(record.value):
            found[record.phase][record.name][record.visit] = record.value
    return found


def _at_end(numbers: Mapping[str, Mapping[int, float]]) -> dict[str, dict[int, float]]:
    """What was seen after each visit, and how it changed since the visit before."""
    found = {name: dict(values) for name, values in numbers.items()}
    for name, values in numbers.items():
        found[f"{name} (change)"] = {i: value - values[i - 1] for i, value in values.items() if i - 1 in values}
    return found


class _Patience:
    """Says on stderr how far it is, once that has taken two seconds, and every two seconds from then on."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def tell(self, what: str) -> None:
        """Say it, if it is time to."""
        if time.monotonic() - self._last > 2:
            print(f"crl: {what}", file=sys.stderr, flush=True)
            self._last = time.monotonic()
