"""Tasks: shared spaces, wrappers, engines, evaluation."""

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

from crl.core import CrlError, Interface, random_state
from envs.engines import Sync
from envs.gym import GymTask, build, join
from envs.minigrid import KINDS, Symbols
from envs.spaces import Flat, join_observation, one_hot, shared_action, shared_observation


class Scripted(gymnasium.Env):  # type: ignore[type-arg]
    """Ends after as many steps as its first observation says; action 1 ends at once."""

    observation_space = spaces.Box(0, 100, (1,), dtype=np.float32)
    action_space = spaces.Discrete(3)
    power = 1.0

    def reset(self, *, seed=None, options=None):  # type: ignore[no-untyped-def]
        super().reset(seed=seed)
        self.left = int(self.np_random.integers(2, 9))
        return np.array([self.left], np.float32), {}

    def step(self, action):  # type: ignore[no-untyped-def]
        self.left -= 1
        self.last = action
        obs = np.array([self.left + self.np_random.random()], np.float32)
        return obs, self.power, self.left <= 0, False, {}


def test_true_successor_and_next_episode_are_apart() -> None:
    engine = Sync(Scripted, 3, seed=1)
    obs = engine.reset()
    for _ in range(50):
        step = engine.step(np.zeros(3, dtype=int))
        ended = step.terminated
        assert (step.next_obs[ended] < 1).all(), "the successor of a last step is the end itself"
        assert (step.obs[ended] >= 2).all(), "and what is acted on next is a new episode"
        assert np.array_equal(step.obs[~ended], step.next_obs[~ended])
        assert (step.reward == 1).all(), "no false step in between"
        obs = step.obs
    assert obs.shape == (3, 1)


def test_an_engine_comes_back_in_the_middle_of_episodes() -> None:
    rng = np.random.default_rng(0)
    engine = Sync(Scripted, 4, seed=5, settings={"power": 1.0})
    engine.reset()
    for i in range(31):
        engine.step(rng.integers(0, 3, 4))
        if i == 29:
            engine.change("power", 2.0)
    twin = Sync(Scripted, 4, seed=5)
    twin.load_state_dict(engine.state_dict())
    assert np.array_equal(twin.obs, engine.obs)
    for _ in range(20):
        actions = rng.integers(0, 3, 4)
        for mine, theirs in zip(engine.step(actions), twin.step(actions), strict=True):
            assert np.array_equal(mine, theirs)


def test_episodes_of_different_copies_and_numbers_differ() -> None:
    engine = Sync(Scripted, 16, seed=0)
    assert len(np.unique(engine.reset())) > 3
    assert not np.array_equal(Sync(Scripted, 16, seed=1).reset(), Sync(Scripted, 16, seed=0).reset())
    assert np.array_equal(Sync(Scripted, 16, seed=0).reset(), Sync(Scripted, 16, seed=0).reset())


def test_minigrid_symbols_are_categories() -> None:
    env = Symbols(gymnasium.make("MiniGrid-DoorKey-5x5-v0"), mission=False)
    obs, _ = env.reset(seed=0)
    raw, _ = env.env.reset(seed=0)
    assert obs.dtype == np.uint8 and obs.shape == (148,) and env.observation_space.contains(obs)
    assert np.array_equal(obs[:147], raw["image"].reshape(-1)) and obs[147] == raw["direction"]
    assert list(env.observation_space.nvec) == [*KINDS] * 49 + [4]
    told, _ = Symbols(gymnasium.make("MiniGrid-DoorKey-5x5-v0"), mission=True).reset(seed=0)
    assert np.array_equal(told[:148], obs) and (told[148:155] > 1).all(), "use the key to open the door ..."


@pytest.mark.parametrize("name", ["MiniGrid-DoorKey-5x5-v0", "MiniGrid-Fetch-5x5-N2-v0", "CartPole-v1"])
def test_the_seed_reaches_the_environment(name: str) -> None:
    task = build(env=name, name=name, envs=1)
    first = [Sync(task.make, 8, seed=s).reset() for s in (0, 0, 1)]
    assert np.array_equal(first[0], first[1]) and not np.array_equal(first[0], first[2])


def test_spaces_that_agree_are_shared_as_they_are() -> None:
    box = spaces.Box(-1, 1, (3,), dtype=np.float32)
    assert shared_observation([box, box]) is box


def test_numbers_beside_categories_are_padded_with_a_mask() -> None:
    box, codes = spaces.Box(-1, 1, (3,), dtype=np.float32), spaces.MultiDiscrete([2, 3])
    shared = shared_observation([box, codes])
    assert shared.shape == (10,)
    seen = join_observation(np.array([0.5, -0.5, 1.0], np.float32), box, shared)
    assert seen.tolist() == [0.5, -0.5, 1.0, 0, 0, 1, 1, 1, 0, 0]
    assert join_observation(np.array([1, 2]), codes, shared).tolist() == [0, 1, 0, 0, 1, 1, 1, 1, 1, 1]
    assert one_hot(np.array([0, 2]), codes).tolist() == [1, 0, 0, 0, 1]


