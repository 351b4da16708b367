"""Keeping memory by anchors: weights that earlier tasks need are held near where those tasks left them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from crl.checked import number, whole
from crl.core import Agent, State, Visit, aside, derive, facing, optimizers_of
from crl.methods.critic import per_variance, refuse_without_critic, values_of
from crl.methods.method import Penalty, own_pass, plainly

MEMORY = "memory"
SAMPLE = 5  # the name of a random stream
Rows = Callable[[Tensor, Mapping[str, Tensor], float], list[Tensor]]


class Anchored(Penalty):
    """strength / 2 * sum over anchors of importance * (w - anchor)^2: subclasses say what is important.

    An anchor is set at the end of each visit; a task that comes again moves its own. No weight is pulled harder than
    what carries it back in one step of its learning rate: beyond that plain gradient descent would diverge. An
    actor-critic is held by what matters to its policy, as in Continual World (Wolczyk et al. 2021,
    `regularize_critic: False`); `critic` is the weight of what matters to its values, which are divided by the
    standard deviation of the returns.
    """

    family = MEMORY
    needs: ClassVar[tuple[str, ...]] = ("model", "optimizers", "prepare", "outputs")
    needs_boundaries = True
    samples_tasks = True
    memory: ClassVar[tuple[str, ...]] = ("anchors",)

    def __init__(self, strength: float, samples: int = 512, critic: float = 0.0) -> None:
        super().__init__(strength)
        self.samples, self.critic = whole("samples", samples), number("critic", critic, 0.0)
        self.anchors: dict[str, dict[str, Any]] = {}  # by task: importance and values of each parameter
        self._sums: dict[str, tuple[Tensor, Tensor]] = {}  # of importance, and of importance times anchor
        self._largest: dict[str, float] = {}  # importance of a number of each parameter
        self._groups: dict[str, dict[str, Any]] = {}

    def accepts(self, agent: Agent) -> None:
        """Only an actor-critic has a critic."""
        refuse_without_critic(self.critic, agent)

    def leave(self, visit: Visit) -> None:
        """Set the task's anchor."""
        if not self.strength:
            return
        self.anchor(visit, self.importance(visit))
        self._sum()

    def anchor(self, visit: Visit, importance: Mapping[str, Tensor]) -> None:
        """Remember what was important, and where the weights are."""
        values = {name: self.parameters[name].detach().clone() for name in importance}
        self.anchors[visit.task.name] = {"importance": dict(importance), "values": values}
        self.count("anchors")

    def importance(self, visit: Visit) -> dict[str, Tensor]:
        """How much each number of each parameter matters to the task that is being left."""
        raise NotImplementedError

    def slope(self, name: str, value: Tensor) -> Tensor | None:
        """The sum over anchors of importance * (w - anchor)."""
        if name not in self._sums:
            return None
        weight, pull = self._sums[name]
        slope = weight * value - pull
        most = self._hardest(name)
        return slope if self._largest[name] <= most else slope * (most / weight).clamp(max=1)

    def _hardest(self, name: str) -> float:
        """The importance with which a step of plain gradient descent ends at the anchor."""
        rate = self._groups[name]["lr"] * self.strength if name in self._groups else 0.0
        return 1 / rate if rate > 0 else float("inf")

    def find_parameters(self) -> None:
        """Also the groups that they are in, which have their learning rates."""
        super().find_parameters()
        groups = [group for optimizer in optimizers_of(self.agent) for group in optimizer.param_groups]
        owner = {id(parameter): group for group in groups for parameter in group["params"]}
        self._groups = {name: owner[id(parameter)] for name, parameter in self.parameters.items()}

    def value(self, name: str, value: Tensor) -> Tensor | None:
        """Half the sum over anchors of importance * (w - anchor)^2."""
        held = [a for a in self.anchors.values() if name in a["importance"]]
        parts = [(a["importance"][name] * (value - a["values"][name]).square()).sum() / 2 for a in held]
        return torch.stack(parts).sum() if parts else None

    def _sum(self) -> None:
        self._sums = {}
        for anchor in self.anchors.values():
            for name, importance in anchor["importance"].items():
                weight, pull = self._sums.get(name, (torch.zeros_like(importance), torch.zeros_like(importance)))
                self._sums[name] = (weight + importance, pull + importance * anchor["values"][name])
        self._largest = {name: float(weight.max()) for name, (weight, _) in self._sums.items()}

    def load_state_dict(self, state: State) -> None:
        """The inverse of `state_dict`."""
        super().load_state_dict(state)
        self._sum()

    def batch(self, visit: Visit) -> Mapping[str, Tensor]:
        """Fresh experience of the task that is being left, prepared; some `samples` rows of it."""
        experience = visit.task.sample(self.agent, derive(visit.seed, SAMPLE), self.samples)
        prepared: Mapping[str, Tensor] = self.agent.prepare(experience)
        count = len(next(iter(prepared.values())))
        chosen = torch.randperm(count, generator=self.generator)[: self.samples]
        return {name: value[chosen.to(value.device)] for name, value in prepared.items()}

    def per_sample(self, visit: Visit, rows: Rows, take: Any) -> Any:
        """The mean over samples of `take(gradient)`, summed over what `rows(outputs, sample, weight)` gives.

        A sample at a time, so that a square is of one sample's gradient, as Fisher information is defined. `weight` is
        the critic's, over the variance of the returns.
        """
        names, values = list(self.parameters), list(self.parameters.values())
        total = {name: torch.zeros_like(value) for name, value in self.parameters.items()}
        with aside(derive(visit.seed, SAMPLE)), facing(self.agent, visit.task):
            batch = self.batch(visit)
            count = len(next(iter(batch.values())))
            weight = self.critic * per_variance(batch["return"]) if self.critic else 0.0
            for i in range(count):
                sample = {name: value[i : i + 1] for name, value in batch.items()}
                with own_pass(self.agent):
                    scalars = rows(self.agent.outputs(sample), sample, weight)
                    for scalar in scalars:
                        found = torch.autograd.grad(scalar, values, retain_graph=True, allow_unused=True)
                        for name, part in zip(names, found, strict=True):
                            if part is not None:
                                total[name] += take(part) / count
        return {name: value for name, value in total.items() if bool((value != 0).any())}


