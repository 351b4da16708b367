"""Intervals over few runs hold what they say, by simulation, and a percentile bootstrap in their place is caught."""

import itertools
import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from crl import stats
from crl.bench import coverage, tables

Bounds = Callable[[Any], tuple[Any, Any]]

TABLED = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 9: 2.262, 10: 2.228, 19: 2.093, 30: 2.042, 120: 1.980}
TABLED_99 = {1: 63.657, 2: 9.925, 4: 4.604, 9: 3.250, 10: 3.169, 30: 2.750}


def test_quantiles_of_t_are_those_of_the_tables() -> None:
    for freedom, expected in TABLED.items():
        assert stats.t_quantile(0.975, freedom) == pytest.approx(expected, abs=6e-4)
    for freedom, expected in TABLED_99.items():
        assert stats.t_quantile(0.995, freedom) == pytest.approx(expected, abs=6e-4)
    assert stats.t_quantile(0.5, 7) == pytest.approx(0, abs=1e-9)


def test_hall_s_transformation_is_undone() -> None:
    for lean, value in itertools.product((-1.0, -0.3, 1e-3, 0.5, 2.0), (-4.3, -2.0, 2.0, 12.7)):
        roots = np.roots([lean**2 / 27, lean / 3, 1.0, lean / 6 - value])  # the polynomial as Hall has it
        (real,) = roots[np.abs(roots.imag) < 1e-6 * np.abs(roots).max()].real
        assert float(stats.unlean(value, np.array(lean))) == pytest.approx(real, rel=1e-5)
    assert stats.unlean(2.0, np.array([0.0, 1e-9])).tolist() == pytest.approx([2.0, 2.0])


def test_without_skewness_it_is_the_t_interval_and_with_it_only_the_long_side_grows() -> None:
    even = stats.interval([1.0, 2.0, 3.0])
    reach = 4.3027 / 3**0.5
    assert (even.low, even.mean, even.high, even.runs) == pytest.approx((2 - reach, 2, 2 + reach, 3), abs=1e-3)
    skewed = stats.interval([0.0, 0.0, 0.0, 1.0])  # mean 1/4, standard error 1/4, skewness 2, so G is 1
    assert skewed.low == pytest.approx(0.25 - 3.1824 / 4, abs=1e-3)
    assert skewed.high == pytest.approx(0.25 + 3 * (1 + np.cbrt(3.1824 + 1 / 6 - 1)) / 4, abs=1e-3)


def test_it_moves_with_the_values_and_not_with_their_order() -> None:
    values = np.random.default_rng(0).exponential(size=7)
    found, mirrored = stats.interval(values), stats.interval(-values[::-1])
    assert (mirrored.low, mirrored.mean, mirrored.high) == pytest.approx((-found.high, -found.mean, -found.low))
    scaled = stats.interval(1e5 + 30 * values)
    assert scaled.low == pytest.approx(1e5 + 30 * found.low) and scaled.high == pytest.approx(1e5 + 30 * found.high)
    assert found == stats.interval(values) and found.low < found.mean < found.high


def test_it_ends_where_the_number_can_go_no_further() -> None:
    values = [0.0, 0.0, 0.0, 1.0]
    free, cut = stats.interval(values), stats.interval(values, possible=(0.0, 1.0))
    assert free.low < 0 and free.high > 1 and (cut.low, cut.mean, cut.high) == (0.0, 0.25, 1.0)


def test_one_run_has_no_interval_and_equal_ones_have_a_point() -> None:
    none, one, broken = stats.interval([]), stats.interval([3.0]), stats.interval([1.0, math.nan])
    assert (none.runs, one.runs, one.mean) == (0, 1, 3.0)
    assert all(math.isnan(end) for found in (none, one, broken) for end in (found.low, found.high))
    for value in (0.1, -1e9, 0.0):
        point = stats.interval([value] * 7)
        assert point.low == point.mean == point.high == pytest.approx(value)
    two = stats.interval([0.0, 1.0])
    assert (two.low, two.high) == pytest.approx((0.5 - 12.706 / 2, 0.5 + 12.706 / 2), abs=1e-3)


# Coverage.


def short_of(bounds: Bounds, samples: int = 4000) -> set[str]:
    """On which symmetric data, and with how many runs, the mean is held in less than 93 % of cases."""
    found = {}
    for runs in (3, 5, 10, 20):
        for name in ("normal", "t(3)", "uniform"):
            draw, truth = coverage.DISTRIBUTIONS[name]
            rows = draw(np.random.default_rng([7, runs]), (samples, runs))
            found[f"{name}, {runs}"] = coverage.held(bounds(rows), truth)
        if runs >= 5:  # two values: the chance of each number of ones is known
            ones = np.array([[float(i < count) for i in range(runs)] for count in range(runs + 1)])
            low, high = bounds(ones)
            chances = [100 * math.comb(runs, count) / 2**runs for count in range(runs + 1)]
            found[f"50/50, {runs}"] = float(np.dot(chances, (low <= 0.5 + 1e-9) & (high >= 0.5 - 1e-9)))
    return {name for name, held in found.items() if held < coverage.MARK}


def percentile_bootstrap(rows: Any) -> tuple[Any, Any]:
    """The mutant."""
    taken = np.random.default_rng(0).integers(rows.shape[1], size=(200, rows.shape[1]))
    drawn = rows[:, taken].mean(axis=2)
    return np.quantile(drawn, 0.025, axis=1), np.quantile(drawn, 0.975, axis=1)


