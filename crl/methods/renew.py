"""Renewing units: weights shrunk and perturbed, single units, heads or all begun anew."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from crl.checked import number, one_of, truth, whole
from crl.core import Agent, State, Visit, optimizers_of
from crl.methods.method import FromFirst, length, refuse_distance
from crl.methods.units import Units, Watch, Young, chains_of, draw, redrawn, refuse_shallow, units_of, weighted

RENEWAL = "renewal"
STRUCTURAL = ("progressive", "packnet")  # methods that own weights for good


class ShrinkPerturb(FromFirst):
    """w <- keep * w + noise * a draw from the first weights, at each new visit or every step (Ash and Adams 2020).

    .4 and .1 are the defaults of the authors' code (github.com/JordanAsh/warm_start, run.py), where they act each time
    that new data arrive. Its noise is a newly initialised network; here each number is drawn from its parameter's first
    ones, which are a sample of the same distribution. With `every: step` keep is to be near 1 (.999, say).
    """

    family = RENEWAL
    excludes: ClassVar[tuple[str, ...]] = STRUCTURAL
    idle: ClassVar[Mapping[str, Any]] = {"keep": 1.0, "noise": 0.0}

    def __init__(self, keep: float = 0.4, noise: float = 0.1, every: str = "visit") -> None:
        super().__init__()
        self.keep, self.noise = number("keep", keep, 0.0, 1.0), number("noise", noise, 0.0)
        self.every = one_of("every", every, ("visit", "step"))
        self.needs_boundaries = self.every == "visit"  # type: ignore[misc]

    def accepts(self, agent: Agent) -> None:
        """Every step, not with an optimizer that measures how far it has gone."""
        if self.every == "step":
            refuse_distance("shrink_perturb", agent)

    def enter(self, visit: Visit) -> None:
        """At each visit but the first."""
        super().enter(visit)
        if self.every == "visit" and visit.index > 1:
            self._act(self.parameters)

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Every step."""
        if self.every == "step":
            self._act(self.owned(optimizer))

    @torch.no_grad()
    def _act(self, parameters: Mapping[str, nn.Parameter]) -> None:
        if self.keep == 1.0 and self.noise == 0.0:
            return
        before = {name: parameter.clone() for name, parameter in parameters.items()}
        for name, parameter in parameters.items():
            parameter.mul_(self.keep)
            if self.noise:
                parameter.add_(draw(self.first[name], parameter.shape, self.generator), alpha=self.noise)
        self.count("times")
        self.count("push", float(length(parameters[name] - old for name, old in before.items())))


