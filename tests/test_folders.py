"""Folders of classes: pictures, arrays, and what can be wrong with them."""

import contextlib
import io
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image

from crl.core import CrlError
from envs import datasets
from envs.datasets import load
from tests.small_data import in_time, refused


def picture(path: Path, mode: str = "RGB", size: tuple[int, int] = (6, 4), value: int = 100) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    depth = len(Image.new(mode, (1, 1)).getbands())
    Image.new(mode, size, value if depth == 1 else (value,) * depth).save(path)


def test_pictures_in_halves(tmp_path: Path) -> None:
    for label in ("10", "9"):
        for half, count in (("train", 3), ("test", 2)):
            for number in range(count):
                picture(tmp_path / half / label / f"{number}.png", value=int(label))
    (tmp_path / "train" / ".DS_Store").write_text("left by a system")
    arrays = load(str(tmp_path))
    assert arrays.train_x.shape == (6, 3, 4, 6) and arrays.test_x.shape == (4, 3, 4, 6)
    assert arrays.classes == ("9", "10"), "numbers in their order"
    assert (arrays.train_x[arrays.train_y == 0] == 9).all() and (arrays.test_x[arrays.test_y == 1] == 10).all()
    shutil.rmtree(tmp_path / "test" / "9")
    datasets._folder.cache_clear()
    refused(lambda: load(str(tmp_path)), "same classes", "'9'")


def test_pictures_without_halves(tmp_path: Path) -> None:
    for number in range(13):
        picture(tmp_path / "cats" / f"{number:02}.png", "L", value=number)
        picture(tmp_path / "train" / f"{number:02}.bmp", "L", value=100 + number)  # a class may be called so
    arrays = load(str(tmp_path))
    assert arrays.train_x.shape == (24, 1, 4, 6), "grey, as all of them are"
    assert arrays.test_x[:, 0, 0, 0].tolist() == [12, 112], "the last seventh of each, by name"
    picture(tmp_path / "cats" / "05.gif", "P")
    datasets._folder.cache_clear()
    mixed = load(str(tmp_path))
    assert mixed.train_x.shape[1] == 3 and (mixed.train_x[0, 0] == mixed.train_x[0, 2]).all(), "grey in colour"


def test_wrong_folders(tmp_path: Path) -> None:
    def say(*words: str) -> None:
        refused(lambda: load(str(tmp_path)), *words)

    say("is empty", "a folder of classes")
    (tmp_path / "cats").mkdir()
    say("cats is empty", ".png")
    picture(tmp_path / "cats" / "1.png")
    say("cats has 1 example")
    picture(tmp_path / "cats" / "2.png")
    (tmp_path / "cats" / "3.png").write_text("no picture")
    say("3.png is no picture that can be read")
    whole = (tmp_path / "cats" / "2.png").read_bytes()
    (tmp_path / "cats" / "3.png").write_bytes(whole[:50])
    say("3.png is no picture that can be read")
    picture(tmp_path / "cats" / "3.png", size=(7, 4))
    say("3.png is 7 x 4, but", "1.png is 6 x 4")
    Image.new("I;16", (6, 4)).save(tmp_path / "cats" / "3.png")
    say("3.png has more than 8 bits a channel")
    (tmp_path / "cats" / "3.png").unlink()
    (tmp_path / "cats" / "notes.txt").write_text("notes")
    say("notes.txt", "is none")
    (tmp_path / "cats" / "notes.txt").unlink()
    (tmp_path / "cats" / "more").mkdir()
    say("more is a folder where")
    (tmp_path / "cats" / "more").rmdir()
    (tmp_path / "readme.txt").write_text("a file")
    say("readme.txt is no folder")
    shutil.rmtree(tmp_path / "cats")
    (tmp_path / "readme.txt").unlink()
    picture(tmp_path / "train" / "cats" / "1.png")
    say("has train: right would be train and test")
    picture(tmp_path / "test" / "cats" / "1.png")
    picture(tmp_path / "val" / "cats" / "1.png")
    say("has test, train, val")


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 6 4\n%%EndComments\nshowpage\n"


