"""The curvature of the agent's own loss on the new task's data: the reason this suite exists.

Before the first update of a visit, the Hessian at the inherited weights says how many directions there are to learn
in (arXiv 2509.22335). Counts come from Ritz values and weights; `/half` is a number's change from half the Lanczos
steps, `/error` its standard error over probe vectors.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from crl.checked import number, truth, whole
from crl.core import CrlError
from crl.linalg import (
    CurvatureError,
    Operator,
    Problem,
    Spectrum,
    entropy_rank,
    kronecker,
    merged,
    operators,
    spectrum,
)
from crl.linalg.memory import available, graph, needed
from crl.linalg.problem import rows
from crl.linalg.spectrum import EPS, RELATIVE
from crl.monitors.look import Look, View, problem_of


class Hessian(Look):
    """The Hessian spectrum of the real loss on the new task's data, of each network and of all parameters together.

    `of` chooses networks, or layers by the beginning of their parameters' names. `rho` adds `tau_trainable`, the
    paper's necessary condition: is the epsilon-rank (at the first `eps`) at least rho? The paper leaves rho open, so
    there is no default. Cost: probes x steps products of about three gradients each.
    """

    operator: Callable[[Problem], Operator] = operators.Hessian

    def __init__(
        self,
        *,
        probes: int = 3,
        steps: int = 100,
        at: Iterable[str] | str = "init",
        of: Sequence[str] | str = (),
        eps: Sequence[float] = EPS,
        relative: Sequence[float] = RELATIVE,
        rho: float | None = None,
        chunk: int | None = None,
        fewer: bool = False,
        **look: Any,
    ) -> None:
        super().__init__(at=at, **look)
        whole("probes", probes, 1, 10_000)
        whole("steps", steps, 2, 100_000)
        if chunk is not None:
            whole("chunk", chunk, 1)
        if not isinstance(of, str | list | tuple):
            raise CrlError(f"of: {of!r} is not a list of networks and layers")
        if rho is not None:
            number("rho", rho, 0.0)
        self.probes, self.steps, self.chunk, self.fewer = probes, steps, chunk, truth("fewer", fewer)
        self.of = (of,) if isinstance(of, str) else tuple(of)
        self.eps, self.relative, self.rho = _shares("eps", eps), _shares("relative", relative), rho

    @property
    def products(self) -> int:
        """How many products with the matrix a look takes, at most."""
        return self.probes * self.steps

    def shortened(self, steps: int) -> Hessian:
        """A monitor that takes no more than so many, by which a look's time is estimated."""
        short = copy.copy(self)
        short.probes, short.steps = 1, min(self.steps, steps)
        return short

    def look(self, view: View) -> Mapping[str, Any]:
        """`<network>`, its spectrum, and `<network>/<number>` for each number of it."""
        problem = fitting(view, self.chunk, self.steps, self.fewer)
        problem.check()
        found: dict[str, Any] = {"samples": problem.samples}
        for network, seen in self._spectra(view, problem).items():
            found[network] = seen
            found |= {f"{network}/{name}": value for name, value in seen.numbers(self.eps, self.relative).items()}
            if self.rho is not None:
                found[f"{network}/tau_trainable"] = float(seen.trainable(self.rho, self.eps[0]))
        return found

    def _spectra(self, view: View, problem: Problem) -> dict[str, Spectrum]:
        parts = self._parts(view.networks, problem)
        operator = type(self).operator

        def of(name: str, matrix: Operator) -> Spectrum:
            def tell(what: str) -> None:
                view.boundary.tell(f"{name}, {what}")

            return spectrum(matrix, self.probes, self.steps, view.boundary.seed, tell=tell)

        seen = {name: of(name, operator(problem.of(parameters))) for name, parameters in parts.items()}
        if not self.of and len(parts) > 1:
            every = operator(problem)
            apart = _apart(every, problem, parts)
            seen["all"] = merged([seen[name] for name in parts]) if apart else of("all", every)
        settings = {"samples": problem.samples, "chunk": self.chunk}
        return {name: replace(each, settings={**each.settings, **settings}) for name, each in seen.items()}

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

    Where the loss is not convex in the outputs (PPO's surrogate) it can have negative eigenvalues too. Cost: as the
    Hessian's.
    """

    operator = operators.GGN


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
        with torch.no_grad():
            numbers = problem.outputs(rows(problem.batch, 0, 2)).reshape(2, -1).shape[1]
        size, free = problem.samples * numbers, available(problem.like.device)
        if free is not None and (need := 32 * size**2 + graph(problem, 2) * problem.samples // 2) > free:
            raise CurvatureError(too_much(f"{problem.samples:,} samples of {numbers} outputs", need, free, "samples"))
        name, operator = self._operator(problem)
        matrix = operator.dense().double()
        values, vectors = torch.linalg.eigh(matrix)
        none = int((matrix == 0).all(1).sum())
        exact = values.cpu().numpy()[None]
        settings = {"samples": problem.samples, "exact": True}
        seen = Spectrum(exact, exact * 0 + 1 / exact.size, exact.size, None, settings, none)
        found: dict[str, Any] = {name: seen}
        found |= {f"{name}/{key}": value for key, value in seen.numbers(self.eps, self.relative).items()}
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


def fitting(view: View, chunk: int | None, steps: int, fewer: bool) -> Problem:
    """The problem, if it fits in memory: with fewer samples only where that is allowed."""
    problem, free = problem_of(view.agent, view.batch, chunk), available(view.problem.like.device)
    while free is not None and (need := needed(problem, steps)) > free:
        if not fewer or problem.samples <= 2:
            what = f"{problem.samples:,} samples and {steps} steps on {problem.size:,} parameters"
            raise CurvatureError(too_much(what, need, free, "samples or steps, set chunk, or allow `fewer: true`"))
        half = {name: value[: problem.samples // 2] for name, value in view.batch.items()}
        problem = problem_of(view.agent, half, chunk)
    return problem


def too_much(what: str, need: int, free: int, rather: str) -> str:
    """The sentence about memory."""
    return f"{what} need {need / 2**30:.2g} GiB and {free / 2**30:.2g} are free: take fewer {rather}"


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
