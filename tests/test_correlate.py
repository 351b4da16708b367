"""Coefficients have their closed forms, intervals cover, and of two monitors the one that predicts is found."""

import csv
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from crl import run, stats
from crl.cli import main
from crl.coefficients import Point, taken
from crl.core import CrlError, Record
from crl.correlate import correlate, find_runs, forgotten, labels, points_of
from crl.correlation_report import Report
from crl.opened import Run, visit_areas
from crl.scatter import Panel, draw_scatters
from crl.sinks import Jsonl
from crl.store import RunFolder

TIED = ([1, 2, 2, 3], [1, 2, 3, 3])
ALL = [stats.pearsons, stats.spearmans, stats.kendalls]


# Coefficients.


@pytest.mark.parametrize(
    ("coefficient", "x", "y", "expected"),
    [
        (stats.pearson, *TIED, 2 / math.sqrt(2 * 2.75)),
        (stats.spearman, *TIED, 5 / 6),  # ranks 1, 2.5, 2.5, 4 and 1, 2, 3.5, 3.5
        (stats.kendall, *TIED, 4 / 5),  # of 6 pairs 4 agree; one is tied in x, one in y
        (stats.pearson, [0, 1, 2, 3], [1, 0, 3, 2], 0.6),
        (stats.spearman, [0, 1, 2, 30], [1, 0, 3, 2], 0.6),
        (stats.kendall, [0, 1, 2, 30], [1, 0, 3, 2], 2 / 6),
    ],
)
def test_closed_forms(
    coefficient: Callable[..., float], x: Sequence[float], y: Sequence[float], expected: float
) -> None:
    assert coefficient(x, y) == pytest.approx(expected, abs=1e-12)
    assert coefficient(y, x) == pytest.approx(expected, abs=1e-12)
    assert coefficient(x, [-value for value in y]) == pytest.approx(-expected, abs=1e-12)
    assert coefficient([1e6 + 1e-3 * value for value in x], y) == pytest.approx(expected, abs=1e-6)


@given(st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=2, max_size=12))
def test_kendall_is_its_definition(pairs: list[tuple[int, int]]) -> None:
    signs = [(np.sign(a[0] - b[0]), np.sign(a[1] - b[1])) for i, a in enumerate(pairs) for b in pairs[:i]]
    x, y = (sum(sign[side] != 0 for sign in signs) for side in (0, 1))
    expected = sum(a * b for a, b in signs) / math.sqrt(x * y) if x and y else math.nan
    assert stats.kendall(*zip(*pairs, strict=True)) == pytest.approx(expected, nan_ok=True)


def test_scipy_agrees() -> None:
    scipy_stats = pytest.importorskip("scipy.stats")
    generator = np.random.default_rng(0)
    for _ in range(20):
        x, y = generator.integers(0, 9, (2, 40))
        assert stats.pearson(x, y) == pytest.approx(scipy_stats.pearsonr(x, y)[0])
        assert stats.spearman(x, y) == pytest.approx(scipy_stats.spearmanr(x, y)[0])
        assert stats.kendall(x, y) == pytest.approx(scipy_stats.kendalltau(x, y)[0])


@pytest.mark.parametrize("constant", [[0.1] * 7, [1e9] * 7, [0.0] * 7])
@pytest.mark.parametrize("coefficient", [stats.pearson, stats.spearman, stats.kendall])
def test_what_does_not_vary_has_no_coefficient(coefficient: Callable[..., float], constant: list[float]) -> None:
    assert math.isnan(coefficient(constant, range(7)))
    assert math.isnan(coefficient(range(7), constant))
    assert math.isnan(stats.line(constant, range(7)).slope)
    assert math.isnan(coefficient([1.0], [1.0]))


