"""Curvature as matrices that are never written down: what each does to a block of vectors.

With J the Jacobian of the outputs by the parameters (rows: samples x numbers) and L the second derivative of the mean
loss by the outputs (a block for each sample), and f the outputs:

    Hessian  = J' L J + sum_i (dloss/df_i) f_i''      GGN  = J' L J
    Gram     = L^1/2 J J' L^1/2                       NTK  = J J'

The GGN and the Gram share their non-zero eigenvalues. Where the loss is not convex in the outputs (PPO's surrogate),
L has no root: the Gram then takes the problem's `metric` instead, and is a Fisher Gram.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from crl.linalg.problem import Batch, CurvatureError, Problem, flat, rows, steady, unflat

SMALL = 100_000  # parameters up to which a product keeps no more than one core busy, and a second basis is light
KEEP = 2_048  # samples whose graph is kept between products; with more, each chunk's is built anew


class Operator:
    """A symmetric matrix of a size, applied to vectors: rows of a (k, size) tensor, or `operator @ columns`."""

    size: int
    like: Tensor  # an empty tensor of its kind and place

    def rows(self, block: Tensor) -> Tensor:
        """The matrix times each row."""
        raise NotImplementedError

    def twin(self) -> Operator | None:
        """An equal one for another thread to use at the same time; None where one thread is to have all cores."""
        return None

    def __matmul__(self, columns: Tensor) -> Tensor:
        if columns.ndim == 1:
            return self.rows(columns[None])[0]
        return self.rows(columns.T.contiguous()).T

    def dense(self, block: int = 64) -> Tensor:
        """The matrix itself, made symmetric: for small ones."""
        unit = torch.eye(self.size, dtype=self.like.dtype, device=self.like.device)
        whole = torch.cat([self.rows(part) for part in torch.split(unit, block)])
        return (whole + whole.T) / 2


class Matrix(Operator):
    """A matrix that is written down."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix, self.size, self.like = matrix, len(matrix), matrix.new_empty(0)

    def rows(self, block: Tensor) -> Tensor:
        """The matrix times each row."""
        return block @ self.matrix


class Restricted(Operator):
    """A matrix on some coordinates only."""

    def __init__(self, operator: Operator, places: Tensor) -> None:
        self.operator, self.places, self.size, self.like = operator, places, len(places), operator.like

    def twin(self) -> Operator | None:
        """The same places of a twin."""
        twin = self.operator.twin()
        return None if twin is None else Restricted(twin, self.places)

    def rows(self, block: Tensor) -> Tensor:
        """The restricted matrix times each row."""
        whole = block.new_zeros(len(block), self.operator.size)
        whole[:, self.places] = block
        return self.operator.rows(whole)[:, self.places]


class _Graphs(Operator):
    """What has a problem and works on a graph for each chunk of its data, kept where all of them are few enough."""

    def __init__(self, problem: Problem) -> None:
        self.problem, self.like = problem, problem.like
        self._kept: list[Any] | None = None

    def twin(self) -> Operator | None:
        """One with graphs of its own, since a graph is locked while it is used; for networks that are not large."""
        if self.problem.size > SMALL or self.problem.samples > KEEP or self.like.device.type != "cpu":
            return None
        other = copy.copy(self)
        other._kept = None
        for _ in other._graphs():
            pass
        return other

    def _graph(self, batch: Batch, share: float) -> Any:
        raise NotImplementedError

    def _graphs(self) -> Iterator[Any]:
        if self._kept is not None:
            yield from self._kept
            return
        keep: list[Any] | None = [] if self.problem.samples <= KEEP else None
        for batch, share in self.problem.chunks():
            graph = self._graph(batch, share)
            if keep is not None:
                keep.append(graph)
            yield graph
        self._kept = keep


class Hessian(_Graphs):
    """The Hessian of a mean loss: a second backward pass over the graph of the first, which is built once.

    A vector at a time: sending several through the graph at once (vmap) was no faster on the networks it was timed on.
    """

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.size = problem.size

    def _graph(self, batch: Batch, share: float) -> list[Tensor]:
        """The gradient of a chunk, as a graph that can be differentiated again."""
        parameters = list(self.problem.parameters.values())
        with torch.enable_grad(), steady(self.problem.module):
            loss = self.problem.objective(self.problem.outputs(batch), batch) * share
            return _twice(torch.autograd.grad(loss, parameters, create_graph=True))

    def rows(self, block: Tensor) -> Tensor:
        """H times each row."""
        out = torch.zeros_like(block)
        parameters = list(self.problem.parameters.values())
        for graph in self._graphs():
            live = [i for i, part in enumerate(graph) if part.requires_grad]  # the others are constant
            if not live:
                continue
            for i, vector in enumerate(block):
                parts = unflat(vector, self.problem.parameters)
                found = _derivative([graph[j] for j in live], parameters, [parts[j] for j in live])
                out[i] += flat(found, self.problem.parameters)
        return out


