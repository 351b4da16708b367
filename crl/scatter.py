"""Scatter figures: a panel for each predictor, a colour for each run, the fitted line, and what it comes to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from crl.core import Array

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST = 12  # panels that a page can show
COLOURS = 10  # that an eye can tell apart


@dataclass(frozen=True)
class Panel:
    """One predictor's points, what each belongs to, and the line through them."""

    name: str
    fit: str  # the title below the name
    x: Array
    y: Array
    of: Sequence[str]  # the run of each point
    slope: float
    intercept: float


def draw_scatters(panels: Sequence[Panel], title: str, ylabel: str) -> Figure:
    """The first dozen panels on one page; the y axis is shared, and with many runs those of one folder share a colour.

    The line goes as far as the points do, and no further.
    """
    from matplotlib.figure import Figure

    shown = panels[:MOST]
    columns = min(len(shown), 4 if len(shown) > 6 else 3) or 1
    rows = max(math.ceil(len(shown) / columns), 1)
    size = (max(3.1 * columns, 5.0), 2.75 * rows + 0.9)
    figure = Figure(figsize=size, dpi=110, layout="constrained")
    figure.suptitle(title, size=11)
    if not shown:
        figure.text(0.5, 0.4, "no predictor has enough points", ha="center", size=10, color="0.4")
        return figure
    grid = figure.subplots(rows, columns, sharey=True, squeeze=False)
    colours = _colours(sorted({run for panel in panels for run in panel.of}))
    for axes in grid.flat[len(shown) :]:
        axes.set_visible(False)
    for panel, axes in zip(shown, grid.flat, strict=False):
        _draw(axes, panel, colours)
    figure.supylabel(ylabel, size=9)
    _legend(figure, colours)
    return figure


def _draw(axes: Any, panel: Panel, colours: dict[str, tuple[str, Any]]) -> None:
    """One panel; points are drawn in an order that hides no run behind another."""
    order = np.random.default_rng(0).permutation(len(panel.x))
    shades = [colours[panel.of[i]][1] for i in order]
    few = len(panel.x) <= 60
    axes.scatter(
        panel.x[order], panel.y[order], s=22 if few else 12, c=shades, alpha=0.85 if few else 0.6, linewidths=0
    )
    if math.isfinite(panel.slope):
        ends = np.array([panel.x.min(), panel.x.max()])
        axes.plot(ends, panel.intercept + panel.slope * ends, color="black", linewidth=1.4)
    axes.set_title(f"{_wrapped(panel.name)}\n{panel.fit}", size=8)
    axes.locator_params(axis="x", nbins=4)
    axes.locator_params(axis="y", nbins=5)
    axes.tick_params(labelsize=7)
    axes.xaxis.get_offset_text().set_size(7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.2)


def _wrapped(name: str, width: int = 44) -> str:
    """A long name in two lines, broken at a slash.

    >>> _wrapped("short/name"), _wrapped("a_monitor/with_a_network/and_its_number", 20)
    ('short/name', 'a_monitor\\n/with_a_network/and_its_number')
    """
    if len(name) <= width or "/" not in name[:width]:
        return name
    cut = name.rindex("/", 0, width)
    return f"{name[:cut]}\n{name[cut:]}"


def _colours(runs: Sequence[str]) -> dict[str, tuple[str, Any]]:
    """Each run's group and colour: itself where there are few runs, else its folder, else a place on a scale."""
    from matplotlib import colormaps

    groups = {run: run for run in runs}
    if len(runs) > COLOURS:
        groups = {run: run.rpartition("/")[0] or run for run in runs}
    names = list(dict.fromkeys(groups.values()))
    if len(names) <= COLOURS:
        palette = [colormaps["tab10"](i) for i in range(len(names))]
    else:
        palette = [colormaps["turbo"](0.05 + 0.9 * i / (len(names) - 1)) for i in range(len(names))]
    shade = dict(zip(names, palette, strict=True))
    return {run: (group, shade[group]) for run, group in groups.items()}


def _legend(figure: Figure, colours: dict[str, tuple[str, Any]]) -> None:
    """What the colours stand for, below the panels; with too many, only how many."""
    from matplotlib.lines import Line2D

    groups = dict(colours.values())
    if len(groups) > 2 * COLOURS:
        groups = {f"{len(groups)} runs, a colour each": "0.5"}
    dots = [Line2D([], [], marker="o", linestyle="", markersize=5, color=colour) for colour in groups.values()]
    width = max(map(len, groups))
    columns = max(1, min(len(groups), int(figure.get_figwidth() * 13 / (width + 5))))
    figure.legend(dots, list(groups), loc="outside lower center", ncols=columns, fontsize=7, frameon=False)
