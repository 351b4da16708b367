"""A run: a walk from its start or from a checkpoint to its end, and the folder that it leaves."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from crl import build, config, named
from crl.baseline import add_baseline
from crl.core import CrlError
from crl.disk import Unwritten
from crl.opened import Run, fits
from crl.stopping import Stopped, listening
from crl.store import RunFolder
from crl.walk import Walk


def train(
    source: str | Path | Mapping[str, Any],
    *,
    out: str | Path = "runs",
    overwrite: bool = False,
    verbosity: int = -1,
    changes: tuple[tuple[str, Any], ...] = (),
    **settings: Any,
) -> Run:
    """Walk through a sequence and return the run. `settings` are top-level keys of the YAML: `seed=3, agent="dqn"`."""
    return begin(config.read(source, (*settings.items(), *changes)), out, overwrite=overwrite, verbosity=verbosity)


def begin(
    experiment: config.Experiment, out: str | Path = "runs", *, overwrite: bool = False, verbosity: int = -1
) -> Run:
    """Walk as an experiment says, from the start."""
    folder = RunFolder(Path(out) / experiment.place)
    folder.refuse_occupied(overwrite)  # before anything slow
    plan = build.build(experiment)
    with folder.taken():
        folder.create(experiment.plain(), _manifest(plan), overwrite=overwrite)
        _walk(Walk(plan, folder, verbosity))
        add_baseline(experiment, folder, plan, _alone)
    return Run(folder.path)


def resume(path: str | Path, *, verbosity: int = -1) -> Run:
    """Go on from a run's last checkpoint; the result is that of a run that was never stopped."""
    folder = RunFolder(Path(path))
    folder.manifest()  # there is a run
    with folder.taken():
        if folder.manifest()["status"] == "finished":
            raise CrlError(f"{folder.path}: this run is finished; there is nothing to resume")
        _go_on(folder, Run(folder.path), verbosity)
    return Run(folder.path)


def _go_on(folder: RunFolder, run: Run, verbosity: int) -> None:
    state = folder.load(folder.latest(), run.experiment.digest)
    plan = build.build(run.experiment)
    if folder.manifest()["status"] == "walked":
        add_baseline(run.experiment, folder, plan, _alone)
        return
    folder.write_manifest({**_manifest(plan), **folder.manifest()})  # it may have been damaged
    lost = max(_lost(run, state["step"]), 0)
    fits(plan, state)
    walk = Walk(plan, folder, verbosity, state["offset"])
    try:
        walk.restore(state)
    except CrlError:
        walk.close()
        raise
    if lost:
        where = f"goes on from its step {state['done']:,}" if state["done"] else "starts again from its boundary"
        walk.terminal.note(f"visit {state['visit'] + 1} {where}: {lost:,} steps are repeated")
    _walk(walk, state["visit"], state["done"])
    add_baseline(run.experiment, folder, plan, _alone)


def _walk(walk: Walk, visit: int = 0, done: int = 0, of: Path | None = None) -> None:
    """Walk to the end, and leave a manifest that says how it ended. A baseline is `of` a run, which is what goes on."""
    folder, began = walk.folder, time.time()
    on = f"go on with: crl resume {of or folder.path}"
    status, before = "failed", folder.manifest().get("seconds", 0.0)
    try:
        try:
            folder.update_manifest(status="running", log=[])
            with listening(walk):
                walk.go(visit, done)
            walk.finish()
            status = "finished" if walk.experiment.baseline == "none" else "walked"
        except Stopped:
            status = "interrupted"
            raise CrlError(f"stopped by {walk.asked_to_stop} at step {walk.step}; {on}") from None
        finally:
            _close(walk, status, round(before + time.time() - began, 3))
    except Unwritten as error:
        raise CrlError(f"{error}; make room, and {on}") from error
    if walk.asked_to_stop and (of or status == "walked"):  # in its last stretch, and more would follow
        raise CrlError(f"stopped by {walk.asked_to_stop} before all baselines; {on}")


def _close(walk: Walk, status: str, seconds: float) -> None:
    """Close all sinks and say in the manifest how it ended: on a full disk at least that it failed."""
    try:
        try:
            log = walk.jsonl.mark
        finally:
            walk.close()
        walk.folder.update_manifest(status=status, seconds=seconds, step=walk.step, log=log)
    except Unwritten:
        walk.folder.fail()
        raise


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


def _lost(run: Run, step: int) -> int:
    """Steps logged after the checkpoint, which will be taken again."""
    return max((record.step for record in run.records), default=step) - step
