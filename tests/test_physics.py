"""Environments that change: attributes and what hangs on them, drawn values, the friction of MuJoCo's bodies."""

import importlib.util
import math
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.envs.classic_control.pendulum import PendulumEnv

import crl
from crl.changing import spread
from crl.config import TaskSpec
from crl.core import CrlError
from crl.opened import Run
from crl.stopping import AtOnce
from crl.walk import Walk
from envs.engines import Sync
from envs.gym import build
from envs.physics import changeable, put

needs_mujoco = pytest.mark.skipif(importlib.util.find_spec("mujoco") is None, reason='pip install "gymnasium[mujoco]"')


def test_a_longer_heavier_pole_moves_as_worked_out_by_hand() -> None:
    env = gymnasium.make("CartPole-v1")
    env.reset(seed=0)
    for name, value in {"length": 1.5, "masspole": 0.3, "masscart": 2.0, "gravity": 5.0, "force_mag": 7.0}.items():
        put(env, name, value)
    env.unwrapped.state = np.array([0.1, 0.2, 0.05, -0.3])  # type: ignore[attr-defined]
    obs = env.step(1)[0]
    m, total, length, angle, turning = 0.3, 2.3, 1.5, 0.05, -0.3
    push = (7.0 + m * length * turning**2 * math.sin(angle)) / total
    bend = (5.0 * math.sin(angle) - math.cos(angle) * push) / (length * (4 / 3 - m * math.cos(angle) ** 2 / total))
    speed = push - m * length * bend * math.cos(angle) / total
    tau = 0.02
    expected = [0.1 + tau * 0.2, 0.2 + tau * speed, angle + tau * turning, turning + tau * bend]
    assert obs == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("env", "changes", "high"),
    [
        ("CartPole-v1", {"x_threshold": 1.0, "theta_threshold_radians": 0.5}, [2.0, np.inf, 1.0, np.inf]),
        ("Acrobot-v1", {"MAX_VEL_1": 3.0}, [1, 1, 1, 1, 3.0, 9 * math.pi]),
        ("MountainCar-v0", {"max_speed": 0.1, "max_position": 0.8}, [0.8, 0.1]),
        ("MountainCarContinuous-v0", {"max_speed": 0.1}, [0.6, 0.1]),
        ("Pendulum-v1", {"max_speed": 4}, [1, 1, 4]),
    ],
)
def test_spaces_follow_what_they_are_made_of(env: str, changes: dict[str, Any], high: list[float]) -> None:
    made: Any = gymnasium.make(env)
    for name, value in changes.items():
        put(made, name, value)
    box = made.observation_space
    assert box.high.tolist() == np.array(high, np.float32).tolist() and box.dtype == np.float32
    for name in {"high", "high_state"} & set(vars(made.unwrapped)):
        assert np.array_equal(getattr(made.unwrapped, name), box.high)


def test_a_changed_pendulum_is_one_built_so() -> None:
    changed, built = PendulumEnv(), PendulumEnv(g=5.0)
    put(changed, "g", 5.0)
    assert np.array_equal(changed.reset(seed=3)[0], built.reset(seed=3)[0])
    assert np.array_equal(changed.step(np.ones(1))[0], built.step(np.ones(1))[0])
    put(changed, "max_torque", 1.5)
    assert np.array_equal(changed.step(np.full(1, 2.0))[0], built.step(np.full(1, 1.5))[0])


def test_a_place_is_kept_in_the_environments_own_kind() -> None:
    env: Any = gymnasium.make("MiniGrid-DistShift1-v0")
    put(env, "goal_pos", [7, 3])
    env.reset(seed=0)
    assert env.unwrapped.goal_pos == (7, 3) and env.unwrapped.grid.get(7, 3).type == "goal"


@pytest.mark.parametrize(
    ("env", "name", "value", "said"),
    [
        ("CartPole-v1", "lenght", 1.0, "change: CartPole-v1 has no attribute 'lenght'; did you mean 'length'?"),
        ("CartPole-v1", "friction", 1.0, "change: CartPole-v1 has no attribute 'friction'; it has force_mag, gravity"),
        ("CartPole-v1", "total_mass", 1.0, "change: total_mass is made of masscart and masspole; change those"),
        ("CartPole-v1", "length", "long", "change: length: expected a number, not 'long'"),
        ("CartPole-v1", "length", True, "change: length: expected a number, not True"),
        ("CartPole-v1", "length", math.nan, "change: length: expected a number, not nan"),
        ("CartPole-v1", "kinematics_integrator", 3, "change: kinematics_integrator: expected text, not 3"),
        ("CartPole-v1", "step", 3, "change: step of CartPole-v1 cannot be changed: it is no plain value"),
        ("CartPole-v1", "np_random", 3, "change: np_random of CartPole-v1 cannot be changed"),
        ("Acrobot-v1", "AVAIL_TORQUE", [1], "change: AVAIL_TORQUE: expected a list like [-1.0, 0.0, 1.0], not [1]"),
        ("Pendulum-v1", "max_torque", 3.0, "change: max_torque: 3.0 is beyond the actions that the agent has"),
        ("MountainCarContinuous-v0", "min_action", -2, "change: min_action: -2 is beyond the actions that"),
    ],
)  # fmt: skip
def test_what_cannot_be_changed_is_said_in_one_line(env: str, name: str, value: Any, said: str) -> None:
    made = gymnasium.make(env)
    before = {key: repr(held) for key, held in vars(made.unwrapped).items()}
    with pytest.raises(CrlError) as error:
        put(made, name, value)
    assert str(error.value).startswith(said) and "\n" not in str(error.value)
    assert before == {key: repr(held) for key, held in vars(made.unwrapped).items() if key in before}


