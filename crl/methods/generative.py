"""Keeping memory without keeping data: a small generator makes up inputs, which the agent of before answers."""

from __future__ import annotations

import copy
import inspect
import math

import torch
from torch import Tensor, nn

from crl.checked import number, whole
from crl.core import Agent, CrlError, State, Visit
from crl.methods.memory import MEMORY, Taught
from crl.methods.method import averaged, plainly


class GenerativeReplay(Taught):
    """Rehearses inputs that a small generator makes up, answered by the agent as it was (Shin et al. 2017).

    A variational autoencoder of the inputs learns along, from minibatches and from what its own copy of the visit's
    beginning makes up. Of k tasks so far each counts alike: the agent's own loss is weighed 1/k and the rehearsal's
    `strength` (k - 1)/k, and so are the generator's two (the ratio r of Shin et al., equation 1, as 1/k). For agents
    that see numbers; categories, such as MiniGrid's cells, are refused: a generator of grids is no small one.
    """

    family = MEMORY
    needs = (*Taught.needs, "interface")
    turn = 0

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
        inputs = math.prod(agent.interface.observation.shape)  # type: ignore[attr-defined]
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
            self.vae.begun.fill_(0)

    @property
    def old_share(self) -> float:
        """How much earlier tasks count together: (k - 1)/k."""
        return 1 - 1 / max(len(self.tasks), 1)

    def push(self, name: str, parameter: nn.Parameter) -> None:
        """The agent's own loss is that of one task in k."""
        if self._due is None:
            self._due = self._gradients()
            self._rehearses = bool(self._due)
        if self._rehearses and parameter.grad is not None:
            parameter.grad.mul_(1 - self.old_share)
        super().push(name, parameter)

    def loss(self) -> Tensor | None:
        """On inputs made up."""
        if self.old is None or not self.old_share:
            return None
        made = self.old.sample(self.batch, self.generator)
        batch = {"obs": made.view(-1, *self.agent.minibatch["obs"].shape[1:])}
        if self.apart():
            apart = self.on_each(batch, self.earlier)
            return None if apart is None else self.old_share * apart / len(self.earlier)
        outputs, taught = self.agent.outputs(batch), self.taught(batch)
        made_up = {"made_up": True} if "made_up" in inspect.signature(self.agent.distill).parameters else {}
        loss: Tensor = self.agent.distill(outputs, taught, **made_up)
        return self.old_share * loss

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """The generator learns from what was seen, and from what it made up."""
        super().after_step(optimizer)
        if not self.strength:
            return
        seen = self.agent.minibatch["obs"].float().flatten(1)
        made = self.old.sample(len(seen), self.generator) if self.old is not None and self.old_share else None
        if not self.vae.begun:
            self.vae.begin(seen if made is None else torch.cat([seen, made]))
        with torch.enable_grad():
            loss = self.vae.loss(seen, self.generator)
            if made is not None:
                loss = (1 - self.old_share) * loss + self.old_share * self.vae.loss(made, self.generator)
            self.adam.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
        if not torch.isfinite(loss) or not all(
            torch.isfinite(p.grad).all() for p in self.vae.parameters() if p.grad is not None
        ):
            self.count("generator_skipped")
            return
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
    """A variational autoencoder of vectors (Kingma and Welling 2014), scaled by a visit's first batch."""

    mean: Tensor
    scale: Tensor
    begun: Tensor  # whether the scale is this visit's

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
            self.begin(x)
        scaled = (x - self.mean) / self.scale
        centre, spread = self.encoder(scaled).chunk(2, 1)
        spread = spread.clamp(-10, 10)
        noise = torch.randn(centre.shape, generator=generator).to(x.device)
        made = self.decoder(centre + noise * (spread / 2).exp())
        kl = 0.5 * (centre.square() + spread.exp() - 1 - spread).sum(1)
        loss: Tensor = (0.5 * (made - scaled).square().sum(1) + kl).mean()
        return loss

    @torch.no_grad()
    def begin(self, x: Tensor) -> None:
        """Take a batch's mean and spread as the scale from now on."""
        spread = x.std(0, correction=0)
        self.mean.copy_(x.mean(0))
        self.scale.copy_(torch.where(spread > 1e-3, spread, torch.ones_like(spread)))  # what stood still may move
        self.begun.fill_(1)

    @torch.no_grad()
    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """Vectors made up."""
        made: Tensor = self.decoder(torch.randn(count, self.latent, generator=generator).to(self.mean.device))
        return made * self.scale + self.mean