@pytest.mark.parametrize("coefficients", ALL)
def test_a_count_is_a_repetition(coefficients: stats.Coefficient) -> None:
    generator = np.random.default_rng(1)
    x, y = generator.integers(0, 5, (2, 30)) + generator.choice([0.0, 0.5], (2, 30))
    counts = generator.poisson(1.0, (30, 50)).astype(float)
    found = coefficients(x, y, counts)
    for resample, value in zip(counts.T.astype(int), found, strict=True):
        again = coefficients(np.repeat(x, resample), np.repeat(y, resample), np.ones((resample.sum(), 1)))
        assert value == pytest.approx(again[0], abs=1e-9)


@pytest.mark.parametrize("coefficients", ALL)
def test_a_resample_of_one_point_has_no_coefficient(coefficients: stats.Coefficient) -> None:
    x = np.array([0.1, 0.7, 1e6])
    counts = np.array([[7.0, 1.0], [0.0, 1.0], [0.0, 1.0]])
    assert np.isnan(coefficients(x, x, counts)).tolist() == [True, False]


def test_blocks_of_pairs_are_all_pairs() -> None:
    generator = np.random.default_rng(0)
    x, y = generator.normal(size=(2, 1100))  # three blocks
    signs = np.sign(x[:, None] - x) * np.sign(y[:, None] - y)
    assert stats.kendall(x, y) == pytest.approx(signs.sum() / (1100 * 1099))


def test_an_exact_line_is_found() -> None:
    x = np.array([3.0, -1.0, 0.5, 8.0])
    found = stats.line(x, 4 - 0.25 * x)
    assert (found.slope, found.intercept, found.r2) == pytest.approx((-0.25, 4, 1))
    assert stats.line([0, 1, 2, 3], [1, 0, 3, 2]).r2 == pytest.approx(0.36)


# Intervals.


def clustered(generator: np.random.Generator, between: float, runs: int = 20, each: int = 8) -> tuple[Any, Any, Any]:
    """Points whose run shifts x and y, independently: neither predicts the other, whatever `between` is."""
    of = np.repeat([f"run-{i}" for i in range(runs)], each)
    x, y = generator.normal(size=(2, runs * each)) + between * np.repeat(generator.normal(size=(2, runs)), each, axis=1)
    return of, x, y


def interval_of(of: Any, x: Any, y: Any, coefficients: stats.Coefficient) -> stats.Correlation:
    counts = stats.resampled(of, 300, np.random.default_rng(0))
    return stats.percentile_interval(math.nan, stats.draws(coefficients, x, y, counts))


def boundaries_only(of: Any) -> Any:
    """The mutant: it takes all boundaries for those of one run."""
    return np.full(len(of), "all")


@pytest.mark.parametrize("coefficients", ALL)
def test_intervals_cover_over_runs_and_a_mutant_without_runs_does_not(coefficients: stats.Coefficient) -> None:
    generator = np.random.default_rng(2)
    right = wrong = 0
    for _ in range(60):
        of, x, y = clustered(generator, between=2.0)
        found, mutant = (interval_of(each, x, y, coefficients) for each in (of, boundaries_only(of)))
        right += found.low <= 0 <= found.high
        wrong += mutant.low <= 0 <= mutant.high
    assert right >= 52  # of 60; 57 would be 95 %
    assert wrong <= 40


def test_intervals_cover_within_one_run() -> None:
    generator = np.random.default_rng(3)
    covered = 0
    for _ in range(100):
        x = generator.normal(size=40)
        y = 0.6 * x + 0.8 * generator.normal(size=40)
        found = interval_of(["only"] * 40, x, y, stats.pearsons)
        covered += found.low <= 0.6 <= found.high
    assert 86 <= covered <= 100


def test_intervals_widen_with_what_is_between_runs() -> None:
    widths = []
    for between in (0.0, 1.0, 4.0):
        generator = np.random.default_rng(4)
        found = [interval_of(*clustered(generator, between), stats.spearmans) for _ in range(10)]
        widths.append(float(np.mean([each.high - each.low for each in found])))
    assert widths[0] * 1.1 < widths[1] and widths[1] * 1.1 < widths[2]


