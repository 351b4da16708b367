"""Optimizers by name or import path: torch's own, Muon, and TRAC around any of them."""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from crl.core import CrlError, brief, imported


class Muon(Optimizer):
    """Momentum whose steps on hidden matrices are made orthogonal (Jordan et al. 2024); the rest is Adam's.

    As published, Muon is for hidden weights: matrices, and convolutions with their last three axes flattened. Adam
    steps input layers (a convolution or embedding too), output layers, biases and gains, and what a model grows later
    on: heads and columns. Which layers those are an agent tells by `leave_ends`; of a group with `hidden=False`
    all is Adam's.
    `lr` is the step of matrices, `adam_lr` is `adam_share` times as long.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 0.02,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_share: float = 0.1,
        hidden: bool = True,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "betas": tuple(betas), "eps": eps, "adam_share": adam_share}
        self._grown = False
        super().__init__(params, {**defaults, "hidden": hidden})
        self._grown = True

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """What comes later is no hidden layer, unless it says so."""
        super().add_param_group({"hidden": False, **param_group} if self._grown else param_group)

    def leave_ends(self, ends: Iterable[Tensor]) -> None:
        """Of the parameters it has, these are of input and output layers."""
        known = {id(value) for value in ends}
        (group,) = self.param_groups
        found = [value for value in group["params"] if id(value) in known]
        hidden = [value for value in group["params"] if id(value) not in known]
        self.param_groups[:] = [{**group, "params": own, "hidden": own is hidden} for own in (hidden, found) if own]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step."""
        loss = None if closure is None else closure()
        for group in self.param_groups:
            for value in group["params"]:
                if value.grad is None:
                    continue
                if group["hidden"] and value.ndim > 1:
                    self._matrix(value, group)
                else:
                    self._adam(value, group)
        return loss

    def _matrix(self, value: Tensor, group: dict[str, Any]) -> None:
        state = self.state[value]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(value)
        buffer, slope = state["momentum_buffer"], value.grad
        assert slope is not None
        buffer.lerp_(slope, 1 - group["momentum"])
        ahead = slope.lerp(buffer, group["momentum"])  # Nesterov's
        matrix = ahead.flatten(1)
        wide = max(1.0, matrix.shape[0] / matrix.shape[1]) ** 0.5
        value.add_(orthogonal(matrix).view_as(value), alpha=-group["lr"] * wide)

    def _adam(self, value: Tensor, group: dict[str, Any]) -> None:
        state, (b1, b2) = self.state[value], group["betas"]
        if "step" not in state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(value), torch.zeros_like(value)
        state["step"] += 1
        count = state["step"].item()
        state["exp_avg"].lerp_(value.grad, 1 - b1)
        state["exp_avg_sq"].mul_(b2).addcmul_(value.grad, value.grad, value=1 - b2)
        scale = (state["exp_avg_sq"] / (1 - b2**count)).sqrt().add_(group["eps"])
        rate = group["lr"] * group["adam_share"] / (1 - b1**count)
        value.addcdiv_(state["exp_avg"], scale, value=-rate)


def leave_ends(optimizer: Optimizer, ends: Iterable[Tensor]) -> None:
    """Tell Muon, or what is around it, which parameters are of input and output layers; others need not know."""
    base = getattr(optimizer, "base", optimizer)
    if isinstance(base, Muon):
        base.leave_ends(ends)


