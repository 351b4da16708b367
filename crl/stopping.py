"""How a walk is asked to stop, and that it has."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from typing import Any


class Stopped(Exception):
    """The run was asked to stop, and has, with a checkpoint."""


class AtOnce(KeyboardInterrupt):
    """The user wants an end now. A plain KeyboardInterrupt in a walk is raised by a part, and is a failure."""


@contextlib.contextmanager
def listening(walk: Any) -> Iterator[bool]:
    """SIGINT and SIGTERM ask a walk (or several) to stop at the next safe point; asked twice, it stops at once.

    Yields whether signals are heard: in another thread than the main one they are the caller's.
    """

    def ask(number: int, frame: Any) -> None:
        if walk.asked_to_stop:
            raise AtOnce
        walk.asked_to_stop = signal.Signals(number).name
        with contextlib.suppress(RuntimeError):  # it was just writing something else
            walk.terminal.note(f"{walk.asked_to_stop}: stopping at the next safe point")

    with heard({signal.SIGINT: ask, signal.SIGTERM: ask}) as hears:
        yield hears


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Outside a walk, Ctrl-C ends the command at once."""

    def end(number: int, frame: Any) -> None:
        raise AtOnce

    with heard({signal.SIGINT: end}):
        yield


@contextlib.contextmanager
def heard(handlers: dict[signal.Signals, Any]) -> Iterator[bool]:
    """Handle signals so while the block runs; yields whether they can be."""
    try:
        before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    except ValueError:  # not in the main thread: the caller keeps its signals
        before = {}
    try:
        yield bool(before)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
