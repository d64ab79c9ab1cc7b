"""Huang, Sun, Liu, Sedra, Weinberger: Deep Networks with Stochastic Depth (2016)."""

from residrop.research.papers.rows import Claim, Curve, Figure, Paper, Point, Variant
from residrop.research.papers.stochastic_depth_tables import (
    CIFAR10,
    CIFAR10_CONSTANT,
    CIFAR100,
    COLUMNS,
    DEEP,
    IMAGENET,
    NAME,
    SVHN,
    TABLES,
    constant,
)
from residrop.training.recipe import Recipe

__all__ = ["STOCHASTIC_DEPTH"]

_EPOCH, _ERROR = "epoch", "test error (%)"


def _pair(plain: Recipe, stochastic: Recipe) -> tuple[Curve, ...]:
    return (
        Curve(label="constant depth", plotted="test_error", recipe=plain),
        Curve(label="stochastic depth", plotted="test_error", recipe=stochastic),
    )


def _training(name: str, title: str, curves: tuple[Curve, ...], note: str) -> Figure:
    return Figure(paper=NAME, name=name, title=title, x=_EPOCH, y=_ERROR, curves=curves, note=note)


_MARKED = "the epoch with the lowest validation error is marked"
_LAST_RATES = tuple(round(0.1 * step, 1) for step in range(1, 10))
_DEPTHS = (20, 32, 44, 56, 110)


def _over_rates(label: str, schedule: str, network: str, note: str = "") -> Curve:
    """Errors over p_L; at p_L = 1 nothing is dropped."""
    stochastic, plain = CIFAR10.replace(network=network), CIFAR10_CONSTANT.replace(network=network)
    points = [Point(x=rate, recipe=stochastic.replace(survival=f"{schedule}({rate:g})")) for rate in _LAST_RATES]
    return Curve(label=label, plotted="error", points=(*points, Point(x=1.0, recipe=plain)), note=note)


_FIGURES = (
    Figure(paper=NAME, name="figure-1", title="A ResBlock", note="a drawing"),
    Figure(
        paper=NAME,
        name="figure-2",
        title="Linear decay of the survival rates from p_0 = 1 to p_L = 0.5",
        x="block l",
        y="p_l",
        curves=(
            Curve(
                label="linear decay",
                plotted="instrument",
                instrument="survival.rates",
                setting={"blocks": 54, "survival": "linear_decay(0.5)"},
            ),
        ),
        note="a drawing of few blocks in the paper",
    ),
    _training("figure-3-left", "Test error on CIFAR-10 during training", _pair(CIFAR10_CONSTANT, CIFAR10), _MARKED),
    _training(
        "figure-3-right", "Test error on CIFAR-100 during training", _pair(constant(CIFAR100), CIFAR100), _MARKED
    ),
    _training("figure-4-left", "Test error on SVHN during training", _pair(constant(SVHN), SVHN), _MARKED),
    _training("figure-4-right", "Test error of 1202 layers on CIFAR-10", _pair(constant(DEEP), DEEP), _MARKED),
    Figure(
        paper=NAME,
        name="figure-5",
        title="110 against 1202 layers, CIFAR-10",
        x="layers",
        y=_ERROR,
        curves=tuple(
            Curve(
                label=f"{kind} depth",
                plotted="error",
                points=(
                    Point(x=110, row=f"table-1/{kind}-cifar10"),
                    Point(x=1202, row=f"section-4/{kind}-1202"),
                ),
            )
            for kind in ("constant", "stochastic")
        ),
        note="the kind of plot is not known from the text",
    ),
    Figure(
        paper=NAME,
        name="figure-6",
        title="Validation error on ImageNet during training",
        x=_EPOCH,
        y="validation error (%)",
        curves=_pair(constant(IMAGENET), IMAGENET),
        note="at epoch 90 the stochastic curve is said to be still falling",
    ),
    Figure(
        paper=NAME,
        name="figure-7",
        title="Mean gradient magnitude of the first convolution, CIFAR-10",
        x=_EPOCH,
        y="mean |gradient|",
        scale="log",
        curves=(
            Curve(label="constant depth", plotted="first_gradient", recipe=CIFAR10_CONSTANT),
            Curve(label="stochastic depth", plotted="first_gradient", recipe=CIFAR10),
        ),
        note="the caption says the first convolutional layer, the text that of the first ResBlock (l = 1). Drops of "
        "the learning rate are dotted lines. The scale of the axis is not known from the text.",
    ),
    Figure(
        paper=NAME,
        name="figure-8-left",
        title="Test error on CIFAR-10 by p_L, 110 layers",
        x="p_L",
        y=_ERROR,
        curves=(
            Curve(label="baseline", plotted="error", recipe=CIFAR10_CONSTANT, note="a level line"),
            _over_rates("linear decay", "linear_decay", "resnet-110"),
            _over_rates("uniform", "uniform", "resnet-110"),
        ),
        note="which p_L were trained is not known from the text",
    ),
    Figure(
        paper=NAME,
        name="figure-8-right",
        title="Test error on CIFAR-10 by p_L and depth, linear decay",
        x="p_L",
        y="layers",
        shape="heat map",
        curves=tuple(_over_rates(f"{depth}", "linear_decay", f"resnet-{depth}") for depth in _DEPTHS),
        note="neither the depths nor the p_L are known from the text; these are ours",
    ),
)

