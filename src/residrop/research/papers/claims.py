"""Whether what a paper says of its numbers is seen in ours."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Literal, NamedTuple

from residrop.research.papers.rows import Claim

__all__ = ["Drawn", "Judged", "Measured", "Pair", "Verdict", "judge", "judge_curves"]

Verdict = Literal["seen", "not seen", "open"]


class Measured(NamedTuple):
    """What is known of a row.

    Attributes:
        values: measured numbers, one per seed; none if it is not measured.
        errors: the standard error of each, over test images or samples; none where it is not known.
    """

    values: Sequence[float] = ()
    errors: Sequence[float] = ()

    @property
    def error(self) -> float | None:
        """Standard error of the mean: over seeds or over images, the larger of what is known; None if nothing is."""
        count = len(self.values)
        found = [math.hypot(*self.errors) / count] if count and len(self.errors) == count else []
        found += [stdev(self.values) / math.sqrt(count)] if count > 1 else []
        return max(found, default=None)


class Drawn(NamedTuple):
    """A curve: positions, values (None where there is none) and their standard errors, if known."""

    x: Sequence[float]
    y: Sequence[float | None]
    error: Sequence[float | None] | None = None

    def at(self) -> dict[float, tuple[float, float | None]]:
        """Value and error by position."""
        errors = self.error or [None] * len(self.x)
        every = zip(self.x, self.y, errors, strict=True)
        return {x: (value, error) for x, value, error in every if value is not None}


@dataclass(frozen=True)
class Pair:
    """One comparison of a claim.

    Attributes:
        smaller: the row (or curve and position) that is claimed to have the smaller value.
        larger: the other.
        difference: mean of `smaller` less mean of `larger`: negative if as claimed; None if one is not measured.
        error: its standard error, see `Measured.error`; None where it is not known of both.
    """

    smaller: str
    larger: str
    difference: float | None
    error: float | None

    @property
    def verdict(self) -> Verdict:
        """Open without numbers, and where two standard errors do not tell the difference from none."""
        if self.difference is None or (self.error is not None and abs(self.difference) < 2.0 * self.error):
            return "open"
        return "seen" if self.difference < 0.0 else "not seen"


@dataclass(frozen=True)
class Judged:
    """A claim and its comparisons; none where somebody has to look at the curves."""

    claim: Claim
    pairs: tuple[Pair, ...]

    @property
    def verdict(self) -> Verdict:
        """Seen if every comparison is, not seen as soon as one is not, open otherwise."""
        found = {pair.verdict for pair in self.pairs}
        if "not seen" in found:
            return "not seen"
        return "seen" if found == {"seen"} else "open"


def judge(claim: Claim, known: Callable[[str], Measured]) -> Judged:
    """Compare a claim with measured values.

    Args:
        claim: of a paper.
        known: from a row ("table-1/key") to what is known of it.
    """
    return Judged(claim, tuple(_compared(a, b, known(a), known(b)) for a, b in claim.pairs))


def _compared(smaller: str, larger: str, a: Measured, b: Measured) -> Pair:
    if not a.values or not b.values:
        return Pair(smaller, larger, None, None)
    error = None if a.error is None or b.error is None else math.hypot(a.error, b.error)
    return Pair(smaller, larger, fmean(a.values) - fmean(b.values), error)


def judge_curves(claim: Claim, drawn: Mapping[str, Drawn]) -> Judged:
    """Compare a claim about curves with those measured, at every position that two of them share.

    Curves of one point each are compared wherever these are. Where both have the very same value, such as a point that
    is one training, there is nothing to compare.

    Args:
        claim: of a paper.
        drawn: curves by label.
    """
    pairs: list[Pair] = []
    for lower, upper in claim.curves:
        if lower in drawn and upper in drawn:
            a, b = drawn[lower].at(), drawn[upper].at()
            if len(a) == len(b) == 1:
                b = dict(zip(a, b.values(), strict=True))
            for x in sorted(a.keys() & b.keys()):
                (value, one), (other, two) = a[x], b[x]
                if value != other:
                    error = None if one is None or two is None else math.hypot(one, two)
                    pairs.append(Pair(f"{lower} at {x:g}", f"{upper} at {x:g}", value - other, error))
    return Judged(claim, tuple(pairs))
