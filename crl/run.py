"""The walk: a learner goes through its tasks, is evaluated on all of them at every boundary, and leaves a folder."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from crl import config, metrics, sinks
from crl.core import (
    Agent,
    Array,
    Boundary,
    CrlError,
    Record,
    State,
    Visit,
    aside,
    brief,
    derive,
    random_state,
    set_random_state,
)
from crl.linalg import CurvatureError, Spectrum
from crl.store import RunFolder

EVALUATE, LOOK = 2, 3  # names of random streams, beside the visits' (1)


class Stopped(Exception):
    """The run was asked to stop, and has, with a checkpoint."""


class Walk:
    """One agent with one seed on its way through a sequence."""

    def __init__(self, plan: config.Plan, folder: RunFolder, verbosity: int, offset: int | None = None) -> None:
        self.plan, self.folder, self.experiment = plan, folder, plan.experiment
        self.agent = plan.agent
        self.names = [task.name for task in plan.tasks]
        self.rows: list[list[float]] = []
        self.step = 0
        self.jsonl = sinks.Jsonl(folder.records, offset)
        self.board = sinks.TensorBoard(folder.tensorboard, self.names)
        self.terminal = sinks.Terminal(verbosity=verbosity, visits=len(plan.order), total_steps=sum(plan.steps))
        self.asked_to_stop = ""
        self.told: set[str] = set()  # what has been said once, and is not said again
        for method in plan.methods:
            method.attach(plan.agent)

    # The story.

    def go(self, visit_index: int = 0, done: int = 0) -> None:
        """Walk from a boundary, or from `done` steps into the visit after it."""
        if visit_index == 0 and done == 0:
            self._boundary_row(0, None)
            self._checkpoint(0)
        for planned in self.plan.visits[visit_index:]:
            visit, done = replace(planned, done=done), 0
            if visit.done == 0:
                self._enter(visit)
            self.terminal.start(visit.index, visit.task.name, visit.steps, visit.start, visit.done)
            self._train(visit)
            if visit.rules.announced:
                for method in self.plan.methods:
                    method.leave(visit)
            self._look(visit, "end")
            self._boundary_row(visit.index, visit)
            self._checkpoint(visit.index)
            if self.asked_to_stop and visit.index < len(self.plan.order):
                raise Stopped

    def _enter(self, visit: Visit) -> None:
        enter(self.plan, visit)
        self._look(visit, "init")

    def _train(self, visit: Visit) -> None:
        clock, before = time.perf_counter(), visit.done
        for tick in visit.task.train(self.agent, visit):
            self.step = visit.start + tick.steps
            now = time.perf_counter()
            rate = (tick.steps - before) / max(now - clock, 1e-9)
            clock, last = now, before
            before = tick.steps
            numbers = {**tick.numbers, "time/steps_per_second": rate, "walk/visit": float(visit.index)}
            self._log(numbers, visit.index, visit.task.name)
            self._refuse_nan(tick.numbers, visit)
            self.terminal.progress(tick.steps, tick.numbers.get("train/return", math.nan))
            self.terminal.numbers(numbers)
            every = self.experiment.evaluation.every
            if every and (visit.start + last) // every < self.step // every and tick.steps < visit.steps:
                self._evaluate(visit.index, "during")
            if self.asked_to_stop and tick.steps < visit.steps:
                self._checkpoint(visit.index - 1, tick.steps)
                raise Stopped

    def _look(self, visit: Visit, phase: str) -> None:
        boundary = boundary_of(self.plan, visit, phase, self.step, self.terminal.doing)
        for name, monitor in self.plan.monitors.items():
            began = time.perf_counter()
            found, problem = look(name, monitor, boundary)
            for key, value in found.items():
                if isinstance(value, Spectrum):
                    self.folder.write_spectrum(visit.index, phase, key, value)
                    self.board.spectrum(visit.index, phase, key, value)
                else:
                    self._log({key: value}, visit.index, visit.task.name, phase)
            if problem:
                self._log({name: math.nan}, visit.index, visit.task.name, phase, note=problem)
                if problem not in self.told:
                    self.terminal.note(f"monitor {name}: {problem}")
                self.told.add(problem)
            if found or problem:
                cost = {f"time/monitor/{name}": time.perf_counter() - began}
                self._log(cost, visit.index, visit.task.name, phase)

    def _evaluate(self, visit: int, phase: str) -> list[float]:
        evaluation = self.experiment.evaluation
        row = []
        for column, task in enumerate(self.plan.tasks):
            seed = derive(self.experiment.seed, EVALUATE, column)  # the same episodes in every row
            score = task.evaluate(self.agent, seed, evaluation.episodes, evaluation.greedy)
            numbers = {"eval/return": score.mean}
            if score.lengths:
                numbers["eval/length"] = float(np.mean(score.lengths))
            if score.reason:
                self.terminal.note(f"{task.name}: not evaluated: {score.reason}")
            self._log(numbers, visit, task.name, phase)
            row.append(score.mean)
        return row

    def _boundary_row(self, index: int, visit: Visit | None) -> None:
        self.rows.append(self._evaluate(index, "end" if visit else "init"))
        order = self.plan.order[:index]
        summary = metrics.summary(np.array(self.rows), order) if index else {}
        self._log({f"metrics/{name}": metric.value for name, metric in summary.items()}, index)
        self.folder.write_matrix(self.names, self.rows)
        self.board.matrix(self.step, self.rows, self.row_names[: len(self.rows)], self.names, order)
        scores = dict(zip(self.names, self.rows[-1], strict=True))
        self.terminal.boundary(index, visit.task.name if visit else "", scores)

    @property
    def row_names(self) -> list[str]:
        """What each row of the matrix came after."""
        return ["start", *(f"{i}. {self.names[j]}" for i, j in enumerate(self.plan.order, start=1))]

    # Small parts.

    def _log(
        self, found: Mapping[str, float | Array], visit: int, task: str = "", phase: str = "", note: str = ""
    ) -> None:
        for name, value in found.items():
            plain = float(value) if np.ndim(value) == 0 else np.asarray(value, dtype=float).ravel().tolist()
            record = Record(name, plain, self.step, visit, task, phase, note)
            self.jsonl.write(record)
            self.board.write(record)
        self.jsonl.flush()

    def _refuse_nan(self, numbers: Mapping[str, float], visit: Visit) -> None:
        bad = [name for name, value in numbers.items() if name.startswith("losses/") and not math.isfinite(value)]
        if bad:
            raise CrlError(
                f"{bad[0]} is not finite any more: step {self.step}, visit {visit.index} ({visit.task.name}); "
                f"the last good checkpoint is {self.folder.latest()}"
            )

    def _checkpoint(self, visit: int, done: int = 0) -> None:
        state: State = {
            "digest": self.experiment.digest,
            "visit": visit,
            "done": done,
            "step": self.step,
            "offset": self.jsonl.offset,
            "matrix": self.rows,
            "agent": self.agent.state_dict(),
            "tasks": {task.name: task.state_dict() for task in self.plan.tasks},
            "methods": [method.state_dict() for method in self.plan.methods],
            "monitors": {
                name: monitor.state_dict()
                for name, monitor in self.plan.monitors.items()
                if hasattr(monitor, "state_dict")
            },
            "random": random_state(),
        }
        self.folder.save(self.folder.stopped if done else self.folder.boundary(visit), state)

    def restore(self, state: State) -> None:
        """Become what the walk was when this checkpoint was taken."""
        self.step, self.rows = state["step"], [list(row) for row in state["matrix"]]
        load_agent(self.plan.agent, state["agent"])
        for task in self.plan.tasks:
            task.load_state_dict(state["tasks"][task.name])
        for method, value in zip(self.plan.methods, state["methods"], strict=True):
            method.load_state_dict(value)
        for name, value in state["monitors"].items():
            self.plan.monitors[name].load_state_dict(value)
        set_random_state(state["random"])
        for record in sinks.read_records(self.folder.records):
            self.board.write(record)
        for visit, phase, spectrum in self.folder.read_spectra():
            if visit <= len(self.rows) - 1 + bool(state["done"]):
                self.board.spectrum(visit, phase, spectrum.settings["name"], spectrum)
        order = self.plan.order[: len(self.rows) - 1]
        self.board.matrix(self.step, self.rows, self.row_names[: len(self.rows)], self.names, order)
        self.folder.write_matrix(self.names, self.rows)

    def close(self) -> None:
        """Flush and close every sink."""
        for sink in (self.terminal, self.jsonl, self.board):
            sink.close()


def enter(plan: config.Plan, visit: Visit) -> None:
    """The moment before a visit: the agent hears of it and then the methods, if boundaries are announced."""
    if visit.rules.announced or visit.index == 1:  # the first visit is the start of the walk, not a boundary in it
        own = getattr(plan.agent, "enter", None)
        if own is not None:
            own(visit)
    if visit.rules.announced:
        for method in plan.methods:
            method.enter(visit)


def boundary_of(
    plan: config.Plan, visit: Visit, phase: str, step: int, tell: Callable[[str], None] = lambda what: None
) -> Boundary:
    """What monitors are shown before or after a visit."""
    seen = {plan.order[i]: plan.visits[i].task for i in range(visit.index - 1)}
    earlier = tuple(task for task in seen.values() if task is not visit.task)
    seed = derive(plan.experiment.seed, LOOK, visit.index)
    return Boundary(visit, phase, step, plan.agent, earlier, seed, tell=tell)


def look(name: str, monitor: Any, boundary: Boundary) -> tuple[dict[str, Any], str]:
    """(what a monitor measures, under its name; or in one sentence why it cannot), leaving no trace."""
    lacking = [part for part in getattr(monitor, "needs", ()) if not hasattr(boundary.agent, part)]
    if lacking:
        return {}, f"{type(boundary.agent).__name__} has no {' and no '.join(lacking)}, so there is nothing to look at"
    where = f"visit {boundary.visit.index}, {boundary.phase}: looking at {name}"
    boundary.tell(where)
    shown = replace(boundary, tell=lambda what: boundary.tell(f"{where}, {what}"))
    with aside(boundary.seed):
        try:
            found = monitor.measure(shown)
        except (CrlError, CurvatureError) as error:
            return {}, str(error)
        except Exception as error:  # a monitor of anybody's must not end a long run
            return {}, brief(error)
    return {f"{name}/{key}": value for key, value in found.items()}, ""


@dataclass(frozen=True)
class Run:
    """A run's folder, opened: its experiment, records, matrix and agents."""

    path: Path

    @cached_property
    def experiment(self) -> config.Experiment:
        """What was asked for."""
        return config.read(self.path / "config.yaml")

    @cached_property
    def records(self) -> list[Record]:
        """Every line of the log."""
        return sinks.read_records(self.path / "metrics.jsonl")

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

    def at(self, visit: int | None = None) -> tuple[config.Plan, State]:
        """The plan with its agent as it was after a visit (by default: at the last checkpoint), and that checkpoint."""
        folder = RunFolder(self.path)
        folder.manifest()
        state = folder.load(folder.latest() if visit is None else folder.boundary(visit), self.experiment.digest)
        plan = config.build(self.experiment)
        load_agent(plan.agent, state["agent"])
        return plan, state

    def curve(self, name: str, visit: int | None = None) -> tuple[Array, Array]:
        """(steps, values) of a record, over the whole walk or one visit."""
        chosen = [r for r in self.records if r.name == name and visit in (None, r.visit)]
        return np.array([r.step for r in chosen]), np.array([r.value for r in chosen], dtype=float)


