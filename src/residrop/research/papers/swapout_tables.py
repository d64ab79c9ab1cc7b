"""The tables of Singh, Hoiem, Forsyth 2016."""

from residrop.research.papers.rows import Metric, Row, Table
from residrop.training.presets import preset
from residrop.training.recipe import Recipe

__all__ = ["BEST", "NAME", "SCHEDULES", "TABLES"]

NAME = "swapout"

BEST = preset("swapout/v2-20-w2").recipe
_W1 = preset("swapout/v2-20-w1").recipe
_W4 = preset("swapout/v2-20-w4").recipe
_DEEP_W4 = preset("swapout/v2-32-w4").recipe
_V1_W1 = preset("swapout/v1-20-w1").recipe
_V1_W2 = preset("swapout/v1-20-w2").recipe
_PLAIN_W1 = preset("swapout/v2-20-w1-constant").recipe
_PLAIN_W2 = preset("swapout/v2-20-w2-constant").recipe
_LAYERS = preset("swapout/v2-20-w2-layer-dropout").recipe
_DROPOUT = preset("swapout/v2-20-w2-dropout").recipe
_SKIPFORWARD = preset("swapout/v2-20-w2-skipforward").recipe
_C100 = preset("swapout/v2-20-w2-cifar100").recipe
_C100_56 = _C100.replace(network="resnet-ours-56")
_C100_DEEP_W4 = preset("swapout/v2-32-w4-cifar100").recipe

_OPEN = "which inference is not stated: read as sampled, like the 5.68 of swapout in Tables 2 and 3"


def _constant(recipe: Recipe) -> Recipe:
    return recipe.replace(rule="constant", survival=None)


def _quoted(key: str, label: str, published: float, parameters_m: float | None = None, note: str = "") -> Row:
    return Row(key=key, label=label, published=published, parameters_m=parameters_m, own=False, note=note)


def _plain(key: str, label: str, published: float, parameters_m: float, recipe: Recipe, note: str = "") -> Row:
    """A network without randomness."""
    return Row(key=key, label=label, published=published, parameters_m=parameters_m, recipe=recipe, note=note)


def _sampled(key: str, label: str, published: float, parameters_m: float, recipe: Recipe, note: str = _OPEN) -> Row:
    """A network with randomness; the table does not say how it predicts."""
    return Row(
        key=key,
        label=label,
        metric="sampled_error",
        published=published,
        parameters_m=parameters_m,
        recipe=recipe,
        also=("error",),
        note=note,
    )


_TABLE_1 = Table(
    paper=NAME,
    name="table-1",
    title="Swapout against baselines of the same structure, CIFAR-10, 20 layers",
    kind="training",
    rows=(
        _quoted("he-v1-w1", "ResNet v1 [4] Wx1", 8.75, 0.27),
        _plain("resnet-v1-ours-w1", "ResNet v1 Ours Wx1", 8.54, 0.27, _constant(_V1_W1)),
        _sampled("swapout-v1-w1", "Swapout v1 Wx1", 8.27, 0.27, _V1_W1),
        _plain("resnet-v2-ours-w1", "ResNet v2 Ours Wx1", 8.27, 0.27, _PLAIN_W1),
        _sampled("swapout-v2-w1", "Swapout v2 Wx1", 7.97, 0.27, _W1, f"7.92 in Table 3: another run. {_OPEN}"),
        _sampled("swapout-v1-w2", "Swapout v1 Wx2", 6.58, 1.09, _V1_W2),
        _plain("resnet-v2-ours-w2", "ResNet v2 Ours Wx2", 6.54, 1.09, _PLAIN_W2),
        _sampled("stochastic-depth-v2-w2", "Stochastic Depth v2 Ours Wx2", 5.99, 1.09, _LAYERS,
                 f"the layer dropout of section 3.2, one coin per mini-batch. {_OPEN}"),
        _sampled("dropout-v2-w2", "Dropout v2 Wx2", 5.87, 1.09, _DROPOUT,
                 "eq. 1 instead of eq. 3, so without a shortcut; but 1.09M parameters are those of the network with "
                 f"projections, which go unused (without them 1.08M). {_OPEN}"),
        _sampled("skipforward-v2-w2", "SkipForward v2 Wx2", 6.11, 1.09, _SKIPFORWARD,
                 "theta read as the probability of F(X): by eq. 4 to the letter, Linear(1, 0.5) would never use the "
                 f"first block. {_OPEN}"),
        _sampled("swapout-v2-w2", "Swapout v2 Wx2", 5.68, 1.09, BEST, "the sampled one of Tables 2 and 3"),
    ),
    note="all stochastic methods with Linear(1, 0.5)",
)  # fmt: skip

