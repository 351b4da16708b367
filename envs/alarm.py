"""A call that takes too long is ended: an environment that hangs costs a line, not a night.

The alarm is a signal, which Python code and waiting hear; code in C that never returns does not, but in a worker of
`async` it keeps only the worker busy. What a process spends suspended does not count.
"""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

from crl.failing import Failed

PARTS = 10  # the time is counted in so many parts; of a suspension one is counted


class Alarm:
    """A context that ends what takes longer than `seconds` (0: never) with one line. Works in the main thread only."""

    def __init__(self, seconds: float, late: str, perhaps: str = "it hangs") -> None:
        self.seconds, self.left = seconds, 0
        self.late, self.perhaps = late, perhaps  # what is said before the time, and after it
        self.before: Any = None

    def __enter__(self) -> None:
        if not self.seconds:
            return
        self.left = PARTS
        try:
            self.before = signal.signal(signal.SIGALRM, self._ring)
        except ValueError:  # in another thread
            self.before = None
            return
        signal.setitimer(signal.ITIMER_REAL, self.seconds / PARTS, self.seconds / PARTS)

    def __exit__(self, *_: object) -> None:
        if self.before is not None:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, self.before)
            self.before = None

    def _ring(self, number: int, frame: FrameType | None) -> None:
        self.left -= 1
        if self.left <= 0:
            signal.setitimer(signal.ITIMER_REAL, 0)
            late = f"{self.late} engine.timeout, {self.seconds:g} seconds"
            raise Failed(f"{late}; {self.perhaps}, or the timeout is too short", "")
