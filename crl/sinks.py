"""Where records go: the JSONL file is the run; TensorBoard is a view of it.

The file is what a resume cuts back and what analysis reads. The view can be thrown away and built again from it.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from crl.core import CrlError, Record
from crl.linalg import Spectrum
from crl.pictures import LARGE, SMALL, Rows, bend, draw_matrix, draw_spectra, pixels

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
        if record.name.endswith("/error"):  # the log has it; the bracket is drawn
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
