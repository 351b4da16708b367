"""The cache: a server of our own that stops, lies or is ignorant, archives, and files that are at hand."""

import errno
import gzip
import hashlib
import http.server
import io
import os
import re
import shutil
import sys
import tarfile
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from envs import fetching
from envs.datasets import load
from envs.fetching import fetch, import_files, status
from envs.sources import SOURCES, File, Source, cache
from tests.small_data import (
    NAMES,
    described,
    empty_cache,
    in_time,
    pretend,
    quiet,
    refused,
    small_cifar,
    small_mnist,
)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return empty_cache(tmp_path, monkeypatch)


class Server(http.server.ThreadingHTTPServer):
    """Serves `files`; remembers what was asked; can stop early, and can be ignorant of ranges."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.asked: list[tuple[str, str]] = []
        self.stop_after: int | None = None
        self.ranges = True

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        name, asked = self.path.lstrip("/"), self.headers.get("Range", "")
        self.server.asked.append((name, asked))
        if name not in self.server.files:
            self.send_error(404)
            return
        data, begin = self.server.files[name], 0
        if asked and self.server.ranges:
            begin = int(asked.removeprefix("bytes=").rstrip("-"))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {begin}-{len(data) - 1}/{len(data)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(data) - begin))
        self.end_headers()
        self.wfile.write(data[begin : self.server.stop_after])

    def log_message(self, *words: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


@pytest.fixture
def mnist(server: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    """A small MNIST to be fetched."""
    server.files = small_mnist()
    source = replace(SOURCES["mnist"], files=described(server.files), mirrors=(server.url,))
    pretend(monkeypatch, "mnist", source)
    return server


def test_the_cache_is_where_the_platform_keeps_such(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CRL_DATA_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "w"))
    for platform, place in (("linux", tmp_path / "x/crl"), ("win32", tmp_path / "w/crl")):
        monkeypatch.setattr(sys, "platform", platform)
        assert cache() == place
    monkeypatch.setattr(sys, "platform", "darwin")
    assert cache() == Path.home() / "Library/Caches/crl"
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache() == Path.home() / ".cache/crl"


def test_fetch(mnist: Server, home: Path) -> None:
    said: list[str] = []
    fetch("mnist", said.append)
    assert load("mnist").train_x.shape == (30, 1, 28, 28) and "is here now" in said[-1]
    assert sorted(path.name for path in (home / "mnist").iterdir()) == sorted(NAMES), "and nothing else"
    asked = len(mnist.asked)
    fetch("mnist", said.append)
    assert len(mnist.asked) == asked and "is here already" in said[-1]
    table = status()
    assert any(re.match(r"mnist\s+there .*/mnist$", line) for line in table), table
    assert any(re.match(r"cifar10\s+not here\s+162 MB .*fetch cifar10", line) for line in table), table
    (home / "mnist" / NAMES[2]).write_bytes(b"x" * mnist_size(home))
    assert any(re.match(r"mnist\s+damaged", line) for line in status())
    fetch("mnist", quiet)
    assert len(mnist.asked) == asked + 1, "only the damaged file is fetched again"
    assert any(re.match(r"mnist\s+there", line) for line in status())


def mnist_size(home: Path) -> int:
    return (home / "mnist" / NAMES[2]).stat().st_size


def test_fetch_goes_on_where_it_ended(mnist: Server, home: Path) -> None:
    mnist.stop_after = 5000
    refused(lambda: fetch("mnist", quiet), "stopped after 5,000 of", NAMES[0])
    assert (home / "mnist" / f"{NAMES[0]}.part").stat().st_size == 5000
    refused(lambda: load("mnist"), "not here")
    mnist.stop_after = None
    (home / "mnist" / f"{NAMES[1]}.part").write_bytes(mnist.files[NAMES[1]])  # whole, but not yet checked
    fetch("mnist", quiet)
    assert NAMES[1] not in [name for name, _ in mnist.asked]
    assert mnist.asked[:2] == [(NAMES[0], ""), (NAMES[0], "bytes=5000-")]
    assert load("mnist").count == 10 and not list(home.rglob("*.part"))


def test_fetch_begins_anew_where_the_server_knows_no_ranges(mnist: Server, home: Path) -> None:
    (home / "mnist").mkdir(parents=True)
    (home / "mnist" / f"{NAMES[0]}.part").write_bytes(mnist.files[NAMES[0]][:5000])
    (home / "mnist" / f"{NAMES[1]}.part").write_bytes(b"x" * 10_000)  # more than there should be
    mnist.ranges = False
    fetch("mnist", quiet)
    assert load("mnist").count == 10


def test_a_wrong_checksum_is_refused_with_both(mnist: Server, home: Path) -> None:
    good = mnist.files[NAMES[2]]
    mnist.files[NAMES[2]] = good[:-1] + b"?"
    found, right = hashlib.md5(mnist.files[NAMES[2]]).hexdigest(), hashlib.md5(good).hexdigest()
    refused(lambda: fetch("mnist", quiet), found, right, NAMES[2])
    kept = {path.name for path in (home / "mnist").iterdir()}
    assert kept == {NAMES[0], NAMES[1]}, "the right files stay; of the wrong one, not even the part"
    mnist.files[NAMES[2]] = good + b"more"
    refused(lambda: fetch("mnist", quiet), "more than")
    mnist.files[NAMES[2]] = good
    fetch("mnist", quiet)
    assert load("mnist").count == 10


def test_mirrors_are_tried_in_order(mnist: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    dead = "http://127.0.0.1:1/"
    source = SOURCES["mnist"]
    pretend(monkeypatch, "mnist", replace(source, mirrors=(dead, f"{mnist.url}elsewhere/", mnist.url)))
    fetch("mnist", quiet)
    assert [name for name, _ in mnist.asked[:2]] == [f"elsewhere/{NAMES[0]}", NAMES[0]]
    pretend(monkeypatch, "fashion_mnist", replace(source, mirrors=(dead, f"{mnist.url}elsewhere/")))
    refused(
        lambda: fetch("fashion_mnist", quiet),
        "127.0.0.1:1: ConnectionRefusedError",
        "404 Not Found",
        "try again later",
        "`crl data import fashion_mnist PATH`",
    )


def test_no_space(mnist: Server, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(home.parent)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10))
        refused(lambda: fetch("mnist", quiet), "no space left", "CRL_DATA_DIR", str(home / "mnist"))
        refused(lambda: import_files("mnist", home, quiet), "no space left")
    assert not mnist.asked, "said before anything is downloaded"

    def full(answer: object) -> Iterator[bytes]:
        yield b"some"
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(fetching, "_blocks", full)
        refused(lambda: fetch("mnist", quiet), "no space left", "meanwhile", "CRL_DATA_DIR")
    assert not list(home.rglob("*.gz"))
    blocked = home / "fashion_mnist"
    blocked.write_text("a file where a folder should be")
    refused(lambda: fetch("fashion_mnist", quiet), "fashion_mnist: File exists")


def test_progress_after_a_while(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    fetching.Progress("a.gz", 100 * 2**20).show(2**20)
    assert capsys.readouterr().err == "", "nothing in the first two seconds"
    fetching.Progress("a.gz", 100 * 2**20, wait=0).show(50 * 2**20)
    assert capsys.readouterr().err == "a.gz: 50 of 100 MB\n"
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    bar = fetching.Progress("a.gz", 100 * 2**20, wait=0)
    bar.show(50 * 2**20)
    bar.close()
    assert capsys.readouterr().err == "\ra.gz: 50 of 100 MB " + "#" * 15 + "." * 15 + "\n"


def tar(files: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            if not data:
                info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def cifar_source(files: dict[str, bytes], archive: bytes, url: str = "http://127.0.0.1:1/") -> Source:
    return replace(
        SOURCES["cifar100"],
        files=described({"cifar-100-binary.tar.gz": archive}),
        kept=described(files),
        mirrors=(url,),
    )


def test_an_archive_is_fetched_and_unpacked(server: Server, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = small_cifar()
    packed = {"../../outside.bin": b"no", "cifar-100-binary/readme.html": b"no"}
    packed |= {"link/train.bin": b"", **{f"cifar-100-binary/{name}": data for name, data in files.items()}}
    archive = tar({**packed, "later/train.bin": b"no"})
    server.files = {"cifar-100-binary.tar.gz": archive}
    pretend(monkeypatch, "cifar100", cifar_source(files, archive, server.url))
    fetch("cifar100", quiet)
    assert sorted(path.name for path in home.rglob("*.*")) == ["test.bin", "train.bin"], "nothing else of the archive"
    cifar = load("cifar100")
    assert cifar.train_y.tolist() == list(range(100)) and cifar.test_y.tolist() == list(range(99, -1, -1))
    raw = np.frombuffer(files["train.bin"], np.uint8).reshape(100, 3074)
    assert (cifar.train_x[7, 1, 2] == raw[7, 2 + 1024 + 64 : 2 + 1024 + 96]).all(), "channel, row, column"


def test_import_takes_all_or_nothing(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = small_cifar()
    archive = tar({f"cifar-100-binary/{name}": data for name, data in files.items()})
    pretend(monkeypatch, "cifar100", cifar_source(files, archive))
    mine = tmp_path / "mine" / "deep"
    mine.mkdir(parents=True)

    def take(path: Path) -> None:
        import_files("cifar100", path, quiet)

    refused(lambda: take(tmp_path / "nowhere"), "nowhere does not exist")
    refused(lambda: take(mine), "has no train.bin, test.bin")
    (mine / "train.bin").write_bytes(files["train.bin"])
    refused(lambda: take(mine), "has no test.bin; nothing was taken")
    (mine / "test.bin").write_bytes(files["train.bin"])
    sums = [hashlib.md5(files[name]).hexdigest() for name in ("train.bin", "test.bin")]
    refused(lambda: take(mine), *sums, "nothing was taken")
    (mine / "bad.tar.gz").write_bytes(archive[: len(archive) // 2])
    refused(lambda: take(mine / "bad.tar.gz"), "bad.tar.gz is no archive, or a damaged one", "nothing was taken")
    (mine / "text.tar.gz").write_text("hello")
    refused(lambda: take(mine / "text.tar.gz"), "text.tar.gz is no archive")
    assert not list(home.rglob("*")), "the cache is as empty as before"
    (mine / "other.tar.gz").write_bytes(archive)
    take(mine / "other.tar.gz")
    assert load("cifar100").count == 100
    (home / "cifar100" / "train.bin").unlink()
    (mine / "test.bin").unlink()
    (mine / "other.tar.gz").rename(mine / "cifar-100-binary.tar.gz")
    take(tmp_path / "mine")
    shutil.rmtree(home)
    (mine / "test.bin").write_bytes(files["test.bin"])
    (mine / "cifar-100-binary.tar.gz").write_text("not needed where the files are")
    take(mine / "train.bin")
    assert (home / "cifar100" / "test.bin").read_bytes() == files["test.bin"]


@pytest.mark.parametrize("bomb", ["junk", "header", "headers"])
def test_no_more_is_unpacked_than_a_dataset_has(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bomb: str
) -> None:
    """Junk of zeros, a header of megabytes, a thousand headers: each is small as it is packed."""
    files = small_cifar()
    pretend(monkeypatch, "cifar100", cifar_source(files, tar(files)))
    monkeypatch.setattr(fetching, "MORE", 2**21)
    head = tarfile.TarInfo("junk")
    head.type, head.size = (tarfile.REGTYPE if bomb == "junk" else tarfile.XHDTYPE), 2**23
    content = b"9" * 2**23
    if bomb == "headers":
        head.size = 512
        content = b"\n".join([b"511 a=" + b"b" * 504, (head.tobuf() + b"511 a=" + b"b" * 504 + b"\n") * 3000])
    path = tmp_path / "cifar-100-binary.tar.gz"
    path.write_bytes(gzip.compress(head.tobuf() + content) + tar(files))
    said = {
        "junk": f"{path} unpacks to more than 3 MB, which is more than the dataset has; nothing was taken",
        "header": f"{path} has a header of 8,388,608 bytes, which none needs; nothing was taken",
        "headers": f"{path} is no archive, or a damaged one (",
    }
    refused(lambda: import_files("cifar100", path, quiet), said[bomb])
    assert not list(home.rglob("*"))


def test_import_finds_the_right_one_of_several(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = small_mnist()
    pretend(monkeypatch, "mnist", replace(SOURCES["mnist"], files=described(files)))
    for right in ("a", "b"):
        for place in ("a", "b"):
            (tmp_path / "mine" / place).mkdir(parents=True, exist_ok=True)
            for name, data in files.items():
                (tmp_path / "mine" / place / name).write_bytes(data if place == right else data[:-1] + b"?")
        import_files("mnist", tmp_path / "mine", quiet)
    assert load("mnist").count == 10


# Files that others packed, or that are not packed.


def twice_described(files: dict[str, bytes]) -> tuple[File, ...]:
    """Files that are known by what they hold, too."""
    inner = {name: gzip.decompress(data) for name, data in files.items()}
    return tuple(
        replace(file, inner_md5=hashlib.md5(inner[file.name]).hexdigest(), inner_size=len(inner[file.name]))
        for file in described(files)
    )


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    files = small_mnist()
    pretend(monkeypatch, "mnist", replace(SOURCES["mnist"], files=twice_described(files)))
    return files


PACKINGS: dict[str, Callable[[str, bytes], tuple[str, bytes]]] = {
    "raw": lambda name, data: (name.removesuffix(".gz"), data),
    "raw, with a dot": lambda name, data: (name.removesuffix(".gz").replace("-idx", ".idx"), data),
    "packed by others": lambda name, data: (name, gzip.compress(data, 1, mtime=7)),
}


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("archived", [False, True])
def test_import_goes_by_content(
    known: dict[str, bytes], home: Path, tmp_path: Path, packing: str, archived: bool
) -> None:
    mine = dict(PACKINGS[packing](name, gzip.decompress(data)) for name, data in known.items())
    assert not set(mine.values()) & set(known.values())
    (tmp_path / "mine").mkdir()
    for name, data in mine.items():
        (tmp_path / "mine" / name).write_bytes(data)
    (tmp_path / "mine.tar.gz").write_bytes(tar(mine))
    import_files("mnist", tmp_path / ("mine.tar.gz" if archived else "mine"), quiet)
    assert sorted(path.name for path in (home / "mnist").iterdir()) == sorted(known)
    assert any(re.match(r"mnist\s+there", line) for line in status())
    expected = np.frombuffer(gzip.decompress(known[NAMES[0]])[16:], np.uint8).reshape(30, 1, 28, 28)
    assert (load("mnist").train_x == expected).all()
    (home / "mnist" / NAMES[0]).write_bytes(gzip.compress(gzip.decompress(known[NAMES[0]])[:-1] + b"?"))
    assert any(re.match(r"mnist\s+damaged", line) for line in status())


def test_import_of_other_content_is_refused(known: dict[str, bytes], home: Path, tmp_path: Path) -> None:
    for name, data in known.items():
        (tmp_path / name.removesuffix(".gz")).write_bytes(gzip.decompress(data))
    odd = tmp_path / NAMES[2].removesuffix(".gz")
    odd.write_bytes(odd.read_bytes()[:-1] + b"?")
    refused(lambda: import_files("mnist", tmp_path, quiet), "the md5 of", NAMES[2], "its content", "nothing was taken")
    assert not home.exists() or not list(home.rglob("*.gz*"))


def test_a_gzip_bomb_in_the_cache_is_not_unpacked(known: dict[str, bytes], home: Path, tmp_path: Path) -> None:
    """It has the right size, and would unpack to hundreds of times what it should."""
    (home / "mnist").mkdir(parents=True)
    for name, data in known.items():
        (home / "mnist" / name).write_bytes(data)
    bomb = gzip.compress(b"\0" * (200 * len(known[NAMES[0]])), mtime=0)
    right = (bomb + b"\0" * len(known[NAMES[0]]))[: len(known[NAMES[0]])]
    (home / "mnist" / NAMES[0]).write_bytes(right)
    tracemalloc.start()
    refused(lambda: load("mnist"), f"{NAMES[0]} is damaged (it unpacks to more than 23,536 bytes)")
    assert any(re.match(r"mnist\s+damaged", line) for line in status())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50 * len(right)


@pytest.mark.parametrize("where", ["among the files", "named itself"])
def test_a_pipe_is_not_imported(known: dict[str, bytes], tmp_path: Path, where: str) -> None:
    os.mkfifo(tmp_path / NAMES[0])
    with in_time():
        if where == "named itself":
            refused(lambda: import_files("mnist", tmp_path / NAMES[0], quiet), "no regular file")
        else:
            refused(lambda: import_files("mnist", tmp_path, quiet), f"has no {NAMES[0]}")
