"""Every family of timm: bit by bit the plain block where nothing is dropped, and the masked one where it is."""

import copy

import pytest

timm = pytest.importorskip("timm")

import torch  # noqa: E402
from block_checks import check_backward, check_coins, check_modes, check_parts, check_rows  # noqa: E402
from timm.layers import DropPath  # noqa: E402
from timm.models.metaformer import MetaFormer  # noqa: E402
from timm.models.mlp_mixer import MlpMixer  # noqa: E402
from timm_blocks import CASES  # noqa: E402
from torch import nn  # noqa: E402

import residrop  # noqa: E402
from residrop.common.errors import ConfigError, InactiveWarning  # noqa: E402
from residrop.schedule.sampler import Plan  # noqa: E402
from residrop.surgery.drops import ReplacedDrop  # noqa: E402

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


@pytest.mark.parametrize("case", [pytest.param(case, id=name) for name, case in CASES.items() if name != "iformer"])
def test_block_present_in_backward_only(case):
    """iFormer multiplies by a parameter behind its drop module, where the reference has no place for a coin."""
    check_backward(case)


# Whole models


def small(name: str, **options) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=3, **options)


def small_vit(**options) -> nn.Module:
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 4, "num_heads": 3}
    return small("vit_tiny_patch16_224", **{**sizes, **options})


RATE = {"drop_path_rate": 0.3}
# name, options, size of images
MODELS = {
    "vit": (small_vit, RATE, 32),
    "deit": (
        lambda **o: small(
            "deit3_small_patch16_224", img_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=3, **o
        ),
        RATE,
        32,
    ),
    "beit": (
        lambda **o: small("beit_base_patch16_224", img_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=3, **o),
        RATE,
        32,
    ),
    "eva": (
        lambda **o: small("eva02_tiny_patch14_224", img_size=28, embed_dim=24, depth=3, num_heads=3, **o),
        RATE,
        28,
    ),
    "cait": (
        lambda **o: small("cait_xxs24_224", img_size=32, embed_dim=24, depth=3, num_heads=3, **o),
        RATE,
        32,
    ),
    "swin": (
        lambda **o: small(
            "swin_tiny_patch4_window7_224",
            img_size=32,
            window_size=4,
            embed_dim=12,
            depths=(2, 2),
            num_heads=(2, 2),
            **o,
        ),
        RATE,
        32,
    ),
    "convnext": (lambda **o: small("convnext_atto", depths=(2, 2, 1, 1), dims=(8, 8, 8, 8), **o), RATE, 32),
    "mobilenet": (lambda **o: small("mobilenetv3_small_050", **o), RATE, 64),
    "resnet": (lambda **o: small("resnet18", layers=(2, 1, 1, 1), channels=(8, 8, 8, 8), **o), RATE, 32),
    "resnet v2": (lambda **o: small("resnetv2_50", layers=(2, 1), channels=(32, 32), **o), RATE, 32),
    "mixer": (lambda **o: MlpMixer(3, 32, patch_size=8, num_blocks=3, embed_dim=16, **o), RATE, 32),
    "poolformer": (lambda **o: MetaFormer(3, num_classes=3, depths=(1, 2), dims=(8, 16), **o), RATE, 32),
}


def drops(model: nn.Module) -> dict[str, float]:
    return {name: module.drop_prob for name, module in model.named_modules() if isinstance(module, DropPath)}


@pytest.mark.parametrize(("make", "options", "size"), MODELS.values(), ids=MODELS.keys())
def test_model_hands_its_rates_over_in_one_line(make, options, size):
    model = make(**options).double()
    own = drops(model)
    images = torch.randn(4, 3, size, size, dtype=torch.float64)
    plain = model.eval()(images)
    keys, printed = list(model.state_dict()), repr(model)
    report = residrop.apply(model, survival="from_model")
    rates = [rate for entry in report.blocks for rate in entry.rates]
    inside = [name for name in own if name.startswith(tuple(f"{entry.name}." for entry in report.blocks))]
    assert set(rates) - {1.0} == {1 - own[name] for name in inside}
    assert len(inside) > 1
    assert all(isinstance(model.get_submodule(name), ReplacedDrop) for name in inside)
    assert drops(model) == own
    assert {entry.granularity for entry in report.blocks} == {"row"}
    assert list(model.state_dict()) == keys
    torch.testing.assert_close(model(images), plain, rtol=0, atol=0)
    model.train()
    for _ in range(2):
        model.zero_grad()
        model(images).sum().backward()
    assert residrop.sampler_of(model).step == 2
    residrop.remove(model)
    assert drops(model) == own
    assert repr(model) == printed


def test_model_without_drop_modules_is_an_error_that_says_what_to_do():
    with pytest.raises(ConfigError, match=r"no drop modules of its own.*survival=0\.8.*drop_path_rate"):
        residrop.apply(small_vit())


