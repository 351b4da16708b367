"""A second look at a finished run sees what the run saw, to the last bit; other looks are as easy."""

import io
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import crl
from crl.cli import main
from crl.core import CrlError
from crl.linalg import Block, Spectrum
from crl.linalg.lanczos import Tridiagonal
from crl.opened import Run
from crl.probe import Seen, probe
from crl.store import RunFolder

LITTLE = {"probes": 2, "steps": 8, "samples": 32}
TASKS = [
    {"env": "CartPole-v1", "steps": 128},
    {"env": "CartPole-v1", "steps": 128, "name": "heavy", "kwargs": {"max_episode_steps": 20}},
    {"env": "CartPole-v1", "steps": 128},
]
MONITORS = [
    {"use": "hessian", **LITTLE},
    {"use": "erank", "earlier": True, "samples": 32},
    {"use": "norms"},
    {"use": "weight_rank"},
    {"use": "drift", "samples": 32},
    {"use": "policy_drift", "samples": 32},
    {"use": "sample_plasticity", "samples": 32},
    {"use": "gradient_norm", "name": "slope", "samples": 32},
]
PPO = {"use": "ppo", "n_steps": 32, "batch_size": 32, "n_epochs": 1}
DQN = {"use": "dqn", "learning_starts": 32, "buffer_size": 200, "target_update_interval": 50}
AGENTS: dict[str, dict[str, Any]] = {
    "ppo": {"agent": {**PPO, "normalize": {"observation": True, "reward": True}}, "boundary": {"optimizer": "reset"}},
    "ppo, heads": {"agent": PPO, "boundary": {"head": "per_task", "optimizer": "reset"}},
    "dqn, heads": {"agent": DQN, "boundary": {"head": "per_task", "optimizer": "reset", "buffer": "reset"}},
    "dqn, unannounced": {"agent": DQN, "boundary": {"announced": False}, "methods": ["tests.test_properties.Decay"]},
}


def walk(out: Path, **parts: Any) -> Run:
    """A tiny run, its spectra not drawn: pictures take longer than the walk."""
    data = {"name": "walk", "tasks": TASKS, "engine": {"envs": 4}, "evaluation": {"episodes": 1}, "monitors": MONITORS}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("crl.sinks.TensorBoard.spectrum", lambda *args: None)
        return crl.train({**data, **parts}, out=out)