def load_agent(agent: Agent, state: State) -> None:
    """Fill an agent from a checkpoint, or say in one line that it does not fit."""
    try:
        agent.load_state_dict(state)
    except (KeyError, RuntimeError, ValueError, TypeError, AttributeError) as error:
        raise CrlError(f"the checkpoint does not fit this agent: {str(error).strip().splitlines()[0]}") from error


def train(
    source: str | Path | Mapping[str, Any],
    *,
    out: str | Path = "runs",
    overwrite: bool = False,
    verbosity: int = -1,
    changes: tuple[tuple[str, Any], ...] = (),
    **settings: Any,
) -> Run:
    """Walk through a sequence and return the run. `settings` are top-level keys of the YAML: `seed=3, agent="dqn"`."""
    experiment = config.read(source, (*settings.items(), *changes))
    folder = RunFolder(Path(out) / experiment.name / experiment.label / f"seed-{experiment.seed}")
    if folder.occupied and not overwrite:
        folder.create({}, {}, overwrite=False)  # refuses, before anything slow
    plan = config.build(experiment)
    folder.create(experiment.plain(), _manifest(plan), overwrite=overwrite)
    _walk(Walk(plan, folder, verbosity))
    _baseline(experiment, folder, plan, verbosity)
    return Run(folder.path)


