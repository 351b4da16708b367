"""A typed experiment to objects, each checked against its contract before it is built."""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from threadpoolctl import threadpool_limits

from crl.changing import spread
from crl.checked import shown
from crl.config import Experiment, in_words, nearest, parse
from crl.core import Agent, CrlError, Interface, Rules, Task, Visit, brief, derive, has_part, seed_streams
from crl.named import AGENTS, METHODS, MONITORS, at, check_contract, check_signature, locate, named_parts, room

COMMON = ("batch", "epochs", "samples", "augment", "joint", "only")  # what every stream takes
LONGEST = 120  # bytes of a task's name
METHOD = 4  # the name of a random stream, beside the visits' (1), evaluation's (2) and the monitors' (3)


@dataclass(frozen=True)
class Plan:
    """The objects of an experiment, built and checked; nothing has been learned or written."""

    experiment: Experiment
    tasks: list[Task]  # each distinct one
    order: list[int]  # the task of each visit
    steps: list[int]  # the budget of each visit, rounded up to whole updates of the agent
    interface: Interface
    agent: Agent
    methods: dict[str, Any]  # by the name that their records bear, in the order in which they act
    monitors: dict[str, Any]  # by the name that their records begin with
    device: str
    warnings: tuple[str, ...] = ()  # what the user may not expect, a line each

    @property
    def engine(self) -> str:
        """What steps the environments, and which version of it where that decides the result."""
        kind = self.experiment.engine.kind
        return f"envpool {room('envs.pool').version()}" if kind == "envpool" else kind

    @property
    def measure(self) -> str:
        """What scores are: return, or accuracy."""
        return getattr(self.tasks[0], "measure", "return")

    @property
    def visits(self) -> list[Visit]:
        """The walk, visit by visit."""
        total, tasks, start, visits = sum(self.steps), len(self.tasks), 0, []
        for i, (column, steps) in enumerate(zip(self.order, self.steps, strict=True), start=1):
            seed = derive(self.experiment.seed, 1, i)
            rules = self.experiment.boundary
            visits.append(Visit(i, self.tasks[column], steps, seed, start, total, rules, tasks=tasks))
            start += steps
        return visits


