"""`apply` and `remove` on whole models: what stays as it was, what is refused, and what the report says."""

import copy
import io
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.models import VisionTransformer
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet
from torchvision.models.vision_transformer import EncoderBlock
from torchvision.ops import StochasticDepth

import residrop
from residrop.blocks.skippable import is_skipped
from residrop.common.errors import ConfigError, InactiveWarning, PlanError
from residrop.rules import Rule
from residrop.schedule.sampler import Plan
from residrop.surgery.blocks import AppliedBlock


def resnet() -> ResNet:
    return ResNet(BasicBlock, [2, 1, 1, 1], num_classes=3)


def vit() -> VisionTransformer:
    return VisionTransformer(32, 8, 4, 2, 16, 32, num_classes=3)


every_model = pytest.mark.parametrize("make", [resnet, vit], ids=["resnet", "vit"])


def images(rows: int = 3) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(rows, 3, 32, 32)


def rules_in(model: nn.Module) -> list[Rule]:
    return [module for module in model.modules() if isinstance(module, Rule)]


# What stays as it was


@every_model
@pytest.mark.parametrize("branches", [True, False])
def test_names_classes_and_order_stay(make, branches):
    torch.manual_seed(0)
    model = make()
    blocks = "layer1.*" if make is resnet else None
    before = [(name, id(parameter)) for name, parameter in model.named_parameters()]
    buffers = [name for name, _ in model.named_buffers()]
    keys, classes = list(model.state_dict()), [type(module) for module in model.modules()]
    printed, contents = repr(model), {name: set(vars(module)) for name, module in model.named_modules()}
    residrop.apply(model, survival=0.5, blocks=blocks, branches=branches)
    assert [(name, id(parameter)) for name, parameter in model.named_parameters()] == before
    assert [name for name, _ in model.named_buffers()] == buffers
    assert list(model.state_dict()) == keys
    own = [module for name, module in model.named_modules() if "residrop_rules" not in name]
    assert [type(module).__name__ for module in own] == [kind.__name__ for kind in classes]
    assert [isinstance(module, kind) for module, kind in zip(own, classes, strict=True)] == [True] * len(classes)
    assert "StochasticDepth(0.5, granularity='block', rescale='train')" in repr(model)
    residrop.remove(model)
    assert [type(module) for module in model.modules()] == classes
    assert repr(model) == printed
    assert {name: set(vars(module)) for name, module in model.named_modules()} == contents
    assert not model._forward_pre_hooks
    assert not model._forward_hooks


@every_model
def test_weights_load_both_ways(make):
    torch.manual_seed(0)
    plain, model = make().eval(), make().eval()
    residrop.apply(model, survival=0.5)
    model.load_state_dict(plain.state_dict())
    torch.testing.assert_close(model(images()), plain(images()), rtol=0, atol=0)
    model.train()(images()).sum().backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = make().eval()
    other.load_state_dict(torch.load(file, weights_only=True))
    torch.testing.assert_close(model.eval()(images()), other(images()), rtol=0, atol=0)


@every_model
def test_copy_draws_for_itself(make):
    model = make()
    residrop.apply(model, survival=0.5, seed=3)
    twin = copy.deepcopy(model)
    assert twin.state_dict().keys() == model.state_dict().keys()
    for _ in range(2):
        twin.train()(images())
    assert residrop.sampler_of(twin).step == 2
    assert residrop.sampler_of(model).step == 0
    assert residrop.sampler_of(twin).plan(7) == residrop.sampler_of(model).plan(7)
    residrop.remove(twin)
    assert not rules_in(twin)
    assert rules_in(model)
    torch.testing.assert_close(twin.eval()(images()).shape, model.eval()(images()).shape)


