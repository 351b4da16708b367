"""Where records go: the JSONL file is the run; TensorBoard is a view of it.

The file is what a resume cuts back and what analysis reads. The view can be thrown away and built again from it.
"""

from __future__ import annotations

import io
import json
import math
import os
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from crl.core import CrlError, Record, brief
from crl.disk import content, writing
from crl.linalg import Spectrum
from crl.pictures import LARGE, SMALL, Rows, bend, draw_matrix, draw_spectra, pixels

_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}  # JSON has no numbers for these


class Damaged(CrlError):
    """A log is not what was written."""


class Jsonl:
    """The run's log, one record a line, only ever added to. Opening at an `offset` cuts off all that follows it.

    With the sum of all before it, that is checked too.
    """

    def __init__(self, path: Path, offset: int | None = None, known: int | None = None) -> None:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a+b")
        self._path, self.sum = path, 0
        try:
            size = _whole_lines(path) if offset is None else _checked(path, offset)
            for block in _blocks(path, size):
                self.sum = zlib.crc32(block, self.sum)
            if known is not None and self.sum != known:
                raise Damaged(f"{path}: damaged before byte {offset}: it is not what was written")
            self._file.truncate(size)
        except CrlError:
            self._file.close()
            raise

    @property
    def offset(self) -> int:
        """Bytes that are safely on disk, all records written so far included: what a checkpoint remembers."""
        with writing(self._path):
            self._file.flush()
            os.fsync(self._file.fileno())
        return os.fstat(self._file.fileno()).st_size

    @property
    def mark(self) -> list[int]:
        """The offset, and the sum of all before it."""
        return [self.offset, self.sum]

    def write(self, record: Record) -> None:
        """Add one record."""
        fields = {key: value for key, value in asdict(record).items() if key != "note" or value}
        line = json.dumps(fields | {"value": _encode(record.value)}, allow_nan=False).encode() + b"\n"
        with writing(self._path):
            self._file.write(line)
        self.sum = zlib.crc32(line, self.sum)

    def flush(self) -> None:
        """Hand everything to the operating system."""
        with writing(self._path):
            self._file.flush()

    def close(self) -> None:
        """Flush and close; once is enough, twice does no harm."""
        with writing(self._path):
            self._file.close()


def read_records(path: Path, mark: Sequence[int] = ()) -> list[Record]:
    """All records of a log, whose sum up to some byte may be known. A last line that is half-written is passed over."""
    records, end, found = [], 0, 0
    for count, line in enumerate(io.BytesIO(content(path)), 1):
        if not line.endswith(b"\n"):
            break
        try:
            records.append(_decode(json.loads(line)))
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
            raise _damaged(path, f"line {count}: this is not a record ({brief(error)})") from None
        end, found = end + len(line), zlib.crc32(line, found)
        if mark and end == mark[0] and found != mark[1]:
            raise _damaged(path, f"in its first {count} lines is something that was not written")
    if mark and end < mark[0]:
        raise _damaged(path, f"it ends at byte {end}, and had {mark[0]}")
    return records


def _damaged(path: Path, why: str) -> Damaged:
    return Damaged(f"{path}: damaged: {why}; `crl eval` does without it: the checkpoints and the matrix are not in it")


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


def _blocks(path: Path, size: int) -> Iterator[bytes]:
    """The first bytes of a file, a part at a time."""
    with path.open("rb") as file:
        while size > 0 and (block := file.read(min(size, 2**20))):
            size -= len(block)
            yield block


def _checked(path: Path, offset: int) -> int:
    """`offset`, if a line of the file ends there."""
    with path.open("rb") as file:
        file.seek(max(offset - 1, 0))
        if offset and file.read(1) != b"\n":
            raise Damaged(f"{path}: no record ends at byte {offset}, where the checkpoint left the log")
    return offset


