import math

import pytest
import torch
import torch.nn.functional as F

from residrop import ConstantDepth, StochasticDepth, attach
from residrop.blocks.residual import Residual
from residrop.common.errors import ConfigError
from residrop.models import CifarResNet, create, group_starts
from residrop.models.blocks import TransformShortcut

OURS = {"downsample": "pool", "shortcut": "project", "head": "conv", "conv_bias": True}
VARIANTS = [
    {},
    {"block": "v2"},
    {"shortcut": "subsample"},
    {"shortcut": "project"},
    {"downsample": "pool"},
    {"transform": True},
    {"stable": True, "block": "v2"},
    OURS,
    {**OURS, "block": "v2", "width": 2},
]


def residuals(model):
    return [module for module in model.modules() if isinstance(module, Residual)]


def randomize_norms(model):
    """Give batch norm values that a wrong order or a missing layer would show."""
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_(0, 0.2)
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 1.5)
    return model


class Reference:
    """The network written out over a state_dict, for eval mode; nothing shared with the code under test."""

    def __init__(self, model):
        self.state = model.state_dict()

    def conv(self, name, x, stride=1):
        weight = self.state[f"{name}.weight"]
        return F.conv2d(x, weight, self.state.get(f"{name}.bias"), stride, weight.shape[-1] // 2)

    def norm(self, name, x):
        mean, var, gamma, beta = (
            self.state[f"{name}.{key}"].view(1, -1, 1, 1) for key in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / torch.sqrt(var + 1e-5) * gamma + beta

    def v1(self, x, n):
        h = F.relu(self.norm("stem.bn", self.conv("stem.conv", x)))
        for number in range(1, 3 * n + 1):
            stride = 2 if number in (n + 1, 2 * n + 1) else 1
            name = f"blocks.block{number}.branch"
            f = F.relu(self.norm(f"{name}.bn1", self.conv(f"{name}.conv1", h, stride)))
            f = self.norm(f"{name}.bn2", self.conv(f"{name}.conv2", f))
            if stride == 2:
                h = F.avg_pool2d(h, 2)
                h = torch.cat([h, torch.zeros_like(h)], dim=1)
            h = F.relu(h + f)
        return F.linear(h.mean((2, 3)), self.state["tail.linear.weight"], self.state["tail.linear.bias"])

    def ours_v2(self, x, n):
        h = self.conv("stem.conv", x)
        for number in range(1, 3 * n + 1):
            name = f"blocks.block{number}"
            skip = h
            if number in (n + 1, 2 * n + 1):
                h = F.avg_pool2d(h, 2)
                skip = self.conv(f"{name}.shortcut", h)
            f = self.conv(f"{name}.branch.conv1", F.relu(self.norm(f"{name}.branch.bn1", h)))
            f = self.conv(f"{name}.branch.conv2", F.relu(self.norm(f"{name}.branch.bn2", f)))
            h = skip + f
        h = F.relu(self.norm("tail.bn", h))
        return self.conv("tail.conv", h).mean((2, 3))


def test_v1_at_constant_depth_equals_the_written_out_network():
    model = randomize_norms(CifarResNet(14)).double().eval()
    x = torch.randn(3, 3, 16, 16, dtype=torch.float64)
    torch.testing.assert_close(model(x), Reference(model).v1(x, 2))


def test_ours_v2_at_constant_depth_equals_the_written_out_network():
    model = randomize_norms(CifarResNet(14, block="v2", **OURS)).double().eval()
    x = torch.randn(3, 3, 16, 16, dtype=torch.float64)
    torch.testing.assert_close(model(x), Reference(model).ours_v2(x, 2))


@pytest.mark.parametrize("options", VARIANTS)
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32), (1, 28, 28), (3, 9, 9), (2, 33, 5), (3, 4, 4)])
def test_forward_gives_finite_logits(shape, options):
    model = CifarResNet(8, classes=7, channels=shape[0], **options)
    logits = model(torch.randn(2, *shape))
    assert logits.shape == (2, 7)
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize("options", VARIANTS)
def test_rules_are_numbered_from_input_to_output(options):
    rules = [StochasticDepth(1 - number / 10) for number in range(1, 7)]
    model = CifarResNet(14, rules=rules, **options)
    sampler = attach(model)
    called = []
    for rule in rules:
        rule.register_forward_hook(lambda module, *_: called.append(module.rates[0]))
    model(torch.randn(2, 3, 8, 8))
    assert called == [rule.rates[0] for rule in rules]
    assert [site.rates[0] for site in sampler.sites] == called


