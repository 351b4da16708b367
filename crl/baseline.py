"""`baseline: fresh`: what a new agent alone on each task learns, beside which transfer is measured.

It has no methods, so that a method which slows learning shows in the transfer; `fresh_with_methods` gives it the
walk's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from crl import build, config, metrics, sinks
from crl.changing import spread
from crl.core import Record
from crl.opened import Run, visit_areas
from crl.store import RunFolder


def add_baseline(
    experiment: config.Experiment, folder: RunFolder, plan: build.Plan, walk: Callable[[build.Plan, RunFolder], None]
) -> None:
    """A new agent alone on each task, by the same walk, for forward transfer."""
    if experiment.baseline == "none":
        return
    methods = experiment.methods if experiment.baseline == "fresh_with_methods" else []
    main = Run(folder.path)
    areas = visit_areas(main)
    jsonl = sinks.Jsonl(folder.records, folder.records.stat().st_size)
    for column, task in enumerate(plan.tasks):
        alone = RunFolder(folder.path / "baseline" / f"task-{column}")
        folder.refuse_moved()
        first = plan.order.index(column)
        if not (alone.occupied and alone.manifest()["status"] == "finished"):
            alike = {**experiment.plain(), "baseline": "none", "repeat": 1, "monitors": [], "methods": methods}
            if experiment.stream:
                single = config.read({**alike, "stream": {**experiment.stream, "only": column + 1}})
            else:
                single = config.read({**alike, "tasks": [_only(experiment, task.name, plan.steps[first])]})
            with alone.taken():
                alone.create(single.plain(), {"status": "new", "measure": plan.measure}, overwrite=True)
                walk(build.build(single), alone)
        base, best = visit_areas(Run(alone.path))[0].value, getattr(task, "best", None)
        ratio = metrics.forward_transfer_ratio(areas[first].value, base)
        found = {"metrics/fresh_area": base, "metrics/forward_transfer_ratio": ratio.value}
        if best is not None:
            found["metrics/forward_transfer"] = metrics.forward_transfer(areas[first].value, base, best).value
        for name, value in found.items():
            jsonl.write(Record(name, value, sum(plan.steps), first + 1, task.name, "baseline"))
    jsonl.close()
    folder.update_manifest(status="finished")


def _only(experiment: config.Experiment, name: str, steps: int) -> dict[str, Any]:
    """The entry of `tasks:` that makes one task alone, for as long as its first visit was."""
    entries = ((spec, *part) for spec in experiment.tasks for part in spread(spec, "tasks"))
    spec, _, setting = next(entry for entry in entries if entry[1] == name)
    return {**dataclasses.asdict(spec), "steps": steps, "change": setting}
