"""A dataset as tasks: each walks a learner through the rows of one slice, in batches made on the learner's device."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from crl.checked import one_of, truth, whole
from crl.core import Agent, Array, CrlError, Interface, NotYet, Pairs, Score, State, Tick, Visit, derive, facing
from envs.answers import acted, learned
from envs.datasets import Arrays, load
from envs.slices import STREAMS, Slice
from envs.tally import Tally

SAFE = 64  # samples between two safe points, rounded up to whole batches
TICK = 2_048  # samples between two lines of the log
CHUNK = 500  # images that are answered at once in an evaluation
STREAM = 7  # the name of a random stream


@dataclass(frozen=True)
class Settings:
    """How a stream is walked, the same for all of its tasks."""

    batch: int = 128
    epochs: int = 1
    augment: tuple[str, ...] = ()
    joint: bool = False  # learn the tasks so far together: what forgetting is measured against
    test_samples: int = 0  # of each task; 0 is all


class ImageTask:
    """One slice of a dataset, learned in batches."""

    measure = "accuracy"
    best = 1.0

    def __init__(self, arrays: Arrays, slices: Sequence[Slice], classes: int, settings: Settings) -> None:
        self.slice, self.settings, self.arrays = slices[-1], settings, arrays
        self.slices = list(slices) if settings.joint else [slices[-1]]
        self.name, self.told, self.about = self.slice.name, self.slice.told, self.slice.about
        self.answers, self.classes = self.slice.answers, classes
        x = arrays.train_x
        low, high = (0, 255) if x.dtype == np.uint8 else (-np.inf, np.inf)
        self.interface = Interface(spaces.Box(low, high, x.shape[1:], x.dtype.type), spaces.Discrete(self.classes))
        self.steps = 0  # samples learned in the visit that is under way
        self.tally = Tally()

    @property
    def samples(self) -> int:
        """How many there are to learn from."""
        return sum(len(part.train) for part in self.slices)

    @property
    def tested(self) -> int:
        """How many it is evaluated on."""
        return min(len(self.slice.test), self.settings.test_samples or len(self.slice.test))

    # The walk's side.

    def train(self, agent: Agent, visit: Visit) -> Iterator[Tick]:
        """Go through the rows in a new order each epoch; every so often it is safe to stop."""
        batch = self.settings.batch
        data = self._rows(agent, train=True)
        count = len(data.label)
        settle = getattr(agent, "settle", None)
        safe, tick = (batch * math.ceil(every / batch) for every in (SAFE, TICK))
        while self.steps < visit.steps:
            epoch, start = divmod(self.steps, count)
            shuffled = self._shuffled(data, visit.seed, epoch)
            while start < count and self.steps < visit.steps:
                single = batch > 1 and count - start - batch == 1  # batch norm could not take the last row alone
                stop = count if single else start + batch
                part = _part(shuffled, start, stop)
                agent.observe(self._augmented(part, visit.seed, epoch, start))
                self.tally.add(learned(agent, agent.update()), len(part.label))
                start, before = stop, self.steps
                self.steps += len(part.label)
                if self.steps // safe > before // safe and settle is not None:
                    settle()
                if self.steps // tick > before // tick or self.steps >= visit.steps:
                    numbers, self.tally = self.tally.numbers(), Tally()
                    yield Tick(min(self.steps, visit.steps), numbers)
                elif self.steps // safe > before // safe:
                    yield Tick(self.steps, {})
        self.steps = 0

    def so_far(self) -> dict[str, float]:
        """The numbers since the last line of the log."""
        return self.tally.numbers()

    def evaluate(self, agent: Agent, seed: int, episodes: int, greedy: bool) -> Score:
        """The share of test images whose likeliest class is right."""
        data = self._rows(agent, train=False)
        if self.settings.test_samples and self.settings.test_samples < len(data.label):
            chosen = np.random.default_rng(seed).permutation(len(data.label))[: self.settings.test_samples]
            data = _part(data, torch.from_numpy(chosen).to(data.label.device))
        right = 0
        try:
            with facing(agent, self):
                for start in range(0, len(data.label), CHUNK):
                    part = _part(data, start, start + CHUNK)
                    found = agent.act(part.obs, None, True)
                    chosen = acted(agent, found, self.interface.action, len(part.label))[0]
                    right += int((chosen == part.label.cpu().numpy()).sum())
        except NotYet as reason:
            return Score(reason=str(reason))
        return Score((right / len(data.label),))

    def sample(self, agent: Agent, seed: int, size: int) -> Pairs:
        """Training images drawn at random, each at most once."""
        count = self.samples
        chosen = np.random.default_rng(seed).permutation(count)[:size]
        return self._rows(agent, train=True, chosen=np.sort(chosen))

    alike = "images"  # all tasks of a stream take as long

    def pace(self, seconds: float = 0.3) -> tuple[float, float]:
        """(seconds a sample, 1), of the data alone, measured now."""
        data, count, began = self._rows(None, train=True), 0, time.perf_counter()
        while time.perf_counter() - began < seconds or not count:
            self._augmented(_part(data, 0, self.settings.batch), 0, 0, count)
            count += min(self.settings.batch, len(data.label))
        return (time.perf_counter() - began) / count, 1.0

    # Rows.

    def _rows(self, agent: Any, *, train: bool, chosen: Array | None = None) -> Pairs:
        """Images, labels and possible answers of the slice, or of all so far, on the agent's device."""
        device = torch.device(getattr(agent, "device", "cpu"))
        images = self.arrays.train_x if train or self._tested_on_train else self.arrays.test_x
        found = []
        for part in self.slices if train else [self.slice]:
            rows, labels = (part.train, part.train_labels) if train else (part.test, part.test_labels)
            if chosen is not None:
                own = chosen[chosen < len(rows)]
                chosen = chosen[len(own) :] - len(rows)
                rows, labels = rows[own], labels[own]
            x = images[rows]
            if part.order is not None:
                x = np.take(x.reshape(len(x), -1), part.order, 1).reshape(x.shape)  # row by row in memory, too
            found.append((x, labels, part))
        x, y = np.concatenate([f[0] for f in found]), np.concatenate([f[1] for f in found])
        answers = self._answers([(len(f[1]), f[2]) for f in found])
        as_tensor = [torch.from_numpy(values).to(device) for values in (x, y.astype(np.int64))]
        return Pairs(as_tensor[0], as_tensor[1], None if answers is None else answers.to(device))

    @property
    def _tested_on_train(self) -> bool:
        return self.slice.test is self.slice.train

    def _answers(self, parts: Sequence[tuple[int, Slice]]) -> Tensor | None:
        """The classes of each row's task, where tasks are told and several are learned together."""
        if len(parts) == 1 or not self.told:
            return None
        masks = torch.zeros(len(parts), self.classes, dtype=torch.bool)
        for mask, (_, part) in zip(masks, parts, strict=True):
            mask[list(part.answers)] = True
        return masks.repeat_interleave(torch.tensor([count for count, _ in parts]), 0)

    def _shuffled(self, data: Pairs, seed: int, epoch: int) -> Pairs:
        generator = torch.Generator().manual_seed(derive(seed, epoch))
        return _part(data, torch.randperm(len(data.label), generator=generator).to(data.label.device))

    def _augmented(self, part: Pairs, seed: int, epoch: int, start: int) -> Pairs:
        if not self.settings.augment:
            return part
        generator = torch.Generator().manual_seed(derive(seed, epoch, start))
        x = part.obs
        for name in self.settings.augment:
            x = AUGMENT[name](x, generator)
        return Pairs(x, part.label, part.answers)

    # State: nothing between visits.

    def state_dict(self) -> State:
        """How far the visit is."""
        return {"steps": self.steps, "tally": self.tally.state_dict()}

    def load_state_dict(self, state: State) -> None:
        """The inverse of `state_dict`."""
        self.steps = state["steps"]
        self.tally.load_state_dict(state["tally"])


