"""A folder of classes: each a folder of pictures, perhaps in `train` and `test`, or each an array, `<class>.npy`."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from crl.core import Array, CrlError, brief

PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif")
FORMATS = (
    "PNG",
    "JPEG",
    "BMP",
    "WEBP",
    "GIF",
)  # Pillow goes by content, and for EPS, whatever its name, runs a program
Classes = dict[str, list[Path]]
Found = tuple[Array, Array, Array, Array, tuple[str, ...]]  # images and labels to learn, and to be tested; the classes


def read(name: str, folder: Path) -> Found:
    """Pictures, or an array a class. Without a test folder, the last seventh of each class is for testing."""
    inside = _visible(folder)
    if not inside:
        raise CrlError(f"{name} is empty: right would be a folder of classes, each a folder of pictures")
    if any(path.suffix == ".npy" for path in inside):
        return _from_arrays(inside)
    halves = [folder / half for half in ("train", "test") if (folder / half).is_dir()]
    if len(halves) == 2 or halves == inside:
        train, test = _halves(name, inside)
    else:
        classes = {path.name: _pictures_of(path) for path in inside}
        cut = {one: len(paths) - _seventh(folder / one, len(paths)) for one, paths in classes.items()}
        train = {one: paths[: cut[one]] for one, paths in classes.items()}
        test = {one: paths[cut[one] :] for one, paths in classes.items()}
    labels = sorted(train, key=_order)
    paths = [path for half in (train, test) for label in labels for path in half[label]]
    x = _read_pictures(paths)
    ys = [np.repeat(np.arange(len(labels)), [len(half[label]) for label in labels]) for half in (train, test)]
    count = len(ys[0])
    return x[:count], ys[0], x[count:], ys[1], tuple(labels)


def _halves(name: str, inside: Sequence[Path]) -> tuple[Classes, Classes]:
    """The pictures of each class in `train` and in `test`."""
    names = [path.name for path in inside]
    if names != ["test", "train"]:
        raise CrlError(f"{name} has {', '.join(names)}: right would be train and test, and nothing else")
    test, train = ({path.name: _pictures_of(path) for path in _visible(half)} for half in inside)
    odd = set(train) ^ set(test)
    if odd or not train:
        raise CrlError(f"{name}: train and test need the same classes" + "".join(f"; not so {one!r}" for one in odd))
    return train, test


def _visible(folder: Path) -> list[Path]:
    """What lies in a folder, classes that are numbers in their order; not what a system leaves there for itself."""
    found = [path for path in folder.iterdir() if not path.name.startswith(".") and path.name != "Thumbs.db"]
    return sorted(found, key=lambda path: _order(path.name))


def _order(name: str) -> tuple[bool, int, str]:
    stem = name.removesuffix(".npy")
    return (False, int(stem), name) if stem.isdecimal() else (True, 0, name)


def _seventh(where: Path, count: int) -> int:
    if count < 2:
        raise CrlError(f"{where} has {count} example: a class needs one to learn from and one to be tested on")
    return max(1, count // 7)


def _pictures_of(folder: Path) -> list[Path]:
    """The pictures of one class; anything else among them is a mistake, not to be passed over."""
    if not folder.is_dir():
        raise CrlError(f"{folder} is no folder: pictures lie in a folder for each class")
    found = sorted(_visible(folder), key=lambda path: path.name)
    if not found:
        raise CrlError(f"{folder} is empty: a class needs pictures ({', '.join(PICTURES)})")
    for path in found:
        if path.is_dir():
            right = "<class>/<picture>, or train/<class>/<picture> and test/<class>/<picture>"
            raise CrlError(f"{path} is a folder where a class's pictures should be; right would be {right}")
        if path.suffix.lower() not in PICTURES:
            raise CrlError(f"{path} lies among a class's pictures and is none ({', '.join(PICTURES)})")
        _regular(path)
    return found


def _regular(path: Path) -> None:
    """Refuse a pipe or a device, which could be read for ever."""
    if not path.is_file():
        raise CrlError(f"{path} is no regular file")


def _read_pictures(paths: Sequence[Path]) -> Array:
    """Pictures of one size as (N, C, H, W): grey if all of them are, else in colour."""
    pictures: list[Array] = []
    for path in paths:
        pictures.append(_picture(path))
        (height, width), (first_height, first_width) = pictures[-1].shape[:2], pictures[0].shape[:2]
        if (height, width) != (first_height, first_width):
            sizes = f"{width} x {height}, but {paths[0]} is {first_width} x {first_height}"
            raise CrlError(f"{path} is {sizes}: all pictures must have one size")
    grey = all(picture.ndim == 2 for picture in pictures)
    x = np.empty((len(pictures), 1 if grey else 3, *pictures[0].shape[:2]), np.uint8)
    for row, picture in zip(x, pictures, strict=True):
        row[:] = picture[None] if picture.ndim == 2 else picture.transpose(2, 0, 1)
    return x


def _picture(path: Path) -> Array:
    """One picture: (H, W) where it is grey, else (H, W, 3)."""
    from PIL import Image

    try:
        huge = warnings.catch_warnings(action="error", category=Image.DecompressionBombWarning)
        with huge, Image.open(path, formats=FORMATS) as image:
            if image.mode.startswith(("I", "F")):
                raise CrlError(f"{path} has more than 8 bits a channel ({image.mode}): save it with 8")
            transparent = image.mode == "P" and "transparency" in image.info
            whole = image.convert("RGBA") if transparent else image  # Pillow warns of a palette that has both
            return np.asarray(whole.convert("L" if image.mode in ("1", "L", "LA") else "RGB"))
    except CrlError:
        raise
    except Exception as error:  # Pillow has many errors for many kinds of damage
        what = brief(error).replace(str(path), "it")
        raise CrlError(f"{path} is no picture that can be read: {what}") from None


def _from_arrays(inside: Sequence[Path]) -> Found:
    """A folder of `<class>.npy`."""
    odd = next((path for path in inside if path.suffix != ".npy"), None)
    if odd is not None:
        raise CrlError(f"{odd} is no .npy, but lies beside some: right would be a .npy for each class and nothing else")
    sizes = [_class_array(path).shape for path in inside]  # each file is closed again: there may be a thousand
    for path, size in zip(inside, sizes, strict=True):
        if size[1:] != sizes[0][1:]:
            both = f"images of {size[1:]}, but {inside[0]} of {sizes[0][1:]}"
            raise CrlError(f"{path} has {both}: they must be alike")
    rest = [_seventh(path, size[0]) for path, size in zip(inside, sizes, strict=True)]
    cuts = [size[0] - tested for size, tested in zip(sizes, rest, strict=True)]
    train, test = (np.empty((sum(counts), *sizes[0][1:]), np.uint8) for counts in (cuts, rest))
    for label, path in enumerate(inside):
        array = _class_array(path)
        train[sum(cuts[:label]) :][: cuts[label]] = array[: cuts[label]]
        test[sum(rest[:label]) :][: rest[label]] = array[cuts[label] :]
    labels, classes = np.arange(len(inside)), tuple(path.stem for path in inside)
    return train, np.repeat(labels, cuts), test, np.repeat(labels, rest), classes


def _class_array(path: Path) -> Array:
    """The images of one class, (N, C, H, W), left on the disk until they are needed."""
    right = "right would be uint8 images (N, C, H, W) or (N, H, W, C), with one or three channels"
    _regular(path)
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # numpy has many errors, and a pickle is one of them
        why = "a pickle, which is never opened" if "Python objects" in str(error) else brief(error)
        raise CrlError(f"{path} is no array that can be read ({why}); {right}") from None
    if not isinstance(array, np.ndarray):
        array.close()
        raise CrlError(f"{path} is an archive of arrays; {right}")
    if array.dtype != np.uint8 or array.ndim != 4:
        raise CrlError(f"{path} is {array.dtype} of shape {array.shape}; {right}")
    if array.shape[1] in (1, 3):
        return array
    if array.shape[3] in (1, 3):
        return array.transpose(0, 3, 1, 2)
    raise CrlError(f"{path} is {array.dtype} of shape {array.shape}; {right}")
