"""Growth of gradients: Proposition 1, the simulation against real networks and autograd, and measurements on models."""

import copy
import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn
from torch.nn import functional as F
from torchvision.models import VisionTransformer, resnet18

import residrop
from helpers import ALPHA, assert_binomial, seed
from residrop import sampler_of
from residrop.blocks.attach import connect
from residrop.common.errors import ConfigError
from residrop.models import Vanilla
from residrop.schedule.budgets import linear_at, uniform_at
from residrop.theory import gated, gradient_growth, growth, growth_rates, measure_growth
from residrop.theory.vanilla_gradients import _log_ratios, _masks

LEVELS = (0, 10, 20, 30, 40)


def modes(blocks, budget):
    return {
        "standard": (1.0,) * blocks,
        "uniform": uniform_at(blocks, budget * blocks),
        "linear": linear_at(blocks, budget * blocks),
    }


# Prediction


@pytest.mark.parametrize(
    ("mode", "budget", "published"),
    [
        ("standard", 0.7, (2, 2, 2, 2, 2)),
        ("uniform", 0.7, (1.7, 1.7, 1.7, 1.7, 1.7)),
        ("linear", 0.7, (1.6915, 1.6355, 1.5791, 1.5220, 1.4643)),
        ("uniform", 0.5, (1.5, 1.5, 1.5, 1.5, 1.5)),
        ("linear", 0.5, (1.4727, 1.3834, 1.2928, 1.2006, 1.1064)),
    ],
)
def test_table_1_predicted(mode, budget, published):
    found = growth_rates(modes(50, budget)[mode])
    assert len(found) == 50
    assert [found[level] for level in LEVELS] == pytest.approx(published, abs=6e-5)


@pytest.mark.parametrize(
    ("mode", "budget", "q_0"),
    [
        ("standard", 0.7, 2.692),
        ("uniform", 0.7, 2.004),
        ("linear", 0.7, 2.003),
        ("uniform", 0.5, 1.645),
        ("linear", 0.5, 1.643),
    ],
)
def test_stable_growth_predicted(mode, budget, q_0):
    found = growth(modes(50, budget)[mode], stable=True)
    assert len(found) == 51
    assert found[0] == pytest.approx(q_0, abs=6e-4)
    assert found[-1] == 1.0
    rates = [q ** (1 / (50 - level)) for level, q in enumerate(found[:-1])]
    assert growth_rates(modes(50, budget)[mode], stable=True) == pytest.approx(rates)


def test_growth_in_numbers():
    assert growth([1.0] * 50)[0] == 2.0**50
    assert growth(uniform_at(50, 25))[0] == pytest.approx(6.376e8, rel=1e-3)
    assert growth(uniform_at(50, 35))[0] == pytest.approx(3.330e11, rel=1e-3)
    assert growth([0.5, 0.0, 1.0]) == (3.0, 2.0, 2.0, 1.0)
    assert growth_rates([0.5, 0.0, 1.0]) == pytest.approx((3 ** (1 / 3), 2**0.5, 2.0))


def test_deep_networks_do_not_overflow():
    assert growth([1.0] * 5000)[0] == math.inf
    assert growth_rates([1.0] * 5000) == pytest.approx([2.0] * 5000)
    found = measure_growth([1.0] * 1500, width=24, samples=2, levels=(0, 1499))
    assert found.q[0] == math.inf
    assert 1.5 < found.rates[0] < 2.5
    assert torch.stack([found.rates, found.rates_error]).isfinite().all()


# The simulation of Vanilla networks


class Recorded:
    """Standard normal numbers that are kept."""

    def __init__(self, rows, width):
        self.shape, self.drawn = (rows, width), []

    def __call__(self):
        self.drawn.append(torch.randn(self.shape, dtype=torch.float64))
        return self.drawn[-1]


def unit(v):
    size = v.norm()
    return v if size == 0 else v / size