def test_a_run_drawn_twice_brings_its_points_twice() -> None:
    of = ["a"] * 3 + ["b"] * 5
    counts = stats.resampled(of, 500, np.random.default_rng(0))
    assert {(a, b) for a, b in zip(counts[:3].sum(0), counts[3:].sum(0), strict=True)} == {(6, 0), (3, 5), (0, 10)}
    alone = stats.resampled(["a"] * 4, 50, np.random.default_rng(0))
    assert (alone.sum(0) == 4).all() and alone.max() > 1


def test_there_is_no_interval_where_resamples_have_no_coefficient() -> None:
    x = np.array([1.0] + [0.0] * 19)  # one point makes all of it, and a third of the resamples lacks it
    y = np.arange(20.0)
    counts = stats.resampled([str(i) for i in range(20)], 500, np.random.default_rng(0))
    found = stats.percentile_interval(stats.spearman(x, y), stats.draws(stats.spearmans, x, y, counts))
    assert math.isfinite(found.value) and math.isnan(found.low) and str(found).endswith("[–]")


def test_noise_does_not_hold_when_all_are_taken_at_once() -> None:
    generator, alone, at_once = np.random.default_rng(5), 0, 0
    for _ in range(40):
        of, _, y = clustered(generator, between=1.0)
        counts = stats.resampled(of, 300, generator)
        noise = [clustered(generator, between=1.0)[1] for _ in range(12)]
        drawn = np.stack([stats.spearmans(x, y, counts) for x in noise], axis=1)
        held = stats.hold_together([stats.spearman(x, y) for x in noise], drawn)
        each = [stats.percentile_interval(0.0, column) for column in drawn.T]
        alone += any(one.low > 0 or one.high < 0 for one in each)
        at_once += any(held)
    assert at_once <= 6 < 9 <= alone  # of 40; 2 would be 5 %


# Runs.


ORDER = ["a", "b", "c", "a", "b", "c"]


def write_run(
    path: Path,
    matrix: Any,
    init: dict[str, list[Any]],
    end: dict[str, list[Any]],
    areas: Sequence[float] = (),
    order: Sequence[str] = ORDER,
    status: str = "finished",
) -> Path:
    """A run's folder with a matrix, areas, and what monitors saw: a list a name, an entry a visit."""
    folder = RunFolder(path)
    folder.write_manifest({"status": status, "visits": [{"task": task} for task in order]})
    folder.write_matrix(sorted(set(order)), np.asarray(matrix, dtype=float).tolist())
    log = Jsonl(folder.records)
    for phase, seen in (("init", init), ("end", end)):
        for name, values in seen.items():
            for visit, value in enumerate(values, start=1):
                log.write(Record(name, value, 10 * visit, visit, order[visit - 1], phase))
    for visit, area in enumerate(areas, start=1):
        log.write(Record("metrics/area", area, 100, visit, order[visit - 1]))
    log.close()
    return path


def write_runs(root: Path, runs: int = 8) -> Path:
    """Runs in which `sharp/rank` predicts forgetting and learning exactly, and `blunt/noise` nothing."""
    for seed in range(runs):
        generator = np.random.default_rng(seed)
        matrix = generator.uniform(0, 1, (len(ORDER) + 1, 3))
        lost = forgotten(matrix, ["abc".index(task) for task in ORDER])
        areas = generator.uniform(size=len(ORDER)).tolist()
        ends = [0.5, *(5 - 2 * lost[i] for i in range(2, len(ORDER) + 1))]
        noise = generator.normal(size=(2, len(ORDER))).tolist()
        init = {"sharp/rank": [3 * area for area in areas], "blunt/noise": noise[0], "sharp/rank/error": areas}
        init |= {"time/monitor/sharp": areas, "early/number": noise[1], "eval/return": areas}
        write_run(root / f"seed-{seed}", matrix, init, {"sharp/rank": ends, "blunt/noise": noise[1]}, areas)
    return root


