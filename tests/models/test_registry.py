import copy

import pytest
import torch

from residrop import RULES, ConstantDepth, DepthDropout, StochasticDepth, Swapout, sampler_of, sampling
from residrop.blocks.attach import depth_of, expected_depth_of, rules_of
from residrop.common.errors import ConfigError
from residrop.models import create, group_starts, list_models, num_blocks
from residrop.schedule.survival import linear, linear_decay, uniform
from residrop.schedule.timing import early


def rates_of(model):
    return [rule.rates for rule in rules_of(model)]


def test_every_pattern_builds_and_counts_its_blocks():
    names = [pattern.split("|")[0].replace("<depth>", "20") for pattern in list_models()]
    with torch.device("meta"):
        found = {name: len(rules_of(create(name))) for name in names}
    assert found == {name: num_blocks(name) for name in names}
    assert found["resnet-20"] == 9
    assert found["vanilla-20"] == 20
    assert found["imagenet-resnet-18"] == 8


def test_listing_names_the_papers():
    listing = list_models()
    assert "Huang" in listing["resnet-<depth>"]
    assert "Singh" in listing["resnet-ours-<depth>"]
    assert "Guo" in listing["imagenet-depth-dropout-resnet-18|34|50|101|152"]
    assert "Hayou" in listing["stable-vanilla-<depth>"]


@pytest.mark.parametrize("rule", [name for name in RULES if name not in {"constant", "depth-dropout"}])
def test_default_survival_is_the_papers(rule):
    own = {
        "stochastic-depth": linear_decay(9, 0.5),
        "gaussian-depth": linear_decay(9, 0.5),
        "backward-depth": uniform(9, 0.5),
    }
    expected = own.get(rule, linear(9, 1.0, 0.5))
    rates = rates_of(create("resnet-20", rule=rule))
    assert [rate[0] for rate in rates] == list(expected)


def test_depth_dropout_defaults_to_one_half_but_for_the_group_starts():
    model = create("depth-dropout-resnet-20", rule="depth-dropout")
    exempt = [i for i, rule in enumerate(rules_of(model)) if isinstance(rule, ConstantDepth)]
    assert tuple(exempt) == group_starts(20)
    assert {rule.rates for rule in rules_of(model) if isinstance(rule, DepthDropout)} == {(0.5,)}


def test_depth_dropout_brings_its_shortcuts_unless_told_not_to():
    named = create("depth-dropout-resnet-20", rule="depth-dropout").state_dict()
    automatic = create("resnet-20", rule="depth-dropout").state_dict()
    without = create("resnet-20", rule="depth-dropout", transform=False)
    assert automatic.keys() == named.keys()
    assert without.state_dict().keys() == create("resnet-20").state_dict().keys()
    assert isinstance(rules_of(without)[0], ConstantDepth)


def test_trainable_shortcuts_exempt_blocks_from_every_rule_that_leaves_out_branches():
    dropping = rules_of(create("depth-dropout-resnet-14", rule="stochastic-depth", survival=0.5))
    masking = rules_of(create("depth-dropout-resnet-14", rule="swapout", survival=0.5))
    assert [isinstance(rule, ConstantDepth) for rule in dropping] == [True, False] * 3
    assert all(isinstance(rule, Swapout) for rule in masking)


def test_imagenet_depth_dropout_drops_the_identity_blocks():
    with torch.device("meta"):
        rules = rules_of(create("imagenet-depth-dropout-resnet-18", rule="depth-dropout", survival=0.25))
    assert [rule.rates for rule in rules] == [(0.25,), (0.25,), (), (0.25,), (), (0.25,), (), (0.25,)]


def test_swapout_takes_a_second_theta():
    same = create("resnet-ours-8", rule="swapout", survival="linear(1, 0.4)")
    other = create("resnet-ours-8", rule="swapout", survival=1.0, theta_2=[0.9, 0.8, 0.7])
    assert rates_of(same) == [(1.0, 1.0), (0.7, 0.7), (0.4, 0.4)]
    assert rates_of(other) == [(1.0, 0.9), (1.0, 0.8), (1.0, 0.7)]


def test_options_reach_rule_and_network():
    model = create("resnet-8", rule="stochastic-depth", granularity="row", rescale="train", rows="bernoulli", width=2)
    rule = rules_of(model)[1]
    assert (rule.granularity, rule.rescale, rule.rows) == ("row", "train", "bernoulli")
    assert model.stem.conv.out_channels == 32
    assert rules_of(create("resnet-8", rule="skipforward", of="shortcut"))[0].of == "shortcut"


def test_rule_may_be_a_function():
    model = create("resnet-8", rule=lambda p: StochasticDepth(p, "row"), survival="linear(1, 0.5)")
    assert rates_of(model) == [(1.0,), (0.75,), (0.5,)]
    assert {rule.granularity for rule in rules_of(model)} == {"row"}


def test_seed_and_timing_reach_the_sampler():
    sampler = sampler_of(create("resnet-8", rule="stochastic-depth", seed=5, timing="warmup(10)"))
    assert sampler.seed == 5
    assert sampler.rates_at(0) == [(1.0,)] * 3
    assert sampler.rates_at(10) == [(rate,) for rate in linear_decay(3, 0.5)]


