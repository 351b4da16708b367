"""Several runs as they are watched: a live line each on a terminal, a plain line a boundary anywhere else."""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from crl.core import CrlError
from crl.pictures import number, short
from crl.store import RunFolder
from crl.terminal import fitted, live, share, standing, width


class Progress:
    """How far a run is: read from its log, which another process writes."""

    def __init__(self, path: Path) -> None:
        self._folder, self._read = RunFolder(path), 0
        self._visits: list[dict[str, Any]] = []
        self._measure = "return"
        self._visit, self._task, self._step = 0, "", 0
        self._rate = self._score = math.nan
        self._scores: dict[str, float] = {}

    def read(self) -> list[str]:
        """Take in what is new in the log: how every task stands, after each visit that ended in it."""
        if not self._visits and not self._plan():
            return []
        return [said for record in self._records() if (said := self._take(record))]

    def _plan(self) -> bool:
        """Whether the run has begun, and its manifest says where it will go."""
        try:
            manifest = self._folder.manifest()
        except CrlError:
            return False
        self._visits, self._measure = manifest["visits"], manifest["measure"]
        return True

    def _records(self) -> Iterator[dict[str, Any]]:
        """The new whole lines. A run that is resumed cuts its log back first, and what was cut is not read again."""
        if not self._folder.records.exists():
            return
        with self._folder.records.open("rb") as file:
            self._read = min(self._read, file.seek(0, 2))
            file.seek(self._read)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self._read += len(line)
                try:
                    yield json.loads(line)
                except ValueError:  # cut back and written on since: the rest of another line
                    continue

    def _take(self, record: dict[str, Any]) -> str:
        name, value, visit = record["name"], record["value"], record["visit"]
        self._step = record["step"]
        if name == "walk/visit":
            self._visit, self._task, self._scores = visit, record["task"], {}
        elif name == "time/steps_per_second":
            self._rate = float(value)
        elif name == f"train/{self._measure}":
            self._score = float(value)
        elif name == f"eval/{self._measure}" and record["phase"] == "end":
            self._scores[record["task"]] = float(value)
        elif name == "metrics/average_performance" and visit:
            return f"after {visit}/{len(self._visits)} | {standing(self._task, self._scores)}"
        return ""

    def line(self, name: str, room: int) -> str:
        """The run's bar, in at most `room` characters."""
        if not self._visit:
            return f"{name}  begins"[:room]
        walked = share(self._step, sum(visit["steps"] for visit in self._visits))
        facts = [f"{self._step:,} steps", f"{self._rate:,.0f} steps/s", f"{self._measure} {number(self._score)}"]
        return fitted([(f"{name}  {self._visit}/{len(self._visits)} {short(self._task)}", walked)], facts, room)


class Bars:
    """A block of live lines at the foot of a terminal, and what is said for good above it."""

    def __init__(self, stream: TextIO | None = None, verbosity: int = 0) -> None:
        self._stream = sys.stderr if stream is None else stream
        self.live, self._quiet = live(self._stream), verbosity < 0
        self._said: list[str] = []
        self._drawn: list[str] = []

    def note(self, text: str) -> None:
        """Say something for good when the lines are drawn next: a signal's handler can call this at any time."""
        self._said.append(text)

    @property
    def room(self) -> int:
        """How many characters a line can have."""
        return width(self._stream) - 1

    def draw(self, lines: Sequence[str], few: Sequence[str] = ()) -> None:
        """Put `lines` in the place of those that are there; `few` instead, where the terminal is too low for all."""
        said, self._said = self._said, []
        high = shutil.get_terminal_size().lines - 1
        shown = [*(lines if len(lines) <= high else few)][:high] if self.live else []
        if self._quiet or (not said and shown == self._drawn):
            return
        back = f"\x1b[{len(self._drawn)}A\r" if self._drawn else ""
        clear, rest = ("\x1b[K", "\x1b[J") if self.live else ("", "")
        try:
            self._stream.write(back + "".join(f"{line}{clear}\n" for line in [*said, *shown]) + rest)
            self._stream.flush()
        except (OSError, ValueError):  # nobody is there to read any more, and the runs go on
            self._quiet = True
        self._drawn = shown

    def close(self) -> None:
        """Leave nothing but what was said."""
        self.draw([])
