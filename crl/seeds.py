"""Several seeds of one walk at once: each in a process and a folder of its own, and one table over all of them.

A child walks for as long as its parent holds the line, which is the child's standard input: when the parent hangs up,
because it was asked to stop or because it is gone, the child stops at its next safe point with a checkpoint.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import yaml
from numpy.typing import ArrayLike

from crl import build, config, metrics, run, stats
from crl.bars import Bars, Progress
from crl.core import CrlError
from crl.failing import failed
from crl.opened import Run
from crl.pictures import LARGE, number, short
from crl.stopping import listening
from crl.store import RunFolder
from crl.terminal import aligned, duration

WAITS, WALKS, FINISHED, STOPPED, FAILED = "waits", "walks", "finished", "stopped", "failed"
LOOK = 0.1  # seconds between two looks at the children
# The child finds modules where its parent does; it is no fork, since threads and their locks do not survive one.
CHILD = """
import json, sys
job = json.loads(sys.stdin.readline())
sys.path[:] = job["path"]
from crl.seeds import child
child(job)
"""


@dataclass(frozen=True)
class Seeds:
    """What came of several seeds: the run of each that is finished, and why the others are not."""

    runs: dict[int, Run]
    failed: dict[int, str]
    seconds: float

    def table(self) -> str:
        """Each metric over the seeds where it is defined: its mean and its interquartile mean, with 95 % intervals."""
        if not self.runs:
            return "no seed is finished"
        found = [final(done) for done in self.runs.values()]
        names = found[0] if all(one.keys() == found[0].keys() for one in found) else metrics_alone(found)
        lines = [["", "mean", "95 % interval", "IQM", "95 % interval", "seeds"]]
        for name in names:
            values = [one[name] for one in found if np.isfinite(one[name])]
            lines.append([name, *_with_interval(stats.interval(values)), *_middle(values), str(len(values))])
        lines += self._all_tasks()
        where = next(iter(self.runs.values())).path.parent
        seeds = f"{len(self.runs)} seed{'s' * (len(self.runs) > 1)} ({_these(list(self.runs))})"
        caption = stats.caption(len(self.runs), middle=True)
        last = [*([caption] if caption else []), f"{seeds} in {where}, {duration(self.seconds)}"]
        return "\n".join([*aligned(lines), "", *last])

    def _all_tasks(self) -> list[list[str]]:
        """The row of all tasks' scores at the end, a seed's taken together: one walk gave them."""
        ends = [done.matrix[-1] for done in self.runs.values()]
        if len({tuple(done.tasks) for done in self.runs.values()}) > 1 or len(ends[0]) < 2:
            return []
        scores = np.stack(ends)
        if not np.isfinite(scores).all():
            return []
        means = _with_interval(stats.interval(scores.mean(axis=1)))
        return [["at the end: all tasks", *means, *_middle(scores), str(len(scores))]]


def _with_interval(found: stats.Interval) -> list[str]:
    """Two cells: the number, and its interval if it has one."""
    return [number(found.mean), "–" if np.isnan(found.low) else f"[{number(found.low)}, {number(found.high)}]"]


def _middle(scores: ArrayLike) -> list[str]:
    """Two cells: the interquartile mean and its interval; of few seeds there is no middle half."""
    found = stats.iqm_interval(scores, np.random.default_rng(0))
    return _with_interval(found) if found.runs >= stats.ENOUGH else ["–", "–"]


def final(done: Run) -> dict[str, float]:
    """What a finished run comes to: the metrics of its matrix, and each task's score at the end."""
    tasks, rows = done.tasks, done.matrix
    order = [tasks.index(visit["task"]) for visit in done.manifest["visits"]]
    found = {name: metric.value for name, metric in metrics.summary(rows, order).items()}
    shown = {f"at the end: {short(task)}": float(score) for task, score in zip(tasks, rows[-1], strict=True)}
    return found | (shown if len(tasks) <= LARGE else {})


def metrics_alone(found: Sequence[Mapping[str, float]]) -> list[str]:
    """The names that all have: where tasks are drawn from the seed, theirs differ."""
    return [name for name in found[0] if all(name in one for one in found)]


