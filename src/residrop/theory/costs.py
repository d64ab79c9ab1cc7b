"""What each block costs on this machine, and survival rates that spend a budget of it."""

import re
import time
from collections.abc import Callable, Iterable, Sequence
from statistics import median
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from residrop.blocks.attach import rules_of, sampler_of, using
from residrop.blocks.observe import branch_flops
from residrop.common.errors import ConfigError
from residrop.schedule import budgets
from residrop.schedule.sampler import Plan
from residrop.theory.discrepancy import discrepancy
from residrop.theory.gates import gated, kept_as_is
from residrop.theory.sensitivity import sensitivity

__all__ = ["Costs", "costs_of", "read_budget", "survival_for"]

Unit = Literal["blocks", "flops", "time"]
Mode = Literal["uniform", "linear", "sensitivity", "max_regularization"]


class Costs(NamedTuple):
    """What a training step costs.

    Attributes:
        branches: what each branch adds, one number per rule.
        fixed: what is left without any branch.
        unit: "blocks" (1 each), "flops" (of a forward) or "time" (seconds of forward and backward).
    """

    branches: tuple[float, ...]
    fixed: float
    unit: Unit

    @property
    def total(self) -> float:
        """The cost at full depth."""
        return self.fixed + sum(self.branches)


def costs_of(
    model: nn.Module,
    unit: Unit,
    x: Tensor | None = None,
    *,
    repeats: int = 5,
    tell: Callable[[], None] | None = None,
) -> Costs:
    """The cost of each branch and of the rest, for a batch.

    Time is measured: how much longer forward and backward take than without one block, block by block, taking turns, of
    each the shortest of `repeats`. A machine that does other things at all times makes it uncertain nevertheless.

    Args:
        model: a model with rules, not compiled.
        unit: see `Costs`.
        x: the batch, on the device of the model; for "flops" and "time".
        repeats: for "time".
        tell: for "time", called after each of L * `repeats` pairs of steps, for a progress bar.

    Raises:
        ConfigError: an unknown unit, no batch, or no rules.
    """
    count = len(rules_of(model))
    if unit not in ("blocks", "flops", "time") or count == 0:
        raise ConfigError(
            f"unit is {unit!r}, and {type(model).__name__} has {count} rules; choose 'blocks', 'flops' or 'time', for "
            "a model with rules"
        )
    if unit == "blocks":
        return Costs((1.0,) * count, 0.0, unit)
    if x is None:
        raise ConfigError(f"costs in {unit} are those of a batch; give one as x")
    if unit == "flops":
        branches = tuple(map(float, branch_flops(model, x)))
        counter = FlopCounterMode(display=False)
        with kept_as_is(model, training=False), torch.no_grad(), gated(model, torch.ones(count)), counter:
            model(x)
        return Costs(branches, float(counter.get_total_flops()) - sum(branches), unit)
    return _timed(model, x, count, repeats, tell)


def _timed(model: nn.Module, x: Tensor, count: int, repeats: int, tell: Callable[[], None] | None) -> Costs:
    draws = sampler_of(model).expectation().draws
    rules = rules_of(model)
    if any(rule.site.granularity != "block" or not rule.rates for rule in rules):
        raise ConfigError("time per block is measured by leaving blocks out; give every block a block-level rule")

    def step(absent: int | None) -> float:
        plan = Plan(tuple(d._replace(alive=number != absent) for number, d in enumerate(draws)))
        started = time.perf_counter()
        with using(model, plan):
            model(x).sum().backward()
        if x.device.type != "cpu":
            torch.accelerator.synchronize(x.device)
        return time.perf_counter() - started

    full: list[list[float]] = [[] for _ in range(count)]
    without: list[list[float]] = [[] for _ in range(count)]
    with kept_as_is(model, training=True), torch.enable_grad():
        step(None)
        for _ in range(repeats):
            for absent in range(count):
                full[absent].append(step(None))
                without[absent].append(step(absent))
                if tell is not None:
                    tell()
    whole = median(map(min, full))  # each the least of as many steps as below, so that neither is favoured
    branches = tuple(max(1e-9, whole - min(found)) for found in without)
    return Costs(branches, max(0.0, whole - sum(branches)), "time")


def read_budget(budget: str | float) -> tuple[float, Unit]:
    """A budget as `survival_for` takes it, as share and unit; ConfigError if it is not understood."""
    if isinstance(budget, str):
        found = re.fullmatch(r"\s*([0-9.]+)\s*(?:of\s+(blocks|flops|time))?\s*", budget.lower())
        if found is None or found[1].count(".") > 1 or found[1] == ".":
            raise ConfigError(
                f"budget {budget!r} is not understood; give a share of blocks, flops or time such as '0.6 of time'"
            )
        unit: Any = found[2] or "blocks"
        return _share(float(found[1])), unit
    return _share(float(budget)), "blocks"


def _share(value: float) -> float:
    if not 0.0 <= value <= 1.0:
        raise ConfigError(f"the budget is {value}; give a share of the full depth, in [0, 1]")
    return value


def survival_for(
    model: nn.Module,
    budget: str | float,
    rule: Mode = "uniform",
    *,
    batches: Iterable[tuple[Tensor, Tensor]] = (),
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    least: float = 0.0,
    per_cost: bool = False,
) -> tuple[float, ...]:
    """Survival rates under which a training step costs a share of the full one, on average.

    Args:
        model: a model with rules (any rates), as `residrop.create` and `residrop.apply` give it.
        budget: a share in [0, 1] of what a step at full depth costs, stem and head included: "0.6 of time" (measured
            here, forward and backward, on the first batch), "0.6 of flops", "0.6 of blocks", or a number of the latter.
        rule: how the budget is spent: "uniform"; "linear" decay; "sensitivity" (SenseMode, `theory.sensitivity`);
            "max_regularization" (Lemma 2, `theory.discrepancy`).
        batches: pairs of input and target, for all but shares of blocks with "uniform" or "linear".
        loss: for "sensitivity" and "max_regularization".
        least: smallest rate, for "sensitivity".
        per_cost: for "sensitivity", whether scores count per unit of cost.

    Returns:
        One rate per rule, to be given as `survival=` of `create` or `apply`.

    Raises:
        ConfigError: a budget or rule that is not understood, that cannot be met (the nearest is named), or no batch.
    """
    if rule not in ("uniform", "linear", "sensitivity", "max_regularization"):
        raise ConfigError(f"rule is {rule!r}; choose 'uniform', 'linear', 'sensitivity' or 'max_regularization'")
    share, unit = read_budget(budget)
    batches = list(batches)
    costs = costs_of(model, unit, batches[0][0] if batches else None)
    left = share * costs.total - costs.fixed
    if left < 0.0:
        raise ConfigError(
            f"a budget of {share:g} of {unit} cannot be met: without any branch {costs.fixed / costs.total:.3g} is left"
        )
    blocks = len(costs.branches)
    if rule == "uniform":
        return budgets.uniform_at(blocks, left, costs.branches)
    if rule == "linear":
        return budgets.linear_at(blocks, left, costs.branches)
    if rule == "max_regularization":
        curvature = discrepancy(model, batches, loss).curvature.clamp_min(1e-30)
        return budgets.max_regularization_at(curvature.tolist(), left, costs.branches)
    scores: Sequence[float] = sensitivity(model, batches, loss).scores.tolist()
    if per_cost:
        scores = [score / cost for score, cost in zip(scores, costs.branches, strict=True)]
    return budgets.sensitivity_at(scores, left, costs.branches, least=least)
