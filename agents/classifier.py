"""The supervised learner: labelled pairs in, classes out, one step of the optimizer a batch."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn

from agents.nets import ACTIVATIONS, DOUBLING, Shape
from agents.optimizers import find
from agents.options import known, policy_kwargs
from crl.core import Array, CrlError, Experience, Interface, State, Visit

TEMPERATURE = 2.0  # of distillation (Hinton et al. 2015; Li and Hoiem 2016)


class Classifier:
    """A multi-layer perceptron that learns labels: an experience's `obs` are inputs, its `action` the right answers."""

    def __init__(
        self,
        interface: Interface,
        seed: int,
        device: str,
        *,
        net: Mapping[str, Any] | None = None,
        optimizer: Mapping[str, Any] | None = None,
        learning_rate: float = 1e-3,
    ) -> None:
        if not isinstance(interface.action, spaces.Discrete) or not isinstance(interface.observation, spaces.Box):
            raise CrlError("agent classifier: it sees a vector of numbers and answers with one of several classes")
        self.interface, self.device = interface, torch.device(device)
        policy_kwargs(interface, net or {}, {})  # refuses what there is not
        own = dict(optimizer or {})
        torch.manual_seed(seed)
        self.model = _mlp(interface, net or {}).to(self.device)
        self.optimizers = [find(own.pop("use", "adam"))(self.model.parameters(), lr=learning_rate, **own)]
        self.minibatch: dict[str, Tensor] = {}
        self._waiting = False
        self._seen, self._length = 0, 1

    # Acting and learning.

    def act(self, obs: Array, carry: Any, greedy: bool) -> tuple[Array, Any, Any]:
        """The likeliest class, or one drawn from the answer."""
        with torch.no_grad():
            logits = self.model(self._tensor(obs).float())
        chosen = logits.argmax(1) if greedy else torch.multinomial(logits.softmax(1), 1)[:, 0]
        return chosen.cpu().numpy(), carry, None

    def observe(self, experience: Experience) -> None:
        """The next batch of pairs."""
        self.minibatch = self.prepare(experience)
        self._waiting = True

    def update(self) -> dict[str, float]:
        """One step."""
        if not self._waiting:
            return {}
        self._waiting = False
        outputs = self.outputs(self.minibatch)
        loss = self.objective(outputs, self.minibatch)
        optimizer = self.optimizers[0]
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self._seen += len(outputs)
        optimizer.step()
        right = (outputs.argmax(1) == self.minibatch["label"]).float().mean()
        return {"losses/loss": float(loss.detach()), "losses/accuracy": float(right)}

    def enter(self, visit: Visit) -> None:
        """A visit begins."""
        self._seen, self._length = 0, visit.steps
        if visit.rules.optimizer == "reset" and visit.index > 1:
            self.optimizers[0].state.clear()

    @property
    def progress(self) -> float:
        """The share of the visit that is over."""
        return min(1.0, self._seen / self._length)

    def rebuilt(self) -> None:
        """The model has grown: its new parameters are to be learned."""
        optimizer = self.optimizers[0]
        there = {id(value) for group in optimizer.param_groups for value in group["params"]}
        new = [value for value in self.model.parameters() if value.requires_grad and id(value) not in there]
        if new:
            optimizer.add_param_group({"params": new})

    # The loss as pure functions.

    def prepare(self, experience: Experience) -> dict[str, Tensor]:
        """Pairs as a batch."""
        inputs = self._tensor(experience.obs).float()
        size = np.asarray(self.interface.observation.shape).prod()
        return {"obs": inputs.reshape(-1, int(size)), "label": self._tensor(experience.action).long().flatten()}

    def outputs(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The logits of all classes."""
        logits: Tensor = self.model(batch["obs"])
        return logits

    def objective(self, outputs: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """Cross entropy."""
        return nn.functional.cross_entropy(outputs, batch["label"])

    def divergence(self, before: Tensor, after: Tensor) -> dict[str, Tensor]:
        """How far each sample's answer moved."""
        return {"kl": _kl(before, after), "flips": (before.argmax(1) != after.argmax(1)).to(before.dtype)}

    def metric(self, outputs: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """The Fisher information of the classes' distribution in the logits."""
        share = outputs.softmax(1)
        return torch.diag_embed(share) - share[:, :, None] * share[:, None, :]

    remembers = ("obs", "label")

    def rehearse(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The loss of stored pairs."""
        return self.objective(self.outputs(batch), batch)

    def distill(self, outputs: Tensor, teacher: Tensor) -> Tensor:
        """The loss of answering otherwise than a teacher, at a temperature, in units of the plain loss."""
        return TEMPERATURE**2 * _kl(teacher / TEMPERATURE, outputs / TEMPERATURE).mean()

    # State.

    def state_dict(self) -> State:
        """Taken between steps."""
        parts = {"model": self.model.state_dict(), "optimizer": self.optimizers[0].state_dict()}
        return {**parts, "progress": [self._seen, self._length]}

    def load_state_dict(self, state: State) -> None:
        """The inverse of `state_dict`."""
        self.model.load_state_dict(state["model"])
        self.optimizers[0].load_state_dict(state["optimizer"])
        self._seen, self._length = state["progress"]

    def _tensor(self, values: Array) -> Tensor:
        return torch.as_tensor(values, device=self.device)


def _mlp(interface: Interface, net: Mapping[str, Any]) -> nn.Sequential:
    """Linear layers with activations between."""
    name = net.get("activation", "relu")
    known("agent.net.activation", [name], {**ACTIVATIONS, **DOUBLING})
    widths = [int(np.prod(interface.observation.shape or ())), *(int(w) for w in net.get("hidden", (400, 400)))]
    parts: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        parts += [nn.Linear(inputs, outputs), ACTIVATIONS.get(name, nn.Identity)()]
    parts.append(nn.Linear(widths[-1], int(interface.action.n)))  # type: ignore[attr-defined]
    chain, shape = nn.Sequential(*parts), Shape.of(net)
    return shape.remake(chain) if shape.changes else chain


def _kl(before: Tensor, after: Tensor) -> Tensor:
    """KL(before || after) of each row of logits."""
    return (before.softmax(1) * (before.log_softmax(1) - after.log_softmax(1))).sum(1)
