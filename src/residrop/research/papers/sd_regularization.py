"""Hayou, Ayed: Regularization in ResNet with Stochastic Depth (2021)."""

from itertools import pairwise

from residrop.research.papers.rows import Claim, Curve, Figure, Paper, Row, Table, Variant
from residrop.schedule import budgets
from residrop.training.presets import preset
from residrop.training.recipe import Recipe

__all__ = ["SD_REGULARIZATION"]

_NAME = "sd-regularization"
_UNIFORM = preset("sd-regularization/stable-resnet-110").recipe
_CONSTANT = preset("sd-regularization/stable-resnet-110-constant").recipe


def _linear(blocks: int, budget: float) -> str:
    """Linear decay whose rates sum to `budget` times the number of blocks."""
    return f"linear_decay({budgets.linear_at(blocks, budget * blocks)[-1]!r})"


_GROWTH = {"samples": 500, "width": 512}
_MODES = {"standard": "uniform(1)", "uniform": "uniform(0.7)", "linear": _linear(50, 0.7)}
_MODE_LABELS = {"standard": "Standard", "uniform": "Uniform", "linear": "Linear"}

# Table 1: empirical and theoretical rate at l = 0, 10, 20, 30, 40
_RATES = {
    "standard": ((2.001, 2.0), (2.001, 2.0), (2.001, 2.0), (2.001, 2.0), (1.999, 2.0)),
    "uniform": ((1.705, 1.7), (1.708, 1.7), (1.707, 1.7), (1.716, 1.7), (1.739, 1.7)),
    "linear": ((1.694, 1.691), (1.633, 1.629), (1.569, 1.573), (1.555, 1.516), (1.530, 1.459)),
}
_LAYERS = (0, 10, 20, 30, 40)


def _rates() -> tuple[Row, ...]:
    return tuple(
        Row(
            key=f"{mode}-{layer}",
            label=f"l = {layer}",
            column=_MODE_LABELS[mode],
            metric="growth_rate",
            published=empirical,
            theory=theoretical,
            instrument="gradients.growth",
            setting={**_GROWTH, "network": "vanilla-50", "survival": _MODES[mode], "layer": layer},
        )
        for mode, cells in _RATES.items()
        for layer, (empirical, theoretical) in zip(_LAYERS, cells, strict=True)
    )


_TABLE_1 = Table(
    paper=_NAME,
    name="table-1",
    title="Growth rate of the gradient, empirical (theoretical): vanilla ResNet50, width 512, budget 0.7",
    kind="theory",
    rows=_rates(),
    note="the columns are decoded from running text: the modes are sure (their theory differs). The rate is read as "
    "q_l^(1 / (L - l)), which gives 1.6915, 1.6355, 1.5791, 1.5220, 1.4643 for the linear mode: the printed theory is "
    "met to 0.001 at l = 0, 11, 21, 31, 41, perhaps one off. Compare with the theory; the empirical rates of large l "
    "are above it by more than 500 samples explain.",
)

_BUDGETS = ("0.1", "0.2", "0.3", "0.4", "0.5", "0.6", "0.7", "0.8", "0.9")
# Table 2 (a): error and its standard deviation over four runs, by budget; linear decay starts at 0.5
_SENSE = ((15.4, 0.4), (9.3, 0.5), (7.0, 0.3), (7.3, 0.4), (7.3, 0.2), (6.9, 0.1), (7.3, 0.3), (6.6, 0.2), (6.2, 0.2))
_UNI = ((17.2, 0.3), (10.3, 0.4), (7.7, 0.2), (7.4, 0.3), (6.8, 0.1), (6.3, 0.2), (5.9, 0.1), (5.7, 0.1), (5.7, 0.1))
_LIN = ((9.1, 0.1), (7.5, 0.2), (6.4, 0.2), (6.1, 0.2), (6.0, 0.2))
_BLOCKS = 54


def _recipe(mode: str, budget: str) -> Recipe:
    if mode == "sensemode":
        return _UNIFORM.replace(survival=None, budget=budget, spend="sensitivity")
    schedule = f"uniform({budget})" if mode == "uniform" else _linear(_BLOCKS, float(budget))
    return _UNIFORM.replace(survival=schedule)


