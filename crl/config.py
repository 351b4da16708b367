"""YAML to a typed experiment to objects. One error a mistake, with its place and what would be right.

A YAML is trusted like code, since it names code (an import path is the registry); a class is still checked against
its contract before it is built, so that a typing slip costs one line.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import importlib
import inspect
import json
import re
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

import crl
from crl.core import Agent, CrlError, Interface, Rules, Task, Visit, brief, derive

AGENTS = {"ppo": "agents.sb3.PPO", "dqn": "agents.sb3.DQN"}
MONITORS = {
    "hessian": "crl.monitors.curvature.Hessian",
    "ggn": "crl.monitors.curvature.GGN",
    "gram": "crl.monitors.curvature.Gram",
    "ntk": "crl.monitors.curvature.NTK",
    "kfac": "crl.monitors.curvature.KFAC",
    "erank": "crl.monitors.features.ERank",
    "dormant": "crl.monitors.features.Dormant",
    "capacity": "crl.monitors.features.Capacity",
    "interference": "crl.monitors.features.Interference",
    "weight_rank": "crl.monitors.weights.WeightRank",
    "norms": "crl.monitors.weights.Norms",
    "gradient_norm": "crl.monitors.gradients.GradientNorm",
    "conflict": "crl.monitors.gradients.Conflict",
    "readiness": "crl.monitors.gradients.Readiness",
    "sample_plasticity": "crl.monitors.gradients.SamplePlasticity",
    "drift": "crl.monitors.drift.Drift",
    "churn": "crl.monitors.drift.Churn",
}
BY_DEFAULT = ("hessian", "erank", "dormant", "norms")
METHODS: dict[str, str] = {}
CONFIGS = Path(crl.__file__).resolve().parent.parent / "configs"


# The typed experiment: what a YAML may say, and the defaults of all it does not.


def at_least(least: int, default: Any = dataclasses.MISSING, most: float = float("inf")) -> Any:
    """A field whose value has a smallest allowed number, and perhaps a largest."""
    return field(default=default, metadata={"least": least, "most": most})


@dataclass(frozen=True)
class TaskSpec:
    """One entry of `tasks:`."""

    env: str
    steps: int = at_least(1)
    name: str = ""
    kwargs: dict[str, Any] = field(default_factory=dict)
    wrappers: list[Any] = field(default_factory=list)
    change: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class EngineSpec:
    """How environments are stepped."""

    kind: str = field(default="sync", metadata={"choices": ("sync",)})
    envs: int = at_least(1, 16, most=4_096)


@dataclass(frozen=True)
class EvaluationSpec:
    """How every task is evaluated: at each boundary, and every so many steps where asked."""

    episodes: int = at_least(1, 20)
    greedy: bool = False
    every: int = at_least(0, 0)


@dataclass(frozen=True)
class Experiment:
    """One YAML, whole. All but `tasks` has a default."""

    tasks: list[TaskSpec]
    name: str = ""
    repeat: int = at_least(1, 1, most=10_000)
    seed: int = at_least(0, 0, most=2**32 - 1)
    threads: int = at_least(1, 1, most=1_024)
    device: str = "auto"
    engine: EngineSpec = EngineSpec()
    boundary: Rules = field(default_factory=Rules)
    agent: dict[str, Any] = field(default_factory=lambda: {"use": "ppo"})
    methods: list[Any] = field(default_factory=list)
    monitors: list[Any] = field(default_factory=lambda: [{"use": use} for use in BY_DEFAULT])
    evaluation: EvaluationSpec = EvaluationSpec()
    baseline: str = field(default="none", metadata={"choices": ("none", "fresh")})

    def plain(self) -> dict[str, Any]:
        """As a YAML would say it, with every default written out."""
        return dataclasses.asdict(self)

    @property
    def digest(self) -> str:
        """A fingerprint: two experiments with the same one give the same run."""
        return hashlib.sha256(json.dumps(self.plain(), sort_keys=True, default=str).encode()).hexdigest()[:16]

    @property
    def label(self) -> str:
        """The folder's name of agent and methods: `ppo`, `dqn+l2_er`."""
        return "+".join(str(part["use"]).rpartition(".")[2] for part in [self.agent, *self.methods])


