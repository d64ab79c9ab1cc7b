"""What a training measures of its own network: survival rates from a budget, and instruments along the way.

Measurements read fixed batches of training images, unaugmented. They leave draws, weights, optimizer and statistics as
they were, so a training goes on afterwards as if nothing had been but for the rates.
"""

import time
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from residrop.blocks.attach import set_survival
from residrop.blocks.skippable import Skippable, parameters_of
from residrop.data import Loader
from residrop.theory import discrepancy, sensitivity, survival_for
from residrop.training.distributed import Ranks
from residrop.training.recipe import Recipe

__all__ = ["due", "first_weights", "rates_now", "watched"]

_BATCHES, _IMAGES = 4, 128  # SenseMode's scores are means over a few batches, each with batch norm of its own
_WATCHED = 64


def due(recipe: Recipe, epoch: int) -> bool:
    """Whether the survival rates are measured before `epoch` (counted from 0)."""
    return recipe.budget is not None and (epoch == 0 or (recipe.refresh > 0 and epoch % recipe.refresh == 0))


def rates_now(
    recipe: Recipe,
    model: nn.Module,
    loader: Loader,
    epoch: int,
    ranks: Ranks,
    on_progress: Callable[[float], None] | None = None,
) -> dict[str, Any]:
    """Spend the recipe's budget on the blocks of a network as it stands, and give it these rates.

    Rank 0 measures, all ranks take its word. `on_progress` is told the share of the timing that is done.

    Returns:
        A line of `survival.jsonl`: `epoch` (done so far), `rates`, and the `seconds` it took.

    Raises:
        ConfigError: the budget cannot be met, or the rule has no single rate per block.
    """
    assert recipe.budget is not None
    budget, started = recipe.budget, time.perf_counter()
    rates = ranks.from_main(
        lambda: survival_for(
            model,
            budget,
            recipe.spend,
            batches=loader.fixed_batches(_BATCHES, _IMAGES),
            least=recipe.least,
            per_cost=recipe.per_cost,
            on_progress=on_progress,
        )
    )
    set_survival(model, rates)
    return {"epoch": epoch, "rates": list(rates), "seconds": time.perf_counter() - started}


def watched(recipe: Recipe, model: nn.Module, loader: Loader, epoch: int) -> dict[str, Any]:
    """A line of `instruments.jsonl`: `epoch` (done so far), and for each name in `watch` a number per block."""
    batches: list[tuple[Tensor, Tensor]] = list(loader.fixed_batches(1, _WATCHED))
    line: dict[str, Any] = {"epoch": epoch}
    if "sensitivity" in recipe.watch:
        line["sensitivity"] = sensitivity(model, batches).scores.tolist()
    if "discrepancy" in recipe.watch:
        found = discrepancy(model, batches)
        line["discrepancy"] = found.curvature.tolist()
        line["discrepancy_standard_error"] = found.standard_error.tolist()
    return line


def first_weights(model: nn.Module) -> nn.Parameter:
    """The weights of the first convolution (or matrix) of block 1, whose gradients Figure 7 of Huang et al. follows.

    So their text has it; the caption of the figure says "first convolutional layer".
    """
    blocks = (module for module in model.modules() if isinstance(module, Skippable))
    parts = (part for block in blocks for _, part in block.residrop_branches())
    return next(parameter for part in parts for parameter in parameters_of(part) if parameter.ndim > 1)
