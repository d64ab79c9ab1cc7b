"""Before anything is timed: every variant computes what it should, in float64, on one draw."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from residrop.blocks.attach import using
from residrop.common.errors import ConfigError
from residrop.research.bench.base import CLASSES, Network
from residrop.research.bench.networks import network
from residrop.research.bench.peers import IndexGather, draws, live_network, narrow_network, spares_of
from residrop.rules.depth import StochasticDepth
from residrop.schedule.sampler import Plan

__all__ = ["verify"]

Map = Callable[[Tensor], Tensor]
ROWS = 4  # images or sequences; images of 64 pixels where the network needs them, else 16: float64 is slow


def verify(name: str, survival: str) -> None:
    """Check the variants of a network against each other and against the obvious masked network.

    - Blocks: ours, the ideal and masks of known coins agree in loss and all gradients; where the branch is absent, ours
      and the ideal give parameters no gradient. Ours and the ideal have equal FLOPs.
    - Rows: ours and index gather agree in loss and gradients, and with masks of the same rows where no batch norm makes
      rows depend on each other. The ideal has the FLOPs of ours, but for shortcuts of absent rows.

    Raises:
        ConfigError: they do not.
    """
    torch.manual_seed(0)
    net = network(name)
    net.model.double()
    if net.pixels == 32:
        net.pixels = 16
    x, y = net.inputs(ROWS), torch.randint(CLASSES, (ROWS,))
    x = x.double() if x.is_floating_point() else x

    def gradients(run: Map) -> list[Tensor | None]:
        net.model.zero_grad(set_to_none=True)
        loss = F.cross_entropy(run(x), y)
        loss.backward()
        return [loss.detach(), *(parameter.grad for parameter in net.model.parameters())]

    _blocks(net, survival, x, gradients)
    _rows(net, survival, x, y, gradients)


def _blocks(net: Network, survival: str, x: Tensor, gradients: Callable[[Map], list[Tensor | None]]) -> None:
    model = net.under(lambda rate: StochasticDepth(rate, "block", "none"), survival)
    (plan,) = draws(model, 1, among=16)  # not one of all blocks present, which tells nothing
    coins = [draw.alive is True for draw in plan.draws]
    ours, ideal = _obeying(model, plan), live_network(net.chain(), coins)
    left = iter(coins)
    masks = net.masked(lambda rate: _Times(float(next(left))), survival)
    found = gradients(ours)
    _agree(net.name, "ours and the ideal, by block", found, gradients(ideal), absent_is_zero=False)
    _agree(net.name, "ours and masks, by block", found, gradients(masks))
    _equal_flops(net.name, "ours and the ideal, by block", _flops(ours, x), _flops(ideal, x))


def _rows(net: Network, survival: str, x: Tensor, y: Tensor, gradients: Callable[[Map], list[Tensor | None]]) -> None:
    model = net.under(lambda rate: StochasticDepth(rate, "row", "none"), survival)
    gather = net.under(lambda rate: IndexGather(rate, scaled=False), survival)
    (plan,) = draws(model, 1)
    ours, by_index = _obeying(model, plan), _obeying(gather, plan)
    windows = [draw.rows(ROWS) for draw in plan.draws]
    found = gradients(ours)
    _agree(net.name, "ours and index gather, by row", found, gradients(by_index))
    _equal_flops(net.name, "ours and index gather, by row", _flops(ours, x), _flops(by_index, x))
    if not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in net.model.modules()):
        live = iter([[(row - start) % ROWS < count for row in range(ROWS)] for start, count in windows])
        masks = net.masked(lambda rate: _Times(torch.tensor(next(live)).double()), survival)
        _agree(net.name, "ours and masks, by row", found, gradients(masks))
    chain, counts = net.chain(), [count for _, count in windows]
    narrow = narrow_network(chain, counts, spares_of(chain, x, lambda logits: F.cross_entropy(logits, y)))
    _equal_flops(net.name, "ours and the ideal, by row", _flops(ours, x), _flops(narrow, x))


def _obeying(model: nn.Module, plan: Plan) -> Map:
    def run(x: Tensor) -> Tensor:
        with using(model, plan):
            return model(x)

    return run


def _flops(run: Map, x: Tensor) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run(x)
    return counter.get_total_flops()


def _agree(
    name: str, what: str, found: list[Tensor | None], expected: list[Tensor | None], absent_is_zero: bool = True
) -> None:
    for a, b in zip(found, expected, strict=True):
        if absent_is_zero:
            a, b = (torch.zeros(()) if grad is None else grad for grad in (a, b))
        if (a is None) != (b is None):
            raise ConfigError(f"{name}: {what} do not leave out the same parameters; nothing was timed")
        if a is not None and b is not None and not bool((a - b).abs().max() <= 1e-7 * b.abs().max() + 1e-12):
            raise ConfigError(f"{name}: {what} do not compute the same; nothing was timed")


def _equal_flops(name: str, what: str, ours: int, other: int) -> None:
    if ours != other:
        raise ConfigError(f"{name}: {what} have {ours} and {other} FLOPs, which should be equal; nothing was timed")


class _Times(nn.Module):
    """A mask whose coins are known: the branch times a number, or times one for each row, Tensor[rows]."""

    def __init__(self, factor: float | Tensor) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        factor = self.factor
        return x * (factor.view(-1, *[1] * (x.dim() - 1)) if isinstance(factor, Tensor) else factor)
