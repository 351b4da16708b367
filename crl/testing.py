"""The conformance kit: does a class of one's own keep the contracts of `crl.core`?

Each check uses the thing as a walk would, on a small environment of random observations, rewards and ends, and
raises an `AssertionError` whose one sentence says what is wrong and what would be right.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib
import inspect
import io
import math
from collections.abc import Callable, Mapping
from typing import Any

import gymnasium
import numpy as np
import torch

from crl.core import (
    Array,
    Boundary,
    Experience,
    Interface,
    Method,
    Monitor,
    NotTheSame,
    State,
    Task,
    Visit,
    aside,
    random_state,
    set_random_state,
)
from crl.linalg import Estimate, Spectrum
from crl.optional import check_optional

TICK = 2_048  # a visit of three times as many steps has a middle to stop in
PPO = {"n_steps": 16, "batch_size": 64, "n_epochs": 1}  # a small agent for monitors and methods


def check_agent(cls: Any, interface: Interface | None = None, **options: Any) -> None:
    """Build, train, evaluate, stop and resume an agent: `check_agent(MyAgent, learning_rate=1e-3)`.

    By default it sees four numbers and chooses one of three actions; another `interface` says what it sees instead.
    Optional parts that it has (`prepare`, `outputs`, `objective`, `minibatch` and others) are each used once.
    """
    parts = ("act", "observe", "update", "state_dict", "load_state_dict")
    lacking = [name for name in parts if not callable(getattr(cls, name, None))]
    assert not lacking, f"{cls.__name__} lacks {', '.join(lacking)}: an agent has {', '.join(parts)}."
    seen = interface or Interface(gymnasium.spaces.Box(-1, 1, (4,)), gymnasium.spaces.Discrete(3), envs=16)
    try:
        inspect.signature(cls).bind(seen, 0, "cpu", **options)
    except TypeError as error:
        message = f"{cls.__name__} is built as {cls.__name__}(interface, seed, device, **options), but: {error}."
        raise AssertionError(message) from None
    watched = _watched(cls)

    def trial() -> _Trial:
        return _Trial(watched, seen, options)

    middle, end = _straight(trial)
    with aside(2):  # other global streams than before: an agent seeds itself
        again = trial().go().state()
    _same(again["agent"], end["agent"], "two agents of one seed differ in", "take all chance from the seed")
    with aside(3):
        resumed = trial().load(middle).go().state()
    _same(resumed, end, "a resumed agent differs from one that never stopped in", "state_dict() must hold whatever "
          "the next update depends on, the optimizer and counters too")  # fmt: skip
    with aside(1):
        looked_at = _evaluated(trial().go(middle=True)).go().state()
    _same(looked_at, end, "an agent that was evaluated goes on differently in", "act() must leave no trace of itself")
    with aside(1):
        learned = trial().go()
        obs = learned.task.sample(learned.agent, 7, 24)
        _check_greedy(learned.agent, obs.obs.reshape(-1, *obs.obs.shape[2:]))
        before = _frozen(learned.agent.state_dict())
        check_optional(learned.agent, obs)
        _same(_frozen(learned.agent.state_dict()), before, "prepare(), outputs() or objective() changes", "it is pure")


def check_task(task: Task) -> None:
    """Evaluate, sample, train, stop and resume a task, with an agent that acts at random."""
    assert isinstance(task, Task), f"{type(task).__name__} lacks a part of crl.core.Task: see its docstring."
    interface: Interface = getattr(task, "shared", None) or task.interface
    with aside(1):
        agent = _Chance(interface)
        before = _frozen({"agent": agent.state_dict(), "random": random_state()})
        scores = [task.evaluate(agent, 7, 3, False) for _ in range(2)]
        first, twin, other = (task.sample(agent, seed, 24) for seed in (7, 7, 8))
        after = _frozen({"agent": agent.state_dict(), "random": random_state()})
    _same(after, before, "evaluate() or sample() changes", "use copies of the environments, and crl.core.aside")
    assert scores[0] == scores[1], "evaluate() with one seed gives two scores: all its chance must come from the seed."
    wanted = 0 if scores[0].reason else 3
    assert len(scores[0].returns) == len(scores[0].lengths) == wanted, "evaluate() must score as many episodes as asked"
    _same(_arrays(first), _arrays(twin), "sample() with one seed gives two", "all its chance must come from the seed")
    assert _difference(_arrays(first), _arrays(other)), "sample() gives the same for two seeds: it must use its seed."
    _check_shapes(first, interface, 24)
    _check_training(task, interface)


def check_monitor(monitor: Monitor) -> None:
    """Measure before and after a visit: numbers come back, and nothing else has happened. A class is built first."""
    monitor = monitor() if inspect.isclass(monitor) else monitor
    with aside(1):
        trial = _Trial(importlib.import_module("agents.ppo").PPO, _small(), PPO)
        earlier = (_task(_small()),)
        for phase in ("init", "end"):
            for parameter in trial.agent.model.parameters():
                parameter.grad = torch.randn_like(parameter)
            before = _everything(trial)
            with aside(7):  # as the walk does
                found = monitor.measure(Boundary(trial.visit, phase, 0, trial.agent, earlier, seed=7, size=64))
            _same(_everything(trial), before, "measure() changes", "work on copies")
            assert isinstance(found, Mapping), f"measure() must return a mapping, not a {type(found).__name__}."
            for name, value in found.items():
                plain = isinstance(value, Spectrum | Estimate) or np.asarray(value).dtype.kind in "biuf"
                assert plain and isinstance(name, str), (
                    f"measure() returns {value!r} for {name!r}: it must be a number, an array of numbers, "
                    "an Estimate or a Spectrum."
                )
            trial.go()
    if hasattr(monitor, "state_dict"):
        _frozen(monitor.state_dict())


def check_method(method: Method) -> None:
    """Attach a method (a newly built one, or its class) to an agent, let it hear of a visit, stop and resume."""
    method = method() if inspect.isclass(method) else method

    def trial() -> _Trial:
        return _Trial(importlib.import_module("agents.ppo").PPO, _small(), PPO, copy.deepcopy(method))

    middle, end = _straight(trial)
    for name, value in end["did"].items():
        fits = isinstance(name, str) and isinstance(value, int | float)
        assert fits, f"numbers() returns {value!r} for {name!r}: it must be a number under a name."
    with aside(2):
        resumed = trial().load(middle).go().state()
    _same(resumed, end, "a resumed run differs from one that never stopped in", "state_dict() must hold whatever the "
          "method remembers, and attach() works on a new agent")  # fmt: skip


# One agent on its way.


class _Trial:
    """One visit of a newly built agent, as the walk goes about it."""

    def __init__(self, cls: Any, interface: Interface, options: Mapping[str, Any], method: Any = None) -> None:
        self.task, self.method = _task(interface), method
        self.agent: Any = cls(self.task.shared, 5, "cpu", **options)
        whole = getattr(self.agent, "stride", 1) * interface.envs
        steps = 3 * whole * math.ceil(TICK / whole)
        self.visit = Visit(1, self.task, steps, seed=11, total=steps, tasks=1)

    def start(self) -> _Trial:
        """Cross the boundary before the visit."""
        if self.method is not None:
            self.method.attach(self.agent)
        for part in (self.agent, self.method):
            if hasattr(part, "enter"):
                part.enter(self.visit)
        return self

    def go(self, middle: bool = False) -> _Trial:
        """Train to the end, or to the first safe point in the last two thirds."""
        if not self.task.state_dict():
            self.start()
        for tick in self.task.train(self.agent, self.visit):
            if middle and tick.steps > self.visit.steps / 3:
                break
        if not middle and self.method is not None:
            self.method.leave(self.visit)
        return self

    def state(self) -> State:
        """What a checkpoint would hold."""
        did = dict(self.method.numbers()) if hasattr(self.method, "numbers") else {}
        did.pop("seconds", None)
        method = self.method.state_dict() if self.method is not None else {}
        for part in (self.agent.state_dict(), method):
            assert isinstance(part, dict), f"state_dict() returns {_shown(part)}: it must be a dictionary."
        parts = {"agent": self.agent.state_dict(), "method": method, "task": self.task.state_dict(), "did": did}
        return _frozen({**parts, "random": random_state()})

    def load(self, state: State) -> _Trial:
        """Go on from a checkpoint."""
        state = copy.deepcopy(state)
        if hasattr(self.method, "rebuild"):
            self.method.rebuild(self.agent, state["method"])
        self.agent.load_state_dict(state["agent"])
        self.task.load_state_dict(state["task"])
        if self.method is not None:
            self.method.attach(self.agent)
            self.method.load_state_dict(state["method"])
        set_random_state(state["random"])
        return self


def _straight(trial: Callable[[], _Trial]) -> tuple[State, State]:
    """The states in the middle and at the end of a visit, which must have taught the agent something."""
    with aside(1):
        walk = trial()
        begin, middle = _weights(walk.agent), walk.go(middle=True).state()
        end = walk.go().state()
        learned = _difference(begin, _weights(walk.agent))
    assert learned, f"nothing was learned in {walk.visit.steps} steps: update() must change the agent's weights."
    return middle, end


def _evaluated(trial: _Trial) -> _Trial:
    before = trial.state()
    for greedy in (False, True):
        trial.task.evaluate(trial.agent, 7, 3, greedy)
    trial.task.sample(trial.agent, 7, 8)
    _same(trial.state(), before, "evaluation changes", "act() must change nothing, and draw from the global streams")
    return trial


def _watched(cls: Any) -> Any:
    """The same class, that tells at once of a wrong answer."""

    def act(self: Any, obs: Array, carry: Any, greedy: bool) -> Any:
        seen = copy.deepcopy(obs)
        answer = cls.act(self, obs, carry, greedy)
        assert not _difference(obs, seen), "act() changes the observations that it is shown: work on a copy of them."
        assert isinstance(answer, tuple) and len(answer) == 3, "act() must return (actions, carry, note)."
        actions, following, _ = answer
        space = self._interface.action
        right = isinstance(actions, np.ndarray) and actions.shape == (len(obs), *space.shape)
        assert right and all(space.contains(action) for action in actions), (
            f"act(greedy={greedy}) returns {_shown(actions)} for {len(obs)} observations: "
            f"it must be an array of one action of {space} for each."
        )
        for part in following if isinstance(following, tuple) else (following,):
            whole = part is None or (isinstance(part, torch.Tensor) and part.shape[:1] == (len(obs),))
            assert whole, "act() returns a carry that is not a tensor (or a tuple of them) with a row for each copy."
        return answer

    def update(self: Any) -> Any:
        numbers = cls.update(self)
        assert isinstance(numbers, Mapping), f"update() must return a mapping, not a {type(numbers).__name__}."
        for name, value in numbers.items():
            real = isinstance(name, str) and np.isscalar(value) and np.asarray(value).dtype.kind in "biuf"
            right = real and bool(np.isfinite(value))
            assert right, f"update() returns {_shown(value)} for {name!r}: it must be a finite number under a name."
        return numbers

    def build(self: Any, interface: Interface, seed: int, device: str, **options: Any) -> None:
        self._interface = interface
        cls.__init__(self, interface, seed, device, **options)

    return type(cls.__name__, (cls,), {"__init__": build, "act": act, "update": update})


# What the checks above are made of.


class Noise(gymnasium.Env[Any, Any]):
    """Observations, rewards and ends at random, in any spaces."""

    def __init__(self, observation: gymnasium.Space[Any], action: gymnasium.Space[Any]) -> None:
        self.observation_space, self.action_space = copy.deepcopy(observation), action

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin an episode."""
        super().reset(seed=seed)
        self.observation_space.seed(seed)
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Roll the dice."""
        chance, reward = self.np_random.random(), self.np_random.normal()
        return self.observation_space.sample(), float(reward), chance < 0.03, chance > 0.97, {}


class _Chance:
    """An agent that acts at random and keeps count of what it is shown."""

    def __init__(self, interface: Interface) -> None:
        self.action, self.steps, self.rewards = copy.deepcopy(interface.action), 0, 0.0

    def act(self, obs: Array, carry: Any, greedy: bool) -> tuple[Array, Any, Any]:
        self.action.seed(int(np.random.randint(2**31)))
        return np.stack([self.action.sample() for _ in obs]), None, None

    def observe(self, experience: Experience) -> None:
        self.steps += len(experience.obs)
        self.rewards += float(experience.reward.sum() + experience.obs.sum())

    def update(self) -> Mapping[str, float]:
        return {}

    def state_dict(self) -> State:
        return {"steps": self.steps, "rewards": self.rewards}

    def load_state_dict(self, state: State) -> None:
        self.steps, self.rewards = state["steps"], state["rewards"]


def _small() -> Interface:
    return Interface(gymnasium.spaces.Box(-1, 1, (4,)), gymnasium.spaces.Discrete(3), envs=16)


def _task(interface: Interface) -> Any:
    """A task of random numbers in the spaces of an interface."""
    if "crl/Noise-v0" not in gymnasium.registry:
        gymnasium.register("crl/Noise-v0", entry_point="crl.testing:Noise", disable_env_checker=True)
    gym = importlib.import_module("envs.gym")
    spaces = {"observation": interface.observation, "action": interface.action}
    task = gym.build(env="crl/Noise-v0", name="noise", kwargs=spaces, envs=interface.envs)
    gym.join([task])
    return task


def _check_greedy(agent: Any, obs: Array) -> None:
    """The best action is the same whatever the chance."""
    answers = []
    for chance in (4, 5):
        with aside(chance):
            answers.append(agent.act(obs, None, True)[0])
    _same(*answers, "act(greedy=True) gives two answers to one question, of", "it must leave nothing to chance")  # type: ignore[call-arg]


def _check_shapes(seen: Experience, interface: Interface, size: int) -> None:
    lead = seen.reward.shape
    assert math.prod(lead) >= size, f"sample() returns {math.prod(lead)} steps where {size} were asked for."
    shapes = {"obs": interface.observation.shape, "next_obs": interface.observation.shape}
    for name, value in _arrays(seen).items():
        wanted = (*lead, *shapes.get(name, value.shape[len(lead) :]))
        assert value.shape == wanted, f"sample() returns {name} of shape {value.shape}: it must be {wanted}."


def _check_training(task: Task, interface: Interface) -> None:
    steps = interface.envs * math.ceil(3 * TICK / interface.envs)
    visit = Visit(1, task, steps, seed=11, total=steps, tasks=1)
    with aside(1):
        agent, ticks, middle = _Chance(interface), [], None
        for tick in task.train(agent, visit):
            ticks.append(tick.steps)
            assert agent.steps == tick.steps, f"a tick tells of {tick.steps} steps, but the agent saw {agent.steps}."
            if middle is None and steps / 3 < tick.steps < steps:
                middle = _frozen({"task": task.state_dict(), "agent": agent.state_dict(), "random": random_state()})
        end = agent.state_dict()
        assert ticks and ticks[-1] == steps, f"a visit of {steps} steps ends after {ticks[-1:]}: they must agree."
        if middle is None:  # it has no safe point within
            return
        resumed = _Chance(interface)
        resumed.load_state_dict(middle["agent"])
        try:
            task.load_state_dict(middle["task"])
        except NotTheSame as error:
            raise AssertionError(f"{error}: reset(seed) must forget all that was before it.") from None
        set_random_state(middle["random"])
        list(task.train(resumed, visit))
    _same(resumed.state_dict(), end, "a resumed visit differs in", "state_dict() must hold where each copy is")


def _everything(trial: _Trial) -> State:
    """The checkpoint, and what else a look could change."""
    model = trial.agent.model
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    modes = {name: [module.training, len(module._forward_hooks)] for name, module in model.named_modules()}
    return _frozen({**trial.state(), "gradients": gradients, "modes": modes})


def _weights(agent: Any) -> State:
    return _frozen(agent.model.state_dict() if hasattr(agent, "model") else agent.state_dict())


def _arrays(experience: Experience) -> dict[str, Array]:
    return {f.name: getattr(experience, f.name) for f in dataclasses.fields(experience) if f.name != "note"}


def _frozen(state: Any) -> State:
    """A copy, by way of the file that it must fit into."""
    assert isinstance(state, dict), f"state_dict() returns {_shown(state)}: it must be a dictionary."
    assert not _holds_itself(state), "state_dict() returns something that holds itself: it must hold plain values."
    file = io.BytesIO()
    try:
        torch.save(state, file)
        file.seek(0)
        return dict(torch.load(file, weights_only=True))
    except Exception as error:
        reason = str(error).strip().splitlines()[-1][:200]
        message = f"state_dict() must hold tensors and plain values only, for a checkpoint to hold it ({reason})."
        raise AssertionError(message) from error


def _holds_itself(state: Any, above: tuple[int, ...] = ()) -> bool:
    parts = state.values() if isinstance(state, dict) else state if isinstance(state, list | tuple) else ()
    return id(state) in above or any(_holds_itself(part, (*above, id(state))) for part in parts)


def _shown(value: Any) -> str:
    """Anything in a part of one line."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:80]}..."


def _same(found: Any, wanted: Any, what: str, remedy: str) -> None:
    place = _difference(found, wanted)
    assert not place, f"{what} {place}: {remedy}."


def _difference(a: Any, b: Any, place: str = "") -> str:
    """Where two states first differ; nothing if they do not."""
    here = place or "their parts"
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        pairs = [(key, a[key], b[key]) for key in a if key in b]
        if list(a) != list(b):
            return here
    elif isinstance(a, list | tuple) and isinstance(b, list | tuple):
        pairs = [(i, x, y) for i, (x, y) in enumerate(zip(a, b, strict=False))]
        if len(a) != len(b):
            return here
    elif isinstance(a, torch.Tensor | np.ndarray) and isinstance(b, torch.Tensor | np.ndarray):
        x, y = np.asarray(a), np.asarray(b)
        return "" if x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes() else here
    else:
        return "" if type(a) is type(b) and (a == b or (a != a and b != b)) else here  # noqa: PLR0124  # NaN is NaN
    return next((found for key, x, y in pairs if (found := _difference(x, y, f"{place}.{key}".lstrip(".")))), "")
