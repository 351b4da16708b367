"""Runs on disk: who may write, what is good enough to be saved, and what damage costs."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import re
import resource
import shutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from torch import nn

import crl
from crl import cli, disk
from crl.checkpoint import FIELDS, FORMAT
from crl.core import CrlError
from crl.correlate import correlate
from crl.linalg import Block, Spectrum
from crl.opened import Run
from crl.probe import probe
from crl.sinks import LARGE, TensorBoard
from crl.store import RunFolder
from tests.my_agent import MyAgent

ROOT = Path(__file__).resolve().parent.parent
TASKS = [{"env": "CartPole-v1", "name": name, "steps": 32} for name in ("a, b", 'c"d')]
CONFIG: dict[str, Any] = {
    "name": "small",
    "tasks": TASKS,
    "agent": {"use": "tests.my_agent.MyAgent"},
    "engine": {"envs": 2},
    "evaluation": {"episodes": 1},
    "monitors": [{"use": "hessian", "probes": 1, "steps": 3, "samples": 8}, "norms"],
}


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    return crl.train(CONFIG, out=tmp_path_factory.mktemp("done")).path


@pytest.fixture
def stopped(done: Path, tmp_path: Path) -> Path:
    """A copy that was killed after its first visit."""
    path = Path(shutil.copytree(done, tmp_path / "run"))
    (path / "checkpoints" / "boundary-02.pt").unlink()
    RunFolder(path).update_manifest(status="running", log=[])
    return path


def said(call: Callable[[], object]) -> str:
    """The one line that a call is refused with."""
    with pytest.raises(CrlError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def contents(path: Path) -> list[str]:
    """What must be the same in two runs: matrix, and records but for times."""
    records = [repr(r) for r in Run(path).records if not r.name.startswith("time/")]
    return [(path / "matrix.csv").read_text(encoding="utf-8"), *records]


# One process on one run.


@pytest.mark.parametrize("way", ["link", "link above", ".", "moved"])
def test_a_run_is_locked_whatever_it_is_called(stopped: Path, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    other = stopped
    if way == "link":
        other = stopped.with_name("link")
        other.symlink_to(stopped)
    elif way == "link above":
        (stopped.parent / "above").symlink_to(stopped.parent)
        other = stopped.parent / "above" / stopped.name
    elif way == ".":
        monkeypatch.chdir(stopped)
        other = Path()
    with RunFolder(stopped).taken():
        if way == "moved":
            other = stopped.rename(stopped.with_name("moved"))
        assert "another process is at work" in said(lambda: crl.resume(other))
    assert crl.resume(other).manifest["status"] == "finished"


class MovesAway(MyAgent):
    """In the middle of its run the run's folder is moved, and another run begins at its place."""

    place = Path()

    def update(self) -> Any:
        if not self.place.with_name("moved").exists() and (self.place / "matrix.csv").exists():
            self.place.rename(self.place.with_name("moved"))
            with RunFolder(self.place).taken():
                (self.place / "manifest.json").write_text("another's")
        return super().update()


def test_a_run_that_was_moved_does_not_write_into_the_one_at_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "small" / "MovesAway" / "seed-0"
    monkeypatch.setattr(MovesAway, "place", place)
    line = said(lambda: crl.train({**CONFIG, "agent": {"use": "tests.test_durable.MovesAway"}}, out=tmp_path))
    assert line.startswith(f"{place}: this run was moved or removed while it was at work; nothing more is written")
    assert sorted(path.name for path in place.iterdir()) == [".lock", "manifest.json"]
    assert (place / "manifest.json").read_text() == "another's"
    moved = place.with_name("moved")
    assert crl.resume(moved).manifest["status"] == "finished", "it can be gone on with where it lies"


def test_two_at_once_of_which_one_begins(tmp_path: Path) -> None:
    """The second is refused whether the first has written its manifest or not."""
    folder = RunFolder(tmp_path / "small" / "MyAgent" / "seed-0")
    with folder.taken():
        assert not folder.occupied
        assert "another process is at work" in said(lambda: crl.train(CONFIG, out=tmp_path))
    assert crl.train(CONFIG, out=tmp_path).manifest["status"] == "finished"


