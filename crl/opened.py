"""A run's folder, opened: what was asked for, what was logged, and the agents of its checkpoints."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from crl import build, config, metrics, sinks
from crl.core import Agent, Array, CrlError, Record, State, brief
from crl.store import RunFolder


@dataclass(frozen=True)
class Run:
    """A run's folder, opened: its experiment, records, matrix and agents."""

    path: Path

    @cached_property
    def experiment(self) -> config.Experiment:
        """What was asked for."""
        path = self.path / "config.yaml"
        try:
            return config.read(path)
        except CrlError as error:
            raise error if str(path) in str(error) else CrlError(f"{path}: {error}") from None

    @cached_property
    def records(self) -> list[Record]:
        """Every line of the log."""
        mark = self.manifest.get("log") if (self.path / "manifest.json").exists() else None
        return sinks.read_records(self.path / "metrics.jsonl", mark or ())

    @property
    def tasks(self) -> list[str]:
        """The names of the matrix's columns."""
        return RunFolder(self.path).read_matrix()[0]

    @property
    def matrix(self) -> Array:
        """R[i, j]: mean return on task j after visit i; row 0 is before the first visit."""
        return np.array(RunFolder(self.path).read_matrix()[1])

    @property
    def manifest(self) -> dict[str, Any]:
        """What the run says of itself."""
        return RunFolder(self.path).manifest()

    @cached_property
    def agent(self) -> Agent:
        """The agent as it was at the last checkpoint."""
        return self.at()[0].agent

    def at(self, visit: int | None = None) -> tuple[build.Plan, State]:
        """The plan with its agent as it was after a visit (by default: at the last checkpoint), and that checkpoint."""
        folder = RunFolder(self.path)
        folder.manifest()
        state = folder.load(folder.latest() if visit is None else folder.boundary(visit), self.experiment.digest)
        plan = build.build(self.experiment)
        fits(plan, state)
        restore(plan, state)
        return plan, state

    def curve(self, name: str, visit: int | None = None) -> tuple[Array, Array]:
        """(steps, values) of a record, over the whole walk or one visit."""
        chosen = [r for r in self.records if r.name == name and visit in (None, r.visit)]
        return np.array([r.step for r in chosen]), np.array([r.value for r in chosen], dtype=float)


def restore(plan: build.Plan, state: State) -> None:
    """Fill agent and methods from a checkpoint, or say in one line that it does not fit: the structure comes first."""
    agent, methods = plan.agent, plan.methods
    with fitting():
        for name, method in methods.items():
            if hasattr(method, "rebuild"):
                method.rebuild(agent, state["methods"][name])
        agent.load_state_dict(state["agent"])
        for name, method in methods.items():
            method.attach(agent)
            method.load_state_dict(state["methods"][name])
        for method in methods.values():
            if hasattr(method, "find_parameters"):
                method.find_parameters()  # one after it may have turned the model to another part of it


def fits(plan: build.Plan, state: State) -> None:
    """Refuse a checkpoint that is nowhere in this walk."""
    visit, done, step = state["visit"], state["done"], state["step"]
    if visit > len(plan.order) or (done and (visit == len(plan.order) or done >= plan.steps[visit])):
        raise CrlError(f"the checkpoint does not fit this walk: it was taken {done:,} steps after visit {visit}")
    if step > sum(plan.steps):
        raise CrlError(f"the checkpoint does not fit this walk: it was taken at step {step:,}")
    if any(len(row) != len(plan.tasks) for row in state["matrix"]):
        raise CrlError(f"the checkpoint does not fit this walk: its matrix is not one of {len(plan.tasks)} tasks")


@contextlib.contextmanager
def fitting() -> Iterator[None]:
    """One line where a state cannot be loaded."""
    try:
        yield
    except (LookupError, RuntimeError, ValueError, TypeError, AttributeError, OverflowError) as error:
        raise CrlError(f"the checkpoint does not fit this agent: {brief(error)}") from error


def visit_areas(run: Run) -> list[metrics.Metric]:
    """The area under the training curve of each visit: its mean return (or accuracy) over the visit's steps."""
    measure = run.manifest.get("measure", "return")
    visits = sorted({record.visit for record in run.records if record.visit > 0})
    areas = []
    for visit in visits:
        steps, values = run.curve(f"train/{measure}", visit)
        ticks = run.curve("walk/visit", visit)[0]
        start = run.curve("walk/visit", visit - 1)[0].max(initial=0)
        if measure == "accuracy":
            areas.append(metrics.online_mean(steps - start, values))
            continue
        areas.append(metrics.area_under_curve(steps - start, values, float(ticks.max(initial=start) - start)))
    return areas
