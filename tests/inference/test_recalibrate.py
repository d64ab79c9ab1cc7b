import pytest
import torch
import torch.distributed as dist
from torch import nn

import residrop
from residrop.blocks.attach import sampler_of, sampling
from residrop.common.errors import ConfigError, RankError
from residrop.inference import recalibrate

MODES = ["layers", "at-once"]


def network(rule="swapout", block="v2", name="resnet-8", **options):
    """A small network in training mode, a few steps of random training behind it."""
    rates = {} if rule == "constant" else {"survival": 0.5}
    model = residrop.create(name, rule=rule, block=block, classes=5, channels=1, **rates, **options)
    with torch.no_grad():
        for _ in range(4):
            model(torch.randn(16, 1, 8, 8) * 1.5 + 0.5)
    return model


def images(*sizes):
    return [torch.randn(size, 1, 8, 8) * 1.5 + 0.5 for size in sizes]


def norms_of(model):
    return {name: one for name, one in model.named_modules() if isinstance(one, nn.BatchNorm2d)}


def statistics(model):
    return {name: (one.running_mean.clone(), one.running_var.clone()) for name, one in norms_of(model).items()}


def input_of(norm, model, batch):
    """What a batch norm reads, by running the whole model in eval mode."""
    seen = []
    hook = norm.register_forward_pre_hook(lambda module, args: seen.append(args[0].double()))
    model.eval()(batch)
    hook.remove()
    return seen


def flat(x):
    return x.transpose(0, 1).flatten(1)


@torch.no_grad()
def layer_by_layer(model, batches):
    """The reference: for every layer a whole pass over all batches, in the order in which layers run."""
    order = []
    hooks = [
        one.register_forward_pre_hook(lambda module, args: order.append(module)) for one in norms_of(model).values()
    ]
    model.eval()(batches[0])
    for hook in hooks:
        hook.remove()
    for norm in order:
        values = torch.cat([flat(x) for batch in batches for x in input_of(norm, model, batch)], dim=1)
        norm.running_mean.copy_(values.mean(dim=1))
        norm.running_var.copy_(values.var(dim=1))


@torch.no_grad()
def at_once(model, batches):
    """The reference: batch norm in training mode among all else in eval mode; its inputs are collected."""
    norms = norms_of(model)
    values = {name: [] for name in norms}
    model.eval()
    kept = statistics(model)
    for name, norm in norms.items():
        norm.register_forward_pre_hook(lambda module, args, name=name: values[name].append(flat(args[0].double())))
        norm.train()
    for batch in batches:
        model(batch)
    for name, norm in norms.items():
        norm._forward_pre_hooks.clear()
        every = torch.cat(values[name], dim=1)
        assert not torch.equal(norm.running_mean, kept[name][0])
        norm.running_mean.copy_(every.mean(dim=1))
        norm.running_var.copy_(every.var(dim=1))


def assert_same_statistics(one, other):
    for name, pair in statistics(one).items():
        for found, wanted in zip(pair, statistics(other)[name], strict=True):
            torch.testing.assert_close(
                found, wanted, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
            )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("block", ["v1", "v2"])
@pytest.mark.parametrize("rule", ["constant", "swapout", "stochastic-depth", "skipforward", "depth-dropout"])
def test_statistics_are_those_of_a_slow_reference(rule, block, mode):
    model, other, batches = network(rule, block), network(rule, block), images(16, 9, 16)
    other.load_state_dict(model.state_dict())
    done = recalibrate(model, batches, mode=mode)
    {"layers": layer_by_layer, "at-once": at_once}[mode](other, batches)
    assert_same_statistics(model, other)
    assert (done.layers, done.images, done.batches) == (len(norms_of(model)), 41, 3)


def test_statistics_of_repeated_branches_are_those_of_the_reference():
    model, batches = network("mix", name="resnet-14", repeat=2, earlier=0.5), images(16, 16)
    other = network("mix", name="resnet-14", repeat=2, earlier=0.5)
    other.load_state_dict(model.state_dict())
    recalibrate(model, batches, mode="at-once")
    at_once(other, batches)
    assert_same_statistics(model, other)
    done = recalibrate(other, batches)
    assert (done.layers, done.unused) == (13, ())


