"""Curvature and ranks against dense oracles in float64, which are written here from torch.func and plain loops."""

import copy
import importlib
import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call
from torch.nn.functional import cross_entropy, mse_loss

from agents import dqn, ppo
from crl.linalg import (
    GGN,
    RANKS,
    CurvatureError,
    Effort,
    Factors,
    Gram,
    Hessian,
    Matrix,
    Problem,
    Spectrum,
    effective_rank,
    entropy_rank,
    exact_spectrum,
    extremes,
    feature_rank,
    hessian_spectrum,
    hutchinson,
    kronecker,
    lanczos,
    merged,
    participation_ratio,
    singular_values,
    spectrum,
    srank,
    stable_rank,
    supervised,
)
from crl.linalg.lanczos import each_probe, probes
from crl.linalg.operators import KEEP
from tests.marks import quickly

LANCZOS = importlib.import_module("crl.linalg.lanczos")  # the package's own attribute is the function of that name
OPERATORS = importlib.import_module("crl.linalg.operators")
SPACE = spaces.Discrete(4)
CASES = ("cross_entropy", "squared_error", "ppo", "dqn")
few = settings(max_examples=8, deadline=None, derandomize=True, database=None)


pytestmark = pytest.mark.usefixtures("one_thread")


# Problems.


def net(*widths: int, activation: Callable[[], nn.Module] = nn.Tanh, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after), activation()]
    return nn.Sequential(*layers[:-1]).double()


def problem_of(
    module: nn.Module, objective: Callable[[Tensor, Any], Tensor], batch: dict[str, Tensor], **options: Any
) -> Problem:
    named = dict(module.named_parameters())
    return Problem(module, lambda b: module(b["obs"]), objective, batch, named, **options)


def case(kind: str, widths: tuple[int, ...] = (6, 10, 8), samples: int = 40, **options: Any) -> Problem:
    """One of four losses on a net of hidden layers; its inputs and targets are random."""
    outputs = {"cross_entropy": 5, "squared_error": 3, "ppo": 5, "dqn": 4}[kind]
    module = net(*widths, outputs, **options)
    torch.manual_seed(1)
    obs, noise = torch.randn(samples, widths[0]).double(), torch.randn(samples, 3).double()
    batch: dict[str, Tensor] = {"obs": obs, "action": torch.randint(4, (samples, 1))}
    if kind == "cross_entropy":
        batch["target"] = torch.randint(outputs, (samples,))
        return problem_of(module, lambda out, b: cross_entropy(out, b["target"]), batch)
    if kind == "squared_error":
        return problem_of(module, lambda out, b: mse_loss(out, b["target"]), batch | {"target": noise})
    if kind == "dqn":
        return problem_of(module, dqn.objective, batch | {"target": 2 * noise[:, 0]})
    with torch.no_grad():
        now, _ = ppo.log_probability(module(obs)[:, :-1], batch["action"], SPACE)
    batch |= {"log_prob": now + 0.15 * noise[:, 0], "advantage": noise[:, 1], "return": noise[:, 2], "value": 0 * now}
    weights: dict[str, Any] = {"clip": 0.2, "clip_value": None, "value_weight": 0.5, "entropy_weight": 0.01}
    return problem_of(
        module,
        lambda out, b: ppo.objective(out, b, SPACE, **weights),
        batch,
        metric=lambda out, b: ppo.metric(out, SPACE, 0.5),
    )


def chunked(problem: Problem, size: int) -> Problem:
    return Problem(**{**vars(problem), "chunk": size})


# Oracles: the loss as a function of one flat vector, differentiated by torch.func.


def point(problem: Problem) -> Tensor:
    return torch.cat([value.detach().reshape(-1) for value in problem.parameters.values()])


def outputs_at(problem: Problem, vector: Tensor) -> Tensor:
    named, start = {}, 0
    for name, value in problem.parameters.items():
        named[name] = vector[start : start + value.numel()].view(value.shape)
        start += value.numel()
    assert isinstance(problem.batch, dict)
    found: Tensor = functional_call(problem.module, named, (problem.batch["obs"],))
    return found


def loss_at(problem: Problem, vector: Tensor) -> Tensor:
    return problem.objective(outputs_at(problem, vector), problem.batch)


def hessian_of(problem: Problem) -> Tensor:
    slope = torch.func.jacrev(lambda vector: loss_at(problem, vector))
    found: Tensor = torch.func.jacrev(slope, chunk_size=256)(point(problem))
    return found


def jacobian_of(problem: Problem) -> Tensor:
    found: Tensor = torch.func.jacrev(lambda vector: outputs_at(problem, vector))(point(problem))
    return found.flatten(0, 1)


def weight_of(problem: Problem) -> Tensor:
    """The whole second derivative of the loss by all outputs of all samples."""
    out = outputs_at(problem, point(problem)).detach()
    found: Tensor = torch.func.jacrev(torch.func.jacrev(lambda o: problem.objective(o, problem.batch)))(out)
    return found.reshape(out.numel(), out.numel())


def metric_of(problem: Problem) -> Tensor:
    assert problem.metric is not None
    out = outputs_at(problem, point(problem)).detach()
    return torch.block_diag(*(problem.metric(out, problem.batch) / len(out)))


def close(found: Tensor, wanted: Tensor, tolerance: float = 1e-9) -> bool:
    assert found.shape == wanted.shape
    return bool((found - wanted).abs().max() <= tolerance * wanted.abs().max().clamp(min=1e-12))


def eigenvalues(matrix: Tensor) -> np.ndarray[Any, Any]:
    found: np.ndarray[Any, Any] = torch.linalg.eigvalsh(matrix).numpy()
    return found


