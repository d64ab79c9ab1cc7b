"""The shapes of measurements that are known: which fields make lines and columns, ratios before seconds."""

from dataclasses import dataclass

__all__ = ["SHAPES", "Column", "Listing", "Pivot"]


@dataclass(frozen=True)
class Column:
    """A column of a listing: heading, name of the value ("" for the number of rows), digits, names of its standard
    error of which the first that is there counts, and the unit's factor."""

    heading: str
    name: str
    digits: int = 2
    error: tuple[str, ...] = ()
    factor: float = 1.0


@dataclass(frozen=True)
class Listing:
    """Rows of equal `by` are one line, mean and standard deviation of its values."""

    needs: frozenset[str]
    by: tuple[tuple[str, str], ...]  # heading, name
    columns: tuple[Column, ...]
    text: str = ""


@dataclass(frozen=True)
class Pivot:
    """One line for each `by`, one column for each value of `across`."""

    needs: frozenset[str]
    by: tuple[tuple[str, str], ...]
    across: str
    value: str
    text: str
    factor: float = 1.0


_MODEL, _RULE, _SURVIVAL = ("model", "model"), ("rule", "rule"), ("survival rates", "survival")
_SKIP = (_MODEL, ("granularity", "granularity"), _SURVIVAL)
_RUN_SURVIVAL = ("survival rates", "run.survival")
_MIB = 2.0**-20

_ERRORS = (
    Column(
        "error %",
        "deterministic_error",
        error=("deterministic_error_std", "details.deterministic.error_se", "details.0.deterministic.error_se"),
    ),
    Column(
        "sampled %",
        "sampled_error",
        error=("sampled_error_std", "details.sampled.error_se", "details.0.sampled.error_se"),
    ),
    Column("expected depth", "expected_depth"),
)
SHAPES: tuple[Listing | Pivot, ...] = (
    Pivot(
        frozenset({"relative_to_ideal", "relative_to_constant", "variant"}), _SKIP, "variant", "relative_to_constant",
        "Time of a training step, relative to constant depth:",
    ),
    Pivot(
        frozenset({"relative_to_ideal", "saved_relative_to_constant", "variant"}), _SKIP, "variant",
        "saved_relative_to_constant", "Saved activations, relative to constant depth:",
    ),
    Pivot(
        frozenset({"relative_to_add", "variant"}), (("shape", "shape"), ("dtype", "dtype")), "variant",
        "relative_to_add", "Forward and backward of one combination, relative to the addition:",
    ),
    Pivot(
        frozenset({"step_seconds", "relative_to_constant", "variant"}), (_MODEL, ("dtype", "dtype")), "variant",
        "relative_to_constant", "A training step, relative to constant depth:",
    ),
    Pivot(
        frozenset({"relative_to_naive", "variant"}), (_MODEL, _RULE, _SURVIVAL, ("samples", "samples")), "variant",
        "relative_to_naive", "Time of a prediction, relative to the naive loop over samples:",
    ),
    Listing(
        frozenset({"relative_to_plain", "images_per_second"}),
        (_MODEL, ("width", "width"), ("loop", "variant"), _RULE, ("precision", "precision")),
        (
            Column("images/s", "images_per_second", 0), Column("x plain loop", "relative_to_plain"),
            Column("GFLOP/s", "model_flops_per_second", 0, factor=1e-9),
            Column("% of bare convolutions", "share_of_bare", 0, factor=100.0),
            Column("% outside the network", "share_outside", 1, factor=100.0),
        ),
        "Training. The plain loop is torchvision's transforms in a DataLoader, float32, eager; bare convolutions are "
        "those that live in the same updates, by themselves:",
    ),
    Listing(
        frozenset({"relative_to_plain", "quartiles"}), (_MODEL, ("batch", "batch_size")),
        (Column("relative to the plain model", "relative_to_plain", 3), Column("quartiles", "quartiles", 3)),
    ),
    Pivot(
        frozenset({"wiring", "relative_to_none"}), (("network", "network"),), "wiring", "relative_to_none",
        "Time of a step, relative to one process's work without communication:",
    ),
    Pivot(
        frozenset({"wiring", "bytes"}), (("network", "network"),), "wiring", "bytes", "MiB of gradients sent a step:",
        _MIB,
    ),
    Listing(
        frozenset({"mode", "change", "nll", "ece"}), (_MODEL, _SURVIVAL, ("statistics", "mode")),
        (
            Column("change", "change", error=("change_se",)), Column("error %", "error", error=("error_se",)),
            Column("NLL", "nll", 3), Column("ECE %", "ece"),
        ),
        "Batch norm before and after recalibration; change is that of the error in percentage points. ± is "
        "the standard deviation over seeds, or of one seed the standard error over the test images:",
    ),
    Listing(
        frozenset({"microseconds", "granularity"}), (("granularity", "granularity"), ("timing", "timing")),
        (Column("blocks", "blocks"), Column("microseconds a step", "microseconds", 1)),
    ),
    Listing(
        frozenset({"adaptive.mean_samples"}), (_RULE, _RUN_SURVIVAL),
        (
            Column("samples, mean", "adaptive.mean_samples", error=("adaptive.samples_se",)),
            Column("of", "adaptive.max_samples"), Column("same decision %", "adaptive.agreement"),
            Column("error %, adaptive", "adaptive.error"), Column("error %, all", "adaptive.full_error"),
            Column("error %, expectation", "deterministic_error"),
        ),
    ),
    Listing(
        frozenset({"deterministic_error", "run.full_epochs"}), (_RULE, ("network", "run.network"), _RUN_SURVIVAL),
        (*_ERRORS, Column("epochs", "run.epochs"), Column("of the paper's", "run.full_epochs")),
        "Schedules far shorter than the papers': not comparable with published numbers in absolute terms. ± is the "
        "standard deviation over seeds, or of one seed the standard error over the test images:",
    ),
    Listing(
        frozenset({"deterministic_error", "relative_time"}), (_RULE, _RUN_SURVIVAL),
        (Column("time, relative", "relative_time"), *_ERRORS),
        "± is the standard deviation over seeds, or of one seed the standard error over the test images:",
    ),
    Listing(
        frozenset({"budget", "mode", "error"}), (("budget", "budget"), ("rates found by", "mode")),
        (
            Column("time, relative", "relative_time"), Column("error %", "error"),
            Column("expected depth", "expected_depth"), Column("seeds", ""),
        ),
        "± is the standard deviation over seeds:",
    ),
)  # fmt: skip