def test_categories_of_different_lengths_get_an_absent_kind() -> None:
    short, long = spaces.MultiDiscrete([2, 3]), spaces.MultiDiscrete([4, 2, 5])
    shared = shared_observation([short, long])
    assert isinstance(shared, spaces.MultiDiscrete) and list(shared.nvec) == [4, 3, 6]
    assert join_observation(np.array([1, 2]), short, shared).tolist() == [1, 2, 5]


def test_actions_are_remapped() -> None:
    tasks = [build(env=name, name=name, envs=1) for name in ("CartPole-v1", "Acrobot-v1")]
    shared = join(tasks)
    assert shared.action == spaces.Discrete(3)
    cart, same = tasks[0].make(), tasks[0].make()
    cart.reset(seed=0)
    same.reset(seed=0)
    assert np.array_equal(cart.step(2)[0], same.step(0)[0]), "2 is played as 2 mod 2"
    with pytest.raises(CrlError, match="discrete actions and b has continuous"):
        shared_action([spaces.Discrete(2), spaces.Box(-1, 1, (1,))], ["a", "b"])


@pytest.mark.parametrize(
    ("space", "expected"),
    [
        (spaces.Discrete(3, start=2), spaces.MultiDiscrete([3])),
        (spaces.Dict(a=spaces.Discrete(2), b=spaces.Box(0, 1, (2, 2))), spaces.Box(0, 1, (6,))),
        (spaces.Tuple((spaces.Discrete(2), spaces.MultiBinary(2))), spaces.Box(0, 1, (4,))),
        (spaces.Box(0, 255, (2, 2, 3), np.uint8), spaces.Box(0, 255, (12,))),
    ],
)
def test_observations_are_flattened(space: spaces.Space, expected: spaces.Space) -> None:  # type: ignore[type-arg]
    env = Scripted()
    env.observation_space = space  # type: ignore[assignment]
    flat = Flat(env)
    assert flat.observation_space == expected
    space.seed(0)
    assert all(flat.observation_space.contains(flat.observation(space.sample())) for _ in range(20))


WRAPPED = [
    ("permute_observation", {"seed": 3}),
    ("shift_observation", {"by": 2.0}),
    ("noise_observation", {"scale": 0.5}),
    ("remap_action", {"order": [1, 0]}),
    ("scale_reward", {"by": 3.0}),
    ("sign_reward", {}),
]


@pytest.mark.parametrize(("name", "options"), WRAPPED)
def test_wrappers_by_name(name: str, options: dict[str, float]) -> None:
    plain = build(env="CartPole-v1", name="p", envs=1).make()
    changed = build(env="CartPole-v1", name="c", envs=1, wrappers=[(name, options)]).make()
    again = build(env="CartPole-v1", name="c", envs=1, wrappers=[(name, options)]).make()
    obs, seen, repeated = plain.reset(seed=4)[0], changed.reset(seed=4)[0], again.reset(seed=4)[0]
    assert np.array_equal(seen, repeated), "all chance comes from seeds"
    after, reward, *_ = plain.step(1)
    seen_after, seen_reward, *_ = changed.step(0 if name == "remap_action" else 1)
    expected = {
        "permute_observation": sorted(seen) == sorted(obs) and not np.array_equal(seen, obs),
        "shift_observation": np.allclose(seen, obs + 2.0),
        "noise_observation": 0.01 < np.abs(seen - obs).max() < 3,
        "remap_action": np.array_equal(seen_after, after),
        "scale_reward": seen_reward == 3 * float(reward),
        "sign_reward": seen_reward == -float(reward),
    }
    assert expected[name]


class Constant:
    """Always answers 0; counts how often it is asked."""

    def __init__(self) -> None:
        self.asked = 0

    def act(self, obs, carry, greedy):  # type: ignore[no-untyped-def]
        self.asked += 1
        np.random.random()
        return np.zeros(len(obs), dtype=int), None, None


def scripted(envs: int = 1) -> GymTask:
    gymnasium.register("Scripted-v0", entry_point=Scripted) if "Scripted-v0" not in gymnasium.registry else None
    return build(env="Scripted-v0", name="s", envs=envs)


def test_evaluation_does_not_favour_short_episodes() -> None:
    task = scripted()
    score = task.evaluate(Constant(), 0, 400, False)  # type: ignore[arg-type]
    assert len(score.returns) == len(score.lengths) == 400
    assert score.mean == pytest.approx(5.0, abs=0.3), "the mean of 2 to 8; the first 400 to end would be shorter"
    assert task.evaluate(Constant(), 0, 400, False) == score  # type: ignore[arg-type]


def test_evaluation_leaves_the_random_streams_alone() -> None:
    before = repr(random_state())
    scripted().evaluate(Constant(), 0, 5, False)  # type: ignore[arg-type]
    scripted().sample(Constant(), 0, 20)  # type: ignore[arg-type]
    assert repr(random_state()) == before


def test_sampled_experience_is_stacked() -> None:
    task = scripted(envs=4)
    join([task])
    experience = task.sample(Constant(), 0, 30)  # type: ignore[arg-type]
    assert experience.obs.shape == experience.next_obs.shape == (8, 4, 1)
    assert experience.reward.shape == experience.terminated.shape == (8, 4) and len(experience.note) == 8
    assert isinstance(task.interface, Interface)
