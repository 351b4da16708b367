"""What networks are made of: a first layer for categories, norms, activations that double, and heads."""

from __future__ import annotations

import copy
import functools
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import nn
from torch.utils._pytree import tree_map_only

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "leaky_relu": nn.LeakyReLU,
}


MANY = 128  # rows, from which on it pays to look for equal ones


class Ones(torch.Tensor):
    """One-hot rows as the places of their ones; a linear layer computes each different row once, of the columns in use.

    Grid worlds look the same again and again: of 2,048 rows some hundreds differ, and half of the columns are never
    one. The answer and its derivatives, of any order, are those of the rows written out, but for rounding. Whatever
    else reads them has them written out.

    >>> rows = Ones(torch.tensor([[0, 3], [1, 3], [0, 3]]), 5)
    >>> rows.sum(0).tolist(), len(rows.different)
    ([2.0, 1.0, 0.0, 3.0, 0.0], 2)
    """

    ones: torch.Tensor
    width: int

    @staticmethod
    def __new__(cls, ones: torch.Tensor, width: int) -> Ones:
        made: Ones = torch.Tensor._make_wrapper_subclass(cls, (len(ones), width), device=ones.device)  # type: ignore[attr-defined]
        made.ones, made.width = ones, width
        return made

    def __init__(self, ones: torch.Tensor, width: int) -> None:
        super().__init__()

    @functools.cached_property
    def written(self) -> torch.Tensor:
        """What everything but a linear layer sees."""
        return written_out(self.ones, self.width)

    @functools.cached_property
    def compact(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(the different rows in the columns that are in use, these columns, which of the rows each row is)."""
        # Two rows with one sum modulo 2**64 are equal, but for a chance below 2**-55 over the weights.
        sums = (self.ones * _weights(self.ones.shape[1], self.ones.device)).sum(1)
        _, which = torch.unique(sums, return_inverse=True)
        example = torch.empty(int(which.max()) + 1, dtype=torch.long, device=which.device)
        example[which] = torch.arange(len(which), device=which.device)
        ones = self.ones[example]
        used = torch.zeros(self.width, dtype=torch.bool, device=ones.device)
        used[ones.flatten()] = True
        columns = used.nonzero()[:, 0]
        place = used.cumsum(0) - 1
        return written_out(place[ones], len(columns)), columns, which

    @property
    def different(self) -> torch.Tensor:
        """The different rows, in the columns that are in use."""
        return self.compact[0]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.linear and isinstance(args[0], Ones):
            rows, columns, which = args[0].compact
            weight, *bias = args[1:]
            return func(rows, weight.index_select(1, columns), *bias, **(kwargs or {})).index_select(0, which)
        args, kwargs = tree_map_only(Ones, lambda rows: rows.written, (args, kwargs or {}))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        args, kwargs = tree_map_only(Ones, lambda rows: rows.written, (args, kwargs or {}))
        return func(*args, **kwargs)


@functools.lru_cache(8)
def _weights(count: int, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(-(2**63), 2**63, count)).to(device)


def written_out(ones: torch.Tensor, width: int) -> torch.Tensor:
    """Rows of ones and zeros."""
    return torch.zeros(len(ones), width, device=ones.device).scatter_(1, ones, 1.0)


class OneHot(BaseFeaturesExtractor):
    """Categories, stored as small integers, made one-hot on the way in: (batch, n) to (batch, sum of kinds).

    >>> layer = OneHot(spaces.Box(0, 2, (2,)), kinds=[2, 3])
    >>> layer(torch.tensor([[1.0, 2.0]])).tolist()
    [[0.0, 1.0, 0.0, 0.0, 1.0]]
    """

    offsets: torch.Tensor

    def __init__(self, observation_space: spaces.Space[Any], kinds: list[int]) -> None:
        super().__init__(observation_space, features_dim=sum(kinds))
        first = torch.tensor([0, *kinds[:-1]]).cumsum(0)
        self.register_buffer("offsets", first, persistent=False)

    def forward(self, obs: torch.Tensor) -> torch.Tensor:
        """One row of ones and zeros for each row of codes; many rows are only written out where need be."""
        ones = obs.long() + self.offsets
        if len(ones) >= MANY and (self.training or not torch.is_grad_enabled()):
            return Ones(ones, self.features_dim)
        return written_out(ones, self.features_dim)


def kaiming(part: nn.Module) -> None:
    """Weights uniform with variance 2 / inputs, biases zero (He et al. 2015)."""
    _uniform(part, "relu")


def lecun(part: nn.Module) -> None:
    """Weights uniform with variance 1 / inputs, biases zero (LeCun et al. 1998)."""
    _uniform(part, "linear")


def _uniform(part: nn.Module, nonlinearity: Literal["relu", "linear"]) -> None:
    if isinstance(part, nn.Linear | nn.Conv2d):
        nn.init.kaiming_uniform_(part.weight, nonlinearity=nonlinearity)
        if part.bias is not None:
            nn.init.zeros_(part.bias)


INITS: dict[str, Callable[[nn.Module], None]] = {"kaiming": kaiming, "lecun": lecun}


class CReLU(nn.Module):
    """[relu(x), relu(-x)]: twice as many numbers, half of them never dead (Abbas et al. 2023, arXiv 2303.07507)."""

    doubles = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Both halves side by side."""
        return torch.cat([torch.relu(x), torch.relu(-x)], 1)


class Fourier(nn.Module):
    """[sin x, cos x]: deep Fourier features (Lewandowski et al. 2024, arXiv 2410.20634)."""

    doubles = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Both halves side by side."""
        return torch.cat([torch.sin(x), torch.cos(x)], 1)


DOUBLING: dict[str, type[nn.Module]] = {"crelu": CReLU, "fourier": Fourier}
NORMS = ("none", "layer")


@dataclass(frozen=True)
class Shape:
    """What a chain of linear layers may have beside them: layer norm before, and activations that double.

    Where an activation doubles, its layer is half as wide, so that what the next one reads stays as wide.
    """

    norm: str = "none"
    activation: type[nn.Module] | None = None

    @staticmethod
    def of(net: Mapping[str, Any]) -> Shape:
        """The shape that `net:` asks for."""
        return Shape(net.get("norm", "none"), DOUBLING.get(net.get("activation", "")))

    @property
    def changes(self) -> bool:
        """Whether a plain chain is anything else."""
        return self != Shape()

    def remake(self, chain: nn.Sequential) -> nn.Sequential:
        """The chain in this shape; its layers keep their first weights (or the first half of them)."""
        parts: list[nn.Module] = []
        for part, following in zip(chain, [*[*chain][1:], None], strict=True):
            hidden = isinstance(part, nn.Linear) and following is not None
            if hidden and self.activation is not None:
                parts.append(_half(part))  # type: ignore[arg-type]
            else:
                last = not isinstance(part, nn.Linear)
                parts.append(self.activation() if last and self.activation is not None else part)
            if hidden and self.norm == "layer":
                parts.append(nn.LayerNorm(parts[-1].out_features))  # type: ignore[arg-type]
        return nn.Sequential(*parts)


def _half(layer: nn.Linear) -> nn.Linear:
    """The first half of a layer's units."""
    half = nn.Linear(layer.in_features, layer.out_features // 2, bias=layer.bias is not None)
    with torch.no_grad():
        half.weight.copy_(layer.weight[: half.out_features])
        if layer.bias is not None:
            half.bias.copy_(layer.bias[: half.out_features])
    return half


def bare_copy(module: nn.Module) -> Any:
    """A copy without the hooks of whoever watches the original."""
    kept = [(part, part._forward_hooks, part._forward_pre_hooks) for part in module.modules()]
    for part, _, _ in kept:
        part._forward_hooks, part._forward_pre_hooks = OrderedDict(), OrderedDict()
    try:
        return copy.deepcopy(module)
    finally:
        for part, after, before in kept:
            part._forward_hooks, part._forward_pre_hooks = after, before


class Heads(nn.Module):
    """An output layer for each task, of which one answers. A new one starts as the first one once did."""

    def __init__(self, first: nn.Module) -> None:
        super().__init__()
        self.heads = nn.ModuleList([first])
        self.current = 0
        self._pristine = [copy.deepcopy(first)]  # in a list, so that it is not a submodule

    def grow(self) -> list[nn.Parameter]:
        """Add a head; its parameters are the optimizer's to be told of."""
        self.heads.append(copy.deepcopy(self._pristine[0]))
        return list(self.heads[-1].parameters())

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """The answer of the current head."""
        answer: torch.Tensor = self.heads[self.current](features)
        return answer
