"""Hidden units: which layer makes them, which read them, what they said last, and how to begin them anew."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from crl.core import CrlError, State
from crl.methods.method import own_passes, plainly

NORMS = (nn.LayerNorm, nn.GroupNorm, nn.BatchNorm1d, nn.BatchNorm2d)


def weighted(part: nn.Module) -> bool:
    """Whether a module is a layer of weights that units come out of."""
    return isinstance(part, nn.Linear | nn.Conv1d | nn.Conv2d)


def chains_of(agent: Any) -> list[list[str]] | None:
    """The agent's chains of modules; read off a model that is an `nn.Sequential`; None where there are none."""
    declared = getattr(agent, "chains", None)
    if declared is not None:
        return [list(chain) for chain in declared]
    if not isinstance(agent.model, nn.Sequential):
        return None
    chain = []
    for name, part in agent.model.named_modules():
        parent = agent.model.get_submodule(name.rpartition(".")[0])
        if name and isinstance(parent, nn.Sequential) and not isinstance(part, nn.Sequential):
            if name.count(".") and not all(
                isinstance(agent.model.get_submodule(above), nn.Sequential) for above in _above(name)
            ):
                continue
            chain.append(name)
    return [chain]


def _above(name: str) -> Iterable[str]:
    parts = name.split(".")
    return (".".join(parts[:depth]) for depth in range(1, len(parts)))


@dataclass(frozen=True)
class Units:
    """A hidden layer's units: made by `into`, read by every layer of `out` when it answers.

    `columns` (units, k) are the places of a unit in what the next layer reads: several after a convolution was
    flattened, or an activation has doubled.
    """

    name: str
    into: Any
    norms: tuple[nn.Module, ...]
    gate: nn.Module  # what is in the chain next, whose input holds the units' activations
    out: tuple[Any, ...]
    columns: Tensor

    @property
    def count(self) -> int:
        """How many units there are."""
        return int(self.into.weight.shape[0])

    def activations(self, seen: Tensor) -> Tensor:
        """(samples, units, places) of what the next layer read."""
        if seen.ndim > 2:
            seen = seen.movedim(1, -1).flatten(0, -2)
        return seen[:, self.columns]


def units_of(agent: Any) -> list[Units]:
    """All hidden layers of the agent's chains."""
    found = []
    for chain in chains_of(agent) or []:
        parts = [agent.model.get_submodule(name) for name in chain]
        made = [i for i, part in enumerate(parts) if weighted(part)]
        ends = made[1:] + ([len(parts) - 1] if not weighted(parts[-1]) else [])
        for start, stop in zip(made, ends, strict=False):
            between, readers = parts[start + 1 : stop], [p for p in parts[stop].modules() if weighted(p)]
            if readers:
                norms = tuple(part for part in between if isinstance(part, NORMS))
                columns = _columns(chain[start], parts[start], between, readers[0])
                found.append(Units(chain[start], parts[start], norms, parts[stop], tuple(readers), columns))
    return found


def refuse_shallow(name: str, agent: Any) -> None:
    """Without a hidden layer there is nothing to do."""
    if chains_of(agent) is not None and not units_of(agent):
        raise CrlError(f"{name} acts on hidden layers, and this network has none")


def _columns(name: str, into: Any, between: list[nn.Module], reader: Any) -> Tensor:
    units, width = into.weight.shape[0], reader.weight.shape[1]
    copies = 2 if any(getattr(part, "doubles", False) for part in between) else 1
    places = width // (units * copies)
    if units * copies * places != width:
        raise CrlError(f"{name} has {units} units, but what follows reads {width} numbers: the chain is not one")
    index = torch.arange(width).view(copies, units, places)
    return index.movedim(1, 0).reshape(units, copies * places)


def replace_part(model: nn.Module, name: str, part: nn.Module) -> None:
    """Put a module in another's place."""
    above, _, own = name.rpartition(".")
    setattr(model.get_submodule(above), own, part)


class Watch:
    """What each hidden layer said in the agent's own last pass with gradients, while it is `on`."""

    def __init__(self) -> None:
        self.seen: dict[str, Tensor] = {}
        self._layers: list[Units] = []
        self._hooks: list[Any] = []

    @property
    def on(self) -> bool:
        """Whether it watches: there are no hooks otherwise, so that it costs nothing."""
        return bool(self._hooks)

    def follow(self, layers: Iterable[Units], on: bool) -> None:
        """Watch these layers, or stop: what reads a layer may be another module by now."""
        self._layers = list(layers)
        self.turn(False)
        self.turn(on)

    def turn(self, on: bool) -> None:
        """Watch, or stop."""
        if on and not self._hooks:
            for layer in self._layers:
                catch = functools.partial(self._catch, layer.name)
                self._hooks.append(layer.gate.register_forward_pre_hook(catch))
        elif not on:
            for hook in self._hooks:
                hook.remove()
            self._hooks = []

    def _catch(self, name: str, part: nn.Module, inputs: tuple[Any, ...]) -> None:
        if part.training and torch.is_grad_enabled() and not own_passes():
            self.seen[name] = inputs[0].detach()


