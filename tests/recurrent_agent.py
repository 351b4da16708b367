"""An agent with a memory: the carry is the hidden state of a GRU, learned from through 16 steps of time."""

import torch
from torch import nn
from torch.distributions import Categorical


class RecurrentAgent:
    """Advantage actor-critic on what a GRU remembers of the episode."""

    stride = 16  # vector steps between two updates; between them nothing is stored, so nothing need be saved

    def __init__(self, interface, seed, device, learning_rate=3e-3, memory=32):
        torch.manual_seed(seed)
        self.device, self.memory = device, memory
        parts = {"gru": nn.GRUCell(interface.observation.shape[0], memory), "out": nn.Linear(memory, 1)}
        self.model = nn.ModuleDict({**parts, "policy": nn.Linear(memory, interface.action.n)}).to(device)
        self.optimizer = torch.optim.Adam(self.model.parameters(), learning_rate)
        self.rollout = []

    def look(self, obs, carry):
        if carry is None:
            carry = torch.zeros(len(obs), self.memory, device=self.device)
        carry = self.model["gru"](torch.as_tensor(obs, dtype=torch.float32, device=self.device), carry)
        return Categorical(logits=self.model["policy"](carry)), self.model["out"](carry)[:, 0], carry

    @torch.no_grad()
    def act(self, obs, carry, greedy):
        policy, _, following = self.look(obs, carry)
        return (policy.mode if greedy else policy.sample()).cpu().numpy(), following, carry

    def observe(self, experience):
        self.rollout.append(experience)

    def update(self):
        if len(self.rollout) < self.stride:
            return {}
        carry, seen = self.rollout[0].note, []
        for e in self.rollout:
            policy, value, carry = self.look(e.obs, carry)
            with torch.no_grad():
                after = self.look(e.next_obs, carry)[1]
            seen.append((policy.log_prob(torch.as_tensor(e.action, device=self.device)), value, after))
            carry = carry * torch.as_tensor(~(e.terminated | e.truncated), device=self.device)[:, None]
        loss, target = 0.0, None
        for e, (chosen, value, after) in zip(reversed(self.rollout), reversed(seen), strict=True):
            reward, ended, cut = (torch.as_tensor(x, device=self.device) for x in (e.reward, e.terminated, e.truncated))
            target = reward + 0.98 * ~ended * (after if target is None else torch.where(cut, after, target))
            gain = target - value
            loss = loss + (gain.square() / 2 - chosen * gain.detach()).mean() / self.stride
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.rollout = []
        return {"losses/loss": loss.item()}

    def state_dict(self):
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state):
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
