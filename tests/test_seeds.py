"""Several seeds at once: each is the run that it would be alone, and none is lost or left behind."""

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml

import crl
from crl import stats
from crl.bars import Bars, Progress
from crl.cli import main
from crl.config import read
from crl.core import CrlError
from crl.pictures import number
from crl.seeds import Seeds, child
from crl.stats import iqm
from crl.store import RunFolder
from tests.marks import SLOW
from tests.test_resume import remembered

ROOT = Path(__file__).resolve().parent.parent


def config(where: Path, steps: int = 128, **agent: Any) -> Path:
    tasks = [{"env": "CartPole-v1", "steps": steps, "name": "one"},
             {"env": "CartPole-v1", "steps": steps, "name": "two", "wrappers": ["permute_observation"]}]  # fmt: skip
    data = {
        "name": "walk",
        "seed": 100,
        "tasks": tasks,
        "engine": {"envs": 2},
        "agent": {"use": "ppo", "n_steps": 16, "batch_size": 16, "n_epochs": 1, "net": {"hidden": [4]}, **agent},
        "monitors": ["norms"],
        "evaluation": {"episodes": 1},
    }
    path = where / "walk.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Seeds]:
    folder = tmp_path_factory.mktemp("seeds")
    path = config(folder)
    return path, folder, crl.train_seeds(path, 2, jobs=2, out=folder / "runs")


def test_each_is_the_run_that_it_would_be_alone(several: tuple[Path, Path, Seeds]) -> None:
    path, folder, seeds = several
    assert [*seeds.runs] == [100, 101] and not seeds.failed
    alone = crl.train(path, out=folder / "alone", seed=101)
    assert remembered(seeds.runs[101]) == remembered(alone)
    assert remembered(seeds.runs[100]) != remembered(alone)