def network_of(drawn, row, mask, width, stable):
    """A Vanilla network whose weights are those that the simulation drew, as far as it did; and its gradient at y_L."""
    blocks, std = len(mask), (2 / width) ** 0.5
    y0, images, top, fresh = drawn[0], drawn[1 : 1 + blocks], drawn[1 + blocks], drawn[2 + blocks :][::-1]
    model = Vanilla(blocks, width=width, in_features=1, stable=stable).double()
    step = std / blocks**0.5 if stable else std
    hs, y = [], y0[row]
    for mine, image in zip(mask, images, strict=True):
        hs.append(unit(F.relu(y)))
        y = y + mine * step * F.relu(y).norm() * image[row]
    g = top[row]
    with torch.no_grad():
        model.stem.weight.copy_(y0[row][:, None])
        model.tail.weight.copy_(g[None])
        for number in reversed(range(blocks)):
            h, a, b = hs[number], images[number][row], fresh[number][row]
            weight = std * (torch.outer(a, h) + torch.outer(unit(g), b - h * (h @ b)))
            model.blocks[number].branch.linear.weight.copy_(weight)
            g = g + mask[number] * (step / std) * (weight.T @ g) * (h > 0)
    connect(model)
    return model


def watched(modules):
    """What these modules give from now on."""
    outputs = []
    for module in modules:
        module.register_forward_hook(lambda module, args, output: outputs.append(output))
    return outputs


@pytest.mark.parametrize("stable", [False, True])
def test_simulation_equals_autograd_on_the_real_network(stable):
    rows, blocks, width = 4, 6, 8
    alive = torch.tensor(
        [[1, 1, 1, 1, 1, 1], [1, 0, 1, 1, 0, 1], [0, 0, 1, 0, 1, 0], [1, 1, 0, 1, 1, 1]], dtype=torch.float64
    )
    normal = Recorded(rows, width)
    branch = (2 / width) ** 0.5 / (blocks**0.5 if stable else 1.0)
    simulated = _log_ratios(alive, 0, branch, normal).exp()
    assert len(normal.drawn) == 2 + 2 * blocks
    for row in range(rows):
        model = network_of(normal.drawn, row, alive[row], width, stable)
        x = torch.ones(1, 1, dtype=torch.float64)
        hidden = watched([model.stem, *model.blocks])
        with gated(model, alive[row : row + 1]):
            grads = torch.autograd.grad(model(x).sum(), hidden)
        sizes = torch.stack([grad.square().sum() for grad in grads])
        torch.testing.assert_close(simulated[row], sizes / sizes[-1], rtol=1e-9, atol=0)
        found = gradient_growth(model, [(x, x)], lambda z, t: z.sum(), rates=alive[row].tolist())
        torch.testing.assert_close(found.q, simulated[row, :-1], rtol=1e-9, atol=0)


def test_only_the_levels_asked_for_are_simulated():
    alive = (torch.rand(5, 7) < 0.6).double()
    normal = Recorded(5, 6)
    whole = _log_ratios(alive, 0, 0.5, normal)
    replay = iter(normal.drawn)
    part = _log_ratios(alive, 4, 0.5, lambda: next(replay))
    torch.testing.assert_close(part, whole[:, 4:])


def dense_ratios(rates, width, networks, stable):
    """The ratios of independent networks with all of their weights, by autograd: float64 Tensor[networks, L]."""
    blocks = len(rates)
    y = torch.bmm(torch.randn(networks, width, 3), torch.randn(networks, 3, 1)).requires_grad_()
    hidden = [y]
    for rate in rates:
        weight = torch.randn(networks, width, width) * (2 / width) ** 0.5 / (blocks**0.5 if stable else 1.0)
        delta = (torch.rand(networks, 1, 1) < rate).float()
        y = y + delta * torch.bmm(weight, F.relu(y))
        hidden.append(y)
    out = torch.bmm(torch.randn(networks, 1, width), y)
    grads = torch.autograd.grad((out.cos() * 3).sum(), hidden)
    sizes = torch.stack([grad.double().square().sum(dim=(1, 2)) for grad in grads], dim=1)
    return sizes[:, :-1] / sizes[:, -1:]


@pytest.mark.parametrize(("width", "stable"), [(4, False), (1, False), (3, True)])
def test_narrow_networks_have_the_same_law(width, stable):
    """Where they are far from the limit of infinite width."""
    networks, blocks = 40_000, 3
    dense = dense_ratios((1.0,) * blocks, width, networks, stable)
    branch = (2 / width) ** 0.5 / (blocks**0.5 if stable else 1.0)
    drawn = _log_ratios(torch.ones(networks, blocks), 0, branch, lambda: torch.randn(networks, width)).exp()
    for level in range(blocks):
        # rounded, as there are many ratios of exactly 1: where all units are off
        samples = [ratios[:, level].numpy().round(4) for ratios in (dense, drawn)]
        assert stats.ks_2samp(samples[0], samples[1]).pvalue > ALPHA


