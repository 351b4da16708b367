"""A part that fails costs one line, leaves its traceback in the run's folder, and never ends with exit code 0."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import yaml

import crl
from crl.cli import main
from crl.store import RunFolder

ROOT = Path(__file__).resolve().parent.parent
PPO = {"use": "ppo", "n_steps": 16, "batch_size": 32, "n_epochs": 1, "net": {"hidden": [4]}}
CALLS = {"n": 0}  # how often any faulty part was called, since the last of them was made


class Faulty(gymnasium.Env[Any, Any]):
    """It does well until its `at`th step over all copies, and then what `how` says."""

    observation_space = gymnasium.spaces.Box(-1, 1, (3,))
    action_space = gymnasium.spaces.Discrete(2)

    def __init__(self, how: str = "", at: int = 300) -> None:
        self.how, self.at, self.steps = how, at, 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.steps = 0
        return np.zeros(3, dtype=np.float32), {}

    def step(self, action: Any) -> Any:
        self.steps += 1
        CALLS["n"] += 1
        found = [np.full(3, 0.5, dtype=np.float32), 1.0, self.steps >= 10, False, {}]
        return misbehave(self.how, found) if CALLS["n"] > self.at else tuple(found)


def misbehave(how: str, found: list[Any]) -> Any:
    if how == "error":
        raise ZeroDivisionError("the maze is empty")
    if how == "exit":
        sys.exit(0)
    if how == "pipe":
        raise BrokenPipeError
    if how == "interrupt":
        raise KeyboardInterrupt
    broken: dict[str, Any] = {
        "none": lambda: None,
        "four": lambda: tuple(found[:4]),
        "text reward": lambda: (found[0], "1", *found[2:]),
        "array reward": lambda: (found[0], np.ones(1), *found[2:]),
        "text done": lambda: (*found[:2], "no", *found[3:]),
        "shape": lambda: (np.zeros(4, dtype=np.float32), *found[1:]),
        "one": lambda: (np.zeros(1, dtype=np.float32), *found[1:]),
        "scalar": lambda: (0.5, *found[1:]),
    }
    return broken[how]() if how in broken else tuple(found)


for name in ("Faulty", "Other"):
    if f"crl/{name}-v0" not in gymnasium.registry:
        gymnasium.register(f"crl/{name}-v0", "tests.test_failing:Faulty", disable_env_checker=True, order_enforce=False)


class FaultyMonitor:
    def __init__(self, how: str = "error") -> None:
        self.how = how

    def measure(self, boundary: Any) -> Any:
        return misbehave(self.how, []) or {}


class FaultyMethod:
    def __init__(self, how: str = "error") -> None:
        self.how = how

    def attach(self, agent: Any) -> None: ...

    def enter(self, visit: Any) -> None: ...

    def leave(self, visit: Any) -> None:
        misbehave(self.how, [])

    def state_dict(self) -> Any:
        return {}

    def load_state_dict(self, state: Any) -> None: ...


def config(how: str = "", steps: int = 640, **parts: Any) -> dict[str, Any]:
    return {
        "name": "faulty",
        "tasks": [{"env": "crl/Faulty-v0", "steps": steps, "name": "maze", "kwargs": {"how": how}}],
        "agent": PPO,
        "engine": {"envs": 2},
        "monitors": [],
        "evaluation": {"episodes": 2},
        **parts,
    }


@pytest.fixture
def walked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs `crl train` of a config in an empty folder: its exit code, the lines it said, and the run's folder."""
    monkeypatch.chdir(tmp_path)

    def walked(data: dict[str, Any], *flags: str) -> tuple[int, list[str], RunFolder]:
        CALLS["n"] = 0
        Path("c.yaml").write_text(yaml.safe_dump(data))
        code = main(["train", "--env-seq", "c.yaml", "-q", *flags])
        folder = next(iter(Path("runs").glob("*/*/seed-0")), Path("runs"))
        return code, capsys.readouterr().err.splitlines(), RunFolder(folder)

    return walked


@pytest.mark.parametrize("how", ["error", "exit", "pipe", "interrupt"])
@pytest.mark.parametrize("part", ["environment Faulty", "method FaultyMethod"])
def test_a_part_that_fails_costs_one_line(walked: Any, how: str, part: str) -> None:
    methods = [{"use": "tests.test_failing.FaultyMethod", "how": how}] if "method" in part else []
    code, said, folder = walked(config("" if methods else how, methods=methods))
    errors = {"error": "ZeroDivisionError: the maze is empty", "exit": "it called sys.exit(0)",
              "pipe": "BrokenPipeError", "interrupt": "KeyboardInterrupt"}  # fmt: skip
    assert code == 2 and len(said) == 1, said
    assert f"{part} failed: {errors[how]} (test_failing.py, line " in said[0] and "in misbehave)" in said[0]
    assert "visit 1 (maze), step " in said[0] and f"crl resume {folder.path}" in said[0]
    assert folder.manifest()["status"] == "failed"
    log = (folder.path / "error.log").read_text()
    assert "Traceback (most recent call last)" in log and "in misbehave" in log


def test_the_traceback_is_shown_where_it_is_asked_for(walked: Any, capsys: pytest.CaptureFixture[str]) -> None:
    walked(config("error"))
    CALLS["n"] = 0
    assert main(["train", "--env-seq", "c.yaml", "-v", "--overwrite"]) == 2
    said = capsys.readouterr().err
    assert "Traceback (most recent call last)" in said and "crl: environment Faulty failed: Zero" in said


