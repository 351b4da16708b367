"""The curvature of the agent's own loss on the new task's data: the reason this suite exists.

Before the first update of a visit, the Hessian at the inherited weights says how many directions there are to learn
in (arXiv 2509.22335). A count is known between `/low` and `/high` (at four standard errors of chance, of which
`/error` is one), and is NaN, with the reason, where these are further apart than `resolution`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from crl.checked import number, truth, whole
from crl.core import CrlError
from crl.linalg import (
    CurvatureError,
    Effort,
    Estimate,
    Operator,
    Problem,
    Spectrum,
    entropy_rank,
    exact_spectrum,
    ggn_spectrum,
    kronecker,
    merged,
    operators,
    spectrum,
)
from crl.linalg.memory import available, needed, room_for_gram, room_for_matrix, too_much
from crl.linalg.resolve import PRODUCTS
from crl.linalg.spectrum import EPS, RELATIVE, RESOLUTION
from crl.monitors.look import Look, View, problem_of


class Hessian(Look):
    """The Hessian spectrum of the real loss on the new task's data, of each network and of all parameters together.

    Lanczos steps, and probes, are added until each count is resolved, within a budget of `products` a network and
    `memory` GiB for a basis; `probes` and `steps` fix them instead. Small networks' eigenvalues are all computed. `of`
    chooses networks, or layers by the beginning of their parameters' names. `rho` adds `tau_trainable`, the paper's
    necessary condition: is the epsilon-rank (at the first `eps`) at least rho? The paper leaves rho open, so there is
    no default. `exact: true` computes every eigenvalue, of as many rows as fit in memory. Cost: at most `products`
    products of about three gradients each; where exact, one a row.
    """

    operator: Callable[[Problem], Operator] = operators.Hessian

    def __init__(
        self,
        *,
        probes: int | None = None,
        steps: int | None = None,
        at: Iterable[str] | str = "init",
        of: Sequence[str] | str = (),
        eps: Sequence[float] = EPS,
        relative: Sequence[float] = RELATIVE,
        resolution: float = RESOLUTION,
        products: int = PRODUCTS,
        memory: float = 2.0,
        exact: bool = False,
        rho: float | None = None,
        chunk: int | None = None,
        fewer: bool = False,
        **look: Any,
    ) -> None:
        super().__init__(at=at, **look)
        for name, value, least, most in (("probes", probes, 1, 10_000), ("steps", steps, 2, 100_000)):
            if value is not None:
                whole(name, value, least, most)
        whole("products", products, 2)
        number("resolution", resolution, 1e-6, 1.0)
        number("memory", memory, 1e-6)
        if chunk is not None:
            whole("chunk", chunk, 1)
        if not isinstance(of, str | list | tuple):
            raise CrlError(f"of: {of!r} is not a list of networks and layers")
        if rho is not None:
            number("rho", rho, 0.0)
        self.chunk, self.fewer, self.exact = chunk, truth("fewer", fewer), truth("exact", exact)
        self.of = (of,) if isinstance(of, str) else tuple(of)
        self.eps, self.relative, self.rho = _shares("eps", eps), _shares("relative", relative), rho
        self.effort = Effort(probes, steps, self.eps, self.relative, resolution, products, int(memory * 2**30))

    @property
    def products(self) -> int:
        """How many products with the matrix a look takes, at most."""
        return self.effort.most

    def shortened(self, steps: int) -> Hessian:
        """A monitor that takes no more than so many, by which a look's time is estimated."""
        short = copy.copy(self)
        short.effort = replace(self.effort, probes=1, steps=steps)
        return short

    def look(self, view: View) -> Mapping[str, Any]:
        """`<network>`, its spectrum, and `<network>/<number>` for each number of it."""
        problem = fitting(view, self.chunk, self.effort, self.fewer)
        problem.check()
        found: dict[str, Any] = {"samples": problem.samples}
        for network, seen in self._spectra(view, problem).items():
            found |= numbers_of(network, seen, self.eps, self.relative)
            found[f"{network}/products"] = seen.settings["products"]
            if self.rho is not None:
                found[f"{network}/tau_trainable"] = self._trainable(seen, self.rho)
        return found

    def _trainable(self, seen: Spectrum, rho: float) -> Estimate:
        told, rank = seen.trainable(rho, self.eps[0]), seen.epsilon_rank(self.eps[0])
        if told is None:
            return Estimate(math.nan, 0.0, 1.0, reason=f"the rank is between {rank.low:.3g} and {rank.high:.3g}")
        return Estimate(float(told), float(told), float(told))

    def _spectra(self, view: View, problem: Problem) -> dict[str, Spectrum]:
        parts = self._parts(view.networks, problem)
        operator = type(self).operator

        def of(name: str, matrix: Operator) -> Spectrum:
            def tell(what: str) -> None:
                view.boundary.tell(f"{name}, {what}")

            return self._spectrum(matrix, view.boundary.seed, tell)

        seen = {name: of(name, operator(problem.of(parameters))) for name, parameters in parts.items()}
        if not self.of and len(parts) > 1:
            every = operator(problem)
            apart = _apart(every, problem, parts)
            seen["all"] = merged([seen[name] for name in parts]) if apart else of("all", every)
        settings = {"samples": problem.samples, "chunk": self.chunk}
        return {name: replace(each, settings={**each.settings, **settings}) for name, each in seen.items()}

    def _spectrum(self, matrix: Operator, seed: int, tell: Callable[[str], None]) -> Spectrum:
        if self.exact:
            room_for_matrix(matrix.size, matrix.like.device)
        return spectrum(matrix, self.effort, seed, matrix.size if self.exact else None, tell)

    def _parts(
        self, networks: Mapping[str, Mapping[str, nn.Parameter]], problem: Problem
    ) -> dict[str, Mapping[str, nn.Parameter]]:
        if not self.of:
            return dict(networks)
        parts: dict[str, Mapping[str, nn.Parameter]] = {}
        for name in self.of:
            inside = {n: p for n, p in problem.parameters.items() if name == "all" or f"{n}.".startswith(f"{name}.")}
            parts[name] = networks.get(name, inside)
            if not parts[name]:
                layers = sorted({n.rpartition(".")[0] for n in problem.parameters} - {""})
                raise CrlError(f"of: there is no network or layer {name!r}; here are {', '.join([*networks, *layers])}")
        return parts


