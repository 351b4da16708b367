"""Counts of eigenvalues are brackets: the truth is inside, and they are no wider than what was proved."""

import functools
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from crl.linalg import (
    GGN,
    Block,
    Effort,
    Gram,
    Hessian,
    Matrix,
    Spectrum,
    ggn_spectrum,
    hessian_spectrum,
    hutchinson,
    spectrum,
    supervised,
)
from crl.linalg import brackets as brackets_of
from crl.linalg.lanczos import Tridiagonal, lanczos
from crl.linalg.lanczos import probes as signs

pytestmark = pytest.mark.usefixtures("one_thread")

SIZE = 400
EPS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)


def rotated(values: np.ndarray, seed: int, kind: torch.dtype = torch.float64) -> Tensor:
    """A symmetric matrix with these eigenvalues."""
    generator = torch.Generator().manual_seed(seed)
    axes = torch.linalg.qr(torch.randn(len(values), len(values), generator=generator, dtype=torch.float64))[0]
    matrix = (axes * torch.from_numpy(values)) @ axes.T
    return ((matrix + matrix.T) / 2).to(kind)


def made() -> dict[str, np.ndarray]:
    """Spectra of every kind that a count can go wrong on."""
    rng = np.random.default_rng(0)
    found: dict[str, np.ndarray] = {}
    for i, (start, stop) in enumerate([(-8, 0), (-8, 1), (-6, 2), (-5, 0), (-4, 0), (-8, -2)]):
        power = np.logspace(start, stop, SIZE)
        found[f"power law {start} to {stop}"] = power
        found[f"power law {start} to {stop}, outliers"] = np.concatenate([power[:-6], np.geomspace(3, 1e3, 6)])
        found[f"power law {start} to {stop}, indefinite"] = power * np.where(rng.random(SIZE) < 0.4, -1, 1)
        zeros = np.where(rng.random(SIZE) < 0.6, 0.0, power)
        found[f"power law {start} to {stop}, singular"] = np.where(np.arange(SIZE) % (i + 2) == 0, -zeros, zeros)
    for width in (1e-4, 1e-2, 1.0):
        found[f"a bulk of {width:g}"] = rng.normal(0, width, SIZE)
        found[f"a bulk of {width:g}, outliers"] = np.concatenate(
            [rng.normal(0, width, SIZE - 9), np.geomspace(-1, -150, 9)]
        )
    found["two heaps"] = np.concatenate([np.full(130, 5e-3), np.full(SIZE - 130, -2e-5)]) + rng.normal(0, 1e-6, SIZE)
    found["a gap at every eps"] = np.concatenate([np.full(SIZE // 5, 3 * 10.0**-k) for k in range(1, 6)])
    return found


def trained(loss: nn.Module, seed: int, rounds: int) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """A net that has learned several tasks in a row, and the data of the next."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(12, 14), nn.Tanh(), nn.Linear(14, 12), nn.ReLU(), nn.Linear(12, 4)).double()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    for task in range(rounds + 1):
        inputs = torch.randn(96, 12).double() + task
        labels = torch.randint(4, (96,))
        targets = labels if isinstance(loss, nn.CrossEntropyLoss) else torch.randn(96, 4).double() * 3
        if task < rounds:
            for _ in range(60):
                optimizer.zero_grad()
                loss(net(inputs), targets).backward()
                optimizer.step()
    return net, (inputs, targets)


class Surrogate(nn.Module):
    """PPO's loss: the clipped ratio, a value, an entropy; indefinite in the outputs."""

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Three logits and a value; targets are advantages, old log-probabilities and returns."""
        log_prob = outputs[:, :3].log_softmax(1)
        ratio = (log_prob[:, 0] - targets[:, 1]).exp()
        surrogate = torch.minimum(targets[:, 0] * ratio, targets[:, 0] * ratio.clamp(0.8, 1.2))
        entropy = -(log_prob.exp() * log_prob).sum(1)
        return (-surrogate + 0.5 * (outputs[:, 3] - targets[:, 2]).square() - 0.01 * entropy).mean()


LOSSES: dict[str, nn.Module] = {"cross-entropy": nn.CrossEntropyLoss(), "PPO": Surrogate()}
NETS = {f"{name} after {rounds} tasks": (loss, rounds) for name, loss in LOSSES.items() for rounds in (0, 1, 3, 5)}
MADE = made()
CASES = [*MADE, *NETS]


@functools.cache
def matrix_of(name: str) -> Tensor:
    """A matrix with a spectrum that was made, or the Hessian of a real net."""
    if name in MADE:
        return rotated(MADE[name], len(name))
    loss, rounds = NETS[name]
    net, batch = trained(loss, rounds, rounds)
    return Hessian(supervised(net, loss, batch)).dense()


def stieltjes(seen: Tridiagonal, eps: float) -> tuple[float, float]:
    """The classical bounds on the share beyond eps, from nodes and weights alone."""
    nodes, weights = seen.ritz()
    sums = np.concatenate([[0.0], np.cumsum(weights)])

    def below(t: float) -> tuple[float, float]:
        left = int((nodes < t).sum())  # nodes before t; the neighbour on each side may lie on the other
        return sums[max(left - 1, 0)], sums[min(left + 1, len(nodes))]

    (low, high), (least, most) = below(-eps), below(eps)
    return low + 1 - most, min(high + 1 - least, 1.0)


def chance(low: float, high: float, trials: int) -> float:
    """Four standard errors, at the worst share in the bracket."""
    worst = min(max(0.5, low), high)
    return 4 * math.sqrt(2 * worst * (1 - worst) / trials)


def wrong(name: str, steps: int, probes: int = 1) -> list[str]:
    """What does not hold of the brackets after so many steps."""
    matrix = matrix_of(name)
    truth = np.abs(torch.linalg.eigvalsh(matrix).numpy())
    seen = spectrum(Matrix(matrix), Effort(probes, steps), seed=steps, dense=0)
    block = next(block for block in seen.blocks if block.seen)
    live, found = block.size / len(truth), []
    for eps in EPS:
        wanted, rank = float((truth > eps).mean()), seen.epsilon_rank(eps)
        where = f"{name}, {steps} steps, {eps:g}: {wanted:.4f} in [{rank.low:.4f}, {rank.high:.4f}]"
        if not rank.low - 1e-9 <= wanted <= rank.high + 1e-9:
            found.append(where)
        bounds = live * np.mean([stieltjes(each, eps) for each in block.seen], axis=0)
        own = live * chance(rank.low / live, rank.high / live, probes * block.size)
        if rank.high > bounds[1] + own + 1e-6 or rank.low < bounds[0] - own - 1e-6:
            found.append(f"{where}, wider than {bounds} by {own:.4f}")
        if rank.resolved and abs(rank.value - wanted) > rank.error + 0.05:
            found.append(f"{where}, said to be {rank.value:.4f}")
        if rank.resolved is not (rank.high - rank.low <= 0.05) or math.isnan(rank.value) is rank.resolved:
            found.append(f"{where}, resolved: {rank.resolved}")
    return found


@pytest.mark.parametrize("steps", [16, 60, 150])
def test_the_truth_is_inside(steps: int) -> None:
    assert len(CASES) == 40
    assert not [line for name in CASES[:: 1 + steps // 100] for line in wrong(name, steps)]


def test_the_truth_is_inside_when_the_recursion_ends() -> None:
    assert not [line for name in CASES[::4] for line in wrong(name, 400, probes=2)]


def test_without_a_neighbour_the_truth_falls_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutant leaves out the weight of the node at the threshold, as a plain sum over Ritz values would."""
    real = brackets_of.below

    def short(*given: object) -> np.ndarray:
        bounds: np.ndarray = real(*given)
        return np.stack([bounds[:, 0], bounds[:, 0]], 1)

    monkeypatch.setattr(brackets_of, "below", short)
    assert len([line for name in CASES for line in wrong(name, 16) if "wider" not in line]) > 10


def test_what_used_to_be_one_with_no_error_is_not_resolved() -> None:
    """All mass near zero sits on one node of each probe: three fifths were reported as all, with an error of zero."""
    values = np.concatenate([np.abs(np.random.default_rng(0).normal(0, 0.01, 540)), np.geomspace(1, 150, 60)])
    eps = 0.006
    assert 0.6 < (values > eps).mean() < 0.62
    for steps in (16, 30):
        seen = spectrum(Matrix(rotated(values, 0)), Effort(3, steps), dense=0)
        sums = [float(weights[np.abs(nodes) > eps].sum()) for nodes, weights in seen.blocks[0].nodes]
        assert sums == pytest.approx([1.0] * 3), "which is what a sum over Ritz values says, of each probe"
        rank = seen.epsilon_rank(eps)
        assert rank.low <= (values > eps).mean() <= rank.high
        assert not rank.resolved and math.isnan(rank.value) and "more steps" in rank.reason


def test_bounds_are_reached_and_chance_is_covered() -> None:
    """Against distributions made to have the same moments: a Gauss rule's own, and those with a node at t."""
    rng = np.random.default_rng(0)
    values, weights = np.sort(rng.normal(size=60)), rng.dirichlet(np.ones(60))
    start = torch.from_numpy(np.sqrt(weights))[None]
    (seen,) = lanczos(Matrix(torch.diag(torch.from_numpy(values))), start, 9)
    for t in np.linspace(-2, 2, 17):
        low, high = brackets_of.below(seen, [float(t)])[0]
        assert low - 1e-12 <= weights[values < t].sum() <= weights[values <= t].sum() <= high + 1e-12
        # Christoffel's function is the width: 1 / sum p_k(t)^2 over the orthonormal polynomials of degree 0 to 9.
        ahead, before, total = 1.0, 0.0, 1.0
        for k in range(9):
            step = (t - seen.diagonal[k]) * ahead - (seen.off[k - 1] if k else 0.0) * before
            ahead, before = step / seen.off[k], ahead
            total += ahead**2
        assert high - low == pytest.approx(1 / total, rel=1e-6)


def test_chance_covers_projections() -> None:
    """Shares of a projection's eigenvalues, by single probes: within four standard errors, and not all in one."""
    matrix = rotated(np.concatenate([np.ones(12), np.zeros(188)]), 3)
    starts = signs(200, 400, 0, matrix)
    shares = (starts @ matrix * starts).sum(1).numpy() / 200
    limit = brackets_of.with_chance(0.06, 0.06, 200)
    assert np.mean(np.abs(shares - 0.06) <= limit) > 0.995
    assert np.mean(np.abs(shares - 0.06) <= limit / 4) < 0.95


def test_single_precision_is_part_of_the_bracket() -> None:
    values = np.concatenate([np.logspace(-8, -3, 390), np.geomspace(10, 1e3, 10)])
    truth = float((values > 1e-4).mean())
    single, double = (spectrum(Matrix(rotated(values, 1, kind)), dense=dense).epsilon_rank(1e-4)
                      for kind, dense in ((torch.float32, 500), (torch.float64, 500)))  # fmt: skip
    assert double.value == pytest.approx(truth) and double.low == double.high
    assert single.low <= truth <= single.high and not single.resolved and "precise" in single.reason


def test_steps_are_added_until_it_is_resolved_and_probes_against_chance() -> None:
    rng = np.random.default_rng(1)
    easy = Matrix(rotated(np.concatenate([rng.normal(0, 1e-5, 780), np.linspace(1, 2, 20)]), 0))
    seen = spectrum(easy, Effort(eps=[0.1], relative=[]), dense=0)
    assert seen.settings["steps"] <= 60 and seen.settings["probes"] > 1
    assert seen.epsilon_rank(0.1).resolved and seen.epsilon_rank(0.1).low <= 0.025 <= seen.epsilon_rank(0.1).high
    hard = spectrum(easy, Effort(eps=[1e-5], relative=[], products=120), dense=0)
    assert not hard.epsilon_rank(1e-5).resolved and hard.settings["products"] <= 124
    again = spectrum(easy, Effort(eps=[0.1], relative=[]), dense=0)
    assert again.numbers() == seen.numbers(), "what decides is no clock"
    short = spectrum(easy, Effort(eps=[1e-5], relative=[], memory=8 * 800 * 40), dense=0)
    assert short.settings["steps"] <= 40, "a basis of no more than that"


def exact_numbers(eigenvalues: Tensor) -> dict[str, float]:
    """Effective rank and negative mass by their definitions."""
    size = eigenvalues.abs()
    shares = size[size > 0] / size.sum()
    return {
        "effective_rank": float(torch.exp(-(shares * shares.log()).sum())),
        "negative_mass": float(size[eigenvalues < 0].sum() / size.sum()),
    }


@pytest.mark.parametrize("name", CASES[::3])
def test_effective_rank_and_negative_mass_are_in_their_brackets(name: str) -> None:
    matrix = matrix_of(name)
    wanted = exact_numbers(torch.linalg.eigvalsh(matrix))
    for steps in (16, 100, 400):
        seen = spectrum(Matrix(matrix), Effort(4, steps), dense=0)
        for number, truth in wanted.items():
            found = getattr(seen, number)
            assert found.low * (1 - 1e-6) - 1e-9 <= truth <= found.high * (1 + 1e-6) + 1e-9, (number, steps, found)
            if found.resolved and number == "effective_rank":
                assert found.value == pytest.approx(truth, rel=0.11)
            assert math.isnan(found.value) is bool(found.reason)


def test_an_effective_rank_is_resolved_where_it_can_be() -> None:
    seen = spectrum(Matrix(rotated(np.linspace(1.0, 1.1, 600), 0)), Effort(16, 20), dense=0)
    assert seen.effective_rank.resolved and seen.effective_rank.value == pytest.approx(600, rel=0.05)


@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(), Surrogate()], ids=["cross-entropy", "PPO"])
def test_the_ggn_is_exact_through_its_gram_matrix(loss: nn.Module) -> None:
    """Also where the loss is not convex in the outputs, and the Gram's own root does not exist."""
    net, batch = trained(loss, 0, 1)
    batch = (batch[0][:20], batch[1][:20])
    problem = supervised(net, loss, batch)
    wanted = torch.linalg.eigvalsh(GGN(problem).dense()).numpy()
    seen = ggn_spectrum(problem)
    assert seen.exact and seen.size == problem.size and Gram.rows_of(problem) == 80
    for eps in (1e-4, 1e-2, 1e-1):
        assert seen.epsilon_rank(eps).value == pytest.approx((np.abs(wanted) > eps).mean(), abs=1e-9)
    assert seen.trace.value == pytest.approx(wanted.sum()) and seen.lambda_max.value == pytest.approx(wanted[-1])
    assert seen.lambda_min.value == pytest.approx(min(wanted[0], 0.0), abs=1e-9)
    assert seen.epsilon_rank(1e-12).value <= 80 / problem.size


def test_the_ggn_of_more_samples_than_parameters_is_over_its_parameters(tmp_path: object) -> None:
    """The Gram has 120 rows and the matrix 75, of which an unseen input and a dead unit make 16 zero."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 9), nn.ReLU(), nn.Linear(9, 3)).double()
    inputs, targets = torch.randn(40, 4).double(), torch.randint(3, (40,))
    inputs[:, 0] = 0.0
    with torch.no_grad():
        net[0].bias[0] = -100.0
    for few in (40, 5):  # fewer samples: the Gram is the smaller, and zero eigenvalues are no zero rows
        problem = supervised(net, nn.functional.cross_entropy, (inputs[:few], targets[:few]))
        whole = GGN(problem).dense()
        wanted, dead = np.linalg.eigvalsh(whole.numpy()), int((whole == 0).all(1).sum())
        assert problem.size == 75 and dead >= 9 + 4 + 3
        seen = ggn_spectrum(problem)
        seen.save(f"{tmp_path}/{few}.npz")
        for found in (seen, Spectrum.load(f"{tmp_path}/{few}.npz")):
            assert found.size == 75 and found.zero_rows == dead
            for eps in (1e-6, 1e-3, 1e-2):
                share = float((np.abs(wanted) > eps).mean())
                assert found.epsilon_rank(eps).value == pytest.approx(share, abs=1e-12)
                assert found.trainable(share - 1e-9, eps) is True and found.trainable(share + 1e-9, eps) is False


def test_a_relative_count_allows_for_a_largest_eigenvalue_that_is_not_reached_yet() -> None:
    """After ten steps the Ritz value is below .996, so that 4,700 eigenvalues seemed beyond a hundredth of it."""
    values = np.concatenate([np.full(4700, 0.00996), np.linspace(0.5, 1, 300)])
    truth = float((values > 1e-2 * values.max()).mean())
    matrix = Matrix(torch.diag(torch.from_numpy(values)))
    early = spectrum(matrix, Effort(probes=10, steps=10)).relative_rank(1e-2)
    assert early.low <= truth <= early.high and not early.resolved and "bound the largest" in early.reason
    late = spectrum(matrix, Effort(probes=10, steps=120)).relative_rank(1e-2)
    assert late.resolved and late.low <= truth <= late.high and late.value == pytest.approx(truth, abs=0.01)


def test_the_largest_eigenvalue_is_within_reach() -> None:
    """Of every case after few steps and many; of what ends early the ends are known."""
    for name in CASES[::3]:
        values = np.abs(np.linalg.eigvalsh(matrix_of(name).numpy()))
        for steps in (12, 30, 90):
            least, most = spectrum(Matrix(matrix_of(name)), Effort(1, steps), steps, dense=0).reach
            assert least <= values.max() * (1 + 1e-9) and values.max() <= most * (1 + 1e-9), (name, steps)
            assert steps < 30 or math.isfinite(most)
    low = spectrum(Matrix(rotated(np.array([3.0, -5.0] + [0.0] * 98), 0)), Effort(1, 12), dense=0)
    assert low.reach == pytest.approx((5.0, 5.0))
    exact = spectrum(Matrix(rotated(np.linspace(-2, 1, 50), 0)))
    assert exact.reach == pytest.approx((2.0, 2.0)) and exact.relative_rank(0.51).low == exact.relative_rank(0.51).high
    assert exact.relative_rank(0.0).value == 1.0


def test_steps_are_added_until_the_largest_eigenvalue_is_near_enough() -> None:
    """A heap lies just beyond a tenth of the largest: it is counted only where that is known to one part in 25."""
    values = np.concatenate([np.full(1700, 1e-5), np.full(200, 0.104), np.linspace(0.5, 1, 100)])
    matrix = Matrix(torch.diag(torch.from_numpy(values)))
    assert not spectrum(matrix, Effort(probes=8, steps=25)).relative_rank(0.1).resolved
    found = spectrum(matrix, Effort(eps=[], relative=[0.1], products=1000), dense=0)
    rank = found.relative_rank(0.1)
    assert found.settings["steps"] > 25 and found.settings["products"] < 1000
    assert rank.resolved and rank.low <= 0.15 <= rank.high and rank.value == pytest.approx(0.15, abs=0.02)


def moved_by(blur: float, values: np.ndarray, seed: int) -> tuple[Spectrum, np.ndarray]:
    """An exact spectrum whose products were precise to `blur` only, and what its eigenvalues may have been before."""
    rng = np.random.default_rng(seed)
    worst = [rng.uniform(-1, 1, len(values)), np.sign(values), -np.sign(values), np.where(values < 0.1, 1, -1)][
        seed % 4
    ]
    return Spectrum((Block(len(values), np.sort(values + blur * worst), (), blur), Block(7, np.zeros(1)))), values


def numbers_by_definition(values: np.ndarray) -> dict[str, float]:
    """What numpy says."""
    size = np.abs(values)
    shares = size[size > 0] / size.sum()
    return {
        "lambda_max": float(max(values.max(), 0)),
        "lambda_min": float(min(values.min(), 0)),
        "trace": float(values.sum()),
        "negative_mass": float(size[values < 0].sum() / size.sum()),
        "effective_rank": float(np.exp(-(shares * np.log(shares)).sum())),
    }


@pytest.mark.parametrize("blur", [1e-2, 1e-4, 1e-6])
def test_rounding_is_part_of_every_bracket_of_an_exact_spectrum(blur: float) -> None:
    rng = np.random.default_rng(3)
    kinds = [np.logspace(-6, 0, 300), rng.normal(0, 1, 300), np.concatenate([np.zeros(290), np.linspace(-1, 1, 10)])]
    wide = 0
    for values in kinds:
        for seed in range(4):
            seen, truth = moved_by(blur, values, seed)
            for name, wanted in numbers_by_definition(truth).items():
                found = getattr(seen, name)
                scale = {"trace": np.abs(values).sum(), "effective_rank": wanted}.get(name, 1.0)
                assert found.low - 2e-5 * scale <= wanted <= found.high + 2e-5 * scale, (name, seed, found, wanted)
                assert math.isnan(found.value) is bool(found.reason)
                wide += bool(found.reason)
    assert bool(wide) is (blur > 1e-5), "and what is too wide is no number"


def test_rounding_that_nobody_sees_leaves_no_bracket() -> None:
    """In double precision, also of a number that is zero: no eigenvalue is negative."""
    values = np.concatenate([np.zeros(30), np.logspace(-3, 1, 170)])
    numbers = spectrum(Matrix(rotated(values, 0))).numbers(eps=(1e-2,), relative=(1e-2,))
    assert not [name for name in numbers if "/" in name]
    assert numbers["trace"] == pytest.approx(values.sum()) and numbers["negative_mass"] == pytest.approx(0, abs=1e-9)


def test_a_trace_knows_of_the_eigenvalue_that_its_probe_hardly_touches() -> None:
    """A single far eigenvalue whose vector has all entries: its weight in a probe is chi-squared, and often small."""
    out, heavy = 0, 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        far = rng.normal(size=1200)
        far /= np.linalg.norm(far)
        bulk = rng.uniform(0.5, 1.5, 1200) / 1200
        matrix = torch.from_numpy(np.diag(bulk) - np.outer(far, far))
        seen = spectrum(Matrix(matrix), Effort(probes=1, steps=60), seed=seed, dense=0)
        out += not seen.trace.low <= bulk.sum() - 1 <= seen.trace.high
        heavy += not seen.blocks[0].total(lambda x: np.clip(-x, 0, None), (0.0,))[2] >= 0.99
    assert out == 0 and heavy == 0


def test_students_quantiles() -> None:
    """Against the closed forms of one, two and four degrees of freedom, and the normal law's."""
    rare = math.erfc(4 / math.sqrt(2))

    def beyond(t: float, freedom: int) -> float:
        root = math.sqrt(freedom + t * t)
        sine = t / root
        return {1: 1 - 2 / math.pi * math.atan(t), 2: 1 - sine, 4: 1 - sine * (1 + (1 - sine**2) / 2)}[freedom]

    for freedom in (1, 2, 4):
        assert beyond(brackets_of.student(freedom), freedom) == pytest.approx(rare, rel=1e-3)
    assert brackets_of.student(10**6) == pytest.approx(4.0, abs=2e-3)


def test_hutchinson_of_few_vectors_knows_that_its_error_is_a_guess() -> None:
    matrix = rotated(np.random.default_rng(0).normal(size=60), 0)
    few, one = hutchinson(Matrix(matrix), 10), hutchinson(Matrix(matrix), 1)
    assert few.high - few.value == pytest.approx(brackets_of.student(9) * few.error) and few.low < few.value
    assert few.low <= float(np.trace(matrix.numpy())) <= few.high
    assert one.low == -math.inf and one.high == math.inf


def test_trainable_says_when_it_cannot_tell() -> None:
    seen = spectrum(Matrix(rotated(np.logspace(-8, 0, 300), 0)), Effort(1, 12), dense=0)
    rank = seen.epsilon_rank(1e-2)
    assert seen.trainable(rank.low, 1e-2) is True and seen.trainable(rank.high + 1e-6, 1e-2) is False
    assert seen.trainable((rank.low + rank.high) / 2, 1e-2) is None


def test_spectra_of_an_earlier_version_say_so(tmp_path: object) -> None:
    path = f"{tmp_path}/old.npz"
    np.savez(path, values=np.zeros((1, 2)), weights=np.ones((1, 2)) / 2, settings=np.array("{}"))
    with pytest.raises(ValueError, match=r"earlier version.*crl probe"):
        Spectrum.load(path)


def test_the_plain_call_resolves() -> None:
    """A net with more rows than are written down: where eigenvalues are few they are counted, elsewhere it says no."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(30, 60), nn.Tanh(), nn.Linear(60, 50), nn.Tanh(), nn.Linear(50, 5))
    inputs, targets = torch.randn(200, 30), torch.randint(5, (200,))
    seen = hessian_spectrum(net, nn.functional.cross_entropy, (inputs, targets))
    assert not seen.exact and seen.settings["products"] <= 304
    rank = seen.epsilon_rank(1e-1)
    assert rank.resolved and rank.low <= rank.value <= rank.high
    assert not seen.epsilon_rank(1e-3).resolved and math.isnan(seen.numbers()["epsilon_rank_0.001"])
