"""A dataset as tasks: what is in each slice, and that a walk goes through it as it says."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from agents.classifier import Classifier
from crl.core import CrlError, Interface, Pairs, Tick, Visit, random_state
from envs import images, slices
from envs.datasets import Arrays
from envs.images import ImageTask, Settings
from envs.slices import Slice
from tests.small_data import refused

pytestmark = pytest.mark.usefixtures("one_thread")

CLASSES, ROWS, TESTS = 12, 7, 4


def pictures(classes: int, rows: int, start: int, shape: tuple[int, ...] = (1, 4, 4)) -> tuple[np.ndarray, np.ndarray]:
    """Noise whose first two pixels number the picture, with its labels."""
    count = classes * rows
    x = np.random.default_rng(start).integers(0, 256, (count, *shape)).astype(np.uint8)
    flat = x.reshape(count, -1)
    flat[:, 0], flat[:, 1] = divmod(np.arange(start, start + count), 256)
    return x, np.arange(count, dtype=np.int64) % classes


def tiny() -> Arrays:
    """A dataset by import path."""
    return Arrays(*pictures(CLASSES, ROWS, 0), *pictures(CLASSES, TESTS, 1000))


def numbers_of(obs: Any) -> list[int]:
    """Which pictures these are."""
    flat = np.asarray(obs).reshape(len(obs), -1).astype(int)
    return [int(n) for n in flat[:, 0] * 256 + flat[:, 1]]


def draw(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def anything(make: Any, options: Mapping[str, Any]) -> None:
    pass


def built(seed: int = 0, test_samples: int = 0, **stream: Any) -> list[ImageTask]:
    """The tasks of a stream over `tiny`."""
    data = {"use": "split", "data": "tests.test_images.tiny", **stream}
    return images.build(data, seed, test_samples, anything)[0]


class Listener:
    """Keeps what it is given, and answers with the same class; its numbers count its updates."""

    device = "cpu"

    def __init__(self) -> None:
        self.seen: list[Pairs] = []
        self.asked: list[torch.Tensor] = []

    def observe(self, pairs: Pairs) -> None:
        self.seen.append(pairs)

    def update(self) -> dict[str, float]:
        return {"count": float(len(self.seen))}

    def act(self, obs: Any, carry: Any, greedy: bool) -> tuple[Any, Any, Any]:
        self.asked.append(obs)
        return np.ones(len(obs), int), carry, None

    @property
    def rows(self) -> list[int]:
        return [n for pairs in self.seen for n in numbers_of(pairs.obs)]


def visit(task: ImageTask, epochs: int = 1, seed: int = 5, index: int = 1) -> Visit:
    return Visit(index, task, epochs * task.samples, seed)


def walked(task: ImageTask, epochs: int = 1, seed: int = 5) -> tuple[Listener, list[Tick]]:
    agent = Listener()
    return agent, list(task.train(agent, visit(task, epochs, seed)))


def whole(arrays: Arrays, settings: Settings) -> ImageTask:
    """All of a dataset as one task."""
    rows, tests = np.arange(len(arrays.train_y)), np.arange(len(arrays.test_y))
    return ImageTask(arrays, [Slice("all", rows, tests, arrays.train_y, arrays.test_y)], arrays.count, settings)


def alike(a: Slice, b: Slice) -> bool:
    pairs = [(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(Slice)]
    return all(np.array_equal(x, y) if isinstance(x, np.ndarray) else x is y or x == y for x, y in pairs)


# Split and incremental.


def test_split_deals_every_class_to_one_task() -> None:
    arrays = tiny()
    found = slices.split(arrays, draw(), tasks=4)
    assert [part.name for part in found] == ["task 1", "task 2", "task 3", "task 4"]
    assert sorted(c for part in found for c in part.answers) == list(range(CLASSES))
    for part in found:
        assert len(part.answers) == 3 and part.told and part.order is None
        for rows, labels, y in (
            (part.train, part.train_labels, arrays.train_y),
            (part.test, part.test_labels, arrays.test_y),
        ):
            assert np.array_equal(labels, y[rows]) and set(labels) == set(part.answers)
            assert len(rows) == np.isin(y, part.answers).sum() and len(set(rows)) == len(rows)


def test_the_order_of_classes_is_the_seeds() -> None:
    def order(seed: int, **options: Any) -> list[tuple[int, ...]]:
        return [part.answers for part in slices.split(tiny(), draw(seed), tasks=4, **options)]

    assert order(3) == order(3) != order(4)
    assert order(3, order="as_is") == order(4, order="as_is") == [(0, 1, 2), (3, 4, 5), (6, 7, 8), (9, 10, 11)]
    names = [[part.answers for part in (task.slice for task in built(seed, tasks=4))] for seed in (0, 0, 1)]
    assert names[0] == names[1] != names[2]


def test_who_is_told_the_task() -> None:
    told = [{part.told for part in slices.split(tiny(), draw(), tasks=4, scenario=s)} for s in ("task", "class")]
    assert told == [{True}, {False}]


@pytest.mark.parametrize("make", [slices.split, slices.incremental])
@pytest.mark.parametrize("tasks", [5, 24])
def test_what_does_not_divide_is_refused(make: Any, tasks: int) -> None:
    with pytest.raises(CrlError, match=f"stream.tasks: 12 classes are not cut into {tasks} equal parts"):
        make(tiny(), draw(), tasks=tasks)


def test_incremental_adds_classes() -> None:
    found = slices.incremental(tiny(), draw(), tasks=4)
    assert [len(part.answers) for part in found] == [3, 6, 9, 12] and not any(part.told for part in found)
    for before, after in itertools.pairwise(found):
        assert after.answers[: len(before.answers)] == before.answers
        assert set(before.train) < set(after.train) and set(before.test) < set(after.test)
    assert [part.name for part in found] == ["3 classes", "6 classes", "9 classes", "12 classes"]
    assert len(found[-1].train) == CLASSES * ROWS


def test_what_is_in_a_task_is_said_in_the_names_of_classes() -> None:
    named = dataclasses.replace(tiny(), classes=tuple("abcdefghijkl"))
    assert slices.split(named, draw(), tasks=4, order="as_is")[0].about == "a, b, c"
    assert slices.split(named, draw(), tasks=2, order="as_is")[1].about == "g ... l"
    assert slices.split(tiny(), draw(), tasks=6, order="as_is")[1].about == "2, 3"


# Permuted, random labels, pairs.


def test_cumulative_orders_are_compositions() -> None:
    pixels, generator = 16, draw(2)
    drawn = [generator.permutation(pixels) for _ in range(4)]
    composed = [drawn[0], drawn[0][drawn[1]], drawn[0][drawn[1]][drawn[2]], drawn[0][drawn[1]][drawn[2]][drawn[3]]]
    for options, expected in (({}, composed), ({"cumulative": False}, drawn)):
        found = slices.permuted(tiny(), draw(2), tasks=4, **options)
        assert all(np.array_equal(part.order, order) for part, order in zip(found, expected, strict=True))
    first = slices.permuted(tiny(), draw(2), tasks=4, first=False)
    assert np.array_equal(first[0].order, np.arange(pixels)) and np.array_equal(first[1].order, drawn[1])
    assert np.array_equal(first[2].order, drawn[1][drawn[2]])
    assert not any(part.told or part.answers for part in first)


def test_a_permutation_holds_for_all_images_of_a_task() -> None:
    task = built(use="permuted", tasks=2, cumulative=False)[1]
    order, arrays = task.slice.order, tiny()
    assert order is not None and not np.array_equal(order, np.arange(16))
    agent, _ = walked(task)
    task.evaluate(agent, 0, 1, True)
    for obs, x in (
        (torch.cat([p.obs for p in agent.seen]), arrays.train_x),
        (torch.cat(agent.asked), arrays.test_x),
        (task.sample(agent, 0, 10**6).obs, arrays.train_x),
    ):
        assert obs.shape == x.shape and obs.dtype == torch.uint8
        expected = x.reshape(len(x), -1)[:, order]
        assert sorted(map(bytes, obs.numpy().reshape(len(x), -1))) == sorted(map(bytes, expected))


def test_random_labels_are_the_same_in_both_halves_and_chance_elsewhere() -> None:
    big = Arrays(*pictures(10, 400, 0), *pictures(10, 3, 9000))
    one, two = slices.random_label(big, draw(), tasks=2)
    for part in (one, two):
        assert part.test is part.train and part.test_labels is part.train_labels and not part.answers
        assert np.bincount(part.train_labels, minlength=10).min() > 300
    assert abs((one.train_labels == two.train_labels).mean() - 0.1) < 0.02
    assert abs((one.train_labels == big.train_y).mean() - 0.1) < 0.02


def test_random_labels_are_tested_on_the_images_they_are_of() -> None:
    task = built(use="random_label", tasks=2, samples=20)[1]
    agent, _ = walked(task)
    score = task.evaluate(agent, 0, 1, True)
    assert sorted(agent.rows) == sorted(numbers_of(torch.cat(agent.asked))) and task.tested == 20
    labels = torch.cat([pairs.label for pairs in agent.seen])
    assert score.mean == pytest.approx((labels == 1).double().mean().item())


def test_pairs_deal_out_all_classes_before_any_comes_again() -> None:
    arrays = tiny()
    found = slices.pairs(arrays, draw(), tasks=18)
    dealt = [tuple(arrays.train_y[part.train[part.train_labels == k]][0] for k in (0, 1)) for part in found]
    for start in (0, 6, 12):
        assert sorted(c for pair in dealt[start : start + 6] for c in pair) == list(range(CLASSES))
    assert dealt[:6] != dealt[6:12]
    for part, pair in zip(found, dealt, strict=True):
        assert not part.answers and not part.told
        for rows, labels, y in (
            (part.train, part.train_labels, arrays.train_y),
            (part.test, part.test_labels, arrays.test_y),
        ):
            assert np.array_equal(y[rows], np.array(pair)[labels]) and len(rows) == np.isin(y, pair).sum()
    assert built(use="pairs", tasks=3)[0].interface.action.n == 2  # type: ignore[attr-defined]


# What all streams take.


@pytest.mark.parametrize("use", sorted(slices.STREAMS))
def test_a_task_alone_is_what_it_is_in_the_walk(use: str) -> None:
    stream = {"use": use, "tasks": 4, "samples": 5}
    together = built(7, **stream)
    for k, task in enumerate(together, start=1):
        (alone,) = built(7, **stream, only=k)
        assert alike(alone.slice, task.slice) and alone.interface == task.interface
    refused(lambda: built(**stream, only=5), "stream.only: 5 is no task; they are counted from 1 to 4")


def test_samples_caps_what_is_learned_and_not_what_is_tested() -> None:
    all_of, few = built(1, tasks=2), built(1, tasks=2, samples=9)
    for task, capped in zip(all_of, few, strict=True):
        assert (task.samples, capped.samples) == (42, 9)
        assert set(capped.slice.train) < set(task.slice.train)
        assert np.array_equal(capped.slice.test, task.slice.test) and capped.tested == task.tested == 24
        assert np.array_equal(capped.slice.train_labels, tiny().train_y[capped.slice.train])
    assert len(set(few[0].slice.train_labels)) > 2, "drawn at random"
    same = [built(seed, use="permuted", tasks=2, samples=9) for seed in (1, 1, 2)]
    rows = [[task.slice.train.tolist() for task in tasks] for tasks in same]
    assert rows[0] == rows[1] != rows[2] and rows[0][0] != rows[0][1], "each task draws its own"


def test_few_samples_do_not_lose_a_class() -> None:
    tasks = built(tasks=1, samples=1)
    assert tasks[0].interface.action.n == CLASSES  # type: ignore[attr-defined]


def test_the_samples_of_a_visit() -> None:
    data = {"use": "split", "data": "tests.test_images.tiny", "tasks": 3, "epochs": 4}
    tasks, steps = images.build(data, 0, 0, anything)
    assert steps == [4 * 4 * ROWS] * 3 and [task.samples for task in tasks] == [4 * ROWS] * 3


def test_joint_learns_all_so_far_with_each_rows_answers() -> None:
    tasks, arrays = built(tasks=4, joint=True), tiny()
    for k, task in enumerate(tasks, start=1):
        agent, _ = walked(task)
        learned = {n for other in tasks[:k] for n in numbers_of(arrays.train_x[other.slice.train])}
        assert sorted(agent.rows) == sorted(learned) and task.samples == 3 * ROWS * k
        for pairs in agent.seen if k > 1 else []:
            assert pairs.answers is not None
            for label, valid in zip(pairs.label.tolist(), pairs.answers, strict=True):
                own = next(other.answers for other in tasks if label in other.answers)
                assert sorted(own) == torch.nonzero(valid)[:, 0].tolist()
        assert all(pairs.answers is None for pairs in agent.seen) or k > 1
        task.evaluate(agent, 0, 1, True)
        assert sorted(numbers_of(torch.cat(agent.asked))) == sorted(numbers_of(arrays.test_x[task.slice.test]))
    sampled = tasks[3].sample(Listener(), 3, 30)
    masks = torch.stack([torch.isin(torch.arange(CLASSES), torch.tensor(task.answers)) for task in tasks])
    owners = [next(i for i, task in enumerate(tasks) if n in task.answers) for n in sampled.label.tolist()]
    assert len(sampled.label) == 30 and torch.equal(sampled.answers, masks[owners]) and len(set(owners)) > 1
    assert all(p.answers is None for p in walked(built(tasks=4, joint=True, scenario="class")[3])[0].seen)


def test_joint_permuted_keeps_each_tasks_pixels() -> None:
    task = built(use="permuted", tasks=2, joint=True, cumulative=False)[1]
    flat, arrays = torch.cat([p.obs for p in walked(task)[0].seen]).numpy().reshape(-1, 16), tiny()
    orders = [part.order for part in task.slices]
    expected = np.concatenate([arrays.train_x.reshape(-1, 16)[:, order] for order in orders])
    assert sorted(map(bytes, flat)) == sorted(map(bytes, expected))


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"use": "splitt"}, "stream.use: 'splitt' is not split or"),
        ({"batch": 0}, "stream.batch: 0 is not"),
        ({"epochs": 1.5}, "stream.epochs: 1.5 is not"),
        ({"samples": -1}, "stream.samples: -1 is not"),
        ({"joint": 1}, "stream.joint: 1 is not true or false"),
        ({"augment": ["blur"]}, "stream.augment: .* is not a list of crop, flip"),
        ({"augment": "crop"}, "stream.augment: 'crop' is not a list"),
        ({"scenario": "domain"}, "stream.scenario: 'domain' is not task or class"),
        ({"tasks": 4, "order": "sorted"}, "stream.order: 'sorted' is not drawn or as_is"),
        ({"use": "permuted", "cumulative": 0}, "stream.cumulative: 0 is not true or false"),
        ({"use": "permuted", "tasks": 0}, "stream.tasks: 0 is not"),
        ({"augment": [["crop"]]}, "stream.augment"),
    ],
)
def test_a_stream_that_cannot_be_is_refused_in_one_line(options: dict[str, Any], line: str) -> None:
    with pytest.raises(CrlError, match=line):
        built(**options)


def vectors() -> Arrays:
    """Numbers that are no images."""
    x, y = draw().normal(size=(24, 5)).astype(np.float32), np.arange(24) % CLASSES
    return Arrays(x, y, x, y)


def lopsided() -> Arrays:
    """Of one class there is nothing to be tested on."""
    x, y, *test = dataclasses.astuple(tiny())[:4]
    return Arrays(x, y, test[0][test[1] != 5], test[1][test[1] != 5])


def test_data_that_a_stream_cannot_use_is_refused() -> None:
    flat = {"data": "tests.test_images.vectors", "augment": ["flip"]}
    refused(lambda: built(**flat), "stream.augment: crop and flip are for images")
    empty = {"data": "tests.test_images.lopsided", "tasks": 12, "order": "as_is"}
    refused(lambda: built(**empty), "stream: task 'task 6' has no images to learn from or to be tested on")


def test_data_that_is_no_image_walks() -> None:
    (task,) = built(data="tests.test_images.vectors", tasks=1, batch=7)
    agent, _ = walked(task)
    assert torch.cat([p.obs for p in agent.seen]).dtype == torch.float32 and task.interface.observation.shape == (5,)
    assert sorted(map(tuple, torch.cat([p.obs for p in agent.seen]).tolist())) == sorted(
        map(tuple, vectors().train_x.tolist())
    )


# Augmentation.


def naive_crop(image: np.ndarray, down: int, right: int) -> np.ndarray:
    """What lies `down - 4` below and `right - 4` right of each place; zero outside."""
    moved = np.zeros_like(image)
    _, height, width = image.shape
    for row in range(height):
        for column in range(width):
            there = row + down - 4, column + right - 4
            if 0 <= there[0] < height and 0 <= there[1] < width:
                moved[:, row, column] = image[:, there[0], there[1]]
    return moved


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_crop_equals_a_naive_loop(dtype: torch.dtype) -> None:
    x = torch.from_numpy(draw().integers(1, 256, (60, 2, 6, 8))).to(dtype)
    moved = images.crop(x, torch.Generator().manual_seed(0))
    assert moved.dtype == dtype and moved.shape == x.shape
    shifts = []
    for before, after in zip(x.numpy(), moved.numpy(), strict=True):
        fits = [s for s in itertools.product(range(9), repeat=2) if np.array_equal(naive_crop(before, *s), after)]
        assert len(fits) == 1
        shifts += fits
    assert {s[0] for s in shifts} == {s[1] for s in shifts} == set(range(9)) and len(set(shifts)) > 30


def test_crop_with_known_shifts(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.from_numpy(draw().integers(1, 256, (3, 2, 6, 8)).astype(np.uint8))
    known = torch.tensor([[0, 4, 7], [8, 4, 1]])
    monkeypatch.setattr(torch, "randint", lambda *args, **options: known)
    expected = [naive_crop(x[i].numpy(), int(known[0, i]), int(known[1, i])) for i in range(3)]
    assert np.array_equal(images.crop(x, torch.Generator()).numpy(), np.stack(expected))
    assert np.array_equal(expected[1], x[1]), "in the middle nothing moves"


def test_flip_mirrors_about_half_left_to_right() -> None:
    x = torch.from_numpy(draw().integers(0, 256, (400, 2, 3, 5)).astype(np.uint8))
    y = images.flip(x, torch.Generator().manual_seed(1))
    mirrored = torch.from_numpy(x.numpy()[:, :, :, ::-1].copy())
    which = (y == mirrored).flatten(1).all(1)
    assert ((y == x).flatten(1).all(1) | which).all() and 150 < which.sum() < 250 and y.dtype == torch.uint8


def test_augmentation_is_the_seeds_the_epochs_and_the_batchs() -> None:
    settings = {"tasks": 2, "batch": 10, "augment": ["crop", "flip"]}
    task = built(**settings)[0]

    def seen(seed: int) -> torch.Tensor:
        return torch.cat([pairs.obs for pairs in walked(task, 2, seed)[0].seen])

    one, again, other = seen(1), seen(1), seen(2)
    assert one.dtype == torch.uint8 and torch.equal(one, again) and not torch.equal(one, other)
    plain = torch.cat([pairs.obs for pairs in walked(built(**{**settings, "augment": []})[0], 2, 1)[0].seen])
    assert not torch.equal(one, plain)
    same = built(tasks=6, batch=3, augment=["crop"])[0]
    same.arrays = dataclasses.replace(same.arrays, train_x=np.tile(same.arrays.train_x[:1], (CLASSES * ROWS, 1, 1, 1)))
    agent, _ = walked(same, 4)
    starts = {bytes(pairs.obs[:2].numpy()) for pairs in agent.seen}
    assert len(agent.seen) == 4 * 5 and len(starts) > 12, "each batch has shifts of its own"


def test_an_evaluation_and_a_sample_are_not_augmented() -> None:
    task, plain = (built(tasks=2, augment=augment)[0] for augment in (["crop", "flip"], []))
    agents = [Listener(), Listener()]
    for agent, own in zip(agents, (task, plain), strict=True):
        own.evaluate(agent, 0, 1, True)
    assert torch.equal(torch.cat(agents[0].asked), torch.cat(agents[1].asked))
    assert torch.equal(task.sample(agents[0], 1, 20).obs, plain.sample(agents[0], 1, 20).obs)


# A visit.


def test_each_epoch_has_each_row_once_in_an_order_of_its_own() -> None:
    task = built(tasks=2, batch=8)[0]
    count, expected = task.samples, sorted(numbers_of(tiny().train_x[task.slice.train]))
    rows = walked(task, 3)[0].rows
    epochs = [rows[i * count : (i + 1) * count] for i in range(3)]
    assert len(rows) == 3 * count and all(sorted(epoch) == expected for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0] and expected not in epochs
    assert walked(task, 3)[0].rows == rows, "the visit's seed is all that it depends on"
    other = walked(task, 3, seed=6)[0].rows
    assert other[:count] != epochs[0] and not any(other[:count] == epoch for epoch in epochs)
    labels = dict(zip(numbers_of(tiny().train_x), tiny().train_y.tolist(), strict=True))
    agent = walked(task)[0]
    assert torch.cat([pairs.label for pairs in agent.seen]).tolist() == [labels[n] for n in agent.rows]


@pytest.mark.parametrize(
    ("batch", "sizes"),
    [
        (16, [16] * 5 + [4]),
        (20, [20] * 4 + [4]),
        (41, [41, 41, 2]),
        (82, [82, 2]),
        (83, [84]),
        (84, [84]),
        (500, [84]),
        (3, [3] * 28),
    ],
)
def test_no_batch_has_a_single_row(batch: int, sizes: list[int]) -> None:
    assert [len(pairs.label) for pairs in walked(whole(tiny(), Settings(batch)))[0].seen] == sizes
    agent, _ = walked(whole(tiny(), Settings(batch)), 2)
    assert [len(pairs.label) for pairs in agent.seen] == 2 * sizes and min(sizes) > 1


def test_learning_online_is_a_row_at_a_time() -> None:
    assert {len(pairs.label) for pairs in walked(whole(tiny(), Settings(1)))[0].seen} == {1}


def many(count: int) -> Arrays:
    return Arrays(*pictures(1, count, 0), *pictures(1, 3, 60_000))


@pytest.mark.parametrize(("batch", "safe", "tick"), [(16, 64, 2048), (100, 100, 2100), (1500, 1500, 3000)])
def test_numbers_come_every_2048_samples_and_safe_points_between(batch: int, safe: int, tick: int) -> None:
    count = 6_001
    agent, ticks = walked(whole(many(count), Settings(batch)))
    ends = np.cumsum([len(pairs.label) for pairs in agent.seen]).tolist()
    before = [0, *ends[:-1]]
    loud = [e for b, e in zip(before, ends, strict=True) if e // tick > b // tick or e == count]
    quiet = [e for b, e in zip(before, ends, strict=True) if e // safe > b // safe and e not in loud]
    assert [t.steps for t in ticks if t.numbers] == loud and [t.steps for t in ticks if not t.numbers] == quiet
    assert loud[0] == tick and loud[-1] == count and [t.steps for t in ticks] == sorted(loud + quiet)
    updates = np.searchsorted(ends, loud) + 1
    sizes = np.diff([0, *ends])
    means = [np.average(np.arange(a, b) + 1, weights=sizes[a:b]) for a, b in itertools.pairwise([0, *updates])]
    assert [t.numbers["count"] for t in ticks if t.numbers] == pytest.approx(means), "means over samples since the last"


@pytest.mark.parametrize("at", [1, 5, 11, 21, 22, 31])
def test_a_visit_goes_on_from_its_state(at: int) -> None:
    """From safe points between two lines of the log, in mid-epoch, with augmentation."""
    settings = Settings(48, 3, ("crop", "flip"))
    task, again = (whole(many(1_031), settings) for _ in range(2))
    agent, ticks = walked(task, 3)
    first, second = Listener(), Listener()
    steps = task.train(first, visit(task, 3))
    before = list(itertools.islice(steps, at))
    assert before[-1].steps % 1_031, "in mid-epoch"
    again.load_state_dict(dict(task.state_dict()))
    second.seen = list(first.seen)  # its numbers count on
    after = list(again.train(second, dataclasses.replace(visit(again, 3), done=before[-1].steps)))
    assert before + after == ticks and sum(bool(t.numbers) for t in ticks) == 2
    for one, other in zip(agent.seen, second.seen, strict=True):
        assert torch.equal(one.obs, other.obs) and torch.equal(one.label, other.label)


def test_between_visits_nothing_is_left() -> None:
    task = whole(tiny(), Settings(16))
    empty = task.state_dict()
    first = walked(task)[0].rows
    assert task.state_dict() == empty == {"steps": 0, "tally": {"sums": {}, "counts": {}}}
    assert walked(task)[0].rows == first


def test_a_tally_of_tensors_is_plain_when_saved() -> None:
    from envs.tally import Tally

    tally = Tally()
    tally.add({"loss": torch.tensor(1.5)})
    tally.add({"loss": 2.5, "other": 4})
    state = tally.state_dict()
    assert state == {"sums": {"loss": 4.0, "other": 4.0}, "counts": {"loss": 2, "other": 1}}
    other = Tally()
    other.load_state_dict(state)
    other.add({"other": 0.0}, 3)
    assert other.numbers() == {"loss": 2.0, "other": 1.0} and tally.numbers() == {"loss": 2.0, "other": 4.0}


# Looking.

NET = {"use": "conv", "channels": [4], "hidden": [8], "norm": "batch"}


def learner(task: ImageTask, net: Mapping[str, Any] = NET, steps: int = 2) -> Classifier:
    agent = Classifier(task.interface, 0, "cpu", net=net, learning_rate=0.01)
    agent.enter(visit(task))
    for _ in range(steps):
        list(task.train(agent, visit(task)))
    return agent


def wide(classes: int = 10, rows: int = 20, tests: int = 120) -> Arrays:
    """More test images than are answered at once, of classes that can be told apart."""
    train, test = pictures(classes, rows, 0, (1, 8, 8)), pictures(classes, tests, 9000, (1, 8, 8))
    for x, y in (train, test):
        x[:, :, 2:] = np.where(np.arange(64).reshape(1, 1, 8, 8)[:, :, 2:] % classes == y[:, None, None, None], 250, 5)
    return Arrays(*train, *test)


def test_an_accuracy_is_the_share_of_right_answers() -> None:
    task = whole(wide(), Settings(25))
    agent = learner(task)
    agent.model.train(False)
    with torch.no_grad():
        logits = agent.model(torch.from_numpy(task.arrays.test_x).float() / 255)
    right = (logits.argmax(1).numpy() == task.arrays.test_y).mean()
    agent.model.train(True)
    score = task.evaluate(agent, 0, 1, True)
    assert len(task.arrays.test_y) > 2 * images.CHUNK
    assert score.returns == (pytest.approx(right),) and 0.2 < right < 1 and not score.lengths


def test_an_evaluation_takes_the_same_few_images_each_time() -> None:
    arrays = wide()

    def asked(seed: int, samples: int, labels: Sequence[int] | None = None) -> list[int]:
        agent, task = Listener(), whole(arrays, Settings(25, test_samples=samples))
        if labels is not None:
            task.slice = dataclasses.replace(task.slice, test=np.array(labels), test_labels=arrays.test_y[labels])
        score = task.evaluate(agent, seed, 1, True)
        rows = numbers_of(torch.cat(agent.asked))
        assert len(rows) == task.tested and score.mean == np.mean([arrays.test_y[n - 9000] == 1 for n in rows])
        return rows

    assert asked(3, 700) == asked(3, 700) and set(asked(3, 700)) != set(asked(4, 700))
    assert len(set(asked(3, 700))) == 700 and len(asked(3, 0)) == 1200
    assert sorted(asked(3, 5000)) == sorted(asked(3, 0)), "no more than there are"
    assert set(asked(3, 4, [5, 6, 7, 8, 9])) < {9005, 9006, 9007, 9008, 9009}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("net", [NET, {"use": "resnet18", "width": 2}], ids=["conv", "resnet18"])
def test_looking_leaves_everything_as_it_was(net: dict[str, Any], training: bool) -> None:
    task = whole(wide(), Settings(25, test_samples=60))
    agent = learner(task, net, 1)
    agent.model.train(training)
    list(itertools.islice(task.train(agent, visit(task)), 1))  # in mid-visit
    before = {name: value.clone() for name, value in agent.model.state_dict().items()}
    random, state = random_state(), repr(task.state_dict())
    assert any("running_mean" in name for name in before)
    task.evaluate(agent, 1, 1, False)
    task.sample(agent, 1, 30)
    task.pace(0.001)
    assert agent.model.training == training
    assert all(torch.equal(value, before[name]) for name, value in agent.model.state_dict().items())
    assert repr(random) == repr(random_state()) and torch.equal(random["torch"], torch.get_rng_state())
    assert repr(task.state_dict()) == state


def test_a_sample_is_drawn_by_its_seed_and_has_each_row_once() -> None:
    task, agent = built(tasks=2)[0], Listener()
    one, again, other = (task.sample(agent, seed, 30) for seed in (1, 1, 2))
    assert torch.equal(one.obs, again.obs) and torch.equal(one.label, again.label)
    rows, others = numbers_of(one.obs), numbers_of(other.obs)
    assert set(rows) != set(others) and len(set(rows)) == 30
    labels = dict(zip(numbers_of(tiny().train_x), tiny().train_y.tolist(), strict=True))
    assert one.label.tolist() == [labels[n] for n in rows] and len(task.sample(agent, 1, 10**6).label) == task.samples


def test_the_interface_says_what_is_seen_and_answered() -> None:
    task = built(tasks=4)[0]
    assert isinstance(task.interface, Interface)
    assert (task.interface.observation.shape, task.interface.observation.dtype) == ((1, 4, 4), np.uint8)
    assert task.interface.action.n == CLASSES  # type: ignore[attr-defined]
    assert (task.measure, task.best, task.told) == ("accuracy", 1.0, True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here: augmentation and batches on the learner's")
def test_batches_are_made_on_the_learners_device() -> None:
    task = built(tasks=4, joint=True, augment=["crop", "flip"], batch=10)[3]
    agents = [Listener(), Listener()]
    agents[1].device = "cuda"
    for agent in agents:
        list(task.train(agent, visit(task)))
    for one, other in zip(agents[0].seen, agents[1].seen, strict=True):
        assert other.obs.is_cuda and other.label.is_cuda and other.answers.is_cuda
        assert torch.equal(one.obs, other.obs.cpu()) and torch.equal(one.label, other.label.cpu())
        assert torch.equal(one.answers, other.answers.cpu())
