"""The regulariser that random presence adds to the loss (Hayou & Ayed, Sec. 4.1, eq. 4 to 6).

Over masks, to second order in delta - p, the expected loss is that of the average network plus
1/2 sum_l p_l (1 - p_l) h_l, with h_l = (dy/d delta_l)^T H (dy/d delta_l), H the Hessian of the loss in the outputs y
(Gauss-Newton). In a Stable network, whose branches carry 1/sqrt(L), the paper's g_l is L h_l, and its zeta_l is
sqrt(L) dy/d delta_l (the text leaves out that factor).
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from residrop.blocks.attach import rules_of
from residrop.common.errors import ConfigError
from residrop.theory.gates import gated, kept_as_is

__all__ = ["Discrepancy", "discrepancy", "exact_curvature", "flat_discrepancy", "regularizer"]

Loss = Callable[[Tensor, Tensor], Tensor]


class Discrepancy(NamedTuple):
    """What the absence of each block does to the outputs.

    Attributes:
        curvature: float64 Tensor[L], h_l, mean over inputs.
        standard_error: float64 Tensor[L], of that mean over inputs; NaN for one input.
        inputs: number of inputs n.
    """

    curvature: Tensor
    standard_error: Tensor
    inputs: int

    @property
    def g(self) -> Tensor:
        """float64 Tensor[L], the paper's g_l = L h_l of a Stable network."""
        return self.curvature * len(self.curvature)


def _row_losses(loss: Loss, outputs: Tensor, targets: Tensor) -> Tensor:
    """The loss of each input by itself, summed (each depends on its own row of the outputs only)."""
    rows = [loss(outputs[i : i + 1], targets[i : i + 1]) for i in range(len(outputs))]
    return torch.stack(rows).sum()


def _curvatures(loss: Loss, outputs: Tensor, targets: Tensor, zetas: Tensor) -> Tensor:
    """v^T H v for each input and block: zetas Tensor[n, L, o] to Tensor[n, L], by Hessian-vector products."""
    leaf = outputs.detach().requires_grad_()
    (slope,) = torch.autograd.grad(_row_losses(loss, leaf, targets), leaf, create_graph=True)
    if not slope.requires_grad:  # a loss that is linear in the outputs
        return zetas.new_zeros(zetas.shape[:2])
    found: list[Tensor] = []
    for block in zetas.unbind(dim=1):
        (product,) = torch.autograd.grad((slope * block).sum(), leaf, retain_graph=True)
        found.append((product * block).flatten(1).sum(dim=1))
    return torch.stack(found, dim=1)


def _zetas(outputs: Tensor, gates: Tensor) -> Tensor:
    """dy / d delta, Tensor[n, L, o] from Tensor[n, o] and Tensor[n, L]: a backward pass for each output, or each block.

    Where blocks are fewer, it is read off the gradient of u^T y by the gates, which is linear in u.
    """
    if outputs.shape[1] <= 2 * gates.shape[1]:
        columns = [
            torch.autograd.grad(outputs[:, i].sum(), gates, retain_graph=True)[0] for i in range(outputs.shape[1])
        ]
        return torch.stack(columns, dim=2)
    u = torch.zeros_like(outputs, requires_grad=True)
    (slopes,) = torch.autograd.grad(outputs, gates, u, create_graph=True)
    rows = [torch.autograd.grad(slopes[:, i].sum(), u, retain_graph=True)[0] for i in range(gates.shape[1])]
    return torch.stack(rows, dim=1).to(gates.dtype)


