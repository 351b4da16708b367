"""PPO whose process can be slow, or fail: for tests of several processes."""

import os
import signal
import time
from collections.abc import Mapping
from typing import Any

from agents.ppo import PPO
from crl.core import Interface


class Slow(PPO):
    """Takes its time over each update; leaves its process's number in a folder; one seed fails, another is killed."""

    def __init__(self, interface: Interface, seed: int, device: str, *, folder: str, seconds: float = 0.0,
                 fails: int = -1, dies: int = -1, **options: Any) -> None:  # fmt: skip
        super().__init__(interface, seed, device, **options)
        self.own, self.seconds, self.folder = seed, seconds, folder
        self.fails, self.dies = fails, dies

    def update(self) -> Mapping[str, float]:
        learned = super().update()
        if learned:
            if self.own == self.fails:
                raise RuntimeError("something broke\nbadly")
            if self.own == self.dies:
                os.kill(os.getpid(), signal.SIGKILL)
            with open(os.path.join(self.folder, f"{self.own}.pid"), "w") as file:
                file.write(str(os.getpid()))
            time.sleep(self.seconds)
        return learned
