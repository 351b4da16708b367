"""The losses as pure functions: one step of SB3's own `train()` goes down their gradient, whatever is acted with."""

import copy
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import Tensor, distributions, nn
from torch.nn.functional import smooth_l1_loss

from agents import dqn, ppo
from agents.dqn import DQN
from agents.ppo import PPO
from crl.core import Experience, Interface, Rules, Visit, facing
from crl.testing import _task

SEEN = spaces.Box(-1, 1, (4,))
ACTIONS: dict[str, Any] = {
    "discrete": spaces.Discrete(3),
    "multi_discrete": spaces.MultiDiscrete([2, 4, 3]),
    "multi_binary": spaces.MultiBinary(3),
    "box": spaces.Box(-1, 1, (2,)),
}
WIDTHS = {"discrete": 3, "multi_discrete": 9, "multi_binary": 3, "box": 4}
SMALL = {"n_steps": 32, "batch_size": 128, "net": {"hidden": [16]}}
STEP = {"optimizer": {"use": "sgd"}, "learning_rate": 0.3, "max_grad_norm": 10**9}
REPLAY = {"learning_starts": 10, "buffer_size": 500, "train_freq": 4, "net": {"hidden": [16]}}


def placed(agent_class: Any, space: Any, **options: Any) -> tuple[Any, Any]:
    """An agent and a task of random numbers, in which episodes are ended and cut often."""
    task = _task(Interface(SEEN, space, envs=4))
    return agent_class(task.shared, 3, "cpu", **options), task


def walk(agent: Any, task: Any, steps: int) -> None:
    visit = Visit(1, task, steps, seed=11, total=steps)
    agent.enter(visit)
    for _ in task.train(agent, visit):
        pass


def sampled(agent: Any, task: Any, size: int = 160) -> Experience:
    found: Experience = task.sample(agent, 7, size)
    cut = found.truncated & ~found.terminated
    assert cut.any() and found.terminated.any(), "the sample should hold both ends"
    return found