def test_what_can_be_changed_is_what_a_user_may_mean() -> None:
    found = changeable(gymnasium.make("CartPole-v1"))
    assert {"length", "masspole", "masscart", "gravity", "force_mag", "kinematics_integrator"} <= set(found)
    assert not {"step", "total_mass", "observation_space", "np_random"} & set(found)


# Drawn values.


def drawn(**given: Any) -> list[float]:
    return [setting["x"] for _, setting in spread(TaskSpec("E-v0", 1, change={"x": given}), "tasks.0")]


def test_drawn_values_are_seeded_and_in_range() -> None:
    table = drawn(log_uniform=[0.02, 2], count=2000, seed=1)
    assert table == drawn(log_uniform=[0.02, 2], count=2000, seed=1) != drawn(log_uniform=[0.02, 2], count=2000)
    assert table[:5] == drawn(log_uniform=[0.02, 2], count=5, seed=1), "a longer walk begins alike"
    assert min(table) >= 0.02 and max(table) <= 2
    counts = np.histogram(np.log10(table), np.linspace(math.log10(0.02), math.log10(2), 5))[0]
    assert (abs(counts - 500) < 80).all(), "equally many in each half decade"
    flat = np.histogram(drawn(uniform=[-1, 3], count=2000), np.linspace(-1, 3, 5))[0]
    assert (abs(flat - 500) < 80).all()


def test_names_are_short_and_say_the_very_value() -> None:
    change = {"friction": {"log_uniform": [0.02, 2], "count": 3, "seed": 1}, "gravity": [1, 2, 3]}
    found = spread(TaskSpec("Ant-v5", 1, name="ant", change=change), "tasks.0")
    assert [name for name, _ in found] == [f"ant[friction={s['friction']}, gravity={s['gravity']}]" for _, s in found]
    assert all(len(str(setting["friction"])) <= 6 for _, setting in found)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "tasks.0.change.x: values are drawn by {log_uniform: [LEAST, MOST], count: N, seed: N} or by uniform"),
        ({"normal": [0, 1], "count": 3}, "tasks.0.change.x: values are drawn by"),
        ({"uniform": [0, 1], "count": 3, "sed": 1}, "tasks.0.change.x: values are drawn by"),
        ({"uniform": [0, 1]}, "or by uniform, with a count from 1 to 10,000"),
        ({"uniform": [0, 1], "count": 0}, "with a count from 1 to 10,000"),
        ({"uniform": [1, 0], "count": 3}, "tasks.0.change.x.uniform: expected [LEAST, MOST], not [1, 0]"),
        ({"uniform": [0, "a"], "count": 3}, "expected [LEAST, MOST], not [0, 'a']"),
        ({"log_uniform": [0, 1], "count": 3}, "x.log_uniform: expected [LEAST, MOST], both above 0, not [0, 1]"),
        ({"log_uniform": 3, "count": 3}, "expected [LEAST, MOST], both above 0, not 3"),
    ],
)
def test_a_wrong_table_is_said_in_one_line(given: dict[str, Any], said: str) -> None:
    with pytest.raises(CrlError) as error:
        drawn(**given)
    assert said in str(error.value) and "\n" not in str(error.value)


# In a walk.

SMALL: dict[str, Any] = {
    "agent": {"use": "ppo", "n_steps": 32, "batch_size": 32, "n_epochs": 1},
    "monitors": [{"use": "norms", "at": ["init", "end"]}],
    "evaluation": {"episodes": 1},
}


def killed_and_resumed(data: dict[str, Any], out: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Run, Run]:
    """The same walk twice, once killed after its first checkpoint within the last visit."""
    monkeypatch.setattr("envs.gym.TICK", 64)
    checkpoint = Walk._checkpoint
    whole = crl.train(data, out=out / "whole")

    def die(self: Walk, visit: int, done: int = 0) -> None:
        checkpoint(self, visit, done)
        if done and visit == len(self.plan.order) - 1:
            raise AtOnce

    with monkeypatch.context() as patch, pytest.raises(AtOnce):
        patch.setattr(Walk, "_checkpoint", die)
        crl.train(data, out=out / "cut")
    return whole, crl.resume(out / "cut" / whole.path.relative_to(out / "whole"))