def test_a_monitor_that_exits_is_recorded_and_the_run_goes_on(walked: Any) -> None:
    code, said, folder = walked(config(monitors=[{"use": "tests.test_failing.FaultyMonitor", "how": "exit"}]))
    assert code == 0 and not said and folder.manifest()["status"] == "finished"
    assert [r.note for r in crl.load(folder.path).records if r.name == "FaultyMonitor"] == ["SystemExit: 0"] * 2
    monitors = [{"use": "tests.test_failing.FaultyMonitor", "how": "interrupt"}]
    code, said, _ = walked(config(monitors=monitors), "--overwrite")
    assert code == 2 and "monitor FaultyMonitor failed: KeyboardInterrupt" in said[0]


@pytest.mark.parametrize("where", ["check", "train"])
def test_a_part_that_exits_before_a_run_is_no_success(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    CALLS["n"] = 10**6
    Path("c.yaml").write_text(yaml.safe_dump(config("exit")))
    assert main(["check", "c.yaml"] if where == "check" else ["train", "--env-seq", "c.yaml"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and "crl/Faulty-v0 cannot be made or stepped" in said[0] and "SystemExit: 0" in said[0]
    Path("leaves.py").write_text("raise SystemExit(0)")
    Path("c.yaml").write_text(yaml.safe_dump(config(agent={"use": "leaves.Agent"})))
    assert main(["check", "c.yaml"]) == 2
    assert "cannot import 'leaves': SystemExit: 0" in capsys.readouterr().err


# Going on.


def unfinished(out: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a run that was killed before its first checkpoint."""
    with monkeypatch.context() as patch:
        patch.setattr("crl.walk.Walk._checkpoint", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
        with pytest.raises(OSError, match="No space"):
            crl.train(config(), out=out)
    return out / "faulty" / "ppo" / "seed-0"


def test_without_a_checkpoint_a_run_begins_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = unfinished(tmp_path / "runs", monkeypatch)
    assert not list(folder.glob("checkpoints/*.pt"))
    whole, resumed = crl.train(config(), out=tmp_path / "whole"), crl.resume(folder)
    for run in (whole, resumed):
        assert run.manifest["status"] == "finished"
    kept = [[repr(r) for r in run.records if not r.name.startswith("time/")] for run in (whole, resumed)]
    assert kept[0] == kept[1] and (whole.matrix == resumed.matrix).all()


def test_a_run_is_resumed_from_within_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = unfinished(tmp_path, monkeypatch)
    monkeypatch.chdir(folder)
    assert main(["resume", ".", "-q"]) == 0
    monkeypatch.chdir(folder / "checkpoints")
    assert main(["resume", "..", "-q"]) == 2  # it is finished


def test_the_same_command_twice_is_one_run(
    walked: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    unfinished(tmp_path / "runs", monkeypatch)
    code, said, folder = walked(config())
    assert code == 2 and "holds a run already" in said[0]
    assert walked(config(), "--continue")[0] == 0 and folder.manifest()["status"] == "finished"
    before = folder.records.stat().st_mtime_ns
    assert walked(config(), "--continue")[0] == 0 and folder.records.stat().st_mtime_ns == before
    code, said, _ = walked(config(steps=999), "--continue")
    assert code == 2 and "another config: tasks.0.steps is 640 there and 999 here" in said[0]
    assert walked({**config(), "name": "new"}, "--continue")[0] == 0


# Streams that nobody reads.

TALK = """
import sys, signal
from crl.cli import main
import crl.walk
old = crl.walk.Walk._boundary_row
def slowly(self, *rest):
    for i in range(3): self.terminal.note('x' * 100)
    old(self, *rest)
crl.walk.Walk._boundary_row = slowly
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(("end", "code"), [("2>&-", 0), ("2>&1 | head -c 1 >&2", 141)])
def test_a_run_ends_well_though_nobody_listens(tmp_path: Path, end: str, code: int) -> None:
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({**config(), "tasks": [{"env": "CartPole-v1", "steps": 64}]}))
    (tmp_path / "talk.py").write_text(TALK)
    line = f"set -o pipefail; {sys.executable} talk.py train --env-seq c.yaml {end}"
    done = subprocess.run(["bash", "-c", line], cwd=tmp_path, capture_output=True, text=True, timeout=100,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})  # fmt: skip
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
    assert RunFolder(next(tmp_path.glob("runs/*/*/seed-0"))).manifest()["status"] == "finished"


# Ctrl-C.


def test_ctrl_c_says_what_is_true(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("c.yaml").write_text(yaml.safe_dump(config()))
    command = ["train", "--env-seq", "c.yaml"]
    with monkeypatch.context() as patch:
        patch.setattr("crl.build.build", lambda *_: os.kill(os.getpid(), signal.SIGINT))
        assert main(command) == 130
    assert capsys.readouterr().err == "crl: stopped at once; no run was begun\n"
    twice = lambda *_: [os.kill(os.getpid(), signal.SIGINT) for _ in range(2)]  # noqa: E731
    with monkeypatch.context() as patch:
        patch.setattr("crl.walk.Walk._boundary_row", twice)
        assert main(command) == 130
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == "crl: stopped at once; there is no checkpoint yet; go on with: crl resume runs/faulty/ppo/seed-0"
    with monkeypatch.context() as patch:
        patch.setattr("crl.walk.Walk._train", twice)
        assert main(["resume", "runs/faulty/ppo/seed-0"]) == 130
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == "crl: stopped at once; the last checkpoint stands; go on with: crl resume runs/faulty/ppo/seed-0"
    assert RunFolder(Path("runs/faulty/ppo/seed-0")).manifest()["status"] == "interrupted"