def test_dropped_blocks_leave_only_the_shortcuts():
    model = create("resnet-14", rule="stochastic-depth", survival=0.0)
    x = torch.randn(4, 3, 16, 16)
    h = model.stem(x)
    for _ in range(2):
        h = F.pad(F.avg_pool2d(h, 2), (0, 0, 0, 0, 0, h.shape[1]))
    assert torch.equal(model(x), model.tail(h))


@pytest.mark.parametrize("depth", [8, 56, 110])
def test_group_starts_are_the_first_blocks_of_the_groups(depth):
    n = (depth - 2) // 6
    starts = group_starts(depth)
    assert starts == (0, n, 2 * n)
    with torch.device("meta"):
        blocks = residuals(CifarResNet(depth, transform=True))
    exempt = [i for i, block in enumerate(blocks) if not isinstance(block.shortcut, TransformShortcut)]
    assert tuple(exempt) == starts


@pytest.mark.parametrize(("depth", "factor"), [(110, 0.136083), (56, 0.192450)])
def test_stable_scales_every_branch_by_blocks_not_layers(depth, factor):
    with torch.device("meta"):
        model = CifarResNet(depth, stable=True)
    factors = [block.branch.scale.factor for block in residuals(model)]
    assert factors == pytest.approx([factor] * ((depth - 2) // 2), abs=1e-6)


def test_stable_and_plain_differ_by_the_factor_only():
    plain, stable = create("resnet-14", seed=3).eval(), create("stable-resnet-14", seed=3).eval()
    x = torch.randn(2, 16, 8, 8)
    ours, theirs = stable.blocks.block1.branch(x), plain.blocks.block1.branch(x)
    torch.testing.assert_close(ours, theirs / math.sqrt(6))
    assert stable.state_dict().keys() == plain.state_dict().keys()


def test_pooling_is_shared_by_branch_and_shortcut():
    model = CifarResNet(8, **OURS)
    names = list(dict(model.blocks.named_children()))
    convs = [module for module in model.modules() if isinstance(module, torch.nn.Conv2d)]
    assert names == ["block1", "pool2", "block2", "pool3", "block3"]
    assert {conv.stride for conv in convs} == {(1, 1)}
    assert all(conv.bias is not None for conv in convs)


def test_initialisation_is_hes():
    model = create("resnet-20")
    weight = model.state_dict()["blocks.block9.branch.conv1.weight"]
    assert weight.std().item() == pytest.approx(math.sqrt(2 / (64 * 9)), rel=0.02)
    assert weight.mean().item() == pytest.approx(0, abs=0.002)
    assert model.tail.linear.weight.abs().max().item() <= 1 / 8
    uniform = create("resnet-20", bn_gamma_init="uniform")
    gammas = torch.cat([m.weight for m in uniform.modules() if isinstance(m, torch.nn.BatchNorm2d)])
    assert gammas.mean().item() == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 57}, "depth is 57; it must be 6n \\+ 2 .*: try 56 or 62"),
        ({"depth": 2}, "depth is 2; .*: try 8 or 14"),
        ({"depth": 20.0}, "depth is 20.0; give a whole number"),
        ({"rules": [ConstantDepth()]}, "1 rules were given for 9 residual blocks"),
        ({"rules": [ConstantDepth()] * 9}, "same rule object"),
        ({"block": "v3"}, "block is 'v3'; choose one of 'v"),
        ({"shortcut": "padd"}, "shortcut is 'padd'; choose one of "),
        ({"downsample": "max"}, "downsample is 'max'"),
        ({"head": None}, "head is None"),
        ({"bn_gamma_init": "zeros"}, "bn_gamma_init is 'zeros'"),
        ({"width": 0}, "width is 0; give a whole number of at least 1"),
        ({"classes": True}, "classes is True"),
    ],
)
def test_constructor_refuses(options, message):
    with pytest.raises(ConfigError, match=message):
        CifarResNet(**{"depth": 20, **options})


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 1, 8, 8), r"shape \[2, 1, 8, 8\]; this network reads \[n, 3, height, width\]"),
        ((3, 8, 8), r"shape \[3, 8, 8\]"),
        ((2, 3, 3, 8), "3 x 8 pixels; this network needs at least 4 x 4"),
    ],
)
def test_forward_refuses(shape, message):
    with pytest.raises(ConfigError, match=message):
        CifarResNet(8)(torch.randn(shape))
