"""A dataset cut into tasks: split, permuted, incremental, with random labels, in pairs.

A slice says which rows a task has, under which labels, with its pixels in which order, and which classes can be the
answer. A stream is a function from the arrays of a dataset, a generator and options to a list of slices.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from crl.checked import one_of, truth, whole
from crl.core import Array, CrlError
from envs.datasets import Arrays

MOST = 10_000  # tasks


@dataclass(frozen=True)
class Slice:
    """A task's share of a dataset."""

    name: str
    train: Array  # rows of the training images
    test: Array
    train_labels: Array
    test_labels: Array
    order: Array | None = None  # which pixel stands where; None where all are in their places
    answers: tuple[int, ...] = ()  # the classes that can be the answer; none named: all
    told: bool = False  # whether the learner is told, when it answers, which task it is
    about: str = ""  # what is in it, in words


# Streams: each a function of the arrays, a generator, and options.


def split(
    arrays: Arrays, draw: np.random.Generator, *, tasks: int = 5, scenario: str = "task", order: str = "drawn"
) -> list[Slice]:
    """The classes, in an order drawn from the seed (or `as_is`), in equal parts, a task each.

    `scenario: task`: the learner is told which task it is, and chooses among its classes. `class`: it is not, and
    chooses among the classes of all tasks so far.
    """
    one_of("stream.scenario", scenario, ("task", "class"))
    count = arrays.count
    if count % whole("stream.tasks", tasks):
        raise CrlError(f"stream.tasks: {count} classes are not cut into {tasks} equal parts")
    parts = np.split(_class_order(count, draw, order), tasks)
    return [
        _of_classes(arrays, f"task {i}", part, part, told=scenario == "task") for i, part in enumerate(parts, start=1)
    ]


def incremental(arrays: Arrays, draw: np.random.Generator, *, tasks: int = 20, order: str = "drawn") -> list[Slice]:
    """Each task adds classes, and the data of all so far are learned (the incremental CIFAR of Dohare et al. 2024)."""
    count = arrays.count
    if count % whole("stream.tasks", tasks):
        raise CrlError(f"stream.tasks: {count} classes are not cut into {tasks} equal parts")
    drawn, part = _class_order(count, draw, order), count // tasks
    return [
        _of_classes(arrays, f"{i * part} classes", drawn[: i * part], drawn[: i * part], told=False)
        for i in range(1, tasks + 1)
    ]


def permuted(
    arrays: Arrays, draw: np.random.Generator, *, tasks: int = 10, cumulative: bool = True, first: bool = True
) -> list[Slice]:
    """The same images with their pixels in a new order for each task (Goodfellow et al. 2014).

    `cumulative`: each order permutes the last one (arXiv 2509.22335); otherwise each is drawn alone. With
    `first: false` the first task has the pixels as they are.
    """
    truth("stream.cumulative", cumulative)
    truth("stream.first", first)
    pixels = math.prod(arrays.train_x.shape[1:])
    order, found = np.arange(pixels), []
    for i in range(1, whole("stream.tasks", tasks, 1, MOST) + 1):
        new = draw.permutation(pixels)
        if i > 1 or first:
            order = order[new] if cumulative else new
        found.append(_whole(arrays, f"permutation {i}", order=order.copy()))
    return found


def random_label(arrays: Arrays, draw: np.random.Generator, *, tasks: int = 50) -> list[Slice]:
    """The same images with labels drawn anew for each task: pure memorising (Lyle et al. 2023).

    A task is tested on what it was trained on, since labels without a rule cannot be had otherwise.
    """
    rows = np.arange(len(arrays.train_y))
    found = []
    for i in range(1, whole("stream.tasks", tasks, 1, MOST) + 1):
        labels = draw.integers(arrays.count, size=len(rows))
        found.append(Slice(f"labels {i}", rows, rows, labels, labels))
    return found


def pairs(arrays: Arrays, draw: np.random.Generator, *, tasks: int = 2000) -> list[Slice]:
    """Two classes a task, told apart by two outputs that all tasks share (Continual ImageNet, Dohare et al. 2024).

    Classes are dealt out in an order drawn anew whenever all have been dealt.
    """
    if arrays.count < 2:
        raise CrlError("stream.data: pairs take at least two classes")
    dealt: list[int] = []
    found = []
    known: dict[tuple[int, int], Slice] = {}  # with ten classes, 2,000 tasks are 90 pairs
    for i in range(1, whole("stream.tasks", tasks, 1, MOST) + 1):
        if len(dealt) < 2:
            dealt = draw.permutation(arrays.count).tolist()
        one, other = dealt.pop(), dealt.pop()
        if (one, other) not in known:
            known[one, other] = _of_classes(arrays, "", np.array([one, other]), np.array([0, 1]))
        found.append(replace(known[one, other], name=f"pair {i}", answers=()))
    return found


STREAMS: dict[str, Callable[..., list[Slice]]] = {
    "split": split,
    "permuted": permuted,
    "incremental": incremental,
    "random_label": random_label,
    "pairs": pairs,
}


def _class_order(count: int, draw: np.random.Generator, order: str) -> Array:
    one_of("stream.order", order, ("drawn", "as_is"))
    return draw.permutation(count) if order == "drawn" else np.arange(count)


def _named(arrays: Arrays, classes: Array) -> str:
    names = [arrays.classes[c] if arrays.classes else str(c) for c in classes.tolist()]
    return ", ".join(names) if len(names) < 4 else f"{names[0]} ... {names[-1]}"


def _of_classes(arrays: Arrays, name: str, classes: Array, labels: Array, *, told: bool = False) -> Slice:
    """The rows of some classes, under these labels, which are the possible answers."""
    known = np.full(arrays.count, -1)
    known[classes] = labels
    train, test = (np.flatnonzero(known[y] >= 0) for y in (arrays.train_y, arrays.test_y))
    labels_of = known[arrays.train_y[train]], known[arrays.test_y[test]]
    valid = tuple(labels.tolist())
    return Slice(name, train, test, *labels_of, answers=valid, told=told, about=_named(arrays, classes))


def _whole(arrays: Arrays, name: str, order: Array) -> Slice:
    train, test = np.arange(len(arrays.train_y)), np.arange(len(arrays.test_y))
    return Slice(name, train, test, arrays.train_y, arrays.test_y, order=order)
