"""Networks that answer with logits: `NETS[name](shape, classes, **options)` for inputs of a shape."""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from agents.layers import ACTIVATIONS, DOUBLING, INITS, NORMS, Shape
from agents.options import known, located, widths
from crl.core import CrlError


def mlp(
    shape: Sequence[int],
    classes: int,
    *,
    hidden: Sequence[int] = (400, 400),
    activation: str = "relu",
    norm: str = "none",
) -> nn.Sequential:
    """Linear layers with activations between; an image is a vector to it.

    >>> [tuple(layer.weight.shape) for layer in mlp((1, 28, 28), 10, hidden=[400])[::2]]
    [(400, 784), (10, 400)]
    """
    known("agent.net.activation", [activation], {**ACTIVATIONS, **DOUBLING})
    known("agent.net.norm", [norm], NORMS)
    widths = [math.prod(shape), *_widths("hidden", hidden, even=activation in DOUBLING)]
    parts: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        parts += [nn.Linear(inputs, outputs), ACTIVATIONS.get(activation, nn.Identity)()]
    chain, made = nn.Sequential(*parts, nn.Linear(widths[-1], classes)), Shape(norm, DOUBLING.get(activation))
    return made.remake(chain) if made.changes else chain


def conv(
    shape: Sequence[int],
    classes: int,
    *,
    channels: Sequence[int] = (32, 64, 128),
    hidden: Sequence[int] = (128, 128),
    activation: str = "relu",
    norm: str = "none",
) -> nn.Sequential:
    """The network of Continual ImageNet (Dohare et al. 2024): convolutions (5x5, then 3x3) and max pooling, then dense.

    >>> sum(p.numel() for p in conv((3, 32, 32), 2).parameters())
    177218
    """
    inputs, places = _image(shape, "conv"), list(shape[1:])
    act = _activation(activation)
    parts: list[nn.Module] = []
    for i, outputs in enumerate(_widths("channels", channels)):
        size = 5 if i == 0 else 3
        parts += [nn.Conv2d(inputs, outputs, size), *_norm(norm, outputs), act(), nn.MaxPool2d(2)]
        places, inputs = [(side - size + 1) // 2 for side in places], outputs
    if min(places) < 1:
        raise CrlError(
            f"agent.net: {len(channels)} convolutions with pooling leave nothing of a {shape[1]}x{shape[2]} image"
        )
    parts.append(nn.Flatten())
    dense = mlp((inputs * math.prod(places),), classes, hidden=hidden, activation=activation, norm=_dense_norm(norm))
    return nn.Sequential(*parts, *dense)


class ResNet18(nn.Module):
    """The residual network of He et al. 2016 for small images: a 3x3 stem without pooling, four stages of two blocks.

    `dense` puts layers between the pooled features and the answer: [512, 512] as in arXiv 2509.22335.

    >>> ResNet18(width=8)(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """

    def __init__(
        self,
        outputs: int = 10,
        width: int = 64,
        *,
        inputs: int = 3,
        dense: Sequence[int] = (),
        activation: str = "relu",
        norm: str = "batch",
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential(_conv(inputs, width, norm=norm), _activation(activation)())
        widths = [width, width, 2 * width, 4 * width, 8 * width]
        stages = zip(widths, widths[1:], (1, 2, 2, 2), strict=False)
        kind = {"activation": activation, "norm": norm}
        self.blocks = nn.Sequential(
            *(b for i, o, s in stages for b in (Block(i, o, s, **kind), Block(o, o, 1, **kind)))
        )
        if dense:
            *layers, head = mlp((8 * width,), outputs, hidden=dense, activation=activation)
            self.dense, self.head = nn.Sequential(*layers), head
        else:
            self.dense, self.head = nn.Sequential(), nn.Linear(8 * width, outputs)

    @property
    def chains(self) -> list[list[str]]:
        """The dense layers: methods on units act on these."""
        return [[*(f"dense.{i}" for i in range(len(self.dense))), "head"]]

    def forward(self, images: Tensor) -> Tensor:
        """Logits of images, (batch, channels, height, width)."""
        logits: Tensor = self.head(self.dense(self.blocks(self.stem(images)).mean((2, 3))))
        return logits


class Block(nn.Module):
    """Two convolutions and a way around them."""

    def __init__(self, inputs: int, outputs: int, stride: int, activation: str = "relu", norm: str = "batch") -> None:
        super().__init__()
        act = _activation(activation)
        self.body = nn.Sequential(_conv(inputs, outputs, stride, norm=norm), act(), _conv(outputs, outputs, norm=norm))
        same = inputs == outputs and stride == 1
        self.around = nn.Identity() if same else _conv(inputs, outputs, stride, 1, norm=norm)
        self.relu = act()

    def forward(self, x: Tensor) -> Tensor:
        """Both ways, added."""
        out: Tensor = self.relu(self.body(x) + self.around(x))
        return out


class ConvGRU(nn.Module):
    """A convolutional gated recurrent network that reads an image band by band, from the top (and from the bottom).

    The layout is ours, since arXiv 2603.04580 gives none: an image of height H is a sequence of `bands` frames of
    H / bands rows. A cell with 3x3 convolutions keeps a state of `hidden` channels of a frame's size (Ballas et al.
    2016): z, r = sigmoid(conv[x, h]), n = tanh(conv[x, r h]), h <- (1 - z) h + z n. The last state is pooled to 2 x 4
    places, and a dense layer of `dense` units precedes the answer. With `both` a second cell reads from the bottom up,
    and both last states are pooled.

    >>> ConvGRU((1, 28, 28), 10, hidden=4)(torch.zeros(2, 1, 28, 28)).shape
    torch.Size([2, 10])
    """

    def __init__(
        self,
        shape: Sequence[int],
        classes: int,
        *,
        hidden: int = 16,
        bands: int = 4,
        dense: int = 64,
        both: bool = False,
        activation: str = "relu",
    ) -> None:
        super().__init__()
        channels = _image(shape, "convgru")
        for name, value in (("hidden", hidden), ("bands", bands), ("dense", dense)):
            _widths(name, [value])
        if shape[1] % bands:
            raise CrlError(f"agent.net.bands: an image of {shape[1]} rows is not cut into {bands} equal bands")
        self.bands, self.hidden = bands, hidden
        self.cells = nn.ModuleList(Cell(channels, hidden) for _ in range(1 + both))
        self.pool = nn.AdaptiveAvgPool2d((2, 4))
        self.dense = nn.Sequential(nn.Linear(8 * hidden * (1 + both), dense), _activation(activation)())
        self.head = nn.Linear(dense, classes)

    @property
    def chains(self) -> list[list[str]]:
        """The dense layers: methods on units act on these."""
        return [["dense.0", "dense.1", "head"]]

    def forward(self, images: Tensor) -> Tensor:
        """Logits of images, (batch, channels, height, width)."""
        frames = images.chunk(self.bands, 2)
        seen = []
        for cell, order in zip(self.cells, (frames, frames[::-1]), strict=False):
            state = images.new_zeros(len(images), self.hidden, *frames[0].shape[2:])
            for frame in order:
                state = cell(frame, state)
            seen.append(self.pool(state).flatten(1))
        logits: Tensor = self.head(self.dense(torch.cat(seen, 1)))
        return logits


class Cell(nn.Module):
    """One step of a convolutional gated recurrent unit."""

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.gates = nn.Conv2d(inputs + hidden, 2 * hidden, 3, padding=1)
        self.new = nn.Conv2d(inputs + hidden, hidden, 3, padding=1)

    def forward(self, frame: Tensor, state: Tensor) -> Tensor:
        """The next state."""
        update, reset = torch.sigmoid(self.gates(torch.cat([frame, state], 1))).chunk(2, 1)
        new = torch.tanh(self.new(torch.cat([frame, reset * state], 1)))
        out: Tensor = state + update * (new - state)
        return out


def _convgru(
    shape: Sequence[int], classes: int, *, hidden: int = 16, bands: int = 4, dense: int = 64, activation: str = "relu"
) -> nn.Module:
    """A convolutional gated recurrent network that reads an image band by band, from the top."""
    return ConvGRU(shape, classes, hidden=hidden, bands=bands, dense=dense, activation=activation)


def _resnet18(
    shape: Sequence[int],
    classes: int,
    *,
    width: int = 64,
    dense: Sequence[int] = (),
    activation: str = "relu",
    norm: str = "batch",
) -> nn.Module:
    """ResNet-18 for small images: a 3x3 stem, four stages; `dense: [512, 512]` as in arXiv 2509.22335."""
    width, dense = _widths("width", [width])[0], _widths("dense", dense)
    return ResNet18(classes, width, inputs=_image(shape, "resnet18"), dense=dense, activation=activation, norm=norm)


def _biconvgru(
    shape: Sequence[int], classes: int, *, hidden: int = 16, bands: int = 4, dense: int = 64, activation: str = "relu"
) -> nn.Module:
    """A convolutional gated recurrent network that reads the bands of an image from both ends."""
    return ConvGRU(shape, classes, hidden=hidden, bands=bands, dense=dense, both=True, activation=activation)


NETS: dict[str, Callable[..., nn.Module]] = {
    "mlp": mlp,
    "conv": conv,
    "resnet18": _resnet18,
    "convgru": _convgru,
    "biconvgru": _biconvgru,
}


def build(net: Mapping[str, Any], shape: Sequence[int], classes: int) -> nn.Module:
    """The network that `agent.net` asks for: a short name, or the import path of something called like those here."""
    if not isinstance(net, Mapping):
        raise CrlError(f"agent.net: expected a mapping such as {{use: conv}}, not {net!r}")
    options = dict(net)
    use, init = options.pop("use", "mlp"), options.pop("init", "torch")
    known("agent.net.init", [init], ["torch", *INITS])
    make = NETS[use] if use in NETS else located(use, "agent.net.use", NETS)
    free = [n for n, p in inspect.signature(make).parameters.items() if p.kind is p.KEYWORD_ONLY]
    if use in NETS:
        known("agent.net", options, free)
    try:
        model = make(tuple(shape), classes, **options)
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        large = "alloc" in str(error) or "memory" in str(error)
        why = "they are too large for this machine's memory" if large else str(error).splitlines()[0]
        raise CrlError(f"agent.net: {use} refuses these settings: {why}") from None
    if not isinstance(model, nn.Module):
        raise CrlError(f"agent.net.use: {use} gives no torch module")
    if init in INITS:
        model.apply(INITS[init])
    return model


def _widths(name: str, values: Any, even: bool = False) -> list[int]:
    given = widths(f"agent.net.{name}", values if isinstance(values, list | tuple) else [values])
    odd = [value for value in given if value % 2] if even else []
    if odd:
        raise CrlError(f"agent.net.{name}: {odd[0]} cannot be halved, as its activation needs")
    return given


def _image(shape: Sequence[int], name: str) -> int:
    """The channels of an image."""
    if len(shape) != 3:
        raise CrlError(
            f"agent.net.use: {name} reads images (channels, height, width), and what is seen is {tuple(shape)}"
        )
    return int(shape[0])


def _activation(name: str) -> type[nn.Module]:
    known("agent.net.activation", [name], ACTIVATIONS)
    return ACTIVATIONS[name]


def _dense_norm(norm: str) -> str:
    return norm if norm in NORMS else "none"


def _norm(name: str, channels: int) -> list[nn.Module]:
    """A norm after a convolution: over the batch, or (`layer`) over all of an image's channels and places."""
    known("agent.net.norm", [name], ("none", "batch", "layer"))
    if name == "none":
        return []
    return [nn.BatchNorm2d(channels) if name == "batch" else nn.GroupNorm(1, channels)]


def _conv(inputs: int, outputs: int, stride: int = 1, size: int = 3, norm: str = "batch") -> nn.Sequential:
    layer = nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=norm == "none")
    return nn.Sequential(layer, *_norm(norm, outputs))
