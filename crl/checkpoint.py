"""A checkpoint's file: tensors and plain values with their sums, so loading one runs no code and hides no damage."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from crl import __version__
from crl.core import CrlError, State

FORMAT = 5  # the former one is read too: of the log it has the length, and no sum


def _count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**53


def _mark(value: Any) -> bool:
    """The length of the log, and its sum."""
    return isinstance(value, list) and len(value) == 2 and _count(value[0]) and (value[1] is None or _count(value[1]))


def _rows(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(row, list) and all(isinstance(cell, int | float) for cell in row) for row in value
    )


def _names(value: Any) -> bool:
    return isinstance(value, dict)


FIELDS: dict[str, Callable[[Any], bool]] = {
    "digest": lambda value: isinstance(value, str),
    **dict.fromkeys(("visit", "done", "step"), _count),
    "offset": _mark,
    "matrix": _rows,
    **dict.fromkeys(("agent", "tasks", "methods", "monitors", "random"), _names),
}


def packed(state: State) -> memoryview:
    """The content of a checkpoint's file, or a line about what in it could not be read back."""
    data = io.BytesIO()
    try:
        torch.save({"format": FORMAT, "crl": __version__, **state}, data)
        data.seek(0)
        torch.load(data, map_location="meta", weights_only=True)  # all but the numbers
    except Exception as error:  # an agent's own objects may fail in any way
        place, what = _unfit(state)
        if not place:
            raise
        right = "state_dict() must return tensors, numbers, text, and lists and dictionaries of them"
        raise CrlError(f"{place} is {what}, which no checkpoint can hold: {right}") from error
    return data.getbuffer()


def unpacked(path: Path) -> Any:
    """What a checkpoint holds. Its sums are taken first, since torch does not; nothing that is packed is unpacked."""
    with zipfile.ZipFile(path) as archive:
        size, inside = path.stat().st_size, archive.infolist()
        large = sum(info.file_size for info in inside)
        if large > size or any(info.compress_type != zipfile.ZIP_STORED for info in inside):
            raise ValueError(f"it unpacks from {size:,} to {large:,} bytes, and crl packs none")
        wrong = archive.testzip()
        if wrong is not None:
            raise ValueError(f"the sum of {wrong} is wrong")
    return torch.load(path, map_location="cpu", weights_only=True)


def misfit(state: Any) -> str:
    """What is wrong with a checkpoint's plain fields, if anything is. A former format's are brought up to date."""
    if not isinstance(state, dict) or type(state.get("format")) is not int:
        return "not a checkpoint of crl"
    if state["format"] not in (FORMAT - 1, FORMAT):
        by = state.get("crl") or ("a later crl" if state["format"] > FORMAT else "an earlier crl")
        which = f"format {state['format']}, written by {by}; this one reads {FORMAT - 1} and {FORMAT}"
        return f"not a checkpoint of crl that this version reads: {which}"
    if type(state.get("offset")) is int:
        state["offset"] = [state["offset"], None]
    wrong = next((name for name, fits in FIELDS.items() if not fits(state.get(name))), "")
    if not wrong and len(state["matrix"]) != state["visit"] + 1:
        return f"not a checkpoint of crl: {len(state['matrix'])} rows of a matrix after {state['visit']} visits"
    return f"not a checkpoint of crl: its {wrong} is {str(state.get(wrong))[:40]!r}" if wrong else ""


def _unfit(state: Any, place: str = "") -> tuple[str, str]:
    """The place in a state, and the type, of the first thing that cannot be saved, or not be read back."""
    try:
        data = io.BytesIO()
        torch.save(state, data)
        data.seek(0)
        torch.load(data, map_location="meta", weights_only=True)
    except Exception:  # an object of anybody's
        parts = dict(enumerate(state)) if type(state) in (list, tuple) else state if isinstance(state, dict) else {}
        inner = (_unfit(part, f"{place}.{key}".lstrip(".")) for key, part in parts.items())
        return next((found for found in inner if found[0]), (place, f"a {type(state).__name__}"))
    return "", ""
