"""A run's folder: manifest, records, matrix, checkpoints. Every file is written whole or appended to.

runs/<experiment>/<agent>[+methods]/seed-<n>/
    config.yaml     the experiment, every default written out
    manifest.json   versions, host, rules, status, timing
    metrics.jsonl   one record a line
    matrix.csv      R[i, j]: a row before the first visit and one after each, a column a task
    checkpoints/    boundary-NN.pt at every boundary; stopped.pt where a run was interrupted within a visit
    spectra/        <visit>-<phase>-<network>.npz: Ritz values, weights and settings
    tb/             TensorBoard's view of metrics.jsonl
"""

from __future__ import annotations

import contextlib
import csv
import fcntl
import hashlib
import importlib.metadata
import io
import json
import os
import platform
import shutil
import subprocess
import time
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import IO, Any
from urllib.parse import quote

import numpy as np
import yaml

from crl.checkpoint import misfit, packed, unpacked
from crl.core import CrlError, State, brief
from crl.disk import Unwritten, content, half_written, write_whole, writing
from crl.linalg import Spectrum

PACKAGES = ("torch", "stable_baselines3", "sb3_contrib", "gymnasium", "minigrid", "numpy", "tensorboard")
LOCK = ".lock"
MANIFEST: dict[str, Any] = {  # what its entries are, where they are there
    "status": str,
    "measure": str,
    "seconds": (int, float),
    "step": int,
    "tasks": list,
    "visits": list,
    "sums": dict,
    "log": list,
}
MOST = 2**28  # bytes that a spectrum may unpack to


class Moved(CrlError):
    """The folder that a process works on lies elsewhere now: what it wrote by name could come into another run."""


