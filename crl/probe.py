"""A second look at a boundary of a finished (or stopped) run: the same monitors on the same data, or others."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from crl import build
from crl.boundary import boundary_of, enter, look
from crl.core import Boundary, CrlError, State, aside, plain, set_random_state
from crl.linalg import Estimate, Spectrum
from crl.opened import Run


@dataclass(frozen=True)
class Seen:
    """What was seen at a boundary, and what the log of the run says of the same."""

    run: str
    visit: int
    phase: str
    task: str
    step: int
    numbers: dict[str, float | list[float]]
    logged: dict[str, float | list[float]]
    spectra: dict[str, Spectrum]
    problems: dict[str, str]
    unresolved: dict[str, str] = field(default_factory=dict)  # numbers that are NaN, and why
    otherwise: bool = False  # whether options other than the run's were asked for

    @property
    def differ(self) -> list[str]:
        """Numbers that the log has otherwise."""
        both = [name for name in self.numbers if name in self.logged]
        return [name for name in both if not np.array_equal(self.numbers[name], self.logged[name], equal_nan=True)]

    def table(self) -> str:
        """A line for each number: its value, bracket and standard error, and the log's value."""
        parts = ("low", "high", "error")
        shown = [name for name in self.numbers if not name.endswith(tuple(f"/{part}" for part in parts))]
        wide = max([len(name) for name in shown] + [8])
        lines = [f"{self.run}: visit {self.visit} ({self.task}), {self.phase}, step {self.step:,}"]
        if shown:
            lines.append(f"{'':<{wide}}  {'value':>12}  {'low':>12}  {'high':>12}  {'error':>12}  {'logged':>12}")
        for name in shown:
            bracket = [self.numbers.get(f"{name}/{part}") for part in parts]
            cells = [_cell(cell) for cell in (self.numbers[name], *bracket, self.logged.get(name))]
            lines.append(f"{name:<{wide}}  {'  '.join(f'{cell:>12}' for cell in cells)}")
        lines += [f"{name}: {why}" for name, why in self.unresolved.items()]
        lines += [f"{name}: {why}" for name, why in self.problems.items()]
        if self.logged:
            same = len([name for name in self.numbers if name in self.logged])
            verdict = f"{len(self.differ)} of them differ" if self.differ else "all equal"
            also = ", looked at with other options" if self.otherwise else ""
            lines.append(f"{same} of these numbers are in the run's log{also}: {verdict}")
        return "\n".join(lines)

    def json(self) -> str:
        """The same, and the spectra whole."""
        spectra = {
            name: {"values": seen.values.tolist(), "weights": seen.weights.tolist(), "size": seen.size}
            for name, seen in self.spectra.items()
        }
        head = {"run": self.run, "visit": self.visit, "phase": self.phase, "task": self.task, "step": self.step}
        found = {"numbers": self.numbers, "logged": self.logged, "problems": self.problems, "spectra": spectra}
        found["unresolved"] = self.unresolved
        return json.dumps(_sayable({**head, **found}), indent=1, allow_nan=False)


def probe(
    path: str | Path,
    visit: int | None = None,
    phase: str = "init",
    monitors: Sequence[str] = (),
    options: Mapping[str, Any] | None = None,
    tell: Callable[[str], None] = lambda what: None,
) -> Seen:
    """Look at a run's boundary again: with its own monitors, or with those named; `options` are for a single one."""
    with aside(0):  # agents seed the global random streams when they are built
        return _probe(Run(Path(path)), visit, phase, monitors, dict(options or {}), tell)


def _probe(
    run: Run, visit: int | None, phase: str, names: Sequence[str], options: dict[str, Any], tell: Callable[[str], None]
) -> Seen:
    if phase not in ("init", "end"):
        raise CrlError(f"--phase: {phase!r} is not init or end")
    visit = max(1, run.at()[1]["visit"]) if visit is None else _checked(run, visit)
    looking = _monitors(run, names, options)
    boundary, state = _boundary(run, visit, "init", tell)
    for name, monitor in looking.items():
        if names and phase not in getattr(monitor, "at", (phase,)):
            monitor.at = (*monitor.at, phase)  # it was asked for
        if hasattr(monitor, "state_dict"):
            _remember(run, name, monitor, visit, None if options else state["monitors"].get(name))
            if phase == "end":
                look(name, monitor, boundary)
    if phase == "end":
        boundary, state = _boundary(run, visit, "end", tell)
    numbers: dict[str, float | list[float]] = {}
    spectra, problems, unresolved = {}, {}, {}
    for name, monitor in looking.items():
        found, problem = look(name, monitor, boundary)
        if problem or (names and not found):
            problems[name] = problem or f"there is nothing to see at {phase} of visit {visit}"
        for key, value in found.items():
            if isinstance(value, Spectrum):
                spectra[key] = value
            elif isinstance(value, Estimate):
                numbers |= value.numbers(key)
                if value.reason:
                    unresolved[key] = value.reason
            else:
                numbers[key] = plain(value)
    logged = {r.name: r.value for r in run.records if r.visit == visit and r.phase == phase and r.name in numbers}
    task = boundary.task.name
    return Seen(
        str(run.path), visit, phase, task, boundary.step, numbers, logged, spectra, problems, unresolved, bool(options)
    )


def _monitors(run: Run, names: Sequence[str], options: dict[str, Any]) -> dict[str, Any]:
    try:
        return build.build_monitors(_specs(run.experiment.monitors, names, options))
    except CrlError as error:  # its place is in a list that the command line does not have
        raise CrlError(re.sub(r"^monitors\.\d+(\.)?", lambda m: "--" if m[1] else "--monitor", str(error))) from None


def _boundary(run: Run, visit: int, phase: str, tell: Callable[[str], None]) -> tuple[Boundary, State]:
    """A boundary as the run came to it, and the checkpoint that it is made from."""
    plan, state = run.at(visit - 1 if phase == "init" else visit)
    here = plan.visits[visit - 1]
    if phase == "init":
        set_random_state(state["random"])
        enter(plan, here)
    return boundary_of(plan, here, phase, state["step"], tell), state


def _remember(run: Run, name: str, monitor: Any, visit: int, state: State | None) -> None:
    """What a monitor remembers when it comes to a visit: from the checkpoint, else by looking at all before."""
    if state is not None:
        monitor.load_state_dict(state)
        return
    for before in range(1, visit):
        for phase in ("init", "end"):
            look(name, monitor, _boundary(run, before, phase, lambda what: None)[0])


def _specs(own: Sequence[Mapping[str, Any]], names: Sequence[str], options: dict[str, Any]) -> list[dict[str, Any]]:
    """The run's own monitors, or those named: as the run had them if it did, with other options where given."""
    had = {str(spec.get("name") or str(spec["use"]).rpartition(".")[2]): dict(spec) for spec in own}
    specs = [had.get(name, {"use": name}) for name in names] if names else list(had.values())
    if options and len(specs) != 1:
        raise CrlError(f"--{next(iter(options))}: say which one monitor it is for: --monitor NAME")
    return [{**spec, **options} for spec in specs]


def _checked(run: Run, visit: int) -> int:
    count = len(run.manifest["visits"])
    if not 1 <= visit <= count:
        raise CrlError(f"--visit: {visit} is not one of the run's visits, 1 to {count}")
    return visit


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.5g}" if isinstance(value, float) else f"{len(value)} numbers"


def _sayable(value: Any) -> Any:
    """As JSON can say it."""
    if isinstance(value, dict):
        return {key: _sayable(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_sayable(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
