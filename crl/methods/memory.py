"""Keeping memory by rehearsal: of what was seen, of what was answered, or of what a generator makes up."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from crl.checked import number, whole
from crl.core import Agent, CrlError, Rules, State, Task, Visit, aside, derive, facing
from crl.linalg.memory import available
from crl.methods.critic import refuse_without_critic, value_distance, values_of
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

    needs: ClassVar[tuple[str, ...]] = ("model", "optimizers", "minibatch", "outputs", "remembers")
    memory: ClassVar[tuple[str, ...]] = ("tasks",)
    fixed: ClassVar[bool] = False
    critic: float = 0.0  # the weight of the distance of values

    def remember(self, size: int, batch: int, every: int) -> None:
        """Set up: rows kept, rows rehearsed in a step, and steps between two looks at a minibatch."""
        self.reservoir = Reservoir(whole("size", size, 1, 10**8), {})
        self.batch, self.every = whole("batch", batch, 1, 10**7), whole("every", every)
        self.tasks: list[str] = []
        self._stepped = 0

    def accepts(self, agent: Agent) -> None:
        """What is to be kept and rehearsed must fit into memory: of each row what is seen, at least."""
        super().accepts(agent)
        refuse_without_critic(self.critic, agent)
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
        rows, known = self.reservoir.rows, self.known()
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

    def known(self) -> Tensor:
        """The rows that may be rehearsed: those of earlier visits, or all where no visit was announced."""
        if not self.visit:
            return torch.arange(len(self.reservoir))
        return torch.nonzero(self.reservoir.rows["visit"][: len(self.reservoir)] < self.visit)[:, 0]

    @contextlib.contextmanager
    def _facing(self, task: str) -> Iterator[None]:
        with aside(0), facing(self.agent, Named(task)):  # type: ignore[arg-type]  # heads are faced by name
            yield

    def row_loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The mean loss of rows: the agent's own or, for which old rewards say nothing, of answering otherwise."""
        if not hasattr(self.agent, "rehearse"):
            return self.cloned(batch)
        loss: Tensor = self.agent.rehearse(batch)
        return loss

    def cloned(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The mean loss of answering otherwise than was answered then."""
        outputs = self.agent.outputs(batch)
        loss: Tensor = self.agent.distill(outputs, batch["outputs"])
        return loss + self.critic * self.strayed(outputs, batch) if self.critic else loss

    def strayed(self, outputs: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """How far values are from those of then, in variances of the returns that are held."""
        returns = self.reservoir.rows["return"][: len(self.reservoir)]
        return value_distance(self.agent, outputs, batch["outputs"], returns)

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


class Rehearsal(Remembering, Term):
    """A loss of remembered rows that joins each step."""

    family = MEMORY

    def __init__(self, strength: float, size: int, batch: int, every: int, critic: float = 0.0) -> None:
        super().__init__(strength)
        self.remember(size, batch, every)
        self.critic = number("critic", critic, 0.0)

    def loss(self) -> Tensor | None:
        """Of a batch of remembered rows."""
        return self.rehearsed()

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Remember."""
        super().after_step(optimizer)
        if self.strength:
            self.store()


class Replay(Rehearsal):
    """Experience replay: rows of earlier visits join each step (Robins 1995; Chaudhry et al. 2019, arXiv 1902.10486).

    What rehearsing means is the agent's own: a classifier learns its stored pairs again, DQN its stored transitions
    with today's target network. To PPO old gains say nothing, so it is refused: `clone` holds what PPO answered.
    """

    def __init__(self, strength: float = 1.0, size: int = 2000, batch: int = 128, every: int = 8) -> None:
        super().__init__(strength, size, batch, every)

    def accepts(self, agent: Agent) -> None:
        """What was stored must be worth learning again."""
        if not hasattr(agent, "rehearse"):
            name = type(agent).__name__
            raise CrlError(f"replay needs an agent with `rehearse`, which {name} lacks; clone holds its old answers")


class Clone(Rehearsal):
    """Behavioural cloning of old answers: CLEAR without its V-trace (Rolnick et al. 2019, arXiv 1811.11682).

    strength * (KL(then || now) of the policy + critic * squared distance of the values) on rows of earlier visits. The
    defaults are the paper's weights, .01 and .005. Its rewards are clipped, ours may be hundreds, so the distance is
    over the variance of the returns. The paper clones what was answered when a row was seen; here it is what was
    answered at the end of the row's visit.
    """

    needs = (*Rehearsal.needs, "distill")

    def __init__(
        self, strength: float = 0.01, critic: float = 0.5, size: int = 2000, batch: int = 128, every: int = 8
    ) -> None:
        super().__init__(strength, size, batch, every, critic)

    def accepts(self, agent: Agent) -> None:
        """An agent without a critic has its answers cloned, and that is all."""
        if not getattr(agent, "critic_columns", ()):
            self.critic = 0.0
        super().accepts(agent)

    def row_loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Of answering otherwise."""
        return self.cloned(batch)


class DER(Rehearsal):
    """Dark experience replay: the squared distance to the very numbers answered when a row was seen (Buzzega 2020).

    The mean over numbers, and alpha .3, are as in the authors' code (Mammoth), and so are the rows: any that was ever
    seen, of the present visit too. Without DER++'s term on the labels. Of an actor-critic the policy's numbers count.
    """

    fixed = True

    def __init__(
        self, strength: float = 0.3, size: int = 2000, batch: int = 128, every: int = 8, critic: float = 0.0
    ) -> None:
        super().__init__(strength, size, batch, every, critic)

    def known(self) -> Tensor:
        """All: it was made for streams whose boundaries nobody tells."""
        return torch.arange(len(self.reservoir))

    def row_loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Mean over rows of the mean squared distance of their answers."""
        outputs: Tensor = self.agent.outputs(batch)
        loss = (outputs - batch["outputs"])[:, ~values_of(self.agent, outputs)].square().mean()
        return loss + self.critic * self.strayed(outputs, batch) if self.critic else loss


class AGEM(Remembering):
    """Averaged GEM: a gradient that would raise the rehearsal loss loses that part (Chaudhry et al. 2019).

    g <- g - (g.r / r.r) r where g.r < 0, with r the gradient of the loss of remembered rows: what is left is orthogonal
    to r. That loss is the agent's `rehearse`, or of PPO the KL to its old policy plus `critic` times the distance of
    its values. Acts on the whole gradient, after penalties and clipping.
    """

    family = MEMORY

    def __init__(self, size: int = 2000, batch: int = 128, every: int = 8, critic: float = 0.0) -> None:
        super().__init__()
        self.remember(size, batch, every)
        self.critic = number("critic", critic, 0.0)

    def accepts(self, agent: Agent) -> None:
        """Of something there must be a gradient."""
        super().accepts(agent)
        if not hasattr(agent, "rehearse") and not hasattr(agent, "distill"):
            raise CrlError(f"agem needs an agent with `rehearse` or `distill`, and {type(agent).__name__} has neither")

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
        return self.distance(batch, self.agent.outputs(batch), self.taught(batch))

    def distance(self, batch: Mapping[str, Tensor], outputs: Tensor, teacher: Tensor) -> Tensor:
        """The loss of a batch's answers beside the teacher's."""
        loss: Tensor = self.agent.distill(outputs, teacher)
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
                part = self.compared(batch) if once is None else self.distance(batch, *once)
            total = part if total is None else total + part
        return total


class LwF(Taught):
    """Learning without forgetting: on today's inputs, answer as the agent of the visit's beginning (Li and Hoiem 2016).

    The loss is the agent's own `distill`: a classifier's T^2 KL at temperature 2, the KL of PPO's policy, half the
    squared error of DQN's values; and `critic` times the squared distance of an actor-critic's values over the variance
    of the returns. It is made for outputs that belong to a task: with a head per task the earlier tasks' heads are held
    so, and the new one is free. With one head for all it asks for the old answers to the inputs for which today's task
    wants others, so learning and memory contradict each other; a warning says so.
    """

    family = MEMORY

    def __init__(self, strength: float = 1.0, critic: float = 0.0) -> None:
        super().__init__(strength)
        self.critic = number("critic", critic, 0.0)

    def accepts(self, agent: Agent) -> None:
        """Only an actor-critic has a critic."""
        refuse_without_critic(self.critic, agent)

    def warns(self, tasks: Sequence[Task], rules: Rules) -> str:
        """Where all tasks share their outputs."""
        apart = rules.head == "per_task" or all(getattr(task, "answers", ()) for task in tasks)
        if apart or len(tasks) < 2 or not self.strength:
            return ""
        return (
            "lwf with one head for all tasks holds today's inputs at yesterday's answers, against what is learned: "
            "boundary.head: per_task, or tasks with classes of their own, keep the two apart"
        )

    def loss(self) -> Tensor | None:
        """On the minibatch."""
        if not self.teacher:
            return None
        minibatch = self.agent.minibatch
        return self.on_each(minibatch, self.earlier) if self.apart() else self.compared(minibatch)

    def distance(self, batch: Mapping[str, Tensor], outputs: Tensor, teacher: Tensor) -> Tensor:
        """With that of the values."""
        loss = super().distance(batch, outputs, teacher)
        if not self.critic:
            return loss
        return loss + self.critic * value_distance(self.agent, outputs, teacher, batch["return"])
