"""Keeping memory by rehearsal: of what was seen, of what was answered, or of what a generator makes up."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from crl.checked import whole
from crl.core import Agent, CrlError, State, Visit, aside, derive, facing
from crl.linalg.memory import available
from crl.methods.method import Method, Term, own_pass

MEMORY = "memory"
FACE = 6  # the name of a random stream


@dataclass
class Reservoir:
    """A sample of all rows ever seen, each as likely as any other (Vitter 1985), as tensors by name."""

    size: int
    rows: dict[str, Tensor]
    seen: int = 0

    def __len__(self) -> int:
        return min(self.seen, self.size)

    def places(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """(which of the next `count` rows are kept, and where): to be decided before the rows are worked out."""
        index = torch.arange(self.seen, self.seen + count)
        drawn = (torch.rand(count, generator=generator, dtype=torch.float64) * (index + 1)).long()
        place = torch.where(index < self.size, index, drawn)
        self.seen += count
        last = {int(p): i for i, p in enumerate(place.tolist()) if p < self.size}  # the later of two takes the place
        return torch.tensor([*last.values()], dtype=torch.long), torch.tensor([*last], dtype=torch.long)

    def put(self, places: Tensor, rows: Mapping[str, Tensor]) -> None:
        """Put rows in their places."""
        for name, value in rows.items():
            if name not in self.rows:
                self.rows[name] = torch.zeros((self.size, *value.shape[1:]), dtype=value.dtype, device=value.device)
            self.rows[name][places.to(value.device)] = value

    def state_dict(self) -> State:
        """The filled rows."""
        return {"seen": self.seen, "rows": {name: value[: len(self)].clone() for name, value in self.rows.items()}}

    def load_state_dict(self, state: State) -> None:
        """The inverse of `state_dict`."""
        self.seen = state["seen"]
        self.rows = {}
        if len(self):
            self.put(torch.arange(len(self)), state["rows"])


@dataclass(frozen=True)
class Named:
    """As much of a task as facing it takes."""

    name: str


class Remembering(Method):
    """Keeps a reservoir of minibatch rows, with the task they are of, and rehearses those of earlier visits.

    With them are kept the agent's `outputs`: those of the moment, and from the end of a visit on those of its end
    (unless `fixed`). Where boundaries are not announced every row may be rehearsed, with the answers of its moment.
    """

    needs: ClassVar[tuple[str, ...]] = ("model", "optimizers", "minibatch", "outputs", "remembers", "rehearse")
    memory: ClassVar[tuple[str, ...]] = ("tasks",)
    fixed: ClassVar[bool] = False

    def remember(self, size: int, batch: int, every: int) -> None:
        """Set up: rows kept, rows rehearsed in a step, and steps between two looks at a minibatch."""
        self.reservoir = Reservoir(whole("size", size, 1, 10**8), {})
        self.batch, self.every = whole("batch", batch, 1, 10**7), whole("every", every)
        self.tasks: list[str] = []
        self._stepped = 0

    def accepts(self, agent: Agent) -> None:
        """What is to be kept and rehearsed must fit into memory: of each row what is seen, at least."""
        super().accepts(agent)
        seen = getattr(getattr(agent, "interface", None), "observation", None)
        free = available(torch.device("cpu"))
        for name, rows in (("size", self.reservoir.size), ("batch", self.batch)):
            need = rows * 4 * math.prod(getattr(seen, "shape", None) or ())
            if free is not None and need > free:
                raise CrlError(f"{name}: {rows:,} rows take {need / 2**30:.2g} GiB, and {free / 2**30:.2g} are free")

    def enter(self, visit: Visit) -> None:
        """Rows from now on are this visit's."""
        super().enter(visit)
        if visit.task.name not in self.tasks:
            self.tasks.append(visit.task.name)
        self._task = self.tasks.index(visit.task.name)

    def store(self) -> None:
        """A step has happened: look at its minibatch, now and then."""
        self._stepped += 1
        if self._stepped % self.every:
            return
        minibatch = self.agent.minibatch
        count = len(minibatch["obs"])
        chosen, places = self.reservoir.places(count, self.generator)
        if not len(chosen):
            return
        rows = {name: minibatch[name][chosen.to(minibatch[name].device)] for name in self.agent.remembers}
        with own_pass(self.agent), torch.no_grad():
            rows["outputs"] = self.agent.outputs(rows).detach()
        made = rows["outputs"]
        rows["visit"] = torch.full((len(chosen),), self.visit, device=made.device)
        rows["task"] = torch.full((len(chosen),), getattr(self, "_task", 0), device=made.device)
        self.reservoir.put(places, rows)

    def leave(self, visit: Visit) -> None:
        """What was answered early in a visit is not worth keeping: its rows get the answers of its end."""
        super().leave(visit)
        if self.fixed or not len(self.reservoir):
            return
        rows = self.reservoir.rows
        own = torch.nonzero(rows["visit"][: len(self.reservoir)] == visit.index)[:, 0]
        with aside(derive(visit.seed, FACE)), facing(self.agent, visit.task), own_pass(self.agent), torch.no_grad():
            for part in torch.split(own, 1024):  # type: ignore[no-untyped-call]
                rows["outputs"][part] = self.agent.outputs({n: rows[n][part] for n in self.agent.remembers})

    def rehearsed(self) -> Tensor | None:
        """The mean loss of a batch of remembered rows; None while there are none."""
        if not len(self.reservoir):
            return None
        rows, filled = self.reservoir.rows, len(self.reservoir)
        known = torch.nonzero(rows["visit"][:filled] < max(self.visit, 1))[:, 0] if self.visit else torch.arange(filled)
        if not len(known):
            return None
        chosen = known[torch.randint(len(known), (self.batch,), generator=self.generator).to(known.device)]
        batch = {name: value[chosen] for name, value in rows.items()}
        if not getattr(self.agent, "heads", None):
            return self.row_loss(batch)
        total = torch.zeros((), device=chosen.device)
        for task in sorted(set(batch["task"].tolist())):
            own = batch["task"] == task
            with self._facing(self.tasks[task]):
                part = self.row_loss({name: value[own] for name, value in batch.items()})
            total = total + part * own.float().mean()
        return total

    @contextlib.contextmanager
    def _facing(self, task: str) -> Iterator[None]:
        with aside(0), facing(self.agent, Named(task)):  # type: ignore[arg-type]  # heads are faced by name
            yield

    def row_loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The mean loss of rows."""
        loss: Tensor = self.agent.rehearse(batch)
        return loss

    def measures(self) -> dict[str, float]:
        """How many rows are held."""
        return {"rows": float(len(self.reservoir))}

    def state_dict(self) -> State:
        """With the reservoir."""
        return {
            **super().state_dict(),
            "reservoir": self.reservoir.state_dict(),
            "stepped": self._stepped,
            "task": getattr(self, "_task", 0),
        }

    def load_state_dict(self, state: State) -> None:
        """The inverse of `state_dict`."""
        super().load_state_dict(state)
        self.reservoir.load_state_dict(state["reservoir"])
        self._stepped, self._task = state["stepped"], state["task"]


class Replay(Remembering, Term):
    """Experience replay: rows of earlier visits from a reservoir join each step (Rolnick et al. 2019 for PPO).

    What rehearsing means is the agent's own: a classifier learns its stored pairs again, DQN its stored transitions
    with today's target network, and PPO, for which old gains say nothing, clones what it answered at the end of the
    visit (the behaviour cloning of CLEAR, without its V-trace).
    """

    family = MEMORY

    def __init__(self, strength: float = 1.0, size: int = 2000, batch: int = 128, every: int = 8) -> None:
        super().__init__(strength)
        self.remember(size, batch, every)

    def loss(self) -> Tensor | None:
        """Of a batch of remembered rows."""
        return self.rehearsed()

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Remember."""
        super().after_step(optimizer)
        if self.strength:
            self.store()