@every_model
def test_model_built_on_the_meta_device(make):
    torch.manual_seed(0)
    plain = make().eval()
    with torch.device("meta"):
        model = make()
    residrop.apply(model, survival=0.5)
    model.to_empty(device="cpu")
    model.load_state_dict(plain.state_dict())
    torch.testing.assert_close(model.eval()(images()), plain(images()), rtol=0, atol=0)
    model.train()(images()).sum().backward()


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: nn.Sequential(BasicBlock(4, 4), BasicBlock(4, 4)), (2, 4, 4, 4)),
        (lambda: nn.Sequential(EncoderBlock(2, 4, 8, 0.0, 0.0)), (2, 3, 4)),
        (lambda: nn.Sequential(nn.Sequential(nn.Linear(4, 4))), (2, 4)),
    ],
    ids=["resnet", "vit", "generic"],
)
@pytest.mark.parametrize("strict", [False, True])
def test_export_in_eval_is_that_of_the_plain_model(make, shape, strict):
    torch.manual_seed(0)
    model, x = make().eval(), torch.randn(*shape)
    expected = model(x)
    plain = torch.export.export(model, (x,), strict=strict)
    residrop.apply(model, survival=0.5, blocks="*")
    program = torch.export.export(model, (x,), strict=strict)
    operations = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert operations == [str(node.target) for node in plain.graph.nodes if node.op == "call_function"]
    assert not [name for name in operations if "bernoulli" in name or "rand" in name]
    torch.testing.assert_close(program.module()(x), expected)


def test_export_with_the_rates_of_the_paper_scales_the_branches():
    torch.manual_seed(0)
    model = resnet().eval()
    residrop.apply(model, survival=0.5, rescale="test")
    expected = model(images())
    program = torch.export.export(model, (images(),), strict=False)
    torch.testing.assert_close(program.module()(images()), expected)
    operations = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert sum("mul" in name for name in operations) == 5


def test_hooks_on_blocks_fire_as_before():
    model = resnet()
    block, seen = model.layer1[1], []
    block.register_forward_pre_hook(lambda module, args: seen.append("before"))
    block.register_forward_hook(lambda module, args, out: seen.append("after"))
    residrop.apply(model, survival=0.5)
    block.register_forward_hook(lambda module, args, out: seen.append("later"))
    block.register_full_backward_hook(lambda module, grads_in, grads_out: seen.append("backward"))
    for coins in ([True] * 5, [False] * 5):
        with residrop.using(model, Plan.of(coins)):
            model.train()(images()).sum().backward()
        assert seen == ["before", "after", "later", "backward"]
        seen.clear()
    residrop.remove(model)
    model(images())
    assert seen == ["before", "after", "later"]


def test_hook_of_the_user_on_the_model_survives_remove():
    model, seen = resnet(), []
    model.register_forward_hook(lambda module, args, out: seen.append(1))
    residrop.apply(model, survival=0.5)
    residrop.remove(model)
    model(images())
    assert seen == [1]


@every_model
@pytest.mark.parametrize("training", [True, False])
def test_training_flags_stay(make, training):
    model = make().train(training)
    next(iter(model.children())).train(not training)
    flags = {name: module.training for name, module in model.named_modules()}
    residrop.apply(model, survival=0.5)
    assert {name: module.training for name, module in model.named_modules() if name in flags} == flags
    assert {rule.training for rule in rules_in(model)} == {training}
    residrop.remove(model)
    assert {name: module.training for name, module in model.named_modules()} == flags


@every_model
def test_removed_model_trains_as_the_plain_one(make):
    torch.manual_seed(0)
    model = make().train()
    plain = copy.deepcopy(model)
    residrop.apply(model, survival=0.5)
    residrop.remove(model)
    for one in (model, plain):
        one(images()).square().sum().backward()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=0)
    torch.testing.assert_close(model.state_dict(), plain.state_dict(), rtol=0, atol=0)


