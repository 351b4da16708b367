"""Where images come from: names, functions of one's own, the built-in pictures, and what can be wrong with arrays."""

import hashlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from envs import shapes
from envs.datasets import Arrays, load
from envs.fetching import fetch
from envs.sources import BUILT_IN
from tests.marks import SLOW
from tests.small_data import empty_cache, refused


def test_what_is_not_here_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    empty_cache(tmp_path, monkeypatch)
    line = refused(lambda: load("cifar100"), "`crl data fetch cifar100`", "`crl data import cifar100 PATH`", "shapes")
    assert "(161 MB)" in line
    refused(lambda: load("cifar1000"), "did you mean cifar100?")
    refused(lambda: load("nothing_like_it"), "mnist, fashion_mnist, cifar10, cifar100")
    refused(lambda: load("no/folder"), "no/folder is no folder")
    refused(lambda: load(""), "no dataset")
    refused(lambda: fetch("mnits"), "did you mean mnist?")
    refused(lambda: fetch("shapes"), "built in")


# Functions.

MODULE = """
from __future__ import annotations
import os
import numpy as np
from envs.datasets import Arrays

called = []

def good() -> Arrays:
    x, y = np.ones((6, 2), np.float32), np.arange(6) % 3
    return Arrays(x, y, x, y)

def bare():
    called.append("bare")

def other() -> list:
    called.append("other")

def unknown() -> Nowhere:
    called.append("unknown")

def raising() -> Arrays:
    raise KeyError("the\\nkey")

def lying() -> Arrays:
    return 3

def bent() -> Arrays:
    x, y = np.ones((6, 2), np.float32), np.arange(6) % 3
    x[4, 1] = np.nan
    return Arrays(x, y, x, y)

def asking(much) -> Arrays:
    return good()
"""


def test_functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    (tmp_path / "data_of_mine.py").write_text(MODULE)
    (tmp_path / "broken_of_mine.py").write_text("1 / 0")
    assert load("data_of_mine.good").count == load("data_of_mine:good").count == 3
    for name in ("bare", "other", "called"):
        refused(lambda name=name: load(f"data_of_mine.{name}"), "not called", f"def {name}() -> Arrays")  # type: ignore[misc]
    refused(lambda: load("data_of_mine.unknown"), "annotations", "Nowhere")
    assert sys.modules["data_of_mine"].called == []
    refused(lambda: load("os.system"), "not called")
    refused(lambda: load("envs.datasets.Arrays"), "not called")
    refused(lambda: load("data_of_mine.raising"), "raising failed: KeyError")
    refused(lambda: load("data_of_mine.asking"), "asking failed: TypeError", "much")
    refused(lambda: load("data_of_mine.lying"), "returned a int, not Arrays")
    refused(lambda: load("data_of_mine.bent"), "train_x", "not finite", "row 4")
    refused(lambda: load("data_of_mine.god"), "has no 'god'", "'good'?")
    refused(
        lambda: load("nowhere_at_all.good"), "nowhere_at_all.good is no folder, and 'nowhere_at_all' cannot be imported"
    )
    refused(lambda: load("broken_of_mine.good"), "ZeroDivisionError")


