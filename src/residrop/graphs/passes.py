"""Whole passes as CUDA graphs, for draws that decide no kernel and no size."""

from functools import partial

import torch
from torch import Tensor, nn

from residrop.attach import before_root, rules_of, sampler_of, using
from residrop.compiling import replays, with_forward
from residrop.errors import ConfigError
from residrop.graphs.segment import Capture, Segment, check, record, recording, replayed
from residrop.kept import Kept
from residrop.sampler import DepthSampler

__all__ = ["record_pass"]


def record_pass(model: nn.Module, x: Tensor, *, compiled: bool = False, capture: Capture | None = None) -> None:
    """Record the whole training pass as two CUDA graphs, forward and backward, which are replayed from then on.

    For models whose draws decide no kernel and no size (`residrop.compiling.replays`): at constant depth, and with
    unit-level rules if `compiled`, whose keys and thetas are then data that every pass brings along. Elsewhere
    (another batch size, `eval()`, no gradients) the model runs as before, uncompiled. The rest is as in
    `record_blocks`, also what the graphs need of gradients.

    Args:
        model: attached, in training mode, on a CUDA device, and called with one Tensor[N, ...]. Its weights and buffers
            are as before afterwards.
        x: a batch as they will come; enter the autocast of the training around this call.
        compiled: record the kernels of `torch.compile(model)`.
        capture: what records; by default CUDA graphs.

    Raises:
        ConfigError: the model is not on a CUDA device, not in training mode, or its draws do not allow it.
    """
    check(model, x, capture)
    hook = before_root(model)
    random = any(rule.rates for rule in rules_of(model))
    if hook is None or not replays(model) or (random and not compiled):
        raise ConfigError(
            f"a whole pass of {type(model).__name__} cannot be recorded: that takes an attached model at constant "
            "depth, or compiled=True and unit-level rules alone; use record_blocks for block-level rules"
        )
    if random:
        hook.boards, hook.kept = True, Kept()
    own = model.forward
    sampler = sampler_of(model)
    with recording(model, x.device.type), using(model, sampler.plan()):
        hook.begin(model, ((x,), {}), hook.boards)
        drawn = _drawn(sampler)
        segment = Segment(torch.compile(own) if compiled else own, x, [model])
        record([segment], capture)

    def forward(x: Tensor) -> Tensor:
        if _drawn(sampler) == drawn and segment.fits(x):
            return replayed(segment, x)
        return own(x)

    model._compiled_call_impl = partial(with_forward, model, forward)


def _drawn(sampler: DepthSampler) -> list[bool]:
    """Which rules have drawn coins for the coming pass; without them their expectation is meant."""
    return [] if sampler.board is None else [coins is not None for coins in sampler.board.coins]