def shake(module: nn.Module, scale: float) -> None:
    """Move the weights, so that ratios are not 1 and nothing agrees by chance."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator)


def answers(name: str, samples: int = 12, seed: int = 0) -> Tensor:
    """Distribution parameters and values in float64."""
    torch.manual_seed(seed)
    return torch.randn(samples, WIDTHS[name] + 1).double()


def naive(name: str, answer: Tensor) -> list[Any]:
    """The distributions of torch, one for each independent part of the action."""
    if name == "box":
        return [distributions.Normal(answer[:, i], answer[:, 2 + i].exp()) for i in range(2)]
    if name == "multi_binary":
        return [distributions.Bernoulli(logits=answer[:, i]) for i in range(3)]
    kinds = [3] if name == "discrete" else [2, 4, 3]
    return [distributions.Categorical(logits=logits) for logits in answer.split(kinds, 1)]


# One step of SB3's own training.


@pytest.mark.parametrize("name", ACTIONS)
@pytest.mark.parametrize("extra", [{}, {"clip_range_vf": 0.1, "normalize_advantage": False, "ent_coef": 0.2,
                                        "clip_range": {"from": 0.3, "to": 0.05}}])  # fmt: skip
def test_one_step_of_sb3s_ppo_goes_down_the_objective(
    name: str, extra: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    agent, task = placed(PPO, ACTIONS[name], **SMALL, **STEP, n_epochs=1, **extra)
    train, moves = agent.algo.train, []

    def watched() -> None:
        shake(agent.model, 0.2)
        (data,) = agent.algo.rollout_buffer.get(128)
        gain = data.advantages
        if not extra:
            gain = (gain - gain.mean()) / (gain.std() + 1e-8)
        batch = {"obs": data.observations, "action": data.actions, "advantage": gain, "log_prob": data.old_log_prob,
                 "value": data.old_values, "return": data.returns}  # fmt: skip
        outputs = agent.outputs(batch)
        ratio = torch.exp(ppo.log_probability(outputs[:, :-1], batch["action"], ACTIONS[name])[0] - batch["log_prob"])
        assert (ratio > 1.3).any() and (ratio < 0.7).any(), "both sides are clipped"
        named = dict(agent.model.named_parameters())
        slopes = torch.autograd.grad(agent.objective(outputs, batch), list(named.values()))
        before = {key: value.detach().clone() for key, value in named.items()}
        train()
        moves.extend((named[key].detach() - before[key], slope) for key, slope in zip(named, slopes, strict=True))

    monkeypatch.setattr(agent.algo, "train", watched)
    walk(agent, task, 128)
    assert moves
    for moved, slope in moves:
        assert slope.abs().max() > 1e-4
        assert torch.allclose(moved, -0.3 * slope, rtol=0, atol=1e-6)


def test_one_step_of_sb3s_dqn_goes_down_the_objective(monkeypatch: pytest.MonkeyPatch) -> None:
    agent, task = placed(DQN, ACTIONS["discrete"], **REPLAY, **STEP)
    walk(agent, task, 400)
    shake(agent.algo.q_net, 0.3)
    data = agent.algo.replay_buffer.sample(64)
    monkeypatch.setattr(agent.algo.replay_buffer, "sample", lambda *args, **kwargs: data)
    with torch.no_grad():
        following = agent.algo.q_net_target(data.next_observations)
    target = dqn.targets(data.rewards[:, 0], following, agent.algo.gamma * (1 - data.dones[:, 0]))
    batch = {"obs": data.observations, "action": data.actions, "target": target}
    outputs = agent.outputs(batch)
    size = (outputs.gather(1, data.actions)[:, 0] - target).abs()
    assert (size < 1).any() and (size > 1).any(), "both pieces of Huber's loss are met"
    named = agent.networks["q"]
    slopes = torch.autograd.grad(agent.objective(outputs, batch), list(named.values()))
    before = {key: value.detach().clone() for key, value in agent.model.named_parameters()}
    agent.algo.train(gradient_steps=1, batch_size=64)
    for key, value in agent.model.named_parameters():
        wanted = dict(zip(named, slopes, strict=True)).get(key, torch.zeros(()))
        assert torch.allclose(value.detach() - before[key], -0.3 * wanted, rtol=0, atol=1e-6)


def test_hubers_loss_is_torchs() -> None:
    torch.manual_seed(0)
    outputs, action, target = torch.randn(50, 3).double(), torch.randint(3, (50, 1)), 3 * torch.randn(50).double()
    found = dqn.objective(outputs, {"action": action, "target": target})
    assert torch.allclose(found, smooth_l1_loss(outputs.gather(1, action)[:, 0], target))


def test_another_clipping_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mutant that clips gains in place of ratios goes another way than SB3."""

    def objective(outputs: Tensor, batch: Any, space: Any, *, clip: float, **weights: Any) -> Tensor:
        log_prob, entropy = ppo.log_probability(outputs[:, :-1], batch["action"], space)
        gain = batch["advantage"] * torch.exp(log_prob - batch["log_prob"])
        error = ppo.value_error(outputs, batch, weights["clip_value"])
        bonus = weights["entropy_weight"] * entropy.mean()
        return -gain.clamp(-1 - clip, 1 + clip).mean() + weights["value_weight"] * error - bonus

    monkeypatch.setattr(ppo, "objective", objective)
    with pytest.raises(AssertionError):
        test_one_step_of_sb3s_ppo_goes_down_the_objective("discrete", {}, monkeypatch)


# Advantages.


def naive_advantages(reward: Any, value: Any, last: Any, ended: Any, discount: float, trace: float) -> Any:
    """The sum of discounted surprises up to the episode's end, for each step from scratch."""
    out = np.zeros(reward.shape)
    steps, copies = reward.shape
    for copy_ in range(copies):
        for start in range(steps):
            for step in range(start, steps):
                following = last[copy_] if step + 1 == steps else value[step + 1, copy_]
                following = 0.0 if ended[step, copy_] else following
                surprise = reward[step, copy_] + discount * following - value[step, copy_]
                out[start, copy_] += (discount * trace) ** (step - start) * surprise
                if ended[step, copy_]:
                    break
    return out


