"""Whether an agent is worth saving: its weights are finite."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from crl.core import Agent, State


def broken(agent: Agent, state: State) -> str:
    """The first weight of an agent that is not finite: of its modules, or of its state where it has none."""
    parts = {"model": getattr(agent, "model", None), **getattr(agent, "__dict__", {})}
    modules = {name: part for name, part in parts.items() if isinstance(part, nn.Module)}
    weights = [(f"{name}.{key}", w) for name, part in modules.items() for key, w in part.named_parameters()]
    if weights:
        return next((name for name, weight in weights if not torch.isfinite(weight).all()), "")
    return next((name for name, value in _tensors(state, "agent") if torch.isnan(value).any()), "")


def _tensors(state: Any, place: str) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a state, with its place."""
    if isinstance(state, Tensor):
        yield place, state
    parts = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, list | tuple) else ()
    for key, part in parts:
        yield from _tensors(part, f"{place}.{key}")
