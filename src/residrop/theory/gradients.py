"""How gradients grow on their way back through the blocks (Hayou & Ayed, Prop. 1, Table 1, Figure 2).

q_l = E[ ||grad_{y_l} loss||^2 / ||grad_{y_L} loss||^2 ], where y_l is what block l gives and y_0 what block 1 is given;
the rate of growth between l and L is q_l^(1/(L-l)). In wide Vanilla networks at initialisation every block multiplies q
by 1 + p_l, in Stable ones by 1 + p_l / L: that is `growth` and `growth_rates`. `measure_growth` looks whether it is
true at a given width (`residrop.theory.vanilla_gradients`), `gradient_growth` measures any model with rules.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from residrop.blocks.attach import rules_of
from residrop.blocks.skippable import Skippable
from residrop.common.checks import check_rate, check_whole
from residrop.common.errors import ConfigError
from residrop.rules.base import Rule
from residrop.schedule.sampler import derive_key
from residrop.schedule.survival import parse
from residrop.theory.gates import check_independent, gated, kept_as_is

__all__ = ["Growth", "gradient_growth", "growth", "growth_rates"]

Loss = Callable[[Tensor, Tensor], Tensor]


class Growth(NamedTuple):
    """Measured growth of gradients.

    Attributes:
        levels: the l that follow, each below L.
        q: float64 Tensor[len(levels)], q_l; infinite where float64 ends, while the rates are right.
        q_error: float64, standard errors of q.
        rates: float64, q_l^(1/(L-l)).
        rates_error: float64, standard errors of the rates by the delta method: rate * (q_error / q) / (L - l).
        samples: number of independent samples behind every q_l.
    """

    levels: tuple[int, ...]
    q: Tensor
    q_error: Tensor
    rates: Tensor
    rates_error: Tensor
    samples: int


# Prediction


def checked(rates: Sequence[float]) -> list[float]:
    """The rates as floats; ConfigError if there are none, or one is outside [0, 1]."""
    if len(rates) == 0:
        raise ConfigError("no survival rates were given; give one per block")
    return [check_rate(f"survival rate {number}", rate) for number, rate in enumerate(rates, start=1)]


def growth(rates: Sequence[float], *, stable: bool = False) -> tuple[float, ...]:
    """Proposition 1: q_l = prod_{k=l+1..L} (1 + p_k), l = 0..L; in Stable networks prod (1 + p_k / L).

    It holds at initialisation, in the limit of infinite width. q_L is 1; numbers above 1.8e308 are infinite.

    >>> growth([0.5, 1.0])
    (3.0, 2.0, 1.0)

    Args:
        rates: survival rates p_1, ..., p_L in [0, 1].
        stable: whether branches carry 1 / sqrt(L).

    Raises:
        ConfigError: no rates, or one outside [0, 1].
    """
    blocks = len(checked(rates))
    share = 1.0 / blocks if stable else 1.0
    found = [1.0]
    for rate in reversed(rates):
        found.append(found[-1] * (1.0 + share * rate))
    return tuple(found[::-1])


def growth_rates(rates: Sequence[float], *, stable: bool = False) -> tuple[float, ...]:
    """Proposition 1 per block: q_l^(1/(L-l)), the geometric mean of the factors, for l = 0..L-1 and any L.

    >>> growth_rates([0.5, 0.5])
    (1.5, 1.5)

    Args and errors as of `growth`.
    """
    blocks = len(checked(rates))
    share = 1.0 / blocks if stable else 1.0
    log, found = 0.0, []
    for above, rate in enumerate(reversed(rates), start=1):
        log += math.log1p(share * rate)
        found.append(math.exp(log / above))
    return tuple(found[::-1])


def summary_of(levels: tuple[int, ...], blocks: int, logs: Tensor) -> Growth:
    """From logarithms of samples of q_l, float64 Tensor[samples, len(levels)]."""
    count = len(logs)
    top = logs.amax(dim=0).clamp_min(-1e300)  # -inf is possible: a gradient that is zero
    scaled = (logs - top).exp()
    mean = scaled.mean(dim=0)
    error = scaled.std(dim=0) / count**0.5 if count > 1 else torch.full_like(mean, torch.nan)
    left = torch.tensor([blocks - level for level in levels], dtype=torch.float64)
    rates = ((top + mean.log()) / left).exp()
    return Growth(levels, top.exp() * mean, top.exp() * error, rates, rates * (error / mean) / left, count)


# Measurement on any model


class _Norms:
    """Squared norms of gradients, row by row, at what every rule is given and at what the last block gives.

    Tensor hooks see the gradient of a value even if somebody overwrites it in place afterwards.
    """

    def __init__(self, model: nn.Module, rules: list[Rule], rows: int) -> None:
        self.rows, self.count = rows, len(rules)
        self.last: Tensor | None = None
        self.first: Tensor | None = None
        self.norms: dict[int, Tensor] = {}
        self.handles: list[Any] = [
            rule.register_forward_pre_hook(partial(self.given, number)) for number, rule in enumerate(rules)
        ]
        self.handles.append(rules[-1].register_forward_hook(self.combined))
        self.handles.append(_owner(model, rules[-1]).register_forward_hook(self.gives))

    def given(self, level: int, rule: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        x: Tensor = args[0]
        changed = not x.requires_grad
        if changed:
            x = x.detach().requires_grad_()
        if level == 0 and self.first is None:
            self.first = x
        self.watch(level, x)
        return (x, *args[1:]) if changed else None

    def combined(self, rule: nn.Module, args: tuple[Any, ...], y: Tensor) -> None:
        self.last = y

    def gives(self, block: nn.Module, args: tuple[Any, ...], output: object) -> None:
        assert self.last is not None
        tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.requires_grad]
        same = [leaf for leaf in tensors if leaf.shape == self.last.shape]
        self.watch(self.count, (same or tensors or [self.last])[0])

    def watch(self, level: int, x: Tensor) -> None:
        if x.shape[:1] != (self.rows,):
            raise ConfigError(
                f"hidden vector {level} has shape {list(x.shape)} in a batch of {self.rows} rows; gradients of "
                "rows are measured where the batch is the first dimension all the way"
            )

        norms, count = self.norms, self.count  # not self, whose `last` may be x: no collector sees that circle

        def keep(grad: Tensor) -> None:
            # of a block that runs several times the first input, which backward reaches last, and the last output
            if level < count or level not in norms:
                norms[level] = grad.detach().flatten(1).double().square().sum(dim=1)

        x.register_hook(keep)

    def stop(self) -> None:
        for handle in self.handles:
            handle.remove()


def _owner(model: nn.Module, rule: Rule) -> nn.Module:
    """The block that a rule belongs to."""
    modules = list(model.modules())
    for module in modules:
        if isinstance(module, Skippable) and any(own is rule for own, _ in module.residrop_branches()):
            return module
    return next((module for module in modules if any(child is rule for child in module.children())), rule)


def _presence(rules: list[Rule], rates: str | float | Sequence[float] | None) -> tuple[Tensor, Tensor]:
    """Probabilities of presence, and the factor of branches that are present."""
    if rates is None:
        units = [number for number, rule in enumerate(rules, start=1) if rule.rates and rule.granularity == "unit"]
        if units:
            raise ConfigError(f"rule {units[0]} tosses coins for single units, not for branches; give rates=...")
        found = tuple(rule.branch_rate(rule.rates) for rule in rules)
    else:
        found = parse(rates, len(rules))
    p = torch.tensor(found, dtype=torch.float64)
    rescaled = torch.tensor([rule.rescale == "train" for rule in rules])
    return p, torch.where(rescaled & (p > 0.0), 1.0 / p.clamp_min(1e-300), 1.0)


def _ratios(model: nn.Module, rules: list[Rule], x: Tensor, y: Tensor, loss: Loss, gates: Tensor) -> Tensor:
    """||grad y_l||^2 / ||grad y_L||^2 of every row, float64 Tensor[n, L]; NaN in rows where the latter is 0."""
    norms = _Norms(model, rules, len(x))
    try:
        with gated(model, gates):
            value = loss(model(x), y)
        if norms.first is None:
            raise ConfigError(f"the first rule of {type(model).__name__} was not run; every block has to be")
        torch.autograd.grad(value, norms.first, materialize_grads=True)
    finally:
        norms.stop()
    zero = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    table = torch.stack([norms.norms.get(level, zero) for level in range(len(rules) + 1)], dim=1)
    bad = (~table.isfinite()).any(dim=0).nonzero().flatten().tolist()
    if bad:
        where = f"what rule {bad[-1] + 1} is given" if bad[-1] < len(rules) else "the last block's output"
        raise ConfigError(
            f"the gradient at {where} is not finite: the loss, or its gradient on the way there, overflows"
        )
    return (table[:, :-1] / table[:, -1:]).masked_fill(table[:, -1:] == 0.0, torch.nan)


def gradient_growth(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    loss: Loss = F.cross_entropy,
    *,
    rates: str | float | Sequence[float] | None = None,
    passes: int = 1,
    seed: int = 0,
) -> Growth:
    """q_l of any model with rules: every input's own gradient, under masks of its own.

    y_l is what rule l + 1 is given (so what lies between two blocks, such as a pooling, counts to the lower one), y_L
    what the last block gives. Coins are tossed for each row and pass; branches of rules with rescale="train" are
    divided by p_l, as in training. Batch norm is in eval mode, as inputs must not know of each other: of an untrained
    network its running statistics say nothing. Nothing about the model changes.

    Args:
        model: a model with rules, not compiled.
        batches: pairs of input Tensor[n, ...] and target.
        loss: from output and target to Tensor[]; a sum or mean of what the rows give.
        rates: probabilities of presence, in any form that `residrop.schedule.survival.parse` reads; 1.0 is full depth,
            for comparison. None is the rules' own.
        passes: masks for every input.
        seed: of the masks.

    Returns:
        Levels 0..L-1. An input is one sample: the mean over its masks. Standard errors are those over inputs, NaN for
        one. Where the gradient at y_L is exactly zero (a loss that is saturated) there is no ratio: such draws are left
        out, and inputs without any other.

    Raises:
        ConfigError: no rules, no batch, rules of single units without `rates`, gradients that are zero for all inputs
            or not finite, or blocks that do not work on the rows of the batch; or coupled draws without `rates`.
    """
    rules = rules_of(model)
    if not rules:
        raise ConfigError(f"{type(model).__name__} has no rules; see residrop.create and residrop.apply")
    check_whole("passes", passes, least=1)
    generator = torch.Generator().manual_seed(derive_key(check_whole("seed", seed)))
    if rates is None:
        check_independent(model)
    p, factor = _presence(rules, rates)
    found: list[Tensor] = []
    with kept_as_is(model, training=False), torch.enable_grad():
        for x, y in batches:
            ratios: list[Tensor] = []
            for _ in range(passes):
                alive = torch.rand(len(x), len(rules), generator=generator, dtype=torch.float64) < p
                gates = torch.where(alive, factor, 0.0).float().to(x.device)
                ratios.append(_ratios(model, rules, x, y, loss, gates))
            found.append(torch.stack(ratios).nanmean(dim=0).cpu())
    if not found:
        raise ConfigError("no batch was given; the growth of gradients needs at least one")
    every = torch.cat(found)
    every = every[~every.isnan().any(dim=1)]
    if len(every) == 0:
        raise ConfigError("the gradient at the last block is zero for every input; give another loss or inputs")
    return summary_of(tuple(range(len(rules))), len(rules), every.log())