def test_a_start_that_was_cut_short_is_no_run(tmp_path: Path) -> None:
    path = tmp_path / "small" / "MyAgent" / "seed-0"
    with RunFolder(path).taken():
        (path / "config.yaml").write_text("name: half")
    assert crl.train(CONFIG, out=tmp_path).path == path
    (path / "manifest.json").unlink()
    assert "nothing there is overwritten" in said(lambda: crl.train(CONFIG, out=tmp_path, overwrite=True))


def test_half_written_files_of_the_dead_are_swept(stopped: Path) -> None:
    places = (
        ".manifest.json.7",
        "checkpoints/.boundary-02.pt.7",
        "spectra/.1-init-q.npz.7",
        "spectra/ggn/.1-init-q.npz.7",
    )
    for place in places:
        (stopped / place).parent.mkdir(exist_ok=True)
        (stopped / place).write_text("half")
    with RunFolder(stopped).taken():
        (stopped / ".matrix.csv.8").write_text("of the living")
        said(lambda: crl.resume(stopped))
        assert (stopped / ".matrix.csv.8").exists(), "who was refused sweeps nothing"
    crl.resume(stopped)
    assert not [path for path in stopped.rglob(".*") if path.name != ".lock"]


def test_the_folder_is_synced_after_a_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    replace, fsync = os.replace, os.fsync
    monkeypatch.setattr(disk.os, "replace", lambda *paths: (done.append("renamed"), replace(*paths)))
    kind = lambda number: "folder" if os.path.isdir(f"/proc/self/fd/{number}") else "file"  # noqa: E731
    monkeypatch.setattr(disk.os, "fsync", lambda number: (done.append(kind(number)), fsync(number)))
    disk.write_whole(tmp_path / "file", b"new")
    assert done == ["file", "renamed", "folder"]


# What is saved is good.


class Spoilt(gymnasium.Wrapper):  # type: ignore[type-arg]
    """Rewards or observations that are not finite from some step on."""

    def __init__(self, env: Any, reward: float = 0.0, observation: float = 0.0, after: int = 20) -> None:
        super().__init__(env)
        self.spoilt, self.left = (reward, observation), after

    def step(self, action: Any) -> Any:
        obs, reward, *rest = self.env.step(action)
        self.left -= 1
        late = self.left < 0
        return obs + np.float32(self.spoilt[1] if late else 0), reward + (self.spoilt[0] if late else 0), *rest


@pytest.mark.parametrize(("part", "value"), [("reward", math.nan), ("reward", -math.inf), ("observation", math.inf)])
def test_what_is_not_finite_is_refused_when_it_comes(tmp_path: Path, part: str, value: float) -> None:
    """DQN would keep it in its buffer, and fail in a later visit."""
    wrapper = {"use": "tests.test_durable.Spoilt", part: value, "after": 40}
    task = {"env": "CartPole-v1", "steps": 128, "wrappers": [wrapper]}
    agent = {"use": "dqn", "learning_starts": 500, "buffer_size": 1000}
    config = {**CONFIG, "tasks": [task, TASKS[0]], "agent": agent, "monitors": []}
    line = said(lambda: crl.train(config, out=tmp_path))
    assert f"{part} is not finite: visit 1 (CartPole-v1), step " in line
    assert "the last good checkpoint is" in line and "boundary-00.pt" in line
    (run,) = tmp_path.glob("*/*/seed-0")
    assert not (run / "checkpoints" / "boundary-01.pt").exists() and Run(run).manifest["status"] == "failed"


class Breaks(MyAgent):
    """Its weights are lost by the last update of the first visit, which no loss tells of."""

    def update(self) -> Any:
        self.count = getattr(self, "count", 0) + 1
        numbers = super().update()
        with torch.no_grad():
            if self.count == 16:
                next(self.nets()).fill_(math.nan)
        return numbers

    def nets(self) -> Any:
        return self.model.parameters()


