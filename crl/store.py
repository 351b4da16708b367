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
import importlib.metadata
import io
import json
import os
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml

from crl.core import CrlError, State, brief
from crl.linalg import Spectrum

FORMAT = 4
PACKAGES = ("torch", "stable_baselines3", "sb3_contrib", "gymnasium", "minigrid", "numpy", "tensorboard")


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that a reader, or a crash, sees the old one or the new one and nothing between."""
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_name(f".{path.name}.{os.getpid()}")
    with open(half, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(half, path)


class RunFolder:
    """The folder of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records = path / "metrics.jsonl"
        self.tensorboard = path / "tb"
        self.checkpoints = path / "checkpoints"

    @property
    def occupied(self) -> bool:
        """Whether there is anything in it."""
        return self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir()))

    def create(self, config: dict[str, Any], manifest: dict[str, Any], *, overwrite: bool) -> None:
        """Begin a run here, unless one is here already."""
        if self.occupied:
            if not overwrite:
                raise CrlError(
                    f"{self.path} holds a run already: `crl resume {self.path}` goes on with it, --overwrite drops it"
                )
            self.drop()
        new = RunFolder(self.path.with_name(f".{self.path.name}.{os.getpid()}"))
        shutil.rmtree(new.path, ignore_errors=True)
        text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
        write_whole(new.path / "config.yaml", text.encode())
        new.write_manifest({**manifest, **_surroundings()})
        new.path.replace(self.path)

    def drop(self) -> None:
        """Remove the run that is here, and never anything else."""
        if self.occupied:
            if not (self.path / "manifest.json").is_file():
                raise CrlError(f"{self.path} is not empty and not a run of crl: nothing there is overwritten")
            shutil.rmtree(self.path)

    @contextlib.contextmanager
    def taken(self) -> Iterator[None]:
        """Work on this run alone; who comes second is refused. The lock is the system's, and ends with its process."""
        lock = self.path.with_name(f".{self.path.name}.lock")
        lock.parent.mkdir(parents=True, exist_ok=True)
        with lock.open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                alone = os.path.samestat(os.fstat(file.fileno()), lock.stat())
            except (BlockingIOError, FileNotFoundError):
                alone = False
            if not alone:  # another has the lock, or just gave it back
                raise CrlError(f"{self.path}: another process is at work on this run")
            try:
                yield
            finally:
                lock.unlink(missing_ok=True)

    # The manifest.

    def manifest(self) -> dict[str, Any]:
        """What the run says of itself."""
        try:
            data: dict[str, Any] = json.loads((self.path / "manifest.json").read_text())
        except (FileNotFoundError, NotADirectoryError):
            raise CrlError(f"{self.path}: no run is here (there is no manifest.json)") from None
        except (json.JSONDecodeError, UnicodeDecodeError, OSError) as error:
            raise CrlError(f"{self.path / 'manifest.json'}: cannot be read: {error}") from None
        if not isinstance(data, dict) or "status" not in data:
            raise CrlError(f"{self.path / 'manifest.json'}: not the manifest of a run")
        return data

    def write_manifest(self, data: dict[str, Any]) -> None:
        """Replace the manifest."""
        write_whole(self.path / "manifest.json", (json.dumps(data, indent=2) + "\n").encode())

    def update_manifest(self, **changes: Any) -> None:
        """Replace some of the manifest's entries."""
        self.write_manifest({**self.manifest(), **changes})

    # The matrix.

    def write_matrix(self, tasks: list[str], rows: list[list[float]]) -> None:
        """R as a table: first column the visit, then a column a task."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["visit", *tasks])
        for visit, row in enumerate(rows):
            writer.writerow([visit, *(repr(float(value)) for value in row)])
        write_whole(self.path / "matrix.csv", text.getvalue().encode())

    def read_matrix(self) -> tuple[list[str], list[list[float]]]:
        """(tasks, rows) as written."""
        with open(self.path / "matrix.csv", newline="") as file:
            head, *rows = list(csv.reader(file))
        return head[1:], [[float(cell) for cell in row[1:]] for row in rows]

    # Spectra.

    def spectrum(self, visit: int, phase: str, name: str) -> Path:
        """Where a monitor's spectrum lies: the Hessian's in `spectra/`, other operators' in a folder of their own."""
        monitor, _, network = name.partition("/")
        folder = self.path / "spectra" / ("" if monitor == "hessian" else monitor)
        safe = re.sub(r"[^-+.=\w]", "-", network)
        return folder / f"{visit}-{phase}-{safe}.npz"

    def write_spectrum(self, visit: int, phase: str, name: str, spectrum: Spectrum) -> None:
        """Write the Ritz values, weights and settings of a spectrum."""
        path = self.spectrum(visit, phase, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, replace(spectrum, settings={**spectrum.settings, "name": name}).packed())

    def read_spectra(self) -> list[tuple[int, str, Spectrum]]:
        """(visit, phase, spectrum) of every file, in the order of the walk; a spectrum's settings hold its name."""
        found = []
        for path in (self.path / "spectra").rglob("*.npz"):
            try:
                visit, phase, _ = path.name.split("-", 2)
                found.append((int(visit), phase, Spectrum.load(path)))
            except Exception as error:  # what any bytes may lead to
                raise CrlError(f"{path}: not a spectrum of crl: {brief(error)}") from None
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
        found = sorted(self.checkpoints.glob("boundary-*.pt"), key=lambda path: (len(path.name), path.name))
        if not found:
            raise CrlError(f"{self.path}: there is no checkpoint here to go on from")
        return found[-1]

    def save(self, path: Path, state: State) -> None:
        """Write a checkpoint; after a boundary's, an interrupted visit's is of no use any more."""
        buffer = io.BytesIO()
        torch.save({"format": FORMAT, **state}, buffer)
        write_whole(path, buffer.getvalue())
        if path != self.stopped:
            self.stopped.unlink(missing_ok=True)

    def keep(self, latest: int) -> None:
        """Drop the checkpoints of all boundaries but the latest few; 0 keeps all."""
        found = sorted(self.checkpoints.glob("boundary-*.pt"), key=lambda path: (len(path.name), path.name))
        for path in found[:-latest] if latest else ():
            path.unlink()

    def load(self, path: Path, digest: str) -> State:
        """Read a checkpoint: tensors and plain values only, so none of its content is run."""
        if not path.is_file():
            have = ", ".join(p.stem for p in sorted(self.checkpoints.glob("*.pt"))) or "none"
            raise CrlError(f"{path}: no such checkpoint (here are: {have})")
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # what any bytes may lead to
            raise CrlError(f"{path}: truncated, or not a checkpoint of crl") from error
        if not isinstance(state, dict) or state.get("format") != FORMAT:
            raise CrlError(f"{path}: not a checkpoint of crl, or of another version of it")
        if state.get("digest") != digest:
            raise CrlError(
                f"{path}: belongs to another config ({state.get('digest')}) than config.yaml here ({digest})"
            )
        return state


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
