"""`shrink`: a plain sub-network of a chosen cost."""

import inspect
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from residrop.blocks.modes import evaluating
from residrop.common.checks import check_choice
from residrop.common.errors import ConfigError
from residrop.inference.deploy.fold import fold as folded
from residrop.inference.deploy.recalibrate import recalibrate as recalibrated
from residrop.inference.sampled.batch import Batch
from residrop.subnetworks.blocks import Data, Loss, Whole, pairs_of
from residrop.subnetworks.choosing import (
    Budget,
    By,
    Tell,
    best_for,
    block_costs,
    chosen,
    greedy,
    importance_of,
    predicted,
)
from residrop.subnetworks.plain import plain, reloads
from residrop.subnetworks.timing import seconds_of
from residrop.theory.costs import Costs

__all__ = ["Shrunk", "measured", "shrink", "shrunk", "wants_statistics"]


@dataclass(frozen=True)
class Shrunk:
    """A sub-network, and what was measured of it.

    Attributes:
        model: a plain module without anything of residrop, in eval mode.
        kept: names of the blocks that are left, as the whole model has them.
        removed: names of the others.
        by: how they were chosen.
        budget: as it was given.
        unit: of the costs: "blocks", "flops" or "time" (of a forward in eval mode).
        predicted: the sub-network's cost as a share of the whole network's, in that unit.
        seconds: median time of a forward on the first batch: of the whole network, and of the sub-network.
        loss: mean loss of the batches: of the whole network, of the sub-network before its batch norms were
            recalibrated, and after.
        recalibrated: whether batch norms have new statistics.
        folded: whether batch norms were folded into convolutions.
        reloads: of models of transformers, whether the configuration and the weights that `save_pretrained` writes give
            this network again; None for others.
    """

    model: nn.Module = field(repr=False)
    kept: tuple[str, ...]
    removed: tuple[str, ...]
    by: str
    budget: str
    unit: str
    predicted: float
    seconds: tuple[float, float]
    loss: tuple[float, float, float]
    recalibrated: bool
    folded: bool
    reloads: bool | None = None

    @property
    def measured_time(self) -> float:
        """The sub-network's time as a share of the whole network's."""
        return self.seconds[1] / self.seconds[0]

    def to_dict(self) -> dict[str, Any]:
        """All fields but the model, as JSON values."""
        found = {one.name: getattr(self, one.name) for one in fields(self) if one.name != "model"}
        found |= {"measured_time": self.measured_time}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()}

    def __str__(self) -> str:
        whole, own = (f"{1000 * one:.3g} ms" for one in self.seconds)
        before, between, after = self.loss
        steps = f"{before:.4g} -> {between:.4g}" + (f" -> {after:.4g} recalibrated" if self.recalibrated else "")
        return (
            f"{len(self.kept)} of {len(self.kept) + len(self.removed)} blocks, {self.predicted:.3g} of {self.unit}; "
            f"{own} instead of {whole} ({self.measured_time:.3g}); loss {steps}"
        )


def shrink(
    model: nn.Module,
    budget: str | float,
    *,
    batches: Iterable[Any],
    by: By | None = None,
    loss: Loss | None = None,
    blocks: Any = None,
    recalibrate: bool | None = None,
    fold: bool = False,
    seed: int = 0,
    repeats: int = 15,
    on_progress: Tell | None = None,
) -> Shrunk:
    """A plain network of some of a model's residual blocks, that costs no more than a budget.

    Every block stays with all its branches or is left out; what its shortcut computes (a projection) stays. Kept
    branches count in full, as where their coin shows them present: the result computes, to the last bit in eval mode,
    what the model computes under the draw with these coins (`Plan.of` with `rescale="none"` or "test"; rescale="train"
    divides a present branch by its rate, which a branch that is always present is not).

    Layers of transformers' models leave their list, and numbers of layers and the configuration follow, so that
    `save_pretrained`, `from_pretrained` and `generate` work. A layer that hands something to the others (T5's first,
    with the position bias) is never left out. In other models an absent block becomes its shortcut where it stands.
    Networks of `residrop.create` become a `torch.fx.GraphModule` of torch's own modules.

    Args:
        model: of `residrop.create`, under `residrop.apply`, or any model with residual blocks; it stays as it is.
        budget: "0.6 of time", "0.6 of flops", "0.6 of blocks" (shares of the whole network, stem and head included, in
            a forward), "12 of blocks", or milliseconds of a forward of the first batch, "8.5 ms".
        batches: pairs of inputs (a tensor, a tuple of arguments, or a mapping of arguments by name) and target; or
            mappings of arguments by name, labels among them. They are kept in memory. Choose on training data.
        by: which blocks stay: "greedy" (the least needed block for what it costs goes, and all others are measured
            again: up to L (L + 1) / 2 forwards a batch for L blocks), "removal" (the loss without each block: L + 1
            forwards a batch) or "sensitivity" (its first-order estimate: one backward pass a batch); or, to compare
            with, "every_other", "first" (blocks stay from the input on) and "random". None is greedy for up to 24
            blocks, else removal.
        loss: from the model's output and the target to Tensor[]; None is cross entropy, or for mappings the output's
            own `loss`.
        blocks: which blocks of a plain model, as in `residrop.apply`.
        recalibrate: whether batch norms get new statistics on the batches; None if there are batch norms. Losses for
            the choice are then measured with the statistics of each batch.
        fold: also fold batch norms into convolutions (`residrop.fold`), for models that return one tensor.
        seed: for "random".
        repeats: how often time is taken.
        on_progress: called with what is done and the share of it that is.

    Warns:
        UserWarning: a model of transformers cannot be built again from a configuration without these blocks.
        SpreadWarning: times differ too much from call to call, and a share of time is taken as a share of FLOPs.

    Raises:
        ConfigError: a budget that is not understood or cannot be met (the least is named), a model without blocks or
            with unit-level rules, batches that it or its loss cannot take, or a model that computes something else
            without the blocks.
    """
    wanted = Budget.read(budget)
    if by is not None:
        check_choice("by", by, By)
    data, of = pairs_of(batches, loss)
    tell = on_progress or (lambda what, share: None)
    whole = Whole(model, data, of, blocks, batch_statistics=wants_statistics(model, recalibrate))
    by = by or best_for(whole)
    costs = block_costs(whole, wanted, tell)
    limit = wanted.limit(costs)
    if by == "greedy":
        kept = greedy(whole, costs, limit, wanted.text, tell)
    else:
        kept = chosen(costs, importance_of(whole, by, seed, tell), by, limit, wanted.text, whole.lists)
    return shrunk(whole, kept, costs, by=by, budget=wanted.text, recalibrate=recalibrate, fold=fold, repeats=repeats)


