"""FSDP2: blocks that are gathered ahead of their turn, chosen anew from every draw; complete checkpoints."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from residrop.blocks.skippable import Skippable, is_skipped, skip_when_absent
from residrop.common.checks import check_whole
from residrop.common.errors import ConfigError

__all__ = ["complete_state", "prefetch"]


def prefetch(model: nn.Module, blocks: Sequence[nn.Module], *, forward: int = 1, backward: int = 1) -> RemovableHandle:
    """Gather live blocks of a model sharded by `fully_shard` ahead of their turn; dead ones never.

    A fixed list (`set_modules_to_forward_prefetch`) names blocks that may be dead in a step and gathers them for
    nothing. Here every forward sets the lists from its own draw, before the first block runs: each live block gathers
    the next live ones.

    Sharded wrappers around blocks (of activation checkpointing, say) are accepted, too; from this call on they are
    passed by when their block is dead, as sharded blocks themselves are without any call.

    Args:
        model: the attached model, sharded; its draws must be made by `attach` before this call.
        blocks: its sharded blocks in the order of their forward.
        forward: how many live blocks are gathered ahead in forward; 0 leaves forward to FSDP, which gathers none
            ahead.
        backward: the same in backward; 0 leaves it to FSDP, which gathers one ahead (of the blocks that ran).

    Returns:
        A handle; `remove()` ends it (the lists of the last step stay).

    Raises:
        ConfigError: a block is not sharded or has no rule inside, or a number is below 0.
    """
    check_whole("forward", forward, least=0)
    check_whole("backward", backward, least=0)
    chain: list[Any] = list(blocks)
    for number, block in enumerate(chain):
        ruled = any(isinstance(one, Skippable) for one in block.modules())
        if not ruled or not hasattr(block, "set_modules_to_forward_prefetch"):
            raise ConfigError(
                f"block {number} is {type(block).__name__}; give blocks with rules, each of them sharded by fully_shard"
            )
        if not isinstance(block, Skippable):
            skip_when_absent(type(block))

    def plan_ahead(module: nn.Module, args: object) -> None:
        if torch._C._current_graph_task_id() != -1:
            return  # a recomputation within backward: the lists stand
        live = [block for block in chain if not is_skipped(block)]
        for place, block in enumerate(live):
            block.set_modules_to_forward_prefetch(live[place + 1 : place + 1 + forward])
            block.set_modules_to_backward_prefetch(live[max(0, place - backward) : place][::-1])

    return model.register_forward_pre_hook(plan_ahead)


@torch.no_grad()
def complete_state(optimizer: torch.optim.Optimizer) -> None:
    """Give every parameter the optimizer state that it would get in its first step; nothing else changes.

    Optimizers make a parameter's state when it first has a gradient, so a block that has not lived yet has none, and
    `torch.distributed.checkpoint` cannot load what was saved (a missing key). Called once before training, all
    checkpoints have all keys, and training goes on as without: the states are zeros at step 0. (SGD with momentum and a
    dampening other than 0 would weigh a first gradient differently, and is refused.)

    Args:
        optimizer: any of torch.optim that keeps tensors of zeros and a count of steps; of plain or sharded parameters.

    Raises:
        ConfigError: SGD with dampening.
    """
    if any(group.get("momentum") and group.get("dampening") for group in optimizer.param_groups):
        raise ConfigError("SGD starts its momentum without dampening, which zeros cannot do; set dampening=0")
    everything = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    fresh = [one for one in everything if one.requires_grad and not optimizer.state.get(one)]
    grads = [(one, one.grad) for one in everything]
    rates = [(group, group["lr"]) for group in optimizer.param_groups]
    for one in everything:
        one.grad = None
    for one in fresh:
        one.grad = torch.zeros_like(one)
    for group, rate in rates:
        group["lr"] = torch.zeros_like(rate) if isinstance(rate, torch.Tensor) else 0.0
    optimizer.step()
    for group, rate in rates:
        group["lr"] = rate
    for one, grad in grads:
        one.grad = grad
    for one in fresh:
        step = optimizer.state[one].get("step")
        if isinstance(step, torch.Tensor):
            step.zero_()
        elif step is not None:
            optimizer.state[one]["step"] = 0
