"""Where records go: the JSONL file is the run; TensorBoard and the terminal are views of it.

The file is what a resume cuts back and what analysis reads. The views can be thrown away and built again from it.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from crl.core import CrlError, Record
from crl.linalg import Spectrum
from crl.pictures import SMALL, Rows, bend, draw_matrix, draw_spectra, number, pixels, short

LARGE = 24  # tasks: where there are more, not all are shown at once
_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}  # JSON has no numbers for these


class Jsonl:
    """The run's log, one record a line, only ever added to. Opening at an `offset` cuts off all that follows it."""

    def __init__(self, path: Path, offset: int | None = None) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a+b")
        try:
            self._file.truncate(_whole_lines(path) if offset is None else _checked(path, offset))
        except CrlError:
            self._file.close()
            raise

    @property
    def offset(self) -> int:
        """Bytes that are safely on disk, all records written so far included: what a checkpoint remembers."""
        self.flush()
        os.fsync(self._file.fileno())
        return os.fstat(self._file.fileno()).st_size

    def write(self, record: Record) -> None:
        """Add one record."""
        fields = {key: value for key, value in asdict(record).items() if key != "note" or value}
        line = json.dumps(fields | {"value": _encode(record.value)}, allow_nan=False)
        self._file.write(line.encode() + b"\n")

    def flush(self) -> None:
        """Hand everything to the operating system."""
        self._file.flush()

    def close(self) -> None:
        """Flush and close; once is enough, twice does no harm."""
        self._file.close()


def read_records(path: Path) -> list[Record]:
    """All records of a log. A last line that a stop left half-written is passed over."""
    records = []
    with path.open("rb") as file:
        for count, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                break
            try:
                records.append(_decode(json.loads(line)))
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise CrlError(f"{path}, line {count}: this is not a record ({error})") from error
    return records


def _encode(value: float | list[float]) -> Any:
    if isinstance(value, list):
        return [_encode(item) for item in value]
    value = float(value)
    return value if math.isfinite(value) else str(json.dumps(value))


def _decode(fields: dict[str, Any]) -> Record:
    def real(item: object) -> float:
        return _NOT_FINITE[item] if isinstance(item, str) else float(item)  # type: ignore[arg-type]

    value = fields["value"]
    counts = {key: int(fields[key]) for key in ("step", "visit")}
    return Record(**fields | counts | {"value": list(map(real, value)) if isinstance(value, list) else real(value)})


def _whole_lines(path: Path) -> int:
    """Bytes up to the end of the last complete line."""
    return path.read_bytes().rfind(b"\n") + 1


def _checked(path: Path, offset: int) -> int:
    """`offset`, if a line of the file ends there."""
    with path.open("rb") as file:
        file.seek(max(offset - 1, 0))
        if offset and file.read(1) != b"\n":
            raise CrlError(f"{path}: no record ends at byte {offset}, where the checkpoint left the log")
    return offset


