"""What each block costs on this machine, and survival rates that spend a budget of it."""

import re
import warnings
from collections.abc import Callable, Collection, Iterable, Sequence
from random import Random
from statistics import stdev
from time import perf_counter
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from residrop.blocks.attach import rules_of, sampler_of, using
from residrop.blocks.observe import branch_flops
from residrop.common.checks import check_whole
from residrop.common.errors import ConfigError, SpreadError, SpreadWarning
from residrop.inference.sampled.batch import Batch
from residrop.rules.base import Rule
from residrop.schedule import budgets
from residrop.schedule.sampler import Plan
from residrop.theory.discrepancy import discrepancy
from residrop.theory.gates import gated, kept_as_is
from residrop.theory.sensitivity import sensitivity

__all__ = ["Costs", "costs_of", "read_budget", "survival_for"]

Unit = Literal["blocks", "flops", "time"]
Mode = Literal["uniform", "linear", "sensitivity", "max_regularization"]
_RESAMPLES = 100
_MOST = 4  # times the rounds that were asked for, where these leave too much uncertain


class Costs(NamedTuple):
    """What a training step costs, or a prediction.

    Attributes:
        branches: what each branch adds, one number per rule.
        fixed: what is left without any branch.
        unit: "blocks" (1 each), "flops" (of a forward) or "time" (seconds of forward and backward, or of a forward in
            eval mode).
        spread: for "time", the standard error of each number in `branches` (from resampled rounds); None if exact.
    """

    branches: tuple[float, ...]
    fixed: float
    unit: Unit
    spread: tuple[float, ...] | None = None

    @property
    def total(self) -> float:
        """The cost at full depth."""
        return self.fixed + sum(self.branches)