@every_model
@pytest.mark.parametrize("granularity", ["block", "row"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_blocks_repeat_their_draw(make, granularity, reentrant):
    torch.manual_seed(0)
    model = make().train()
    residrop.apply(model, survival=0.5, granularity=granularity, seed=2)
    if make is resnet:
        model.eval()  # batch norm counts a recomputation twice, with or without rules
    blocks = [module for module in model.modules() if isinstance(module, AppliedBlock)]
    x = images()
    plan = residrop.sampler_of(model).plan(0)
    gradients = []
    for wrapped in (False, True):
        model.zero_grad()
        y = torch.nn.functional.interpolate(x, 8)
        y = (y.repeat(1, 22, 1, 1)[:, :64] if make is resnet else y.flatten(2)[..., :16]).clone().requires_grad_()
        with residrop.using(model, plan):
            z = y
            for block in blocks[:2] if make is resnet else blocks:
                z = checkpoint(block, z, use_reentrant=reentrant) if wrapped else block(z)
            z.square().sum().backward()
        gradients.append([y.grad, *(parameter.grad for parameter in model.parameters())])
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


# Which blocks


@pytest.mark.parametrize(
    ("blocks", "names"),
    [
        (None, ["layer1.0", "layer1.1", "layer2.0", "layer3.0", "layer4.0"]),
        ("layer1.*", ["layer1.0", "layer1.1"]),
        ("*.0", ["layer1.0", "layer2.0", "layer3.0", "layer4.0"]),
        (["layer3.*", "layer1.1"], ["layer1.1", "layer3.0"]),
        (BasicBlock, ["layer1.0", "layer1.1", "layer2.0", "layer3.0", "layer4.0"]),
        (lambda model: model.layer1, ["layer1.0", "layer1.1"]),
        (lambda model: [model.layer4, model.layer1[1]], ["layer1.1", "layer4.0"]),
        (lambda model: nn.ModuleList([model.layer2[0]]), ["layer2.0"]),
        (lambda model: {model.layer2[0], model.layer3[0]}, ["layer2.0", "layer3.0"]),
    ],
)
def test_blocks_by_pattern_class_and_module(blocks, names):
    model = resnet()
    chosen = blocks(model) if callable(blocks) and not isinstance(blocks, type) else blocks
    report = residrop.apply(model, survival="linear_decay(0.5)", blocks=chosen)
    assert [entry.name for entry in report.blocks] == names
    depth = len(names)
    assert [entry.rates[0] for entry in report.blocks] == pytest.approx(
        [1 - (place + 1) / depth / 2 for place in range(depth)]
    )


@pytest.mark.parametrize(
    ("blocks", "match"),
    [
        ("layer9.*", r"nothing in ResNet matches blocks='layer9\.\*'; names look like 'layer1\.\*'"),
        (Bottleneck, "nothing in ResNet matches blocks=<class 'torchvision.models.resnet.Bottleneck'>"),
        ([], "nothing in ResNet matches blocks=these list"),
        (nn.Linear(1, 1), "a Linear in `blocks` is no part of this ResNet"),
        (3, "blocks contains 3; give name patterns, classes, modules or lists of modules"),
        (["layer1", "layer1.0"], "block 'layer1.0' lies inside block 'layer1'; choose one of the two"),
    ],
)
def test_blocks_that_cannot_be(blocks, match):
    model = resnet()
    with pytest.raises(ConfigError, match=match):
        residrop.apply(model, survival=0.5, blocks=blocks)
    assert not rules_in(model)


def test_model_without_residual_sums_says_how_to_name_blocks():
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)))
    with pytest.raises(
        ConfigError, match=r"no residual blocks: in the source.*blocks='1\.\*', \.\.\.\), by a pattern, a class or a"
    ):
        residrop.apply(model, survival=0.5)


def test_subclass_with_a_forward_of_its_own_is_read_by_itself():
    """That of its base class says nothing of it; one that calls it cannot be taken apart, and is a whole block."""

    class Own(BasicBlock):
        def forward(self, x: Tensor) -> Tensor:
            return x + self.bn1(self.conv1(x)) * 0.5

    class Calling(BasicBlock):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 1

    class Same(BasicBlock):
        pass

    model = nn.Sequential(Own(4, 4), Calling(4, 4), Calling(4, 4), Same(4, 4))
    del model[0].conv2, model[0].bn2
    report = residrop.apply(model, survival=0.5)
    assert [entry.name for entry in report.blocks] == ["0", "3"]
    ((names, why),) = report.left_alone
    assert names == "1, 2"
    assert "2 x Calling" in why
    assert "its forward calls that of a base class" in why
    x = torch.rand(2, 4, 3, 3)
    with residrop.using(model.train(), Plan.of([True, False])):
        torch.testing.assert_close(model[0](x), x + model[0].bn1(model[0].conv1(x)))  # twice a half
        assert torch.equal(model[3](x), x)
    residrop.remove(model)
    report = residrop.apply(model, survival=0.5, blocks="*")
    assert [entry.kind for entry in report.blocks] == [
        f"tests {kind}" for kind in ("Own", "Calling, whole", "Calling, whole", "Same")
    ]


