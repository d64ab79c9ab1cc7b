"""Recipes by name: the main rows of the four papers at full protocol, and the digits run of the README.

A recipe's fields follow its paper; where the text leaves something open, the choice is stated above each group of
recipes, and in the note of a recipe that departs from its group.
"""

from dataclasses import dataclass
from difflib import get_close_matches

from residrop.common.errors import ConfigError
from residrop.training.recipe import Recipe

__all__ = ["PRESETS", "Preset", "preset"]


@dataclass(frozen=True)
class Preset:
    """A named recipe.

    Attributes:
        recipe: the protocol.
        title: one line for listings.
        published: test error in percent as published, or None.
        note: readings where the paper is silent.
    """

    recipe: Recipe
    title: str
    published: float | None = None
    note: str = ""


_DIGITS = Recipe(data="digits", augmentation="shift", epochs=40, batch_size=64, lr=0.1, lr_drops=(0.5, 0.75))

# Huang et al. 2016, sections 3-4. From the released Torch code: zero gradients for dropped blocks, one scalar std.
# Unlike it: batch norm's gamma starts at 1 (--bn-gamma-init uniform is the release's), convolutions have no bias.
_HUANG = Recipe(
    network="resnet-110",
    rule="stochastic-depth",
    survival="linear_decay(0.5)",
    data="cifar10",
    validation=5000,
    select="best",
    normalization="pixel-mean",
    augmentation="crop",
    epochs=500,
    batch_size=128,
    decay_dropped=True,
)

# Singh et al. 2016, section 4. Unstated: Nesterov (off), normalisation (per channel), validation (none, last epoch).
_SWAPOUT = Recipe(
    network="resnet-ours-20",
    block="v2",
    width=1,
    rule="swapout",
    survival="linear(1, 0.5)",
    data="cifar10",
    normalization="channel",
    augmentation="batch-crop",
    epochs=256,
    batch_size=128,
    lr_drops=(196 / 256, 224 / 256),
    nesterov=False,
)

# Guo & Gould 2016, section IV: 64,000 iterations of 128 images, drops after 32,000 and 48,000; 164 epochs are 64,124.
# Unstated: momentum 0.9 and weight decay 1e-4 (He et al., whom the paper follows), ImageNet's drops (every 30 epochs).
_DEPTH_DROPOUT = Recipe(
    network="depth-dropout-resnet-56",
    rule="depth-dropout",
    survival="uniform(0.5)",
    data="cifar10",
    normalization="pixel-mean-only",
    augmentation="crop",
    epochs=164,
    batch_size=128,
    nesterov=False,
)

# Hayou & Ayed 2021: the protocol is not in the paper's body; the repository it builds on trains like this. Test-time
# scaling is not stated either: p times the branch, the mean network of the theory.
_STABLE = Recipe(
    network="stable-resnet-110",
    rule="stochastic-depth",
    survival="uniform(0.7)",
    data="cifar10",
    validation=5000,
    select="best",
    normalization="unit",
    augmentation="crop",
    epochs=164,
    batch_size=64,
)

_IMAGENET = {
    "data": "imagenet",
    "normalization": "imagenet",
    "augmentation": "resized-crop",
    "validation": 0,
    "select": "last",
}


def _swapout(title: str, published: float | None, **changes: object) -> Preset:
    return Preset(
        _SWAPOUT.replace(**changes), title, published, "plain momentum, per-channel normalisation, last epoch"
    )