@pytest.mark.parametrize("number", [0, 1])
def test_a_picture_runs_no_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Pillow would hand PostScript to Ghostscript whatever the file is called; a stand-in says that it was called."""
    program = tmp_path / "bin" / "gs"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    for count in range(2):
        picture(tmp_path / "data" / "cats" / f"{count}.png")
    (tmp_path / "data" / "cats" / f"{number}.png").write_bytes(EPS)
    with contextlib.suppress(CrlError):
        load(str(tmp_path / "data"))
    assert not (tmp_path / "ran").exists()
    refused(lambda: load(str(tmp_path / "data")), f"{number}.png is no picture that can be read")


@pytest.mark.parametrize("name", ["cats/1.png", "1.npy"])
def test_a_pipe_among_pictures_is_refused(tmp_path: Path, name: str) -> None:
    for count in range(2):
        picture(tmp_path / "cats" / f"{count}.png")
    path = tmp_path / name
    if path.suffix == ".npy":
        shutil.rmtree(tmp_path / "cats")
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    with in_time():
        refused(lambda: load(str(tmp_path)), f"{name} is no regular file")


def test_a_picture_that_unpacks_to_gigabytes_is_refused(tmp_path: Path) -> None:
    picture(tmp_path / "cats" / "0.png", "1", (12_000, 10_000))
    shutil.copy(tmp_path / "cats" / "0.png", tmp_path / "cats" / "1.png")
    assert (tmp_path / "cats" / "0.png").stat().st_size < 200_000
    refused(lambda: load(str(tmp_path)), "0.png is no picture that can be read")


def test_an_array_for_each_class(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    first = rng.integers(0, 256, (7, 3, 5, 4)).astype(np.uint8)
    last = rng.integers(0, 256, (14, 5, 4, 3)).astype(np.uint8)
    np.save(tmp_path / "9.npy", first)
    np.save(tmp_path / "10.npy", last)
    arrays = load(str(tmp_path))
    assert arrays.classes == ("9", "10") and arrays.train_x.shape == (18, 3, 5, 4)
    assert (arrays.train_x[:6] == first[:6]).all() and (arrays.test_x[0] == first[6]).all()
    assert (arrays.test_x[1:] == last[12:].transpose(0, 3, 1, 2)).all()
    assert arrays.train_y.tolist() == [0] * 6 + [1] * 12 and arrays.test_y.tolist() == [0, 1, 1]


class Trap:
    """Says so when it is unpickled."""

    sprung = False

    def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
        return spring, ()


def spring() -> None:
    Trap.sprung = True


def test_wrong_arrays(tmp_path: Path) -> None:
    def say(array: object, *words: str) -> None:
        datasets._folder.cache_clear()
        if isinstance(array, bytes):
            (tmp_path / "b.npy").write_bytes(array)
        else:
            np.save(tmp_path / "b.npy", array, allow_pickle=True)  # type: ignore[arg-type]
        refused(lambda: load(str(tmp_path)), "b.npy", *words)

    np.save(tmp_path / "a.npy", np.zeros((4, 3, 5, 5), np.uint8))
    say(np.array([Trap()], dtype=object), "no array that can be read")
    say(pickle.dumps(Trap()), "no array that can be read")
    assert not Trap.sprung
    say(b"", "no array that can be read")
    say((tmp_path / "a.npy").read_bytes()[:-20], "no array that can be read")
    say(np.zeros((4, 3, 5, 5)), "float64", "right would be uint8")
    say(np.zeros((4, 5, 5), np.uint8), "(4, 5, 5)")
    say(np.zeros((4, 5, 5, 5), np.uint8), "(4, 5, 5, 5)")
    say(np.zeros((4, 1, 5, 5), np.uint8), "they must be alike", "a.npy")
    say(np.zeros((1, 3, 5, 5), np.uint8), "has 1 example")
    archive = io.BytesIO()
    np.savez(archive, x=np.zeros(3))
    say(archive.getvalue(), "an archive of arrays")
    (tmp_path / "b.npy").unlink()
    (tmp_path / "c.txt").write_text("notes")
    refused(lambda: load(str(tmp_path)), "c.txt is no .npy")
