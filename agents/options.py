"""What a YAML may say of a Stable-Baselines3 agent, turned into SB3's own arguments; one line for each mistake."""

from __future__ import annotations

import difflib
import inspect
import operator
from collections.abc import Mapping
from typing import Any

from gymnasium import spaces
from stable_baselines3.common.base_class import BaseAlgorithm
from torch import nn

from agents.layers import ACTIVATIONS, DOUBLING, INITS, NORMS, OneHot
from agents.optimizers import find
from crl.checked import FAR, Range, shown, truth, whole
from crl.core import CrlError, Interface, brief, imported

OURS = {"policy", "env", "seed", "device", "verbose", "tensorboard_log", "_init_setup_model", "self", "use_sde"}
SHARE, WEIGHT, STEPS = Range(0, 1), Range(0, 1e9), Range(1, 10**9)
RANGES = {  # of Stable-Baselines3's arguments, which it does not check itself; of all others a finite number
    "learning_rate": Range(0, 1e30),
    **dict.fromkeys(("gamma", "gae_lambda", "tau", "line_search_shrinking_factor"), SHARE),
    **dict.fromkeys(("exploration_fraction", "exploration_initial_eps", "exploration_final_eps"), SHARE),
    **dict.fromkeys(("n_steps", "batch_size", "buffer_size", "target_update_interval", "stats_window_size"), STEPS),
    **dict.fromkeys(("n_epochs", "policy_delay", "n_critic_updates", "cg_max_steps"), Range(1, 10_000)),
    **dict.fromkeys(("line_search_max_iter", "sub_sampling_factor"), Range(1, 10_000)),
    **dict.fromkeys(("vf_coef", "ent_coef", "target_kl", "rms_prop_eps"), WEIGHT),
    **dict.fromkeys(("cg_damping", "target_policy_noise", "target_noise_clip"), WEIGHT),
    "clip_range": Range(0, 10),
    "max_grad_norm": Range(0, float("inf")),
    "clip_range_vf": WEIGHT,
    "train_freq": Range(1, 10**6),
    "gradient_steps": Range(-1, 10**6),
    "learning_starts": Range(0, 10**12),
    "top_quantiles_to_drop_per_net": Range(0, 10_000),
}
WIDEST = 65_536  # units of a layer
CLASSES = ("activation_fn", "features_extractor_class", "optimizer_class")  # of `policy_kwargs`, by import path
BUFFERS = ("rollout_buffer_class", "replay_buffer_class")


def policy_kwargs(interface: Interface, net: Mapping[str, Any], optimizer: Mapping[str, Any]) -> dict[str, Any]:
    """SB3's `policy_kwargs` from our `net` and `optimizer` options; what is not named stays SB3's."""
    known("agent.net", net, ("hidden", "activation", "norm", "init"))
    kwargs: dict[str, Any] = {}
    if "hidden" in net:
        kwargs["net_arch"] = widths("agent.net.hidden", net["hidden"])
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


def widths(place: str, given: Any) -> list[int]:
    """How many units each layer has."""
    if not isinstance(given, list | tuple):
        raise CrlError(f"{place}: {shown(given)} is not a list of whole numbers")
    return [whole(place, width, 1, WIDEST) for width in given]


def check_options(algorithm: type[BaseAlgorithm], options: Mapping[str, Any]) -> None:
    """Refuse what Stable-Baselines3's algorithm does not take: an unknown name, another kind, or out of range."""
    parameters = {k: v for k, v in inspect.signature(algorithm.__init__).parameters.items() if k not in OURS}
    known("agent", options, [*parameters, "net", "optimizer", "normalize"])
    for name, value in options.items():
        default, place = parameters[name].default, f"agent.{name}"
        if isinstance(default, bool):
            truth(place, value)
        elif isinstance(value, Mapping) and name in ("learning_rate", "clip_range"):
            line(name, value)
        elif isinstance(default, int | float) or (name in RANGES and value is not None and value != default):
            _check_number(place, value, default, RANGES.get(name, Range(-FAR)))


def _check_number(place: str, value: Any, default: Any, allowed: Range) -> None:
    wanted = (int, "a whole number") if isinstance(default, int) else ((int, float), "a number")
    if isinstance(default, str) and isinstance(value, str):  # `auto_0.1`
        return
    if isinstance(value, bool) or not isinstance(value, wanted[0]):  # type: ignore[arg-type]
        raise CrlError(f"{place}: {shown(value)} is not {wanted[1]}")
    allowed.check(place, value)


def with_classes(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The same settings, where a class that is named by its import path is that class."""
    found = {k: located(v, f"agent.{k}", ()) if k in BUFFERS and isinstance(v, str) else v for k, v in settings.items()}
    if not isinstance(inner := found.get("policy_kwargs") or {}, Mapping):
        raise CrlError(f"agent.policy_kwargs: {shown(inner)} is not a mapping")
    place = "agent.policy_kwargs."
    named = {k: located(v, place + k, ()) for k, v in inner.items() if k in CLASSES and isinstance(v, str)}
    return {**found, **({"policy_kwargs": {**inner, **named}} if inner else {})}


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
    try:
        return getattr(imported(module_name), name)
    except CrlError as error:
        raise CrlError(f"{place}: {error}") from None
    except Exception as error:  # a module may fail in any way
        raise CrlError(f"{place}: cannot import {path!r}: {brief(error)}") from error


def line(name: str, ends: Mapping[str, float]) -> Any:
    known(f"agent.{name}", ends, ("from", "to"))
    try:
        first, last = map(float, operator.itemgetter("from", "to")(ends))
    except (KeyError, TypeError, ValueError):
        raise CrlError(f"agent.{name}: a schedule is {{from: NUMBER, to: NUMBER}}") from None
    for end in (first, last):
        RANGES[name].check(f"agent.{name}", end)
    return lambda remaining: last + (first - last) * remaining