PRESETS: dict[str, Preset] = {
    "digits": Preset(_DIGITS, "ResNet-20 with stochastic depth on the embedded digits: about a minute on two cores"),
    "digits/swapout": Preset(
        _DIGITS.replace(network="resnet-ours-20", block="v2", rule="swapout"), "the same with swapout and its network"
    ),
    "stochastic-depth/resnet-110": Preset(_HUANG, "CIFAR-10, 110 layers (Huang et al., Table 1)", 5.25),
    "stochastic-depth/resnet-110-constant": Preset(
        _HUANG.replace(rule="constant", survival=None), "its constant-depth baseline (Table 1)", 6.41
    ),
    "stochastic-depth/resnet-110-cifar100": Preset(_HUANG.replace(data="cifar100"), "CIFAR-100 (Table 1)", 24.98),
    "stochastic-depth/resnet-1202": Preset(
        _HUANG.replace(network="resnet-1202", epochs=300, warmup=10 / 300), "CIFAR-10, 1202 layers (section 4)", 4.91
    ),
    "stochastic-depth/resnet-152-svhn": Preset(
        _HUANG.replace(
            network="resnet-152", data="svhn", validation=6000, augmentation="none", epochs=50, lr_drops=(0.6, 0.7)
        ),
        "SVHN, 152 layers (Table 1)",
        1.75,
    ),
    "stochastic-depth/imagenet-152": Preset(
        _HUANG.replace(network="imagenet-resnet-152", epochs=120, lr_drops=(0.25, 0.5, 0.75), **_IMAGENET),
        "ImageNet, 152 layers (Table 1)",
        21.98,
        "steps every 30 epochs as in the repository the paper builds on",
    ),
    "stochastic-depth/resnet-20": Preset(
        _HUANG.replace(network="resnet-20", survival="linear_decay(0.9)"),
        "the CIFAR-10 protocol at 20 layers",
        note="p_L = 0.9, not from the paper: best of 0.5, 0.8, 0.9 in ten epochs; not tried at full length",
    ),
    "stochastic-depth/resnet-20-constant": Preset(
        _HUANG.replace(network="resnet-20", rule="constant", survival=None), "its constant-depth baseline"
    ),
    "swapout/v2-20-w1": _swapout("CIFAR-10, v2, 20 layers, width x1 (Singh et al., Table 3; Table 1 has 7.97)", 7.92),
    "swapout/v2-20-w2": _swapout("CIFAR-10, v2, 20 layers, width x2 (Tables 1-3)", 5.68, width=2),
    "swapout/v2-20-w4": _swapout("CIFAR-10, v2, 20 layers, width x4 (Table 3)", 5.09, width=4),
    "swapout/v2-32-w4": _swapout(
        "CIFAR-10, v2, 32 layers, width x4 (Tables 3, 4)", 4.76, width=4, network="resnet-ours-32"
    ),
    "swapout/v1-20-w1": _swapout("CIFAR-10, v1, 20 layers, width x1 (Table 1)", 8.27, block="v1"),
    "swapout/v1-20-w2": _swapout("CIFAR-10, v1, 20 layers, width x2 (Table 1)", 6.58, block="v1", width=2),
    "swapout/v2-20-w1-constant": _swapout(
        "ResNet v2 Ours, 20 layers, width x1 (Table 1)", 8.27, rule="constant", survival=None
    ),
    "swapout/v2-20-w2-constant": _swapout(
        "ResNet v2 Ours, 20 layers, width x2 (Table 1)", 6.54, rule="constant", survival=None, width=2
    ),
    "swapout/v2-20-w2-layer-dropout": _swapout(
        "Stochastic Depth v2 Ours, width x2 (Table 1)", 5.99, rule="layer-dropout", width=2
    ),
    "swapout/v2-20-w2-dropout": _swapout("Dropout v2, width x2 (Table 1)", 5.87, rule="dropout", width=2),
    "swapout/v2-20-w2-skipforward": _swapout("SkipForward v2, width x2 (Table 1)", 6.11, rule="skipforward", width=2),
    "swapout/v2-20-w2-cifar100": _swapout(
        "CIFAR-100, v2, 20 layers, width x2 (Table 5)", 25.86, width=2, data="cifar100"
    ),
    "swapout/v2-32-w4-cifar100": _swapout(
        "CIFAR-100, v2, 32 layers, width x4, Linear(1, 0.8) (Table 5)",
        22.72,
        width=4,
        network="resnet-ours-32",
        data="cifar100",
        survival="linear(1, 0.8)",
    ),
    "depth-dropout/resnet-56": Preset(_DEPTH_DROPOUT, "CIFAR-10, 56 layers, ratio 0.5 (Guo & Gould, Table I)", 9.8),
    "depth-dropout/resnet-56-0.25": Preset(
        _DEPTH_DROPOUT.replace(survival="uniform(0.75)"), "the same at drop ratio 0.25 (Table I)", 8.1
    ),
    "depth-dropout/resnet-56-constant": Preset(
        _DEPTH_DROPOUT.replace(network="resnet-56", rule="constant", survival=None), "its baseline (Table I)", 8.5
    ),
    "depth-dropout/imagenet-18": Preset(
        _DEPTH_DROPOUT.replace(
            network="imagenet-depth-dropout-resnet-18",
            epochs=120,
            batch_size=256,
            lr_drops=(0.25, 0.5, 0.75),
            **_IMAGENET,
        ),
        "ImageNet, ResNet-18, ratio 0.5 (Table III)",
        34.1,
    ),
    "sd-regularization/stable-resnet-110": Preset(
        _STABLE, "Stable ResNet-110, uniform mode, budget 0.7 (Hayou & Ayed, Table 2)", 5.9
    ),
    "sd-regularization/stable-resnet-110-constant": Preset(
        _STABLE.replace(rule="constant", survival=None), "the same without dropping (Table 2)", 6.37
    ),
}


def preset(name: str) -> Preset:
    """The preset of that name; ConfigError with the closest names if there is none."""
    if name in PRESETS:
        return PRESETS[name]
    close = get_close_matches(name, PRESETS, n=3, cutoff=0.4) or list(PRESETS)[:3]
    raise ConfigError(f"recipe {name!r} is unknown; did you mean {', '.join(close)}? `residrop recipes` lists all")
