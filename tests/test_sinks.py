"""Records go to files and come back; the views show what they were given."""

from __future__ import annotations

import io
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import plugin_data_pb2

from crl.core import CrlError, Record
from crl.pictures import draw_matrix, number, short
from crl.sinks import Jsonl, TensorBoard, read_records, tag
from crl.terminal import Terminal

EMPTY, DOOR = "MiniGrid-Empty-5x5-v0", "MiniGrid-DoorKey-5x5-v0"
ROWS = [[0.1, math.nan], [0.9, 0.2], [0.5, 0.8]]
NAMES = ["before", f"1 {EMPTY}", f"2 {DOOR}"]


def record(step: int, value: float | list[float] = 1.0, name: str = "train/return", **more: Any) -> Record:
    return Record(name, value, step, visit=1, **more)


def test_importing_the_sinks_loads_no_view() -> None:
    views = ("tensorboard", "matplotlib", "torch.utils.tensorboard")
    code = f"import sys, crl.sinks; sys.exit(str([name for name in {views} if name in sys.modules] or ''))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == ""


def test_records_come_back_as_they_were(tmp_path: Path) -> None:
    written = [
        record(1, 0.1 + 0.2, task=EMPTY, phase="baseline"),
        record(2, [1.0, math.inf, -math.inf, 1e-300]),
        record(3, -math.inf),
        record(4, []),
        record(5, name="Straße"),
    ]
    log = Jsonl(tmp_path / "new" / "records.jsonl")
    for item in [*written, record(6, math.nan), record(7, [math.nan, 2.0])]:
        log.write(item)
    log.close()
    *back, lone, array = read_records(tmp_path / "new" / "records.jsonl")
    assert back == written
    assert isinstance(lone.value, float) and math.isnan(lone.value)
    assert isinstance(array.value, list) and math.isnan(array.value[0]) and array.value[1] == 2.0
    text = (tmp_path / "new" / "records.jsonl").read_text()
    assert re.search(r'"value": "NaN"', text) and not re.search(r": (NaN|-?Infinity)", text)


def test_an_offset_cuts_the_log_back(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    log = Jsonl(path)
    log.write(record(1))
    offset = log.offset
    assert offset == path.stat().st_size > 0
    log.write(record(2))
    log.close()
    log = Jsonl(path, offset)
    assert log.offset == offset
    log.write(record(3))
    log.close()
    log.close()
    assert [item.step for item in read_records(path)] == [1, 3]
    Jsonl(path, 0).close()
    assert read_records(path) == []


@pytest.mark.parametrize("wrong", [5, 10_000])
def test_an_offset_that_fits_no_record_changes_nothing(tmp_path: Path, wrong: int) -> None:
    path = tmp_path / "records.jsonl"
    log = Jsonl(path)
    log.write(record(1))
    log.close()
    before = path.read_bytes()
    with pytest.raises(CrlError, match=f"byte {wrong}"):
        Jsonl(path, wrong)
    assert path.read_bytes() == before


def test_a_half_written_line_is_passed_over_and_then_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    log = Jsonl(path)
    log.write(record(1))
    log.close()
    with path.open("ab") as file:
        file.write(b'{"name": "train/ret')
    assert [item.step for item in read_records(path)] == [1]
    log = Jsonl(path)
    log.write(record(2))
    log.close()
    assert [item.step for item in read_records(path)] == [1, 2]


@pytest.mark.parametrize(
    "line",
    [
        "half a li",
        "",
        "[1, 2]",
        '{"name": "x", "step": 1, "visit": 1}',
        '{"name": "x", "value": "much", "step": 1, "visit": 1, "task": "", "phase": ""}',
        '{"name": "x", "value": 1.0, "step": 1, "visit": 1, "task": "", "phase": "", "more": 1}',
    ],
)
def test_a_malformed_line_is_refused_with_its_number(tmp_path: Path, line: str) -> None:
    path = tmp_path / "records.jsonl"
    log = Jsonl(path)
    log.write(record(1))
    log.close()
    with path.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(CrlError, match="line 2"):
        read_records(path)


def test_tags() -> None:
    assert tag(record(0, task=EMPTY)) == "train/return"
    assert tag(record(0, task=EMPTY, phase="baseline")) == f"train/return/{EMPTY}"
    assert tag(record(0, name="eval/return", task=EMPTY)) == f"eval/{EMPTY}"
    assert tag(record(0, name="eval/return", task=EMPTY, phase="end")) == f"eval/{EMPTY}"
    assert tag(record(0, name="eval/length", task=EMPTY)) == f"eval/length/{EMPTY}"
    assert tag(record(0, name="rank", task=EMPTY, phase="init")) == "rank/init"
    assert tag(record(0, name="metrics/forgetting")) == "metrics/forgetting"


def accumulate(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0, "histograms": 0, "tensors": 0})
    return events.Reload()


