"""What gradients say: their size, whether samples and tasks agree, and what one step would gain."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from crl.checked import whole
from crl.core import Boundary, optimizers_of
from crl.linalg import CurvatureError, Problem
from crl.linalg.problem import flat, rows, steady
from crl.monitors.look import Look, View


class GradientNorm(Look):
    """The norm of the loss's gradient on the new data, before any clipping. Cost: one backward pass."""

    def look(self, view: View) -> Mapping[str, float]:
        """`<network>`."""
        return {network: float(g.norm()) for network, g in _gradients(view, 1).items()}


class Readiness(Look):
    """Optimisation readiness: the mean gradient's strength times its reliability over minibatches (arXiv 2605.09044).

    Strength is its norm, agreement the squared norm over the mean squared norm of the minibatches' gradients. The
    product is our reading: only the paper's abstract was at hand. Cost: a backward pass of all samples.
    """

    def __init__(self, *, minibatches: int = 16, **look: Any) -> None:
        super().__init__(**look)
        whole("minibatches", minibatches, 2)
        self.minibatches = minibatches

    def look(self, view: View) -> Mapping[str, float]:
        """`<network>/strength`, `/agreement` and `/readiness`."""
        found = {}
        for network, each in _gradients(view, self.minibatches).items():
            strength, spread = float(each.mean(0).norm()), float(each.square().sum(1).mean())
            agreement = strength**2 / spread if spread > 0 else 0.0
            found[f"{network}/strength"], found[f"{network}/agreement"] = strength, agreement
            found[f"{network}/readiness"] = strength * agreement
        return found


class Conflict(Look):
    """Whether the new task's gradient and each earlier task's point the same way (after Lyle et al. 2023; PCGrad).

    Cosine of the two mean gradients, and the share of pairs of minibatches, one from each, whose cosine is below 0; of
    the parameters that both tasks have. Cost: a backward pass a task.
    """

    compares = True

    def __init__(self, *, minibatches: int = 8, **look: Any) -> None:
        super().__init__(**look)
        whole("minibatches", minibatches, 1)
        self.minibatches = minibatches

    def measure(self, boundary: Boundary) -> Mapping[str, float]:
        """`<network>/cosine/with/<task>` and `<network>/below_zero/with/<task>`."""
        if not self.due(boundary) or not boundary.earlier:
            return {}
        new, found = self.on(boundary, boundary.task), {}
        for task in boundary.earlier:
            for network, old in self.on(boundary, task).items():
                shared = [name for name in new[network] if name in old]  # not the heads, where each task has its own
                left, right = (torch.cat([each[name] for name in shared], 1) for each in (new[network], old))
                cosine = nn.functional.cosine_similarity(left.mean(0), right.mean(0), 0)
                pairs = _directions(left) @ _directions(right).T
                found[f"{network}/cosine/with/{task.name}"] = float(cosine)
                found[f"{network}/below_zero/with/{task.name}"] = float((pairs < 0).double().mean())
        return found

    def look(self, view: View) -> Mapping[str, Mapping[str, Tensor]]:
        """For each network the gradients of each parameter, (minibatches, numbers)."""
        every = _gradients(view, self.minibatches)
        sizes = {network: [p.numel() for p in parameters.values()] for network, parameters in view.networks.items()}
        return {
            network: dict(zip(parameters, torch.split(every[network], sizes[network], 1), strict=True))
            for network, parameters in view.networks.items()
        }


class SamplePlasticity(Look):
    """What one trial step of the agent's own optimizer gains on the same data: max(0, 1 - after / before).

    Of the part of the loss that is an error (`error`): the value's, the temporal difference's, or cross-entropy. The
    step is taken on copies of the weights and of the optimizer's state. After Elsayed and Mahmood 2024 (UPGD).
    Cost: one backward and two forward passes.
    """

    needs = (*Look.needs, "optimizers")

    def look(self, view: View) -> Mapping[str, float]:
        """`plasticity`, and the error `before` and `after` the step."""
        error, batch = getattr(view.agent, "error", view.agent.objective), view.batch
        problem = Problem(view.agent.model, view.agent.outputs, error, batch, view.problem.parameters)
        gradient = dict(zip(map(id, problem.parameters.values()), _parts(view.problem), strict=True))
        before = problem.loss()
        with ExitStack() as steps:
            for optimizer in optimizers_of(view.agent):
                steps.enter_context(stepped(optimizer, gradient))
            after = problem.loss()
        if not (math.isfinite(before) and math.isfinite(after)):
            raise CurvatureError("the error, before or after the step, is not finite")
        gain = max(0.0, 1 - after / before) if before > 0 else float("nan")
        return {"plasticity": gain, "before": before, "after": after}


@contextmanager
def stepped(optimizer: torch.optim.Optimizer, gradient: Mapping[int, Tensor]) -> Iterator[None]:
    """The weights as one step of an equal optimizer would leave them, for the time being."""
    groups, pairs = [], []
    for group in optimizer.param_groups:
        copies = []
        for parameter in group["params"]:
            twin = nn.Parameter(parameter.detach().clone())
            twin.grad = gradient.get(id(parameter))
            copies.append(twin)
            pairs.append((parameter, twin))
        groups.append({**{key: value for key, value in group.items() if key != "params"}, "params": copies})
    make: Any = getattr(optimizer, "like", type(optimizer))  # what is around another optimizer says how it is made
    trial = make(groups)
    trial.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    trial.step()
    held = [parameter.data for parameter, _ in pairs]
    for parameter, twin in pairs:
        parameter.data = twin.data
    try:
        yield
    finally:
        for (parameter, _), data in zip(pairs, held, strict=True):
            parameter.data = data


def _parts(problem: Problem) -> list[Tensor]:
    gradient = problem.gradient()
    shapes = list(problem.parameters.values())
    return [part.view_as(p) for part, p in zip(torch.split(gradient, [p.numel() for p in shapes]), shapes, strict=True)]


def _gradients(view: View, minibatches: int) -> dict[str, Tensor]:
    """The gradient of each minibatch by each network's parameters, (minibatches, parameters), in float64."""
    problem = view.problem
    size = max(1, -(-problem.samples // minibatches))
    found: dict[str, list[Tensor]] = {network: [] for network in view.networks}
    for start in range(0, problem.samples, size):
        batch = rows(problem.batch, start, start + size)
        with torch.enable_grad(), steady(problem.module):
            loss = problem.objective(problem.outputs(batch), batch)
            parts = torch.autograd.grad(loss, list(problem.parameters.values()), allow_unused=True)
        by_name = dict(zip(problem.parameters, parts, strict=True))
        for network, parameters in view.networks.items():
            found[network].append(flat([by_name[name] for name in parameters], parameters).double())
    stacked = {network: torch.stack(each) for network, each in found.items()}
    if not all(torch.isfinite(each).all() for each in stacked.values()):
        raise CurvatureError("the gradient is not finite")
    return stacked


def _directions(gradients: Tensor) -> Tensor:
    return nn.functional.normalize(gradients, dim=1)