def discrepancy(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    loss: Loss = F.cross_entropy,
    *,
    at: Sequence[float] | None = None,
) -> Discrepancy:
    """h_l of every block, by a backward pass for each output (or block): dy/d delta_l is never formed by differencing.

    Batch norm is in eval mode, as inputs must not know of each other. Nothing about the model changes.

    Args:
        model: a model with rules, Tensor[n, ...] to Tensor[n, o].
        batches: pairs of input and target.
        loss: from output Tensor[n, o] and target to Tensor[], twice differentiable; the mean over rows or the sum.
        at: delta around which to expand, one number per block: None is 1 (the paper); the survival rates p are
            closer to the truth for small p.

    Raises:
        ConfigError: no batch, outputs that are no matrix, or another number of rates than of rules.
    """
    count = len(rules_of(model))
    if at is not None and len(at) != count:
        raise ConfigError(f"{len(at)} rates were given to expand around for {count} blocks; give one per block")
    centre = torch.ones(count) if at is None else torch.tensor(list(at), dtype=torch.float32)
    found: list[Tensor] = []
    with kept_as_is(model, training=False), torch.enable_grad():
        for x, y in batches:
            gates = centre.to(x.device).expand(len(x), count).clone().requires_grad_()
            with gated(model, gates):
                outputs = model(x)
            if outputs.ndim != 2:
                raise ConfigError(f"the model gives Tensor{list(outputs.shape)}; discrepancies need Tensor[n, outputs]")
            zetas = _zetas(outputs, gates)
            found.append(_curvatures(loss, outputs, y, zetas.to(outputs.dtype)).double())
    if not found:
        raise ConfigError("no batch was given; discrepancies need at least one")
    every = torch.cat(found)
    spread = every.std(dim=0) / len(every) ** 0.5 if len(every) > 1 else torch.full_like(every[0], torch.nan)
    return Discrepancy(every.mean(dim=0), spread, len(every))


def exact_curvature(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    loss: Loss = F.cross_entropy,
    *,
    at: Sequence[float] | None = None,
) -> Tensor:
    """d^2 loss / d delta_l^2, what h_l stands for: the loss differentiated twice, with no Gauss-Newton in between.

    The difference to `discrepancy` is the curvature of the outputs in delta_l. There is none in networks of matrices
    and ReLUs, almost everywhere. One backward pass through the gradient for each block: for small networks, as a check.

    Args:
        model: as of `discrepancy`.
        batches: as of `discrepancy`.
        loss: the mean over rows.
        at: as of `discrepancy`.

    Returns:
        float64 Tensor[L], mean over inputs.

    Raises:
        ConfigError: no batch, or another number of rates than of rules.
    """
    count = len(rules_of(model))
    if at is not None and len(at) != count:
        raise ConfigError(f"{len(at)} rates were given to expand around for {count} blocks; give one per block")
    centre = torch.ones(count) if at is None else torch.tensor(list(at), dtype=torch.float32)
    total, inputs = torch.zeros(count, dtype=torch.float64), 0
    with kept_as_is(model, training=False), torch.enable_grad():
        for x, y in batches:
            gates = centre.to(x.device).clone().requires_grad_()
            with gated(model, gates):
                value = loss(model(x), y)
            (slope,) = torch.autograd.grad(value, gates, create_graph=True)
            for block in range(count):
                (row,) = torch.autograd.grad(slope[block], gates, retain_graph=True)
                total[block] += float(row[block]) * len(x)
            inputs += len(x)
    if inputs == 0:
        raise ConfigError("no batch was given; curvatures need at least one")
    return total / inputs


def regularizer(curvature: Tensor, rates: Sequence[float]) -> float:
    """1/2 sum_l p_l (1 - p_l) h_l: what random presence adds to the loss of the average network (eq. 4).

    Args:
        curvature: Tensor[L], h_l of `discrepancy`.
        rates: survival rates p_l.
    """
    if len(rates) != len(curvature):
        raise ConfigError(f"{len(rates)} rates were given for {len(curvature)} blocks; give one per block")
    p = torch.tensor(list(rates), dtype=torch.float64)
    return float(0.5 * (p * (1.0 - p) * curvature.cpu()).sum())


def flat_discrepancy(blocks: int, outputs: int, second_moment: float) -> float:
    """Theorem 1: E[g_l] of every block of a Stable Vanilla network at initialisation, 2 o q0 (1 + 1/L)^(L - 1).

    Args:
        blocks: L.
        outputs: o, each with weights of variance 1/N.
        second_moment: q0, the mean of y_0^2 over neurons.
    """
    return 2.0 * outputs * second_moment * (1.0 + 1.0 / blocks) ** (blocks - 1)
