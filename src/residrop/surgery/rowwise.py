"""Whether rows of a batch may enter a block by themselves: block(x)[rows] against block(x[rows]), compared once.

Row level cuts the hidden state, and every argument whose first size is that of the batch, to the live rows. That is
right if the first dimension is the batch in all of them, which sizes alone do not tell: a hidden state may come as
[tokens, batch, width] (`batch_first=False`), and a mask [tokens, tokens] may happen to be as long as the batch.
"""

from collections import OrderedDict
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from residrop.blocks.modes import evaluating
from residrop.common.errors import ConfigError, PlanError
from residrop.surgery.arguments import Whole, call

__all__ = ["check_batch_first", "check_rows", "full_precision", "looking_on", "seen_alike"]


def check_batch_first(name: str, block: nn.Module) -> None:
    """ConfigError if a block of a class that says where its batch is has it elsewhere than first."""
    if isinstance(block, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)):
        attention: Any = block.self_attn
        if not attention.batch_first:
            raise ConfigError(
                f"block {name!r} takes [tokens, batch, width] (batch_first=False), so its rows are no samples; use "
                "granularity='block', or build the model with batch_first=True"
            )


@contextmanager
def looking_on(block: nn.Module, x: Tensor) -> Generator[None, None, None]:
    """For runs of a block that are no part of the training: in eval mode, without gradients, randomness put back, and
    without the hooks of users, who would count or record what is no forward of the model."""
    devices = [x.device] if x.device.type == "cuda" else []
    kept: list[tuple[nn.Module, str, Any]] = []
    for module in block.modules():
        for name in ("_forward_hooks", "_forward_pre_hooks"):
            hooks = getattr(module, name)
            if any(not _is_of_torch(hook) for hook in hooks.values()):
                kept.append((module, name, hooks))
    with torch.no_grad(), evaluating(block), torch.random.fork_rng(devices=devices):
        try:
            for module, name, hooks in kept:
                setattr(module, name, OrderedDict((key, hook) for key, hook in hooks.items() if _is_of_torch(hook)))
            yield
        finally:
            for module, name, hooks in kept:
                setattr(module, name, hooks)


def _is_of_torch(hook: Any) -> bool:
    """Whether a hook is one that makes a module what it is: weight norms, sharded parameters."""
    return (getattr(hook, "__module__", None) or type(hook).__module__).partition(".")[0] == "torch"


def check_rows(
    block: nn.Module,
    run: Callable[..., Tensor],
    x: Tensor,
    given: tuple[tuple[Any, ...], dict[str, Any]],
    along: Sequence[Any],
    names: Sequence[str],
) -> bool:
    """PlanError unless some rows of a batch give by themselves what they give within it.

    It costs about one and a half forwards of the block, in eval mode and without gradients; nothing is drawn from the
    random number generators in the end, and no statistics move.

    Args:
        block: whose training flags are put back.
        run: (x, *args, **kwargs) to the block's output, Tensor of the shape of x.
        x: Tensor[N, ...], N at least 2.
        given: the other arguments as the block got them.
        along: () or the same as `surgery.arguments.pack` gives them.
        names: names of the positional ones.

    Returns:
        Whether it could be seen: not where what the block adds is not finite, or so small
        beside its input that rounding hides it (as at the start where the last layer is zero).
    """
    args, kwargs = given
    rows = torch.arange(len(x) - 1, -1, -2, device=x.device)  # backwards: causal attention over them would differ
    packed = along[0] if along else ((), {})
    with looking_on(block, x), full_precision(block, x):
        expected = run(x.clone(), *args, **kwargs)
        branch = _size(expected - x)
        allowed = _tolerance(block, x, expected) * branch + torch.finfo(expected.dtype).eps * _size(x)
        if not isfinite(branch) or allowed > branch / 4:
            return False

        def differs(packed: Any, dim: int = 0) -> bool:
            cut = tree_map(lambda leaf: leaf.index_select(0, rows) if isinstance(leaf, Tensor) else leaf, packed)
            try:
                found = call(run, x.index_select(dim, rows), cut)
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, IndexError, ValueError, AssertionError):
                return True
            wanted = expected.index_select(dim, rows)
            return found.shape != wanted.shape or not _size(found - wanted) <= allowed

        if not differs(packed):
            return True
        where = f"{type(block).__name__} with row-level presence"
        for name in [*names[: len(args)], *kwargs]:
            if _is_cut(packed, name, names) and not differs(_with_whole(packed, name, names)):
                raise PlanError(
                    f"{where} got an argument {name} that all rows share, although its first size is that of the batch "
                    f"({len(x)}); name it in residrop.apply(..., whole=[{name!r}]), or use granularity='block'"
                )
        whole = (tuple(map(Whole, args)), {name: Whole(value) for name, value in kwargs.items()})
        if x.ndim > 2 and x.shape[1] > 1:
            rows = torch.arange(x.shape[1] - 1, -1, -2, device=x.device)
            if not differs(whole, 1):
                raise PlanError(
                    f"{where}: the batch seems to be dimension 1 of its input of shape {tuple(x.shape)} (a layer with "
                    "batch_first=False?), so that dropping rows would drop parts of all samples; use "
                    "granularity='block', or give the model batch_first=True"
                )
        raise PlanError(
            f"{where}: what it gives for some rows of an input of shape {tuple(x.shape)} depends on the other rows, or "
            "an argument has to be cut with them and is not; use granularity='block', name arguments in "
            "residrop.apply(..., whole=[...], cut=[...]), or leave the block out of `blocks`"
        )