@pytest.fixture(scope="module", params=AGENTS)
def walked(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return walk(tmp_path_factory.mktemp("walked"), **AGENTS[request.param])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A small run for what does not depend on the agent."""
    return walk(tmp_path_factory.mktemp("run"), agent=PPO, tasks=TASKS[:2])


def snapshot(folder: Path) -> dict[Path, Any]:
    return {p: (p.stat().st_mtime_ns, p.read_bytes()) if p.is_file() else None for p in sorted(folder.rglob("*"))}


# The same look.


@pytest.mark.parametrize("phase", ["init", "end"])
@pytest.mark.parametrize("visit", [1, 2, 3])
def test_a_second_look_sees_what_the_run_saw(walked: Run, visit: int, phase: str) -> None:
    before = snapshot(walked.path)
    seen = probe(walked.path, visit, phase)
    own = [spec.get("name", spec["use"]) for spec in MONITORS]
    logged = {
        r.name: r.value for r in walked.records if r.visit == visit and r.phase == phase and r.name.split("/")[0] in own
    }
    assert logged and seen.logged == seen.numbers == logged
    assert seen.differ == [] and seen.problems == {}
    assert (seen.visit, seen.phase, seen.task) == (visit, phase, walked.manifest["visits"][visit - 1]["task"])
    assert seen.step == 128 * (visit - (phase == "init"))
    kept = {
        each.settings["name"]: each for v, p, each in RunFolder(walked.path).read_spectra() if (v, p) == (visit, phase)
    }
    assert set(seen.spectra) == set(kept) and bool(kept) == (phase == "init")
    for name, each in seen.spectra.items():
        assert np.array_equal(each.values, kept[name].values) and np.array_equal(each.weights, kept[name].weights)
    assert snapshot(walked.path) == before, "a look leaves the run's folder as it is"


def test_what_remembers_is_part_of_it(walked: Run) -> None:
    names = set(probe(walked.path, 3, "end").numbers)
    for start in ("norms/", "weight_rank/", "drift/", "policy_drift/", "slope/"):
        assert any(name.startswith(start) for name in names), start
    assert any(name.startswith("policy_drift/") and name.endswith("/on/heavy") for name in names)


@pytest.mark.parametrize("name", ["ppo, heads", "dqn, heads"])
def test_an_agent_that_has_not_entered_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    path = walk(tmp_path, **AGENTS[name], tasks=TASKS[:2]).path
    monkeypatch.setattr("crl.probe.enter", lambda plan, visit: None)
    seen = probe(path, 2, "init")
    assert seen.differ or seen.problems


def test_a_memory_that_is_not_restored_is_noticed(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("crl.monitors.weights.Norms.load_state_dict", lambda self, state: None)
    assert "norms/actor/distance_from_init" in probe(run.path, 2, "init").differ


def test_it_is_the_last_visit_unless_said(run: Run) -> None:
    assert probe(run.path).visit == 2 and probe(str(run.path), monitors=["norms"]).phase == "init"


def test_a_stopped_run_can_be_looked_at(run: Run, tmp_path: Path) -> None:
    """After a stop or a kill in visit 2 there are the boundaries before it."""
    path = Path(shutil.copytree(run.path, tmp_path / "run"))
    (path / "checkpoints" / "boundary-02.pt").unlink()
    assert probe(path).visit == 1
    assert probe(path, 2, "init").differ == []
    with pytest.raises(CrlError, match=r"boundary-02.pt: no such checkpoint \(here are: boundary-00, boundary-01\)"):
        probe(path, 2, "end")


# Another look.


def test_other_options_see_something_else(run: Run) -> None:
    seen = probe(run.path, 2, monitors=["hessian"], options={"probes": 3, "samples": 64})
    assert seen.differ and not seen.problems
    assert all(name.startswith("hessian/") for name in seen.numbers)
    assert seen.spectra["hessian/actor"].values.shape[0] == 3
    same = probe(run.path, 2, monitors=["hessian"])
    assert same.logged and same.differ == []
    assert same.spectra["hessian/actor"].values.shape == (2, 8), "the run's own options, where no other is given"


def test_a_monitor_that_the_run_had_not(run: Run) -> None:
    seen = probe(run.path, 2, "end", ["dormant"], {"tau": 0.5})
    assert set(seen.numbers) >= {"dormant/actor/dormant", "dormant/critic/dead"} and seen.logged == {}
    assert "in the run's log" not in seen.table()


def test_what_the_run_did_not_remember_is_found_by_looking_again(tmp_path: Path) -> None:
    stateful = ["norms", "weight_rank", "drift", "policy_drift"]
    whole = walk(tmp_path / "whole", agent=PPO, monitors=stateful)
    blind = walk(tmp_path / "blind", agent=PPO, monitors=[])
    for visit, phase in ((2, "init"), (3, "end")):
        seen = probe(blind.path, visit, phase, stateful)
        logged = {r.name: r.value for r in whole.records if (r.visit, r.phase) == (visit, phase)}
        assert seen.numbers and not seen.logged
        assert all(np.array_equal(value, logged[name], equal_nan=True) for name, value in seen.numbers.items())
        assert seen.numbers["norms/actor/distance_from_init"] > 0


def test_a_phase_that_is_asked_for_is_looked_at(run: Run) -> None:
    assert "hessian/actor/lambda_max" in probe(run.path, 2, "end", ["hessian"]).numbers
    assert "there is nothing to see at init" in probe(run.path, 2, "init", ["policy_drift"]).table()


def test_a_monitor_of_a_name_of_its_own(run: Run) -> None:
    assert probe(run.path, 2, monitors=["slope"]).differ == []
    assert set(probe(run.path, 2, monitors=["slope"]).numbers) == {"slope/actor", "slope/critic"}


def test_a_monitor_of_ones_own(run: Run) -> None:
    seen = probe(run.path, 1, monitors=["tests.my_monitor.Silence"])
    assert set(seen.numbers) == {"Silence/actor", "Silence/critic"}


def test_what_cannot_be_seen_is_said(run: Run) -> None:
    seen = probe(run.path, 1, monitors=["hessian", "norms"])
    assert seen.problems == {}
    seen = probe(run.path, 1, monitors=["hessian"], options={"of": ["nowhere"]})
    assert "of: there is no network or layer 'nowhere'" in seen.problems["hessian"] and seen.numbers == {}
    assert "nowhere" in seen.table() and "nowhere" in json.loads(seen.json())["problems"]["hessian"]


# The command.


def printed(capsys: pytest.CaptureFixture[str], run: Run, words: str) -> str:
    capsys.readouterr()
    assert main(["probe", str(run.path), *words.split()]) == 0
    return capsys.readouterr().out


def test_json_holds_the_spectra_whole(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, run, "--visit 2 --phase init --monitor hessian --probes 3 --samples 64 --json")
    found = json.loads(text, parse_constant=pytest.fail)
    assert (found["visit"], found["phase"], found["task"], found["step"]) == (2, "init", "heavy", 128)
    assert set(found["spectra"]) == {"hessian/actor", "hessian/critic", "hessian/all"}
    for spectrum in found["spectra"].values():
        assert np.allclose(np.sum(spectrum["weights"], 1), 1) and np.shape(spectrum["values"])[0] == 3
    sizes = {name: spectrum["size"] for name, spectrum in found["spectra"].items()}
    assert sizes["hessian/all"] == sizes["hessian/actor"] + sizes["hessian/critic"]
    assert found["numbers"]["hessian/actor/lambda_max"] == np.max(found["spectra"]["hessian/actor"]["values"])
    assert set(found["logged"]) <= set(found["numbers"]) and found["logged"]


def test_a_number_that_is_missing_is_null_in_json() -> None:
    seen = Seen("r", 1, "init", "t", 0, {"a": math.nan, "b": [1.0, math.inf]}, {"a": math.nan}, {}, {})
    found = json.loads(seen.json(), parse_constant=pytest.fail)
    assert found["numbers"] == {"a": None, "b": [1.0, None]} and seen.differ == []


def test_the_table_has_its_columns(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(capsys, run, "--visit 2 --monitor hessian").splitlines()
    assert lines[0] == f"{run.path}: visit 2 (heavy), init, step 128"
    assert lines[1].split() == ["value", "low", "high", "error", "logged"]
    (rank,) = [line.split() for line in lines if line.startswith("hessian/actor/epsilon_rank_0.001 ")]
    logged = {r.name: r.value for r in run.records if r.visit == 2 and r.phase == "init"}
    names = [f"hessian/actor/epsilon_rank_0.001{part}" for part in ("", "/low", "/high", "/error", "")]
    assert rank[1:] == [f"{logged[name]:.5g}" for name in names]
    assert lines[-1].endswith("of these numbers are in the run's log: all equal")
    assert not any("/low " in line or "/error " in line for line in lines)
    table = [line for line in lines[1:-1] if ": between " not in line]
    assert len({len(line) for line in table}) == 1, "the columns stand below one another"
    why = [line for line in lines if line.startswith("hessian/actor/effective_rank: between ")]
    assert len(why) == 1, "what is not resolved says why"


def test_the_table_says_how_much_differs(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, run, "--visit 2 --monitor hessian --samples 64")
    assert "of them differ" in text.splitlines()[-1]


def test_words_are_options(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert "erank/actor/hidden-1/effective_rank" in printed(capsys, run, "--monitor erank --layers all")
    text = printed(capsys, run, "--monitor erank --ranks=[srank,stable_rank] --centred true")
    assert "erank/actor/last/srank" in text and "erank/actor/last/stable_rank" in text
    text = printed(capsys, run, "--monitor hessian --eps 1e-5 --of action_net")
    assert "hessian/action_net/epsilon_rank_1e-05" in text
    text = printed(capsys, run, "--monitor norms --monitor slope")
    assert "norms/actor/weight_norm" in text and "slope/actor" in text


# Mistakes.


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    capsys.readouterr()
    try:
        code: Any = main(["probe", *argv])
    except SystemExit as error:  # argparse's own way out
        code = error.code
    said = capsys.readouterr()
    assert (code, said.out) == (2, "") and len(said.err.splitlines()) == 1, said.err
    return said.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--visit 0", "--visit: 0 is not one of the run's visits, 1 to 2"),
        ("--visit 99", "--visit: 99 is not one of the run's visits, 1 to 2"),
        ("--visit -1", "--visit: -1 is not one of the run's visits, 1 to 2"),
        ("--visit two", "invalid int value: 'two'"),
        ("--phase middle", "invalid choice: 'middle'"),
        ("--monitor hesian", "unknown 'hesian'; did you mean 'hessian'?"),
        ("--monitor no.such.Thing", "cannot import 'no.such'"),
        ("--monitor norms --monitor norms", "another monitor is called 'norms' already"),
        ("--monitor hessian --probs 3", "probs: Hessian takes no such option; did you mean 'probes'?"),
        ("--monitor erank --layer all", "layer: ERank takes no such option; did you mean 'layers'?"),
        ("--monitor erank --sample 64", "sample: ERank takes no such option"),
        ("--monitor policy_drift --at end", "at: PolicyDrift takes no such option"),
        ("--monitor hessian --probes 0", "probes: 0 is not a whole number of at least 1"),
        ("--monitor hessian --probes three", "probes: 'three' is not a whole number"),
        ("--monitor hessian --probes", "--probes: expected an option of the monitor and its value"),
        ("--monitor hessian --probes [1", "--probes, line 1, column 3: not valid YAML"),
        ("--monitor hessian stray", "stray: expected an option of the monitor and its value"),
        ("--probes 3", "--probes: say which one monitor it is for: --monitor NAME"),
        (
            "--monitor hessian --monitor erank --samples 64",
            "--samples: say which one monitor it is for: --monitor NAME",
        ),
    ],
)
def test_a_mistake_costs_one_line(run: Run, capsys: pytest.CaptureFixture[str], words: str, said: str) -> None:
    before = snapshot(run.path)
    assert said in refused(capsys, str(run.path), *words.split())
    assert snapshot(run.path) == before


def test_what_is_not_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    for name in ("nowhere", "empty", "file"):
        said = refused(capsys, str(tmp_path / name))
        assert name in said and "Traceback" not in said


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 nothing more", None])
def test_a_damaged_checkpoint(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: bytes | None
) -> None:
    path = Path(shutil.copytree(run.path, tmp_path / "run"))
    file = path / "checkpoints" / "boundary-01.pt"
    file.write_bytes(file.read_bytes()[:-200] if damage is None else damage)
    assert "boundary-01.pt: truncated, damaged, or not a checkpoint of crl" in refused(
        capsys, str(path), "--visit", "2"
    )
    assert probe(path, 1, "init").differ == [], "the other boundaries can still be looked at"


class Bomb:
    """What a pickle can do."""

    fired = False

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return setattr, (Bomb, "fired", True)


def an_array() -> bytes:
    file = io.BytesIO()
    np.save(file, np.zeros(3))
    return file.getvalue()


def a_pickle() -> bytes:
    file = io.BytesIO()
    np.savez(file, values=np.array([Bomb()], dtype=object), head=np.array([Bomb()], dtype=object))
    return file.getvalue()


def other_arrays(settings: str = "{}") -> bytes:
    file = io.BytesIO()
    np.savez(file, head=np.array(settings), values=np.zeros((1, 2)), weights=np.ones((1, 2)) / 2)
    return file.getvalue()


SPECTRA: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda good: b"",
    "cut short": lambda good: good[: len(good) // 2],
    "text": lambda good: b"values: 3",
    "an array": lambda good: an_array(),
    "a pickle": lambda good: a_pickle(),
    "no size": lambda good: other_arrays(),
    "settings that are a list": lambda good: other_arrays("[1]"),
    "settings that are not JSON": lambda good: other_arrays("{"),
}


@pytest.mark.parametrize("damage", SPECTRA)
def test_a_damaged_spectrum_is_one_line(run: Run, tmp_path: Path, damage: str) -> None:
    path = Path(shutil.copytree(run.path, tmp_path / "run"))
    file = path / "spectra" / "1-init-actor.npz"
    file.write_bytes(SPECTRA[damage](file.read_bytes()))
    with pytest.raises(CrlError, match=r"1-init-actor\.npz: damaged, or not a spectrum of crl"):
        RunFolder(path).read_spectra()
    assert not Bomb.fired, "no content of a file is run"


def test_any_flipped_byte_of_a_spectrum_is_read_or_refused(tmp_path: Path) -> None:
    chance = np.random.default_rng(0)
    values, weights = chance.normal(size=(2, 8)), np.full((2, 8), 1 / 8)
    block = Block(30, None, tuple(Tridiagonal(*pair) for pair in zip(values, weights, strict=True)))
    good = Spectrum((block,), {"name": "hessian/q"}).packed()
    file = tmp_path / "spectra" / "1-init-q.npz"
    file.parent.mkdir()
    for place in range(0, len(good), 3):
        damaged = bytearray(good)
        damaged[place] ^= 0xFF
        file.write_bytes(bytes(damaged))
        try:
            RunFolder(tmp_path).read_spectra()
        except CrlError as error:
            assert "not a spectrum of crl" in str(error)


@pytest.mark.parametrize("name", ["notes.npz", "x-init-actor.npz", "1-init.npz"])
def test_a_file_of_another_name_is_no_spectrum(run: Run, tmp_path: Path, name: str) -> None:
    path = Path(shutil.copytree(run.path, tmp_path / "run"))
    shutil.copy(path / "spectra" / "1-init-actor.npz", path / "spectra" / name)
    with pytest.raises(CrlError, match="not a spectrum of crl"):
        RunFolder(path).read_spectra()


def test_a_pickle_in_a_spectrum_is_not_run(tmp_path: Path) -> None:
    (tmp_path / "bomb.npz").write_bytes(a_pickle())
    with pytest.raises(ValueError, match="allow_pickle"):
        Spectrum.load(tmp_path / "bomb.npz")
    assert not Bomb.fired
