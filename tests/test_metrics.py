"""Every metric against numbers worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from crl import metrics
from crl.metrics import Metric

NAN = math.nan

# Three tasks, each visited once.
R = [
    [0.0, 0.1, 0.2],
    [0.8, 0.3, 0.2],
    [0.6, 0.9, 0.1],
    [0.2, 1.0, 0.7],
]
ONCE = [0, 1, 2]

# Two tasks, the first visited again and then the second.
CYCLE = [
    [0.0, 0.0],
    [4.0, 1.0],
    [1.0, 6.0],
    [8.0, 2.0],
    [3.0, 5.0],
]
TWICE = [0, 1, 0, 1]


def value(metric: Metric) -> float:
    assert metric.reason == ""
    return metric.value


def undefined(metric: Metric, reason: str) -> None:
    assert math.isnan(metric.value)
    assert reason in metric.reason


def test_average_performance() -> None:
    assert value(metrics.average_performance(R)) == pytest.approx((0.2 + 1.0 + 0.7) / 3)


def test_average_incremental() -> None:
    assert value(metrics.average_incremental(R, ONCE)) == pytest.approx((0.8 + 0.75 + 1.9 / 3) / 3)


def test_forgetting() -> None:
    assert metrics.forgetting_per_task(R, ONCE) == pytest.approx([0.6, -0.1, 0.0])
    assert value(metrics.forgetting(R, ONCE)) == pytest.approx(0.5 / 3)


def test_forgetting_max() -> None:
    assert value(metrics.forgetting_max(R, ONCE)) == pytest.approx((0.6 - 0.1) / 2)
    before_own_visit = [[0.0, 0.0], [0.0, 7.0], [0.0, 5.0], [1.0, 4.0]]
    assert value(metrics.forgetting_max(before_own_visit, [0, 1, 0])) == 1.0, "7 is before its own visit"


def test_forgetting_max_is_the_published_one() -> None:
    """Chaudhry et al. 2018, written out: a[k, j] is defined for j <= k; f_j = max_{l < K} a[l, j] - a[K, j]."""
    a = np.random.default_rng(0).random((4, 4))
    a[np.triu_indices(4, 1)] = NAN  # in a class-incremental run what has not been seen is not evaluated
    published = np.mean([max(a[l, j] for l in range(j, 3)) - a[3, j] for j in range(3)])  # noqa: E741
    matrix = np.vstack([np.full(4, NAN), a])
    assert value(metrics.forgetting_max(matrix, [0, 1, 2, 3])) == pytest.approx(published)


def test_isolated_forgetting() -> None:
    expected = [[NAN, NAN, NAN], [0.2 / 0.8, NAN, NAN], [0.4 / 0.8, -0.1 / 1.0, NAN]]
    np.testing.assert_allclose(metrics.isolated_forgetting(R, ONCE), expected)
    np.testing.assert_allclose(metrics.isolated_forgetting(R, ONCE, [2.0, 1.0, 1.0])[1:, 0], [0.1, 0.2])
    assert np.isnan(metrics.isolated_forgetting([[0, 0], [0, 0], [0, 1]], [0, 1])).all()


def test_backward_transfer() -> None:
    assert value(metrics.backward_transfer(R, ONCE)) == pytest.approx((-0.6 + 0.1) / 2)


def test_forward_transfer_zero_shot() -> None:
    assert value(metrics.forward_transfer_zero_shot(R, ONCE)) == pytest.approx((0.2 - 0.1) / 2)


def test_revisits() -> None:
    assert metrics.forgetting_per_task(CYCLE, TWICE).tolist() == [5.0, 0.0]
    np.testing.assert_array_equal(
        metrics.isolated_forgetting(CYCLE, TWICE), [[NAN, NAN], [3 / 8, NAN], [NAN, 4 / 6], [5 / 8, NAN]]
    )
    assert {name: value(metric) for name, metric in metrics.summary(CYCLE, TWICE).items()} == {
        "average_performance": 4.0,
        "average_incremental": (4.0 + 3.5 + 5.0 + 4.0) / 4,
        "forgetting": 2.5,
        "forgetting_max": 5.0,
        "backward_transfer": -5.0,
        "forward_transfer_zero_shot": 1.0,
    }


def test_area_under_curve() -> None:
    assert value(metrics.area_under_curve([0, 20, 100], [0, 1, 0.5], total=100)) == pytest.approx(0.1 + 0.6)
    assert value(metrics.area_under_curve([1020, 1100], [3, 3], total=100)) == 3.0
    undefined(metrics.area_under_curve([0, 49], [1, 1], total=100), "49 of 100")
    undefined(metrics.area_under_curve([100], [1], total=100), "two points")
    undefined(metrics.area_under_curve([0, 50, 100], [1, NAN, 1], total=100), "missing")


def test_forward_transfer() -> None:
    assert value(metrics.forward_transfer(0.4, baseline=0.6, best=1.0)) == pytest.approx(-0.5)
    undefined(metrics.forward_transfer(0.4, baseline=1.0, best=1.0), "baseline")
    undefined(metrics.forward_transfer(0.4, baseline=1.0, best=0.5), "baseline")
    undefined(metrics.forward_transfer(NAN, baseline=0.5, best=1.0), "missing")
    undefined(metrics.forward_transfer(0.4, baseline=NAN, best=1.0), "missing")


def test_forward_transfer_ratio() -> None:
    assert value(metrics.forward_transfer_ratio(-150.0, baseline=-100.0)) == pytest.approx(-0.5)
    undefined(metrics.forward_transfer_ratio(1.0, baseline=0.0), "zero")
    undefined(metrics.forward_transfer_ratio(0.0, baseline=0.0), "zero")
    undefined(metrics.forward_transfer_ratio(1.0, baseline=NAN), "missing")


def test_plasticity_ratio() -> None:
    ratios = metrics.plasticity_ratio([0.8, 0.4, NAN, 1.0])
    assert [value(ratios[0]), value(ratios[2])] == pytest.approx([0.5, 1.25])
    undefined(ratios[1], "missing")
    for areas, reason in (
        ([0.8], "not revisited"),
        ([], "not revisited"),
        ([0.0, 1.0], "first"),
        ([-2.0, -1.0], "first"),
    ):
        (ratio,) = metrics.plasticity_ratio(areas)
        undefined(ratio, reason)


def test_intransigence() -> None:
    assert value(metrics.intransigence(baseline=0.9, reached=0.6)) == pytest.approx(0.3)
    undefined(metrics.intransigence(baseline=0.9, reached=NAN), "missing")


def test_partial_matrices() -> None:
    start, first, second = (metrics.summary(R[: i + 1], ONCE[:i]) for i in range(3))
    assert value(start["average_performance"]) == pytest.approx(0.1)
    undefined(start["average_incremental"], "no visit")
    assert value(first["average_incremental"]) == 0.8
    for name in ("forgetting", "forgetting_max", "backward_transfer", "forward_transfer_zero_shot"):
        undefined(start[name], "fewer than two tasks")
        undefined(first[name], "fewer than two tasks")
    assert value(second["forgetting"]) == pytest.approx(0.1)  # the third task is left out
    assert value(second["forgetting_max"]) == pytest.approx(0.2)
    assert value(second["backward_transfer"]) == pytest.approx(-0.2)
    assert value(second["forward_transfer_zero_shot"]) == pytest.approx(0.2)
    assert math.isnan(metrics.forgetting_per_task(R[:3], ONCE[:2])[2])


def test_the_same_task_over_and_over_is_one_task() -> None:
    undefined(metrics.forgetting([[0.0], [1.0], [2.0]], [0, 0]), "fewer than two tasks")
    undefined(metrics.forgetting_max([[0.0], [1.0], [2.0]], [0, 0]), "fewer than two tasks")


def test_nan_stays_nan_and_only_where_it_is_needed() -> None:
    r = np.array(R)
    r[3, 0] = NAN
    for name, metric in metrics.summary(r, ONCE).items():
        if name == "forward_transfer_zero_shot":
            assert value(metric) == pytest.approx(0.05)
        else:
            undefined(metric, "missing")
    assert np.isnan(metrics.forgetting_per_task(r, ONCE)).tolist() == [True, False, False]
    assert np.isnan(metrics.isolated_forgetting(r, ONCE, [1, 1, 1])[2]).tolist() == [True, False, True]
    r = np.array(R)
    r[3, 2] = NAN  # the last task's own zero is not a zero if it was not evaluated
    undefined(metrics.forgetting(r, ONCE), "missing")
    r = np.array(R)
    r[2, 0] = NAN
    undefined(metrics.forgetting_max(r, ONCE), "missing")


@pytest.mark.parametrize(
    ("matrix", "visits", "message"),
    [
        ([0.0, 1.0], [0], "row per evaluation"),
        (np.zeros((0, 2)), [], "row per evaluation"),
        (np.zeros((2, 0)), [], "row per evaluation"),
        (R[1:], ONCE, "row before the first visit"),
        (R, [0, 1], "row before the first visit"),
        (R, [0, 1, 3], "columns 0 to 2"),
        (R, [0, 1, -1], "columns 0 to 2"),
    ],
)
def test_shape_mistakes_are_one_clear_line(matrix: object, visits: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        metrics.summary(matrix, visits)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_other_shape_mistakes() -> None:
    with pytest.raises(ValueError, match="each of the 3 tasks"):
        metrics.isolated_forgetting(R, ONCE, [1.0])
    with pytest.raises(ValueError, match="one length"):
        metrics.area_under_curve([0, 1], [0], total=1)
    with pytest.raises(ValueError, match="must increase"):
        metrics.area_under_curve([0, 0], [0, 1], total=1)
    with pytest.raises(ValueError, match="more than the total"):
        metrics.area_under_curve([0, 200], [0, 1], total=100)