class GGN(Hessian):
    """The spectrum of the generalised Gauss-Newton matrix J'LJ: the Hessian without the network's own curvature.

    Where the loss is not convex in the outputs (PPO's surrogate) it can have negative eigenvalues too. Its rank is at
    most samples x outputs: `<network>/rank_bound`, as a share. Cost: as the Hessian's. `exact: true` computes every
    eigenvalue through the Gram matrix J J' instead: samples x outputs products and a matrix of that size.
    """

    operator = operators.GGN

    def look(self, view: View) -> Mapping[str, Any]:
        """As the Hessian's, and the bound on the rank."""
        found = dict(super().look(view))
        for network, parameters in self._parts(view.networks, view.problem).items():
            bound = operators.Gram.rows_of(view.problem) / sum(p.numel() for p in parameters.values())
            found[f"{network}/rank_bound"] = min(bound, 1.0)
        return found

    def _spectrum(self, matrix: Operator, seed: int, tell: Callable[[str], None]) -> Spectrum:
        if not self.exact:
            return super()._spectrum(matrix, seed, tell)
        assert isinstance(matrix, operators.GGN)
        tell("every eigenvalue, through the Gram matrix")
        return ggn_spectrum(matrix.problem, self.effort, seed)


class Gram(Look):
    """The loss-weighted Gram L^1/2 J J' L^1/2, which shares the GGN's non-zero spectrum; for PPO the Fisher Gram.

    PPO's surrogate is not convex in the outputs, so it is weighted by the policy's Fisher information instead, and
    its names begin with `fisher`, not `loss`. `reachable_<eps>` is our reading of the epsilon-rank condition of arXiv
    2509.22335 v3: the share of the weighted residual (squared) in eigenvectors with an eigenvalue above eps. Cost:
    samples x outputs products.
    """

    weights: tuple[str, ...] = ("loss", "metric")

    def __init__(
        self,
        *,
        samples: int = 64,
        at: Iterable[str] | str = "init",
        eps: Sequence[float] = EPS,
        relative: Sequence[float] = RELATIVE,
        **look: Any,
    ) -> None:
        super().__init__(at=at, samples=samples, **look)
        self.eps, self.relative = _shares("eps", eps), _shares("relative", relative)

    def look(self, view: View) -> Mapping[str, Any]:
        """`<weight>`, the spectrum, and `<weight>/<number>`."""
        problem = view.problem
        problem.check()
        room_for_gram(problem)
        name, operator = self._operator(problem)
        matrix = operator.dense().double()
        values, vectors = torch.linalg.eigh(matrix)
        seen = exact_spectrum(matrix, problem.like.dtype, {"samples": problem.samples})
        found = numbers_of(name, seen, self.eps, self.relative)
        if name == "loss":
            part = (vectors.T @ operator.residual()).square()
            for eps in self.eps:
                share = part[values > eps].sum() / part.sum() if part.sum() > 0 else part.sum()
                found[f"{name}/reachable_{eps:g}"] = float(share)
        return found

    def _operator(self, problem: Problem) -> tuple[str, operators.Gram]:
        names = {"loss": "loss", "metric": "fisher", "none": "ntk"}
        *others, last = self.weights
        for weight in others:
            try:
                return names[weight], operators.Gram(problem, weight)
            except CurvatureError:
                if problem.metric is None:
                    raise
        return names[last], operators.Gram(problem, last)


