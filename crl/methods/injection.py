"""A head injected beside the old one, which freezes: new plasticity, and the same function at that step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from crl.checked import whole
from crl.core import Agent, CrlError, State, Visit
from crl.methods.method import FromFirst, Method
from crl.methods.renew import RENEWAL, STRUCTURAL
from crl.methods.units import bare_linear, chains_of, draw, replace_part, weighted


class PlasticityInjection(FromFirst):
    """Before visit `visit`, new last layers are put beside the old, which freeze (Nikishin et al. 2023).

    The answer becomes old(x) + new(x) - copy(x), where the copy is the new layers' first weights, frozen: at that step
    nothing changes. `layers` is how many of the last layers that is; with one alone nothing would be won, since the sum
    of linear layers is one linear layer. Visit 0 is never.
    """

    family = RENEWAL
    needs = ("model", "optimizers", "chains", "rebuilt")
    needs_boundaries = True
    one_head = True
    excludes = (*STRUCTURAL, "reset", "head_reset", "redo", "cbp")
    memory: ClassVar[tuple[str, ...]] = ("first", "injected")
    idle: ClassVar[Mapping[str, Any]] = {"visit": 0}

    def __init__(self, visit: int = 2, layers: int = 2) -> None:
        super().__init__()
        self.only_before, self.layers = whole("visit", visit, 0), whole("layers", layers, 2)
        if visit == 1:
            raise CrlError("visit: 1 is the first, before which nothing has been learned; the least is 2")
        self.injected = False

    def accepts(self, agent: Agent) -> None:
        """The layers must be linear, with nothing between them that looks at several units at once."""
        for chain in chains_of(agent) or []:
            self._check(agent, chain)

    def _check(self, agent: Any, chain: list[str]) -> tuple[list[str], str]:
        parts = [(name, agent.model.get_submodule(name)) for name in chain]
        made = [name for name, part in parts if weighted(part)]
        if len(made) < self.layers:
            raise CrlError(f"plasticity_injection: {self.layers} layers are asked for, and a chain has {len(made)}")
        start = chain.index(made[-self.layers])
        for name, part in parts[start:]:
            if any(True for _ in part.children()) or getattr(part, "doubles", False):
                raise CrlError(f"plasticity_injection goes beside linear layers and activations only, not {name}")
            if any(True for _ in part.parameters()) and not isinstance(part, nn.Linear):
                raise CrlError(f"plasticity_injection goes beside linear layers and activations only, not {name}")
        return made[-self.layers :], made[-1]

    def enter(self, visit: Visit) -> None:
        """Once."""
        super().enter(visit)
        if visit.index == self.only_before and not self.injected:
            self.inject(self.agent, fresh=True)
            self.find_parameters()
            self.count("injected")

    def inject(self, agent: Any, fresh: bool) -> None:
        """Put new layers beside the old."""
        for chain in chains_of(agent) or []:
            names, last = self._check(agent, chain)
            for name in names:
                old = agent.model.get_submodule(name)
                live = bare_linear(old, old.in_features)
                if fresh:
                    _fill(live, {kind: self.first[f"{name}.{kind}"] for kind, _ in old.named_parameters()}, self)
                beside = Beside(old, live, first=name == names[0], last=name == last)
                replace_part(agent.model, name, beside)
        agent.rebuilt()
        self.injected = True

    def rebuild(self, agent: Agent, state: State) -> None:
        """After a resume: the structure, before its weights are loaded."""
        if state["injected"]:
            self.inject(agent, fresh=False)


@torch.no_grad()
def _fill(layer: nn.Linear, first: Mapping[str, Tensor], method: Method) -> None:
    for kind, parameter in layer.named_parameters():
        parameter.copy_(draw(first[kind], parameter.shape, method.generator))


class Beside(nn.Module):
    """Three linear layers side by side, of which one learns: what was, what is new, and what the new was at first."""

    def __init__(self, old: nn.Linear, live: nn.Linear, first: bool, last: bool) -> None:
        super().__init__()
        self.old, self.live = old, live
        self.still = bare_linear(live, live.in_features)
        self.still.load_state_dict(live.state_dict())
        self.old.requires_grad_(False)
        self.still.requires_grad_(False)
        self.first, self.last = first, last

    def forward(self, x: Tensor) -> Tensor:
        """All three answers side by side; at the end old + new - still."""
        old, live, still = (x, x, x) if self.first else x.chunk(3, 1)
        answers = self.old(old), self.live(live), self.still(still)
        return answers[0] + answers[1] - answers[2] if self.last else torch.cat(answers, 1)
