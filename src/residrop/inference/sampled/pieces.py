"""Networks as sequences of pieces, and what a residual block is with and without its branch."""

from collections.abc import Sequence

from torch import Tensor, nn

from residrop.blocks.attach import before_root, rules_of
from residrop.blocks.residual import Chain, Residual
from residrop.functional.call import combined
from residrop.models import CifarResNet, ImageNetResNet, Vanilla
from residrop.rules.base import Rule
from residrop.rules.depth import DepthDropout, StochasticDepth
from residrop.rules.units import Mix, SkipForward, Swapout, UnitDropout
from residrop.schedule.sampler import Draw, Plan

__all__ = [
    "TREE",
    "UNITS",
    "branch_of",
    "is_certain",
    "is_plain",
    "is_random",
    "pieces_of",
    "with_branch",
    "without_branch",
]

TREE = (StochasticDepth, DepthDropout)
UNITS = (Swapout, SkipForward, UnitDropout, Mix)
_LEAST_PIXELS = 4  # a side, so that every network here takes it


def pieces_of(model: nn.Module, x: Tensor) -> list[nn.Module] | None:
    """Modules whose composition is the model, for an input x that it takes; None if it is not known to be a sequence.

    Whoever looks at the model as a whole (hooks, compilers) makes it none, as do modules that work in place: they
    would overwrite what several samples share, and those whose rows depend on one another.
    """
    if before_root(model) is None or len(model._forward_pre_hooks) > 1 or len(model._forward_hooks) > 1:
        return None
    if model._compiled_call_impl is not None or "forward" in model.__dict__:
        return None
    if any(getattr(module, "inplace", False) or _mixes_rows(module) for module in model.modules()):
        return None
    parts: Sequence[nn.Module]
    if type(model) is CifarResNet or type(model) is ImageNetResNet:
        if x.ndim != 4 or x.shape[1] != model.channels or min(x.shape[2:]) < _LEAST_PIXELS:
            return None  # its forward says what is wrong
        parts = (model.stem, model.blocks, model.tail)
    elif type(model) is Vanilla:
        if x.ndim < 2 or x.shape[1:].numel() != model.in_features:
            return None
        parts = (nn.Flatten(), model.stem, model.blocks, model.tail)
    elif type(model) is nn.Sequential:
        parts = tuple(model)
    else:
        return None
    return [piece for part in parts for piece in _opened(part)]


def _mixes_rows(module: nn.Module) -> bool:
    """Whether what a module of torch gives for a row depends on other rows: batch statistics, a batch not first."""
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return module.running_mean is None
    return getattr(module, "batch_first", True) is False


def _opened(module: nn.Module) -> list[nn.Module]:
    if type(module) is not nn.Sequential and type(module) is not Chain:
        return [module]
    if _watched(module) or any(isinstance(child, Residual) and child.rule.earlier for child in module):
        return [module]  # blocks that read earlier outputs are no pieces
    return [piece for child in module for piece in _opened(child)]  # a child may come twice


def _watched(module: nn.Module) -> bool:
    hooks = (module._forward_hooks, module._forward_pre_hooks)
    return any(hooks) or module._compiled_call_impl is not None or "forward" in module.__dict__


def is_random(piece: nn.Module, plan: Plan) -> bool:
    """Whether samples may differ behind this piece."""
    return not all(is_certain(plan.draws[rule.index]) for rule in rules_of(piece))


def is_certain(draw: Draw) -> bool:
    """Whether all draws at these rates come out alike."""
    return set(draw.rates) <= {0.0, 1.0}


def is_plain(piece: nn.Module, rules: tuple[type[Rule], ...]) -> bool:
    """Whether a piece is a residual block of ours with one of these rules, one branch, and nobody looks inside."""
    if type(piece) is not Residual or _watched(piece):
        return False
    return type(piece.rule) in rules and len(piece.rule.rates) <= 2 and not _watched(piece.rule)


def branch_of(block: Residual, h: Tensor) -> Tensor:
    """The branch of a block, compiled if it was."""
    return block.rule.executor.part(block.branch, h, ())


def with_branch(block: Residual, h: Tensor, scale: float) -> Tensor:
    """A block whose branch is present for all rows of h."""
    return block.post(combined(block.shortcut(h), branch_of(block, h), scale))


def without_branch(block: Residual, h: Tensor) -> Tensor:
    """A block whose branch is absent for all rows of h."""
    y = block.shortcut(h)
    return y if block.settled else block.post(y)
