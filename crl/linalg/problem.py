"""A loss on a batch, in the two halves that curvature needs: outputs of the network, and the objective on them."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

Batch = Mapping[str, Tensor] | Sequence[Tensor]


class CurvatureError(ValueError):
    """Curvature that cannot be had, in one sentence that says why."""


@dataclass(frozen=True)
class Problem:
    """The mean loss `objective(outputs(batch), batch)` as a function of some parameters of a module.

    Tensors of the batch agree in their first axis, the samples. The outputs are (samples, numbers); the objective is a
    mean over samples of a function of each sample's own outputs. `metric(outputs, batch)` is (samples, numbers,
    numbers): how much outputs matter where the objective's own second derivative is not positive (the Fisher
    information of a policy, say). `chunk` samples are taken at once; with batch norm in training mode it is part of
    the definition of the loss.
    """

    module: nn.Module
    outputs: Callable[[Any], Tensor]
    objective: Callable[[Tensor, Any], Tensor]
    batch: Batch
    parameters: Mapping[str, nn.Parameter]
    metric: Callable[[Tensor, Any], Tensor] | None = None
    chunk: int | None = None

    @property
    def samples(self) -> int:
        """Rows of the batch."""
        values = list(self.batch.values()) if isinstance(self.batch, Mapping) else list(self.batch)
        return len(values[0])

    @property
    def size(self) -> int:
        """How many numbers the parameters hold."""
        return sum(parameter.numel() for parameter in self.parameters.values())

    @property
    def like(self) -> Tensor:
        """An empty tensor of the parameters' kind and place."""
        first = next(iter(self.parameters.values()))
        return first.new_empty(0)

    def of(self, parameters: Mapping[str, nn.Parameter]) -> Problem:
        """The same loss as a function of other parameters: one network's, or one layer's."""
        return replace(self, parameters=dict(parameters))

    def chunks(self) -> Iterator[tuple[Batch, float]]:
        """Parts of the batch, each with its share of the samples."""
        total = self.samples
        step = self.chunk or total
        for start in range(0, total, step):
            yield rows(self.batch, start, start + step), min(step, total - start) / total

    def loss(self) -> float:
        """The objective's value."""
        with torch.no_grad(), steady(self.module):
            return sum(float(self.objective(self.outputs(batch), batch)) * share for batch, share in self.chunks())

    def gradient(self) -> Tensor:
        """The gradient, flat; zero where the objective does not touch a parameter."""
        total = torch.zeros(self.size, dtype=self.like.dtype, device=self.like.device)
        with torch.enable_grad(), steady(self.module):
            for batch, share in self.chunks():
                loss = self.objective(self.outputs(batch), batch)
                found = torch.autograd.grad(loss, list(self.parameters.values()), allow_unused=True)
                total += share * flat(found, self.parameters)
        return total

    def check(self) -> None:
        """Refuse what curvature cannot be taken of: a loss that is not finite, or changes from call to call."""
        if not self.parameters:
            raise CurvatureError("there are no parameters to take the curvature of")
        first, second = self.loss(), self.loss()
        if not math.isfinite(first):
            raise CurvatureError(f"the loss is not finite ({first})")
        if first != second:
            raise CurvatureError(
                f"two evaluations of the loss differ ({first:.9g} and {second:.9g}): put dropout and sampling aside"
            )
        with torch.enable_grad(), steady(self.module):
            batch, _ = next(self.chunks())
            loss = self.objective(self.outputs(batch), batch)
            found = torch.autograd.grad(loss, list(self.parameters.values()), allow_unused=True)
        if self.chunk is not None and self.chunk < self.samples:
            self._check_mean()
        untouched = [name for name, part in zip(self.parameters, found, strict=True) if part is None]
        if untouched:
            more = f" and {len(untouched) - 1} more" if len(untouched) > 1 else ""
            raise CurvatureError(
                f"the loss does not touch parameter {untouched[0]!r}{more}: leave it out of the parameters looked at"
            )
        if not all(torch.isfinite(part).all() for part in found):
            raise CurvatureError("the gradient is not finite")

    def _check_mean(self) -> None:
        """A sum over samples would weigh chunks wrongly: twice the same samples must have the same loss."""
        few = rows(self.batch, 0, min(4, self.samples))
        twice: Batch
        if isinstance(few, Mapping):
            twice = {name: torch.cat([value, value]) for name, value in few.items()}
        else:
            twice = [torch.cat([value, value]) for value in few]
        with torch.no_grad(), steady(self.module):
            once, again = (float(self.objective(self.outputs(b), b)) for b in (few, twice))
        if abs(once - again) > 1e-3 * abs(once) + 1e-12:
            raise CurvatureError("the objective is not a mean over samples, so it cannot be taken in chunks")


def rows(batch: Batch, start: int, stop: int) -> Batch:
    """Samples `start` to `stop` of a batch."""
    if isinstance(batch, Mapping):
        return {name: value[start:stop] for name, value in batch.items()}
    return tuple(value[start:stop] for value in batch)


def flat(parts: Sequence[Tensor | None], parameters: Mapping[str, nn.Parameter]) -> Tensor:
    """One vector of many tensors; what is missing is zero."""
    pairs = zip(parts, parameters.values(), strict=True)
    return torch.cat([(p.new_zeros(p.numel()) if part is None else part.reshape(-1)) for part, p in pairs])


def unflat(vector: Tensor, parameters: Mapping[str, nn.Parameter]) -> list[Tensor]:
    """The inverse of `flat`, as views."""
    values = list(parameters.values())
    return [part.view_as(p) for part, p in zip(torch.split(vector, [p.numel() for p in values]), values, strict=True)]


@contextlib.contextmanager
def steady(module: nn.Module) -> Iterator[None]:
    """Evaluating leaves no trace: batch norm moves clones of its statistics; attention has derivatives."""
    held = [(part._buffers, name, value) for part in module.modules() for name, value in part._buffers.items()]
    for buffers, name, value in held:
        buffers[name] = value.clone() if value is not None else None
    try:
        with sdpa_kernel(SDPBackend.MATH):  # the other kernels of attention have no second derivative
            yield
    finally:
        for buffers, name, value in held:
            buffers[name] = value
