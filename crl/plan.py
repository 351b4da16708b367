"""What can be said without training: a config's plan, a checkpoint's scores and films, what there is to choose from."""

from __future__ import annotations

import importlib
import inspect
import textwrap
from pathlib import Path
from typing import Any

from crl import build, config, named
from crl.core import CrlError, NotTheSame, derive
from crl.estimate import estimate
from crl.opened import Run
from crl.walk import EVALUATE


def describe(source: str, changes: tuple[tuple[str, Any], ...] = (), deep: bool = False) -> str:
    """The plan of a config in words: its visits, spaces, agent, rules, and how long it will take here.

    A `deep` check steps every environment, and refuses one that a resumed run could not bring back.
    """
    plan = build.build(config.read(source, changes))
    stepped = [_brought_back(task) for task in plan.tasks if hasattr(task, "bring_back")] if deep else []
    experiment = plan.experiment
    unit = "samples" if experiment.stream else "steps"
    lines = [f"{experiment.name}: {len(plan.tasks)} tasks, {len(plan.order)} visits, {sum(plan.steps):,} {unit}"]
    for visit in plan.visits:
        again = plan.order[: visit.index - 1].count(plan.order[visit.index - 1])
        about = getattr(visit.task, "about", "")
        said = f"  {visit.steps:,} {unit}" + (f"  ({about})" if about else "") + ("  (again)" if again else "")
        lines.append(f"  {visit.index:>3}. {visit.task.name}{said}")
    rules = ", ".join(f"{name} {value}" for name, value in experiment.plain()["boundary"].items())
    observation = str(plan.interface.observation)
    clock = _time(plan)
    remark = getattr(plan.agent, "remark", None)  # about the rollout that the estimate has just learned from
    lines += [
        f"seen      {observation if len(observation) < 90 else _short(plan.interface.observation)}",
        f"answered  {plan.interface.action}",
        f"agent     {experiment.label}, seed {experiment.seed}, {_parameters(plan.agent)} on {plan.device}",
        *([] if experiment.stream else [f"engine    {plan.engine}, {experiment.engine.envs} copies"]),
        f"boundary  {rules}",
        f"told      {_told(plan)}",
        f"monitors  {', '.join(plan.monitors) or 'none'}",
        f"evaluated {_evaluated(experiment)}",
        f"time      {clock}",
        *stepped,
        *(f"warning   {said}" for said in [*plan.warnings, *([remark] if remark else [])]),
    ]
    return "\n".join(lines)


def evaluate(path: str, visit: int | None, episodes: int | None, greedy: bool, render: str | None) -> str:
    """A checkpoint's mean return on every task, and a film of one episode of each."""
    if episodes is not None and episodes < 1:
        raise CrlError(f"--episodes: {episodes} is too small; the least is 1")
    if render and not Path(render).parent.is_dir():
        raise CrlError(f"--render: there is no folder {str(Path(render).parent)!r}")
    if render and Path(render).suffix.lower() != ".gif":
        raise CrlError(f"--render: {render}: films are written as .gif alone")
    run = Run(Path(path))
    plan, state = run.at(visit)
    evaluation = run.experiment.evaluation
    greedy = greedy or evaluation.greedy
    lines = [f"after visit {state['visit']}, step {state['step']:,}"]
    pictures: list[Any] = []
    for column, task in enumerate(plan.tasks):
        seed = derive(run.experiment.seed, EVALUATE, column)
        score = task.evaluate(plan.agent, seed, episodes or evaluation.episodes, greedy)
        reason = f"  ({score.reason})" if score.reason else ""
        lines.append(f"  {task.name:<40} {score.mean:8.3f}{reason}")
        if render and not score.reason and not plan.experiment.stream:
            pictures += task.film(plan.agent, seed, greedy)  # type: ignore[attr-defined]  # environments have one
    if render and plan.experiment.stream:
        raise CrlError("--render: pictures that are classified make no film")
    if render:
        _gif(pictures, Path(render))
        lines.append(f"wrote {render}: {len(pictures)} frames")
    return "\n".join(lines)


