"""The protocols of the papers, written out again."""

import pytest
import torch

from residrop.blocks.attach import rules_of
from residrop.common.errors import ConfigError
from residrop.models import create
from residrop.training import PRESETS, preset
from residrop.training.checkpoint import build_network

SHAPES = {"digits": (10, 1), "cifar10": (10, 3), "cifar100": (100, 3), "svhn": (10, 3), "imagenet": (1000, 3)}

HUANG = {
    "rule": "stochastic-depth",
    "survival": "linear_decay(0.5)",
    "granularity": None,
    "rescale": None,
    "survival_timing": "constant",
    "batch_size": 128,
    "lr": 0.1,
    "lr_schedule": "steps",
    "lr_factor": 0.1,
    "momentum": 0.9,
    "nesterov": True,
    "weight_decay": 1e-4,
    "decay_dropped": True,
    "limit": None,
    "width": None,
}
HUANG_CIFAR = {
    **HUANG,
    "network": "resnet-110",
    "data": "cifar10",
    "validation": 5000,
    "select": "best",
    "normalization": "pixel-mean",
    "augmentation": "crop",
    "epochs": 500,
    "lr_drops": (0.5, 0.75),
    "warmup": 0.0,
}
SWAPOUT = {
    "network": "resnet-ours-20",
    "block": "v2",
    "width": 1,
    "rule": "swapout",
    "survival": "linear(1, 0.5)",
    "theta_2": None,
    "data": "cifar10",
    "validation": 0,
    "select": "last",
    "limit": None,
    "augmentation": "batch-crop",
    "epochs": 256,
    "batch_size": 128,
    "lr": 0.1,
    "lr_schedule": "steps",
    "lr_drops": (196 / 256, 224 / 256),
    "lr_factor": 0.1,
    "warmup": 0.0,
    "momentum": 0.9,
    "nesterov": False,
    "weight_decay": 1e-4,
    "samples": 30,
}
DEPTH_DROPOUT = {
    "network": "depth-dropout-resnet-56",
    "rule": "depth-dropout",
    "survival": "uniform(0.5)",
    "data": "cifar10",
    "validation": 0,
    "select": "last",
    "normalization": "pixel-mean-only",
    "augmentation": "crop",
    "epochs": 164,
    "batch_size": 128,
    "lr": 0.1,
    "lr_drops": (0.5, 0.75),
    "lr_factor": 0.1,
    "momentum": 0.9,
    "weight_decay": 1e-4,
}
STABLE = {
    "network": "stable-resnet-110",
    "rule": "stochastic-depth",
    "survival": "uniform(0.7)",
    "data": "cifar10",
    "validation": 5000,
    "epochs": 164,
    "batch_size": 64,
    "lr": 0.1,
    "lr_drops": (0.5, 0.75),
    "lr_factor": 0.1,
    "momentum": 0.9,
    "nesterov": True,
    "weight_decay": 1e-4,
    "augmentation": "crop",
}
CONSTANT = {"rule": "constant", "survival": None}

PROTOCOLS = {
    "stochastic-depth/resnet-110": HUANG_CIFAR,
    "stochastic-depth/resnet-110-constant": {**HUANG_CIFAR, **CONSTANT},
    "stochastic-depth/resnet-110-cifar100": {**HUANG_CIFAR, "data": "cifar100"},
    "stochastic-depth/resnet-1202": {**HUANG_CIFAR, "network": "resnet-1202", "epochs": 300, "warmup": 10 / 300,
                                     "warmup_lr": 0.01},
    "stochastic-depth/resnet-152-svhn": {**HUANG_CIFAR, "network": "resnet-152", "data": "svhn", "validation": 6000,
                                         "augmentation": "none", "epochs": 50, "lr_drops": (0.6, 0.7)},
    "stochastic-depth/imagenet-152": {**HUANG, "network": "imagenet-resnet-152", "data": "imagenet", "epochs": 120,
                                      "lr_drops": (0.25, 0.5, 0.75), "select": "last", "validation": 0,
                                      "normalization": "imagenet", "augmentation": "resized-crop"},
    "swapout/v2-20-w1": SWAPOUT,
    "swapout/v2-20-w2": {**SWAPOUT, "width": 2},
    "swapout/v2-20-w4": {**SWAPOUT, "width": 4},
    "swapout/v2-32-w4": {**SWAPOUT, "width": 4, "network": "resnet-ours-32"},
    "swapout/v1-20-w1": {**SWAPOUT, "block": "v1"},
    "swapout/v1-20-w2": {**SWAPOUT, "block": "v1", "width": 2},
    "swapout/v2-20-w1-constant": {**SWAPOUT, **CONSTANT},
    "swapout/v2-20-w2-constant": {**SWAPOUT, **CONSTANT, "width": 2},
    "swapout/v2-20-w2-layer-dropout": {**SWAPOUT, "rule": "layer-dropout", "width": 2},
    "swapout/v2-20-w2-dropout": {**SWAPOUT, "rule": "dropout", "width": 2},
    "swapout/v2-20-w2-skipforward": {**SWAPOUT, "rule": "skipforward", "width": 2},
    "swapout/v2-20-w2-cifar100": {**SWAPOUT, "width": 2, "data": "cifar100"},
    "swapout/v2-32-w4-cifar100": {**SWAPOUT, "width": 4, "network": "resnet-ours-32", "data": "cifar100",
                                  "survival": "linear(1, 0.8)"},
    "depth-dropout/resnet-56": DEPTH_DROPOUT,
    "depth-dropout/resnet-56-0.25": {**DEPTH_DROPOUT, "survival": "uniform(0.75)"},
    "depth-dropout/resnet-56-constant": {**DEPTH_DROPOUT, **CONSTANT, "network": "resnet-56"},
    "depth-dropout/imagenet-18": {"network": "imagenet-depth-dropout-resnet-18", "rule": "depth-dropout",
                                  "survival": "uniform(0.5)", "batch_size": 256, "epochs": 120, "lr": 0.1,
                                  "select": "last", "augmentation": "resized-crop"},
    "sd-regularization/stable-resnet-110": STABLE,
    "sd-regularization/stable-resnet-110-constant": {**STABLE, **CONSTANT},
}  # fmt: skip

