"""YAML to a typed experiment. One error a mistake, with its place and what would be right."""

from __future__ import annotations

import dataclasses
import datetime
import difflib
import hashlib
import json
import math
import os
import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import yaml

import crl
from crl.checked import Range, shown
from crl.core import CrlError, Rules, brief

BY_DEFAULT = ("hessian", "erank", "dormant", "norms")
CONFIGS = Path(crl.__file__).resolve().parent.parent / "configs"


# The typed experiment: what a YAML may say, and the defaults of all it does not.


STEPS = Range(0, 10**12)
COUNT = Range(1, 10**6)


@dataclass(frozen=True)
class TaskSpec:
    """One entry of `tasks:`."""

    env: str
    steps: Annotated[int, Range(1, STEPS.most)]
    name: str = ""
    kwargs: dict[str, Any] = field(default_factory=dict)
    wrappers: list[Any] = field(default_factory=list)
    change: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class EngineSpec:
    """How many copies of an environment are stepped at once, and how: in turn, in processes, or in C++."""

    kind: str = field(default="sync", metadata={"choices": ("sync", "async", "envpool")})
    envs: Annotated[int, Range(1, 4_096)] = 16
    threads: Annotated[int, Range(0, 1_024)] = 0  # that step, or processes; 0 is all cores; changes no result
    timeout: Annotated[int, Range(0, 86_400)] = 600  # seconds that one call of an environment may take; 0: any
    max_episode_steps: Annotated[int, Range(0, 10**9)] = 100_000  # an episode that has no end is ended there; 0: never


@dataclass(frozen=True)
class EvaluationSpec:
    """Which tasks are evaluated at each boundary (and every so many steps where asked), and on how much."""

    episodes: Annotated[int, COUNT] = 20
    greedy: bool = False
    every: Annotated[int, STEPS] = 0
    samples: Annotated[int, STEPS] = 0  # test images of each task; 0 is all
    of: str = field(default="all", metadata={"choices": ("all", "seen", "own")})


@dataclass(frozen=True)
class CheckpointSpec:
    """Which checkpoints there are: in the middle of visits every so many steps, and how many boundaries' are kept."""

    every: Annotated[int, STEPS] = 0
    keep: Annotated[int, STEPS] = 0  # the latest; 0 is all


@dataclass(frozen=True)
class Experiment:
    """One YAML, whole: a list of environments (`tasks`) or a dataset's slices (`stream`). The rest has defaults."""

    tasks: list[TaskSpec] = field(default_factory=list)
    stream: dict[str, Any] = field(default_factory=dict)
    name: str = ""
    repeat: Annotated[int, Range(1, 10_000)] = 1
    seed: Annotated[int, Range(0, 2**32 - 1)] = 0
    threads: Annotated[int, Range(1, 1_024)] = 1
    device: str = "auto"
    engine: EngineSpec = EngineSpec()
    boundary: Rules = field(default_factory=Rules)
    agent: dict[str, Any] = field(default_factory=lambda: {"use": "ppo"})
    methods: list[Any] = field(default_factory=list)
    monitors: list[Any] = field(default_factory=lambda: [{"use": use} for use in BY_DEFAULT])
    evaluation: EvaluationSpec = EvaluationSpec()
    checkpoint: CheckpointSpec = CheckpointSpec()
    baseline: str = field(default="none", metadata={"choices": ("none", "fresh", "fresh_with_methods")})

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


MOST_VALUES = 10**6  # in one YAML, every alias written out


class _Loader(yaml.SafeLoader):
    """YAML 1.1, but `3e-4` and `1e6` are numbers, a key given twice is a mistake, and aliases do not multiply."""

    def construct_document(self, node: Any) -> Any:
        if self._count(node, {}) > MOST_VALUES:
            raise yaml.constructor.ConstructorError(None, None, f"more than {MOST_VALUES:,} values", node.start_mark)
        return super().construct_document(node)  # type: ignore[no-untyped-call]

    def _count(self, node: Any, known: dict[int, int]) -> int:
        """How many values a node stands for, with what its aliases stand for; each node is gone through once."""
        if id(node) not in known:
            known[id(node)] = 1  # of what contains itself
            parts = node.value if isinstance(node, yaml.CollectionNode) else ()
            below = [part for part in parts for part in (part if isinstance(part, tuple) else (part,))]
            known[id(node)] = 1 + sum(self._count(part, known) for part in below)
        return known[id(node)]

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)  # type: ignore[no-untyped-call]
        except BROKEN as error:  # the 99th of May, or `!!bool maybe`
            raise yaml.constructor.ConstructorError(None, None, _why(error, node), node.start_mark) from None

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen: set[Any] = set()
        for key_node, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str | int) and key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
            seen.add(key if isinstance(key, str | int) else None)
        return super().construct_mapping(node, deep)


BROKEN = (ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError)


def _why(error: Exception, node: Any) -> str:
    """What is wrong with a value: as Python says it, or that it is not what its tag says."""
    return str(error) if isinstance(error, ValueError) else f"not a value of the kind {node.tag.rpartition(':')[2]}"


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
    except (yaml.YAMLError, RecursionError, *BROKEN) as error:
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
        data, default_name = plain(source), "experiment"
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
        _put(data, place, plain(value, place))
    _shorthands(data)
    data["name"] = default_name if data.get("name") in (None, "") else data["name"]
    experiment: Experiment = parse(Experiment, data)
    _refuse_no_numbers(data, "")
    if not re.fullmatch(r"[\w+-][\w.+-]{0,59}", experiment.name):
        raise CrlError(f"name: {experiment.name!r} names a folder: at most 60 letters, digits, '.', '_', '+' and '-'")
    if bool(experiment.tasks) == bool(experiment.stream):
        both = "has both `tasks:` and `stream:`" if experiment.tasks else "has neither `tasks:` nor `stream:`"
        raise CrlError(f"{experiment.name}: {both}; a walk goes through environments or through slices of a dataset")
    return experiment