@pytest.mark.parametrize(("discount", "trace"), [(0.99, 0.95), (0.9, 1.0), (1.0, 0.0), (0.5, 0.3)])
def test_advantages_are_the_naive_ones_and_sb3s(discount: float, trace: float) -> None:
    random = np.random.default_rng(0)
    reward, value = random.normal(size=(2, 20, 3)).astype(np.float32)
    last, ended = random.normal(size=3).astype(np.float32), random.random((20, 3)) < 0.2
    ended[-1] = [True, False, False]
    parts = [torch.as_tensor(part) for part in (reward, value, last)]
    found = ppo.advantages(*parts, torch.as_tensor(ended).float(), discount, trace)
    assert found.numpy() == pytest.approx(naive_advantages(reward, value, last, ended, discount, trace), abs=1e-5)
    buffer = RolloutBuffer(20, SEEN, ACTIONS["discrete"], gae_lambda=trace, gamma=discount, n_envs=3)
    buffer.rewards[:], buffer.values[:] = reward, value
    buffer.episode_starts[1:] = ended[:-1]
    buffer.compute_returns_and_advantage(last_values=parts[2], dones=ended[-1])
    assert found.numpy() == pytest.approx(buffer.advantages, abs=1e-5)
    assert (found + parts[1]).numpy() == pytest.approx(buffer.returns, abs=1e-5)


# What a batch is made of.


def values_of(agent: Any, obs: Any) -> Any:
    with torch.no_grad():
        flat = torch.as_tensor(obs.reshape(-1, 4)).float()
        return agent.algo.policy.predict_values(flat).numpy().reshape(obs.shape[:-1]).astype(np.float64)


@pytest.mark.parametrize("name", ACTIONS)
@pytest.mark.parametrize("normalized", [True, False])
def test_a_rollout_is_prepared_as_sb3_would(name: str, normalized: bool) -> None:
    agent, task = placed(PPO, ACTIONS[name], **SMALL, normalize_advantage=normalized)
    shake(agent.model, 0.3)
    experience = sampled(agent, task)
    held = copy.deepcopy(experience)
    batch = agent.prepare(experience)
    count = held.reward.size
    assert {len(part) for part in batch.values()} == {count} and not any(p.requires_grad for p in batch.values())
    # The old policy is the one that answers now: ratios are 1.
    outputs = agent.outputs(batch)
    log_prob, _ = ppo.log_probability(outputs[:, :-1], batch["action"], ACTIONS[name])
    assert torch.equal(torch.exp(log_prob - batch["log_prob"]), torch.ones(count))
    assert torch.equal(outputs[:, -1], batch["value"])
    raw = torch.as_tensor(np.stack(held.note)).flatten(0, 1)
    with torch.no_grad():
        theirs = agent.algo.policy.evaluate_actions(torch.as_tensor(held.obs).flatten(0, 1), raw)
    assert torch.allclose(batch["value"], theirs[0][:, 0], atol=1e-6)
    assert torch.allclose(batch["log_prob"], theirs[1], atol=1e-5)
    # A truncated episode goes on as the value of its last state, a terminated one does not.
    reward, cut = held.reward.astype(np.float64), held.truncated & ~held.terminated
    reward[cut] += agent.algo.gamma * values_of(agent, held.next_obs)[cut]
    value, last = values_of(agent, held.obs), values_of(agent, held.next_obs[-1])
    ended = held.terminated | held.truncated
    gain = naive_advantages(reward, value, last, ended, agent.algo.gamma, agent.algo.gae_lambda)
    assert batch["return"].numpy() == pytest.approx((gain + value).ravel(), abs=1e-4)
    if normalized:
        assert abs(float(batch["advantage"].mean())) < 1e-6 and float(batch["advantage"].std()) == pytest.approx(1)
        gain = (gain - gain.mean()) / gain.std(ddof=1)
    assert batch["advantage"].numpy() == pytest.approx(gain.ravel(), abs=1e-4)


def same(first: Experience, second: Experience) -> bool:
    names = ("obs", "action", "reward", "next_obs", "terminated", "truncated")
    return all(np.array_equal(getattr(first, name), getattr(second, name)) for name in names)


@pytest.mark.parametrize(("agent_class", "options"), [(PPO, SMALL), (DQN, REPLAY)])
def test_preparing_leaves_the_experience_alone(agent_class: Any, options: dict[str, Any]) -> None:
    agent, task = placed(agent_class, ACTIONS["discrete"], **options)
    experience = sampled(agent, task)
    held = copy.deepcopy(experience)
    first, second = agent.prepare(experience), agent.prepare(experience)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert same(experience, held)


def test_a_continuous_answer_is_judged_before_it_is_bounded() -> None:
    agent, task = placed(PPO, ACTIONS["box"], **SMALL)
    experience = sampled(agent, task)
    raw = np.stack(experience.note)
    assert (np.abs(raw) > 1).any() and np.abs(experience.action).max() <= 1
    assert np.array_equal(agent.prepare(experience)["action"].numpy(), raw.reshape(-1, 2))


