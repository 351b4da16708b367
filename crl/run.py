"""The walk: a learner goes through its tasks, is evaluated on all of them at every boundary, and leaves a folder."""

from __future__ import annotations

import contextlib
import math
import signal
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from crl import build, config, metrics, named, sinks
from crl.baseline import add_baseline
from crl.boundary import boundary_of, enter, look, segment, tell_methods
from crl.core import (
    Array,
    CrlError,
    Record,
    State,
    Visit,
    derive,
    plain,
    random_state,
    set_random_state,
)
from crl.detect import Detector
from crl.linalg import Spectrum
from crl.opened import Run, restore, visit_areas
from crl.store import RunFolder

EVALUATE = 2  # the name of a random stream, beside the visits' (1) and the monitors' (3)


class Stopped(Exception):
    """The run was asked to stop, and has, with a checkpoint."""


class Walk:
    """One agent with one seed on its way through a sequence."""

    def __init__(self, plan: build.Plan, folder: RunFolder, verbosity: int, offset: int | None = None) -> None:
        self.plan, self.folder, self.experiment = plan, folder, plan.experiment
        self.agent = plan.agent
        self.names = [task.name for task in plan.tasks]
        self.rows: list[list[float]] = []
        self.step = 0
        self.jsonl = sinks.Jsonl(folder.records, offset)
        self.board = sinks.TensorBoard(folder.tensorboard, self.names, plan.measure)
        self.terminal = sinks.Terminal(len(plan.order), sum(plan.steps), verbosity=verbosity, measure=plan.measure)
        self.detector, self.segment = Detector(), segment(plan, 1, 0)  # of use where boundaries are detected
        self.asked_to_stop = ""
        self.spent: dict[str, float] = {}  # by methods, at boundaries since the last tick
        self.told: set[str] = set()  # what has been said once, and is not said again

    # The story.

    def go(self, visit_index: int = 0, done: int = 0) -> None:
        """Walk from a boundary, or from `done` steps into the visit after it."""
        if visit_index == 0 and done == 0 and not self.rows:
            for method in self.plan.methods.values():
                method.attach(self.agent)
            self._boundary_row(0, None)
            self._checkpoint(0)
        for planned in self.plan.visits[visit_index:]:
            visit, done = replace(planned, done=done), 0
            if visit.done == 0:
                self._enter(visit)
            self.terminal.start(visit.index, visit.task.name, visit.steps, visit.start, visit.done)
            self._train(visit)
            self._spend(tell_methods(self.plan, "leave", visit))
            self._look(visit, "end")
            self._boundary_row(visit.index, visit)
            self._checkpoint(visit.index)
            if self.asked_to_stop and visit.index < len(self.plan.order):
                raise Stopped

    def _enter(self, visit: Visit) -> None:
        self._spend(enter(self.plan, visit))
        setting = getattr(visit.task, "setting", {})
        numbers = {f"setting/{name}": value for name, value in setting.items() if isinstance(value, int | float)}
        self._log(numbers, visit.index, visit.task.name)
        self._look(visit, "init")

    def _spend(self, seconds: Mapping[str, float]) -> None:
        """Boundaries are a part of what a method takes: they are told of at the next tick."""
        for name, value in seconds.items():
            self.spent[name] = self.spent.get(name, 0.0) + value

    def _train(self, visit: Visit) -> None:
        clock, logged, before = time.perf_counter(), visit.done, visit.done
        for tick in visit.task.train(self.agent, visit):
            self.step = visit.start + tick.steps
            last, before = before, tick.steps
            if tick.numbers:
                now = time.perf_counter()
                rate = (tick.steps - logged) / max(now - clock, 1e-9)
                clock, logged = now, tick.steps
            if tick.numbers:
                numbers = {**tick.numbers, **self._methods_did()}
                numbers |= {"time/steps_per_second": rate, "walk/visit": float(visit.index)}
                self._log(numbers, visit.index, visit.task.name)
                self._refuse_nan(tick.numbers, visit)
                self.terminal.numbers(numbers)
            score = tick.numbers.get(f"train/{self.plan.measure}")
            self.terminal.progress(tick.steps, score)
            self._detect(visit, score)
            if tick.steps >= visit.steps:
                continue
            if self._passed(self.experiment.evaluation.every, visit.start + last):
                self._evaluate(visit.index, "during")
            if self.asked_to_stop or self._passed(self.experiment.checkpoint.every, visit.start + last):
                self._refuse_nan(getattr(visit.task, "so_far", dict)(), visit)
                self._checkpoint(visit.index - 1, tick.steps)
            if self.asked_to_stop:
                raise Stopped

    def _detect(self, visit: Visit, score: float | None) -> None:
        """Where the learner finds boundaries by itself: if this is one, it is told so."""
        listens = visit.rules.announced == "detected" and score is not None and math.isfinite(score)
        if score is None or not listens or not self.detector.changed(score):
            return
        left, self.segment = self.segment, segment(self.plan, self.segment.index + 1, self.step)
        self._spend(tell_methods(self.plan, "leave", left))
        self._spend(enter(self.plan, self.segment))
        self._log({"boundary/detected": 1.0}, visit.index, visit.task.name)
        self.terminal.note(f"step {self.step:,}: a change of {self.plan.measure} is detected: {self.segment.task.name}")

    def _passed(self, every: int, last: int) -> bool:
        """Whether a multiple of `every` steps lies between the last safe point and this one."""
        return bool(every) and last // every < self.step // every

    def _methods_did(self) -> dict[str, float]:
        """What the methods did since the last tick, and how long that took."""
        found = {}
        for name, method in self.plan.methods.items():
            did = dict(method.numbers()) if hasattr(method, "numbers") else {}
            wrong = next((key for key, value in did.items() if not isinstance(value, int | float)), None)
            if wrong is not None:
                raise CrlError(f"method {name}: numbers() has {did[wrong]!r} for {wrong!r}, which is not a number")
            if "seconds" in did or name in self.spent:
                found[f"time/method/{name}"] = did.pop("seconds", 0.0) + self.spent.pop(name, 0.0)
            found |= {f"method/{name}/{key}": value for key, value in did.items()}
        return found

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
                said = f"monitor {name}: {problem}"
                if said not in self.told:
                    self.terminal.note(said)
                self.told.add(said)
            if found or problem:
                cost = {f"time/monitor/{name}": time.perf_counter() - began}
                self._log(cost, visit.index, visit.task.name, phase)

    def _evaluate(self, visit: int, phase: str) -> list[float]:
        evaluation = self.experiment.evaluation
        row = []
        for column, task in enumerate(self.plan.tasks):
            if not self._asked(column, visit):
                row.append(math.nan)
                continue
            seed = derive(self.experiment.seed, EVALUATE, column)  # the same episodes in every row
            score = task.evaluate(self.agent, seed, evaluation.episodes, evaluation.greedy)
            numbers = {f"eval/{self.plan.measure}": score.mean}
            if score.lengths:
                numbers["eval/length"] = float(np.mean(score.lengths))
            if score.reason and score.reason not in self.told:
                self.terminal.note(f"{task.name}: not evaluated: {score.reason}")
                self.told.add(score.reason)
            self._log(numbers, visit, task.name, phase)
            row.append(score.mean)
        return row

    def _asked(self, column: int, visit: int) -> bool:
        """Whether a task is evaluated during or after a visit: all are, or those seen so far, or the visit's own."""
        of, order = self.experiment.evaluation.of, self.plan.order
        return of == "all" or column in (order[:visit] if of == "seen" else order[max(visit - 1, 0) : visit])

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
            record = Record(name, plain(value), self.step, visit, task, phase, note)
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
            "methods": {name: method.state_dict() for name, method in self.plan.methods.items()},
            "monitors": {
                name: monitor.state_dict()
                for name, monitor in self.plan.monitors.items()
                if hasattr(monitor, "state_dict")
            },
            "detector": self.detector.state_dict(),
            "segment": [self.segment.index, self.segment.start],
            "random": random_state(),
        }
        self.folder.save(self.folder.stopped if done else self.folder.boundary(visit), state)
        self.folder.keep(self.experiment.checkpoint.keep)

    def restore(self, state: State) -> None:
        """Become what the walk was when this checkpoint was taken."""
        self.step, self.rows = state["step"], [list(row) for row in state["matrix"]]
        restore(self.plan, state)
        for task in self.plan.tasks:
            task.load_state_dict(state["tasks"][task.name])
        for name, value in state["monitors"].items():
            self.plan.monitors[name].load_state_dict(value)
        if "detector" in state:
            self.segment = segment(self.plan, *state["segment"])
            self.detector.load_state_dict(state["detector"])
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
    return begin(config.read(source, (*settings.items(), *changes)), out, overwrite=overwrite, verbosity=verbosity)


