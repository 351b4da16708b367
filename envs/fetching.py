"""The cache of public datasets: what is there, what is downloaded into it, and what is taken from files at hand.

Nothing is downloaded but by `fetch`, and a file has its own name in the cache only once its checksum was right.
"""

from __future__ import annotations

import bz2
import contextlib
import errno
import gzip
import hashlib
import http.client
import lzma
import os
import shutil
import sys
import tarfile
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import IO, Any

from crl.core import CrlError, brief
from envs.sources import BUILT_IN, MB, SOURCES, File, Source, cache, unknown

BLOCK = 2**18  # bytes read at once
GZIP = b"\x1f\x8b"  # what gzip's files begin with
UNPACK: dict[bytes, Callable[..., Any]] = {GZIP: gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\0": lzma.open}
HEADERS = (ValueError, OverflowError, RecursionError)  # what headers of any bytes may lead to
DAMAGED = (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile, lzma.LZMAError, *HEADERS)
HEADER = 2**20  # bytes that an archive's header may have
MORE = 64 * MB  # that an archive may hold beside twice its dataset


def status() -> list[str]:
    """A table of the datasets: which are there (every checksum is taken), how large, and where."""
    rows = [("data", "", "size", "where")]
    for name, source in SOURCES.items():
        states = [_state(cache() / name / file.name, file) for file in source.wanted]
        state = next((each for each in ("damaged", "not here") if each in states), "there")
        size = f"{sum(file.size for file in source.wanted) / MB:.0f} MB" if state == "there" else source.size
        if state == "damaged":
            where = f"{cache() / name}: `crl data fetch {name}` gets it again"
        else:
            where = str(cache() / name) if state == "there" else f"`crl data fetch {name}` downloads it"
        rows.append((name, state, size, where))
    rows += [(name, "there", "", "built in") for name in BUILT_IN]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = [
        f"{name:<{widths[0]}}  {state:<{widths[1]}}  {size:>{widths[2]}}  {where}" for name, state, size, where in rows
    ]
    return [*lines, f"cache: {cache()} (CRL_DATA_DIR moves it)"]


def _state(path: Path, file: File) -> str:
    if not path.is_file():
        return "not here"
    right = path.stat().st_size == file.size and _md5(path) == file.md5
    return "there" if right or (file.inner_md5 and _inner_md5(path, file) == file.inner_md5) else "damaged"


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def _inner_md5(path: Path, file: File) -> str:
    """The sum of what a gzipped file holds (no more is unpacked than there should be), or of one that is not."""
    with path.open("rb") as start:
        packed = start.read(2) == GZIP
    digest, read = hashlib.md5(usedforsecurity=False), 0
    try:
        with gzip.open(path) if packed else path.open("rb") as stream:
            while read <= file.inner_size and (block := stream.read(BLOCK)):
                digest.update(block)
                read += len(block)
    except (gzip.BadGzipFile, EOFError, zlib.error):
        return "none"
    return digest.hexdigest()


def _source(name: str) -> Source:
    if name in BUILT_IN:
        raise CrlError(f"{name} is built in: there is nothing to fetch or import")
    if name not in SOURCES:
        raise CrlError(unknown(name, list(SOURCES)))
    return SOURCES[name]


def fetch(name: str, tell: Callable[[str], None] = print) -> None:
    """Download a dataset into the cache, going on where an earlier attempt ended, unless it is there already."""
    source, folder = _source(name), cache() / name
    with _disk(folder):
        if all(_state(folder / file.name, file) == "there" for file in source.wanted):
            tell(f"{name} is here already: {folder}")
            return
        folder.mkdir(parents=True, exist_ok=True)
        files = [file for file in source.files if _state(folder / file.name, file) != "there"]
        _room(folder, sum(_lacking(folder, file) for file in files) + sum(file.size for file in source.kept))
        for file in files:
            _download(file, source.mirrors, folder)
        if source.kept:
            archive = folder / source.files[0].name
            _take(_members(archive, source.kept), source.kept, folder, str(archive))
            archive.unlink()
    tell(f"{name} is here now: {folder}")


def _lacking(folder: Path, file: File) -> int:
    """How many bytes of a file are still to come."""
    part = folder / f"{file.name}.part"
    return max(0, file.size - part.stat().st_size) if part.exists() else file.size


@contextlib.contextmanager
def _disk(folder: Path) -> Iterator[None]:
    """What the disk refuses costs one line; a download that was cut short stays, to be gone on with."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _full(folder, "it ran out meanwhile") from error
        raise CrlError(f"{error.filename or folder}: {error.strerror or brief(error)}") from error


def _full(folder: Path, why: str) -> CrlError:
    return CrlError(f"no space left for {folder} ({why}): make room, or set CRL_DATA_DIR to a folder on another disk")


def _room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise _full(folder, f"{needed / MB:,.0f} MB are needed and {free / MB:,.0f} MB are free")


def _download(file: File, mirrors: Sequence[str], folder: Path) -> None:
    """Get one file from the first mirror that has it; under its own name it is only ever whole and right."""
    part, reasons = folder / f"{file.name}.part", []
    for mirror in mirrors:
        progress = Progress(file.name, file.size)
        try:
            _receive(mirror + file.name, part, file.size, progress)
        except _Odd as error:
            reasons.append(f"{_host(mirror)}: {error}")
            continue
        finally:
            progress.close()
        found = _md5(part)
        if found == file.md5:
            os.replace(part, folder / file.name)
            return
        part.unlink()  # so that the next attempt starts anew
        reasons.append(f"{_host(mirror)}: its md5 is {found}, not {file.md5}")
    other = f"`crl data import {folder.name} PATH` takes files that you have"
    raise CrlError(f"{file.name} cannot be had ({'; '.join(reasons)}): try again later; {other}")


def _host(url: str) -> str:
    return url.split("/")[2]


class _Odd(Exception):
    """A mirror does not answer, or with something that is not the file: the next one is asked."""


@contextlib.contextmanager
def _network() -> Iterator[None]:
    """Keeps the network's errors apart from the disk's, which no other mirror can mend."""
    try:
        yield
    except urllib.error.HTTPError as error:
        error.close()
        raise _Odd(f"{error.code} {error.reason}") from None
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None)  # urllib hides the error behind one of its own
        raise _Odd(brief(reason if isinstance(reason, Exception) else error)) from None


def _receive(url: str, part: Path, size: int, progress: Progress) -> None:
    """Append what is missing to `part`, or begin anew where the server knows no ranges."""
    have = part.stat().st_size if part.exists() else 0
    if have == size:
        return
    have = have if have < size else 0
    headers = {"User-Agent": "crl", **({"Range": f"bytes={have}-"} if have else {})}
    request = urllib.request.Request(url, headers=headers)  # noqa: S310  a mirror: http or https
    with _network():
        answer = urllib.request.urlopen(request, timeout=30)  # noqa: S310
    with answer:
        resumed = have > 0 and answer.status == 206
        if resumed and not answer.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            raise _Odd("it answered with another part of the file")
        have = have if resumed else 0
        with part.open("ab" if resumed else "wb") as out:
            for block in _blocks(answer):
                have += len(block)
                if have > size:
                    out.truncate(0)
                    raise _Odd(f"it sent more than the {size:,} bytes that there should be")
                out.write(block)
                progress.show(have)
    if have < size:
        raise _Odd(f"it stopped after {have:,} of {size:,} bytes")


def _blocks(answer: Any) -> Iterator[bytes]:
    while True:
        with _network():
            block = answer.read(BLOCK)
        if not block:
            return
        yield block


class Progress:
    """How far a download is, on stderr once it takes a while: a bar on a terminal, else a line now and then."""

    def __init__(self, name: str, size: int, wait: float = 2.0) -> None:
        self.name, self.size = name, size
        self.terminal = sys.stderr.isatty()
        self.next = time.monotonic() + wait
        self.shown = False

    def show(self, have: int) -> None:
        """Told after every block."""
        if time.monotonic() < self.next:
            return
        share = have / self.size
        text = f"{self.name}: {have / MB:.0f} of {self.size / MB:.0f} MB"
        if self.terminal:
            print(f"\r{text} {'#' * round(30 * share):.<30}", end="", file=sys.stderr, flush=True)
        else:
            print(text, file=sys.stderr, flush=True)
        self.shown, self.next = True, time.monotonic() + (0.2 if self.terminal else 10)

    def close(self) -> None:
        """End the bar's line."""
        if self.shown and self.terminal:
            print(file=sys.stderr)


def import_files(name: str, path: str | Path, tell: Callable[[str], None] = print) -> None:
    """Take a dataset's files from a folder (however nested), or from its archive, into the cache."""
    source, found, folder = _source(name), Path(path).expanduser(), cache() / name
    with _disk(folder):
        if not found.exists():
            raise CrlError(f"{path} does not exist")
        if not found.is_dir() and not found.is_file():
            raise CrlError(f"{path} is no regular file: right would be an archive, or the folder that holds the files")
        members = _choose(found, source)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            _room(folder, sum(file.size for file in source.wanted))
            _take(members, source.wanted, folder, str(found))
        finally:
            with contextlib.suppress(OSError):
                folder.rmdir()  # where nothing came into it
    tell(f"{name} is here now: {folder}")


Member = tuple[File, IO[bytes]]


def _choose(found: Path, source: Source) -> Iterator[Member]:
    """The files in a folder, or beside one of them; or else those in an archive, which a folder may hold."""
    if found.is_file() and all(found.name not in file.names for file in source.wanted):
        return _members(found, source.wanted)
    inside = _walk(found if found.is_dir() else found.parent)
    archive = next((path for file in source.files for path in inside.get(file.name, ())), None)
    if source.kept and archive is not None and not all(file.name in inside for file in source.kept):
        return _members(archive, source.kept)
    return _files(inside, source.wanted)


def _walk(folder: Path) -> dict[str, list[Path]]:
    """Every regular file in a folder, however nested, by its name: a pipe could be read for ever."""
    inside: dict[str, list[Path]] = {}
    for where, _, names in os.walk(folder):
        for path in (Path(where, name) for name in names):
            if path.is_file():
                inside.setdefault(path.name, []).append(path)
    return inside


def _files(inside: dict[str, list[Path]], files: Sequence[File]) -> Iterator[Member]:
    """Of several files of one name, the one that has the right sum."""
    for file in files:
        paths = [path for name in file.names for path in inside.get(name, ())]
        if paths:
            right = next((path for path in paths[1:] if _state(path, file) == "there"), paths[0])
            with right.open("rb") as stream:
                yield file, stream


class _Bounded:
    """An archive's content, of which no more is unpacked than a dataset takes: a few bytes may hold a disk of zeros."""

    def __init__(self, stream: Any, most: int, archive: Path) -> None:
        self.stream, self.most, self.archive, self.tell = stream, most, archive, stream.tell

    def read(self, size: int = -1) -> bytes:
        """What comes next. All that is large is read in parts but for headers, which are kept in memory."""
        if not 0 <= size <= HEADER:
            raise CrlError(f"{self.archive} has a header of {size:,} bytes, which none needs; nothing was taken")
        data: bytes = self.stream.read(size)
        self._refuse(self.tell())
        return data

    def seek(self, offset: int) -> int:
        """Go to another place, which takes unpacking what is before it."""
        self._refuse(offset)
        return int(self.stream.seek(offset))

    def _refuse(self, place: int) -> None:
        if place > self.most:
            much = f"unpacks to more than {self.most / MB:,.0f} MB, which is more than the dataset has"
            raise CrlError(f"{self.archive} {much}; nothing was taken")


def _members(archive: Path, files: Sequence[File]) -> Iterator[Member]:
    """The files of these names in a tar, read one after the other; nothing else of it is touched."""
    by_name = {name: file for file in files for name in file.names}
    with archive.open("rb") as start:
        begins = start.read(6)
    unpack = next((each for magic, each in UNPACK.items() if begins.startswith(magic)), open)
    most = MORE + 2 * sum(file.size + file.inner_size for file in files)
    with unpack(archive, "rb") as content:
        bounded: Any = _Bounded(content, most, archive)
        with tarfile.open(fileobj=bounded, mode="r:") as tar:
            for member in tar:
                file = by_name.get(PurePosixPath(member.name).name)
                stream = tar.extractfile(member) if file is not None and member.isfile() else None
                if file is not None and stream is not None:
                    yield file, stream


def _take(members: Iterable[Member], files: Sequence[File], folder: Path, where: str) -> None:
    """Copy files into the cache: all of them, each with the right sum, or none."""
    done: dict[str, Path] = {}
    try:
        for file, stream in members:
            if file.name in done:
                continue
            new = folder / f"{file.name}.new"
            done[file.name] = new
            found = _copy(stream, new, file)
            inner = _inner_md5(new, file) if file.inner_md5 and found != file.md5 else ""
            if found != file.md5 and (not inner or inner != file.inner_md5):
                content = f", and of its content {inner}, not {file.inner_md5}" if inner else ""
                wrong = f"the md5 of {file.name} is {found}, not {file.md5}{content}"
                raise CrlError(f"{where}: {wrong}; nothing was taken")
        absent = [file.name for file in files if file.name not in done]
        if absent:
            raise CrlError(f"{where} has no {', '.join(absent)}; nothing was taken")
        for name, new in done.items():
            os.replace(new, folder / name)
    except DAMAGED as error:
        raise CrlError(f"{where} is no archive, or a damaged one ({brief(error)}); nothing was taken") from None
    finally:
        for new in done.values():
            new.unlink(missing_ok=True)


def _copy(stream: IO[bytes], new: Path, file: File) -> str:
    """Copy at most a little more than a file has, packing what came unpacked, and say the sum of what was copied."""
    digest, copied, most = hashlib.md5(usedforsecurity=False), 0, max(file.size, file.inner_size)
    block = stream.read(BLOCK)
    packs = bool(file.inner_md5) and not block.startswith(GZIP)
    with gzip.GzipFile(new, "wb", compresslevel=6, mtime=0) if packs else new.open("wb") as out:
        while block and copied <= most:
            digest.update(block)
            out.write(block)
            copied += len(block)
            block = stream.read(BLOCK)
    return digest.hexdigest()