def test_blocks_of_any_class_are_found_with_their_branches():
    class Mine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm1, self.attn, self.norm2, self.mlp = (nn.LayerNorm(4), nn.Linear(4, 4), nn.LayerNorm(4), nn.Tanh())
            self.drop_path = StochasticDepth(0.25, "row")

        def forward(self, x: Tensor) -> Tensor:
            """With words of its own."""
            x = x + self.drop_path(self.attn(self.norm1(x)))  # and remarks
            x = x + self.drop_path(self.mlp(self.norm2(x)))
            return x  # noqa: RET504

    report = residrop.apply(nn.Sequential(Mine()))
    assert [(entry.rates, entry.kind) for entry in report.blocks] == [((0.75, 0.75), "tests Mine")]


def test_block_whose_forward_was_replaced_is_left_alone():
    model = resnet()
    model.layer1[0].forward = lambda x: x
    report = residrop.apply(model, survival=0.5)
    assert report.left_alone == (("layer1.0", "its forward was replaced on the object, by an engine or by hand"),)
    assert len(report.blocks) == 4


# What is refused


def test_applying_twice():
    model = resnet()
    residrop.apply(model, survival=0.5)
    with pytest.raises(ConfigError, match=r"has rules already; call residrop.remove\(model\) first"):
        residrop.apply(model, survival=0.5)
    residrop.remove(model)
    residrop.apply(model, survival=0.5)
    assert len(rules_in(model)) == 5


def test_our_own_networks():
    with pytest.raises(ConfigError, match="has residual blocks of residrop already"):
        residrop.apply(residrop.create("resnet-20", rule="constant"), survival=0.5)
    with pytest.raises(ConfigError, match="has residual blocks of residrop already"):
        residrop.apply(nn.Sequential(residrop.create("resnet-20"), BasicBlock(4, 4)), survival=0.5, blocks="1")


def test_removing_what_was_not_applied():
    with pytest.raises(ConfigError, match="has no rules of residrop"):
        residrop.remove(resnet())


def test_removing_what_was_changed_since():
    model = resnet()
    residrop.apply(model, survival=0.5)
    model.layer1[1].forward = lambda x: x
    with pytest.raises(ConfigError, match="was changed since residrop"):
        residrop.remove(model)
    assert len(rules_in(model)) == 5
    del model.layer1[1].forward
    residrop.remove(model)
    assert not rules_in(model)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"survival": 1.5}, "1.5"),
        ({"survival": [0.5, 0.5]}, "5"),
        ({"survival": 0.5, "granularity": "unit"}, "granularity is 'unit'"),
        ({"survival": 0.5, "rescale": "both"}, "rescale is 'both'"),
        ({"survival": 0.5, "rule": "swap-out"}, "rule 'swap-out' is unknown"),
        ({"survival": 0.5, "rule": "swapout", "granularity": "row"}, "takes no option 'granularity'"),
        ({"survival": 0.5, "wholes": ["x"]}, "takes no option 'wholes'"),
        ({"survival": "from_model"}, "no drop modules of its own"),
        ({}, "no drop modules of its own"),
        ({"survival": 0.5, "timing": "sometimes"}, "sometimes"),
    ],
)
def test_wrong_options_leave_the_model_as_it_was(options, match):
    model = resnet()
    with pytest.raises(ConfigError, match=match):
        residrop.apply(model, **options)
    assert not rules_in(model)
    assert not model._forward_pre_hooks
    assert not any(isinstance(module, AppliedBlock) for module in model.modules())


# Coins


def test_training_advances_and_eval_does_not():
    model = resnet()
    residrop.apply(model, survival=0.5, seed=5)
    sampler = residrop.sampler_of(model)
    model.train()(images())
    model.eval()(images())
    model.train()(images())
    assert sampler.step == 2
    fresh = resnet().train()
    residrop.apply(fresh, survival=0.5)
    with pytest.raises(PlanError, match="run outside of a forward of its root"):
        fresh.layer1(torch.randn(2, 64, 8, 8))