@pytest.mark.parametrize("stable", [False, True])
def test_tilted_masks_measure_the_mean_over_plain_masks(stable):
    rates = (0.5, 0.9, 0.3)
    dense = dense_ratios(rates, 4, 300_000, stable)
    error = dense.std(dim=0) / len(dense) ** 0.5
    found = measure_growth(rates, width=4, stable=stable, samples=100_000, levels=(0, 1, 2), seed=seed(1))
    assert (((found.q - dense.mean(dim=0)) / (found.q_error**2 + error**2).sqrt()).abs() < 5).all()
    # and that mean is not the prediction for wide networks, so it is no tautology
    assert found.q[0] - growth(rates, stable=stable)[0] > 3 * found.q_error[0]


def test_weights_of_tilted_masks():
    rates = torch.tensor([0.3, 0.5, 1.0, 0.0, 0.8, 0.2], dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed(2))
    alive, logs = _masks(rates, 2, 1.0, 200_000, generator)
    weights = logs.exp()[:, None]
    for sample, mean in ((weights, torch.ones(1)), (weights * alive, rates), (alive[:, :2], rates[:2])):
        error = sample.double().std(dim=0) / len(sample) ** 0.5
        assert ((sample.double().mean(dim=0) - mean).abs() <= 5 * error + 1e-12).all()
    assert alive[:, 4].mean() > 0.85  # 0.8 is drawn as 1.6 / 1.8
    assert alive[:, 2:4].unique(dim=0).tolist() == [[1.0, 0.0]]


@pytest.mark.parametrize("stable", [False, True])
def test_standard_errors_are_honest(stable):
    rates, levels = uniform_at(8, 4), (0, 4, 7)
    runs = [
        measure_growth(rates, width=16, samples=100, levels=levels, stable=stable, seed=seed(1000) + i)
        for i in range(300)
    ]
    truth = measure_growth(rates, width=16, samples=20_000, levels=levels, stable=stable, seed=seed(9))
    for kind, error in (("q", "q_error"), ("rates", "rates_error")):
        off = torch.stack([getattr(run, kind) for run in runs]) - getattr(truth, kind)
        z = off / torch.stack([getattr(run, error) for run in runs])
        for level in range(3):
            assert_binomial(int((z[:, level].abs() < 1.96).sum()), 300, 0.94, f"{kind} within 1.96 errors")
            # the spread of the runs themselves is what they say it is
            said = torch.stack([getattr(run, error)[level] for run in runs]).square().mean().sqrt()
            assert float(off[:, level].std() / said) == pytest.approx(1.0, abs=0.2)


def test_levels_are_independent_of_each_other_and_results_repeat():
    rates = uniform_at(12, 6)
    several = measure_growth(rates, width=8, samples=40, levels=(3, 0, 11), seed=5)
    alone = measure_growth(rates, width=8, samples=40, levels=(0,), seed=5)
    assert several.levels == (3, 0, 11)
    assert several.samples == 40
    assert float(several.q[1]) == pytest.approx(float(alone.q[0]), rel=1e-12)
    assert float(alone.q[0]) != float(measure_growth(rates, width=8, samples=40, levels=(0,), seed=6).q[0])
    assert measure_growth(uniform_at(25, 6), width=4, samples=2).levels == (0, 3, 6, 9, 12, 15, 18, 21, 24)


def test_rates_and_errors_are_those_of_q():
    found = measure_growth(uniform_at(10, 6), width=16, samples=50, levels=(2, 7))
    left = torch.tensor([8.0, 3.0], dtype=torch.float64)
    torch.testing.assert_close(found.rates, found.q ** (1 / left))
    torch.testing.assert_close(found.rates_error, found.rates / left * found.q_error / found.q)


def check_against_theory(blocks, width, budget, levels, **options):
    """Every rate within 0.02 of theory, and by at least four standard errors."""
    for name, rates in modes(blocks, budget).items():
        found = measure_growth(rates, width=width, levels=levels, **options)
        predicted = torch.tensor(growth_rates(rates), dtype=torch.float64)[list(levels)]
        assert ((found.rates - predicted).abs() + 4 * found.rates_error < 0.02).all(), (name, predicted, found)