class BreaksApart(Breaks):
    """The same in a network beside its model."""

    def __init__(self, *parts: Any, **options: Any) -> None:
        super().__init__(*parts, **options)
        self.beside = nn.Linear(2, 2)

    def nets(self) -> Any:
        return self.beside.parameters()


class Tabular:
    """An agent without modules, whose table is lost."""

    def __init__(self, interface: Any, seed: int, device: str) -> None:
        self.table, self.actions = torch.zeros(3), interface.action

    def act(self, obs: Any, carry: Any, greedy: bool) -> Any:
        return np.zeros(len(obs), dtype=np.int64), None, None

    def observe(self, experience: Any) -> None:
        self.table = self.table * math.nan

    def update(self) -> Any:
        return {}

    def state_dict(self) -> Any:
        return {"table": self.table}

    def load_state_dict(self, state: Any) -> None:
        self.table = state["table"]


@pytest.mark.parametrize(
    ("agent", "weight"),
    [(Breaks, "model.0.weight"), (BreaksApart, "beside.weight"), (Tabular, "agent.table")],
)
def test_broken_weights_are_not_saved(tmp_path: Path, agent: type, weight: str) -> None:
    use = f"tests.test_durable.{agent.__name__}"
    line = said(lambda: crl.train({**CONFIG, "agent": {"use": use}, "monitors": []}, out=tmp_path))
    assert f"{weight} is not finite any more: step 32" in line and "boundary-00.pt" in line
    (run,) = tmp_path.glob("*/*/seed-0")
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["boundary-00.pt"]


class Keeps(MyAgent):
    """Its state holds what no checkpoint can."""

    what: Any = None

    def state_dict(self) -> Any:
        return {**super().state_dict(), "memory": {"kept": [1, self.what]}}


class Own:
    """An object of one's own."""


@pytest.mark.parametrize(
    "what", [Own(), np.zeros(2), np.float64(1), threading.Lock()], ids=lambda what: type(what).__name__
)
def test_a_state_that_cannot_be_read_back_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: Any
) -> None:
    monkeypatch.setattr(Keeps, "what", what)
    line = said(lambda: crl.train({**CONFIG, "agent": {"use": "tests.test_durable.Keeps"}}, out=tmp_path))
    assert f"agent.memory.kept.1 is a {type(what).__name__}, which no checkpoint can hold" in line
    assert not list(tmp_path.rglob("*.pt"))


def test_the_first_checkpoint_is_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    load = RunFolder.load
    monkeypatch.setattr(
        RunFolder, "load", lambda self, path, digest: (read.append(path.name), load(self, path, digest))[1]
    )
    crl.train(CONFIG, out=tmp_path)
    assert read == ["boundary-00.pt"]


# Damage.


def test_a_flipped_byte_of_a_checkpoint_never_loads_as_something_else(done: Path, tmp_path: Path) -> None:
    """Each of 200 flips is refused in one line, or changes nothing that is read."""
    path = Path(shutil.copytree(done, tmp_path / "run"))
    folder, digest = RunFolder(path), Run(path).experiment.digest
    file = folder.boundary(1)
    good = file.read_bytes()
    torch.set_printoptions(profile="full")
    whole, chance, harmless = repr(folder.load(file, digest)), np.random.default_rng(0), 0
    for place in chance.integers(0, len(good), 200):
        damaged = bytearray(good)
        damaged[place] ^= 1 << int(chance.integers(8))
        file.write_bytes(bytes(damaged))
        try:
            harmless += repr(folder.load(file, digest)) == whole
        except CrlError as error:
            assert str(file) in str(error) and f"the last good one is {folder.boundary(2)}" in str(error)
        else:
            assert repr(folder.load(file, digest)) == whole
    torch.set_printoptions(profile="default")
    assert harmless < 100, "most bytes are weights"


