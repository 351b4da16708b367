"""Small datasets in the real formats, in a cache of their own, and how a refusal is tested."""

import contextlib
import gzip
import hashlib
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from crl.core import CrlError
from envs.sources import SOURCES, File, Source

NAMES = ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz", "t10k-images-idx3-ubyte.gz")
NAMES += ("t10k-labels-idx1-ubyte.gz",)


def quiet(line: str) -> None:
    pass


def refused(call: Callable[[], object], *words: str) -> str:
    """The one line that the call is refused with; every word is in it."""
    with pytest.raises(CrlError) as caught:
        call()
    line = str(caught.value)
    assert "\n" not in line
    for word in words:
        assert word in line, line
    return line


@contextlib.contextmanager
def in_time(seconds: int = 10) -> Iterator[None]:
    """Ends a block that would hang."""

    def late(number: int, frame: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, which is returned, and nothing between us and our own server."""
    monkeypatch.setenv("CRL_DATA_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")
    return tmp_path / "cache"


def idx(array: np.ndarray) -> bytes:
    lengths = np.array(array.shape, ">u4").tobytes()
    return gzip.compress(bytes((0, 0, 8, array.ndim)) + lengths + array.astype(np.uint8).tobytes(), mtime=0)


def small_mnist() -> dict[str, bytes]:
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (30, 28, 28)), np.arange(30) % 10
    return dict(zip(NAMES, map(idx, (x, y, x[:10], y[:10])), strict=True))


def small_cifar() -> dict[str, bytes]:
    records = np.random.default_rng(0).integers(0, 256, (100, 3074)).astype(np.uint8)
    records[:, 1] = np.arange(100)
    return {"train.bin": records.tobytes(), "test.bin": records[::-1].tobytes()}


def described(files: dict[str, bytes]) -> tuple[File, ...]:
    return tuple(File(name, hashlib.md5(data).hexdigest(), len(data)) for name, data in files.items())


def pretend(monkeypatch: pytest.MonkeyPatch, name: str, source: Source) -> None:
    monkeypatch.setitem(SOURCES, name, source)


def placed(home: Path, monkeypatch: pytest.MonkeyPatch, name: str, files: dict[str, bytes]) -> None:
    """Files in the cache as if they had been fetched: sums and sizes are theirs, whatever is in them."""
    (home / name).mkdir(parents=True)
    for file, data in files.items():
        (home / name / file).write_bytes(data)
    source = SOURCES[name]
    kept = {"kept": described(files)} if source.kept else {"files": described(files)}
    pretend(monkeypatch, name, replace(source, **kept))