# schedules of Table 2: label, survival (theta_1 and, unless given, theta_2), theta_2
SCHEDULES: dict[str, tuple[str, str, str | None]] = {
    "0.5-0.5": ("Swapout (theta_1 = theta_2 = 0.5)", "uniform(0.5)", None),
    "0.2-0.8": ("Swapout (theta_1 = 0.2, theta_2 = 0.8)", "uniform(0.2)", "uniform(0.8)"),
    "0.8-0.2": ("Swapout (theta_1 = 0.8, theta_2 = 0.2)", "uniform(0.8)", "uniform(0.2)"),
    "linear-0.5-1": ("Swapout (theta_1 = theta_2 = Linear(0.5, 1))", "linear(0.5, 1)", None),
    "linear-1-0.5": ("Swapout (theta_1 = theta_2 = Linear(1, 0.5))", "linear(1, 0.5)", None),
}
_BOTH_WAYS = {
    "0.5-0.5": (10.36, 6.69),
    "0.2-0.8": (10.14, 7.63),
    "0.8-0.2": (7.58, 6.56),
    "linear-0.5-1": (7.34, 6.52),
    "linear-1-0.5": (6.43, 5.68),
}


def _schedules() -> tuple[Row, ...]:
    notes = {"linear-1-0.5-deterministic": "6.40 in Table 3: another run, or another evaluation"}
    columns: tuple[tuple[Metric, str, str], ...] = (
        ("error", "deterministic", "Deterministic Error(%)"),
        ("sampled_error", "stochastic", "Stochastic Error(%)"),
    )
    return tuple(
        Row(
            key=f"{key}-{kind}",
            label=label,
            column=column,
            metric=metric,
            published=value,
            recipe=BEST.replace(survival=survival, theta_2=theta_2),
            note=notes.get(f"{key}-{kind}", ""),
        )
        for key, (label, survival, theta_2) in SCHEDULES.items()
        for (metric, kind, column), value in zip(columns, _BOTH_WAYS[key], strict=True)
    )


_TABLE_2 = Table(
    paper=NAME,
    name="table-2",
    title="Stochastic training schedules: swapout v2, 20 layers, Wx2, CIFAR-10, both kinds of inference",
    kind="training",
    rows=_schedules(),
    note='the caption says "see [6]" (Huang et al.) of Linear(a, b), but defines it from the first block to the last: '
    "the first block has exactly a",
)

_WIDTHS = (
    ("20-w1", "Swapout v2 (20) Wx1", 0.27, (8.27, 8.58, 7.92), _W1),
    ("20-w2", "Swapout v2 (20) Wx2", 1.09, (6.54, 6.40, 5.68), BEST),
    ("20-w4", "Swapout v2 (20) Wx4", 4.33, (5.62, 5.43, 5.09), _W4),
    ("32-w4", "Swapout v2 (32) Wx4", 7.43, (5.23, 4.97, 4.76), _DEEP_W4),
)
_WIDTH_NOTES = {
    "20-w1-stochastic": "7.97 in Table 1: another run",
    "20-w2-deterministic": "6.43 in Table 2: another run, or another evaluation",
}