def _twice(gradients: Sequence[Tensor | None]) -> list[Any]:
    """Gradients, once it is sure that nothing in their graph forbids a second derivative.

    A function that is differentiable once leaves an error in the graph, which the engine steps around in silence where
    it is not on the way to what is asked for.
    """
    seen: set[Any] = set()
    ahead = [part.grad_fn for part in gradients if part is not None]
    while ahead:
        node = ahead.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name() == "torch::autograd::Error":
            raise CurvatureError("an operation of this network has no second derivative: it is differentiable once")
        ahead += [following for following, _ in node.next_functions]
    return list(gradients)


def _derivative(outputs: list[Tensor], inputs: Sequence[Tensor], weights: list[Tensor]) -> tuple[Tensor | None, ...]:
    try:
        return torch.autograd.grad(outputs, inputs, weights, retain_graph=True, allow_unused=True)
    except (RuntimeError, NotImplementedError) as error:
        text = str(error).strip().splitlines()[0]
        known = ("not implemented", "not differentiable", "double backward", "cudnn", "does not support", "derivative")
        if any(word in text.lower() for word in known):
            raise CurvatureError(f"an operation of this network has no second derivative: {text}") from error
        raise


@dataclass
class _Linear:
    """A chunk of data with the graph that goes from parameters to outputs, and back twice."""

    outputs: Tensor  # (samples, numbers)
    weight: Tensor  # L: (samples, numbers, numbers)
    lever: Tensor  # what the transposed Jacobian is multiplied with, so that its derivative is the Jacobian
    transposed: tuple[Tensor | None, ...]


class _JacobianOperator(_Graphs):
    """What the GGN, the Gram and the NTK share: J and J' as products, one chunk at a time."""

    def __init__(self, problem: Problem, weight: str) -> None:
        super().__init__(problem)
        self.weight = weight

    def _graph(self, batch: Batch, share: float) -> _Linear:
        with torch.enable_grad(), steady(self.problem.module):
            outputs = self.problem.outputs(batch)
            outputs = outputs.reshape(len(outputs), -1)
            lever = torch.zeros_like(outputs, requires_grad=True)
            parameters = list(self.problem.parameters.values())
            found = torch.autograd.grad(outputs, parameters, lever, create_graph=True, allow_unused=True)
            transposed = tuple(_twice(found))
        weight = output_weight(self.problem, outputs, batch, self.weight)
        return _Linear(outputs, weight if self.weight == "none" else weight * share, lever, transposed)

    def _push(self, graph: _Linear, vector: Tensor) -> Tensor:
        """J times a vector."""
        parts = unflat(vector, self.problem.parameters)
        pairs = [(t, v) for t, v in zip(graph.transposed, parts, strict=True) if t is not None and t.requires_grad]
        if not pairs:
            return torch.zeros_like(graph.lever)
        (found,) = _derivative([t for t, _ in pairs], [graph.lever], [v for _, v in pairs])
        return torch.zeros_like(graph.lever) if found is None else found

    def _pull(self, graph: _Linear, vector: Tensor) -> Tensor:
        """J' times a vector."""
        parameters = list(self.problem.parameters.values())
        found = torch.autograd.grad(graph.outputs, parameters, vector, retain_graph=True, allow_unused=True)
        return flat(found, self.problem.parameters)


class GGN(_JacobianOperator):
    """The generalised Gauss-Newton matrix J' L J; `weight="metric"` takes the problem's metric for L."""

    def __init__(self, problem: Problem, weight: str = "loss") -> None:
        super().__init__(problem, weight)
        self.size = problem.size

    def rows(self, block: Tensor) -> Tensor:
        """J' L J times each row."""
        out = torch.zeros_like(block)
        for graph in self._graphs():
            for i, vector in enumerate(block):
                weighted = torch.einsum("nij,nj->ni", graph.weight, self._push(graph, vector))
                out[i] += self._pull(graph, weighted)
        return out


