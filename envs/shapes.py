"""Pictures that need no download: a hundred classes, each one of ten outlines filled in one of ten ways.

`shapes` is 32 x 32 in colour, `shapes_grey` 28 x 28 in grey; both have the same hundred classes. Where the figure
lies, its size, slant and colours, the background, two specks and the noise are drawn anew for every picture, from one
fixed seed, so the pictures are the same everywhere and always. What they are to be, a test measures: too varied for a
linear model of the pixels, easy for a small convolutional network.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from crl.core import Array

SEED = 20_250_101
TRAIN, TEST = 200, 40  # pictures of each class
PERIOD = 4.5  # of a filling, in pixels

# An outline is a function of the figure's own coordinates: negative inside, zero on the line, and about the distance
# elsewhere. It lies within the square of side 2.


def _box(u: Array, v: Array, width: float, height: float) -> Array:
    box: Array = np.maximum(np.abs(u) - width, np.abs(v) - height)
    return box


def _disc(u: Array, v: Array) -> Array:
    disc: Array = np.sqrt(u * u + v * v) - 0.95
    return disc


def _square(u: Array, v: Array) -> Array:
    return _box(u, v, 0.82, 0.82)


def _diamond(u: Array, v: Array) -> Array:
    return (np.abs(u) + np.abs(v)) * 0.7071 - 0.78


def _peak(u: Array, v: Array) -> Array:
    return np.maximum(np.abs(u) * 0.8944 - v * 0.4472 - 0.42, v - 0.82)


def _valley(u: Array, v: Array) -> Array:
    return _peak(u, -v)


def _plus(u: Array, v: Array) -> Array:
    return np.minimum(_box(u, v, 0.36, 1.0), _box(u, v, 1.0, 0.36))


def _times(u: Array, v: Array) -> Array:
    return _plus((u + v) * 0.7071, (u - v) * 0.7071)


def _beam(u: Array, v: Array) -> Array:
    return _box(u, v, 1.0, 0.5)


def _pillar(u: Array, v: Array) -> Array:
    return _box(u, v, 0.5, 1.0)


def _corner(u: Array, v: Array) -> Array:
    return np.minimum(_box(u + 0.55, v, 0.36, 0.9), _box(u, v - 0.55, 0.9, 0.36))


OUTLINES: dict[str, Callable[[Array, Array], Array]] = {
    "disc": _disc,
    "square": _square,
    "diamond": _diamond,
    "peak": _peak,
    "valley": _valley,
    "plus": _plus,
    "times": _times,
    "beam": _beam,
    "pillar": _pillar,
    "corner": _corner,
}

# A filling says for each pixel how much of the figure's first colour it has (the rest is its second), from the
# figure's coordinates in pixels, shifted by a random phase, and from the outline in pixels.


def _wave(x: Array) -> Array:
    """A wave of period one with steep flanks, between 0 and 1."""
    wave: Array = np.clip(np.sin(2 * np.pi * x) * 1.5 + 0.5, 0, 1)
    return wave


FILLINGS: dict[str, Callable[[Array, Array, Array], Array]] = {
    "full": lambda x, y, inside: np.ones_like(x),
    "hollow": lambda x, y, inside: np.clip(2.5 + inside, 0, 1),
    "rows": lambda x, y, inside: _wave(y / PERIOD),
    "columns": lambda x, y, inside: _wave(x / PERIOD),
    "rising": lambda x, y, inside: _wave((x + y) * 0.7071 / PERIOD),
    "falling": lambda x, y, inside: _wave((x - y) * 0.7071 / PERIOD),
    "checks": lambda x, y, inside: np.clip(np.sin(2 * np.pi * x / 7) * np.sin(2 * np.pi * y / 7) * 4 + 0.5, 0, 1),
    "dots": lambda x, y, inside: np.clip(2.5 * np.sin(np.pi * x / 4) ** 2 * np.sin(np.pi * y / 4) ** 2 - 0.6, 0, 1),
    "core": lambda x, y, inside: np.clip(-2.5 - inside, 0, 1),
    "fading": lambda x, y, inside: np.clip(0.5 - inside / 6, 0, 1),
}

CLASSES = tuple(f"{filling} {outline}" for outline in OUTLINES for filling in FILLINGS)


def _column(numbers: Array) -> Array:
    """One number a picture, to be spread over its rows and columns."""
    return numbers.astype(np.float32)[:, None, None]


def _figures(rng: np.random.Generator, label: int, count: int, size: int) -> tuple[Array, Array]:
    """How far each pixel belongs to the figure, and how far to its first colour: (count, size, size) each."""
    middle, unit = (size - 1) / 2, size / 32
    rows, columns = np.mgrid[:size, :size].astype(np.float32) - np.float32(middle)
    x = columns - _column(rng.uniform(-3, 3, count) * unit)
    y = rows - _column(rng.uniform(-3, 3, count) * unit)
    slant = rng.uniform(-0.22, 0.22, count)
    cos, sin = _column(np.cos(slant)), _column(np.sin(slant))
    x, y = (x * cos + y * sin) / np.float32(unit), (y * cos - x * sin) / np.float32(unit)
    radius = _column(rng.uniform(9.5, 12, count))
    outline, filling = list(OUTLINES.values())[label // 10], list(FILLINGS.values())[label % 10]
    inside = outline(x / radius, y / radius) * radius
    phase_x, phase_y = _column(rng.uniform(0, 8, count)), _column(rng.uniform(0, 8, count))
    return np.clip(0.5 - inside, 0, 1), filling(x + phase_x, y + phase_y, inside)


def _specks(rng: np.random.Generator, count: int, size: int) -> Array:
    """Where two small discs lie that mean nothing."""
    rows, columns = np.mgrid[:size, :size].astype(np.float32)
    found = np.zeros((count, size, size), np.float32)
    for _ in range(2):
        x, y = _column(rng.uniform(0, size, count)), _column(rng.uniform(0, size, count))
        distance = np.sqrt((columns - x) ** 2 + (rows - y) ** 2)
        np.maximum(found, np.clip(_column(rng.uniform(1.2, 2.2, count)) - distance, 0, 1), out=found)
    return found


def draw(rng: np.random.Generator, label: int, count: int, size: int, channels: int) -> Array:
    """Pictures of one class, uint8 (count, channels, size, size)."""
    figure, first = _figures(rng, label, count, size)
    specks = _specks(rng, count, size)
    slope = np.linspace(-1, 1, size, dtype=np.float32)
    down, right = _column(rng.uniform(-15, 15, count)), _column(rng.uniform(-15, 15, count))
    light = down * slope[:, None] + right * slope[None, :]
    pictures = np.empty((count, channels, size, size), np.uint8)
    for channel in range(channels):
        ground = _column(rng.uniform(20, 110, count)) + light
        bright, dark = _column(rng.uniform(140, 240, count)), _column(rng.uniform(20, 110, count))
        colour = dark + (bright - dark) * first
        pixels = ground + (colour - ground) * figure
        pixels += (_column(rng.uniform(0, 255, count)) - pixels) * specks
        pixels += (rng.random(pixels.shape, np.float32) - np.float32(0.5)) * 70
        pictures[:, channel] = np.clip(pixels, 0, 255)
    return pictures


def make(size: int, channels: int) -> tuple[Array, Array, Array, Array]:
    """Pictures and labels to learn from, pictures and labels to be tested on; classes come in order."""
    made: list[Array] = []
    for part, count in enumerate((TRAIN, TEST)):
        pictures = [
            draw(np.random.default_rng([SEED, size, part, label]), label, count, size, channels)
            for label in range(len(CLASSES))
        ]
        made += [np.concatenate(pictures), np.repeat(np.arange(len(CLASSES)), count)]
    return made[0], made[1], made[2], made[3]