def test_transitions_are_prepared_as_sb3_would() -> None:
    agent, task = placed(DQN, ACTIONS["discrete"], **REPLAY)
    shake(agent.algo.q_net, 0.3)
    shake(agent.algo.q_net_target, 0.1)
    experience = sampled(agent, task)
    batch = agent.prepare(experience)
    with torch.no_grad():
        answer = agent.algo.q_net_target(torch.as_tensor(experience.next_obs).flatten(0, 1)).numpy()
    index = 0
    for step in range(len(experience.reward)):
        for copy_ in range(4):
            following = 0.0 if experience.terminated[step, copy_] else max(answer[index])
            wanted = experience.reward[step, copy_] + agent.algo.gamma * following
            assert float(batch["target"][index]) == pytest.approx(wanted, abs=1e-5)
            assert int(batch["action"][index, 0]) == experience.action[step, copy_]
            index += 1
    assert batch["target"].shape == (index,) and not batch["target"].requires_grad
    assert torch.equal(agent.outputs(batch), agent.algo.q_net(batch["obs"]))


@pytest.mark.parametrize(("agent_class", "options"), [(PPO, SMALL), (DQN, REPLAY)])
def test_a_batch_is_normalized_as_training_is(agent_class: Any, options: dict[str, Any]) -> None:
    wanted = {"observation": True, "reward": True}
    agent, task = placed(agent_class, ACTIONS["discrete"], normalize=wanted, gamma=0.9, **options)
    walk(agent, task, 256)
    experience = sampled(agent, task)
    before = copy.deepcopy(agent.normalizer.state_dict())
    held = copy.deepcopy(experience)
    batch = agent.prepare(experience)
    after = agent.normalizer.state_dict()
    assert after["obs"]["count"] == before["obs"]["count"] == 256
    assert torch.equal(after["obs"]["mean"], before["obs"]["mean"])
    moments = agent.normalizer.obs_moments
    seen, following = ((o - moments.mean) / np.sqrt(moments.var + 1e-8) for o in (held.obs, held.next_obs))
    assert batch["obs"].numpy() == pytest.approx(seen.reshape(-1, 4), abs=1e-5)
    assert batch["obs"].dtype == torch.float32
    reward = np.clip(held.reward / np.sqrt(agent.normalizer.return_moments.var + 1e-8), -10, 10)
    if agent_class is DQN:
        with torch.no_grad():
            answer = agent.algo.q_net_target(torch.as_tensor(following.reshape(-1, 4)).float()).numpy().max(1)
        target = reward.ravel() + 0.9 * ~held.terminated.ravel() * answer
        assert batch["target"].numpy() == pytest.approx(target, abs=1e-5)
        return
    cut = held.truncated & ~held.terminated
    reward[cut] += 0.9 * values_of(agent, following)[cut]
    value, last = values_of(agent, seen), values_of(agent, following[-1])
    gain = naive_advantages(reward, value, last, held.terminated | held.truncated, 0.9, agent.algo.gae_lambda)
    assert batch["return"].numpy() == pytest.approx((gain + value).ravel(), abs=1e-4)


def test_categories_are_prepared_too() -> None:
    task = _task(Interface(spaces.MultiDiscrete([3, 4]), ACTIONS["discrete"], envs=4))
    for agent_class, options in ((PPO, SMALL), (DQN, REPLAY)):
        agent: Any = agent_class(task.shared, 3, "cpu", **options)  # type: ignore[arg-type]
        batch = agent.prepare(sampled(agent, task))
        outputs = agent.outputs(batch)
        assert outputs.shape == (160, 4 if agent_class is PPO else 3) and bool(
            agent.objective(outputs, batch).isfinite()
        )


# Distributions.


@pytest.mark.parametrize("name", ACTIONS)
def test_log_probability_and_entropy_are_torchs(name: str) -> None:
    answer = answers(name)[:, :-1]
    parts = naive(name, answer)
    actions = [part.sample() for part in parts]
    log_prob, entropy = ppo.log_probability(answer, torch.stack(actions, 1), ACTIONS[name])
    wanted = torch.stack([part.log_prob(action) for part, action in zip(parts, actions, strict=True)])
    assert torch.allclose(log_prob, wanted.sum(0), atol=1e-10)
    assert torch.allclose(entropy, torch.stack([part.entropy() for part in parts]).sum(0), atol=1e-10)


