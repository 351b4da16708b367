"""The contracts: a learner walks through an ordered list of tasks and is looked at when it crosses a boundary.

Everything here is a noun of that sentence. `Agent`, `Task`, `Monitor` and `Method` are protocols: a class of
one's own needs the right methods and no base class. The rest are small records that pass between them.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import random
import site
import sys
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, Protocol, runtime_checkable

import gymnasium
import numpy as np
import torch

Array = np.ndarray[Any, np.dtype[Any]]
State = dict[str, Any]  # tensors and plain values only: what a checkpoint may hold


class CrlError(Exception):
    """A mistake that the user can mend: shown as one line, without a traceback."""


def brief(error: BaseException) -> str:
    """An error of someone else's code in one line.

    >>> brief(AssertionError()), brief(KeyError("size")), brief(ValueError("too long\\nby far"))
    ('AssertionError', "KeyError: 'size'", 'ValueError: too long')
    """
    try:
        text = str(error)
    except Exception:  # anybody's __str__
        text = "(its text cannot be shown)"
    first = printable(next(iter(text.strip().splitlines()), ""))
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def printable(text: str) -> str:
    r"""A text as any terminal and file can take it: what steers a terminal, or is no character, is written out.

    >>> printable("\x1b[31mred \udce9")
    '\\x1b[31mred \\udce9'
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)


class NotTheSame(CrlError):
    """An environment does not come back to where it was: seeded again and replayed, it shows something else."""


class NotYet(Exception):
    """The agent cannot answer for a task yet (it has no head for it, say): evaluated as NaN, with this reason."""


@dataclass(frozen=True)
class Interface:
    """What is seen and what is answered, the same over a whole sequence, for `envs` copies at once.

    `observation` is a flat `Box` of numbers or a `MultiDiscrete` of categories; `action` is any Gymnasium space.
    """

    observation: gymnasium.Space[Any]
    action: gymnasium.Space[Any]
    envs: int = 1


@dataclass(frozen=True)
class Rules:
    """What happens at a boundary: each part of the agent is kept or reset, and who tells it, if anybody."""

    optimizer: str = field(default="keep", metadata={"choices": ("keep", "reset")})
    head: str = field(default="shared", metadata={"choices": ("shared", "per_task")})
    buffer: str = field(default="keep", metadata={"choices": ("keep", "reset")})
    normalizer: str = field(default="keep", metadata={"choices": ("keep", "reset")})
    schedules: str = field(default="restart", metadata={"choices": ("restart", "continue")})
    announced: Literal[True, False, "detected"] = True


@dataclass(frozen=True)
class Visit:
    """One stay at a task. Visits are counted from 1; a task can be visited again."""

    index: int
    task: Task
    steps: int  # the budget, in environment steps over all copies, or in samples
    seed: int  # the root of this visit's random streams
    start: int = 0  # environment steps taken in the walk before this visit
    total: int = 0  # environment steps of the whole walk
    rules: Rules = Rules()
    done: int = 0  # steps of this visit taken before a stop, when it is resumed in the middle
    tasks: int = 0  # how many different tasks the whole walk has; 0 where nobody knows

    @property
    def schedule(self) -> tuple[int, int]:
        """(steps already run on the agent's schedules, steps they last): this visit's, or the whole walk's."""
        whole_walk = self.rules.schedules == "continue" or self.rules.announced is not True
        return (self.start, self.total) if whole_walk else (0, self.steps)


@dataclass(frozen=True)
class Experience:
    """One vector step, or a batch of them: arrays whose leading axes agree, (envs, ...) or (time, envs, ...).

    `next_obs` is the true successor, also where an episode ended; `note` is what the agent's `act` returned.
    """

    obs: Array
    action: Array
    reward: Array
    next_obs: Array
    terminated: Array
    truncated: Array
    note: Any = None


@dataclass(frozen=True)
class Pairs:
    """Labelled examples, tensors on the agent's device: the experience that a dataset's task hands over.

    `answers` says which classes there are to choose from: (classes,) for all rows, or (rows, classes).
    """

    obs: torch.Tensor
    label: torch.Tensor
    answers: torch.Tensor | None = None


@dataclass(frozen=True)
class Tick:
    """What a task reports while it trains: steps taken so far in this visit, and numbers by name.

    One without numbers is a safe point to stop at, and nothing else.
    """

    steps: int
    numbers: Mapping[str, float]