def resume(path: str | Path, *, verbosity: int = -1) -> Run:
    """Go on from a run's last checkpoint; the result is that of a run that was never stopped."""
    folder = RunFolder(Path(path))
    if folder.manifest()["status"] == "finished":
        raise CrlError(f"{folder.path}: this run is finished; there is nothing to resume")
    run = Run(folder.path)
    state = folder.load(folder.latest(), run.experiment.digest)
    plan = config.build(run.experiment)
    if folder.manifest()["status"] == "walked":
        _baseline(run.experiment, folder, plan, verbosity)
        return run
    lost = _lost(run, state["step"])
    walk = Walk(plan, folder, verbosity, state["offset"])
    walk.restore(state)
    if lost:
        walk.terminal.note(f"visit {state['visit'] + 1} starts again from its boundary: {lost:,} steps are repeated")
    _walk(walk, state["visit"], state["done"])
    _baseline(run.experiment, folder, plan, verbosity)
    return Run(folder.path)


def _walk(walk: Walk, visit: int = 0, done: int = 0) -> None:
    """Walk to the end, and leave a manifest that says how it ended."""
    folder, began = walk.folder, time.time()
    folder.update_manifest(status="running")
    before = folder.manifest().get("seconds", 0.0)
    status = "failed"
    try:
        with _listening(walk):
            walk.go(visit, done)
        _finish(walk)
        status = "finished" if walk.experiment.baseline == "none" else "walked"
    except Stopped:
        status = "interrupted"
        raise CrlError(
            f"stopped by {walk.asked_to_stop} at step {walk.step}; go on with: crl resume {folder.path}"
        ) from None
    finally:
        walk.close()
        folder.update_manifest(status=status, seconds=round(before + time.time() - began, 3), step=walk.step)