@pytest.mark.parametrize("name", ACTIONS)
def test_divergence_is_torchs(name: str) -> None:
    before, after = answers(name), answers(name, seed=1)
    found = ppo.divergence(before, after, ACTIONS[name])
    pairs = zip(naive(name, before[:, :-1]), naive(name, after[:, :-1]), strict=True)
    wanted = torch.stack([distributions.kl_divergence(old, new) for old, new in pairs]).sum(0)
    assert torch.allclose(found["kl"], wanted, atol=1e-10) and (found["kl"] > 0).all()
    assert torch.allclose(found["value_change"], (after[:, -1] - before[:, -1]) ** 2)
    still = ppo.divergence(before, before, ACTIONS[name])
    assert torch.allclose(still["kl"], torch.zeros(12).double(), atol=1e-12) and not still["value_change"].any()


@pytest.mark.parametrize("name", ACTIONS)
def test_the_metric_is_the_second_derivative_of_the_divergence(name: str) -> None:
    before = answers(name)
    found = ppo.metric(before, ACTIONS[name], value_weight=0.7)
    assert found.shape == (12, WIDTHS[name] + 1, WIDTHS[name] + 1)

    def moved(row: Tensor, after: Tensor) -> Tensor:
        apart = ppo.divergence(row[None], after[None], ACTIONS[name])
        return apart["kl"].sum() + 0.7 * apart["value_change"].sum()

    for row, block in zip(before, found, strict=True):
        wanted = torch.func.jacrev(torch.func.jacrev(lambda after, row=row: moved(row, after)))(row)
        assert torch.allclose(block, wanted, atol=1e-9)
        assert torch.linalg.eigvalsh(block)[0] > -1e-9
    assert torch.allclose(found[:, -1, -1], torch.tensor(1.4).double())


def test_the_metric_holds_the_value_losss_second_derivative() -> None:
    row = answers("discrete", 1)
    batch = {"value": row[:, -1], "return": torch.ones(1).double()}
    slope = torch.func.jacrev(lambda out: 0.7 * ppo.value_error(out, batch, None))
    wanted = torch.func.jacrev(slope)(row)[0, :, 0, :]
    assert torch.allclose(ppo.metric(row, ACTIONS["discrete"], 0.7)[0, -1], wanted[-1])


def test_extreme_logits_stay_finite() -> None:
    for name in ("discrete", "multi_discrete", "multi_binary"):
        answer = (200 * answers(name)).requires_grad_()
        action = torch.zeros(12, 3 if name != "discrete" else 1)
        log_prob, entropy = ppo.log_probability(answer[:, :-1], action, ACTIONS[name])
        assert log_prob.isfinite().all() and entropy.isfinite().all()
        (slope,) = torch.autograd.grad(log_prob.sum() + entropy.sum(), answer)
        assert slope.isfinite().all() and ppo.metric(answer, ACTIONS[name], 0.5).isfinite().all()
        assert ppo.divergence(answer, -answer, ACTIONS[name])["kl"].isfinite().all()


def test_dqns_divergence_counts_changed_choices() -> None:
    before = torch.tensor([[1.0, 0.0, 0.0], [0.0, 2.0, 1.0]])
    after = torch.tensor([[0.0, 1.0, 0.0], [0.0, 2.0, 1.0]])
    found = dqn.divergence(before, after)
    assert found["greedy_flips"].tolist() == [1.0, 0.0] and found["value_change"].tolist() == pytest.approx([2 / 3, 0])


@pytest.mark.parametrize("name", ACTIONS)
def test_an_agent_passes_its_own_settings_on(name: str) -> None:
    agent, task = placed(PPO, ACTIONS[name], **SMALL, vf_coef=0.8)
    batch = agent.prepare(sampled(agent, task))
    outputs = agent.outputs(batch).detach()
    assert torch.allclose(agent.error(outputs, batch), (outputs[:, -1] - batch["return"]).square().mean())
    perfect = torch.cat([outputs[:, :-1], batch["return"][:, None]], 1)
    assert float(agent.error(perfect, batch)) == 0.0
    assert torch.equal(agent.metric(outputs, batch), ppo.metric(outputs, ACTIONS[name], 0.8))
    assert not agent.divergence(outputs, outputs)["value_change"].any()
    assert float(agent.divergence(outputs, outputs)["kl"].abs().max()) < 1e-6


# Networks.