def orthogonal(matrix: Tensor, steps: int = 5) -> Tensor:
    """About U V^T of a matrix's U S V^T, by a Newton-Schulz iteration of the fifth order (Jordan et al. 2024).

    >>> values = torch.linalg.svdvals(orthogonal(torch.randn(32, 16, generator=torch.Generator().manual_seed(0))))
    >>> bool((values > 0.6).all() and (values < 1.3).all())
    True
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrix.shape[0] > matrix.shape[1]
    x: Tensor = matrix.T if tall else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    found: Tensor = x.T if tall else x
    return found


class Trac(Optimizer):
    """TRAC around any optimizer (Muppidi et al. 2024, arXiv 2405.16642): how far from the first weights to go is tuned.

    The base optimizer's steps add up to an offset from the first weights; the weights are the first ones plus the
    offset times S, a sum of scales that grow while the offset goes against the gradient and fall when it goes along.
    What others do to the weights between two steps (a method's reset, say) moves the first weights along.
    """

    measures_distance = True  # what puts weights back after every step would be taken for a step of its own
    BETAS = (0.9, 0.99, 0.999, 0.9999, 0.99999, 0.999999)

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        base: str | type[Optimizer] = "adam",
        betas: Iterable[float] = BETAS,
        **options: Any,
    ) -> None:
        if base == "trac":
            raise CrlError("agent.optimizer.base: trac goes around another optimizer, not around itself")
        kind: Any = base if isinstance(base, type) else find(base, "agent.optimizer.base")
        self.base: Optimizer = kind(params, lr=lr, **options)
        self.rates = tuple(float(beta) for beta in betas)
        self._start = 1e-8
        super().__init__(self.base.param_groups, self.base.defaults)
        self._share()

    def like(self, groups: Any) -> Trac:
        """A new one around the same kind of base, for other parameters."""
        return Trac(groups, base=type(self.base), betas=self.rates)

    def _share(self) -> None:
        """One list of groups and one state, the base's."""
        self.param_groups, self.state = self.base.param_groups, self.base.state

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """New parameters are the base's; at construction they are that already."""
        if not any(group is param_group for group in self.base.param_groups):
            self.base.add_param_group(param_group)
        self._share()

    def load_state_dict(self, state_dict: Any) -> None:
        """The base's state, which holds TRAC's own."""
        self.base.load_state_dict(state_dict)
        self._share()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """The base's step, then as much of the whole offset as is worth it."""
        values = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        before = [value.clone() for value in values]
        gradients = [value.grad.clone() for value in values]
        loss = self.base.step(closure)
        states = [self.state[value] for value in values]
        for state, old in zip(states, before, strict=True):
            if "trac_first" not in state:
                state["trac_first"], state["trac_offset"] = old.clone(), torch.zeros_like(old)
            else:
                state["trac_first"].add_(old - state["trac_left"])
        along = sum(float((g * state["trac_offset"]).sum()) for g, state in zip(gradients, states, strict=True))
        scale = self._scale(self._sums(), along)
        for value, old, state in zip(values, before, states, strict=True):
            state["trac_offset"].add_(value - old)
            value.copy_(state["trac_first"] + scale * state["trac_offset"])
            state["trac_left"] = value.clone()
        return loss

    def _sums(self) -> dict[str, list[float]]:
        """TRAC's own few numbers, kept in the first parameter's state, which a checkpoint holds and a reset clears."""
        state = self.state[self.param_groups[0]["params"][0]]
        if "trac_sigma" not in state:
            state["trac_sigma"], state["trac_variance"] = [self._start] * len(self.rates), [0.0] * len(self.rates)
        return {"sigma": state["trac_sigma"], "variance": state["trac_variance"]}

    def _scale(self, sums: dict[str, list[float]], along: float) -> float:
        total = 0.0
        for i, beta in enumerate(self.rates):
            sums["variance"][i] = beta**2 * sums["variance"][i] + along**2
            sums["sigma"][i] = beta * sums["sigma"][i] - along
            spread = math.sqrt(2 * sums["variance"][i]) + self._start
            total += self._start / erfi(math.sqrt(0.5)) * erfi(sums["sigma"][i] / spread)
        return max(total, 0.0)


def erfi(x: float) -> float:
    """The imaginary error function, by its series: every term has the sign of x, so nothing cancels.

    >>> round(erfi(1.0), 9), erfi(-0.5) == -erfi(0.5)
    (1.650425759, True)
    """
    term, total, n = x, x, 0
    while abs(term) > 1e-17 * abs(total):
        n += 1
        term *= x * x / n
        total += term / (2 * n + 1)
    return 2 / math.sqrt(math.pi) * total


OPTIMIZERS: dict[str, type[Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
    "rmsprop": torch.optim.RMSprop,
    "muon": Muon,
    "trac": Trac,
}


def make(optimizer: Any, parameters: Any, rate: float) -> Optimizer:
    """The optimizer that `agent.optimizer` asks for: a name, or a mapping with `use:` and its own options."""
    asked = {"use": optimizer} if isinstance(optimizer, str) else optimizer or {}
    if not isinstance(asked, Mapping):
        raise CrlError(
            f"agent.optimizer: expected a name or a mapping such as {{use: sgd, momentum: 0.9}}, not {asked!r}"
        )
    options = dict(asked)
    kind = find(options.pop("use", "adam"))
    known = [name for name in inspect.signature(kind).parameters if name not in ("params", "lr")]
    for name in options:
        if name == "lr":
            raise CrlError("agent.optimizer.lr: say agent.learning_rate")
        if name not in known and kind is not Trac:
            near = difflib.get_close_matches(str(name), known, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
            raise CrlError(f"agent.optimizer.{name}: {kind.__name__} takes no such option; {hint}")
    if inspect.signature(kind.step).parameters.get("closure", OPTIONAL).default is inspect.Parameter.empty:
        raise CrlError(
            f"agent.optimizer.use: {kind.__name__} asks for the loss again and again, which no agent here gives"
        )
    try:
        made: Optimizer = kind(parameters, lr=rate, **options)
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        raise CrlError(f"agent.optimizer: {kind.__name__} refuses these settings: {brief(error)}") from None
    return made


OPTIONAL = inspect.Parameter("closure", inspect.Parameter.KEYWORD_ONLY, default=None)


def find(use: Any, place: str = "agent.optimizer.use") -> Any:
    """The optimizer class that a short name or an import path names."""
    if use in OPTIMIZERS:
        return OPTIMIZERS[use]
    module_name, _, name = str(use).replace(":", ".").rpartition(".")
    if not module_name:
        near = difflib.get_close_matches(str(use), OPTIMIZERS, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(sorted(OPTIMIZERS))}, or an import path"
        raise CrlError(f"{place}: unknown {use!r}; {hint}")
    try:
        found = getattr(imported(module_name), name, None)
    except CrlError as error:
        raise CrlError(f"{place}: {error}") from None
    except Exception as error:  # a module may fail in any way
        raise CrlError(f"{place}: cannot import {module_name!r}: {brief(error)}") from error
    if not inspect.isclass(found) or not issubclass(found, Optimizer):
        raise CrlError(f"{place}: {use} is not a torch optimizer")
    return found
