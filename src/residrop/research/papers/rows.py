"""What a paper's tables and figures are made of: rows and curves, each with the recipe or instrument that fills it.

Nothing here runs anything. A number is as printed, but for its unit: errors are in percent and times in minutes or
milliseconds throughout. Where a reading is uncertain, `note` says so.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, Literal

from residrop.common.errors import ConfigError
from residrop.training.recipe import Recipe

__all__ = [
    "INSTRUMENTS",
    "METRICS",
    "PLOTTED",
    "Claim",
    "Curve",
    "Figure",
    "Kind",
    "Metric",
    "Paper",
    "Plotted",
    "Point",
    "Row",
    "Table",
    "Variant",
]

Metric = Literal[
    "error", "sampled_error", "minutes", "milliseconds", "share_saved", "blocks", "growth_rate", "orders_of_magnitude"
]
METRICS: dict[Metric, str] = {
    "error": "%: top-1 error on the test images (ImageNet: validation images), inference in expectation",
    "sampled_error": "%: the same, predictions averaged over 30 sampled passes",
    "minutes": "min: wall time of a whole training",
    "milliseconds": "ms: wall time per training iteration",
    "share_saved": "%: wall time or work of training saved against constant depth, 100 (1 - t / t_constant)",
    "blocks": "blocks: expected number of live blocks, sum of p_l",
    "growth_rate": "ratio: growth of the squared gradient norm per block, q_l^(1 / (L - l))",
    "orders_of_magnitude": "log10 of a ratio",
}

Kind = Literal["training", "timing", "theory"]

INSTRUMENTS: dict[str, str] = {
    "counts": "arithmetic over survival rates (expected blocks, share of work saved); nothing is run",
    "survival.rates": "p_l over the blocks",
    "depth.law": "exact law of the number of live blocks",
    "timing.training": "time of an update of `network` under `rule`, times `updates`; saved against `baseline`",
    "timing.update": "forward, backward and total time of an update, mean over `updates`; saved against `baseline`",
    "gradients.growth": "q_l from sampled weights, masks and loss gradients at initialization (Proposition 1)",
    "discrepancy.layers": "g_l of every block at initialization (Theorem 1)",
    "noise.condition": "max_k mu_k^2 / sum_l mu_l^2 along training, by depth (Theorem 2, condition 2)",
    "noise.normality": "Shapiro-Wilk p-values of a neuron over masks, one per input (Theorem 2)",
}
"""Ways to measure without training by a recipe. What they take is in `setting` of the row or curve."""

Plotted = Literal[
    "test_error",
    "first_gradient",
    "error",
    "error_by_samples",
    "standard_error_by_samples",
    "relative_error",
    "share_saved",
    "test_error_by_hours",
    "instrument",
]
PLOTTED: dict[Plotted, str] = {
    "test_error": "test_error of metrics.jsonl, every epoch",
    "first_gradient": "first_gradient of metrics.jsonl: mean |gradient| of the first convolution, every epoch",
    "error": "test error at the end, inference in expectation; one value per point",
    "error_by_samples": "error of k sampled passes averaged, k = 1, 2, ..., mean over repetitions",
    "standard_error_by_samples": "standard error of that mean",
    "relative_error": "%: 100 (error / error of the baseline - 1); one value per point",
    "share_saved": "%: time saved against constant depth; one value per point",
    "test_error_by_hours": "test_error against hours: iterations times the time of one (rows of the timing table)",
    "instrument": "what the curve's instrument returns",
}

Setting = Mapping[str, Any]


def _nothing() -> Setting:
    return {}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One number of a paper.

    Attributes:
        key: slug, unique within its table.
        label: the line's label, as the paper prints it.
        column: heading of its column, where the table has several of numbers.
        metric: what the number is, see `METRICS`.
        published: the printed number in the metric's unit; None if the paper claims without a number.
        spread: the printed "+-", in the same unit.
        theory: the paper's own prediction of the same quantity, where it prints one.
        computed: `published` is not printed, but follows from printed numbers.
        parameters_m: number of parameters printed beside it, in millions.
        own: the paper measured it; False: quoted from other work.
        recipe: the training that gives the number; None for quoted, timed and theoretical rows. Rows of one training
            hold equal recipes.
        instrument: how it is measured without a training, a name in `INSTRUMENTS`.
        setting: what the instrument takes.
        also: further metrics of the same training to show beside, since the paper leaves open which one it printed.
        note: reading, confidence, ambiguity.
    """

    key: str
    label: str
    column: str = ""
    metric: Metric = "error"
    published: float | None
    spread: float | None = None
    theory: float | None = None
    computed: bool = False
    parameters_m: float | None = None
    own: bool = True
    recipe: Recipe | None = None
    instrument: str | None = None
    setting: Setting = field(default_factory=_nothing, hash=False)
    also: tuple[Metric, ...] = ()
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table of a paper, or the numbers that the text of one section gives (`name` is "section-4").

    Attributes:
        paper: name of the paper.
        name: "table-2".
        title: what it shows, in one line.
        kind: how most of its rows are filled.
        rows: in the paper's order.
        note: what holds for the whole table.
    """

    paper: str
    name: str
    title: str
    kind: Kind
    rows: tuple[Row, ...]
    note: str = ""

    @property
    def id(self) -> str:
        """ "swapout/table-2"."""
        return f"{self.paper}/{self.name}"

    def row(self, key: str) -> Row:
        """The row of that key; ConfigError with the closest keys if there is none."""
        for row in self.rows:
            if row.key == key:
                return row
        keys = [row.key for row in self.rows]
        close = get_close_matches(key, keys, n=3, cutoff=0.4) or keys[:3]
        raise ConfigError(f"{self.id} has no row {key!r}; did you mean {', '.join(close)}?")


@dataclass(frozen=True, kw_only=True)
class Point:
    """One point of a curve whose points are trainings or rows of their own.

    Attributes:
        x: position on the x axis (nominal, where it is measured, too).
        row: "table-1/0.25" of the same paper: its value is the point's.
        recipe: instead of a row, the training that gives the value.
        x_row: the row whose value is the position, where that is measured.
    """

    x: float
    row: str | None = None
    recipe: Recipe | None = None
    x_row: str | None = None


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A line (or, in a heat map, a line of cells) of a figure: from one recipe, from points, or from an instrument.

    Attributes:
        label: as the paper's legend or text names it.
        plotted: what is drawn, see `PLOTTED`.
        recipe: the training whose record is drawn, if it is one.
        points: else the points, in order of x.
        instrument: else a name in `INSTRUMENTS`.
        setting: what the instrument takes, or repetitions and samples of sampled inference.
        rows: rows of the same paper whose measured time per iteration gives the x axis in hours.
        note: reading.
    """

    label: str
    plotted: Plotted
    recipe: Recipe | None = None
    points: tuple[Point, ...] = ()
    instrument: str | None = None
    setting: Setting = field(default_factory=_nothing, hash=False)
    rows: tuple[str, ...] = ()
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A figure of a paper, or one panel of it ("figure-8-left"). A drawing without data has no curves.

    Attributes:
        paper: name of the paper.
        name: "figure-3-left".
        title: what it shows.
        x: label of the x axis.
        y: label of the y axis.
        scale: of the y axis.
        shape: lines, or a heat map whose rows are the curves.
        curves: in the legend's order.
        note: what is marked, what the text says of it, what is not known of it.
    """

    paper: str
    name: str
    title: str
    x: str = ""
    y: str = ""
    scale: Literal["linear", "log"] = "linear"
    shape: Literal["lines", "heat map"] = "lines"
    curves: tuple[Curve, ...] = ()
    note: str = ""

    @property
    def id(self) -> str:
        """ "stochastic-depth/figure-7"."""
        return f"{self.paper}/{self.name}"


@dataclass(frozen=True, kw_only=True)
class Claim:
    """Something a paper says of its numbers.

    Attributes:
        text: the claim.
        where: name of the table, figure or section.
        pairs: rows of the same paper ("table-1/key"), the first of each pair being claimed to have the smaller value;
            none where the claim is about curves.
        curves: labels of curves of the figure, the first of each pair being claimed to be below at every position; none
            where somebody has to look.
    """

    text: str
    where: str
    pairs: tuple[tuple[str, str], ...] = ()
    curves: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Variant:
    """Another reading of an ambiguous text, or the same on a smaller network. The rows' own recipes are the recommended
    reading.

    Attributes:
        name: unique within its paper.
        changes: fields of `Recipe` that differ.
        why: one line.
        concerns: tables ("table-1"), rows ("table-1/key") and figures ("figure-7") it is meant for.
        networks: for each network of the paper the one that is taken instead; others are not concerned. None: as it is.
    """

    name: str
    changes: Setting = field(default_factory=_nothing, hash=False)
    why: str
    concerns: tuple[str, ...]
    networks: Mapping[str, str] | None = field(default=None, hash=False)

    @property
    def resizes(self) -> bool:
        """Whether networks are of another size than the paper's, and so not to be compared with those that are not."""
        return self.networks is not None or "width" in self.changes

    def applies(self, table: Table, row: Row) -> bool:
        """Whether it is another reading of this row's training; never of a row without a recipe."""
        named = table.name in self.concerns or f"{table.name}/{row.key}" in self.concerns
        return named and row.recipe is not None and (self.networks is None or row.recipe.network in self.networks)

    def of(self, recipe: Recipe) -> Recipe:
        """The recipe under this reading."""
        networks = self.networks or {}
        return recipe.replace(network=networks.get(recipe.network, recipe.network)).replace(**self.changes)


@dataclass(frozen=True, kw_only=True)
class Paper:
    """A paper.

    Attributes:
        name: as in ids.
        title: as printed.
        authors: as cited.
        year: of publication.
        venue: where.
        arxiv: identifier, or None if not known here.
        tables: all of them, then the numbers of the text.
        figures: all of them, panel by panel.
        variants: other readings of ambiguous passages.
        claims: what it says of its numbers.
        note: what is missing here, and readings that no recipe can express.
    """

    name: str
    title: str
    authors: str
    year: int
    venue: str
    arxiv: str | None
    tables: tuple[Table, ...]
    figures: tuple[Figure, ...]
    variants: tuple[Variant, ...]
    claims: tuple[Claim, ...]
    note: str = ""

    def table(self, name: str) -> Table:
        """The table of that name; ConfigError if there is none."""
        for table in self.tables:
            if table.name == name:
                return table
        raise ConfigError(f"{self.name} has no table {name!r}; it has {', '.join(table.name for table in self.tables)}")

    def row(self, name: str) -> Row:
        """The row "table-1/key"; ConfigError if there is none."""
        table, _, key = name.partition("/")
        return self.table(table).row(key)
