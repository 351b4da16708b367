"""What networks are made of: a first layer for categories, norms, activations that double, and heads."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from gymnasium import spaces
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import nn

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "leaky_relu": nn.LeakyReLU,
}


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
        """One row of ones and zeros for each row of codes."""
        out = torch.zeros(obs.shape[0], self.features_dim, device=obs.device)
        return out.scatter_(1, obs.long() + self.offsets, 1.0)


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