@pytest.mark.parametrize("shortcut", ["pad", "project"])
@pytest.mark.parametrize("name", ["resnet-14", "stable-resnet-8"])
def test_layer_by_layer_leaves_every_input_normalised(name, shortcut):
    model, batches = network(name=name, shortcut=shortcut), images(16, 16)
    recalibrate(model, batches)
    for norm in norms_of(model).values():
        with torch.no_grad():
            values = torch.cat([flat(x) for batch in batches for x in input_of(norm, model, batch)], dim=1)
        torch.testing.assert_close(values.mean(dim=1).float(), norm.running_mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(values.var(dim=1).float(), norm.running_var, rtol=1e-4, atol=1e-5)


def test_a_model_that_is_no_sequence_is_recalibrated_as_one_that_is():
    class Opaque(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x)

    model, other, batches = network(), network(), images(8, 8)
    other.load_state_dict(model.state_dict())
    recalibrate(model, batches)
    done = recalibrate(Opaque(other), batches)
    assert_same_statistics(model, other)
    assert done.where.startswith("inner.")


def test_children_that_only_look_like_a_sequence_are_not_taken_for_one():
    class Misleading(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.blocks, self.tail = (nn.BatchNorm2d(1) for _ in range(3))

        def forward(self, x):
            return self.tail(self.blocks(x) + self.stem(x) * 3.0)

    model, other, batches = Misleading(), Misleading(), images(8, 8)
    recalibrate(model, batches)
    layer_by_layer(other, batches)
    assert_same_statistics(model, other)


def test_a_layer_that_is_called_twice_counts_both_calls():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.last = nn.BatchNorm1d(3), nn.BatchNorm1d(3)

        def forward(self, x):
            return self.last(self.norm(self.norm(x) * 2.0 + 1.0))

    model, x = Twice(), torch.randn(64, 3) * 5.0
    done = recalibrate(model, [x])
    first = (x - x.mean(0)) / (x.var(0, correction=0) + 1e-5).sqrt() * 2.0 + 1.0
    torch.testing.assert_close(model.norm.running_mean, torch.cat([x, first]).mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.norm.running_var, torch.cat([x, first]).var(0), rtol=1e-4, atol=1e-5)
    assert done.layers == 2


@pytest.mark.parametrize("mode", MODES)
def test_applied_models_and_their_batch_norms(mode):
    torchvision = pytest.importorskip("torchvision")
    model = torchvision.models.resnet18(num_classes=5)
    residrop.apply(model, survival=0.5, rescale="test")
    batches = [torch.randn(6, 3, 32, 32) for _ in range(2)]
    before = model.state_dict()["layer4.1.bn2.running_var"].clone()
    done = recalibrate(model, [(x, torch.zeros(6)) for x in batches], mode=mode)
    assert done.layers == 20
    assert not torch.equal(before, model.layer4[1].bn2.running_var)
    assert done.unused == ()
    assert sampler_of(model).step == 0


def test_branches_that_are_never_present_are_left_alone_and_named():
    model = network(rule="stochastic-depth")
    for rule in [one for one in model.modules() if isinstance(one, residrop.StochasticDepth)][:1]:
        rule.rates = (0.0,)
    residrop.attach(model)
    kept = statistics(model)
    done = recalibrate(model, images(8))
    assert done.unused == ("blocks.block1.branch.bn1", "blocks.block1.branch.bn2")
    assert torch.equal(model.blocks.block1.branch.bn1.running_var, kept["blocks.block1.branch.bn1"][1])


@pytest.mark.parametrize("mode", MODES)
def test_all_but_the_statistics_stays(mode):
    model = network()
    model.blocks.block2.eval()
    flags = [module.training for module in model.modules()]
    model.blocks.block1.requires_grad_(False)
    grads = [parameter.requires_grad for parameter in model.parameters()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    step, momentum = sampler_of(model).step, [one.momentum for one in norms_of(model).values()]
    hooks = sum(len(module._forward_pre_hooks) for module in model.modules())
    batches, random = iter(images(8, 8)), torch.get_rng_state()
    recalibrate(model, batches, mode=mode)
    assert [module.training for module in model.modules()] == flags
    assert [parameter.requires_grad for parameter in model.parameters()] == grads
    assert sampler_of(model).step == step
    assert [one.momentum for one in norms_of(model).values()] == momentum
    assert sum(len(module._forward_pre_hooks) for module in model.modules()) == hooks
    changed = [name for name, value in model.state_dict().items() if not torch.equal(state[name], value)]
    assert sorted(changed) == sorted(f"{name}.running_{what}" for name in norms_of(model) for what in ("mean", "var"))
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(random, torch.get_rng_state())


@pytest.mark.parametrize("mode", MODES)
def test_undo_restores_the_statistics(mode):
    model = network()
    kept = statistics(model)
    done = recalibrate(model, images(8), mode=mode)
    assert not torch.equal(model.tail.bn.running_var, kept["tail.bn"][1])
    done.undo()
    assert all(
        torch.equal(a, b) for name, pair in statistics(model).items() for a, b in zip(pair, kept[name], strict=True)
    )


@pytest.mark.parametrize("mode", MODES)
def test_draws_in_force_do_not_matter(mode):
    model, other, batches = network(), network(), images(8, 8)
    other.load_state_dict(model.state_dict())
    recalibrate(model, batches, mode=mode)
    with sampling(other, first=3):
        recalibrate(other, batches, mode=mode)
        number = sampler_of(other).in_force.sample
    assert_same_statistics(model, other)
    assert number == 3


def test_largest_change_is_in_standard_deviations():
    model = nn.Sequential(nn.BatchNorm1d(2))
    model[0].running_var.copy_(torch.tensor([4.0, 1.0]))
    x = torch.tensor([[10.0, 1.0], [12.0, -1.0]])
    done = recalibrate(model, [x])
    assert done.where == "0"
    assert done.largest_change == pytest.approx(11.0 / (4.0 + 1e-5) ** 0.5, rel=1e-6)
    assert model[0].running_var.tolist() == [2.0, 2.0]  # unbiased


def test_number_of_batches_and_progress():
    shares = []
    done = recalibrate(network(), images(8, 8, 8), batches=2, on_progress=shares.append)
    assert (done.batches, done.images) == (2, 16)
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    shares.clear()
    recalibrate(network(), images(8, 8, 8), mode="at-once", on_progress=shares.append)
    assert shares == pytest.approx([1 / 3, 2 / 3, 1.0])


def test_mappings_are_keyword_arguments():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(2)

        def forward(self, *, values, scale):
            return self.norm(values * scale)

    model, x = Named(), torch.randn(32, 2)
    done = recalibrate(model, [{"values": x, "scale": 3.0}])
    torch.testing.assert_close(model.norm.running_var, (3.0 * x).var(0))
    assert done.images == 32


@pytest.mark.parametrize("mode", MODES)
def test_statistics_of_large_means_are_accurate(mode):
    model, x = nn.Sequential(nn.BatchNorm1d(1)), torch.randn(4000, 1) + 10_000.0
    recalibrate(model, list(x.split(100)), mode=mode)
    torch.testing.assert_close(model[0].running_var, x.double().var(0).float(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("mode", MODES)
def test_a_failure_leaves_the_model_as_it_was(mode):
    model = network()
    kept = statistics(model)
    bad = images(8, 8)
    bad[1][0] = torch.nan
    with pytest.raises(ConfigError, match="is not finite on this data"):
        recalibrate(model, bad, mode=mode)
    assert all(
        torch.equal(a, b) for name, pair in statistics(model).items() for a, b in zip(pair, kept[name], strict=True)
    )
    assert model.training


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        ([], {}, "data has no batches"),
        (torch.zeros(2, 1, 8, 8), {}, r"data is one tensor; give batches of it"),
        (None, {}, "data is a NoneType"),
        (["a"], {}, "a batch is str without tensors"),
        ([torch.zeros(2, 1, 8, 8)], {"batches": 0}, "batches is 0; give a whole number of at least 1"),
        ([torch.zeros(2, 1, 8, 8)], {"mode": "best"}, r"mode is 'best'; choose one of 'layers', 'at-once'"),
    ],
)
def test_bad_input_is_refused(data, options, message):
    with pytest.raises(ConfigError, match=message):
        recalibrate(network(), data, **options)


def test_one_value_has_no_variance():
    with pytest.raises(ConfigError, match="one value per channel"):
        recalibrate(nn.Sequential(nn.BatchNorm1d(2)), [torch.zeros(1, 2)])


def test_a_model_without_batch_norm_is_refused():
    with pytest.raises(ConfigError, match="Linear has no batch norm with running statistics"):
        recalibrate(nn.Linear(2, 2), [torch.zeros(2, 2)])


@pytest.mark.parametrize("mode", MODES)
def test_a_model_that_runs_none_of_its_batch_norms_is_refused(mode):
    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(2)

        def forward(self, x):
            return x

    with pytest.raises(ConfigError, match="none of the 1 batch norms of Idle was run"):
        recalibrate(Idle(), [torch.zeros(2, 2)], mode=mode)


def test_several_ranks_are_refused(monkeypatch):
    model = network()
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    with pytest.raises(RankError, match="recalibrate runs in one process"):
        recalibrate(model, images(8))
