"""A part of the network for each task: a column that reads the earlier ones, or a share of the weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from crl.checked import number
from crl.core import Agent, CrlError, NotYet, State, Task, Visit, add_facing, optimizers_of
from crl.hidden import WEIGHTED
from crl.methods.method import Method, plainly
from crl.methods.units import NORMS, bare_linear, chains_of, draw, replace_part

ARCHITECTURE = "architecture"


class Progressive(Method):
    """A new column of layers for each new task, reading the earlier columns, which freeze (Rusu et al. 2016).

    Simplified: what is read of earlier columns is added by a linear layer (the paper's equation 1), not through the
    adapters of its equation 2, and begins at zero instead of at random; otherwise a column begins as the first did
    (drawn from its first weights). Goes with chains of linear layers and activations that act on each number alone. A
    task that comes again is answered by its own column, of which only the last layer, which no other column reads,
    learns on.
    """

    family = ARCHITECTURE
    needs = ("model", "optimizers", "chains", "rebuilt")
    needs_boundaries = True
    one_head = True  # it has an answer for each task already
    names_tasks = True
    excludes = ("packnet", "ewc", "online_ewc", "si", "mas", "spectral_norm", "parseval", "spectral", "weight_clip",
                "normalize_and_project", "wasserstein", "l2_init", "lwf", "generative_replay")  # fmt: skip
    memory: ClassVar[tuple[str, ...]] = ("tasks", "first")

    def __init__(self) -> None:
        super().__init__()
        self.tasks: list[str] = []
        self.first: dict[str, Tensor] = {}  # the first weights of the first column, by layer and kind

    def accepts(self, agent: Agent) -> None:
        """Plain chains only."""
        _refuse_normalizer("progressive", agent)
        _refuse_partial("progressive", agent)
        for chain in chains_of(agent) or []:
            for name in chain:
                part = agent.model.get_submodule(name)  # type: ignore[attr-defined]
                plain = isinstance(part, nn.Linear) or not any(True for _ in part.parameters())
                if not plain or getattr(part, "doubles", False):
                    raise CrlError(f"progressive grows linear layers and plain activations only, and {name} is neither")

    def attach(self, agent: Agent) -> None:
        """Whoever faces a task faces its column."""
        super().attach(agent)
        if not self.tasks and not self._layers():
            for name, part in self._linear():
                for kind, parameter in part.named_parameters():
                    self.first[f"{name}.{kind}"] = parameter.detach().clone()
        add_facing(agent, self.facing)

    def enter(self, visit: Visit) -> None:
        """A new task gets a column, an old one its own."""
        name = visit.task.name
        if name not in self.tasks:
            self.tasks.append(name)
            if len(self.tasks) > 1:
                self.grow(self.agent, fresh=True)
                self.count("columns")
        self._turn(self.tasks.index(name))
        super().enter(visit)

    @contextlib.contextmanager
    def facing(self, task: Task) -> Iterator[None]:
        """Answer with the task's column; before the first visit there is one for all."""
        if self.tasks and task.name not in self.tasks:
            raise NotYet("no column for this task yet")
        layers = self._layers()
        before = layers[0].current if layers else 0
        self._turn(self.tasks.index(task.name) if self.tasks else 0)
        try:
            yield
        finally:
            self._turn(before)

    def grow(self, agent: Any, fresh: bool) -> None:
        """One more column in every chain; all earlier ones freeze."""
        for chain in chains_of(agent) or []:
            names = [n for n in chain if isinstance(agent.model.get_submodule(n), nn.Linear | Columns)]
            for name in names:
                part = agent.model.get_submodule(name)
                if isinstance(part, nn.Linear):
                    part = Columns(part, first=name == names[0], last=name == names[-1])
                    replace_part(agent.model, name, part)
                column = part.grow()
                if fresh:
                    self._fill(column, name)
        agent.rebuilt()

    def _fill(self, column: nn.Linear, name: str) -> None:
        with torch.no_grad():
            weight = self.first[f"{name}.weight"]
            column.weight.zero_()
            own = column.weight[:, -weight.shape[1] :]
            own.copy_(draw(weight, own.shape, self.generator))
            if column.bias is not None:
                column.bias.copy_(self.first[f"{name}.bias"])

    def _turn(self, column: int) -> None:
        """Answer with a column: it alone can be learned, and of an earlier one only the last layer."""
        for layer in self._layers():
            layer.current = column
            for i, part in enumerate(layer.columns):
                part.requires_grad_(i == column and (layer.last or i == len(layer.columns) - 1))

    def _layers(self) -> list[Columns]:
        return [part for part in self.agent.model.modules() if isinstance(part, Columns)]

    def _linear(self) -> list[tuple[str, nn.Module]]:
        parts = [(n, self.agent.model.get_submodule(n)) for chain in chains_of(self.agent) or [] for n in chain]
        return [(name, part) for name, part in parts if isinstance(part, nn.Linear)]

    def state_dict(self) -> State:
        """With the column that answers."""
        layers = self._layers()
        return {**super().state_dict(), "current": layers[0].current if layers else 0}

    def load_state_dict(self, state: State) -> None:
        """The inverse of `state_dict`."""
        super().load_state_dict(state)
        self._turn(state["current"])

    def rebuild(self, agent: Agent, state: State) -> None:
        """After a resume: as many columns as there were."""
        for _ in state["tasks"][1:]:
            self.grow(agent, fresh=False)


class Columns(nn.Module):
    """A linear layer for each task: each reads its own column's units and all earlier columns'."""

    def __init__(self, first_column: nn.Linear, first: bool, last: bool) -> None:
        super().__init__()
        self.columns = nn.ModuleList([first_column])
        self.first, self.last = first, last
        self.current = 0

    def grow(self) -> nn.Linear:
        """A new column, which answers from now on; the others freeze, unless no column reads them."""
        self.columns.requires_grad_(self.last)
        one: Any = self.columns[0]
        inputs = one.in_features * (1 if self.first else len(self.columns) + 1)
        column = bare_linear(one, inputs)
        self.columns.append(column)
        self.current = len(self.columns) - 1
        return column

    def forward(self, x: Tensor) -> Tensor:
        """The units of all columns up to the current one, side by side; at the end the current one's answer."""
        chosen: list[Any] = [*self.columns][: self.current + 1]
        if self.last:
            chosen = chosen[-1:]
        return torch.cat([column(x if self.first else x[:, : column.in_features]) for column in chosen], 1)


class PackNet(Method):
    """Each task keeps a share of the weights, and never again moves them (Mallya and Lazebnik 2018).

    Late in a visit (after the share `prune_at` of it) the smallest free weights are set to zero; those that stay learn
    on to the visit's end and belong to the task. With `share: equal` each of the walk's tasks gets as many weights as
    any other: one over the number of tasks that are still to come, this one included, of what is free (as in
    Continual World, Wolczyk et al. 2021). A number is that share of what is free. After pruning and after the visit
    the optimizer begins anew (as there): what it remembers is of weights that are gone. Biases and norms learn in
    the first visit only; heads per task are left alone. A task is answered with its own weights and those of earlier
    tasks. A task that comes again when later ones have been learned learns nothing more.
    """

    family = ARCHITECTURE
    needs = ("model", "optimizers", "chains", "progress")
    names_tasks = True
    needs_boundaries = True
    excludes = ("progressive", "reset", "head_reset", "redo", "cbp", "shrink_perturb", "plasticity_injection",
                "spectral_norm", "normalize_and_project")  # fmt: skip
    memory: ClassVar[tuple[str, ...]] = ("tasks", "owner", "pruned", "planned")

    def __init__(self, share: float | str = "equal", prune_at: float = 0.75) -> None:
        super().__init__()
        self.share = share if share == "equal" else number("share (equal, or a number)", share, 0.001, 1.0)
        self.prune_at = number("prune_at", prune_at, 0.0, 1.0)
        self.tasks: list[str] = []
        self.owner: dict[str, Tensor] = {}  # 0 is free; task k owns what says k + 1
        self.pruned = False
        self.current = 0
        self.planned = 0  # how many tasks the walk has
        self._held: dict[str, Tensor] = {}  # what a step must not move, at the values that it is put back to
        self._whole: dict[str, Tensor] = {}  # all weights, while those of later tasks are out of sight

    def accepts(self, agent: Agent) -> None:
        """What frozen weights see must not move."""
        _refuse_normalizer("packnet", agent)
        _refuse_partial("packnet", agent)
        if any(getattr(part, "running_mean", None) is not None for part in agent.model.modules()):  # type: ignore[attr-defined]
            raise CrlError("packnet freezes weights, but batch norm's statistics go on moving: use norm: layer or none")

    def attach(self, agent: Agent) -> None:
        """Whoever faces a task sees its weights."""
        super().attach(agent)
        add_facing(agent, self.facing)

    def enter(self, visit: Visit) -> None:
        """A new task takes what is free."""
        super().enter(visit)
        if self.share == "equal" and not visit.tasks:
            raise CrlError("packnet.share: equal needs the number of tasks, not known here; say a number")
        self.planned = visit.tasks
        name = visit.task.name
        self.pruned = name in self.tasks
        if not self.pruned:
            self.tasks.append(name)
        self.current = self.tasks.index(name) + 1
        for key, parameter in self._weights().items():
            self.owner.setdefault(key, torch.zeros(parameter.shape, dtype=torch.int16, device=parameter.device))
        if self.current < len(self.tasks):
            self._whole = {key: parameter.detach().clone() for key, parameter in self._weights().items()}
            self._show({key: self._hidden(key, self.current, value) for key, value in self._whole.items()})
        self._freeze()

    def leave(self, visit: Visit) -> None:
        """What was not pruned in time is pruned now; what was out of sight comes back."""
        if not self.pruned:
            self.prune()
        with torch.no_grad():
            self._put_back()
        self._show(self._whole)
        self._whole = {}
        self._forget_moments()

    def _hidden(self, name: str, task: int, value: Tensor) -> Tensor:
        """Weights as a task sees them: those of later ones, and those that are free, are zero."""
        return value.masked_fill((self.owner[name] > task) | (self.owner[name] == 0), 0.0)

    @torch.no_grad()
    def _show(self, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            self.parameters[name].copy_(value)

    @torch.no_grad()
    def prune(self) -> None:
        """Own the largest of what is free, and set the rest to zero."""
        share = 1 / (self.planned - self.current + 1) if self.share == "equal" else float(self.share)
        for name, parameter in self._weights().items():
            free = self.owner[name] == 0
            count = int(free.sum())
            kept = round(share * count)
            if count:
                sizes = torch.where(free, parameter.abs(), torch.full_like(parameter, -1.0)).flatten()
                chosen = sizes.topk(kept).indices
                self.owner[name].view(-1)[chosen] = self.current
                parameter[self.owner[name] == 0] = 0
        self.pruned = True
        self.count("pruned")
        self._forget_moments()
        self._freeze()

    def _forget_moments(self) -> None:
        for optimizer in optimizers_of(self.agent):
            optimizer.state.clear()

    def _freeze(self) -> None:
        """What a step must not move, at the values that it has now."""
        self._held = {name: parameter.detach().clone() for name, parameter in self._bound().items()}

    def _bound(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.parameters.items() if ".heads." not in name}

    def _weights(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self._bound().items() if p.ndim > 1}

    def _moves(self, name: str) -> Tensor | bool:
        """Where a parameter may move."""
        if name not in self.owner:
            return self.current == 1 and not (self.pruned and self.visit > 1)
        if self.pruned:
            return (self.owner[name] == self.current) & (self.current == len(self.tasks))
        return self.owner[name] == 0

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Put back what must not move; prune when it is time to."""
        if not self.tasks:
            return
        self._put_back()
        if not self.pruned and self.agent.progress >= self.prune_at:
            self.prune()

    def _put_back(self) -> None:
        for name, held in self._held.items():
            moves, parameter = self._moves(name), self.parameters[name]
            if isinstance(moves, bool):
                if not moves:
                    parameter.copy_(held)
            else:
                parameter.copy_(torch.where(moves, parameter, held))

    @contextlib.contextmanager
    def facing(self, task: Task) -> Iterator[None]:
        """The weights of later tasks are zero for an earlier one."""
        known = task.name in self.tasks
        number_ = self.tasks.index(task.name) + 1 if known else 0
        whole = not known or (number_ == self.current and not self.pruned)
        values = {name: self.parameters[name].data for name in self.owner if not whole or name in self._whole}
        for name, value in values.items():
            full = self._whole.get(name, value)
            self.parameters[name].data = full.clone() if whole else self._hidden(name, number_, full)
        try:
            yield
        finally:
            for name, value in values.items():
                self.parameters[name].data = value

    def measures(self) -> dict[str, float]:
        """The share of weights that is still free."""
        total = sum(owner.numel() for owner in self.owner.values())
        return {"free": sum(float((o == 0).sum()) for o in self.owner.values()) / total} if total else {}

    def state_dict(self) -> State:
        """With the task that is being learned."""
        held = {"held": plainly(self._held), "whole": plainly(self._whole)}
        return {**super().state_dict(), "current": self.current, **held}

    def load_state_dict(self, state: State) -> None:
        """The inverse of `state_dict`."""
        super().load_state_dict(state)
        self.current = state["current"]
        self._held, self._whole = dict(plainly(state["held"])), dict(plainly(state["whole"]))


def _refuse_partial(name: str, agent: Any) -> None:
    """What is outside the chains would go on moving under frozen weights."""
    inside = {part for chain in chains_of(agent) or [] for part in chain}
    learned = {id(p) for o in optimizers_of(agent) for group in o.param_groups for p in group["params"]}
    for place, part in agent.model.named_modules():
        own = any(id(p) in learned for p in part.parameters(recurse=False))
        if (
            own
            and isinstance(part, (*WEIGHTED, *NORMS))
            and not any(place == x or place.startswith(f"{x}.") for x in inside)
        ):
            raise CrlError(f"{name} divides chains of layers, and {place} of this network is in none")


def _refuse_normalizer(name: str, agent: Any) -> None:
    """Statistics that go on moving would change what frozen weights answer."""
    if getattr(getattr(agent, "normalizer", None), "observation", False):
        raise CrlError(f"{name} freezes weights, but agent.normalize.observation goes on moving what they see")
