"""A run as it is watched: one live line on a terminal, a plain line now and then anywhere else."""

from __future__ import annotations

import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TextIO

from crl.pictures import LARGE, Rows, number, short


class Terminal:
    """The run as it is watched: one live line on a terminal, a plain line now and then anywhere else.

    A `verbosity` of -1 says nothing at all, 0 tells of progress and boundaries, 1 adds the numbers of every tick.
    """

    def __init__(
        self,
        visits: int,
        total_steps: int,
        stream: TextIO | None = None,
        verbosity: int = 0,
        clock: Callable[[], float] = time.monotonic,
        measure: str = "return",
    ) -> None:
        self._visits, self._total, self._measure, self._score = visits, total_steps, measure, math.nan
        self._stream = sys.stderr if stream is None else stream
        self._verbosity, self._clock = verbosity, clock
        self._tty = live(self._stream)
        self._live = ""  # what the live line shows now
        self._drawn = -math.inf
        self.start(0, "", 0, 0)

    def start(self, visit_index: int, task_name: str, steps: int, start_step: int, done: int = 0) -> None:
        """A visit begins, or goes on after `done` of its steps."""
        self._visit, self._task, self._steps, self._before, self._done = visit_index, task_name, steps, start_step, done
        self._since = self._clock()

    def progress(self, steps_in_visit: int, score: float | None = None) -> None:
        """Show how far the walk is, if the last time was long enough ago; without a score, the last one."""
        now = self._clock()
        self._score = self._score if score is None else score
        if self._verbosity < 0 or now - self._drawn < (0.1 if self._tty else 10.0):
            return
        self._drawn = now
        rate = (steps_in_visit - self._done) / (now - self._since) if now > self._since else 0.0
        walked = self._before + steps_in_visit
        left = duration((self._total - walked) / rate) if rate > 0 else "–"
        facts = [f"{rate:,.0f} steps/s", f"{left} left", f"{self._measure} {number(self._score)}"]
        visit = (f"{self._visit}/{self._visits} {short(self._task)}", share(steps_in_visit, self._steps))
        walk = ("walk", share(walked, self._total))
        if self._tty:
            self._redraw(fitted([visit, walk], facts, width(self._stream) - 1))
        else:
            self._print(", ".join([f"{name} {part:.0%}" for name, part in (visit, walk)] + facts))

    def numbers(self, numbers: Mapping[str, float]) -> None:
        """The numbers of a tick, for those who want to see them all."""
        if self._verbosity > 0 and numbers:
            self.note("  ".join(f"{name} {value:.4g}" for name, value in numbers.items()))

    def note(self, text: str) -> None:
        """Say something on a line of its own; the live line moves below it."""
        if self._verbosity >= 0:
            live = self._live
            self._redraw("")
            self._print(text)
            self._redraw(live)

    def doing(self, what: str) -> None:
        """Say on the live line what takes a while."""
        if self._tty and self._verbosity >= 0:
            self._redraw(what[: width(self._stream) - 1])

    def boundary(self, visit_index: int, task: str, scores: Mapping[str, float]) -> None:
        """How every task stands after a visit (or before the first, number 0); a star marks the one just visited."""
        self._redraw("")
        row = standing(task, scores)
        self.note(f"after {visit_index}/{self._visits} | {row}" if visit_index else f"before    | {row}")

    def table(self, rows: Rows, row_names: Sequence[str], tasks: Sequence[str], metrics: Mapping[str, float]) -> None:
        """The whole matrix, and what it comes to."""
        self._redraw("")
        if len(tasks) > LARGE:
            rows, row_names, tasks = [], [], []
        names, heads = [short(name) for name in row_names], [short(task) for task in tasks]
        lines = _matrix(rows, names, heads)
        if self._tty and len(lines[0]) >= width(self._stream):
            counts = [str(count) for count in range(1, len(heads) + 1)]
            legend = [f"{count:>{len(counts[-1])}} = {head}" for count, head in zip(counts, heads, strict=True)]
            lines = [*_matrix(rows, names, counts), "", *legend]
        wide = max(map(len, metrics), default=0)
        summary = [f"{name:<{wide}}  {number(value):>7}" for name, value in metrics.items()]
        self.note("\n".join([*lines, "", *summary] if summary else lines))

    def close(self) -> None:
        """Leave the terminal's line empty."""
        self._redraw("")

    def _print(self, text: str) -> None:
        self._write(text + "\n")

    def _write(self, text: str) -> None:
        """Write, if anybody is there to read: a long run does not end because its watcher has gone."""
        try:
            self._stream.write(text)
            self._stream.flush()
        except (OSError, ValueError):  # a broken pipe, a terminal hung up, a closed stream
            self._verbosity, self._tty = -1, False

    def _redraw(self, line: str) -> None:
        """Put `line` in the place of the live line."""
        if self._tty and (line or self._live):
            self._write(f"\r{line}\x1b[K")
        self._live = line


def live(stream: TextIO) -> bool:
    """Whether lines on it can be drawn over."""
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def width(stream: TextIO) -> int:
    """The columns of its terminal."""
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80
    except (OSError, ValueError):
        return shutil.get_terminal_size().columns


def standing(task: str, scores: Mapping[str, float]) -> str:
    """How every task stands, in one line; a star marks the one just visited."""
    known = {name: score for name, score in scores.items() if math.isfinite(score)}
    shown = known if len(scores) > LARGE else dict(scores)
    left_out = len(shown) - LARGE
    if left_out > 0:
        shown = dict([*shown.items()][-LARGE:])
    row = "  ".join(f"{'*' * (name == task)}{short(name)} {number(score)}" for name, score in shown.items())
    return f"({left_out} more)  {row}" if left_out > 0 else row


def share(part: int, whole: int) -> float:
    """How much of it is over, from 0 to 1."""
    return min(part / whole, 1.0) if whole else 0.0


def duration(seconds: float) -> str:
    """Minutes and seconds, or hours and minutes.

    >>> duration(62), duration(7_500)
    ('1m02s', '2h05m')
    """
    minutes, seconds = divmod(int(max(seconds, 0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{seconds:02}s"


def fitted(shares: Sequence[tuple[str, float]], facts: Sequence[str], room: int) -> str:
    """One line of at most `room` characters: what is left over goes to the bars, and where nothing is, they go."""
    texts = [f"{name} {part:.0%}" for name, part in shares]
    length = min((room - len("   ".join([*texts, *facts]))) // len(shares) - 1, 24)
    if length >= 3:
        filled = [round(part * length) for _, part in shares]
        texts = [f"{text} {'━' * full}{'─' * (length - full)}" for text, full in zip(texts, filled, strict=True)]
    return "   ".join([*texts, *facts])[:room]


def aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table whose columns are as wide as what stands in them: names to the left, the rest to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    form = "  ".join(f"{{:{'>' if i else '<'}{wide}}}" for i, wide in enumerate(widths))
    return [form.format(*line) for line in lines]


def _matrix(rows: Rows, names: Sequence[str], heads: Sequence[str]) -> list[str]:
    return aligned([["", *heads], *([name, *map(number, row)] for name, row in zip(names, rows, strict=True))])
