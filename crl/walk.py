"""The walk: a learner goes through its tasks, and is evaluated on all of them at every boundary."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np

from crl import build, metrics, sinks
from crl.boundary import boundary_of, enter, look, segment, tell_methods
from crl.core import (
    Array,
    CrlError,
    NotTheSame,
    Record,
    State,
    Task,
    Tick,
    Visit,
    derive,
    plain,
    random_state,
    set_random_state,
)
from crl.detect import Detector
from crl.failing import Failed
from crl.linalg import Estimate, Spectrum
from crl.opened import Run, fitting, restore, visit_areas
from crl.sound import broken
from crl.stopping import Stopped
from crl.store import RunFolder
from crl.terminal import Terminal
from crl.threads import Listener

EVALUATE = 2  # the name of a random stream, beside the visits' (1) and the monitors' (3)


class Walk:
    """One agent with one seed on its way through a sequence."""

    def __init__(self, plan: build.Plan, folder: RunFolder, verbosity: int, mark: Sequence[int | None] = ()) -> None:
        self.plan, self.folder, self.experiment = plan, folder, plan.experiment
        self.agent = plan.agent
        self.names = [task.name for task in plan.tasks]
        self.rows: list[list[float]] = []
        self.step = 0
        self.threads = Listener(self._tell_of_thread)
        self.jsonl = sinks.Jsonl(folder.records, *mark)
        self.board = sinks.TensorBoard(folder.tensorboard, self.names, plan.measure, len(plan.order))
        self.terminal = Terminal(len(plan.order), sum(plan.steps), verbosity=verbosity, measure=plan.measure)
        self.detector, self.segment = Detector(), segment(plan, 1, 0)  # of use where boundaries are detected
        self.visit: Visit | None = None  # the one that is under way, or was last
        self.asked_to_stop = ""
        self.spent: dict[str, float] = {}  # by methods, at boundaries since the last tick
        self.told: set[str] = set()  # what has been said once, and is not said again
        self.read_back = False  # whether the first checkpoint was

    # The story.

    def go(self, visit_index: int = 0, done: int = 0) -> None:
        """Walk from a boundary, or from `done` steps into the visit after it."""
        if visit_index == 0 and done == 0 and not self.rows:
            for said in self.plan.warnings:
                self.terminal.note(f"warning: {said}")
            for method in self.plan.methods.values():
                method.attach(self.agent)
            self._boundary_row(0, None)
            self._checkpoint(0)
        for planned in self.plan.visits[visit_index:]:
            self.visit = visit = replace(planned, done=done)
            done = 0
            if visit.done == 0:
                self._enter(visit)
            self.terminal.start(visit.index, visit.task.name, visit.steps, visit.start, visit.done)
            self._train(visit)
            self._refuse_broken(self._state("agent", self.agent))
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
        for tick in self._ticks(visit):
            self.step = visit.start + tick.steps
            last, before = before, tick.steps
            if tick.numbers:
                now = time.perf_counter()
                rate = (tick.steps - logged) / max(now - clock, 1e-9)
                clock, logged = now, tick.steps
                numbers = {**tick.numbers, **self._methods_did()}
                numbers |= {"time/steps_per_second": rate, "walk/visit": float(visit.index)}
                self._log(numbers, visit.index, visit.task.name)
                self._refuse_nan(tick.numbers, visit)
                self.terminal.numbers(numbers)
                if "train/cut" in numbers:
                    self._tell_endless(visit.task.name)
            self._tell_once(getattr(self.agent, "remark", None) or "")
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

    def _ticks(self, visit: Visit) -> Iterator[Tick]:
        """The task's own."""
        with self._placed():
            yield from visit.task.train(self.agent, visit)

    @contextlib.contextmanager
    def _placed(self) -> Iterator[None]:
        """Beside a task's mistakes, where they came, and the checkpoint from before them."""
        try:
            yield
        except Failed:
            raise
        except CrlError as error:
            raise CrlError(f"{error}: {self.place}; {self._last_good}") from error

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
                elif isinstance(value, Estimate):
                    self._log(value.numbers(key), visit.index, visit.task.name, phase, note=value.reason)
                else:
                    self._log({key: value}, visit.index, visit.task.name, phase)
            if problem:
                self._log({name: math.nan}, visit.index, visit.task.name, phase, note=problem)
                self._tell_once(f"monitor {name}: {problem}")
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
            with self._placed():
                score = task.evaluate(self.agent, seed, evaluation.episodes, evaluation.greedy)
            numbers = {f"eval/{self.plan.measure}": score.mean}
            if score.lengths:
                numbers["eval/length"] = float(np.mean(score.lengths))
            if score.reason:
                self._tell_once(f"{task.name}: not evaluated: {score.reason}", score.reason)
            if score.cut:
                self._tell_endless(task.name)
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

    def finish(self) -> None:
        """What can only be said at the end: areas under the curves, plasticity over revisits."""
        self.jsonl.flush()
        areas = visit_areas(Run(self.folder.path))
        for index, area in enumerate(areas, start=1):
            self._log({"metrics/area": area.value}, index, self.names[self.plan.order[index - 1]])
        for column, name in enumerate(self.names):
            own = [areas[i].value for i, visited in enumerate(self.plan.order) if visited == column]
            if len(own) > 1:
                for ratio in metrics.plasticity_ratio(own):
                    self._log({f"metrics/plasticity_ratio/{name}": ratio.value}, len(self.plan.order), name)
        if self.experiment.boundary.announced == "detected":
            self._log_detection()
        summary = metrics.summary(np.array(self.rows), self.plan.order)
        shown = {name: metric.value for name, metric in summary.items()}
        self.board.hparams(_flat(self.experiment.plain()), shown)
        self.terminal.table(self.rows, self.row_names, self.names, shown)

    def _log_detection(self) -> None:
        """How soon the learner noticed each boundary, and how often it noticed one where there was none."""
        visits = self.plan.visits
        found = [(r.visit, r.step) for r in Run(self.folder.path).records if r.name == "boundary/detected"]
        delays, alarms = metrics.detection(self.plan.order, [visit.start for visit in visits], found)
        for visit, delay in zip(visits[1:], delays[1:], strict=True):
            self._log({"metrics/detection_delay": delay.value}, visit.index, visit.task.name, note=delay.reason)
        self._log({"metrics/false_alarms": float(alarms)}, len(visits))
        hits, there = len(found) - alarms, sum(one != other for one, other in pairwise(self.plan.order))
        self.terminal.note(f"detected: {hits} of the walk's {there} boundaries, and {alarms} false alarms")

    # Small parts.

    def _tell_once(self, text: str, what: str = "") -> None:
        """Say something, unless it (or `what` of it matters) has been said in this walk."""
        if text and (what or text) not in self.told:
            self.terminal.note(text)
        self.told.add(what or text)

    def _tell_of_thread(self, line: str, trace: str) -> None:
        log = self.folder.add_error(f"{self.place}: {line}\n{trace}\n")
        self.terminal.note(f"warning: {line}; the walk goes on; its traceback is in {log}")

    def _tell_endless(self, task: str) -> None:
        limit = f"{self.experiment.engine.max_episode_steps:,}"
        self._tell_once(f"{task}: an episode has no end within {limit} steps and is ended (engine.max_episode_steps)")

    @property
    def place(self) -> str:
        """Where the walk is, in words."""
        return (
            f"visit {self.visit.index} ({self.visit.task.name}), step {self.step:,}" if self.visit else "at the start"
        )

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
            where = f"step {self.step}, visit {visit.index} ({visit.task.name})"
            raise CrlError(f"{bad[0]} is not finite any more: {where}; {self._last_good}")

    def _refuse_broken(self, state: State) -> None:
        """Weights that are not finite are not saved: the last good checkpoint is one that can be gone on from."""
        weight = broken(self.agent, state)
        if weight:
            raise CrlError(f"{weight} is not finite any more: step {self.step}; {self._last_good}")

    @property
    def broken(self) -> str:
        """Where a weight is not finite, which one, and what to go on from: what a part then says is of no help."""
        with contextlib.suppress(Exception):  # an agent of anybody's
            weight = broken(self.agent, {})
            return f"{weight} is not finite any more, and {self._last_good}" if weight else ""
        return ""

    @property
    def _last_good(self) -> str:
        there = any(self.folder.checkpoints.glob("*.pt"))
        return f"the last good checkpoint is {self.folder.latest()}" if there else "there is no checkpoint yet"

    def _checkpoint(self, visit: int, done: int = 0) -> None:
        agent = self._state("agent", self.agent)
        self._refuse_broken(agent)
        state: State = {
            "digest": self.experiment.digest,
            "visit": visit,
            "done": done,
            "step": self.step,
            "offset": self.jsonl.mark,
            "matrix": self.rows,
            "agent": agent,
            "tasks": {task.name: task.state_dict() for task in self.plan.tasks},
            "methods": {name: self._state("method", method) for name, method in self.plan.methods.items()},
            "monitors": {
                name: self._state("monitor", monitor)
                for name, monitor in self.plan.monitors.items()
                if hasattr(monitor, "state_dict")
            },
            "detector": self.detector.state_dict(),
            "segment": [self.segment.index, self.segment.start],
            "random": random_state(),
        }
        path = self.folder.stopped if done else self.folder.boundary(visit)
        self.folder.save(path, state)
        if not self.read_back:
            self.folder.load(path, self.experiment.digest)
            self.read_back = True
        self.folder.keep(self.experiment.checkpoint.keep)

    def _state(self, role: str, part: Any) -> State:
        """What a checkpoint holds of a part."""
        state: State = part.state_dict()
        if not isinstance(state, dict):
            what = "None" if state is None else f"a {type(state).__name__}"
            raise Failed(f"{role} {type(part).__name__}: state_dict() returns {what}: it must be a dictionary", "")
        return state

    def restore(self, state: State) -> None:
        """Become what the walk was when this checkpoint was taken."""
        self.step, self.rows = state["step"], [list(row) for row in state["matrix"]]
        restore(self.plan, state)
        with fitting():
            for task in self.plan.tasks:
                self._restore_task(task, state["tasks"][task.name], bool(state["done"]))
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

    def _restore_task(self, task: Task, state: State, in_visit: bool) -> None:
        """An environment that goes on over a boundary, and cannot be brought back there, begins anew."""
        try:
            task.load_state_dict(state)
        except NotTheSame as error:
            if in_visit:
                raise
            task.load_state_dict({})
            self._tell_once(f"{error}; it begins anew here, so the run differs from one that was never stopped")

    def close(self) -> None:
        """Flush and close every sink."""
        with contextlib.ExitStack() as stack:  # each, also where another cannot be
            for sink in (self.threads, self.board, self.jsonl, self.terminal):
                stack.callback(sink.close)


def _flat(data: Any, place: str = "") -> dict[str, Any]:
    if isinstance(data, dict):
        return {k: v for key, value in data.items() for k, v in _flat(value, f"{place}.{key}".lstrip(".")).items()}
    return {place: data if isinstance(data, bool | int | float | str) else str(data)}
