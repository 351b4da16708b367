"""Keeping weights in shape: penalties on them, and limits that they are put back into after every step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from crl.checked import number
from crl.core import Agent, CrlError, optimizers_of
from crl.methods.method import FromFirst, Method, Penalty, length, refuse_distance
from crl.methods.units import NORMS, chains_of, refuse_shallow, weighted

WEIGHTS = "weights"


class L2(Penalty):
    """strength / 2 * |w|^2 of every parameter, biases too, in the gradient (coupled, as arXiv 2509.22335 has it)."""

    family = WEIGHTS

    def __init__(self, strength: float = 1e-3) -> None:
        super().__init__(strength)

    def attach(self, agent: Agent) -> None:
        """An agent that can add it by itself does so: it has no need to stop at every gradient."""
        if hasattr(agent, "decay"):
            agent.decay += self.strength
        super().attach(agent)

    def hooks(self) -> bool:
        """Not where the agent adds it."""
        return super().hooks() and not hasattr(self.agent, "decay")

    def slope(self, name: str, value: Tensor) -> Tensor:
        """The weights themselves."""
        return value

    def value(self, name: str, value: Tensor) -> Tensor:
        """Half the sum of squares."""
        return value.square().sum() / 2


class WeightDecay(Method):
    """Every weight times 1 - learning rate * strength before each step: decoupled (Loshchilov and Hutter 2019)."""

    family = WEIGHTS
    idle: ClassVar[Mapping[str, Any]] = {"strength": 0.0}

    def __init__(self, strength: float = 1e-2) -> None:
        super().__init__()
        self.strength = number("strength", strength, 0.0)

    def accepts(self, agent: Agent) -> None:
        """A step must not turn a weight around."""
        rate = max(group["lr"] for optimizer in optimizers_of(agent) for group in optimizer.param_groups)
        if rate * self.strength >= 1:
            raise CrlError(
                f"strength: {self.strength:g} times the learning rate {rate:g} is 1 or more: nothing is left"
            )

    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Shrink what is about to move."""
        for group in optimizer.param_groups if self.strength else ():
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.mul_(1 - group["lr"] * self.strength)

    def measures(self) -> dict[str, float]:
        """How far a step shrinks, at a learning rate of 1."""
        return {"push": self.strength * float(length(self.parameters.values()))}


class L2Init(FromFirst, Penalty):
    """strength * |w - w0|^2, towards the first weights (Kumar et al. 2023, arXiv 2308.11958)."""

    family = WEIGHTS

    def __init__(self, strength: float = 1e-3) -> None:
        super().__init__(strength)

    def slope(self, name: str, value: Tensor) -> Tensor:
        """Twice the way back."""
        return 2 * (value - self.first[name])

    def value(self, name: str, value: Tensor) -> Tensor:
        """The squared distance."""
        return (value - self.first[name]).square().sum()


class Wasserstein(FromFirst, Penalty):
    """strength * |sort(w) - sort(w0)|^2 in each parameter: its values as first, in any order (arXiv 2312.00246).

    Summed, as `l2_init` is; the published form is a mean, which makes the strength depend on the layer's size.
    """

    family = WEIGHTS

    def __init__(self, strength: float = 1e-3) -> None:
        super().__init__(strength)
        self._kept: dict[str, tuple[Tensor, Tensor]] = {}

    def slope(self, name: str, value: Tensor) -> Tensor:
        """Twice the way back, in the order of the first weights."""
        ordered, places = value.flatten().sort()
        back = torch.empty_like(ordered)
        back[places] = 2 * (ordered - self._sorted(name))
        return back.view_as(value)

    def value(self, name: str, value: Tensor) -> Tensor:
        """The squared distance of the sorted values."""
        return (value.flatten().sort().values - self._sorted(name)).square().sum()

    def _sorted(self, name: str) -> Tensor:
        """The first weights in order, sorted once."""
        first = self.first[name]
        if name not in self._kept or self._kept[name][0] is not first:
            self._kept[name] = (first, first.flatten().sort().values)
        return self._kept[name][1]