def begin(
    experiment: config.Experiment, out: str | Path = "runs", *, overwrite: bool = False, verbosity: int = -1
) -> Run:
    """Walk as an experiment says, from the start."""
    folder = RunFolder(Path(out) / experiment.place)
    if folder.occupied and not overwrite:
        folder.create({}, {}, overwrite=False)  # refuses, before anything slow
    plan = build.build(experiment)
    folder.create(experiment.plain(), _manifest(plan), overwrite=overwrite)
    _walk(Walk(plan, folder, verbosity))
    add_baseline(experiment, folder, plan, _alone)
    return Run(folder.path)


def resume(path: str | Path, *, verbosity: int = -1) -> Run:
    """Go on from a run's last checkpoint; the result is that of a run that was never stopped."""
    folder = RunFolder(Path(path))
    if folder.manifest()["status"] == "finished":
        raise CrlError(f"{folder.path}: this run is finished; there is nothing to resume")
    run = Run(folder.path)
    state = folder.load(folder.latest(), run.experiment.digest)
    plan = build.build(run.experiment)
    if folder.manifest()["status"] == "walked":
        add_baseline(run.experiment, folder, plan, _alone)
        return run
    lost = max(_lost(run, state["step"]), 0)
    walk = Walk(plan, folder, verbosity, state["offset"])
    walk.restore(state)
    if lost:
        where = f"goes on from its step {state['done']:,}" if state["done"] else "starts again from its boundary"
        walk.terminal.note(f"visit {state['visit'] + 1} {where}: {lost:,} steps are repeated")
    _walk(walk, state["visit"], state["done"])
    add_baseline(run.experiment, folder, plan, _alone)
    return Run(folder.path)


