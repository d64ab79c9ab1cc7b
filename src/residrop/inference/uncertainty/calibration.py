"""Whether probabilities mean what they say: proper scores, calibration errors, temperature scaling.

`probabilities` is a floating-point Tensor[n, classes] whose rows sum to 1, `labels` an int64 Tensor[n] with values 0 to
classes - 1 on the same device; sums are taken in float64. ConfigError is raised for other shapes, no images, NaN, rows
that do not sum to 1 and labels that are no class.
"""

import math
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from residrop.common.checks import check_choice, check_whole, is_number
from residrop.common.errors import ConfigError
from residrop.common.extras import extra
from residrop.inference.uncertainty.inputs import check_labelled, check_probabilities, check_values

__all__ = [
    "TEMPERATURES",
    "Binning",
    "Reliability",
    "brier",
    "calibration_error",
    "check_temperature",
    "fit_temperature",
    "negative_log_likelihood",
    "reliability",
    "with_temperature",
]

Binning = Literal["width", "mass"]
TEMPERATURES = (0.05, 20.0)  # between which `fit_temperature` looks


def brier(probabilities: Tensor, labels: Tensor) -> Tensor:
    """Brier score of every image: sum over the classes of (probability - [class is the label])^2.

    Brier (1950), in [0, 2]; the score of a set is the mean over its images. For two classes it is twice what
    scikit-learn gives.

    Returns:
        Tensor[n] float64.
    """
    check_labelled(probabilities, labels)
    p = probabilities.double()
    return p.square().sum(1) - 2 * p.gather(1, labels[:, None]).squeeze(1) + 1


def negative_log_likelihood(probabilities: Tensor, labels: Tensor) -> Tensor:
    """-log(probability of the label) of every image in nats, from 0 to 87: probabilities of 0 count as 1.2e-38.

    Returns:
        Tensor[n] float64; its mean is the NLL of the set.
    """
    check_labelled(probabilities, labels)
    return -_log(probabilities).gather(1, labels[:, None]).squeeze(1)


def _log(probabilities: Tensor) -> Tensor:
    """Logarithms in float64 of what float32 can hold: a softmax that rounds to 0 has no logarithm."""
    return probabilities.double().clamp_min(torch.finfo(torch.float32).tiny).log()


class Reliability(NamedTuple):
    """A reliability diagram: what images of similar confidence were right in. Empty bins are left out.

    Attributes:
        confidence: Tensor[bins] float64, mean confidence of the images of a bin.
        accuracy: Tensor[bins] float64, share of them whose decision is right.
        images: Tensor[bins] int64, how many they are.
    """

    confidence: Tensor
    accuracy: Tensor
    images: Tensor

    @property
    def error(self) -> float:
        """Expected calibration error in [0, 1]: mean of |accuracy - confidence| over the images."""
        share = self.images / self.images.sum()
        return float((share * (self.accuracy - self.confidence).abs()).sum())


def reliability(confidence: Tensor, right: Tensor, bins: int = 15, binning: Binning = "width") -> Reliability:
    """Bins of a reliability diagram (DeGroot and Fienberg 1983; Guo et al. 2017, figure 4).

    Args:
        confidence: floating-point Tensor[n] in [0, 1], the largest probability of every image.
        right: bool Tensor[n], whether its decision is right.
        bins: number of bins, at least 1.
        binning: "width" divides [0, 1] into equal intervals, closed on the left, and the last on both sides; "mass"
            divides at quantiles of the confidences, interpolated as by `numpy.quantile`, so that bins have equally many
            images as far as ties allow: images of equal confidence share a bin, whatever their order
            (as scikit-learn's `calibration_curve` with strategy "quantile").

    Returns:
        The bins that have images, on the CPU.

    Raises:
        ConfigError: wrong shapes, no images, confidences outside [0, 1] or NaN, fewer than one bin.
    """
    check_choice("binning", binning, Binning)
    _check_bins(confidence, right, bins)
    values = confidence.double().cpu()
    if binning == "width":
        inner = torch.linspace(0, 1, bins + 1, dtype=torch.float64)[1:-1]
        place = torch.bucketize(values, inner, right=True)
    else:
        inner = torch.from_numpy(np.quantile(values.numpy(), np.linspace(0, 1, bins + 1)[1:-1]))
        place = torch.bucketize(values, inner)
    images = torch.bincount(place, minlength=bins)
    confidences = torch.bincount(place, values, minlength=bins)
    hits = torch.bincount(place, right.double().cpu(), minlength=bins)
    there = images > 0
    return Reliability(confidences[there] / images[there], hits[there] / images[there], images[there])


