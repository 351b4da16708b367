"""Plain gradient descent on one sample at a time, with its updates held back: exact, and twice as fast.

A step on one sample changes a layer's weights by an outer product, W <- keep W - rate d h^T. Written into memory at
once, that is most of the step. So the vectors are kept instead, and what they would have changed is added to every
product with W, which is cheap while they are few; every `HELD` steps, or when somebody looks at the weights, one matrix
product brings W up to date. With a penalty (keep < 1) a common scale stands before W:

    W_t = c_t (W_0 - rate sum_s (d_s / c_{s+1}) h_s^T),   c_{t+1} = keep c_t

The products are numpy's, whose matrix-vector product is the faster one on the machines this was measured on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from crl.core import Array

HELD = 64  # steps


class Online:
    """The layers of a chain with ReLUs between, and the updates that they wait for."""

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        self.layers = list(layers)
        self.weights: list[Array] = [layer.weight.detach().numpy() for layer in layers]
        self.biases: list[Array] = [layer.bias.detach().numpy() for layer in layers]
        self.places = [layer.weight.data_ptr() for layer in layers]
        kind = self.weights[0].dtype
        self.seen = [np.zeros((HELD, w.shape[1]), kind) for w in self.weights]  # h of each held step
        self.back = [np.zeros((HELD, w.shape[0]), kind) for w in self.weights]  # d of each, over its scale
        self.held, self.scale = 0, 1.0
        self.settings: tuple[float, float] = (0.0, 1.0)

    def current(self) -> bool:
        """Whether these are still the layers' own numbers."""
        return [layer.weight.data_ptr() for layer in self.layers] == self.places

    def step(self, x: Array, label: int, answers: Array | None, rate: float, keep: float) -> tuple[float, float]:
        """One step: (the loss before it, whether the likeliest class was right)."""
        if self.settings != (rate, keep):
            self.flush()
            self.settings = (rate, keep)
        logits = self._forward(x, rate)
        if answers is not None:
            logits = np.where(answers, logits, logits.dtype.type(-1e9))
        right = float(int(logits.argmax()) == label)
        logits -= logits.max()
        share = np.exp(logits)
        total = share.sum()
        loss = float(np.log(total) - logits[label])
        share /= total
        share[label] -= 1
        self._backward(share, rate, keep)
        self.held += 1
        self.scale *= keep
        if self.held == HELD:
            self.flush()
        return loss, right

    def _forward(self, x: Array, rate: float) -> Array:
        """The logits, with the weights as they would be by now."""
        held, out = self.held, x
        for k, weight in enumerate(self.weights):
            seen = self.seen[k]
            seen[held] = out
            out = weight.dot(out)
            out += self.biases[k]
            if held:
                share = seen[:held].dot(seen[held])
                share += 1
                share *= -rate
                out += share.dot(self.back[k][:held])
            if self.scale != 1:
                out *= self.scale
            if k + 1 < len(self.weights):
                np.maximum(out, 0, out=out)
        return out

    def _backward(self, back: Array, rate: float, keep: float) -> None:
        held = self.held
        for k in range(len(self.weights) - 1, -1, -1):
            own = self.back[k]
            np.multiply(back, 1 / (self.scale * keep), out=own[held])
            if not k:
                return
            further = back.dot(self.weights[k])
            if held:
                share = own[:held].dot(back)
                share *= -rate
                further += share.dot(self.seen[k][:held])
            if self.scale != 1:
                further *= self.scale
            further *= self.seen[k][held] > 0
            back = further

    @torch.no_grad()
    def flush(self) -> None:
        """Bring the weights up to date."""
        if not self.held:
            return
        rate, held, scale = self.settings[0], self.held, self.scale
        for layer, seen, back in zip(self.layers, self.seen, self.back, strict=True):
            late, came = torch.from_numpy(back[:held]), torch.from_numpy(seen[:held])
            layer.weight.addmm_(late.T, came, beta=scale, alpha=-rate * scale)
            layer.bias.mul_(scale).add_(late.sum(0), alpha=-rate * scale)
        self.held, self.scale = 0, 1.0


def one(batch: Any) -> tuple[Array, int, Array | None]:
    """The only row of a batch, as numpy has it."""
    answers: Tensor | None = batch.get("answers")
    return batch["obs"][0].numpy(), int(batch["label"]), None if answers is None else answers[0].numpy()
