"""What supervised continual learning costs elsewhere: Avalanche, JAX and bare PyTorch on the same arrays and network.

Every function takes pictures as uint8 in memory and times nothing but the training: datasets are made, functions
compiled and accuracies taken outside the clock. `avalanche` and `bare` train the given module over tasks that are
lists of classes; `torch_online` and `jax_online` take one picture a step, answer it, and then learn from it. Both
pairs start from the same weights. Avalanche runs as fast as it can be asked to: pictures scaled beforehand and cut
into single tensors in a list, which its loader collates faster than a tensor dataset, no workers, no logging, no
evaluation. Needs `pip install avalanche-lib jax`; a torchvision whose compiled part does not fit torch's build will do.

A process should call one of these and end: threads are set for all of it, and JAX reads its own once.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import os
import time
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from crl.core import Array, CrlError

INSTALL = {"avalanche": "pip install avalanche-lib", "jax": "pip install jax"}
ONLINE = (784, 1000, 1000, 1000, 10)  # the network of Online Permuted MNIST
BLOCK = 100  # samples of one scan
JUDGED = 200  # pictures of each task, at most, for an accuracy


class How(NamedTuple):
    """How a module is trained: at most so many `steps` of each task (0: all its pictures)."""

    lr: float
    optimizer: str = "sgd"
    batch: int = 128
    epochs: int = 1
    steps: int = 0
    threads: int = 1
    seed: int = 0


class Trained(NamedTuple):
    """A timed training, how well the tasks are answered after it, and how many pictures were learned from."""

    seconds: float
    accuracy: float
    samples: int


class Online(NamedTuple):
    """What a step took, and the share of pictures that were answered well before they were learned from."""

    seconds: float
    accuracy: float


def mlp(sizes: Sequence[int], seed: int = 0) -> nn.Sequential:
    """ReLU layers over flattened pictures, kaiming-uniform weights and no bias to begin with.

    >>> mlp((784, 400, 400, 10))(torch.zeros(2, 28, 28)).shape
    torch.Size([2, 10])
    """
    random = torch.Generator().manual_seed(seed)
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in itertools.pairwise(sizes):
        linear = nn.Linear(inputs, outputs)
        nn.init.kaiming_uniform_(linear.weight, nonlinearity="relu", generator=random)
        nn.init.zeros_(linear.bias)
        layers += [linear, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def accuracy(model: nn.Module, images: Array, labels: Array, tasks: Sequence[Sequence[int]]) -> float:
    """The mean over tasks of the share answered well, by the best answer among the task's own classes."""
    shares = []
    model.eval()
    with torch.inference_mode():
        for classes, (pictures, answers) in zip(tasks, _tasks(images, labels, tasks, JUDGED), strict=True):
            logits = torch.cat([model(_scaled(part)) for part in torch.split(pictures, 100)])
            shares.append((torch.tensor(classes)[logits[:, classes].argmax(1)] == answers).double().mean().item())
    return sum(shares) / len(shares)


def avalanche(
    model: nn.Module,
    images: Array,
    labels: Array,
    tasks: Sequence[Sequence[int]],
    how: How,
    *,
    listed: bool = True,
) -> Trained:
    """Avalanche's plain fine-tuning, one experience a task.

    `listed` is its fastest form found here; otherwise the datasets are of tensors, as its documentation has it.
    """
    benchmarks, training = _avalanche()
    _begin(how.threads, how.seed)
    found = [
        benchmarks.utils.AvalancheDataset([list(zip(_scaled(pictures), answers.tolist(), strict=True))])
        if listed
        else benchmarks.utils.AvalancheDataset([torch.utils.data.TensorDataset(_scaled(pictures), answers)])
        for pictures, answers in _tasks(images, labels, tasks, how.steps * how.batch)
    ]
    with warnings.catch_warnings(action="ignore"):  # that nothing will be logged
        strategy = training.Naive(
            model=model.train(),
            optimizer=_optimizer(how.optimizer, model, how.lr),
            criterion=nn.CrossEntropyLoss(),
            train_mb_size=how.batch,
            train_epochs=how.epochs,
            evaluator=None,
        )
    stream = benchmarks.benchmark_from_datasets(train=found).train_stream
    began = time.perf_counter()
    for experience in stream:
        strategy.train(experience, num_workers=0)
    seconds = time.perf_counter() - began
    return Trained(seconds, accuracy(model, images, labels, tasks), how.epochs * sum(map(len, found)))


def bare(model: nn.Module, images: Array, labels: Array, tasks: Sequence[Sequence[int]], how: How) -> Trained:
    """The same in plain PyTorch: index, scale, forward, backward and step over tensors in memory, and nothing else."""
    _begin(how.threads, how.seed)
    found = list(_tasks(images, labels, tasks, how.steps * how.batch))
    rule = _optimizer(how.optimizer, model.train(), how.lr)
    began = time.perf_counter()
    for pictures, answers in found:
        for _ in range(how.epochs):
            for chosen in torch.split(torch.randperm(len(answers)), how.batch):
                rule.zero_grad()
                loss = functional.cross_entropy(model(_scaled(pictures[chosen])), answers[chosen])
                loss.backward()  # type: ignore[no-untyped-call,unused-ignore]
                rule.step()
    seconds = time.perf_counter() - began
    return Trained(
        seconds, accuracy(model, images, labels, tasks), how.epochs * sum(len(answers) for _, answers in found)
    )