def _finish(walk: Walk) -> None:
    """What can only be said at the end: areas under the curves, plasticity over revisits."""
    walk.jsonl.flush()
    areas = visit_areas(Run(walk.folder.path))
    for index, area in enumerate(areas, start=1):
        walk._log({"metrics/area": area.value}, index, walk.names[walk.plan.order[index - 1]])
    for column, name in enumerate(walk.names):
        own = [areas[i].value for i, visited in enumerate(walk.plan.order) if visited == column]
        if len(own) > 1:
            for ratio in metrics.plasticity_ratio(own):
                walk._log({f"metrics/plasticity_ratio/{name}": ratio.value}, len(walk.plan.order), name)
    summary = metrics.summary(np.array(walk.rows), walk.plan.order)
    shown = {name: metric.value for name, metric in summary.items()}
    walk.board.hparams(_flat(walk.experiment.plain()), shown)
    walk.terminal.table(walk.rows, walk.row_names, walk.names, shown)


def visit_areas(run: Run) -> list[metrics.Metric]:
    """The area under the training-return curve of each visit: its mean return over the visit's steps."""
    visits = sorted({record.visit for record in run.records if record.visit > 0})
    areas = []
    for visit in visits:
        steps, values = run.curve("train/return", visit)
        ticks = run.curve("walk/visit", visit)[0]
        start = run.curve("walk/visit", visit - 1)[0].max(initial=0)
        areas.append(metrics.area_under_curve(steps - start, values, float(ticks.max(initial=start) - start)))
    return areas