@pytest.mark.parametrize("budget", [0.5, 0.7])
def test_proposition_1_holds_in_small(budget):
    check_against_theory(20, 512, budget, (0, 10), samples=500, seed=seed(0))


@pytest.mark.slow
@pytest.mark.parametrize("budget", [0.5, 0.7])
def test_table_1_measured(budget):
    check_against_theory(50, 512, budget, LEVELS, samples=500, seed=seed(0))


@pytest.mark.slow
def test_stable_growth_measured():
    for rates in [*modes(50, 0.7).values(), *modes(50, 0.5).values()]:
        found = measure_growth(rates, stable=True, levels=(0, 25), seed=seed(0))
        predicted = growth(rates, stable=True)
        np.testing.assert_allclose(found.q, [predicted[0], predicted[25]], rtol=0.03)


# Any model


def images(rows=6, classes=10, size=32):
    return torch.randn(rows, 3, size, size), torch.randint(classes, (rows,))


def plain_growth(model, hidden, x, y):
    """q_l of each row at full depth, one row at a time; `hidden` finds y_0..y_L by hooks of its own."""
    found = []
    for row in range(len(x)):
        values = hidden(x[row : row + 1])
        grads = torch.autograd.grad(F.cross_entropy(values.pop(), y[row : row + 1]), values)
        sizes = torch.stack([grad.double().square().sum() for grad in grads])
        found.append(sizes[:-1] / sizes[-1])
    every = torch.stack(found)
    return every.mean(dim=0), every.std(dim=0) / len(x) ** 0.5


def test_full_depth_of_a_cifar_network():
    model = residrop.create("resnet-14", rule="stochastic-depth", survival=0.5, seed=1).eval()
    x, y = images()

    def hidden(row):
        values = [model.stem(row)]
        for block in model.blocks:
            h = values[-1]
            values.append(block.post(block.shortcut(h) + block.branch(h)))
        return [*values, model.tail(values[-1])]

    q, error = plain_growth(model, hidden, x, y)
    found = gradient_growth(model, [(x[:4], y[:4]), (x[4:], y[4:])], rates=1.0)
    assert (found.levels, found.samples) == (tuple(range(6)), 6)
    torch.testing.assert_close(found.q, q, rtol=1e-3, atol=0)
    torch.testing.assert_close(found.q_error, error, rtol=1e-2, atol=0)


def test_full_depth_of_a_torchvision_network():
    plain = resnet18(num_classes=10).eval()
    model = copy.deepcopy(plain)
    residrop.apply(model, survival=0.5, seed=0)
    x, y = images(4, size=64)

    def hidden(row):
        values = [plain.maxpool(plain.relu(plain.bn1(plain.conv1(row))))]
        for layer in (plain.layer1, plain.layer2, plain.layer3, plain.layer4):
            for block in layer:
                values.append(block(values[-1]))
        return [*values, plain.fc(plain.avgpool(values[-1]).flatten(1))]

    q, _ = plain_growth(plain, hidden, x, y)
    found = gradient_growth(model, [(x, y)], rates=1.0)
    assert len(found.q) == 8
    torch.testing.assert_close(found.q, q, rtol=1e-3, atol=0)
    assert not torch.allclose(gradient_growth(model, [(x, y)]).q, q, rtol=0.05)


def test_blocks_of_two_branches_and_of_unknown_classes():
    plain = VisionTransformer(32, 16, 2, 2, 16, 32, num_classes=10).eval()
    nn.init.normal_(plain.heads[0].weight)
    x, y = images(3)
    seen = {}
    for number, layer in enumerate(plain.encoder.layers):
        layer.register_forward_hook(lambda m, i, out, at=number: seen.update({at: (i[0], out)}))
    logits = plain(x)
    values = [seen[0][0], seen[1][0], seen[1][1]]
    grads = torch.autograd.grad(F.cross_entropy(logits, y), values)
    sizes = torch.stack([grad.double().square().flatten(1).sum(dim=1) for grad in grads])
    q = (sizes[:-1] / sizes[-1]).mean(dim=1)
    for branches, places in ((True, [0, 2]), (False, [0, 1])):
        model = copy.deepcopy(plain)
        residrop.apply(model, survival=0.5, branches=branches)
        torch.testing.assert_close(gradient_growth(model, [(x, y)], rates=1.0).q[places], q, rtol=1e-3, atol=0)


