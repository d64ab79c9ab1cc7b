"""Arguments of blocks besides the hidden state: their names, and which of them are cut with the rows of the batch."""

import inspect
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map, tree_map_with_path

from residrop.common.errors import PlanError

__all__ = ["Cutting", "Signature", "Whole", "call", "is_cache", "pack", "refuse_caches", "settle_caches", "unpack"]


@dataclass(frozen=True)
class Signature:
    """What a forward takes: the names of its arguments in order, without `self`, and their defaults."""

    own: inspect.Signature
    names: tuple[str, ...]
    defaults: dict[str, Any]

    @classmethod
    def of(cls, forward: Callable[..., Any]) -> "Signature":
        """The signature of a function whose first argument is `self`."""
        _, *parameters = inspect.signature(forward).parameters.values()
        plain = [one for one in parameters if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)]
        named = [one for one in parameters if one.kind == one.KEYWORD_ONLY]
        defaults = {one.name: one.default for one in (*plain, *named) if one.default is not one.empty}
        return cls(inspect.Signature(parameters), tuple(one.name for one in plain), defaults)

    def take(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """The first argument of a call, and all others by name, defaults included; TypeError as the forward itself."""
        given = {**self.defaults, **dict(zip(self.names, args, strict=False)), **kwargs}
        if len(args) > len(self.names) or len(given) != len(self.own.parameters):
            self.own.bind(*args, **kwargs)
        return given.pop(self.names[0]), given


@dataclass(frozen=True)
class Whole:
    """A value that every row shares; the cutting of rows does not look inside."""

    value: Any


@dataclass(frozen=True)
class Cutting:
    """Which arguments of a block are cut with the rows.

    Attributes:
        whole: names of arguments that all rows share.
        cut: names of arguments whose tensors all have the batch dimension first.
    """

    whole: Collection[str] = ()
    cut: Collection[str] = ()


def pack(
    x: Tensor, where: str, cutting: Cutting, args: tuple[Any, ...], kwargs: dict[str, Any], names: Sequence[str] = ()
) -> Any:
    """(args, kwargs) with everything that is not to be cut wrapped in `Whole`.

    Where nothing is known of an argument, its tensors are cut if their first dimension is that of the hidden state, and
    shared if it is 1 (or there is none), as is everything that holds no numbers per row (None, bool, int, float, str).

    Args:
        x: the hidden state, Tensor[N, ...].
        where: what the arguments are of, for the error.
        cutting: what is known.
        args: positional arguments after the hidden state.
        kwargs: arguments by name.
        names: names of the positional ones, as far as they have any.

    Raises:
        PlanError: a tensor of another first dimension, one that may be meant either way, or an object (a cache of keys
            and values) without rows.
    """
    labels = [*names[: len(args)], *map(str, range(len(names), len(args)))]
    packed = [_packed(x, where, cutting, name, value) for name, value in zip(labels, args, strict=True)]
    return tuple(packed), {name: _packed(x, where, cutting, name, value) for name, value in kwargs.items()}


def _packed(x: Tensor, where: str, cutting: Cutting, name: str, value: Any) -> Any:
    if name in cutting.whole:
        return Whole(value)
    known = name in cutting.cut
    rows = x.shape[0]

    def one(path: Any, leaf: Any) -> Any:
        problem = "cannot be cut to the live rows of a batch of " + str(rows)
        if isinstance(leaf, Tensor):
            if leaf.ndim == 0 or leaf.shape[0] == 1:
                return Whole(leaf)
            what = f"a tensor of shape {tuple(leaf.shape)}"
            if leaf.shape[0] == rows:
                if known or rows not in x.shape[1:]:
                    return leaf
                problem = f"may have the {rows} rows of the batch first, or another dimension of that size"
        elif leaf is None or isinstance(leaf, (bool, int, float, complex, str, Whole)):
            return Whole(leaf)
        else:
            what = f"a {type(leaf).__name__}"
        raise PlanError(
            f"{where} got {what} as argument {name}{''.join(map(str, path))}, which {problem}; name it in "
            f"residrop.apply(..., whole=[...]) if all rows share it, in cut=[...] if its first dimension is the batch, "
            f"or use granularity='block'"
        )

    return tree_map_with_path(one, value)


_CACHE = (
    "got a cache of keys and values in a pass with coins; generate text in eval mode outside of residrop.sampling, or "
    "pass use_cache=False"
)


def refuse_caches(root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], given: bool) -> None:
    """PlanError if a model is given a cache that a block under a rule would only half fill, as `generate` gives it.

    It is asked before the first of a text's passes has drawn; `settle_caches` sees caches that come on other ways.
    """
    if given or not any(is_cache(value) for value in (*args, *kwargs.values())):
        return  # under a plan given by hand nothing is drawn
    for block in root.modules():
        taken = getattr(block, "residrop_signature", None)
        if taken is not None and not _NAMES.isdisjoint(taken.own.parameters):
            rules: Any = block.residrop_rules
            if any(rule.tosses() and min(rule.rates) < 1.0 for rule in rules):
                raise PlanError(f"{type(root).__name__} {_CACHE}")


_NAMES = frozenset({"cache", "layer_past", "past_key_value", "past_key_values"})


def is_cache(value: Any) -> bool:
    return hasattr(value, "get_seq_length")


def settle_caches(
    block: nn.Module, rules: Iterable[Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a block without caches of keys and values that a pass with coins would only half fill.

    Models of transformers make an empty cache in every forward. In training it is left out, and stays empty. A cache
    that holds something, or comes back after it was left out, belongs to a text whose earlier tokens went through
    other blocks than the next will, so it is refused.

    Raises:
        PlanError: a cache in training that is not new, or one in eval mode where rows or a branch are absent.
    """
    if not any(is_cache(value) for value in (*args, *kwargs.values())):
        return args, kwargs
    draws = [rule.draw() for rule in rules if rule.rates]
    if all(draw.expected or min(draw.rates) == 1.0 or (draw.alive and not block.training) for draw in draws):
        return args, kwargs

    def one(value: Any) -> Any:
        if not is_cache(value):
            return value
        left_out: set[int] = value.__dict__.setdefault("residrop_left_out", set())
        again = id(block) in left_out and torch._C._current_graph_task_id() == -1  # not a recomputation in backward
        if not block.training or again or _length(value, block) > 0:
            raise PlanError(f"{type(block).__name__} {_CACHE}")
        left_out.add(id(block))
        return None

    return tuple(map(one, args)), {name: one(value) for name, value in kwargs.items()}


def without_new_caches(
    block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a block as training leaves them: None in place of caches that hold nothing."""

    def one(value: Any) -> Any:
        return None if is_cache(value) and _length(value, block) == 0 else value

    return tuple(map(one, args)), {name: one(value) for name, value in kwargs.items()}


def _length(cache: Any, block: nn.Module) -> int:
    """Number of tokens that a cache holds for a block (blocks without rules before it may have filled their part), or
    whether it holds a state."""
    index = next((module.layer_idx for module in block.modules() if hasattr(module, "layer_idx")), 0)
    try:
        return int(cache.get_seq_length(index))
    except ValueError:  # a layer that keeps a state instead of tokens
        return int(cache.has_previous_state(index))


def unpack(packed: Any) -> Any:
    """What `pack` wrapped, unwrapped."""
    return tree_map(lambda leaf: leaf.value if isinstance(leaf, Whole) else leaf, packed)


def call(function: Callable[..., Any], x: Tensor, packed: Any) -> Any:
    """function(x, *args, **kwargs) with the arguments that `pack` gave."""
    args, kwargs = unpack(packed)
    return function(x, *args, **kwargs)
