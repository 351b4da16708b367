"""What happens at a boundary: the agent and the methods hear of it, and monitors look."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from torch import nn

from crl import build
from crl.core import Boundary, CrlError, Visit, aside, brief, derive, has_part
from crl.detect import Segment
from crl.linalg import CurvatureError, Estimate, Spectrum
from crl.linalg.problem import steady

LOOK = 3  # the name of a random stream, beside the visits' (1) and evaluation's (2)
SEGMENT = 7  # and of another


def enter(plan: build.Plan, visit: Visit) -> dict[str, float]:
    """The moment before a visit: the agent hears of it and then the methods, if they hear of boundaries.

    Returns the seconds that each method took.
    """
    if visit.rules.announced == "detected" and visit.index == 1:
        visit = segment(plan, 1, 0)
    if _heard(visit) or visit.index == 1:  # the first visit is the start of the walk, not a boundary in it
        own = getattr(plan.agent, "enter", None)
        if own is not None:
            own(visit)
    return tell_methods(plan, "enter", visit)


def tell_methods(plan: build.Plan, what: str, visit: Visit) -> dict[str, float]:
    """Tell the methods, if they hear of it, that a visit begins or is over: the seconds that each took.

    They hear of it in the order of the YAML, but of a beginning those first that grow the model.
    """
    spent = {}
    order = sorted(plan.methods.items(), key=lambda item: what == "enter" and not hasattr(item[1], "rebuild"))
    for name, method in order if _heard(visit) else ():
        began = time.perf_counter()
        getattr(method, what)(visit)
        spent[name] = time.perf_counter() - began
    for method in plan.methods.values():
        if what == "enter" and hasattr(method, "find_parameters"):
            method.find_parameters()  # a method after it may have grown the model
    return spent


def segment(plan: build.Plan, index: int, start: int) -> Visit:
    """What the learner is told where a change was detected: that there is one, and no more than it can know."""
    seed, total = derive(plan.experiment.seed, SEGMENT, index), sum(plan.steps)
    task: Any = Segment(f"segment-{index}")
    return Visit(index, task, max(total - start, 1), seed, start, total, plan.experiment.boundary)


def _heard(visit: Visit) -> bool:
    return visit.rules.announced is True or isinstance(visit.task, Segment)


def boundary_of(
    plan: build.Plan, visit: Visit, phase: str, step: int, tell: Callable[[str], None] = lambda what: None
) -> Boundary:
    """What monitors are shown before or after a visit."""
    seen = {plan.order[i]: plan.visits[i].task for i in range(visit.index - 1)}
    earlier = tuple(task for task in seen.values() if task is not visit.task)
    seed = derive(plan.experiment.seed, LOOK, visit.index)
    return Boundary(visit, phase, step, plan.agent, earlier, seed, tell=tell)


def look(name: str, monitor: Any, boundary: Boundary) -> tuple[dict[str, Any], str]:
    """(what a monitor measures, under its name; or in one sentence why it cannot), leaving no trace."""
    lacking = [part for part in getattr(monitor, "needs", ()) if not has_part(boundary.agent, part)]
    if lacking:
        parts = " or ".join(lacking)
        return {}, f"{type(boundary.agent).__name__} has no {parts}, so there is nothing to look at"
    where = f"visit {boundary.visit.index}, {boundary.phase}: looking at {name}"
    boundary.tell(where)
    shown = replace(boundary, tell=lambda what: boundary.tell(f"{where}, {what}"))
    model = getattr(boundary.agent, "model", None)
    still = steady(model) if isinstance(model, nn.Module) else contextlib.nullcontext()
    with aside(boundary.seed), still:  # batch norm counts no look
        try:
            found = {key: _numbers(value) for key, value in monitor.measure(shown).items()}
        except (CrlError, CurvatureError) as error:
            return {}, str(error)
        except (Exception, SystemExit) as error:  # a monitor of anybody's must not end a long run
            return {}, brief(error)
    return {f"{name}/{key}": value for key, value in found.items()}, ""


def _numbers(value: Any) -> Any:
    """A spectrum, an estimate, or an array: anything else fails here, where the monitor is to be named."""
    return value if isinstance(value, Spectrum | Estimate) else np.asarray(value, dtype=float)