def train_seeds(
    source: str | Path | Mapping[str, Any],
    seeds: int,
    *,
    jobs: int | None = None,
    out: str | Path = "runs",
    overwrite: bool = False,
    verbosity: int = -1,
    changes: tuple[tuple[str, Any], ...] = (),
    **settings: Any,
) -> Seeds:
    """Walk with `seeds` seeds from the config's on, `jobs` at once: by default one for each `threads` cores.

    Finished runs are counted and not run again, and others go on, so the same call goes on after a stop.
    """
    for name, value in (("seeds", seeds), ("jobs", 1 if jobs is None else jobs)):
        if not isinstance(value, int):
            raise CrlError(f"{name}: expected a whole number, not {value!r}")
        if value < 1:
            raise CrlError(f"{name}: {value} is too small; the least is 1")
    first, began = config.read(source, (*settings.items(), *changes)), time.time()
    plain = first.plain()
    every = [config.parse(config.Experiment, {**plain, "seed": first.seed + i}) for i in range(seeds)]
    walks = [Walk(f"seed {one.seed}", one, Path(out)) for one in every]
    walk(walks, jobs or max((os.cpu_count() or 1) // first.threads, 1), overwrite, verbosity)
    ended = {one.experiment.seed: one for one in walks}
    return Seeds(
        {seed: Run(one.folder.path) for seed, one in ended.items() if one.state == FINISHED},
        {seed: one.why for seed, one in ended.items() if one.state == FAILED},
        time.time() - began,
    )


def walk(walks: Sequence[Walk], at_once: int, overwrite: bool = False, verbosity: int = -1) -> None:
    """Walk all of them that are not finished yet, some at once. What a user could mend is refused before any begins."""
    for one in walks:
        one.prepare(overwrite)
    new = next((one for one in walks if one.state == WAITS and not one.again), None)
    if new is not None:
        build.build(new.experiment)
    if overwrite:
        with contextlib.ExitStack() as several:
            for one in walks:
                several.enter_context(one.folder.taken())
            for one in walks:
                one.folder.drop()
    watched = Several(walks, at_once, verbosity)
    watched.go()
    if watched.asked_to_stop and any(one.state == STOPPED for one in walks):
        count = sum(one.state == FINISHED for one in walks)
        how = ", without --overwrite" if overwrite else ""
        raise CrlError(
            f"stopped by {watched.asked_to_stop}, {count} of {len(walks)} runs are finished; "
            f"go on with the same command{how}"
        )


class Walk:
    """One walk in a process of its own."""

    def __init__(self, name: str, experiment: config.Experiment, out: Path) -> None:
        self.name, self.experiment, self.out = name, experiment, out
        self.folder = RunFolder(out / experiment.place)
        self.errors = self.folder.path.with_name(f"{self.folder.path.name}.stderr")
        self.progress = Progress(self.folder.path)
        self.state, self.why, self.again = WAITS, "", False
        self.process: subprocess.Popen[bytes] | None = None
        self._said: IO[bytes] = io.BytesIO()
        self.began = 0.0

    def prepare(self, overwrite: bool) -> None:
        """See what is there: a finished run, one to go on with, or one of another config, which is refused."""
        if overwrite or not (self.folder.path / "manifest.json").exists():
            return  # nothing is there, or nothing but what was begun when it was killed
        run.refuse_another(self.folder, self.experiment)
        if self.folder.manifest()["status"] == "finished":
            self.state = FINISHED
        self.again = self.folder.has_checkpoint
        self.progress.read()  # boundaries of before the stop are not told again

    def start(self) -> None:
        """Begin it or go on with it."""
        self.state, self.began = WALKS, time.time()
        self._said = tempfile.TemporaryFile()  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", CHILD],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=self._said,
            process_group=0,  # a Ctrl-C is the parent's alone
        )
        job = {"path": sys.path, "out": str(self.out), "config": yaml.safe_dump(self.experiment.plain())}
        with contextlib.suppress(BrokenPipeError):  # it is dead already, and `ended` will say why
            self._line.write(json.dumps(job).encode() + b"\n")
            self._line.flush()

    @property
    def _line(self) -> IO[bytes]:
        assert self.process is not None and self.process.stdin is not None
        return self.process.stdin

    def hang_up(self) -> None:
        """Ask it to stop at its next safe point."""
        with contextlib.suppress(BrokenPipeError):
            self._line.close()

    def ended(self, asked: bool) -> bool:
        """Whether its process is over; then its state says how, and `why` in one line what went wrong."""
        code = self.process.poll() if self.process is not None else None
        if code is None:
            return False
        self.hang_up()
        status = self.folder.manifest()["status"] if (self.folder.path / "manifest.json").exists() else ""
        self._said.seek(0)
        all_said = self._said.read()
        said = all_said.decode(errors="replace").strip().splitlines()
        if code == 0 and status == "finished":
            self.state = FINISHED
        elif asked and (status in ("interrupted", "walked") or code == -signal.SIGTERM):
            self.state = STOPPED
        else:
            self.state = FAILED
            self.why = (
                f"killed by {signal.Signals(-code).name}" if code < 0 else said[-1] if said else f"exit code {code}"
            )
            if len(said) > 1:
                with contextlib.suppress(OSError):  # a full disk may be what ended it
                    self.errors.write_bytes(all_said)
                self.why += f" ({self.errors} has more)"
                return True
        self.errors.unlink(missing_ok=True)
        return True

    def kill(self) -> None:
        """End it at once."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.hang_up()
            self._said.close()

    def line(self, room: int) -> str:
        """Its bar."""
        return self.progress.line(self.name, room) if self.state == WALKS else f"{self.name}  {self.state}"[:room]


class Several:
    """Walks that are under way, and how they are watched."""

    def __init__(self, walks: Sequence[Walk], at_once: int, verbosity: int) -> None:
        self.walks, self.at_once = walks, at_once
        self.terminal = Bars(verbosity=verbosity)
        self.asked_to_stop = ""

    def go(self) -> None:
        """Until all have ended, or have stopped; asked twice to stop, none is left behind."""
        with listening(self):
            try:
                while any(one.state in (WAITS, WALKS) for one in self.walks):
                    self._turn()
                    self._draw()
                    time.sleep(LOOK)
            finally:
                for one in self.walks:
                    one.kill()
                self.terminal.close()

    def _turn(self) -> None:
        for one in self._now(WALKS):
            if self.asked_to_stop:
                one.hang_up()
            over = one.ended(bool(self.asked_to_stop))
            for said in one.progress.read():
                if not self.terminal.live:
                    self.terminal.note(f"{one.name}: {said}")
            if over:
                why = f": {one.why}" if one.why else ""
                self.terminal.note(f"{one.name}: {one.state} after {duration(time.time() - one.began)}{why}")
        waiting = self._now(WAITS)
        if self.asked_to_stop:
            for one in waiting:
                one.state = STOPPED
        else:
            for one in waiting[: max(self.at_once - len(self._now(WALKS)), 0)]:
                one.start()

    def _now(self, state: str) -> list[Walk]:
        return [one for one in self.walks if one.state == state]

    def _draw(self) -> None:
        room = self.terminal.room
        counts = {state: len(self._now(state)) for state in (WAITS, WALKS, FINISHED, STOPPED, FAILED)}
        total = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
        few = [*(one.line(room) for one in self._now(WALKS)), total]
        self.terminal.draw([one.line(room) for one in self.walks], few[-self.at_once - 1 :])


# The child's side.


def child(job: Mapping[str, str]) -> None:
    """Walk until the end, or until the parent hangs up. What is there is looked at now: others may have been here."""
    threading.Thread(target=_heed, daemon=True).start()
    try:
        experiment = config.parse(config.Experiment, config.parse_yaml(job["config"], "the parent's config"))
        run.begin_or_go_on(experiment, job["out"])
    except CrlError as error:
        sys.exit(" ".join(str(error).split()))
    except (Exception, SystemExit) as error:  # never exit code 0
        traceback.print_exc()
        sys.exit(str(failed(error)))


def _heed() -> None:
    """The end of the line is as good as a signal. Read without Python's buffer, whose lock would outlive the child."""
    os.read(0, 1)
    os.kill(os.getpid(), signal.SIGTERM)


# Small parts.


def _these(seeds: Sequence[int]) -> str:
    """Seeds in words.

    >>> _these([3, 4, 5]), _these([3, 5])
    ('3 to 5', '3, 5')
    """
    if len(seeds) > 2 and list(seeds) == [*range(seeds[0], seeds[-1] + 1)]:
        return f"{seeds[0]} to {seeds[-1]}"
    return ", ".join(map(str, seeds))
