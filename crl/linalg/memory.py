"""How much memory curvature would take, and how much there is."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from crl.linalg.operators import KEEP, Gram
from crl.linalg.problem import CurvatureError, Problem, rows, steady

TRIAL = 16  # samples whose graph is weighed


def available(device: torch.device) -> int | None:
    """Bytes that are free, or None where that cannot be told."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    free = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), None)
    return min(free, limit) if free is not None and (limit := _container()) is not None else free


def _container() -> int | None:
    """What a container's own limit leaves."""
    try:
        limit, used = (Path(f"/sys/fs/cgroup/memory.{name}").read_text().strip() for name in ("max", "current"))
    except OSError:
        return None
    return int(limit) - int(used) if limit.isdigit() else None


def needed(problem: Problem, steps: int) -> int:
    """Bytes for a Lanczos basis, and for the graph of a chunk (of all samples where all are kept)."""
    basis = (steps + 4) * problem.size * problem.like.element_size()
    trial = min(TRIAL, problem.samples)
    held = problem.samples if problem.samples <= KEEP else min(problem.chunk or problem.samples, problem.samples)
    return basis + graph(problem, trial) * held // trial


def room_for_gram(problem: Problem) -> None:
    """Refuse a Gram matrix of samples x outputs that does not fit in memory."""
    size, free = Gram.rows_of(problem), available(problem.like.device)
    if free is not None and (need := 32 * size**2 + graph(problem, 2) * problem.samples // 2) > free:
        what = f"{problem.samples:,} samples of {size // problem.samples} outputs"
        raise CurvatureError(too_much(what, need, free, "samples"))


def room_for_matrix(size: int, device: torch.device) -> None:
    """Refuse a dense matrix, with the copies that its eigenvalues take, that does not fit in memory."""
    free = available(device)
    if free is not None and (need := 28 * size**2) > free:
        raise CurvatureError(too_much(f"every eigenvalue of {size:,} rows", need, free, "rows (`of`)"))


def too_much(what: str, need: int, free: int, rather: str) -> str:
    """The sentence about memory."""
    return f"{what} need {need / 2**30:.2g} GiB and {free / 2**30:.2g} are free: take fewer {rather}"


def graph(problem: Problem, samples: int) -> int:
    """Bytes that a gradient's graph of so many samples keeps."""
    kept: list[Tensor] = []  # beside the graph, not in it: a node that held its own output would never be freed

    def keep(tensor: Tensor) -> int:
        kept.append(tensor)
        return len(kept) - 1

    own = {p.untyped_storage().data_ptr() for p in problem.parameters.values()}
    batch = rows(problem.batch, 0, samples)
    with torch.enable_grad(), steady(problem.module), torch.autograd.graph.saved_tensors_hooks(keep, kept.__getitem__):
        loss = problem.objective(problem.outputs(batch), batch)
        gradient = torch.autograd.grad(loss, list(problem.parameters.values()), create_graph=True, allow_unused=True)
    held = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in kept}
    del gradient
    kept.clear()
    return sum(size for place, size in held.items() if place not in own)
