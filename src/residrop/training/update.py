"""The work of an update, and a whole update as one CUDA graph."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from residrop.blocks.attach import using
from residrop.engines.graphs import Capture, CudaCapture, WholePass
from residrop.schedule.sampler import Plan

__all__ = ["RecordedUpdate", "note_gradient", "one_pass"]

Autocast = Callable[[], AbstractContextManager[Any]]

_WARM = 3  # updates before the recording, in which libraries choose kernels and compilers compile


def one_pass(
    forward: Callable[[Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    share: float,
    sums: Tensor,
    autocast: Autocast,
    label_smoothing: float = 0.0,
) -> None:
    """Forward and backward of a (micro-)batch.

    Args:
        forward: from images to logits.
        x: Tensor[n, ...].
        y: labels, int64 Tensor[n], or shares of the classes, float32 Tensor[n, K]; then the largest counts for errors.
        share: what an image adds to the gradient, per gradient of its loss.
        sums: float64 Tensor[3], to which loss, wrong answers and images are added.
        autocast: makes the context of the forward.
        label_smoothing: share of the target that is spread over all classes.
    """
    with autocast():
        logits = forward(x)
        loss = F.cross_entropy(logits.float(), y, label_smoothing=label_smoothing)
    (loss * (len(x) * share)).backward()
    with torch.no_grad():
        wrong = (logits.argmax(dim=1) != (y if y.ndim == 1 else y.argmax(dim=1))).sum()
        sums += torch.stack((loss.double() * len(x), wrong.double(), torch.ones_like(wrong) * len(x)))


def note_gradient(first: nn.Parameter, gradient: Tensor) -> None:
    """Add the mean |gradient| of the first weights, and 1, to float64 Tensor[2]."""
    assert first.grad is not None
    gradient[0] += first.grad.abs().mean()
    gradient[1] += 1.0


class RecordedUpdate:
    """Updates of full batches as one CUDA graph, from images and labels to the optimizer's step.

    For models whose draws decide no kernel and no size: see `residrop.engines.graphs.record_pass`.

    Args:
        model: in training mode, on a CUDA device; called with one Tensor[n, ...].
        optimizer: fused SGD with all its momentum buffers.
        x: a batch as they will come; its numbers do not matter.
        compiled: record the kernels of `torch.compile(model)`.
        sums: as in `one_pass`.
        gradient: as in `note_gradient`, of the weights `first`.
        first: see there.
        autocast: makes the context of the forward.
        capture: what records; by default CUDA graphs.

    Attributes:
        whole: the pass inside.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.SGD,
        x: Tensor,
        *,
        compiled: bool,
        sums: Tensor,
        gradient: Tensor,
        first: nn.Parameter,
        autocast: Autocast,
        capture: Capture | None = None,
    ) -> None:
        self._model, self._optimizer, self._autocast = model, optimizer, autocast
        self._sums, self._gradient, self._first = sums, gradient, first
        self.whole = WholePass(model, compiled)
        self._x, self._y = x.clone(), torch.zeros(len(x), dtype=torch.int64, device=x.device)
        self._lr = torch.zeros((), device=x.device)
        self._now = 0.0
        self._record(capture or CudaCapture())

    def _record(self, capture: Capture) -> None:
        """Record, and put everything back to what it was."""
        buffers = [state["momentum_buffer"] for state in self._optimizer.state.values() if state]
        touched = [*self._model.parameters(), *self._model.buffers(), *buffers, self._sums, self._gradient]
        before = [one.detach().clone() for one in touched]
        rates = [group["lr"] for group in self._optimizer.param_groups]
        for group in self._optimizer.param_groups:
            group["lr"] = self._lr  # read by the graph
        with self.whole.recording(self._x):
            capture.warm(self._warm)
            self._optimizer.zero_grad()
            _, self._replay = capture.record(self._work)
        for group, rate in zip(self._optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        with torch.no_grad():
            for one, was in zip(touched, before, strict=True):
                one.copy_(was)

    def _warm(self) -> None:
        for _ in range(_WARM):
            self._work()

    def _work(self) -> None:
        self._optimizer.zero_grad()
        one_pass(self.whole.forward, self._x, self._y, 1.0 / len(self._x), self._sums, self._autocast)
        note_gradient(self._first, self._gradient)
        self._optimizer.step()

    def fits(self, x: Tensor) -> bool:
        """Whether a batch is of the recorded size."""
        return x.shape == self._x.shape

    def run(self, plan: Plan, x: Tensor, y: Tensor, lr: float) -> None:
        """An update under a plan at a learning rate."""
        if lr != self._now:
            self._lr.fill_(lr)
            self._now = lr
        self._x.copy_(x)
        self._y.copy_(y)
        with using(self._model, plan):
            self.whole.draw(self._x)
            self._replay()