def costs_of(
    model: nn.Module,
    unit: Unit,
    x: Any = None,
    *,
    training: bool = True,
    repeats: int = 10,
    on_progress: Callable[[float], None] | None = None,
) -> Costs:
    """The cost of each branch and of the rest, for a batch.

    Time is measured: how much longer forward and backward take than without all the branches of one structure, which
    share the difference; without `training`, how much longer a forward with these branches alone takes than one without
    any, in shares of what all of them add. Steps with and without them take turns, and of either kind the lowest decile
    counts, so that a machine that now and then does other things alters little. What is left of that is stated as
    `Costs.spread`.

    Args:
        model: a model with rules, not compiled.
        unit: see `Costs`.
        x: the batch, on the device of the model, for "flops" and "time": a tensor, a tuple of arguments, or a mapping
            of arguments by name.
        training: whether "time" is that of a training step (of the sum of the model's output, one tensor), or of a
            prediction.
        repeats: for "time", how often each structure is timed, at least 2; up to four times as often where that leaves
            too much uncertain.
        on_progress: for "time", called with the share that is done, in (0, 1].

    Raises:
        ConfigError: an unknown unit, no batch, or no rules; or times that differ too much from step to step.
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
        batch = Batch(x)
        branches = tuple(map(float, branch_flops(model, *batch.args, **batch.kwargs)))
        counter = FlopCounterMode(display=False)
        with kept_as_is(model, training=False), torch.no_grad(), gated(model, torch.ones(count)), counter:
            batch.called(model)
        return Costs(branches, float(counter.get_total_flops()) - sum(branches), unit)
    check_whole("repeats", repeats, least=2)
    return _timed(model, Batch(x), training, repeats, on_progress or (lambda share: None))


def _timed(model: nn.Module, x: Batch, training: bool, repeats: int, tell: Callable[[float], None]) -> Costs:
    draws = sampler_of(model).expectation().draws
    if any(rule.site.granularity != "block" or not rule.rates for rule in rules_of(model)):
        raise ConfigError("time per block is measured by leaving blocks out; give every block a block-level rule")
    groups = _groups(model, x)
    sizes = [len(group) for group in groups]
    every = range(len(draws))
    # A forward's branches cost the same alone, and of shorter steps less is noise. In training the branches that are
    # present decide which gradients there are.
    pairs = (
        [(every, set(every).difference(group)) for group in groups]
        if training
        else [(group, ()) for group in (*groups, every)]
    )
    whole, each, spread, doubt = 0.0, list[float](), list[float](), None

    def step(present: Collection[int]) -> float:
        plan = Plan(tuple(d._replace(alive=number in present) for number, d in enumerate(draws)))
        started = perf_counter()
        with using(model, plan):
            found = x.called(model)
            total = found.sum() if training else None
        if total is not None and total.requires_grad:  # not where all that is trained lies in absent branches
            total.backward()
        if x.device.type != "cpu":
            torch.accelerator.synchronize(x.device)
        return perf_counter() - started

    rounds: list[list[tuple[float, float]]] = []  # of each round and pair: a step with the branches, and without them
    with kept_as_is(model, training=training), torch.set_grad_enabled(training):
        for with_them, without in pairs:  # whatever is made at a first call
            step(with_them)
            step(without)
        while len(rounds) < _MOST * repeats:
            rounds.append([])
            for with_them, without in pairs:
                rounds[-1].append((step(with_them), step(without)))
                tell((len(rounds) - 1 + len(rounds[-1]) / len(pairs)) / (_MOST * repeats))
            if len(rounds) % repeats == 0:
                whole, each, spread = _estimate(rounds, sizes)
                if (doubt := _doubt(whole, each, spread, sizes)) is None:
                    break
    tell(1.0)
    if doubt is not None:
        raise SpreadError(doubt)
    place = {number: group for group, numbers in enumerate(groups) for number in numbers}
    branches, errors = ([values[place[number]] for number in range(len(draws))] for values in (each, spread))
    return Costs(tuple(branches), max(0.0, whole - sum(branches)), "time", tuple(errors))


def _groups(model: nn.Module, x: Batch) -> list[list[int]]:
    """The numbers of the rules, those of one structure and as much work together, in the order of the first of each."""
    found: dict[Any, list[int]] = {}
    modules, rules = dict(model.named_modules()), [name for name, one in model.named_modules() if isinstance(one, Rule)]
    for number, (name, flops) in enumerate(zip(rules, branch_flops(model, *x.args, **x.kwargs), strict=True)):
        block, _, branch = f".{name}".removesuffix(".rule").partition(".residrop_rules.")
        parts = [one for one in modules[block[1:]].modules() if not isinstance(one, (Rule, nn.Identity))]
        parts = [one for one in parts if type(one).__name__ not in ("DropPath", "StochasticDepth")]  # rules' work now
        tensors = [tensor for one in parts for tensor in (*one.parameters(False), *one.buffers(False))]
        shapes = tuple((tensor.shape, tensor.dtype, tensor.requires_grad) for tensor in tensors)
        found.setdefault((branch, flops, tuple(map(type, parts)), shapes), []).append(number)
    return list(found.values())


def _with_whole_forwards(model: nn.Module, costs: Costs) -> Costs:
    """The FLOPs of training in units of a forward, where absent branches are left out of backward alone."""
    forward = [flops / 3.0 * rule.runs_absent for rule, flops in zip(rules_of(model), costs.branches, strict=True)]
    branches = tuple(flops - own for flops, own in zip(costs.branches, forward, strict=True))
    return costs._replace(branches=branches, fixed=costs.fixed + sum(forward))


_Rounds = Sequence[Sequence[tuple[float, float]]]


def _estimate(rounds: _Rounds, sizes: Sequence[int]) -> tuple[float, list[float], list[float]]:
    """The time of a whole step, and of every group of that size the cost of a branch and its standard error."""
    whole, each = _deciles(rounds, sizes)
    again = [_deciles(Random(number).choices(rounds, k=len(rounds)), sizes)[1] for number in range(_RESAMPLES)]
    return whole, each, [stdev(found) for found in zip(*again, strict=True)]


def _deciles(rounds: _Rounds, sizes: Sequence[int]) -> tuple[float, list[float]]:
    times, counts = np.array(rounds), np.array(sizes)  # [rounds, pairs, 2], [groups]
    if times.shape[1] == len(counts):  # all branches, and all but a group
        whole, without = np.quantile(times[..., 0], 0.1), np.quantile(times[..., 1], 0.1, axis=0)
        return float(whole), ((whole - without) / counts).tolist()
    *alone, whole = np.quantile(times[..., 0], 0.1, axis=0)  # a group, ..., all branches; and none
    none = np.quantile(times[..., 1], 0.1)
    more = np.array(alone) - none
    return float(whole), (more * (whole - none) / more.sum() / counts).tolist()


def _doubt(whole: float, each: Sequence[float], spread: Sequence[float], sizes: Sequence[int]) -> str | None:
    """What is wrong with costs that are known neither to a quarter of themselves nor to a tenth of a mean block."""
    mean = sum(cost * size for cost, size in zip(each, sizes, strict=True)) / sum(sizes)
    for cost, error in zip(each, spread, strict=True):
        if not (cost > 0.0 and error <= max(cost / 4, mean / 10)):
            return (
                f"a block takes {1e3 * cost:.3g} ± {1e3 * error:.1g} ms of a step of {1e3 * whole:.3g} ms, which is "
                "too uncertain; measure larger batches, while the machine does nothing else, or ask for flops"
            )
    return None


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
    on_progress: Callable[[float], None] | None = None,
) -> tuple[float, ...]:
    """Survival rates under which a training step costs a share of the full one, on average.

    Args:
        model: a model with rules (any rates), as `residrop.create` and `residrop.apply` give it.
        budget: a share in [0, 1] of what a step at full depth costs, stem and head included: "0.6 of time" (measured
            here, forward and backward, on the first batch), "0.6 of flops", "0.6 of blocks", or a number of the latter.
            Under `BackwardDepth` a step runs every branch forward, which is a third of the branch's FLOPs in training.
        rule: how the budget is spent: "uniform"; "linear" decay; "sensitivity" (SenseMode, `theory.sensitivity`);
            "max_regularization" (Lemma 2, `theory.discrepancy`).
        batches: pairs of input and target, for all but shares of blocks with "uniform" or "linear".
        loss: for "sensitivity" and "max_regularization".
        least: smallest rate, for "sensitivity".
        per_cost: for "sensitivity", whether scores count per unit of cost.
        on_progress: for shares of time, called with the share of the measurement that is done, in (0, 1].

    Returns:
        One rate per rule, to be given as `survival=` of `create` or `apply`.

    Warns:
        SpreadWarning: times differ too much from step to step, and the budget is taken as a share of FLOPs.

    Raises:
        ConfigError: a budget or rule that is not understood, that cannot be met (the nearest is named), or no batch.
    """
    if rule not in ("uniform", "linear", "sensitivity", "max_regularization"):
        raise ConfigError(f"rule is {rule!r}; choose 'uniform', 'linear', 'sensitivity' or 'max_regularization'")
    share, unit = read_budget(budget)
    batches = list(batches)
    x = batches[0][0] if batches else None
    try:
        costs = costs_of(model, unit, x, on_progress=on_progress)
    except SpreadError as error:
        warnings.warn(f"{error}; the budget is {share:g} of flops now", SpreadWarning, stacklevel=2)
        unit, costs = "flops", costs_of(model, "flops", x)
    if unit == "flops":
        costs = _with_whole_forwards(model, costs)
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
