"""Numbers gathered between two ticks, as means."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from crl.core import Array, State


class Tally:
    """Sums and counts by name. A tensor on a GPU is only waited for when the means are asked for."""

    def __init__(self) -> None:
        self.sums: dict[str, Any] = {}
        self.counts: dict[str, int] = {}

    def add(self, numbers: Any, weight: int = 1) -> None:
        """Take in the numbers of an update, which may stand for several samples."""
        for name, value in numbers.items():
            own = value.double() if isinstance(value, Tensor) and value.is_cuda else float(value)
            self.sums[name] = self.sums.get(name, 0.0) + own * weight
            self.counts[name] = self.counts.get(name, 0) + weight

    def episodes(self, returns: Array, lengths: Array) -> None:
        """Take in the episodes that ended at a step."""
        for name, values in (("train/return", returns), ("train/length", lengths)):
            self.sums[name] = self.sums.get(name, 0.0) + float(values.sum())
            self.counts[name] = self.counts.get(name, 0) + len(values)

    def numbers(self) -> dict[str, float]:
        """The means."""
        return {name: float(total) / self.counts[name] for name, total in self.sums.items()}

    def state_dict(self) -> State:
        """The sums so far."""
        return {"sums": {name: float(total) for name, total in self.sums.items()}, "counts": dict(self.counts)}

    def load_state_dict(self, state: State) -> None:
        """The inverse of `state_dict`."""
        self.sums, self.counts = dict(state["sums"]), dict(state["counts"])