def _check_bins(confidence: Tensor, right: Tensor, bins: int) -> None:
    check_values("confidence", confidence)
    check_whole("bins", bins, least=1)
    if right.dtype != torch.bool or right.shape != confidence.shape:
        raise ConfigError(
            f"right is {right.dtype} of shape {tuple(right.shape)}; give a bool Tensor[{len(confidence)}]"
        )
    low, high = float(confidence.min()), float(confidence.max())
    if low < 0 or high > 1 + 1e-3:  # as `check_probabilities` allows
        raise ConfigError(f"confidence lies in {low:g}..{high:g}; give the largest probabilities")


def calibration_error(confidence: Tensor, right: Tensor, bins: int = 15, binning: Binning = "width") -> float:
    """Expected calibration error in [0, 1]: |accuracy - confidence| of a bin, averaged over the images.

    "width" is Guo et al. (2017), eq. 3, by torchmetrics, as `residrop.evaluate` has it (a confidence of exactly 1 has
    a bin of its own there); "mass" takes the bins of `reliability` with equally many images (Nixon et al. 2019), which
    resolve confidences where most of them are. Both are biased upwards where bins have few images.

    Args and errors are those of `reliability`.
    """
    if binning != "width":
        return reliability(confidence, right, bins, binning).error
    _check_bins(confidence, right, bins)
    with extra("train"):
        from torchmetrics.functional.classification import binary_calibration_error

    confidence = confidence.clamp(0, 1)  # a mean of rounded probabilities may be above; then 1 / (1 + exp(-x)) is taken
    return float(binary_calibration_error(confidence, right.long(), n_bins=bins, validate_args=False))


def check_temperature(temperature: float) -> None:
    """ConfigError unless this is a finite number above 0."""
    if not is_number(temperature) or not 0 < temperature < math.inf:
        raise ConfigError(f"temperature is {temperature!r}; give a finite number above 0 (1 changes nothing)")


def with_temperature(probabilities: Tensor, temperature: float) -> Tensor:
    """Probabilities p^(1/T) / sum of p^(1/T): softmax(logits / T) of a pass whose softmax is p.

    Guo et al. (2017), eq. 9. The mean of sampled passes has no logits; its log probabilities take their place ("pool
    then calibrate", Rahaman and Thiery 2021). Decisions stay as they are. T above 1 makes probabilities less sure.

    Args:
        probabilities: Tensor[n, classes].
        temperature: T, a finite number above 0.

    Returns:
        Tensor[n, classes] of the same type; for T = 1 the same values.

    Raises:
        ConfigError: bad probabilities, or a temperature that is not above 0 or not finite.
    """
    check_probabilities(probabilities)
    check_temperature(temperature)
    if temperature == 1:
        return probabilities
    return torch.softmax(_log(probabilities) / temperature, dim=1).to(probabilities.dtype)


def fit_temperature(probabilities: Tensor, labels: Tensor) -> float:
    """The temperature whose probabilities (`with_temperature`) have the smallest NLL on labelled images.

    Guo et al. (2017), section 4.2. The NLL is convex in 1/T, so a bounded scalar search over log T finds its minimum
    within `TEMPERATURES`. Fit on images that are neither trained nor tested on.

    Raises:
        ConfigError: bad arguments, or no image is decided wrongly: then smaller temperatures are better without end,
            and the images say nothing about the right one.
    """
    check_labelled(probabilities, labels)
    log = _log(probabilities)
    chosen = log.gather(1, labels[:, None])
    if bool((chosen.squeeze(1) >= log.amax(1)).all()):
        raise ConfigError(
            f"all decisions on the {len(labels)} images to fit on are right, so that no temperature is the best; give "
            "more labelled images"
        )
    with extra("train"):
        from scipy.optimize import minimize_scalar

    margins = log - chosen  # log p of all classes relative to the label's: its NLL is their logsumexp

    def loss(log_temperature: float) -> float:
        return float(torch.logsumexp(margins / math.exp(log_temperature), dim=1).mean())

    bounds = tuple(map(math.log, TEMPERATURES))
    found: Any = minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-6})
    return math.exp(float(found.x))
