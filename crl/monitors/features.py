"""What hidden layers say: the ranks of their activations, and how many of their units still say anything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from crl.checked import number, truth
from crl.core import CrlError, State
from crl.hidden import Layer, hidden
from crl.linalg import RANKS, CurvatureError
from crl.monitors.look import READ, Look, View


def features(view: View, batch: Mapping[str, Tensor] | None = None) -> dict[str, list[Layer]]:
    """The hidden layers of each network on a batch, by default the view's."""
    with torch.no_grad():
        return hidden(view.agent, view.batch if batch is None else batch)


class ERank(Look):
    """Ranks of hidden activations (samples x units): of each network's last hidden layer, or of all.

    Source: Roy and Vetterli 2007; as a sign of collapse, arXiv 2509.22335 and 2603.04580. Uncentred unless asked. With
    `of_peak` each is also given as a share of the highest it has had, over the boundaries looked at so far.
    Cost: one forward pass and a singular value decomposition a layer.
    """

    needs = READ

    def __init__(
        self,
        *,
        layers: str = "last",
        ranks: Sequence[str] = ("effective_rank",),
        centred: bool = False,
        of_peak: bool = False,
        **look: Any,
    ) -> None:
        super().__init__(**look)
        self.of_peak = truth("of_peak", of_peak)
        self.peak: dict[str, float] = {}
        if not isinstance(ranks, list | tuple):
            raise CrlError(f"ranks: {ranks!r} is not a list of {', '.join(RANKS)}")
        if layers not in ("last", "all"):
            raise CrlError(f"layers: {layers!r} is not last or all")
        unknown = [name for name in ranks if name not in RANKS]
        if unknown:
            raise CrlError(f"ranks: unknown {unknown[0]!r}; known are {', '.join(RANKS)}")
        self.layers, self.ranks, self.centred = layers, tuple(ranks), centred

    def look(self, view: View) -> Mapping[str, float]:
        """`<network>/last/<rank>`, or `<network>/hidden-<n>/<rank>`."""
        found = {}
        for network, layers in features(view).items():
            named = (
                {"last": layers[-1]} if self.layers == "last" else {f"hidden-{i}": x for i, x in enumerate(layers, 1)}
            )
            for place, layer in named.items():
                for rank in self.ranks:
                    found[f"{network}/{place}/{rank}"] = RANKS[rank](layer.values, centred=self.centred)  # type: ignore[operator]
        return {**found, **(self._shares(found) if self.of_peak else {})}

    def _shares(self, found: Mapping[str, float]) -> dict[str, float]:
        """Of the peaks, which are of all tasks together."""
        shares = {}
        for name, value in found.items():
            self.peak[name] = max(self.peak.get(name, 0.0), value)
            shares[f"{name}/of_peak"] = value / self.peak[name] if self.peak[name] else 0.0
        return shares

    def state_dict(self) -> State:
        """The peaks."""
        return {"peak": dict(self.peak)}

    def load_state_dict(self, state: State) -> None:
        """The inverse of `state_dict`."""
        self.peak = dict(state["peak"])


class Dormant(Look):
    """Shares of hidden units that are dormant (score at most tau) or dead, and of activations that are not stuck.

    A unit's score is its mean |h| over its layer's mean (Sokar et al. 2023); dead is 0 on every sample. Active counts
    activations: not 0, or for tanh |h| <= .99 and for a sigmoid within [.01, .99] where these are modules of the
    network (of a bare function only its values are seen, so not 0). Cost: one forward pass.
    """

    needs = READ

    def __init__(self, *, tau: float = 0.025, **look: Any) -> None:
        super().__init__(**look)
        self.tau = number("tau", tau, 0.0)

    def look(self, view: View) -> Mapping[str, float]:
        """`<network>/dormant`, `/dead` and `/active`, over all hidden layers."""
        found: dict[str, float] = {}
        for network, layers in features(view).items():
            if not all(torch.isfinite(x.values).all() for x in layers):
                found |= {f"{network}/{what}": float("nan") for what in ("dormant", "dead", "active")}
                continue
            units = sum(layer.values.shape[1] for layer in layers)
            found[f"{network}/dormant"] = sum(int((score(x.values) <= self.tau).sum()) for x in layers) / units
            found[f"{network}/dead"] = sum(int((x.values == 0).all(0).sum()) for x in layers) / units
            count = sum(x.values.numel() for x in layers)
            found[f"{network}/active"] = sum(int(x.active.sum()) for x in layers) / count
        return found


