"""The public datasets' own formats: MNIST's gzipped arrays, and the records of CIFAR's binary version."""

from __future__ import annotations

import gzip
import hashlib
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from crl.core import Array, CrlError, brief
from envs.sources import File, Source


def read(source: Source, folder: Path) -> tuple[Array, Array, Array, Array]:
    """Images and labels to learn from, and those to be tested on, out of files that have the right sizes."""
    paths = [folder / file.name for file in source.wanted]
    for path, file in zip(paths, source.wanted, strict=True):
        size = path.stat().st_size
        if size != file.size and not file.inner_md5:
            raise _damaged(path, f"{size:,} bytes, not {file.size:,}")
    if not source.labels:
        files = [_Packed(path, file) for path, file in zip(paths, source.wanted, strict=True)]
        return *_read_idx(files[0], files[1]), *_read_idx(files[2], files[3])
    *train, test = (_read_records(path, source.labels, len(source.classes)) for path in paths)
    return np.concatenate([x for x, _ in train]), np.concatenate([y for _, y in train]), *test


def _damaged(path: Path, what: str) -> CrlError:
    return CrlError(f"{path} is damaged ({what}): `crl data fetch {path.parent.name}` gets it again")


class _Packed(NamedTuple):
    """A gzipped file in the cache, and what it should be."""

    path: Path
    file: File

    def data(self) -> bytes:
        """What is in it: no more is unpacked than there should be."""
        wanted = self.file.inner_size
        try:
            with gzip.open(self.path) as stream:
                data = stream.read(wanted + 1 if wanted else -1)
        except (OSError, EOFError, zlib.error) as error:
            raise _damaged(self.path, brief(error)) from None
        if wanted and len(data) > wanted:
            raise _damaged(self.path, f"it unpacks to more than {wanted:,} bytes")
        found = hashlib.md5(data, usedforsecurity=False).hexdigest()
        if wanted and found != self.file.inner_md5:
            raise _damaged(self.path, f"the md5 of its content is {found}, not {self.file.inner_md5}")
        return data


def _read_idx(images: _Packed, labels: _Packed) -> tuple[Array, Array]:
    """Images (N, 1, 28, 28) and labels out of two gzipped files in MNIST's format."""
    x, y = _idx(images, (28, 28)), _idx(labels, ())
    if len(x) != len(y):
        raise _damaged(labels.path, f"{len(y):,} labels for {len(x):,} images")
    if y.max() > 9:
        raise _damaged(labels.path, f"label {y.max()}, the largest is 9")
    return x[:, None], y.astype(np.int64)


def _idx(packed: _Packed, row: tuple[int, ...]) -> Array:
    """A byte array of the right shape: two zero bytes, its type (8), its axes, their lengths, then the values."""
    path, data = packed.path, packed.data()
    begin = 4 + 4 * (1 + len(row))
    if data[:4] != bytes((0, 0, 8, 1 + len(row))) or len(data) < begin:
        raise _damaged(path, f"it begins with {data[:4].hex(' ') or 'nothing'}, not 00 00 08 0{1 + len(row)}")
    lengths = tuple(int(length) for length in np.frombuffer(data[4:begin], ">u4"))
    if lengths[0] == 0 or lengths[1:] != row:
        raise _damaged(path, f"it says that it is {lengths}, not (N{''.join(f', {length}' for length in row)})")
    if len(data) - begin != np.prod(lengths, dtype=np.int64):
        raise _damaged(path, f"{len(data) - begin:,} values, but it says that it is {lengths}")
    return np.frombuffer(data, np.uint8, offset=begin).reshape(lengths).copy()


def _read_records(path: Path, labels: int, classes: int) -> tuple[Array, Array]:
    """Images (N, 3, 32, 32) and labels out of CIFAR's binary format."""
    data = np.fromfile(path, np.uint8)
    width = labels + 3072
    if not len(data) or len(data) % width:
        raise _damaged(path, f"{len(data):,} bytes are no whole number of records of {width:,}")
    records = data.reshape(-1, width)
    y = records[:, labels - 1].astype(np.int64)
    if y.max() >= classes:
        raise _damaged(path, f"label {y.max()} in record {np.argmax(y >= classes)}, the largest is {classes - 1}")
    return records[:, labels:].reshape(-1, 3, 32, 32), y