def symmetric(size: int, seed: int, values: Any = None) -> Tensor:
    """A random symmetric matrix, or one of given eigenvalues in a random frame."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.randn(size, size, generator=generator, dtype=torch.float64)
    if values is None:
        return (wide + wide.T) / 2
    frame = torch.linalg.qr(wide)[0]
    found = frame @ torch.diag(torch.as_tensor(values, dtype=torch.float64)) @ frame.T
    return (found + found.T) / 2


# Hessians.


LARGE = {"cross_entropy": (12, 46, 46), "squared_error": (8, 32, 32), "ppo": (8, 32, 32), "dqn": (8, 32, 32)}


def trained(problem: Problem, steps: int) -> Problem:
    optimizer = torch.optim.Adam(problem.parameters.values(), lr=5e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        problem.objective(problem.outputs(problem.batch), problem.batch).backward()
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return problem


@pytest.mark.parametrize("kind", quickly(CASES, lambda kind: kind == "ppo"))
def test_lanczos_finds_the_hessians_spectrum(kind: str) -> None:
    problem = trained(case(kind, LARGE[kind], samples=48), 40)
    operator = Hessian(problem)
    wanted = eigenvalues(hessian_of(problem))
    found = spectrum(operator, Effort(10, 300), dense=0)
    assert not found.exact and found.size == len(wanted) > 1400
    largest, smallest = extremes(operator)
    assert largest == pytest.approx(wanted[::-1][:5], rel=1e-3)
    assert smallest == pytest.approx(wanted[:5], rel=1e-3)
    assert found.lambda_max.value == pytest.approx(wanted[-1], rel=1e-3)
    assert found.lambda_min.value == pytest.approx(wanted[0], rel=1e-3)
    trace = found.trace
    assert abs(trace.value - wanted.sum()) <= max(0.01 * abs(wanted.sum()), 2 * trace.error)
    assert trace.low <= wanted.sum() <= trace.high
    ranks = {eps: found.epsilon_rank(eps) for eps in (1e-3, 1e-2, 1e-1)}
    for eps, rank in ranks.items():
        assert rank.low <= (np.abs(wanted) > eps).mean() <= rank.high
    assert ranks[1e-1].resolved


def test_too_few_steps_show_in_the_bracket() -> None:
    """Before learning, eigenvalues crowd evenly around zero, nearer to each other than so few steps can tell."""
    problem = case("dqn", LARGE["dqn"], samples=48)
    wanted = (np.abs(eigenvalues(hessian_of(problem))) > 1e-3).mean()
    found = spectrum(Hessian(problem), Effort(4, 300), dense=0).epsilon_rank(1e-3)
    assert found.low <= wanted <= found.high and not found.resolved and math.isnan(found.value)
    assert found.high - found.low > 0.1 > 10 * found.error, "the standard error does not tell"


@pytest.mark.parametrize("kind", CASES)
def test_the_dense_path_is_exact(kind: str) -> None:
    problem = case(kind)
    problem.check()
    matrix = hessian_of(problem)
    wanted = eigenvalues(matrix)
    assert close(Hessian(problem).dense(), matrix)
    found = spectrum(Hessian(problem), Effort(10, 100))
    assert found.exact and found.values[0] == pytest.approx(wanted, abs=1e-10)
    assert found.trace.value == pytest.approx(wanted.sum()) and found.trace.error == 0.0
    for eps in (1e-3, 1e-2, 1e-1):
        assert found.epsilon_rank(eps).value == pytest.approx((np.abs(wanted) > eps).mean(), abs=1e-12)
    below = np.abs(wanted[wanted < 0]).sum() / np.abs(wanted).sum()
    assert found.negative_mass.value == pytest.approx(below)
    assert found.effective_rank.value == pytest.approx(float(entropy_rank(torch.tensor(np.abs(wanted)))))
    assert found.magnitude == pytest.approx(np.abs(wanted).max())
    share = (np.abs(wanted) > 0.01 * np.abs(wanted).max()).mean()
    assert found.relative_rank(0.01).value == pytest.approx(share)
    assert found.trainable(share - 0.01, 0.01 * found.magnitude)
    assert not found.trainable(share + 0.01, 0.01 * found.magnitude)


@pytest.mark.parametrize("kind", CASES)
def test_loss_and_gradient_are_the_oracles(kind: str) -> None:
    problem = case(kind)
    assert problem.loss() == pytest.approx(float(loss_at(problem, point(problem))))
    assert close(problem.gradient(), torch.func.grad(lambda vector: loss_at(problem, vector))(point(problem)))
    assert problem.size == len(point(problem)) and problem.samples == 40


def test_a_product_takes_columns_and_rows() -> None:
    problem = case("cross_entropy")
    matrix = hessian_of(problem)
    columns = torch.randn(problem.size, 3).double()
    assert close(Hessian(problem) @ columns, matrix @ columns)
    assert close(Hessian(problem) @ columns[:, 0], matrix @ columns[:, 0])
    assert close(Hessian(problem).rows(columns.T.contiguous()), columns.T @ matrix)


def test_relu_without_smoothness_has_the_hessian_of_its_pieces() -> None:
    problem = case("squared_error", activation=nn.ReLU)
    assert close(Hessian(problem).dense(), hessian_of(problem))
    assert close(GGN(problem).dense(), jacobian_of(problem).T @ weight_of(problem) @ jacobian_of(problem))


def test_a_linear_loss_has_no_curvature() -> None:
    problem = problem_of(net(4, 3), lambda out, b: out.mean(), {"obs": torch.randn(8, 4).double()})
    for operator in (Hessian(problem), GGN(problem), Gram(problem)):
        assert torch.equal(operator.dense(), torch.zeros(operator.size, operator.size).double())
        for dense in (None, 0):
            numbers = spectrum(operator, Effort(4, 10), dense=dense).numbers()
            assert numbers.pop("zero_rows") == 1.0
            assert all(value == 0.0 for value in numbers.values())


def test_rows_that_are_zero_are_set_aside_and_counted_without_error() -> None:
    inner = symmetric(60, 3)
    matrix = torch.zeros(200, 200, dtype=inner.dtype)
    places = torch.randperm(200, generator=torch.Generator().manual_seed(0))[:60]
    matrix[places[:, None], places] = inner
    seen = spectrum(Matrix(matrix), Effort(4, 60), dense=0)
    alone = spectrum(Matrix(inner), Effort(4, 60), dense=0)
    assert seen.zero_rows == 140 and seen.size == 200
    rank = seen.epsilon_rank(1e-9)
    assert rank.high == pytest.approx(60 / 200, abs=1e-9), "no probe can miscount these zeros"
    assert rank.error < 1e-7 and alone.zero_rows == 0
    assert seen.lambda_max.value == pytest.approx(float(torch.linalg.eigvalsh(inner)[-1]))
    assert spectrum(Matrix(matrix)).values.shape == (1, 61) and spectrum(Matrix(matrix)).exact


def test_a_gradient_that_is_constant_in_part_is_no_obstacle() -> None:
    problem = problem_of(net(4, 5, 3), lambda out, b: out.mean(), {"obs": torch.randn(8, 4).double()})
    matrix = hessian_of(problem)
    assert matrix.abs().max() > 0 and not matrix[-3:].any()
    assert close(Hessian(problem).dense(), matrix)


def test_one_layers_hessian_is_the_diagonal_block() -> None:
    problem = case("cross_entropy")
    whole = {"hessian": hessian_of(problem), "ggn": GGN(problem).dense()}
    start = 0
    for name, value in problem.parameters.items():
        block = slice(start, start := start + value.numel())
        part = problem.of({name: value})
        assert part.size == value.numel()
        assert close(Hessian(part).dense(), whole["hessian"][block, block])
        assert close(GGN(part).dense(), whole["ggn"][block, block])
        assert close(part.gradient(), problem.gradient()[block])


# Gauss-Newton matrices and Grams.


def shares_its_spectrum(problem: Problem, weight: str = "loss") -> None:
    """The Gram's and the GGN's eigenvalues agree, and where one has more, those are zero."""
    small, large = (
        eigenvalues(operator.dense())[::-1]
        for operator in sorted((Gram(problem, weight), GGN(problem, weight)), key=lambda operator: operator.size)
    )
    assert large[: len(small)] == pytest.approx(small, abs=1e-5 * large[0])
    assert np.abs(large[len(small) :]).max(initial=0.0) <= 1e-5 * large[0]


@pytest.mark.parametrize("kind", CASES)
def test_the_ggn_is_the_weighted_square_of_the_jacobian(kind: str) -> None:
    problem = case(kind)
    jacobian, weight = jacobian_of(problem), weight_of(problem)
    assert close(GGN(problem).dense(), jacobian.T @ weight @ jacobian)
    assert close(GGN(problem, "none").dense(), jacobian.T @ jacobian)


@pytest.mark.parametrize("kind", ["cross_entropy", "squared_error", "dqn"])
@pytest.mark.parametrize("widths", [(6, 10, 8), (3, 3)])  # fewer outputs than parameters, and more
def test_the_gram_shares_the_ggns_spectrum(kind: str, widths: tuple[int, ...]) -> None:
    shares_its_spectrum(case(kind, widths))


def test_the_fisher_gram_shares_the_ggns_spectrum() -> None:
    problem = case("ppo")
    shares_its_spectrum(problem, "metric")
    jacobian = jacobian_of(problem)
    assert close(GGN(problem, "metric").dense(), jacobian.T @ metric_of(problem) @ jacobian)


def test_ppos_own_gram_is_refused_where_the_surrogate_is_not_convex() -> None:
    problem = case("ppo")
    assert eigenvalues(weight_of(problem))[0] < -1e-4
    with pytest.raises(CurvatureError, match=r"not convex in the outputs.*Fisher"):
        Gram(problem)
    with pytest.raises(CurvatureError, match="not convex"):
        kronecker(problem)
    with pytest.raises(CurvatureError, match="no metric stands in"):
        Gram(case("dqn"), "metric")


def test_the_plain_gram_is_the_tangent_kernel() -> None:
    problem = case("cross_entropy")
    jacobian = jacobian_of(problem)
    assert close(Gram(problem, "none").dense(), jacobian @ jacobian.T)
    assert close(Gram(chunked(problem, 7), "none").dense(), jacobian @ jacobian.T)


@pytest.mark.parametrize(
    ("kind", "weight"),
    [("cross_entropy", "loss"), ("squared_error", "loss"), ("cross_entropy", "none"), ("ppo", "metric"),
     ("ppo", "none"), ("dqn", "none")],
)  # fmt: skip
def test_the_roots_of_the_weight_lead_from_the_residual_to_the_gradient(kind: str, weight: str) -> None:
    problem = case(kind)
    gram = Gram(problem, weight)
    root = torch.block_diag(*torch.cat(gram.roots))
    wanted = {"loss": weight_of, "metric": metric_of, "none": lambda p: torch.eye(len(root)).double()}[weight](problem)
    assert close(root @ root, wanted)
    assert close(jacobian_of(problem).T @ root @ gram.residual(), problem.gradient(), 1e-7)


def test_hubers_residual_leads_to_the_gradient_within_its_square() -> None:
    problem = case("dqn")
    assert isinstance(problem.batch, dict)
    near = {**problem.batch, "target": problem.outputs(problem.batch).detach().gather(1, problem.batch["action"])[:, 0]}
    near["target"] = near["target"] + 0.5 * torch.rand(40).double()
    problem = problem_of(problem.module, dqn.objective, near)
    gram = Gram(problem)
    root = torch.block_diag(*torch.cat(gram.roots))
    assert close(jacobian_of(problem).T @ root @ gram.residual(), problem.gradient(), 1e-7)


def test_an_objective_that_mixes_samples_is_refused() -> None:
    batch = {"obs": torch.randn(8, 4).double()}
    with pytest.raises(CurvatureError, match="mixes samples"):
        GGN(problem_of(net(4, 3), lambda out, b: out.mean(0).square().sum(), batch)).dense()


def test_mixing_that_ignores_shifts_is_refused_too() -> None:
    batch = {"obs": torch.randn(8, 4).double()}
    with pytest.raises(CurvatureError, match="mixes samples"):
        GGN(problem_of(net(4, 3), lambda out, b: out.softmax(1).mean(0).square().sum(), batch)).dense()


@pytest.mark.parametrize("kind", CASES)
def test_chunks_change_nothing(kind: str) -> None:
    chunks_add_up(case(kind, (4, 6), 24))


def chunks_add_up(problem: Problem) -> None:
    parts = chunked(problem, 7)  # the last chunk is smaller
    assert parts.loss() == pytest.approx(problem.loss())
    assert close(parts.gradient(), problem.gradient())
    weight = "metric" if problem.metric is not None else "loss"
    mine: Any
    whole: Any
    mine, whole = ([Hessian(part), GGN(part), Gram(part, weight)] for part in (parts, problem))
    for pieces, once in zip(mine, whole, strict=True):
        assert close(pieces.dense(), once.dense(), 1e-7)  # a root of a singular matrix has half the digits
        assert close(pieces.dense(), once.dense(), 1e-7)  # from the graphs kept
    assert close(Gram(parts, weight).residual(), Gram(problem, weight).residual(), 1e-6)
    pairs = zip(kronecker(parts, weight).values(), kronecker(problem, weight).values(), strict=True)
    for other, factors in pairs:
        assert close(other.inputs, factors.inputs) and close(other.signals, factors.signals)


@pytest.mark.parametrize("chunk", [None, 700])
def test_more_samples_than_are_kept_change_nothing(chunk: int | None) -> None:
    samples = KEEP + 52
    problem = chunked(case("cross_entropy", (3, 4), samples=samples), chunk or samples)
    assert isinstance(problem.batch, dict)

    def one(vector: Tensor, row: Tensor) -> Tensor:
        return outputs_at(Problem(**{**vars(problem), "batch": {"obs": row[None]}}), vector)[0]

    jacobian = torch.func.vmap(torch.func.jacrev(one), (None, 0))(point(problem), problem.batch["obs"])
    share = outputs_at(problem, point(problem)).softmax(1)
    weight = torch.diag_embed(share) - share[:, :, None] * share[:, None, :]
    hessian, ggn, gram = Hessian(problem), GGN(problem), Gram(problem, "none")
    curved, square = hessian_of(problem), torch.einsum("nip,nij,njq->pq", jacobian, weight, jacobian) / samples
    for _ in range(2):
        assert close(hessian.dense(), curved) and close(ggn.dense(), square)
        vector = torch.randn(gram.size).double()
        assert close(gram @ vector, jacobian.flatten(0, 1) @ (jacobian.flatten(0, 1).T @ vector))
    assert hessian._kept is None and ggn._kept is None and gram._kept is None


@given(st.lists(st.integers(1, 6), min_size=2, max_size=4), st.integers(1, 9), st.sampled_from(CASES[:2]))
@few
def test_matrices_agree_over_random_widths(widths: list[int], samples: int, kind: str) -> None:
    problem = case(kind, tuple(widths), samples)
    shares_its_spectrum(problem)
    jacobian = jacobian_of(problem)
    assert close(GGN(problem).dense(), jacobian.T @ weight_of(problem) @ jacobian)
    assert close(Hessian(problem).dense(), hessian_of(problem))


# Kronecker factors.


def test_kronecker_eigenvalues_are_the_products() -> None:
    for inputs, signals in ((symmetric(4, 0), symmetric(3, 1)), (symmetric(1, 2), symmetric(5, 3))):
        wanted = torch.linalg.eigvalsh(torch.kron(inputs, signals))
        assert close(Factors(inputs, signals).eigenvalues(), wanted)


@pytest.mark.parametrize("bias", [True, False])
def test_one_linear_layers_factors_are_the_ggn(bias: bool) -> None:
    torch.manual_seed(0)
    module = nn.Linear(4, 3, bias=bias).double()
    batch = {"obs": torch.randn(20, 4).double(), "target": torch.randn(20, 3).double()}
    problem = problem_of(module, lambda out, b: mse_loss(out, b["target"]), batch)
    (factors,) = kronecker(problem).values()
    width = 4 + bias
    assert factors.inputs.shape == (width, width) and factors.signals.shape == (3, 3)
    # The GGN's parameters are all weights, then all biases; the product has each output's bias after its weights.
    order = [index for out in range(3) for index in (*range(4 * out, 4 * out + 4), *([12 + out] if bias else []))]
    block = GGN(problem).dense()[order][:, order]
    assert close(torch.kron(factors.signals, factors.inputs), block)
    assert close(factors.eigenvalues(), torch.linalg.eigvalsh(block))


def test_the_biass_column_is_the_mean_input() -> None:
    problem = case("cross_entropy")
    assert isinstance(problem.batch, dict)
    found = kronecker(problem)
    assert list(found) == ["0", "2", "4"]
    inputs = found["0"].inputs
    assert inputs[-1, -1].item() == pytest.approx(1.0)
    assert close(inputs[:-1, -1], problem.batch["obs"].mean(0))
    assert close(inputs[:-1, :-1], problem.batch["obs"].T @ problem.batch["obs"] / 40)


@pytest.mark.parametrize("weight", ["loss", "none"])
def test_an_mlps_signals_are_the_naive_ones(weight: str) -> None:
    problem = case("cross_entropy")
    assert isinstance(problem.batch, dict) and isinstance(problem.module, nn.Sequential)
    found = kronecker(problem, weight)
    for layer in (0, 2, 4):
        inputs = problem.module[:layer](problem.batch["obs"]).detach()
        total = naive_signals(problem.module[layer:], inputs, weight)
        assert close(found[str(layer)].signals, total)


def naive_signals(rest: Any, inputs: Tensor, weight: str) -> Tensor:
    """Backward signals of a layer, the first of `rest`: sample by sample and place by place, under cross-entropy."""
    total: Any = 0
    for sample in inputs:
        places = rest[0](sample[None]).detach()
        jacobian = torch.func.jacrev(lambda z: rest[1:](z)[0])(places)[:, 0]  # (numbers, outputs, places...)
        share = rest[1:](places)[0].detach().softmax(0)
        loss_weight = torch.diag(share) - torch.outer(share, share) if weight == "loss" else torch.diag(share**0)
        jacobian = jacobian.reshape(*jacobian.shape[:2], -1)
        for place in range(jacobian.shape[2]):
            here = jacobian[:, :, place]
            total = total + here.T @ loss_weight @ here / jacobian.shape[2] / len(inputs)
    found: Tensor = total
    return found


def conv_case(layer: nn.Module, shape: tuple[int, ...]) -> tuple[Problem, nn.Sequential]:
    torch.manual_seed(0)
    obs = torch.randn(6, *shape)
    module = nn.Sequential(layer, nn.Tanh(), nn.Flatten(), nn.Linear(layer(obs)[0].numel(), 3)).double()
    batch = {"obs": obs.double(), "target": torch.randint(3, (6,))}
    return problem_of(module, lambda out, b: cross_entropy(out, b["target"]), batch), module


@pytest.mark.parametrize("bias", [True, False])
def test_a_convolutions_factors_are_the_naive_ones(bias: bool) -> None:
    layer = nn.Conv2d(2, 3, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2), bias=bias)
    problem, module = conv_case(layer, (2, 5, 6))
    assert isinstance(problem.batch, dict)
    found = kronecker(problem)["0"]
    total = torch.zeros(12 + bias, 12 + bias).double()
    for image in problem.batch["obs"]:
        height, width = module[0](image[None]).shape[2:]
        for row, column in itertools.product(range(height), range(width)):
            seen = []
            for channel, down, right in itertools.product(range(2), range(3), range(2)):
                y, x = 2 * row + down - 1, column + 2 * right
                inside = 0 <= y < 5 and 0 <= x < 6
                seen.append(float(image[channel, y, x]) if inside else 0.0)
            patch = torch.tensor([*seen, 1.0] if bias else seen).double()
            total += torch.outer(patch, patch) / 6
            # The patch is right: it gives what the layer answers there.
            kernel = layer.weight.detach().flatten(1)
            answer = kernel @ patch[:12] + (layer.bias.detach() if layer.bias is not None else 0)
            assert close(answer, module[0](image[None])[0, :, row, column].detach())
    assert close(found.inputs, total)
    assert close(found.signals, naive_signals(module, problem.batch["obs"], "loss"))


def test_a_convolution_in_one_dimension_has_naive_factors() -> None:
    layer = nn.Conv1d(2, 4, 3, stride=2, padding=1)
    problem, module = conv_case(layer, (2, 7))
    assert isinstance(problem.batch, dict)
    found = kronecker(problem)["0"]
    total = torch.zeros(7, 7).double()
    for line, place in itertools.product(problem.batch["obs"], range(4)):
        at = [2 * place + offset - 1 for offset in range(3)]
        seen = [float(line[c, x]) if 0 <= x < 7 else 0.0 for c in range(2) for x in at]
        total += torch.outer(*[torch.tensor([*seen, 1.0]).double()] * 2) / 6
    assert close(found.inputs, total)
    assert close(found.signals, naive_signals(module, problem.batch["obs"], "loss"))


def test_a_convolution_of_one_place_is_a_linear_layer() -> None:
    problem, module = conv_case(nn.Conv2d(2, 3, (3, 4)), (2, 3, 4))
    assert isinstance(problem.batch, dict)
    twin = nn.Sequential(nn.Flatten(), nn.Linear(24, 3), *module[1:]).double()
    with torch.no_grad():
        twin[1].weight.copy_(module[0].weight.flatten(1))
        twin[1].bias.copy_(module[0].bias)
    mine, theirs = kronecker(problem)["0"], kronecker(problem_of(twin, problem.objective, problem.batch))["1"]
    assert close(mine.inputs, theirs.inputs) and close(mine.signals, theirs.signals)


@pytest.mark.parametrize(
    "layer", [nn.Conv2d(2, 4, 3, groups=2), nn.Conv2d(2, 3, 3, padding="same"),
              nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular")],
)  # fmt: skip
def test_a_convolution_that_factors_are_not_defined_for_is_refused(layer: nn.Module) -> None:
    problem, _ = conv_case(layer, (2, 5, 5))
    with pytest.raises(CurvatureError, match="convolution"):
        kronecker(problem)


def test_factors_need_a_layer() -> None:
    problem = case("cross_entropy")
    with pytest.raises(CurvatureError, match="no linear or convolutional layer"):
        kronecker(problem.of({"0.bias": problem.parameters["0.bias"]}))
    only = kronecker(problem.of({"2.weight": problem.parameters["2.weight"]}))
    assert list(only) == ["2"]


def test_an_activation_in_place_changes_no_factor() -> None:
    plain = case("cross_entropy", activation=nn.ReLU)
    written = case("cross_entropy", activation=lambda: nn.ReLU(inplace=True))
    for name, factors in kronecker(plain).items():
        other = kronecker(written)[name]
        assert close(other.inputs, factors.inputs) and close(other.signals, factors.signals)


def test_ppos_factors_take_the_metric() -> None:
    problem = case("ppo", (6,))
    (factors,) = kronecker(problem, "metric").values()
    assert close(factors.signals, metric_of(problem).reshape(40, 5, 40, 5).diagonal(dim1=0, dim2=2).sum(2))


# Lanczos.


def reproduces(matrix: Tensor, tolerance: float = 1e-9) -> None:
    """After as many steps as rows, Ritz values are the eigenvalues, and weights are squared projections."""
    size = len(matrix)
    start = torch.randn(2, size, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    wanted, vectors = (part.numpy() for part in torch.linalg.eigh(matrix))
    for row, found in zip(start, lanczos(Matrix(matrix), start, size), strict=True):
        values, weights = found.ritz()
        assert len(values) == size
        assert values == pytest.approx(wanted, abs=tolerance * np.abs(wanted).max())
        assert weights == pytest.approx((vectors.T @ (row / row.norm()).numpy()) ** 2, abs=1e-6)
        assert weights.sum() == pytest.approx(1.0) and (weights >= 0).all()


@given(st.integers(1, 30), st.integers(0, 1000))
@few
def test_ritz_values_are_the_eigenvalues_after_all_steps(size: int, seed: int) -> None:
    reproduces(symmetric(size, seed))


@given(st.integers(1, 60), st.integers(2, 20), st.integers(0, 1000), st.floats(0, 3))
@few
def test_weights_are_shares(size: int, steps: int, seed: int, eps: float) -> None:
    matrix = symmetric(size, seed)
    for found in (spectrum(Matrix(matrix), Effort(3, steps), seed, dense=0), spectrum(Matrix(matrix), dense=100)):
        assert (found.weights >= 0).all() and found.weights.sum(1) == pytest.approx(1.0)
        rank, negative, directions = found.epsilon_rank(eps), found.negative_mass, found.effective_rank
        assert 0.0 <= rank.low <= rank.high <= 1 + 1e-12 and (not rank.resolved or rank.low <= rank.value <= rank.high)
        assert 0.0 <= negative.low <= negative.high <= 1 + 1e-12
        assert 0.0 <= directions.low <= directions.high <= size * (1 + 1e-9)


@pytest.mark.parametrize("size", [20, 30, 45, 49])  # the sum of so many equal shares rounds above or below 1
def test_a_full_rank_is_exactly_one(size: int) -> None:
    found = spectrum(Matrix(torch.eye(size).double()))
    assert found.exact and found.epsilon_rank(0.5).value == 1.0
    assert found.trainable(rho=1.0, eps=0.5)


@given(st.integers(8, 40), st.integers(0, 6), st.integers(0, 1000))
@few
def test_a_low_rank_ends_early_and_loses_nothing(size: int, rank: int, seed: int) -> None:
    values = np.zeros(size)
    values[:rank] = np.linspace(-2, 3, rank) + 0.1
    matrix = symmetric(size, seed, values)
    start = LANCZOS.probes(size, 4, seed, matrix)
    onto = torch.linalg.eigh(matrix)[1][:, np.argsort(-np.abs(eigenvalues(matrix)))[:rank]]
    for row, found in zip(start, lanczos(Matrix(matrix), start, size), strict=True):
        ritz, weights = found.ritz()
        assert len(ritz) <= rank + 1
        beyond = float((onto.T @ row).square().sum() / size)  # the probe's share outside of the kernel
        assert weights[np.abs(ritz) > 1e-8].sum() == pytest.approx(beyond, abs=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_and_identity_end_at_once(dtype: torch.dtype) -> None:
    for matrix, value in ((torch.zeros(50, 50), 0.0), (torch.eye(50), 1.0), (-2 * torch.eye(50), -2.0)):
        found = spectrum(Matrix(matrix.to(dtype)), Effort(3, 20), dense=0)
        assert found.values.shape[1] == 1
        assert found.values == pytest.approx(value, abs=1e-5) and found.weights == pytest.approx(1.0)
        rank, directions = found.epsilon_rank(1e-3), found.effective_rank
        assert rank.low <= float(value != 0) <= rank.high and directions.low <= 50 * (value != 0) <= directions.high


def test_probes_of_a_block_are_independent() -> None:
    matrix = symmetric(30, 3, [*np.linspace(1, 2, 10), *np.zeros(20)])
    eigenvector = torch.linalg.eigh(matrix)[1][:, -1]
    start = torch.stack([eigenvector, torch.randn(30).double(), torch.ones(30).double()])  # the first ends at once
    together = lanczos(Matrix(matrix), start, 8)
    assert [len(each.diagonal) for each in together] == [1, 8, 8]
    for row, found in zip(start, together, strict=True):
        (alone,) = lanczos(Matrix(matrix), row[None], 8)
        assert found.diagonal == pytest.approx(alone.diagonal) and found.off == pytest.approx(alone.off)


def test_a_product_that_is_not_finite_is_refused() -> None:
    for bad in (math.nan, math.inf):
        with pytest.raises(CurvatureError, match="not finite"):
            spectrum(Matrix(torch.full((20, 20), bad)), Effort(2, 5), dense=0)


def test_numbers_that_are_not_exact_say_so() -> None:
    matrix = Matrix(symmetric(40, 0))
    exact, guessed = spectrum(matrix).numbers(), spectrum(matrix, Effort(3, 10), dense=0).numbers()
    assert not any("/" in name for name in exact)
    assert set(exact) == {name for name in guessed if "/" not in name}
    for name in set(exact) - {"zero_rows", "lambda_max", "lambda_min"}:
        assert guessed[f"{name}/low"] <= exact[name] <= guessed[f"{name}/high"]
    assert guessed["lambda_max/error"] > 0 < guessed["trace/error"]
    assert {"epsilon_rank_0.001", "epsilon_rank_0.01", "epsilon_rank_0.1", "relative_rank_0.01"} < set(exact)


def test_a_count_is_right_where_a_smoothed_curve_overcounts() -> None:
    """One eigenvalue in twenty is beyond eps. A curve smoothed by 1 % of the range puts nearly all of them there."""
    eps, size = 1e-3, 1000
    matrix = symmetric(size, 0, [*np.linspace(-1e-5, 1e-5, 950), *np.linspace(0.5, 1.0, 50)])
    found = spectrum(Matrix(matrix), Effort(10, 60), dense=0)
    share = found.epsilon_rank(eps)
    assert share.value == pytest.approx(0.05, abs=max(0.005, 2 * share.error))
    width = 0.01 * found.magnitude
    grid = np.linspace(-0.1, 1.1, 12_001)
    curve = np.zeros(len(grid))
    for value, weight in zip(found.values.ravel(), found.weights.ravel() / 10, strict=True):
        curve += weight * np.exp(-0.5 * ((grid - value) / width) ** 2) / (width * math.sqrt(2 * math.pi))
    smoothed = curve[np.abs(grid) > eps].sum() * (grid[1] - grid[0])
    assert smoothed > 0.8


@given(st.integers(2, 25), st.integers(2, 25), st.integers(0, 1000))
@few
def test_blocks_merge_into_the_block_diagonals_spectrum(first: int, second: int, seed: int) -> None:
    parts = [symmetric(first, seed), symmetric(second, seed + 1)]
    whole = spectrum(Matrix(torch.block_diag(*parts)), dense=100)
    found = merged([spectrum(Matrix(part), dense=100) for part in parts])
    assert found.exact and found.size == whole.size == first + second
    assert np.sort(found.values[0]) == pytest.approx(whole.values[0], abs=1e-9)
    assert found.numbers() == pytest.approx(whole.numbers())


def test_an_exact_part_and_a_guessed_one_merge() -> None:
    parts = [symmetric(40, 0), symmetric(300, 1, np.linspace(0, 2, 300))]
    wanted = np.concatenate([eigenvalues(part) for part in parts])
    found = merged([spectrum(Matrix(parts[0])), spectrum(Matrix(parts[1]), Effort(10, 50), dense=0)])
    assert not found.exact and found.size == 340 and found.weights.sum(1) == pytest.approx(1.0)
    assert found.trace.value == pytest.approx(wanted.sum(), abs=3 * found.trace.error)
    share = found.epsilon_rank(0.5)
    assert share.low <= (np.abs(wanted) > 0.5).mean() <= share.high
    assert found.lambda_max.value == pytest.approx(wanted.max(), rel=1e-3)


def test_a_spectrum_is_written_and_read(tmp_path: Path) -> None:
    for found in (
        spectrum(Matrix(symmetric(40, 0))),
        spectrum(Matrix(symmetric(40, 0)), Effort(3, 10), seed=4, dense=0),
    ):
        found.save(tmp_path / "spectrum.npz")
        again = Spectrum.load(tmp_path / "spectrum.npz")
        assert again.numbers() == found.numbers() and again.exact is found.exact
        assert again.settings == found.settings and again.size == found.size
        assert np.array_equal(again.values, found.values) and np.array_equal(again.weights, found.weights)


class Trap:
    """Leaves a mark when unpickled."""

    sprung = False

    def __reduce__(self) -> Any:
        return (setattr, (Trap, "sprung", True))


def test_reading_runs_nothing(tmp_path: Path) -> None:
    bad = np.array([Trap()], dtype=object)
    np.savez(tmp_path / "trap.npz", head=bad, values=bad, weights=bad)
    with pytest.raises(ValueError, match="allow_pickle"):
        Spectrum.load(tmp_path / "trap.npz")
    assert not Trap.sprung


def test_extremes_finds_repeated_eigenvalues() -> None:
    inner = np.linspace(-1, 1, 191)
    matrix = Matrix(symmetric(200, 0, [*[10.0] * 4, 7.0, *[-5.0] * 3, -4.0, *inner]))
    largest, smallest = extremes(matrix)
    assert largest == pytest.approx([10, 10, 10, 10, 7], rel=1e-6)
    assert smallest == pytest.approx([-5, -5, -5, -4, -1], rel=1e-3)
    single = spectrum(matrix, Effort(3, 100), dense=0)  # one vector cannot tell how often, but weighs it
    assert single.lambda_max.value == pytest.approx(10)


@pytest.mark.parametrize("value", [0.0, 3.0, -3.0])
def test_extremes_of_a_multiple_of_the_identity(value: float) -> None:
    largest, smallest = extremes(Matrix(value * torch.eye(30).double()))
    assert largest == pytest.approx([value] * 5) and smallest == pytest.approx([value] * 5)


@given(st.integers(1, 40), st.integers(1, 6), st.integers(0, 1000))
@few
def test_extremes_are_the_ends_of_the_spectrum(size: int, count: int, seed: int) -> None:
    matrix = symmetric(size, seed)
    wanted, count = eigenvalues(matrix), min(count, size)
    largest, smallest = extremes(Matrix(matrix), count)
    assert largest == pytest.approx(wanted[::-1][:count], abs=1e-5)
    assert smallest == pytest.approx(wanted[:count], abs=1e-5)


def test_extremes_of_a_low_rank_are_not_made_up() -> None:
    largest, smallest = extremes(Matrix(symmetric(100, 0, [4.0, 2.0, *[0.0] * 98])))
    assert largest == pytest.approx([4, 2, 0, 0, 0], abs=1e-9) and smallest == pytest.approx([0] * 5, abs=1e-9)


def test_hutchinson_is_unbiased() -> None:
    for seed in range(3):
        matrix = symmetric(100, seed)
        found = hutchinson(Matrix(matrix), 200, seed)
        spread = 2 * (matrix.square().sum() - matrix.diag().square().sum())  # its variance, in closed form
        assert found.error == pytest.approx(math.sqrt(spread / 200), rel=0.25)
        assert abs(found.value - matrix.trace()) <= 3 * found.error
    assert hutchinson(Matrix(torch.diag(torch.arange(5.0))), 3).value == pytest.approx(10)
    assert math.isinf(hutchinson(Matrix(torch.eye(3)), 1).error), "of one vector nothing is known"


# The way in.


def test_a_models_spectrum_in_one_call() -> None:
    model = net(5, 8, 3)
    inputs, targets = torch.randn(30, 5).double(), torch.randint(3, (30,))
    problem = problem_of(model, lambda out, b: cross_entropy(out, b["target"]), {"obs": inputs, "target": targets})
    found = hessian_spectrum(model, cross_entropy, (inputs, targets), chunk=11)
    assert found.exact and found.values[0] == pytest.approx(eigenvalues(hessian_of(problem)), abs=1e-10)
    for name in ("0.weight", "0.bias"):
        model.get_parameter(name).requires_grad_(False)
    part = problem.of({name: value for name, value in model.named_parameters() if name.startswith("2")})
    found = hessian_spectrum(model, cross_entropy, (inputs, targets), probes=3, steps=2)
    assert found.size == part.size == 27 and found.exact  # as many products as 500 rows take are always taken
    assert close(Hessian(supervised(model, cross_entropy, (inputs, targets))).dense(), hessian_of(part))


def test_a_sum_is_not_taken_in_chunks() -> None:
    def total(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return (outputs - targets).square().sum()

    batch = (torch.randn(30, 5).double(), torch.randn(30, 3).double())
    with pytest.raises(CurvatureError, match="not a mean over samples"):
        hessian_spectrum(net(5, 8, 3), total, batch, chunk=8)
    assert hessian_spectrum(net(5, 8, 3), total, batch).exact


@pytest.mark.parametrize(
    "bad",
    [
        {"probes": 0},
        {"steps": 1},
        {"products": -3},
        {"products": 0},
        {"products": 2.5},
        {"memory": 0},
        {"resolution": 0},
        {"resolution": 2},
        {"resolution": math.nan},
        {"eps": [-1.0]},
        {"relative": [math.nan]},
    ],
    ids=str,
)
def test_an_effort_that_is_none_is_refused(bad: dict[str, Any]) -> None:
    (name,) = bad
    with pytest.raises(ValueError, match=f"^{name}: .* is not a "):
        Effort(**bad)
    with pytest.raises(ValueError, match=f"^{name}: "):
        hessian_spectrum(net(5, 8, 3), cross_entropy, (torch.randn(9, 5).double(), torch.randint(3, (9,))), **bad)


@pytest.mark.filterwarnings("ignore:Complex modules")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.complex64], ids=str)
def test_a_dtype_that_curvature_is_not_taken_in_is_refused(dtype: torch.dtype) -> None:
    model, inputs = nn.Linear(5, 3).to(dtype), torch.randn(9, 5).to(dtype)
    with pytest.raises(CurvatureError, match=f"float32 or float64, not in {str(dtype)[6:]}"):
        hessian_spectrum(model, lambda out, targets: out.square().mean(), (inputs, torch.zeros(9)))
    with pytest.raises(CurvatureError, match="float32 or float64"):
        spectrum(Matrix(torch.eye(4, dtype=dtype)))


class Steep(nn.Module):
    """Loss and gradient at 0 are 0, and the second derivative is infinite."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """|w|^1.5 of each weight."""
        return inputs * (self.weight.abs() ** 1.5).sum()


@pytest.mark.parametrize("size", [5, 1500])
def test_curvature_that_is_not_finite_is_refused_on_every_path(size: int) -> None:
    model, batch = Steep(size), (torch.ones(4, 1), torch.zeros(4))
    with pytest.raises(CurvatureError, match="is not finite"):
        hessian_spectrum(model, lambda out, targets: out.mean(), batch)
    with pytest.raises(CurvatureError, match="is not finite"):
        spectrum(Matrix(torch.eye(1500) * 1e38))
    with pytest.raises(CurvatureError, match="is not finite"):
        exact_spectrum(torch.full((3, 3), math.inf), torch.float32, {})


def test_a_matrix_without_rows_is_refused() -> None:
    for dense in (None, 0):
        with pytest.raises(CurvatureError, match="without rows"):
            spectrum(Matrix(torch.zeros(0, 0)), dense=dense)
    with pytest.raises(CurvatureError, match="without rows"):
        exact_spectrum(torch.zeros(0, 0), torch.float32, {})


def test_a_spectrum_of_which_no_count_is_wanted() -> None:
    torch.manual_seed(0)
    inputs, targets = torch.randn(50, 600), torch.randint(3, (50,))
    model = nn.Linear(600, 3)
    found = hessian_spectrum(model, cross_entropy, (inputs, targets), eps=(), relative=())
    wanted = np.linalg.eigvalsh(Hessian(supervised(model, cross_entropy, (inputs, targets))).dense().double().numpy())
    assert found.lambda_max.value == pytest.approx(wanted[-1], rel=1e-3) and found.settings["steps"] >= 2
    assert found.trace.low <= wanted.sum() <= found.trace.high


def test_a_probe_does_not_depend_on_how_many_run_beside_it() -> None:
    problem = case("cross_entropy")
    starts = probes(problem.size, 5, 0, problem.like)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = each_probe(Hessian(problem), starts, 20)
        torch.set_num_threads(3)
        operator = Hessian(problem)
        beside = each_probe(operator, starts, 20)
        assert torch.get_num_threads() == 3 and operator.twin() is not None
    finally:
        torch.set_num_threads(threads)
    for one, other in zip(alone, beside, strict=True):
        assert np.array_equal(one.diagonal, other.diagonal) and np.array_equal(one.off, other.off)


def test_what_fails_in_a_thread_fails_outside_it() -> None:
    class Broken(Matrix):
        def rows(self, block: torch.Tensor) -> torch.Tensor:
            return block * float("nan")

        def twin(self) -> Matrix:
            return Broken(self.matrix)

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with pytest.raises(CurvatureError, match="not finite"):
            each_probe(Broken(symmetric(20, 0)), probes(20, 4, 0, torch.empty(0, dtype=torch.float64)), 5)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


def test_single_precision_will_do() -> None:
    problem = case("cross_entropy")
    wanted = eigenvalues(hessian_of(problem))
    assert isinstance(problem.batch, dict)
    problem.module.float()
    batch = {name: value.float() if value.is_floating_point() else value for name, value in problem.batch.items()}
    operator = Hessian(problem_of(problem.module, problem.objective, batch))
    found = spectrum(operator, Effort(10, 203), dense=0)
    assert extremes(operator)[0] == pytest.approx(wanted[::-1][:5], rel=1e-3)
    rank = found.epsilon_rank(1e-2)
    assert rank.low <= (np.abs(wanted) > 1e-2).mean() <= rank.high


# Ranks.


def test_ranks_of_the_identity() -> None:
    eye = torch.eye(5)
    assert effective_rank(eye) == pytest.approx(5) and stable_rank(eye) == pytest.approx(5)
    assert srank(eye) == 5 and srank(eye, delta=0.2) == 4 and srank(eye, delta=0.21) == 4
    assert participation_ratio(eye, centred=False) == pytest.approx(5)
    assert participation_ratio(eye) == pytest.approx(4), "centred, the rows add up to nothing"
    assert feature_rank(eye) == 5 and feature_rank(eye, eps=0.45) == 0 and feature_rank(eye, eps=0.44) == 5


@pytest.mark.parametrize("name", RANKS)
def test_every_rank_of_simple_matrices(name: str) -> None:
    rank: Any = RANKS[name]
    line = torch.outer(torch.randn(7), torch.randn(4)).double()
    assert rank(line, centred=False) == pytest.approx(1.0)
    assert rank(line, centred=True) == pytest.approx(1.0)
    same = torch.ones(7, 1) * torch.tensor([1.0, 2.0, 4.0])  # one row, again and again
    assert rank(same, centred=False) == pytest.approx(1.0) and rank(same, centred=True) == 0.0
    assert rank(torch.zeros(6, 3)) == 0.0
    for bad in (math.nan, math.inf):
        broken = torch.ones(4, 3)
        broken[1, 2] = bad
        assert math.isnan(rank(broken)), "a rank of what is not a number is none"
    wide = torch.randn(9, 4)
    assert rank(wide) == pytest.approx(rank(wide @ torch.linalg.qr(torch.randn(4, 4))[0]), rel=1e-5)
    assert rank(wide, centred=True) == pytest.approx(rank(wide + 5.0, centred=True), rel=1e-4)


def test_stable_rank_is_not_srank() -> None:
    matrix = torch.diag(torch.tensor([2.0, 1.0, 1.0]))
    assert stable_rank(matrix) == pytest.approx(1.5) and srank(matrix) == 3.0


@given(st.lists(st.floats(0.01, 10), min_size=1, max_size=8), st.integers(0, 100))
@few
def test_ranks_follow_from_the_singular_values(values: list[float], seed: int) -> None:
    known = np.sort(np.array(values))[::-1]
    torch.manual_seed(seed)
    left, right = (torch.linalg.qr(torch.randn(size, len(known)).double())[0] for size in (12, 8))
    matrix = left @ torch.diag(torch.tensor(known.copy())) @ right.T
    full = np.pad(known, (0, 8 - len(known)))
    assert singular_values(matrix).numpy() == pytest.approx(full, abs=1e-9)
    shares = known / known.sum()
    assert effective_rank(matrix) == pytest.approx(math.exp(-(shares * np.log(shares)).sum()))
    assert stable_rank(matrix) == pytest.approx((known**2).sum() / known[0] ** 2)
    assert participation_ratio(matrix, centred=False) == pytest.approx((known**2).sum() ** 2 / (known**4).sum())
    assert feature_rank(matrix, 0.5) == (known / math.sqrt(12) > 0.5).sum()
    for delta in (0.013, 0.217):
        held, count = 0.0, 0
        while held < (1 - delta) * known.sum():
            held, count = held + known[count], count + 1
        assert srank(matrix, delta) == count


def test_sranks_delta_is_met_exactly() -> None:
    assert srank(torch.diag(torch.tensor([98.0, 1.0, 1.0, 0.0]))) == 2.0
    assert srank(torch.diag(torch.tensor([99.0, 1.0]))) == 1.0
    assert srank(torch.diag(torch.tensor([98.9, 1.1]))) == 2.0


# Mistakes.


def test_dropout_in_training_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.5), nn.Linear(16, 3)).double()
    batch = (torch.randn(20, 4).double(), torch.randint(3, (20,)))
    sentence = r"two evaluations of the loss differ \(.* and .*\): put dropout and sampling aside"
    with pytest.raises(CurvatureError, match=sentence):
        hessian_spectrum(model, cross_entropy, batch)
    assert hessian_spectrum(model.eval(), cross_entropy, batch).exact


def test_a_parameter_out_of_reach_is_named() -> None:
    model = net(4, 3)
    batch = (torch.randn(8, 4).double(), torch.randint(3, (8,)))
    model.register_module("spare", nn.Linear(2, 2).double())
    with pytest.raises(CurvatureError, match=r"does not touch parameter '0\.weight' and 1 more"):
        idle = net(4, 3)
        problem_of(idle, lambda out, b: net(4, 3)(b["obs"]).mean(), {"obs": batch[0]}).check()
    model.forward = lambda inputs: model[0](inputs)  # type: ignore[method-assign]
    with pytest.raises(CurvatureError, match=r"does not touch parameter 'spare\.weight' and 1 more: leave it out"):
        hessian_spectrum(model, cross_entropy, batch)
    with pytest.raises(CurvatureError, match=r"'spare\.bias': leave"):
        hessian_spectrum(model, cross_entropy, batch, parameters={"spare.bias": model.get_parameter("spare.bias")})


def test_a_loss_that_is_no_number_is_refused() -> None:
    problem = case("cross_entropy")
    for bad in (math.nan, math.inf):
        with pytest.raises(CurvatureError, match="the loss is not finite"):
            problem_of(problem.module, lambda out, b, bad=bad: out.mean() * bad, dict(problem.batch)).check()
    with pytest.raises(CurvatureError, match="no parameters"):
        problem.of({}).check()


def test_a_gradient_that_is_no_number_is_refused() -> None:
    problem = problem_of(net(4, 3), lambda out, b: (0 * out).sqrt().mean(), {"obs": torch.randn(8, 4).double()})
    with pytest.raises(CurvatureError, match="the gradient is not finite"):
        problem.check()


class Square(torch.autograd.Function):
    """A square whose derivative cannot be differentiated again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        found: Tensor = 2 * ctx.saved_tensors[0] * slope
        return found


