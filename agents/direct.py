"""A step of plain gradient descent on a chain of linear layers and ReLUs, written out: no graph, no stored gradient.

The gradient of a layer's weights is an outer product of what came in and what came back, so it can be added to the
weights without ever standing in memory. For a batch of one this is most of the time of a step.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from agents.online import Online, one

NEVER = -1e9  # the logit of a class that cannot be the answer: finite, so that no gradient is NaN


def only(logits: Tensor, answers: Tensor | None) -> Tensor:
    """Logits whose other classes are never the answer."""
    return logits if answers is None else logits.masked_fill(~answers, NEVER)


class Direct:
    """The plain case of a classifier's step. It is ready while nobody watches gradients or layers."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.optimizer = model, optimizer
        self.layers: list[nn.Linear] = []
        if self._plain():
            self.layers = [part for part in model if isinstance(part, nn.Linear)]  # type: ignore[attr-defined]
            names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
            hooks = [getattr(part, name) for part in model.modules() for name in names]
            self._watchers: list[Any] = [*hooks, optimizer._optimizer_step_pre_hooks]
            self._values = [(layer.weight, layer.bias) for layer in self.layers]
        self.online = Online(self.layers) if self.layers and self.layers[0].weight.device.type == "cpu" else None

    def _plain(self) -> bool:
        """Whether this is gradient descent without momentum on linear layers with ReLUs between."""
        groups = self.optimizer.param_groups
        if type(self.optimizer) is not torch.optim.SGD or len(groups) != 1 or type(self.model) is not nn.Sequential:
            return False
        if any(groups[0][name] for name in ("momentum", "nesterov", "maximize")):
            return False
        linear, between = [*self.model][::2], [*self.model][1::2]
        return (
            len(linear) == len(between) + 1
            and all(type(part) is nn.Linear and part.bias is not None for part in linear)
            and all(type(part) is nn.ReLU for part in between)
        )

    def ready(self) -> bool:
        """Whether a step may be taken so: no hook would miss its gradient."""
        if not self.layers or any(self._watchers) or len(self.model) != 2 * len(self.layers) - 1:  # type: ignore[arg-type]
            return False
        for (weight, bias), layer in zip(self._values, self.layers, strict=True):
            if layer.weight is not weight or weight._post_accumulate_grad_hooks or bias._post_accumulate_grad_hooks:
                return False
            if not weight.requires_grad or weight._backward_hooks or bias._backward_hooks:
                return False
        after = self.optimizer._optimizer_step_post_hooks.values()
        return len(self.optimizer.param_groups) == 1 and all(getattr(hook, "blind", False) for hook in after)

    def flush(self) -> None:
        """Bring the weights up to date."""
        if self.online is not None:
            self.online.flush()

    def step(self, batch: Mapping[str, Tensor], decay: float) -> tuple[Any, Any]:
        """One step on the mean cross entropy of a batch: (the loss before it, the share that was right)."""
        group = self.optimizer.param_groups[0]
        rate, keep = group["lr"], 1 - group["lr"] * (decay + group["weight_decay"])
        if self.online is not None and len(batch["label"]) == 1 and keep > 0 and self.online.current():
            found: tuple[Any, Any] = self.online.step(*one(batch), rate, keep)
        else:
            self.flush()
            found = self._step(batch, rate, keep)
        for hook in [*self.optimizer._optimizer_step_post_hooks.values()]:
            hook(self.optimizer, (), {})
        return found

    @torch.no_grad()
    def _step(self, batch: Mapping[str, Tensor], rate: float, keep: float) -> tuple[Tensor, Tensor]:
        label = batch["label"]
        seen, logits = self._forward(batch["obs"])
        logits = only(logits, batch.get("answers"))
        logs = logits.log_softmax(1)
        loss = -logs.gather(1, label[:, None]).mean()
        right = (logits.argmax(1) == label).float().mean()
        back = logs.exp_()
        back.scatter_add_(1, label[:, None], torch.full_like(label[:, None], -1, dtype=back.dtype))
        back.div_(len(label))
        for i in range(len(self.layers) - 1, -1, -1):
            weight, bias = self._values[i]
            further = (back @ weight).mul_(seen[i] > 0) if i else back
            weight.addmm_(back.T, seen[i], beta=keep, alpha=-rate)
            bias.mul_(keep).add_(back.sum(0), alpha=-rate)
            back = further
        return loss, right

    def _forward(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        """(what each layer read, the logits)."""
        seen = []
        for weight, bias in self._values[:-1]:
            seen.append(x)
            x = torch.addmm(bias, x, weight.T).relu_()
        weight, bias = self._values[-1]
        return [*seen, x], torch.addmm(bias, x, weight.T)