def test_finished_seeds_are_counted_and_another_config_is_refused(
    several: tuple[Path, Path, Seeds], capsys: pytest.CaptureFixture[str]
) -> None:
    path, folder, seeds = several
    command = ["train", "--env-seq", str(path), "--seeds", "2", "--out", str(folder / "runs")]
    before = [run.path.joinpath("metrics.jsonl").stat().st_mtime_ns for run in seeds.runs.values()]
    assert main(command) == 0
    assert [run.path.joinpath("metrics.jsonl").stat().st_mtime_ns for run in seeds.runs.values()] == before
    said = capsys.readouterr().out.splitlines()
    assert said[:-1] == seeds.table().splitlines()[:-1] and "2 seeds (100, 101) in " in said[-1]
    rows = {line.split("  ")[0]: line.split() for line in said if line}
    mean = sum(run.matrix[-1].mean() for run in seeds.runs.values()) / 2
    assert float(rows["average_performance"][1]) == pytest.approx(mean, abs=0.06)
    assert {"forgetting", "backward_transfer", "at the end: one", "at the end: two"} <= set(rows)
    assert rows["forgetting"][-2:] == ["–", "2"], "two seeds have no middle half"
    assert main([*command, "--set", "tasks.1.steps=999"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and "tasks.1.steps is 128 there and 999 here" in said[0] and "--overwrite" in said[0]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--seeds", "0"], "seeds: 0 is too small"),
        (["--jobs", "2"], "needs --seeds"),
        (["--seeds", "2", "--agent", "pop"], "unknown 'pop'"),
        (["--seeds", "2", "--seed", str(2**32 - 1)], "too large"),
    ],
)
def test_a_mistake_costs_one_line_and_begins_nothing(
    more: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--env-seq", str(config(tmp_path)), "--out", str(tmp_path / "runs"), *more]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and words in said[0] and not (tmp_path / "runs").exists()


@SLOW
def test_a_seed_that_fails_takes_no_other_with_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = config(tmp_path, use="tests.slow_agent.Slow", folder=str(tmp_path), fails=101, dies=102)
    out = tmp_path / "runs"
    assert main(["train", "--env-seq", str(path), "--seeds", "3", "--jobs", "3", "--out", str(out)]) == 2
    said = capsys.readouterr()
    failed = [line for line in said.err.splitlines() if line.startswith("crl: ")]
    assert len(failed) == 2 and "seed 102 failed: killed by SIGKILL" in failed[1]
    assert "seed 101 failed: " in failed[0] and "RuntimeError: something broke" in failed[0]
    assert "1 seed (100) in " in said.out
    rest = out / "walk" / "Slow" / "seed-101" / "error.log"
    assert str(rest) in failed[0] and "Traceback" in rest.read_text()
    there = sorted(path.name for path in rest.parents[1].glob("[!.]*"))  # a kill leaves the lock's file, not the lock
    assert there == ["seed-100", "seed-101", "seed-102"]


def test_what_another_did_meanwhile_is_neither_dropped_nor_done_again(
    several: tuple[Path, Path, Seeds], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, folder, seeds = several
    monkeypatch.setattr("crl.seeds._heed", lambda: None)
    there = seeds.runs[101].path
    before = {file: file.stat().st_mtime_ns for file in there.rglob("*") if file.is_file()}
    same = read(path, [("seed", 101)])
    for experiment, words in ((read(path, [("seed", 101), ("agent.n_steps", 32)]), "another config"), (same, "")):
        job = {"out": str(folder / "runs"), "config": yaml.safe_dump(experiment.plain())}
        with pytest.raises(SystemExit, match=words) if words else contextlib.nullcontext():
            child(job)
    assert {file: file.stat().st_mtime_ns for file in there.rglob("*") if file.is_file()} == before


def test_seeds_that_somebody_walks_are_not_dropped(several: tuple[Path, Path, Seeds]) -> None:
    path, folder, seeds = several
    with RunFolder(seeds.runs[101].path).taken(), pytest.raises(CrlError, match="another process is at work"):
        crl.train_seeds(path, 2, out=folder / "runs", overwrite=True)
    assert all(run.path.exists() for run in seeds.runs.values()), "the first one's was free"


# Stopped.


def gone(number: int) -> bool:
    """Whether a process has ended: it may still be there for an init that collects it late."""
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def until(holds: Any, seconds: float = 60) -> bool:
    end = time.monotonic() + seconds
    while not holds() and time.monotonic() < end:
        time.sleep(0.05)
    return bool(holds())


def begun(path: Path, out: Path) -> tuple[subprocess.Popen[str], list[int]]:
    """Three seeds in a process of its own, two of them at once: the parent, and the children that walk."""
    command = [
        sys.executable,
        "-m",
        "crl",
        "train",
        "--env-seq",
        str(path),
        "--seeds",
        "3",
        "--jobs",
        "2",
        "--out",
        str(out),
    ]
    parent = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    files = [path.parent / f"{seed}.pid" for seed in (100, 101)]
    if not until(lambda: all(file.exists() and file.read_text() for file in files), 120):
        there = [path.name for path in path.parent.iterdir()]
        pytest.fail(f"after two minutes there are {there}; in the end {parent.communicate()}")
    return parent, [int(file.read_text()) for file in files]


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="whether a process has ended is read from /proc")
@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGKILL, marks=SLOW)])
def test_stopped_or_left_alone_they_stop_with_checkpoints_and_go_on(number: int, tmp_path: Path) -> None:
    path = config(tmp_path, steps=4_000, use="tests.slow_agent.Slow", folder=str(tmp_path), seconds=0.005)
    parent, children = begun(path, tmp_path / "runs")
    os.kill(parent.pid, number)
    _, said = parent.communicate(timeout=60)
    assert parent.returncode == (2 if number == signal.SIGTERM else -number), said
    assert until(lambda: all(map(gone, children)))
    folders = [RunFolder(tmp_path / "runs" / "walk" / "Slow" / f"seed-{seed}") for seed in (100, 101, 102)]
    assert [folder.manifest()["status"] for folder in folders[:2]] == ["interrupted"] * 2 and folders[
        0
    ].stopped.exists()
    assert not folders[2].path.exists()
    if number == signal.SIGTERM:
        assert "stopped by SIGTERM, 0 of 3 runs are finished; go on with the same command" in said.splitlines()[-1]
        return
    seeds = crl.train_seeds(path, 1, out=tmp_path / "runs")
    assert not seeds.failed and remembered(seeds.runs[100]) == remembered(crl.train(path, out=tmp_path))


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="whether a process has ended is read from /proc")
@SLOW
def test_asked_twice_they_stop_at_once(tmp_path: Path) -> None:
    path = config(tmp_path, use="tests.slow_agent.Slow", folder=str(tmp_path), seconds=300)
    parent, children = begun(path, tmp_path / "runs")
    assert parent.stderr is not None
    os.kill(parent.pid, signal.SIGINT)
    assert "SIGINT: stopping at the next safe point" in parent.stderr.readline()
    os.kill(parent.pid, signal.SIGINT)
    _, said = parent.communicate(timeout=20)
    assert parent.returncode == 130 and "stopped at once" in said and all(map(gone, children))


