"""Out-of-distribution detection: whether a score of uncertainty is higher for images of another kind."""

from typing import NamedTuple

import torch
from torch import Tensor

from residrop.common.extras import extra
from residrop.inference.uncertainty.inputs import check_values

__all__ = ["Detection", "detection"]


class Detection(NamedTuple):
    """How well a score tells images from outside (positive) from images of the training's kind (negative).

    The measures of Hendrycks and Gimpel (2017) and Liang et al. (2018). A score that knows nothing has an `auroc` of
    0.5, an `aupr` of the share of images from outside, and an `fpr95` of 0.95.

    Attributes:
        auroc: area under the ROC curve: the probability that an image from outside has the higher score (ties count
            half).
        aupr: area under the precision-recall curve (average precision); depends on how many images either side has.
        fpr95: smallest share of images of the training's kind that are taken for foreign where at least 95% of the
            foreign ones are found.
    """

    auroc: float
    aupr: float
    fpr95: float


def detection(inside: Tensor, outside: Tensor) -> Detection:
    """Compare a score of uncertainty, high for foreign images, on images of both kinds.

    Args:
        inside: floating-point Tensor[n], scores of images of the training's kind.
        outside: floating-point Tensor[m], scores of images from elsewhere.

    Raises:
        ConfigError: no images on one side, other shapes, NaN or infinities.
    """
    check_values("inside", inside)
    check_values("outside", outside)
    with extra("train"):
        from torchmetrics.functional.classification import (
            binary_auroc,
            binary_average_precision,
            binary_specificity_at_sensitivity,
        )

    scores = torch.cat([inside.double().cpu(), outside.double().cpu()])
    foreign = torch.cat([torch.zeros(len(inside)), torch.ones(len(outside))]).long()
    values, rank = scores.unique(return_inverse=True)
    # ranks in [0, 1]: torchmetrics would put other values through a sigmoid, where large ones become equal
    ranks = rank.double() / len(values)
    specificity, _ = binary_specificity_at_sensitivity(ranks, foreign, min_sensitivity=0.95, validate_args=False)
    return Detection(
        float(binary_auroc(ranks, foreign, validate_args=False)),
        float(binary_average_precision(ranks, foreign, validate_args=False)),
        1.0 - float(specificity),
    )
