"""YAML to a typed experiment. One error a mistake, with its place and what would be right."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import os
import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

import crl
from crl.core import CrlError, Rules, brief

BY_DEFAULT = ("hessian", "erank", "dormant", "norms")
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
    """How many copies of an environment are stepped at once, and how: in turn, in processes, or in C++."""

    kind: str = field(default="sync", metadata={"choices": ("sync", "async", "envpool")})
    envs: int = at_least(1, 16, most=4_096)
    threads: int = at_least(0, 0, most=1_024)  # threads or processes that step; 0 is all cores; changes no result
    timeout: int = at_least(0, 600, most=86_400)  # seconds that one call of an environment may take; 0: any
    max_episode_steps: int = at_least(0, 100_000)  # an episode that has no end is ended there; 0: never


@dataclass(frozen=True)
class EvaluationSpec:
    """Which tasks are evaluated at each boundary (and every so many steps where asked), and on how much."""

    episodes: int = at_least(1, 20)
    greedy: bool = False
    every: int = at_least(0, 0)
    samples: int = at_least(0, 0)  # test images of each task; 0 is all
    of: str = field(default="all", metadata={"choices": ("all", "seen", "own")})


@dataclass(frozen=True)
class CheckpointSpec:
    """Which checkpoints there are: in the middle of visits every so many steps, and how many boundaries' are kept."""

    every: int = at_least(0, 0)
    keep: int = at_least(0, 0)  # the latest; 0 is all


@dataclass(frozen=True)
class Experiment:
    """One YAML, whole: a list of environments (`tasks`) or a dataset's slices (`stream`). The rest has defaults."""

    tasks: list[TaskSpec] = field(default_factory=list)
    stream: dict[str, Any] = field(default_factory=dict)
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
    checkpoint: CheckpointSpec = CheckpointSpec()
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
        names = [method.get("name") or method["use"] for method in self.methods]
        return "+".join(str(name).rpartition(".")[2] for name in [self.agent["use"], *names])

    @property
    def place(self) -> str:
        """Where its run goes, below where runs go."""
        return f"{self.name}/{self.label}/seed-{self.seed}"


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
    raise CrlError(f"{name}: no such file{nearest(stem, shipped, 'did you mean the shipped config')}")


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
        raise CrlError(f"{source}: an experiment is a mapping with `tasks:` or `stream:`, not {in_words(data)}")
    data.setdefault("monitors", list(BY_DEFAULT))
    for place, value in changes:
        _put(data, place, value)
    _shorthands(data)
    data["name"] = data.get("name") or default_name
    experiment: Experiment = parse(Experiment, data)
    if not re.fullmatch(r"[\w+-][\w.+-]{0,59}", experiment.name):
        raise CrlError(f"name: {experiment.name!r} names a folder: at most 60 letters, digits, '.', '_', '+' and '-'")
    if bool(experiment.tasks) == bool(experiment.stream):
        both = "has both `tasks:` and `stream:`" if experiment.tasks else "has neither `tasks:` nor `stream:`"
        raise CrlError(f"{experiment.name}: {both}; a walk goes through environments or through slices of a dataset")
    return experiment


