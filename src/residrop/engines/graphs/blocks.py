"""CUDA graphs of present blocks: Python tosses the coins, and a block that is present is one launch each way.

Networks of many small kernels train at the speed of the processor that launches them. A CUDA graph launches a whole
sequence at once, but repeats it as it was recorded, so it cannot hold a block-level coin. Hence one graph a block, and
another for its backward: any subset of them, in the order of the network, is a pass under a draw, and no draw is
recorded.

All graphs share one pool of memory. Memory that one of them returns is taken by later ones only (in the order forward
1 ... L, backward L ... 1), and a pass under any draw is a part of that order, so nothing is overwritten that is needed.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from residrop.blocks.attach import rules_of, sampler_of, using
from residrop.engines.graphs.segment import Capture, Segment, check, record, recording, replayed
from residrop.functional.call import BranchCall, Map
from residrop.rules.base import Rule
from residrop.rules.executor import Executor
from residrop.schedule.sampler import Plan

__all__ = ["record_blocks"]


class _Noted(Executor):
    """Notes how it is called, and has `behind` do it."""

    def __init__(self, behind: Executor) -> None:
        self.behind = behind
        self.calls: list[tuple[BranchCall, float, Tensor]] = []

    def present(self, x: Tensor, call: BranchCall, scale: float) -> Tensor:
        self.calls.append((call, scale, x))
        return self.behind.present(x, call, scale)

    def part(self, branch: Map, x: Tensor, along: Sequence[Any]) -> Tensor:
        return self.behind.part(branch, x, along)

    def on_rows(self, branch: Map, fixed: bool) -> Map:
        return self.behind.on_rows(branch, fixed)


class _Replayed(_Noted):
    """Replays a recorded block where the call is the one that was recorded, with other numbers."""

    def __init__(self, behind: Executor, segment: Segment) -> None:
        super().__init__(behind)
        self.segment = segment

    def present(self, x: Tensor, call: BranchCall, scale: float) -> Tensor:
        if scale == self.segment.scale and not call.along and self.segment.fits(x):
            return replayed(self.segment, x)
        return self.behind.present(x, call, scale)


def _modules_of(call: BranchCall) -> list[nn.Module] | None:
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
        rule.executor = _Replayed(rule.executor, segment)
    return len(segments)


def _segments_of(model: nn.Module, x: Tensor) -> dict[Rule, Segment]:
    """The blocks that can be recorded, from input to output."""
    sampler = sampler_of(model)
    rules = [rule for rule in rules_of(model) if rule.granularity == "block"]
    noted = {rule: _Noted(rule.executor) for rule in rules}
    draws = tuple(one if one.alive is None else one._replace(alive=True) for one in sampler.plan().draws)
    for rule, note in noted.items():
        rule.executor = note
    try:
        with using(model, Plan(draws)):
            model(x)
    finally:
        for rule, note in noted.items():
            rule.executor = note.behind
    found: dict[Rule, Segment] = {}
    for rule in [rule for rule in rules if len(noted[rule].calls) == 1]:
        call, scale, given = noted[rule].calls[0]
        modules = None if call.along else _modules_of(call)
        if given.requires_grad and modules and any(p.requires_grad for m in modules for p in m.parameters()):
            found[rule] = Segment(partial(_run, rule.executor, call, scale), given, modules, scale)
    return found


def _run(executor: Executor, call: BranchCall, scale: float, x: Tensor) -> Tensor:
    return executor.present(x, call, scale)
