"""Whose failure an error is, an environment's, an agent's, a method's, a monitor's or a task's: its traceback tells."""

from __future__ import annotations

import sysconfig
import traceback
from pathlib import Path
from typing import Any

import gymnasium

from crl.core import CrlError, brief, printable

ROLES = {  # the functions that a part of each kind has
    "agent": ("act", "observe", "update"),
    "method": ("attach", "enter", "leave"),
    "monitor": ("measure",),
    "task": ("train", "evaluate", "sample"),
}
HOME = Path(__file__).resolve().parent.parent
OURS = tuple(f"{HOME / room}/" for room in ("crl", "envs", "agents"))
LIBRARIES = tuple(sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib"))


class Failed(CrlError):
    """A part has failed in a way of its own. The line says which part, where, and its error; `trace` is the rest."""

    def __init__(self, line: str, trace: str) -> None:
        super().__init__(line)
        self.trace = trace


def failed(error: BaseException) -> Failed:
    """An error of any part as one line, with its traceback beside it."""
    if isinstance(error, Failed):
        return error
    if isinstance(error, CrlError):
        return Failed(printable(str(error)), "")
    if isinstance(error, RuntimeError) and isinstance(error.__cause__, StopIteration):
        error = error.__cause__  # it came through a generator of ours
    return Failed(f"{culprit(error) or 'crl itself'} failed: {said(error)}", traced(error))


def said(error: BaseException) -> str:
    """An error of any part in a few words, with the line that it came from."""
    text = f"it called sys.exit({error.code!r})" if isinstance(error, SystemExit) else brief(error)
    return printable(f"{text}{_where(error)}")


def traced(error: BaseException) -> str:
    """An error's traceback."""
    return printable("".join(traceback.format_exception(error)))


def culprit(error: BaseException) -> str:
    """The innermost part on an error's traceback, such as `environment Maze`; nothing where only crl is on it."""
    found = ""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        found = _part(frame.f_locals.get("self")) or found
    return found


def _part(thing: Any) -> str:
    cls = type(thing)
    if isinstance(thing, gymnasium.Wrapper) and cls.__module__.startswith(("gymnasium.", "envs.")):
        return _part(thing.unwrapped)  # a wrapper of a library's only hands on
    if isinstance(thing, gymnasium.Env):
        return f"environment {cls.__name__}"
    for role, functions in ROLES.items():
        if all(callable(getattr(cls, name, None)) for name in functions):
            return "" if role == "task" and cls.__module__.startswith("envs.") else f"{role} {cls.__name__}"
    return ""


def _where(error: BaseException) -> str:
    """The innermost line that the user wrote, or else the innermost that is no library's."""
    lines = traceback.extract_tb(error.__traceback__)
    own = [line for line in lines if not line.filename.startswith((*LIBRARIES, "<frozen"))]
    users = [line for line in own if not line.filename.startswith(OURS)]
    line = next(reversed(users or own or list(lines)), None)
    return f" ({Path(line.filename).name}, line {line.lineno}, in {line.name})" if line else ""
