"""Networks: their shapes and sizes, what they compute, and that curvature can be had of each."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from agents import nets
from agents.layers import CReLU
from crl.linalg import Hessian, Problem
from tests.small_data import refused

pytestmark = pytest.mark.usefixtures("one_thread")

RGB, GREY = (3, 32, 32), (1, 28, 28)


def built(use: str, shape: tuple[int, ...] = RGB, classes: int = 5, **options: Any) -> Any:
    torch.manual_seed(0)
    return nets.build({"use": use, **options}, shape, classes)


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


SMALL: dict[str, dict[str, Any]] = {
    "mlp": {"hidden": [6, 4]},
    "conv": {"channels": [3, 4], "hidden": [5]},
    "resnet18": {"width": 2},
    "convgru": {"hidden": 2, "dense": 5},
    "biconvgru": {"hidden": 2, "dense": 5},
}


@pytest.mark.parametrize("shape", [RGB, GREY], ids=["rgb", "grey"])
@pytest.mark.parametrize("use", sorted(nets.NETS))
def test_every_net_answers_with_logits(use: str, shape: tuple[int, ...]) -> None:
    assert sorted(SMALL) == sorted(nets.NETS)
    model = built(use, shape, 7, **SMALL[use])
    x = torch.randn(3, *shape)
    x = x.flatten(1) if use == "mlp" else x
    logits = model(x)
    assert logits.shape == (3, 7) and logits.isfinite().all() and logits.std() > 0
    again = built(use, shape, 7, **SMALL[use])
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True)), "seeded"


# Sizes.


def test_the_network_of_continual_imagenet() -> None:
    """Dohare et al. 2024: convolutions of 32, 64, 128 channels (5x5, 3x3, 3x3), pooled, two dense layers of 128."""
    places = (((32 - 4) // 2 - 2) // 2 - 2) // 2  # 32 -> 28 -> 14 -> 12 -> 6 -> 4 -> 2
    convolutions = 32 * (3 * 25 + 1) + 64 * (32 * 9 + 1) + 128 * (64 * 9 + 1)
    dense = 128 * (128 * places**2 + 1) + 128 * (128 + 1) + 2 * (128 + 1)
    model = built("conv", RGB, 2)
    assert places == 2 and count(model) == convolutions + dense == 177_218
    kinds = [type(part).__name__ for part in model]
    assert kinds == [*["Conv2d", "ReLU", "MaxPool2d"] * 3, "Flatten", *["Linear", "ReLU"] * 2, "Linear"]


def test_resnet18_is_as_large_as_it_should_be() -> None:
    """He et al. 2016 with a 3x3 stem: 3x3 convolutions without biases, two numbers a channel of each batch norm."""
    widths = [64, 128, 256, 512]
    total = 64 * 3 * 9 + 2 * 64
    for inputs, outputs in zip([64, *widths], widths, strict=False):
        first = inputs * outputs * 9 + 3 * outputs * outputs * 9 + 4 * 2 * outputs
        total += first + (inputs * outputs + 2 * outputs if inputs != outputs else 0)
    assert count(built("resnet18", RGB, 10)) == total + 10 * 513 == 11_173_962
    assert count(built("resnet18", GREY, 10)) == total + 10 * 513 - 64 * 2 * 9
    dense = built("resnet18", RGB, 10, dense=[512, 512])
    assert count(dense) == total + 2 * (512 * 513) + 10 * 513
    assert count(built("resnet18", RGB, 10, norm="none")) == total + 10 * 513 - _norms(widths)
    assert count(built("resnet18", RGB, 10, norm="layer")) == total + 10 * 513


def _norms(widths: list[int]) -> int:
    """What goes and comes where norms are left out: their gains and shifts go, and convolutions get a bias."""
    channels = 64 + sum(4 * width for width in widths) + sum(widths[1:])
    return 2 * channels - channels


def test_resnet18_halves_the_image_three_times() -> None:
    model = built("resnet18", RGB, 10, width=2)
    sizes = []
    for block in model.blocks:
        block.register_forward_hook(lambda part, inputs, output: sizes.append(tuple(output.shape[1:])))
    model(torch.randn(2, *RGB))
    assert sizes == [
        (2, 32, 32),
        (2, 32, 32),
        (4, 16, 16),
        (4, 16, 16),
        (8, 8, 8),
        (8, 8, 8),
        (16, 4, 4),
        (16, 4, 4),
    ]
    seen = []
    model.head.register_forward_hook(lambda part, inputs, output: seen.append(inputs[0]))
    model(torch.randn(2, *RGB))
    assert seen[0].shape == (2, 16)


def test_a_block_adds_its_two_ways() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 6, 6)
    for block, around in ((nets.Block(3, 3, 1).eval(), None), (nets.Block(3, 4, 2).eval(), 4)):
        first, _, second = block.body
        inner = second(torch.relu(first(x)))
        way = x if around is None else block.around(x)
        assert torch.equal(block(x), torch.relu(inner + way))
        assert around is None or block.around[0].kernel_size == (1, 1)


@pytest.mark.parametrize(
    ("use", "options", "numbers"),
    [
        ("mlp", {}, 400 * 785 + 400 * 401 + 5 * 401),
        ("mlp", {"hidden": []}, 5 * 785),
        ("mlp", {"hidden": [8], "norm": "layer"}, 8 * 785 + 16 + 5 * 9),
        ("mlp", {"hidden": [8, 6], "activation": "crelu"}, 4 * 785 + 3 * 9 + 5 * 7),
        ("conv", {"channels": [3], "hidden": [], "norm": "batch"}, 3 * 26 + 6 + 5 * (3 * 144 + 1)),
        ("convgru", {"hidden": 3, "dense": 6}, 9 * (4 * 9 + 1) + 6 * (8 * 3 + 1) + 5 * 7),
        ("biconvgru", {"hidden": 3, "dense": 6}, 2 * 9 * (4 * 9 + 1) + 6 * (16 * 3 + 1) + 5 * 7),
    ],
)
def test_sizes_by_hand(use: str, options: dict[str, Any], numbers: int) -> None:
    assert count(built(use, GREY, 5, **options)) == numbers


@pytest.mark.parametrize(("init", "variance"), [("kaiming", 2), ("lecun", 1)])
def test_first_weights(init: str, variance: int) -> None:
    for use, options in (("mlp", {"hidden": [300]}), ("conv", {"channels": [40]})):
        model, plain = built(use, GREY, 5, init=init, **options), built(use, GREY, 5, **options)
        for part, same in zip(model, plain, strict=True):
            if isinstance(part, nn.Linear | nn.Conv2d):
                bound = (3 * variance / part.weight[0].numel()) ** 0.5
                assert 0.95 * bound < part.weight.abs().max() <= bound and not part.bias.any()
                assert same.bias.any() and same.weight.abs().max() < 0.8 * bound


# What methods and monitors act on.


@pytest.mark.parametrize("use", ["resnet18", "convgru", "biconvgru"])
def test_chains_are_the_dense_layers(use: str) -> None:
    options = {**SMALL[use], **({"dense": [6, 4]} if use == "resnet18" else {})}
    model = built(use, GREY, 5, **options)
    (chain,) = model.chains
    parts = [model.get_submodule(name) for name in chain]
    assert chain[-1] == "head" and isinstance(parts[0], nn.Linear)
    handed: list[Tensor] = []
    for part in parts:
        part.register_forward_hook(lambda part, inputs, output: handed.extend((inputs[0], output)))
    logits = model(torch.randn(2, *GREY))
    assert all(a is b for a, b in zip(handed[1:-1:2], handed[2::2], strict=True)) and handed[-1] is logits
    assert [p.out_features for p in parts if isinstance(p, nn.Linear)][-1] == 5
    assert sum(isinstance(p, nn.Linear) for p in model.modules()) == sum(isinstance(p, nn.Linear) for p in parts)


def test_without_dense_layers_a_resnets_chain_is_its_head() -> None:
    assert built("resnet18", RGB, 5, width=2).chains == [["head"]]


@pytest.mark.parametrize("use", sorted(nets.NETS))
def test_gradients_and_curvature_can_be_had(use: str) -> None:
    torch.manual_seed(1)
    options = {k: v if use != "mlp" else [6] for k, v in SMALL[use].items()} | {"activation": "tanh"}
    shape = (2, 16, 16)
    model = nets.build({"use": use, **options}, shape, 3).double().eval()
    x, y = torch.randn(4, *shape, dtype=torch.float64), torch.tensor([0, 1, 2, 1])
    batch = {"obs": x.flatten(1) if use == "mlp" else x, "label": y}
    problem = Problem(
        model,
        lambda batch: model(batch["obs"]),
        lambda outputs, batch: nn.functional.cross_entropy(outputs, batch["label"]),
        batch,
        dict(model.named_parameters()),
    )
    problem.check()
    gradient, product = problem.gradient(), None
    assert all(
        part.abs().sum() > 0 for part in torch.split(gradient, [p.numel() for p in problem.parameters.values()])
    ), "every parameter matters"
    vector = torch.randn(problem.size, dtype=torch.float64)
    vector /= vector.norm()
    product = Hessian(problem) @ vector
    step, before = 1e-5, nn.utils.parameters_to_vector(model.parameters()).detach()
    slopes = []
    for sign in (1, -1):
        nn.utils.vector_to_parameters(before + sign * step * vector, model.parameters())
        slopes.append(problem.gradient())
    numeric = (slopes[0] - slopes[1]) / (2 * step)
    assert torch.allclose(product, numeric, rtol=1e-4, atol=1e-7 * float(product.abs().max()) + 1e-8)
    assert product.norm() > 0


# The recurrent one.


def naive_convolution(x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """3x3, padded with zeros: (channels, height, width) to (outputs, height, width)."""
    _, height, width = x.shape
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1)))
    out = np.zeros((len(weight), height, width))
    for o in range(len(weight)):
        for i in range(height):
            for j in range(width):
                out[o, i, j] = (weight[o] * padded[:, i : i + 3, j : j + 3]).sum() + bias[o]
    return out


def naive_gru(cell: Any, frames: list[np.ndarray], hidden: int) -> np.ndarray:
    """z, r = sigmoid(conv[x, h]), n = tanh(conv[x, r h]), h <- (1 - z) h + z n."""
    gates, new = ([p.detach().numpy() for p in part.parameters()] for part in (cell.gates, cell.new))
    state = np.zeros((hidden, *frames[0].shape[1:]))
    for frame in frames:
        z, r = np.split(1 / (1 + np.exp(-naive_convolution(np.concatenate([frame, state]), *gates))), 2)
        n = np.tanh(naive_convolution(np.concatenate([frame, r * state]), *new))
        state = (1 - z) * state + z * n
    return state


@pytest.mark.parametrize("both", [False, True], ids=["convgru", "biconvgru"])
def test_convgru_is_its_formula(both: bool) -> None:
    shape, hidden = (2, 8, 8), 3
    use = "biconvgru" if both else "convgru"
    model = built(use, shape, 4, hidden=hidden, bands=2, dense=5).double()
    image = torch.randn(1, *shape, dtype=torch.float64)
    frames = [image[0, :, :4].numpy(), image[0, :, 4:].numpy()]
    states = [naive_gru(model.cells[0], frames, hidden)]
    states += [naive_gru(model.cells[1], frames[::-1], hidden)] if both else []
    pooled = [state.reshape(hidden, 2, 2, 4, 2).mean((2, 4)).ravel() for state in states]  # 4 x 8 to 2 x 4
    dense, head = ([p.detach().numpy() for p in part.parameters()] for part in (model.dense[0], model.head))
    units = np.maximum(dense[0] @ np.concatenate(pooled) + dense[1], 0)
    assert np.allclose(model(image).detach().numpy(), head[0] @ units + head[1], atol=1e-12)


def test_biconvgru_reads_from_both_ends() -> None:
    """With its bands in reverse an image gives the one cell what the other had."""
    model = built("biconvgru", GREY, 4, hidden=3)
    read: dict[int, list[Tensor]] = {0: [], 1: []}
    for i, cell in enumerate(model.cells):
        cell.register_forward_hook(lambda part, inputs, output, i=i: read[i].append(inputs[0]))
    image = torch.randn(2, *GREY)
    model(image)
    bands = list(image.chunk(4, 2))
    assert all(torch.equal(a, b) for a, b in zip(read[0], bands, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(read[1], bands[::-1], strict=True))
    upright = {i: list(frames) for i, frames in read.items()}
    read[0].clear(), read[1].clear()
    model(torch.cat(bands[::-1], 2))
    assert all(torch.equal(a, b) for i in (0, 1) for a, b in zip(read[i], upright[1 - i], strict=True))
    one = built("convgru", GREY, 4, hidden=3)
    assert len(one.cells) == 1 and len(model.cells) == 2


# What is refused, and one's own.


@pytest.mark.parametrize(
    ("net", "words"),
    [
        ({"use": "mpl"}, ("agent.net.use", "unknown 'mpl'", "'mlp'")),
        ({"use": "mlp", "hiden": [4]}, ("agent.net", "unknown 'hiden'", "'hidden'")),
        ({"use": "mlp", "hidden": [0]}, ("agent.net.hidden", "0 is not a whole number of at least 1")),
        ({"use": "mlp", "hidden": [5], "activation": "crelu"}, ("agent.net.hidden", "5 cannot be halved")),
        ({"use": "mlp", "activation": "rely"}, ("agent.net.activation", "'relu'")),
        ({"use": "mlp", "norm": "batch"}, ("agent.net.norm", "unknown 'batch'")),
        ({"use": "mlp", "init": "he"}, ("agent.net.init", "kaiming, lecun, torch")),
        ({"use": "conv", "channels": [4, 0]}, ("agent.net.channels", "0 is not a whole number")),
        ({"use": "conv", "channels": [4] * 5}, ("agent.net", "5 convolutions", "28x28")),
        ({"use": "conv", "activation": "crelu"}, ("agent.net.activation", "unknown 'crelu'")),
        ({"use": "conv", "norm": "group"}, ("agent.net.norm", "unknown 'group'")),
        ({"use": "conv", "width": 3}, ("agent.net", "unknown 'width'")),
        ({"use": "resnet18", "width": 1.5}, ("agent.net.width", "1.5 is not")),
        ({"use": "resnet18", "depth": 18}, ("agent.net", "unknown 'depth'")),
        ({"use": "resnet18", "norm": "rms"}, ("agent.net.norm", "unknown 'rms'")),
        ({"use": "convgru", "bands": 3}, ("agent.net.bands", "28 rows is not cut into 3")),
        ({"use": "convgru", "hidden": "many"}, ("agent.net",)),
        ({"use": "convgru", "both": True}, ("agent.net", "unknown 'both'")),
        ({"use": "biconvgru", "both": False}, ("agent.net", "unknown 'both'")),
        ({"use": "biconvgru", "cells": 2}, ("agent.net", "unknown 'cells'")),
        ({"use": "no.such.Net"}, ("agent.net.use", "cannot import 'no.such.Net'")),
        ({"use": "tests.test_nets.no_module"}, ("agent.net.use", "gives no torch module")),
        ({"use": "tests.test_nets.Mine", "deepness": 3}, ("agent.net", "tests.test_nets.Mine refuses", "deepness")),
    ],
    ids=str,
)
def test_one_line_about_what_is_wrong(net: Mapping[str, Any], words: tuple[str, ...]) -> None:
    refused(lambda: nets.build(net, GREY, 5), *words)


@pytest.mark.parametrize("option", [{"bands": 0}, {"bands": -4}, {"hidden": 0}, {"dense": 0}], ids=str)
def test_a_convgru_of_nothing_is_refused(option: dict[str, int]) -> None:
    refused(lambda: nets.build({"use": "convgru", **option}, GREY, 5), f"agent.net.{next(iter(option))}")


@pytest.mark.parametrize("use", ["conv", "resnet18", "convgru", "biconvgru"])
def test_what_reads_images_refuses_vectors(use: str) -> None:
    refused(
        lambda: nets.build({"use": use}, (40,), 5), f"agent.net.use: {use.removeprefix('bi')} reads images", "(40,)"
    )


class Mine(nn.Module):
    """A network of one's own, by import path."""

    def __init__(self, shape: tuple[int, ...], classes: int, *, width: int = 3) -> None:
        super().__init__()
        self.shape, self.head = shape, nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(images.flatten(1)[:, : self.head.in_features])
        return logits


def no_module(shape: tuple[int, ...], classes: int) -> int:
    return classes


def test_a_net_of_ones_own() -> None:
    model = nets.build({"use": "tests.test_nets.Mine", "width": 4}, GREY, 6)
    assert isinstance(model, Mine) and model.shape == GREY and model(torch.zeros(2, *GREY)).shape == (2, 6)
    filled = nets.build({"use": "tests.test_nets.Mine", "init": "kaiming"}, GREY, 6)
    assert not filled.head.bias.any()  # type: ignore[attr-defined]


def test_halved_layers_feed_what_doubles() -> None:
    model = built("mlp", GREY, 5, hidden=[8], activation="crelu")
    assert [type(part) for part in model] == [nn.Linear, CReLU, nn.Linear] and model[0].out_features == 4