def test_tensorboard_shows_what_it_was_given(tmp_path: Path) -> None:
    (tmp_path / "events.out.tfevents.1.old").write_bytes(b"an older view")
    (tmp_path / "records.jsonl").write_text("kept")
    board = TensorBoard(tmp_path, [EMPTY, DOOR])
    for step, value in ((10, 0.25), (20, math.nan), (30, 0.75)):
        board.write(record(step, value, name="eval/return", task=EMPTY))
    board.write(record(30, [0.0, 1.0, math.nan, 5.0], name="weights", phase="end"))
    board.write(record(30, [math.nan], name="nothing"))
    board.matrix(30, ROWS, NAMES, [EMPTY, DOOR], [0, 1])
    board.hparams({"lr": 0.1, "seed": 1, "hidden": [64, 64], "told": True}, {"forgetting": 0.5})
    board.flush()
    board.close()

    assert not (tmp_path / "events.out.tfevents.1.old").exists() and (tmp_path / "records.jsonl").exists()
    events = accumulate(tmp_path)
    tags = events.Tags()
    assert set(tags["scalars"]) == {f"eval/{EMPTY}", "final/forgetting"}
    curve = events.Scalars(f"eval/{EMPTY}")
    assert [point.step for point in curve] == [10, 20, 30]
    assert curve[0].value == 0.25 and math.isnan(curve[1].value) and curve[2].value == 0.75
    assert tags["histograms"] == ["weights/end"]
    seen = events.Histograms("weights/end")[0].histogram_value
    assert (seen.num, seen.min, seen.max) == (3, 0, 5)
    assert tags["images"] == ["walk/matrix"]
    image = events.Images("walk/matrix")[0]
    assert image.encoded_image_string.startswith(b"\x89PNG") and image.width > 200 and image.height > 200
    start = plugin_data_pb2.HParamsPluginData.FromString(
        events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    )
    values = start.session_start_info.hparams
    assert values["lr"].number_value == 0.1 and values["told"].string_value == "True"
    assert values["hidden"].string_value == "[64, 64]"
    assert [item.name for item in tmp_path.iterdir() if item.is_dir()] == []


def test_the_layout_picks_each_curve_and_no_other(tmp_path: Path) -> None:
    TensorBoard(tmp_path, ["Pole", "Pole", "Pole long", "C++"]).close()
    layout = layout_pb2.Layout.FromString(
        accumulate(tmp_path).Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0]
    )
    charts = {chart.title: list(chart.multiline.tag) for part in layout.category for chart in part.chart}
    assert [part.title for part in layout.category] == ["The walk", "What it kept", "Inside, by visit"]
    assert list(charts)[:3] == ["every task's evaluation", "training return", "task being visited"]

    def drawn(chart: str, *names: str) -> list[str]:
        return [name for name in names if any(re.match(pattern, name) for pattern in charts[chart])]

    every = [tag(record(0, name="eval/return", task=task)) for task in ("Pole", "Pole long", "C++")]
    assert len(charts["every task's evaluation"]) == 3
    assert drawn("every task's evaluation", *every, "eval/Pole short", "eval/length/Pole") == every
    assert drawn("training return", "train/return", "train/return/Pole") == ["train/return"]
    ranks = [f"hessian/{network}/epsilon_rank_0.01/init" for network in ("actor", "all")]
    chart = next(title for title in charts if title.startswith("Hessian"))
    assert drawn(chart, *ranks, "hessian/actor/epsilon_rank_0.1/init", "ggn/actor/epsilon_rank_0.01/init") == ranks
    assert drawn("transfer", "metrics/forward_transfer", "metrics/transfer", "metrics/forgetting") == [
        "metrics/forward_transfer",
        "metrics/transfer",
    ]


def test_a_resume_builds_the_view_again(tmp_path: Path) -> None:
    for count in (5, 2):
        board = TensorBoard(tmp_path, [EMPTY])
        for step in range(count):
            board.write(record(step))
        board.close()
    assert [point.step for point in accumulate(tmp_path).Scalars("train/return")] == [0, 1]


