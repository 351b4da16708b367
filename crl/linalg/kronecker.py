"""Kronecker factors of each layer's Gauss-Newton block: second moments A of its inputs, G of its backward signal.

KFAC (Martens and Grosse 2015; convolutions: Grosse and Martens 2016): the block is about A x G, so its eigenvalues are
the products of theirs, and rank(A x G) = rank(A) rank(G). Inputs have a 1 appended where the layer has a bias. The
signal is that of the loss's own L (or the problem's metric), column by column of its root, so nothing is sampled.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from crl.linalg.operators import output_weight, root_of
from crl.linalg.problem import CurvatureError, Problem, steady

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d)


@dataclass(frozen=True)
class Factors:
    """A layer's A (inputs x inputs, with the bias's 1) and G (outputs x outputs)."""

    inputs: Tensor
    signals: Tensor

    def eigenvalues(self) -> Tensor:
        """Those of the Kronecker product: every product of an eigenvalue of A and one of G, rising."""
        a, g = (torch.linalg.eigvalsh(part.double()) for part in (self.inputs, self.signals))
        return torch.outer(a, g).flatten().sort().values


def kronecker(problem: Problem, weight: str = "loss") -> Mapping[str, Factors]:
    """The factors of every linear and convolutional layer that holds some of the problem's parameters."""
    chosen = {id(parameter) for parameter in problem.parameters.values()}
    layers = {
        name: part
        for name, part in problem.module.named_modules()
        if isinstance(part, LAYERS) and id(part.weight) in chosen
    }
    if not layers:
        raise CurvatureError("there is no linear or convolutional layer here, which Kronecker factors are defined for")
    sums: dict[str, list[Any]] = {}
    for batch, share in problem.chunks():
        seen: dict[str, tuple[Tensor, Tensor]] = {}
        handles = [part.register_forward_hook(_catch(seen, name)) for name, part in layers.items()]
        try:
            with torch.enable_grad(), steady(problem.module):
                outputs = problem.outputs(batch)
                outputs = outputs.reshape(len(outputs), -1)
        finally:
            for handle in handles:
                handle.remove()
        root = root_of(output_weight(problem, outputs, batch, weight) * len(outputs), weight)
        reached = {name: pair for name, pair in seen.items() if pair[1].requires_grad}
        moments = {name: torch.zeros((), dtype=outputs.dtype) for name in reached}
        for column in range(root.shape[2]):
            found = torch.autograd.grad(
                outputs, [z for _, z in reached.values()], root[:, :, column], retain_graph=True, allow_unused=True
            )
            for name, signal in zip(reached, found, strict=True):
                if signal is not None:
                    moments[name] = moments[name] + _moment(_places(signal, layers[name])) / signal.shape[0]
        for name, (inputs, _) in reached.items():
            patches = _patches(inputs, layers[name])
            if layers[name].bias is not None:
                patches = torch.cat([patches, patches.new_ones(*patches.shape[:2], 1)], 2)
            factor, signal = _moment(patches) / len(inputs), moments[name] / patches.shape[1]
            total = sums.setdefault(name, [0, 0])
            total[0], total[1] = total[0] + share * factor, total[1] + share * signal
    return {name: Factors(*pair) for name, pair in sums.items() if getattr(pair[1], "ndim", 0) == 2}


def _catch(seen: dict[str, tuple[Tensor, Tensor]], name: str) -> Any:
    def hook(part: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        seen[name] = (inputs[0].detach().clone(), output)
        return output.clone()  # an activation in place would otherwise change what was seen

    return hook


def _patches(inputs: Tensor, layer: nn.Module) -> Tensor:
    """What each place of the output saw: (samples, places, inputs)."""
    if isinstance(layer, nn.Linear):
        return inputs.reshape(len(inputs), -1, inputs.shape[-1])
    if layer.groups != 1 or layer.padding_mode != "zeros":  # type: ignore[union-attr]
        raise CurvatureError(
            "Kronecker factors are not defined here for a convolution in groups or without zero padding"
        )
    if isinstance(layer, nn.Conv1d):
        inputs, size = inputs[:, :, None], (1, *layer.kernel_size)
        around: Any = {"dilation": (1, *layer.dilation), "stride": (1, *layer.stride)}
        padding = (0, *layer.padding) if not isinstance(layer.padding, str) else None
    else:
        assert isinstance(layer, nn.Conv2d)
        size, around = layer.kernel_size, {"dilation": layer.dilation, "stride": layer.stride}  # type: ignore[assignment]
        padding = layer.padding if not isinstance(layer.padding, str) else None  # type: ignore[assignment]
    if padding is None:
        raise CurvatureError("Kronecker factors need a convolution whose padding is given in numbers")
    return nn.functional.unfold(inputs, size, padding=padding, **around).transpose(1, 2)


def _places(signal: Tensor, layer: nn.Module) -> Tensor:
    """(samples, places, outputs)."""
    if isinstance(layer, nn.Linear):
        return signal.reshape(len(signal), -1, signal.shape[-1])
    return signal.flatten(2).transpose(1, 2)


def _moment(values: Tensor) -> Tensor:
    """The sum over samples and places of outer products."""
    wide = values.reshape(-1, values.shape[-1])
    return wide.T @ wide
