"""A custom agent with every optional part that methods use: an actor-critic that learns from each step once."""

import itertools

from torch import as_tensor, distributions, manual_seed, nn, no_grad, optim


class FullAgent:
    """One network answers with logits and a value; its chain is read off the `nn.Sequential`."""

    remembers = ("obs", "return")
    critic_columns = (0,)
    epoch = 3

    def __init__(self, interface, seed, device, *, net=None, learning_rate=5e-3):
        manual_seed(seed)
        shape = {"hidden": [8, 8], "norm": "none", **(net or {})}
        self.interface = interface
        self.inputs = interface.observation.shape[0]
        widths, parts = [self.inputs, *shape["hidden"]], []
        for inputs, outputs in itertools.pairwise(widths):
            norm = [nn.LayerNorm(outputs)] if shape["norm"] == "layer" else []
            parts += [nn.Linear(inputs, outputs), *norm, nn.Tanh()]
        self.model = nn.Sequential(*parts, nn.Linear(widths[-1], interface.action.n + 1))
        self.optimizers = [optim.Adam(self.model.parameters(), learning_rate)]
        self.minibatch = {}
        self.seen, self.length = 0, 1

    @property
    def progress(self):
        return min(1.0, self.seen / self.length)

    def enter(self, visit):
        self.seen, self.length = 0, visit.steps

    def act(self, obs, carry, greedy):
        with no_grad():
            logits = self.model(as_tensor(obs).float())[:, 1:]
        policy = distributions.Categorical(logits=logits)
        return (policy.mode if greedy else policy.sample()).numpy(), None, None

    def observe(self, experience):
        self.minibatch = self.prepare(experience)
        self.seen += len(experience.obs)

    def update(self):
        loss = self.objective(self.outputs(self.minibatch), self.minibatch)
        self.optimizers[0].zero_grad()
        loss.backward()
        self.optimizers[0].step()
        return {"losses/loss": loss.item()}

    def rebuilt(self):
        known = {id(p) for group in self.optimizers[0].param_groups for p in group["params"]}
        new = [p for p in self.model.parameters() if p.requires_grad and id(p) not in known]
        if new:
            self.optimizers[0].add_param_group({"params": new})

    def prepare(self, experience):
        obs, following = (as_tensor(x).float().reshape(-1, self.inputs) for x in (experience.obs, experience.next_obs))
        with no_grad():
            worth, old = self.model(following)[:, 0], self.model(obs)[:, 0]
        alive = 1 - as_tensor(experience.terminated).float().flatten()
        target = as_tensor(experience.reward).float().flatten() + 0.98 * alive * worth
        action = as_tensor(experience.action).long().flatten()
        return {"obs": obs, "action": action, "return": target, "gain": target - old}

    def outputs(self, batch):
        return self.model(batch["obs"])

    def objective(self, outputs, batch):
        logs = outputs[:, 1:].log_softmax(1).gather(1, batch["action"][:, None])[:, 0]
        return ((batch["return"] - outputs[:, 0]).square() / 2 - logs * batch["gain"]).mean()

    def rehearse(self, batch):
        return self.distill(self.outputs(batch), batch["outputs"])  # an actor-critic's old gains say nothing

    def distill(self, outputs, teacher):
        policies = [distributions.Categorical(logits=x[:, 1:]) for x in (teacher, outputs)]
        return distributions.kl_divergence(*policies).mean()

    def state_dict(self):
        parts = {"model": self.model.state_dict(), "optimizer": self.optimizers[0].state_dict()}
        return {**parts, "seen": [self.seen, self.length]}

    def load_state_dict(self, state):
        self.model.load_state_dict(state["model"])
        self.optimizers[0].load_state_dict(state["optimizer"])
        self.seen, self.length = state["seen"]
