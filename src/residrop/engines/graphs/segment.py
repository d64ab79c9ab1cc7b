"""Work recorded as CUDA graphs, forward and backward, and replayed as one node of autograd."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from residrop.common.errors import ConfigError, RunError

__all__ = ["Capture", "CudaCapture", "Segment", "check", "record", "recording", "replayed"]

Map = Callable[..., Tensor]

_WARM = 3


class Capture(Protocol):
    """How work is recorded."""

    def warm(self, work: Callable[[], None]) -> None:
        """Do some work where it will be recorded."""
        ...

    def record(self, work: Callable[..., Any], *args: Any) -> tuple[Any, Callable[[], None]]:
        """work(*args), and a function that does it again, from and into the same tensors."""
        ...


class CudaCapture:
    """Records CUDA graphs that share memory and follow each other in the order in which they are recorded."""

    def __init__(self) -> None:
        self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()

    def warm(self, work: Callable[[], None]) -> None:
        torch.cuda.synchronize()
        with torch.cuda.stream(self._stream):
            work()
        torch.cuda.synchronize()

    def record(self, work: Callable[..., Any], *args: Any) -> tuple[Any, Callable[[], None]]:
        graph = torch.cuda.CUDAGraph()
        # other threads, such as those that pin memory for a loader, may go on meanwhile
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            result = work(*args)
        return result, graph.replay


class Segment:
    """The two graphs of a block, or of a whole pass, and the tensors that they read and write."""

    def __init__(self, work: Map, x: Tensor, modules: Sequence[nn.Module], scale: float = 1.0) -> None:
        self._work, self._module, self.scale = work, modules[0], scale
        owned = dict.fromkeys(parameter for module in modules for parameter in module.parameters())
        self._parameters = [parameter for parameter in owned if parameter.requires_grad]
        self.x = x.detach().clone().requires_grad_(x.requires_grad)
        self.anchor = self._parameters[0]  # makes autograd keep a pass whose input needs no gradient
        self._layout, self._autocast = _layout_of(x), _autocast_of(x)

    def fits(self, x: Tensor) -> bool:
        """Whether a pass is like the one that was recorded."""
        return (
            self._module.training
            and torch.is_grad_enabled()
            and x.requires_grad is self.x.requires_grad
            and _layout_of(x) == self._layout
            and _autocast_of(x) == self._autocast
        )

    def _forward(self) -> Tensor:
        return self._work(self.x)

    def _backward(self, y: Tensor) -> list[Tensor | None]:
        inputs = [self.x] if self.x.requires_grad else []
        found = torch.autograd.grad(y, [*inputs, *self._parameters], self.grad, allow_unused=True)
        dx, grads = (found[0], found[1:]) if inputs else (None, found)
        return [dx, *map(_laid_out_as, grads, self._parameters)]

    def warm(self) -> None:
        """Run passes, in which libraries choose kernels and compilers compile, neither of which can be recorded."""
        for _ in range(_WARM):
            y = self._forward()
            self.grad = torch.zeros_like(y)
            self._backward(y)

    def record_forward(self, capture: Capture) -> None:
        self._output, self.replay_forward = capture.record(self._forward)
        self.y = self._output.detach()
        self.grad = torch.zeros_like(self.y)

    def record_backward(self, capture: Capture) -> None:
        grads, self.replay_backward = capture.record(self._backward, self._output)
        del self._output  # and with it what backward keeps, for graphs recorded later
        self.dx: Tensor | None = grads[0]
        pairs = zip(self._parameters, grads[1:], strict=True)
        self.gradients = [(parameter, grad) for parameter, grad in pairs if grad is not None]


class _Replay(torch.autograd.Function):
    """The block as one node. Gradients of its parameters are put where they belong and do not pass through autograd,
    whose share of the time would be larger than that of the launch."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor, segment: Segment) -> Tensor:
        ctx.segment = segment
        segment.x.copy_(x)
        segment.replay_forward()
        return segment.y.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        segment: Segment = ctx.segment
        segment.grad.copy_(grads[0])
        segment.replay_backward()
        for parameter, own in segment.gradients:
            before = parameter.grad
            if before is None:
                parameter.grad = own
            elif before is not own:
                before.add_(own)
            else:
                raise RunError(
                    "the gradients of the last pass were still there, and recorded blocks write theirs to the same "
                    "place; call optimizer.zero_grad() before every backward pass, or do not record blocks"
                )
        return None if segment.dx is None else segment.dx.detach(), None, None


def replayed(segment: Segment, x: Tensor) -> Tensor:
    """What the segment gives for this input, which has to fit."""
    result: Tensor = _Replay.apply(x, segment.anchor, segment)  # pyright: ignore[reportAssignmentType]
    return result


def _layout_of(x: Tensor) -> tuple[Any, ...]:
    return x.shape, x.stride(), x.dtype, x.device


def _autocast_of(x: Tensor) -> torch.dtype | None:
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def _laid_out_as(grad: Tensor | None, parameter: Tensor) -> Tensor | None:
    """A gradient with the strides of its parameter, as fused optimizers want them."""
    if grad is None or grad.stride() == parameter.stride():
        return grad
    return torch.empty_like(parameter).copy_(grad)


def check(model: nn.Module, x: Tensor, capture: Capture | None) -> None:
    """ConfigError if a pass of the model with this batch cannot be recorded."""
    if capture is None and x.device.type != "cuda":
        raise ConfigError(f"what is recorded are CUDA graphs, and the batch is on {x.device}; move both to a GPU")
    if not model.training:
        raise ConfigError(f"{type(model).__name__} is in eval mode; what is recorded is a training pass: call train()")


@contextmanager
def recording(model: nn.Module, kind: str) -> Iterator[None]:
    """Leaves buffers as they were, and autocast without its cache of weights, which graphs could not follow."""
    kept = [buffer.clone() for buffer in model.buffers()]
    dtype, enabled = torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
    with torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=False):
        yield
    with torch.no_grad():
        for buffer, before in zip(model.buffers(), kept, strict=True):
            buffer.copy_(before)


def record(segments: Sequence[Segment], capture: Capture | None) -> None:
    """Record segments that follow each other in a pass, in this order; by default as CUDA graphs."""
    capture = capture or CudaCapture()
    for segment in segments:
        capture.warm(segment.warm)
    for segment in segments:
        segment.record_forward(capture)
    for segment in reversed(segments):
        segment.record_backward(capture)