class NTK(Gram):
    """The plain neural tangent kernel J J' over samples x outputs, not divided by anything. Cost: as the Gram's."""

    weights = ("none",)


class KFAC(Look):
    """Effective ranks of each layer's Kronecker factors: A of its inputs and G of its backward signals.

    rank(A x G) = rank(A) rank(G) is the argument by which arXiv 2509.22335 raises the rank of activations. G is
    weighted by the loss, or for PPO by the policy's Fisher information. Cost: one backward pass an output.
    """

    def __init__(self, *, at: Iterable[str] | str = "init", **look: Any) -> None:
        super().__init__(at=at, **look)

    def look(self, view: View) -> Mapping[str, float]:
        """`<layer>/A` and `<layer>/G`."""
        view.problem.check()
        try:
            factors = kronecker(view.problem)
        except CurvatureError:
            if view.problem.metric is None:
                raise
            factors = kronecker(view.problem, "metric")
        found = {}
        for layer, pair in factors.items():
            for name, matrix in (("A", pair.inputs), ("G", pair.signals)):
                values = torch.linalg.eigvalsh(matrix.double()).clamp(min=0)
                found[f"{layer}/{name}"] = float(entropy_rank(values))
        return found


def numbers_of(name: str, seen: Spectrum, eps: Sequence[float], relative: Sequence[float]) -> dict[str, Any]:
    """A spectrum under its name, and everything that it comes to under `<name>/<number>`."""
    estimates = {f"{name}/{key}": value for key, value in seen.estimates(eps, relative).items()}
    return {name: seen, f"{name}/zero_rows": seen.zero_rows / seen.size, **estimates}


def fitting(view: View, chunk: int | None, effort: Effort, fewer: bool) -> Problem:
    """The problem, if it fits in memory: with fewer samples only where that is allowed."""
    steps = effort.fixed[1] if effort.fixed else 2
    problem, free = problem_of(view.agent, view.batch, chunk), available(view.problem.like.device)
    while free is not None and (need := needed(problem, steps)) > free:
        if not fewer or problem.samples <= 2:
            what = f"{problem.samples:,} samples and {steps} steps on {problem.size:,} parameters"
            raise CurvatureError(too_much(what, need, free, "samples or steps, set chunk, or allow `fewer: true`"))
        half = {name: value[: problem.samples // 2] for name, value in view.batch.items()}
        problem = problem_of(view.agent, half, chunk)
    return problem


def _apart(operator: Operator, problem: Problem, parts: Mapping[str, Mapping[str, nn.Parameter]]) -> bool:
    """Whether the matrix has no entry between the networks: a vector in one leaves the others at zero."""
    names = [name for parameters in parts.values() for name in parameters]
    if sorted(names) != sorted(problem.parameters):
        return False
    owner = {name: network for network, parameters in parts.items() for name in parameters}
    order = list(parts)
    marks = [problem.like.new_full((p.numel(),), order.index(owner[name])) for name, p in problem.parameters.items()]
    mark = torch.cat(marks)
    for i in range(len(parts) - 1):
        image = operator.rows((mark == i).to(mark.dtype)[None])[0]
        if image[mark != i].abs().max() > 0:
            return False
    return True


def _shares(name: str, values: Sequence[float]) -> tuple[float, ...]:
    found = tuple(values) if isinstance(values, list | tuple) else (values,)
    if not found:
        raise CrlError(f"{name}: {values!r} is not a list of numbers of at least 0")
    return tuple(number(name, value, 0.0) for value in found)
