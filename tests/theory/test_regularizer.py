"""Gates, sensitivities and discrepancies against finite differences, enumeration of masks, and the paper's theorems."""

import copy
import itertools
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import residrop
from residrop import sampler_of
from residrop.common.errors import ConfigError
from residrop.theory import (
    discrepancy,
    exact_curvature,
    flat_discrepancy,
    gated,
    regularizer,
    removal_losses,
    sensitivity,
)


def stable(blocks, *, width=64, outputs=3, seed=0, survival=0.5):
    return residrop.create(
        f"stable-vanilla-{blocks}",
        rule="stochastic-depth",
        survival=survival,
        width=width,
        in_features=16,
        classes=outputs,
        seed=seed,
    ).double()


def squared(outputs, targets):
    """||z - z'||^2, mean over inputs (eq. 6)."""
    return (outputs - targets).square().sum(dim=1).mean()


def task(rows=6, outputs=3, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(rows, 16, generator=generator, dtype=torch.float64),
        torch.randn(rows, outputs, generator=generator, dtype=torch.float64),
    )


# Gates


def test_all_ones_is_the_plain_network_and_masks_are_sub_networks():
    model, (x, _) = stable(4), task()
    with gated(model, torch.ones(4)):
        full = model(x)
    h = model.stem(x)
    for block in model.blocks:
        h = h + block.branch(h)
    torch.testing.assert_close(full, model.tail(h))
    with gated(model, torch.tensor([1.0, 0.0, 0.0, 1.0])):
        part = model(x)
    h = model.stem(x)
    for block in (model.blocks[0], model.blocks[3]):
        h = h + block.branch(h)
    torch.testing.assert_close(part, model.tail(h))


@pytest.mark.parametrize("options", [{}, {"granularity": "row"}, {"rule": "swapout"}, {"rule": "constant"}])
def test_gates_leave_nothing_behind(options):
    options = {"rule": "stochastic-depth", **options}
    model = residrop.create("resnet-14", seed=1, **options)
    before, step = copy.deepcopy(model.state_dict()), sampler_of(model).step
    classes = [type(module) for module in model.modules()]
    x, y = torch.randn(8, 3, 16, 16), torch.arange(8) % 10
    model.train()
    first = next(model.parameters())
    first.grad = torch.ones_like(first)
    sensitivity(model, [(x, y)])
    discrepancy(model, [(x, y)])
    assert [type(module) for module in model.modules()] == classes
    assert sampler_of(model).step == step
    assert model.training
    assert torch.equal(first.grad, torch.ones_like(first))
    assert sum(parameter.grad is not None for parameter in model.parameters()) == 1
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_gates_of_rows():
    model, (x, _) = stable(3), task(rows=2)
    with gated(model, torch.tensor([[1.0, 0.0, 1.0], [0.5, 1.0, 0.0]])):
        both = model(x)
    for row, gates in enumerate(([1.0, 0.0, 1.0], [0.5, 1.0, 0.0])):
        with gated(model, torch.tensor(gates)):
            torch.testing.assert_close(model(x[row : row + 1])[0], both[row])


def test_gates_of_an_applied_model():
    import torchvision

    model = torchvision.models.resnet18(num_classes=5)
    residrop.apply(model, survival=0.5, seed=0)
    plain = copy.deepcopy(model)
    residrop.remove(plain)
    x, y = torch.randn(2, 3, 32, 32), torch.tensor([1, 4])
    model.eval(), plain.eval()
    with gated(model, torch.ones(8)):
        torch.testing.assert_close(model(x), plain(x))
    found = sensitivity(model, [(x, y)], training=False)
    step = 1e-3
    losses = []
    for sign in (1, -1):
        gates = torch.ones(8)
        gates[3] += sign * step
        with gated(model, gates), torch.no_grad():
            losses.append(F.cross_entropy(model(x), y))
    assert float(losses[0] - losses[1]) / (2 * step) == pytest.approx(float(found.scores[3]), rel=0.02, abs=1e-4)


# Sensitivity


def test_scores_are_derivatives():
    model, batch = stable(5), task()
    found = sensitivity(model, [batch], squared)
    for block in range(5):
        losses = []
        for sign in (1, -1):
            gates = torch.ones(5, dtype=torch.float64)
            gates[block] += sign * 1e-5
            with gated(model, gates), torch.no_grad():
                losses.append(float(squared(model(batch[0]), batch[1])))
        assert (losses[0] - losses[1]) / 2e-5 == pytest.approx(float(found.scores[block]), rel=1e-3, abs=1e-7)


