"""The public datasets read: the real files where they are at hand, and each kind of damage to small ones."""

import gzip
import shutil
from pathlib import Path

import numpy as np
import pytest

from envs import datasets
from envs.datasets import load
from envs.fetching import import_files
from tests.small_data import NAMES, empty_cache, idx, placed, quiet, refused, small_cifar, small_mnist

REAL = Path(__file__).resolve().parent.parent.parent / "shared" / "data"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return empty_cache(tmp_path, monkeypatch)


# Real files.


@pytest.mark.skipif(not (REAL / "mnist").is_dir(), reason="the real MNIST is not beside this repository")
def test_real_mnist(home: Path) -> None:
    import_files("mnist", REAL / "mnist", quiet)
    mnist = load("mnist")
    assert mnist.train_x.shape == (60000, 1, 28, 28) and mnist.test_x.shape == (10000, 1, 28, 28)
    assert np.bincount(mnist.train_y).tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert int(mnist.train_x.sum(dtype=np.int64)) == 1_567_298_545 and int(mnist.test_x.sum()) == 264_923_200
    assert mnist.train_y[:5].tolist() == [5, 0, 4, 1, 9] and mnist.count == len(mnist.classes) == 10
    assert load("mnist") is mnist, "remembered"
    refused(lambda: import_files("fashion_mnist", REAL / "mnist", quiet), "f68b3c2d", "8d4fb7e6")


@pytest.mark.skipif(not (REAL / "cifar-100-binary").is_dir(), reason="the real CIFAR-100 is not beside this repository")
def test_real_cifar100(home: Path) -> None:
    import_files("cifar100", REAL, quiet)  # nested, as the archive unpacks
    cifar = load("cifar100")
    assert cifar.train_x.shape == (50000, 3, 32, 32) and cifar.test_x.shape == (10000, 3, 32, 32)
    assert set(np.bincount(cifar.train_y)) == {500} and set(np.bincount(cifar.test_y)) == {100}
    assert int(cifar.train_x.sum(dtype=np.int64)) == 18_729_378_732 and int(cifar.test_x.sum()) == 3_755_249_331
    means = cifar.train_x[:, :, ::4, ::4].mean((0, 2, 3))
    assert means[0] > means[1] > means[2], "red, green and blue, in this order"
    names = (REAL / "cifar-100-binary" / "fine_label_names.txt").read_text().split()
    assert list(cifar.classes) == names


# Damage.


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({0: b"no gzip"}, "Not a gzipped file"),
        ({0: small_mnist()[NAMES[0]][:-9]}, "ended before"),
        ({0: idx(np.zeros(30))}, "it begins with 00 00 08 01, not 00 00 08 03"),
        ({0: gzip.compress(b"")}, "it begins with nothing"),
        ({0: idx(np.zeros((30, 28, 27)))}, "(30, 28, 27), not (N, 28, 28)"),
        ({0: gzip.compress(gzip.decompress(small_mnist()[NAMES[0]])[:-1])}, "23,519 values"),
        ({0: gzip.compress(gzip.decompress(small_mnist()[NAMES[0]]) + b"?")}, "23,521 values"),
        ({1: idx(np.arange(29) % 10)}, "29 labels for 30 images"),
        ({1: idx(np.arange(30) % 11)}, "label 10, the largest is 9"),
        ({2: idx(np.zeros((0, 28, 28)))}, "(0, 28, 28)"),
    ],
)
def test_damaged_idx(change: dict[int, bytes], words: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {**small_mnist(), **{NAMES[number]: data for number, data in change.items()}}
    placed(home, monkeypatch, "mnist", files)
    refused(lambda: load("mnist"), words, NAMES[next(iter(change))], "`crl data fetch mnist` gets it again")


def test_damaged_records(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = small_cifar()
    placed(home, monkeypatch, "cifar100", files)
    assert load("cifar100").count == 100
    datasets._public.cache_clear()
    (home / "cifar100" / "train.bin").write_bytes(files["train.bin"][:-1])
    refused(lambda: load("cifar100"), "train.bin is damaged (307,399 bytes, not 307,400)", "crl data fetch cifar100")
    shutil.rmtree(home)
    placed(home, monkeypatch, "cifar100", {**files, "train.bin": files["train.bin"][:-1]})
    refused(lambda: load("cifar100"), "train.bin is damaged", "no whole number of records of 3,074")
    shutil.rmtree(home)
    spoilt = bytearray(files["test.bin"])
    spoilt[3 * 3074 + 1] = 100
    placed(home, monkeypatch, "cifar100", {**files, "test.bin": bytes(spoilt)})
    refused(lambda: load("cifar100"), "test.bin is damaged", "label 100 in record 3, the largest is 99")
