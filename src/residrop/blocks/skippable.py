"""Blocks that are passed by when all their branches are absent, before any engine's hooks see the call."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_map

from residrop.rules.base import Rule

__all__ = ["Skippable", "fewest_rows", "forget_blocks", "is_skipped", "left_whole", "parameters_of", "skip_when_absent"]

Part = nn.Module | nn.Parameter


def parameters_of(parts: Sequence[Part]) -> Iterator[nn.Parameter]:
    """The parameters of modules, and parameters given themselves."""
    for part in parts:
        if isinstance(part, nn.Parameter):
            yield part
        else:
            yield from part.parameters()


def fewest_rows(parts: Sequence[Part]) -> int:
    """The smallest batch of which modules can take statistics whatever the size of the map: 2 with batch norm among
    them, which refuses one row of a 1x1 map, as does a group norm of one channel a group; else 1."""
    inside = (module for part in parts if isinstance(part, nn.Module) for module in part.modules())
    return 1 + any(
        isinstance(one, _BatchNorm) or (isinstance(one, nn.GroupNorm) and one.num_groups == one.num_channels)
        for one in inside
    )


class Skippable(nn.Module):
    """Base of blocks with rules: says which of its parameters which rule may leave out.

    Its names begin with `residrop`, as it also stands in front of classes that nobody here wrote.

    A block that is sharded by itself (`torch.distributed.fsdp.fully_shard(block)`) gathers its parameters in a hook
    that runs before its forward. So for sharded blocks, and for those only, the call looks at the draw first: where no
    parameter is needed it goes straight to `forward`, and the block is neither gathered nor reduced. Forward hooks
    that others put on the block do not run then, either.
    """

    # called as (root, args, kwargs, given) before a pass with coins, which are `given` by hand or about to be drawn
    residrop_checks: tuple[Callable[[nn.Module, tuple[Any, ...], dict[str, Any], bool], None], ...] = ()

    def residrop_branches(self) -> Sequence[tuple[Rule, Sequence[Part]]]:
        """Every rule of the block with the modules (or parameters) that only its branch uses."""
        raise NotImplementedError

    def residrop_absent(self) -> bool:
        """Whether the coming forward computes no branch of this block, on any rank."""
        return all(
            rule.scope == "shared" and rule.draw().alive is False and not rule.runs_absent
            for rule, _ in self.residrop_branches()
        )

    def residrop_unchecked(self) -> bool:
        """Whether the next training forward compares what rows give by themselves with what they give in a batch."""
        return False

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if hasattr(cls, "_get_fsdp_state"):  # fully_shard makes this class, under the block's own one
            skip_when_absent(cls)


def left_whole(block: nn.Module, rules: Iterable[Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The call of a block as one node, where `torch.fx` traces a pass with coins, which no graph can hold: the graph
    calls the block, which goes on drawing. None elsewhere."""
    proxy = next((one for one in (*args, *kwargs.values()) if isinstance(one, Proxy)), None)
    if proxy is None or not any(rule.tosses() for rule in rules):
        return None
    tracer: Any = proxy.tracer
    return tracer.create_proxy("call_module", tracer.path_of_module(block), args, kwargs)


def is_skipped(module: nn.Module) -> bool:
    """Whether the coming forward of a block, or of a wrapper around blocks, uses none of its parameters."""
    found: list[Skippable] | None = module.__dict__.get("_only_branches")
    if found is None:
        found = [one for one in module.modules() if isinstance(one, Skippable)]
        inside = {id(p) for block in found for _, parts in block.residrop_branches() for p in parameters_of(parts)}
        if not all(id(parameter) in inside for parameter in module.parameters()):
            found = []  # a shortcut's parameters, say, are needed in every pass
        module.__dict__["_only_branches"] = found  # not an attribute proper, which would register the blocks once more
    return bool(found) and all(block.residrop_absent() for block in found)


def forget_blocks(model: nn.Module) -> None:
    """Drop what `is_skipped` remembers of a model, whose blocks are no longer what they were."""
    for module in model.modules():
        module.__dict__.pop("_only_branches", None)


def skip_when_absent(cls: type[nn.Module]) -> None:
    """Make calls of sharded modules of a class go straight to `forward`, past all hooks, when `is_skipped` says so."""
    cls.__call__ = _call_sharded


def _call_sharded(self: Any, *args: Any, **kwargs: Any) -> Any:
    if not is_skipped(self):
        return nn.Module.__call__(self, *args, **kwargs)
    # what the hooks would do to the dtypes of a block that is present
    policy = self._get_fsdp_state()._mp_policy
    if policy.cast_forward_inputs:
        args, kwargs = _cast((args, kwargs), policy.param_dtype)
    return _cast(self.forward(*args, **kwargs), policy.output_dtype)


def _cast(value: Any, dtype: torch.dtype | None) -> Any:
    if dtype is None:
        return value
    return tree_map(lambda one: one.to(dtype) if isinstance(one, Tensor) and one.is_floating_point() else one, value)