def _part(data: Pairs, start: Any, stop: int | None = None) -> Pairs:
    """Some rows: from one to another, or those of an index."""
    rows = start if stop is None else slice(start, stop)
    answers = data.answers
    return Pairs(data.obs[rows], data.label[rows], answers[rows] if answers is not None else None)


def flip(x: Tensor, generator: torch.Generator) -> Tensor:
    """Half of the images mirrored, left to right."""
    which = torch.rand(len(x), generator=generator).to(x.device) < 0.5
    return torch.where(which[:, None, None, None], x.flip(3), x)


def crop(x: Tensor, generator: torch.Generator, border: int = 4) -> Tensor:
    """Each image moved by up to `border` pixels either way; what comes in is zero."""
    count, _, height, width = x.shape
    padded = torch.nn.functional.pad(x, (border,) * 4)
    down, right = torch.randint(2 * border + 1, (2, count), generator=generator).to(x.device)
    rows = down[:, None] + torch.arange(height, device=x.device)
    columns = right[:, None] + torch.arange(width, device=x.device)
    images = torch.arange(count, device=x.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[images, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


AUGMENT: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {"crop": crop, "flip": flip}


def build(
    stream: Mapping[str, Any], seed: int, test_samples: int, choose: Callable[[Any, Mapping[str, Any]], None]
) -> tuple[list[ImageTask], list[int]]:
    """(the tasks of a stream, the samples that a visit to each learns); `choose` checks a stream's own options."""
    options = {key: int(v) if isinstance(v, float) and v.is_integer() else v for key, v in stream.items()}  # 1e4
    use, data = options.pop("use"), options.pop("data")
    batch, epochs = (
        whole(f"stream.{name}", options.pop(name, default)) for name, default in (("batch", 128), ("epochs", 1))
    )
    samples, only = (options.pop(name, 0) for name in ("samples", "only"))
    augment, joint = options.pop("augment", []), truth("stream.joint", options.pop("joint", False))
    whole("stream.samples", samples, 0)
    make = STREAMS[one_of("stream.use", use, tuple(STREAMS))]
    choose(make, options)
    arrays = load(str(data))
    settings = Settings(batch, epochs, _augment(augment, arrays), joint, test_samples)
    slices = make(arrays, np.random.default_rng(derive(seed, STREAM)), **options)
    if whole("stream.only", only, 0) > len(slices):
        raise CrlError(f"stream.only: {only} is no task; they are counted from 1 to {len(slices)}")
    classes = 1 + int(max(max(part.train_labels.max(), *part.answers, 0) for part in slices if len(part.train)))
    slices = [_fewer(part, samples, derive(seed, STREAM, i)) for i, part in enumerate(slices)] if samples else slices
    empty = next((part.name for part in slices if not len(part.train) or not len(part.test)), None)
    if empty is not None:
        raise CrlError(f"stream: task {empty!r} has no images to learn from or to be tested on")
    tasks = [ImageTask(arrays, slices[: i + 1], classes, settings) for i in range(len(slices))]
    tasks = tasks[only - 1 : only] if only else tasks
    return tasks, [epochs * task.samples for task in tasks]


def _augment(names: Any, arrays: Arrays) -> tuple[str, ...]:
    if not isinstance(names, list | tuple) or any(name not in tuple(AUGMENT) for name in names):
        raise CrlError(f"stream.augment: {names!r} is not a list of {', '.join(AUGMENT)}")
    if names and arrays.train_x.ndim != 4:
        raise CrlError("stream.augment: crop and flip are for images (channels, height, width)")
    return tuple(names)


def _fewer(part: Slice, samples: int, seed: int) -> Slice:
    """At most so many rows to learn from, drawn at random."""
    chosen = np.sort(np.random.default_rng(seed).permutation(len(part.train))[:samples])
    train, labels = part.train[chosen], part.train_labels[chosen]
    same = part.test is part.train
    test, test_labels = (train, labels) if same else (part.test, part.test_labels)
    return replace(part, train=train, test=test, train_labels=labels, test_labels=test_labels)
