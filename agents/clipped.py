"""Whether the critic is what learning is about, where one clip is over its gradient and the actor's.

Returns of hundreds make the value's gradient hundreds of times longer than the policy's. Clipped together to a norm
of .5, next to nothing of it is the policy's; and a critic that has so far to go gives bad advantages for long. What a
study says of learning is then about the scale of the rewards.
"""

from __future__ import annotations

from typing import Any

import torch

FEW = 10.0  # times that the clip may shorten the actor's gradient because of the critic
MOST = 2_048  # samples that are looked at


def crowded_out(algo: Any) -> str:
    """One line where the critic's gradient alone is ten times the clip and ten times the actor's; else nothing.

    It is measured on the rollout that is about to be learned from, at the weights that collected it.
    """
    clip = getattr(algo, "max_grad_norm", None)
    if not clip or not hasattr(algo, "vf_coef"):
        return ""
    actor, critic = _norms(algo)
    if critic <= FEW * max(clip, actor):
        return ""
    return (
        f"the critic's gradient is {critic:.3g} and the actor's {actor:.2g}, clipped together to {clip:g}: returns are "
        "large, and learning is about the critic; recommended: agent.normalize.reward=true"
    )


def _norms(algo: Any) -> tuple[float, float]:
    """The lengths of the policy's and the value's gradient, as their losses enter the one that is clipped."""
    policy, buffer = algo.policy, algo.rollout_buffer
    rows = max(MOST // buffer.n_envs, 1)

    def part(values: Any) -> torch.Tensor:
        return torch.as_tensor(values[:rows], device=algo.device).flatten(0, 1)

    actions = part(buffer.actions)
    actions = actions.long().flatten() if policy.action_space.shape == () else actions.float()  # as SB3's own samples
    values, log_prob, _ = policy.evaluate_actions(part(buffer.observations), actions)
    gain = part(buffer.advantages)
    gain = (gain - gain.mean()) / (gain.std() + 1e-8)
    losses = -(gain * log_prob).mean(), algo.vf_coef * (part(buffer.returns) - values.flatten()).square().mean()
    actor, critic = (_length(loss, [p for p in policy.parameters() if p.requires_grad]) for loss in losses)
    return actor, critic


def _length(loss: torch.Tensor, parameters: list[torch.nn.Parameter]) -> float:
    found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    return float(torch.stack([part.square().sum() for part in found if part is not None]).sum().sqrt())