def _baseline(experiment: config.Experiment, folder: RunFolder, plan: config.Plan, verbosity: int) -> None:
    """`baseline: fresh`: a new agent alone on each task, by the same walk, for forward transfer."""
    if experiment.baseline != "fresh":
        return
    main = Run(folder.path)
    areas = visit_areas(main)
    jsonl = sinks.Jsonl(folder.records, folder.records.stat().st_size)
    for column, task in enumerate(plan.tasks):
        alone = RunFolder(folder.path / "baseline" / f"task-{column}")
        first = plan.order.index(column)
        if not (alone.occupied and alone.manifest()["status"] == "finished"):
            entry = _only(experiment, task.name, plan.steps[first])
            single = config.read(
                {**experiment.plain(), "baseline": "none", "repeat": 1, "monitors": [], "tasks": [entry]}
            )
            alone.create(single.plain(), {"status": "new"}, overwrite=True)
            _walk(Walk(config.build(single), alone, min(verbosity, -1)))
        base, best = visit_areas(Run(alone.path))[0].value, getattr(task, "best", None)
        ratio = metrics.forward_transfer_ratio(areas[first].value, base)
        found = {"metrics/fresh_area": base, "metrics/forward_transfer_ratio": ratio.value}
        if best is not None:
            found["metrics/forward_transfer"] = metrics.forward_transfer(areas[first].value, base, best).value
        for name, value in found.items():
            jsonl.write(Record(name, value, sum(plan.steps), first + 1, task.name, "baseline"))
    jsonl.close()
    folder.update_manifest(status="finished")


def _only(experiment: config.Experiment, name: str, steps: int) -> dict[str, Any]:
    """The entry of `tasks:` that makes one task alone, for as long as its first visit was."""
    entries = ((spec, *part) for spec in experiment.tasks for part in config.spread(spec, "tasks"))
    spec, _, setting = next(entry for entry in entries if entry[1] == name)
    return {**dataclasses.asdict(spec), "steps": steps, "change": setting}


def _manifest(plan: config.Plan) -> dict[str, Any]:
    experiment = plan.experiment
    return {
        "status": "new",
        "digest": experiment.digest,
        "seed": experiment.seed,
        "threads": experiment.threads,
        "device": plan.device,
        "engine": f"{experiment.engine.kind} x {experiment.engine.envs}",
        "boundary": experiment.plain()["boundary"],
        "tasks": [task.name for task in plan.tasks],
        "visits": [{"task": visit.task.name, "steps": visit.steps, "seed": visit.seed} for visit in plan.visits],
        "observation": str(plan.interface.observation)[:200],
        "action": str(plan.interface.action),
    }


def _lost(run: Run, step: int) -> int:
    """Steps logged after the checkpoint, which will be taken again."""
    return max((record.step for record in run.records), default=step) - step


def _flat(data: Any, place: str = "") -> dict[str, Any]:
    if isinstance(data, dict):
        return {k: v for key, value in data.items() for k, v in _flat(value, f"{place}.{key}".lstrip(".")).items()}
    return {place: data if isinstance(data, bool | int | float | str) else str(data)}


@contextlib.contextmanager
def _listening(walk: Walk) -> Iterator[None]:
    """SIGINT and SIGTERM ask the walk to stop at its next safe point; asked twice, it stops at once."""

    def ask(number: int, frame: Any) -> None:
        if walk.asked_to_stop:
            raise KeyboardInterrupt
        walk.asked_to_stop = signal.Signals(number).name
        walk.terminal.note(f"{walk.asked_to_stop}: stopping at the next safe point")

    try:
        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not in the main thread: the caller keeps its signals
        before = {}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
