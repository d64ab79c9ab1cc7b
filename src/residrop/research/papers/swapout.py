"""Singh, Hoiem, Forsyth: Swapout: Learning an ensemble of deep architectures (2016)."""

from residrop.research.papers.rows import Claim, Curve, Figure, Paper, Plotted, Variant
from residrop.research.papers.swapout_tables import BEST, NAME, SCHEDULES, TABLES

__all__ = ["SWAPOUT"]

_SAMPLED_SCHEDULES = ("linear-1-0.5", "linear-0.5-1")


def _by_samples(name: str, title: str, y: str, plotted: Plotted) -> Figure:
    return Figure(
        paper=NAME,
        name=name,
        title=title,
        x="sampled passes",
        y=y,
        curves=tuple(
            Curve(
                label=SCHEDULES[key][0],
                plotted=plotted,
                recipe=BEST.replace(survival=SCHEDULES[key][1], theta_2=SCHEDULES[key][2]),
                setting={"repetitions": 30, "samples": 30},
            )
            for key in _SAMPLED_SCHEDULES
        ),
        note="two schedules, not named in the text (these are a choice among Table 2's), nor is the largest number of "
        "samples; 30 repetitions for each number. In the left panel the standard error is shaded.",
    )


_FIGURES = (
    Figure(
        paper=NAME,
        name="figure-1",
        title="What the units of a block report: feed-forward, residual, skipforward, swapout",
        note="a drawing",
    ),
    _by_samples("figure-2-left", "Error by number of samples", "error (%)", "error_by_samples"),
    _by_samples("figure-2-right", "Its standard error", "standard error (%)", "standard_error_by_samples"),
)

_OURS = tuple(table.name for table in TABLES)
_VARIANTS = (
    Variant(
        name="w1",
        changes={"width": 1},
        why="not the paper's width but a quarter of its work, which a CPU can train",
        concerns=(
            "table-2",
            *(f"table-1/{method}-v2-w2" for method in ("stochastic-depth", "dropout", "skipforward")),
            "figure-2-left",
            "figure-2-right",
        ),
    ),
    Variant(
        name="nesterov",
        changes={"nesterov": True},
        why="the text says momentum 0.9 and no more",
        concerns=_OURS,
    ),
    Variant(
        name="pixel-mean",
        changes={"normalization": "pixel-mean-only"},
        why="no preprocessing is stated; He et al., whose networks these are, subtract the mean image",
        concerns=_OURS,
    ),
    Variant(
        name="crop-per-image",
        changes={"augmentation": "crop"},
        why='"All the images in a mini-batch use the same crop" is unusual: the usual way',
        concerns=_OURS,
    ),
    Variant(
        name="held-out",
        changes={"validation": 5000, "select": "best"},
        why="no validation is mentioned; Huang et al. report the epoch that is best on 5,000 held-out images",
        concerns=_OURS,
    ),
    Variant(
        name="dropout-residual",
        changes={"rule": "dropout-residual"},
        why="1.09M parameters are those of the network with shortcuts, Y = X + Theta F(X)",
        concerns=("table-1/dropout-v2-w2",),
    ),
    Variant(
        name="dropout-sum",
        changes={"rule": "dropout-sum"},
        why="the same, with the units of the sum dropped: Y = Theta (X + F(X))",
        concerns=("table-1/dropout-v2-w2",),
    ),
    Variant(
        name="skipforward-literal",
        changes={"of": "shortcut"},
        why="eq. 4 to the letter: theta is the probability of X, so the first block always skips",
        concerns=("table-1/skipforward-v2-w2",),
    ),
    Variant(
        name="layer-dropout-per-image",
        changes={"granularity": "row"},
        why="one coin for all units of a block; whether for every image or every mini-batch is not stated",
        concerns=("table-1/stochastic-depth-v2-w2",),
    ),
)

_WIDTHS = ("20-w1", "20-w2", "20-w4", "32-w4")
_CLAIMS = (
    Claim(
        text="models trained with swapout consistently outperform all others of comparable architecture",
        where="table-1",
        pairs=(
            ("table-1/swapout-v1-w1", "table-1/resnet-v1-ours-w1"),
            ("table-1/swapout-v2-w1", "table-1/resnet-v2-ours-w1"),
            ("table-1/swapout-v2-w2", "table-1/resnet-v2-ours-w2"),
            ("table-1/swapout-v2-w2", "table-1/stochastic-depth-v2-w2"),
            ("table-1/swapout-v2-w2", "table-1/dropout-v2-w2"),
            ("table-1/swapout-v2-w2", "table-1/skipforward-v2-w2"),
        ),
    ),
    Claim(
        text="the schedule with less randomness in the early layers is best",
        where="table-2",
        pairs=tuple(
            (f"table-2/linear-1-0.5-{kind}", f"table-2/{other}-{kind}")
            for kind in ("deterministic", "stochastic")
            for other in SCHEDULES
            if other != "linear-1-0.5"
        ),
    ),
    Claim(
        text="stochastic inference outperforms deterministic inference",
        where="table-3",
        pairs=(
            *((f"table-2/{key}-stochastic", f"table-2/{key}-deterministic") for key in SCHEDULES),
            *((f"table-3/{key}-stochastic", f"table-3/{key}-deterministic") for key in _WIDTHS),
        ),
    ),
    Claim(
        text="swapout with deterministic inference is better than the ResNet at most widths (not at Wx1), and with "
        "stochastic inference at all",
        where="table-3",
        pairs=(
            *((f"table-3/{key}-deterministic", f"table-3/{key}-resnet") for key in _WIDTHS[1:]),
            *((f"table-3/{key}-stochastic", f"table-3/{key}-resnet") for key in _WIDTHS),
        ),
    ),
    Claim(
        text="width helps both",
        where="table-3",
        pairs=tuple(
            (f"table-3/20-{wide}-{kind}", f"table-3/20-{narrow}-{kind}")
            for kind in ("resnet", "deterministic", "stochastic")
            for wide, narrow in (("w2", "w1"), ("w4", "w2"))
        ),
    ),
    Claim(
        text="on CIFAR-100 swapout improves 20 layers by more than 2 points; depth, less randomness and width improve "
        "it further",
        where="table-5",
        pairs=(
            ("table-5/swapout-20-w2", "table-5/resnet-v2-ours-20-w2"),
            ("table-5/swapout-56-w2", "table-5/swapout-20-w2"),
            ("table-5/swapout-56-w2-0.8", "table-5/swapout-56-w2"),
            ("table-5/swapout-32-w4-0.8", "table-5/swapout-56-w2-0.8"),
        ),
    ),
    Claim(text="few samples are enough for a good estimate of the mean", where="figure-2-left"),
)

SWAPOUT = Paper(
    name=NAME,
    title="Swapout: Learning an ensemble of deep architectures",
    authors="Singh et al.",
    year=2016,
    venue="NIPS 2016",
    arxiv="1605.06465",
    tables=TABLES,
    figures=_FIGURES,
    variants=_VARIANTS,
    claims=_CLAIMS,
    note="Every run is evaluated both ways, whichever a table prints. No recipe can express: batch norm on the "
    "projections or after the stem (counts of parameters do not decide), pooling in the two paths instead of before "
    "the block, one flip per mini-batch, another value in the padding, averaging logits instead of probabilities.",
)
