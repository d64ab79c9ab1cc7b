"""Whole passes as CUDA graphs, for draws that decide no kernel and no size."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from residrop.blocks.attach import before_root, rules_of, sampler_of, using
from residrop.common.errors import ConfigError
from residrop.engines.compiling import replays, with_forward
from residrop.engines.graphs.segment import Capture, Segment, check, record, recording, replayed
from residrop.functional.static_draws import StaticDraws

__all__ = ["WholePass", "record_pass"]


class WholePass:
    """A model's forward for one graph, and what has to be drawn before every replay of it.

    Args:
        model: attached.
        compiled: compile the forward.

    Raises:
        ConfigError: the model's draws do not allow it: see `record_pass`.
    """

    def __init__(self, model: nn.Module, compiled: bool) -> None:
        hook = before_root(model)
        self._random = any(rule.rates for rule in rules_of(model))
        if hook is None or not replays(model) or (self._random and not compiled):
            raise ConfigError(
                f"a whole pass of {type(model).__name__} cannot be recorded: that takes an attached model at constant "
                "depth, or compiled=True and unit-level rules alone; use record_blocks for block-level rules"
            )
        if self._random:
            hook.feeds_graph, hook.static_draws = True, StaticDraws()
        self._model, self._hook, self._sampler = model, hook, sampler_of(model)
        self.plain = model.forward
        self.forward = torch.compile(model.forward) if compiled else model.forward

    @contextmanager
    def recording(self, x: Tensor) -> Iterator[None]:
        """In here the forward is warmed and recorded; buffers are as before afterwards."""
        with recording(self._model, x.device.type), using(self._model, self._sampler.plan()):
            self.draw(x)
            self._drawn = self._coins()
            yield

    def draw(self, x: Tensor) -> None:
        """Put what the plan in force draws where the graph reads it."""
        if self._random:
            self._hook.begin(self._model, ((x,), {}), True)

    def drawn(self) -> bool:
        """Whether the draws in force are of the recorded kind: coins, and not their expectation."""
        return self._coins() == self._drawn

    def _coins(self) -> list[bool]:
        draws = self._sampler.graph_draws
        return [] if draws is None else [coins is not None for coins in draws.coins]


def record_pass(model: nn.Module, x: Tensor, *, compiled: bool = False, capture: Capture | None = None) -> None:
    """Record the whole training pass as two CUDA graphs, forward and backward, which are replayed from then on.

    For models whose draws decide no kernel and no size (`residrop.engines.compiling.replays`): at constant depth, and
    with unit-level rules if `compiled`, whose keys and thetas are then data that every pass brings along. Elsewhere
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
    whole = WholePass(model, compiled)
    with whole.recording(x):
        segment = Segment(whole.forward, x, [model])
        record([segment], capture)

    def forward(x: Tensor) -> Tensor:
        return replayed(segment, x) if whole.drawn() and segment.fits(x) else whole.plain(x)

    model._compiled_call_impl = partial(with_forward, model, forward)
