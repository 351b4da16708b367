from crl.monitors.features import features
from crl.monitors.look import Look


class Silence(Look):
    """The share of hidden activations that are exactly zero, in each network."""

    def look(self, view):
        seen = features(view)
        return {name: sum(float((x.values == 0).float().mean()) for x in seen[name]) / len(seen[name]) for name in seen}