class Once(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = Square.apply(x)
        return found


def without_second_derivative(name: str) -> Problem:
    torch.manual_seed(0)
    target = torch.randint(3, (8,))
    if name == "embedding_bag":
        module = nn.Sequential(nn.EmbeddingBag(10, 4), nn.Tanh(), nn.Linear(4, 3)).double()
        batch = {"obs": torch.randint(10, (8, 3)), "target": target}
    else:
        module = nn.Sequential(nn.Linear(4, 5), Once(), nn.Linear(5, 3)).double()
        batch = {"obs": torch.randn(8, 4).double(), "target": target}
    return problem_of(module, lambda out, b: cross_entropy(out, b["target"]), batch)


@pytest.mark.parametrize("name", ["embedding_bag", "once_differentiable"])
@pytest.mark.parametrize("matrix", [Hessian, GGN, Gram])
def test_an_operation_without_second_derivative_is_refused(name: str, matrix: Any) -> None:
    with pytest.raises(CurvatureError, match="no second derivative"):
        matrix(without_second_derivative(name)).dense()


def test_batch_norm_keeps_its_running_statistics() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)).double().train()
    batch = {"obs": torch.randn(16, 4).double(), "target": torch.randint(3, (16,))}
    module(batch["obs"])
    problem = problem_of(module, lambda out, b: cross_entropy(out, b["target"]), batch)
    before, buffers = copy.deepcopy(module.state_dict()), dict(module.named_buffers())
    problem.check()
    problem.gradient()
    dense = Hessian(problem).dense()
    for weight in ("loss", "none"):
        GGN(problem, weight).dense()
        gram = Gram(problem, weight)
        gram.dense()
        gram.residual()
        kronecker(problem, weight)
    hutchinson(Hessian(problem), 2)
    after = module.state_dict()
    assert int(after["1.num_batches_tracked"]) == 1
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(dict(module.named_buffers())[name] is value for name, value in buffers.items())
    assert module.training and all(parameter.grad is None for parameter in module.parameters())
    module.load_state_dict(before)
    twin = Problem(**{**vars(problem), "module": copy.deepcopy(module)})  # its statistics may move
    wanted = torch.autograd.functional.hessian(lambda vector: loss_at(twin, vector), point(problem))
    assert isinstance(wanted, Tensor) and close(dense, wanted)


