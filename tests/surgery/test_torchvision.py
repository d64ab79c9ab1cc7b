"""Every family of torchvision: bit by bit the plain block where nothing is dropped, and the masked one where it is."""

import copy

import pytest
import torch
from block_checks import check_backward, check_coins, check_modes, check_parts, check_rows
from torch import Tensor, nn
from torchvision import models
from torchvision.models.resnet import BasicBlock, ResNet
from torchvision_blocks import CASES

import residrop
from residrop.common.errors import ConfigError
from residrop.schedule.sampler import Draw, Plan
from residrop.surgery.drops import ReplacedDrop

every_block = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


@every_block
def test_block_is_the_plain_one_where_nothing_is_dropped(case):
    check_modes(case)


@every_block
def test_block_under_every_combination_of_coins(case):
    check_coins(case)


@every_block
def test_block_tells_what_a_dead_branch_leaves_out(case):
    check_parts(case)


@every_block
def test_block_with_some_rows(case):
    check_rows(case)


@every_block
def test_block_present_in_backward_only(case):
    check_backward(case)


# Row level with batch norm, which sees the live rows only


def small_resnet(**options) -> ResNet:
    torch.manual_seed(1)
    model = ResNet(BasicBlock, [2, 2, 1, 1], num_classes=3, **options).double()
    for block in (one for one in model.modules() if isinstance(one, BasicBlock)):
        nn.init.normal_(block.bn2.weight, 1.0, 0.3)
    return model.train()


def live_of(draw: Draw, rows: int) -> list[int]:
    window = draw.rows(rows)
    return [(window.start + i) % rows for i in range(window.live)]


def by_hand(model: ResNet, x: Tensor, draws: list[Draw], rate: float) -> Tensor:
    """The network as written in a textbook, with branches on the live rows."""
    x = model.maxpool(model.relu(model.bn1(model.conv1(x))))
    blocks = [block for layer in (model.layer1, model.layer2, model.layer3, model.layer4) for block in layer]
    for block, draw in zip(blocks, draws, strict=True):
        skip = x if block.downsample is None else block.downsample(x)
        live = live_of(draw, len(x))
        if live:
            branch = block.bn2(block.conv2(block.bn1(block.conv1(x[live])).relu()))
            skip = skip.index_add(0, torch.tensor(live), branch, alpha=1 / rate)
        x = skip.relu()
    return model.fc(model.avgpool(x).flatten(1))


@pytest.mark.parametrize("keys", [(1, 2, 3, 4, 5, 6), (7, 8, 9, 10, 11, 12), (21, 22, 23, 24, 25, 26)])
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_resnet_rows_are_a_batch_of_their_own_for_batch_norm(keys, memory):
    model, reference = small_resnet(), small_resnet()
    residrop.apply(model, survival=0.4, granularity="row")
    model.to(memory_format=memory)
    draws = [Draw((0.4,), key=key) for key in keys]
    x = torch.randn(5, 3, 32, 32, dtype=torch.float64).to(memory_format=memory)
    with residrop.using(model, Plan(tuple(draws))):
        ours = model(x)
    theirs = by_hand(reference, x, draws, 0.4)
    torch.testing.assert_close(ours, theirs)
    ours.square().sum().backward()
    theirs.square().sum().backward()
    for (name, parameter), other in zip(model.named_parameters(), reference.parameters(), strict=True):
        expected = torch.zeros_like(other) if other.grad is None else other.grad
        actual = torch.zeros_like(other) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(actual, expected, msg=lambda text, name=name: f"{name}: {text}")
    torch.testing.assert_close(model.state_dict(), reference.state_dict())


def test_the_draws_of_this_test_wrap_around_and_leave_rows_out():
    windows = [Draw((0.4,), key=key).rows(5) for key in (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 21, 22, 23, 24, 25, 26)]
    assert any(window.start + window.live > 5 for window in windows)
    assert {window.live for window in windows} == {2}


# The last ReLU is left out only where the input is known not to be negative


def settled(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if "residrop_settled" in vars(module)]


def test_relu_is_left_out_behind_a_relu():
    model = small_resnet()
    residrop.apply(model, survival=0.5)
    assert settled(model) == ["layer1.0", "layer1.1", "layer2.1"]
    block, x = model.layer1[1], torch.rand(2, 64, 4, 4, dtype=torch.float64)
    with residrop.using(model, Plan.of([False] * 6)):
        assert block(x) is x


@pytest.mark.parametrize("activation", [nn.ReLU6(True), nn.LeakyReLU(0.1, True), nn.Hardtanh(-1, 1, True)])
def test_other_activations_are_applied_to_all(activation):
    model = small_resnet()
    for module in model.modules():
        if hasattr(module, "relu"):
            module.relu = activation
    plain = copy.deepcopy(model)
    residrop.apply(model, survival=0.5)
    assert settled(model) == []
    x = 10 * torch.randn(2, 64, 4, 4, dtype=torch.float64)
    before = x.clone()
    with residrop.using(model, Plan.of([False] * 6)):
        out = model.layer1[1](x)
    torch.testing.assert_close(out, plain.layer1[1].relu(x.clone()), rtol=0, atol=0)
    torch.testing.assert_close(x, before, rtol=0, atol=0)  # what came in is not overwritten


