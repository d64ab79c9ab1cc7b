"""Data parallelism that is told in advance which blocks are dead: their gradients are neither waited for nor sent.

The collectives of a backward pass are a function of the plans of its forwards alone. Plans are equal on all ranks, so
the collectives are, too, whatever a rank's own graph looks like: nothing is searched for, voted on, or able to hang.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Variable
from torch.utils._pytree import tree_leaves

from residrop.blocks.attach import rules_of, sampler_of
from residrop.common.errors import ConfigError
from residrop.engines.distributed.buckets import Bucket, Unit, units_of
from residrop.engines.distributed.ranks import broadcast, check_ranks, is_distributed

__all__ = ["GradientSync", "data_parallel"]

_FIRST_BYTES = 1 << 20  # the first bucket is small, so that sending starts early, as in DistributedDataParallel


def data_parallel(
    model: nn.Module, *, group: dist.ProcessGroup | None = None, bucket_mb: float = 25.0
) -> "GradientSync":
    """Average the gradients of `model` over ranks at the end of every backward pass, those of live blocks only.

    One line after `attach` (or `create`) and before the optimizer; the model stays what it is: its class, its
    `state_dict` keys and its forward are unchanged, and it is called directly. Parameters and buffers of rank 0 are
    copied to all ranks. Parameters of a dead block keep `grad is None` on every rank, as in a single process.

    - Shared draws (the default of blocks): a dead block costs no communication.
    - `per_rank` draws: a block that is dead on one rank only counts as a zero gradient there, and the mean over ranks
      is the gradient of the mean loss.
    - Buffers (batch norm statistics) stay each rank's own in training; see `GradientSync.sync_buffers`.

    Gradients become views of flat buffers; `create_graph=True` is not supported, and parameters frozen at this call
    stay unsynchronised. In a single process (torch.distributed not initialised, no torchrun) nothing is done.

    Args:
        model: the attached model, on its device; the module that the training loop calls.
        group: ranks that hold different data (default: all).
        bucket_mb: gradients are sent in flat buckets of about this many MiB, while backward goes on.

    Returns:
        A handle with `no_sync` for gradient accumulation, `sync_buffers`, and counters of what was sent.

    Raises:
        ConfigError: the model is not attached, is sharded or has sparse gradients; torchrun is running but no process
            group exists.
        RankError: the ranks differ in model, rules, rates, seed or step.
    """
    if not bucket_mb > 0.0:
        raise ConfigError(f"bucket_mb is {bucket_mb}; give a positive number of MiB")
    sampler = sampler_of(model)
    if any(getattr(module, "sparse", False) is True for module in model.modules()):
        raise ConfigError(
            f"{type(model).__name__} has an embedding with sparse gradients, which are not bucketed; set sparse=False"
        )
    if any(hasattr(parameter, "device_mesh") for parameter in model.parameters()):
        raise ConfigError(
            f"{type(model).__name__} has sharded parameters, whose gradients fully_shard reduces; "
            "leave data_parallel out, and call residrop.engines.distributed.check_ranks(model) instead"
        )
    for module in model.modules():  # an earlier handle must not go on reducing
        for hook in list(module._forward_hooks.values()):
            if isinstance(hook, _AfterForward) and hook.sync is not None:
                hook.sync.remove()
    if is_distributed(group):
        sampler.rank = dist.get_rank(group)
        check_ranks(model, group=group)
        broadcast((*model.parameters(), *model.buffers()), group)
    return GradientSync(model, group=group, bucket_bytes=max(1, round(bucket_mb * (1 << 20))))


@contextmanager
def without_other_ranks(model: nn.Module) -> Iterator[None]:
    """Inside, passes through `model` are of no concern to other ranks: one of them can measure something."""
    hooks = [hook for module in model.modules() for hook in module._forward_hooks.values()]
    syncs = [hook.sync for hook in hooks if isinstance(hook, _AfterForward) and hook.sync is not None]
    for sync in syncs:
        sync._away = True
    try:
        yield
    finally:
        for sync in syncs:
            sync._away = False


class GradientSync:
    """Handle of `data_parallel`.

    Attributes:
        collectives: number of gradient all-reduces started so far.
        bytes_sent: size of the buffers they reduced, in bytes (what travels depends on the backend's algorithm).
        bytes_skipped: gradient bytes of dead blocks that were not sent.
    """

    def __init__(self, model: nn.Module, *, group: dist.ProcessGroup | None, bucket_bytes: int) -> None:
        self.collectives = self.bytes_sent = self.bytes_skipped = 0
        self._model, self._group, self._bucket_bytes = model, group, bucket_bytes
        self._rules, self._sampler = rules_of(model), sampler_of(model)
        self._enabled, self._away = True, False
        self._expected: set[Unit] = set()
        self._fresh = True  # whether the next forward starts a new round
        self._buckets: list[Bucket] | None = None  # of the running backward
        self._next = 0
        self._seen: set[Tensor] = set()
        self._surprises: list[Unit] = []
        self._handles: list[Any] = []
        self._units = units_of(model) if is_distributed(group) else []
        if not self._units:
            return
        self._handles.append(model.register_forward_hook(_AfterForward(self)))
        for unit in self._units:
            for parameter in unit.parameters:
                self._handles.append(parameter.register_post_accumulate_grad_hook(_Ready(self, unit)))

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Inside, backward passes accumulate local gradients; the first one outside sends the sums."""
        before, self._enabled = self._enabled, False
        try:
            yield
        finally:
            self._enabled = before

    @torch.no_grad()
    def sync_buffers(self) -> None:
        """Copy the buffers of rank 0 to all ranks; to be called by all, before evaluating or saving on several.

        In training batch norm does not read its running statistics, so copying them once, when they are needed, gives
        what DistributedDataParallel gets by copying them before every forward: the statistics that rank 0 saw.
        """
        if self._units:
            broadcast(self._model.buffers(), self._group)

    def join(self) -> None:
        """Take part in one reduction without a backward, with gradients as they are (none count as zero).

        For a rank without data in a step: called under the plan of that step (`with residrop.using(model, plan)`)
        where the others run their backward.
        """
        if self._units:
            self._sampler.recall(None)  # an earlier backward's plan is not that of this step
            self._after_forward(())
            self._make_buckets()
            self._finish()

    def remove(self) -> None:
        """Take all hooks off the model; gradients are each rank's own again."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._units = []

    # The rest is called by the hooks, in the order of a step.

    def _after_forward(self, output: object) -> None:
        """Add what this forward used to what the next backward waits for."""
        if self._away:
            return
        self._expect()
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor) and leaf.grad_fn is not None:
                # Here rather than in the first parameter's hook: that one may run in the backward of a reentrant
                # checkpoint, which ends long before the whole does.
                leaf.grad_fn.register_prehook(lambda grads: self._begin())

    def _expect(self) -> None:
        if self._fresh:
            self._expected.clear()
            self._fresh = False
        dead = {number for number, rule in enumerate(self._rules) if self._is_dead(number, rule.training)}
        self._expected.update(unit for unit in self._units if not unit.rules or not dead.issuperset(unit.rules))

    def _is_dead(self, number: int, training: bool) -> bool:
        draw = self._sampler.draw(number, training, over=True)
        return draw is not None and draw.alive is False and self._rules[number].scope == "shared"

    def _begin(self) -> None:
        """The start of a backward: from here to its end, gradients are sent as they become complete."""
        if self._buckets is None and self._enabled and self._units:
            self._make_buckets()
            Variable._execution_engine.queue_callback(self._finish)

    def _make_buckets(self) -> None:
        if (
            self._fresh
        ):  # the forward was compiled as a whole, or has had its backward; the plan in force is likely its own
            self._expect()
        self._buckets, self._next = [], 0
        self._seen.clear()
        self._surprises.clear()
        filling: list[Unit] = []
        size, limit = 0, min(_FIRST_BYTES, self._bucket_bytes)
        for unit in self._units:
            if unit not in self._expected:
                unit.bucket = None
                self.bytes_skipped += unit.bytes
                continue
            unit.waiting = len(unit.parameters)
            if filling and (size + unit.bytes > limit or unit.kind != filling[0].kind):
                self._close(filling)
                filling, size, limit = [], 0, self._bucket_bytes
            filling.append(unit)
            size += unit.bytes
        if filling:
            self._close(filling)

    def _close(self, units: list[Unit]) -> None:
        assert self._buckets is not None
        bucket = Bucket(units)
        for unit in units:
            unit.bucket = bucket
        self._buckets.append(bucket)

    def _ready(self, unit: Unit, parameter: Tensor) -> None:
        """A gradient is complete: send its bucket if it was the last one, in the order common to all ranks."""
        if self._away:
            return
        if not self._enabled:
            self._expected.add(unit)
            self._fresh = False
            return
        self._begin()
        bucket = unit.bucket
        if bucket is None or self._buckets is None:  # not expected: of a forward before the last backward, say
            self._surprises.append(unit)
            return
        if parameter in self._seen:  # shared weights under reentrant checkpointing arrive in parts
            bucket.stale = True
            return
        self._seen.add(parameter)
        unit.waiting -= 1
        if unit.waiting == 0:
            bucket.waiting -= 1
            while self._next < len(self._buckets) and self._buckets[self._next].waiting == 0:
                self._launch(self._buckets[self._next])
                self._next += 1

    @torch.no_grad()
    def _launch(self, bucket: Bucket) -> None:
        self.bytes_sent += bucket.launch(self._group)
        self.collectives += 1

    @torch.no_grad()
    def _finish(self) -> None:
        """The end of backward: send what is left, with zeros for what did not come, and wait for all."""
        assert self._buckets is not None
        self._buckets += [Bucket([unit]) for unit in self._units if unit in self._surprises]
        for bucket in self._buckets[self._next :]:
            self._launch(bucket)
        for bucket in self._buckets:
            if bucket.stale:
                self._launch(bucket)
            bucket.hand_out()
        for unit in self._units:
            unit.bucket = None
        self._buckets, self._fresh = None, True


class _Ready:
    """Hook of a parameter."""

    def __init__(self, sync: GradientSync, unit: Unit) -> None:
        self.sync, self.unit = sync, unit

    def __call__(self, parameter: Tensor) -> None:
        self.sync._ready(self.unit, parameter)


class _AfterForward:
    """Hook of the root."""

    def __init__(self, sync: GradientSync | None) -> None:
        self.sync = sync

    def __call__(self, module: nn.Module, args: object, output: object) -> None:
        if self.sync is None or torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return
        if torch._C._current_graph_task_id() == -1:  # not a recomputation
            self.sync._after_forward(output)

    def __reduce__(self) -> tuple[type, tuple[None]]:
        return _AfterForward, (None,)  # a copy (an average of weights, say) is a model of its own, without other ranks