class Renewal(FromFirst):
    """A method that begins single units anew, young in their optimizer."""

    needs = ("model", "optimizers", "chains")
    excludes: ClassVar[tuple[str, ...]] = STRUCTURAL

    def __init__(self) -> None:
        super().__init__()
        self.young = Young()

    def accepts(self, agent: Agent) -> None:
        """Hidden units there must be."""
        refuse_shallow(type(self).__name__.lower(), agent)

    def attach(self, agent: Agent) -> None:
        """Find the units, and watch what they say."""
        self.layers = units_of(agent)
        self.watch = Watch()
        self.watch.follow(self.layers, on=False)
        self.names = {id(part): name for name, part in agent.model.named_modules()}  # type: ignore[attr-defined]
        super().attach(agent)

    def enter(self, visit: Visit) -> None:
        """Heads may have grown: the layers that read units are found anew."""
        super().enter(visit)
        found = {layer.name: layer for layer in units_of(self.agent)}
        self.layers = [found[layer.name] for layer in self.layers]
        self.watch.follow(self.layers, self.watch.on)
        self.names = {id(part): name for name, part in self.agent.model.named_modules()}

    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Hold what is young."""
        self.young.before(self.parameters)

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Scale how far what is young has moved."""
        self.young.after(self.parameters, optimizer)

    def renew(self, layer: Units, units: Tensor, fold: Tensor | None = None) -> None:
        """Draw the units' incoming weights anew, read them with zero, and fold their mean into what reads them."""
        if not len(units):
            return
        into = layer.into
        weight = into.weight
        new = draw(self.first[self._name(into, "weight")], weight[units].shape, self.generator)
        self._set(into, "weight", units, new)
        if into.bias is not None:
            self._set(into, "bias", units, self.first[self._name(into, "bias")][units])
        for norm in layer.norms:
            self._renew_norm(norm, units)
        columns = layer.columns[units]
        for reader in layer.out:
            if fold is not None and reader.bias is not None:
                read = (
                    reader.weight[:, columns].flatten(3).sum(-1)
                    if reader.weight.ndim > 2
                    else reader.weight[:, columns]
                )
                reader.bias.add_((read * fold).sum((1, 2)))
            self._set(reader, "weight", (slice(None), columns.flatten()), 0.0)
        self.count("renewed", len(units))

    def _renew_norm(self, norm: nn.Module, units: Tensor) -> None:
        for kind, value in (("weight", 1.0), ("bias", 0.0)):
            if getattr(norm, kind, None) is not None:
                self._set(norm, kind, units, value)
        for kind, value in (("running_mean", 0.0), ("running_var", 1.0)):
            if getattr(norm, kind, None) is not None:
                getattr(norm, kind)[units] = value

    def _name(self, part: nn.Module, kind: str) -> str:
        return f"{self.names[id(part)]}.{kind}"

    def _set(self, part: nn.Module, kind: str, where: Any, value: Any) -> None:
        parameter: nn.Parameter = getattr(part, kind)
        parameter[where] = value
        for optimizer in optimizers_of(self.agent):
            if any(parameter is p for group in optimizer.param_groups for p in group["params"]):
                self.young.begin(self._name(part, kind), parameter, where, optimizer)

    def state_dict(self) -> State:
        """With the ages of what is young."""
        return {**super().state_dict(), "young": self.young.state_dict()}

    def load_state_dict(self, state: State) -> None:
        """The inverse of `state_dict`."""
        super().load_state_dict(state)
        self.young.load_state_dict(state["young"])


class ReDo(Renewal):
    """Every `every` steps, units whose score is at most `tau` begin anew (Sokar et al. 2023, arXiv 2302.12902).

    A unit's score is its mean |h| over its layer's mean, on the minibatch (at most `samples` of it). Incoming weights
    are drawn anew, outgoing ones are zero, moments are cleared.
    """

    family = RENEWAL
    memory: ClassVar[tuple[str, ...]] = ("first", "steps")
    idle: ClassVar[Mapping[str, Any]] = {"every": 10**9}

    def __init__(self, tau: float = 0.025, every: int = 1000, samples: int = 256) -> None:
        super().__init__()
        self.tau, self.every = number("tau", tau, 0.0), whole("every", every)
        self.samples, self.steps = whole("samples", samples, 1), 0

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Count, look one step ahead of time, and renew in time."""
        super().after_step(optimizer)
        self.steps += 1
        if self.steps % self.every == 0:
            for layer in self.layers:
                if layer.name in self.watch.seen:
                    self.renew(layer, dormant(layer.activations(self.watch.seen[layer.name][: self.samples]), self.tau))
            self.count("checks")
        self._look_ahead()

    def attach(self, agent: Agent) -> None:
        """Watch at once if the first step is the one."""
        super().attach(agent)
        self._look_ahead()

    def load_state_dict(self, state: State) -> None:
        """The inverse of `state_dict`."""
        super().load_state_dict(state)
        self._look_ahead()

    def _look_ahead(self) -> None:
        self.watch.turn((self.steps + 1) % self.every == 0)
        if not self.watch.on:
            self.watch.seen.clear()


def dormant(activations: Tensor, tau: float) -> Tensor:
    """The units whose mean |h| is at most tau of their layer's mean, from (samples, units, places)."""
    size = activations.abs().mean((0, 2))
    return torch.nonzero(size / (size.mean() + 1e-9) <= tau)[:, 0]


