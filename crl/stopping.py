"""How a walk is asked to stop, and that it has."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from typing import Any


class Stopped(Exception):
    """The run was asked to stop, and has, with a checkpoint."""


@contextlib.contextmanager
def listening(walk: Any) -> Iterator[None]:
    """SIGINT and SIGTERM ask a walk (or several) to stop at the next safe point; asked twice, it stops at once."""

    def ask(number: int, frame: Any) -> None:
        if walk.asked_to_stop:
            raise KeyboardInterrupt
        walk.asked_to_stop = signal.Signals(number).name
        with contextlib.suppress(RuntimeError):  # it was just writing something else
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
