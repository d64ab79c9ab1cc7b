"""Whether what a paper says of its numbers is seen in ours."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Literal

from residrop.papers.rows import Claim

__all__ = ["Judged", "Pair", "Verdict", "judge"]

Verdict = Literal["seen", "not seen", "open"]
Values = Sequence[float]


@dataclass(frozen=True)
class Pair:
    """One comparison of a claim.

    Attributes:
        smaller: the row that is claimed to have the smaller value.
        larger: the other.
        difference: mean of `smaller` less mean of `larger`: negative if as claimed; None if one is not measured.
        error: its standard error over seeds; None with one seed on either side.
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
    """A claim and its comparisons; none where it is about curves, which somebody has to look at."""

    claim: Claim
    pairs: tuple[Pair, ...]

    @property
    def verdict(self) -> Verdict:
        """Seen if every comparison is, not seen as soon as one is not, open otherwise."""
        found = {pair.verdict for pair in self.pairs}
        if "not seen" in found:
            return "not seen"
        return "seen" if found == {"seen"} else "open"


def judge(claim: Claim, values: Callable[[str], Values]) -> Judged:
    """Compare a claim with measured values.

    Args:
        claim: of a paper.
        values: from a row ("table-1/key") to its measured numbers, one per seed; none if it is not measured.
    """
    return Judged(claim, tuple(_compared(a, b, values(a), values(b)) for a, b in claim.pairs))


def _compared(smaller: str, larger: str, a: Values, b: Values) -> Pair:
    if not a or not b:
        return Pair(smaller, larger, None, None)
    error = None
    if len(a) > 1 and len(b) > 1:
        error = math.hypot(stdev(a) / math.sqrt(len(a)), stdev(b) / math.sqrt(len(b)))
    return Pair(smaller, larger, fmean(a) - fmean(b), error)
