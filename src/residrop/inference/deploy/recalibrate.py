"""Batch-norm statistics for prediction in one pass.

Batch norm collects its running statistics in training, while blocks, rows and units are absent at random. In
expectation the inputs of its layers have other means and, above all, smaller variances, so every layer normalises by
the wrong numbers (Singh et al. 2016, Sec. 4.1, find sampled inference better for that reason). `recalibrate` measures
the right ones.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from residrop.blocks.attach import in_expectation
from residrop.common.checks import check_whole
from residrop.common.errors import ConfigError, RankError
from residrop.inference.deploy.batch_statistics import Batches, at_once, by_layers

__all__ = ["Mode", "Recalibration", "recalibrate"]

Mode = Literal["layers", "at-once"]


@dataclass(frozen=True)
class Recalibration:
    """What `recalibrate` did, and the way back.

    Attributes:
        mode: as given.
        layers: number of batch norms with new statistics.
        images: number of rows (images) they come from.
        batches: number of batches.
        largest_change: over all layers and channels, the larger of |change of the mean| / old standard deviation and
            |new / old standard deviation - 1|.
        where: name of the layer with that change.
        unused: names of batch norms that saw no input (of branches that are never present); they keep what they had.
    """

    mode: Mode
    layers: int
    images: int
    batches: int
    largest_change: float
    where: str
    unused: tuple[str, ...]
    before: "_Saved" = field(repr=False, compare=False)

    def undo(self) -> None:
        """Put the statistics from before `recalibrate` back."""
        self.before.restore()

    def to_dict(self) -> dict[str, Any]:
        """All fields but the way back, as JSON values."""
        names = ("mode", "layers", "images", "batches", "largest_change", "where")
        return {**{name: getattr(self, name) for name in names}, "unused": list(self.unused)}


@torch.no_grad()
def recalibrate(
    model: nn.Module,
    data: Iterable[Any],
    batches: int = 200,
    mode: Mode = "layers",
    *,
    on_progress: Callable[[float], None] | None = None,
    shared: bool = False,
) -> Recalibration:
    """Re-estimate the running statistics of all batch norms for prediction in expectation, in place.

    Every coin is replaced by its mean, dropout and the like are in eval mode. Means and unbiased variances are those of
    all values of a channel in all batches together (so every value counts the same, whatever the sizes of batches),
    summed in float64. `momentum`, `num_batches_tracked`, parameters, training flags and the sampler's step stay as
    they are.

    - "layers": the statistics of a layer are measured once all earlier layers have their new ones. So on the given
      images every layer's input is normalised exactly, as the network will run. Networks of `residrop.create`, and any
      `nn.Sequential`, are taken block by block, for about two passes in all; any other model is run once per batch
      norm, up to that layer (half a pass on average). The batches are kept in memory.
    - "at-once": one pass, in which every layer normalises by the statistics of the batch at hand, as in training. (With
      the old running statistics the later layers would be fitted to errors of the earlier ones that are about to be
      corrected.) What is left is the noise that a batch's own statistics bring into the layers behind.

    Args:
        model: any model with batch norms (`_BatchNorm` of torch and its subclasses), under rules or not.
        data: batches: tensors, (x, labels) pairs, or mappings of keyword arguments; training images, as they come at
            prediction (normalised, not augmented). A few thousand images are plenty.
        batches: how many batches to take at most.
        mode: see above.
        on_progress: called with the share that is done, in (0, 1].
        shared: the caller sees to it that all ranks of the process group have the same statistics afterwards.

    Returns:
        What was done; its `undo()` puts the old statistics back.

    Raises:
        ConfigError: no batch norm with running statistics, no data, or inputs that are not finite. The model is
            unchanged.
        RankError: the process group has several ranks, whose models would part (unless they are `shared`).
    """
    norms = _checked(model, batches, mode, shared)
    before = _Saved(norms)
    tell = on_progress or (lambda share: None)
    try:
        with in_expectation(model):
            source = Batches(data, batches, _device(model))
            seen = (by_layers if mode == "layers" else at_once)(model, source, norms, tell)
        if not seen:
            raise ConfigError(
                f"none of the {len(norms)} batch norms of {type(model).__name__} was run; give the model itself, not a "
                "compiled or wrapped form of it"
            )
        change, where = before.largest_change(seen)
    except BaseException:
        before.restore()
        raise
    unused = tuple(name for name in norms if name not in seen)
    return Recalibration(mode, len(seen), source.images, source.taken, change, where, unused, before)


def _checked(model: nn.Module, batches: int, mode: str, shared: bool) -> dict[str, Any]:
    """The batch norms with running statistics by name; errors for what can be told before any work."""
    if mode not in get_args(Mode):
        raise ConfigError(f"mode is {mode!r}; choose one of {', '.join(map(repr, get_args(Mode)))}")
    check_whole("batches", batches, least=1)
    if not shared and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        raise RankError(
            f"recalibrate runs in one process, but the process group has {dist.get_world_size()}, whose models would "
            "part; do it on the saved weights, after the distributed training"
        )
    norms = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    }
    if not norms:
        raise ConfigError(f"{type(model).__name__} has no batch norm with running statistics; there is nothing to do")
    return norms


class _Saved:
    """Statistics as they were."""

    def __init__(self, norms: Mapping[str, Any]) -> None:
        self.norms = dict(norms)
        self.values = {name: (norm.running_mean.clone(), norm.running_var.clone()) for name, norm in norms.items()}

    def restore(self) -> None:
        with torch.no_grad():
            for name, (mean, var) in self.values.items():
                self.norms[name].running_mean.copy_(mean)
                self.norms[name].running_var.copy_(var)

    def largest_change(self, names: Iterable[str]) -> tuple[float, str]:
        """See `Recalibration`; ConfigError if a new value is not finite."""
        found = [(0.0, "")]
        for name in names:
            norm, (mean, var) = self.norms[name], self.values[name]
            if not (norm.running_mean.isfinite().all() and norm.running_var.isfinite().all()):
                raise ConfigError(
                    f"the input of {name} is not finite on this data; is the model trained, the data clean?"
                )
            old, new = ((each.double() + norm.eps).sqrt() for each in (var, norm.running_var))
            shift = (norm.running_mean.double() - mean.double()).abs() / old
            found.append((float(torch.maximum(shift, (new / old - 1.0).abs()).max()), name))
        return max(found)


def _device(model: nn.Module) -> torch.device:
    return next(model.buffers()).device