def test_the_level_of_a_target_stands_with_its_interval(tmp_path: Path) -> None:
    report = correlate([write_runs(tmp_path / "runs")], tmp_path / "out", resamples=100)
    (said,) = [note for note in report.notes if note.startswith("learning: its interquartile mean")]
    seen = {(p.run, p.visit): p.y for p in report.points if p.target == "learning"}
    table = [[seen[run, visit] for visit in range(2, len(ORDER) + 1)] for run in sorted({run for run, _ in seen})]
    found = stats.iqm_interval(table, np.random.default_rng(0))
    assert f"over 8 runs at 5 visits is {found.mean:.3g}, 95 % interval [{found.low:.3g}, {found.high:.3g}]" in said
    few = correlate([write_runs(tmp_path / "few", runs=3)], tmp_path / "out", resamples=100)
    assert not any("interquartile" in note for note in few.notes), "of three runs there is no middle half"


def read_csv(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


def rows_of(report: Report, target: str) -> dict[str, Any]:
    return {row.predictor: row for row in report.rows if row.target == target}


def test_the_monitor_that_predicts_is_found(tmp_path: Path) -> None:
    report = correlate([write_runs(tmp_path / "runs")], tmp_path / "out", resamples=400)
    forgetting, learning = rows_of(report, "forgetting"), rows_of(report, "learning")
    assert set(forgetting) == {"sharp/rank", "sharp/rank (change)", "blunt/noise", "blunt/noise (change)"}
    assert set(learning) == {"sharp/rank", "blunt/noise", "early/number"}
    sharp = forgetting["sharp/rank"]
    for found in (sharp.spearman, sharp.pearson, sharp.kendall, *sharp.beside.values()):
        assert (found.value, found.low, found.high) == pytest.approx((-1, -1, -1))
    assert (sharp.line.r2, sharp.line.slope, sharp.n, sharp.runs) == pytest.approx((1, -0.5, 40, 8))
    assert sharp.holds and learning["sharp/rank"].holds and learning["sharp/rank"].line.slope == pytest.approx(1 / 3)
    for row in (forgetting["blunt/noise"], learning["blunt/noise"], rows_of(report, "after")["blunt/noise"]):
        assert not row.holds and abs(row.spearman.value) < 0.5 and row.spearman.low < row.spearman.high
    assert 0 < abs(forgetting["sharp/rank (change)"].spearman.value) < 1


def test_the_report_is_a_table_two_csvs_and_two_figures(tmp_path: Path) -> None:
    report = correlate([write_runs(tmp_path / "runs")], tmp_path / "out", resamples=200)
    text = report.table()
    assert text.index("| sharp/rank ") < text.index("| blunt/noise")
    assert "\nafter: " not in text
    assert "early (`at: [init, end]` has both)" in text and "4 predictors were tested" in text
    widths = {len(line) for line in text[text.index("forgetting: mean") :].splitlines() if line.startswith("|")}
    assert len(widths) == 1
    rows = read_csv(tmp_path / "out" / "correlation.csv")
    assert {row["target"] for row in rows} == {"learning", "after", "forgetting"}
    assert float(rows[0]["spearman_low"]) == pytest.approx(1) and rows[0]["holds"] == "1"
    points = read_csv(tmp_path / "out" / "points.csv")
    assert len(points) == 8 * 5 * (3 + 3 + 4) and {point["run"] for point in points} >= {"seed-0", "seed-7"}
    for name in ("learning", "forgetting"):
        with Image.open(tmp_path / "out" / f"{name}.png") as image:
            assert image.width > 500 and len(np.unique(np.asarray(image))) > 20


def test_it_is_the_same_every_time(tmp_path: Path) -> None:
    runs = write_runs(tmp_path / "runs", runs=3)
    for out in ("one", "two"):
        correlate([runs], tmp_path / out, resamples=200)
    assert (tmp_path / "one/correlation.csv").read_bytes() == (tmp_path / "two/correlation.csv").read_bytes()


def test_one_run_says_what_its_intervals_are_of(tmp_path: Path) -> None:
    report = correlate([write_runs(tmp_path / "runs", runs=1)], tmp_path / "out", resamples=200)
    assert "one run" in report.table() and "nothing of other runs" in report.table()
    assert rows_of(report, "forgetting")["sharp/rank"].runs == 1


def test_few_points_and_constants_have_a_reason(tmp_path: Path) -> None:
    short = write_run(
        tmp_path / "run", np.eye(4, 3), {"rank/x": [1.0, 2.0, 3.0]}, {"rank/x": [1.0, 1.0, 1.0]}, [1, 2, 3], ORDER[:3]
    )
    report = correlate([short], tmp_path / "out", resamples=100)
    assert {row.reason for row in report.rows} == {"fewer than 4 points"}
    assert "no predictor has 4 points that vary" in report.table()
    constant = write_run(tmp_path / "constant", np.eye(7, 3), {"rank/x": [1.0] * 6}, {}, range(6))
    report = correlate([constant], tmp_path / "out", resamples=100)
    assert rows_of(report, "learning")["rank/x"].reason == "the number does not vary"
    assert "the number does not vary: rank/x" in report.table()


# What a point is.


def test_forgetting_is_from_the_best_since_training_began() -> None:
    matrix = np.array([[9, 9, 9], [4, 0, 0], [5, 6, 0], [1, 7, 2], [8, 3, 1]], dtype=float)
    # after visit 3 (task 2): task 0 had 5 and has 1, task 1 had 6 and has 7; after visit 4 task 0 is back: only 1 and 2
    assert forgotten(matrix, [0, 1, 2, 0]) == {2: -1.0, 3: pytest.approx(1.5), 4: pytest.approx((4 + 1) / 2)}


def test_forgetting_passes_over_what_is_missing() -> None:
    matrix = np.array([[0, 0, 0], [math.nan, 0, 0], [3, 5, 0], [1, math.nan, 2]])
    found = forgotten(matrix, [0, 1, 2])
    assert math.isnan(found[2]) and found[3] == 2.0
    assert math.isnan(forgotten(np.ones((3, 1)), [0, 0])[2])  # a task that is visited again is not another


def test_points_have_the_number_of_their_own_boundary(tmp_path: Path) -> None:
    matrix = [[0, 0, 0], [4, 0, 0], [1, 5, 0], [0, 2, 6]]
    seen = {"m/x": [10.0, 20.0, math.nan], "m/list": [[1.0, 2.0]] * 3, "m": [math.nan] * 3}
    path = write_run(tmp_path / "run", matrix, seen, {"m/x": [1.0, 4.0, 9.0]}, [7, 8, math.nan], ORDER[:3])
    found = {(p.target, p.predictor, p.visit): (p.x, p.y) for p in points_of(Run(path), "run")}
    assert found == {
        ("learning", "m/x", 2): (20, 8),
        ("after", "m/x", 2): (20, 5),
        ("forgetting", "m/x", 2): (4, 3),
        ("forgetting", "m/x", 3): (9, 3.5),
        ("forgetting", "m/x (change)", 2): (3, 3),
        ("forgetting", "m/x (change)", 3): (5, 3.5),
    }


def test_a_run_that_was_stopped_has_the_visits_that_are_over(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", np.eye(4, 3), {"m/x": [1.0, 2.0, 3.0, 4.0]}, {}, status="interrupted")
    log = Jsonl(path / "metrics.jsonl", (path / "metrics.jsonl").stat().st_size)
    for visit in (1, 2, 3, 4):
        for tick in (1, 2):
            step = 2 * visit - 2 + tick
            log.write(Record("train/return", float(visit), step, visit))
            log.write(Record("walk/visit", float(visit), step, visit))
    log.close()
    found = [(p.visit, p.y) for p in points_of(Run(path), "run") if p.target == "learning"]
    assert found == [(2, 2.0), (3, 3.0)]  # the areas are computed, as none was logged; visit 4 is not over


def test_a_real_walk_gives_points(tmp_path: Path) -> None:
    tasks = [{"env": "CartPole-v1", "steps": 4096, "name": name} for name in ("a", "b")]
    agent = {"use": "ppo", "n_steps": 128, "batch_size": 512, "n_epochs": 1}
    settings = {"name": "w", "tasks": tasks, "repeat": 2, "agent": agent, "monitors": ["norms", "erank"]}
    settings |= {"engine": {"kind": "sync", "envs": 4}, "evaluation": {"episodes": 2}}
    walked = run.train(settings, out=tmp_path / "runs")
    report = correlate(walked.path, tmp_path / "out", resamples=200)
    own = {p.visit: p for p in report.points if (p.target, p.predictor) == ("learning", "norms/actor/weight_norm")}
    areas = visit_areas(walked)
    assert {i: p.y for i, p in own.items()} == {i: areas[i - 1].value for i in (2, 3, 4)}
    assert {p.task for p in own.values()} == {"a", "b"}
    assert {(p.target, p.visit) for p in report.points} >= {("after", 4), ("forgetting", 2), ("forgetting", 4)}
    assert not any("time/" in p.predictor or "eval/" in p.predictor for p in report.points)


def points(numbers: Sequence[tuple[str, int, float, float]]) -> list[Point]:
    return [Point(run, visit, "t", "learning", "m/x", x, y) for run, visit, x, y in numbers]


def test_within_takes_away_what_a_run_is_as_a_whole() -> None:
    given_ = points([("p", 2, 1, 9), ("p", 3, 2, 8), ("q", 2, 11, 19), ("q", 3, 12, 18), ("r", 2, 50, 50)])
    x, y, kept = taken(given_, "within")
    assert (x.tolist(), y.tolist(), kept) == ([-0.5, 0.5] * 2, [0.5, -0.5] * 2, [0, 1, 2, 3])
    pooled = taken(given_, "pooled")
    assert stats.pearson(pooled[0], pooled[1]) > 0.9 and stats.pearson(x, y) == -1


def test_same_visit_takes_away_what_drifts_with_visits() -> None:
    given_ = points([(run, i, i + off, 10 * i - off) for run, off in (("p", 0.0), ("q", 0.5)) for i in (2, 3, 4)])
    assert stats.pearson(*taken(given_, "pooled")[:2]) > 0.9
    assert stats.pearson(*taken(given_, "same visit")[:2]) == pytest.approx(-1)


def test_rounding_makes_no_ranks() -> None:
    given_ = points([("p", i, 0.1, float(i)) for i in range(2, 9)])
    assert taken(given_, "within")[0].tolist() == [0.0] * 7


def test_within_can_be_the_default_and_is_said_so(tmp_path: Path) -> None:
    for seed, level in enumerate((0.0, 100.0, 200.0)):
        areas = [level - i for i in range(6)]
        write_run(tmp_path / "runs" / f"s{seed}", np.eye(7, 3), {"m/x": [level + i for i in range(6)]}, {}, areas)
    pooled = rows_of(correlate([tmp_path / "runs"], tmp_path / "out", resamples=100), "learning")["m/x"]
    report = correlate([tmp_path / "runs"], tmp_path / "out", resamples=100, within=True)
    within = rows_of(report, "learning")["m/x"]
    assert pooled.spearman.value > 0.7 and pooled.beside["within"].value == pytest.approx(-1)
    assert within.spearman.value == pytest.approx(-1) and within.beside["pooled"] == pooled.spearman
    assert "deviations from the run's own mean" in report.table()
    head = (tmp_path / "out" / "correlation.csv").read_text().splitlines()[0]
    assert "pooled_low" in head and "within" not in head


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs, out = str(write_runs(tmp_path / "runs", runs=2)), str(tmp_path / "out")
    assert main(["correlate", runs, "--out", out, "--resamples", "100", "--within"]) == 0
    assert "| pooled |" in capsys.readouterr().out and (tmp_path / "out" / "forgetting.png").is_file()
    assert main(["correlate", runs, "--resamples", "3"]) == 2
    assert "at least 100" in capsys.readouterr().err


# Folders.


def test_runs_are_found_once_and_baselines_are_none(tmp_path: Path) -> None:
    runs = write_runs(tmp_path / "runs", runs=2)
    write_runs(runs / "seed-0" / "baseline", runs=1)
    assert [path.name for path in find_runs([runs, runs / "seed-1"])] == ["seed-0", "seed-1"]


def test_no_run_is_one_line(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(CrlError, match=r"no run is here, nor below"):
            correlate([path], tmp_path / "out")
    with pytest.raises(CrlError, match="at least one run"):
        correlate([], tmp_path / "out")
    with pytest.raises(CrlError, match="at least 100"):
        correlate([write_runs(tmp_path / "runs", runs=1)], tmp_path / "out", resamples=3)
    assert not (tmp_path / "out").exists()


def test_a_run_that_cannot_be_read_is_left_out_and_named(tmp_path: Path) -> None:
    runs = write_runs(tmp_path / "runs", runs=3)
    (runs / "seed-0" / "matrix.csv").unlink()
    (runs / "seed-1" / "metrics.jsonl").write_text("no record\n")
    report = correlate([runs], tmp_path / "out", resamples=100)
    notes = [note for note in report.notes if note.startswith("left out")]
    assert (
        len(notes) == 2
        and "seed-0" in notes[0]
        and "matrix.csv: cannot be read" in notes[0]
        and "seed-1" in notes[1]
        and "line 1" in notes[1]
    )
    (runs / "seed-2" / "manifest.json").write_text(json.dumps({"status": "new"}))
    with pytest.raises(CrlError, match=r"nothing to correlate.*seed-0"):
        correlate([runs], tmp_path / "out", resamples=100)


def test_labels_differ_where_runs_do() -> None:
    assert labels([Path("/r/m/ppo/seed-0"), Path("/r/m/dqn/seed-1")]) == ["ppo/seed-0", "dqn/seed-1"]
    assert labels([Path("/r/seed-0"), Path("/r/m/seed-0")]) == ["seed-0", "m/seed-0"]


def test_different_tasks_are_said_to_be(tmp_path: Path) -> None:
    runs = write_runs(tmp_path / "runs", runs=1)
    write_run(runs / "other", np.eye(7, 2), {"m/x": list(range(6))}, {}, range(6), ["y", "z"] * 3)
    assert "do not have the same tasks" in correlate([runs], tmp_path / "out", resamples=100).table()


# Figures.


@pytest.mark.parametrize("runs", [1, 10, 40])
def test_a_figure_has_at_most_a_dozen_panels_and_few_colours_in_its_legend(runs: int) -> None:
    generator = np.random.default_rng(0)
    of = [f"arm-{i % 4}/seed-{i}" for i in range(runs)]
    panels = [Panel(f"m{i}/x", "R² 0", *generator.normal(size=(2, runs)), of, 1.0, 0.0) for i in range(30)]
    figure = draw_scatters(panels, "title", "area")
    assert len([axes for axes in figure.axes if axes.get_visible()]) == 12
    assert len(figure.legends[0].get_texts()) == (runs if runs <= 10 else 4)


def test_a_figure_without_panels_says_so() -> None:
    assert "no predictor" in draw_scatters([], "title", "area").texts[-1].get_text()
