"""The noise that random presence adds to a neuron, and whether it is Gaussian (Hayou & Ayed 2021, Sec. 4.2 and 6).

To first order a neuron y^i of a network with presences delta_l is y^i(p) + sum_l (delta_l - p_l) d_l, with
d_l = d y^i / d delta_l (eq. 7; d_l = mu_l / sqrt(L) in Stable networks). Theorem 2: where no d_l dominates the others
(condition 2, `condition_ratio`), this sum tends to a Gaussian with the depth. All of it is measured here on any model
with rules: samples of neurons under random masks, Shapiro-Wilk tests of them, and d_l by differentiation.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from residrop.blocks.attach import rules_of
from residrop.blocks.skippable import Skippable
from residrop.common.checks import check_rate, check_whole
from residrop.common.errors import ConfigError
from residrop.common.extras import extra
from residrop.rules.base import Rule
from residrop.schedule.sampler import derive_key
from residrop.theory.gates import check_independent, gated, kept_as_is

__all__ = [
    "Noise",
    "Uniformity",
    "block_effects",
    "condition_ratio",
    "first_order_variance",
    "neuron_samples",
    "noise",
    "shapiro",
    "uniformity",
]

Law = Literal["coins", "gaussian"]
Neurons = int | Sequence[int]


class Noise(NamedTuple):
    """What random presence does to neurons, for n inputs and k neurons of every block.

    Attributes:
        p_values: float64 Tensor[B, n, k], Shapiro-Wilk p-values of samples under masks, for the output of each of B
            blocks (Figure 5); NaN where there is nothing to test (`shapiro`).
        ratio: float64 Tensor[n, k], condition 2 for neurons of the last block (Figure 4).
        variance: float64 Tensor[n, k], of the samples of these.
        first_order: float64 Tensor[n, k], `first_order_variance` of these, expanded at delta = 1 as in the paper.
        first_order_at_mean: the same, expanded at delta = p.
    """

    p_values: Tensor
    ratio: Tensor
    variance: Tensor
    first_order: Tensor
    first_order_at_mean: Tensor


class Uniformity(NamedTuple):
    """How far p-values are from uniform, as they are where the hypothesis holds.

    Attributes:
        rejected: share of p-values below 0.05; 0.05 under the hypothesis.
        distance: Kolmogorov-Smirnov distance to the uniform law, in [0, 1].
        tests: number of p-values, those that are NaN left out; with none, the other two are NaN.
    """

    rejected: float
    distance: float
    tests: int


def noise(
    model: nn.Module,
    x: Tensor,
    *,
    masks: int = 200,
    neurons: Neurons = 1,
    rates: Sequence[float] | None = None,
    law: Law = "coins",
    seed: int = 0,
    chunk: int = 2048,
) -> Noise:
    """All measurements of this module on one model. Arguments as in `neuron_samples`, of which it is built."""
    rates = _rates_of(model, rates)
    samples = neuron_samples(model, x, masks=masks, neurons=neurons, rates=rates, law=law, seed=seed, chunk=chunk)
    at_one = block_effects(model, x, neurons=neurons, rates=rates, seed=seed)
    at_mean = block_effects(model, x, neurons=neurons, rates=rates, at=rates, seed=seed)
    return Noise(
        shapiro(samples),
        condition_ratio(at_one),
        samples[-1].var(dim=-1),
        first_order_variance(at_one, rates),
        first_order_variance(at_mean, rates),
    )


# Samples


def neuron_samples(
    model: nn.Module,
    x: Tensor,
    *,
    masks: int = 200,
    neurons: Neurons = 1,
    rates: Sequence[float] | None = None,
    law: Law = "coins",
    seed: int = 0,
    chunk: int = 2048,
) -> Tensor:
    """Some neurons of the output of every block, for each input under random masks of its own.

    Batch norm is in eval mode. A present branch counts 1, or 1/p under a rule with `rescale="train"`. Nothing about the
    model changes, and no global random state is read or moved; results do not depend on `chunk`, but for rounding.

    Args:
        model: a model with rules, of `residrop.create` or after `residrop.apply`; first dimension of all is the batch.
        x: Tensor[n, ...].
        masks: masks for each input, at least 3.
        neurons: how many, at random places (that differ from block to block, and are the same for one `seed`), or the
            places in the flattened output of a row.
        rates: survival rate of every rule; None is those of the rules.
        law: "coins", or "gaussian" numbers of the same mean and variance, as `residrop.GaussianDepth` draws them.
        seed: of masks and neurons.
        chunk: rows that go through the model together; a row is an (input, mask) pair.

    Returns:
        float64 Tensor[B, n, k, masks] on the CPU for B blocks: one for each module with rules, input to output.

    Raises:
        ConfigError: no blocks with rules, an argument out of range, or neurons that a block does not have.
    """
    check_whole("masks", masks, least=3)
    check_whole("chunk", chunk, least=1)
    if law not in ("coins", "gaussian"):
        raise ConfigError(f"law is {law!r}; choose 'coins' or 'gaussian'")
    p = torch.tensor(_rates_of(model, rates), dtype=torch.float64)
    generator = torch.Generator().manual_seed(derive_key(seed, 1) >> 1)
    shape = (len(x) * masks, len(p))
    if law == "coins":
        drawn = (torch.rand(shape, generator=generator, dtype=torch.float64) < p).double()
    else:
        drawn = p + (p * (1.0 - p)).sqrt() * torch.randn(shape, generator=generator, dtype=torch.float64)
    drawn = (drawn * _gains(model, p)).float()
    blocks, chosen = _blocks_of(model), _Chosen(neurons, seed)
    parts: list[list[Tensor]] = [[] for _ in blocks]

    def keep(number: int, output: Tensor) -> None:
        parts[number].append(chosen.of(number, output).double().cpu())

    with kept_as_is(model, training=False), torch.no_grad(), _watched(blocks, keep):
        for rows in torch.arange(len(drawn)).split(chunk):
            with gated(model, drawn[rows].to(x.device)):
                model(x[(rows // masks).to(x.device)])
    if any(sum(map(len, part)) != len(drawn) for part in parts):
        raise ConfigError(
            f"a block of {type(model).__name__} does not run on the whole batch once a pass; give a model whose do"
        )
    return torch.stack([torch.cat(part).unflatten(0, (len(x), masks)).movedim(1, 2) for part in parts])


def _rates_of(model: nn.Module, rates: Sequence[float] | None) -> tuple[float, ...]:
    rules = rules_of(model)
    if rates is None:
        check_independent(model)
        return tuple(rule.branch_rate(rule.rates) for rule in rules)
    if len(rates) != len(rules):
        raise ConfigError(f"{len(rates)} rates were given for {len(rules)} rules; give one per rule")
    return tuple(check_rate(f"rate {number}", rate) for number, rate in enumerate(rates, start=1))


def _gains(model: nn.Module, p: Tensor) -> Tensor:
    """What a present branch counts in training: float64 Tensor[L]."""
    rescaled = torch.tensor([rule.rescale == "train" for rule in rules_of(model)])
    return torch.where(rescaled & (p > 0), 1.0 / p, 1.0)


def _blocks_of(model: nn.Module) -> Sequence[nn.Module]:
    found = [m for m in model.modules() if isinstance(m, Skippable) and any(isinstance(r, Rule) for r in m.modules())]
    if not found:
        raise ConfigError(
            f"{type(model).__name__} has no blocks with rules; build them with residrop.Residual, or use residrop.apply"
        )
    return found


class _Chosen:
    """Neurons of every block, the same at each call."""

    def __init__(self, neurons: Neurons, seed: int) -> None:
        self.neurons, self.seed = neurons, seed
        self.places: dict[int, Tensor] = {}

    def of(self, number: int, output: Tensor) -> Tensor:
        """Tensor[n, k] of the output Tensor[n, ...] of block `number`."""
        flat = output.flatten(1)
        if number not in self.places:
            self.places[number] = self._choose(number, flat.shape[1])
        return flat[:, self.places[number].to(flat.device)]

    def _choose(self, number: int, units: int) -> Tensor:
        if isinstance(self.neurons, int):
            generator = torch.Generator().manual_seed(derive_key(self.seed, 2, number) >> 1)
            places = torch.randperm(units, generator=generator)[: self.neurons]
            wanted = self.neurons
        else:
            places = torch.tensor([place for place in self.neurons if 0 <= place < units], dtype=torch.long)
            wanted = len(self.neurons)
        if wanted < 1 or len(places) != wanted:
            raise ConfigError(
                f"neurons is {self.neurons!r}, and a row of block {number + 1} has {units}; give 1 to {units}, or "
                f"places from 0 to {units - 1}"
            )
        return places


@contextmanager
def _watched(blocks: Sequence[nn.Module], tell: Callable[[int, Tensor], None]) -> Iterator[None]:
    """Inside, what each block gives is told."""

    def hook(number: int, module: nn.Module, args: Any, output: Any) -> None:
        tell(number, next(leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)))

    with ExitStack() as stack:
        for number, block in enumerate(blocks):
            stack.callback(block.register_forward_hook(partial(hook, number)).remove)
        yield


# Tests


def shapiro(samples: Tensor) -> Tensor:
    """p-values of the Shapiro-Wilk test of normality along the last dimension (Shapiro & Wilk 1965; scipy).

    Args:
        samples: Tensor[..., m], 3 <= m <= 5000 (beyond, p-values are unreliable).

    Returns:
        float64 Tensor[...], in [0, 1]; NaN where samples are all equal (no noise) or one of them is not finite.
    """
    if samples.ndim == 0 or not 3 <= samples.shape[-1] <= 5000:
        raise ConfigError(f"samples are Tensor{list(samples.shape)}; give 3 to 5000 along the last dimension")
    values = samples.detach().double().cpu().numpy()
    found = np.full(values.shape[:-1], np.nan)
    testable = np.isfinite(values).all(axis=-1) & (np.ptp(np.nan_to_num(values), axis=-1) > 0)
    if testable.any():
        with extra("theory"):
            from scipy import stats
        centred = values[testable] - values[testable].mean(axis=-1, keepdims=True)
        scale = np.abs(centred).max(axis=-1, keepdims=True)  # the test is free of scale, its arithmetic is not
        found[testable] = stats.shapiro(centred / scale, axis=-1).pvalue  # pyright: ignore[reportCallIssue]
    return torch.from_numpy(found)


def uniformity(p_values: Tensor) -> Uniformity:
    """How far p-values, Tensor[...] of any shape, are from uniform: those of one layer, say, or of one epoch."""
    values = p_values[~p_values.isnan()].double().numpy().ravel()
    if len(values) == 0:
        return Uniformity(float("nan"), float("nan"), 0)
    with extra("theory"):
        from scipy import stats
    return Uniformity(float((values < 0.05).mean()), float(stats.kstest(values, "uniform").statistic), len(values))


# First order


def block_effects(
    model: nn.Module,
    x: Tensor,
    *,
    neurons: Neurons = 1,
    rates: Sequence[float] | None = None,
    at: Sequence[float] | None = None,
    seed: int = 0,
) -> Tensor:
    """d_l = d y^i / d delta_l for neurons i of the last block's output, by one backward pass a neuron.

    With the same `neurons` and `seed` they are the last ones of `neuron_samples`.

    Args:
        model: as in `neuron_samples`.
        x: Tensor[n, ...].
        neurons: as in `neuron_samples`.
        rates: as in `neuron_samples`; they count under `rescale="train"` only.
        at: delta around which to expand, one number per rule; None is 1 (the paper).
        seed: of neurons.

    Returns:
        float64 Tensor[n, k, L] on the CPU for L rules.
    """
    p = torch.tensor(_rates_of(model, rates), dtype=torch.float64)
    centre = torch.ones_like(p) if at is None else torch.tensor(_rates_of(model, at), dtype=torch.float64)
    gains = _gains(model, p)
    blocks, chosen = _blocks_of(model), _Chosen(neurons, seed)
    found: list[Tensor] = []

    def keep(number: int, output: Tensor) -> None:
        if number == len(blocks) - 1:
            found[:] = chosen.of(number, output).unbind(dim=1)

    with kept_as_is(model, training=False), torch.enable_grad(), _watched(blocks, keep):
        gates = (centre * gains).float().to(x.device).expand(len(x), -1).clone().requires_grad_()
        with gated(model, gates):
            model(x)
        columns = [torch.autograd.grad(neuron.sum(), gates, retain_graph=True)[0] for neuron in found]
    return torch.stack(columns, dim=1).double().cpu() * gains


def condition_ratio(effects: Tensor) -> Tensor:
    """max_l d_l^2 / sum_l d_l^2 over the last dimension (Theorem 2, condition 2): 1/L at least, 1 at most; NaN for 0/0.

    Args:
        effects: Tensor[..., L], of `block_effects`. A factor common to all l, as 1 / sqrt(L), cancels.
    """
    squares = (effects / effects.abs().amax(dim=-1, keepdim=True)).square()
    return squares.amax(dim=-1) / squares.sum(dim=-1)


def first_order_variance(effects: Tensor, rates: Sequence[float]) -> Tensor:
    """sum_l p_l (1 - p_l) d_l^2 over the last dimension: the variance of the noise to first order.

    It is the v of Theorem 2 as a direct sum up to the block that `effects` belong to, factor 1 / L included.

    Args:
        effects: Tensor[..., L], of `block_effects`.
        rates: survival rates p_l.
    """
    if len(rates) != effects.shape[-1]:
        raise ConfigError(f"{len(rates)} rates were given for {effects.shape[-1]} rules; give one per rule")
    p = torch.tensor(list(rates), dtype=torch.float64)
    return (p * (1.0 - p) * effects.double().square()).sum(dim=-1)
