"""How long a walk will take here: everything that it does is tried on a throw-away agent, for a few seconds in all."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from crl import build
from crl.boundary import boundary_of, enter, look, tell_methods
from crl.core import Boundary, Visit, aside, facing
from crl.monitors.look import PHASES, View

TRIAL = 1.5  # seconds that learning may be tried for, and all tasks together be stepped for
PACE = 0.15  # seconds that one task is stepped for, at most
FEW = 32  # samples of a first, short look
IMAGES = 256  # that are answered at once
WHOLE = 2.0  # seconds that a whole look may take to be tried


@dataclass(frozen=True)
class Estimate:
    """Seconds for each part of a walk."""

    learning: float
    evaluation: float
    monitors: float

    @property
    def whole(self) -> float:
        """Seconds for all of it."""
        return self.learning + self.evaluation + self.monitors


@dataclass(frozen=True)
class Trial:
    """What was measured of each task: seconds a step, and steps an episode."""

    step: list[float]
    episode: list[float]


def estimate(plan: build.Plan) -> Estimate:
    """Try every part of a walk and count how often it comes. The plan's agent is not to be used any more."""
    trial = _tried(plan)
    with aside(0):
        for method in plan.methods.values():
            method.attach(plan.agent)
        visit = replace(plan.visits[0], steps=10**9, total=10**9)
        began = time.perf_counter()
        enter(plan, visit)
        around = time.perf_counter() - began
        answer, monitors = _answer(plan), _monitors(plan)
        learning = _learning(plan, visit, trial)
        around += sum(tell_methods(plan, "leave", visit).values())
    walked = [*zip(plan.steps, plan.order, strict=True)]
    if plan.experiment.baseline != "none":  # each task once more, alone
        walked += [(plan.steps[plan.order.index(j)], j) for j in range(len(plan.tasks))]
    training = sum(steps * (learning + trial.step[j]) for steps, j in walked)
    return Estimate(training + around * len(plan.order), _evaluation(plan, trial, answer), monitors)


def _tried(plan: build.Plan) -> Trial:
    """Tasks that are alike are stepped once for all of them."""
    alike = [getattr(task, "alike", i) for i, task in enumerate(plan.tasks)]
    seconds = min(PACE, TRIAL / len(set(alike)))
    paces: dict[Any, tuple[float, float]] = {}
    for key, task in zip(alike, plan.tasks, strict=True):
        if key not in paces:
            paces[key] = task.pace(seconds)  # type: ignore[attr-defined]  # our own tasks have it
    return Trial([paces[key][0] for key in alike], [paces[key][1] for key in alike])


def _answer(plan: build.Plan) -> float:
    """Seconds that the agent takes to answer, for each row that it is asked for at once."""
    task, rows = plan.tasks[0], IMAGES if plan.experiment.stream else plan.interface.envs
    with aside(0), facing(plan.agent, task):
        experience = task.sample(plan.agent, 0, rows)
        seen = experience.obs if plan.experiment.stream else experience.obs[0]
        plan.agent.act(seen, None, True)  # the first takes longer
        seconds = _timed(plan.agent.act, seen, None, True)
    return seconds / len(seen)


def _learning(plan: build.Plan, visit: Visit, trial: Trial) -> float:
    """Seconds that acting and learning take of each step, beside the environment."""
    began, steps = time.perf_counter(), 1
    for tick in visit.task.train(plan.agent, visit):
        steps = tick.steps
        if time.perf_counter() - began > TRIAL:
            break
    return max((time.perf_counter() - began) / steps - trial.step[plan.order[0]], 0.0)


def _evaluation(plan: build.Plan, trial: Trial, answer: float) -> float:
    """Seconds for all rows of the matrix, and for the evaluations between."""
    asked, order = plan.experiment.evaluation, plan.order
    rows = [*range(len(order) + 1), *([1] * (sum(plan.steps) // asked.every) if asked.every else [])]
    if plan.experiment.stream:
        each = [task.tested * answer for task in plan.tasks]  # type: ignore[attr-defined]
    else:
        parts = zip(trial.step, trial.episode, strict=True)
        each = [asked.episodes * length * (step + answer) for step, length in parts]
    mean, tasks = sum(each) / len(each), len(each)
    distinct = _distinct(order)
    count = sum({"all": tasks, "seen": distinct[row], "own": min(row, 1)}[asked.of] for row in rows)
    return float(mean * count)


def _distinct(order: list[int]) -> list[int]:
    """How many different tasks have been visited after each visit, beginning with none."""
    seen: set[int] = set()
    return [0, *(len(seen := seen | {column}) for column in order)]


# Monitors.


def _monitors(plan: build.Plan) -> float:
    """Seconds for all looks: a look of each is tried, at the first boundary, and the looks that are due are counted."""
    boundary = boundary_of(plan, plan.visits[0], "init", 0)
    drawn: dict[int, tuple[float, int]] = {}  # for each number of samples: seconds to draw them, and how often
    total = 0.0
    for name, monitor in plan.monitors.items():
        looks = sum(_looks(plan, monitor))
        size = _samples(boundary, monitor)
        if size:
            before, often = drawn.get(size, (0.0, 0))
            drawn[size] = (before + _timed(boundary.experience, None, size), max(often, looks))
        total += looks * _look(name, monitor, boundary)
    return total + sum(seconds * often for seconds, often in drawn.values())


def _looks(plan: build.Plan, monitor: Any) -> Iterator[int]:
    """For each boundary that a monitor looks at, at how many tasks it does."""
    seen = _distinct(plan.order)
    several = getattr(monitor, "earlier", False) or getattr(monitor, "compares", False)
    for visit, before in zip(plan.visits, seen, strict=False):
        for phase in PHASES:
            due = getattr(monitor, "due", lambda boundary: True)
            if due(Boundary(visit, phase, 0, plan.agent, (), 0)):
                yield 1 + before if several else 1


def _samples(boundary: Boundary, monitor: Any) -> int:
    """How much experience a monitor asks for; none where it draws none, or its own."""
    if not hasattr(monitor, "samples") or not hasattr(boundary.agent, "prepare"):
        return 0
    return View(boundary, boundary.task, monitor.samples).size


def _look(name: str, monitor: Any, boundary: Boundary) -> float:
    """Seconds for one look at one task; of one that would take long, a look at few samples stands for it."""
    if getattr(monitor, "samples", 0) > FEW:
        few = copy.copy(monitor)
        few.samples = FEW
        seconds = _products(name, few, boundary) * monitor.samples / FEW
        if seconds > WHOLE:
            return float(seconds)
    return _products(name, monitor, boundary)


def _products(name: str, monitor: Any, boundary: Boundary) -> float:
    """Seconds for a look; one that takes many products with a matrix is tried with few, and with a few more."""
    if not hasattr(monitor, "shortened"):
        return _timed(look, name, copy.copy(monitor), boundary)
    least = _timed(look, name, monitor.shortened(2), boundary)
    if least > WHOLE:
        return float(least * monitor.products / 4)  # it takes two before the first step
    more = _timed(look, name, monitor.shortened(8), boundary)
    return float(least + max(more - least, 0.0) / 6 * monitor.products)


def _timed(call: Any, *args: Any) -> float:
    began = time.perf_counter()
    call(*args)
    return time.perf_counter() - began
