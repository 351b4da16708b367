"""Continual reinforcement learning that looks inside the network while it learns.

run = crl.train("minigrid_quick", seed=3)
run = crl.load("runs/minigrid_quick/ppo/seed-3")
run.matrix, run.records, run.agent
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from crl.core import CrlError

if TYPE_CHECKING:
    from pathlib import Path

    from crl.opened import Run
    from crl.seeds import Seeds

__version__ = "0.1.0"
__all__ = ["CrlError", "load", "resume", "train", "train_seeds"]


def train(source: Any, **settings: Any) -> Run:
    """Walk through a sequence: a YAML's path, its name, or its data. See `crl.run.train`."""
    from crl import run

    return run.train(source, **settings)


def train_seeds(source: Any, seeds: int, **settings: Any) -> Seeds:
    """Walk with several seeds at once, each in a process of its own. See `crl.seeds.train_seeds`."""
    from crl import seeds as several

    return several.train_seeds(source, seeds, **settings)


def resume(path: str | Path, **settings: Any) -> Run:
    """Go on from a run's last checkpoint. See `crl.run.resume`."""
    from crl import run

    return run.resume(path, **settings)


def load(path: str | Path) -> Run:
    """Open a run's folder: its agent, matrix and records."""
    from pathlib import Path

    from crl.opened import Run
    from crl.store import RunFolder

    RunFolder(Path(path)).manifest()  # one clear line where no run is
    return Run(Path(path))
