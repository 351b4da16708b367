"""The metrics: what a walk kept, lost and carried over, read from one matrix of evaluations.

Row 0 of the matrix R is before the first visit and row i after visit i; there is a column per distinct task.
`visits` says which column each visit trained, so task `visits[i - 1]` in visit i, and tasks can be revisited.
A walk under way has fewer rows: pass the visits that are over. What was not evaluated is NaN, and a metric that
needs it is NaN too. Where a task was visited often, its "own visit" is its last for forgetting and backward
transfer, and its first for zero-shot forward transfer; without revisits these are the published formulas.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

Array = np.ndarray[Any, np.dtype[np.float64]]

TINY = 1e-8  # a denominator below this share of the numbers around it counts as zero
MISSING = "an evaluation that it needs is missing (NaN)"
ONE_TASK = "fewer than two tasks were visited"


@dataclass(frozen=True)
class Metric:
    """A number, or NaN and the reason why there is none."""

    value: float
    reason: str = ""


def average_performance(R: ArrayLike) -> Metric:
    """Mean of the last row, over all tasks (Lopez-Paz & Ranzato 2017, ACC): 1/T sum_j R[V, j].

    >>> average_performance([[0, 0], [1, 0], [0.5, 1]]).value
    0.75
    """
    return _mean(_matrix(R)[-1])


def average_incremental(R: ArrayLike, visits: Sequence[int]) -> Metric:
    """Mean over visits i of the mean of row i over the tasks seen by then (Rebuffi et al. 2017, iCaRL).

    >>> average_incremental([[0, 0], [1, 0], [0.5, 1]], [0, 1]).value
    0.875
    """
    r = _checked(R, visits)
    if not visits:
        return Metric(math.nan, "no visit is over")
    return _mean([r[i, sorted(set(visits[:i]))].mean() for i in range(1, len(r))])


def forgetting_per_task(R: ArrayLike, visits: Sequence[int]) -> Array:
    """F_j = R[end of j's last visit, j] - R[V, j] (Wolczyk et al. 2021, Continual World); NaN for unvisited tasks.

    >>> forgetting_per_task([[0, 0], [1, 0], [0.25, 1]], [0, 1]).tolist()
    [0.75, 0.0]
    """
    r = _checked(R, visits)
    lost = np.full(r.shape[1], np.nan)
    for i, j in enumerate(visits, start=1):  # a later visit overwrites an earlier one
        lost[j] = r[i, j] - r[-1, j]
    return lost


def forgetting(R: ArrayLike, visits: Sequence[int]) -> Metric:
    """Mean of `forgetting_per_task` over the visited tasks, the last with its zero (Continual World): 1/N sum_j F_j.

    >>> forgetting([[0, 0], [1, 0], [0.25, 1]], [0, 1]).value
    0.375
    """
    lost, seen = forgetting_per_task(R, visits), sorted(set(visits))
    return _mean(lost[seen]) if len(seen) > 1 else Metric(math.nan, ONE_TASK)


def forgetting_max(R: ArrayLike, visits: Sequence[int]) -> Metric:
    """Mean over j of max_{j <= l < V} R[l, j] - R[V, j], without the last visit's task (Chaudhry et al. 2018).

    The maximum is from the task's first visit on: there, R[l, j] is defined for j <= l only.

    >>> forgetting_max([[9, 9], [0.5, 0], [0.25, 1]], [0, 1]).value
    0.25
    """
    r, earlier = _checked(R, visits), _but(visits, -1)
    lost = [r[visits.index(j) + 1 : -1, j].max() - r[-1, j] for j in earlier]
    return _mean(lost) if earlier else Metric(math.nan, ONE_TASK)


def isolated_forgetting(R: ArrayLike, visits: Sequence[int], scale: ArrayLike | None = None) -> Array:
    """F[i - 1, j] = (R[i - 1, j] - R[i, j]) / s_j: what visit i cost task j (Powers et al. 2022, CORA).

    A row per visit; NaN unless j was visited before i, and in i itself. `scale` is the largest |R| of each task, over
    all runs where there are several; by default it is this matrix's. A task whose scale is zero is NaN.

    >>> isolated_forgetting([[0, 0], [2, 0], [1, 4]], [0, 1]).tolist()
    [[nan, nan], [0.5, nan]]
    """
    r = _checked(R, visits)
    s = np.abs(r).max(axis=0) if scale is None else np.asarray(scale, dtype=np.float64)
    if s.shape != r.shape[1:]:
        raise ValueError(f"scale needs one number for each of the {r.shape[1]} tasks, got shape {s.shape}")
    lost = np.full((len(visits), r.shape[1]), np.nan)
    for i, trained in enumerate(visits):
        for j in set(visits[:i]) - {trained}:
            if s[j] != 0:
                lost[i, j] = (r[i, j] - r[i + 1, j]) / s[j]
    return lost


def backward_transfer(R: ArrayLike, visits: Sequence[int]) -> Metric:
    """Mean of R[V, j] - R[j, j], without the last visit's task (Lopez-Paz & Ranzato 2017, GEM, BWT).

    >>> backward_transfer([[0, 0], [1, 0], [0.25, 1]], [0, 1]).value
    -0.75
    """
    lost, earlier = forgetting_per_task(R, visits), _but(visits, -1)
    return _mean(-lost[earlier]) if earlier else Metric(math.nan, ONE_TASK)


def forward_transfer_zero_shot(R: ArrayLike, visits: Sequence[int]) -> Metric:
    """Mean of R[j - 1, j] - R[0, j], without the first visit's task (Lopez-Paz & Ranzato 2017, GEM, FWT).

    >>> forward_transfer_zero_shot([[0, 0.25], [1, 0.5], [0, 1]], [0, 1]).value
    0.25
    """
    r, later = _checked(R, visits), _but(visits, 0)
    gains = [r[visits.index(j), j] - r[0, j] for j in later]
    return _mean(gains) if gains else Metric(math.nan, ONE_TASK)


def area_under_curve(steps: ArrayLike, values: ArrayLike, total: float) -> Metric:
    """Time average of a learning curve, as in Continual World: AUC = 1/(b - a) times its integral from a to b.

    Trapezoids between the first step a and the last b: nothing is made up outside them. `total` is the visit's budget;
    a curve that spans less than half of it stands for a different quantity, and is NaN.

    >>> area_under_curve([0, 50, 100], [0, 1, 1], total=100).value
    0.75
    """
    x, y = np.asarray(steps, dtype=np.float64), np.asarray(values, dtype=np.float64)
    if x.ndim != 1 or x.shape != y.shape:
        raise ValueError(f"steps and values must be two lists of one length, got shapes {x.shape} and {y.shape}")
    if not (np.diff(x) > 0).all():
        raise ValueError("steps must increase")
    if len(x) < 2:
        return Metric(math.nan, "the curve has fewer than two points")
    span = float(x[-1] - x[0])
    if span > total:
        raise ValueError(f"the curve spans {span:g} steps, more than the total of {total:g}")
    if span < total / 2:
        return Metric(math.nan, f"the curve spans {span:g} of {total:g} steps, less than half")
    return _metric(float((np.diff(x) * (y[1:] + y[:-1]) / 2).sum()) / span)


def online_mean(steps: ArrayLike, values: ArrayLike) -> Metric:
    """The mean over all samples, where each value is the mean since the step of the one before: online accuracy.

    >>> online_mean([100, 150], [0.5, 0.8]).value
    0.6
    """
    x, y = np.asarray(steps, dtype=np.float64), np.asarray(values, dtype=np.float64)
    if not len(x):
        return Metric(math.nan, "nothing was recorded")
    return _metric(float((np.diff(x, prepend=0) * y).sum() / x[-1]))


def forward_transfer(auc: float, baseline: float, best: float) -> Metric:
    """FT = (AUC - b) / (best - b), b the AUC of a fresh agent on the task alone (Continual World, where best is 1).

    >>> forward_transfer(0.75, baseline=0.5, best=1).value
    0.5
    """
    return _ratio(auc - baseline, best - baseline, max(abs(best), abs(baseline)), "the baseline is not below the best")


def forward_transfer_ratio(auc: float, baseline: float) -> Metric:
    """FT = (AUC - b) / |b|, b the AUC of a fresh agent on the task alone (Tomilin et al. 2025, MEAL).

    >>> forward_transfer_ratio(-1, baseline=-2).value
    0.5
    """
    return _ratio(auc - baseline, abs(baseline), abs(auc), "the baseline is zero")


def plasticity_ratio(areas_by_visit: Sequence[float]) -> list[Metric]:
    """AUC_k / AUC_1 for each revisit k = 2, 3, ... of one task: 1 is as fast as at first, less is plasticity lost.

    The ratio form of transfer in New et al. 2022 (l2metrics). A first area that is not positive has no such ratio.

    >>> [m.value for m in plasticity_ratio([0.5, 0.5, 0.25])]
    [1.0, 0.5]
    """
    if len(areas_by_visit) < 2:
        return [Metric(math.nan, "the task was not revisited")]
    first, *later = areas_by_visit
    return [_ratio(area, first, abs(area), "the area of the first visit is not above zero") for area in later]


def intransigence(baseline: float, reached: float) -> Metric:
    """I_j = b_j - R[j, j]: a reference model's score less what was reached when j was learnt (Chaudhry et al. 2018).

    The paper's reference is trained on all tasks so far together; a fresh agent on j alone is the usual stand-in.

    >>> intransigence(baseline=1, reached=0.75).value
    0.25
    """
    return _metric(baseline - reached)


def detection(
    order: Sequence[int], starts: Sequence[int], found: Sequence[tuple[int, int]]
) -> tuple[list[Metric], int]:
    """(steps from each visit's beginning to when it was noticed, false alarms); `found`: (visit, step) of each notice.

    `order` has the task of each visit. Only a visit of another task than the one before has something to notice; a
    notice that is not its visit's first, or of nothing, is a false alarm.

    >>> delays, alarms = detection([0, 1, 0], [0, 100, 200], [(1, 50), (2, 120), (2, 160)])
    >>> [delay.value for delay in delays], alarms
    ([nan, 20.0, nan], 2)
    """
    delays = []
    for i, start in enumerate(starts):
        own = [step for visit, step in found if visit == i + 1]
        if i == 0 or order[i] == order[i - 1]:
            delays.append(Metric(math.nan, "the task is that of before"))
        else:
            delays.append(Metric(float(own[0] - start)) if own else Metric(math.nan, "no change was detected"))
    return delays, len(found) - sum(not math.isnan(delay.value) for delay in delays)


def summary(R: ArrayLike, visits: Sequence[int]) -> dict[str, Metric]:
    """All aggregates of one matrix, by name.

    >>> summary([[0, 0], [1, 0], [0.25, 1]], [0, 1])["backward_transfer"]
    Metric(value=-0.75, reason='')
    """
    aggregates = (average_incremental, forgetting, forgetting_max, backward_transfer, forward_transfer_zero_shot)
    return {"average_performance": average_performance(R)} | {f.__name__: f(R, visits) for f in aggregates}


def _matrix(R: ArrayLike) -> Array:
    r = np.asarray(R, dtype=np.float64)
    if r.ndim != 2 or r.size == 0:
        raise ValueError(f"R must have a row per evaluation and a column per task, got shape {r.shape}")
    return r


def _checked(R: ArrayLike, visits: Sequence[int]) -> Array:
    r = _matrix(R)
    if len(r) != len(visits) + 1:
        raise ValueError(f"R needs a row before the first visit and one after each of {len(visits)}, got {len(r)} rows")
    if not all(0 <= j < r.shape[1] for j in visits):
        raise ValueError(f"visits must name columns 0 to {r.shape[1] - 1} of R, got {list(visits)}")
    return r


def _but(visits: Sequence[int], excluded: int) -> list[int]:
    """The visited tasks, without that of one visit."""
    return sorted(set(visits) - {visits[excluded]}) if visits else []


def _metric(value: float) -> Metric:
    return Metric(value, MISSING if math.isnan(value) else "")


def _mean(values: ArrayLike) -> Metric:
    return _metric(float(np.mean(np.asarray(values, dtype=np.float64))))


def _ratio(numerator: float, denominator: float, scale: float, undefined: str) -> Metric:
    if denominator <= TINY * scale:
        return Metric(math.nan, undefined)
    return _metric(float(numerator / denominator))