def test_the_matrix_is_labelled_boxed_and_numbered() -> None:
    figure = draw_matrix(ROWS, NAMES, [EMPTY, DOOR], [0, 1])
    axes = figure.axes[0]
    assert [text.get_text() for text in axes.texts] == ["0.10", "–", "0.90", "0.20", "0.50", "0.80"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["Empty-5x5", "DoorKey-5x5"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["before", "1 Empty-5x5", "2 DoorKey-5x5"]
    boxes: Any = axes.patches
    corners = [(round(box.get_x() + 0.5), round(box.get_y() + 0.5)) for box in boxes]
    assert corners == [(0, 1), (1, 2)]


@pytest.mark.parametrize("rows", [[[math.nan, math.nan]], [[1.0, 1.0]]])
def test_a_matrix_without_contrast_is_drawn(rows: list[list[float]]) -> None:
    draw_matrix(rows, ["before"], [EMPTY, DOOR], [])


def test_short_names_and_numbers() -> None:
    assert (short(DOOR), short("CartPole-v1")) == ("DoorKey-5x5", "CartPole-v1")
    assert [number(value) for value in (0.8349, -12.34, 1234.5, math.nan)] == ["0.83", "-12.3", "1234", "–"]


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Tty(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(autouse=True)
def eighty_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")


def walk(terminal: Terminal, clock: Clock, ticks: int = 40) -> None:
    """Two visits, a tick of 100 steps each second."""
    for visit, task in enumerate((EMPTY, DOOR), 1):
        terminal.start(visit, task, 100 * ticks, 100 * ticks * (visit - 1))
        for tick in range(1, ticks + 1):
            clock.now += 1
            terminal.progress(100 * tick, 0.5)
        terminal.boundary(visit, task, {EMPTY: 0.9, DOOR: math.nan})


def test_plain_lines_are_few(clock: Clock) -> None:
    stream = io.StringIO()
    terminal = Terminal(2, 8000, stream, clock=clock)
    walk(terminal, clock)
    terminal.close()
    lines = stream.getvalue().splitlines()
    assert "\r" not in stream.getvalue() and "\x1b" not in stream.getvalue()
    assert lines[0] == "1/2 Empty-5x5 2%, walk 1%, 100 steps/s, 1m19s left, return 0.50"
    progress = [line for line in lines if "steps/s" in line]
    assert len(progress) == 8
    assert [line for line in lines if line not in progress] == [
        "after 1/2 | *Empty-5x5 0.90  DoorKey-5x5 –",
        "after 2/2 | Empty-5x5 0.90  *DoorKey-5x5 –",
    ]


@pytest.mark.parametrize("columns", [20, 40, 80, 200])
def test_a_live_line_is_redrawn_and_fits(clock: Clock, monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    stream = Tty()
    terminal = Terminal(2, 8000, stream, clock=clock)
    terminal.start(1, EMPTY, 4000, 0)
    for tick in range(1, 101):
        clock.now += 0.01
        terminal.progress(10 * tick, 0.5)
    drawn = [part.removesuffix("\x1b[K") for part in stream.getvalue().split("\r")[1:]]
    assert 9 <= len(drawn) <= 11 and "\n" not in stream.getvalue()
    assert all(len(line) < columns for line in drawn)
    if columns >= 80:
        assert "━" in drawn[-1] and "return 0.50" in drawn[-1] and "1,000 steps/s" in drawn[-1]


def test_a_note_stands_above_the_live_line(clock: Clock) -> None:
    stream = Tty()
    terminal = Terminal(2, 8000, stream, clock=clock)
    terminal.start(1, EMPTY, 4000, 0)
    clock.now += 1
    terminal.progress(400)
    live = stream.getvalue()
    terminal.note("saved")
    assert stream.getvalue() == live + "\r\x1b[Ksaved\n" + live
    terminal.close()
    terminal.close()
    assert stream.getvalue() == live + "\r\x1b[Ksaved\n" + live + "\r\x1b[K"


def test_a_resumed_visit_counts_only_its_new_steps(clock: Clock) -> None:
    stream = io.StringIO()
    terminal = Terminal(2, 8000, stream, clock=clock)
    terminal.start(1, EMPTY, 4000, 0, done=3000)
    terminal.progress(3000)
    clock.now += 10
    terminal.progress(3500)
    first, second = stream.getvalue().splitlines()
    assert "– left" in first and "return –" in first
    assert "50 steps/s" in second and "1m30s left" in second


def test_verbosity(clock: Clock) -> None:
    said = {}
    for verbosity in (-1, 0, 1):
        stream = Tty()
        terminal = Terminal(2, 8000, stream, verbosity, clock)
        walk(terminal, clock, 2)
        terminal.numbers({"losses/policy": 0.123456})
        terminal.table(ROWS, NAMES, [EMPTY, DOOR], {"forgetting": 0.4})
        terminal.close()
        said[verbosity] = stream.getvalue()
    assert said[-1] == ""
    assert "losses/policy 0.1235" in said[1] and "losses" not in said[0]


def test_the_table_is_aligned(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Tty()
    terminal = Terminal(2, 8000, stream, clock=clock)
    terminal.table(ROWS, NAMES, [EMPTY, DOOR], {"forgetting": 0.4, "average performance": math.nan})
    assert stream.getvalue().splitlines() == [
        "               Empty-5x5  DoorKey-5x5",
        "before              0.10            –",
        "1 Empty-5x5         0.90         0.20",
        "2 DoorKey-5x5       0.50         0.80",
        "",
        "forgetting              0.40",
        "average performance        –",
    ]
    monkeypatch.setenv("COLUMNS", "30")
    terminal.table(ROWS, NAMES, [EMPTY, DOOR], {})
    assert stream.getvalue().splitlines()[7:] == [
        "                  1     2",
        "before         0.10     –",
        "1 Empty-5x5    0.90  0.20",
        "2 DoorKey-5x5  0.50  0.80",
        "",
        "1 = Empty-5x5",
        "2 = DoorKey-5x5",
    ]
