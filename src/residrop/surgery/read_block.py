"""Blocks whose branches were read from the source of their forward."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from residrop.blocks.skippable import Part, parameters_of
from residrop.common.errors import ConfigError, PlanError, UsageError
from residrop.rules.base import Rule
from residrop.surgery.arguments import Whole, is_cache
from residrop.surgery.blocks import AppliedBlock, ForeignBlock
from residrop.surgery.generic import Call
from residrop.surgery.operations import Operations
from residrop.surgery.reading.questions import part_at
from residrop.surgery.reading.read import Reading, read, read_again
from residrop.surgery.rowwise import full_precision, looking_on, seen_alike

__all__ = ["ReadBlock", "mixin_of"]

# How many dimensions an argument of this name has at least if its first one is the batch: an attention mask
# [N, 1, T, T] has 4, [T, T] is shared. Other names are told by sizes, and checked on the first batch.
_LEAST_DIMENSIONS: Mapping[str, int] = {
    "attn_mask": 4,
    "rope": 4,
    "rope_cos": 3,
    "rope_sin": 3,
    "position_embeddings": 3,
    "shared_rel_pos": 4,
    "shared_rel_pos_bias": 4,
}


class ReadBlock(ForeignBlock):
    """A block with a rule for every branch that was found in its forward.

    Attributes:
        residrop_reading: what was read.
    """

    residrop_reading: ClassVar[Reading]

    def residrop_branches(self) -> Sequence[tuple[Rule, Sequence[Part]]]:
        own = self.__dict__.get("residrop_own_paths")
        if own is None:
            own = self.__dict__["residrop_own_paths"] = _own_paths(self, self.residrop_reading)
        found: list[tuple[Rule, Sequence[Part]]] = []
        for rule, paths in zip(self.residrop_rules, own, strict=True):
            assert isinstance(rule, Rule)
            parts = (part_at(self, path) for path in paths)
            found.append((rule, [part for part in parts if part is not None]))
        return found

    def residrop_unchecked(self, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] = {}) -> bool:
        if super().residrop_unchecked(args, kwargs):
            return True
        # rows of arguments that have not come yet, or not with these dimensions, are looked at once more
        return "residrop_kinds" in self.__dict__ and _kind(args, kwargs) not in self.__dict__["residrop_kinds"]

    def residrop_absent(self) -> bool:
        # the block is looked at once, for which its parameters must be there
        return "residrop_checked" in self.__dict__ and super().residrop_absent()

    # what the forward that was written for the block calls

    def residrop_sum(
        self,
        number: int,
        x: Tensor,
        branch: Callable[..., Any],
        *,
        taken: dict[str, Any] | None = None,
        live: int = 0,
        shortcut: Callable[..., Tensor] | None = None,
        skip_taken: dict[str, Any] | None = None,
        post: nn.Module | None = None,
        batch: Any = None,
    ) -> Any:
        """shortcut(x) + branch(x) by rule `number`; with `live` a tuple of that and the branch's other values.

        Where `x` is Tensor[N * T, ...], the tokens of a `batch` Tensor[N, ...] as rows, the rule has it as [N, T, ...].
        """
        rule: Any = self.residrop_rules[number]
        if isinstance(batch, Tensor) and rule.granularity == "row" and _has_flat(batch, x):
            sequences = x.unflatten(0, (batch.shape[0], -1))
            return self.residrop_sum(number, sequences, partial(_of_tokens, branch)).flatten(0, 1)
        taken = taken or {}
        skip: Any = shortcut
        if shortcut is not None and skip_taken:
            skip = partial(shortcut, **skip_taken)
        trial: _Trial | None = self.__dict__.get("residrop_trial")
        if trial is not None:
            return trial.sum(self, number, x, branch, taken, live, skip, post)
        settled = post is not None and shortcut is None and "residrop_settled" in self.__dict__
        if not live:
            return self.residrop_through(number, x, branch, shortcut=skip, post=post, settled=settled, **taken)
        call = Call(self, branch, None, rule.cuts_rows(), (x, (), taken), number)
        y = self.residrop_through(number, x, call, shortcut=skip, post=post, settled=settled, **taken)
        return call.result(y, x, (), taken)

    def residrop_own(self, x: Any) -> Any:
        """A value that may be overwritten: the sum of an absent branch is the block's own input."""
        return x.clone() if isinstance(x, Tensor) else x

    def residrop_plain(self, module: nn.Module) -> None:
        """PlanError if a child, whose forward is part of what was written, has become more than its forward."""
        if "forward" in module.__dict__ or module._forward_hooks or module._forward_pre_hooks:
            raise PlanError(
                f"{type(self).__name__} has a {type(module).__name__} with hooks, or a forward of its own, across "
                "which its branches go; put the hooks on the modules inside of it or on the block, or use "
                "residrop.apply(..., branches=False)"
            )

    def residrop_changed(self) -> None:
        """PlanError: the forward that was written holds for other attributes of the block."""
        raise PlanError(
            f"an attribute of a {type(self).__name__} has changed that decides what its forward does; call "
            "residrop.remove(model) before such a change, and residrop.apply afterwards"
        )

    def residrop_cut(self, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return args, {name: self._residrop_marked(name, value, len(x)) for name, value in kwargs.items()}

    def _residrop_marked(self, own: str, value: Any, rows: int) -> Any:
        """A value with what is not to be cut in `Whole`."""
        name = own.rpartition("__")[0] or own
        if own in self.residrop_reading.variadic and isinstance(value, dict):
            return {key: self._residrop_marked(key, one, rows) for key, one in value.items()}
        whole, cut = self.__dict__.get("residrop_cutting", ((), ()))
        trial: _Trial | None = self.__dict__.get("residrop_trial")
        if name in whole:
            return Whole(value)
        return self._residrop_leaf(name, (own,), value, rows, name in cut, trial)

    def _residrop_leaf(
        self, name: str, place: tuple[Any, ...], value: Any, rows: int, cut: bool, trial: "_Trial | None"
    ) -> Any:
        """Marked, for one argument or one element of it, at this place."""
        if isinstance(value, (tuple, list)):
            made = [self._residrop_leaf(name, (*place, at), one, rows, cut, trial) for at, one in enumerate(value)]
            return tuple(made) if isinstance(value, tuple) else made
        if isinstance(value, dict):
            return {key: self._residrop_leaf(name, (*place, key), one, rows, cut, trial) for key, one in value.items()}
        if isinstance(value, Tensor):
            size = value.shape[0] if value.ndim else 0
            batched = size == rows
            heads = name.endswith("mask") and value.ndim == 3 and size > rows and size % rows == 0
            if not cut and not heads:
                # what was seen when the block was looked at tells more than sizes, which may agree by chance
                seen = self.__dict__.get("residrop_seen", {}).get((place, value.ndim))
                shared = trial is not None and name in trial.shared
                if shared or seen is False or value.ndim < _LEAST_DIMENSIONS.get(name, 1):
                    batched = False
                if trial is not None:
                    trial.note(name, (place, value.ndim), batched, size)
                if not batched and not (seen and size > 1 and size != rows):
                    return Whole(value)
            elif trial is not None:
                trial.note(name, (place, value.ndim), batched, size)
            if batched:
                return value
        elif value is None or isinstance(value, (bool, int, float, complex, str, Whole, torch.dtype, torch.device)):
            return Whole(value)
        what = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise PlanError(
            f"{type(self).__name__} with row-level presence got {what} as argument {name}, of which it does not know "
            f"the live rows of a batch of {rows}; name it in residrop.apply(..., whole=[...]) if all rows share it, in "
            "cut=[...] if its first dimension is the batch, or use granularity='block'"
        )

    # what is looked at once

    def residrop_check(self, args: tuple[Any, ...], kwargs: dict[str, Any], own: Any = None) -> bool | None:
        rules: list[Any] = list(self.residrop_rules)
        x = _first_tensor(args, kwargs)
        if x is None:
            raise PlanError(
                f"{type(self).__name__} was called without a tensor, so it is no block x + F(x); leave it out"
            )
        if x.is_nested or any(map(is_cache, (*args, *kwargs.values()))):
            return False  # what a pass leaves in a cache would be seen by the next
        rowwise = any(rule.granularity == "row" for rule in rules)
        if rowwise and len(x) < 2:
            return None

        seen: dict[Any, bool] = {}

        def trial(shared: frozenset[str]) -> tuple[Any, _Trial]:
            made = _Trial(x, rowwise, shared, flops=own is not None)
            self.__dict__["residrop_trial"] = made
            try:
                given = _copied(args), _copied(kwargs)  # a block may overwrite what it is given
                out = self.residrop_forward(*given[0], **given[1])
                seen.clear()
                seen.update(made.seen)
                return out, made
            except (
                RuntimeError,
                LookupError,
                ValueError,
                AssertionError,
                TypeError,
                NameError,
                AttributeError,
            ) as error:
                if isinstance(error, (torch.OutOfMemoryError, UsageError)):
                    raise
                return None, made
            finally:
                del self.__dict__["residrop_trial"]
                if shared == frozenset() and made.flops:
                    self.__dict__["residrop_flops"] = tuple(made.flops)

        with looking_on(self, x), full_precision(self, x):
            if own is None:
                own = super(AppliedBlock, self).forward(*_copied(args), **_copied(kwargs))
            if not seen_alike(self, x, own, trial):
                return False
        if rowwise:
            self.__dict__["residrop_seen"] = {**self.__dict__.get("residrop_seen", {}), **seen}
            self.__dict__["residrop_kinds"] = {*self.__dict__.get("residrop_kinds", ()), _kind(args, kwargs)}
        return True

    def residrop_bare(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The block's output with its own hidden state, and with what else it returns as where it is absent."""
        x = _first_tensor(args, kwargs)
        assert x is not None  # the block was looked at
        self.__dict__["residrop_trial"] = _Trial(x, rowwise=False, shared=frozenset(), flops=False, bare=True)
        try:
            with looking_on(self, x):
                return self.residrop_forward(*_copied(args), **_copied(kwargs))
        finally:
            del self.__dict__["residrop_trial"]


def _first_tensor(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    return next((one for one in (*args, *kwargs.values()) if isinstance(one, Tensor)), None)


def _has_flat(batch: Tensor, x: Any) -> bool:
    """Whether x may have several rows for each of a batch; what its rows are is seen when the block is looked at."""
    if not isinstance(x, Tensor) or not batch.ndim or not x.ndim or batch.shape[0] == 0:
        return False
    return x.shape[0] > batch.shape[0] and x.shape[0] % batch.shape[0] == 0


def _of_tokens(branch: Callable[[Tensor], Tensor], sequences: Tensor) -> Tensor:
    """A branch of Tensor[N * T, ...] on Tensor[N, T, ...]."""
    return branch(sequences.flatten(0, 1)).unflatten(0, sequences.shape[:2])


def _copied(value: Any) -> Any:
    return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, value)


class _Trial:
    """A pass through the forward that was written in which every branch is present: for all rows, or for some of
    them where rows are cut.

    Args:
        x: the block's input.
        rowwise: whether only some rows go through branches.
        shared: names of arguments that are not cut.
        flops: whether to count the operations of the branches for all rows.
        bare: whether what branches give besides the hidden state is what it is where they are absent.
    """

    def __init__(self, x: Tensor, rowwise: bool, shared: frozenset[str], flops: bool, bare: bool = False) -> None:
        self.total, self.rowwise, self.shared, self.count, self.bare = len(x), rowwise, shared, flops, bare
        self.flops: list[float] = []
        self.rows = torch.arange(
            len(x) - 1, -1, -2, device=x.device
        )  # backwards: causal attention over them would differ
        self.names: dict[str, None] = {}
        self.seen: dict[Any, bool] = {}
        self.branches: list[Tensor] = []

    def sum(
        self,
        block: ReadBlock,
        number: int,
        x: Tensor,
        branch: Callable[..., Any],
        taken: dict[str, Any],
        live: int,
        skip: Callable[..., Tensor] | None,
        post: nn.Module | None,
    ) -> Any:
        """What `ReadBlock.residrop_sum` gives, without a rule."""
        rule: Any = block.residrop_rules[number]
        if not isinstance(x, Tensor):
            raise PlanError(
                f"{type(block).__name__} adds to a {type(x).__name__} where a hidden state was expected; leave it out "
                "of `blocks`"
            )
        version = None if x.is_inference() else x._version
        y = x if skip is None else skip(x)
        call = Call(block, branch, None, self.rowwise, (x, (), taken), number) if live else branch
        if self.rowwise and rule.granularity == "row":
            if len(x) != self.total:
                raise PlanError(
                    f"{type(block).__name__} with row-level presence has a branch of which the input, of shape "
                    f"{tuple(x.shape)}, has not the batch of {self.total} first; use granularity='block'"
                )
            packed = block.residrop_cut(x, (), taken)[1]
            cut = _cut(packed, self.rows)
            out = self._run(call, x.index_select(0, self.rows), cut, self.total / len(self.rows))
            z = y.index_add(0, self.rows, out.to(y.dtype))
        else:
            out = self._run(call, x, taken, 1.0)
            z = y + out
        self.branches.append(out)
        if version is not None and x._version != version:
            raise ConfigError(
                f"{type(block).__name__} overwrites the input of a branch, which its shortcut needs; make the first "
                "operation of the branch one that is not in place"
            )
        if post is not None:
            z = post(z)
        if not live:
            return z
        assert isinstance(call, Call)
        if self.bare:
            call.others = None
        return call.result(z, x, (), taken)

    def _run(self, branch: Callable[..., Any], x: Tensor, taken: dict[str, Any], share: float) -> Any:
        if not self.count:
            return branch(x, **taken)
        with Operations() as counter:
            out = branch(x, **taken)
        self.flops.append(counter.total * share)
        return out

    def note(self, name: str, key: Any, batched: bool, size: int) -> None:
        """Remember of a tensor whether it is cut, if that says something of other batches."""
        if batched:
            self.names[name] = None
        if batched or size > 1:
            self.seen[key] = batched


def _kind(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    """What decides which arguments are cut: which are tensors, of how many dimensions, with the batch first or not."""
    leaves = tree_flatten((args, dict(kwargs)))[0]
    rows = next((len(one) for one in leaves if isinstance(one, Tensor) and one.ndim), 0)
    return (
        len(args),
        *kwargs,
        *((one.ndim, one.ndim and len(one) == rows) if isinstance(one, Tensor) else None for one in leaves),
    )


def _cut(packed: Any, rows: Tensor) -> Any:
    """Tensors cut to some rows, and what is whole as it is."""
    leaves, spec = tree_flatten(packed)
    made = [
        leaf.index_select(0, rows) if isinstance(leaf, Tensor) else leaf.value if isinstance(leaf, Whole) else leaf
        for leaf in leaves
    ]
    return spec.unflatten(made)


def _own_paths(block: nn.Module, reading: Reading) -> tuple[tuple[str, ...], ...]:
    """For every branch the paths of what only it uses."""

    def inside(paths: Sequence[str] | frozenset[str]) -> set[int]:
        parts = (part_at(block, path) for path in paths)
        return {id(one) for one in parameters_of([part for part in parts if part is not None])}

    used = [inside(branch.paths) for branch in reading.branches]
    around = inside(reading.elsewhere)
    own: list[tuple[str, ...]] = []
    for number, branch in enumerate(reading.branches):
        others = around.union(*(each for other, each in enumerate(used) if other != number))
        own.append(tuple(path for path in branch.paths if not inside([path]) & others))
    return tuple(own)


_MIXINS: dict[int, type[ReadBlock]] = {}


def mixin_of(block: nn.Module) -> type[ReadBlock] | None:
    """The mixin for the branches that are found in a block's forward; None if there are none."""
    reading = read(block)
    return _mixin(type(block), reading) if reading.branches else None


def _mixin(block_class: type[nn.Module], reading: Reading) -> type[ReadBlock]:
    key = id(reading)  # readings are kept for good
    if key not in _MIXINS:
        log: dict[tuple[Hashable, ...], Any] = dict(reading.log)
        attributes = {
            **reading.methods,
            "residrop_reading": reading,
            "residrop_made": (_again, (block_class, tuple(log.items())), {}),
            "__doc__": ReadBlock.__doc__,
        }
        _MIXINS[key] = type("ReadBlock", (ReadBlock,), attributes)
    return _MIXINS[key]


def _again(block_class: type[nn.Module], log: tuple[tuple[tuple[Hashable, ...], Any], ...]) -> type[ReadBlock]:
    return _mixin(block_class, read_again(block_class, dict(log)))
