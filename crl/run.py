"""A run: a walk from its start or from a checkpoint to its end, and the folder that it leaves."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from crl import build, config, named, sinks
from crl.baseline import add_baseline
from crl.core import CrlError, NotTheSame
from crl.disk import Unwritten
from crl.failing import Failed, culprit, failed
from crl.opened import Run, fits
from crl.stopping import AtOnce, Stopped, listening
from crl.store import RunFolder
from crl.walk import Walk


def train(
    source: str | Path | Mapping[str, Any],
    *,
    out: str | Path = "runs",
    overwrite: bool = False,
    go_on: bool = False,
    verbosity: int = -1,
    changes: tuple[tuple[str, Any], ...] = (),
    **settings: Any,
) -> Run:
    """Walk through a sequence and return the run. `settings` are top-level keys of the YAML: `seed=3, agent="dqn"`.

    With `go_on` a run that is there already goes on, or is returned where it is finished.
    """
    experiment = config.read(source, (*settings.items(), *changes))
    if go_on:
        return begin_or_go_on(experiment, out, verbosity=verbosity)
    return begin(experiment, out, overwrite=overwrite, verbosity=verbosity)


def begin(
    experiment: config.Experiment, out: str | Path = "runs", *, overwrite: bool = False, verbosity: int = -1
) -> Run:
    """Walk as an experiment says, from the start."""
    folder = RunFolder(Path(out) / experiment.place)
    with _truly_said(folder):
        folder.refuse_occupied(overwrite)  # before anything slow
        plan = build.build(experiment)
        with folder.taken():
            folder.create(experiment.plain(), _manifest(plan), overwrite=overwrite)
            _walk(Walk(plan, folder, verbosity))
            add_baseline(experiment, folder, plan, _alone)
    return Run(folder.typed)


def begin_or_go_on(experiment: config.Experiment, out: str | Path = "runs", *, verbosity: int = -1) -> Run:
    """Walk as an experiment says, from wherever an earlier walk got to: the same command twice is one run."""
    folder = RunFolder(Path(out) / experiment.place)
    if not folder.occupied:
        return begin(experiment, out, verbosity=verbosity)
    refuse_another(folder, experiment)
    if folder.manifest()["status"] == "finished":
        return Run(folder.typed)
    return resume(folder.path, verbosity=verbosity)


def resume(path: str | Path, *, verbosity: int = -1) -> Run:
    """Go on from a run's last checkpoint; the result is that of a run that was never stopped."""
    path = Path(path)
    RunFolder(path).manifest()  # there is a run
    folder = RunFolder(path if path.name not in ("", "..") else path.resolve())  # `crl resume .` in a run's folder
    with _truly_said(folder), folder.taken():
        if folder.manifest()["status"] == "finished":
            raise CrlError(f"{folder.typed}: this run is finished; there is nothing to resume")
        _go_on(folder, Run(folder.path), verbosity)
    return Run(folder.typed)


def _go_on(folder: RunFolder, run: Run, verbosity: int) -> None:
    if not folder.has_checkpoint:  # it was killed before its first, or the disk was full
        walk = Walk(build.build(run.experiment), folder, verbosity, (0,))
        walk.terminal.note("there is no checkpoint yet: the run begins anew")
        _walk(walk)
        add_baseline(run.experiment, folder, walk.plan, _alone)
        return
    state = folder.load(folder.latest(), run.experiment.digest)
    reached = _reached(run)
    plan = build.build(run.experiment)
    if folder.manifest()["status"] == "walked":
        add_baseline(run.experiment, folder, plan, _alone)
        return
    folder.write_manifest({**_manifest(plan), **folder.manifest()})  # it may have been damaged
    fits(plan, state)
    try:
        walk = Walk(plan, folder, verbosity, state["offset"])
    except sinks.Damaged as error:
        raise CrlError(f"{error}{folder.whole_log(run.experiment.digest)}") from None
    try:
        walk.restore(state)
    except NotTheSame as error:  # then not from here, but from the boundary before
        walk.terminal.note(str(error))
        walk.close()
        state = folder.load(folder.boundary(state["visit"]), run.experiment.digest)
        walk = Walk(build.build(run.experiment), folder, verbosity, state["offset"])
        walk.restore(state)
    except CrlError:
        walk.close()
        raise
    if reached is None:
        walk.terminal.note("the log was damaged after the last checkpoint: what was there is done again")
    elif (lost := reached - state["step"]) > 0:
        where = f"goes on from its step {state['done']:,}" if state["done"] else "starts again from its boundary"
        walk.terminal.note(f"visit {state['visit'] + 1} {where}: {lost:,} steps are repeated")
    _walk(walk, state["visit"], state["done"])
    add_baseline(run.experiment, folder, plan, _alone)