def build(experiment: Experiment) -> Plan:
    """Build everything that a walk needs."""
    torch.set_num_threads(experiment.threads)
    threadpool_limits(experiment.threads, "blas")  # numpy's
    device = _device(experiment.device)
    if experiment.stream:
        tasks, order, steps = build_stream(experiment)
        interface = tasks[0].interface
    else:
        tasks, order, steps = build_tasks(experiment)
        interface = room("envs.gym").join(tasks)
    agent = build_agent(experiment, interface, device)
    _check_rules(experiment, agent)
    methods = build_methods(experiment, agent)
    _check_visit(experiment, methods, len(order))
    _check_told(experiment, tasks, methods)
    _check_detected(experiment, agent, methods)
    monitors = build_monitors(experiment.monitors)
    if getattr(agent, "stride", 1) < 1:
        raise CrlError(f"agent: {type(agent).__name__} updates every {agent.stride} steps; the least is 1")  # type: ignore[attr-defined]
    stride = 1 if experiment.stream else getattr(agent, "stride", 1) * interface.envs
    rounded = [-(-budget // stride) * stride for budget in steps]
    warned = tuple(_warnings(methods, tasks, experiment.boundary))
    in_turn = dict(sorted(methods.items(), key=lambda item: getattr(item[1], "turn", 2)))  # otherwise as in the YAML
    return Plan(experiment, tasks, order, rounded, interface, agent, in_turn, monitors, device, warned)


def build_tasks(experiment: Experiment) -> tuple[list[Any], list[int], list[int]]:
    """(distinct tasks, the task of each visit, the asked-for steps of each visit)."""
    gym, engine = room("envs.gym"), experiment.engine
    tasks: dict[str, Any] = {}
    known: dict[str, Any] = {}
    once: list[tuple[str, int]] = []
    for i, spec in enumerate(experiment.tasks):
        place = f"tasks.{i}"
        world = gym.World(goes_on=True) if spec.change else None
        for name, setting in spread(spec, place):
            meaning = (spec.env, spec.kwargs, spec.wrappers, setting)
            _check_name(name, f"{place}.name")
            if name in tasks and known[name] != meaning:
                raise CrlError(f"{place}: another task is called {name!r} already; give this one a `name:` of its own")
            if name not in tasks:
                known[name] = meaning
                wrappers = [_wrapper(item, f"{place}.wrappers.{j}") for j, item in enumerate(spec.wrappers)]
                own = {"env": spec.env, "kwargs": spec.kwargs, "wrappers": wrappers, "setting": setting}
                how = {"engine": engine.kind, "envs": engine.envs, "threads": engine.threads}
                how |= {"timeout": engine.timeout, "max_episode_steps": engine.max_episode_steps}
                tasks[name] = at(place, gym.build, name=name, **own, **how, world=world)
            once.append((name, spec.steps))
    names = list(tasks)
    walk = once * experiment.repeat
    return list(tasks.values()), [names.index(name) for name, _ in walk], [steps for _, steps in walk]


def _check_name(name: str, place: str) -> None:
    """A task's name stands in tables, and in the names of files, which may have 255 bytes."""
    if not name.isprintable() or name != name.strip():
        raise CrlError(f"{place}: {shown(name)} must be one line of printable text")
    if len(name.encode()) > LONGEST:
        raise CrlError(f"{place}: {shown(name)} is too long; the most is {LONGEST} letters (bytes of UTF-8)")


def build_stream(experiment: Experiment) -> tuple[list[Any], list[int], list[int]]:
    """(the tasks of a dataset's stream, the task of each visit, the samples of each visit)."""

    def choose(make: Any, options: Mapping[str, Any]) -> None:
        check_signature(make, (None, None), dict(options), "stream", COMMON)

    samples = experiment.evaluation.samples
    tasks, steps = at("stream", room("envs.images").build, experiment.stream, experiment.seed, samples, choose)
    return tasks, [*range(len(tasks))] * experiment.repeat, steps * experiment.repeat


def build_agent(experiment: Experiment, interface: Interface, device: str) -> Agent:
    """The agent, checked against its contract."""
    options = dict(experiment.agent)
    cls = locate(options.pop("use"), AGENTS, "agent")
    if _is_algorithm(cls):
        cls = room("agents.adapt").adapt(cls)
    check_contract(cls, ("act", "observe", "update", "state_dict", "load_state_dict"), "agent")
    wanted = "pairs" if experiment.stream else "transitions"
    learns_from = getattr(cls, "learns_from", "transitions")
    if learns_from != wanted:
        what = "labelled pairs; use classifier" if experiment.stream else "transitions; use ppo or dqn"
        raise CrlError(f"agent: {cls.__name__} learns from {learns_from}, and this sequence gives {what}")
    check_signature(cls, (interface, 0, device), options, "agent")
    seed_streams(experiment.seed)  # for an agent that draws from them and does not seed itself
    try:
        agent: Agent = cls(interface, experiment.seed, device, **options)
    except (AssertionError, ValueError, TypeError, RuntimeError, MemoryError) as error:
        raise CrlError(f"agent: {cls.__name__} refuses these settings: {brief(error)}") from error
    return agent


def _is_algorithm(cls: Any) -> bool:
    """Whether it is Stable-Baselines3's or made of one; then that is imported already."""
    base = sys.modules.get("stable_baselines3.common.base_class")
    own = base is not None and isinstance(cls, type) and issubclass(cls, base.BaseAlgorithm)
    return own or cls.__module__.startswith(("stable_baselines3.", "sb3_contrib."))


def build_monitors(specs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The monitors by name."""
    return named_parts(MONITORS, "monitor", specs, ("measure",))


def build_methods(experiment: Experiment, agent: Any) -> dict[str, Any]:
    """The methods by name, each one that the agent can do with and that goes with the others."""
    methods = named_parts(METHODS, "method", experiment.methods, ("attach", "enter", "leave", "state_dict"))
    uses = {name: str(spec["use"]) for name, spec in zip(methods, experiment.methods, strict=True)}
    for i, (name, method) in enumerate(methods.items()):
        place, use = f"methods.{i}", uses[name]
        if getattr(method, "needs_boundaries", False) and not experiment.boundary.announced:
            raise CrlError(f"boundary.announced: false hides boundaries, which method {use!r} needs")
        if getattr(method, "one_head", False) and experiment.boundary.head == "per_task":
            raise CrlError(f"{place}: {use} does not go with boundary.head: per_task")
        excluded = {METHODS.get(other, other) for other in getattr(method, "excludes", ())}
        for other, found in methods.items():
            if f"{type(found).__module__}.{type(found).__name__}" in excluded:
                raise CrlError(f"{place}: {use} does not go with {uses[other]}; leave one of them out")
        lacking = [part for part in getattr(method, "needs", ()) if not has_part(agent, part)]
        if lacking:
            raise CrlError(f"{place}: {use} needs an agent with `{lacking[0]}`, which {type(agent).__name__} lacks")
        if hasattr(method, "accepts"):
            at(place, method.accepts, agent)
        if hasattr(method, "reseed"):
            method.reseed(derive(experiment.seed, METHOD, i))
    return methods


def _warnings(methods: Mapping[str, Any], tasks: Sequence[Task], rules: Rules) -> Iterator[str]:
    """What methods say of this walk, with the place of each."""
    for i, method in enumerate(methods.values()):
        said = method.warns(tasks, rules) if hasattr(method, "warns") else ""
        if said:
            yield f"methods.{i}: {said}"


def _check_rules(experiment: Experiment, agent: Any) -> None:
    rules = experiment.boundary
    asked = [f"{name}: {value}" for name, value in dataclasses.asdict(rules).items() if value in ("reset", "per_task")]
    if asked and not rules.announced:
        raise CrlError(f"boundary: announced: false tells the agent nothing, so {', '.join(asked)} cannot happen")
    if asked and not hasattr(agent, "enter"):
        raise CrlError(
            f"boundary: {', '.join(asked)} needs an agent with enter(visit), which {type(agent).__name__} lacks"
        )
    if hasattr(agent, "accepts"):
        agent.accepts(rules)


def _check_visit(experiment: Experiment, methods: Mapping[str, Any], visits: int) -> None:
    """What a method does before one visit alone would never happen, if the walk has fewer."""
    for i, (name, method) in enumerate(methods.items()):
        before = getattr(method, "only_before", 0)
        if before > visits and experiment.boundary.announced is True:
            raise CrlError(f"methods.{i}.visit: {name} waits for visit {before}, and this walk has {visits}")


def _check_told(experiment: Experiment, tasks: Sequence[Task], methods: Mapping[str, Any]) -> None:
    """Where the learner is not told which task it answers for, nothing may choose by the task's name."""
    if experiment.stream.get("joint") and experiment.boundary.head == "per_task":
        raise CrlError("boundary.head: per_task does not go with stream.joint: one batch would be of several heads")
    if all(getattr(task, "told", True) or not getattr(task, "answers", ()) for task in tasks):
        return
    _refuse_own_parts(experiment, methods, "in this scenario nobody tells which task it is")


def _check_detected(experiment: Experiment, agent: Any, methods: Mapping[str, Any]) -> None:
    """A detector notices that the task is another: neither which it is, nor in time to look at it once more."""
    if experiment.boundary.announced != "detected":
        return
    if not hasattr(agent, "enter"):
        raise CrlError(
            f"boundary.announced: detected needs an agent with enter(visit), which {type(agent).__name__} lacks"
        )
    _refuse_own_parts(experiment, methods, "a detector does not tell which task it is")
    for i, (name, method) in enumerate(methods.items()):
        if getattr(method, "samples_tasks", False):
            raise CrlError(f"methods.{i}: {name} samples a task when it is over, and a detector notices that too late")


def _refuse_own_parts(experiment: Experiment, methods: Mapping[str, Any], reason: str) -> None:
    """Where nobody names the task, it cannot have a head or a column of its own."""
    answers = f"answers each task with a part of its own, and {reason}"
    if experiment.boundary.head == "per_task":
        raise CrlError(f"boundary.head: per_task {answers}")
    for i, (name, method) in enumerate(methods.items()):
        if getattr(method, "names_tasks", False):
            raise CrlError(f"methods.{i}: {name} {answers}")


def _device(name: str) -> str:
    """`auto` is the CPU: small networks beside Python environments are faster there."""
    if name in ("auto", "cpu"):
        return "cpu"
    if not re.fullmatch(r"cuda(:[0-9]{1,3})?", name):
        raise CrlError(f"device: {name!r} is not one of auto, cpu, cuda, cuda:N")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if (torch.device(name).index or 0) >= count:
        raise CrlError(f"device: {name} was asked for, but torch sees {count or 'no'} CUDA devices here; use cpu")
    return name


def _wrapper(item: Any, place: str) -> tuple[Any, dict[str, Any]]:
    """(name or class, options) of one wrapper."""
    options = {"use": item} if isinstance(item, str) else dict(parse(dict[str, Any], item, place))
    use = options.pop("use", None)
    if not isinstance(use, str):
        raise CrlError(f"{place}: expected a name or a mapping with `use:`, not {in_words(item)}")
    names = {**room("envs.wrappers").BY_NAME, "mission": room("envs.recipe").mission}
    found = names[use] if use in names else _wrapper_class(use, names, place)
    own = {name: value for name, value in options.items() if name != "evaluate"}  # which is for any of them
    check_signature(found, (None,), own, place)
    if not isinstance(options.get("evaluate", False), bool):
        raise CrlError(f"{place}.evaluate: {options['evaluate']!r} is not true or false")
    return use if use in names else found, options


def _wrapper_class(path: str, names: Mapping[str, Any], place: str) -> Any:
    found = locate(path, {}, place) if "." in path or ":" in path else None
    if found is None:
        raise CrlError(f"{place}: unknown {path!r}{nearest(path, names)} (an import path works too)")
    check_contract(found, ("step", "reset"), place)
    return found