def one_block(survival=0.25, **options):
    model = nn.Sequential(residrop.Residual(nn.Linear(3, 3), rule=residrop.StochasticDepth(survival, **options)))
    residrop.attach(model, seed=0)
    return model


@pytest.mark.parametrize(("rescale", "factor"), [("train", 4.0), ("test", 1.0)])
def test_every_row_has_its_own_coin_and_training_scale(rescale, factor):
    """The input itself is y_0 here, and needs no gradient; one block has two possible ratios."""
    model = one_block(rescale=rescale)
    weight = model[0].branch.weight.detach()
    v = torch.tensor([1.0, -2.0, 0.5])
    absent, present = 1.0, float((v + factor * weight.T @ v).square().sum() / v.square().sum())
    x = torch.randn(4000, 3)
    found = gradient_growth(model, [(x, x)], lambda z, t: (z @ v).sum(), seed=seed(3))
    share = (float(found.q[0]) - absent) / (present - absent)
    assert_binomial(round(share * 4000), 4000, 0.25)
    assert share * 4000 == pytest.approx(round(share * 4000), abs=0.05)
    sure = gradient_growth(model, [(x, x)], lambda z, t: (z @ v).sum(), rates=1.0)
    assert float(sure.q[0]) == pytest.approx(float((v + weight.T @ v).square().sum() / v.square().sum()), rel=1e-5)


def test_last_output_is_that_of_the_block():
    """After its activation, which its rule knows nothing of; overwriting it afterwards changes nothing."""
    block = residrop.Residual(nn.Linear(5, 5), rule=residrop.StochasticDepth(0.5), post=nn.Hardtanh(-0.5, 9.0))
    model = nn.Sequential(block, nn.LeakyReLU(0.1, inplace=True))
    residrop.attach(model, seed=0)
    x = torch.randn(1, 5, requires_grad=True)
    last = F.hardtanh(x + block.branch(x), -0.5, 9.0)
    z = F.leaky_relu(last, 0.1)
    grads = torch.autograd.grad(z.square().sum() + z.sum(), [x, last])
    found = gradient_growth(model, [(x.detach(), x)], lambda z, t: z.square().sum() + z.sum(), rates=1.0)
    expected = grads[0].double().square().sum() / grads[1].double().square().sum()
    torch.testing.assert_close(found.q[0], expected, rtol=1e-5, atol=0)


def test_a_block_that_runs_twice_counts_from_its_first_input_to_its_last_output():
    block = residrop.Residual(nn.Linear(3, 3), rule=residrop.StochasticDepth(0.5))
    model = nn.Sequential(block, block)
    residrop.attach(model, seed=0)
    x = torch.randn(1, 3)
    jacobian = torch.eye(3) + block.branch.weight.detach()
    expected = (torch.ones(3) @ jacobian @ jacobian).double().square().sum() / 3
    found = gradient_growth(model, [(x, x)], lambda z, t: z.sum(), rates=1.0)
    torch.testing.assert_close(found.q[0], expected, rtol=1e-5, atol=0)


def test_agrees_with_the_simulation_over_draws_of_the_weights():
    rates, draws = (0.8, 0.5, 0.9, 0.6), 300
    found = []
    for number in range(draws):
        model = residrop.create(
            "vanilla-4", rule="stochastic-depth", survival=rates, width=32, in_features=8, classes=1, seed=number
        )
        batch = torch.randn(8, 8), torch.randn(8, 1)
        found.append(gradient_growth(model, [batch], F.mse_loss, passes=2, seed=number).q)
    q = torch.stack(found)
    error = q.std(dim=0) / draws**0.5
    simulated = measure_growth(rates, width=32, samples=20_000, levels=range(4), seed=seed(4))
    assert (((q.mean(dim=0) - simulated.q) / (error**2 + simulated.q_error**2).sqrt()).abs() < 5).all()


def test_passes_are_averaged_within_an_input():
    model = one_block(rescale="none")
    x = torch.randn(500, 3)

    def run(passes):
        return gradient_growth(model, [(x, x)], lambda z, t: z.sum(), passes=passes, seed=seed(5))

    assert run(1).samples == run(16).samples == 500
    assert float(run(16).q_error / run(1).q_error) == pytest.approx(0.25, rel=0.25)
    one = gradient_growth(model, [(x[:1], x[:1])], lambda z, t: z.sum())
    assert one.samples == 1
    assert one.q_error.isnan().all()
    assert one.q.isfinite().all()


