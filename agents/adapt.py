"""An agent from any supported algorithm class of Stable-Baselines3 or sb3-contrib."""

from __future__ import annotations

from typing import Any

import stable_baselines3 as sb3
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm

from agents.dqn import DQN
from agents.off_policy import OffPolicy
from agents.on_policy import OnPolicy
from agents.ppo import PPO
from agents.sb3 import SB3Agent
from crl.core import CrlError

SUPPORTED = ("PPO", "A2C", "TRPO", "DQN", "QRDQN", "SAC", "TD3", "DDPG", "TQC", "CrossQ")


def adapt(algorithm: type[BaseAlgorithm]) -> type[SB3Agent]:
    """An agent from any supported algorithm class of Stable-Baselines3 or sb3-contrib, with its own defaults.

    One's own subclass of PPO or DQN is one too. If it learns by another loss, monitors do not look through theirs.
    """
    if not {one.__name__ for one in algorithm.__mro__} & {*SUPPORTED}:
        raise CrlError(f"agent.use: {algorithm.__name__} is not supported; supported are {', '.join(SUPPORTED)}")
    bases: Any = {OnPolicyAlgorithm: OnPolicy, OffPolicyAlgorithm: OffPolicy}
    learning: Any = getattr(algorithm, "train", None)
    if learning in (sb3.PPO.train, sb3.DQN.train):
        bases = {sb3.PPO: PPO, sb3.DQN: DQN}
    base = next(ours for theirs, ours in bases.items() if issubclass(algorithm, theirs))
    return type(algorithm.__name__, (base,), {"algorithm": algorithm, "defaults": {}, "__doc__": algorithm.__doc__})
