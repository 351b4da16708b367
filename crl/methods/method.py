"""What methods share: where in a step they act, what they remember, what they tell.

torch has the places, so no algorithm is forked. In the order in which they come:

1. a gradient has been computed: penalties and added losses join it, before whatever clips it (`Penalty`, `Term`);
2. `before_step(optimizer)`: the gradient is whole and clipped, and no weight has moved;
3. `after_step(optimizer)`: the weights have moved.

Several methods act in the order of the YAML at 2 and at 3. What they add at 1 is a sum: a method that weighs or reads
the agent's own gradient there has its `turn` before those that add to it.
"""

from __future__ import annotations

import contextlib
import functools
import time
import weakref
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from crl.checked import number
from crl.core import Agent, CrlError, State, Visit, optimizers_of
from crl.linalg.problem import steady

_own_passes = [0]  # how deep in passes of methods' own: who watches the agent's own passes looks away


@contextlib.contextmanager
def own_pass(agent: Any) -> Iterator[None]:
    """A forward pass of a method's own, with gradients: no watcher sees it, batch norm does not count it."""
    _own_passes[0] += 1
    try:
        with torch.enable_grad(), steady(agent.model):
            yield
    finally:
        _own_passes[0] -= 1


def own_passes() -> bool:
    """Whether a pass is a method's own."""
    return _own_passes[0] > 0


class Method:
    """A method that knows its agent's parameters by name, acts around steps, and tells what it did.

    Subclasses write what they need of `before_step`, `after_step`, `enter`, `leave`; they put what they did into
    `self.done` (a sum of events between two records) and `measures()` (how things stand); and name the attributes that
    a checkpoint must hold in `memory`.
    """

    family: ClassVar[str] = ""
    needs: ClassVar[tuple[str, ...]] = ("model", "optimizers")
    excludes: ClassVar[tuple[str, ...]] = ()
    memory: ClassVar[tuple[str, ...]] = ()
    needs_boundaries: ClassVar[bool] = False
    one_head: ClassVar[bool] = False  # whether heads per task are refused
    turn: ClassVar[int] = 2  # who is first at a gradient: 0 weighs the agent's own, 1 reads it, 2 adds to it
    blind: ClassVar[bool] = False  # whether it never looks at gradients, which a step that is written out does not keep
    names_tasks: ClassVar[bool] = False  # whether it answers by a task's name
    samples_tasks: ClassVar[bool] = False  # whether it draws experience of the task that is being left
    idle: ClassVar[Mapping[str, Any]] = {}  # the options with which it changes nothing

    agent: Any

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)
        self.visit = 0
        self.parameters: dict[str, nn.Parameter] = {}
        self.done: dict[str, float] = {}
        self.seconds = 0.0

    # The walk's side.

    def reseed(self, seed: int) -> None:
        """Draw from a stream of its own."""
        self.generator.manual_seed(seed)

    def accepts(self, agent: Agent) -> None:
        """Refuse, in one sentence, an agent that this makes no sense for."""

    def attach(self, agent: Agent) -> None:
        """Hook into the agent's steps."""
        self.agent = agent
        self.find_parameters()
        for optimizer in optimizers_of(agent):
            if self.acts("before_step"):
                optimizer.register_step_pre_hook(lambda stepped, args, kwargs: self._timed(self.before_step, stepped))
            if self.acts("after_step"):
                optimizer.register_step_post_hook(After(self))
        agent.attached = [*getattr(agent, "attached", ()), self]  # type: ignore[attr-defined]  # lives as long

    def acts(self, when: str) -> bool:
        """Whether it has anything to do there."""
        return getattr(type(self), when) is not getattr(Method, when)

    def enter(self, visit: Visit) -> None:
        """A visit begins; the agent may have grown a head for it."""
        self.visit = visit.index
        self.find_parameters()

    def leave(self, visit: Visit) -> None:
        """A visit is over."""

    def numbers(self) -> dict[str, float]:
        """What it did since it was last asked, and how things stand."""
        done, seconds = dict(self.done), self.seconds
        self.done, self.seconds = {}, 0.0
        _ = self.agent.model  # an agent may hold updates back until it is asked for its model
        with torch.no_grad():
            return {**done, **self.measures(), "seconds": seconds}

    def state_dict(self) -> State:
        """What it remembers, and its random stream."""
        own = {name: plainly(getattr(self, name)) for name in self.memory}
        return {**own, "visit": self.visit, "done": dict(self.done), "generator": self.generator.get_state()}

    def load_state_dict(self, state: State) -> None:
        """The inverse of `state_dict`."""
        for name in self.memory:
            setattr(self, name, plainly(state[name]))
        self.visit, self.done = state["visit"], dict(state["done"])
        self.generator.set_state(state["generator"])

    # The subclass's side.

    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        """The gradient is whole, and no weight has moved."""

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """The weights have moved."""

    def measures(self) -> dict[str, float]:
        """How things stand: a penalty, the size of its push."""
        return {}

    def count(self, name: str, by: float = 1.0) -> None:
        """Something was done."""
        self.done[name] = self.done.get(name, 0.0) + by

    def find_parameters(self) -> None:
        """Whatever the optimizers step, by its name in the model."""
        stepped = {id(p) for o in optimizers_of(self.agent) for group in o.param_groups for p in group["params"]}
        named = self.agent.model.named_parameters()
        self.parameters = {name: p for name, p in named if id(p) in stepped and p.requires_grad}

    def owned(self, optimizer: torch.optim.Optimizer) -> dict[str, nn.Parameter]:
        """The parameters that an optimizer steps, by name."""
        ids = {id(p) for group in optimizer.param_groups for p in group["params"]}
        return {name: p for name, p in self.parameters.items() if id(p) in ids}

    def _timed(self, act: Any, *args: Any) -> None:
        began = time.perf_counter()
        with torch.no_grad():
            act(*args)
        self.seconds += time.perf_counter() - began


