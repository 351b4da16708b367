"""A real walk's event files hold the curves, the pictures and the page that the story is read from."""

from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import plugin_data_pb2

import crl

TASKS = ("CartPole-v1", "Acrobot-v1")
STEPS = 256


@pytest.fixture(scope="module")
def events(tmp_path_factory: pytest.TempPathFactory) -> EventAccumulator:
    run = crl.train(
        {
            "name": "tiny",
            "tasks": [{"env": env, "steps": STEPS} for env in TASKS],
            "engine": {"envs": 2},
            "agent": {"use": "ppo", "n_steps": 32, "batch_size": 32},
            "evaluation": {"episodes": 1},
        },
        out=tmp_path_factory.mktemp("runs"),
    )
    found = EventAccumulator(str(run.path / "tb"), size_guidance={"images": 0, "scalars": 0})
    found.Reload()
    return found


def steps(events: EventAccumulator, tag: str) -> list[int]:
    return [event.step for event in events.Scalars(tag)]


def test_training_is_drawn_against_the_steps_of_the_walk(events: EventAccumulator) -> None:
    ends = [STEPS, 2 * STEPS]
    assert steps(events, "walk/visit") == ends
    assert [event.value for event in events.Scalars("walk/visit")] == [1.0, 2.0]
    assert steps(events, "time/steps_per_second") == ends
    assert steps(events, "losses/loss") == ends and steps(events, "losses/value_loss") == ends
    assert steps(events, "train/return")[0] == STEPS  # random CartPole ends often; Acrobot need not
    assert steps(events, "train/length") == steps(events, "train/return")


def test_every_task_has_an_evaluation_curve(events: EventAccumulator) -> None:
    for task in TASKS:
        assert steps(events, f"eval/{task}") == steps(events, f"eval/length/{task}") == [0, STEPS, 2 * STEPS]


def test_the_matrix_is_a_picture_at_every_boundary(events: EventAccumulator) -> None:
    pictures = events.Images("walk/matrix")
    assert [picture.step for picture in pictures] == [0, STEPS, 2 * STEPS]
    assert all(picture.width > 100 and picture.height > 100 for picture in pictures)


def test_forgetting_is_drawn(events: EventAccumulator) -> None:
    names = events.Tags()["scalars"]
    forgetting = [name for name in names if name.startswith("metrics/") and "forgetting" in name]
    assert forgetting and all(steps(events, name)[-1] == 2 * STEPS for name in forgetting)
    assert any(name.startswith("metrics/average") for name in names)


def test_the_first_page_tells_the_story(events: EventAccumulator) -> None:
    layout: Any = layout_pb2.Layout()
    layout.ParseFromString(events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    charts = {chart.title: list(chart.multiline.tag) for page in layout.category for chart in page.chart}
    assert len(charts["every task's evaluation"]) == len(TASKS)
    assert "forgetting" in charts and "training return" in charts


def test_the_run_is_in_the_table_of_runs(events: EventAccumulator) -> None:
    data = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    table: Any = plugin_data_pb2.HParamsPluginData.FromString(data)
    assert table.session_start_info.hparams["agent.use"].string_value == "ppo"
    finals = [name for name in events.Tags()["scalars"] if name.startswith("final/")]
    assert "final/average_performance" in finals and not any(name.startswith("final/final/") for name in finals)
