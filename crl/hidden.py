"""What a network's hidden layers say on a batch: found by watching what its weighted layers read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from crl.core import Agent
from crl.linalg import CurvatureError
from crl.linalg.problem import steady

WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.RNNBase, nn.RNNCellBase)
ACTIVE: dict[type[nn.Module], Any] = {  # where a unit of this kind is not stuck
    nn.Tanh: lambda h: h.abs() <= 0.99,
    nn.Sigmoid: lambda h: (h >= 0.01) & (h <= 0.99),
}


@dataclass(frozen=True)
class Layer:
    """What a hidden layer hands on, (samples, units); of a convolution the units are channels, places are samples."""

    name: str
    values: Tensor
    activation: type[nn.Module] | None

    @property
    def active(self) -> Tensor:
        """Which activations are not stuck: not 0 (or, for tanh and sigmoid, not saturated)."""
        inside: Tensor = ACTIVE.get(self.activation or nn.ReLU, lambda h: h != 0)(self.values)
        return inside


def hidden(agent: Any, batch: Mapping[str, Tensor]) -> dict[str, list[Layer]]:
    """The hidden layers of each network in order: whatever its weighted layers after the first read.

    They carry gradients where these are enabled.
    """
    model: nn.Module = agent.model
    read: list[tuple[str, nn.Module, Tensor, type[nn.Module] | None]] = []
    made: dict[int, type[nn.Module]] = {}

    def hook(name: str, part: nn.Module) -> Any:
        def catch(module: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
            if isinstance(part, WEIGHTED):
                read.append((name, part, inputs[0], made.get(inputs[0].data_ptr())))
            elif isinstance(output, Tensor) and (type(part) in ACTIVE or output.data_ptr() not in made):
                made[output.data_ptr()] = type(part)
                kept.append(output)  # alive, so that its place in memory is not taken by another

        return catch

    kept: list[Tensor] = []
    leaves = [
        (name, part) for name, part in model.named_modules() if isinstance(part, WEIGHTED) or not [*part.children()]
    ]
    handles = [part.register_forward_hook(hook(name, part)) for name, part in leaves]
    try:
        with steady(model):
            agent.outputs(batch)
    finally:
        for handle in handles:
            handle.remove()
    found: dict[str, list[Layer]] = {}
    for network, parameters in networks(agent).items():
        chosen = {id(value) for value in parameters.values()}
        own = [entry for entry in read if any(id(value) in chosen for value in entry[1].parameters(recurse=False))]
        first = {_place(seen) for _, _, seen, _ in own[:1]}  # the observation, which other branches read too
        hidden = [entry for entry in own if _place(entry[2]) not in first]
        places = {_place(seen): name for name, _, seen, _ in reversed(hidden)}  # read twice, it is one layer
        merged: dict[str, Layer] = {}
        for name, part, seen, kind in hidden:
            if places[_place(seen)] == name:
                values = _units(part, seen)  # a part that is called again and again (band by band) is one layer
                values = torch.cat([merged[name].values, values]) if name in merged else values
                merged[name] = Layer(name, values, kind)
        found[network] = list(merged.values())
    if not any(found.values()):
        raise CurvatureError("no hidden layer was found: the model has less than two layers with weights")
    return {network: layers for network, layers in found.items() if layers}


def _place(values: Tensor) -> int:
    return values.untyped_storage().data_ptr()


def _units(part: nn.Module, seen: Tensor) -> Tensor:
    if isinstance(part, nn.Conv1d | nn.Conv2d):
        return seen.movedim(1, -1).flatten(0, -2)
    return seen.reshape(-1, seen.shape[-1])


def networks(agent: Agent) -> dict[str, dict[str, nn.Parameter]]:
    """The parameters of each network of an agent; one network, `model`, where it does not say."""
    own: dict[str, dict[str, nn.Parameter]] | None = getattr(agent, "networks", None)
    if own is not None:
        return own
    model: nn.Module = agent.model  # type: ignore[attr-defined]
    return {"model": {name: value for name, value in model.named_parameters() if value.requires_grad}}