class Gram(_JacobianOperator):
    """L^1/2 J J' L^1/2, a matrix of samples x numbers: with `weight="none"` the plain NTK Gram, with "metric" Fisher's.

    The plain one is not divided by the number of samples.
    """

    def __init__(self, problem: Problem, weight: str = "loss") -> None:
        super().__init__(problem, weight)
        self.roots = [root_of(graph.weight, weight) for graph in self._graphs()]
        self.size = sum(root.shape[0] * root.shape[1] for root in self.roots)

    def rows(self, block: Tensor) -> Tensor:
        """The Gram times each row: down through every chunk, then up again."""
        down = torch.zeros(len(block), self.problem.size, dtype=block.dtype, device=block.device)
        parts = torch.split(block, [root.shape[0] * root.shape[1] for root in self.roots], dim=1)
        for graph, root, part in zip(self._graphs(), self.roots, parts, strict=True):
            for i, vector in enumerate(part):
                down[i] += self._pull(graph, torch.einsum("nij,nj->ni", root, vector.view(root.shape[:2])))
        out = []
        for graph, root in zip(self._graphs(), self.roots, strict=True):
            pushed = torch.stack([self._push(graph, vector) for vector in down])
            out.append(torch.einsum("nij,knj->kni", root, pushed).flatten(1))
        return torch.cat(out, 1)

    @staticmethod
    def rows_of(problem: Problem) -> int:
        """Samples x outputs."""
        with torch.no_grad(), steady(problem.module):
            return problem.samples * problem.outputs(rows(problem.batch, 0, 2)).reshape(2, -1).shape[1]

    def residual(self) -> Tensor:
        """L^-1/2 times the derivative of the loss by the outputs: J' L^1/2 of it is the gradient.

        Where the loss is linear in an output (Huber's, far off), L is 0 and that part of the derivative is lost.
        """
        parts = []
        for (batch, share), root in zip(self.problem.chunks(), self.roots, strict=True):
            with torch.enable_grad(), steady(self.problem.module):
                outputs = self.problem.outputs(batch).detach().requires_grad_()
                (slope,) = torch.autograd.grad(self.problem.objective(outputs, batch) * share, outputs)
            inverse = torch.linalg.pinv(root.double(), hermitian=True, rtol=1e-6)
            parts.append(torch.einsum("nij,nj->ni", inverse, slope.reshape(len(slope), -1).double()).flatten())
        return torch.cat(parts)


def output_weight(problem: Problem, outputs: Tensor, batch: Batch, weight: str) -> Tensor:
    """A matrix for each sample: the loss's second derivative by its outputs, the problem's metric, or the identity."""
    samples, numbers = outputs.shape
    if weight == "none":
        return torch.eye(numbers, dtype=outputs.dtype, device=outputs.device).expand(samples, -1, -1)
    if weight == "metric":
        if problem.metric is None:
            raise CurvatureError("the loss is not convex in the outputs, and no metric stands in for it")
        return problem.metric(outputs.detach(), batch).to(outputs.dtype) / samples
    values = outputs.detach().requires_grad_()
    with torch.enable_grad():
        (slope,) = torch.autograd.grad(problem.objective(values, batch), values, create_graph=True)
        if not slope.requires_grad:
            return outputs.new_zeros(samples, numbers, numbers)
        columns = [
            torch.autograd.grad(slope[:, i].sum(), values, retain_graph=True, allow_unused=True)[0]
            for i in range(numbers)
        ]
        found = torch.stack([torch.zeros_like(values) if column is None else column for column in columns], 1)
        uneven = torch.linspace(1, 2, numbers, dtype=slope.dtype, device=slope.device)
        mixed = torch.autograd.grad((slope[0] * uneven).sum(), values, retain_graph=True, allow_unused=True)[0]
    if mixed is not None and samples > 1 and mixed[1:].abs().max() > 1e-6 * found.abs().max():
        raise CurvatureError("the objective mixes samples: it must be a mean of one term for each sample")
    return (found + found.transpose(1, 2)) / 2


def loss_weight(problem: Problem) -> Tensor:
    """L of all samples: the second derivative of the mean loss by the outputs, (samples, numbers, numbers)."""
    parts = []
    for batch, share in problem.chunks():
        with torch.no_grad(), steady(problem.module):
            outputs = problem.outputs(batch)
        parts.append(output_weight(problem, outputs.reshape(len(outputs), -1), batch, "loss") * share)
    return torch.cat(parts)


def root_of(weight: Tensor, kind: str) -> Tensor:
    """The symmetric root of each sample's matrix."""
    if kind == "none":
        return torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device).expand_as(weight)
    values, vectors = torch.linalg.eigh(weight.double())
    if values.min() < -1e-6 * values.abs().max():
        raise CurvatureError("the loss is not convex in the outputs, so its Gram has no root: use the Fisher Gram")
    root: Tensor = (vectors * values.clamp(min=0).sqrt()[:, None, :]) @ vectors.transpose(1, 2)
    return root.to(weight.dtype)
