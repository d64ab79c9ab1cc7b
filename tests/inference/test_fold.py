import copy
import subprocess
import sys

import pytest
import torch
from torch import fx, nn

import residrop
from residrop.common.errors import ConfigError
from residrop.inference import fold
from residrop.inference.deploy.fold import coefficients
from residrop.rules import Rule

CIFAR = {
    "v1": ("resnet-8", {}),
    "v2": ("resnet-8", {"block": "v2"}),
    "subsample": ("resnet-8", {"shortcut": "subsample"}),
    "project": ("resnet-8", {"shortcut": "project"}),
    "ours": ("resnet-ours-8", {}),
    "ours-v2": ("resnet-ours-8", {"block": "v2"}),
    "stable": ("stable-resnet-8", {}),
    "stable-v2": ("stable-resnet-8", {"block": "v2"}),
    "transform": ("depth-dropout-resnet-8", {}),
    "transform-v2": ("depth-dropout-resnet-8", {"block": "v2"}),
}
VANILLA = {"vanilla": ("vanilla-4", {}), "stable-vanilla": ("stable-vanilla-4", {})}
IMAGENET = {
    "basic": ("imagenet-resnet-18", {}),
    "bottleneck": ("imagenet-resnet-50", {}),
    "large-transform": ("imagenet-depth-dropout-resnet-18", {}),
}
NETWORKS = {**CIFAR, **VANILLA, **IMAGENET}


def build(kind, rule, survival=0.6, **more):
    name, options = NETWORKS[kind]
    if kind in VANILLA:
        options = {**options, "in_features": 48, "width": 16}
    elif "bn_gamma_init" not in more:
        more = {"bn_gamma_init": "uniform", **more}
    rates = {} if rule == "constant" else {"survival": survival}
    return residrop.create(name, rule=rule, classes=5, **rates, **options, **more)


def trained(model, size=8):
    """The same with statistics of some images, and biases of batch norm that are not zero."""
    with torch.no_grad():
        for _ in range(2):
            model.train()(torch.randn(8, 3, size, size) + 0.3)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.bias.normal_(std=0.3)
                module.running_var.mul_(torch.rand_like(module.running_var) + 0.5)
    return model


def assert_folds(model, x, tolerance=1e-5):
    folded = fold(model)
    with torch.no_grad():
        wanted, found = model.eval()(x), folded(x)
    scale = float(wanted.abs().max())
    assert scale > 1e-6
    torch.testing.assert_close(found / scale, wanted / scale, rtol=0, atol=tolerance)
    return folded


def count(folded, what):
    if isinstance(what, type):
        return sum(isinstance(module, what) for module in folded.modules())
    return sum(getattr(node.target, "__name__", "") == what for node in folded.graph.nodes)


@pytest.mark.parametrize("rule", residrop.RULES)
@pytest.mark.parametrize("kind", [*CIFAR, *VANILLA])
def test_every_network_under_every_rule_predicts_the_same(kind, rule):
    if kind in VANILLA and rule == "depth-dropout":
        pytest.skip("vanilla networks have no trainable shortcuts")
    size = 4 if kind in VANILLA else 8
    folded = assert_folds(trained(build(kind, rule), size), torch.randn(3, 3, size, size))
    assert count(folded, "mul") == 0


@pytest.mark.parametrize("rule", ["stochastic-depth", "swapout", "skipforward"])
@pytest.mark.parametrize("kind", IMAGENET)
def test_large_networks_predict_the_same(kind, rule):
    folded = assert_folds(trained(build(kind, rule), 32), torch.randn(2, 3, 32, 32))
    assert count(folded, "mul") == count(folded, nn.BatchNorm2d) == 0


@pytest.mark.parametrize("rescale", ["test", "train", "none"])
@pytest.mark.parametrize("granularity", ["block", "row"])
def test_every_rescaling_predicts_the_same(granularity, rescale):
    model = trained(build("v1", "stochastic-depth", granularity=granularity, rescale=rescale))
    assert_folds(model, torch.randn(3, 3, 8, 8))


@pytest.mark.parametrize("of", ["branch", "shortcut"])
def test_skipforward_of_either_predicts_the_same(of):
    assert_folds(trained(build("v2", "skipforward", survival=0.7, of=of)), torch.randn(3, 3, 8, 8))


