"""Configs that nobody would write: each is accepted, or refused in one line, soon, and leaves no file behind."""

from __future__ import annotations

import copy
import signal
import time
from pathlib import Path
from types import FrameType
from typing import Any

import yaml

from tests.soak.runs import dice, here, tiny

VALUES: list[Any] = [
    None, True, 0, -1, 1, 2.5, 1e300, -1e308, 10**30, float("nan"), float("inf"), "", "0", "a" * 300, "../x", "a/b",
    "é\n",
    [], [0], [[]], [None], {}, {"use": "ppo"}, {"a": {"b": []}}, ["64"], [2.5], "1e999", "!!", "*a", [1] * 50,
]  # fmt: skip
TEXTS = [
    "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 9)),  # a bomb
    "seed: !!bool 3\n", "tasks: !!map [1]\n", "tasks: !!set {a, b}\n", "? [a]\n: b\n", "tasks: [\n", "\x00", "- a\n",
    "%YAML 9.9\n---\n",
]  # fmt: skip
LIMIT = 20  # seconds of the processor that one check may take


class TooLong(BaseException):
    """Nobody's `except Exception` catches it."""


def config_case(number: int, out: Path) -> tuple[str, str]:
    """A tiny config with one to three places changed, or a text that is none; checked by the public command."""
    chance, path = dice("config", number), out / f"strange-{number}.yaml"
    if chance.random() < 0.05:
        path.write_text(chance.choice(TEXTS), encoding="utf-8")
    else:
        path.write_text(
            yaml.safe_dump(_changed(tiny(chance.randrange(300)), chance), allow_unicode=True), encoding="utf-8"
        )
    files, began = {*out.iterdir()}, time.time()
    before = signal.signal(signal.SIGVTALRM, _too_long)  # the other timer is the environments' own
    signal.setitimer(signal.ITIMER_VIRTUAL, LIMIT)
    try:
        code, said = here(["check", str(path)])
    except TooLong:
        return "hangs", path.read_text(encoding="utf-8")[:300]
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
    took, left = time.time() - began, {*out.iterdir()} - files
    text = path.read_text(encoding="utf-8")
    path.unlink()
    if left:
        return "left behind", f"{left}"
    if code == 0:
        return "ran", f"{took:.1f} s"
    one = code == 2 and len(said.splitlines()) == 1 and "crl itself failed" not in said
    return ("refused", said) if one else ("not one line", f"{said[-250:]} of {text[:200]}")


def _too_long(number: int, frame: FrameType | None) -> None:
    raise TooLong


def _changed(data: dict[str, Any], chance: Any) -> dict[str, Any]:
    """One to three places of the whole tree hold something else, are gone, or are new."""
    for _ in range(chance.randint(1, 3)):
        places = _places(data)
        owner, key = chance.choice(places)
        how = chance.random()
        if how < 0.75:
            owner[key] = copy.deepcopy(chance.choice(VALUES))
        elif how < 0.9 and isinstance(owner, dict):
            owner[chance.choice(["x", "", "steps", "use", "gamma", "learning_rate", "n_epochs"])] = chance.choice(
                VALUES
            )
        else:
            del owner[key]
    return data


def _places(node: Any) -> list[tuple[Any, Any]]:
    keys = [*node] if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else []
    return [(node, key) for key in keys] + [place for key in keys for place in _places(node[key])]