def test_it_holds_the_mean_of_symmetric_runs_and_the_percentile_bootstrap_does_not() -> None:
    assert not short_of(stats.wider_of_t_and_hall)
    mutant = short_of(percentile_bootstrap, samples=300)
    assert mutant >= {f"{name}, {runs}" for name in ("normal", "t(3)", "uniform") for runs in (3, 5)}


def test_on_skewed_runs_it_holds_more_than_student_s_and_less_than_it_says() -> None:
    for name, runs in itertools.product(coverage.SKEWED, (3, 5, 10, 20)):
        draw, truth = coverage.DISTRIBUTIONS[name]
        rows = draw(np.random.default_rng([8, runs]), (4000, runs))
        error = stats.t_quantile(0.975, runs - 1) * rows.std(1, ddof=1) / math.sqrt(runs)
        student = coverage.held((rows.mean(1) - error, rows.mean(1) + error), truth)
        mine = coverage.held(stats.wider_of_t_and_hall(rows), truth)
        assert mine > student + 2 and mine == pytest.approx(stats.HELD[runs][1], abs=7)


def test_the_bench_measures_every_candidate_and_its_choice_is_by_the_rule() -> None:
    assert all(
        set(coverage.measure(runs, name, 20, 20)) == set(coverage.CANDIDATES)
        for runs, name in ((3, "80/20"), (5, "normal"))
    )
    published = json.loads((tables.RESULTS / "coverage.json").read_text())
    assert coverage.best(published["mean"]) == coverage.CHOSEN
    for runs, (even, skewed, rare) in stats.HELD.items():
        cells = {name: each[coverage.CHOSEN]["held"] for name, each in published["mean"][str(runs)].items()}
        symmetric = [cells[name] for name in coverage.SYMMETRIC if runs >= 5 or not name.startswith("50/50")]
        groups = symmetric, [cells[name] for name in coverage.SKEWED], [cells[name] for name in coverage.RARE]
        assert [even, skewed, rare] == [math.floor(min(group)) for group in groups]


def test_what_is_said_of_the_interquartile_mean_is_what_was_published() -> None:
    published = json.loads((tables.RESULTS / "coverage.json").read_text())["iqm"]
    for runs, said in stats.HELD_IQM.items():
        least = [min(cell[tasks]["whole runs, widened"] for cell in published[str(runs)].values())
                 for tasks in ("one task", "five tasks, correlated")]  # fmt: skip
        assert [*said] == [math.floor(value) for value in least]


def test_a_caption_says_what_so_few_runs_hold() -> None:
    assert stats.caption(1) == ""
    assert all(str(percent) in stats.caption(5) for percent in stats.HELD[5])
    assert "5 runs" in stats.caption(5) and str(stats.HELD[5][2]) in stats.caption(7)
    assert str(stats.HELD[20][1]) in stats.caption(400)
    assert "interquartile" not in stats.caption(5) + stats.caption(3, middle=True)
    assert all(f"{percent} %" in stats.caption(5, middle=True).partition("inter")[2] for percent in stats.HELD_IQM[5])


# The interquartile mean.


def test_its_interval_is_that_of_all_draws() -> None:
    values = [0.0, 1.0, 3.0, 7.0]
    every = np.sort(np.array(list(itertools.product(values, repeat=4))), axis=1)[:, 1:3].mean(axis=1)
    found = stats.iqm_interval(values, np.random.default_rng(0), share=0.5)
    assert found.mean == 2.0 and found.runs == 4
    tail = stats.widened(4, share=0.5)[0]
    exact = np.quantile(every, [tail, 1 - tail])
    assert (found.low, found.high) == pytest.approx(exact, abs=0.51), "values lie half a unit apart there"
    t, share = 3.1824, stats.widened(4)[0]
    assert share == pytest.approx(math.erfc(t * math.sqrt(4 / 3) / math.sqrt(2)) / 2, rel=1e-3)


def test_a_draw_keeps_each_task_s_scores_apart() -> None:
    table = np.repeat([[0.0, 10.0, 20.0, 30.0]], 6, axis=0)
    for whole in (True, False):
        found = stats.iqm_interval(table, np.random.default_rng(0), whole)
        assert found.low == found.mean == found.high == 15.0, "no task is drawn more often than another"
    opposite = np.arange(8.0)[:, None] * [1.0, -1.0]  # a run is as good on one task as it is bad on the other
    together, apart = (stats.iqm_draws(opposite, np.random.default_rng(0), whole, 300) for whole in (True, False))
    assert np.abs(together).max() == pytest.approx(0) and np.abs(apart).max() > 0.3


def test_scores_of_one_walk_are_drawn_together_and_the_mutant_that_does_not_is_too_narrow() -> None:
    found = coverage.measure_iqm(10, "normal", "five tasks, correlated", samples=150, draws=150)
    assert found["whole runs, widened"] >= 88 and found["widened"] < 88 and found["as published"] < 83


def test_few_runs_have_no_middle_half() -> None:
    assert math.isnan(stats.iqm_interval([1.0, 2.0, 3.0], np.random.default_rng(0)).low)
    assert math.isnan(stats.iqm([1.0, math.nan, 2.0, 3.0, 4.0])) and math.isnan(stats.iqm([]))
    assert stats.iqm([[0.0, 1.0], [2.0, 100.0]]) == 1.5