class Spectral(Penalty):
    """strength * (s^2 - 1)^2 of each matrix's largest singular value s, |b|^2, |gain - 1|^2 (arXiv 2406.06811).

    Lewandowski et al. 2024, with k = 2; b are biases, gains are norm layers'; s is found by one step of power iteration
    that goes on from the last. The squares of biases and gains are those of the code of arXiv 2509.22335 (lop-jax); by
    the first paper's rule, (|b|^k)^2, a bias's would be |b|^4, which hardly holds what is small.
    """

    family = WEIGHTS
    memory: ClassVar[tuple[str, ...]] = ("directions",)

    def __init__(self, strength: float = 1e-4) -> None:
        super().__init__(strength)
        self.directions: dict[str, Tensor] = {}

    def find_parameters(self) -> None:
        """Where a matrix is largest is found anew for new ones, by ten steps."""
        super().find_parameters()
        for name, parameter in self.parameters.items():
            if parameter.ndim > 1 and name not in self.directions:
                self.directions[name] = first_direction(parameter.detach(), self.generator)

    def push(self, name: str, parameter: nn.Parameter) -> None:
        """Let the direction go on, once a step; then add the gradient."""
        if name in self.directions:
            self.directions[name] = _power(parameter.detach().flatten(1), self.directions[name])
        super().push(name, parameter)

    def slope(self, name: str, value: Tensor) -> Tensor:
        """2 (s^2 - 1) 2 s u v^T; 2 b; 2 (g - 1)."""
        if value.ndim > 1:
            right = self.directions[name]
            left = value.flatten(1) @ right
            size = left.norm()  # left / size is u, so size * u v^T is left v^T
            slope: Tensor = 4 * (size.square() - 1) * torch.outer(left, right)
            return slope.view_as(value)
        return 2 * (value - self._rest(name))

    def value(self, name: str, value: Tensor) -> Tensor:
        """The penalty."""
        if value.ndim > 1:
            return ((value.flatten(1) @ self.directions[name]).square().sum() - 1).square()
        return (value - self._rest(name)).square().sum()

    def _rest(self, name: str) -> float:
        """Where a vector rests: gains of norms at 1, all else at 0."""
        owner = self.agent.model.get_submodule(name.rpartition(".")[0])
        return float(isinstance(owner, NORMS) and name.endswith("weight"))


class Parseval(Penalty):
    """strength * |W W^T - scale * I|^2 of hidden layers: rows stay orthogonal (Chung et al. 2024, RLC)."""

    family = WEIGHTS
    needs = ("model", "optimizers", "chains")

    def __init__(self, strength: float = 1e-3, scale: float = 2.0) -> None:
        super().__init__(strength)
        self.scale = number("scale", scale, 0.0)
        self.hidden: set[str] = set()

    def accepts(self, agent: Agent) -> None:
        """Hidden layers there must be."""
        refuse_shallow("parseval", agent)

    def find_parameters(self) -> None:
        """All but the last layer of each chain."""
        super().find_parameters()
        self.hidden = hidden_weights(self.agent)

    def slope(self, name: str, value: Tensor) -> Tensor | None:
        """4 (W W^T - scale I) W."""
        if name not in self.hidden:
            return None
        rows = value.flatten(1)
        return (4 * self._excess(rows) @ rows).view_as(value)

    def value(self, name: str, value: Tensor) -> Tensor | None:
        """The squared norm of the excess."""
        return self._excess(value.flatten(1)).square().sum() if name in self.hidden else None

    def _excess(self, rows: Tensor) -> Tensor:
        return rows @ rows.T - self.scale * torch.eye(len(rows), dtype=rows.dtype, device=rows.device)