def test_scores_follow_the_loss_without_each_block():
    """Stable Vanilla, L = 50, width 128, sin(beta^T x): correlation above 0.9 (the paper's approximation)."""
    for seed in range(3):
        model = residrop.create(
            "stable-vanilla-50", rule="stochastic-depth", survival=0.5, width=128, in_features=256, seed=seed
        )
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(256, 256, generator=generator)
        beta = torch.randn(256, 1, generator=generator) / 16
        batch = (x, torch.sin(x @ beta))
        fast, exact = sensitivity(model, [batch], F.mse_loss).scores, removal_losses(model, [batch], F.mse_loss)
        assert float(torch.corrcoef(torch.stack([fast, exact]))[0, 1]) > 0.9


def test_removal_losses_are_differences():
    model, batch = stable(3), task()
    found = removal_losses(model, [batch], squared)
    with gated(model, torch.ones(3)), torch.no_grad():
        full = squared(model(batch[0]), batch[1])
    with gated(model, torch.tensor([1.0, 0.0, 1.0])), torch.no_grad():
        torch.testing.assert_close(found[1], full - squared(model(batch[0]), batch[1]))


def test_batches_are_averaged():
    model, (x, y) = stable(3), task(rows=8)
    both = sensitivity(model, [(x[:4], y[:4]), (x[4:], y[4:])], squared)
    whole = sensitivity(model, [(x, y)], squared)
    torch.testing.assert_close(both.scores, whole.scores, rtol=1e-5, atol=1e-7)
    assert both.batches == 2
    assert bool(both.standard_error.isfinite().all())
    assert bool(whole.standard_error.isnan().all())


# Discrepancy


@pytest.mark.parametrize("loss", ["squared", "cross-entropy"])
def test_curvature_is_the_second_derivative_without_that_of_the_network(loss):
    """Against d2/dt2 of loss(y + t zeta), zeta by central differences."""
    model, (x, y) = stable(4), task()
    if loss == "squared":
        function, targets = squared, y
    else:
        function, targets = F.cross_entropy, y.argmax(dim=1)
    found = discrepancy(model, [(x, targets)], function)
    for block in range(4):
        outputs = []
        for sign in (1, 0, -1):
            gates = torch.ones(4, dtype=torch.float64)
            gates[block] += sign * 1e-4
            with gated(model, gates), torch.no_grad():
                outputs.append(model(x))
        zeta, total = (outputs[0] - outputs[2]) / 2e-4, 0.0
        for row in range(len(x)):
            hessian = torch.autograd.functional.hessian(
                lambda z, row=row: function(z[None], targets[row : row + 1]), outputs[1][row]
            )
            total += float(zeta[row] @ hessian @ zeta[row])
        assert float(found.curvature[block]) == pytest.approx(total / len(x), rel=1e-3)


def expected_loss(model, batch, rates):
    """Exactly, over all masks."""
    x, y = batch
    total = 0.0
    for mask in itertools.product((0.0, 1.0), repeat=len(rates)):
        weight = math.prod(p if alive else 1 - p for p, alive in zip(rates, mask, strict=True))
        with gated(model, torch.tensor(mask)), torch.no_grad():
            total += weight * float(squared(model(x), y))
    return total


def test_regularizer_against_all_masks():
    """Eq. 4 and 6: around delta = p close to the truth; around 1 short by about exp(p - 1), less for larger p."""
    ratios = {"one": [], "p": []}
    for p in (0.3, 0.5, 0.7, 0.9, 0.97):
        truth, at_one, at_p = 0.0, 0.0, 0.0
        for seed in range(3):
            model, batch = stable(8, seed=seed), task(rows=8, seed=seed)
            with gated(model, torch.full((8,), p)), torch.no_grad():
                average = float(squared(model(batch[0]), batch[1]))
            truth += expected_loss(model, batch, [p] * 8) - average
            at_one += regularizer(discrepancy(model, [batch], squared).curvature, [p] * 8)
            at_p += regularizer(discrepancy(model, [batch], squared, at=[p] * 8).curvature, [p] * 8)
        ratios["one"].append(truth / at_one)
        ratios["p"].append(truth / at_p)
    assert all(0.4 < ratio < 1.15 for ratio in ratios["one"]), ratios
    assert ratios["one"] == sorted(ratios["one"])
    assert all(0.75 < ratio < 1.2 for ratio in ratios["p"]), ratios


@pytest.mark.slow
def test_discrepancies_are_flat_at_initialisation():
    """Theorem 1 and Figure 3: Stable Vanilla, L = 50, width 512, 8 outputs, 150 draws of the weights."""
    x, y = torch.randn(4, 16), torch.zeros(4, 8)
    every = []
    for seed in range(150):
        model = residrop.create(
            "stable-vanilla-50", rule="stochastic-depth", survival=0.5, width=512, in_features=16, classes=8, seed=seed
        )
        second_moment = x.square().mean(dim=1).mean()
        every.append(discrepancy(model, [(x, y)], squared).g / second_moment)
    g = torch.stack(every)
    mean, error = g.mean(), g.mean(dim=1).std() / 150**0.5
    relative = g.mean(dim=0) / mean
    assert float((relative - 1).abs().max()) < 0.08
    predicted = flat_discrepancy(50, 8, 1.0)
    assert abs(float(mean) - predicted) < 5 * float(error)


