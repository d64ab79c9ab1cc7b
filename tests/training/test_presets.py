"""The protocols of the papers, written out again."""

import re
import tomllib
from pathlib import Path

import pytest
import torch

from residrop.blocks.attach import rules_of
from residrop.common.errors import ConfigError
from residrop.models import create
from residrop.training import PRESETS, Recipe, preset, presets
from residrop.training.networks import build_network
from residrop.training.presets import Preset, short_name

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


# The package's own files


def test_every_file_is_read():
    folder = Path(presets.__file__).parent / "recipes"
    tables = {name for path in folder.glob("*.toml") for name in tomllib.loads(path.read_text())}
    assert set(PRESETS) == tables
    assert [*dict.fromkeys(name.partition("/")[0] for name in PRESETS)] == [
        "digits", "stochastic-depth", "swapout", "depth-dropout", "sd-regularization",
    ]  # fmt: skip
    assert len(list(folder.glob("*.toml"))) == 5


def test_every_preset_has_a_title_of_its_own():
    assert len({one.title for one in PRESETS.values()}) == len(PRESETS) == 29
    assert not any(one.title.startswith(("based on", "a recipe of")) for one in PRESETS.values())  # what is put in


# Files of one's own


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes a recipe below the working directory; returns the path to give."""
    monkeypatch.chdir(tmp_path)

    def write(name, text):
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return name

    return write


def test_file_of_ones_own(write):
    name = write(
        "mine.toml",
        'title = "Mine"\npublished = 6\nnote = "a guess"\nnetwork = "resnet-32"\nlr = 1\nlr_drops = [0.5, 1]\n'
        'rescale = "none"\nsurvival = "0.5"\nnesterov = false\nwatch = ["discrepancy"]\n',
    )
    wanted = Recipe(
        network="resnet-32", lr=1.0, lr_drops=(0.5, 1.0), rescale="none", survival="0.5", nesterov=False,
        watch=("discrepancy",),
    )  # fmt: skip
    assert preset(name) == Preset(wanted, "Mine", 6.0, "a guess")
    assert preset(name).recipe.fingerprint() == wanted.fingerprint()  # 1 and 1.0 have different hashes


def test_empty_file_is_the_default_recipe(write):
    assert preset(write("empty.toml", "")) == Preset(Recipe(), "a recipe of your own")


def test_base_is_a_preset(write):
    name = write("mine.toml", 'base = "swapout/v2-20-w2"\nrule = "constant"\nsurvival = "None"\nepochs = 10\n')
    wanted = preset("swapout/v2-20-w2").recipe.replace(rule="constant", survival=None, epochs=10)
    assert preset(name) == Preset(wanted, "based on swapout/v2-20-w2")


def test_base_is_a_file_beside_the_one_that_names_it(write):
    write("a/common.toml", 'base = "digits"\nlr = 0.07\n')
    write("a/b/mine.toml", 'base = "../common.toml"\nepochs = 3\n')
    wanted = preset("digits").recipe.replace(lr=0.07, epochs=3)
    assert preset("a/b/mine.toml").recipe == wanted
    assert preset(str(Path("a/b/mine.toml").absolute())).recipe == wanted


def test_file_is_read_anew(write):
    assert preset(write("mine.toml", "epochs = 3")).recipe.epochs == 3
    assert preset(write("mine.toml", "epochs = 4")).recipe.epochs == 4


BAD = {
    "missing": (None, r"^recipe 'mine\.toml' cannot be read: No such file or directory; give the path of a TOML file"),
    "no TOML": ("lr: 0.1", r"^recipe 'mine\.toml' is not TOML: .*line 1.*; write lines such as epochs = 30"),
    "unknown field": ("epoch = 3", r"^recipe mine\.toml has no field 'epoch'; did you mean epochs\? `residrop train"),
    "unknown base key": ("bases = 3", r"^recipe mine\.toml has no field 'bases'; did you mean base\? "),
    "far from any field": ("zzzzz = 3", r"^recipe mine\.toml has no field 'zzzzz'; `residrop train --help` lists all"),
    "a table": ("[recipe]\nepochs = 3", r"^recipe mine\.toml has no field 'recipe'; "),
    "text for a number": ('lr = "0.1"', r"^recipe mine\.toml: lr is '0\.1'; give float or int"),
    "number for text": ("survival = 0.5", r"^recipe mine\.toml: survival is 0\.5; give str or None"),
    "truth for a number": ("lr = true", r"^recipe mine\.toml: lr is True; give float or int"),
    "text for numbers": ('lr_drops = "0.5"', r"^recipe mine\.toml: lr_drops is '0\.5'; give numbers"),
    "out of range": ("epochs = 0", r"^recipe mine\.toml: epochs is 0; give a whole number of at least 1"),
    "none of the choices": ('select = "first"', r"^recipe mine\.toml: select is 'first'; choose one of 'last', 'best'"),
    "None where it cannot be": ('data = "digits"\nlr = "None"', r"^recipe mine\.toml: lr is 'None'; give float or int"),
    "title is a number": ("title = 3", r"^recipe mine\.toml: title is 3; give text in quotes"),
    "published is text": ('published = "6%"', r"^recipe mine\.toml: published is '6%'; give a number"),
    "base is a number": ("base = 3", r"^recipe mine\.toml: base is 3; give the name or the \.toml file"),
    "unknown base": ('base = "swapout/v3"', r"^recipe 'swapout/v3', the base of mine\.toml, is unknown; .*swapout/v2-"),
    "missing base": ('base = "b.toml"', r"^recipe 'b\.toml', the base of mine\.toml, cannot be read: No such file"),
    "its own base": ('base = "./mine.toml"', r"^recipe mine\.toml is based on mine\.toml; take out"),
}


@pytest.mark.parametrize(("text", "message"), BAD.values(), ids=BAD)
def test_bad_file_is_refused_in_one_line(text, message, write):
    if text is not None:
        write("mine.toml", text)
    with pytest.raises(ConfigError, match=message) as refused:
        preset("mine.toml")
    assert "\n" not in str(refused.value)


def test_circle_of_bases_is_named(write):
    write("a.toml", 'base = "folder/b.toml"')
    write("folder/b.toml", 'base = "../c.toml"')
    write("c.toml", 'base = "a.toml"')
    circle = (
        "recipe a.toml is based on folder/b.toml is based on c.toml is based on a.toml; take out one of these bases"
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(circle)}$"):
        preset("./a.toml")


def test_fault_of_a_base_is_said_of_the_base(write):
    write("a.toml", 'base = "b.toml"')
    write("b.toml", "epochs = 0")
    with pytest.raises(ConfigError, match=r"^recipe b\.toml: epochs is 0"):
        preset("a.toml")


def test_file_that_is_no_text_is_refused(write):
    Path("mine.toml").write_bytes(b"title = '\xff'")
    with pytest.raises(ConfigError, match=r"^recipe 'mine\.toml' is not TOML: .*utf-8"):
        preset("mine.toml")


def test_runs_of_a_file_are_called_by_its_stem():
    assert short_name("/some/where/wide-0.5.toml") == "wide-0.5"
    assert short_name("swapout/v2-20-w2") == "swapout/v2-20-w2"