@pytest.mark.parametrize("timing", ["early(4)", early(2, 2), "plateau(1, 3)"], ids=str)
def test_timing_that_ends_at_full_depth_predicts_at_full_depth(timing):
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    full = create("resnet-8").eval()(x)
    model = create("resnet-8", rule="stochastic-depth", survival=0.1, timing=timing)
    assert expected_depth_of(model) == 3
    assert depth_of(model, sampler_of(model).expectation(0)) == pytest.approx(0.3)
    with torch.no_grad():
        assert torch.equal(model.eval()(x), full)
        with sampling(model):
            assert torch.equal(model(x), full)
    moving = create("resnet-8", rule="stochastic-depth", survival=0.1, timing="warmup(4)").eval()
    assert expected_depth_of(moving) == pytest.approx(0.3)
    assert torch.equal(moving(x), create("resnet-8", rule="stochastic-depth", survival=0.1).eval()(x))
    assert not torch.equal(moving(x), full)


def test_classes_of_a_vanilla_network_are_its_outputs():
    model = create("vanilla-2", width=8, in_features=4, classes=3)
    assert model(torch.randn(2, 4)).shape == (2, 3)


@pytest.mark.parametrize("rule", sorted(RULES))
def test_state_dict_is_independent_of_the_rule(rule):
    plain = create("depth-dropout-resnet-8", seed=1).state_dict()
    other = create("depth-dropout-resnet-8", seed=1, rule=rule).state_dict()
    assert list(other) == list(plain)
    assert all(torch.equal(other[key], plain[key]) for key in plain)


@pytest.mark.parametrize("rule", sorted(RULES))
def test_every_rule_trains_and_repeats_after_a_copy(rule):
    model = create("resnet-ours-8", rule=rule, block="v2", channels=1)
    x = torch.randn(4, 1, 8, 8)
    twin = copy.deepcopy(model)
    y = model(x)
    y.square().mean().backward()
    assert torch.equal(twin(x), y)
    assert model.stem.conv.weight.grad.abs().sum() > 0
    assert torch.isfinite(model.eval()(x)).all()


@pytest.mark.parametrize("name", ["resnet-8", "resnet-ours-8", "vanilla-3", "imagenet-resnet-18"])
def test_weights_depend_on_the_seed_alone(name):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = create(name, seed=7).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    second = create(name, seed=7).state_dict()
    third = create(name, seed=8).state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert any(not torch.equal(first[key], third[key]) for key in first)


def test_any_integer_is_a_seed():
    weights = [create("vanilla-1", width=4, seed=seed).stem.weight for seed in (-1, 0, 2**70 + 1)]
    assert not torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[1], weights[2])


def test_meta_device_builds_without_weights():
    with torch.device("meta"):
        model = create("resnet-20", rule="swapout", bn_gamma_init="uniform")
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    loaded = model.to_empty(device="cpu")
    loaded.load_state_dict(create("resnet-20").state_dict())
    assert torch.isfinite(loaded(torch.randn(2, 3, 8, 8))).all()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnett-20", {}, "model 'resnett-20' is unknown; known: resnet-<depth>, "),
        ("vanila-20", {}, "known: vanilla-<depth>, "),
        ("resnet", {}, "model 'resnet' is unknown"),
        ("resnet-x", {}, "model 'resnet-x' is unknown"),
        ("resnet-57", {}, "depth is 57; .* try 56 or 62"),
        ("imagenet-resnet-20", {}, "depth is 20; allowed: 18, 34"),
        ("vanilla-0", {}, "depth is 0"),
        ("resnet-8", {"widht": 2}, "option 'widht' is unknown to 'resnet-8'; known: width, "),
        ("resnet-8", {"survval": 1}, "option 'survval' is unknown to 'resnet-8'; known: survival, "),
        ("resnet-8", {"rule": "skipforward", "off": "x"}, "option 'off' is unknown .*known: of, "),
        ("resnet-ours-8", {"head": "linear"}, "'head' is decided by the name 'resnet-ours-8': 'conv'"),
        ("stable-resnet-8", {"stable": False}, "'stable' is decided by the name"),
        ("resnet-8", {"rules": []}, "option 'rules' is unknown"),
        ("resnet-8", {"rule": "swapuot"}, "rule 'swapuot' is unknown"),
        ("resnet-8", {"survival": 0.5}, "survival is 0.5, but rule 'constant' keeps every block"),
        ("resnet-8", {"rule": "swapout", "survival": [0.5]}, "3"),
        ("resnet-8", {"rule": "dropout", "theta_2": 0.5}, "takes no option 'theta_2'"),
        ("resnet-8", {"rule": "depth-dropout", "rescale": "test"}, "takes no option 'rescale'"),
        ("resnet-8", {"rule": StochasticDepth}, "survival is missing"),
        ("resnet-8", {"rule": StochasticDepth, "survival": 1, "rescale": "none"}, "rescale is for rules named"),
        ("vanilla-3", {"rule": "depth-dropout"}, "needs trainable shortcuts"),
        ("vanilla-3", {"channels": 3}, "give in_features=... instead of channels"),
        ("vanilla-3", {"classes": 3, "out_features": 3}, "are the same number"),
        ("resnet-8", {"seed": 0.5}, "seed is 0.5; give a whole number"),
    ],
)
def test_create_refuses(name, options, message):
    with pytest.raises(ConfigError, match=message):
        create(name, **options)


def test_num_blocks_refuses_unknown_options():
    assert num_blocks("resnet-ours-56", width=2) == 27
    with pytest.raises(ConfigError, match="option 'wdth' is unknown"):
        num_blocks("resnet-ours-56", wdth=2)
