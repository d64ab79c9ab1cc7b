"""What training really did: the share of every branch that was present, effective depth, FLOPs not computed."""

from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from residrop.blocks.attach import rules_of, sampler_of, using
from residrop.blocks.modes import evaluating
from residrop.common.errors import ConfigError
from residrop.functional.units import row_mask
from residrop.rules.base import Rule
from residrop.schedule.sampler import Draw, Plan, Site

__all__ = ["Observation", "branch_flops", "observe"]


def observe(model: nn.Module, flops: Sequence[float] | None = None) -> "Observation":
    """Record what is present in the training forwards of `model`, from now until `stop`, or inside a `with` block.

    It reads the plans, which are Python numbers: nothing is drawn, changed or asked of the device. A step costs a few
    microseconds, and about one more for every row-level rule whose rows are rounded at random. Every training forward
    of the root counts, so an update of several micro-batches counts as several steps.

    >>> import residrop
    >>> model = residrop.create("resnet-20", rule="stochastic-depth", survival=0.5)
    >>> with residrop.observe(model) as seen:
    ...     _ = model(torch.zeros(2, 3, 32, 32))
    >>> seen.steps
    1

    Args:
        model: an attached model, or a wrapper around it.
        flops: cost of every branch in any unit, one number per rule, as `branch_flops` measures it. Without, the share
            of FLOPs that was not computed is unknown.

    Raises:
        ConfigError: the model was never attached, or another number of costs than rules.
    """
    return Observation(model, flops)


class Observation:
    """What `observe` has recorded so far. `str` of it is a table."""

    def __init__(self, model: nn.Module, flops: Sequence[float] | None = None) -> None:
        self._rules = rules_of(model)
        if flops is not None and (len(flops) != len(self._rules) or not all(cost >= 0 for cost in flops)):
            raise ConfigError(
                f"flops has {len(flops)} numbers for {len(self._rules)} rules; give one per rule, none below zero, "
                "such as residrop.branch_flops(model, x)"
            )
        self._flops = None if flops is None else tuple(map(float, flops))
        self._names = _names_of(model)
        self._present = [0.0] * len(self._rules)
        self._steps = 0
        self._sampler = sampler_of(model)
        self._sampler.observers.append(self._record)

    def stop(self) -> None:
        """Record no more. What was recorded stays."""
        if self._record in self._sampler.observers:
            self._sampler.observers.remove(self._record)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _record(self, plan: Plan, rows: int | None) -> None:
        self._steps += 1
        present = self._present
        for index, draw in enumerate(plan.draws):
            if draw.alive:
                present[index] += 1.0
            elif draw.alive is None:
                present[index] += _share(self._rules[index], draw, rows)

    @property
    def steps(self) -> int:
        """Training forwards seen."""
        return self._steps

    @property
    def survival(self) -> tuple[float, ...]:
        """Realised survival of every branch, in [0, 1]: the share of steps in which it was present (block), the mean
        share of rows that entered it (row), or its rate (unit). Zeros before the first step."""
        return tuple(value / max(self._steps, 1) for value in self._present)

    @property
    def effective_depth(self) -> float:
        """Mean number of branches present, the sum of `survival`."""
        return sum(self.survival)

    @property
    def skipped_flops(self) -> float | None:
        """Share in [0, 1] of the FLOPs of all branches that was not computed; None without `flops` or before a step.

        What is multiplied is computed all the same: unit-level rules and `GaussianDepth` skip nothing. `BackwardDepth`
        skips backward alone, which counts as two of the three parts of a branch.
        """
        if self._flops is None or self._steps == 0:
            return None
        computed = [_computed(rule, share) for rule, share in zip(self._rules, self.survival, strict=True)]
        done = sum(cost * share for cost, share in zip(self._flops, computed, strict=True))
        return 1.0 - done / total if (total := sum(self._flops)) > 0 else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Everything as numbers: `steps`, `depth` (all branches), `effective_depth`, `skipped_flops`, and `blocks`.

        Of every branch `blocks` has `name`, `granularity`, `rate` (what the rule was given) and `survival` (realised).
        """
        blocks = [
            {"name": name, "granularity": rule.granularity, "rate": rule.branch_rate(rule.rates), "survival": share}
            for name, rule, share in zip(self._names, self._rules, self.survival, strict=True)
        ]
        return {
            "steps": self.steps,
            "depth": len(blocks),
            "effective_depth": self.effective_depth,
            "skipped_flops": self.skipped_flops,
            "blocks": blocks,
        }

    def __str__(self) -> str:
        found = self.to_dict()
        skipped = (
            "" if found["skipped_flops"] is None else f", {100 * found['skipped_flops']:.1f}% of branch FLOPs skipped"
        )
        lines = [f"{self.steps} steps, effective depth {self.effective_depth:.2f} of {len(self._rules)}{skipped}"]
        width = max(map(len, self._names))
        lines += [
            f"  {block['name']:<{width}}  {block['granularity']:<5}  "
            f"rate {block['rate']:.3f}  realised {block['survival']:.3f}"
            for block in found["blocks"]
        ]
        return "\n".join(lines)


def _computed(rule: Rule, share: float) -> float:
    """Of a branch that was present so often, how much of its forward and backward was computed."""
    if not _droppable(rule.site):
        return 1.0
    return (1.0 + 2.0 * share) / 3.0 if rule.runs_absent else share


def _share(rule: Rule, draw: Draw, rows: int | None) -> float:
    """Share of the batch that enters a branch which is no matter of one coin."""
    if rule.site.granularity != "row" or draw.key is None or not rows:
        return rule.presence(draw)
    if rule.rows == "bernoulli":
        rate = (draw.rates or rule.rates)[0]
        return int(row_mask(rows, rate, draw.key).sum()) / rows  # on the CPU, as the rule makes it
    return (draw if draw.rates else draw._replace(rates=rule.rates)).live(rows) / rows


def _names_of(model: nn.Module) -> list[str]:
    """Dotted name of every rule's block; rules of one block are numbered."""
    names = [name for name, module in model.named_modules() if isinstance(module, Rule)]
    blocks = [name.removesuffix(".rule").partition(".residrop_rules.") for name in names]
    several = {block for block, _, number in blocks if number not in ("", "0")}
    return [f"{block}, branch {int(number) + 1}" if block in several else block for block, _, number in blocks]