def check_partition(agent: Any, shared: str = "nothing is") -> None:
    parts = agent.networks
    named = {name: value for name, value in agent.model.named_parameters() if value.requires_grad}
    assert set(parts["actor"]) | set(parts["critic"]) == set(named)
    both = set(parts["actor"]) & set(parts["critic"])
    assert all(name.startswith(shared) for name in both)
    assert all(named[name] is value for part in parts.values() for name, value in part.items())
    # Each is what its half of the outputs hangs on.
    outputs = agent.outputs({"obs": torch.randn(5, 4)})
    for part, half in (("actor", outputs[:, :-1]), ("critic", outputs[:, -1])):
        found = torch.autograd.grad(half.sum(), list(named.values()), allow_unused=True, retain_graph=True)
        assert {name for name, slope in zip(named, found, strict=True) if slope is not None and slope.any()} == set(
            parts[part]
        )


@pytest.mark.parametrize("name", ACTIONS)
def test_actor_and_critic_share_out_the_parameters(name: str) -> None:
    agent, _ = placed(PPO, ACTIONS[name], **SMALL)
    assert not set(agent.networks["actor"]) & set(agent.networks["critic"])
    assert ("log_std" in agent.networks["actor"]) is (name == "box")
    check_partition(agent)


class Extractor(BaseFeaturesExtractor):
    """A first layer of its own."""

    def __init__(self, observation_space: Any) -> None:
        super().__init__(observation_space, 6)
        self.layer = nn.Linear(4, 6)

    def forward(self, obs: Tensor) -> Tensor:
        found: Tensor = self.layer(obs).tanh()
        return found


@pytest.mark.parametrize("shared", [True, False])
def test_first_layers_belong_to_whom_they_serve(shared: bool) -> None:
    kwargs = {"features_extractor_class": Extractor, "share_features_extractor": shared}
    agent, task = placed(PPO, ACTIONS["discrete"], **SMALL, policy_kwargs=kwargs)
    check_partition(agent, "features_extractor.")
    assert bool(set(agent.networks["actor"]) & set(agent.networks["critic"])) is shared
    batch = agent.prepare(sampled(agent, task))
    with torch.no_grad():
        values = agent.algo.policy.predict_values(batch["obs"])[:, 0]
    assert torch.allclose(batch["value"], values, atol=1e-6)


def test_dqns_network_leaves_the_target_out() -> None:
    agent, _ = placed(DQN, ACTIONS["discrete"], **REPLAY)
    own = {f"q_net.{name}" for name, _ in agent.algo.q_net.named_parameters()}
    assert set(agent.networks["q"]) == own and len(own) == 4
    targets = {id(value) for value in agent.algo.q_net_target.parameters()}
    assert not targets & {id(value) for value in agent.networks["q"].values()}


@pytest.mark.parametrize(("agent_class", "options"), [(PPO, SMALL), (DQN, REPLAY)])
def test_only_the_head_that_answers_is_looked_at(agent_class: Any, options: dict[str, Any]) -> None:
    agent, _ = placed(agent_class, ACTIONS["discrete"], **options)
    plain = sum(value.numel() for part in agent.networks.values() for value in part.values())
    tasks: list[Any] = [SimpleNamespace(name=f"task {index}") for index in range(11)]
    for index, task in enumerate(tasks, 1):
        agent.enter(Visit(index, task, 64, seed=index, total=704, rules=Rules(head="per_task")))

    def heads() -> set[str]:
        names = [name for part in agent.networks.values() for name in part]
        assert sum(value.numel() for part in agent.networks.values() for value in part.values()) == plain
        return {name.split(".heads.")[1].split(".")[0] for name in names if ".heads." in name}

    assert heads() == {"10"}
    for index in (1, 0):
        with facing(agent, tasks[index]):
            assert heads() == {str(index)}
            outputs = agent.outputs({"obs": torch.randn(5, 4)})
            chosen = [value for part in agent.networks.values() for value in part.values()]
            found = torch.autograd.grad(outputs.sum(), chosen, allow_unused=True)
            assert all(slope is not None for slope in found)
    assert heads() == {"10"}


def test_frozen_parameters_are_no_part_of_a_network() -> None:
    agent, _ = placed(PPO, ACTIONS["discrete"], **SMALL)
    agent.model.action_net.bias.requires_grad_(False)
    assert "action_net.bias" not in agent.networks["actor"] and "action_net.weight" in agent.networks["actor"]