class CBP(Renewal):
    """Continual backprop: a share `rate` of the mature units, the least useful, begins anew each step (Dohare 2024).

    With `utility: contribution` a unit's utility is a running mean of mean |h| * sum of |outgoing weights| (equation 1
    of the Nature paper, and `contribution` in the authors' code). With `utility: adaptable` it is a running mean of
    mean |h - mean h| * mean |outgoing weights| / mean |incoming weights| (`adaptable_contribution` in their code, and
    their preprint arXiv 2306.13812). Both are corrected for age, as in their code. Units younger than `maturity` steps
    are let be; a replaced unit's mean is folded into the next bias, and its outgoing weights are zero, so that nothing
    changes but the unit's own variation (exactly so where no norm layer lies between).
    """

    family = RENEWAL
    memory: ClassVar[tuple[str, ...]] = ("first", "utility", "mean", "age", "owed")
    idle: ClassVar[Mapping[str, Any]] = {"rate": 0.0}

    def __init__(
        self, rate: float = 1e-4, maturity: int = 1000, decay: float = 0.99, utility: str = "contribution"
    ) -> None:
        super().__init__()
        self.rate, self.maturity = number("rate", rate, 0.0, 1.0), whole("maturity", maturity, 0)
        self.decay = number("decay", decay, 0.0, 0.999999)
        self.adaptable = one_of("utility", utility, ("contribution", "adaptable")) == "adaptable"
        self.utility: dict[str, Tensor] = {}
        self.mean: dict[str, Tensor] = {}  # of the activations, (units, places), not yet corrected for age
        self.age: dict[str, Tensor] = {}
        self.owed: dict[str, float] = {}  # units to be replaced, which add up to whole ones

    def attach(self, agent: Agent) -> None:
        """Watch every step."""
        super().attach(agent)
        self.watch.turn(self.rate > 0)
        for layer in self.layers:
            like = layer.into.weight.detach()
            self.utility.setdefault(layer.name, like.new_zeros(layer.count))
            self.mean.setdefault(layer.name, like.new_zeros(layer.columns.shape))
            self.age.setdefault(layer.name, like.new_zeros(layer.count))
            self.owed.setdefault(layer.name, 0.0)

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Age, weigh, and replace."""
        super().after_step(optimizer)
        for layer in self.layers if self.rate else ():
            if layer.name in self.watch.seen:
                self._update(layer, layer.activations(self.watch.seen[layer.name]))
                self.renew_least(layer)
        self.watch.seen.clear()

    def _update(self, layer: Units, activations: Tensor) -> None:
        name = layer.name
        self.age[name] += 1
        self.mean[name].lerp_(activations.mean(0), 1 - self.decay)
        now = self._adaptable(layer, activations) if self.adaptable else contribution(layer, activations)
        self.utility[name].lerp_(now, 1 - self.decay)

    def _adaptable(self, layer: Units, activations: Tensor) -> Tensor:
        """The mean-corrected contribution over the size of the incoming weights."""
        moved = (activations - self.corrected_mean(layer.name)).abs().mean(0)
        sizes = [_sizes(reader.weight).mean(0) for reader in layer.out]
        read = torch.stack(sizes).mean(0)[layer.columns]
        made = layer.into.weight.flatten(1).abs().mean(1)
        worth: Tensor = (read * moved).sum(1) / (made + 1e-12)
        return worth

    def corrected_mean(self, name: str) -> Tensor:
        """The mean activation of each unit, as if its running mean had not begun at zero."""
        return self.mean[name] / (1 - self.decay ** self.age[name].clamp(min=1))[:, None]

    def renew_least(self, layer: Units) -> None:
        """Replace as many units as are due."""
        name = layer.name
        mature = torch.nonzero(self.age[name] > self.maturity)[:, 0]
        self.owed[name] += self.rate * len(mature)
        count = min(int(self.owed[name]), len(mature))
        if count < 1:
            return
        self.owed[name] -= count
        worth = self.utility[name] / (1 - self.decay ** self.age[name].clamp(min=1))
        units = mature[worth[mature].argsort()[:count]]
        self.renew(layer, units, fold=self.corrected_mean(name)[units])
        for store in (self.utility, self.mean, self.age):
            store[name][units] = 0


def contribution(layer: Units, activations: Tensor) -> Tensor:
    """Each unit's mean |h| times the sum of |outgoing weights|: Dohare et al. 2024, equation 1."""
    read = torch.stack([_sizes(reader.weight).sum(0) for reader in layer.out]).sum(0)[layer.columns]
    worth: Tensor = (read * activations.abs().mean(0)).sum(1)
    return worth


