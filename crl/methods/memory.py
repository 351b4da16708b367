"""Keeping memory by rehearsal: of what was seen, of what was answered, or of what a generator makes up."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from crl.core import Agent, CrlError, State, Visit, aside, derive, facing
from crl.methods.method import Method, Term, averaged, number, own_pass, plainly, whole

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
        self.reservoir = Reservoir(whole("size", size), {})
        self.batch, self.every = whole("batch", batch), whole("every", every)
        self.tasks: list[str] = []
        self._stepped = 0

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
    memory: ClassVar[tuple[str, ...]] = ("teacher",)

    def __init__(self, strength: float) -> None:
        super().__init__(strength)
        self.teacher: dict[str, Tensor] = {}

    def enter(self, visit: Visit) -> None:
        """The agent as it is now teaches."""
        super().enter(visit)
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


class LwF(Taught):
    """Learning without forgetting: on today's inputs, answer as the agent of the visit's beginning (Li and Hoiem 2016).

    The loss is the agent's own `distill`: a classifier's T^2 KL at temperature 2, the KL of PPO's policy and half the
    value's squared error, half the squared error of DQN's values. With a head per task the earlier tasks' heads are
    held so, and the new one is free.
    """

    family = MEMORY
    memory: ClassVar[tuple[str, ...]] = ("teacher", "earlier")

    def __init__(self, strength: float = 1.0) -> None:
        super().__init__(strength)
        self.earlier: list[str] = []
        self._tasks: list[str] = []

    def enter(self, visit: Visit) -> None:
        """All tasks but this one are held."""
        super().enter(visit)
        self.earlier = [name for name in self._tasks if name != visit.task.name]
        self._tasks = list(dict.fromkeys([*self._tasks, visit.task.name]))

    def loss(self) -> Tensor | None:
        """On the minibatch."""
        if not self.teacher:
            return None
        minibatch = self.agent.minibatch
        if not getattr(self.agent, "heads", None):
            return self._compared(minibatch)
        total: Tensor | None = None
        for task in self.earlier:
            with aside(0), facing(self.agent, Named(task)):  # type: ignore[arg-type]
                part = self._compared(minibatch)
            total = part if total is None else total + part
        return total

    def _compared(self, batch: Mapping[str, Tensor]) -> Tensor:
        loss: Tensor = self.agent.distill(self.agent.outputs(batch), self.taught(batch))
        return loss

    def state_dict(self) -> State:
        """With the tasks so far."""
        return {**super().state_dict(), "tasks": list(self._tasks)}

    def load_state_dict(self, state: State) -> None:
        """The inverse of `state_dict`."""
        super().load_state_dict(state)
        self._tasks = list(state["tasks"])


class GenerativeReplay(Taught):
    """Rehearses inputs that a small generator makes up, answered by the agent as it was (Shin et al. 2017).

    A variational autoencoder of the inputs learns along, from minibatches and from what its own copy of the visit's
    beginning makes up. For agents that see numbers; categories, such as MiniGrid's cells, are refused: a generator of
    grids is no small one.
    """

    family = MEMORY
    needs = (*Taught.needs, "interface")
    memory: ClassVar[tuple[str, ...]] = ("teacher",)

    def __init__(
        self, strength: float = 1.0, batch: int = 128, latent: int = 16, hidden: int = 128, lr: float = 1e-3
    ) -> None:
        super().__init__(strength)
        self.batch, self.latent, self.hidden = whole("batch", batch), whole("latent", latent), whole("hidden", hidden)
        self.lr = number("lr", lr, 0.0)

    def accepts(self, agent: Agent) -> None:
        """Numbers only."""
        seen = agent.interface.observation  # type: ignore[attr-defined]
        if not hasattr(seen, "low"):
            raise CrlError("generative_replay makes up numbers, and these observations are categories")

    def attach(self, agent: Agent) -> None:
        """A generator of the agent's inputs."""
        inputs = int(agent.interface.observation.shape[0])  # type: ignore[attr-defined]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(torch.randint(2**31, (1,), generator=self.generator)))
            self.vae = VAE(inputs, self.latent, self.hidden)
        self.vae.to(next(agent.model.parameters()).device)  # type: ignore[attr-defined]
        self.old: VAE | None = None
        self.adam = torch.optim.Adam(self.vae.parameters(), self.lr)
        super().attach(agent)

    def enter(self, visit: Visit) -> None:
        """The generator as it is now makes up what was seen before."""
        super().enter(visit)
        if visit.index > 1 and self.strength:
            self.old = copy.deepcopy(self.vae)

    def loss(self) -> Tensor | None:
        """On inputs made up."""
        if self.old is None:
            return None
        batch = {"obs": self.old.sample(self.batch, self.generator)}
        loss: Tensor = self.agent.distill(self.agent.outputs(batch), self.taught(batch))
        return loss

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """The generator learns from what was seen, and from what it made up."""
        super().after_step(optimizer)
        if not self.strength:
            return
        seen = self.agent.minibatch["obs"].float()
        if self.old is not None:
            seen = torch.cat([seen, self.old.sample(len(seen), self.generator)])
        with torch.enable_grad():
            loss = self.vae.loss(seen, self.generator)
            self.adam.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
        self.adam.step()
        self.count("generator_steps")
        self.count("generator_loss", float(loss.detach()))

    def numbers(self) -> dict[str, float]:
        """The generator's mean loss too."""
        return averaged(super().numbers(), "generator_loss", over="generator_steps")

    def state_dict(self) -> State:
        """With the generator."""
        parts = {"vae": plainly(self.vae.state_dict()), "adam": plainly(self.adam.state_dict())}
        return {**super().state_dict(), **parts, "old": plainly(self.old.state_dict()) if self.old else {}}

    def load_state_dict(self, state: State) -> None:
        """The inverse of `state_dict`."""
        super().load_state_dict(state)
        self.vae.load_state_dict(state["vae"])
        self.adam.load_state_dict(state["adam"])
        if state["old"]:
            self.old = copy.deepcopy(self.vae)
            self.old.load_state_dict(state["old"])


class VAE(nn.Module):
    """A variational autoencoder of vectors (Kingma and Welling 2014), scaled by the first batch it sees."""

    mean: Tensor
    scale: Tensor
    begun: Tensor

    def __init__(self, inputs: int, latent: int, hidden: int) -> None:
        super().__init__()
        self.latent = latent
        self.encoder = nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, 2 * latent))
        self.decoder = nn.Sequential(nn.Linear(latent, hidden), nn.ReLU(), nn.Linear(hidden, inputs))
        self.register_buffer("mean", torch.zeros(inputs))
        self.register_buffer("scale", torch.ones(inputs))
        self.register_buffer("begun", torch.zeros(()))

    def loss(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Minus the evidence bound, a nat a number: squared error with unit variance, and the KL to the prior."""
        if not self.begun:
            self.mean.copy_(x.mean(0))
            self.scale.copy_(x.std(0, correction=0) + 1e-3)
            self.begun.fill_(1)
        scaled = (x - self.mean) / self.scale
        centre, spread = self.encoder(scaled).chunk(2, 1)
        noise = torch.randn(centre.shape, generator=generator).to(x.device)
        made = self.decoder(centre + noise * (spread / 2).exp())
        kl = 0.5 * (centre.square() + spread.exp() - 1 - spread).sum(1)
        loss: Tensor = (0.5 * (made - scaled).square().sum(1) + kl).mean()
        return loss

    @torch.no_grad()
    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """Vectors made up."""
        made: Tensor = self.decoder(torch.randn(count, self.latent, generator=generator).to(self.mean.device))
        return made * self.scale + self.mean