def test_dead_parameters_get_no_gradient():
    model = resnet().train()
    residrop.apply(model, survival=0.5)
    with residrop.using(model, Plan.of([True, False, False, True, False])):
        model(images()).sum().backward()
    without = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    dead = ("layer1.1", "layer2.0", "layer4.0")
    assert without == {
        name
        for name in model.state_dict()
        if name.startswith(dead) and "downsample" not in name and name in dict(model.named_parameters())
    }


def test_what_a_wrapper_remembers_of_its_block_goes_with_the_rule():
    """A wrapper that is sharded by itself asks `is_skipped` at every call, also after `remove` and a second `apply`."""
    model = nn.Sequential(nn.Sequential(BasicBlock(4, 4)))
    absent = Plan.of([False])
    for _ in range(2):
        residrop.apply(model, survival=0.5)
        with residrop.using(model, absent):
            assert not is_skipped(
                model[0]
            )  # the block looks at its first batch, for which its parameters must be there
            model.train()(torch.randn(2, 4, 3, 3))
            assert is_skipped(model[0])
        residrop.remove(model)
        assert not is_skipped(model[0])


def test_timing_moves_the_rates():
    model = resnet().train()
    residrop.apply(model, survival=0.5, timing="warmup(4)")
    sampler = residrop.sampler_of(model)
    assert sampler.rates_at(0)[0][0] > sampler.rates_at(3)[0][0] >= sampler.rates_at(4)[0][0] == 0.5


def test_sampled_inference():
    torch.manual_seed(0)
    model = resnet().eval()
    residrop.apply(model, survival=0.5, granularity="row")
    with torch.no_grad(), residrop.sampling(model):
        draws = [model(images()) for _ in range(4)]
    assert not any(torch.equal(draws[0], other) for other in draws[1:])
    with torch.no_grad(), residrop.sampling(model):
        torch.testing.assert_close(model(images()), draws[0], rtol=0, atol=0)


def test_shared_drop_of_a_rank_is_a_no_op_here():
    model = resnet().train()
    residrop.apply(model, survival=0.5, scope="per_rank")
    assert {rule.scope for rule in rules_in(model)} == {"per_rank"}
    model(images()).sum().backward()


# The report


def test_report_is_readable():
    model = vit()
    report = residrop.apply(model, survival="linear_decay(0.5)", granularity="row")
    assert str(report) == "\n".join(
        [
            "4 blocks, 8 branches, expected depth 5.50, 72% of the parameters may be left out",
            "  encoder.layers.encoder_layer_0  0.875, 0.875  row  torchvision EncoderBlock",
            "  encoder.layers.encoder_layer_1  0.75, 0.75    row  torchvision EncoderBlock",
            "  encoder.layers.encoder_layer_2  0.625, 0.625  row  torchvision EncoderBlock",
            "  encoder.layers.encoder_layer_3  0.5, 0.5      row  torchvision EncoderBlock",
        ]
    )
    assert report.expected_depth == pytest.approx(5.5)


def test_report_of_generic_blocks_and_what_is_left_alone():
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.Tanh()), EncoderBlock(2, 4, 8, 0.0, 0.0))
    model[1].forward = lambda x: x
    report = residrop.apply(model, survival=0.25, blocks=["0", "1"])
    assert str(report) == "\n".join(
        [
            "1 block, 1 branch, expected depth 0.25, 10% of the parameters may be left out",
            "  0  0.25  block  torch Sequential, whole",
            "  left alone: 1: its forward was replaced on the object, by an engine or by hand",
        ]
    )


def test_rates_1_warn_and_others_do_not():
    with pytest.warns(InactiveWarning, match="all 5 blocks have survival rate 1; give survival=..."):
        residrop.apply(resnet(), survival=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = residrop.apply(resnet(), survival=[1, 1, 1, 1, 0.5])
    assert [entry.rates for entry in report.blocks] == [(1.0,)] * 4 + [(0.5,)]