class EWC(Anchored):
    """Elastic weight consolidation (Kirkpatrick et al. 2017): importance is the diagonal of the Fisher information.

    It is that of the whole answer's distribution, exactly: for classes the sum over them of p (gradient of log p)^2.
    `metric` is the answer's own Fisher matrix; where an agent names none, the answer is a Gaussian of unit variance.
    With `critic: 1` values are Gaussians with the variance of the returns.
    """

    def __init__(self, strength: float = 100.0, samples: int = 256, critic: float = 0.0) -> None:
        super().__init__(strength, samples, critic)

    def importance(self, visit: Visit) -> dict[str, Tensor]:
        """The diagonal of the Fisher information."""
        found: dict[str, Tensor] = self.per_sample(visit, self._directions, torch.square)
        return found

    def _directions(self, outputs: Tensor, sample: Mapping[str, Tensor], weight: float) -> list[Tensor]:
        """The answer along each direction of its Fisher matrix, whose squared gradients add up to its diagonal."""
        fixed = outputs.detach().double()  # p - p^2 of a sure answer is lost in float32
        metric = torch.eye(fixed.shape[1], dtype=fixed.dtype, device=fixed.device)
        if hasattr(self.agent, "metric"):
            metric = self.agent.metric(fixed, sample)[0].clone()
        values = values_of(self.agent, outputs)
        metric[values], metric[:, values] = 0.0, 0.0
        metric[values, values] = weight
        return list(outputs[0] @ factor(metric).to(outputs))


def factor(matrix: Tensor) -> Tensor:
    """F with F F^T = matrix, which is positive semi-definite: a column for each direction that is not zero.

    Cholesky's steps with the largest pivot first, in as many steps as the rank is, so that many zeros (classes that
    cannot be the answer) cost nothing. An eigendecomposition need not converge on these.

    >>> factor(torch.tensor([[4.0, 2.0], [2.0, 1.0]]))
    tensor([[2.],
            [1.]])
    """
    rest, columns = matrix.clone(), [matrix.new_zeros(len(matrix), 0)]
    least = 1e-14 * rest.diagonal().max()
    for _ in range(len(rest)):
        pivot = rest.diagonal().argmax()
        if rest[pivot, pivot] <= least:
            break
        column = rest[:, pivot] / rest[pivot, pivot].sqrt()
        rest -= torch.outer(column, column)
        columns.append(column[:, None])
    return torch.cat(columns, 1)


