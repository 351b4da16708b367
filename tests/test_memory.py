"""A walk's memory does not grow with its visits."""

import json
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from tests.marks import SLOW

ROOT = Path(__file__).resolve().parent.parent
STATM = Path("/proc/self/statm")
BOUND = 5.0  # MiB between the medians of two groups of boundaries that are twelve visits apart
VISITS = """
import ctypes, ctypes.util, gc, json, os, sys
import crl
from crl.walk import Walk
from crl.sinks import TensorBoard

trim = getattr(ctypes.CDLL(ctypes.util.find_library("c")), "malloc_trim", lambda kept: 0)

def told(self, visit, done=0):
    gc.collect()  # what is only waiting to be collected is no leak, nor what the allocator holds back
    trim(0)
    pages = int(open("/proc/self/statm").read().split()[1])
    print(pages * os.sysconf("SC_PAGESIZE") / 2**20, flush=True)
    saved(self, visit, done)

saved, Walk._checkpoint = Walk._checkpoint, told
if sys.argv[3]:  # pictures are what takes long
    TensorBoard.spectrum = TensorBoard.matrix = lambda *given: None
crl.train(json.loads(sys.argv[1]), out=sys.argv[2])
"""


def resident(out: Path, *more: str, pictures: bool = True) -> list[float]:
    """MiB at each boundary of 24 visits with the default monitors, in a process of its own."""
    data = {
        "name": "walk",
        "tasks": [{"env": "tests.wide:Wide-v0", "steps": 64, "name": name} for name in ("one", "two")],
        "repeat": 12,
        "engine": {"envs": 2},
        "agent": {"use": "ppo", "n_steps": 16, "batch_size": 16, "net": {"hidden": [4]}},
        "monitors": [{"use": "hessian", "probes": 1, "steps": 10}, "erank", "dormant", "norms", *more],
        "evaluation": {"episodes": 1},
    }
    command = [sys.executable, "-c", VISITS, json.dumps(data), str(out), "" if pictures else "none"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return [float(line) for line in done.stdout.splitlines()]


def growth(sizes: list[float]) -> float:
    """How much more is resident at the last six boundaries than at those after a warm-up of six."""
    assert len(sizes) == 25
    return statistics.median(sizes[19:]) - statistics.median(sizes[7:13])


@pytest.mark.skipif(not STATM.exists(), reason="the resident size is read from /proc")
@SLOW
def test_memory_is_flat_over_visits(tmp_path: Path) -> None:
    sizes = resident(tmp_path)
    assert growth(sizes) < BOUND, [round(size, 1) for size in sizes]


@pytest.mark.skipif(not STATM.exists(), reason="the resident size is read from /proc")
@SLOW
def test_a_monitor_that_keeps_what_it_sees_is_caught(tmp_path: Path) -> None:
    sizes = resident(tmp_path, "tests.wide.Keeps", pictures=False)
    assert growth(sizes) > 2 * BOUND, [round(size, 1) for size in sizes]