def test_block_out_of_its_network_handles_negative_inputs():
    root = nn.ModuleDict({"first": BasicBlock(4, 4), "second": BasicBlock(4, 4)}).train()
    residrop.apply(root, survival=0.5)
    assert settled(root) == []
    x = torch.randn(2, 4, 4, 4)
    before = x.clone()
    with residrop.using(root, Plan.of([False, False])):
        out = root["first"](x)
    torch.testing.assert_close(out, before.relu(), rtol=0, atol=0)
    torch.testing.assert_close(x, before, rtol=0, atol=0)


def test_first_block_behind_something_else_is_not_settled():
    model = small_resnet()
    model.maxpool = nn.Conv2d(64, 64, 1).double()
    residrop.apply(model, survival=0.5)
    assert settled(model)[0] == "layer1.1"


# Whole models: rates are inherited, blocks without a residual sum are left alone


def small_efficientnet() -> nn.Module:
    settings = [
        models.efficientnet.FusedMBConvConfig(1, 3, 1, 8, 8, 2),
        models.efficientnet.MBConvConfig(2, 3, 2, 8, 12, 2),
    ]
    return models.efficientnet.EfficientNet(settings, 0.0, stochastic_depth_prob=0.4, num_classes=3, last_channel=16)


def small_convnext() -> nn.Module:
    settings = [models.convnext.CNBlockConfig(8, 12, 2), models.convnext.CNBlockConfig(12, None, 2)]
    return models.convnext.ConvNeXt(settings, stochastic_depth_prob=0.3, num_classes=3)


def small_swin(version: str) -> nn.Module:
    options = {}
    if version == "v2":
        options = {
            "block": models.swin_transformer.SwinTransformerBlockV2,
            "downsample_layer": models.swin_transformer.PatchMergingV2,
        }
    return models.swin_transformer.SwinTransformer(
        [4, 4], 8, [2, 2], [2, 2], [2, 2], stochastic_depth_prob=0.3, num_classes=3, **options
    )


INHERITING = {
    "efficientnet": small_efficientnet,
    "convnext": small_convnext,
    "swin": lambda: small_swin("v1"),
    "swin v2": lambda: small_swin("v2"),
}


@pytest.mark.parametrize("make", INHERITING.values(), ids=INHERITING.keys())
def test_model_hands_its_rates_over(make):
    torch.manual_seed(0)
    model = make().double()
    drops = {name: one for name, one in model.named_modules() if type(one).__name__ == "StochasticDepth"}
    own = {name.rpartition(".")[0]: 1.0 - one.p for name, one in drops.items()}
    x = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    plain = model.eval()(x)
    report = residrop.apply(model)
    assert len(report.blocks) >= 3
    assert {entry.granularity for entry in report.blocks} == {"row"}
    assert [set(entry.rates) for entry in report.blocks] == [{own[entry.name]} for entry in report.blocks]
    assert all(isinstance(drops[f"{entry.name}.stochastic_depth"], ReplacedDrop) for entry in report.blocks)
    torch.testing.assert_close(model(x), plain, rtol=0, atol=0)
    residrop.remove(model)
    assert {name.rpartition(".")[0]: 1.0 - one.p for name, one in drops.items()} == own


def test_blocks_without_a_residual_sum_are_left_alone():
    model = small_efficientnet()
    report = residrop.apply(model, survival="linear_decay(0.5)")
    assert [entry.name for entry in report.blocks] == ["features.1.0", "features.1.1", "features.2.1"]
    assert [entry.rates for entry in report.blocks] == [(pytest.approx(rate),) for rate in (1 - 1 / 6, 1 - 2 / 6, 0.5)]
    assert report.left_alone == (
        (
            "features.2.0",
            "it has no residual sum (blocks that change the stride or the width often have none)",
        ),
    )
    assert "left alone: features.2.0: it has no residual sum" in str(report)


def test_named_block_without_a_residual_sum_is_refused_at_its_first_forward():
    model = small_efficientnet().train()
    report = residrop.apply(model, survival=0.5, blocks="features.2.0")
    assert report.blocks[0].kind == "torchvision MBConv, whole"
    with pytest.raises(ConfigError, match=r"MBConv turns \(2, 8, 16, 16\) into \(2, 16, 8, 8\).*leave this block out"):
        model(torch.randn(2, 3, 32, 32))


@pytest.mark.parametrize(
    ("make", "size"),
    [
        (lambda: models.vision_transformer.VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=3), 32),
        (lambda: models.mobilenet_v2(num_classes=3, width_mult=0.25), 64),
        (lambda: models.mnasnet0_5(num_classes=3), 64),
        (
            lambda: models.maxvit.MaxVit((32, 32), 8, 4, [8, 16], [1, 1], 4, stochastic_depth_prob=0.2, num_classes=3),
            32,
        ),
    ],
    ids=["vit", "mobilenet", "mnasnet", "maxvit"],
)
@pytest.mark.parametrize("granularity", ["block", "row"])
def test_model_trains_at_every_level(make, size, granularity):
    torch.manual_seed(0)
    model = make()
    x = torch.randn(3, 3, size, size)
    keys = list(model.state_dict())
    residrop.apply(model, survival=0.5, granularity=granularity)
    for _ in range(3):
        model.zero_grad()
        out = model.train()(x)
        out.sum().backward()
        assert torch.isfinite(out).all()
    assert list(model.state_dict()) == keys
    assert residrop.sampler_of(model).step == 3
