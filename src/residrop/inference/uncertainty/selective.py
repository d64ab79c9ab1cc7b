"""Predictions that may be withheld: the error among images whose uncertainty is low enough."""

from typing import NamedTuple

import torch
from torch import Tensor

from residrop.common.checks import check_rate
from residrop.inference.uncertainty.inputs import check_values

__all__ = ["RiskCoverage", "risk_coverage"]


class RiskCoverage(NamedTuple):
    """Mean loss of the k most certain images, for every k from 1 to n (El-Yaniv and Wiener 2010).

    Images of equal uncertainty cannot be told apart: `risk` is the expectation over their order, computed exactly, so
    that the order in which images are given does not matter.

    Attributes:
        coverage: Tensor[n] float64, k / n.
        risk: Tensor[n] float64, in the unit of the losses.
        reachable: bool Tensor[n], whether a threshold on the uncertainty accepts exactly k images, that is whether the
            next one has a higher uncertainty.
    """

    coverage: Tensor
    risk: Tensor
    reachable: Tensor

    @property
    def area(self) -> float:
        """AURC, the mean of `risk` over all k (Geifman, Uziel and El-Yaniv 2019)."""
        return float(self.risk.mean())

    def coverage_at(self, risk: float) -> float:
        """The largest share of images that a threshold accepts with a mean loss of at most `risk`; 0 if there is none.

        Raises:
            ConfigError: a risk outside [0, 1].
        """
        fits = self.reachable & (self.risk <= check_rate("risk", risk) + 1e-12)
        return float(self.coverage[fits].max()) if bool(fits.any()) else 0.0


def risk_coverage(uncertainty: Tensor, losses: Tensor) -> RiskCoverage:
    """The risk-coverage curve of a score of uncertainty.

    Args:
        uncertainty: floating-point Tensor[n]; images of low values are accepted first.
        losses: floating-point Tensor[n] on the same device, such as 1.0 for a wrong decision and 0.0 for a right one.

    Raises:
        ConfigError: no images, other shapes, NaN or infinities.
    """
    check_values("uncertainty", uncertainty)
    check_values("losses", losses, len(uncertainty))
    order = uncertainty.argsort()
    _, ties, sizes = uncertainty[order].unique_consecutive(return_inverse=True, return_counts=True)
    sums = torch.zeros(len(sizes), dtype=torch.float64, device=losses.device)
    sums.index_add_(0, ties, losses[order].double())
    total = (sums / sizes)[ties].cumsum(0)  # each image counts as the mean of those it is tied with
    last = torch.ones_like(ties, dtype=torch.bool)
    last[:-1] = ties[1:] != ties[:-1]
    count = torch.arange(1, len(losses) + 1, dtype=torch.float64, device=losses.device)
    return RiskCoverage(count / len(losses), total / count, last)
