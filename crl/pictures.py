"""The pictures of a run: the evaluation matrix as coloured cells, and spectra as one line a boundary."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from crl.core import Array
from crl.linalg import Spectrum

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Rows = Sequence[Sequence[float]]
LARGE = 24  # tasks: where there are more, not all are shown at once
SMALL = 1e-4  # where the axis of eigenvalues turns from linear to logarithmic


def short(name: str) -> str:
    """A task's name without what all its neighbours share.

    >>> short("MiniGrid-DoorKey-5x5-v0")
    'DoorKey-5x5'
    """
    return name.replace("MiniGrid-", "").removesuffix("-v0")


def number(value: float) -> str:
    """A number as a cell shows it: about three digits, and a dash for one that is missing.

    >>> number(0.8349), number(-12.34), number(1234.5), number(float("nan"))
    ('0.83', '-12.3', '1234', '–')
    """
    if math.isnan(value):
        return "–"
    size = abs(value)
    return f"{value:.{0 if size >= 100 else 1 if size >= 10 else 2}f}"


def draw_matrix(
    rows: Rows, row_names: Sequence[str], tasks: Sequence[str], visited: Sequence[int], measure: str = "mean return"
) -> Figure:
    """Mean returns (or accuracies) as coloured cells: a row for each boundary, a column for each task.

    The first row comes before any training; `visited` names the column trained before each later row, which
    gets a box. One scale of colours holds for all cells; a grey cell was not evaluated. Where there are many rows or
    tasks, cells have no numbers and not all names are said.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    values = np.asarray(rows, dtype=np.float64).reshape(len(rows), len(tasks))
    low, high = _limits(values)
    colours = colormaps["viridis"].with_extremes(bad="0.88")
    columns, lines = ([*range(0, count, math.ceil(count / LARGE) or 1)] for count in (len(tasks), len(rows)))
    heads, names = [short(tasks[i]) for i in columns], [short(row_names[i]) for i in lines]
    cells = (max(0.75 * min(len(tasks), LARGE), 1.0), max(0.42 * min(len(rows), LARGE), 1.0))  # inches
    font = max(6.0, 9.0 - 0.15 * max(len(tasks) - 8, 0))
    letter = 0.6 * font / 72  # a layout that measures texts takes longer than all else
    left, top = (0.2 + share * letter * max(map(len, said), default=0) for share, said in ((1.0, names), (0.6, heads)))
    right = max(1.1, 0.85 * letter * max(len(head) - 3 * i for i, head in enumerate(reversed([*heads, ""]))))
    size = (left + cells[0] + right, top + cells[1] + 0.2)
    figure = Figure(figsize=size, dpi=110)
    axes = figure.add_axes((left / size[0], 0.2 / size[1], cells[0] / size[0], cells[1] / size[1]))
    image = axes.imshow(np.ma.masked_invalid(values), cmap=colours, vmin=low, vmax=high, aspect="auto")
    if max(len(rows), len(tasks)) <= LARGE:
        _fill_in(axes, values, visited, (low, high), font)
    else:
        axes.plot(visited, range(1, len(visited) + 1), "s", color="#d55e00", markersize=2)
    axes.set_xticks(columns, heads, rotation=35, ha="left", rotation_mode="anchor", size=font)
    axes.set_yticks(lines, names, size=font)
    axes.tick_params(length=0, labeltop=True, labelbottom=False)
    axes.spines[:].set_visible(False)
    bar = figure.add_axes(((left + cells[0] + 0.15) / size[0], 0.2 / size[1], 0.14 / size[0], cells[1] / size[1]))
    figure.colorbar(image, cax=bar, label=measure).outline.set_visible(False)
    return figure


def _fill_in(axes: Any, values: Array, visited: Sequence[int], limits: tuple[float, float], font: float) -> None:
    """The number of each cell, a box around each that was trained, and lines between them."""
    from matplotlib.patches import Rectangle

    low, high = limits
    for (row, column), value in np.ndenumerate(values):
        dark = math.isfinite(value) and (value - low) / (high - low) < 0.55
        axes.text(column, row, number(value), ha="center", va="center", size=font, color="white" if dark else "black")
    for row, column in enumerate(visited, 1):
        box = Rectangle((column - 0.46, row - 0.44), 0.92, 0.88, fill=False, edgecolor="#d55e00", linewidth=2.2)
        axes.add_patch(box)
    rows, columns = values.shape
    axes.set_xticks(np.arange(1, columns) - 0.5, minor=True)
    axes.set_yticks(np.arange(1, rows) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=1.5)
    axes.tick_params(which="minor", length=0)


def _limits(values: Array) -> tuple[float, float]:
    """The lowest and highest finite value, or something wider where these leave no room for colours."""
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def pixels(figure: Figure) -> Array:
    from matplotlib.backends import backend_agg

    canvas: Any = backend_agg.FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def draw_spectra(seen: Sequence[tuple[str, Spectrum]], title: str) -> Figure:
    """Densities of eigenvalues on a symmetric logarithmic axis, a line for each boundary, the newest darkest.

    Each Ritz value is smoothed over a tenth of a decade: a picture, nothing is counted from it.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 4.4), dpi=110)
    axes = figure.add_axes((0.09, 0.12, 0.89, 0.8))
    reach = max((spectrum.magnitude for _, spectrum in seen), default=1.0)
    far = float(bend(np.array(max(reach, 10 * SMALL)))) + 0.4
    grid = np.linspace(-far, far, 801)
    for i, (label, spectrum) in enumerate(seen):
        colour = colormaps["viridis_r"](0.15 + 0.85 * (i + 1) / len(seen))
        width = 1.2 if i + 1 < len(seen) else 2.2
        axes.semilogy(grid, density(spectrum, grid), color=colour, linewidth=width, label=label)
    powers = range(0, math.ceil(far) + 1)
    ticks = [sign * (SMALL * 10.0**power) for sign in (-1, 1) for power in powers if power and power % 2 == 0]
    ticks = [0.0, *(tick for tick in ticks if abs(tick) <= 10 * reach)]
    axes.set_xticks(bend(np.array(ticks)), [f"{tick:g}" for tick in ticks], size=8)
    axes.set_xlim(-far, far)
    axes.set_ylim(1e-6, 10)
    axes.set_xlabel("eigenvalue")
    axes.set_ylabel("share of eigenvalues a decade", size=9)
    axes.set_title(title, size=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=7, frameon=False, ncols=2 if len(seen) > 8 else 1, loc="upper left")
    return figure


def bend(values: Array) -> Array:
    """A symmetric logarithm: decades above SMALL where it is far away, linear near zero.

    >>> [round(float(x), 2) for x in bend(np.array([-1e-2, 0.0, 1e-2, 1.0]))]
    [-2.0, 0.0, 2.0, 4.0]
    """
    bent: Array = np.arcsinh(values / (2 * SMALL)) / math.log(10)
    return bent


def density(spectrum: Spectrum, grid: Array, width: float = 0.1) -> Array:
    """The share of eigenvalues a unit of the bent axis, smoothed over `width` of it."""
    places = bend(spectrum.values.ravel())
    weights = spectrum.weights.ravel() / len(spectrum.values)
    kernel = np.exp(-0.5 * ((grid[:, None] - places) / width) ** 2) / (width * math.sqrt(2 * math.pi))
    found: Array = kernel @ weights
    return found
