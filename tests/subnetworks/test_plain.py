"""Plain networks of some blocks against the whole model with the other blocks absent."""

import copy

import pytest
import timm
import torch
import torchvision
from torch import nn

import residrop
from residrop.common.errors import ConfigError
from residrop.schedule.sampler import Plan
from residrop.subnetworks.blocks import Whole, pairs_of
from residrop.subnetworks.plain import cut, plain

OURS = {
    "v1": lambda: residrop.create("resnet-14", rule="stochastic-depth"),
    "v2": lambda: residrop.create("resnet-14", block="v2", rule="constant"),
    "ours": lambda: residrop.create("resnet-ours-20", rule="depth-dropout", survival=0.8),
    "stable": lambda: residrop.create("stable-resnet-14", rule="stochastic-depth"),
}
THEIRS = {
    "resnet": lambda: torchvision.models.resnet18(num_classes=5),
    "convnext": lambda: timm.create_model("convnext_atto", depths=(1, 2, 2, 1), num_classes=5),
    "vit": lambda: timm.create_model("vit_tiny_patch16_224", img_size=32, depth=4, num_classes=5),
    "swin": lambda: torchvision.models.SwinTransformer(
        [4, 4], 16, [2, 2], [2, 2], [4, 4], stochastic_depth_prob=0.0, num_classes=5
    ),
    "bottleneck": lambda: timm.create_model("resnet14t", num_classes=5),
}


def batches_of(model, size=32):
    torch.manual_seed(1)
    channels = 3
    return [(torch.randn(4, channels, size, size), torch.arange(4))]


def whole_of(model, batches=None):
    return Whole(model, *pairs_of(batches or batches_of(model), None))


def alternating(count, first=True):
    return tuple((number % 2 == 0) is first for number in range(count))


def assert_plain(model):
    assert not [type(module) for module in model.modules() if type(module).__module__.startswith("residrop")]
    assert not [one for module in model.modules() for one in module._forward_pre_hooks.values()]


def reference(model, whole, kept):
    """The same model under rules of its own, whose coins are given by hand."""
    model = copy.deepcopy(model)
    if not [one for one in model.modules() if isinstance(one, residrop.Rule)]:
        residrop.apply(model, survival=0.5, granularity="block", rescale="none", branches=True)
    return model, Plan.of([bool(draw.alive) for draw in whole.plan(kept).draws])


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("name", THEIRS)
def test_other_libraries_models_without_blocks_equal_those_with_absent_ones(name, first):
    model = THEIRS[name]().eval()
    whole = whole_of(model)
    kept = alternating(len(whole.blocks), first)
    found = plain(whole, kept)
    assert type(found) is type(model)
    assert_plain(found)
    assert found.state_dict().keys() < model.state_dict().keys()
    x = batches_of(model)[0][0]
    ruled, plan = reference(model, whole, kept)
    for training in (False, True):
        found.train(training), ruled.train(training)
        with residrop.using(ruled, plan):
            wanted = ruled(x)
        assert torch.equal(found(x), wanted)
    for parameter in found.parameters():  # batch statistics of training mode moved alike in both
        parameter.grad = None
    found(x).square().sum().backward()
    with residrop.using(ruled, plan):
        ruled(x).square().sum().backward()
    theirs = dict(ruled.named_parameters())
    assert all(torch.equal(one.grad, theirs[key].grad) for key, one in found.named_parameters())


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("name", OURS)
def test_our_networks_without_blocks_equal_those_with_absent_ones(name, first):
    model = OURS[name]()
    residrop.attach(model)
    whole = whole_of(model)
    kept = alternating(len(whole.blocks), first)
    found = plain(whole, kept)
    assert_plain(found)
    assert found.state_dict().keys() < model.state_dict().keys()
    x = batches_of(model)[0][0]
    cut_one = copy.deepcopy(whole.model)
    for training in (False, True):
        found.train(training), cut_one.train(training)
        with residrop.using(cut_one, whole.plan(kept)):
            wanted = cut_one(x)
        assert torch.equal(found(x), wanted)
    again = copy.deepcopy(found)
    again.load_state_dict(found.state_dict())


def test_kept_branches_count_in_full_whatever_the_rule_makes_of_its_rates():
    """As a present branch of Huang et al. in training; rescale="train" divides by no rate here."""
    outputs = []
    for rescale in ("test", "train", "none"):
        torch.manual_seed(0)
        model = residrop.create("resnet-8", rule="stochastic-depth", survival=0.5, rescale=rescale, seed=0)
        outputs.append(plain(whole_of(model), (True, False, True)).eval()(batches_of(model)[0][0]))
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


def test_a_model_under_apply_keeps_the_blocks_it_has_rules_for():
    model = THEIRS["vit"]()
    residrop.apply(model, survival=0.9, blocks="blocks.[12]", seed=3)
    step = residrop.sampler_of(model).step
    whole = whole_of(model)
    assert [block.name for block in whole.blocks] == ["blocks.1", "blocks.2"]
    found = plain(whole, (False, True))
    assert [type(block).__name__ for block in found.blocks] == ["Block", "Identity", "Block", "Block"]
    assert residrop.sampler_of(model).step == step