@dataclass(frozen=True)
class Score:
    """What an evaluation found: the return and length of each episode (or one accuracy), or why there is none."""

    returns: tuple[float, ...] = ()
    lengths: tuple[int, ...] = ()
    reason: str = ""
    cut: int = 0  # episodes that had no end, and were ended by the engine's limit

    @property
    def mean(self) -> float:
        """Mean return; NaN where nothing could be evaluated."""
        return float(np.mean(self.returns)) if self.returns else float("nan")


@dataclass(frozen=True)
class Record:
    """One line of a run's log. `task` and `phase` are empty where they say nothing."""

    name: str
    value: float | list[float]
    step: int
    visit: int
    task: str = ""
    phase: str = ""
    note: str = ""  # why the value is missing, where it is


def plain(value: float | Array) -> float | list[float]:
    """A number or an array of them, as a record holds it.

    >>> plain(np.float32(0.5)), plain(np.array([[1, 2]]))
    (0.5, [1.0, 2.0])
    """
    return float(value) if np.ndim(value) == 0 else [float(item) for item in np.asarray(value).ravel()]


class Agent(Protocol):
    """What learns. Built as `Agent(interface, seed, device, **options)`.

    Further parts are optional, and each unlocks something: `enter(visit)` hears of an announced boundary (all rules
    but the defaults need it), and `accepts(rules)` refuses some of them with a `CrlError`; `facing(task)` is a
    context around evaluation and looking (heads, masks); `stride` is the number of vector steps between two updates
    (visits are rounded up to it, and a run stops at its multiples; at those of `pause`, where there is one: where
    `state_dict` is whole between updates too, `pause` is 1); `model` and `optimizers` (or one `optimizer`) are what
    methods and monitors work on. `prepare(experience)` makes a batch, a mapping of tensors with all that is
    constant while learning; `outputs(batch)`, (samples, numbers), and `objective(outputs, batch)`, the mean loss,
    are pure in the model's parameters: gradients and curvature. Beside them `networks` names the parameters of each
    network (by default all of the model is one), `error(outputs, batch)` is the part of the objective that is an
    error, `metric(outputs, batch)` weighs outputs where the objective is not convex in them, `divergence(before,
    after)` says by name how far each sample's outputs moved.

    Methods use, beside these and the `interface`: `minibatch`, the batch whose step is about to happen; `chains`, lists
    of module names from what is seen to what is answered, in order (read off a model that is an `nn.Sequential`);
    `progress`, the share of the visit that is over; `epoch`, how many steps of the optimizer go once through the data
    at hand; `distill(outputs, teacher)`, the mean loss of answering otherwise than a teacher (perhaps with
    `made_up=True`, on inputs that are made up after earlier tasks); `rehearse(batch)`, the mean loss of a replayed
    batch, whose rows hold what of the minibatch `remembers` names, and their `outputs` of then; `critic_columns`, which
    numbers of its outputs estimate returns, of which a batch (and `remembers`) then has the `return`: methods that
    remember answers leave these out unless told otherwise; and `rebuilt()`, called when the model has grown, which has
    the new parameters learned and target networks made anew. `apart`, where it is true, says that tasks are answered by
    outputs of their own (heads, masks), for which the agent is to face a task; `decay` is the strength of an L2 penalty
    that the agent adds to its gradients by itself, which `l2` then raises instead.

    On a dataset an agent declares `learns_from = "pairs"`; `settle()`, where there is one, is called at safe points.
    """

    def act(self, obs: Any, carry: Any, greedy: bool) -> tuple[Array, Any, Any]:
        """(actions, the next carry, a note that comes back in `observe`) for a batch of observations, an array.

        A dataset's task asks with a tensor, with no carry, and has no use for a note: actions are classes.

        The carry is a recurrent state: None at the start of a visit or an evaluation, then whatever `act` made of
        it, a tensor or a tuple of them whose leading axis is the copies; rows whose episode ended come back zero.
        """
        ...

    def observe(self, experience: Any) -> None:
        """Take in one vector step (an `Experience`), or a batch of labelled examples (`Pairs`)."""
        ...

    def update(self) -> Mapping[str, float]:
        """Learn if it is time to; numbers worth logging, or an empty mapping.

        On a dataset `train/accuracy` is one of them: the share of the batch that was right before the update.
        """
        ...

    def state_dict(self) -> State:
        """Everything that the next update depends on."""
        ...

    def load_state_dict(self, state: State) -> None:
        """The inverse of `state_dict`, on a newly built agent."""
        ...