def shrunk(
    whole: Whole,
    kept: Sequence[bool],
    costs: Costs,
    *,
    by: str,
    budget: str,
    recalibrate: bool | None,
    fold: bool,
    repeats: int,
) -> Shrunk:
    """The sub-network of these blocks, measured. Arguments as in `shrink`."""
    model = plain(whole, kept).eval()
    full = plain(whole, whole.full).eval()
    same = reloads(model, whole, kept)
    if same is False:
        warnings.warn(
            f"{type(whole.model).__name__} cannot be built again without these blocks from a configuration, so "
            "from_pretrained would give another network; keep the module itself, or export it",
            stacklevel=3,
        )
    first = _loss(full, whole.data, whole.loss)
    before, after, again = measured(whole, model, recalibrate)
    if fold:
        example = whole.data[0][0]
        if not isinstance(example, Tensor):
            raise ConfigError("fold=True needs a model of one tensor; leave it out")
        model = folded(model, example)
    seconds = seconds_of([full, model], whole.data[0][0], repeats)
    names = [block.name for block in whole.blocks]
    return Shrunk(
        model,
        tuple(name for name, keep in zip(names, kept, strict=True) if keep),
        tuple(name for name, keep in zip(names, kept, strict=True) if not keep),
        by,
        budget,
        costs.unit,
        predicted(costs, kept),
        (seconds[0], seconds[1]),
        (first, before, after),
        again,
        fold,
        same,
    )


def measured(
    whole: Whole, model: nn.Module, recalibrate: bool | None, metric: Callable[[nn.Module], float] | None = None
) -> tuple[float, float, bool]:
    """A sub-network's metric (None: its loss) before and after its batch norms are recalibrated, and whether they are.

    Raises:
        ConfigError: they are asked for, and there are none.
    """

    def of() -> float:
        return _loss(model, whole.data, whole.loss) if metric is None else metric(model)

    before = of()
    if not wants_statistics(model, recalibrate):
        return before, before, False
    recalibrated(model, (_as_data(model, x) for x, _ in whole.data), batches=len(whole.data))
    return before, of(), True


def wants_statistics(model: nn.Module, recalibrate: bool | None) -> bool:
    """Whether batch norms of sub-networks get new statistics: if there are any and they are not to stay.

    Raises:
        ConfigError: they are asked for, and there are none.
    """
    norms = any(isinstance(one, _BatchNorm) and one.running_mean is not None for one in model.modules())
    if recalibrate and not norms:
        raise ConfigError(f"{type(model).__name__} has no batch norm to recalibrate; leave out recalibrate=True")
    return norms if recalibrate is None else recalibrate


def _as_data(model: nn.Module, inputs: Any) -> Any:
    """Inputs as `recalibrate` takes them: a tensor, or arguments by name."""
    if not isinstance(inputs, tuple):
        return inputs
    return dict(zip(inspect.signature(model.forward).parameters, inputs, strict=False))


@torch.no_grad()
def _loss(model: nn.Module, data: Data, loss: Callable[[Any, Any], Tensor]) -> float:
    with evaluating(model):
        found = [float(loss(Batch(x).copied().called(model), y)) for x, y in data]
    return sum(found) / len(found)