class Counting(nn.Module):
    """A model whose forward depends on where its blocks stand."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True) for _ in range(3))

    def forward(self, x):
        for number, layer in enumerate(self.layers):
            x = layer(x + number, src_key_padding_mask=None)
        return x.mean(1)


def test_a_model_that_computes_something_else_without_its_blocks_is_refused():
    batches = [(torch.randn(2, 5, 8), torch.arange(2))]
    with pytest.raises(ConfigError, match=r"Counting (computes something else|fails) without"):
        plain(whole_of(Counting(), batches), (True, False, True))


@pytest.mark.parametrize("name", ["resnet-14", "resnet-ours-20", "stable-resnet-14"])
def test_cut_networks_of_ours_equal_their_plain_form_and_go_on_training(name):
    model = residrop.create(name, rule="constant")
    whole = whole_of(model)
    kept = alternating(len(whole.blocks))
    found = plain(whole, kept).eval()
    cut(model, [block.name for block, keep in zip(whole.blocks, kept, strict=True) if not keep])
    residrop.attach(model)
    x, y = batches_of(model)[0]
    torch.testing.assert_close(model.eval()(x), found(x), rtol=1e-5, atol=1e-5)  # stable networks have their factor
    assert model.state_dict().keys() == found.state_dict().keys()
    nn.functional.cross_entropy(model.train()(x), y).backward()
    assert all(one.grad is not None for one in model.parameters())


@pytest.mark.parametrize("name", ["vit", "resnet"])
def test_cut_models_of_others_equal_their_plain_form(name):
    model = THEIRS[name]().eval()
    whole = whole_of(model)
    kept = alternating(len(whole.blocks))
    found = plain(whole, kept)
    cut(model, [block.name for block, keep in zip(whole.blocks, kept, strict=True) if not keep])
    assert_plain(model)
    assert torch.equal(model(batches_of(model)[0][0]), found(batches_of(model)[0][0]))


class PostNorm(nn.Module):
    """A block whose norm stands behind its sum; with a condition that no tracer can follow."""

    def __init__(self, traceable):
        super().__init__()
        self.linear, self.norm, self.traceable = nn.Linear(8, 8), nn.LayerNorm(8), traceable
        nn.init.normal_(self.norm.weight)

    def forward(self, x):
        if not self.traceable and x.sum() > 1e9:
            x = x + 1
        return self.norm(x + self.linear(x))


class Stack(nn.Module):
    def __init__(self, traceable, listed):
        super().__init__()
        blocks = [PostNorm(traceable) for _ in range(4)]
        self.blocks = nn.ModuleList(blocks) if listed else nn.Sequential(*blocks)

    def forward(self, x):
        if isinstance(self.blocks, nn.Sequential):
            return self.blocks(x)
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.parametrize("training", [True, False])
def test_norms_behind_sums_stay_where_blocks_are_cut_in_any_mode(training):
    model = Stack(True, False).eval()
    x = torch.randn(3, 8)
    wanted = model.blocks[3](model.blocks[2](model.blocks[1].norm(model.blocks[0](x))))
    cut(model.train(training), ["blocks.1"])
    assert torch.equal(model(x), wanted)


@pytest.mark.parametrize("listed", [True, False])
def test_blocks_that_cannot_be_traced_are_left_out_whole(listed):
    model = Stack(False, listed).eval()
    x = torch.randn(3, 8)
    wanted = model.blocks[3](model.blocks[1](model.blocks[0](x)))
    whole = whole_of(model, [(x, torch.arange(3))])
    assert torch.equal(plain(whole, (True, True, False, True))(x), wanted)


def test_a_layer_that_stands_in_a_list_twice_leaves_it_twice():
    model = Stack(True, True).eval()
    model.blocks.append(model.blocks[1])
    x = torch.randn(3, 8)
    wanted = model.blocks[3](model.blocks[2](model.blocks[0](x)))
    found = plain(whole_of(model, [(x, torch.arange(3))]), (True, False, True, True))
    assert len(found.blocks) == 3
    assert torch.equal(found(x), wanted)


@pytest.mark.parametrize("make", [OURS["v1"], THEIRS["vit"]])
def test_cut_names_the_blocks_there_are(make):
    with pytest.raises(ConfigError, match=r"has no residual block 'nothing'; its blocks are blocks\."):
        cut(make(), ["nothing"])


@pytest.mark.parametrize("rule", ["swapout", "gaussian-depth"])
def test_rules_under_which_no_block_is_absent_are_refused(rule):
    model = residrop.create("resnet-8", rule=rule, survival=0.5)
    with pytest.raises(ConfigError, match=r"of which none is absent as a whole"):
        whole_of(model)
