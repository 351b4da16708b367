"""Stopped or killed, then resumed: the same records, matrix and weights as a run that was never stopped."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import crl
from agents.sb3 import SB3Agent
from crl.core import CrlError
from crl.opened import Run
from crl.store import RunFolder
from envs.images import ImageTask
from tests.marks import SLOW, quickly

ROOT = Path(__file__).resolve().parent.parent
# Budgets and intervals that do not divide each other, so that a counter left out of a checkpoint shows.
TASKS = [
    {"env": "CartPole-v1", "steps": 600},
    {"env": "CartPole-v1", "steps": 1200, "name": "pole", "change": {"gravity": [20.0, 5.0]}},
    {"env": "Acrobot-v1", "steps": 600, "kwargs": {"max_episode_steps": 90}},
]
AGENTS: dict[str, dict[str, Any]] = {
    "ppo": {
        "use": "ppo",
        "n_steps": 70,
        "batch_size": 70,
        "n_epochs": 2,
        "normalize": {"observation": True, "reward": True},
    },
    "custom": {"use": "tests.full_agent.FullAgent"},
    "dqn": {"use": "dqn", "learning_starts": 150, "target_update_interval": 250, "train_freq": 7, "buffer_size": 1500},
}
PAUSE = (
    "import sys, time, envs.gym as g; old = g.GymTask.train; g.TICK = 400\n"
    "def slow(self, agent, visit):\n"
    "    for tick in old(self, agent, visit):\n"
    "        if visit.index == {visit} and 420 < tick.steps < visit.steps:\n"
    "            print('middle', flush=True); time.sleep({seconds})\n"
    "        yield tick\n"
    "g.GymTask.train = slow\n"
    "from crl.cli import main; sys.exit(main(sys.argv[1:]))"
)


METHODS: dict[str, list[Any]] = {  # of every kind that remembers; intervals that do not divide a tick
    "custom": [{"use": "redo", "every": 7}, "l2_init", {"use": "replay", "batch": 16, "size": 90, "every": 3}],
    "ppo": [
        {"use": "l2_er", "every": 3, "samples": 40},
        {"use": "redo", "every": 7},
        {"use": "clone", "batch": 16, "size": 90},
        {"use": "ewc", "samples": 8},
    ],
    "dqn": [
        {"use": "cbp", "rate": 0.01, "maturity": 5},
        "si",
        "lwf",
        {"use": "agem", "batch": 16, "size": 90, "every": 3},
    ],
}
REMEMBER = ["norms", "weight_rank", "drift", "policy_drift"]  # the monitors that have a state


def config(agent: str, folder: Path) -> Path:
    data = {
        "name": "walk",
        "tasks": TASKS,
        "agent": AGENTS[agent],
        "engine": {"envs": 3},
        "evaluation": {"episodes": 3, "every": 1000},
        "boundary": {"head": "per_task"},
        "methods": METHODS[agent],
        "monitors": [*REMEMBER, {"use": "hessian", "of": "all", "probes": 1, "steps": 5, "samples": 24}],
    }
    path = folder / "walk.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


def remembered(run: Run) -> tuple[Any, ...]:
    """All that must be equal: records but for times, matrix, and every tensor of the last checkpoint."""
    records = [repr(record) for record in run.records if not record.name.startswith("time/")]
    folder = RunFolder(run.path)
    state = folder.load(folder.latest(), run.experiment.digest)
    return (
        records,
        (run.path / "matrix.csv").read_bytes(),
        repr(fingerprint({**state, "offset": 0})),
    )  # repr: NaN is NaN


def fingerprint(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.dtype, value.tolist() if value.isfinite().all() else repr(value)
    if isinstance(value, dict):
        return {key: fingerprint(item) for key, item in value.items()}
    return [fingerprint(item) for item in value] if isinstance(value, list | tuple) else value


def interrupted(path: Path, out: Path, number: int, visit: int = 2) -> str:
    """Start the walk in a process of its own, and signal it in the middle of a visit."""
    return signalled(PAUSE.replace("{visit}", str(visit)), ["--env-seq", str(path), "--out", str(out)], number)


def signalled(code: str, arguments: list[str], number: int) -> str:
    """Run `crl train` in a process of its own, signal it where the code says "middle", and hear what it says."""
    code = code.format(seconds=30 if number == signal.SIGKILL else 0.5)
    command = [sys.executable, "-c", code, "train", *arguments]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.readline() == "middle\n", process.stderr.read()
    os.kill(process.pid, number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == (-number if number == signal.SIGKILL else 2), said
    return said


@pytest.fixture(scope="module", autouse=True)
def short_ticks() -> Iterator[None]:
    """Safe points that are near each other, so that short walks have several."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("envs.gym.TICK", 400)
        yield