def draw(first: Tensor, shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Numbers drawn from a parameter's first ones, so from its own initial distribution, whatever that was."""
    values = first.flatten()
    return values[torch.randint(len(values), shape, generator=generator).to(values.device)]


def redrawn(first: Tensor, generator: torch.Generator) -> Tensor:
    """Other weights from the distribution of a parameter's first ones, whatever that was.

    The rows and the columns of a matrix (or of a kernel) change places, and signs are drawn for each row and column.
    So numbers that were drawn independently with signs alike stay so, and a matrix that was orthogonal stays
    orthogonal, which numbers drawn one by one would not. A vector's numbers change places and keep their signs.
    """
    new = first
    for axis in range(min(first.ndim, 2)):
        order = torch.randperm(first.shape[axis], generator=generator)
        new = new.index_select(axis, order.to(first.device))
        if first.ndim > 1:
            signs = torch.randint(2, (first.shape[axis],), generator=generator) * 2 - 1
            shape = [-1 if place == axis else 1 for place in range(first.ndim)]
            new = new * signs.view(shape).to(first)
    return new


class Young:
    """Adam for numbers that begin anew in a tensor that does not.

    Adam counts steps once a tensor, so what begins anew has its moments cleared, and its movement scaled to what a new
    Adam's would be: with t steps of the tensor and k of the number, by (1 - b1^t) / (1 - b1^k) times
    sqrt((1 - b2^k) / (1 - b2^t)). Without it the first step is about three times too long; to reset the count would
    slow all others down.
    """

    def __init__(self) -> None:
        self.ages: dict[str, Tensor] = {}  # steps since a number began anew; -1 where it has grown old
        self._before: dict[str, Tensor] = {}

    def begin(self, name: str, parameter: nn.Parameter, where: Any, optimizer: torch.optim.Optimizer) -> None:
        """These numbers of a parameter begin anew."""
        state = optimizer.state.get(parameter, {})
        for value in state.values():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                value[where] = 0
        if "exp_avg_sq" in state and "step" in state:
            ages = self.ages.setdefault(
                name, torch.full(parameter.shape, -1, dtype=torch.int32, device=parameter.device)
            )
            ages[where] = 0

    def before(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """A step is about to happen."""
        self._before = {name: parameters[name].detach().clone() for name in self.ages if name in parameters}

    def after(self, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
        """It has happened: scale the movement of what is young."""
        for name, old in self._before.items():
            parameter, ages = parameters[name], self.ages[name]
            state = optimizer.state.get(parameter, {})
            if parameter.grad is None or "step" not in state:
                continue
            ages[ages >= 0] += 1
            group = _group(optimizer, parameter)
            size = state.get("max_exp_avg_sq", state["exp_avg_sq"])
            b1, b2 = group["betas"]
            factor = young_factor(ages, float(state["step"]), size, b1, b2, group.get("eps", 0.0))
            decay = group["lr"] * group["weight_decay"] if group.get("decoupled_weight_decay") else 0.0
            start = old * (1 - decay)  # what decays does so at any age
            parameter.copy_(torch.where(ages > 0, start + (parameter - start) * factor, parameter))
            ages[ages >= 10_000] = -1
            if not (ages >= 0).any():
                del self.ages[name]
        self._before = {}

    def state_dict(self) -> State:
        """The ages."""
        return dict(plainly(self.ages))

    def load_state_dict(self, state: State) -> None:
        """The inverse of `state_dict`."""
        self.ages = dict(plainly(state))


def young_factor(ages: Tensor, steps: float, size: Tensor, b1: float, b2: float, eps: float) -> Tensor:
    """How much further a new Adam would have moved; 1 where a number is as old as its tensor or older."""
    age, size = ages.clamp(min=1).double(), size.double()
    old, new = (size / (1 - b2**steps)).sqrt() + eps, (size / (1 - b2**age)).sqrt() + eps
    factor = (1 - b1**steps) / (1 - b1**age) * old / new.clamp(min=1e-300)
    return torch.where(age < steps, factor, torch.ones_like(factor)).float()


def _group(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, Any]:
    return next(g for g in optimizer.param_groups if any(value is parameter for value in g["params"]))


def bare_linear(like: Any, inputs: int) -> nn.Linear:
    """A linear layer as `like` but for what it reads, not filled yet, so that no random stream moves."""
    kind = {"device": like.weight.device, "dtype": like.weight.dtype}
    make: Any = nn.utils.skip_init
    layer: nn.Linear = make(nn.Linear, inputs, like.out_features, bias=like.bias is not None, **kind)
    return layer
