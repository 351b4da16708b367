"""Sides of a benchmark run in turns, each in a process of its own, so that a drifting machine does not decide."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from crl.core import CrlError

Figures = dict[str, Any]  # what one run of a side prints, as JSON, in its last line


def in_turns(
    case: str,
    sides: Sequence[str],
    pairs: int,
    command: Callable[[str], Sequence[str]],
    shown: Callable[[Figures], str],
    env: Callable[[str], Mapping[str, str]] | None = None,
) -> dict[str, list[Figures]]:
    """Run Python with each side's arguments so often, every other time in the opposite order."""
    found: dict[str, list[Figures]] = {side: [] for side in sides}
    for turn in range(pairs):
        for side in sides if turn % 2 == 0 else sides[::-1]:
            own = dict(env(side)) if env else None
            whole = [sys.executable, "-W", "ignore", "-m", *command(side)]
            done = subprocess.run(whole, capture_output=True, text=True, check=False, env=own)
            if done.returncode:
                said = (done.stderr.strip() or "no word").splitlines()[-1]
                raise CrlError(f"bench: {side} on {case}: {said}")
            found[side].append(json.loads(done.stdout.splitlines()[-1]))
            print(f"{case}: {side} {shown(found[side][-1])}", file=sys.stderr, flush=True)
    return found


def ratios(found: Mapping[str, Sequence[Figures]], seconds: Callable[[Figures], float]) -> dict[str, list[float]]:
    """How many times as long each other side took as the first one, pair by pair."""
    first, *others = found
    ours = [seconds(run) for run in found[first]]
    return {side: [seconds(run) / own for run, own in zip(found[side], ours, strict=True)] for side in others}


def table(
    titles: Sequence[str], results: Sequence[Figures], cells: Callable[[Sequence[Figures]], Sequence[str]]
) -> str:
    """A Markdown table: each case's sides, the cells of a side's runs, and its ratio to the first with the spread."""
    empty = " |" * len(titles)
    lines = [f"| | {' | '.join(titles)} |", f"|---|{'---|' * len(titles)}"]
    for result in results:
        lines.append(f"| **{result['case']}** |{empty}")
        for side, runs in result["runs"].items():
            ratio = f" {spread(result['ratios'][side])}" if side in result["ratios"] else ""
            lines.append(f"| {side} | {' | '.join(cells(runs))} |{ratio} |")
    return "\n".join(lines)


def middle(runs: Sequence[Figures], name: str) -> float:
    """The median of a figure."""
    return float(statistics.median(run[name] for run in runs))


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Median, least and most.

    >>> spread([1.0, 3.0, 2.0], 1)
    '2.0 (1.0 to 3.0)'
    """
    own = f".{digits}f"
    return f"{statistics.median(values):{own}} ({min(values):{own}} to {max(values):{own}})"