class TensorBoard:
    """The run as TensorBoard shows it. Old event files are removed: on a resume, write the run's records again.

    In a walk of many visits pictures come at few of them, with few lines each: a boundary costs what the first did.
    """

    def __init__(self, folder: Path, tasks: Sequence[str], measure: str = "return", visits: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._folder, self._measure = folder, measure
        self._visits, self._every = visits, max(math.ceil(visits / LARGE), 1)
        self._spectra: dict[str, list[tuple[int, str, Spectrum]]] = {}
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            for old in folder.glob("events.out.tfevents.*"):
                old.unlink()
            self._writer: Any = SummaryWriter(str(folder), flush_secs=10)
            self._writer.add_custom_scalars(_layout(tasks, measure))

    def write(self, record: Record) -> None:
        """Draw a number as a point of a curve, and an array as a histogram of what is finite in it."""
        if record.name.endswith("/error"):  # the log has it; the bracket is drawn
            return
        step = record.visit if looked(record) else record.step
        with writing(self._folder):
            if not isinstance(record.value, list):
                self._writer.add_scalar(tag(record), record.value, step)
                return
            values = np.asarray(record.value, dtype=np.float64)
            values = values[np.isfinite(values)]
            if values.size:
                self._writer.add_histogram(tag(record), values, step)

    def spectrum(self, visit: int, phase: str, name: str, spectrum: Spectrum) -> None:
        """Show a spectrum as a histogram, and now and then those of its name so far as one picture."""
        with writing(self._folder):
            self._decades(visit, phase, name, spectrum)
            seen = self._spectra.setdefault(name, [])
            seen.append((visit, phase, spectrum))
            if len(seen) > LARGE:
                kept = {*list(dict.fromkeys(one[0] for one in seen))[::2], visit}
                seen[:] = [one for one in seen if one[0] in kept]
            if self._now(visit):
                lines = [(f"visit {visit}, {phase}", spectrum) for visit, phase, spectrum in seen]
                image = pixels(draw_spectra(lines, f"spectrum: {name}"))
                self._writer.add_image(_clean(f"spectra/{name}"), image, visit, dataformats="HWC")

    def _now(self, visit: int) -> bool:
        """Whether it is time for a picture: after each of a few visits, and after few of many."""
        return visit % self._every == 0 or visit == self._visits

    def _decades(self, visit: int, phase: str, name: str, spectrum: Spectrum) -> None:
        """A histogram of signed decades (2 is .01, 4 is 1, -4 is -1) beyond the smallest.

        Most eigenvalues are next to zero, and would be all there is to see.
        """
        apart = np.abs(spectrum.values) > SMALL
        values = bend(spectrum.values[apart])
        weights = spectrum.weights[apart] * spectrum.size / len(spectrum.values)
        if not values.size:
            return
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

    def matrix(
        self, step: int, rows: Rows, row_names: Sequence[str], tasks: Sequence[str], visited: Sequence[int]
    ) -> None:
        """Show the evaluation matrix so far; `draw_matrix` says what the arguments are."""
        if not self._now(len(rows) - 1):
            return
        image = pixels(draw_matrix(rows, row_names, tasks, visited, f"mean {self._measure}"))
        with writing(self._folder):
            self._writer.add_image("walk/matrix", image, step, dataformats="HWC")

    def hparams(self, config: Mapping[str, object], metrics: Mapping[str, float]) -> None:
        """Enter the run in the table that compares runs, with its flat config and its final metrics."""
        from torch.utils.tensorboard import summary

        plain = {key: value if type(value) in (int, float, str) else str(value) for key, value in config.items()}
        final = {f"final/{name}": float(value) for name, value in metrics.items()}
        table: Any = summary.hparams  # the writer's own add_hparams would make a second run of it
        with writing(self._folder):
            for part in table(plain, final):
                self._writer.file_writer.add_summary(part)
            for name, value in final.items():
                self._writer.add_scalar(name, value)

    def flush(self) -> None:
        """Bring the view up to date."""
        with writing(self._folder):
            self._writer.flush()

    def close(self) -> None:
        """Flush and close."""
        with writing(self._folder):
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
            "Hessian at the start of a visit: share of |eigenvalues| above .01, and its bracket": [
                "Multiline",
                ["^hessian/[^/]*/epsilon_rank_0.01/((low|high)/)?init$"],
            ],
            "effective rank of the last hidden layers": ["Multiline", ["^erank/[^/]*/last/effective_rank/(init|end)$"]],
            "ranks, of their peak": ["Multiline", ["^(erank/.*|weight_rank/[^/]*/mean)/of_peak/"]],
            "dormant units": ["Multiline", ["^dormant/[^/]*/dormant/"]],
            "distance from the first weights": ["Multiline", ["^norms/[^/]*/distance_from_init/"]],
        },
    }