# Reading.


class _Loader(yaml.SafeLoader):
    """YAML 1.1, but `3e-4` and `1e6` are numbers, and a key given twice is a mistake."""

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)  # type: ignore[no-untyped-call]
        except ValueError as error:  # the 99th of May
            raise yaml.constructor.ConstructorError(None, None, str(error), node.start_mark) from None

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str | int) and key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
            seen.add(key if isinstance(key, str | int) else None)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*(?:\.[0-9_]*)?|\.[0-9_]+)[eE][-+]?[0-9]+$"),
    list("-+0123456789."),
)


def parse_yaml(text: str, source: str) -> Any:
    """The plain data of a YAML text."""
    try:
        data = yaml.load(text, Loader=_Loader)  # noqa: S506  # a SafeLoader
        json.dumps(data, default=str, skipkeys=True)  # refuses what contains itself
        return data
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or brief(error)
        raise CrlError(f"{source}{where}: not valid YAML: {problem}") from None


def find_config(name: str) -> Path:
    """A path, or the name of a shipped config."""
    path = Path(name)
    if path.is_file():
        return path
    shipped = {str(p.relative_to(CONFIGS).with_suffix("")): p for p in sorted(CONFIGS.rglob("*.yaml"))}
    stem = name.removeprefix("configs/").removesuffix(".yaml")
    if stem in shipped and (name == stem or name.startswith("configs/")):
        return shipped[stem]
    raise CrlError(f"{name}: no such file{_hint(stem, shipped, 'did you mean the shipped config')}")


def read(source: str | Path | Mapping[str, Any], changes: Sequence[tuple[str, Any]] = ()) -> Experiment:
    """The experiment of a YAML file (or of its data), with `(place, value)` changes applied first."""
    if isinstance(source, Mapping):
        data, default_name = json.loads(json.dumps(source)), "experiment"
    else:
        path = find_config(str(source))
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CrlError(f"{path}: cannot be read: {error}") from None
        default_name = re.sub(r"[^\w.+-]+", "-", path.stem).strip("-.") or "experiment"
        data = parse_yaml(text, str(path))
    if not isinstance(data, dict):
        raise CrlError(f"{source}: an experiment is a mapping with at least `tasks:`, not {_kind(data)}")
    data.setdefault("monitors", list(BY_DEFAULT))
    for place, value in changes:
        _put(data, place, value)
    _shorthands(data)
    data["name"] = data.get("name") or default_name
    experiment: Experiment = parse(Experiment, data)
    if not re.fullmatch(r"[\w+-][\w.+-]{0,59}", experiment.name):
        raise CrlError(f"name: {experiment.name!r} names a folder: at most 60 letters, digits, '.', '_', '+' and '-'")
    if not experiment.tasks:
        raise CrlError("tasks: the list is empty; a sequence has at least one task")
    return experiment


def parse(kind: Any, data: Any, place: str = "") -> Any:
    """`data` as the annotated `kind`, or the one line that says where it is not."""
    if dataclasses.is_dataclass(kind):
        return _parse_dataclass(kind, data, place)
    origin = typing.get_origin(kind)
    if origin is list:
        if not isinstance(data, list):
            raise CrlError(f"{place}: expected a list, not {_kind(data)}")
        return [parse(typing.get_args(kind)[0], item, f"{place}.{i}") for i, item in enumerate(data)]
    if origin is dict:
        if data is None:
            return {}
        if not isinstance(data, dict):
            raise CrlError(f"{place}: expected a mapping, not {_kind(data)}")
        for key in data:
            if not isinstance(key, str):
                raise CrlError(f"{place}.{key}: a key is a name here, not {_kind(key)}")
        return data
    if kind is Any:
        return data
    if kind is int and isinstance(data, float) and data.is_integer():
        return int(data)  # 1e6 is a fair way to write a number of steps
    fits = isinstance(data, kind) and not (kind is int and isinstance(data, bool))
    if not fits:
        names = {int: "a whole number", str: "text", bool: "true or false"}
        raise CrlError(f"{place}: expected {names.get(kind, kind.__name__)}, not {_kind(data)} ({data!r})")
    return data