def test_theorem_1_in_a_number():
    assert flat_discrepancy(50, 8, 2.0) == pytest.approx(2 * 8 * 2.0 * 1.02**49)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, b: sensitivity(m, []), "at least one"),
        (lambda m, b: removal_losses(m, []), "at least one"),
        (lambda m, b: discrepancy(m, []), "at least one"),
        (lambda m, b: discrepancy(m, [b], squared, at=[0.5]), "one per block"),
        (lambda m, b: regularizer(torch.ones(3), [0.5]), "one per block"),
        (lambda m, b: sensitivity(m, [b], lambda z, t: z.sum() * float("nan")), "block 1 is not finite"),
        (lambda m, b: gated(m, torch.ones(7)).__enter__(), "has 4 rules"),
        (lambda m, b: gated(nn.Linear(2, 2), torch.ones(1)).__enter__(), "has 0 rules"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ConfigError, match=message):
        call(stable(4), task())


def test_many_outputs_give_what_few_give(monkeypatch):
    model = residrop.create("resnet-8", rule="stochastic-depth", survival=0.5, classes=40, seed=0).double()
    batches = [(torch.randn(3, 3, 16, 16, dtype=torch.float64), torch.tensor([1, 35, 7]))]
    by_block = discrepancy(model, batches).curvature
    original = torch.autograd.grad
    passes = []
    monkeypatch.setattr(torch.autograd, "grad", lambda *args, **kw: passes.append(args) or original(*args, **kw))
    discrepancy(model, batches)
    assert len(passes) < 10
    monkeypatch.setattr(torch.autograd, "grad", original)
    model.eval()
    gates = torch.ones(3, 3, dtype=torch.float64, requires_grad=True)
    with gated(model, gates):
        y = model(batches[0][0])
    zetas = torch.stack([torch.autograd.grad(y[:, i].sum(), gates, retain_graph=True)[0] for i in range(40)], dim=2)
    p = y.detach().softmax(dim=1)
    hessian = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    expected = torch.einsum("nlo,nop,nlp->nl", zetas, hessian, zetas).mean(dim=0)
    torch.testing.assert_close(by_block, expected, rtol=1e-6, atol=0)


# The exact Hessian


def smooth(blocks):
    """A network whose outputs bend in delta: tanh in the place of ReLU."""
    model = stable(blocks, width=16)
    for block in model.blocks:
        block.branch.relu = nn.Tanh()
    return model


@pytest.mark.parametrize("loss", [squared, F.cross_entropy], ids=["squared", "cross-entropy"])
@pytest.mark.parametrize("at", [None, [0.5, 0.8, 0.3, 1.0, 0.6]], ids=["ones", "rates"])
def test_gauss_newton_is_the_exact_hessian_of_networks_of_relus(loss, at):
    model, (x, targets) = stable(5), task()
    targets = targets if loss is squared else targets.argmax(dim=1)
    batches = [(x[:4], targets[:4]), (x[4:], targets[4:])]
    exact = exact_curvature(model, batches, loss, at=at)
    torch.testing.assert_close(exact, discrepancy(model, batches, loss, at=at).curvature, rtol=1e-5, atol=1e-7)


def test_gauss_newton_is_the_exact_hessian_of_a_convolutional_network():
    model = residrop.create("resnet-8", rule="stochastic-depth", survival=0.5, seed=0).double()
    batches = [(torch.randn(3, 3, 16, 16, dtype=torch.float64), torch.tensor([1, 5, 7]))]
    torch.testing.assert_close(
        exact_curvature(model, batches), discrepancy(model, batches).curvature, rtol=1e-4, atol=0
    )


def test_exact_curvature_is_that_of_the_loss_where_outputs_bend():
    model, (x, targets) = smooth(4), task()
    found = exact_curvature(model, [(x, targets)], squared)
    step = 1e-3

    def loss(block, shift):
        gates = torch.ones(4, dtype=torch.float64)
        gates[block] += shift
        with gated(model, gates), torch.no_grad():
            return squared(model(x), targets)

    differences = [(loss(b, step) - 2 * loss(b, 0.0) + loss(b, -step)) / step**2 for b in range(4)]
    torch.testing.assert_close(found, torch.stack(differences), rtol=1e-3, atol=1e-4)
    newton = discrepancy(model, [(x, targets)], squared).curvature
    assert ((newton - found).abs() > 0.02 * found.abs()).any()
    assert newton[-1] == pytest.approx(found[-1].item(), rel=1e-4)  # nothing bends after the last block


def test_exact_curvature_refuses_what_it_cannot_use():
    model = stable(3)
    with pytest.raises(ConfigError, match="no batch"):
        exact_curvature(model, [])
    with pytest.raises(ConfigError, match="2 rates"):
        exact_curvature(model, [task()], squared, at=[0.5, 0.5])