def _walk(walk: Walk, visit: int = 0, done: int = 0) -> None:
    """Walk to the end, and leave a manifest that says how it ended."""
    folder, began = walk.folder, time.time()
    folder.update_manifest(status="running")
    before = folder.manifest().get("seconds", 0.0)
    status = "failed"
    try:
        with listening(walk):
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
    if walk.asked_to_stop and status == "walked":  # in its last stretch, and baselines would follow
        raise CrlError(f"stopped by {walk.asked_to_stop} before the baselines; go on with: crl resume {folder.path}")


def _alone(plan: build.Plan, folder: RunFolder) -> None:
    """A baseline's walk, which says nothing."""
    walk = Walk(plan, folder, -1)
    _walk(walk)
    if walk.asked_to_stop:
        raise CrlError(f"stopped by {walk.asked_to_stop}; go on with: crl resume {folder.path.parent.parent}")


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
    if walk.experiment.boundary.announced == "detected":
        _log_detection(walk)
    summary = metrics.summary(np.array(walk.rows), walk.plan.order)
    shown = {name: metric.value for name, metric in summary.items()}
    walk.board.hparams(_flat(walk.experiment.plain()), shown)
    walk.terminal.table(walk.rows, walk.row_names, walk.names, shown)


def _log_detection(walk: Walk) -> None:
    """How soon the learner noticed each boundary, and how often it noticed one where there was none."""
    visits = walk.plan.visits
    found = [(r.visit, r.step) for r in Run(walk.folder.path).records if r.name == "boundary/detected"]
    delays, alarms = metrics.detection(walk.plan.order, [visit.start for visit in visits], found)
    for visit, delay in zip(visits[1:], delays[1:], strict=True):
        walk._log({"metrics/detection_delay": delay.value}, visit.index, visit.task.name, note=delay.reason)
    walk._log({"metrics/false_alarms": float(alarms)}, len(visits))
    hits, there = len(found) - alarms, sum(one != other for one, other in pairwise(walk.plan.order))
    walk.terminal.note(f"detected: {hits} of the walk's {there} boundaries, and {alarms} false alarms")


def _manifest(plan: build.Plan) -> dict[str, Any]:
    experiment = plan.experiment
    return {
        "status": "new",
        "measure": plan.measure,
        "digest": experiment.digest,
        "seed": experiment.seed,
        "threads": experiment.threads,
        "device": plan.device,
        "engine": f"{plan.engine} x {experiment.engine.envs}",
        "boundary": experiment.plain()["boundary"],
        "methods": named.resolved(named.METHODS, experiment.methods),
        "monitors": named.resolved(named.MONITORS, experiment.monitors),
        "tasks": [task.name for task in plan.tasks],
        "about": {task.name: about for task in plan.tasks if (about := getattr(task, "about", ""))},
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
def listening(walk: Any) -> Iterator[None]:
    """SIGINT and SIGTERM ask a walk (or several) to stop at the next safe point; asked twice, it stops at once."""

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