def _parse_dataclass(kind: Any, data: Any, place: str) -> Any:
    if not isinstance(data, dict):
        raise CrlError(f"{place}: expected a mapping, not {_kind(data)}")
    fields = {f.name: f for f in dataclasses.fields(kind)}
    hints = typing.get_type_hints(kind)
    values = {}
    for key, value in data.items():
        where = f"{place}.{key}".lstrip(".")
        if key not in fields:
            raise CrlError(f"{where}: unknown key{_hint(str(key), fields) or _known(fields)}")
        values[key] = parse(hints[key], value, where)
        limits = fields[key].metadata
        if "choices" in limits and values[key] not in limits["choices"]:
            raise CrlError(f"{where}: {values[key]!r} is not one of {', '.join(limits['choices'])}")
        if "least" in limits and values[key] < limits["least"]:
            raise CrlError(f"{where}: {values[key]} is too small; the least is {limits['least']}")
        if "most" in limits and values[key] > limits["most"]:
            raise CrlError(f"{where}: {values[key]} is too large; the most is {limits['most']}")
    for name, spec in fields.items():
        required = spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING
        if required and name not in values:
            raise CrlError(f"{place or 'the experiment'}: `{name}` is missing")
    return kind(**values)


def _shorthands(data: dict[str, Any]) -> None:
    """`agent: ppo` is `agent: {use: ppo}`, and so for each method and monitor."""

    def whole(item: Any, place: str) -> Any:
        item = {"use": item} if isinstance(item, str) else item
        if not isinstance(item, dict):
            raise CrlError(f"{place}: expected a name or a mapping with `use:`, not {_kind(item)}")
        parse(str, item.get("use", ""), f"{place}.use")
        return parse(dict[str, Any], item, place)

    agent = whole(data.get("agent") or {}, "agent")
    data["agent"] = {"use": "ppo", **agent}
    for part in ("methods", "monitors"):
        items = data.get(part) or []
        if not isinstance(items, list):
            raise CrlError(f"{part}: expected a list, not {_kind(items)}")
        data[part] = [whole(item, f"{part}.{i}") for i, item in enumerate(items)]
        for i, item in enumerate(data[part]):
            if "use" not in item:
                raise CrlError(f"{part}.{i}: `use` is missing")


def _put(data: Any, place: str, value: Any) -> None:
    """Set `tasks.0.steps` to a value, wherever that is allowed to be."""
    keys = place.split(".")
    if "" in keys:
        raise CrlError(f"--set {place}: expected a place such as tasks.0.steps")
    here = data
    for depth, key in enumerate(keys):
        last = depth == len(keys) - 1
        if isinstance(here, list):
            if not re.fullmatch("[0-9]{1,9}", key) or int(key) >= len(here):
                near = f"they are counted from 0 to {len(here) - 1}" if here else "it is empty"
                raise CrlError(f"--set {place}: {'.'.join(keys[:depth])} has no entry {key!r}; {near}")
            if last:
                here[int(key)] = value
                continue
            if isinstance(here[int(key)], str):
                here[int(key)] = {"use": here[int(key)]}
            here = here[int(key)]
            continue
        if not isinstance(here, dict):
            raise CrlError(f"--set {place}: {'.'.join(keys[:depth])} is {_kind(here)} and has no {key!r}")
        if last:
            here[key] = value
        elif isinstance(here.get(key), str) and key == "agent":
            here[key] = {"use": here[key]}
            here = here[key]
        else:
            here[key] = {} if here.get(key) is None else here[key]
            here = here[key]


