"""Arguments of the measures of uncertainty: one line says what is wrong with them."""

import torch
from torch import Tensor

from residrop.common.errors import ConfigError

__all__ = ["check_labelled", "check_probabilities", "check_values"]

_TOLERANCE = 1e-3  # of a sum of probabilities: rounding, also that of half precision


def check_probabilities(probabilities: Tensor) -> None:
    """ConfigError unless this is Tensor[n, classes] of at least one image and two classes, and rows sum to 1."""
    shape = tuple(probabilities.shape)
    if probabilities.ndim != 2 or shape[0] < 1 or shape[1] < 2 or not probabilities.is_floating_point():
        raise ConfigError(
            f"probabilities is {probabilities.dtype} of shape {shape}; give a floating-point Tensor[n, classes] of at "
            "least one image and two classes"
        )
    if not bool(((probabilities >= 0) & (probabilities <= 1 + _TOLERANCE)).all()):  # False for NaN, too
        raise ConfigError("probabilities has values outside [0, 1] or NaN; give softmax outputs, not logits")
    if float(off := (probabilities.sum(1) - 1).abs().max()) > _TOLERANCE:
        raise ConfigError(f"probabilities has a row whose sum is off 1 by {off:.3g}; give softmax outputs, not logits")


def check_labelled(probabilities: Tensor, labels: Tensor) -> None:
    """ConfigError unless the probabilities are as of `check_probabilities` and labels Tensor[n] int64 fit them."""
    check_probabilities(probabilities)
    images, classes = probabilities.shape
    if labels.dtype != torch.int64 or tuple(labels.shape) != (images,):
        raise ConfigError(
            f"labels is {labels.dtype} of shape {tuple(labels.shape)}; give an int64 Tensor[{images}], a label an image"
        )
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise ConfigError(f"labels lie in {low}..{high}; allowed are 0..{classes - 1}, the classes of probabilities")


def check_values(name: str, values: Tensor, images: int | None = None) -> None:
    """ConfigError unless this is a floating-point Tensor[n] without NaN or infinity, n being `images` if given."""
    wanted = "n, at least 1" if images is None else str(images)
    if values.ndim != 1 or not values.is_floating_point() or len(values) != (images or max(len(values), 1)):
        raise ConfigError(
            f"{name} is {values.dtype} of shape {tuple(values.shape)}; give a floating-point Tensor[{wanted}]"
        )
    if not bool(values.isfinite().all()):
        raise ConfigError(f"{name} has a value that is NaN or infinite; give finite numbers")
