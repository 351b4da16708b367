"""Boundaries that nobody announces: a learner that watches its own returns notices that the task has changed.

The detector is told one number a tick, and says when the numbers are no longer those of before. What it finds divides
the walk into segments; of a segment's task the learner knows nothing, its name included.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from crl.core import CrlError, State


@dataclass(frozen=True)
class Segment:
    """The task of a segment, as much of it as is known to a learner that has only noticed a change: a number."""

    name: str

    def sample(self, agent: Any, seed: int, size: int) -> Any:
        """Nobody says which task it is, so there is nothing to draw from."""
        raise CrlError(f"{self.name} was detected, not announced: nobody can sample its task")


class Detector:
    """Page's cumulative sum (1954) of falls below the recent median, and a leap beyond all that was ever reached.

    Learning raises returns by itself, so falls and rises are measured in different units. A fall, from the median of
    the last `RECENT` numbers, is in units of noise: the standard deviation that goes with the mean move from one number
    to the next among the last `WINDOW`, were they normal, which a slow rise hardly widens; and at least `FLOOR` of the
    range so far, since what stands still has no noise. S <- max(0, S + fall - DRIFT) tells of a change where S > LIMIT;
    numbers are compared with what was before S rose from 0. A rise tells of one where it goes beyond the best by more
    than the whole range so far, once learning has been seen: once that range is `LEARNED` mean moves.
    """

    WINDOW, RECENT, LEAST = 30, 10, 8  # after a change nothing is said for the least
    DRIFT, LIMIT, FLOOR = 2.5, 5.0, 0.05
    LEARNED = 8.0

    def __init__(self) -> None:
        self.recent: list[float] = []
        self.doubted: list[float] = []  # those since S rose from 0, with which nothing is compared yet
        self.fallen = 0.0  # S
        self.low = self.high = self.last = self.moved = 0.0
        self.count = 0

    def changed(self, value: float) -> bool:
        """Take in the next number: whether it, with those before it, tells of a change."""
        found = len(self.recent) >= self.LEAST and (self._fell(value) or self._rose(value))
        if found:
            self.recent, self.doubted, self.fallen = [], [], 0.0
        self._take(value)
        return found

    def _fell(self, value: float) -> bool:
        noise = statistics.fmean(abs(b - a) for a, b in pairwise(self.recent)) * math.sqrt(math.pi) / 2
        unit = max(noise, self.FLOOR * (self.high - self.low))
        fall = (statistics.median(self.recent[-self.RECENT :]) - value) / unit if unit else 0.0
        self.fallen = max(0.0, self.fallen + fall - self.DRIFT)
        return self.fallen > self.LIMIT

    def _rose(self, value: float) -> bool:
        span = self.high - self.low
        return span * (self.count - 1) >= self.LEARNED * self.moved > 0 and value - self.high > span

    def _take(self, value: float) -> None:
        first = self.count == 0
        self.moved += 0.0 if first else abs(value - self.last)
        self.low = value if first else min(self.low, value)
        self.high = value if first else max(self.high, value)
        self.last, self.count = value, self.count + 1
        self.doubted.append(value)
        if not self.fallen:
            self.recent, self.doubted = [*self.recent, *self.doubted][-self.WINDOW :], []

    def state_dict(self) -> State:
        """All that it remembers."""
        return {name: list(value) if isinstance(value, list) else value for name, value in vars(self).items()}

    def load_state_dict(self, state: State) -> None:
        """The inverse of `state_dict`."""
        for name, value in state.items():
            setattr(self, name, list(value) if isinstance(value, list) else value)
