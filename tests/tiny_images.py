"""Datasets of a few small pictures, by import path: `--data tests.tiny_images.grey`."""

import numpy as np

from crl.core import Array
from envs import shapes
from envs.datasets import Arrays

CLASSES = (0, 11, 22, 55, 66, 77)  # of the built-in shapes: each has an outline and a filling of its own


def pictures(train: int, test: int, size: int, channels: int) -> Arrays:
    """So many of each class."""

    def part(which: int, count: int) -> tuple[Array, Array]:
        drawn = [shapes.draw(np.random.default_rng([which, c]), c, count, size, channels) for c in CLASSES]
        return np.concatenate(drawn), np.repeat(np.arange(len(CLASSES)), count)

    return Arrays(*part(0, train), *part(1, test))


def tiny() -> Arrays:
    """Six classes in grey, 16 x 16."""
    return pictures(12, 6, 16, 1)


def grey() -> Arrays:
    """As MNIST's, 28 x 28 in grey."""
    return pictures(12, 6, 28, 1)


def colour() -> Arrays:
    """As CIFAR's, 32 x 32 in colour."""
    return pictures(12, 6, 32, 3)


def real() -> Arrays:
    """Enough to learn something from."""
    return pictures(100, 50, 16, 1)


def untested() -> Arrays:
    """The last two classes have no pictures to be tested on."""
    whole = tiny()
    there = whole.test_y < 4
    return Arrays(whole.train_x, whole.train_y, whole.test_x[there], whole.test_y[there])


def vectors() -> Arrays:
    """No pictures."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(36, 5)).astype(np.float32), np.arange(36) % 6
    return Arrays(x, y, x[:12], y[:12])