# As they are watched.


class Tty(io.StringIO):
    def isatty(self) -> bool:
        return True


def log(folder: Path, *records: tuple[str, float, int, str, str]) -> None:
    with (folder / "metrics.jsonl").open("a") as file:
        for name, value, visit, task, phase in records:
            record = {"name": name, "value": value, "step": 50 * visit, "visit": visit, "task": task, "phase": phase}
            file.write(json.dumps(record) + "\n")


def test_a_bar_is_read_from_the_log_that_another_process_writes(tmp_path: Path) -> None:
    progress = Progress(tmp_path)
    assert progress.read() == [] and progress.line("seed 7", 79) == "seed 7  begins"
    visits = [{"task": "one", "steps": 50}] * 4
    RunFolder(tmp_path).write_manifest({"status": "new", "measure": "return", "visits": visits})
    log(tmp_path, ("train/return", 0.5, 1, "one", ""), ("time/steps_per_second", 3210.0, 1, "one", ""),
        ("walk/visit", 1.0, 1, "one", ""), ("eval/return", 0.25, 1, "one", "end"),
        ("metrics/average_performance", 0.25, 1, "", ""))  # fmt: skip
    assert progress.read() == ["after 1/4 | *one 0.25"] and progress.read() == []
    line = progress.line("seed 7", 79)
    assert line.startswith("seed 7  1/4 one 25% ━") and line.endswith("50 steps   3,210 steps/s   return 0.50")
    assert len(line) <= 79 and len(progress.line("seed 7", 30)) <= 30
    (tmp_path / "metrics.jsonl").write_text("")  # cut back, as a resume does
    assert progress.read() == []
    log(tmp_path, ("walk/visit", 2.0, 2, "two", ""))
    assert progress.read() == [] and "2/4 two 50%" in progress.line("seed 7", 79)


def test_bars_are_drawn_over_and_what_is_said_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("LINES", "4")
    stream = Tty()
    bars = Bars(stream)
    bars.draw(["a", "b"])
    bars.draw(["a", "b"])
    bars.note("said")
    bars.draw(["a", "c"])
    bars.draw(["a", "b", "c", "d"], ["few"])
    bars.close()
    assert stream.getvalue() == (
        "a\x1b[K\nb\x1b[K\n\x1b[J\x1b[2A\rsaid\x1b[K\na\x1b[K\nc\x1b[K\n\x1b[J\x1b[2A\rfew\x1b[K\n\x1b[J\x1b[1A\r\x1b[J"
    )
    plain = Bars(elsewhere := io.StringIO())
    plain.note("said")
    plain.draw(["a"])
    assert elsewhere.getvalue() == "said\n"


def test_the_table_has_both_means_with_intervals_and_says_what_those_hold() -> None:
    rows = np.random.default_rng(0).uniform(size=(5, 3, 2))
    made = {seed: SimpleNamespace(tasks=["one", "two"], matrix=rows[seed], manifest={"visits": [{"task": "one"},
            {"task": "two"}]}, path=Path("runs/walk") / str(seed)) for seed in range(5)}  # fmt: skip
    said = Seeds(made, {}, 1.0).table().splitlines()  # type: ignore[arg-type]
    cells = {cells[0]: cells for line in said if len(cells := re.split(r"\s{2,}", line.strip())) == 6}
    mean = stats.interval(rows[:, -1].mean(axis=1))
    assert cells["average_performance"][1:3] == [number(mean.mean), f"[{number(mean.low)}, {number(mean.high)}]"]
    middle = stats.iqm_interval(rows[:, -1, 1], np.random.default_rng(0))
    assert cells["at the end: two"][3:] == [number(middle.mean), f"[{number(middle.low)}, {number(middle.high)}]", "5"]
    all_tasks = stats.iqm_interval(rows[:, -1], np.random.default_rng(0))
    assert cells["at the end: all tasks"][3] == number(all_tasks.mean) == number(stats.iqm(rows[:, -1]))
    assert cells["at the end: all tasks"][1:3] == cells["average_performance"][1:3]
    assert stats.caption(5, middle=True) in said
    few = Seeds({0: made[0]}, {}, 1.0).table()  # type: ignore[dict-item]
    assert "[" not in few and "simulated" not in few


def test_the_interquartile_mean_leaves_out_a_quarter_on_each_side() -> None:
    assert iqm([9.0, 1.0, 2.0, 3.0, -50.0]) == 2.0 and iqm([1.0, 3.0]) == 2.0