X, Y = np.zeros((4, 1, 2, 2), np.uint8), np.arange(4) % 2


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        (Arrays(X, Y, X, Y[:3]), "test_x has 4 rows and test_y 3"),
        (Arrays(X, Y, X[:, :, :1], Y), "must be alike"),
        (Arrays(X, Y, X.astype(np.float32), Y), "must be alike"),
        (Arrays(X.astype(float), Y, X, Y), "train_x is float64"),
        (Arrays(X[0], Y, X, Y), "train_x is uint8 of shape (1, 2, 2)"),
        (Arrays(X, Y.astype(np.int32), X, Y), "train_y is int32"),
        (Arrays(X, Y[:, None], X, Y), "train_y is int64 of shape (4, 1)"),
        (Arrays(X, Y - 1, X, Y), "train_y has the label -1"),
        (Arrays(X, Y + 1, X, Y), "no 0"),
        (Arrays(X, Y, X, Y + 1), "labels go up to 2, but train_y has no 2"),
        (Arrays(X[:0], Y[:0], X, Y), "train_x is empty"),
        (Arrays(X, Y, X[:0], Y[:0]), "test_x is empty"),
        (Arrays(X, list(Y), X, Y), "train_y is a list"),  # type: ignore[arg-type]
        (Arrays(X, Y, X, Y, classes=("one",)), "1 names of classes for 2 classes"),
    ],
)
def test_wrong_arrays_of_a_function(arrays: Arrays, words: str) -> None:
    assert Arrays(X, Y, X, Y).check("mine").count == 2
    refused(lambda: arrays.check("mine"), "mine: ", words)


# The built-in pictures.


@pytest.mark.parametrize(("name", "shape"), [("shapes", (3, 32, 32)), ("shapes_grey", (1, 28, 28))])
def test_shapes_are_always_the_same(name: str, shape: tuple[int, ...]) -> None:
    arrays = load(name)
    assert arrays.train_x.shape == (20000, *shape) and arrays.test_x.shape == (4000, *shape)
    assert arrays.count == len(set(arrays.classes)) == 100 and set(np.bincount(arrays.train_y)) == {200}
    again = shapes.make(*BUILT_IN[name])
    sums = [hashlib.sha256(array.tobytes()).hexdigest() for array in again]
    assert sums[0] == hashlib.sha256(arrays.train_x.tobytes()).hexdigest()
    assert sums[2] == hashlib.sha256(arrays.test_x.tobytes()).hexdigest()
    assert arrays.train_x.mean() == pytest.approx(KNOWN[name], abs=0.001), "other pictures: results cannot be compared"
    assert len(np.unique(arrays.train_x[::50], axis=0)) == 400, "no picture twice"


KNOWN = {"shapes": 81.5590, "shapes_grey": 81.7105}  # to the last bits, which processors round differently


def learned(net: torch.nn.Module, arrays: Arrays, epochs: int, rate: float) -> float:
    """Test accuracy after a short training."""
    x, y = torch.from_numpy(arrays.train_x), torch.from_numpy(arrays.train_y)
    steps, optimizer = epochs * (len(x) // 64), torch.optim.Adam(net.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    for _ in range(epochs):
        for rows in torch.randperm(len(x))[: 64 * (len(x) // 64)].view(-1, 64):
            loss = torch.nn.functional.cross_entropy(net((x[rows].float() - 100) / 60), y[rows])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    net.eval()
    with torch.no_grad():
        found = net((torch.from_numpy(arrays.test_x).float() - 100) / 60).argmax(1).numpy()
    return float((found == arrays.test_y).mean())


@pytest.mark.parametrize("name", ["shapes_grey", pytest.param("shapes", marks=SLOW)])
def test_shapes_are_hard_for_a_line_and_easy_for_a_convolution(name: str, one_thread: None) -> None:
    arrays = load(name)
    channels, side = arrays.train_x.shape[1:3]
    torch.manual_seed(0)
    linear = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(channels * side**2, 100))
    score = learned(linear, arrays, 3, 1e-3)
    assert 0.1 < score < 0.6, score
    layers: list[torch.nn.Module] = [torch.nn.Conv2d(channels, 16, 5, stride=2, padding=2)]
    for width in (16, 32):
        layers += [torch.nn.BatchNorm2d(width), torch.nn.ReLU(), torch.nn.Conv2d(width, 2 * width, 3, padding=1)]
        layers += [torch.nn.MaxPool2d(2)]
    layers += [torch.nn.BatchNorm2d(64), torch.nn.ReLU(), torch.nn.Flatten()]
    score = learned(torch.nn.Sequential(*layers, torch.nn.Linear(64 * (side // 8) ** 2, 100)), arrays, 1, 1e-2)
    assert score > 0.85, score