def _sizes(weight: Tensor) -> Tensor:
    """|weight| of a layer that reads, (answers, columns); a kernel's places are summed."""
    return weight.abs().flatten(2).sum(-1) if weight.ndim > 2 else weight.abs()


class HeadReset(FromFirst):
    """The last `layers` layers begin anew at each new visit, moments too (Nikishin et al. 2022).

    Their weights are drawn anew (the same ones for the same seed of the run, others at each visit), as `redrawn` does;
    with `same: true` they are the first ones again.
    """

    family = RENEWAL
    needs: ClassVar[tuple[str, ...]] = ("model", "optimizers", "chains")
    needs_boundaries = True
    one_head = True
    excludes: ClassVar[tuple[str, ...]] = STRUCTURAL
    idle: ClassVar[Mapping[str, Any]] = {"layers": 0}

    def __init__(self, layers: int = 1, same: bool = False) -> None:
        super().__init__()
        self.layers, self.same = whole("layers", layers, 0), truth("same", same)

    def enter(self, visit: Visit) -> None:
        """At each visit but the first."""
        super().enter(visit)
        if visit.index > 1:
            self.reset(self.chosen())

    def chosen(self) -> list[str]:
        """The parameters that are reset."""
        names: list[str] = []
        for chain in chains_of(self.agent) or []:
            made = [n for n in chain if any(weighted(part) for part in self.agent.model.get_submodule(n).modules())]
            last = made[-self.layers :] if self.layers else []
            names += [n for n in self.parameters if any(n.startswith(f"{layer}.") for layer in last)]
        return names

    @torch.no_grad()
    def reset(self, names: list[str]) -> None:
        """New weights, no moments, and target networks made anew."""
        for name in names:
            first = self.first[name]
            self.parameters[name].copy_(first if self.same else redrawn(first, self.generator))
        self._forget_moments(names)
        if names and hasattr(self.agent, "rebuilt"):
            self.agent.rebuilt()
        self.count("reset", float(sum(self.parameters[name].numel() for name in names)))

    def _forget_moments(self, names: Iterable[str]) -> None:
        """These parameters begin anew in their optimizer too, its count of steps included."""
        chosen = {id(self.parameters[name]) for name in names}
        for optimizer in optimizers_of(self.agent):
            for parameter in [p for p in optimizer.state if id(p) in chosen]:
                del optimizer.state[parameter]


class Reset(HeadReset):
    """All weights begin anew at each new visit, moments too: the control RESET of arXiv 2509.22335.

    They are drawn anew each time, or with `same: true` are the first ones again, as in `head_reset`.
    """

    needs = ("model", "optimizers")
    memory: ClassVar[tuple[str, ...]] = ("first", "buffers")
    one_head = False
    excludes = (*STRUCTURAL, "head_reset", "plasticity_injection")
    idle: ClassVar[Mapping[str, Any]] = {}

    def __init__(self, same: bool = False) -> None:
        super().__init__(0, same)
        self.buffers: dict[str, Tensor] = {}  # batch norm's first statistics

    def attach(self, agent: Agent) -> None:
        """Remember what is no parameter too."""
        super().attach(agent)
        if not self.buffers:
            self.buffers = {name: value.clone() for name, value in agent.model.named_buffers()}  # type: ignore[attr-defined]

    @torch.no_grad()
    def reset(self, names: list[str]) -> None:
        """Statistics as well."""
        super().reset(names)
        there = dict(self.agent.model.named_buffers())
        for name, value in self.buffers.items():
            there[name].copy_(value)

    def chosen(self) -> list[str]:
        """All."""
        return list(self.parameters)
