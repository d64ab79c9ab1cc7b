"""Trying blocks on an example before they are taken."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from residrop.blocks.modes import evaluating
from residrop.common.errors import ConfigError, UsageError
from residrop.surgery.operations import Operations

__all__ = ["Tried", "called_with", "tried"]

_ROWS = 4  # of an example that are looked at
_KEPT = ("residrop_checked", "residrop_seen", "residrop_kinds", "residrop_forms")


@dataclass
class Tried:
    """What became of blocks on an example.

    Attributes:
        wrong: why a block cannot be taken, by block.
        learnt: what was learnt of the others, by block.
        flops: operations of their branches.
        total: operations of the whole model.
    """

    wrong: dict[nn.Module, str] = field(default_factory=dict)
    learnt: dict[nn.Module, dict[str, Any]] = field(default_factory=dict)
    flops: float = 0.0
    total: float = 0.0


def called_with(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a model that an example stands for: a tensor, a tuple of arguments, or arguments by name."""
    if isinstance(example, Mapping):
        return (), dict(example)
    if isinstance(example, (tuple, list)):
        return tuple(example), {}
    return (example,), {}


def _few_rows(example: Any) -> Any:
    """An example of some rows of this one, which show as much; None if it cannot be told what its rows are."""
    tensors = [leaf for leaf in tree_leaves(example) if isinstance(leaf, Tensor)]
    sizes = {leaf.shape[0] if leaf.ndim else 0 for leaf in tensors}
    if len(sizes) != 1 or max(sizes) <= _ROWS:
        return None
    return tree_map(lambda leaf: leaf[:_ROWS] if isinstance(leaf, Tensor) else leaf, example)


def tried(model: nn.Module, blocks: Sequence[Any], example: Any) -> Tried:
    """Run a model once on an example (four rows of it), and compare each block with what it was taken for.

    The model is in eval mode meanwhile, no gradients are computed, and random number generators are put back.

    Args:
        model: with its blocks changed (`surgery.blocks.install_rules`).
        blocks: these.
        example: see `called_with`.

    Raises:
        ConfigError: the model fails on the example.
    """
    few = _few_rows(example)
    if few is not None:
        try:
            return _tried(model, blocks, few)
        except ConfigError:
            pass  # not all of it has the batch first
    return _tried(model, blocks, example)


def _tried(model: nn.Module, blocks: Sequence[Any], example: Any) -> Tried:
    args, kwargs = called_with(example)
    result = Tried()
    extra = 0.0

    def of(block: Any) -> Callable[..., Any]:
        def run(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            nonlocal extra
            if block in result.wrong or block in result.learnt:
                return forward(*args, **kwargs)
            inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            versions = [leaf._version for leaf in inputs]
            with Operations() as own:
                out = forward(*args, **kwargs)
            if versions != [leaf._version for leaf in inputs]:
                result.wrong[block] = "it overwrites what it is given"
                return out
            with Operations() as again:
                try:
                    seen = block.residrop_check(args, kwargs, out)
                except UsageError as error:
                    result.wrong[block] = str(error)
                else:
                    block.__dict__["residrop_checked"] = (None, 0) if seen else (0, 1)
                    result.learnt[block] = {name: block.__dict__[name] for name in _KEPT if name in block.__dict__}
                    result.flops += sum(block.__dict__.get("residrop_flops", (own.total,)))
            extra += again.total
            return out

        return run

    for block in blocks:
        block.__dict__["residrop_trying"] = of(block)
    devices = [leaf.device for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.is_cuda]
    try:
        with (
            torch.no_grad(),
            evaluating(model),
            torch.random.fork_rng(devices=devices[:1]),
            Operations() as counter,
        ):
            model(*args, **kwargs)
    except UsageError:
        raise
    except Exception as error:
        raise ConfigError(
            f"{type(model).__name__} fails on the example ({type(error).__name__}: {error}); give a batch as the model "
            "takes it: a tensor, a tuple of its arguments, or a dict of them by name"
        ) from error
    finally:
        for block in blocks:
            block.__dict__.pop("residrop_trying", None)
    result.total = counter.total - extra
    return result
