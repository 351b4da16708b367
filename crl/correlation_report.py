"""What `crl correlate` shows and writes: tables, how to read them, two CSVs, and a figure for each target."""

from __future__ import annotations

import csv
import io
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from crl.coefficients import FEWEST, TARGETS, Point, Row, kinds, taken
from crl.disk import write_whole
from crl.scatter import MOST, Panel, draw_scatters
from crl.stats import ENOUGH, iqm_interval


@dataclass(frozen=True)
class Report:
    """What was found: a row for each predictor and target, the points behind them, and what is to be said of both."""

    rows: Sequence[Row]
    points: Sequence[Point]
    notes: Sequence[str]
    out: Path

    def table(self) -> str:
        """Both targets' rows, the largest |Spearman| first, and the notes; `after` is in the CSV."""
        parts = [_table([row for row in self.rows if row.target == t], t) for t in ("learning", "forgetting")]
        return "\n\n".join([*parts, "\n".join(f"- {note}" for note in self.notes)])


def _table(rows: Sequence[Row], target: str) -> str:
    """A target's rows in Markdown, aligned; those without coefficients are told of below it."""
    title = f"{target}: {TARGETS[target]}"
    shown = [row for row in rows if not row.reason]
    if not shown:
        return f"{title}\n\nno predictor has {FEWEST} points that vary"
    beside = list(shown[0].beside)
    lines = [["predictor", "n", "runs", "Spearman", "Pearson", "Kendall", "R2", *beside]]
    for row in shown:
        star = " *" if row.holds else "  "
        numbers = [f"{row.spearman}{star}", str(row.pearson), str(row.kendall), _short(row.line.r2)]
        others = [_short(row.beside[kind].value) for kind in beside]
        lines.append([row.predictor, str(row.n), str(row.runs), *numbers, *others])
    widths = [max(3, *map(len, column)) for column in zip(*lines, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    form = "| " + " | ".join(f"{{:{side}{w}}}" for side, w in zip("<" + ">" * 9, widths, strict=False)) + " |"
    return "\n".join([title, "", *(form.format(*line) for line in [lines[0], rule, *lines[1:]])])


def _short(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:z.2f}"


def reading(rows: Sequence[Row], points: Sequence[Point], within: bool) -> list[str]:
    """How to read the tables: what was tested, and what the intervals do not say."""
    runs = {point.run for point in points}
    notes = []
    for target in ("learning", "forgetting"):
        tested = [row for row in rows if row.target == target and not row.reason]
        if tested:
            clear = sum(row.clear for row in tested)
            notes.append(
                f"{target}: {len(tested)} predictors were tested; the intervals of {clear} leave out zero, each taken "
                f"alone, and {sum(row.holds for row in tested)} (*) hold with all taken at once"
            )
            notes += _level([point for point in points if point.target == target])
    notes.append(_spread(len(runs)))
    meaning = {
        "pooled": "pooled: Spearman of all points as they are",
        "within": "within: Spearman of deviations from the run's own mean, without runs good or bad as a whole",
        "same visit": "same visit: of deviations from the mean over runs at the same visit of the same task, without "
        "late boundaries and hard tasks",
    }
    notes += [meaning[kind] for kind in kinds(within)[1:]]
    if within:
        notes.append("the other columns are of deviations from the run's own mean")
    return [*notes, *_warnings(rows, points)]


def _level(points: Sequence[Point]) -> list[str]:
    """How much of a target there is: where that is next to nothing, what goes with it says little.

    Over the visits that all runs have; a draw takes runs with all of their visits.
    """
    scores: dict[str, dict[int, float]] = defaultdict(dict)
    for point in points:
        scores[point.run][point.visit] = point.y
    visits = sorted(set.intersection(*(set(own) for own in scores.values())))
    if not visits or len(scores) < ENOUGH:
        return []
    found = iqm_interval([[own[i] for i in visits] for own in scores.values()], np.random.default_rng(0))
    return [
        f"{points[0].target}: its interquartile mean over {len(scores)} runs at {len(visits)} visits is "
        f"{found.mean:z.3g}, 95 % interval [{found.low:z.3g}, {found.high:z.3g}] (stratified bootstrap)"
    ]


def _spread(runs: int) -> str:
    """Over what the intervals are."""
    if runs == 1:
        return "one run: the 95 % intervals are over its boundaries alone, and say nothing of other runs"
    return f"95 % bootstrap intervals: {runs} runs are drawn, then boundaries within them"


def _warnings(rows: Sequence[Row], points: Sequence[Point]) -> list[str]:
    """What these runs in particular cannot tell, and which rows have no coefficients."""
    tasks: dict[str, set[str]] = defaultdict(set)
    for point in points:
        tasks[point.run].add(point.task)
    notes = []
    if len({frozenset(own) for own in tasks.values()}) > 1:
        notes.append("the runs do not have the same tasks: their returns are pooled as they are, on whatever scales")
    ends = {row.predictor for row in rows if row.target == "forgetting"}
    only = sorted({row.predictor.partition("/")[0] for row in rows if row.target == "learning"} - _monitors(ends))
    if only:
        notes.append(
            f"seen before visits only, so not beside forgetting: {', '.join(only)} (`at: [init, end]` has both)"
        )
    reasons: dict[tuple[str, str], list[str]] = defaultdict(list)
    for row in rows:
        if row.reason and row.target != "after":
            reasons[row.target, row.reason].append(row.predictor)
    return [*notes, *(f"{target}: {why}: {_listed(names)}" for (target, why), names in reasons.items())]


def _listed(names: Sequence[str]) -> str:
    """A few names, and how many more the CSV has."""
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _monitors(names: set[str]) -> set[str]:
    return {name.partition("/")[0] for name in names}


def write(report: Report, within: bool) -> None:
    """Two tables and two figures."""
    report.out.mkdir(parents=True, exist_ok=True)
    write_whole(report.out / "correlation.csv", _csv([_flat(row) for row in report.rows]))
    write_whole(report.out / "points.csv", _csv([vars(point) for point in report.points]))
    for target, ylabel in (("learning", "area under the training curve"), ("forgetting", "mean forgetting")):
        rows = [row for row in report.rows if row.target == target and not row.reason]
        panels = [_panel(row, report.points, within) for row in rows[:MOST]]
        count = f"the {MOST} strongest of {len(rows)} predictors" if len(rows) > MOST else f"{len(rows)} predictors"
        title = f"what goes with {target}: {count}{', within runs' if within else ''}"
        unit = f"{ylabel}, from the run's mean" if within else ylabel
        draw_scatters(panels, title, unit).savefig(report.out / f"{target}.png")


def _panel(row: Row, points: Sequence[Point], within: bool) -> Panel:
    own = [p for p in points if (p.target, p.predictor) == (row.target, row.predictor)]
    x, y, kept = taken(own, "within" if within else "pooled")
    beside = ", ".join(f"{kind} {_short(found.value)}" for kind, found in row.beside.items())
    fit = f"R² {row.line.r2:.2f}, Spearman {row.spearman}{' *' if row.holds else ''}, n {row.n}\n{beside}"
    return Panel(row.predictor, fit, x, y, [own[i].run for i in kept], row.line.slope, row.line.intercept)


def _flat(row: Row) -> dict[str, object]:
    """A row as the CSV has it: intervals in columns of their own."""
    fields: dict[str, object] = {name: getattr(row, name) for name in ("target", "predictor", "n", "runs")}
    found = {"spearman": row.spearman, "pearson": row.pearson, "kendall": row.kendall, **row.beside}
    for name, value in found.items():
        key = name.replace(" ", "_")
        fields |= {key: value.value, f"{key}_low": value.low, f"{key}_high": value.high}
    fields |= {"r2": row.line.r2, "slope": row.line.slope, "intercept": row.line.intercept}
    return fields | {"holds": int(row.holds), "reason": row.reason}


def _csv(rows: Sequence[Mapping[str, object]]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()
