"""The studies: which arms of which config are compared, and what of a run their tables show."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from crl import metrics
from crl.bench.study import Arm, Column, Study
from crl.opened import Run, visit_areas

LAST = 4  # visits
INSIDE_ANT = {
    "dead": "dormant/actor/dead",
    "dead_critic": "dormant/critic/dead",
    "erank": "erank/actor/hidden-1/effective_rank",
    "erank_critic": "erank/critic/hidden-1/effective_rank",
    "hessian": "hessian/actor/epsilon_rank_0.001",
}
INSIDE_POLE = {
    "hessian_rank": "hessian/actor/epsilon_rank_0.01",
    "hessian_low": "hessian/actor/epsilon_rank_0.01/low",
    "hessian_high": "hessian/actor/epsilon_rank_0.01/high",
    "hessian_max": "hessian/actor/lambda_max",
}
EARLY, LATE = slice(5, 15), slice(-10, None)  # tasks of Permuted MNIST: after the first few, and the last


def plasticity(run: Run) -> dict[str, float]:
    """What was learned early and late, and how many units and directions are left."""
    areas = [area.value for area in visit_areas(run)]
    numbers = {"first": float(np.mean(areas[:2])), "last": float(np.mean(areas[-LAST:]))}
    numbers |= {"dead": _late(run, "dormant/actor/dead"), "erank": _late(run, "erank/actor/last/effective_rank")}
    for short, name in INSIDE_POLE.items():
        seen = [float(r.value) for r in run.records if r.name == name and r.phase == "init"]  # type: ignore[arg-type]
        if seen:
            numbers |= {f"{short}_early": float(np.mean(seen[1:3])), f"{short}_late": float(np.mean(seen[-LAST:]))}
            numbers |= {f"{short}_{i}": value for i, value in enumerate(seen, start=1)}
    begin = [next((r for r in run.records if r.visit == i and r.name == "losses/entropy_loss"), None)
             for i in range(1, len(areas) + 1)]  # fmt: skip
    sure = [-float(r.value) for r in begin if r is not None]  # type: ignore[arg-type]
    if sure:
        numbers["entropy_late"] = float(np.mean(sure[-LAST:]))
    fresh = [r.value for r in run.records if r.name == "metrics/fresh_area"]
    visits = {f"visit_{i}": area for i, area in enumerate(areas, start=1)}
    return {**numbers, **({"fresh": float(np.mean(fresh))} if fresh else {}), **visits}


def _late(run: Run, name: str) -> float:
    values = [r.value for r in run.records if r.name == name and r.phase == "end"]
    return float(np.mean(values[-LAST:]))


def returns(run: Run) -> dict[str, float]:
    """Each task right after its visit, and all of them at the end; how fast it went."""
    visits = [run.tasks.index(visit["task"]) for visit in run.manifest["visits"]]
    numbers = {f"after_{i}": float(run.matrix[i, column]) for i, column in enumerate(visits, start=1)}
    numbers |= {f"end_{name}": float(score) for name, score in zip(run.tasks, run.matrix[-1], strict=True)}
    return {**numbers, "average": float(run.matrix[-1].mean()), "seconds": float(run.manifest["seconds"])}


def forgetting(run: Run) -> dict[str, float]:
    """How each task stood after its visit and at the end."""
    matrix, visits = run.matrix, list(range(len(run.tasks)))
    numbers = {f"after_{name}": float(matrix[i + 1, i]) for i, name in enumerate(run.tasks)}
    numbers |= {f"end_{name}": float(matrix[-1, i]) for i, name in enumerate(run.tasks)}
    lost = metrics.forgetting_per_task(matrix, visits)
    return {**numbers, "forgetting": float(lost[:-1].mean()), "average": float(matrix[-1].mean())}


def accuracy(run: Run) -> dict[str, float]:
    """In percent: right after each visit, at the end, and what was lost; and the ranks at the end of each visit."""
    matrix, count = 100 * run.matrix, len(run.tasks)
    own = [float(matrix[i + 1, i]) for i in range(count)]
    lost = metrics.forgetting_per_task(matrix, range(count))
    seen = [float(np.nanmean(matrix[i + 1, : i + 1])) for i in range(count)]  # after each visit, over the tasks so far
    numbers = {"own": float(np.mean(own)), "average": seen[-1], "forgetting": float(lost[:-1].mean())}
    numbers |= {f"seen_{i}": value for i, value in enumerate(seen, start=1)}
    for short, name in (("features", "erank/model/last/effective_rank"), ("weights", "weight_rank/model/mean")):
        ranks = [float(r.value) for r in run.records if r.name == name and r.phase == "end"]  # type: ignore[arg-type]
        numbers |= {f"{short}_{i}": value for i, value in enumerate(ranks, start=1)}
        if ranks:
            numbers[f"{short}_of_peak"] = ranks[-1] / max(ranks)
    return numbers


def online(run: Run) -> dict[str, float]:
    """In percent: online accuracy early and late and its slope over the tasks; what is left inside at the end."""
    areas = 100 * np.array([area.value for area in visit_areas(run)])
    count = len(areas)
    slope = np.polyfit(np.arange(10, count), areas[10:], 1)[0] if count > 12 else np.nan  # the first ten still learn
    late = {"dead": "dormant/model/dead", "erank": "erank/model/hidden-3/effective_rank"}
    numbers = {name: _late(run, where) for name, where in late.items()}
    hessian = [r.value for r in run.records if r.name == "hessian/model/epsilon_rank_0.1" and r.phase == "init"]
    ranks = {f"hessian_{i}": float(value) for i, value in enumerate(hessian, start=1)}  # type: ignore[arg-type]
    early, last = float(areas[EARLY].mean()), float(areas[LATE].mean())
    tasks = {f"task_{i}": float(area) for i, area in enumerate(areas, start=1)}
    return {"early": early, "late": last, "slope": float(10 * slope), **numbers, **ranks, **tasks}


def walking(run: Run) -> dict[str, Any]:
    """Slippery Ant, visit by visit: returns, what of them is no survival, and what is left inside before and after."""
    numbers: dict[str, Any] = {}
    order = [run.tasks.index(visit["task"]) for visit in run.manifest["visits"]]
    for i, column in enumerate(order, start=1):
        mine = [r for r in run.records if r.visit == i]
        curve = {name: [float(r.value) for r in mine if r.name == name] for name in ("train/return", "train/length")}  # type: ignore[arg-type]
        walked = np.subtract(curve["train/return"], curve["train/length"])  # a step survived is worth 1
        numbers |= {f"return_{i}": float(run.matrix[i, column]), f"walked_{i}": float(np.mean(walked[-10:]))}
        numbers |= {f"curve_{i}": np.round(curve["train/return"], 1).tolist()}
        numbers |= {f"curve_walked_{i}": np.round(walked, 1).tolist()}
        for short, name in INSIDE_ANT.items():
            found = {r.phase: float(r.value) for r in mine if r.name == name}  # type: ignore[arg-type]
            numbers |= {f"{short}_{i}_{phase}": value for phase, value in found.items()}
    last = len(order)
    own = {"return": numbers[f"return_{last}"], "walked": numbers[f"walked_{last}"]}
    return {**own, "dead": numbers[f"dead_{last}_end"], "erank": numbers[f"erank_{last}_end"], **numbers}


SHARE, PERCENT, POLE = (0.0, 1.0), (0.0, 100.0), (0.0, 500.0)  # what is possible: of CartPole, its return
RETURNS = (Column("first", "first two visits", 0, POLE), Column("last", f"last {LAST} visits", 0, POLE))
INSIDE = (Column("dead", "dead units, actor", 2, SHARE), Column("erank", "effective rank, actor", 2, (0.0, math.inf)))
ACCURACY = (
    Column("own", "right after its visit, %", 1, PERCENT),
    Column("average", "all tasks at the end, %", 1, PERCENT),
    Column("forgetting", "forgotten, points", 1, (-100.0, 100.0)),
)
RANKS = (
    Column("features_of_peak", "features' effective rank at the end, of its peak", 2, SHARE),
    Column("weights_of_peak", "weights' effective rank at the end, of its peak", 2, SHARE),
)
REPLAY = [{"use": "replay", "size": 2000, "batch": 128, "every": 1}]
ONE = {"threads": 1}  # as many runs at once as there are cores
CONVGRU = {  # plain gradient descent at .1 has not left chance after 32 steps
    "agent.net": {"use": "convgru"},
    "agent.optimizer": {"use": "adam"},
    "agent.learning_rate": 3e-3,
    "stream.samples": 2000,
    "stream.epochs": 4,
    "evaluation.samples": 500,
}
CONTROLS = {
    "naive SGD": Arm(),
    "LwF": Arm([{"use": "lwf"}]),
    "ER": Arm(REPLAY),
}

# Strengths were chosen among two or three each on seed 100, those of `plasticity` on an earlier sequence.
STUDIES: dict[str, Callable[[], Study]] = {
    "plasticity": lambda: Study(
        "plasticity",
        {
            "plain": Arm(),
            "reset": Arm([{"use": "reset"}]),
            "new output layers": Arm(changes={"boundary.head": "per_task"}),
            "five times the entropy": Arm(changes={"agent.ent_coef": 0.05}),
            "l2": Arm([{"use": "l2", "strength": 1e-3}]),
            "l2_er": Arm([{"use": "l2_er", "l2": 1e-3, "lr": 1e-2, "every": 5, "samples": 500}]),
            "shrink_perturb": Arm([{"use": "shrink_perturb", "keep": 0.4, "noise": 0.6}]),
            "redo": Arm([{"use": "redo", "every": 100}]),
            "LayerNorm": Arm(changes={"agent.net.norm": "layer"}),
        },
        plasticity,
        (
            *RETURNS,
            *INSIDE,
            Column(
                "hessian_low_late", f"Hessian's rank at .01, actor, at the start of the last {LAST}: from", 3, SHARE
            ),
            Column("hessian_high_late", "to", 3, SHARE),
            Column("hessian_max_late", "its largest eigenvalue", 3, (0.0, math.inf)),
            Column("entropy_late", f"policy's entropy, first update of the last {LAST}", 2, (0.0, math.log(2))),
        ),
        differences=(("reset", "plain"), ("new output layers", "plain")),
    ),
    "critic_scale": lambda: Study(
        "critic_scale",
        {"rewards as they are": Arm(), "normalised": Arm(changes={"agent.normalize.reward": True})},
        plasticity,
        (*RETURNS, *INSIDE),
        changes=ONE,
    ),
    "forgetting": lambda: Study(
        "forgetting",
        {
            "plain": Arm(),
            "ewc": Arm([{"use": "ewc"}]),
            "clone": Arm([{"use": "clone"}]),
            "lwf": Arm([{"use": "lwf", "strength": 0.1}]),
            "agem": Arm([{"use": "agem"}]),
            "plain, rewards as they are": Arm(changes={"agent.normalize.reward": False}),
        },
        forgetting,
        (
            Column("average", "all tasks, at the end", 0, POLE),
            Column("forgetting", "forgotten of the first two", 0, (-500.0, 500.0)),
            Column("after_exchanged", "the second, right after its visit", 0, POLE),
            Column("end_exchanged", "the second, at the end", 0, POLE),
        ),
        changes=ONE,
    ),
    "split_mnist": lambda: Study(
        "split_mnist",
        {
            **CONTROLS,
            "EWC": Arm([{"use": "ewc"}]),
            "SI": Arm([{"use": "si"}]),
            "A-GEM": Arm([{"use": "agem", "every": 1}]),
            "DER": Arm([{"use": "der", "every": 1}]),
            "generative replay": Arm([{"use": "generative_replay"}]),
            "progressive networks": Arm([{"use": "progressive"}]),
            "a fresh learner per task": Arm([{"use": "reset"}]),
            "joint training": Arm(changes={"stream.joint": True}),
        },
        accuracy,
        ACCURACY,
        changes={**ONE, "monitors": []},
    ),
    "split_cifar100": lambda: Study(
        "papers/collapse_cifar100_quick",
        {**CONTROLS, "ER": Arm([{"use": "replay", "size": 2000, "batch": 50, "every": 1}])},
        accuracy,
        (*ACCURACY, *RANKS),
        changes={**ONE, "stream.samples": 1000},
    ),
    "collapse_mnist": lambda: Study(
        "papers/collapse_mnist",
        {
            f"{net} {arm}": Arm(part.methods, changes)
            for net, changes in (
                ("MLP", {}),
                ("ConvGRU", CONVGRU),
            )
            for arm, part in CONTROLS.items()
        },
        accuracy,
        (*ACCURACY, *RANKS),
    ),
    "permuted_mnist": lambda: Study(
        "papers/permuted_mnist_short",
        {
            "SGD": Arm(),
            "L2-ER": Arm([{"use": "l2_er", "l2": 1e-3, "lr": 1e-2, "every": 100, "samples": 100}]),
        },
        online,
        (
            Column("early", "tasks 6 to 15, %", 2, PERCENT),
            Column("late", "last 10 tasks, %", 2, PERCENT),
            Column("slope", "slope over tasks 11 to 60, points per 10 tasks", 3),
            Column("dead", "dead units at the end", 3, SHARE),
            Column("erank", "effective rank of the last layer", 1),
        ),
        differences=(("L2-ER", "SGD"),),
    ),
    "minigrid_fast": lambda: Study(
        "minigrid_fast",
        {"EnvPool, 256 copies": Arm()},
        returns,
        (
            Column("after_1", "DoorKey", 3, SHARE),
            Column("after_2", "Unlock", 3, SHARE),
            Column("after_3", "SimpleCrossing", 3, SHARE),
            Column("after_4", "Empty-Random", 3, SHARE),
            Column("after_5", "DoorKey, again", 3, SHARE),
            Column("average", "all tasks at the end", 3, SHARE),
            Column("seconds", "seconds a seed", 0, (0.0, math.inf)),
        ),
    ),
    "slippery_ant": lambda: Study(
        "papers/slippery_ant_short",
        {
            "plain": Arm(),
            "L2-ER": Arm(
                [{"use": "l2_er", "l2": 1e-3, "lr": 1e-6, "every": "epoch", "samples": 2048}],
                {"agent.optimizer.betas": [0.99, 0.99]},  # as the paper has it, of all but plain backpropagation
            ),
        },
        walking,
        (
            Column("return", "return on the last friction, at the end"),
            Column("walked", "of which walked, less its costs"),
            Column("dead", "dead units at the end, actor", 3),
            Column("erank", "effective rank at the end, actor", 1),
        ),
    ),
}
