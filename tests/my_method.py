from crl.methods.method import Method


class Prune(Method):
    """Weights smaller than `size` are zero after every step."""

    def __init__(self, size=1e-4):
        super().__init__()
        self.size = size

    def after_step(self, optimizer):
        for weight in self.owned(optimizer).values():
            self.count("pruned", float((weight.abs() < self.size).sum()))
            weight[weight.abs() < self.size] = 0
