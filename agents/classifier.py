"""The supervised learner: labelled pairs in, classes out, one step of the optimizer a batch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from gymnasium import spaces
from torch import Tensor, nn

from agents import nets
from agents.direct import Direct, only
from agents.layers import Heads
from agents.optimizers import leave_ends, make
from crl.checked import number
from crl.core import Array, CrlError, Interface, NotYet, Rules, State, Task, Visit

TEMPERATURE = 2.0  # of distillation (Hinton et al. 2015; Li and Hoiem 2016)


class Classifier:
    """Learns labels, one step of the optimizer a batch; `net` names its network, from an MLP to a ResNet.

    Where tasks have classes of their own, only those can be the answer: the task's, if it is told which task it is,
    otherwise those of all tasks so far. The outputs of the others are left alone, so one output layer is a head for
    each task. `head: per_task` gives each a layer of its own.
    """

    learns_from = "pairs"

    def __init__(
        self,
        interface: Interface,
        seed: int,
        device: str,
        *,
        net: Mapping[str, Any] | str | None = None,
        optimizer: Mapping[str, Any] | str | None = None,
        learning_rate: float = 1e-3,
    ) -> None:
        seen, answered = interface.observation, interface.action
        if not isinstance(answered, spaces.Discrete) or not isinstance(seen, spaces.Box):
            raise CrlError("agent classifier: it sees numbers and answers with one of several classes")
        self.interface, self.device = interface, torch.device(device)
        net = {"use": net} if isinstance(net, str) else net
        self.classes = int(answered.n)
        torch.manual_seed(seed)
        self.flat = not isinstance(net, Mapping) or net.get("use", "mlp") == "mlp"
        model = nets.build(net or {}, seen.shape, self.classes)
        self.layout = _layout(model, self.flat or len(seen.shape) != 3)
        self._model: nn.Module = model.to(self.device, memory_format=self.layout)  # type: ignore[call-overload]
        rate = number("agent.learning_rate", learning_rate, 0.0)
        self.optimizers = [make(optimizer, self._model.parameters(), rate)]
        layers = [part for part in self._model.modules() if isinstance(part, nn.Linear | nn.Conv2d)]
        leave_ends(self.optimizers[0], [value for part in (layers[0], layers[-1]) for value in part.parameters()])
        self.decay = 0.0
        self.announced = True
        self.heads: list[str] = []  # the tasks that have one, where heads are per task
        self.masks: dict[str, list[int]] = {}  # the classes of each task that is told
        self.met: list[int] = []  # the classes of all tasks so far
        self.before: list[int] = []  # those of the tasks before this one
        self.minibatch: dict[str, Tensor] = {}
        self._direct = Direct(self._model, self.optimizers[0])
        self._answers: Tensor | None = None
        self._waiting = False
        self._seen, self._length = 0, 1

    @property
    def model(self) -> nn.Module:
        """The network, with all updates in it: whoever keeps its parameters asks for it before reading them."""
        self._direct.flush()
        return self._model

    def settle(self) -> None:
        """A safe point: what was held back is done now, so that it makes no difference whether anybody looks."""
        self._direct.flush()

    # Acting and learning.

    def act(self, obs: Any, carry: Any, greedy: bool) -> tuple[Array, Any, Any]:
        """The likeliest class, or one drawn from the answer."""
        if tuple(obs.shape) == self.interface.observation.shape:
            raise CrlError(f"act() takes a batch of observations; of one of shape {(*obs.shape,)} make it: obs[None]")
        with torch.no_grad(), _evaluating(self.model):
            logits = only(self.model(self._inputs(obs)), self._answers)
        chosen = logits.argmax(1) if greedy else torch.multinomial(logits.softmax(1), 1)[:, 0]
        return chosen.cpu().numpy(), carry, None

    def observe(self, experience: Any) -> None:
        """The next batch of pairs."""
        self.minibatch = self.prepare(experience)
        self._waiting = True

    def update(self) -> dict[str, Any]:
        """One step. Its numbers are tensors, so that nobody has to wait for them."""
        if not self._waiting:
            return {}
        self._waiting = False
        batch = self.minibatch
        self._seen += len(batch["label"])
        if self._direct.ready():
            loss, right = self._direct.step(batch, self.decay)
            return {"losses/loss": loss, "train/accuracy": right}
        try:
            outputs = self.outputs(batch)
        except ValueError as error:  # torch's batch norm
            if "more than 1 value" not in str(error):
                raise
            raise CrlError(
                "agent.net: batch norm cannot learn from one number a channel: a larger stream.batch"
            ) from error
        loss = self.objective(outputs, batch)
        self._step(loss)
        right = (only(outputs.detach(), batch.get("answers")).argmax(1) == batch["label"]).float().mean()
        return {"losses/loss": loss.detach(), "train/accuracy": right}

    def _step(self, loss: Tensor) -> None:
        optimizer = self.optimizers[0]
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        if self.decay:
            learned = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            torch._foreach_add_([p.grad for p in learned], [p.detach() for p in learned], alpha=self.decay)
        optimizer.step()

    # Tasks.

    def accepts(self, rules: Rules) -> None:
        """It has neither a buffer nor a normaliser of its own, and its learning rate stands still."""
        self.announced = rules.announced is True
        for name in ("buffer", "normalizer"):
            if getattr(rules, name) == "reset":
                raise CrlError(f"boundary.{name}: reset: the classifier has none")

    def enter(self, visit: Visit) -> None:
        """A visit begins: with classes, perhaps a head of its own."""
        self._seen, self._length = 0, visit.steps
        if visit.rules.optimizer == "reset" and visit.index > 1:
            self.optimizers[0].state.clear()
        if visit.rules.head == "per_task":
            self._turn(visit.task.name, grow=True)
        own = list(getattr(visit.task, "answers", ()))
        self.announced = visit.rules.announced is True
        if own and self.announced:
            self.before = list(self.met)
            self.met = sorted({*self.met, *own})
            if getattr(visit.task, "told", False):
                self.masks[visit.task.name] = own
            self._answers = self._valid(visit.task.name)

    @contextlib.contextmanager
    def facing(self, task: Task) -> Iterator[None]:
        """Answering for a task: with its classes and its head."""
        own, told = list(getattr(task, "answers", ())), getattr(task, "told", task.name in self.masks)
        if self.met and not told and not set(own) <= set(self.met):
            raise NotYet("not all of its classes have been seen yet")
        if self.heads and task.name not in self.heads:
            raise NotYet("no head for this task yet")
        answers, head = self._answers, self._head().current if self.heads else 0
        self._answers = self._mask(own) if told and own and self.announced else self._valid(task.name)
        if self.heads:
            self._turn(task.name, grow=False)
        try:
            yield
        finally:
            self._answers = answers
            if self.heads:
                self._head().current = head

    @property
    def apart(self) -> bool:
        """Whether tasks are answered by outputs of their own."""
        return bool(self.heads or self.masks)

    def _valid(self, task: str) -> Tensor | None:
        """Which classes can be the answer, (classes,); None where all can."""
        return self._mask(self.masks.get(task, self.met))

    def _mask(self, classes: list[int]) -> Tensor | None:
        if not classes:
            return None
        mask = torch.zeros(self.classes, dtype=torch.bool)
        mask[classes] = True
        return mask.to(self.device)

    def _slot(self) -> tuple[Any, str]:
        """Where the output layer is: the module that holds it, and its name there."""
        last = [name for name, part in self.model.named_modules() if isinstance(part, nn.Linear | Heads)]
        last = [name for name in last if not any(name.startswith(f"{other}.") for other in last)]
        above, _, own = last[-1].rpartition(".")
        return self.model.get_submodule(above), own

    def _head(self) -> Heads:
        owner, name = self._slot()
        head: Heads = getattr(owner, name)
        return head

    def _turn(self, task: str, *, grow: bool) -> None:
        if task not in self.heads and grow:
            owner, name = self._slot()
            self.heads.append(task)
            if len(self.heads) == 1:
                setattr(owner, name, Heads(getattr(owner, name)))
            else:
                self._head().grow()
            self.rebuilt()
        self._head().current = self.heads.index(task)

    @property
    def chains(self) -> list[list[str]] | None:
        """As the network declares them; None where they are to be read off it."""
        return getattr(self.model, "chains", None)

    @property
    def networks(self) -> dict[str, dict[str, nn.Parameter]]:
        """Of heads only the one that answers."""
        heads = [*self._head().heads] if self.heads else []
        rest = {id(p) for i, one in enumerate(heads) if i != self._head().current for p in one.parameters()}
        named = self.model.named_parameters()
        return {"model": {name: p for name, p in named if p.requires_grad and id(p) not in rest}}

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

    def prepare(self, experience: Any) -> dict[str, Tensor]:
        """Pairs as a batch: bytes as numbers from 0 to 1, and for each row the classes that can be the answer."""
        label = experience.label.to(self.device)
        batch = {"obs": self._inputs(experience.obs), "label": label}
        own, valid = experience.answers, self._answers
        if own is not None and self.met:
            valid = own.to(self.device)
        if valid is not None:
            batch["answers"] = valid.expand(len(label), -1)
        return batch

    def _inputs(self, obs: Any) -> Tensor:
        values = torch.as_tensor(obs, device=self.device)
        values = values.float().mul_(1 / 255) if values.dtype == torch.uint8 else values.float()
        return values.flatten(1) if self.flat else values.contiguous(memory_format=self.layout)

    def outputs(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The logits of all classes."""
        logits: Tensor = self.model(batch["obs"])
        return logits

    def objective(self, outputs: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """Cross entropy among the classes that can be the answer."""
        return nn.functional.cross_entropy(only(outputs, batch.get("answers")), batch["label"])

    def divergence(self, before: Tensor, after: Tensor) -> dict[str, Tensor]:
        """How far each sample's answer moved."""
        before, after = only(before, self._answers), only(after, self._answers)
        return {"kl": _kl(before, after), "flips": (before.argmax(1) != after.argmax(1)).to(before.dtype)}

    def metric(self, outputs: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """The Fisher information of the classes' distribution in the logits."""
        share = only(outputs, batch.get("answers")).softmax(1)
        return torch.diag_embed(share) - share[:, :, None] * share[:, None, :]

    @property
    def remembers(self) -> tuple[str, ...]:
        """What of a minibatch it takes to rehearse it."""
        return ("obs", "label", "answers") if self.met else ("obs", "label")

    def rehearse(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The loss of stored pairs: among their task's classes or, where tasks are not told, among all so far."""
        if self.met and not self.masks:
            batch = {**batch, "answers": self._mask(self.met).expand(len(batch["label"]), -1)}  # type: ignore[union-attr]
        return self.objective(self.outputs(batch), batch)

    def distill(self, outputs: Tensor, teacher: Tensor, made_up: bool = False) -> Tensor:
        """The loss of answering otherwise than a teacher, at a temperature, in units of the plain loss.

        Among the classes of the task that is faced, or where tasks are not told those of the earlier ones, which are
        all that the teacher knows. What was `made_up` to be of earlier tasks is not to become a new class either.
        """
        valid = self._answers if self.apart else self._mask(self.before)
        free = self._mask(self.met) if made_up and not self.apart else valid
        return TEMPERATURE**2 * _kl(only(teacher, valid) / TEMPERATURE, only(outputs, free) / TEMPERATURE).mean()

    # State.

    def state_dict(self) -> State:
        """Taken between steps."""
        parts = {"model": self.model.state_dict(), "optimizer": self.optimizers[0].state_dict()}
        known: State = {
            "announced": self.announced,
            "masks": dict(self.masks),
            "met": list(self.met),
            "before": list(self.before),
        }
        head = self._head().current if self.heads else 0
        answers = self._answers.clone() if self._answers is not None else None
        progress = [self._seen, self._length]
        return {**parts, **known, "heads": list(self.heads), "head": head, "answers": answers, "progress": progress}

    def load_state_dict(self, state: State) -> None:
        """The inverse of `state_dict`: the structure first."""
        for task in state["heads"]:
            self._turn(task, grow=True)
        if self.heads:
            self._head().current = state["head"]
        self.model.load_state_dict(state["model"])
        self.optimizers[0].load_state_dict(state["optimizer"])
        self.masks = {task: list(classes) for task, classes in state["masks"].items()}
        self.announced = state["announced"]
        self.met, self.before = list(state["met"]), list(state["before"])
        self._answers = state["answers"].to(self.device) if state["answers"] is not None else None
        self._seen, self._length = state["progress"]


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Batch norm as it is when nothing is learned."""
    was = model.training
    model.train(False)
    try:
        yield
    finally:
        model.train(was)


def _kl(before: Tensor, after: Tensor) -> Tensor:
    """KL(before || after) of each row of logits."""
    return (before.softmax(1) * (before.log_softmax(1) - after.log_softmax(1))).sum(1)


def _layout(model: nn.Module, flat: bool) -> torch.memory_format:
    """How a model and its pictures lie in memory: channels last is faster.

    Not where a narrow net has a shortcut of fewer than 8 channels: torch 2.13 then writes past its memory on some
    processors (the gradient of a 1 x 1 convolution with a stride, by oneDNN).
    """
    narrow = any(
        isinstance(part, nn.Conv2d) and part.kernel_size == (1, 1) and part.in_channels < 8 for part in model.modules()
    )
    return torch.contiguous_format if flat or narrow else torch.channels_last
