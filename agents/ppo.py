"""PPO (Schulman et al. 2017): Stable-Baselines3's, and its loss as pure functions of the policy's outputs.

Outputs are one row a sample: the parameters of the action distribution, then the value. They are logits for discrete
answers, the mean and the logarithm of the standard deviation for continuous ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import stable_baselines3 as sb3
import torch
from gymnasium import spaces
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from agents.on_policy import OnPolicy
from agents.sb3 import named
from crl.core import Experience

Batch = Mapping[str, Tensor]


def outputs(policy: Any, obs: Tensor) -> Tensor:
    """What an actor-critic policy of Stable-Baselines3 answers: (samples, distribution's parameters and value)."""
    features = policy.extract_features(obs)
    if policy.share_features_extractor:
        actor, critic = policy.mlp_extractor(features)
    else:
        actor = policy.mlp_extractor.forward_actor(features[0])
        critic = policy.mlp_extractor.forward_critic(features[1])
    answer = policy.action_net(actor)
    parts = [answer, policy.value_net(critic)]
    if isinstance(policy.action_space, spaces.Box):
        parts.insert(1, policy.log_std.expand_as(answer))
    return torch.cat(parts, 1)


def objective(
    outputs: Tensor,
    batch: Batch,
    space: spaces.Space[Any],
    *,
    clip: float,
    clip_value: float | None,
    value_weight: float,
    entropy_weight: float,
) -> Tensor:
    """The clipped surrogate, the value loss and the entropy bonus, weighted: what one minibatch's step descends."""
    log_prob, entropy = log_probability(outputs[:, :-1], batch["action"], space)
    ratio = torch.exp(log_prob - batch["log_prob"])
    gain = batch["advantage"]
    surrogate = torch.min(gain * ratio, gain * ratio.clamp(1 - clip, 1 + clip))
    error = value_error(outputs, batch, clip_value)
    return -surrogate.mean() + value_weight * error - entropy_weight * entropy.mean()


def value_error(outputs: Tensor, batch: Batch, clip_value: float | None) -> Tensor:
    """The mean squared error of the value, clipped around the old one where asked."""
    value = outputs[:, -1]
    if clip_value is not None:
        value = batch["value"] + (value - batch["value"]).clamp(-clip_value, clip_value)
    return (batch["return"] - value).square().mean()


def log_probability(answer: Tensor, action: Tensor, space: spaces.Space[Any]) -> tuple[Tensor, Tensor]:
    """(log-probability of the actions, entropy) of each sample."""
    if isinstance(space, spaces.Box):
        mean, log_std = answer.chunk(2, 1)
        distance = (action - mean) / log_std.exp()
        log_prob = -0.5 * distance.square() - log_std - 0.5 * math.log(2 * math.pi)
        return log_prob.sum(1), (log_std + 0.5 + 0.5 * math.log(2 * math.pi)).sum(1)
    if isinstance(space, spaces.MultiBinary):
        yes, no = logsigmoid(answer), logsigmoid(-answer)
        entropy = -(yes.exp() * yes + no.exp() * no)
        return (action * yes + (1 - action) * no).sum(1), entropy.sum(1)
    log_prob, entropy = answer.new_zeros(len(answer)), answer.new_zeros(len(answer))
    for logits, chosen in zip(torch.split(answer, _kinds(space), 1), action.long().T, strict=True):
        logs = logits.log_softmax(1)
        log_prob = log_prob + logs.gather(1, chosen[:, None])[:, 0]
        entropy = entropy - (logs.exp() * logs).sum(1)
    return log_prob, entropy


def metric(outputs: Tensor, space: spaces.Space[Any], value_weight: float) -> Tensor:
    """The Fisher information of the action distribution, and the value loss's second derivative, for each sample.

    Where the surrogate is not convex in the outputs, this is what outputs matter by: the second derivative of the
    divergence between the old and the new policy.
    """
    answer, total = outputs[:, :-1], outputs.shape[1]
    out = outputs.new_zeros(len(outputs), total, total)
    out[:, -1, -1] = 2 * value_weight
    if isinstance(space, spaces.Box):
        _, log_std = answer.chunk(2, 1)
        out[:, :-1, :-1] = torch.diag_embed(torch.cat([torch.exp(-2 * log_std), torch.full_like(log_std, 2.0)], 1))
    elif isinstance(space, spaces.MultiBinary):
        share = answer.sigmoid()
        out[:, :-1, :-1] = torch.diag_embed(share * (1 - share))
    else:
        start = 0
        for logits in torch.split(answer, _kinds(space), 1):
            share, stop = logits.softmax(1), start + logits.shape[1]
            out[:, start:stop, start:stop] = torch.diag_embed(share) - share[:, :, None] * share[:, None, :]
            start = stop
    return out


def divergence(before: Tensor, after: Tensor, space: spaces.Space[Any]) -> dict[str, Tensor]:
    """How far each sample's answer moved: KL(before || after) of the policy, and the squared change of the value."""
    old, new = before[:, :-1], after[:, :-1]
    if isinstance(space, spaces.Box):
        (mean, log_std), (mean_new, log_std_new) = old.chunk(2, 1), new.chunk(2, 1)
        spread = (torch.exp(2 * log_std) + (mean - mean_new).square()) / (2 * torch.exp(2 * log_std_new))
        kl = (log_std_new - log_std + spread - 0.5).sum(1)
    elif isinstance(space, spaces.MultiBinary):
        yes, no = logsigmoid(old), logsigmoid(-old)
        kl = (yes.exp() * (yes - logsigmoid(new)) + no.exp() * (no - logsigmoid(-new))).sum(1)
    else:
        kl = old.new_zeros(len(old))
        for left, right in zip(torch.split(old, _kinds(space), 1), torch.split(new, _kinds(space), 1), strict=True):
            kl = kl + (left.softmax(1) * (left.log_softmax(1) - right.log_softmax(1))).sum(1)
    return {"kl": kl, "value_change": (after[:, -1] - before[:, -1]).square()}


def advantages(
    reward: Tensor, value: Tensor, last_value: Tensor, ended: Tensor, discount: float, trace: float
) -> Tensor:
    """Generalised advantage estimates (Schulman et al. 2016) of a rollout, (time, copies); `ended` follows the step."""
    out = torch.zeros_like(reward)
    following, running = last_value, torch.zeros_like(last_value)
    for step in reversed(range(len(reward))):
        alive = 1 - ended[step]
        running = reward[step] + discount * following * alive - value[step] + discount * trace * alive * running
        out[step], following = running, value[step]
    return out


def _kinds(space: spaces.Space[Any]) -> list[int]:
    if isinstance(space, spaces.MultiDiscrete):
        return [int(kind) for kind in space.nvec]
    assert isinstance(space, spaces.Discrete)
    return [int(space.n)]


class PPO(OnPolicy):
    """Proximal policy optimisation (Schulman et al. 2017), with settings that learn small MiniGrid tasks."""

    algorithm = sb3.PPO
    defaults: ClassVar[Mapping[str, Any]] = {
        "learning_rate": 5e-4,
        "n_steps": 128,
        "batch_size": 256,
        "n_epochs": 4,
        "ent_coef": 0.01,
    }

    @property
    def networks(self) -> dict[str, dict[str, nn.Parameter]]:
        """The parameters that answer now, of the actor and of the critic."""
        actor, critic = ["mlp_extractor.policy_net", "log_std"], ["mlp_extractor.value_net", "vf_features_extractor"]
        actor.append("features_extractor")
        critic += ["features_extractor"] if self.algo.policy.share_features_extractor else []
        head = f".heads.{self._current_head()}" if self.heads else ""
        parts = {"actor": [*actor, f"action_net{head}"], "critic": [*critic, f"value_net{head}"]}
        return {name: named(self.model, prefixes) for name, prefixes in parts.items()}

    @property
    def minibatch(self) -> dict[str, torch.Tensor]:
        """The batch whose step is about to happen, as `train()` sees it."""
        seen = self.algo.rollout_buffer.last
        gain = seen.advantages
        if self.algo.normalize_advantage and len(gain) > 1:
            gain = (gain - gain.mean()) / (gain.std() + 1e-8)
        batch = {"obs": seen.observations, "action": seen.actions, "advantage": gain, "log_prob": seen.old_log_prob}
        return {**batch, "value": seen.old_values, "return": seen.returns}

    def prepare(self, experience: Experience) -> dict[str, torch.Tensor]:
        """A rollout, (time, copies, ...), as minibatches see it, with everything that is constant while learning."""
        policy, algo = self.algo.policy, self.algo
        obs = self._tensor(self._seen(experience.obs)).flatten(0, 1)
        reward = experience.reward if self.normalizer is None else self.normalizer.normalize_reward(experience.reward)
        gains = self._tensor(reward).float().clone()
        action = self._tensor(experience.action if experience.note is None else np.stack(experience.note))
        cut = self._tensor(experience.truncated & ~experience.terminated)
        following = self._tensor(self._seen(experience.next_obs))
        with torch.no_grad():
            answer = outputs(policy, obs)
            value = answer[:, -1].reshape(gains.shape)
            if cut.any():
                gains[cut] += algo.gamma * policy.predict_values(following[cut])[:, 0]
            last = policy.predict_values(following[-1])[:, 0]
            ended = self._tensor(experience.terminated | experience.truncated).float()
            gain = advantages(gains, value, last, ended, algo.gamma, algo.gae_lambda).flatten()
            action = action.reshape(len(obs), -1)
            log_prob, _ = log_probability(answer[:, :-1], action, algo.action_space)
        returns, value = gain + value.flatten(), value.flatten()
        if algo.normalize_advantage and len(gain) > 1:
            gain = (gain - gain.mean()) / (gain.std() + 1e-8)
        batch = {"obs": obs, "action": action, "advantage": gain, "log_prob": log_prob}
        return {**batch, "value": value, "return": returns}

    def outputs(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The action distribution's parameters and the value."""
        return outputs(self.algo.policy, batch["obs"])

    def objective(self, outputs: torch.Tensor, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The loss of a minibatch, as `train()` has it (SB3 normalises advantages within each minibatch)."""
        remaining = self.algo._current_progress_remaining
        return objective(
            outputs,
            batch,
            self.algo.action_space,
            clip=self.algo.clip_range(remaining),
            clip_value=self.algo.clip_range_vf(remaining) if self.algo.clip_range_vf else None,
            value_weight=self.algo.vf_coef,
            entropy_weight=self.algo.ent_coef,
        )

    def error(self, outputs: torch.Tensor, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The part of the loss that is an error, which 0 is the least of: the value's."""
        return value_error(outputs, batch, None)

    def metric(self, outputs: torch.Tensor, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """What outputs matter by where the surrogate is not convex in them."""
        return metric(outputs, self.algo.action_space, self.algo.vf_coef)

    def divergence(self, before: torch.Tensor, after: torch.Tensor) -> dict[str, torch.Tensor]:
        """How far the answers moved."""
        return divergence(before, after, self.algo.action_space)

    critic_columns = (-1,)
    remembers = ("obs", "return")

    def distill(self, outputs: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        """The loss of answering otherwise than a teacher: the KL of the policies. The value is no answer."""
        return divergence(teacher, outputs, self.algo.action_space)["kl"].mean()