def listing(what: str) -> list[str]:
    """The short names of agents, environments or configs, with a line each."""
    if what == "configs":
        return [
            f"{p.relative_to(config.CONFIGS).with_suffix('')!s:<24} {_title(p)}"
            for p in sorted(config.CONFIGS.rglob("*.yaml"))
        ]
    if what == "envs":
        importlib.import_module("minigrid")
        return sorted(importlib.import_module("gymnasium").registry)
    if what in ("streams", "nets"):
        room = importlib.import_module("envs.slices" if what == "streams" else "agents.nets")
        return [line for name, make in getattr(room, what.upper()).items() for line in _function(name, make)]
    short = {"agents": named.AGENTS, "methods": named.METHODS, "monitors": named.MONITORS}[what]
    lines = []
    for name, where in short.items():
        module, _, cls = where.rpartition(".")
        found = getattr(importlib.import_module(module), cls)
        doc = found.__doc__ or ""
        if what == "methods":
            lines += _method(name, found)
            continue
        star = "*" if what == "monitors" and name in config.BY_DEFAULT else " "
        lines.append(f"{name:<22}{star} {doc.strip().splitlines()[0]}")
        cost = " ".join(doc.split()).partition("Cost: ")[2]
        if what == "monitors" and cost and "Cost: " not in lines[-1]:
            lines.append(f"{'':<24} Cost: {cost}")
    if what == "agents":
        supported = ", ".join(importlib.import_module("agents.adapt").SUPPORTED)
        lines.append(f"{'by import path':<24} stable_baselines3.X or sb3_contrib.X, with X in {supported}")
    if what == "monitors":
        lines.append(f"{'*':<24} on by default; `monitors: []` or --monitor none turns all off")
    if what == "methods":
        optimizers = ", ".join(importlib.import_module("agents.optimizers").OPTIMIZERS)
        lines.append(f"{'in agent.net':<24} norm: layer; activation: crelu, or fourier (deep Fourier features)")
        lines.append(f"{'in agent.optimizer':<24} use: {optimizers}, or an import path")
    return [*lines, f"{'your own':<24} any import path, such as my_{what[:-1]}.My{what[:-1].title()}"]


def _function(name: str, make: Any) -> list[str]:
    """What a stream or a network is, and its options."""
    doc = " ".join((make.__doc__ or "").strip().split("\n\n")[0].split())
    options = [o for o in inspect.signature(make).parameters.values() if o.kind is o.KEYWORD_ONLY]
    text = textwrap.wrap(doc, 95, subsequent_indent="  ")
    lines = [f"{name if i == 0 else '':<24} {line}" for i, line in enumerate(text)]
    return [*lines, f"{'':<24}   {', '.join(f'{o.name}: {o.default}' for o in options)}"]


def _method(name: str, cls: Any) -> list[str]:
    """A method's family, what it does with its source, and its options."""
    doc = " ".join((cls.__doc__ or "").strip().split("\n\n")[0].split())
    options = inspect.signature(cls).parameters.values()
    defaults = ", ".join(f"{o.name}: {o.default}" for o in options if o.default is not None)
    text = textwrap.wrap(f"[{cls.family}] {doc}", 95, subsequent_indent="  ")
    lines = [f"{name if i == 0 else '':<24} {line}" for i, line in enumerate(text)]
    lines += [f"{'':<24}   {defaults}"] if defaults else []
    for kind, own in getattr(cls, "by_kind", {}).items():
        lines.append(f"{'':<24}   learning from {kind}: {', '.join(f'{name}: {value}' for name, value in own.items())}")
    return lines


def _brought_back(task: Any) -> str:
    try:
        task.bring_back()
    except NotTheSame as error:
        remedy = "a run that is stopped in mid-visit begins that visit again; reset(seed) must forget all before it"
        raise CrlError(f"{task.name}: {error}: {remedy}") from None
    return f"deep      {task.name}: stepped, stopped and brought back: the same"


def _told(plan: build.Plan) -> str:
    """Who tells the learner of a boundary, in words."""
    told: dict[Any, str] = {True: "of every boundary, and whose it is", False: "of no boundary"}
    detected = f"that there is a boundary where train/{plan.measure} changes, not whose it is"
    return told.get(plan.experiment.boundary.announced, detected)


def _evaluated(experiment: config.Experiment) -> str:
    """On what, in words."""
    asked = experiment.evaluation
    if not experiment.stream:
        return f"{asked.episodes} episodes a task, {'greedy' if asked.greedy else 'sampled'}"
    tasks = {"all": "every task", "seen": "every task so far", "own": "the visit's own task"}[asked.of]
    return f"{tasks}, on {f'{asked.samples:,}' if asked.samples else 'all'} of its test images"


def _parameters(agent: Any) -> str:
    model = getattr(agent, "model", None)
    return f"{sum(p.numel() for p in model.parameters()):,} parameters" if model is not None else "its own parameters"


def _short(space: Any) -> str:
    return f"{type(space).__name__} of {space.shape[0]} places"


def _time(plan: build.Plan) -> str:
    """How long it will take, and what takes it."""
    found = estimate(plan)
    parts = {"learning": found.learning, "evaluation": found.evaluation, "monitors at most": found.monitors}
    each = ", ".join(f"{name} {_clock(seconds)}" for name, seconds in parts.items())
    return f"about {_clock(found.whole)} here ({each}), measured on a throw-away agent"


def _clock(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} seconds" if seconds >= 0.5 else "none"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:,.0f} hours"


def _title(path: Path) -> str:
    first = path.read_text(encoding="utf-8").splitlines()[0]
    return first.removeprefix("#").strip() if first.startswith("#") else ""


def _gif(pictures: list[Any], path: Path) -> None:
    from PIL import Image

    if not pictures:
        raise CrlError("nothing to show: no task could be evaluated")
    size = (min(p.shape[1] for p in pictures), min(p.shape[0] for p in pictures))
    frames = [Image.fromarray(p).resize(size) for p in pictures]
    frames[0].save(path, "GIF", save_all=True, append_images=frames[1:], duration=120, loop=0)