def test_first_block_without_drop_module_has_rate_1():
    report = residrop.apply(small_vit(drop_path_rate=0.3))
    assert [entry.rates for entry in report.blocks] == [pytest.approx((1 - rate,) * 2) for rate in (0.0, 0.1, 0.2, 0.3)]
    assert [entry.name for entry in report.blocks] == ["blocks.0", "blocks.1", "blocks.2", "blocks.3"]
    assert report.left_alone == ()


def test_unscaled_drop_path_stays_unscaled():
    model = small_vit(drop_path_rate=0.3)
    for module in model.modules():
        if isinstance(module, DropPath):
            module.scale_by_keep = False
    residrop.apply(model)
    rescales = {rule.rescale for rule in model.modules() if isinstance(rule, residrop.StochasticDepth)}
    assert rescales == {"none", "train"} or rescales == {"none"}


def test_rates_given_override_those_of_the_model():
    model = small_vit(drop_path_rate=0.3)
    report = residrop.apply(model, survival="linear_decay(0.5)")
    assert [entry.rates[0] for entry in report.blocks] == pytest.approx([0.875, 0.75, 0.625, 0.5])
    assert all(isinstance(model.get_submodule(name), ReplacedDrop) for name in drops(model))
    assert {entry.granularity for entry in report.blocks} == {"block"}


# Arguments of blocks are cut by their meaning


def masked(model: nn.Module, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    for block in model.blocks:
        x = block(x, attn_mask=mask)
    return x


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("shape", [(5, 5), (3, 5, 5), (1, 1, 5, 5), (5, 1, 5, 5), (5, 3, 5, 5)])
def test_masks_of_five_tokens_for_five_rows(shape, fused):
    model = small_vit(embed_dim=24).double().train()
    for block in model.blocks:
        block.attn.fused_attn = fused
    plain = copy.deepcopy(model)
    residrop.apply(model, survival=0.6, granularity="row", rescale="none", seed=3)
    x = torch.randn(5, 5, 24, dtype=torch.float64)
    mask = torch.where(torch.rand(*shape) < 0.4, -30.0, 0.0).double()
    plan = residrop.sampler_of(model).plan(0)
    with residrop.using(model, plan):
        ours = masked(model, x, mask)
    draws = iter(plan.draws)
    for block in plain.blocks:
        for branch in (
            lambda x, block=block: block.attn(block.norm1(x), attn_mask=mask),
            lambda x, block=block: block.mlp(block.norm2(x)),
        ):
            window = next(draws).rows(5)
            live = torch.zeros(5, dtype=torch.bool)
            live[[(window.start + i) % 5 for i in range(window.live)]] = True
            x = torch.where(live.view(5, 1, 1), x + branch(x), x)
    torch.testing.assert_close(ours, x)


@pytest.mark.parametrize("looked", [False, True])
def test_mask_of_another_batch_is_refused(looked):
    """As by the plain block, although half of the batch would happen to fit."""
    model = small_vit().train()
    residrop.apply(model, survival=0.5, granularity="row")
    x = torch.randn(4, 17, 24)
    with residrop.using(model, residrop.sampler_of(model).plan(0)):
        if looked:
            model.blocks[0](x, attn_mask=torch.zeros(4, 1, 17, 17))
        with pytest.raises(RuntimeError, match=r"size of tensor a \(4\) must match .* b \(2\)"):
            model.blocks[0](x, attn_mask=torch.zeros(2, 1, 17, 17))


def test_block_called_by_name_and_with_wrong_arguments():
    model = small_vit().train()
    residrop.apply(model, survival=0.5)
    x = torch.randn(2, 17, 24)
    with residrop.using(model, Plan.of([False] * 8)):
        assert model.blocks[0](x=x) is x
        assert model.blocks[0](x, attn_mask=None) is x
        with pytest.raises(TypeError, match="unexpected keyword argument 'mask'"):
            model.blocks[0](x, mask=None)
        with pytest.raises(TypeError, match=r"takes from 2 to \d positional arguments but 5 were given"):
            model.blocks[0](x, None, False, None)
        with pytest.raises(TypeError, match="missing 1 required positional argument: 'x'"):
            model.blocks[0]()


# Precision and memory format


@pytest.mark.parametrize("granularity", ["block", "row"])
@pytest.mark.parametrize("name", ["convnext", "resnet", "vit"])
def test_autocast_and_channels_last(name, granularity):
    make, _, size = MODELS[name]
    model = make().to(memory_format=torch.channels_last).train()
    residrop.apply(model, survival=0.5, granularity=granularity)
    images = torch.randn(4, 3, size, size).to(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(images)
    out.float().sum().backward()
    assert torch.isfinite(out).all()


def test_all_rates_1_warns():
    with pytest.warns(InactiveWarning, match="changed nothing: all 4 blocks have survival rate 1"):
        residrop.apply(small_vit(), survival=1.0)
