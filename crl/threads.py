"""Threads that a part began: one that ends with an error costs a line and a note in the run's folder, no more."""

from __future__ import annotations

import threading
from collections.abc import Callable

from crl.failing import culprit, said, traced


class Listener:
    """Hears of the errors that end threads until it is closed: `tell` has (a line, a traceback).

    TensorBoard's own thread fails where the disk is full, which its next call says.
    """

    def __init__(self, tell: Callable[[str, str], None]) -> None:
        self.tell, self.before = tell, threading.excepthook
        threading.excepthook = self._hear

    def _hear(self, what: threading.ExceptHookArgs) -> None:
        boards = type(what.thread).__module__.startswith("tensorboard.")
        error = what.exc_value
        if error is None or isinstance(error, SystemExit) or (boards and isinstance(error, OSError)):
            return
        name = what.thread.name if what.thread is not None else "nobody's"
        who = culprit(error)
        self.tell(f"a thread{f' of {who}' if who else ''} ({name}) failed: {said(error)}", traced(error))

    def close(self) -> None:
        """Leave it to who heard before."""
        if threading.excepthook == self._hear:
            threading.excepthook = self.before
