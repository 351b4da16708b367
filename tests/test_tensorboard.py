"""A run's TensorBoard files, read back: the story is in them."""

from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2

import crl
from crl.opened import Run


@pytest.fixture(scope="module")
def walked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, EventAccumulator]:
    data = {
        "name": "board",
        "tasks": [{"env": "CartPole-v1", "steps": 4096}, {"env": "Acrobot-v1", "steps": 2048}],
        "agent": {"n_steps": 64, "batch_size": 256, "n_epochs": 1},
        "evaluation": {"episodes": 1},
        "monitors": [{"use": "hessian", "steps": 20, "samples": 64}, "erank", "norms"],
    }
    run = crl.train(data, out=tmp_path_factory.mktemp("board"))
    board = EventAccumulator(str(run.path / "tb"), size_guidance={"images": 0, "scalars": 0, "tensors": 0})
    return run, board.Reload()


@pytest.mark.parametrize(
    "tag",
    ["train/return", "train/length", "losses/value_loss", "time/steps_per_second", "walk/visit", "metrics/forgetting",
     "eval/CartPole-v1", "eval/Acrobot-v1"],
)  # fmt: skip
def test_curves_are_the_records(walked: tuple[Run, EventAccumulator], tag: str) -> None:
    run, board = walked
    events = board.Scalars(tag)
    task = tag.removeprefix("eval/") if tag.startswith("eval/") else None
    name = "eval/return" if task else tag
    records = [r for r in run.records if r.name == name and task in (None, r.task)]
    assert [e.step for e in events] == [r.step for r in records] and len(events) > 0
    values = np.array([r.value for r in records], dtype=np.float32)
    assert np.array_equal(np.array([e.value for e in events], dtype=np.float32), values, equal_nan=True)


def test_the_boundary_is_visible(walked: tuple[Run, EventAccumulator]) -> None:
    """And each visit has its twenty lines, however short it is."""
    drawn = [(e.step, e.value) for e in walked[1].Scalars("walk/visit")]
    assert drawn == [(step, 1 if step <= 4096 else 2) for step, _ in drawn]
    assert all([value for _, value in drawn].count(visit) >= 20 for visit in (1, 2))
    assert (4096, 1) in drawn and drawn[-1] == (6144, 2)


def test_the_matrix_is_drawn_after_each_boundary(walked: tuple[Run, EventAccumulator]) -> None:
    images = walked[1].Images("walk/matrix")
    assert [image.step for image in images] == [0, 4096, 6144]
    assert all(image.encoded_image_string.startswith(b"\x89PNG") and image.width > 200 for image in images)


def test_the_first_page_is_the_story(walked: tuple[Run, EventAccumulator]) -> None:
    (event,) = walked[1].Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    chart = layout.category[0].chart[0]
    assert layout.category[0].title == "The walk" and len(chart.multiline.tag) == 2


def test_hparams_are_filled(walked: tuple[Run, EventAccumulator]) -> None:
    run, _ = walked
    folder = Path(run.path / "tb")
    text = b"".join(file.read_bytes() for file in folder.rglob("events*"))
    assert b"hparams" in text and b"agent.n_steps" in text and b"final/forgetting" in text