def parse(kind: Any, data: Any, place: str = "") -> Any:
    """`data` as the annotated `kind`, or the one line that says where it is not."""
    if dataclasses.is_dataclass(kind):
        return _parse_dataclass(kind, data, place)
    origin = typing.get_origin(kind)
    if origin is list:
        if not isinstance(data, list):
            raise CrlError(f"{place}: expected a list, not {in_words(data)}")
        return [parse(typing.get_args(kind)[0], item, f"{place}.{i}") for i, item in enumerate(data)]
    if origin is dict:
        if data is None:
            return {}
        if not isinstance(data, dict):
            raise CrlError(f"{place}: expected a mapping, not {in_words(data)}")
        for key in data:
            if not isinstance(key, str):
                raise CrlError(f"{place}.{key}: a key is a name here, not {in_words(key)}")
        return data
    if origin is typing.Literal:
        choices = typing.get_args(kind)
        if not any(type(data) is type(choice) and data == choice for choice in choices):
            *most, last = (str(choice).lower() for choice in choices)
            raise CrlError(f"{place}: expected {', '.join(most)} or {last}, not {in_words(data)} ({data!r})")
        return data
    if kind is Any:
        return data
    if kind is int and isinstance(data, float) and data.is_integer():
        return int(data)  # 1e6 is a fair way to write a number of steps
    fits = isinstance(data, kind) and not (kind is int and isinstance(data, bool))
    if not fits:
        names = {int: "a whole number", str: "text", bool: "true or false"}
        raise CrlError(f"{place}: expected {names.get(kind, kind.__name__)}, not {in_words(data)} ({data!r})")
    return data


def _parse_dataclass(kind: Any, data: Any, place: str) -> Any:
    if not isinstance(data, dict):
        raise CrlError(f"{place}: expected a mapping, not {in_words(data)}")
    fields = {f.name: f for f in dataclasses.fields(kind)}
    hints = typing.get_type_hints(kind)
    values = {}
    for key, value in data.items():
        where = f"{place}.{key}".lstrip(".")
        if key not in fields:
            raise CrlError(f"{where}: unknown key{nearest(str(key), fields) or all_known(fields)}")
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
    """`agent: ppo` is `agent: {use: ppo}`, and so for each method and monitor; `engine: async` names its kind."""

    def whole(item: Any, place: str) -> Any:
        item = {"use": item} if isinstance(item, str) else item
        if not isinstance(item, dict):
            raise CrlError(f"{place}: expected a name or a mapping with `use:`, not {in_words(item)}")
        parse(str, item.get("use", ""), f"{place}.use")
        return parse(dict[str, Any], item, place)

    if isinstance(data.get("engine"), str):
        data["engine"] = {"kind": data["engine"]}
    agent = whole(data.get("agent") or {}, "agent")
    data["agent"] = {"use": "classifier" if data.get("stream") else "ppo", **agent}
    if data.get("stream"):
        data["stream"] = {"use": "split", **whole(data["stream"], "stream")}
        data.setdefault("threads", os.cpu_count() or 1)  # part of the result: written out
        if "data" not in data["stream"]:
            raise CrlError("stream: `data` is missing: mnist, cifar100, shapes, a folder, or an import path")
        parse(str, data["stream"]["data"], "stream.data")
    for part in ("methods", "monitors"):
        items = data.get(part) or []
        if not isinstance(items, list):
            raise CrlError(f"{part}: expected a list, not {in_words(items)}")
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
            raise CrlError(f"--set {place}: {'.'.join(keys[:depth])} is {in_words(here)} and has no {key!r}")
        if last:
            here[key] = value
        elif isinstance(here.get(key), str) and key in ("agent", "engine"):
            here[key] = {"use" if key == "agent" else "kind": here[key]}
            here = here[key]
        else:
            here[key] = {} if here.get(key) is None else here[key]
            here = here[key]


def all_known(names: Any) -> str:
    """The end of a sentence: what there is."""
    return f"; known are {', '.join(names)}" if names else ""


def nearest(name: str, known: Any, lead: str = "did you mean") -> str:
    """The end of a sentence: what comes nearest to an unknown name."""
    near = difflib.get_close_matches(name, [str(k) for k in known], 1, 0.5)
    return f"; {lead} {near[0]!r}?" if near else ""


def in_words(data: Any) -> str:
    """What a value is, in words."""
    if isinstance(data, types.ModuleType):
        return "a module"
    if data is None:
        return "nothing"
    names = {dict: "a mapping", list: "a list", str: "text", int: "a number", float: "a number", bool: "true or false"}
    return names.get(type(data), f"a {type(data).__name__}")
