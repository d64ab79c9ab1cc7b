"""Standard errors of any statistic over images, by drawing images again with replacement (Efron 1979)."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from residrop.common.checks import check_whole
from residrop.schedule.sampler import derive_key

__all__ = ["bootstrap", "resamples", "standard_error"]

_PURPOSE = 21  # first word of the seeds: another purpose has other draws


def bootstrap(
    statistic: Callable[[Tensor], float | Sequence[float]], images: int, *, repetitions: int = 200, seed: int = 0
) -> Tensor:
    """Values of a statistic on sets of images drawn with replacement.

    Two statistics under one seed see the same sets: the standard deviation of their differences is the standard error
    of a paired comparison.

    Args:
        statistic: from the numbers of the images drawn, int64 Tensor[images] on the CPU, to one or several numbers.
        images: how many there are, at least 1.
        repetitions: sets to draw, at least 2.
        seed: the same seed draws the same sets.

    Returns:
        Tensor[repetitions] float64, or Tensor[repetitions, numbers] of a statistic of several.

    Raises:
        ConfigError: fewer images or repetitions.
    """
    return torch.tensor([statistic(one) for one in resamples(images, repetitions, seed)], dtype=torch.float64)


def resamples(images: int, repetitions: int, seed: int) -> Iterator[Tensor]:
    """Numbers of images drawn with replacement, int64 Tensor[images], so many times; see `bootstrap`."""
    check_whole("images", images, least=1)
    check_whole("repetitions", repetitions, least=2)
    generator = torch.Generator().manual_seed(derive_key(_PURPOSE, seed) >> 1)
    for _ in range(repetitions):
        yield torch.randint(images, (images,), generator=generator)


def standard_error(
    statistic: Callable[[Tensor], float | Sequence[float]], images: int, *, repetitions: int = 200, seed: int = 0
) -> Tensor:
    """Standard deviation of `bootstrap` over its sets: Tensor[] float64, or Tensor[numbers]. Arguments are the same."""
    return bootstrap(statistic, images, repetitions=repetitions, seed=seed).std(0)
