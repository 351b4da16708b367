"""Boundaries that nobody announces: the statistic, what the learner is told, and that a stop changes nothing."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

import crl
from crl import build, config
from crl.core import CrlError
from crl.detect import Detector
from crl.named import METHODS
from crl.opened import Run
from crl.walk import Walk
from tests.test_resume import AGENTS, remembered

NOISE = math.sqrt(math.pi)  # of numbers that go up and down by 2: the mean move of normal ones is 2 / sqrt(pi) times it
REFUSED = {"ewc": "samples", "online_ewc": "samples", "mas": "samples", "packnet": "answers", "progressive": "answers"}
TASKS = [
    {"env": "CartPole-v1", "steps": 3612, "name": "first"},
    {
        "env": "CartPole-v1",
        "steps": 2415,
        "name": "other",
        "wrappers": [{"use": "scale_reward", "by": 0.3, "evaluate": True}],
    },
]


class Hears:
    """A method that notes what it is told."""

    told: ClassVar[list[Any]] = []

    def attach(self, agent: Any) -> None:
        pass

    def enter(self, visit: Any) -> None:
        self.told.append(("enter", visit.index, visit.task.name, visit.start, visit.steps, visit.schedule))

    def leave(self, visit: Any) -> None:
        self.told.append(("leave", visit.index, visit.task.name, visit.start, visit.steps, visit.schedule))

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


def walk(**parts: Any) -> dict[str, Any]:
    return {
        "name": "walk",
        "tasks": TASKS,
        "agent": AGENTS["dqn"],
        "engine": {"envs": 3},
        "evaluation": {"episodes": 1},
        "boundary": {"announced": "detected", "optimizer": "reset", "buffer": "reset"},
        "methods": ["si", "lwf", "tests.test_detect.Hears"],
        "monitors": [],
        **parts,
    }


@pytest.fixture(autouse=True, scope="module")
def short_ticks() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("envs.gym.TICK", 300)
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    Hears.told.clear()
    return crl.train(walk(), out=tmp_path_factory.mktemp("whole"))


def filled(*numbers: float) -> Detector:
    detector = Detector()
    assert not any(detector.changed(number) for number in numbers)
    return detector


def test_the_statistic_is_pages_sum() -> None:
    """Of falls in units of noise, less the drift of 2.5, beyond 5."""
    steady = [10, 12] * 5  # the median is 11
    assert not filled(*steady).changed(11 - 7.4 * NOISE)
    assert filled(*steady).changed(11 - 7.6 * NOISE)
    assert not filled(*steady, 11 - 5.1 * NOISE).changed(11 - 4.8 * NOISE)  # 2.6 + 2.3, compared with what was before
    assert filled(*steady, 11 - 5.1 * NOISE).changed(11 - 5 * NOISE)


def test_a_rise_goes_beyond_all_that_was_learned() -> None:
    learned = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 10, 10]
    assert filled(*learned).changed(20.5)
    assert not filled(*learned).changed(19.5)
    assert not filled(*[0, 1] * 6).changed(20.5)  # nothing was learned yet: these may be the first steps of it


@pytest.mark.parametrize("seed", range(3))
def test_learning_and_noise_are_no_change(seed: int) -> None:
    draw = np.random.default_rng(seed)
    x = np.arange(100)
    sigmoid, growth = 200 / (1 + np.exp(-(x - 30) / 6)), np.minimum(5 * 1.2**x, 300)
    for curve in (np.zeros(100), x * 3.0, sigmoid, growth):
        returns = [*curve + draw.normal(0, 6, 100)]
        detector = filled(*returns)
        assert any(detector.changed(number) for number in np.array(returns[-3:]) - 200)


def test_what_the_learner_is_told(whole: Run) -> None:
    """Of segments: no task's name, and no boundary's step."""
    found = [record for record in whole.records if record.name == "boundary/detected"]
    assert [record.visit for record in found] == [2]
    at, total = found[0].step, 6027
    assert 3612 < at < total
    first, second = ("segment-1", 0, total), ("segment-2", at, total - at)
    shown = [(what, *rest) for what, _, *rest in Hears.told]
    assert shown == [
        ("enter", *first, (0, total)),
        ("leave", *first, (0, total)),
        ("enter", *second, (at, total)),
    ]
    last = {record.name: record.value for record in whole.records}
    assert last["metrics/detection_delay"] == at - 3612
    assert last["metrics/false_alarms"] == 0


def test_stopped_between_a_fall_and_its_alarm(whole: Run, tmp_path: Path) -> None:
    """And once more after it. Bit for bit: what was doubted is in the checkpoint, and so is the segment."""
    detect, found = Walk._detect, 0

    def until(self: Walk, visit: Any, score: float | None) -> None:
        detect(self, visit, score)
        if self.segment.index == 2 if found else visit.index == 2 and self.detector.fallen:
            self.asked_to_stop = "the test"

    stopped = tmp_path.joinpath(*whole.path.parts[-3:])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Walk, "_detect", until)
        for go in (lambda: crl.train(walk(), out=tmp_path), lambda: crl.resume(stopped)):
            with pytest.raises(CrlError, match="stopped by the test"):
                go()
            assert sum(record.name == "boundary/detected" for record in Run(stopped).records) == found
            found += 1
    assert remembered(crl.resume(stopped)) == remembered(whole)


def test_what_is_missed_has_a_reason(tmp_path: Path) -> None:
    tasks = [{**task, "steps": 300} for task in TASKS]
    run = crl.train(walk(tasks=tasks), out=tmp_path)
    missed = next(record for record in run.records if record.name == "metrics/detection_delay")
    assert math.isnan(missed.value) and missed.note == "no change was detected"


@pytest.mark.parametrize("name", METHODS)
def test_methods_that_can_do_with_a_detector(name: str) -> None:
    net = {"norm": "layer"} if name == "normalize_and_project" else {}
    agent = {"use": "tests.full_agent.FullAgent", "net": net}
    asked = config.read(walk(agent=agent, methods=[name], boundary={"announced": "detected"}))
    if name in REFUSED:
        with pytest.raises(CrlError, match=f"methods.0: {name} {REFUSED[name]}"):
            build.build(asked)
    else:
        assert [*build.build(asked).methods] == [name]


@pytest.mark.parametrize(
    "methods",
    [
        ["si", "lwf", "replay", "shrink_perturb", "redo", "l2_er"],
        ["generative_replay", "der", "head_reset", "spectral_norm"],
        ["plasticity_injection", "agem"],
        ["reset", "cbp"],
    ],
)
def test_they_live_through_a_change(methods: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Detector, "changed", lambda self, value: True)  # at every tick
    parts = {"agent": {"use": "tests.full_agent.FullAgent"}, "boundary": {"announced": "detected"}}
    run = crl.train(walk(tasks=[{**TASKS[0], "steps": 900}], methods=methods, **parts), out=tmp_path)
    assert sum(record.name == "boundary/detected" for record in run.records) == 3
    assert np.isfinite(run.matrix).all()


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"boundary": {"announced": "detected", "head": "per_task"}}, "boundary.head: per_task answers each task"),
        ({"agent": {"use": "tests.my_agent.MyAgent"}, "boundary": {"announced": "detected"}}, "which MyAgent lacks"),
    ],
)
def test_what_a_detector_cannot_tell_is_refused(parts: dict[str, Any], said: str) -> None:
    with pytest.raises(CrlError, match=said) as caught:
        build.build(config.read(walk(**parts)))
    assert "\n" not in str(caught.value)