@pytest.fixture(scope="module", params=quickly(AGENTS, lambda agent: agent == "ppo"))
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Run]:
    folder = tmp_path_factory.mktemp(request.param)
    path = config(request.param, folder)
    return path, crl.train(path, out=folder / "whole")


@pytest.mark.parametrize(
    ("number", "visit"),
    quickly(
        [(signal.SIGKILL, 2), (signal.SIGKILL, 3), (signal.SIGINT, 2), (signal.SIGTERM, 3)],
        lambda case: case in ((signal.SIGKILL, 2), (signal.SIGTERM, 3)),
    ),
)
def test_resumed_is_never_stopped(whole: tuple[Path, Run], tmp_path: Path, number: int, visit: int) -> None:
    path, expected = whole
    said = interrupted(path, tmp_path, number, visit)
    folder = tmp_path / expected.path.relative_to(expected.path.parents[2])
    stopped = RunFolder(folder).stopped
    if number == signal.SIGKILL:
        assert not stopped.exists() and RunFolder(folder).manifest()["status"] == "running"
    else:
        assert stopped.exists() and f"crl resume {folder}" in said and signal.Signals(number).name in said
    resumed = crl.resume(folder)
    assert remembered(resumed) == remembered(expected)
    assert not stopped.exists() and resumed.manifest["status"] == "finished"
    with pytest.raises(CrlError, match="finished"):
        crl.resume(folder)


@SLOW
def test_killed_says_what_it_costs(whole: tuple[Path, Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, expected = whole
    interrupted(path, tmp_path, signal.SIGKILL)
    folder = RunFolder(tmp_path / expected.path.relative_to(expected.path.parents[2]))
    with folder.taken():
        for second in (lambda: crl.resume(folder.path), lambda: crl.train(path, out=tmp_path, overwrite=True)):
            with pytest.raises(CrlError, match="another process is at work on this run"):
                second()
    crl.resume(folder.path, verbosity=0)
    assert "visit 2 starts again from its boundary: " in capsys.readouterr().err


@SLOW
def test_same_seed_same_run_and_other_seed_other_run(whole: tuple[Path, Run], tmp_path: Path) -> None:
    path, expected = whole
    assert remembered(crl.train(path, out=tmp_path)) == remembered(expected)
    assert remembered(crl.train(path, out=tmp_path, seed=1))[1] != remembered(expected)[1]


@SLOW
@pytest.mark.parametrize("left_out", ["optimizer", "random"])
def test_a_checkpoint_that_lacks_something_is_caught(
    whole: tuple[Path, Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left_out: str
) -> None:
    """Two mutants: the optimizer's state, and the random streams, are not restored."""
    path, expected = whole
    interrupted(path, tmp_path, signal.SIGINT)
    if left_out == "optimizer" and expected.experiment.label.startswith("FullAgent"):
        monkeypatch.setattr("torch.optim.Adam.load_state_dict", lambda self, state: None)
    elif left_out == "optimizer":
        load = SB3Agent.load_state_dict

        def forgetful(self: SB3Agent, state: dict[str, Any]) -> None:
            modules = {k: v for k, v in state["modules"].items() if "optimizer" not in k}
            load(self, {**state, "modules": modules})

        monkeypatch.setattr(SB3Agent, "load_state_dict", forgetful)
    else:
        monkeypatch.setattr("crl.walk.set_random_state", lambda state: None)
    resumed = crl.resume(tmp_path / expected.path.relative_to(expected.path.parents[2]))
    assert remembered(resumed) != remembered(expected)


def test_no_half_written_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from crl import disk as store

    path = tmp_path / "file"
    store.write_whole(path, b"old")
    monkeypatch.setattr(store.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("power cut")))
    with pytest.raises(CrlError, match="file: cannot be written: OSError: power cut"):
        store.write_whole(path, b"new")
    assert path.read_bytes() == b"old"


# A dataset's walk.

IMAGES: dict[str, Any] = {
    "name": "images",
    "stream": {
        "use": "split",
        "data": "tests.tiny_images.real",
        "tasks": 3,
        "samples": 103,
        "batch": 12,
        "epochs": 2,
        "augment": ["crop", "flip"],
    },
    "threads": 1,
    "agent": {
        "net": {"use": "conv", "channels": [4], "hidden": [8], "norm": "batch"},
        "optimizer": {"use": "sgd", "momentum": 0.9},
        "learning_rate": 0.05,
    },
    "boundary": {"head": "per_task"},
    "methods": [{"use": "l2_er", "every": 5, "samples": 20}, {"use": "replay", "batch": 8, "size": 50, "every": 2}],
    "monitors": REMEMBER,
    "evaluation": {"samples": 20, "every": 125},
    "checkpoint": {"every": 139, "keep": 2},
}
HALT = (
    "import sys, time, envs.images as i; old = i.ImageTask.train; i.TICK = 40\n"
    "def slow(self, agent, visit):\n"
    "    for tick in old(self, agent, visit):\n"
    "        if visit.index == 2 and 130 < tick.steps < visit.steps:\n"
    "            print('middle', flush=True); time.sleep({seconds})\n"
    "        yield tick\n"
    "i.ImageTask.train = slow\n"
    "from crl.cli import main; sys.exit(main(sys.argv[1:]))"
)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Run]]:
    folder = tmp_path_factory.mktemp("images")
    path = folder / "images.yaml"
    path.write_text(yaml.safe_dump(IMAGES))
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("envs.images.TICK", 40)
        yield path, crl.train(path, out=folder / "whole")
    torch.set_num_threads(threads)


