"""Runs that are killed, whose disk is full, or that are long: resumed, each is the run that was never stopped."""

from __future__ import annotations

import contextlib
import gc
import os
import resource
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np

from tests.soak.runs import accepted, apart, command, dice, finished, here, kept, run_of

WALKED = {}  # how the uninterrupted runs ended, by their numbers
STOP_AT = """
import os, crl.store as store
old, count = os.{name}, [0]
def once(*args, **options):
    count[0] += 1
    if count[0] == {at}:
        {what}
    return old(*args, **options)
os.{name} = once
"""
FULL = "raise OSError(28, 'No space left on device')"
DIES = "os.kill(os.getpid(), 9)"


def whole(number: int, folder: Path) -> tuple[Any, ...]:
    """What an uninterrupted run leaves."""
    if number not in WALKED:
        code, said = here(command(accepted(number), folder, "whole", "--overwrite"))
        run = run_of(folder, "whole")
        if code or run is None:
            raise RuntimeError(f"the uninterrupted run failed: {said}")
        WALKED[number] = kept(run)
    return WALKED[number]


def resumed(number: int, folder: Path, limit: int = 5) -> tuple[str, str]:
    """Go on by the same command until the run is finished, and compare."""
    argv = command(accepted(number), folder, "runs", "--continue")
    code, said = here(argv)
    run = run_of(folder, "runs")
    if code or run is None or not finished(run):
        return "not resumed", said
    outcome = "same" if kept(run) == whole(number, folder) else "different"
    left = [str(path) for path in (folder / "runs").rglob(".*") if path.is_file() and not path.name.endswith(".lock")]
    return ("left behind", " ".join(left)) if outcome == "same" and left else (outcome, "")


def kill_case(number: int, out: Path) -> tuple[str, str]:
    """SIGKILL at a random moment; again, perhaps, while it goes on."""
    folder, chance = out / f"kill-{number}", dice("kill", number)
    whole(number, folder)
    for _ in range(chance.choice([1, 1, 2])):
        process = apart(command(accepted(number), folder, "runs", "--continue"))
        begun = time.time()
        while run_of(folder, "runs") is None and process.poll() is None and time.time() - begun < 60:
            time.sleep(0.02)
        time.sleep(chance.random() * 1.5)
        process.kill()
        process.communicate()
    return _swept(folder, resumed(number, folder))


def write_case(number: int, out: Path) -> tuple[str, str]:
    """SIGKILL inside a write: at a replace, an fsync or a truncation."""
    folder, chance = out / f"write-{number}", dice("write", number)
    name = chance.choice(["replace", "fsync", "replace"])
    before = STOP_AT.format(name=name, at=chance.randint(1, 14), what=DIES)
    process = apart(command(accepted(number), folder, "runs", "--continue"), before)
    process.communicate()
    return _swept(folder, resumed(number, folder))


def disk_case(number: int, out: Path) -> tuple[str, str]:
    """The disk is full from some fsync on; there is room again when the run goes on."""
    folder, chance = out / f"disk-{number}", dice("disk", number)
    at = chance.randint(1, 14)
    before = STOP_AT.format(name="fsync", at=at, what=FULL).replace(f"== {at}", f">= {at}")
    process = apart(command(accepted(number), folder, "runs", "--continue"), before)
    said = process.communicate()[1]
    if process.returncode and ("Traceback" in said or len(said.splitlines()) != 1):
        return _swept(folder, ("not one line", said[-400:]))
    return _swept(folder, resumed(number, folder))


def long_case(number: int, out: Path) -> tuple[str, str]:
    """300 visits: memory and open files stay flat from the 50th to the 300th, and so does what a boundary costs."""
    from crl.walk import Walk

    folder, seen = out / "long", []
    data = accepted(0)
    data |= {"repeat": 150, "methods": [], "checkpoint": {"every": 0, "keep": 2}}
    data["tasks"] = [{**task, "steps": 64} for task in data["tasks"]]
    old = Walk._checkpoint

    def look(self: Walk, visit: int, done: int = 0) -> None:
        old(self, visit, done)
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        seen.append((pages * resource.getpagesize() / 2**20, len(os.listdir("/proc/self/fd")), time.time()))

    Walk._checkpoint = look  # type: ignore[method-assign]
    try:
        code, said = here(command(data, folder, "runs", "--overwrite"))
    finally:
        Walk._checkpoint = old  # type: ignore[method-assign]
    if code:
        return "failed", said
    memory, files, clock = (np.array(column) for column in zip(*seen, strict=True))
    cost = np.diff(clock)
    note = (
        f"memory {memory[50]:.0f} to {memory[-1]:.0f} MB, open files {files[50]} to {files[-1]}, "
        f"a visit {np.median(cost[50:100]):.2f} to {np.median(cost[-50:]):.2f} s"
    )
    flat = (
        memory[-1] - memory[50] < 50
        and files[-1] <= files[50] + 1
        and np.median(cost[-50:]) < 3 * np.median(cost[50:100])
    )
    return _swept(folder, ("flat" if flat else "grows", note))


def _swept(folder: Path, outcome: tuple[str, str]) -> tuple[str, str]:
    """What went well need not stay."""
    if outcome[0] in ("same", "flat"):
        with contextlib.suppress(OSError):
            shutil.rmtree(folder)
    return outcome