@pytest.mark.parametrize("survival", [0.0, 1.0, "linear(1, 0)"])
@pytest.mark.parametrize("rule", ["stochastic-depth", "swapout", "skipforward", "dropout-sum"])
@pytest.mark.filterwarnings("ignore::residrop.InactiveWarning")
def test_certain_rates_predict_the_same(rule, survival):
    model = trained(build("v2", rule, survival=survival, theta_2=0.5 if rule == "swapout" else None))
    folded = fold(model)
    x = torch.randn(3, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(folded(x), model.eval()(x), rtol=1e-5, atol=1e-5)


def test_branches_that_are_never_present_are_left_out():
    folded = assert_folds(trained(build("v1", "stochastic-depth", survival="1, 0, 0.5")), torch.randn(3, 3, 8, 8))
    assert "block2.branch" not in folded.code
    assert "block3.branch" in folded.code


def test_rates_that_the_timing_ends_with_count():
    model = trained(build("v2", "swapout", survival=0.5, timing="early(1)"))
    assert_folds(model, torch.randn(3, 3, 8, 8))
    assert coefficients(model.blocks.block2.rule) == (1.0, 1.0)


def test_batch_norm_stays_only_in_front_of_a_relu():
    v1, v2 = (fold(trained(build(kind, "swapout"))) for kind in ("v1", "v2"))
    assert count(v1, nn.BatchNorm2d) == 0
    assert count(v2, nn.BatchNorm2d) == 3 + 1  # in front of every block, and in the tail
    assert all(not module.training for module in v2.modules())


@pytest.mark.parametrize("survival", [0.5, 0.25])
def test_products_of_many_factors_stay_in_range(survival):
    model = trained(residrop.create("vanilla-60", rule="swapout", survival=survival, in_features=48, width=16), 4)
    x = torch.randn(3, 3, 4, 4)
    with torch.no_grad():
        for block in model.blocks:
            block.branch.linear.weight.mul_(1.5 / survival)
    folded = assert_folds(model, x, tolerance=1e-4)
    weights = [module.weight.detach() for module in folded.modules() if isinstance(module, nn.Linear)]
    assert max(float(weight.abs().max()) for weight in weights) < 65504.0  # of half precision
    assert 0 < count(folded, "mul") <= 60


def test_the_model_is_left_as_it_was():
    model = trained(build("v2", "swapout"))
    model.blocks.block2.eval()
    flags = [module.training for module in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    fold(model, torch.randn(2, 3, 8, 8))
    assert [module.training for module in model.modules()] == flags
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    model.train()(torch.randn(2, 3, 8, 8))  # still attached
    with torch.no_grad(), residrop.sampling(model):
        assert not torch.equal(model(torch.ones(2, 3, 8, 8)), model(torch.ones(2, 3, 8, 8)))


def test_draws_in_force_do_not_matter():
    model, x = trained(build("v2", "swapout")), torch.randn(3, 3, 8, 8)
    with residrop.sampling(model):
        folded = fold(model)
    with torch.no_grad():
        torch.testing.assert_close(folded(x), model.eval()(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["v1", "v2", "vanilla"])
def test_nothing_of_residrop_is_left(kind, tmp_path):
    """Saved, loaded and run by a Python that cannot import residrop."""
    size = 4 if kind == "vanilla" else 8
    model, x = trained(build(kind, "swapout"), size), torch.randn(3, 3, size, size)
    folded = fold(model)
    with torch.no_grad():
        wanted = model.eval()(x)
    torch.save({"model": copy.deepcopy(folded), "x": x, "wanted": wanted}, tmp_path / "folded.pt")
    script = (
        "import sys, torch\n"
        "sys.modules['residrop'] = None\n"
        f"found = torch.load({str(tmp_path / 'folded.pt')!r}, weights_only=False)\n"
        "with torch.no_grad(): y = found['model'](found['x'])\n"
        "torch.testing.assert_close(y, found['wanted'], rtol=1e-4, atol=1e-5)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert b"residrop" not in (tmp_path / "folded.pt").read_bytes()
    assert all(type(one).__module__.startswith("torch.") for one in folded.modules() if one is not folded)


def test_the_folded_network_is_copied_traced_and_double():
    folded = fold(trained(build("v1", "swapout")))
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(folded)(x), folded(x))
        assert torch.equal(fx.symbolic_trace(folded)(x), folded(x))
        wanted = folded(x)
        torch.testing.assert_close(folded.double()(x.double()).float(), wanted, rtol=1e-4, atol=1e-5)


# Models of others


def foreign(name, **options):
    torchvision = pytest.importorskip("torchvision")
    model = getattr(torchvision.models, name)(num_classes=5)
    residrop.apply(model, **options)
    for module in model.modules():
        if hasattr(module, "layer_scale") and isinstance(module.layer_scale, nn.Parameter):
            nn.init.constant_(module.layer_scale, 0.5)
    return trained(model, 32)


@pytest.mark.parametrize(
    "options",
    [
        {"survival": 0.7},
        {"survival": 0.7, "rescale": "test"},
        {"survival": 0.7, "rescale": "test", "granularity": "row"},
        {"rule": "swapout", "survival": 0.7},
        {"rule": "skipforward", "survival": 0.7},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_applied_convolutional_networks_are_folded(name, options):
    folded = assert_folds(foreign(name, **options), torch.randn(3, 3, 32, 32))
    assert count(folded, nn.BatchNorm2d) == 0
    assert "residrop" not in folded.code


@pytest.mark.parametrize("options", [{"rescale": "test"}, {"rule": "swapout"}], ids=str)
def test_applied_networks_with_other_norms_keep_their_factors(options):
    folded = assert_folds(foreign("convnext_tiny", survival=0.7, **options), torch.randn(2, 3, 32, 32))
    assert count(folded, "mul") > 0


def test_blocks_under_the_generic_rule_are_folded():
    model = foreign("resnet18", survival=0.7, rescale="test", branches=False, blocks="layer*.1")
    assert_folds(model, torch.randn(3, 3, 32, 32))


def test_blocks_of_torch_under_the_generic_rule_are_folded():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = nn.Sequential(*(copy.deepcopy(layer) for _ in range(2)), nn.Flatten(), nn.Linear(64, 3))
    residrop.apply(model, survival=0.6, rescale="test", blocks=nn.TransformerEncoderLayer, branches=False)
    assert_folds(model, torch.randn(2, 4, 16))


def test_a_model_whose_factors_are_one_and_that_cannot_be_traced_is_given_back_plain():
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=16
    )
    model = transformers.ViTForImageClassification(config)
    plain = type(model)
    residrop.apply(model, survival=0.5)
    folded, x = fold(model), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(folded(x).logits, model.eval()(x).logits, rtol=0, atol=0)
    assert type(folded) is plain
    assert not any(isinstance(module, Rule) for module in folded.modules())
    residrop.remove(model)
    residrop.apply(model, survival=0.5, rescale="test")
    with pytest.raises(ConfigError, match=r"cannot be traced by torch\.fx .* use rescale='train'"):
        fold(model)


# Rules and graphs of users


def test_a_rule_of_a_user_is_asked_for_its_factors():
    class Halves(residrop.StochasticDepth):
        def scale(self, draw):
            return 0.25 if draw.expected else 1.0

    model = residrop.create("resnet-8", rule=lambda rate: Halves(rate), survival=0.5)
    assert_folds(trained(model), torch.randn(3, 3, 8, 8))
    assert coefficients(model.blocks.block1.rule) == (1.0, 0.25)


@pytest.mark.parametrize(
    ("rule", "wanted"),
    [
        (residrop.ConstantDepth(), (1.0, 1.0)),
        (residrop.StochasticDepth(0.3), (1.0, 0.3)),
        (residrop.StochasticDepth(0.3, rescale="train"), (1.0, 1.0)),
        (residrop.Swapout(0.3, 0.6), (0.3, 0.6)),
        (residrop.SkipForward(0.3), (0.7, 0.3)),
        (residrop.SkipForward(0.3, of="shortcut"), (0.3, 0.7)),
        (residrop.UnitDropout(0.3), (0.0, 0.3)),
        (residrop.UnitDropout(0.3, on="residual"), (1.0, 0.3)),
        (residrop.UnitDropout(0.3, on="sum"), (0.3, 0.3)),
        (residrop.Mix((0.3, 0.6, 0.9)), (0.3, 0.6, 0.9)),
    ],
    ids=str,
)
def test_coefficients_of_the_rules(rule, wanted):
    assert coefficients(rule) == pytest.approx(wanted)
    assert rule.training


def test_a_rule_that_is_no_weighted_sum_is_refused():
    class Product(Rule):
        def forward(self, x, shortcut, branch, *, post=None, along=()):
            return shortcut(x) * branch(x)

    model = nn.Sequential(residrop.Residual(nn.Linear(2, 2), rule=Product(())))
    with pytest.raises(ConfigError, match="is no weighted sum of shortcut and branch"):
        fold(model)


def test_a_mixture_of_earlier_tensors_is_folded():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.rule = nn.Linear(4, 4), nn.Linear(4, 4), residrop.Mix((0.5, 0.25, 0.75))

        def forward(self, x):
            y = self.one(x)
            return self.rule(y, nn.Identity(), self.two, x)

    model = Net()
    residrop.attach(model)
    assert_folds(model, torch.randn(3, 4))


@pytest.mark.parametrize("kind", ["v1", "v2"])
def test_networks_of_the_general_form_are_folded(kind):
    name, options = {"v1": ("resnet-20", {}), "v2": ("resnet-20", {"block": "v2"})}[kind]
    model = residrop.create(name, rule="mix", survival=0.8, theta_2=0.6, repeat=2, earlier=0.5, classes=5, **options)
    assert model.blocks.block3.rule.rates == (0.8, 0.6, 0.6, 0.5)
    assert coefficients(model.blocks.block3.rule) == (0.8, 0.6, 0.6, 0.5)
    assert_folds(trained(model), torch.randn(3, 3, 8, 8))


def test_a_layer_that_is_shared_is_folded_once_per_call():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.first, self.second = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)
            self.block = residrop.Residual(self.conv, rule=residrop.Swapout(0.5, 0.25))

        def forward(self, x):
            return self.block(self.second(self.conv(torch.relu(self.first(self.conv(x))))))

    model = Net()
    residrop.attach(model)
    folded = assert_folds(trained(model), torch.randn(3, 3, 8, 8))
    assert count(folded, nn.BatchNorm2d) == 0
    assert count(folded, nn.Conv2d) == 3


def test_a_tensor_that_others_read_keeps_its_value():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
            self.block = residrop.Residual(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), residrop.Swapout(0.5, 0.25))

        def forward(self, x):
            y = self.conv(x)
            z = self.block(self.norm(y) + y)
            return torch.sigmoid(z) + z.relu_() + y.sum(dim=1, keepdim=True)

    model = Net()
    residrop.attach(model)
    assert_folds(trained(model), torch.randn(3, 3, 8, 8))


class _InPlaceBehind(nn.Module):
    """What is left of a block without its factor is a tensor that somebody else reads."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 6)
        self.block = residrop.Residual(nn.Linear(6, 6), None, residrop.Swapout(0.5, 0.0), nn.ReLU(inplace=True))

    def forward(self, x):
        y = self.first(x)
        return self.last(self.block(y)) + y.abs()


class _InPlaceBefore(nn.Module):
    """What a layer overwrites is read later, as it is then."""

    def __init__(self, how):
        super().__init__()
        self.how, self.first, self.relu = how, nn.Linear(6, 6), nn.ReLU(inplace=True)
        self.block = residrop.Residual(nn.Linear(6, 6), None, residrop.Swapout(0.5, 0.25))

    def forward(self, x):
        y = self.first(x)
        z = y.sin()
        if self.how == "module":
            self.relu(y)
        elif self.how == "function":
            nn.functional.relu(y, inplace=True)
        else:
            y.relu_()
        return self.block(y) + z


@pytest.mark.parametrize("how", ["behind", "module", "function", "method"])
def test_operations_in_place_do_as_before(how):
    model = _InPlaceBehind() if how == "behind" else _InPlaceBefore(how)
    residrop.attach(model)
    assert_folds(model, torch.randn(5, 6))


def test_a_model_without_rules_is_folded():
    folded = assert_folds(
        trained(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True))), torch.randn(2, 3, 8, 8)
    )
    assert [type(module) for module in folded.children()] == [nn.Conv2d, nn.ReLU]


def test_batch_norm_without_statistics_or_weights():
    without = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, track_running_stats=False))
    plain = nn.Sequential(nn.Conv2d(3, 3, 1, bias=False), nn.BatchNorm2d(3, affine=False))
    block = residrop.Residual(
        nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3, affine=False)), rule=residrop.Swapout(0.5, 0.3)
    )
    model = nn.Sequential(without, plain, block)
    residrop.attach(model)
    x = torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        model.train()(x)
    folded = assert_folds(model, x)
    assert count(folded, nn.BatchNorm2d) == 2


def test_what_cannot_be_traced_is_refused():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = residrop.Residual(nn.Linear(2, 2), rule=residrop.StochasticDepth(0.5))

        def forward(self, x):
            return self.block(x) if x.sum() > 0 else x

    model = Net()
    residrop.attach(model)
    with pytest.raises(ConfigError, match=r"Net cannot be traced by torch\.fx \(symbolically traced variables"):
        fold(model)


def test_an_example_finds_what_tracing_does_not_see():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = residrop.Residual(nn.Linear(2, 2), rule=residrop.StochasticDepth(0.5))

        def forward(self, x):
            return self.block(x) * (2.0 if torch.is_grad_enabled() else 1.0)

    model = Net()
    residrop.attach(model)
    assert fold(model) is not None
    with pytest.raises(ConfigError, match=r"Net folded differs from the original by 1\.0e"):
        fold(model, torch.ones(1, 2))