PUBLISHED = {
    "stochastic-depth/resnet-110": 5.25,
    "stochastic-depth/resnet-110-constant": 6.41,
    "stochastic-depth/resnet-110-cifar100": 24.98,
    "stochastic-depth/resnet-1202": 4.91,
    "stochastic-depth/resnet-152-svhn": 1.75,
    "stochastic-depth/imagenet-152": 21.98,
    "swapout/v2-20-w1": 7.92,
    "swapout/v2-20-w2": 5.68,
    "swapout/v2-20-w4": 5.09,
    "swapout/v2-32-w4": 4.76,
    "swapout/v1-20-w1": 8.27,
    "swapout/v1-20-w2": 6.58,
    "swapout/v2-20-w1-constant": 8.27,
    "swapout/v2-20-w2-constant": 6.54,
    "swapout/v2-20-w2-layer-dropout": 5.99,
    "swapout/v2-20-w2-dropout": 5.87,
    "swapout/v2-20-w2-skipforward": 6.11,
    "swapout/v2-20-w2-cifar100": 25.86,
    "swapout/v2-32-w4-cifar100": 22.72,
    "depth-dropout/resnet-56": 9.8,
    "depth-dropout/resnet-56-0.25": 8.1,
    "depth-dropout/resnet-56-constant": 8.5,
    "depth-dropout/imagenet-18": 34.1,
    "sd-regularization/stable-resnet-110": 5.9,
    "sd-regularization/stable-resnet-110-constant": 6.37,
}


@pytest.mark.parametrize("name", PROTOCOLS)
def test_protocol_is_the_papers(name):
    values = preset(name).recipe.to_dict()
    wanted = PROTOCOLS[name]
    assert {field: values[field] for field in wanted} == wanted


def test_published_numbers_are_the_papers():
    assert {name: one.published for name, one in PRESETS.items() if one.published is not None} == PUBLISHED


def described(classes, channels, **more):
    return {"classes": [str(i) for i in range(classes)], "channels": channels, "size": 32, **more}


@pytest.mark.parametrize("name", PRESETS)
def test_preset_builds_with_the_classes_and_channels_of_its_data(name):
    recipe = preset(name).recipe
    classes, channels = SHAPES[recipe.data]
    with torch.device("meta"):
        model = build_network(recipe, described(classes, channels, steps=100))
    shapes = [parameter.shape for parameter in model.parameters()]
    assert shapes[0][1] == channels
    assert shapes[-1][0] == classes
    assert model.training


def test_rates_reach_the_blocks():
    recipe = preset("stochastic-depth/resnet-110").recipe
    with torch.device("meta"):
        rates = [rule.rates[0] for rule in rules_of(build_network(recipe, described(10, 3)))]
    assert len(rates) == 54
    assert (rates[0], rates[26], rates[53]) == pytest.approx((0.990741, 0.75, 0.5), abs=1e-6)
    assert sum(rates) == pytest.approx(40.25)


def test_preset_networks_have_the_published_parameter_counts():
    def count(name):
        recipe = preset(name).recipe
        classes, channels = SHAPES[recipe.data]
        with torch.device("meta"):
            model = build_network(recipe, described(classes, channels))
        return sum(parameter.numel() for parameter in model.parameters())

    assert count("stochastic-depth/resnet-110") == 1_727_962
    assert count("stochastic-depth/resnet-1202") == 19_421_274
    assert count("swapout/v2-20-w2") == 1_085_770
    assert count("swapout/v2-32-w4-cifar100") == 7_455_204
    assert count("depth-dropout/resnet-56") == 897_818
    assert count("stochastic-depth/imagenet-152") == 60_192_808
    assert count("depth-dropout/imagenet-18") == 12_043_816


def test_unknown_preset_suggests_close_names():
    with pytest.raises(ConfigError, match=r"'stochastic-depth/resnet-111' is unknown; .*stochastic-depth/resnet-110"):
        preset("stochastic-depth/resnet-111")


def test_hopeless_preset_name_still_gets_suggestions():
    with pytest.raises(ConfigError, match=r"'zzzz' is unknown; did you mean digits, .*`residrop recipes` lists all"):
        preset("zzzz")


def test_options_of_a_recipe_reach_the_network():
    recipe = preset("digits").recipe.replace(width=2, block="v2", bn_gamma_init="uniform", network="resnet-8", seed=3)
    built = build_network(recipe, described(10, 1)).state_dict()
    wanted = create("resnet-8", width=2, block="v2", bn_gamma_init="uniform", classes=10, channels=1, seed=3)
    assert built.keys() == wanted.state_dict().keys()
    assert all(torch.equal(built[key], value) for key, value in wanted.state_dict().items())