def _walk(walk: Walk, visit: int = 0, done: int = 0, of: Path | None = None) -> None:
    """Walk to the end, and leave a manifest that says how it ended. A baseline is `of` a run, which is what goes on."""
    folder, began, hears = walk.folder, time.time(), False
    on = f"go on with: crl resume {of or folder.typed}"
    status, before, home = "failed", folder.manifest().get("seconds", 0.0), os.getcwd()
    try:
        folder.update_manifest(status="running", log=[])
        with listening(walk) as hears:
            walk.go(visit, done)
        walk.finish()
        status = "finished" if walk.experiment.baseline == "none" else "walked"
    except Stopped:
        status = "interrupted"
        raise CrlError(f"stopped by {walk.asked_to_stop} at step {walk.step}; {on}") from None
    except AtOnce:
        status = "interrupted"
        raise
    except Unwritten as error:
        raise CrlError(f"{error}; make room, and {on}") from error
    except BaseException as error:
        if _own_way(error, hears):
            raise
        raise _told(failed(error), walk, on) from error
    finally:
        with contextlib.suppress(OSError):
            os.chdir(home)  # a part may have left it
        _close(walk, status, round(before + time.time() - began, 3), on)
    if walk.asked_to_stop and (of or status == "walked"):  # in its last stretch, and more would follow
        raise CrlError(f"stopped by {walk.asked_to_stop} before all baselines; {on}")


def _own_way(error: BaseException, hears: bool) -> bool:
    """Whether an error is to be shown as it is: a line of ours, a full disk, a Ctrl-C where signals are not ours."""
    if isinstance(error, KeyboardInterrupt):
        return not hears
    ours = isinstance(error, CrlError) and not isinstance(error, Failed)
    return ours or (isinstance(error, OSError) and not culprit(error))


def _told(error: Failed, walk: Walk, on: str) -> Failed:
    """The line of a failure with all that helps; its traceback goes to the run's `error.log`."""
    place = "; ".join(filter(None, (walk.broken, walk.place)))
    if not error.trace:
        return Failed(f"{error}; {place}; {on}", "")
    now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    log = walk.folder.add_error(f"{now}, {walk.place}: {error}\n{error.trace}\n")
    return Failed(f"{error}; {place}; its traceback is in {log}; {on}", error.trace)


@contextlib.contextmanager
def _truly_said(folder: RunFolder) -> Iterator[None]:
    """Let an end at once say what there is to go on with."""
    try:
        yield
    except KeyboardInterrupt as error:
        if not (folder.path / "manifest.json").is_file():
            raise type(error)("no run was begun") from None
        where = "the last checkpoint stands" if folder.has_checkpoint else "there is no checkpoint yet"
        raise type(error)(f"{where}; go on with: crl resume {folder.typed}") from None


def _close(walk: Walk, status: str, seconds: float, on: str) -> None:
    """Close all sinks and say in the manifest how it ended: on a full disk at least that it failed."""
    try:
        try:
            log = walk.jsonl.mark
        finally:
            walk.close()
        walk.folder.update_manifest(status=status, seconds=seconds, step=walk.step, log=log)
    except Unwritten as error:
        walk.folder.fail()
        raise CrlError(f"{error}; make room, and {on}") from error


def _alone(plan: build.Plan, folder: RunFolder) -> None:
    """A baseline's walk, which says nothing."""
    _walk(Walk(plan, folder, -1), of=folder.path.parent.parent)


def _manifest(plan: build.Plan) -> dict[str, Any]:
    experiment = plan.experiment
    return {
        "status": "new",
        "measure": plan.measure,
        "digest": experiment.digest,
        "seed": experiment.seed,
        "threads": experiment.threads,
        "device": plan.device,
        "engine": f"{plan.engine} x {experiment.engine.envs}",
        "boundary": experiment.plain()["boundary"],
        "methods": named.resolved(named.METHODS, experiment.methods),
        "monitors": named.resolved(named.MONITORS, experiment.monitors),
        "tasks": [task.name for task in plan.tasks],
        "about": {task.name: about for task in plan.tasks if (about := getattr(task, "about", ""))},
        "visits": [{"task": visit.task.name, "steps": visit.steps, "seed": visit.seed} for visit in plan.visits],
        "observation": str(plan.interface.observation)[:200],
        "action": str(plan.interface.action),
    }


def _reached(run: Run) -> int | None:
    """The last step in the log, before it is cut back to where the checkpoint left it; none where it is damaged."""
    try:
        return max((record.step for record in run.records), default=0)
    except sinks.Damaged:
        return None


def refuse_another(folder: RunFolder, experiment: config.Experiment) -> None:
    """A run of another config is not gone on with, and not dropped unless that is asked for."""
    there = Run(folder.path).experiment
    if there != experiment:
        raise CrlError(
            f"{folder.typed} is of another config: {_difference(there.plain(), experiment.plain())}; "
            "--overwrite begins all anew, with another `name` both are kept"
        )


def _difference(there: Any, here: Any, place: str = "") -> str:
    """The first thing that two configs say differently.

    >>> _difference({"tasks": [{"steps": 1}]}, {"tasks": [{"steps": 2}]})
    'tasks.0.steps is 1 there and 2 here'
    """
    if isinstance(there, list) and isinstance(here, list):
        there, here = dict(enumerate(there)), dict(enumerate(here))
    if isinstance(there, dict) and isinstance(here, dict):
        key = next(key for key in {**there, **here} if there.get(key) != here.get(key))
        return _difference(there.get(key), here.get(key), f"{place}.{key}".lstrip("."))
    old, new = ("not set" if value is None else value for value in (there, here))
    return f"{place} is {old} there and {new} here"