def score(values: Tensor) -> Tensor:
    """Each unit's mean magnitude over the layer's mean: Sokar et al. 2023 (arXiv 2302.12902), equation 1.

    >>> import torch
    >>> score(torch.tensor([[1.0, 0.0, 2.0], [1.0, 0.0, -2.0]])).tolist()
    [1.0, 0.0, 2.0]
    """
    size = values.abs().mean(0)
    return size / (size.mean() + 1e-9)


class Capacity(Look):
    """Used capacity: how many units of the last hidden layer hold 99 % of its variance. Cost: a forward pass."""

    needs = READ

    def __init__(self, *, share: float = 0.99, **look: Any) -> None:
        super().__init__(**look)
        self.share = _portion(share)

    def look(self, view: View) -> Mapping[str, float]:
        """`<network>/units`, and `<network>/share` of the layer's."""
        found: dict[str, float] = {}
        for network, layers in features(view).items():
            count = used(layers[-1].values, self.share)
            found |= {f"{network}/units": count, f"{network}/share": count / layers[-1].values.shape[1]}
        return found


def _portion(share: Any) -> float:
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
        raise CrlError(f"share: {share!r} is not a number in (0, 1]")
    return share


def used(values: Tensor, share: float) -> float:
    """The least number of units that together hold a share of the variance.

    >>> import torch
    >>> used(torch.tensor([[1.0, 0.1, 5.0], [-1.0, -0.1, 5.0]]), 0.99)
    1.0
    """
    spread = values.double().var(0, correction=0).sort(descending=True).values
    if not torch.isfinite(spread).all():
        return float("nan")
    if spread.sum() == 0:
        return 0.0
    return float((spread.cumsum(0) < share * spread.sum() * (1 - 1e-12)).sum() + 1)


class Interference(Look):
    """Principal angles between the feature subspaces of the new task and of each earlier one (last hidden layers).

    A subspace holds the leading directions with 99 % of the squared singular values. Overlap is the mean squared
    cosine: 1 where the smaller lies in the larger, 0 where they share nothing. Cost: a forward pass a task.
    """

    needs = READ
    compares = True

    def __init__(self, *, share: float = 0.99, **look: Any) -> None:
        super().__init__(**look)
        self.share = _portion(share)

    def measure(self, boundary: Any) -> Mapping[str, float]:
        """`<network>/overlap/with/<task>` and `<network>/angle/with/<task>`, the mean angle in degrees."""
        if not self.due(boundary):
            return {}
        spaces = {task.name: self.on(boundary, task) for task in (boundary.task, *boundary.earlier)}
        found = {}
        for task in boundary.earlier:
            for network, new in spaces[boundary.task.name].items():
                old = spaces[task.name][network]
                if not new.shape[1] or not old.shape[1]:  # features that are all zero span nothing
                    continue
                cosines = torch.linalg.svdvals(new.T @ old).clamp(0, 1)
                found[f"{network}/overlap/with/{task.name}"] = float(cosines.square().mean())
                found[f"{network}/angle/with/{task.name}"] = float(torch.rad2deg(torch.arccos(cosines)).mean())
        return found

    def look(self, view: View) -> Mapping[str, Tensor]:
        """An orthonormal basis of each network's feature subspace, (units, directions)."""
        return {network: subspace(layers[-1].values, self.share) for network, layers in features(view).items()}


def subspace(values: Tensor, share: float) -> Tensor:
    """The leading right singular vectors that hold a share of the squared singular values."""
    if not torch.isfinite(values).all():
        raise CurvatureError("the features are not finite")
    _, sizes, directions = torch.linalg.svd(values.double(), full_matrices=False)
    power = sizes.square()
    count = int((power.cumsum(0) < share * power.sum() * (1 - 1e-12)).sum()) + 1 if power.sum() > 0 else 0
    basis: Tensor = directions[:count].T
    return basis
