"""What has moved: features from boundary to boundary, answers over a visit (drift) and in one update (churn)."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from crl.checked import whole
from crl.core import Boundary, State, facing
from crl.monitors.features import features
from crl.monitors.gradients import stepped
from crl.monitors.look import READ, Look, View, problem_of


class Drift(Look):
    """Representation drift on each task seen: 1 - linear CKA of the last hidden layer between two boundaries.

    The inputs are fixed: those of the task when it was first seen. Centred (Kornblith et al. 2019); 0 is no change but
    rotation and scale. Cost: a forward pass a task.
    """

    needs = READ
    compares = True

    def __init__(self, **look: Any) -> None:
        super().__init__(**look)
        self.inputs: dict[str, dict[str, Tensor]] = {}
        self.before: dict[str, dict[str, Tensor]] = {}

    def measure(self, boundary: Boundary) -> Mapping[str, float]:
        """`<network>/on/<task>`: since the last boundary looked at."""
        if not self.due(boundary):
            return {}
        found: dict[str, float] = {}
        for task in (boundary.task, *boundary.earlier):
            with facing(boundary.agent, task):
                view = View(boundary, task, self.samples)
                if task.name not in self.inputs:
                    self.inputs[task.name] = _kept(view.batch)
                seen = features(view, _placed(self.inputs[task.name], view))
            now = {network: layers[-1].values.cpu().clone() for network, layers in seen.items()}
            for network, old in self.before.get(task.name, {}).items():
                found[f"{network}/on/{task.name}"] = 1 - cka(old, now[network])
            self.before[task.name] = now
        return found

    def state_dict(self) -> State:
        """The inputs, and the features last seen on them."""
        return {"inputs": dict(self.inputs), "before": dict(self.before)}

    def load_state_dict(self, state: State) -> None:
        """The inverse of `state_dict`."""
        self.inputs, self.before = dict(state["inputs"]), dict(state["before"])


def cka(left: Tensor, right: Tensor) -> float:
    """Linear centred kernel alignment of two sets of features of the same samples; NaN where one does not vary.

    >>> x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    >>> round(cka(x, 3 * x.flip(1)), 6)
    1.0
    """
    if any(bool((each == each[0]).all()) for each in (left, right)):
        return float("nan")
    left, right = (each.double() - each.double().mean(0) for each in (left, right))
    cross, own = (left.T @ right).square().sum(), (left.T @ left).norm() * (right.T @ right).norm()
    return float(cross / own) if own > 0 else float("nan")


class Churn(Look):
    """How far one update moves the answers on samples that are not in its minibatch.

    Churn is the change of outputs on a reference batch that an update on another batch causes (Tang and Berseth 2024;
    C-CHAIN, arXiv 2506.00592); of a policy, how often the greedy action changes (Schaul et al. 2022). The update is
    one step of the agent's own optimizer, clipped as the agent's are, on copies of the weights and of the optimizer's
    state; methods have no part in it. Of the `samples`, `minibatch` rows (half of them at most) are learned from and
    the rest are the reference; the mean over `times` such draws. Recorded is the agent's `divergence`: PPO's KL and
    squared value change, DQN's share of flipped greedy actions. Cost: `times` backward passes of a minibatch, and
    forward passes.
    """

    needs = (*Look.needs, "divergence", "optimizers")

    def __init__(self, *, minibatch: int = 64, times: int = 4, **look: Any) -> None:
        super().__init__(**look)
        self.minibatch, self.times = whole("minibatch", minibatch), whole("times", times)

    def look(self, view: View) -> Mapping[str, float]:
        """`<what>`."""
        generator = torch.Generator().manual_seed(view.boundary.seed)
        count, found = len(next(iter(view.batch.values()))), dict[str, list[float]]()
        size = min(self.minibatch, count // 2)
        for _ in range(self.times):
            order = torch.randperm(count, generator=generator)
            learned, reference = (
                {name: value[rows.to(value.device)] for name, value in view.batch.items()}
                for rows in (order[:size], order[size:])
            )
            for name, value in self._moved(view, learned, reference).items():
                found.setdefault(name, []).append(value)
        return {name: sum(values) / len(values) for name, values in found.items()}

    def _moved(self, view: View, learned: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> dict[str, float]:
        problem = problem_of(view.agent, learned)
        whole_gradient = problem.gradient()
        most, size = getattr(view.agent, "largest_gradient", None), float(whole_gradient.norm())
        scale = min(1.0, most / (size + 1e-6)) if most else 1.0
        parameters = list(problem.parameters.values())
        parts = torch.split(whole_gradient * scale, [p.numel() for p in parameters])
        gradient = {id(p): part.view_as(p).to(p.dtype) for p, part in zip(parameters, parts, strict=True)}
        agent: Any = view.agent
        with torch.no_grad():
            before = agent.outputs(reference).clone()
        with ExitStack() as steps:
            for optimizer in agent.optimizers:
                steps.enter_context(stepped(optimizer, gradient))
            with torch.no_grad():
                after = agent.outputs(reference).clone()
        return {name: float(values.double().mean()) for name, values in agent.divergence(before, after).items()}


class PolicyDrift(Look):
    """How far a visit moves the answers on its own and on earlier tasks: KL from `init` to `end`, value change.

    On the experience at `init`. What is recorded is the agent's `divergence`: PPO's KL and squared value change, DQN's
    share of flipped greedy actions and squared change of values. Cost: two forward passes a task.
    """

    needs = (*Look.needs, "divergence")
    compares = True

    def __init__(self, *, samples: int = 512) -> None:
        super().__init__(samples=samples)
        self.inputs: dict[str, dict[str, Tensor]] = {}
        self.before: dict[str, Tensor] = {}

    def measure(self, boundary: Boundary) -> Mapping[str, float]:
        """At `end`: `<what>`, and `<what>/on/<task>` for earlier tasks."""
        tasks = (boundary.task, *boundary.earlier)
        if boundary.phase == "init":
            self.inputs, self.before = {}, {}
            for task in tasks:
                with facing(boundary.agent, task):
                    view = View(boundary, task, self.samples)
                    self.inputs[task.name] = _kept(view.batch)
                    self.before[task.name] = self._answers(view)
            return {}
        found = {}
        for task in (task for task in tasks if task.name in self.before):
            with facing(boundary.agent, task):
                now = self._answers(View(boundary, task, self.samples))
            agent: Any = boundary.agent
            for name, values in agent.divergence(self.before[task.name], now).items():
                found[name if task is boundary.task else f"{name}/on/{task.name}"] = float(values.double().mean())
        return found

    def _answers(self, view: View) -> Tensor:
        with torch.no_grad():
            answer: Tensor = view.agent.outputs(_placed(self.inputs[view.task.name], view))
        return answer.cpu().clone()

    def state_dict(self) -> State:
        """The inputs and answers at `init`."""
        return {"inputs": dict(self.inputs), "before": dict(self.before)}

    def load_state_dict(self, state: State) -> None:
        """The inverse of `state_dict`."""
        self.inputs, self.before = dict(state["inputs"]), dict(state["before"])


def _kept(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A batch to remember, and to write into checkpoints."""
    return {name: value.detach().cpu().clone() for name, value in batch.items()}


def _placed(batch: Mapping[str, Tensor], view: View) -> dict[str, Tensor]:
    """A remembered batch where the agent's parameters are."""
    device = next(view.agent.model.parameters()).device
    return {name: value.to(device) for name, value in batch.items()}