def torch_online(images: Array, labels: Array, steps: int, lr: float, *, threads: int = 1, seed: int = 0) -> Online:
    """A picture a step through autograd and `torch.optim.SGD`."""
    _begin(threads, seed)
    model = mlp(ONLINE, seed)
    rule = torch.optim.SGD(model.parameters(), lr)
    pictures, answers = _online(images, labels, steps)
    began, right = time.perf_counter(), torch.zeros((), dtype=torch.long)
    for picture, answer in zip(torch.split(pictures, 1), torch.split(answers, 1), strict=True):
        logits = model(picture)
        right += (logits.detach().argmax(1) == answer).sum()
        rule.zero_grad()
        functional.cross_entropy(logits, answer).backward()  # type: ignore[no-untyped-call,unused-ignore]
        rule.step()
    return Online((time.perf_counter() - began) / steps, right.item() / steps)


def jax_online(
    images: Array, labels: Array, steps: int, lr: float, *, scan: bool = False, threads: int = 1, seed: int = 0
) -> Online:
    """A picture a step through one jitted function that gives its state back; `scan` takes `BLOCK` of them at once.

    Pictures, counter and score stay inside the state, so that a step waits for nothing on the host.
    """
    jax = _jax(threads)
    block = BLOCK if scan else 1
    if steps % block:
        raise CrlError(f"bench: a scan takes {BLOCK} pictures, and {steps} steps are no multiple of it")
    linears = [layer for layer in mlp(ONLINE, seed) if isinstance(layer, nn.Linear)]
    weights = [(each.weight.detach().T.numpy().copy(), each.bias.detach().numpy().copy()) for each in linears]
    pictures, answers = (jax.numpy.asarray(each.numpy()) for each in _online(images, labels, steps))
    learn = _jax_learn(jax, lr, block)
    jax.block_until_ready(learn(_jax_state(jax, weights), pictures, answers))  # compiles
    state = jax.block_until_ready(_jax_state(jax, weights))
    began = time.perf_counter()
    for _ in range(steps // block):
        state = learn(state, pictures, answers)
    jax.block_until_ready(state)
    return Online((time.perf_counter() - began) / steps, int(state[2]) / steps)


def _jax_learn(jax: Any, lr: float, block: int) -> Any:
    """`block` steps as one compiled function of (weights, counter, right answers) and the pictures."""

    def loss(weights: Any, picture: Any, answer: Any) -> tuple[Any, Any]:
        hidden = picture
        for weight, bias in weights[:-1]:
            hidden = jax.nn.relu(hidden @ weight + bias)
        logits = hidden @ weights[-1][0] + weights[-1][1]
        return -jax.nn.log_softmax(logits)[answer], logits

    def step(state: Any, pictures: Any, answers: Any) -> Any:
        weights, at, right = state
        slope, logits = jax.grad(loss, has_aux=True)(weights, pictures[at], answers[at])
        weights = jax.tree_util.tree_map(lambda weight, change: weight - lr * change, weights, slope)
        return weights, at + 1, right + (logits.argmax() == answers[at])

    def several(state: Any, pictures: Any, answers: Any) -> Any:
        return jax.lax.scan(lambda now, _: (step(now, pictures, answers), None), state, None, length=block)[0]

    return jax.jit(step if block == 1 else several, donate_argnums=0)


def _jax_state(jax: Any, weights: Any) -> Any:
    copies = jax.tree_util.tree_map(lambda each: jax.numpy.array(each, copy=True), weights)
    return copies, jax.numpy.zeros((), "int32"), jax.numpy.zeros((), "int32")


def _online(images: Array, labels: Array, steps: int) -> tuple[Tensor, Tensor]:
    """The first `steps` pictures, scaled and flat."""
    if len(images) < steps:
        raise CrlError(f"bench: {steps} online steps need as many pictures, not {len(images)}")
    return _scaled(_tensor(images[:steps])).flatten(1), _tensor(labels[:steps]).long()


def _tasks(
    images: Array, labels: Array, tasks: Sequence[Sequence[int]], most: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """Each task's pictures and answers, the first `most` of them."""
    for classes in tasks:
        chosen = np.flatnonzero(np.isin(labels, classes))[: most or None]
        yield _tensor(images[chosen]), _tensor(labels[chosen]).long()


def _tensor(values: Array) -> Tensor:
    """A copy whose rows lie in one piece: pixels permuted by an index come column by column, which slows every step."""
    return torch.from_numpy(np.array(values, order="C"))


def _scaled(pictures: Tensor) -> Tensor:
    return pictures.float().div_(255)


def _optimizer(name: str, model: nn.Module, lr: float) -> torch.optim.Optimizer:
    rules: dict[str, Any] = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}
    rule: torch.optim.Optimizer = rules[name](model.parameters(), lr, fused=True)
    return rule


def _begin(threads: int, seed: int) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(seed)


def _jax(threads: int) -> Any:
    """JAX with as many threads, which it is told before it is imported."""
    os.environ.update({"JAX_PLATFORMS": "cpu", "NPROC": str(threads)})
    return _peer("jax")


def _avalanche() -> tuple[Any, Any]:
    """Avalanche's benchmarks and strategies, without the warnings of packages that it imports and does not use here."""
    with warnings.catch_warnings(action="ignore"):
        _torchvision()
        _peer("avalanche")
        names = ("avalanche.benchmarks", "avalanche.training.supervised")
        benchmarks, training = map(importlib.import_module, names)
    return benchmarks, training


def _peer(name: str) -> Any:
    if importlib.util.find_spec(name) is None:
        raise CrlError(f"bench supervised compares with {name}: {INSTALL[name]}")
    return importlib.import_module(name)


def _torchvision() -> None:
    """Import torchvision even if its compiled part is for another build of torch: only the names must be there."""
    if importlib.util.find_spec("torchvision") is None:
        return
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor boxes, Tensor scores, float overlap) -> Tensor")
        importlib.import_module("torchvision")
