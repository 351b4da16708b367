from torch import as_tensor, distributions, manual_seed, nn, optim


class MyAgent:
    """A small actor-critic on the CPU, which learns from every step once."""

    def __init__(self, interface, seed, device, learning_rate=5e-3):
        manual_seed(seed)
        self.kinds = int(max(getattr(interface.observation, "nvec", [0])))  # of categories, made one-hot
        inputs = interface.observation.shape[0] * max(self.kinds, 1)
        self.model = nn.Sequential(nn.Linear(inputs, 64), nn.Tanh(), nn.Linear(64, interface.action.n + 1))
        self.optimizer = optim.Adam(self.model.parameters(), learning_rate)

    def look(self, obs):
        x = as_tensor(obs)
        out = self.model(nn.functional.one_hot(x.long(), self.kinds).flatten(1).float() if self.kinds else x)
        return distributions.Categorical(logits=out[:, 1:]), out[:, 0]

    def act(self, obs, carry, greedy):
        policy = self.look(obs)[0]
        return (policy.mode if greedy else policy.sample()).numpy(), None, None

    def observe(self, e):
        (policy, value), following = self.look(e.obs), self.look(e.next_obs)[1].detach()
        gain = as_tensor(e.reward) + 0.98 * as_tensor(~e.terminated) * following - value
        self.loss = (gain**2 / 2 - policy.log_prob(as_tensor(e.action)) * gain.detach()).mean()

    def update(self):
        self.optimizer.zero_grad()
        self.loss.backward()
        self.optimizer.step()
        return {"losses/loss": self.loss.item()}

    def state_dict(self):
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state):
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
