"""The method of arXiv 2509.22335: features whose effective rank is kept high, and an L2 penalty beside it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from crl.checked import number, one_of, whole
from crl.core import Agent, CrlError, State, Visit
from crl.hidden import WEIGHTED, hidden, networks
from crl.linalg import CurvatureError, effective_rank_to_raise
from crl.methods.method import Method, Term, averaged, length, own_pass
from crl.methods.shape import L2

FEATURES = "features"
# What the paper's authors use, by what the agent learns from: incremental CIFAR-100, and PPO on Slippery Ant, where the
# step comes once an epoch on a rollout of 2,048. Without epochs it comes once in 2,048 rows, in minibatches of 32.
PAIRS = {"every": 5, "samples": 500}
TRANSITIONS = {"every": "epoch", "samples": 2048}
NO_EPOCHS = 64


class ERank(Term):
    """Raises the effective rank of the hidden layers on recent inputs (arXiv 2509.22335).

    Every `every` steps of the optimizer (or `epoch`, as often as the data at hand are gone through), a plain SGD step
    of its own, `w <- w + lr * gradient of the rank`, which the optimizer's moments do not see: the mean over a
    network's hidden layers (its `last`, or so many of its last), summed over actor and critic, on the latest `samples`
    inputs. With `how: loss` it is a term of the loss instead, of strength `lr`. A step that is not finite is skipped
    and counted: where singular values repeat or vanish the gradient is finite (see `effective_rank_to_raise`). What is
    not said is the authors' choice for the kind of agent.
    """

    family = FEATURES
    blind = True
    idle: ClassVar[Mapping[str, Any]] = {"lr": 0.0}
    memory: ClassVar[tuple[str, ...]] = ("block", "steps")
    by_kind: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "pairs": {"lr": 1e-4, **PAIRS},
        "transitions": {"lr": 1e-7, **TRANSITIONS},
    }

    def __init__(
        self,
        lr: float | None = None,
        every: int | str | None = None,
        layers: int | str = "all",
        samples: int | None = None,
        how: str = "step",
    ) -> None:
        self.how = one_of("how", how, ("step", "loss"))
        super().__init__(0.0)
        self._asked = {"lr": lr, "every": every, "samples": samples}
        self.lr, self.samples = 0.0, 2
        self.every: int | str = 1
        self._take({name: value for name, value in self._asked.items() if value is not None})
        count = isinstance(layers, int) and not isinstance(layers, bool)
        self.layers = whole("layers", layers) if count else one_of("layers", layers, ("all", "last"))
        self.block: list[dict[str, Tensor]] = []  # the latest minibatches, with all that `outputs` may read
        self.steps = 0
        self._rows: int | None = None  # how many there are in it; None: to be counted

    def _take(self, options: Mapping[str, Any]) -> None:
        if "lr" in options:
            self.lr = number("lr", options["lr"], 0.0)
            self.strength = self.lr if self.how == "loss" else 0.0
        if "every" in options:
            self.every = options["every"] if options["every"] == "epoch" else whole("every", options["every"])
        if "samples" in options:
            self.samples = whole("samples", options["samples"], 2)

    def settle(self, agent: Any, defaults: Mapping[str, Any]) -> None:
        """What was not asked for is the default for this agent."""
        missing = {name: defaults[name] for name, value in self._asked.items() if value is None}
        if missing.get("every") == "epoch" and not hasattr(agent, "epoch"):
            missing["every"] = NO_EPOCHS
        self._take(missing)
        self._asked |= missing
        if self.every == "epoch":
            self.every = whole("every: epoch asks the agent for `epoch`, which", getattr(agent, "epoch", None))

    def attach(self, agent: Agent) -> None:
        """By now it is known what agent it is."""
        self.settle(agent, self.by_kind[kind_of(agent)])
        super().attach(agent)

    def accepts(self, agent: Agent) -> None:
        """Hidden layers there must be; and epochs are only known of agents that tell."""
        layers = [p for p in agent.model.modules() if isinstance(p, WEIGHTED)]  # type: ignore[attr-defined]
        owned = [{id(p) for p in part.values()} for part in networks(agent).values()]
        if all(sum(any(id(p) in own for p in layer.parameters()) for layer in layers) < 2 for own in owned):
            raise CrlError("erank acts on hidden layers, and this network has none")
        self.settle(agent, self.by_kind[kind_of(agent)])

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Remember the inputs, and rise when it is time to."""
        super().after_step(optimizer)
        if not self.lr:
            return
        self._remember(self.agent.minibatch)
        self.steps += 1
        if self.how == "step" and self._due_now(self.steps):
            self._rise()

    def loss(self) -> Tensor | None:
        """As a term: minus the rank, on every so manieth step."""
        if not self._due_now(self.steps + 1):
            return None
        before = list(self.block)
        self._remember(self.agent.minibatch)
        rank = self.rank()
        self.block = before
        self._rows = None
        self.count("rank", float(rank.detach()))
        return -rank

    def rank(self) -> Tensor:
        """What is to be raised, on the block."""
        seen = hidden(self.agent, {name: torch.cat([rows[name] for rows in self.block]) for name in self.block[0]})
        total = torch.zeros(())
        for layers in seen.values():
            chosen = layers if self.layers == "all" else layers[-(1 if self.layers == "last" else int(self.layers)) :]
            total = total + sum(effective_rank_to_raise(layer.values) for layer in chosen) / len(chosen)
        return total

    def _due_now(self, step: int) -> bool:
        return step % int(self.every) == 0

    def _remember(self, minibatch: Mapping[str, Tensor]) -> None:
        count = len(minibatch["obs"])
        self._rows = (sum(len(rows["obs"]) for rows in self.block) if self._rows is None else self._rows) + count
        self.block.append(dict(minibatch))
        while self._rows > self.samples:
            excess, first = self._rows - self.samples, self.block[0]
            if len(first["obs"]) <= excess:
                self._rows -= len(self.block.pop(0)["obs"])
            else:
                self.block[0], self._rows = {name: value[excess:] for name, value in first.items()}, self.samples

    def _rise(self) -> None:
        values = list(self.parameters.values())
        with own_pass(self.agent):
            try:
                rank = self.rank()
            except CurvatureError:  # no hidden layer
                return
            found = torch.autograd.grad(rank, values, allow_unused=True) if rank.requires_grad else ()
        parts = [(value, part) for value, part in zip(values, found, strict=False) if part is not None]
        size = float(length(part for _, part in parts)) if parts else float("nan")
        if not math.isfinite(size):
            self.count("skipped")
            return
        for value, part in parts:
            value.add_(part, alpha=self.lr)
        self.count("steps")
        self.count("rank", float(rank.detach()))
        self.count("push", self.lr * size)

    def load_state_dict(self, state: State) -> None:
        """The inverse of `state_dict`."""
        super().load_state_dict(state)
        self._rows = None

    def numbers(self) -> dict[str, float]:
        """The rank that its steps found, and how long they were: means."""
        return (
            averaged(super().numbers(), "rank") if self.how == "loss" else averaged(super().numbers(), "rank", "push")
        )


