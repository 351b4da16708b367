"""What a YAML may say of a Stable-Baselines3 agent, turned into SB3's own arguments; one line for each mistake."""

from __future__ import annotations

import difflib
import importlib
import inspect
import operator
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gymnasium import spaces
from stable_baselines3.common.base_class import BaseAlgorithm
from torch import nn

from agents.layers import ACTIVATIONS, DOUBLING, INITS, NORMS, OneHot
from agents.optimizers import find
from crl.core import CrlError, Interface, brief

OURS = {"policy", "env", "seed", "device", "verbose", "tensorboard_log", "_init_setup_model", "self", "use_sde"}


def policy_kwargs(interface: Interface, net: Mapping[str, Any], optimizer: Mapping[str, Any]) -> dict[str, Any]:
    """SB3's `policy_kwargs` from our `net` and `optimizer` options; what is not named stays SB3's."""
    known("agent.net", net, ("hidden", "activation", "norm", "init"))
    kwargs: dict[str, Any] = {}
    if "hidden" in net:
        kwargs["net_arch"] = [int(width) for width in net["hidden"]]
    if "activation" in net:
        known("agent.net.activation", [net["activation"]], {**ACTIVATIONS, **DOUBLING})
        kwargs["activation_fn"] = ACTIVATIONS.get(net["activation"], nn.Identity)  # what doubles is put in later
        odd = [width for width in net.get("hidden", ()) if width % 2]
        if net["activation"] in DOUBLING and odd:
            raise CrlError(f"agent.net.hidden: {odd[0]} cannot be halved, as activation {net['activation']} needs")
    if "norm" in net:
        known("agent.net.norm", [net["norm"]], NORMS)
    if "init" in net:
        known("agent.net.init", [net["init"]], ["sb3", *INITS])
    if isinstance(interface.observation, spaces.MultiDiscrete):
        kinds = [int(kind) for kind in interface.observation.nvec]
        kwargs |= {"features_extractor_class": OneHot, "features_extractor_kwargs": {"kinds": kinds}}
    rest = dict(optimizer)
    if "use" in rest:
        kwargs["optimizer_class"] = find(rest.pop("use"))
    if rest:
        kwargs["optimizer_kwargs"] = rest
    return kwargs


def check_options(algorithm: type[BaseAlgorithm], options: Mapping[str, Any]) -> None:
    parameters = {k: v for k, v in inspect.signature(algorithm.__init__).parameters.items() if k not in OURS}
    known("agent", options, [*parameters, "net", "optimizer", "normalize"])
    for name, value in options.items():
        default = parameters[name].default
        schedule = name in ("learning_rate", "clip_range") and isinstance(value, Mapping)
        if schedule or isinstance(default, bool) or not isinstance(default, int | float):
            continue
        wanted = (int, "a whole number") if isinstance(default, int) else ((int, float), "a number")
        if isinstance(value, bool) or not isinstance(value, wanted[0]):  # type: ignore[arg-type]
            raise CrlError(f"agent.{name}: {value!r} is not {wanted[1]}")


def known(place: str, given: Any, known: Any) -> None:
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(str(name), list(known), 1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(sorted(known))}"
            raise CrlError(f"{place}: unknown {name!r}; {hint}")


def located(path: Any, place: str, short: Any) -> Any:
    """What an import path names."""
    module_name, _, name = str(path).replace(":", ".").rpartition(".")
    if not module_name:
        known(place, [path], short)
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        return getattr(importlib.import_module(module_name), name)
    except Exception as error:  # a module may fail in any way
        raise CrlError(f"{place}: cannot import {path!r}: {brief(error)}") from error


def line(name: str, ends: Mapping[str, float]) -> Any:
    known(f"agent.{name}", ends, ("from", "to"))
    try:
        first, last = map(float, operator.itemgetter("from", "to")(ends))
    except (KeyError, TypeError, ValueError):
        raise CrlError(f"agent.{name}: a schedule is {{from: NUMBER, to: NUMBER}}") from None
    return lambda remaining: last + (first - last) * remaining
