"""Rules by name, for recipes and the command line."""

from collections.abc import Callable
from typing import NamedTuple

from residrop.common.checks import check_rate
from residrop.common.errors import ConfigError
from residrop.rules.backward import BackwardDepth
from residrop.rules.base import Rule
from residrop.rules.depth import ConstantDepth, DepthDropout, StochasticDepth
from residrop.rules.gaussian import GaussianDepth
from residrop.rules.units import Mix, SkipForward, Swapout, UnitDropout

__all__ = ["RULES", "entry_of", "make_rule"]


class _Entry(NamedTuple):
    build: Callable[..., Rule]
    survival: str  # the paper's own schedule, used where none is given
    options: tuple[str, ...]
    title: str
    placed: bool = False  # whether `build` also takes the place of the block in its stage


def _constant(survival: float) -> Rule:
    if check_rate("survival", survival) != 1.0:
        raise ConfigError(f"survival is {survival}; a constant block is always present: give a number in [1, 1]")
    return ConstantDepth()


RULES: dict[str, _Entry] = {
    "constant": _Entry(_constant, "1", (), "every block always present: the plain residual network"),
    "stochastic-depth": _Entry(
        StochasticDepth,
        "linear_decay(0.5)",
        ("granularity", "rescale", "rows", "scope"),
        "whole branches dropped, per mini-batch or row (Huang et al. 2016)",
    ),
    "layer-dropout": _Entry(
        StochasticDepth,
        "linear(1, 0.5)",
        ("granularity", "scope"),
        "stochastic depth as the Swapout paper runs it: Linear(1, 0.5)",
    ),
    "depth-dropout": _Entry(
        DepthDropout,
        "uniform(0.5)",
        ("scope",),
        "uniform dropping over trainable shortcuts, for speed (Guo & Gould 2016)",
    ),
    "backward-depth": _Entry(
        BackwardDepth,
        "uniform(0.5)",
        ("granularity", "rescale", "scope"),
        "whole forward, branches dropped in backward only (DropBP, Woo et al. 2024)",
    ),
    "gaussian-depth": _Entry(
        GaussianDepth,
        "linear_decay(0.5)",
        ("granularity", "rescale", "scope"),
        "branches times Gaussian numbers with the coins' mean and variance (after Hayou & Ayed 2021, Theorem 2)",
    ),
    "swapout": _Entry(
        Swapout,
        "linear(1, 0.5)",
        ("theta_2", "scope"),
        "every unit drops, skips, feeds forward or adds (Singh et al. 2016)",
    ),
    "mix": _Entry(
        Mix.in_stage,
        "linear(1, 0.5)",
        ("theta_2", "repeat", "earlier", "scope"),
        "every unit sums some of shortcut, branch, repeated branch, earlier outputs (Singh et al. 2016, eq. 2)",
        placed=True,
    ),
    "skipforward": _Entry(
        SkipForward,
        "linear(1, 0.5)",
        ("of", "scope"),
        "every unit skips or feeds forward (Singh et al. 2016, eq. 4)",
    ),
    "dropout": _Entry(
        UnitDropout,
        "linear(1, 0.5)",
        ("on", "scope"),
        "units of the branch dropped, no skip (Singh et al. 2016, eq. 1)",
    ),
    "dropout-residual": _Entry(
        lambda theta, **options: UnitDropout(theta, on="residual", **options),
        "linear(1, 0.5)",
        ("scope",),
        "units of the branch dropped, skip kept: X + Theta F(X)",
    ),
    "dropout-sum": _Entry(
        lambda theta, **options: UnitDropout(theta, on="sum", **options),
        "linear(1, 0.5)",
        ("scope",),
        "units of the sum dropped: Theta (X + F(X))",
    ),
}


def make_rule(name: str, survival: float, *, place: int | None = None, **options: object) -> Rule:
    """Build a rule by name; `survival` is its p_l or theta. Options that are None are left at the rule's default.

    `place` is the 0-based place of the block in its stage, for rules that combine earlier outputs.

    Raises:
        ConfigError: unknown name, an option that this rule does not take, or a value it refuses.
    """
    entry = entry_of(name)
    given = {key: value for key, value in options.items() if value is not None}
    for key in given:
        if key not in entry.options:
            takes = ", ".join(entry.options) or "no options"
            raise ConfigError(f"rule {name!r} takes no option {key!r}; it takes {takes}")
    if entry.placed and place is not None:
        given["place"] = place
    return entry.build(survival, **given)


def entry_of(name: str) -> _Entry:
    """The catalogue's entry for a rule; ConfigError, with all names, if there is none."""
    if name not in RULES:
        raise ConfigError(f"rule {name!r} is unknown; choose one of {', '.join(RULES)}")
    return RULES[name]