_STOCHASTIC = (
    *(f"table-1/stochastic-{data}" for data in COLUMNS),
    *(f"section-4/stochastic-{what}" for what in ("cifar10-plain", "cifar100-plain", "1202", "imagenet-90")),
)
_SMALLER = tuple(
    Variant(
        name=network,
        networks={"resnet-110": network},
        why=f"not the paper's network but one of {network.removeprefix('resnet-')} layers, which a CPU can train",
        concerns=("table-1", "section-4", "figure-3-left", "figure-3-right", "figure-7", "figure-8-left"),
    )
    for network in ("resnet-20", "resnet-32")
)
_VARIANTS = (
    *_SMALLER,
    Variant(
        name="release-gamma",
        changes={"bn_gamma_init": "uniform"},
        why="the released Torch code leaves batch norm's gamma at Torch7's default, uniform in (0, 1)",
        concerns=("table-1", "section-4"),
    ),
    Variant(
        name="dropped-left-alone",
        changes={"decay_dropped": False},
        why="the text gives dropped blocks no update at all; in the released code momentum and weight decay go on",
        concerns=_STOCHASTIC,
    ),
    Variant(
        name="per-image",
        changes={"granularity": "row"},
        why='the introduction says "for each sample or mini-batch"; everything else says mini-batch',
        concerns=_STOCHASTIC,
    ),
    Variant(
        name="rescale-train",
        changes={"rescale": "train"},
        why="not the paper's (eq. 5 multiplies by p at test): the scaling of later libraries, for comparison",
        concerns=_STOCHASTIC,
    ),
)

_CLAIMS = (
    Claim(
        text="stochastic depth has a lower test error than constant depth",
        where="table-1",
        pairs=tuple(
            (f"table-1/stochastic-{data}", f"table-1/constant-{data}") for data in ("cifar10", "cifar100", "svhn")
        ),
    ),
    Claim(
        text="on ImageNet there is no immediate benefit",
        where="section-4",
        pairs=(
            ("table-1/constant-imagenet", "table-1/stochastic-imagenet"),
            ("section-4/constant-imagenet-90", "section-4/stochastic-imagenet-90"),
        ),
    ),
    Claim(
        text="without augmentation it is about 15% better",
        where="section-4",
        pairs=tuple(
            (f"section-4/stochastic-{data}-plain", f"section-4/constant-{data}-plain")
            for data in ("cifar10", "cifar100")
        ),
    ),
    Claim(
        text="1202 layers are better than 110 with stochastic depth, and worse without",
        where="section-4",
        pairs=(
            ("section-4/stochastic-1202", "table-1/stochastic-cifar10"),
            ("table-1/constant-cifar10", "section-4/constant-1202"),
            ("section-4/stochastic-1202", "section-4/constant-1202"),
        ),
    ),
    Claim(
        text="stochastic depth saves about 25% of the training time",
        where="table-2",
        pairs=tuple(
            (f"table-2/stochastic-{data}", f"table-2/constant-{data}") for data in ("cifar10", "cifar100", "svhn")
        ),
    ),
    Claim(
        text="the gradient of the first convolution is always larger with stochastic depth",
        where="figure-7",
        curves=(("constant depth", "stochastic depth"),),
    ),
    Claim(
        text="linear decay is consistently better than uniform survival rates",
        where="figure-8-left",
        curves=(("linear decay", "uniform"),),
    ),
    Claim(
        text="both rules beat the baseline when p_L is set properly; linear decay is competitive for p_L from 0.4 to "
        "0.8, and at 0.2 as good as the baseline",
        where="figure-8-left",
    ),
    Claim(
        text="the valley of the heat map is along the diagonal: deeper networks do better at p_L = 0.5, shorter ones "
        "with less skipping",
        where="figure-8-right",
    ),
)

STOCHASTIC_DEPTH = Paper(
    name=NAME,
    title="Deep Networks with Stochastic Depth",
    authors="Huang et al.",
    year=2016,
    venue="ECCV 2016",
    arxiv="1603.09382",
    tables=TABLES,
    figures=_FIGURES,
    variants=_VARIANTS,
    claims=_CLAIMS,
    note="No recipe can express: the 1x1 stride-2 pooling of the shortcuts in the released code before 2017 (here 2x2 "
    "average pooling, as in the text), its convolutions with biases, and the reading of the ImageNet shortcut that "
    "projects only the new channels (here a projection where shapes change, He et al.'s option B).",
)
