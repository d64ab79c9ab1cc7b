"""Sets of classes that hold the right one as often as promised: split conformal prediction.

A nonconformity E(x, y) says how badly class y suits an image; the set of an image is all classes with E at most a
threshold, and the threshold is a quantile of E(x, label) over n images kept for it. If these and later images are
exchangeable, a set holds the label with probability at least `coverage`, over both (Vovk et al. 2005). Given the n
images it is Beta(k, n + 1 - k) distributed with k = ceil((n + 1) coverage), where no two E are equal: 0.9 promised with
n = 100 gives 0.84 to 0.95 in nine of ten cases.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from residrop.common.checks import check_choice, check_whole, is_number
from residrop.common.errors import ConfigError
from residrop.inference.uncertainty.inputs import check_labelled, check_probabilities
from residrop.schedule.sampler import derive_key

__all__ = ["METHODS", "Conformal", "Method", "fit_conformal", "nonconformity"]

Method = Literal["thr", "aps", "raps"]
METHODS: tuple[Method, ...] = get_args(Method)
_FITTED, _LATER = 31, 32  # first words of the seeds: images to fit on and later ones have unrelated random numbers


def nonconformity(
    probabilities: Tensor, method: Method, uniform: Tensor, penalty: float = 0.01, free: int = 5
) -> Tensor:
    """How badly every class suits every image.

    - "thr": 1 - p(y), Sadinle, Lei and Wasserman (2019): the smallest sets on average.
    - "aps": sum of the probabilities above p(y), + U p(y), Romano, Sesia and Candes (2020), with U uniform in [0, 1):
      sets grow with the difficulty of an image.
    - "raps": the same + penalty * max(rank of y - free, 0), ranks from 1, Angelopoulos et al. (2021): without the long
      tail of unlikely classes.

    Of equal probabilities the class of the lower number ranks first.

    Args:
        probabilities: Tensor[n, classes].
        method: see above.
        uniform: Tensor[n], U of every image ("thr" has no use for it).
        penalty: of raps, lambda in the paper; at least 0.
        free: of raps, the ranks without a penalty, k_reg in the paper; at least 0.

    Returns:
        Tensor[n, classes] float64.

    Raises:
        ConfigError: bad probabilities or settings.
    """
    check_probabilities(probabilities)
    _check_settings(method, penalty, free)
    p = probabilities.double()
    if method == "thr":
        return 1 - p
    falling, order = p.sort(dim=1, descending=True, stable=True)
    above = falling.cumsum(1) - falling
    scores = above + uniform.to(p)[:, None] * falling
    if method == "raps":
        rank = torch.arange(1, p.shape[1] + 1, device=p.device)
        scores = scores + penalty * (rank - free).clamp_min(0)
    return torch.empty_like(scores).scatter_(1, order, scores)


def _check_settings(method: str, penalty: float, free: int) -> None:
    check_choice("method", method, Method)
    check_whole("free", free, least=0)
    if not is_number(penalty) or not 0 <= penalty < math.inf:
        raise ConfigError(f"penalty is {penalty!r}; give a finite number of at least 0")


def _uniform(images: int, first: int, *words: int) -> Tensor:
    """Numbers in [0, 1) as functions of the words and the number of an image alone: batches do not matter."""
    return torch.tensor([derive_key(*words, first + i) / 2**64 for i in range(images)], dtype=torch.float64)


@dataclass(frozen=True)
class Conformal:
    """A fitted conformal predictor.

    Attributes:
        method: see `nonconformity`.
        coverage: the promise, in (0, 1).
        threshold: the largest nonconformity of a class in a set; infinite (all classes) where too few images were there
            for the promise.
        images: how many it was fitted on.
        seed: of the random numbers of aps and raps.
        penalty: of raps.
        free: of raps.
    """

    method: Method
    coverage: float
    threshold: float
    images: int
    seed: int = 0
    penalty: float = 0.01
    free: int = 5

    def sets(self, probabilities: Tensor, first: int = 0) -> Tensor:
        """bool Tensor[n, classes], which classes are in the set of an image.

        A set may be empty: then even the likeliest class suits the image worse than the threshold allows.

        Args:
            probabilities: Tensor[n, classes], made as those it was fitted on.
            first: number of the first image, where they come in several batches.

        Raises:
            ConfigError: bad probabilities.
        """
        uniform = _uniform(len(probabilities), first, _LATER, self.seed)
        return nonconformity(probabilities, self.method, uniform, self.penalty, self.free) <= self.threshold

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON values; an infinite threshold is None."""
        return {**asdict(self), "threshold": self.threshold if math.isfinite(self.threshold) else None}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Conformal":
        """The predictor that `to_dict` described; ConfigError if it is none."""
        try:
            found = cls(**{**values, "threshold": math.inf if values["threshold"] is None else values["threshold"]})
            _check_settings(found.method, found.penalty, found.free)
            _check_coverage(found.coverage)
            if not all(is_number(one) for one in (found.threshold, found.images, found.seed)):
                raise TypeError("no number where one belongs")
        except (TypeError, KeyError, ConfigError) as error:
            raise ConfigError(f"this describes no conformal predictor ({error}); fit it anew") from None
        return found


def fit_conformal(
    probabilities: Tensor,
    labels: Tensor,
    coverage: float = 0.9,
    method: Method = "thr",
    *,
    seed: int = 0,
    penalty: float = 0.01,
    free: int = 5,
) -> Conformal:
    """Fit the threshold of conformal sets on labelled images that were neither trained nor chosen on.

    It is the k-th smallest nonconformity of a label, k = ceil((n + 1) coverage): infinite for n < coverage / (1 -
    coverage), such as 9 images for 0.9.

    Args:
        probabilities: Tensor[n, classes]. The promise needs them to be made without the labels, so before
            `fit_temperature` on the same images.
        labels: int64 Tensor[n].
        coverage: the promise, in (0, 1).
        method: see `nonconformity`.
        seed: of the random numbers of aps and raps, which are functions of it and the number of an image.
        penalty: of raps.
        free: of raps.

    Raises:
        ConfigError: bad arguments.
    """
    check_labelled(probabilities, labels)
    _check_coverage(coverage)
    uniform = _uniform(len(labels), 0, _FITTED, seed)
    every = nonconformity(probabilities, method, uniform, penalty, free)
    found = every.gather(1, labels[:, None]).squeeze(1).sort().values
    place = math.ceil((len(found) + 1) * coverage * (1 - 1e-12))  # 10 * 0.9 is 9, also where it rounds to more
    threshold = float(found[place - 1]) if place <= len(found) else math.inf
    return Conformal(method, float(coverage), threshold, len(found), seed, float(penalty), free)


def _check_coverage(coverage: Any) -> None:
    if not is_number(coverage) or not 0 < coverage < 1:
        raise ConfigError(f"coverage is {coverage!r}; give a number between 0 and 1, such as 0.9")
