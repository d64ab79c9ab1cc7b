"""Drop rates that a training loop sets after `residrop.apply`: a ramp over epochs, a switch to fine-tuning.

A schedule that sets them on the modules of a backbone: roboflow/rf-detr#750.
"""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

import residrop
from helpers import assert_binomial
from residrop.common.errors import ConfigError

timm = pytest.importorskip("timm")
from timm.layers import DropPath  # noqa: E402
from timm.models.vision_transformer import VisionTransformer  # noqa: E402


def vit(rate: float = 0.2, depth: int = 3) -> nn.Module:
    torch.manual_seed(0)
    return VisionTransformer(16, 8, num_classes=2, embed_dim=8, depth=depth, num_heads=2, drop_path_rate=rate)


def set_all(model: nn.Module, rate: float) -> None:
    """What such loops do."""
    for module in model.modules():
        if isinstance(module, DropPath):
            module.drop_prob = rate


def rates(model: nn.Module) -> list[float]:
    return [rate for rule in residrop.sampler_of(model).sites for rate in rule.rates]


def test_the_rules_follow_a_ramp_and_drop_once():
    model = vit().train()
    residrop.apply(model)
    for epoch in range(1, 4):
        set_all(model, 0.1 * epoch)
        assert rates(model) == pytest.approx([1.0, 1.0, *[1 - 0.1 * epoch] * 4])
        model(torch.randn(4, 3, 16, 16))
    torch.manual_seed(1)
    x, lost, total = torch.randn(50, 4, 8), 0, 0
    block = model.blocks[1]  # both branches change a row in all but a set of inputs of measure 0
    for step in range(40):
        with residrop.using(model, residrop.sampler_of(model).plan(step)):
            out = block(x)
        lost += int((out == x).all((1, 2)).sum())
        total += 50
    # rows of a window are no independent coins: the bound of independent ones is wider than the law of the windows
    assert_binomial(lost, total, 0.3 * 0.3, "rows without any branch")


def test_reading_gives_what_was_set_and_remove_leaves_it():
    model = vit()
    residrop.apply(model)
    drops = [module for module in model.modules() if isinstance(module, DropPath)]
    before = [drop.drop_prob for drop in drops]
    assert before == pytest.approx([0.1, 0.1, 0.2, 0.2])
    for drop in drops:
        drop.drop_prob *= 2  # a ramp that goes by what it reads
    assert rates(model)[2:] == pytest.approx([0.8, 0.8, 0.6, 0.6])
    residrop.remove(model)
    assert [drop.drop_prob for drop in drops] == pytest.approx([0.2, 0.2, 0.4, 0.4])
    assert {type(drop) for drop in drops} == {DropPath}
    assert not any("residrop" in name for drop in drops for name in vars(drop))


@pytest.mark.parametrize("again", [copy.deepcopy, lambda drop: pickle.loads(pickle.dumps(drop))])
def test_copies_follow_their_own_rules(again):
    model = vit()
    residrop.apply(model)
    drop = model.blocks[2].drop_path1
    other = again(drop)
    assert type(other).__name__ == "DropPath"
    other.drop_prob = 0.5
    assert (drop.drop_prob, other.drop_prob) == (pytest.approx(0.2), 0.5)
    assert rates(model)[4] == pytest.approx(0.8)
    x = torch.randn(3, 2)
    assert other.train()(x) is x


def test_other_rates_than_the_models_are_not_overruled():
    model = vit()
    residrop.apply(model, survival=0.5)
    with pytest.raises(ConfigError, match=r"drop_prob of a DropPath was set to 0\.3, but rules with rates of"):
        set_all(model, 0.3)
    set_all(model, 0.0)  # switching it off is what the rules did already
    assert rates(model) == [0.5] * 6


def test_rates_set_in_between_give_way_to_what_is_set_last():
    model = vit()
    residrop.apply(model)
    set_all(model, 0.2)
    residrop.set_survival(model, [0.9] * 6)
    set_all(model, 0.2)
    assert rates(model)[2:] == pytest.approx([0.8] * 4)


class Shadowed(DropPath):
    drop_prob = 0.1

    def __init__(self) -> None:
        super().__init__()
        del self.__dict__["drop_prob"]


Shadowed.__name__ = "DropPath"


def test_a_rate_of_the_class_is_replaced_and_given_back():
    block = Twice()
    block.one, block.two = Shadowed(), nn.Identity()
    model = nn.Sequential(block)
    residrop.apply(model, blocks=Twice)
    block.one.drop_prob = 0.3
    assert rates(model) == pytest.approx([0.7])
    x = torch.randn(2, 4)
    assert block.one(input=x) is x
    residrop.remove(model)
    assert type(block.one) is Shadowed
    assert "drop_prob" not in vars(block.one)


@pytest.mark.parametrize("rate", [1.5, float("nan"), "0.1"])
def test_a_rate_that_is_none_is_refused(rate):
    model = vit()
    residrop.apply(model)
    with pytest.raises(ConfigError, match=r"drop_prob was set to .*; give a drop rate in \[0, 1\]"):
        set_all(model, rate)
    assert rates(model)[-1] == pytest.approx(0.8)


