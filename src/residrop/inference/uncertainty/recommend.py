"""One sentence from the measures: which inference to use, as far as the numbers can tell."""

from collections.abc import Mapping
from typing import Literal, NamedTuple

from residrop.inference.uncertainty.measures import Estimate, Measured

__all__ = ["Kind", "compare", "recommend"]

_ERRORS = 2  # standard errors that a difference must exceed


class Kind(NamedTuple):
    """A kind of inference.

    Attributes:
        samples: sampled passes; 0 for one pass in expectation.
        temperature: that of its probabilities; 1 for none.
    """

    samples: int
    temperature: float = 1.0

    def __str__(self) -> str:
        passes = f"{self.samples} sampled passes" if self.samples else "one pass"
        return passes if self.temperature == 1 else f"{passes}, temperature {self.temperature:.2f}"


def compare(difference: Estimate) -> int:
    """-1, 0 or 1: lower, not to be told apart, higher. A difference must exceed two standard errors, and these 0."""
    if not abs(difference.value) > _ERRORS * difference.standard_error > 0:
        return 0
    return 1 if difference.value > 0 else -1


def recommend(found: Mapping[Kind, Measured]) -> str:
    """Say what sampling and temperatures change, with standard errors, and which kind of inference to use.

    Better and worse are differences of more than two standard errors, paired over the images. The kind to use is one
    pass without a temperature unless another has a lower NLL; of several the one with the lowest, and where they cannot
    be told apart the one with fewer passes, and that without a temperature.

    Args:
        found: measures of the same images under the same draws; one pass without a temperature must be among them.
    """
    order = sorted(found, key=lambda kind: (kind.samples, kind.temperature != 1))
    plain = {kind.samples: kind for kind in order if kind.temperature == 1}
    best = one = plain[0]
    parts: list[str] = []
    for kind in order:
        if kind.temperature != 1:
            of = "their mean" if kind.samples else "one pass"
            parts.append(
                f"temperature {kind.temperature:.2f} of {of}: {_change(found, kind, plain[kind.samples], 'ece')}"
            )
        elif kind.samples:
            changes = (_change(found, kind, one, name) for name in ("error", "ece"))
            parts.append(f"{kind} instead of one: {', '.join(changes)}")
        if compare(found[kind].less(found[best], "nll")) < 0:
            best = kind
    if not parts:
        return "One pass is all that was measured."
    parts.append(f"use {best}")
    if best == one:
        return f"{'; '.join(parts)}: no other has a lower NLL by more than {_ERRORS} standard errors."
    gain = found[one].less(found[best], "nll")
    size = f"{gain.value:.3f} ± {gain.standard_error:.3f}"
    return f"{'; '.join(parts)}: its NLL is {size} lower than that of one pass at temperature 1."


def _change(found: Mapping[Kind, Measured], kind: Kind, other: Kind, name: Literal["error", "ece"]) -> str:
    """How a measure, of which less is better, changes from the other kind."""
    change, word = found[kind].less(found[other], name), {"error": "error", "ece": "ECE"}[name]
    if not (sign := compare(change)):
        return f"{word} not to be told apart ({change.value:+.2f} ± {change.standard_error:.2f} points)"
    size = f"{abs(change.value):.2f} ± {change.standard_error:.2f} points"
    return f"{word} {'worse' if sign > 0 else 'better'} by {size}"