class RunFolder:
    """The folder of one run."""

    def __init__(self, path: Path) -> None:
        self.typed, path = path, path.absolute()  # a part may change the working folder
        self.path = path
        self.records = path / "metrics.jsonl"
        self.tensorboard = path / "tb"
        self.checkpoints = path / "checkpoints"
        self.lock: tuple[IO[str], Path] | None = None  # while this process works on it: the open file, and its name

    @property
    def occupied(self) -> bool:
        """Whether there is anything in it but what a start that was cut short has left."""
        if not self.path.is_dir():
            return self.path.exists()
        names = {path.name for path in self.path.iterdir() if not half_written(path.name)}
        return bool(names - {LOCK, "config.yaml"} if LOCK in names else names)

    def create(self, config: dict[str, Any], manifest: dict[str, Any], *, overwrite: bool) -> None:
        """Begin a run here, unless one is here already. The manifest is written last: with it, a run is here."""
        self.refuse_occupied(overwrite)
        self.drop()
        text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
        write_whole(self.path / "config.yaml", text.encode())
        self.write_manifest({**manifest, **_surroundings()})

    def refuse_occupied(self, overwrite: bool) -> None:
        """Refuse to begin where a run is, unless it may be dropped, and where anything else is."""
        if self.occupied and not overwrite:
            raise CrlError(
                f"{self.typed} holds a run already: `crl resume {self.typed}` goes on with it, --overwrite drops it"
            )
        if self.occupied and not (self.path / "manifest.json").is_file():
            raise CrlError(f"{self.typed} is not empty and not a run of crl: nothing there is overwritten")

    def drop(self) -> None:
        """Remove the run that is here, its manifest last, and never anything else."""
        self.refuse_occupied(overwrite=True)
        if not self.occupied:
            return
        manifest = self.path / "manifest.json"
        for path in self.path.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path != manifest and path.name != LOCK:
                path.unlink()
        manifest.unlink()

    @contextlib.contextmanager
    def taken(self) -> Iterator[None]:
        """Work on this run alone; who comes second is refused. The lock is the system's, and ends with its process.

        It lies in the folder, which may have several names: a symbolic link, `.`, a folder that was moved meanwhile.
        """
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            lock = (self.path / LOCK).open("a")
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise CrlError(f"{self.typed}: another process is at work on this run") from None
            self.lock = lock, self.path / LOCK
            try:
                self.refuse_moved()
                self._sweep()
                yield
            finally:
                self.lock = None

    def refuse_moved(self) -> None:
        """Before anything is written by name: is this folder the one that was locked?

        Where it was moved, another run may have begun at its place, which has a lock of its own.
        """
        if self.lock is None:
            return
        file, name = self.lock
        try:
            same = os.path.samestat(os.fstat(file.fileno()), os.stat(name))
        except OSError:  # nothing is there any more
            same = False
        if not same:
            raise Moved(f"{name.parent}: this run was moved or removed while it was at work; nothing more is written")

    def _write(self, path: Path, data: bytes | memoryview) -> None:
        self.refuse_moved()
        write_whole(path, data)

    def add_error(self, text: str) -> Path:
        """Add to what is kept of the errors; where, in any case, and written if it can be."""
        path = self.path / "error.log"
        with contextlib.suppress(OSError, Moved):
            self.refuse_moved()
            with path.open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(text)
        return path

    def _sweep(self) -> None:
        """Remove what a process that was killed has half written: with the lock held, no other process writes here."""
        for folder in (self.path, self.checkpoints, *(self.path / "spectra").glob("**")):
            for path in folder.glob(".*"):
                if half_written(path.name) and path.is_file():
                    path.unlink()

    # The manifest.

    def manifest(self) -> dict[str, Any]:
        """What the run says of itself."""
        self.refuse_moved()  # it is read to be written again
        path = self.path / "manifest.json"
        if not path.exists():
            raise CrlError(f"{self.typed}: no run is here (there is no manifest.json)")
        try:
            data: dict[str, Any] = json.loads(content(path))
        except (ValueError, RecursionError) as error:  # of JSON, and of text that is none
            raise self._no_manifest(brief(error)) from None
        if not isinstance(data, dict) or "status" not in data:
            raise self._no_manifest("it has no status")
        wrong = next((key for key, kind in MANIFEST.items() if key in data and not isinstance(data[key], kind)), None)
        if wrong is not None:
            raise self._no_manifest(f"{wrong} is {str(data[wrong])[:40]!r}")
        if any(not isinstance(v, dict) or not isinstance(v.get("task"), str) for v in data.get("visits", [])):
            raise self._no_manifest("visits is no list of visits")
        return data

    def _no_manifest(self, why: str) -> CrlError:
        right = f'with {{"status": "interrupted"}} in it, `crl resume {self.typed}` writes it anew'
        return CrlError(f"{self.path / 'manifest.json'}: damaged, or not the manifest of a run ({why}); {right}")

    def write_manifest(self, data: dict[str, Any]) -> None:
        """Replace the manifest."""
        self._write(self.path / "manifest.json", (json.dumps(data, indent=2) + "\n").encode())

    def update_manifest(self, **changes: Any) -> None:
        """Replace some of the manifest's entries."""
        self.write_manifest({**self.manifest(), **changes})

    def fail(self) -> None:
        """Say that the run failed, on a full disk too: a shorter text goes where the manifest lies already."""
        path = self.path / "manifest.json"
        text = json.dumps({**self.manifest(), "status": "failed"}).encode()
        try:
            self._write(path, text)
        except Unwritten:
            with path.open("r+b") as file:
                file.write(text.ljust(path.stat().st_size))

    # The matrix.

    def write_matrix(self, tasks: list[str], rows: list[list[float]]) -> None:
        """R as a table: first column the visit, then a column a task. The manifest has its sum before it is there."""
        text, path = io.StringIO(), self.path / "matrix.csv"
        csv.writer(text).writerow(["visit", *tasks])  # its line's end has both signs, so that both are quoted
        lines = [f"{visit}{''.join(f',{float(value)!r}' for value in row)}\n" for visit, row in enumerate(rows)]
        data = (text.getvalue().removesuffix("\r\n") + "\n" + "".join(lines)).encode()
        if (self.path / "manifest.json").exists():
            there = {zlib.crc32(path.read_bytes())} & set(self._sums()) if path.exists() else set()
            self.update_manifest(sums={"matrix.csv": sorted(there | {zlib.crc32(data)})})
        self._write(path, data)

    def read_matrix(self) -> tuple[list[str], list[list[float]]]:
        """(tasks, rows) as written."""
        path = self.path / "matrix.csv"
        data = content(path)
        try:
            head, *rows = list(csv.reader(io.StringIO(data.decode(), newline="")))
            numbers = [[float(cell) for cell in row] for row in rows]
            wrong = [i for i, row in enumerate(numbers) if len(row) != len(head) or row[0] != i]
            if self._sums() and zlib.crc32(data) not in self._sums():
                raise ValueError("it is not what was written")
            if head[0] != "visit" or wrong:
                raise ValueError(f"line {wrong[0] + 2 if wrong else 1} is none of a matrix")
        except (ValueError, IndexError, csv.Error) as error:
            also = "the log (eval/...) and the checkpoints hold the same numbers"
            raise CrlError(f"{path}: damaged ({brief(error)}); {also}") from None
        return head[1:], [row[1:] for row in numbers]

    def _sums(self) -> list[int]:
        """What the sum of the matrix may be: the table that there is, and the one that is about to be."""
        here = (self.path / "manifest.json").exists()
        return list(self.manifest().get("sums", {}).get("matrix.csv", [])) if here else []

    # Spectra.

    def spectrum(self, visit: int, phase: str, name: str) -> Path:
        """Where a monitor's spectrum lies: the Hessian's in `spectra/`, other operators' in a folder of their own."""
        monitor, _, network = name.partition("/")
        folder = self.path / "spectra" / ("" if monitor == "hessian" else monitor)
        safe = quote(network, safe="+=")  # no two names are one file's
        if len(safe) > 150:
            safe = f"{safe[:120]}-{hashlib.sha256(network.encode()).hexdigest()[:16]}"
        return folder / f"{visit}-{phase}-{safe}.npz"

    def write_spectrum(self, visit: int, phase: str, name: str, spectrum: Spectrum) -> None:
        """Write the Ritz values, weights and settings of a spectrum."""
        path = self.spectrum(visit, phase, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._write(path, replace(spectrum, settings={**spectrum.settings, "name": name}).packed())

    def read_spectra(self) -> list[tuple[int, str, Spectrum]]:
        """(visit, phase, spectrum) of every file, in the order of the walk; a spectrum's settings hold its name."""
        found = []
        for path in (self.path / "spectra").rglob("*.npz"):
            try:
                visit, phase, _ = path.name.split("-", 2)
                found.append((int(visit), phase, _spectrum(path)))
            except Exception as error:  # what any bytes may lead to
                without = "without it, everything but its picture can still be had"
                raise CrlError(f"{path}: damaged, or not a spectrum of crl: {brief(error)}; {without}") from None
        return sorted(found, key=lambda item: (item[0], item[1] == "end"))

    # Checkpoints.

    def boundary(self, visit: int) -> Path:
        """The checkpoint taken after a visit; 0 is before the first."""
        return self.checkpoints / f"boundary-{visit:02d}.pt"

    @property
    def stopped(self) -> Path:
        """The checkpoint of an interrupted visit."""
        return self.checkpoints / "stopped.pt"

    @property
    def has_checkpoint(self) -> bool:
        """Whether there is one to go on from."""
        return any(self.checkpoints.glob("*.pt"))

    def latest(self) -> Path:
        """The checkpoint to go on from."""
        if self.stopped.is_file():
            return self.stopped
        found = self._boundaries()
        if not found:
            raise CrlError(f"{self.typed}: there is no checkpoint here to go on from")
        return found[-1]

    def save(self, path: Path, state: State) -> None:
        """Write a checkpoint; after a boundary's, an interrupted visit's is of no use any more."""
        self._write(path, packed(state))
        if path != self.stopped:
            self.stopped.unlink(missing_ok=True)

    def keep(self, latest: int) -> None:
        """Drop the checkpoints of all boundaries but the latest few; 0 keeps all."""
        self.refuse_moved()
        found = self._boundaries()
        for path in found[:-latest] if latest else ():
            path.unlink()

    def load(self, path: Path, digest: str) -> State:
        """Read a checkpoint: tensors and plain values only, so none of its content is run."""
        if not path.is_file():
            have = ", ".join(p.stem for p in sorted(self.checkpoints.glob("*.pt"))) or "none"
            raise CrlError(f"{path}: no such checkpoint (here are: {have})")
        state, wrong = _checkpoint(path, digest)
        if wrong:
            raise CrlError(f"{path}: {wrong}{self._instead(path, digest)}")
        return state

    def _instead(self, damaged: Path, digest: str) -> str:
        """The last good checkpoint beside one that is damaged, and how to go on from it."""
        last = damaged == self.latest()
        for path in reversed(self._boundaries()):
            if path == damaged or _checkpoint(path, digest)[1]:
                continue
            how = f": without the damaged one, `crl resume {self.typed}` goes on from there" if last else ""
            return f"; the last good one is {path}{how}"
        return "; there is no other good one"

    def whole_log(self, digest: str) -> str:
        """Up to which checkpoint a damaged log is what was written, and how to go on from there."""
        data = content(self.records)
        for path in reversed(self._boundaries()):
            state, wrong = _checkpoint(path, digest)
            if not wrong and zlib.crc32(data[: state["offset"][0]]) == state["offset"][1]:
                without = "without the checkpoints after it"
                return f"; it is whole up to {path}: {without}, `crl resume {self.typed}` goes on from there"
        return "; it is whole up to no checkpoint"

    def _boundaries(self) -> list[Path]:
        """The checkpoints of all boundaries, in the order of the walk."""
        return sorted(self.checkpoints.glob("boundary-*.pt"), key=lambda path: (len(path.name), path.name))


def _checkpoint(path: Path, digest: str) -> tuple[State, str]:
    """What a checkpoint holds, and why it is of no use here, if it is of none."""
    try:
        state = unpacked(path)
    except Exception as error:  # what any bytes may lead to
        return {}, f"truncated, damaged, or not a checkpoint of crl ({brief(error)})"
    wrong = misfit(state)
    if not wrong and state["digest"] != digest:
        wrong = f"belongs to another config ({state['digest']}) than config.yaml here ({digest})"
    return ({}, wrong) if wrong else (dict(state), "")


def _spectrum(path: Path) -> Spectrum:
    """A spectrum, if it is one. The sums of all its arrays are checked, also of those that only others read."""
    with zipfile.ZipFile(path) as archive:
        large = sum(info.file_size for info in archive.infolist())
        if large > MOST:
            raise ValueError(f"it unpacks to {large:,} bytes; the most is {MOST:,}")
        wrong = archive.testzip()
        if wrong is not None:
            raise ValueError(f"the sum of {wrong} is wrong")
    found = Spectrum.load(path)
    values, weights = found.values, found.weights  # made of its blocks, each of which must be sound
    right = values.shape == weights.shape and values.size and bool(np.isfinite(values).all())
    if not right or type(found.size) is not int or found.size < 1 or not isinstance(found.settings.get("name"), str):
        raise ValueError("its values, weights, size or name are not those of a spectrum")
    return found


def _surroundings() -> dict[str, Any]:
    return {
        "versions": {"python": platform.python_version(), **_versions()},
        "git": _git(),
        "host": {"name": platform.node(), "system": platform.platform(), "cpus": os.cpu_count()},
        "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _versions() -> dict[str, str]:
    found = {}
    for name in ("crl", *PACKAGES):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _git() -> str:
    """The commit of the source that runs, marked where it was changed; empty when it is installed."""
    here = Path(__file__).resolve().parent
    try:
        run = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40"],
            cwd=here,
            capture_output=True,
            text=True,
            timeout=5,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return run.stdout.strip() if run.returncode == 0 else ""
