"""What the weights themselves say: their ranks, their size, and how far they have come."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from crl.core import State
from crl.linalg import effective_rank
from crl.monitors.look import Look, View

GATES = {nn.GRU: 3, nn.GRUCell: 3, nn.LSTM: 4, nn.LSTMCell: 4}


class WeightRank(Look):
    """Effective rank of each weight matrix, and as a share of the highest it has had (arXiv 2603.04580).

    A convolution's kernel is (out, in x places); a gated layer's is taken whole and gate by gate. The peak is over the
    boundaries seen so far. Cost: a singular value decomposition a layer; needs no data.
    """

    needs = ("model",)

    def __init__(self, **look: Any) -> None:
        super().__init__(**look)
        self.peak: dict[str, float] = {}

    def look(self, view: View) -> Mapping[str, float]:
        """`<network>/<parameter>` and its `/of_peak`, and the network's mean of both."""
        found: dict[str, float] = {}
        for network, parameters in view.networks.items():
            ranks = {name: effective_rank(matrix) for name, matrix in _matrices(view.agent.model, parameters)}
            for name, rank in ranks.items():
                self.peak[name] = max(self.peak.get(name, 0.0), rank)
            shares = {name: rank / self.peak[name] if self.peak[name] else 0.0 for name, rank in ranks.items()}
            for name, rank in ranks.items():
                found |= {f"{network}/{name}": rank, f"{network}/{name}/of_peak": shares[name]}
            layers = [name for name in ranks if "/gate-" not in name]
            if layers:
                found[f"{network}/mean"] = sum(ranks[name] for name in layers) / len(layers)
                found[f"{network}/mean/of_peak"] = sum(shares[name] for name in layers) / len(layers)
        return found

    def state_dict(self) -> State:
        """The peaks."""
        return {"peak": dict(self.peak)}

    def load_state_dict(self, state: State) -> None:
        """The inverse of `state_dict`."""
        self.peak = dict(state["peak"])


def _matrices(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> Iterator[tuple[str, Tensor]]:
    gates = {
        f"{place}.{name}".lstrip("."): GATES[type(part)]
        for place, part in model.named_modules()
        if type(part) in GATES
        for name, _ in part.named_parameters(recurse=False)
    }
    for name, value in parameters.items():
        if value.ndim < 2:
            continue
        matrix = value.detach().flatten(1)
        yield name, matrix
        if name in gates and "weight_hr" not in name:  # an LSTM's projection has no gates
            for i, gate in enumerate(matrix.chunk(gates[name]), 1):
                yield f"{name}/gate-{i}", gate


class Norms(Look):
    """The Euclidean norm of all weights, and their distance from where they were first seen. Cost: none to speak of."""

    needs = ("model",)

    def __init__(self, **look: Any) -> None:
        super().__init__(**look)
        self.first: dict[str, Tensor] = {}

    def look(self, view: View) -> Mapping[str, float]:
        """`<network>/weight_norm` and `<network>/distance_from_init`."""
        found = {}
        for network, parameters in view.networks.items():
            for name, value in parameters.items():
                self.first.setdefault(name, value.detach().cpu().clone())
            away = [(value.detach().cpu() - self.first[name]).double().norm() for name, value in parameters.items()]
            size = [value.detach().double().norm() for value in parameters.values()]
            found[f"{network}/weight_norm"] = float(torch.stack(size).norm())
            found[f"{network}/distance_from_init"] = float(torch.stack(away).norm())
        return found

    def state_dict(self) -> State:
        """The first weights."""
        return {"first": {name: value.clone() for name, value in self.first.items()}}

    def load_state_dict(self, state: State) -> None:
        """The inverse of `state_dict`."""
        self.first = {name: value.clone() for name, value in state["first"].items()}