@runtime_checkable
class Task(Protocol):
    """A source of experience. The task drives, the walk iterates."""

    name: str
    measure: str  # what its scores are: return, or accuracy
    interface: Interface  # of this task alone, before it is joined with the others'

    def train(self, agent: Agent, visit: Visit) -> Iterator[Tick]:
        """Let the agent learn for a visit; each tick is a safe point to stop at."""
        ...

    def evaluate(self, agent: Agent, seed: int, episodes: int, greedy: bool) -> Score:
        """Evaluate on copies of its own; changes neither the agent nor any random stream of training."""
        ...

    def sample(self, agent: Agent, seed: int, size: int) -> Any:
        """Experience (or `Pairs`) of the agent as it is, on copies of its own, for monitors to look at."""
        ...

    def state_dict(self) -> State:
        """What training needs to go on from here."""
        ...

    def load_state_dict(self, state: State) -> None:
        """The inverse of `state_dict`."""
        ...


@dataclass(frozen=True)
class Boundary:
    """The moment before a visit (phase `init`) or after it (phase `end`)."""

    visit: Visit
    phase: str
    step: int
    agent: Agent
    earlier: tuple[Task, ...]  # the other tasks visited before this one
    seed: int
    size: int = 512  # samples that `experience` holds
    tell: Callable[[str], None] = field(default=lambda what: None, repr=False, compare=False)  # what takes a while
    _seen: dict[tuple[str, int], Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def task(self) -> Task:
        """The task being entered or left."""
        return self.visit.task

    def experience(self, task: Task | None = None, size: int | None = None) -> Any:
        """Fresh experience of the agent on a task (by default the boundary's own), sampled once for all monitors."""
        task, size = task or self.task, size or self.size
        if (task.name, size) not in self._seen:
            self.tell(f"{size:,} samples of {task.name}")
            self._seen[task.name, size] = task.sample(self.agent, self.seed, size)
        return self._seen[task.name, size]


class Monitor(Protocol):
    """Looks at a boundary and changes nothing: no weight, gradient, buffer or random stream.

    An optional `needs` names the parts of an agent that it cannot do without; an optional `state_dict` and
    `load_state_dict` hold what it remembers from boundary to boundary. An error says in one sentence why there is
    nothing to measure: it is recorded, and the run goes on.
    """

    def measure(self, boundary: Boundary) -> Mapping[str, Any]:
        """Numbers by name; or arrays of them, a `crl.linalg.Estimate` (a number with its bracket), or a `Spectrum`."""
        ...


class Method(Protocol):
    """Acts on learning, from outside the agent: through torch's hooks, and at boundaries.

    Where boundaries are not announced, `enter` and `leave` are not called; a class attribute `needs_boundaries = True`
    has such a walk refused instead. Where they are detected, both are called at once when a change is noticed, with
    visits that are segments between changes: of their tasks nothing is known but a made-up name, `steps` is what is
    left of the walk, and `samples_tasks = True` (it draws experience of a visit's task) has such a walk refused.
    Further parts are optional: `needs` names the parts of an agent that it cannot do
    without and `excludes` the methods that it cannot be with; `only_before` is the one visit before which it acts, so
    that a shorter walk is refused; `one_head = True` has heads per task refused,
    `names_tasks = True` (it answers by a task's name) a walk in which the task is not told, and
    `accepts(agent)` refuses an agent with a `CrlError`;
    `warns(tasks, rules)` is one sentence on what the user may not expect of it in this walk, or empty;
    `numbers()` is what it did since it was last asked, to be logged; `reseed(seed)` seeds its own random stream;
    `rebuild(agent, state)` gives a new agent the structure that it had, before the agent's state is loaded.
    """

    def attach(self, agent: Agent) -> None:
        """Called once: before the first visit; or, after a resume, when the agent is what it was."""
        ...

    def enter(self, visit: Visit) -> None:
        """Called before an announced visit."""
        ...

    def leave(self, visit: Visit) -> None:
        """Called after an announced visit."""
        ...

    def state_dict(self) -> State:
        """What the method remembers."""
        ...

    def load_state_dict(self, state: State) -> None:
        """The inverse of `state_dict`."""
        ...


def derive(seed: int, *path: int) -> int:
    """A 31-bit seed for the stream that `path` names, independent of every other path's.

    >>> derive(0, 1, 2) == derive(0, 1, 2) != derive(0, 2, 1)
    True
    """
    return int(np.random.SeedSequence(seed, spawn_key=path).generate_state(1)[0]) >> 1


def random_state() -> State:
    """The state of the global random streams, which Stable-Baselines3 draws from, as plain values."""
    name, keys, position, has_gauss, cached = np.random.get_state()
    version, internal, gauss = random.getstate()
    state: State = {
        "torch": torch.get_rng_state(),
        "numpy": [str(name), torch.from_numpy(np.asarray(keys).astype(np.int64)), int(position), int(has_gauss)],
        "numpy_cached": float(cached),
        "python": [version, list(internal), gauss],
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_random_state(state: State) -> None:
    """The inverse of `random_state`."""
    name, keys, position, has_gauss = state["numpy"]
    version, internal, gauss = state["python"]
    torch.set_rng_state(state["torch"])
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, state["numpy_cached"]))
    random.setstate((version, tuple(internal), gauss))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])