@pytest.mark.parametrize(
    ("env", "change"),
    [
        ("CartPole-v1", {"length": [0.5, 1.5], "masspole": [0.1, 0.5]}),
        pytest.param("Ant-v5", {"friction": {"log_uniform": [0.02, 2], "count": 2}}, marks=needs_mujoco),
    ],
)
def test_killed_in_the_middle_of_a_changed_visit(
    env: str, change: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    task = {"env": env, "steps": 160, "name": "it", "change": change, "kwargs": {"max_episode_steps": 75}}
    data = {"name": "w", "tasks": [task], "engine": {"envs": 2}, "checkpoint": {"every": 64}, **SMALL}
    whole, again = killed_and_resumed(data, tmp_path, monkeypatch)
    kept = [[repr(r) for r in run.records if not r.name.startswith("time/")] for run in (whole, again)]
    assert kept[0] == kept[1] and np.array_equal(whole.matrix, again.matrix)
    for (name, mine), theirs in zip(
        whole.agent.model.state_dict().items(), again.agent.model.state_dict().values(), strict=True
    ):
        assert mine.equal(theirs), name
    values = [r.value for r in whole.records if r.name == f"setting/{next(iter(change))}"]
    assert values == [setting[next(iter(change))] for _, setting in spread(TaskSpec(env, 1, change=change), "")]
    phases = {(r.visit, r.phase) for r in whole.records if r.name.startswith("norms/")}
    assert phases == {(1, "init"), (1, "end"), (2, "init"), (2, "end")}, "monitors look at each switch"


# MuJoCo.


def run(env: Any, friction: float, steps: int = 60) -> Any:
    env.reset(seed=0)
    put(env, "friction", friction)
    rng = np.random.default_rng(0)
    return np.array([env.step(rng.uniform(-1, 1, 8))[0] for _ in range(steps)])


@needs_mujoco
def test_friction_reaches_every_geom_and_how_the_ant_moves() -> None:
    env: Any = gymnasium.make("Ant-v5", terminate_when_unhealthy=False)
    slippery = run(env, 0.02)
    assert (env.unwrapped.model.geom_friction[:, 0] == 0.02).all()
    env.reset(seed=1)
    assert (env.unwrapped.model.geom_friction[:, 0] == 0.02).all(), "a reset leaves it"
    assert abs(run(env, 2.0) - slippery).max() > 0.1
    assert np.array_equal(run(env, 0.02), slippery), "nothing but friction has changed"
    with pytest.raises(CrlError, match="friction: expected a number of at least 0, not -1"):
        put(env, "friction", -1)
    assert "friction" in changeable(env)


@needs_mujoco
def test_every_copy_has_the_visits_friction() -> None:
    task = build(env="Ant-v5", name="ant", setting={"friction": 0.3}, envs=2)
    for env in (task.make(), task.make(render=True)):
        assert (env.unwrapped.model.geom_friction[:, 0] == 0.3).all()  # type: ignore[attr-defined]
        env.close()


@needs_mujoco
def test_an_engine_of_ants_comes_back_in_the_middle_of_an_episode() -> None:
    task = build(env="Ant-v5", name="ant", setting={"friction": 0.3}, envs=1)
    rng = np.random.default_rng(0)
    engine = Sync(task.make, 1, 5, task.setting)
    engine.reset()
    for i in range(20):
        engine.step(rng.uniform(-1, 1, (1, 8)).astype(np.float32))
        if i == 8:
            engine.change("friction", 0.02)
    twin = Sync(task.make, 1, 5)
    twin.load_state_dict(engine.state_dict())
    actions = rng.uniform(-1, 1, (10, 1, 8)).astype(np.float32)
    for action in actions:
        for mine, theirs in zip(engine.step(action), twin.step(action), strict=True):
            assert np.array_equal(mine, theirs)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_an_observation_that_is_not_finite_is_one_line(tmp_path: Path) -> None:
    broken = [{"use": "noise_observation", "scale": 3e38}]
    tasks = [{"env": "CartPole-v1", "steps": 64, "name": "pole", "wrappers": broken}]
    agent = {"use": "ppo", "n_steps": 32, "batch_size": 32, "net": {"hidden": [4]}}
    walk = {"tasks": tasks, "agent": agent, "engine": {"envs": 2}, "monitors": [], "evaluation": {"episodes": 1}}
    with pytest.raises(CrlError, match=r"pole: an observation is not finite"):
        crl.train(walk, out=tmp_path)