def _errors() -> tuple[Row, ...]:
    columns = (("sensemode", "SenseMode", _BUDGETS, _SENSE), ("uniform", "Uniform", _BUDGETS, _UNI),
               ("linear", "Linear", _BUDGETS[4:], _LIN))  # fmt: skip
    rows = [
        Row(
            key=f"{mode}-{budget}",
            label=budget,
            column=column,
            published=error,
            spread=spread,
            recipe=_recipe(mode, budget),
        )
        for mode, column, budgets_of, cells in columns
        for budget, (error, spread) in zip(budgets_of, cells, strict=True)
    ]
    rows.append(
        Row(
            key="constant",
            label="1",
            column="Uniform",
            published=6.37,
            spread=0.12,
            recipe=_CONSTANT,
            note="at budget 1 nothing is dropped and all modes are one; the column is a guess",
        )
    )
    return tuple(rows)


_TABLE_2 = Table(
    paper=_NAME,
    name="table-2",
    title="Modes of survival rates under a budget: Stable ResNet110, (a) CIFAR-10",
    kind="training",
    rows=_errors(),
    note="mean +- standard deviation of four runs. Decoded from running text: with this order of columns everything "
    "the text says holds, with another it does not; that the numbers are test errors in percent is read from their "
    "size. Linear decay cannot meet a budget below 1/2 - 1/(2L). The protocol is in an appendix that is not at hand: "
    "here that of the repository the paper builds on. SenseMode: p_l proportional to |S_l| and at most 1. Panel (b), "
    "CIFAR-100, is not at hand.",
)

_SECTION_3 = Table(
    paper=_NAME,
    name="section-3",
    title="How much stochastic depth reduces the explosion of gradients",
    kind="theory",
    rows=(
        Row(
            key="explosion-0.5",
            label="L = 50, uniform mode 1/2",
            metric="orders_of_magnitude",
            published=6.0,
            instrument="gradients.growth",
            setting={
                **_GROWTH,
                "network": "vanilla-50",
                "survival": "uniform(0.5)",
                "layer": 0,
                "against": "uniform(1)",
            },
            note='printed as "six orders of magnitude"; (2 / 1.5)^50 = 1.77e6, or 6.25',
        ),
    ),
)


def _growth(name: str, network: str, budget: float) -> Figure:
    modes = {"standard": "uniform(1)", "uniform": f"uniform({budget:g})", "linear": _linear(50, budget)}
    stable = network.startswith("stable")
    return Figure(
        paper=_NAME,
        name=name,
        title=f"Growth of the gradient, budget {budget:g}, {'stable' if stable else 'standard'} ResNet",
        x="layer l",
        y="q_l",
        scale="linear" if stable else "log",
        curves=tuple(
            Curve(
                label=_MODE_LABELS[mode],
                plotted="instrument",
                instrument="gradients.growth",
                setting={**_GROWTH, "network": network, "survival": survival},
            )
            for mode, survival in modes.items()
        ),
        note="vanilla ResNet50, width 512, at initialization, 500 samples",
    )


def _one(label: str, instrument: str, **setting: object) -> tuple[Curve, ...]:
    return (Curve(label=label, plotted="instrument", instrument=instrument, setting=setting),)


def _depth(label: str, survival: str) -> Curve:
    setting = {"blocks": 100, "survival": survival}
    return Curve(label=label, plotted="instrument", instrument="depth.law", setting=setting)


def _time(label: str, rule: str, survival: str | None, note: str = "") -> Curve:
    setting = {
        "network": "resnet-56",
        "baseline": "resnet-56",
        "rule": rule,
        "survival": survival,
        "data": "cifar10",
        "batch_size": 64,
        "updates": 704 * 100,
    }
    return Curve(label=label, plotted="instrument", instrument="timing.training", setting=setting, note=note)


