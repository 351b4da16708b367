"""A part that fails costs one line, leaves its traceback in the run's folder, and never ends with exit code 0."""

import io
import math
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
import yaml

import crl
from crl.cli import main
from crl.core import CrlError
from crl.store import RunFolder
from crl.testing import check_task
from envs.answers import STEP
from envs.gym import build, join
from tests.my_agent import MyAgent
from tests.test_resume import remembered

ROOT = Path(__file__).resolve().parent.parent
PPO = {"use": "ppo", "n_steps": 16, "batch_size": 32, "n_epochs": 1, "net": {"hidden": [4]}}
CALLS = {"n": 0}  # how often any faulty part was called, since the last of them was made


TEXTS = {  # of an exception, and what is said of it
    "bad \udce9 name": r"Speechless: bad \udce9 name",
    "\x1b[31mred": r"Speechless: \x1b[31mred",
    "speechless": "Speechless: (its text cannot be shown)",
}


class Speechless(Exception):
    """Its text cannot be written as it is, or not be had."""

    def __str__(self) -> str:
        if self.args[0] == "speechless":
            raise RuntimeError("no text")
        return super().__str__()


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
    if how == "stop":
        raise StopIteration("at the end")
    if how == "elsewhere":
        os.chdir("/")
    if how == "thread":
        thread = threading.Thread(target=lambda: 1 / 0, name="aside")
        thread.start()
        thread.join()
        return tuple(found)
    if how == "closed":
        sys.stdout.close()
    if how == "no streams":
        sys.stdout = sys.stderr = None  # type: ignore[assignment]
    if how in TEXTS:
        raise Speechless(how)
    broken: dict[str, Any] = {
        "none": lambda: None,
        "four": lambda: tuple(found[:4]),
        "text reward": lambda: (found[0], "1", *found[2:]),
        "array reward": lambda: (found[0], np.ones(1), *found[2:]),
        "text done": lambda: (*found[:2], "no", *found[3:]),
        "shape": lambda: (np.zeros(4, dtype=np.float32), *found[1:]),
        "one": lambda: (np.zeros(1, dtype=np.float32), *found[1:]),
        "scalar": lambda: (0.5, *found[1:]),
        "far": lambda: (np.full(3, 1e300), *found[1:]),
        "info": lambda: (*found[:4], []),
        "huge reward": lambda: (found[0], 1e308, *found[2:]),
        "endless reward": lambda: (found[0], 10**5000, *found[2:]),
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
        "tasks": [{"env": "tests.test_failing:crl/Faulty-v0", "steps": steps, "name": "maze", "kwargs": {"how": how}}],
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
    assert "visit 1 (maze), step " in said[0] and f"crl resume {folder.typed}" in said[0]
    assert folder.manifest()["status"] == "failed"
    log = (folder.path / "error.log").read_text()
    assert "Traceback (most recent call last)" in log and "in misbehave" in log


@pytest.mark.parametrize("how", [*TEXTS, "stop"])
def test_any_text_of_an_error_is_said_safely(walked: Any, how: str) -> None:
    code, said, folder = walked(config(how))
    assert code == 2 and len(said) == 1 and said[0].isprintable(), said
    assert f"environment Faulty failed: {TEXTS.get(how, 'StopIteration: at the end')} (test_failing.py, line" in said[0]
    log = (folder.path / "error.log").read_text()
    assert "in misbehave" in log and "\x1b" not in log


def test_a_thread_that_fails_costs_a_line_and_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    before, CALLS["n"] = threading.excepthook, 0
    Path("c.yaml").write_text(yaml.safe_dump(config("thread", steps=320)))
    assert main(["train", "--env-seq", "c.yaml"]) == 0
    folder = RunFolder(next(Path("runs").glob("*/*/seed-0")))
    told = capsys.readouterr().err
    line = "warning: a thread (aside) failed: ZeroDivisionError: division by zero (test_failing.py, line "
    assert line in told and "; the walk goes on; its traceback is in" in told and "Traceback" not in told
    assert folder.manifest()["status"] == "finished" and threading.excepthook == before
    assert "Traceback (most recent call last)" in (folder.path / "error.log").read_text()


@pytest.mark.parametrize("how", ["elsewhere", "closed", "no streams"])
def test_a_part_that_leaves_its_place_or_closes_streams_ends_no_run(
    walked: Any, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    home = Path.cwd()
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    monkeypatch.setattr(sys, "stderr", sys.stderr)  # it is put back
    code, said, folder = walked(config(how))
    assert code == 0 and not said and Path.cwd() == home
    assert folder.manifest()["status"] == "finished" and sys.stdout is not None


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


def test_a_full_stdout_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("c.yaml").write_text(yaml.safe_dump(config(steps=32)))
    with open("/dev/full", "w") as full, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", full)
        code = main(["train", "--env-seq", "c.yaml"])
    line = "crl: stdout: cannot be written: No space left on device; the run is finished: runs/faulty/ppo/seed-0"
    assert code == 2 and capsys.readouterr().err.splitlines()[-1] == line


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


# What an environment answers.

WRONG = {
    "none": f"environment Faulty: step() returned a NoneType; right is {STEP}",
    "four": f"environment Faulty: step() returned 4 values; right is {STEP}",
    "text reward": "environment Faulty: step() returned the reward '1'; right is one number",
    "array reward": "environment Faulty: step() returned the reward array([1.]); right is one number",
    "text done": "environment Faulty: step() returned 'no' for terminated; right is true or false",
    "shape": "environment Faulty: an observation of shape (4,) came; its space has (3,)",
    "one": "environment Faulty: an observation of shape (1,) came; its space has (3,)",
    "scalar": "environment Faulty: an observation of shape () came; its space has (3,)",
    "info": "environment Faulty: step() returned [] for info; right is a dictionary",
    "huge reward": "environment Faulty: step() returned the reward 1e+308; right is a number that float32 can hold",
    "endless reward": "environment Faulty: step() returned the reward something of type int; right is a number that",
}


@pytest.mark.parametrize("kind", ["sync", "async"])
@pytest.mark.parametrize("how", WRONG)
def test_a_wrong_answer_is_named_at_once(walked: Any, how: str, kind: str) -> None:
    if kind == "async" and how != "text done":
        pytest.skip("one is enough: a worker's engine is the same")
    code, said, folder = walked(config(how, engine={"envs": 2, "kind": kind, "threads": 1}))
    assert code == 2 and len(said) == 1, said
    assert f"crl: {WRONG[how]}" in said[0] and "; visit 1 (maze), step " in said[0] and "error.log" not in said[0]
    assert folder.manifest()["status"] == "failed"


@pytest.mark.parametrize("how", ["text reward", "array reward"])
@pytest.mark.parametrize("wrapper", ["noise_observation", "sign_reward", "scale_reward", "time limit", "joined"])
def test_no_wrapper_makes_a_wrong_answer_fit(walked: Any, wrapper: str, how: str) -> None:
    data = config(how)
    if wrapper == "joined":
        data["tasks"].append({"env": "CartPole-v1", "steps": 32})
    elif wrapper == "time limit":
        data["tasks"][0]["kwargs"]["max_episode_steps"] = 50
    else:
        data["tasks"][0]["wrappers"] = [wrapper]
    code, said, _ = walked(data)
    assert code == 2 and "Faulty: step() returned the reward " in said[0], said


def test_too_few_values_are_named_though_a_wrapper_trips_over_them(walked: Any) -> None:
    data = config("four")
    data["tasks"][0]["kwargs"]["max_episode_steps"] = 50
    code, said, _ = walked(data)
    assert code == 2 and "crl: environment Faulty: step() returned too few or too many values; right is (obs" in said[0]


# What an agent answers.

ACTIONS = {  # what act() makes of right actions, and how that is told
    "two": (lambda a: (a, None), "2 values"),
    "none": (lambda a: None, "a NoneType"),
    "few": (lambda a: (a[:1], None, None), "actions array([0]) of shape (1,) and type int64"),
    "float": (lambda a: (a + 0.5, None, None), "actions array([0.5, 0.5]) of shape (2,) and type float64"),
    "text": (lambda a: (["a"] * len(a), None, None), "actions array(['a', 'a'], dtype='<U1') of shape (2,) and"),
    "column": (lambda a: (a[:, None], None, None), "actions array([[0], [0]]) of shape (2, 1) and type int64"),
    "tensor": (lambda a: (torch.as_tensor(a), None, None), "actions that are a torch.Tensor, tensor([0, 0])"),
    "large": (lambda a: (a + 7, None, None), "array([7, 7])"),
    "negative": (lambda a: (a - 5, None, None), "array([-5, -5])"),
}
NUMBERS: dict[str, Any] = {  # what update() returns, and how that is told
    "None": None,
    "[1]": [1],
    "{'x': 'text'}": {"x": "text"},
    "{'x': array([[0., 0.], [0., 0.]])}": {"x": np.zeros((2, 2))},
    "{'x': 1j}": {"x": 1j},
    "{3: 1.0}": {3: 1.0},
}


class OddAgent(MyAgent):
    """It answers as `how` says: `act` from its first time on, `update` after some updates, or `state_dict`."""

    def __init__(self, interface: Any, seed: int, device: str, how: str = "") -> None:
        super().__init__(interface, seed, device)
        self.how, self.updates = how, 0

    def act(self, obs: Any, carry: Any, greedy: bool) -> Any:
        found = super().act(obs, carry, greedy)
        return ACTIONS[self.how][0](found[0] * 0) if self.how in ACTIONS else found

    def update(self) -> Any:
        self.updates += 1
        found = {**super().update(), "losses/with a graph": self.loss}
        if self.how == "lost" and self.updates == 20:
            with torch.no_grad():
                self.model[2].bias.fill_(math.nan)
        return NUMBERS[self.how] if self.how in NUMBERS and self.updates == 20 else found

    def state_dict(self) -> Any:
        return None if self.how == "state" else super().state_dict()


@pytest.mark.parametrize("how", ACTIONS)
def test_a_wrong_action_is_the_agents(walked: Any, how: str) -> None:
    data = config(agent={"use": "tests.test_failing.OddAgent", "how": how})
    data["tasks"][0] = {"env": "CartPole-v1", "steps": 64, "name": "maze"}  # it refuses what is none of its actions
    code, said, folder = walked(data)
    assert code == 2 and len(said) == 1, said
    assert f"crl: agent OddAgent: act() returns {ACTIONS[how][1]}" in said[0]
    right = "it must be (actions, carry, note), the actions an array of shape (2,) of integers from 0 to 1"
    assert f" for 2 observations: {right}; at the start" in said[0]
    assert folder.manifest()["status"] == "failed"


class LosingMethod(FaultyMethod):
    """It makes a weight of the agent's be no number, once the agent has learned a while."""

    def attach(self, agent: Any) -> None:
        self.agent, learn, self.updates = agent, agent.update, 0

        def update() -> Any:
            self.updates += 1
            found = learn()
            if self.updates == 20:
                with torch.no_grad():
                    next(agent.model.parameters()).fill_(math.nan)
            return found

        agent.update = update

    def leave(self, visit: Any) -> None: ...


@pytest.mark.parametrize("part", ["update", "method"])
def test_a_part_that_fails_over_lost_weights_is_not_all_that_is_said(walked: Any, part: str) -> None:
    """The line tells which weight is lost, and where the last good ones are."""
    agent: Any = {"use": "tests.test_failing.OddAgent", "how": "lost"} if part == "update" else PPO
    methods = ["tests.test_failing.LosingMethod"] if part == "method" else []
    code, said, folder = walked(config(agent=agent, methods=methods))
    assert code == 2 and len(said) == 1, said
    who = "OddAgent" if part == "update" else "PPO"
    assert f"crl: agent {who} failed: ValueError: Expected parameter logits" in said[0]
    good = f"is not finite any more, and the last good checkpoint is {folder.boundary(0)}; visit 1 "
    assert re.search(rf"; model\.[\w.]+ {re.escape(good)}", said[0]), said


@pytest.mark.parametrize("how", NUMBERS)
def test_a_wrong_update_is_the_agents(walked: Any, how: str) -> None:
    code, said, _ = walked(config(agent={"use": "tests.test_failing.OddAgent", "how": how}))
    assert code == 2 and len(said) == 1, said
    told = f"update() returns {how}: it must be a dictionary of numbers by name"
    assert f"crl: agent OddAgent: {told}; visit 1" in said[0]


def test_a_state_that_is_none_is_the_agents(walked: Any) -> None:
    code, said, _ = walked(config(agent={"use": "tests.test_failing.OddAgent", "how": "state"}))
    assert code == 2 and len(said) == 1, said
    assert "crl: agent OddAgent: state_dict() returns None: it must be a dictionary" in said[0]


def test_numbers_with_a_graph_are_taken_without_a_word(walked: Any, recwarn: Any) -> None:
    code, said, _ = walked(config(steps=64, agent={"use": "tests.test_failing.OddAgent"}))
    assert code == 0 and not said and not [w for w in recwarn if "requires_grad" in str(w.message)]


# Environments that hang, and episodes without an end.


class Hanging(Faulty):
    """After 300 steps one takes for ever; or its episodes have no end."""

    def step(self, action: Any) -> Any:
        found = list(super().step(action))
        if self.how == "endless":
            found[2] = False
        elif CALLS["n"] > 300:
            time.sleep(1000)
        return tuple(found)


class Unforgetful(Faulty):
    """The last action of an episode is seen after the next reset, which is told a seed."""

    def __init__(self) -> None:
        super().__init__()
        self.last = 0.0

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        obs, info = super().reset(seed=seed)
        return obs + np.float32(self.last), info

    def step(self, action: Any) -> Any:
        obs, reward, *rest = super().step(action)
        obs[0], self.last = self.last, float(action) / 2
        return (obs, reward * float(action), *rest)


for name in ("Hanging", "Unforgetful"):
    if f"crl/{name}-v0" not in gymnasium.registry:
        gymnasium.register(f"crl/{name}-v0", f"tests.test_failing:{name}", disable_env_checker=True)


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_an_environment_that_hangs_costs_a_line(walked: Any, kind: str) -> None:
    data = config(engine={"envs": 2, "kind": kind, "threads": 1, "timeout": 1 if kind == "sync" else 6})
    data["tasks"][0]["env"] = "tests.test_failing:crl/Hanging-v0"
    code, said, _ = walked(data)
    assert code == 2 and "task maze: one call has taken longer than engine.timeout" in said[0], said


class LateAsync:
    """Workers that need long for their imports."""

    copies = 2

    def __init__(self, *_: Any) -> None: ...

    def reset(self) -> None:
        time.sleep(10)


def test_workers_that_start_late_cost_a_line(walked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("envs.gym.Async", LateAsync)
    data = config(engine={"envs": 2, "kind": "async", "threads": 1, "timeout": 1})
    code, said, _ = walked(data)
    line = "crl: engine: the workers did not start within engine.timeout, 1 seconds; they import for long, or the"
    assert code == 2 and len(said) == 1 and said[0].startswith(line), said
    assert "its traceback" not in said[0]


def test_a_worker_that_nobody_waits_for_ends_without_a_word() -> None:
    from multiprocessing import Pipe

    from envs.workers import _serve

    ours, theirs = Pipe()
    ours.send_bytes(pickle.dumps(("reset", ())))
    ours.close()
    _serve(theirs, b"nothing that could be loaded")


@pytest.mark.parametrize("wrapper", [[], ["noise_observation"]])
def test_what_float32_does_not_hold_costs_no_warning(walked: Any, wrapper: list[str], recwarn: Any) -> None:
    data = config("far")
    data["tasks"][0]["wrappers"] = wrapper
    code, said, _ = walked(data)
    assert code == 2 and said[0].startswith("crl: maze: an observation is not finite: visit 1 (maze), step"), said
    assert not [str(w.message) for w in recwarn if "overflow" in str(w.message)]


def test_an_episode_without_an_end_is_ended_with_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = config("endless", engine={"envs": 2, "max_episode_steps": 50})
    data["tasks"][0]["env"] = "tests.test_failing:crl/Hanging-v0"
    run = crl.train(data, out=tmp_path, verbosity=0)
    said = "maze: an episode has no end within 50 steps and is ended (engine.max_episode_steps)"
    assert capsys.readouterr().err.count(said) == 1, "once"
    assert set(run.curve("train/length")[1]) == set(run.curve("eval/length")[1]) == {50.0}
    assert set(run.curve("train/cut")[1]) == {1.0}
    CALLS["n"] = 0
    steps = crl.train(config(), out=tmp_path / "other").curve("train/cut")[0]
    assert not len(steps), "episodes that end by themselves are not cut"


# What does not come back.


def stopped_and_resumed(data: dict[str, Any], out: Path, monkeypatch: pytest.MonkeyPatch, at: int) -> Any:
    """A run that is stopped in the middle of its last visit, and resumed."""
    from crl.walk import Walk

    old = Walk._passed

    def ask(self: Walk, every: int, last: int) -> bool:
        if self.step >= at and not out.joinpath("asked").exists():
            out.joinpath("asked").touch()
            self.asked_to_stop = "a test"
        return old(self, every, last)

    out.mkdir()
    with monkeypatch.context() as patch, pytest.raises(CrlError, match="stopped by a test"):
        patch.setattr(Walk, "_passed", ask)
        crl.train(data, out=out)
    folder = next(out.glob("*/*/seed-0"))
    assert RunFolder(folder).load(RunFolder(folder).stopped, crl.load(folder).experiment.digest)["done"] % 32
    return crl.resume(folder, verbosity=0)


def test_what_does_not_come_back_begins_its_visit_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = config()
    data["tasks"][0] = {"env": "tests.test_failing:crl/Unforgetful-v0", "steps": 320, "name": "maze"}
    whole = crl.train(data, out=tmp_path / "whole")
    resumed = stopped_and_resumed(data, tmp_path / "runs", monkeypatch, at=150)
    said = capsys.readouterr().err
    assert "environment Unforgetful does not come back to where it was when it is replayed" in said
    assert "visit 1 starts again from its boundary: " in said
    assert remembered(resumed) == remembered(whole)
    data["tasks"][0] = {"env": "CartPole-v1", "steps": 320, "name": "pole"}
    whole = crl.train(data, out=tmp_path / "whole2")
    assert remembered(stopped_and_resumed(data, tmp_path / "runs2", monkeypatch, at=150)) == remembered(whole)
    assert "does not come back" not in capsys.readouterr().err


def test_a_checked_task_that_does_not_come_back_is_named() -> None:
    task = build(env="tests.test_failing:crl/Unforgetful-v0", name="maze", envs=4)
    join([task])
    with pytest.raises(AssertionError, match=r"does not come back .*: reset\(seed\) must forget all"):
        check_task(task)


@pytest.mark.parametrize("env", ["tests.test_failing:crl/Unforgetful-v0", "CartPole-v1"])
def test_a_deep_check_tells_before_a_long_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], env: str
) -> None:
    monkeypatch.chdir(tmp_path)
    data = {**config(), "tasks": [{"env": env, "steps": 64, "name": "maze"}]}
    Path("c.yaml").write_text(yaml.safe_dump(data))
    good = env == "CartPole-v1"
    assert main(["check", "c.yaml", "--deep"]) == (0 if good else 2)
    said = capsys.readouterr()
    if good:
        assert "maze: stepped, stopped and brought back: the same" in said.out
    else:
        assert said.err.startswith("crl: maze: environment Unforgetful does not come back to where it was")


def test_a_visit_has_twenty_lines_and_a_rollout_can_be_stopped_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """640 steps are five rollouts of 128; a stop comes in the middle of one, and changes nothing."""
    data = config(agent={**PPO, "n_steps": 64, "batch_size": 64, "normalize": {"observation": True}})
    data["tasks"][0] = {"env": "CartPole-v1", "steps": 640, "name": "pole"}
    whole = crl.train(data, out=tmp_path / "whole")
    assert len(whole.curve("walk/visit")[0]) == 20 and len(whole.curve("losses/loss")[0]) == 5
    assert remembered(stopped_and_resumed(data, tmp_path / "runs", monkeypatch, at=330)) == remembered(whole)
