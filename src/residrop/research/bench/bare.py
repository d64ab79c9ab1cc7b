"""The convolutions of a network and nothing else: the least that a training step of it can take here.

Matrix products count as convolutions of one pixel. Operands of one shape are the same tensors, so they are nearer to
the processor than a network's are; the limit is a high one.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from residrop.blocks.attach import sampler_of, using
from residrop.blocks.residual import Residual
from residrop.schedule.sampler import Plan

__all__ = ["Bare", "recorded"]


class _Layer(NamedTuple):
    x: Tensor
    weight: Tensor
    grad: Tensor
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    inner: bool  # whether the gradient of its input is needed
    block: int | None  # number of the block in whose branch it is

    def run(self) -> None:
        y = F.conv2d(self.x, self.weight, None, self.stride, self.padding)
        torch.autograd.grad(y, (self.x, self.weight) if self.inner else (self.weight,), self.grad)


class Bare:
    """Forward and backward of every convolution of a network.

    Args:
        model: one of ours, of one rule a block.
        x: a batch, Tensor[n, C, H, W], on the model's device and in its memory format.
        dtype: of the operands.
    """

    def __init__(self, model: nn.Module, x: Tensor, dtype: torch.dtype) -> None:
        layout = torch.contiguous_format
        if x.is_contiguous(memory_format=torch.channels_last):
            layout = torch.channels_last
        self._operands: dict[tuple[str, tuple[int, ...]], Tensor] = {}
        self.layers: list[_Layer] = []
        for module, seen, given, block in _calls(model, x):
            shapes = [tuple(seen), tuple(module.weight.shape), tuple(given)]
            named = zip(("x", "weight", "grad"), (shape + (1,) * (4 - len(shape)) for shape in shapes), strict=True)
            tensors = {name: self._operand(name, shape, dtype, x.device, layout) for name, shape in named}
            stride, padding = getattr(module, "stride", (1, 1)), getattr(module, "padding", (0, 0))
            self.layers.append(_Layer(**tensors, stride=stride, padding=padding, inner=bool(self.layers), block=block))

    def _operand(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, layout: torch.memory_format
    ) -> Tensor:
        if (name, shape) not in self._operands:
            made = torch.randn(shape, device=device).to(dtype).contiguous(memory_format=layout)
            self._operands[name, shape] = made.requires_grad_(name != "grad")
        return self._operands[name, shape]

    def run(self, plan: Plan) -> None:
        """A step: the layers that are present under a plan."""
        for layer in self.layers:
            if layer.block is None or plan.draws[layer.block].alive is not False:
                layer.run()

    def flops(self, plan: Plan) -> int:
        """Of these layers forward, by their shapes."""
        return sum(
            2 * layer.grad.numel() * layer.weight[0].numel()
            for layer in self.layers
            if layer.block is None or plan.draws[layer.block].alive is not False
        )


def recorded(work: Callable[[], None]) -> Callable[[], None]:
    """A function that does some work of a GPU again, as one CUDA graph."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        for _ in range(3):
            work()
    with torch.cuda.graph(graph, stream=stream):
        work()
    return graph.replay


def _calls(model: nn.Module, x: Tensor) -> Iterator[tuple[nn.Conv2d | nn.Linear, torch.Size, torch.Size, int | None]]:
    """Every convolution and matrix product of a forward at full depth: module, shapes of input and output, block."""
    blocks = [module for module in model.modules() if isinstance(module, Residual)]
    inside = {part: number for number, block in enumerate(blocks) for part in block.branch.modules()}
    found: list[tuple[nn.Conv2d | nn.Linear, torch.Size, torch.Size, int | None]] = []

    def note(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(module, (nn.Conv2d, nn.Linear))
        found.append((module, args[0].shape, output.shape, inside.get(module)))

    parts = [module for module in model.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    hooks = [part.register_forward_hook(note) for part in parts]
    training = model.training
    try:
        model.eval()
        with torch.no_grad(), using(model, sampler_of(model).expectation()):
            model(x)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return iter(found)
