"""How files come on the disk: whole or not at all, and with their name in the error where they do not."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from crl.core import CrlError, brief


class Unwritten(CrlError):
    """A file could not be written: the disk is full, say."""


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an error of the disk into one line that names the file."""
    try:
        yield
    except OSError as error:
        raise Unwritten(f"{path}: cannot be written: {error.strerror or brief(error)}") from error


def write_whole(path: Path, data: bytes | memoryview) -> None:
    """Write a file so that a reader, or a crash, sees the old one or the new one and nothing between."""
    half = path.with_name(f".{path.name}.{os.getpid()}")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(half, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(half, path)
        except BaseException:
            half.unlink(missing_ok=True)
            raise
    _sync(path.parent)


def _sync(folder: Path) -> None:
    """Have the names in a folder outlive a power cut, where its file system knows how to."""
    with contextlib.suppress(OSError):
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


def half_written(name: str) -> bool:
    """Whether this is a file that `write_whole` has not finished."""
    return re.fullmatch(r"\..+\.\d+", name) is not None


def content(path: Path) -> bytes:
    """All of a file, or a line about why it cannot be read; a pipe could be read for ever."""
    if path.exists() and not path.is_file():
        raise CrlError(f"{path}: no regular file")
    try:
        return path.read_bytes()
    except OSError as error:
        raise CrlError(f"{path}: cannot be read: {error.strerror or brief(error)}") from None