def test_rules_of_several_rates_cannot_follow():
    model = vit()
    residrop.apply(model, rule="swapout")
    with pytest.raises(ConfigError, match="Swapout, which has 2 rates and cannot follow"):
        set_all(model, 0.3)


class Twice(nn.Module):
    """A block with two drop modules of torchvision, under one generic rule."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = StochasticDepth(0.1, "row"), StochasticDepth(0.2, "row")
        self.body = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.two(self.one(self.body(x)))


def test_a_rule_for_several_drop_modules_has_the_lowest_of_their_rates():
    model = nn.Sequential(Twice(), Twice())
    residrop.apply(model, blocks=Twice)
    assert rates(model) == pytest.approx([0.8, 0.8])
    model[0].one.p = 0.5
    assert rates(model) == pytest.approx([0.5, 0.8])
    model[0].one.p = 0.0
    assert rates(model) == pytest.approx([0.8, 0.8])


def test_torchvisions_one_module_for_both_branches():
    from torchvision.models.swin_transformer import SwinTransformer

    model = SwinTransformer([4, 4], 8, [2], [1], [2, 2], stochastic_depth_prob=0.2, num_classes=2)
    residrop.apply(model)
    (drop,) = [one for name, one in model.named_modules() if name.endswith("stochastic_depth") and one.p > 0]
    drop.p = 0.4
    assert rates(model) == pytest.approx([1.0, 1.0, 0.6, 0.6])
    assert residrop.sampler_of(model).step == 0


SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}


def speech(layerdrop: float) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.Wav2Vec2Config(
        **SMALL,
        conv_dim=(8, 8),
        conv_stride=(4, 4),
        conv_kernel=(4, 4),
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        apply_spec_augment=False,
        layerdrop=layerdrop,
    )
    return transformers.Wav2Vec2Model(config).train()


def bart(layerdrop: float) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.BartConfig(
        vocab_size=20,
        d_model=16,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        encoder_layerdrop=layerdrop,
        decoder_layerdrop=layerdrop,
    )
    return transformers.BartModel(config).train()


def test_layer_drop_in_the_configuration_is_followed():
    model = speech(0.25)
    residrop.apply(model)
    model.config.layerdrop = 0.5
    model(torch.randn(2, 64))
    assert rates(model) == [0.5, 0.5]
    residrop.remove(model)
    assert model.encoder.config.layerdrop == model.config.layerdrop == 0.5


def test_layer_drop_as_an_attribute_is_followed():
    model = bart(0.25)
    residrop.apply(model)
    model.encoder.layerdrop = 0.5
    with torch.no_grad():
        model(torch.arange(6)[None], decoder_input_ids=torch.arange(4)[None])
    assert rates(model) == [0.5, 0.5, 0.75, 0.75]
    assert model.encoder.layerdrop == 0.0
    model.decoder.layerdrop = 0.0
    model(torch.arange(6)[None], decoder_input_ids=torch.arange(4)[None])
    assert rates(model) == [0.5, 0.5, 1.0, 1.0]
    residrop.remove(model)
    assert (model.encoder.layerdrop, model.decoder.layerdrop) == (0.5, 0.0)


def test_layer_drop_that_is_set_to_what_it_was_is_no_second_coin():
    model = bart(0.25)
    residrop.apply(model)
    tokens = torch.arange(6)[None]
    for rate in (0.25, 0.5, 0.5):
        model.encoder.layerdrop = rate
        model(tokens, decoder_input_ids=tokens)
        assert model.encoder.layerdrop == 0.0
        assert rates(model)[:2] == [1 - rate] * 2
    model.encoder.layerdrop = 0.5
    with residrop.using(model, residrop.sampler_of(model).plan()):
        model(tokens, decoder_input_ids=tokens)
    assert model.encoder.layerdrop == 0.0


def test_layer_drop_is_followed_from_another_root():
    model = bart(0.25)
    residrop.apply(model)
    other = nn.Sequential(model)
    residrop.attach(other)
    model.encoder.layerdrop = 0.5
    residrop.attach(other)
    tokens = torch.arange(6)[None]
    other.forward = lambda tokens: model(tokens, decoder_input_ids=tokens)
    other.train()(tokens)
    assert rates(other) == [0.5, 0.5, 0.75, 0.75]


@pytest.mark.parametrize("survival", ["from_model", 0.5])
def test_layer_drop_that_was_off_is_no_second_coin(survival):
    model = speech(0.0)
    if survival == "from_model":
        with pytest.raises(ConfigError, match="no drop modules"):
            residrop.apply(model)
        return
    residrop.apply(model, survival=survival)
    model.config.layerdrop = 0.5
    with pytest.raises(ConfigError, match=r"config.layerdrop of a Wav2Vec2Encoder was set to 0.5.*set_survival"):
        model(torch.randn(2, 64))
    assert residrop.sampler_of(model).step == 0