class Limit(Method):
    """Something that weights are put back into after every step: subclasses write `put_back(name, parameter)`."""

    def accepts(self, agent: Agent) -> None:
        """Not with an optimizer that measures how far it has gone."""
        refuse_distance("a limit on weights", agent)

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Put back what has moved."""
        moved = 0.0
        for name, parameter in self.owned(optimizer).items():
            if parameter.grad is not None:
                moved += self.put_back(name, parameter)
        self.count("moved", moved)
        self.count("steps")

    def put_back(self, name: str, parameter: nn.Parameter) -> float:
        """Put a parameter back, and say how many of its numbers (or of its layers) had to move."""
        raise NotImplementedError


class SpectralNorm(Limit):
    """Hidden weights divided by their largest singular value after every step (Miyato et al. 2018), from the first on.

    The weights themselves are divided; the original trains others and divides them on the way, so gradients differ.
    """

    family = WEIGHTS
    needs = ("model", "optimizers", "chains")
    memory: ClassVar[tuple[str, ...]] = ("directions",)

    def __init__(self) -> None:
        super().__init__()
        self.directions: dict[str, Tensor] = {}

    def accepts(self, agent: Agent) -> None:
        """Hidden layers there must be."""
        super().accepts(agent)
        refuse_shallow("spectral_norm", agent)

    def find_parameters(self) -> None:
        """New ones are divided at once."""
        super().find_parameters()
        for name in sorted(hidden_weights(self.agent) - set(self.directions)):
            self.directions[name] = first_direction(self.parameters[name].detach(), self.generator)

    def enter(self, visit: Any) -> None:
        """The walk begins with weights that are in their limits."""
        super().enter(visit)
        with torch.no_grad():
            for name in self.directions.keys() & self.parameters.keys():
                self.put_back(name, self.parameters[name])

    def put_back(self, name: str, parameter: nn.Parameter) -> float:
        """One step of power iteration, and the division."""
        if name not in self.directions:
            return 0.0
        rows = parameter.flatten(1)
        self.directions[name] = _power(rows, self.directions[name])
        parameter.div_((rows @ self.directions[name]).norm() + 1e-12)
        return 1.0


class WeightClip(Limit):
    """Weights and biases clamped to +-kappa / sqrt(fan-in) after every step (Elsayed et al. 2024)."""

    family = WEIGHTS

    def __init__(self, kappa: float = 2.0) -> None:
        super().__init__()
        self.kappa = number("kappa", kappa, 1e-6)

    def put_back(self, name: str, parameter: nn.Parameter) -> float:
        """Clamp the parameters of linear and convolution layers."""
        owner = self.agent.model.get_submodule(name.rpartition(".")[0])
        if not weighted(owner):
            return 0.0
        bound = self.kappa / float(owner.weight[0].numel()) ** 0.5
        outside = float((parameter.abs() > bound).sum())
        parameter.clamp_(-bound, bound)
        return outside


class NormalizeAndProject(Limit):
    """Hidden weights scaled back to the norms they began with after each step (Lyle et al. 2024, arXiv 2407.01800).

    Goes with layer norm, which is a network argument: `agent: {net: {norm: layer}}`. A layer that a norm follows says
    the same at any scale, which is why its scale may be fixed. What answers has no norm after it, so its scale is
    learned: PPO's policy begins with a hundredth of the usual one, and pinned there could not come to prefer any
    action. Gains and offsets of norms are learned freely.
    """

    family = WEIGHTS
    needs = ("model", "optimizers", "chains")
    memory: ClassVar[tuple[str, ...]] = ("norms",)

    def __init__(self) -> None:
        super().__init__()
        self.norms: dict[str, float] = {}

    def accepts(self, agent: Agent) -> None:
        """Without norm layers the function would change with its weights' scale."""
        super().accepts(agent)
        if not any(isinstance(part, NORMS) for part in agent.model.modules()):  # type: ignore[attr-defined]
            raise CrlError(
                "normalize_and_project needs a network with norm layers: --set agent.net.norm=layer puts them in"
            )
        if chains_of(agent) is None:
            raise CrlError(
                "normalize_and_project leaves the last layer alone: the network's `chains` must say which it is"
            )

    def find_parameters(self) -> None:
        """New ones keep the norm that they come with."""
        super().find_parameters()
        for name, parameter in self.parameters.items():
            if parameter.ndim > 1 and not name.startswith(self.answering()):
                self.norms.setdefault(name, float(parameter.detach().norm()))

    def answering(self) -> tuple[str, ...]:
        """How the names of the last layers' parameters begin."""
        return tuple(f"{made[-1]}." for made in layers_of(self.agent))

    def put_back(self, name: str, parameter: nn.Parameter) -> float:
        """Scale."""
        if name not in self.norms:
            return 0.0
        parameter.mul_(self.norms[name] / (parameter.norm() + 1e-12))
        return 1.0


def hidden_weights(agent: Any) -> set[str]:
    """The names of the weights of all but the last layer of each chain."""
    part = agent.model.get_submodule
    return {f"{name}.weight" for made in layers_of(agent) for name in made[:-1] if weighted(part(name))}


def layers_of(agent: Any) -> list[list[str]]:
    """The layers of weights of each chain, by name and in order; the last of them answers."""
    part = agent.model.get_submodule
    made = [[n for n in chain if any(map(weighted, part(n).modules()))] for chain in chains_of(agent) or []]
    return [names for names in made if names]


def first_direction(weight: Tensor, generator: torch.Generator) -> Tensor:
    """About the right singular vector of the largest singular value."""
    rows = weight.flatten(1)
    direction = torch.randn(rows.shape[1], generator=generator).to(rows)
    for _ in range(10):
        direction = _power(rows, direction)
    return direction


def _power(rows: Tensor, direction: Tensor) -> Tensor:
    """One step of power iteration on W^T W."""
    found: Tensor = rows.T @ (rows @ direction)
    one: Tensor = found / (found.norm() + 1e-12)
    return one