def seen_alike(block: nn.Module, x: Tensor, own: Any, trial: Callable[[frozenset[str]], tuple[Any, Any]]) -> bool:
    """PlanError unless a block gives, with its branches called by themselves, what its own forward gives.

    It costs one forward of the block (half of one where rows are cut), and as much again for every argument of which
    has to be found out whether rows share it. It is called within `looking_on`.

    Args:
        block: whose training flags are put back.
        x: its input, Tensor[N, ...].
        own: what its own forward gave.
        trial: calls the forward that was written, in which these arguments are not cut; returns what that gives, and
            what it knows: `rowwise`, `rows`, `names` (of the arguments that were cut) and `branches` (what they gave).

    Returns:
        Whether it could be seen: not where branches are not finite, or so small beside the input that rounding hides
        them. The last `trial` was the one that gave the same.
    """
    expected = [leaf for leaf in tree_leaves(own) if isinstance(leaf, Tensor) and leaf.is_floating_point()]

    def differs(shared: frozenset[str]) -> tuple[bool | None, Any]:
        """Whether it differs; None where that cannot be seen."""
        found, made = trial(shared)
        if found is None:
            return True, made
        leaves = [leaf for leaf in tree_leaves(found) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        if not leaves or not expected:
            return None, made
        branch = min((_size(one) for one in made.branches), default=0.0)
        if not isfinite(branch):
            return None, made
        # besides the first of them a block may give what is of some rows only: the weights of an attention
        pairs = zip(expected, leaves, strict=True) if len(expected) == len(leaves) else [(expected[0], leaves[0])]
        seen = True
        for number, (wanted, got) in enumerate(pairs):
            if wanted.shape != got.shape:
                if number and made.rowwise:
                    continue
                return True, made
            if made.rowwise and wanted.ndim and len(wanted) == len(x):
                wanted, got = wanted.index_select(0, made.rows), got.index_select(0, made.rows)
            allowed = _tolerance(block, x, wanted) * branch + 2 * torch.finfo(wanted.dtype).eps * _size(wanted)
            difference = _size(got - wanted)
            if not difference <= allowed:
                return (True if isfinite(difference) else None), made
            seen = seen and allowed <= branch / 4
        return (False if seen and branch else None), made

    answer, made = differs(frozenset())
    if answer is None:
        return False
    if answer:
        _find_shared(block, differs, made, x.shape)
    return True


def _find_shared(
    block: nn.Module, differs: Callable[[frozenset[str]], tuple[bool | None, Any]], made: Any, shape: torch.Size
) -> None:
    """Find an argument that has to be left whole for rows to be right; PlanError if there is none such."""
    for name in made.names:
        if differs(frozenset({name}))[0] is False:
            return
    where = f"{type(block).__name__}, with its branches called by themselves,"
    if not made.rowwise:
        raise PlanError(
            f"{where} gives something else than its own forward; use residrop.apply(..., branches=False), or leave it "
            "out of `blocks`"
        )
    raise PlanError(
        f"{where} gives for some rows of an input of shape {tuple(shape)} something else than for all of them: its "
        "first dimension is not the batch, rows depend on each other, or an argument has to be cut with them and is "
        "not; use granularity='block', name arguments in residrop.apply(..., whole=[...], cut=[...]), or leave the "
        "block out of `blocks`"
    )


def _size(x: Tensor) -> float:
    """Root of the mean square, in which rounding errors average out; Tensor[...]."""
    return x.double().square().mean().sqrt().item()


def full_precision(block: nn.Module, x: Tensor) -> AbstractContextManager[Any]:
    """Without autocast, where the block can do without."""
    dtypes = {x.dtype, *(parameter.dtype for parameter in block.parameters())}
    if torch.is_autocast_enabled(x.device.type) and dtypes == {torch.float32}:
        return torch.autocast(x.device.type, enabled=False)
    return nullcontext()


def _tolerance(block: nn.Module, *tensors: Tensor) -> float:
    """Relative difference between two orders of the same sums, in the coarsest format that takes part."""
    dtypes = {one.dtype for one in (*tensors, *block.parameters()) if one.is_floating_point()}
    device = tensors[0].device.type
    if torch.is_autocast_enabled(device):
        dtypes.add(torch.get_autocast_dtype(device))
    coarsest = max(torch.finfo(dtype).eps for dtype in dtypes)
    if device == "cuda" and torch.float64 not in dtypes:
        coarsest = max(coarsest, 2.0**-11)  # matrix products may be of TF32
    return max(4 * coarsest, 1e-5)


def _is_cut(packed: Any, name: str, names: Sequence[str]) -> bool:
    args, kwargs = packed
    value = kwargs[name] if name in kwargs else args[names.index(name)]
    return any(isinstance(leaf, Tensor) for leaf in tree_leaves(value))


def _with_whole(packed: Any, name: str, names: Sequence[str]) -> Any:
    args, kwargs = packed
    if name in kwargs:
        return args, {**kwargs, name: tree_map(_whole, kwargs[name])}
    place = names.index(name)
    return (*args[:place], tree_map(_whole, args[place]), *args[place + 1 :]), kwargs


def _whole(leaf: Any) -> Any:
    return leaf if isinstance(leaf, Whole) else Whole(leaf)