def _widths() -> tuple[Row, ...]:
    columns: tuple[tuple[Metric, str, str], ...] = (
        ("error", "resnet", "ResNet v2"),
        ("error", "deterministic", "Swapout Deterministic"),
        ("sampled_error", "stochastic", "Swapout Stochastic"),
    )
    return tuple(
        Row(
            key=f"{key}-{kind}",
            label=label,
            column=column,
            metric=metric,
            published=value,
            parameters_m=parameters_m,
            recipe=_constant(recipe) if kind == "resnet" else recipe,
            note=_WIDTH_NOTES.get(f"{key}-{kind}", ""),
        )
        for key, label, parameters_m, values, recipe in _WIDTHS
        for (metric, kind, column), value in zip(columns, values, strict=True)
    )


_TABLE_3 = Table(
    paper=NAME,
    name="table-3",
    title="Wider networks, CIFAR-10, both kinds of inference",
    kind="training",
    rows=_widths(),
    note="one extraction of the text has lost the heading over the last two columns; the other has it",
)

_TABLE_4 = Table(
    paper=NAME,
    name="table-4",
    title="Swapout against comparable methods, CIFAR-10",
    kind="training",
    rows=(
        _quoted("dropconnect", "DropConnect [20]", 9.32),
        _quoted("nin", "NIN [11]", 8.81),
        _quoted("fitnet", "FitNet(19) [15]", 8.39),
        _quoted("dsn", "DSN [10]", 7.97),
        _quoted("highway", "Highway [18]", 7.60),
        _quoted("resnet-v1-110", "ResNet v1(110) [4]", 6.41, 1.7, "the reproduction by Huang et al."),
        _quoted("stochastic-depth-1202", "Stochastic Depth v1(1202) [6]", 4.91, 19.4),
        _sampled("swapout-v1-20-w2", "SwapOut v1(20) Wx2", 6.58, 1.09, _V1_W2, f"as in Table 1. {_OPEN}"),
        _quoted("resnet-v2-1001", "ResNet v2 (1001) [5]", 4.92, 10.2, "the text gives it 4.91, which is another row's"),
        _sampled("swapout-v2-32-w4", "SwapOut v2(32) Wx4", 4.76, 7.43, _DEEP_W4, "the sampled one of Table 3"),
    ),
)

_TABLE_5 = Table(
    paper=NAME,
    name="table-5",
    title="Swapout against other methods, CIFAR-100",
    kind="training",
    rows=(
        _quoted("nin", "NIN [11]", 35.68),
        _quoted("dsn", "DSN [10]", 34.57),
        _quoted("fitnet", "FitNet [15]", 35.04),
        _quoted("highway", "Highway [18]", 32.39, None, "32.24 as quoted by Huang et al."),
        _quoted("resnet-v1-110", "ResNet v1 (110) [4]", 27.22, 1.7, "the text of Huang et al.; their table has 27.76"),
        _quoted("stochastic-depth-110", "Stochastic Depth v1 (110) [6]", 24.58, 1.7, "24.98 in Huang et al."),
        _quoted("resnet-v2-164", "ResNet v2 (164) [5]", 24.33, 1.7),
        _quoted("resnet-v2-1001", "ResNet v2 (1001) [5]", 22.71, 10.2),
        _plain("resnet-v2-ours-20-w2", "ResNet v2 Ours (20) Wx2", 28.08, 1.09, _constant(_C100),
               "1.09M is the network of CIFAR-10: with 100 classes it is the 1.10M of the next line"),
        _sampled("swapout-20-w2", "SwapOut v2 (20)(Linear(1,0.5)) Wx2", 25.86, 1.10, _C100),
        _sampled("swapout-56-w2", "SwapOut v2 (56)(Linear(1,0.5)) Wx2", 24.86, 3.43, _C100_56),
        _sampled("swapout-56-w2-0.8", "SwapOut v2 (56)(Linear(1,0.8)) Wx2", 23.46, 3.43,
                 _C100_56.replace(survival="linear(1, 0.8)")),
        _sampled("swapout-32-w4-0.8", "SwapOut v2 (32)(Linear(1,0.8)) Wx4", 22.72, 7.46, _C100_DEEP_W4),
    ),
)  # fmt: skip

TABLES = (_TABLE_1, _TABLE_2, _TABLE_3, _TABLE_4, _TABLE_5)