class L2ER(Method):
    """L2-ER: `l2` and `erank` together (arXiv 2509.22335); `l2` is the penalty's strength, all else is `erank`'s."""

    family = FEATURES
    needs = ERank.needs
    excludes = ("erank",)
    idle: ClassVar[Mapping[str, Any]] = {"l2": 0.0, "lr": 0.0}
    by_kind: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "pairs": {"lr": 1e-3, **PAIRS},
        "transitions": {"lr": 1e-6, **TRANSITIONS},
    }

    def __init__(
        self,
        l2: float = 1e-3,
        lr: float | None = None,
        every: int | str | None = None,
        layers: int | str = "all",
        samples: int | None = None,
        how: str = "step",
    ) -> None:
        super().__init__()
        number("l2", l2, 0.0)
        self.erank = ERank(lr, every, layers, samples, how)
        self.parts: dict[str, Any] = {"l2": L2(l2), "erank": self.erank}

    def accepts(self, agent: Agent) -> None:
        """What its parts accept."""
        self.erank.settle(agent, self.by_kind[kind_of(agent)])
        for part in self.parts.values():
            part.accepts(agent)

    def reseed(self, seed: int) -> None:
        """Its parts draw nothing."""

    def attach(self, agent: Agent) -> None:
        """L2 first; they do not touch one another: one is in the gradient, one a step of its own."""
        self.agent = agent
        self.erank.settle(agent, self.by_kind[kind_of(agent)])
        for part in self.parts.values():
            part.attach(agent)

    def find_parameters(self) -> None:
        """Both know the parameters."""
        for part in self.parts.values():
            part.find_parameters()

    def enter(self, visit: Visit) -> None:
        """A visit begins."""
        for part in self.parts.values():
            part.enter(visit)

    def numbers(self) -> dict[str, float]:
        """What both did."""
        found = {name: part.numbers() for name, part in self.parts.items()}
        seconds = sum(numbers.pop("seconds") for numbers in found.values())
        named = {f"{name}/{key}": value for name, numbers in found.items() for key, value in numbers.items()}
        return {**named, "seconds": seconds}

    def state_dict(self) -> State:
        """What both remember."""
        return {name: part.state_dict() for name, part in self.parts.items()}

    def load_state_dict(self, state: State) -> None:
        """The inverse of `state_dict`."""
        for name, part in self.parts.items():
            part.load_state_dict(state[name])


def kind_of(agent: Any) -> str:
    """What it learns from: labelled pairs, or else transitions."""
    return "pairs" if getattr(agent, "learns_from", "") == "pairs" else "transitions"
