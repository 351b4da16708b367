"""Copies stepped in several processes at once: the same episodes as in one, bit for bit, each worker having its share.

It pays where a step takes longer than a message to another process does, about 50 microseconds: MuJoCo, pixels.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Any

import numpy as np

from crl.core import Array, NotTheSame, State
from crl.failing import Failed, failed
from envs.engines import Env, Step, Sync


class Async:
    """`copies` environments in `workers` processes (0: as many as there are cores)."""

    def __init__(
        self,
        make: Callable[[], Env],
        copies: int,
        seed: int,
        settings: Mapping[str, Any] | None = None,
        workers: int = 0,
        limit: int = 0,
    ) -> None:
        self.copies, self.answered = copies, False
        shares = np.array_split(np.arange(copies), min(workers or os.cpu_count() or 1, copies))
        self.shares = [slice(int(share[0]), int(share[-1]) + 1) for share in shares]
        context = multiprocessing.get_context("spawn")  # a fork would inherit torch's threads, which do not survive it
        self.pipes: list[Connection] = []
        self.processes: list[SpawnProcess] = []
        with _deaf():
            for share in self.shares:
                ours, theirs = context.Pipe()
                what = pickle.dumps((make, share.stop - share.start, seed, dict(settings or {}), share.start, limit))
                self.processes.append(context.Process(target=_serve, args=(theirs, what), daemon=True))
                self.processes[-1].start()
                theirs.close()
                self.pipes.append(ours)
        self._end = weakref.finalize(self, _stop, self.pipes, self.processes)
        self.obs: Array = np.empty(0)

    def reset(self) -> Array:
        """Begin an episode in every copy."""
        self.obs = np.concatenate(self._ask("reset"))
        return self.obs

    def step(self, actions: Array) -> Step:
        """Step every copy once; one whose episode ends begins its next."""
        found = self._ask("step", [(actions[share],) for share in self.shares])
        step = Step(*(np.concatenate(parts) for parts in zip(*found, strict=True)))
        self.obs = step.obs
        return step

    def change(self, name: str, value: Any) -> None:
        """Set an attribute of every copy; the episodes go on."""
        self._ask("change", [(name, value)] * len(self.pipes))

    def state_dict(self) -> State:
        """Each worker's own."""
        return {"workers": self._ask("state_dict")}

    def load_state_dict(self, state: State) -> None:
        """The inverse of `state_dict`."""
        self.obs = np.concatenate(self._ask("restore", [(part,) for part in state["workers"]]))

    def close(self) -> None:
        """Close every copy, and end the workers."""
        self._end()

    def _ask(self, what: str, arguments: Sequence[tuple[Any, ...]] = ()) -> list[Any]:
        """Have every worker do something at once; what each answers."""
        answers = []
        try:
            for i, pipe in enumerate(self.pipes):
                pipe.send_bytes(pickle.dumps((what, arguments[i] if arguments else ())))
            for pipe in self.pipes:
                answers.append(pickle.loads(pipe.recv_bytes()))  # noqa: S301  # our own process
        except (EOFError, ConnectionError):
            raise Failed(self._gone(), "") from None
        for kind, line, trace in (answer for answer in answers if answer[0]):
            raise NotTheSame(line) if kind == "astray" else Failed(line, trace)
        self.answered = True
        return [answer for _, answer, _ in answers]

    def _gone(self) -> str:
        """Which worker has ended, and how."""
        for process in self.processes:
            process.join(1 / len(self.processes))
        number, code = next(((i, p.exitcode) for i, p in enumerate(self.processes, 1) if p.exitcode), (0, 0))
        worker = f"engine: worker {number} of {len(self.processes)}" if number else "engine: a worker"
        if code and code < 0:
            why = "; the system does so for want of memory: use fewer envs" if code == -signal.SIGKILL else ""
            return f"{worker} was killed by {signal.Signals(-code).name}{why}"
        guard = 'a script that trains needs `if __name__ == "__main__":` around it' if not self.answered else ""
        return f"{worker} has ended with exit code {code}" + (f"; {guard}, or engine: sync" if guard else "")


def _serve(pipe: Connection, what: bytes) -> None:
    """A worker's life: do what is asked until nobody asks any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the walk, which ends at a safe point
    engine: Sync | None = None
    while True:
        try:
            name, arguments = pickle.loads(pipe.recv_bytes())  # noqa: S301  # our own process
        except (EOFError, OSError):
            break
        try:
            if engine is None:
                make, copies, seed, settings, first, limit = pickle.loads(what)  # noqa: S301
                engine = Sync(make, copies, seed, settings, first, limit)
            answer = _restore(engine, *arguments) if name == "restore" else getattr(engine, name)(*arguments)
            said = ("", tuple(answer) if isinstance(answer, Step) else answer, "")
        except NotTheSame as error:
            said = ("astray", str(error), "")
        except BaseException as error:  # whatever it is, who asked is to hear of it
            problem = failed(error)
            said = ("failed", str(problem), problem.trace)
        try:
            pipe.send_bytes(pickle.dumps(said))
        except OSError:  # nobody waits any more
            break
    if engine is not None:
        engine.close()


def _restore(engine: Sync, state: State) -> Array:
    engine.load_state_dict(state)
    return engine.obs


@contextlib.contextmanager
def _deaf() -> Iterator[None]:
    """A Ctrl-C is for who began the workers: those that begin meanwhile never hear one, not even while they import."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set what signals do
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _stop(pipes: Sequence[Connection], processes: Sequence[SpawnProcess]) -> None:
    for pipe in pipes:
        pipe.close()
    for process in processes:
        process.join(5)
        if process.is_alive():
            process.terminate()
