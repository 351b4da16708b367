"""What a YAML names, found: short names and import paths to classes, each checked before it is built.

A YAML is trusted like code, since it names code (an import path is the registry); the checks are there so that a typing
slip costs one line.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import crl
from crl.checked import shown
from crl.config import all_known, in_words, nearest
from crl.core import CrlError, brief, imported

AGENTS = {"ppo": "agents.ppo.PPO", "dqn": "agents.dqn.DQN", "classifier": "agents.classifier.Classifier"}
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
    "policy_drift": "crl.monitors.drift.PolicyDrift",
    "churn": "crl.monitors.drift.Churn",
}
METHODS = {
    "l2": "crl.methods.shape.L2",
    "erank": "crl.methods.erank.ERank",
    "l2_er": "crl.methods.erank.L2ER",
    "weight_decay": "crl.methods.shape.WeightDecay",
    "l2_init": "crl.methods.shape.L2Init",
    "wasserstein": "crl.methods.shape.Wasserstein",
    "spectral": "crl.methods.shape.Spectral",
    "spectral_norm": "crl.methods.shape.SpectralNorm",
    "parseval": "crl.methods.shape.Parseval",
    "weight_clip": "crl.methods.shape.WeightClip",
    "normalize_and_project": "crl.methods.shape.NormalizeAndProject",
    "shrink_perturb": "crl.methods.renew.ShrinkPerturb",
    "redo": "crl.methods.renew.ReDo",
    "cbp": "crl.methods.renew.CBP",
    "head_reset": "crl.methods.renew.HeadReset",
    "reset": "crl.methods.renew.Reset",
    "plasticity_injection": "crl.methods.injection.PlasticityInjection",
    "progressive": "crl.methods.columns.Progressive",
    "packnet": "crl.methods.columns.PackNet",
    "ewc": "crl.methods.anchors.EWC",
    "online_ewc": "crl.methods.anchors.OnlineEWC",
    "si": "crl.methods.anchors.SI",
    "mas": "crl.methods.anchors.MAS",
    "lwf": "crl.methods.memory.LwF",
    "replay": "crl.methods.memory.Replay",
    "clone": "crl.methods.memory.Clone",
    "generative_replay": "crl.methods.generative.GenerativeReplay",
    "agem": "crl.methods.memory.AGEM",
    "der": "crl.methods.memory.DER",
}


def locate(path: str, short: Mapping[str, str], place: str) -> Any:
    """The class that a short name or an import path names."""
    full = short.get(path, path)
    module_name, _, name = full.replace(":", ".").rpartition(".")
    if not module_name:
        kind = place.partition(".")[0].rstrip("s")
        own = f"my_{kind}.My{kind.title()}"
        raise CrlError(f"{place}: unknown {path!r}{nearest(path, short)} (an import path, such as {own}, works too)")
    try:
        module = imported(module_name)
    except CrlError as error:
        raise CrlError(f"{place}: {error}") from None
    except (Exception, SystemExit) as error:  # a module may fail in any way
        ours = module_name.split(".")[0] in ("agents", "envs", "configs")
        hidden = "; a package of crl's own has that name, so give yours another" if ours else ""
        raise CrlError(f"{place}: cannot import {module_name!r}: {brief(error)}{hidden}") from error
    found = getattr(module, name, None)
    if found is None:
        raise CrlError(f"{place}: module {module_name!r} has no {name!r}{nearest(name, vars(module))}")
    if not inspect.isclass(found):
        raise CrlError(f"{place}: {path} is {in_words(found)}, not a class")
    return found


def check_rooms() -> None:
    """The packages `envs` and `agents` must be ours: name an intruder that shadows one."""
    home = Path(crl.__file__).resolve().parent.parent
    for name in ("envs", "agents"):
        where = getattr(importlib.import_module(name), "__file__", None)
        if where is None or Path(where).resolve().parent.parent != home:
            raise CrlError(f"the package {name!r} found at {where} hides ours in {home}: rename it or start elsewhere")


def room(name: str) -> Any:
    """A module of `envs` or `agents`, imported by name."""
    check_rooms()
    return importlib.import_module(name)


def named_parts(
    short: Mapping[str, str], kind: str, specs: Sequence[Mapping[str, Any]], needed: tuple[str, ...]
) -> dict[str, Any]:
    """Parts by name: what they are called in `use:`, or their own `name:`."""
    parts: dict[str, Any] = {}
    for i, spec in enumerate(specs):
        own = {key: value for key, value in spec.items() if key != "name"}
        name, place = spec.get("name", str(spec["use"]).rpartition(".")[2]), f"{kind}s.{i}"
        if not isinstance(name, str) or not re.fullmatch(r"[\w+-][\w.+-]{0,59}", name):
            raise CrlError(f"{place}.name: {shown(name)} is no name: at most 60 letters, digits, '.', '_', '+' and '-'")
        if name in parts:
            raise CrlError(f"{place}: another {kind} is called {name!r} already; give this one a `name:` of its own")
        parts[name] = at(place, _part, short, f"{kind}s", i, own, needed)
    return parts


def resolved(short: Mapping[str, str], specs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What parts were built with, defaults and all: a default of tomorrow does not change what a run was."""
    found = []
    for i, spec in enumerate(specs):
        options = inspect.signature(locate(spec["use"], short, f"parts.{i}")).parameters
        known = {name: o.default for name, o in options.items() if o.default is not inspect.Parameter.empty}
        found.append({"use": spec["use"], **known, **spec})
    return found


def _part(short: Mapping[str, str], place: str, i: int, spec: dict[str, Any], needed: tuple[str, ...]) -> Any:
    options = {key: value for key, value in spec.items() if key != "use"}
    cls = locate(spec["use"], short, f"{place}.{i}")
    check_contract(cls, needed, f"{place}.{i}")
    check_signature(cls, (), options, f"{place}.{i}")
    try:
        return cls(**options)
    except (AssertionError, ValueError, TypeError, RuntimeError) as error:
        raise CrlError(f"{place}.{i}: {cls.__name__} refuses these settings: {brief(error)}") from error


def check_contract(cls: Any, methods: tuple[str, ...], place: str) -> None:
    """Refuse a class that lacks a function of its contract."""
    lacking = [name for name in methods if not callable(getattr(cls, name, None))]
    if lacking:
        raise CrlError(f"{place}: {cls.__module__}.{cls.__name__} lacks {', '.join(f'{name}()' for name in lacking)}")


def check_signature(
    cls: Any, args: tuple[Any, ...], options: dict[str, Any], place: str, others: tuple[str, ...] = ()
) -> None:
    """Refuse options that a class (or function) does not take; `others` are taken elsewhere."""
    signature = inspect.signature(cls)
    ours = list(signature.parameters)[: len(args)]
    names, open_ended = _options(cls, signature)
    free = [*(name for name in names if name not in ours), *others]
    for name in options:
        if name in ours or (name not in free and not open_ended):
            raise CrlError(
                f"{place}.{name}: {cls.__name__} takes no such option{nearest(name, free) or all_known(free)}"
            )
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


def at(place: str, call: Any, *args: Any, **options: Any) -> Any:
    """Call, and let an error name its place."""
    try:
        return call(*args, **options)
    except CrlError as error:
        text = str(error)
        raise CrlError(text if text.startswith(place) else f"{place}: {text}") from None