class OnlineEWC(EWC):
    """EWC with one running importance, `decay` times what it was, around the latest weights (Schwarz et al. 2018)."""

    def __init__(self, strength: float = 100.0, decay: float = 0.99, samples: int = 256, critic: float = 0.0) -> None:
        super().__init__(strength, samples, critic)
        self.decay = number("decay", decay, 0.0, 1.0)

    def anchor(self, visit: Visit, importance: Mapping[str, Tensor]) -> None:
        """One anchor for all."""
        before = self.anchors.get("all", {}).get("importance", {})
        names = (set(before) | set(importance)) & set(self.parameters)
        zero = {name: torch.zeros_like(self.parameters[name]) for name in names}
        merged = {n: self.decay * before.get(n, zero[n]) + importance.get(n, zero[n]) for n in sorted(names)}
        values = {name: self.parameters[name].detach().clone() for name in merged}
        self.anchors = {"all": {"importance": merged, "values": values}}
        self.count("anchors")


class MAS(Anchored):
    """Memory aware synapses (Aljundi et al. 2018): importance is the mean size of the gradient of |answer|^2."""

    def __init__(self, strength: float = 1.0, samples: int = 256, critic: float = 0.0) -> None:
        super().__init__(strength, samples, critic)

    def importance(self, visit: Visit) -> dict[str, Tensor]:
        """Per-sample gradients' absolute values."""
        found: dict[str, Tensor] = self.per_sample(visit, self._size, torch.abs)
        return found

    def _size(self, outputs: Tensor, sample: Mapping[str, Tensor], weight: float) -> list[Tensor]:
        """|answer|^2, of the classes that can be the answer."""
        answers = sample.get("answers")
        squares = (outputs if answers is None else outputs.masked_fill(~answers, 0.0))[0].square()
        return [(squares * torch.where(values_of(self.agent, outputs), weight, 1.0)).sum()]


class SI(Anchored):
    """Synaptic intelligence (Zenke et al. 2017): importance is what a weight's own way made the loss fall.

    The sum over steps of -gradient * movement, over (squared distance of the visit + xi), added up over visits. The
    gradient is the agent's own loss's, before this penalty and before clipping. The paper's penalty, c * importance *
    (w - anchor)^2, has no half, so its c is half the strength. Its c = 1 on Split-MNIST goes with Adam and ten epochs;
    after less training importance is smaller, and c = 1/2 did next to nothing in `configs/split_mnist.yaml`, where a
    strength of 30 keeps three tenths of what was forgotten, 100 most of it, and 1,000 diverges. On small images 100
    stopped the learning, hence 30.
    """

    needs = ("model", "optimizers")
    turn = 1
    samples_tasks = False
    memory: ClassVar[tuple[str, ...]] = ("anchors", "path", "start")

    def __init__(self, strength: float = 30.0, xi: float = 0.1) -> None:
        super().__init__(strength)
        self.xi = number("xi", xi, 1e-12)
        self.path: dict[str, Tensor] = {}
        self.start: dict[str, Tensor] = {}
        self._slopes: dict[str, Tensor] = {}
        self._before: dict[str, Tensor] = {}

    def find_parameters(self) -> None:
        """A path begins where a parameter is first seen."""
        super().find_parameters()
        for name, parameter in self.parameters.items():
            self.path.setdefault(name, torch.zeros_like(parameter.detach()))
            self.start.setdefault(name, parameter.detach().clone())

    def push(self, name: str, parameter: nn.Parameter) -> None:
        """Keep the gradient as the agent's loss has it, then add the penalty's."""
        if parameter.grad is not None:
            self._slopes[name] = parameter.grad.clone()
        super().push(name, parameter)

    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Where the weights are."""
        self._before = {name: self.parameters[name].detach().clone() for name in self._slopes}

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """What the step was worth."""
        for name, before in self._before.items():
            self.path[name].addcmul_(self._slopes[name], self.parameters[name] - before, value=-1)
        self._slopes, self._before = {}, {}

    def importance(self, visit: Visit) -> dict[str, Tensor]:
        """Earlier importance, and the visit's."""
        before = self.anchors.get("all", {}).get("importance", {})
        found = {}
        for name, path in self.path.items():
            if name in self.parameters:
                moved = self.parameters[name].detach() - self.start[name]
                own = path.clamp(min=0) / (moved.square() + self.xi)
                found[name] = before.get(name, torch.zeros_like(own)) + own
        return found

    def anchor(self, visit: Visit, importance: Mapping[str, Tensor]) -> None:
        """One anchor for all; the next path begins here."""
        values = {name: self.parameters[name].detach().clone() for name in importance}
        self.anchors = {"all": {"importance": dict(importance), "values": values}}
        self.path = {name: torch.zeros_like(value) for name, value in values.items()}
        self.start = plainly(values)
        self.count("anchors")