def halted(path: Path, out: Path, number: int, run: Run) -> Path:
    """Start the walk in a process of its own, and signal it in mid-visit: the folder that it leaves."""
    signalled(HALT, ["--data-seq", str(path), "--out", str(out)], number)
    return out / run.path.relative_to(run.path.parents[2])


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT], ids=["killed", "stopped"])
def test_a_datasets_walk_resumed_is_never_stopped(images: tuple[Path, Run], tmp_path: Path, number: int) -> None:
    """Killed, it goes on from the checkpoint that it made in the middle of the visit, in the middle of an epoch."""
    path, expected = images
    folder = halted(path, tmp_path, number, expected)
    state = RunFolder(folder).load(RunFolder(folder).stopped, expected.experiment.digest)
    assert state["visit"] == 1 and state["done"] % 103 and (state["done"] > 130) == (number == signal.SIGINT)
    assert sorted(p.name for p in (folder / "checkpoints").glob("b*")) == ["boundary-00.pt", "boundary-01.pt"]
    resumed = crl.resume(folder)
    assert remembered(resumed) == remembered(expected)
    assert resumed.manifest["status"] == "finished" and not RunFolder(folder).stopped.exists()


def fallen(path: Path, out: Path) -> Path:
    """The walk ends by itself in mid-visit, as in a power cut: the folder that it leaves."""
    train = ImageTask.train

    def until(self: ImageTask, agent: Any, visit: Any) -> Iterator[Any]:
        for tick in train(self, agent, visit):
            if visit.index == 2 and tick.steps > 130:
                raise MemoryError("power cut")
            yield tick

    with pytest.MonkeyPatch.context() as patch, pytest.raises(CrlError, match="MemoryError: power cut"):
        patch.setattr(ImageTask, "train", until)
        crl.train(path, out=out)
    return out / "images" / "classifier+l2_er+replay" / "seed-0"


@pytest.mark.parametrize("left_out", ["", "envs.images.ImageTask", "envs.tally.Tally"])
def test_a_task_that_forgets_where_it_was_is_caught(
    images: tuple[Path, Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left_out: str
) -> None:
    path, expected = images
    folder = fallen(path, tmp_path)
    if left_out:
        monkeypatch.setattr(f"{left_out}.load_state_dict", lambda self, state: None)
    assert (remembered(crl.resume(folder)) == remembered(expected)) == (not left_out)


def test_from_a_checkpoint_in_mid_visit_no_visit_starts_again(
    images: tuple[Path, Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    crl.resume(fallen(images[0], tmp_path), verbosity=0)
    assert "starts again from its boundary" not in capsys.readouterr().err