class DER(Replay):
    """Dark experience replay: the squared distance to the very numbers answered when a row was seen (Buzzega 2020)."""

    fixed = True

    def __init__(self, strength: float = 0.3, size: int = 2000, batch: int = 128, every: int = 8) -> None:
        super().__init__(strength, size, batch, every)

    def row_loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Mean over rows of the mean squared distance of their answers."""
        outputs: Tensor = self.agent.outputs(batch)
        return (outputs - batch["outputs"]).square().mean()


class AGEM(Remembering):
    """Averaged GEM: a gradient that would raise the rehearsal loss loses that part (Chaudhry et al. 2019).

    g <- g - (g.r / r.r) r where g.r < 0, with r the gradient of the loss of remembered rows (what `replay` adds): what
    is left is orthogonal to r. Acts on the whole gradient, after penalties and clipping.
    """

    family = MEMORY

    def __init__(self, size: int = 2000, batch: int = 128, every: int = 8) -> None:
        super().__init__()
        self.remember(size, batch, every)

    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Project."""
        with own_pass(self.agent):
            loss = self.rehearsed()
            if loss is None:
                return
            found = torch.autograd.grad(loss, list(self.parameters.values()), allow_unused=True)
        pairs = [(p.grad, r) for p, r in zip(self.parameters.values(), found, strict=True) if p.grad is not None]
        pairs = [(g, r) for g, r in pairs if r is not None]
        along = sum(float((g * r).sum()) for g, r in pairs)
        size = sum(float(r.square().sum()) for _, r in pairs)
        self.count("steps")
        if along < 0 and size > 0:
            for g, r in pairs:
                g.add_(r, alpha=-along / size)
            self.count("projected")
            self.count("push", -along / size**0.5)

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Remember."""
        self.store()


class Taught(Term):
    """A term that compares with the agent as it was when the visit began."""

    needs: ClassVar[tuple[str, ...]] = ("model", "optimizers", "minibatch", "outputs", "distill")
    needs_boundaries = True
    memory: ClassVar[tuple[str, ...]] = ("teacher", "earlier", "tasks")

    def __init__(self, strength: float) -> None:
        super().__init__(strength)
        self.teacher: dict[str, Tensor] = {}
        self.tasks: list[str] = []
        self.earlier: list[str] = []  # all tasks so far but the one that is being learned

    def enter(self, visit: Visit) -> None:
        """The agent as it is now teaches, what it knows of all tasks but this one."""
        super().enter(visit)
        self.earlier = [name for name in self.tasks if name != visit.task.name]
        self.tasks = list(dict.fromkeys([*self.tasks, visit.task.name]))
        if visit.index > 1 and self.strength:
            self.teacher = {name: p.detach().clone() for name, p in self.parameters.items()}

    def taught(self, batch: Mapping[str, Tensor]) -> Tensor:
        """What the teacher answers."""
        values = {name: self.parameters[name].data for name in self.teacher}
        for name, value in self.teacher.items():
            self.parameters[name].data = value
        try:
            with torch.no_grad():
                answer: Tensor = self.agent.outputs(batch)
        finally:
            for name, value in values.items():
                self.parameters[name].data = value
        return answer

    def compared(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The loss of answering otherwise than the teacher."""
        loss: Tensor = self.agent.distill(self.agent.outputs(batch), self.taught(batch))
        return loss

    def apart(self) -> bool:
        """Whether tasks are answered by outputs of their own."""
        return bool(getattr(self.agent, "heads", None) or getattr(self.agent, "apart", False))

    def on_each(self, batch: Mapping[str, Tensor], tasks: Iterable[str]) -> Tensor | None:
        """The loss summed over the answers for several tasks; one pass is enough where only masks tell them apart."""
        total: Tensor | None = None
        several = getattr(self.agent, "heads", None) or getattr(self.agent, "also_facing", None)
        once = None if several else (self.agent.outputs(batch), self.taught(batch))
        for task in tasks:
            with aside(0), facing(self.agent, Named(task)):  # type: ignore[arg-type]
                part = self.compared(batch) if once is None else self.agent.distill(*once)
            total = part if total is None else total + part
        return total


class LwF(Taught):
    """Learning without forgetting: on today's inputs, answer as the agent of the visit's beginning (Li and Hoiem 2016).

    The loss is the agent's own `distill`: a classifier's T^2 KL at temperature 2, the KL of PPO's policy and half the
    value's squared error, half the squared error of DQN's values. With a head per task the earlier tasks' heads are
    held so, and the new one is free.
    """

    family = MEMORY

    def __init__(self, strength: float = 1.0) -> None:
        super().__init__(strength)

    def loss(self) -> Tensor | None:
        """On the minibatch."""
        if not self.teacher:
            return None
        minibatch = self.agent.minibatch
        return self.on_each(minibatch, self.earlier) if self.apart() else self.compared(minibatch)
