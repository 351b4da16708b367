"""Where images come from: a public dataset in the cache, a folder of classes, a function, or the built-in shapes.

Nothing is downloaded here (`envs.fetching` does, when asked to), and nothing is unpickled.
"""

from __future__ import annotations

import difflib
import functools
import os
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from crl.core import Array, CrlError, brief, imported
from envs import folders, records, shapes
from envs.sources import BUILT_IN, SOURCES, cache, unknown


@dataclass(frozen=True, eq=False)
class Arrays:
    """Images (uint8, N x C x H x W) or anything else (float32, N x ...), each with a label (int64) from 0 on.

    What `load` returns is shared by all who ask for it: index it, and write into copies only.
    """

    train_x: Array
    train_y: Array
    test_x: Array
    test_y: Array
    name: str = ""
    classes: tuple[str, ...] = ()

    @property
    def count(self) -> int:
        """How many classes there are."""
        return int(max(self.train_y.max(), self.test_y.max())) + 1

    def check(self, name: str) -> Arrays:
        """The same, or one line about what is wrong with it."""
        for part in ("train", "test"):
            _check_part(f"{name}: {part}", getattr(self, f"{part}_x"), getattr(self, f"{part}_y"))
        one, other = self.train_x, self.test_x
        if one.shape[1:] != other.shape[1:] or one.dtype != other.dtype:
            both = f"{one.dtype} {one.shape[1:]} to learn from and {other.dtype} {other.shape[1:]} to be tested on"
            raise CrlError(f"{name}: {both}: they must be alike")
        there = np.unique(self.train_y)
        if len(there) != self.count:
            absent = next((i for i, label in enumerate(there.tolist()) if i != label), len(there))
            raise CrlError(
                f"{name}: labels go up to {self.count - 1}, but train_y has no {absent}: labels are 0, 1, 2, ..."
            )
        if not isinstance(self.classes, tuple | list):
            raise CrlError(f"{name}: classes is {self.classes!r}; right would be the names of all classes, or ()")
        if self.classes and len(self.classes) != self.count:
            raise CrlError(f"{name}: {len(self.classes)} names of classes for {self.count} classes")
        return self


def _check_part(where: str, x: Any, y: Any) -> None:
    """One half of an `Arrays` by itself."""
    for letter, array in (("x", x), ("y", y)):
        if not isinstance(array, np.ndarray):
            raise CrlError(f"{where}_{letter} is a {type(array).__name__}, not a NumPy array")
    image, other = x.dtype == np.uint8 and x.ndim == 4, x.dtype == np.float32 and x.ndim >= 2
    if not image and not other:
        right = "uint8 images (N, C, H, W) or float32 (N, ...)"
        raise CrlError(f"{where}_x is {x.dtype} of shape {x.shape}; right would be {right}")
    if y.dtype != np.int64 or y.ndim != 1:
        raise CrlError(f"{where}_y is {y.dtype} of shape {y.shape}; right would be int64 labels (N,)")
    if len(x) != len(y):
        raise CrlError(f"{where}_x has {len(x)} rows and {where.rpartition(' ')[2]}_y {len(y)}: they must be as many")
    if not x.size:
        raise CrlError(f"{where}_x is empty: its shape is {x.shape}")
    if y.min() < 0:
        raise CrlError(f"{where}_y has the label {y.min()}: labels are 0, 1, 2, ...")
    if other and not np.isfinite(x).all():
        raise CrlError(f"{where}_x has values that are not finite, the first in row {_first_broken(x)}")


def _first_broken(x: Array) -> int:
    return int(np.argmin(np.isfinite(x).reshape(len(x), -1).all(1)))


# Loading.


def load(name: str) -> Arrays:
    """The arrays that a name, a folder, or the import path of a function stands for; the last few are remembered."""
    if not isinstance(name, str) or not name:
        raise CrlError(f"{name!r} is no dataset: right would be a name, such as shapes or mnist, or a folder")
    folder = Path(name).expanduser()
    if name in BUILT_IN:
        return _built_in(name)
    if name in SOURCES:
        return _public(name, cache() / name)
    if folder.is_dir():
        return _folder(name, folder.resolve())
    if "/" in name or os.sep in name:
        raise CrlError(f"{name} is no folder: right would be a folder of classes, each a folder of pictures")
    if "." in name or ":" in name:
        return _made(name)
    why = unknown(name, [*BUILT_IN, *SOURCES])
    raise CrlError(f"{why} (a folder of classes, or my_data.digits, works too)")


@functools.lru_cache(2)
def _built_in(name: str) -> Arrays:
    return Arrays(*shapes.make(*BUILT_IN[name]), name, shapes.CLASSES).check(name)


@functools.lru_cache(2)
def _public(name: str, folder: Path) -> Arrays:
    source = SOURCES[name]
    if not all((folder / file.name).is_file() for file in source.wanted):
        raise CrlError(
            f"{name} is not here: `crl data fetch {name}` downloads it ({source.size}), "
            f"`crl data import {name} PATH` takes files that you have; `--data shapes` runs without"
        )
    return Arrays(*records.read(source, folder), name, source.classes).check(f"{name} in {folder}")


@functools.lru_cache(2)
def _folder(name: str, folder: Path) -> Arrays:
    train_x, train_y, test_x, test_y, classes = folders.read(name, folder)
    return Arrays(train_x, train_y, test_x, test_y, name, classes).check(name)


# Functions.


@functools.lru_cache(2)
def _made(path: str) -> Arrays:
    """What a function returns that says of itself that it returns `Arrays`: nothing else is ever called."""
    function = _locate(path)
    try:
        returns = typing.get_type_hints(function).get("return") if callable(function) else None
    except Exception as error:  # an annotation may name what does not exist
        raise CrlError(f"{path}: its annotations cannot be read: {brief(error)}") from error
    if returns is not Arrays:
        right = f"`def {path.replace(':', '.').rpartition('.')[2]}() -> Arrays` (of envs.datasets)"
        raise CrlError(f"{path} is no function annotated to return Arrays, so it is not called; right would be {right}")
    try:
        arrays = function()
    except CrlError:
        raise
    except (Exception, SystemExit) as error:  # a function of the user's may fail in any way
        raise CrlError(f"{path} failed: {brief(error)}") from error
    if not isinstance(arrays, Arrays):
        raise CrlError(f"{path} returned a {type(arrays).__name__}, not Arrays")
    return arrays.check(path)


def _locate(path: str) -> Any:
    """What an import path names; the working directory counts as a place to import from."""
    module_name, _, name = path.replace(":", ".").rpartition(".")
    try:
        module = imported(module_name)
    except CrlError:
        raise
    except Exception as error:  # a module may fail in any way
        raise CrlError(f"{path} is no folder, and {module_name!r} cannot be imported: {brief(error)}") from error
    if not hasattr(module, name):
        near = difflib.get_close_matches(name, vars(module), 1)
        raise CrlError(f"{path}: module {module_name!r} has no {name!r}" + "".join(f"; {n!r}?" for n in near))
    return getattr(module, name)
