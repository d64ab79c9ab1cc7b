"""Trying blocks on an example before they are taken."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from residrop.blocks.modes import evaluating
from residrop.common.errors import ConfigError, PlanError, UsageError
from residrop.surgery.arguments import without_new_caches
from residrop.surgery.operations import Operations

__all__ = ["Tried", "called_with", "tried"]

_KEPT = ("residrop_checked", "residrop_seen", "residrop_kinds", "residrop_forms", "residrop_unused")


@dataclass
class Tried:
    """What became of blocks on an example.

    Attributes:
        wrong: why a block cannot be taken, by block.
        needed: those of them that return what an absent block cannot, and the model needs it.
        streams: of those the arguments (see `StreamBlock.residrop_streams`), where all that a block returns is handed
            to the next block of its class.
        learnt: what was learnt of the others, by block.
        flops: operations of their branches.
        total: operations of the whole model.
    """

    wrong: dict[nn.Module, str] = field(default_factory=dict)
    needed: set[nn.Module] = field(default_factory=set)
    streams: dict[nn.Module, tuple[str | None, ...]] = field(default_factory=dict)
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


def _few_rows(example: Any, rows: int) -> Any:
    """An example of some rows of this one, which show as much; None if it cannot be told what its rows are."""
    tensors = [leaf for leaf in tree_leaves(example) if isinstance(leaf, Tensor)]
    sizes = {leaf.shape[0] if leaf.ndim else 0 for leaf in tensors}
    if len(sizes) != 1 or max(sizes) <= rows:
        return None
    return tree_map(lambda leaf: leaf[:rows] if isinstance(leaf, Tensor) else leaf, example)


def tried(model: nn.Module, blocks: Sequence[Any], example: Any, rows: int) -> Tried:
    """Run a model once on an example (a few rows of it), and compare each block with what it was taken for.

    The model is in eval mode meanwhile, no gradients are computed, and random number generators are put back.

    Args:
        model: with its blocks changed (`surgery.blocks.install_rules`).
        blocks: these.
        example: see `called_with`.
        rows: how many rows of it.

    Raises:
        ConfigError: the model fails on the example.
    """
    few = _few_rows(example, rows)
    if few is not None:
        try:
            return _tried(model, blocks, few)
        except ConfigError:
            pass  # not all of it has the batch first
    return _tried(model, blocks, example)


def _tried(model: nn.Module, blocks: Sequence[Any], example: Any) -> Tried:
    result = Tried()
    flops: dict[nn.Module, float] = {}
    extra = 0.0
    # of blocks that return what an absent one cannot: why, and at which leaves of their output it is
    unknown: dict[nn.Module, PlanError] = {}
    places: dict[nn.Module, list[bool]] = {}
    handed = _HandedOn()

    def look(block: Any, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        nonlocal extra
        if block in result.wrong or block in result.learnt:
            return forward(*args, **kwargs)
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        versions = [leaf._version for leaf in inputs]
        with Operations() as own:
            out = forward(*args, **kwargs)
        handed.see(block, args, kwargs, out)
        if versions != [leaf._version for leaf in inputs]:
            result.wrong[block] = "it overwrites what it is given"
            return out
        errors = block.__dict__["residrop_unknown"] = dict[str, PlanError]()
        with Operations() as again:
            try:
                seen = block.residrop_check(args, kwargs, out)
                if errors:
                    unknown[block] = next(iter(errors.values()))
                    places[block] = _gone(out, block.residrop_bare(args, kwargs), unknown[block])
            except UsageError as error:
                result.wrong[block] = str(error)
                unknown.pop(block, None)
            else:
                block.__dict__["residrop_checked"] = (None, 0) if seen else (0, 1)
                block.__dict__["residrop_unused"] = block.__dict__["residrop_unused"].union(errors)
                result.learnt[block] = {name: block.__dict__[name] for name in _KEPT if name in block.__dict__}
                flops[block] = sum(block.__dict__.get("residrop_flops", (own.total,)))
            finally:
                del block.__dict__["residrop_unknown"]
        extra += again.total
        return out

    def without(block: Any, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        leaves, spec = tree_flatten(forward(*args, **kwargs))
        pairs = zip(leaves, places[block], strict=True)
        return tree_unflatten([None if gone else leaf for leaf, gone in pairs], spec)

    with Operations() as counter:
        out = _run(model, blocks, look, example)
    if unknown and not _same(out, lambda: _run(model, list(unknown), without, example)):
        result.needed = set(unknown)
        result.streams = {block: streams for block in unknown if (streams := handed.streams(block)) is not None}
        for block, error in unknown.items():
            what = str(error).partition(":")[0].removesuffix(" that is none of its arguments")
            result.wrong[block] = f"{what}, which the model needs and an absent block cannot give"
            del result.learnt[block], flops[block]
    result.flops, result.total = sum(flops.values()), counter.total - extra
    return result


class _HandedOn:
    """Which outputs of blocks are arguments of the next block of their class."""

    def __init__(self) -> None:
        self.outputs: dict[int, tuple[type, int, Tensor]] = {}  # by id; kept so that no id comes twice
        self.names: dict[type, dict[int, str]] = {}  # by class and place among the outputs
        self.number: dict[type, int] = {}  # of outputs

    def see(self, block: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        kind = type(block)
        given = block.residrop_signature.own.bind_partial(*args, **kwargs).arguments
        for name, value in given.items():
            kept = self.outputs.get(id(value))
            if kept is not None and kept[0] is kind:
                self.names.setdefault(kind, {})[kept[1]] = name
        if isinstance(out, tuple):
            known = {id(value) for value in given.values()}
            new = [(place, one) for place, one in enumerate(out) if isinstance(one, Tensor) and id(one) not in known]
            self.outputs.update({id(one): (kind, place, one) for place, one in new})
            self.number[kind] = len(out)

    def streams(self, block: Any) -> tuple[str | None, ...] | None:
        """For every output of a block the argument that it becomes; None unless the first argument and others are."""
        names = self.names.get(type(block), {})
        if len(names) < 2 or block.residrop_signature.names[0] not in names.values():
            return None
        return tuple(names.get(place) for place in range(self.number[type(block)]))


def _run(model: nn.Module, blocks: Sequence[Any], through: Callable[..., Any], example: Any) -> Any:
    """What a model gives for an example if its blocks are called by `through(block, forward, args, kwargs)`.

    Raises:
        ConfigError: it fails.
    """
    args, kwargs = called_with(example)

    def of(block: Any) -> Callable[..., Any]:
        def run(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return through(block, forward, *without_new_caches(block, args, kwargs))

        return run

    for block in blocks:
        block.__dict__["residrop_trying"] = of(block)
    devices = [leaf.device for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.is_cuda]
    try:
        with torch.no_grad(), evaluating(model), torch.random.fork_rng(devices=devices[:1]):
            return model(*args, **kwargs)
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


def _gone(own: Any, bare: Any, error: PlanError) -> list[bool]:
    """For every leaf of a block's output whether it is None where the block is absent; `error` if that is another."""
    (leaves, spec), (others, other) = tree_flatten(own), tree_flatten(bare)
    if spec != other:
        raise error
    return [kept is None and leaf is not None for leaf, kept in zip(leaves, others, strict=True)]


def _same(expected: Any, run: Callable[[], Any]) -> bool:
    """Whether a run gives what was expected, to the last bit."""
    try:
        (wanted, spec), (found, other) = tree_flatten(expected), tree_flatten(run())
    except (UsageError, ValueError):
        return False
    return spec == other and all(map(_equal, wanted, found))


def _equal(a: Any, b: Any) -> bool:
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return type(a) is type(b)
    return a.shape == b.shape and torch.allclose(a, b, rtol=0.0, atol=0.0, equal_nan=True)