# Building.


@dataclass(frozen=True)
class Plan:
    """The objects of an experiment, built and checked; nothing has been learned or written."""

    experiment: Experiment
    tasks: list[Task]  # each distinct one
    order: list[int]  # the task of each visit
    steps: list[int]  # the budget of each visit, rounded up to whole updates of the agent
    interface: Interface
    agent: Agent
    methods: list[Any]
    monitors: dict[str, Any]  # by the name that their records begin with
    device: str

    @property
    def visits(self) -> list[Visit]:
        """The walk, visit by visit."""
        total, start, visits = sum(self.steps), 0, []
        for i, (column, steps) in enumerate(zip(self.order, self.steps, strict=True), start=1):
            seed = derive(self.experiment.seed, 1, i)
            visits.append(Visit(i, self.tasks[column], steps, seed, start, total, self.experiment.boundary))
            start += steps
        return visits


def build(experiment: Experiment) -> Plan:
    """Build everything that a walk needs."""
    torch.set_num_threads(experiment.threads)
    device = _device(experiment.device)
    tasks, order, steps = build_tasks(experiment)
    interface = _room("envs.gym").join(tasks)
    agent = build_agent(experiment, interface, device)
    _check_rules(experiment, agent)
    methods = [_part(METHODS, "methods", i, spec, ("attach",)) for i, spec in enumerate(experiment.methods)]
    monitors = build_monitors(experiment.monitors)
    for method, spec in zip(methods, experiment.methods, strict=True):
        if getattr(method, "needs_boundaries", False) and not experiment.boundary.announced:
            raise CrlError(f"boundary.announced: false hides boundaries, which method {spec['use']!r} needs")
    if getattr(agent, "stride", 1) < 1:
        raise CrlError(f"agent: {type(agent).__name__} updates every {agent.stride} steps; the least is 1")  # type: ignore[attr-defined]
    stride = getattr(agent, "stride", 1) * interface.envs
    rounded = [-(-budget // stride) * stride for budget in steps]
    return Plan(experiment, tasks, order, rounded, interface, agent, methods, monitors, device)


def build_tasks(experiment: Experiment) -> tuple[list[Any], list[int], list[int]]:
    """(distinct tasks, the task of each visit, the asked-for steps of each visit)."""
    gym = _room("envs.gym")
    tasks: dict[str, Any] = {}
    known: dict[str, Any] = {}
    once: list[tuple[str, int]] = []
    for i, spec in enumerate(experiment.tasks):
        place = f"tasks.{i}"
        world = gym.World(goes_on=True) if spec.change else None
        for name, setting in spread(spec, place):
            meaning = (spec.env, spec.kwargs, spec.wrappers, setting)
            if not name.isprintable():
                raise CrlError(f"{place}.name: {name!r} must be one line of printable text")
            if name in tasks and known[name] != meaning:
                raise CrlError(f"{place}: another task is called {name!r} already; give this one a `name:` of its own")
            if name not in tasks:
                known[name] = meaning
                wrappers = [_wrapper(item, f"{place}.wrappers.{j}") for j, item in enumerate(spec.wrappers)]
                own = {"env": spec.env, "kwargs": spec.kwargs, "wrappers": wrappers, "setting": setting}
                tasks[name] = _at(place, gym.build, name=name, **own, envs=experiment.engine.envs, world=world)
            once.append((name, spec.steps))
    names = list(tasks)
    walk = once * experiment.repeat
    return list(tasks.values()), [names.index(name) for name, _ in walk], [steps for _, steps in walk]


def build_agent(experiment: Experiment, interface: Interface, device: str) -> Agent:
    """The agent, checked against its contract."""
    options = dict(experiment.agent)
    cls = locate(options.pop("use"), AGENTS, "agent")
    if cls.__module__.startswith(("stable_baselines3.", "sb3_contrib.")):
        cls = _room("agents.sb3").adapt(cls)
    _check_contract(cls, ("act", "observe", "update", "state_dict", "load_state_dict"), "agent")
    _check_signature(cls, (interface, 0, device), options, "agent")
    try:
        agent: Agent = cls(interface, experiment.seed, device, **options)
    except (AssertionError, ValueError, TypeError, RuntimeError, MemoryError) as error:
        raise CrlError(f"agent: {cls.__name__} refuses these settings: {brief(error)}") from error
    return agent


def locate(path: str, short: Mapping[str, str], place: str) -> Any:
    """The class that a short name or an import path names."""
    full = short.get(path, path)
    module_name, _, name = full.replace(":", ".").rpartition(".")
    if not module_name:
        kind = place.partition(".")[0].rstrip("s")
        own = f"my_{kind}.My{kind.title()}"
        raise CrlError(f"{place}: unknown {path!r}{_hint(path, short)} (an import path, such as {own}, works too)")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # a module may fail in any way
        ours = module_name.split(".")[0] in ("agents", "envs", "configs")
        hidden = "; a package of crl's own has that name, so give yours another" if ours else ""
        raise CrlError(f"{place}: cannot import {module_name!r}: {brief(error)}{hidden}") from error
    found = getattr(module, name, None)
    if found is None:
        raise CrlError(f"{place}: module {module_name!r} has no {name!r}{_hint(name, vars(module))}")
    if not inspect.isclass(found):
        raise CrlError(f"{place}: {path} is {_kind(found)}, not a class")
    return found


def check_rooms() -> None:
    """The packages `envs` and `agents` must be ours: name an intruder that shadows one."""
    home = Path(crl.__file__).resolve().parent.parent
    for name in ("envs", "agents"):
        where = getattr(importlib.import_module(name), "__file__", None)
        if where is None or Path(where).resolve().parent.parent != home:
            raise CrlError(f"the package {name!r} found at {where} hides ours in {home}: rename it or start elsewhere")


def _room(name: str) -> Any:
    check_rooms()
    return importlib.import_module(name)


def build_monitors(specs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The monitors by name: what they are called in `use:`, or their own `name:`."""
    monitors: dict[str, Any] = {}
    for i, spec in enumerate(specs):
        own = {key: value for key, value in spec.items() if key != "name"}
        name = spec.get("name") or str(spec["use"]).rpartition(".")[2]
        if not isinstance(name, str) or not re.fullmatch(r"[\w.+-]{1,60}", name):
            raise CrlError(f"monitors.{i}.name: {name!r} is not a name of letters, digits, '.', '_', '+' and '-'")
        if name in monitors:
            raise CrlError(
                f"monitors.{i}: another monitor is called {name!r} already; give this one a `name:` of its own"
            )
        monitors[name] = _at(f"monitors.{i}", _part, MONITORS, "monitors", i, own, ("measure",))
    return monitors


def _part(short: Mapping[str, str], place: str, i: int, spec: dict[str, Any], needed: tuple[str, ...]) -> Any:
    options = {key: value for key, value in spec.items() if key != "use"}
    cls = locate(spec["use"], short, f"{place}.{i}")
    _check_contract(cls, needed, f"{place}.{i}")
    _check_signature(cls, (), options, f"{place}.{i}")
    try:
        return cls(**options)
    except (AssertionError, ValueError, TypeError, RuntimeError) as error:
        raise CrlError(f"{place}.{i}: {cls.__name__} refuses these settings: {brief(error)}") from error


def _check_contract(cls: Any, methods: tuple[str, ...], place: str) -> None:
    lacking = [name for name in methods if not callable(getattr(cls, name, None))]
    if lacking:
        raise CrlError(f"{place}: {cls.__module__}.{cls.__name__} lacks {', '.join(f'{name}()' for name in lacking)}")


def _check_signature(cls: Any, args: tuple[Any, ...], options: dict[str, Any], place: str) -> None:
    signature = inspect.signature(cls)
    ours = list(signature.parameters)[: len(args)]
    names, open_ended = _options(cls, signature)
    free = [name for name in names if name not in ours]
    for name in options:
        if name in ours or (name not in free and not open_ended):
            raise CrlError(f"{place}.{name}: {cls.__name__} takes no such option{_hint(name, free) or _known(free)}")
    try:
        signature.bind(*args, **options)
    except TypeError as error:
        raise CrlError(f"{place}: {cls.__name__} {error}") from None


def _options(cls: Any, signature: inspect.Signature) -> tuple[list[str], bool]:
    """The names of a class's options, its bases' too where it hands `**options` on, and whether any other goes."""
    steps = [signature]
    if inspect.isclass(cls):
        own = [base for base in cls.__mro__ if "__init__" in vars(base)]
        steps += [inspect.signature(vars(base)["__init__"]) for base in own[1:]]
    names: list[str] = []
    for step in steps:
        kinds = {p.kind for p in step.parameters.values()}
        fixed = [n for n, p in step.parameters.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
        names += [name for name in fixed if name not in names and name != "self"]
        if inspect.Parameter.VAR_KEYWORD not in kinds:
            return names, False
    return names, True


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


def spread(spec: TaskSpec, place: str) -> list[tuple[str, dict[str, Any]]]:
    """(name, setting) of each visit of an entry: `change: {gravity: [9.8, 20.0]}` makes two."""
    base = spec.name or spec.env.rpartition(":")[2]
    if not spec.change:
        return [(base, {})]
    columns = {key: value if isinstance(value, list) else [value] for key, value in spec.change.items()}
    lengths = {len(values) for values in columns.values()}
    if len(lengths) != 1 or 0 in lengths:
        raise CrlError(f"{place}.change: every attribute needs the same number of values, at least one")
    settings = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    return [(f"{base}[{', '.join(f'{key}={value}' for key, value in s.items())}]", s) for s in settings]


def _wrapper(item: Any, place: str) -> tuple[Any, dict[str, Any]]:
    """(name or class, options) of one wrapper."""
    options = {"use": item} if isinstance(item, str) else dict(parse(dict[str, Any], item, place))
    use = options.pop("use", None)
    if not isinstance(use, str):
        raise CrlError(f"{place}: expected a name or a mapping with `use:`, not {_kind(item)}")
    names = {**_room("envs.wrappers").BY_NAME, "mission": _room("envs.gym").mission}
    found = names[use] if use in names else _wrapper_class(use, names, place)
    _check_signature(found, (None,), options, place)
    return use if use in names else found, options


def _wrapper_class(path: str, names: Mapping[str, Any], place: str) -> Any:
    found = locate(path, {}, place) if "." in path or ":" in path else None
    if found is None:
        raise CrlError(f"{place}: unknown {path!r}{_hint(path, names)} (an import path works too)")
    _check_contract(found, ("step", "reset"), place)
    return found


def _at(place: str, call: Any, *args: Any, **options: Any) -> Any:
    """Call, and let an error name its place."""
    try:
        return call(*args, **options)
    except CrlError as error:
        text = str(error)
        raise CrlError(text if text.startswith(place) else f"{place}: {text}") from None


def _known(names: Any) -> str:
    return f"; known are {', '.join(names)}" if names else ""


def _hint(name: str, known: Any, lead: str = "did you mean") -> str:
    near = difflib.get_close_matches(name, [str(k) for k in known], 1, 0.5)
    return f"; {lead} {near[0]!r}?" if near else ""


def _kind(data: Any) -> str:
    if isinstance(data, types.ModuleType):
        return "a module"
    if data is None:
        return "nothing"
    names = {dict: "a mapping", list: "a list", str: "text", int: "a number", float: "a number", bool: "true or false"}
    return names.get(type(data), f"a {type(data).__name__}")
