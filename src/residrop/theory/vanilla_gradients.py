"""Proposition 1 on Vanilla networks of finite width: the growth of gradients, by simulation (Hayou & Ayed, Table 1)."""

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from residrop.common.checks import check_whole
from residrop.common.errors import ConfigError
from residrop.schedule.sampler import derive_key
from residrop.theory.gradients import Growth, checked, summary_of

__all__ = ["measure_growth"]

_NUMBERS = 1 << 22  # kept of one batch of simulated networks, twice: 32 MiB
_SERIAL = (1 << 15) - 1  # numbers in a tensor that PyTorch works on with one thread: small operations gain from no more


def _stored_forward(
    alive: Tensor, start: int, branch: float, normal: Callable[[], Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Forward of m Vanilla networks: for blocks above `start`, relu(y) at length 1 and the normal part of W relu(y).

    Args:
        alive: float32 Tensor[m, L], delta.
        start: blocks 1 to `start` are not asked for.
        branch: standard deviation of an entry of W, times the factor of the branch.
        normal: makes a standard normal Tensor[m, N].
    """
    units: list[Tensor] = []
    images: list[Tensor] = []
    y = normal()
    for number, delta in enumerate(alive.unbind(dim=1)):
        hidden = F.relu(y)
        size = hidden.norm(dim=1, keepdim=True)
        empty = size == 0.0  # narrow networks only: all units of a row are off
        size = size.masked_fill(empty, 1.0)
        image = normal()
        if number >= start:
            units.append(hidden / size)
            images.append(image)
        # y + delta W relu(y), divided by the size: all of it is homogeneous, so no depth overflows
        y = torch.addcmul(y / size, (branch * delta)[:, None].masked_fill(empty, 0.0), image)
    return units, images


def _log_ratios(alive: Tensor, start: int, branch: float, normal: Callable[[], Tensor]) -> Tensor:
    """log ||grad y_l||^2 / ||grad y_L||^2 for l = start..L, float64 Tensor[m, L - start + 1]; see `measure_growth`."""
    units, images = _stored_forward(alive, start, branch, normal)
    g = normal()
    g = g / g.norm(dim=1, keepdim=True)
    logs = [alive.new_zeros(len(alive), dtype=torch.float64)]
    for delta, unit, image in zip(alive[:, start:].unbind(dim=1)[::-1], units[::-1], images[::-1], strict=True):
        on = unit > 0.0
        fresh = normal() * on
        along = ((image * g).sum(dim=1) - (fresh * unit).sum(dim=1))[:, None]
        g = torch.addcmul(g, (branch * delta)[:, None], torch.addcmul(fresh, along, unit))
        squared = g.square().sum(dim=1, keepdim=True)
        logs.append(logs[-1] + squared[:, 0].double().log())
        g = g * squared.rsqrt()
    return torch.stack(logs[::-1], dim=1)


def _masks(rates: Tensor, level: int, gain: float, rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Masks in which blocks above `level` are present more often than they should be, and the log weights of that."""
    tilted = rates.clone()
    above = rates[level:]
    tilted[level:] = above * (1.0 + gain) / (1.0 + gain * above)
    alive = torch.rand(rows, len(rates), generator=generator, dtype=torch.float64) < tilted
    present = torch.where(rates > 0.0, rates / tilted.clamp_min(1e-300), 1.0)
    absent = torch.where(rates < 1.0, (1.0 - rates) / (1.0 - tilted).clamp_min(1e-300), 1.0)
    return alive.float(), torch.where(alive, present, absent).log().sum(dim=1)


def measure_growth(
    rates: Sequence[float],
    *,
    width: int = 512,
    stable: bool = False,
    samples: int = 500,
    levels: Sequence[int] | None = None,
    seed: int = 0,
) -> Growth:
    """q_l of Vanilla networks of finite width at initialisation, by Monte Carlo over weights, masks and data.

    Every sample is a network of its own: fresh weights, mask, input and output vector. Without approximation:

    - Of W_l only W_l h, h = relu(y_{l-1}), and W_l^T g matter. Given W_l h, which is N(0, 2 ||h||^2 / N) in every unit,
      the rest of W_l is still Gaussian, so W_l^T g = h (W_l h, g) / ||h||^2 + (1 - h h^T / ||h||^2) v, where v is
      N(0, 2 ||g||^2 / N) in every unit. That is the law of the network, from 2 N random numbers a block instead of N^2.
    - The ratio does not change with the scale of y_0 or of the gradient. y_0 = W_0 x is Gaussian for every x, and
      grad y_L is W_out^T times the derivative of the loss by the one output, so neither input nor loss enters.
    - q is carried by rare masks with many blocks, which plain draws miss (at rate 0.5 and L = 50, the variance of one
      sample is 193 q_0^2). So blocks above l are drawn with the odds of p_k times 1 + s^2 (s is the factor of the
      branch: 1, or 1/sqrt(L)), and samples are weighted by the ratio of probabilities: the mean is that of the masks
      of `rates`. Blocks up to l have their own rates. Samples of different l are independent.

    Standard errors are of the mean of the weighted samples. The bias of a rate that comes from its root is of second
    order in its error.

    Args:
        rates: survival rates p_1, ..., p_L in [0, 1].
        width: N.
        stable: whether branches carry 1 / sqrt(L).
        samples: independent samples for every level, at least 2.
        levels: the l, from 0 to L - 1; None is about ten of them, 0 and every ceil(L / 10)-th. Each costs the same.
        seed: of everything; the result of one level does not depend on which others are asked for.

    Raises:
        ConfigError: rates as in `growth`, a level outside 0..L-1, or numbers that are not whole or too small.
    """
    p = torch.tensor(checked(rates), dtype=torch.float64)
    blocks = len(p)
    check_whole("width", width, least=1)
    check_whole("samples", samples, least=2)
    check_whole("seed", seed)
    levels = tuple(range(0, blocks, -(-blocks // 10)) if levels is None else levels)
    for level in levels:
        if check_whole("a level", level, least=0) >= blocks:
            raise ConfigError(f"level {level} was given for {blocks} blocks; levels are 0 to {blocks - 1}")
    gain = 1.0 / blocks if stable else 1.0
    branch = math.sqrt(2.0 * gain / width)
    at_once = max(1, min(_SERIAL // width, _NUMBERS // (blocks * width)))
    columns: list[Tensor] = []
    for level in levels:
        generator = torch.Generator().manual_seed(derive_key(seed, level))
        found: list[Tensor] = []
        for begin in range(0, samples, at_once):
            rows = min(at_once, samples - begin)
            alive, weights = _masks(p, level, gain, rows, generator)
            normal = partial(torch.randn, rows, width, generator=generator)
            found.append(_log_ratios(alive, level, branch, normal)[:, 0] + weights)
        columns.append(torch.cat(found))
    return summary_of(levels, blocks, torch.stack(columns, dim=1) if columns else p.new_zeros(samples, 0))
