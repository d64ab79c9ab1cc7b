"""CUDA graphs of present blocks: Python tosses the coins, and a block that is present is one launch each way.

Networks of many small kernels train at the speed of the processor that launches them. A CUDA graph launches a whole
sequence at once, but repeats it as it was recorded, so it cannot hold a block-level coin. Hence one graph a block, and
another for its backward: any subset of them, in the order of the network, is a pass under a draw, and no draw is
recorded.

All graphs share one pool of memory. Memory that one of them returns is taken by later ones only (in the order forward
1 ... L, backward L ... 1), and a pass under any draw is a part of that order, so nothing is overwritten that is needed.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn

from residrop.blocks.attach import rules_of, sampler_of, using
from residrop.engines.graphs.segment import Capture, Segment, check, record, recording, replayed
from residrop.functional.rows import combined
from residrop.rules.base import Rule
from residrop.schedule.sampler import Plan

__all__ = ["record_blocks"]

Map = Callable[..., Tensor]


class _Call(NamedTuple):
    """What a rule asks for where its branch is present for the whole batch."""

    shortcut: Map
    branch: Map
    scale: float
    includes_input: bool
    post: Map | None
    along: Sequence[Any]

    def __call__(self, x: Tensor) -> Tensor:
        y = combined(self.shortcut(x), self.branch(x, *self.along), self.scale, self.includes_input)
        return y if self.post is None else self.post(y)


class _Blocks:
    """What stands in `Rule.compiled`: the parts of a block, with those that were compiled before behind it."""

    def __init__(self, behind: Any) -> None:
        self.behind = behind

    def present(self, x: Tensor, *call: Any) -> Tensor:
        """The block for all rows of x; `call` are the fields of a `_Call`."""
        return _Call(*call)(x) if self.behind is None else self.behind.present(x, *call)

    def part(self, branch: Map, x: Tensor, along: Sequence[Any]) -> Tensor:
        return branch(x, *along) if self.behind is None else self.behind.part(branch, x, along)

    def on_rows(self, branch: Map, fixed: bool) -> Map:
        return branch if self.behind is None else self.behind.on_rows(branch, fixed)


class _Noted(_Blocks):
    """Notes how it is called."""

    def __init__(self, behind: Any) -> None:
        super().__init__(behind)
        self.calls: list[tuple[_Call, Tensor]] = []

    def present(self, x: Tensor, *call: Any) -> Tensor:
        self.calls.append((_Call(*call), x))
        return super().present(x, *call)


class _Replayed(_Blocks):
    """Replays a recorded block where the call is the one that was recorded, with other numbers."""

    def __init__(self, behind: Any, segment: Segment) -> None:
        super().__init__(behind)
        self.segment = segment

    def present(self, x: Tensor, *call: Any) -> Tensor:
        _, _, scale, _, _, along = call
        if scale == self.segment.scale and not along and self.segment.fits(x):
            return replayed(self.segment, x)
        return super().present(x, *call)


def _modules_of(call: _Call) -> list[nn.Module] | None:
    """Whose parameters a block's parts use; None if that cannot be known, or if a graph would freeze what they do."""
    found: list[nn.Module] = []
    for part in (call.branch, call.shortcut, call.post):
        owner = part if isinstance(part, nn.Module) else getattr(part, "__self__", None)
        if part is None:
            continue
        if not isinstance(owner, nn.Module):
            return None
        found.append(owner)
    for module in (one for owner in found for one in owner.modules()):
        hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
        if isinstance(module, Rule) or any(hooks):
            return None  # coins, or what Python does in every pass
    return found


def record_blocks(model: nn.Module, x: Tensor, *, capture: Capture | None = None) -> int:
    """Record every block that block-level coins (or none) decide as two CUDA graphs, which its rule replays from then
    on wherever the block is present in a training pass like this one.

    Elsewhere (another batch size, `eval()`, no gradients, a factor 1/p that timing has changed) blocks run as before.
    The numbers are those of the same kernels run one by one. What the graphs need:

    - `zero_grad(set_to_none=True)`, PyTorch's default, before every backward pass, and one forward for each backward:
      gradients and outputs are the graphs' own memory, which the next pass overwrites. So no accumulation over
      micro-batches, and no gradient hooks of parameters (DDP, FSDP).
    - Parameters and buffers stay where they are; values may change (optimizers, `load_state_dict`).
    - Call it after `residrop.engines.compiling.compile_branches`, if at all; graphs then hold the compiled kernels.

    Left out are blocks whose branch is no module, takes further arguments, has hooks or rules inside, or runs twice in
    a pass, and those whose input needs no gradient.

    Args:
        model: attached, in training mode, on a CUDA device. Its weights and buffers are as before afterwards.
        x: a batch as they will come, Tensor[N, ...]; enter the autocast of the training around this call.
        capture: what records; by default CUDA graphs.

    Returns:
        The number of blocks that were recorded.

    Raises:
        ConfigError: the model is not on a CUDA device, or not in training mode.
    """
    check(model, x, capture)
    with recording(model, x.device.type):
        segments = _segments_of(model, x)
        record(list(segments.values()), capture)
    for rule, segment in segments.items():
        rule.compiled = _Replayed(rule.compiled, segment)
    return len(segments)


def _segments_of(model: nn.Module, x: Tensor) -> dict[Rule, Segment]:
    """The blocks that can be recorded, from input to output."""
    sampler = sampler_of(model)
    rules = [rule for rule in rules_of(model) if rule.granularity == "block"]
    noted = {rule: _Noted(rule.compiled) for rule in rules}
    draws = tuple(one if one.alive is None else one._replace(alive=True) for one in sampler.plan().draws)
    for rule, note in noted.items():
        rule.compiled = note
    try:
        with using(model, Plan(draws)):
            model(x)
    finally:
        for rule, note in noted.items():
            rule.compiled = note.behind
    found: dict[Rule, Segment] = {}
    for rule in [rule for rule in rules if len(noted[rule].calls) == 1]:
        call, given = noted[rule].calls[0]
        modules = None if call.along else _modules_of(call)
        if given.requires_grad and modules and any(p.requires_grad for m in modules for p in m.parameters()):
            found[rule] = Segment(partial(_run, rule.compiled, call), given, modules, call.scale)
    return found


def _run(parts: Any, call: _Call, x: Tensor) -> Tensor:
    return _Blocks(parts).present(x, *call)