class After:
    """The hook of a method that acts after a step."""

    def __init__(self, method: Method) -> None:
        self.method, self.blind = method, method.blind

    def __call__(self, stepped: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """A step has been taken."""
        self.method._timed(self.method.after_step, stepped)


class FromFirst(Method):
    """A method that knows the first weights: what comes later has its first weights then."""

    memory: ClassVar[tuple[str, ...]] = ("first",)
    first: dict[str, Tensor]

    def find_parameters(self) -> None:
        """Keep those that were not there before."""
        super().find_parameters()
        self.first = getattr(self, "first", {})
        for name, parameter in self.parameters.items():
            self.first.setdefault(name, parameter.detach().clone())


class Addition(Method):
    """Whatever adds to the gradient as if it stood in the loss: subclasses write `push(name, parameter)`."""

    idle: ClassVar[Mapping[str, Any]] = {"strength": 0.0}

    def __init__(self, strength: float) -> None:
        super().__init__()
        self.strength = number("strength", strength, 0.0)
        self._named: dict[int, str] = {}  # by id: a head that is wrapped has another name from then on

    def find_parameters(self) -> None:
        """Also hook into those that were not there before."""
        super().find_parameters()
        for name, parameter in self.parameters.items():
            if self.hooks() and id(parameter) not in self._named:
                hook = functools.partial(_push, weakref.ref(self))
                parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
            self._named[id(parameter)] = name

    def hooks(self) -> bool:
        """Whether it is to be called when a gradient has been computed."""
        return bool(self.strength)

    def pushed(self, parameter: nn.Parameter) -> None:
        """A gradient has been computed."""
        self._timed(self.push, self._named[id(parameter)], parameter)

    def push(self, name: str, parameter: nn.Parameter) -> None:
        """A parameter's gradient has been computed: add to it."""
        raise NotImplementedError


def _push(method: weakref.ref[Addition], parameter: Any) -> None:
    """Torch holds a parameter's hooks where no collector looks, so they must not hold what holds the parameter."""
    alive = method()
    if alive is not None:
        alive.pushed(parameter)


class Penalty(Addition):
    """A penalty on parameters, added to the loss: subclasses write its gradient `slope` and its `value`."""

    def push(self, name: str, parameter: nn.Parameter) -> None:
        """Add the penalty's gradient."""
        slope = self.slope(name, parameter.detach())
        if slope is not None and parameter.grad is not None:
            parameter.grad.add_(slope, alpha=self.strength)

    def slope(self, name: str, value: Tensor) -> Tensor | None:
        """The gradient of the penalty of strength 1, or None where there is no penalty."""
        raise NotImplementedError

    def value(self, name: str, value: Tensor) -> Tensor | None:
        """The penalty of strength 1 on one parameter."""
        raise NotImplementedError

    def measures(self) -> dict[str, float]:
        """The penalty as it is in the loss, and how long its gradient is."""
        values = [self.value(name, p.detach()) for name, p in self.parameters.items()]
        slopes = [self.slope(name, p.detach()) for name, p in self.parameters.items()]
        push = sum(float(part.square().sum()) for part in slopes if part is not None) ** 0.5
        penalty = sum(float(part) for part in values if part is not None)
        return {"penalty": self.strength * penalty, "push": self.strength * push}


class Term(Addition):
    """A loss of its own, added to the agent's: subclasses write `loss()`, which may be None for now.

    Its gradient is computed when the first parameter's has been, and joins each; what the agent's loss did not touch
    (the head of an earlier task) gets it just before the step. One that is not finite is left out, and counted.
    """

    needs: ClassVar[tuple[str, ...]] = ("model", "optimizers", "minibatch", "outputs")

    def __init__(self, strength: float) -> None:
        super().__init__(strength)
        self._due: dict[str, Tensor] | None = None

    def loss(self) -> Tensor | None:
        """The loss of strength 1."""
        raise NotImplementedError

    def acts(self, when: str) -> bool:
        """Without strength there is no gradient to add."""
        own = type(self).before_step is not Term.before_step
        return super().acts(when) and (when != "before_step" or bool(self.strength) or own)

    def push(self, name: str, parameter: nn.Parameter) -> None:
        """Add this parameter's share of the loss's gradient, which the first to come has computed for all."""
        if self._due is None:
            self._due = self._gradients()
        part = self._due.pop(name, None)
        if part is not None and parameter.grad is not None:
            parameter.grad.add_(part)

    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        """What is still due."""
        for name, parameter in self.owned(optimizer).items() if self._due else ():
            part = self._due.pop(name, None)  # type: ignore[union-attr]
            if part is not None:
                parameter.grad = part if parameter.grad is None else parameter.grad + part

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """The next step has a loss of its own."""
        self._due = None

    def _gradients(self) -> dict[str, Tensor]:
        with own_pass(self.agent):
            loss = self.loss()
            if loss is None:
                return {}
            found = torch.autograd.grad(self.strength * loss, list(self.parameters.values()), allow_unused=True)
        parts = {name: part for name, part in zip(self.parameters, found, strict=True) if part is not None}
        if not all(torch.isfinite(part).all() for part in parts.values()):
            self.count("skipped")
            return {}
        self.count("steps")
        self.count("loss", float(loss.detach()) * self.strength)
        self.count("push", float(length(parts.values())))
        return parts

    def numbers(self) -> dict[str, float]:
        """The means of its loss and of the length of its gradient since it was last asked, beside what it did."""
        done = super().numbers()
        return averaged(done, "loss", "push")


def averaged(done: dict[str, float], *names: str, over: str = "steps") -> dict[str, float]:
    """Sums over steps as means."""
    times = max(done.get(over, 1), 1)
    return {name: value / times if name in names else value for name, value in done.items()}


def length(parts: Iterable[Tensor]) -> Tensor:
    """The norm of many tensors as one vector."""
    return torch.stack([part.square().sum() for part in parts]).sum().sqrt()


def refuse_distance(name: str, agent: Any) -> None:
    """An optimizer that measures how far it has gone must not be put back after every step."""
    if any(getattr(optimizer, "measures_distance", False) for optimizer in optimizers_of(agent)):
        raise CrlError(f"{name} moves weights after every step, which optimizer trac would take for its own doing")


def plainly(value: Any) -> Any:
    """A copy of tensors, numbers and containers of them, as a checkpoint may hold it."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, Mapping):
        return {key: plainly(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plainly(item) for item in value]
    return value