_NEURON = {"network": "stable-vanilla-100", "width": 128, "survival": "uniform(0.7)", "masks": 200, "task": "sin"}
_TIMED_RATES = (0.3, 0.5, 0.7)
_FIGURES = (
    Figure(
        paper=_NAME,
        name="figure-1a",
        title="Law of the number of live blocks, L = 100, mean survival rate 0.5",
        x="live blocks",
        y="probability",
        curves=(_depth("Uniform", "uniform(0.5)"), _depth("Linear", _linear(100, 0.5))),
        note="a histogram of draws in the paper",
    ),
    Figure(
        paper=_NAME,
        name="figure-1b",
        title="Training time of dropout and stochastic depth: CIFAR-10, ResNet56, 100 epochs",
        x="survival rate",
        y="training time",
        curves=(
            _time("no dropout", "constant", None),
            _time("dropout", "dropout-residual", "uniform(0.5)", "where and how much the paper drops is not stated"),
            *(_time(f"stochastic depth, {rate:g}", "stochastic-depth", f"uniform({rate:g})") for rate in _TIMED_RATES),
        ),
        note="said in the text: dropout takes longer than none, stochastic depth less. Rates, batch size and axes are "
        "not known from the text (these are ours; 64 images, of 45,000, as the repository the paper builds on).",
    ),
    _growth("figure-2a", "vanilla-50", 0.5),
    _growth("figure-2b", "vanilla-50", 0.7),
    _growth("figure-2c", "stable-vanilla-50", 0.7),
    Figure(
        paper=_NAME,
        name="figure-3",
        title="Distribution of g_l over the layers at initialization",
        x="layer l",
        y="g_l",
        curves=_one("g_l", "discrepancy.layers", network="stable-vanilla-50", width=512, loss="quadratic"),
        note='"Vanilla ResNet50 with width 512"; Theorem 1 is about the stable network, so it is that one. Said: flat',
    ),
    Figure(
        paper=_NAME,
        name="figure-4",
        title="Condition 2 of Theorem 2 by depth and epoch",
        x="epoch",
        y="max mu^2 / sum mu^2",
        curves=tuple(
            Curve(
                label=f"L = {depth}",
                plotted="instrument",
                instrument="noise.condition",
                setting={"network": f"stable-vanilla-{depth}", "width": 128, "task": "sin"},
            )
            for depth in (25, 50, 100, 200)
        ),
        note="depths, width, epochs and data are not known from the text; these are ours. Said to fall with depth "
        "at all epochs",
    ),
    Figure(
        paper=_NAME,
        name="figure-5-left",
        title="p-values of Shapiro-Wilk tests of an output neuron, by epoch",
        x="epoch",
        y="p-value",
        curves=_one("y_L", "noise.normality", **_NEURON, over="epoch"),
        note="vanilla ResNet100, width 128, uniform mode, budget 0.7, 200 masks for each input; epochs not stated",
    ),
    Figure(
        paper=_NAME,
        name="figure-5-right",
        title="p-values of Shapiro-Wilk tests of a neuron, by layer",
        x="layer l",
        y="p-value",
        curves=_one("y_l", "noise.normality", **_NEURON, over="layer"),
        note="normal after about 20 layers, says the text",
    ),
)

_ALL = ("table-2",)
_RANDOM = tuple(f"table-2/{row.key}" for row in _TABLE_2.rows if row.key != "constant")
_VARIANTS = (
    Variant(
        name="rescale-train",
        changes={"rescale": "train"},
        why="test-time scaling is not stated; the repository the paper builds on divides by p in training instead",
        concerns=_RANDOM,
    ),
    Variant(
        name="last-epoch",
        changes={"validation": 0, "select": "last"},
        why="which epoch is reported is not stated: the last, of a training on all images",
        concerns=_ALL,
    ),
    Variant(
        name="huang-protocol",
        changes={"epochs": 500, "batch_size": 128, "normalization": "pixel-mean"},
        why='"ResNet110 follows Huang et al.": perhaps their protocol, too',
        concerns=_ALL,
    ),
)

_CLAIMS = (
    Claim(
        text="at budgets of 0.5 and more the uniform mode is best",
        where="table-2",
        pairs=tuple(
            (f"table-2/uniform-{budget}", f"table-2/{mode}-{budget}")
            for budget in _BUDGETS[4:]
            for mode in ("sensemode", "linear")
        ),
    ),
    Claim(
        text="below 0.5 SenseMode is better than the uniform mode",
        where="table-2",
        pairs=tuple((f"table-2/sensemode-{budget}", f"table-2/uniform-{budget}") for budget in _BUDGETS[:4]),
    ),
    Claim(
        text="budget-performance trade-off: the error rises as the budget falls",
        where="table-2",
        pairs=tuple((f"table-2/uniform-{more}", f"table-2/uniform-{less}") for less, more in pairwise(_BUDGETS[:8])),
    ),
    Claim(
        text="dropout takes longer than no dropout, stochastic depth less",
        where="figure-1b",
        curves=(
            ("no dropout", "dropout"),
            *((f"stochastic depth, {rate:g}", "no dropout") for rate in _TIMED_RATES),
        ),
    ),
    Claim(text="neurons behave as normal ones after about 20 layers, throughout training", where="figure-5-right"),
)

SD_REGULARIZATION = Paper(
    name=_NAME,
    title="Regularization in ResNet with Stochastic Depth",
    authors="Hayou & Ayed",
    year=2021,
    venue="NeurIPS 2021",
    arxiv=None,
    tables=(_TABLE_1, _TABLE_2, _SECTION_3),
    figures=_FIGURES,
    variants=_VARIANTS,
    claims=_CLAIMS,
    note="Not at hand: the appendix with the protocol and Stable ResNet56, and panel (b) of Table 2, CIFAR-100. No "
    "recipe can express a smallest survival rate p_min for SenseMode (the experiments have none).",
)