def test_damage_names_the_last_good_checkpoint_and_how_to_go_on(stopped: Path, done: Path) -> None:
    last, before = (RunFolder(stopped).boundary(visit) for visit in (1, 0))
    data = bytearray(last.read_bytes())
    data[len(data) // 2] ^= 1
    last.write_bytes(bytes(data))
    line = said(lambda: crl.resume(stopped))
    assert f"the last good one is {before}: without the damaged one, `crl resume {stopped}` goes on from there" in line
    last.unlink()
    assert contents(crl.resume(stopped).path) == contents(done)


def test_a_packed_checkpoint_is_not_unpacked(stopped: Path) -> None:
    state = RunFolder(stopped).load(RunFolder(stopped).latest(), Run(stopped).experiment.digest)
    data = io.BytesIO()
    torch.save({**state, "bomb": torch.zeros(2**22)}, data)
    with (
        zipfile.ZipFile(data) as plain,
        zipfile.ZipFile(RunFolder(stopped).latest(), "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for name in plain.namelist():
            bomb.writestr(name, plain.read(name))
    assert RunFolder(stopped).latest().stat().st_size < 2**20
    assert "it unpacks from" in said(lambda: crl.resume(stopped))


def test_the_former_format_is_read(stopped: Path, done: Path) -> None:
    folder = RunFolder(stopped)
    for path in folder.checkpoints.iterdir():
        state = torch.load(path, weights_only=True)
        state.pop("crl")
        torch.save({**state, "format": FORMAT - 1, "offset": state["offset"][0]}, path)
    assert contents(crl.resume(stopped).path) == contents(done)


@pytest.mark.parametrize(("number", "by"), [(FORMAT + 1, "crl 9"), (3, "an earlier crl")])
def test_another_format_says_who_wrote_it(stopped: Path, number: int, by: str) -> None:
    path = RunFolder(stopped).latest()
    state = {**torch.load(path, weights_only=True), "format": number, "crl": "crl 9" if number > FORMAT else ""}
    torch.save(state, path)
    assert f"format {number}, written by {by}" in said(lambda: crl.resume(stopped))


@pytest.mark.parametrize("field", [*FIELDS, "format"])
def test_plain_fields_of_another_kind_cost_one_line(stopped: Path, field: str) -> None:
    """They are refused where they are of no use, by whichever command, which names the last good checkpoint."""
    path, before = RunFolder(stopped).latest(), RunFolder(stopped).boundary(0)
    good = torch.load(path, weights_only=True)
    for value in ("missing", None, 0.5, True, [[]], "text", [], 10**12, -1, {"a": 1}):
        state = {key: part for key, part in good.items() if key != field}
        torch.save(state if value == "missing" else {**state, field: value}, path)
        calls = (lambda: Run(stopped).at(), lambda: crl.resume(stopped), lambda: probe(stopped, 1, "end"))
        for call in calls[: 3 if value in ("missing", 10**12) else 1]:
            if value in ("missing", None, 0.5):  # of no field's kind
                line = said(call)
                assert str(path) in line and f"the last good one is {before}" in line
            else:
                with contextlib.suppress(CrlError):  # a few are as good as what was there; no traceback comes
                    call()
            RunFolder(stopped).update_manifest(status="running")


def test_a_config_that_was_changed_is_named(stopped: Path) -> None:
    file = stopped / "config.yaml"
    file.write_text(file.read_text() + "colour: red\n")
    for call in (lambda: crl.resume(stopped), lambda: probe(stopped, 1, "end"), lambda: Run(stopped).at()):
        line = said(call)
        assert line.startswith(f"{file}: ") and "colour" in line and line.count(str(file)) == 1


def test_what_is_called_good_could_be_gone_on_with(stopped: Path) -> None:
    """Not one whose sums are right, but which lacks a field, or is another run's."""
    folder = RunFolder(stopped)
    last, first = folder.boundary(1), folder.boundary(0)
    last.write_bytes(last.read_bytes()[:-100])
    good = torch.load(first, weights_only=True)
    for state in ({**good, "step": None}, {**good, "digest": "another"}):
        torch.save(state, first)
        assert "there is no other good one" in said(lambda: crl.resume(stopped))


def test_a_damaged_log_is_not_gone_on_with(stopped: Path, done: Path) -> None:
    """A flipped digit is still a record: only its sum tells."""
    log = stopped / "metrics.jsonl"
    text = log.read_text()
    place = re.search(r'"value": \d\.(\d)', text)
    assert place is not None
    log.write_text(text[: place.start(1)] + str((int(place[1]) + 1) % 10) + text[place.end(1) :])
    line = said(lambda: crl.resume(stopped))
    assert f"{log}: damaged" in line and "it is whole up to" in line
    shutil.copy(log, done.parent / "damaged.jsonl")
    copy = Path(shutil.copytree(done, stopped.with_name("copy")))
    shutil.copy(log, copy)
    assert "metrics.jsonl: damaged" in said(lambda: Run(copy).records)


def test_a_damaged_log_is_gone_on_with_from_where_it_is_whole(stopped: Path, done: Path) -> None:
    """The first visit's records are damaged; the boundary before it is not."""
    folder = RunFolder(stopped)
    offset = torch.load(folder.boundary(0), weights_only=True)["offset"][0]
    data = bytearray(folder.records.read_bytes())
    place = offset + data[offset:].index(b'"step": ') + 8
    data[place] = ord("1") if data[place] != ord("1") else ord("2")
    folder.records.write_bytes(data)
    line = said(lambda: crl.resume(stopped))
    assert f"it is whole up to {folder.boundary(0)}: without the checkpoints after it, `crl resume {stopped}`" in line
    for path in set(folder.checkpoints.iterdir()) - {folder.boundary(0)}:
        path.unlink()
    assert contents(crl.resume(stopped).path) == contents(done)


FILES = {
    "manifest.json": [
        b"",
        b"{",
        b"[]",
        b'{"status": 5}',
        b'{"status": "finished", "visits": [3]}',
        b"[" * 10**5,
        b"\xff",
    ],
    "matrix.csv": [
        b"",
        b"visit",
        b"visit,a\n0,x\n",
        b"visit,a\n0\n",
        b"\xff",
        b"visit,a\n7,1.0\n",
        b"visit,a\n0,1.0\n",
    ],
    "metrics.jsonl": [b"\xff\n", b"{\n", b"[" * 10**5 + b"\n", b'{"name": 1}\n', b""],
    "spectra/1-init-model.npz": [b"", b"PK", b"\xff"],
}


@pytest.mark.parametrize("name", FILES)
def test_damaged_files_cost_one_line(done: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    for number, data in enumerate(FILES[name]):
        path = Path(shutil.copytree(done, tmp_path / str(number)))
        RunFolder(path).write_spectrum(1, "init", "hessian/model", Spectrum((Block(1, np.ones(1)),), {}))
        file = path / name
        file.write_bytes(data)
        calls: dict[str, Callable[[], object]] = {
            "load": lambda path=path: (crl.load(path).matrix, crl.load(path).records),  # type: ignore[misc]
            "probe": lambda path=path: probe(path, 1),  # type: ignore[misc]
            "resume": lambda path=path: crl.resume(path),  # type: ignore[misc]
            "correlate": lambda path=path: correlate(path, out=tmp_path / "out", resamples=100),  # type: ignore[misc]
            "spectra": lambda path=path: RunFolder(path).read_spectra(),  # type: ignore[misc]
        }
        lines = []
        for call in calls.values():
            try:
                call()
            except CrlError as error:
                lines.append(str(error))
        assert any(file.name in line and "damaged" in line for line in lines), (name, data, lines)
        assert not any("\n" in line for line in lines)
        assert cli.main(["eval", str(path)]) in (0, 2)
        assert "Traceback" not in capsys.readouterr().err


def test_a_manifest_that_was_lost_is_written_anew(stopped: Path, done: Path) -> None:
    (stopped / "manifest.json").write_text("{")
    assert '{"status": "interrupted"}' in said(lambda: crl.resume(stopped))
    (stopped / "manifest.json").write_text('{"status": "interrupted"}')
    resumed = crl.resume(stopped)
    assert resumed.manifest["visits"] == Run(done).manifest["visits"] and contents(stopped) == contents(done)


def test_a_kill_around_the_matrix_is_no_damage(done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The manifest has the sum before the matrix is there, and the sum of the one that still is."""
    path = Path(shutil.copytree(done, tmp_path / "run"))
    folder = RunFolder(path)
    tasks, rows = folder.read_matrix()
    for _ in range(2):
        with monkeypatch.context() as patch:
            patch.setattr(
                "crl.store.write_whole", lambda file, data: file.name == "matrix.csv" or disk.write_whole(file, data)
            )
            folder.write_matrix(tasks, [*rows, [7.0, 8.0]])
        assert folder.read_matrix() == (tasks, rows)
    folder.write_matrix(tasks, [*rows, [7.0, 8.0]])
    assert folder.read_matrix()[1][-1] == [7.0, 8.0]
    text = (path / "matrix.csv").read_text()
    (path / "matrix.csv").write_text(text.replace("7.0", "9.0"))
    assert "it is not what was written" in said(folder.read_matrix)


# Names.


def test_names_of_any_kind_come_back_from_the_matrix(tmp_path: Path) -> None:
    tasks = ["a,b", 'c"d', "e\nf", "g\rh", "Straße 走", " ", "'"]
    folder = RunFolder(tmp_path)
    folder.write_matrix(tasks, [[0.5] * len(tasks)])
    assert folder.read_matrix() == (tasks, [[0.5] * len(tasks)])


def test_spectra_of_like_names_are_files_of_their_own(tmp_path: Path) -> None:
    folder, names = RunFolder(tmp_path), ["a b", "a/b", "a-b", "a%20b", "é", "x" * 240, "x" * 241, ".."]
    for value, name in enumerate(names):
        folder.write_spectrum(1, "init", f"hessian/{name}", Spectrum((Block(1, np.full(1, float(value))),), {}))
    found = {each.settings["name"]: each.values[0, 0] for _, _, each in folder.read_spectra()}
    assert found == {f"hessian/{name}": value for value, name in enumerate(names)}
    assert folder.spectrum(1, "init", "hessian/actor").name == "1-init-actor.npz"


def test_a_bomb_among_spectra_is_not_unpacked(tmp_path: Path) -> None:
    (tmp_path / "spectra").mkdir()
    path = tmp_path / "spectra" / "1-init-q.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as bomb, bomb.open("v.npy", "w", force_zip64=True) as file:
        for _ in range(17):
            file.write(bytes(2**24))
    assert "it unpacks to" in said(RunFolder(tmp_path).read_spectra)


def test_a_flip_in_an_array_that_is_seldom_read_is_found(tmp_path: Path) -> None:
    """A spectrum holds its values twice: as blocks, which are read, and as plain arrays for others."""
    folder = RunFolder(tmp_path)
    folder.write_spectrum(1, "init", "hessian/actor", Spectrum((Block(1, np.arange(9.0)),), {}))
    path = folder.spectrum(1, "init", "hessian/actor")
    folder.read_spectra()
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo("values.npy")
    data = bytearray(path.read_bytes())
    data[info.header_offset + 30 + len(info.filename) + 150] ^= 1
    path.write_bytes(bytes(data))
    assert f"{path}: damaged" in said(folder.read_spectra)


def test_ascii_stdout(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True)
    monkeypatch.setattr("sys.stdout", out)
    monkeypatch.setattr(cli, "_check", lambda arguments: print("–") or 0)
    assert cli.main(["check", "x"]) == 0 and out.buffer.getvalue() == b"?\n"  # type: ignore[attr-defined]


# A full disk.


class Large(MyAgent):
    """Its checkpoints are larger than anything else."""

    def state_dict(self) -> Any:
        return {**super().state_dict(), "large": torch.zeros(2**16)}


LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), int(sys.argv[1])))
from crl.cli import main
sys.exit(main(sys.argv[2:]))
"""


def test_a_view_that_cannot_be_written_costs_one_line(tmp_path: Path) -> None:
    """A limit on the size of files stands in for a full disk. TensorBoard writes in a thread of its own."""
    (tmp_path / "c.yaml").write_text(json.dumps({**CONFIG, "monitors": []}))
    argv = ["40000", "train", "--env-seq", str(tmp_path / "c.yaml"), "--out", str(tmp_path), "-q"]
    found = subprocess.run(
        [sys.executable, "-c", LIMITED, *argv], capture_output=True, text=True, cwd=ROOT, check=False
    )
    run = tmp_path / "small" / "MyAgent" / "seed-0"
    assert found.returncode == 2 and len(found.stderr.splitlines()) == 1, found.stderr
    line = f"{run / 'tb'}: cannot be written: File too large; make room, and go on with: crl resume {run}"
    assert line in found.stderr and Run(run).manifest["status"] == "failed"


def test_a_checkpoint_that_cannot_be_written_leaves_no_half(tmp_path: Path) -> None:
    run = tmp_path / "small" / "Large" / "seed-0"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, before[1]))
    try:
        config = {**CONFIG, "monitors": [], "agent": {"use": "tests.test_durable.Large"}}
        line = said(lambda: crl.train(config, out=tmp_path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    file = run / "checkpoints" / "boundary-00.pt"
    assert line == f"{file}: cannot be written: File too large; make room, and go on with: crl resume {run}"
    assert Run(run).manifest["status"] == "failed" and not list(file.parent.iterdir())


def test_a_manifest_says_failed_where_nothing_can_be_written(done: Path, tmp_path: Path, monkeypatch: Any) -> None:
    path = Path(shutil.copytree(done, tmp_path / "run"))
    RunFolder(path).update_manifest(status="running")

    def full(path: Path, data: bytes) -> None:
        raise disk.Unwritten("no space")

    size = (path / "manifest.json").stat().st_size
    monkeypatch.setattr("crl.store.write_whole", full)
    RunFolder(path).fail()
    assert RunFolder(path).manifest()["status"] == "failed" and (path / "manifest.json").stat().st_size == size


# Pictures.


def test_pictures_at_boundaries_stay_few_and_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over 300 visits: no more pictures than over 24, and none with more lines."""
    visits, lines, drawn = 300, [], []
    blank = np.zeros((2, 2, 3), np.uint8)
    monkeypatch.setattr("crl.sinks.draw_spectra", lambda seen, title: lines.append(len(seen)))
    monkeypatch.setattr("crl.sinks.draw_matrix", lambda rows, *rest: drawn.append(len(rows)))
    monkeypatch.setattr("crl.sinks.pixels", lambda figure: blank)
    board = TensorBoard(tmp_path, ["a", "b"], visits=visits)
    rows = [[0.0, 1.0]]
    for visit in range(1, visits + 1):
        for phase in ("init", "end"):
            spectrum = Spectrum((Block(1, np.ones(1)),), {})
            board.spectrum(visit, phase, "hessian/q", spectrum)
        rows.append([0.0, 1.0])
        board.matrix(visit, rows, ["x"] * len(rows), ["a", "b"], [0] * visit)
    board.close()
    assert 20 <= len(lines) <= 2 * LARGE + 2 and max(lines) <= LARGE + 1
    assert 20 <= len(drawn) <= LARGE + 1 and drawn[-1] == visits + 1, "the last is among them"


def test_a_walk_of_few_visits_has_every_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []
    monkeypatch.setattr("crl.sinks.draw_matrix", lambda rows, *rest: drawn.append(len(rows)))
    monkeypatch.setattr("crl.sinks.pixels", lambda figure: np.zeros((2, 2, 3), np.uint8))
    board = TensorBoard(tmp_path, ["a"], visits=5)
    for count in range(1, 7):
        board.matrix(count, [[0.0]] * count, ["x"] * count, ["a"], [0] * (count - 1))
    board.close()
    assert drawn == [1, 2, 3, 4, 5, 6]