def test_gradients_and_modes_are_left_alone() -> None:
    problem = case("cross_entropy")
    for value in problem.parameters.values():
        value.grad = torch.ones_like(value)
    with torch.no_grad():  # as monitors may have it
        Hessian(problem).dense()
        Gram(problem).dense()
        kronecker(problem)
        problem.gradient()
    assert all(value.grad is not None and (value.grad == 1).all() for value in problem.parameters.values())
    assert not any(part._forward_hooks for part in problem.module.modules())


# Mutants: what the tests above would say of broken variants.


def test_lanczos_without_orthogonalisation_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = symmetric(30, 3)
    reproduces(matrix)
    monkeypatch.setattr(LANCZOS, "_orthogonalise", lambda image, basis: None)
    with pytest.raises(AssertionError):
        reproduces(matrix)


def test_lanczos_with_ghosts_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The textbook's three-term recurrence: eigenvalues far from the others come back as copies."""
    matrix = symmetric(60, 3, [1000.0, 300.0, *np.linspace(0, 1, 58)])
    reproduces(matrix)

    def shallow(image: Tensor, basis: Tensor) -> None:
        for before in basis[-2:].flip(0):
            image -= (image @ before) * before

    monkeypatch.setattr(LANCZOS, "_orthogonalise", shallow)
    with pytest.raises(AssertionError):
        reproduces(matrix)


def test_chunks_without_their_share_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = case("cross_entropy", (4, 6), 24)
    chunks_add_up(problem)

    def blind(self: Problem) -> Iterator[Any]:
        for start in range(0, self.samples, self.chunk or self.samples):
            yield {k: v[start : start + (self.chunk or self.samples)] for k, v in dict(self.batch).items()}, 1.0

    monkeypatch.setattr(Problem, "chunks", blind)
    with pytest.raises(AssertionError):
        chunks_add_up(problem)


def test_a_gram_with_the_weight_for_its_root_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = case("cross_entropy")
    shares_its_spectrum(problem)
    monkeypatch.setattr(OPERATORS, "root_of", lambda weight, kind: weight)
    with pytest.raises(AssertionError):
        shares_its_spectrum(problem)