def branch_flops(model: nn.Module, *args: Any, **kwargs: Any) -> tuple[int, ...]:
    """FLOPs of the forward of every branch, one number per rule, for one batch, by PyTorch's counter.

    A branch costs what model(*args, **kwargs) needs with this branch alone, less what it needs without any. These L + 1
    forwards, nearly empty, run twice (in one of them blocks under `residrop.apply` may look at themselves), in eval
    mode and without gradients: nothing is drawn, no statistics move, and training flags are as before. Rules that never
    leave out a branch (constant depth, unit level, Gaussian) count 0. The counter knows matrix products, convolutions
    and attention, and sees nothing of compiled graphs: measure before compiling.

    Args:
        model: an attached model.
        args: arguments of its forward, on its device.
        kwargs: the same, by name.

    Raises:
        ConfigError: the model was never attached.
    """
    sampler = sampler_of(model)

    def spent(only: int | None) -> int:
        draws = [_alone(site, index == only) for index, site in enumerate(sampler.sites)]
        counts: list[int] = []
        for _ in range(2):
            with torch.no_grad(), FlopCounterMode(display=False) as counter, using(model, Plan(tuple(draws))):
                model(*args, **kwargs)
            counts.append(counter.get_total_flops())
        return min(counts)

    with evaluating(model):
        without = spent(None)
        return tuple(spent(index) - without if _droppable(site) else 0 for index, site in enumerate(sampler.sites))


def _droppable(site: Site) -> bool:
    return bool(site.rates) and site.granularity in ("block", "row")


def _alone(site: Site, present: bool) -> Draw:
    """The draw of a branch that is present or absent for certain."""
    if not _droppable(site) or (present and site.granularity == "row"):
        return Draw((1.0,) * len(site.rates))
    return Draw((0.0,), key=0) if site.granularity == "row" else Draw((), alive=present)