def plain(value: Any, place: str = "") -> Any:
    """What Python says, as a YAML says it: NumPy's numbers and arrays, paths, and classes by their import path.

    >>> plain({"agent": dict, "steps": np.int64(3), "hidden": (4, 4)})
    {'agent': 'builtins.dict', 'steps': 3, 'hidden': [4, 4]}
    """
    if isinstance(value, Mapping):
        return {key: plain(item, f"{place}.{key}".lstrip(".")) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, f"{place}.{i}".lstrip(".")) for i, item in enumerate(value)]
    if isinstance(value, np.generic | np.ndarray):
        return plain(value.tolist(), place)
    if isinstance(value, type):
        if value.__module__ == "__main__" or "." in value.__qualname__:
            raise CrlError(f"{place}: {value.__qualname__} is no class of a module that can be imported again")
        return f"{value.__module__}.{value.__qualname__}"
    if isinstance(value, Path):
        return str(value)
    if value is None or isinstance(value, bool | int | float | str | datetime.date):
        return value
    raise CrlError(
        f"{place}: {shown(value)} cannot be written into a YAML; give numbers, text, lists, mappings or classes"
    )


def _refuse_no_numbers(data: Any, place: str) -> None:
    """NaN means nothing anywhere; infinity, and what no float32 holds, only to code that is not ours."""
    if isinstance(data, dict):
        foreign = _foreign(data.get("use"))
        for key, value in data.items():
            if not foreign and key not in ENDLESS:
                _refuse_no_numbers(value, f"{place}.{key}".lstrip("."))
    elif isinstance(data, list):
        for i, value in enumerate(data):
            _refuse_no_numbers(value, f"{place}.{i}".lstrip("."))
    elif isinstance(data, float) and not math.isfinite(data):
        raise CrlError(f"{place}: {data} is not a finite number")
    elif isinstance(data, int | float) and not abs(data) <= LARGEST[type(data)]:
        raise CrlError(f"{place}: {shown(data)} is too large for a number")


ENDLESS = ("kwargs", "wrappers", "max_grad_norm")  # where infinity may mean something
LARGEST = {bool: 1, int: 2**63 - 1, float: 3e38}


def _foreign(use: Any) -> bool:
    """Whether a part is somebody else's class, which may take any number."""
    path = str(use).replace(":", ".")
    return "." in path and not path.startswith(("stable_baselines3.", "sb3_contrib."))


def parse(kind: Any, data: Any, place: str = "") -> Any:
    """`data` as the annotated `kind`, or the one line that says where it is not."""
    if dataclasses.is_dataclass(kind):
        return _parse_dataclass(kind, data, place)
    origin = typing.get_origin(kind)
    if origin is Annotated:
        base, limits = typing.get_args(kind)
        value = parse(base, data, place)
        limits.check(place, value)
        return value
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
            raise CrlError(f"{place}: expected {', '.join(most)} or {last}, not {in_words(data)} ({shown(data)})")
        return data
    if kind is Any:
        return data
    if kind is int and isinstance(data, float) and data.is_integer():
        return int(data)  # 1e6 is a fair way to write a number of steps
    fits = isinstance(data, kind) and not (kind is int and isinstance(data, bool))
    if not fits:
        names = {int: "a whole number", str: "text", bool: "true or false"}
        raise CrlError(f"{place}: expected {names.get(kind, kind.__name__)}, not {in_words(data)} ({shown(data)})")
    return data


def _parse_dataclass(kind: Any, data: Any, place: str) -> Any:
    if not isinstance(data, dict):
        raise CrlError(f"{place}: expected a mapping, not {in_words(data)}")
    fields = {f.name: f for f in dataclasses.fields(kind)}
    hints = typing.get_type_hints(kind, include_extras=True)
    values = {}
    for key, value in data.items():
        where = f"{place}.{key}".lstrip(".")
        if key not in fields:
            raise CrlError(f"{where}: unknown key{nearest(str(key), fields) or all_known(fields)}")
        values[key] = parse(hints[key], value, where)
        choices = fields[key].metadata.get("choices")
        if choices and values[key] not in choices:
            raise CrlError(f"{where}: {shown(values[key])} is not one of {', '.join(choices)}")
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
    for part, nothing in (("agent", {}), ("stream", {}), ("methods", []), ("monitors", [])):
        data[part] = nothing if data.get(part) is None else data[part]
    data["agent"] = {"use": "classifier" if data["stream"] else "ppo", **whole(data["agent"], "agent")}
    if data["stream"] != {}:
        data["stream"] = {"use": "split", **whole(data["stream"], "stream")}
        data.setdefault("threads", os.cpu_count() or 1)  # part of the result: written out
        if "data" not in data["stream"]:
            raise CrlError("stream: `data` is missing: mnist, cifar100, shapes, a folder, or an import path")
        parse(str, data["stream"]["data"], "stream.data")
    for part in ("methods", "monitors"):
        items = data[part]
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
