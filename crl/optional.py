"""The parts an agent may have beside the five it must: each that is there is used once, as monitors and methods do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from crl.core import CrlError

LEARNS = ("prepare", "outputs", "objective")  # what curvature needs, all three of them


def check_optional(agent: Any, experience: Any) -> None:
    """Ask an agent that has learned already about an experience: its batch, its outputs, its loss, its minibatch."""
    there = [name for name in LEARNS if callable(getattr(agent, name, None))]
    lacking = [name for name in ("model", *LEARNS) if not hasattr(agent, name)]
    if not there:
        return
    assert not lacking, f"the agent has {', '.join(there)} but lacks {', '.join(lacking)}: monitors need them together."
    assert isinstance(agent.model, nn.Module), f"model is a {type(agent.model).__name__}: it must be a torch Module."
    try:
        batch = agent.prepare(experience)
        _check_batch(batch, "prepare()")
        outputs = agent.outputs(batch)
        _check_outputs(outputs, agent, batch)
        _check_objective(outputs, agent, batch)
        _check_others(outputs, agent, batch)
        if hasattr(agent, "minibatch"):
            _check_batch(agent.minibatch, "minibatch, after an update,")
            agent.objective(agent.outputs(agent.minibatch), agent.minibatch)
    except (AssertionError, CrlError):
        raise
    except Exception as error:
        place = error.__traceback__
        while place is not None and place.tb_next is not None:
            place = place.tb_next
        where = place.tb_frame.f_code.co_name if place is not None else "an optional part"
        raise AssertionError(f"{where} fails with {type(error).__name__}: {error}.") from error


def _check_batch(batch: Any, what: str) -> None:
    assert isinstance(batch, Mapping) and batch, f"{what} must be a mapping of tensors, not a {type(batch).__name__}."
    for name, value in batch.items():
        right = isinstance(value, Tensor) and not value.requires_grad
        assert right, f"{what} holds {name!r}, which is no tensor that is constant: detach it, or leave it out."
    assert "obs" in batch, f"{what} lacks 'obs', what the network sees: methods look for it under this name."
    rows = {name: len(value) for name, value in batch.items() if value.ndim}
    assert len(set(rows.values())) == 1, f"{what} has rows of unlike number: {rows}."


def _check_outputs(outputs: Any, agent: Any, batch: Mapping[str, Tensor]) -> None:
    rows = len(batch["obs"])
    assert isinstance(outputs, Tensor) and outputs.ndim == 2 and len(outputs) == rows, (
        f"outputs() returns {_shown(outputs)} for {rows} samples: it must be a tensor of a row for each."
    )
    assert outputs.requires_grad, "outputs() returns a tensor without a graph: leave out no_grad() and detach()."
    assert torch.equal(outputs, agent.outputs(batch)), (
        "outputs() twice of one batch are not the same: it must be pure, without dropout or other chance."
    )


def _check_objective(outputs: Tensor, agent: Any, batch: Mapping[str, Tensor]) -> None:
    loss = agent.objective(outputs, batch)
    assert isinstance(loss, Tensor) and loss.ndim == 0 and bool(loss.isfinite()), (
        f"objective() returns {_shown(loss)}: it must be a finite number, the mean loss."
    )
    assert loss.requires_grad, "objective() returns a number without a graph: leave out no_grad() and detach()."
    parameters = [p for p in agent.model.parameters() if p.requires_grad]
    slopes = torch.autograd.grad(loss, parameters, allow_unused=True)
    assert any(slope is not None and bool(slope.any()) for slope in slopes), (
        "objective() does not depend on the model's parameters: no monitor of curvature could say a word."
    )
    twice = {name: torch.cat([value, value]) if value.ndim else value for name, value in batch.items()}
    loss = loss.detach()
    again = float(agent.objective(torch.cat([outputs, outputs]), twice).detach())
    assert abs(again - float(loss)) < 0.4 * abs(float(loss)) + 1e-2, (
        f"objective() of a batch is {float(loss):.4g}, and of the same rows twice {again:.4g}: it must be a mean."
    )


def _check_others(outputs: Tensor, agent: Any, batch: Mapping[str, Tensor]) -> None:
    if hasattr(agent, "networks"):
        known = {name for name, _ in agent.model.named_parameters()}
        for name, names in agent.networks.items():
            foreign = [one for one in names if one not in known]
            assert not foreign, f"networks names {foreign[0]!r} as a part of {name!r}: the model has no such parameter."
    if hasattr(agent, "error"):
        error = agent.error(outputs, batch)
        assert isinstance(error, Tensor) and error.ndim == 0, f"error() returns {_shown(error)}: it must be a number."
    if hasattr(agent, "metric"):
        rows, width = outputs.shape
        metric = agent.metric(outputs, batch)
        assert isinstance(metric, Tensor) and metric.shape == (rows, width, width), (
            f"metric() returns {_shown(metric)}: it must be a tensor of shape {(rows, width, width)}."
        )
    if hasattr(agent, "divergence"):
        for name, value in agent.divergence(outputs.detach(), outputs.detach()).items():
            assert isinstance(value, Tensor) and value.shape == (len(outputs),), (
                f"divergence() returns {_shown(value)} for {name!r}: it must be a number for each sample."
            )
    if hasattr(agent, "distill"):
        loss = agent.distill(outputs, outputs.detach())
        assert isinstance(loss, Tensor) and loss.ndim == 0, f"distill() returns {_shown(loss)}: it must be a number."


def _shown(value: Any) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"{value!r}"[:60]