class TensorBoard:
    """The run as TensorBoard shows it. Old event files are removed: on a resume, write the run's records again."""

    def __init__(self, folder: Path, tasks: Sequence[str], measure: str = "return") -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob("events.out.tfevents.*"):
            old.unlink()
        self._writer: Any = SummaryWriter(str(folder), flush_secs=10)
        self._writer.add_custom_scalars(_layout(tasks, measure))
        self._measure = measure
        self._spectra: dict[str, list[tuple[str, Spectrum]]] = {}

    def write(self, record: Record) -> None:
        """Draw a number as a point of a curve, and an array as a histogram of what is finite in it."""
        if record.name.endswith(("/half", "/error")):  # how sure a number is: the log has it
            return
        step = record.visit if looked(record) else record.step
        if not isinstance(record.value, list):
            self._writer.add_scalar(tag(record), record.value, step)
            return
        values = np.asarray(record.value, dtype=np.float64)
        values = values[np.isfinite(values)]
        if values.size:
            self._writer.add_histogram(tag(record), values, step)

    def spectrum(self, visit: int, phase: str, name: str, spectrum: Spectrum) -> None:
        """Show a spectrum as a histogram, and all of its name so far as one picture.

        The histogram is of signed decades (2 is .01, 4 is 1, -4 is -1) beyond the smallest: most eigenvalues are
        next to zero, and would be all there is to see.
        """
        apart = np.abs(spectrum.values) > SMALL
        values = bend(spectrum.values[apart])
        weights = spectrum.weights[apart] * spectrum.size / len(spectrum.values)
        if values.size:
            edges = np.arange(np.floor(values.min() * 5), np.ceil(values.max() * 5) + 2) / 5
            counts, _ = np.histogram(values, edges, weights=weights)
            self._writer.add_histogram_raw(
                _clean(f"{name}/decades/{phase}"),
                min=float(values.min()),
                max=float(values.max()),
                num=float(weights.sum()),
                sum=float(values @ weights),
                sum_squares=float(values**2 @ weights),
                bucket_limits=edges[1:].tolist(),
                bucket_counts=counts.tolist(),
                global_step=visit,
            )
        seen = self._spectra.setdefault(name, [])
        seen.append((f"visit {visit}, {phase}", spectrum))
        image = pixels(draw_spectra(seen, f"spectrum: {name}"))
        self._writer.add_image(_clean(f"spectra/{name}"), image, visit, dataformats="HWC")

    def matrix(
        self, step: int, rows: Rows, row_names: Sequence[str], tasks: Sequence[str], visited: Sequence[int]
    ) -> None:
        """Show the evaluation matrix so far; `draw_matrix` says what the arguments are."""
        if len(tasks) > LARGE and len(rows) % (len(tasks) // LARGE + 1):
            return  # a picture of many tasks takes long, and few boundaries show in it
        image = pixels(draw_matrix(rows, row_names, tasks, visited, f"mean {self._measure}"))
        self._writer.add_image("walk/matrix", image, step, dataformats="HWC")

    def hparams(self, config: Mapping[str, object], metrics: Mapping[str, float]) -> None:
        """Enter the run in the table that compares runs, with its flat config and its final metrics."""
        from torch.utils.tensorboard import summary

        plain = {key: value if type(value) in (int, float, str) else str(value) for key, value in config.items()}
        final = {f"final/{name}": float(value) for name, value in metrics.items()}
        table: Any = summary.hparams  # the writer's own add_hparams would make a second run of it
        for part in table(plain, final):
            self._writer.file_writer.add_summary(part)
        for name, value in final.items():
            self._writer.add_scalar(name, value)

    def flush(self) -> None:
        """Bring the view up to date."""
        self._writer.flush()

    def close(self) -> None:
        """Flush and close."""
        self._writer.close()


def looked(record: Record) -> bool:
    """Whether a monitor saw this: drawn by visit, not by step, since two boundaries share a step."""
    return record.phase in ("init", "end") and not record.name.startswith("eval/")


def tag(record: Record) -> str:
    """The curve that a record is a point of.

    An evaluation has a curve for each task. Training has one over the whole walk, so that boundaries show in it;
    only baselines, which walk alone, are kept apart. What monitors see before and after visits are two curves.
    """
    if record.phase == "baseline":
        name = f"{record.name}/{record.task}"
    elif record.name in ("eval/return", "eval/accuracy") and record.task:
        name = f"eval/{record.task}"
    elif record.name.startswith("eval/") and record.task:
        name = f"{record.name}/{record.task}"
    else:
        name = f"{record.name}/{record.phase}" if record.phase in ("init", "end") else record.name
    return _clean(name)


def _clean(name: str) -> str:
    """A tag of the characters that TensorBoard's writer leaves as they are."""
    return re.sub(r"[^-/\w.]", "_", name).strip("/")


def _layout(tasks: Sequence[str], measure: str) -> dict[str, dict[str, list[Any]]]:
    """The page that tells the story. TensorBoard reads the tags as regular expressions for the start of a tag."""
    every_task = [f"^{re.escape(_clean(f'eval/{task}'))}$" for task in dict.fromkeys(tasks)]
    return {
        "The walk": {
            "every task's evaluation": ["Multiline", every_task],
            f"training {measure}": ["Multiline", [f"^train/{measure}$"]],
            "task being visited": ["Multiline", ["^walk/visit$"]],
        },
        "What it kept": {
            "forgetting": ["Multiline", ["^metrics/forgetting"]],
            "average performance": ["Multiline", ["^metrics/average"]],
            "transfer": ["Multiline", ["^metrics/.*transfer"]],
        },
        "Inside, by visit": {
            "Hessian at the start of a visit: share of |eigenvalues| above .01": [
                "Multiline",
                ["^hessian/[^/]*/epsilon_rank_0.01/init$"],
            ],
            "effective rank of the last hidden layers": ["Multiline", ["^erank/[^/]*/last/effective_rank/(init|end)$"]],
            "ranks, of their peak": ["Multiline", ["^(erank/.*|weight_rank/[^/]*/mean)/of_peak/"]],
            "dormant units": ["Multiline", ["^dormant/[^/]*/dormant/"]],
            "distance from the first weights": ["Multiline", ["^norms/[^/]*/distance_from_init/"]],
        },
    }


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
        self._stream.write(text + "\n")
        self._stream.flush()

    def _redraw(self, line: str) -> None:
        """Put `line` in the place of the live line."""
        if self._tty and (line or self._live):
            self._stream.write(f"\r{line}\x1b[K")
            self._stream.flush()
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
