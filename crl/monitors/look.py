"""What the monitors here share: when they look, at which tasks, and what of an agent they look at."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import nn

from crl.checked import truth, whole
from crl.core import Boundary, CrlError, Task, facing
from crl.hidden import networks
from crl.linalg import CurvatureError, Problem

PHASES = ("init", "end")
MOST = 65_536  # samples that are ever looked at
READ = ("model", "prepare", "outputs")  # what it takes to see features


class Look:
    """A monitor that looks at the agent on one task at a time: subclasses write `look(view)`.

    `at` names the phases; `earlier: true` adds every earlier task (names end in `/on/<task>`), which monitors that
    compare tasks look at in any case; with `every: 10` only visits 1, 11, 21 ... are looked at. `samples` is how many
    transitions are looked at, drawn from fresh episodes of the agent acting as in training, as long as its first
    rollout; of a dataset, how many training images.
    """

    needs: ClassVar[tuple[str, ...]] = (*READ, "objective")
    compares: ClassVar[bool] = False  # whether it looks at earlier tasks in any case

    def __init__(
        self, *, at: Iterable[str] | str = PHASES, earlier: bool = False, samples: int = 512, every: int = 1
    ) -> None:
        if not isinstance(at, str | list | tuple):
            raise CrlError(f"at: {at!r} is not init, end, or a list of both")
        self.at = (at,) if isinstance(at, str) else tuple(at)
        if not self.at or any(phase not in PHASES for phase in self.at):
            raise CrlError(f"at: {', '.join(map(str, self.at)) or 'nothing'} is not init, end, or a list of both")
        whole("samples", samples, 2, MOST)
        self.earlier, self.samples = truth("earlier", earlier), samples
        self.every = whole("every", every)

    def due(self, boundary: Boundary) -> bool:
        """Whether it looks at this boundary."""
        return boundary.phase in self.at and (boundary.visit.index - 1) % self.every == 0

    def measure(self, boundary: Boundary) -> Mapping[str, Any]:
        """What `look` sees of the boundary's task, and of the earlier ones where asked."""
        if not self.due(boundary):
            return {}
        found = dict(self.on(boundary, boundary.task))
        for task in boundary.earlier if self.earlier else ():
            found |= {f"{name}/on/{task.name}": value for name, value in self.on(boundary, task).items()}
        return found

    def on(self, boundary: Boundary, task: Task) -> Mapping[str, Any]:
        """`look`, with the agent facing a task."""
        with facing(boundary.agent, task):
            return self.look(View(boundary, task, self.samples))

    def look(self, view: View) -> Mapping[str, Any]:
        """Numbers, arrays or spectra by name."""
        raise NotImplementedError


@dataclass(frozen=True)
class View:
    """An agent on a task at a boundary, as `look` is given it."""

    boundary: Boundary
    task: Task
    samples: int

    @property
    def agent(self) -> Any:
        """The agent."""
        return self.boundary.agent

    @cached_property
    def experience(self) -> Any:
        """Fresh experience on the task: as much as the agent learns from at once, or more where more is asked for."""
        return self.boundary.experience(self.task, self.size)

    @property
    def size(self) -> int:
        """How much that is."""
        copies = getattr(getattr(self.agent, "interface", None), "envs", 1)
        return max(self.samples, getattr(self.agent, "stride", 1) * copies)

    @cached_property
    def batch(self) -> Mapping[str, torch.Tensor]:
        """As many samples of it, chosen at random, as the agent's loss takes them."""
        broken = [name for name, value in self.agent.model.named_parameters() if not torch.isfinite(value).all()]
        if broken:
            raise CurvatureError(f"parameter {broken[0]!r} is not finite any more")
        prepared: Mapping[str, torch.Tensor] = self.agent.prepare(self.experience)
        count = len(next(iter(prepared.values())))
        if count <= self.samples:
            return prepared
        generator = torch.Generator().manual_seed(self.boundary.seed)
        chosen = torch.randperm(count, generator=generator)[: self.samples].sort().values
        return {name: value[chosen.to(value.device)] for name, value in prepared.items()}

    @cached_property
    def networks(self) -> dict[str, dict[str, nn.Parameter]]:
        """The parameters of each network."""
        return networks(self.agent)

    @cached_property
    def problem(self) -> Problem:
        """The agent's loss on the batch, as a function of all its networks' parameters."""
        return problem_of(self.agent, self.batch)


def problem_of(agent: Any, batch: Mapping[str, torch.Tensor], chunk: int | None = None) -> Problem:
    """An agent's loss on a batch."""
    everything = {name: value for part in networks(agent).values() for name, value in part.items()}
    metric = getattr(agent, "metric", None)
    return Problem(agent.model, agent.outputs, agent.objective, batch, everything, metric, chunk)
