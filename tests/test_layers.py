"""One-hot rows that are shared: the same answers, gradients and second derivatives as rows written out."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import nn

from agents import layers
from agents.layers import OneHot, Ones, written_out

KINDS = [3, 5, 2, 4]


def rows(count: int, seed: int = 0) -> torch.Tensor:
    generator = np.random.default_rng(seed)
    return torch.from_numpy(np.stack([generator.integers(0, kind, count) for kind in KINDS], 1).astype(np.float32))


def extractor() -> OneHot:
    return OneHot(spaces.Box(0, 9, (len(KINDS),)), KINDS)


def both(count: int) -> tuple[Any, torch.Tensor]:
    layer = extractor()
    return layer.train()(rows(count)), layer.eval()(rows(count))


def test_rows_are_shared_while_learning_and_acting_and_written_out_to_be_looked_at() -> None:
    layer = extractor()
    assert type(layer.train()(rows(layers.MANY))) is Ones
    assert type(layer.train()(rows(layers.MANY - 1))) is torch.Tensor
    assert type(layer.eval()(rows(500))) is torch.Tensor
    with torch.no_grad():
        assert type(layer.eval()(rows(500))) is Ones


def test_whatever_else_reads_them_has_them_written_out() -> None:
    shared, plain = both(300)
    assert len(shared.different) <= 3 * 5 * 2 * 4 < 300
    assert shared.shape == plain.shape and shared.dtype == plain.dtype and not shared.requires_grad
    assert torch.equal(shared * 1, plain)
    assert shared.data_ptr() == shared.untyped_storage().data_ptr() == shared.data_ptr()  # monitors ask where it is
    assert torch.equal(shared[3:7], plain[3:7]) and torch.equal(shared.T @ shared, plain.T @ plain)
    assert torch.equal(torch.cat([shared, shared], 1), torch.cat([plain, plain], 1))
    assert torch.equal(nn.functional.layer_norm(shared, (14,)), nn.functional.layer_norm(plain, (14,)))


def test_answers_and_derivatives_of_two_orders_are_those_of_rows_written_out() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(sum(KINDS), 6), nn.Tanh(), nn.Linear(6, 2)).double()
    found = []
    for x in both(300):
        x = x if isinstance(x, Ones) else x.double()
        if isinstance(x, Ones):
            compact, columns, which = x.compact
            x.__dict__["compact"] = (compact.double(), columns, which)
        loss = net(x).square().mean()
        first = torch.autograd.grad(loss, list(net.parameters()), create_graph=True)
        second = torch.autograd.grad(sum(part.square().sum() for part in first), list(net.parameters()))
        found.append([loss.detach(), *first, *second])
    for ours, theirs in zip(*found, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-12, atol=1e-14)


def test_columns_that_are_never_one_do_not_move() -> None:
    net, seen = nn.Linear(sum(KINDS), 3), rows(200)
    seen[:, 1] = 2  # of the second place's five kinds, one is seen
    before = copy.deepcopy(net)
    net(extractor().train()(seen)).sum().backward()
    grad = net.weight.grad
    assert grad is not None and (grad[:, [3, 4, 6, 7]] == 0).all() and (grad[:, 5] == 200).all()
    assert torch.equal(net.weight, before.weight)


@pytest.mark.parametrize("count", [1, 128, 129])
def test_all_rows_equal_or_all_different(count: int) -> None:
    ones = torch.arange(count)[:, None]
    weight = torch.randn(4, count)
    assert torch.allclose(nn.functional.linear(Ones(ones, count), weight), weight.T)
    same = Ones(torch.zeros(count, 1, dtype=torch.long), 7)
    assert torch.equal(same + 0, written_out(torch.zeros(count, 1, dtype=torch.long), 7))
    assert len(same.different) == 1