def seed_streams(seed: int) -> None:
    """Begin the global random streams anew."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


@contextlib.contextmanager
def aside(seed: int) -> Iterator[None]:
    """Run the block on random streams of its own; the global ones are as before when it ends."""
    before = random_state()
    seed_streams(seed)
    try:
        yield
    finally:
        set_random_state(before)


Facing = Callable[["Task"], contextlib.AbstractContextManager[None]]


def add_facing(agent: Any, context: Facing) -> None:
    """From now on, facing a task enters this context too: a method's masks or columns."""
    agent.also_facing = [*getattr(agent, "also_facing", ()), context]


@contextlib.contextmanager
def facing(agent: Agent, task: Task) -> Iterator[None]:
    """The agent as it answers for `task`: its own `facing`, where it has one, and what methods have added."""
    own = getattr(agent, "facing", None)
    with contextlib.ExitStack() as stack:
        for context in [*([own] if own is not None else []), *getattr(agent, "also_facing", ())]:
            stack.enter_context(context(task))
        yield


def has_part(agent: Any, part: str) -> bool:
    """Whether an agent has an optional part; chains may be read off its model, and one optimizer will do."""
    if part == "chains":
        return hasattr(agent, "chains") or isinstance(getattr(agent, "model", None), torch.nn.Sequential)
    if part == "optimizers":
        return hasattr(agent, "optimizers") or hasattr(agent, "optimizer")
    return hasattr(type(agent), part) or hasattr(agent, part)


def optimizers_of(agent: Any) -> list[torch.optim.Optimizer]:
    """Whatever steps an agent's model: its `optimizers`, or its one `optimizer`."""
    several = getattr(agent, "optimizers", None)
    return list(several) if several is not None else [agent.optimizer]


INSTALLED_ONLY = "CRL_INSTALLED_ONLY"  # an environment variable, so that the processes we start inherit it


def imported(name: str) -> ModuleType:
    """The module that a config names; files beside the user count too, after all that is installed.

    A config from a stranger must not run a file that came with it: where `CRL_INSTALLED_ONLY` is set, a module that
    belongs to no installed package is refused before it is imported.
    """
    if os.environ.get(INSTALLED_ONLY):
        if not _installed(name.partition(".")[0]):
            raise CrlError(f"{name} is in no installed package, and with --installed-only nothing else is imported")
    elif "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    return importlib.import_module(name)


def _installed(package: str) -> bool:
    """Whether a package lies where Python's own and installed ones do, or is one of the three of ours."""
    try:
        spec = importlib.util.find_spec(package)
    except ValueError:  # the script that is running
        return False
    if spec is None or spec.origin in ("built-in", "frozen"):
        return spec is not None
    home = Path(__file__).resolve().parent.parent
    ours = package in ("crl", "agents", "envs")
    names = ("stdlib", "platstdlib", "purelib", "platlib")
    places = [sysconfig.get_path(name) for name in names] + [*site.getsitepackages(), site.getusersitepackages()]
    found = [spec.origin] if spec.origin else list(spec.submodule_search_locations or ())
    inside = [Path(place).resolve() for place in places if Path(place).resolve() != home]
    return bool(found) and all(
        any(Path(file).resolve().is_relative_to(place) for place in inside)
        or (ours and Path(file).resolve().is_relative_to(home / package))
        for file in found
    )