def test_rows_without_a_gradient_are_left_out():
    model = one_block()
    x = torch.randn(6, 3)
    keep = torch.tensor([1.0, 0, 1, 1, 0, 1])[:, None]
    found = gradient_growth(model, [(x, x)], lambda z, t: (z * keep).sum(), rates=1.0)
    assert found.samples == 4
    assert found.q.isfinite().all()


def snapshot(model):
    """Tensors of a model, and what else there is of it."""
    tensors = [value.clone() for value in model.state_dict().values()]
    tensors += [p.grad.clone() for p in model.parameters() if p.grad is not None]
    rest = [
        (type(m), m.training, len(m._forward_hooks), len(m._forward_pre_hooks), sorted(vars(m)))
        for m in model.modules()
    ]
    return tensors, [rest, sampler_of(model).state_dict(), [p.grad is None for p in model.parameters()]]


@pytest.mark.parametrize("kind", ["vanilla", "resnet", "applied"])
def test_nothing_changes(kind):
    if kind == "applied":
        model: nn.Module = resnet18(num_classes=10)
        residrop.apply(model, survival=0.5, granularity="row", seed=3)
    else:
        name = "vanilla-3" if kind == "vanilla" else "resnet-8"
        options = {"in_features": 3072, "width": 16} if kind == "vanilla" else {}
        model = residrop.create(name, rule="stochastic-depth", survival=0.5, seed=3, classes=10, **options)
    x, y = images(4)
    for _ in range(2):
        F.cross_entropy(model(x), y).backward()
    before = snapshot(model)
    random = torch.get_rng_state()
    first = gradient_growth(model, [(x, y)], passes=2)
    assert torch.equal(torch.get_rng_state(), random)
    with pytest.raises(ZeroDivisionError):
        gradient_growth(model, [(x, y)], lambda outputs, targets: 1 / 0)
    torch.testing.assert_close(first.q, gradient_growth(model, [(x, y)], passes=2).q)
    after = snapshot(model)
    torch.testing.assert_close(after[0], before[0], rtol=0, atol=0)
    assert after[1] == before[1]


class Folding(nn.Module):
    """Its block works on pieces of rows."""

    def __init__(self):
        super().__init__()
        self.block = residrop.Residual(nn.Linear(3, 3), rule=residrop.StochasticDepth(0.5))

    def forward(self, x):
        return self.block(x.reshape(-1, 3)).reshape(len(x), -1)


def folding():
    model = Folding()
    residrop.attach(model, seed=0)
    return model


X = torch.randn(4, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: growth([]), "one per block"),
        (lambda: growth_rates([0.5, 1.5]), "survival rate 2"),
        (lambda: measure_growth([]), "one per block"),
        (lambda: measure_growth([0.5], width=0), "width is 0"),
        (lambda: measure_growth([0.5], samples=1), "samples is 1"),
        (lambda: measure_growth([0.5], levels=(1,)), "levels are 0 to 0"),
        (lambda: measure_growth([0.5], levels=(-1,)), "a level is -1"),
        (lambda: measure_growth([0.5], seed=0.5), "seed is 0.5"),
        (lambda: gradient_growth(nn.Linear(3, 3), [(X, X)]), "Linear has no rules"),
        (lambda: gradient_growth(one_block(), []), "no batch was given"),
        (lambda: gradient_growth(one_block(), [(X, X)], passes=0), "passes is 0"),
        (lambda: gradient_growth(one_block(), [(X, X)], rates=[0.5, 0.5]), "for 1 residual blocks"),
        (lambda: gradient_growth(one_block(), [(X, X)], lambda z, t: 0 * z.sum()), "zero for every input"),
        (lambda: gradient_growth(one_block(), [(X, X)], lambda z, t: z.sum() * math.inf), "last block's output is not"),
        (lambda: gradient_growth(folding(), [(torch.randn(4, 6), X)], rates=1.0), "the batch is the first dimension"),
        (
            lambda: gradient_growth(residrop.create("resnet-8", rule="swapout"), [images(2)]),
            "rule 1 tosses coins for single units",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ConfigError, match=message):
        call()
