"""Imports run one way: crl.core at the bottom; envs and agents never see each other; crl reaches them by name."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAY = {  # each room, and what of ours it may import
    "envs": {"envs", "crl.checked", "crl.core", "crl.failing"},
    "agents": {"agents", "crl.checked", "crl.core"},
    "crl/linalg": {"crl.linalg", "crl.core"},
    "crl/checked.py": {"crl.core"},
    "crl/hidden.py": {"crl.linalg", "crl.core"},
    "crl/monitors": {"crl.monitors", "crl.checked", "crl.hidden", "crl.linalg", "crl.core"},
    "crl/methods": {"crl.methods", "crl.checked", "crl.hidden", "crl.linalg", "crl.core"},
    "crl/core.py": set(),
    "crl/metrics.py": {"crl.core"},
    "crl/stats.py": set(),
    "crl/pictures.py": {"crl.core", "crl.linalg"},
    "crl/disk.py": {"crl.core"},
    "crl/checkpoint.py": {"crl", "crl.core"},
    "crl/sound.py": {"crl.core"},
    "crl/sinks.py": {"crl.core", "crl.disk", "crl.linalg", "crl.pictures"},
    "crl/terminal.py": {"crl.pictures"},
    "crl/store.py": {"crl.checkpoint", "crl.core", "crl.disk", "crl.linalg"},
    "crl/config.py": {"crl", "crl.checked", "crl.core"},
    "crl/named.py": {"crl", "crl.checked", "crl.config", "crl.core"},
    "crl/changing.py": {"crl.checked", "crl.config", "crl.core"},
    "crl/build.py": {"crl", "crl.changing", "crl.checked", "crl.config", "crl.core", "crl.named"},
    "crl/detect.py": {"crl.core"},
    "crl/boundary.py": {"crl", "crl.build", "crl.config", "crl.core", "crl.detect", "crl.linalg"},
    "crl/opened.py": {"crl", "crl.build", "crl.config", "crl.core", "crl.metrics", "crl.sinks", "crl.store"},
    "crl/baseline.py": {
        "crl",
        "crl.build",
        "crl.changing",
        "crl.config",
        "crl.core",
        "crl.metrics",
        "crl.opened",
        "crl.sinks",
        "crl.store",
    },
    "crl/failing.py": {"crl.core"},
    "crl/stopping.py": set(),
    "crl/threads.py": {"crl.failing"},
    "crl/walk.py": {"crl", "crl.build", "crl.boundary", "crl.core", "crl.detect", "crl.linalg", "crl.metrics"}
    | {"crl.failing", "crl.opened", "crl.sinks", "crl.sound", "crl.stopping", "crl.store", "crl.terminal"}
    | {"crl.threads"},
    "crl/run.py": {"crl", "crl.build", "crl.baseline", "crl.config", "crl.core", "crl.disk", "crl.failing", "crl.named"}
    | {"crl.opened", "crl.stopping", "crl.store", "crl.walk"},
    "crl/bars.py": {"crl.core", "crl.pictures", "crl.store", "crl.terminal"},
    "crl/seeds.py": {"crl", "crl.bars", "crl.build", "crl.config", "crl.core", "crl.failing", "crl.metrics"}
    | {"crl.opened", "crl.pictures", "crl.run", "crl.stats", "crl.stopping", "crl.store", "crl.terminal"},
    "crl/estimate.py": {"crl", "crl.boundary", "crl.build", "crl.core", "crl.monitors.look"},
    "crl/plan.py": {"crl", "crl.named", "crl.build", "crl.config", "crl.core", "crl.estimate", "crl.opened", "crl.run"}
    | {"crl.walk"},
    "crl/probe.py": {"crl", "crl.build", "crl.boundary", "crl.config", "crl.core", "crl.linalg", "crl.opened"},
    "crl/optional.py": {"crl.core"},
    "crl/testing.py": {"crl.core", "crl.linalg", "crl.optional"},
    "crl/scatter.py": {"crl.core"},
    "crl/coefficients.py": {"crl", "crl.core", "crl.stats"},
    "crl/correlation_report.py": {"crl.coefficients", "crl.disk", "crl.scatter", "crl.stats"},
    "crl/correlate.py": {"crl.coefficients", "crl.core", "crl.correlation_report", "crl.opened", "crl.sinks"},
    "crl/cli.py": {"crl", "crl.config", "crl.core", "crl.correlate", "crl.plan", "crl.probe", "crl.run"}
    | {"crl.failing", "crl.stopping", "crl.terminal"},
}


def ours(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return {name for name in found if name.split(".")[0] in ("crl", "envs", "agents", "tests")}


def allowed(name: str, may: set[str]) -> bool:
    open_rooms = may & {"envs", "agents", "crl.linalg", "crl.monitors", "crl.methods"}
    return name in may or any(name.startswith(f"{room}.") for room in open_rooms)


@pytest.mark.parametrize("room", MAY)
def test_imports_run_one_way(room: str) -> None:
    path = ROOT / room
    for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
        back = {name for name in ours(file) if not allowed(name, MAY[room])}
        assert not back, f"{file.relative_to(ROOT)} imports {back}"


def test_this_test_can_fail(tmp_path: Path) -> None:
    file = tmp_path / "bad.py"
    file.write_text("from envs.gym import GymTask\nimport agents.sb3")
    assert {name for name in ours(file) if not allowed(name, MAY["agents"])} == {"envs.gym"}


def test_importing_crl_stays_light() -> None:
    heavy = {"stable_baselines3", "matplotlib", "tensorboard", "minigrid", "pygame"}
    code = f"import crl, crl.cli, sys; print(sorted({heavy!r} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert run.stdout.strip() == "[]"
