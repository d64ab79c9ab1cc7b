"""Gradients in flat buffers: which parameters live together, and what is sent of them."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from residrop.blocks.attach import rules_of
from residrop.blocks.skippable import Skippable, parameters_of

__all__ = ["Bucket", "Unit", "units_of"]

UNIT_BYTES = 1 << 20


@dataclass(eq=False, slots=True)
class Unit:
    """Neighbouring parameters that live and die together."""

    parameters: list[nn.Parameter]
    rules: tuple[int, ...]  # numbers of the rules that may leave them out; () is always live
    bytes: int = 0
    waiting: int = 0  # parameters without a gradient in this backward
    bucket: "Bucket | None" = None

    @property
    def kind(self) -> tuple[torch.dtype, torch.device]:
        return self.parameters[0].dtype, self.parameters[0].device


def units_of(model: nn.Module) -> list[Unit]:
    """The parameters to reduce, last one first, as backward meets them, in units of about 1 MiB at most."""
    numbers = {rule: number for number, rule in enumerate(rules_of(model))}
    owners: dict[nn.Parameter, set[int]] = {}
    for module in model.modules():
        if isinstance(module, Skippable):
            for rule, parts in module.residrop_branches():
                for parameter in set(parameters_of(parts)):
                    owners.setdefault(parameter, set()).add(numbers[rule])
    units: list[Unit] = []
    for parameter in reversed(list(model.parameters())):
        if not parameter.requires_grad:
            continue
        rules = tuple(sorted(owners.get(parameter, ())))
        size = parameter.numel() * parameter.element_size()
        last = units[-1] if units else None
        kind = parameter.dtype, parameter.device
        if last is None or last.rules != rules or last.kind != kind or last.bytes + size > UNIT_BYTES:
            units.append(Unit([], rules))
        units[-1].parameters.append(parameter)
        units[-1].bytes += size
    return units


class Bucket:
    """Gradients sent together: flat, followed by one number per parameter that says whether any rank has one."""

    def __init__(self, units: list[Unit]) -> None:
        self.waiting = len(units)
        self.stale = False
        self.parameters = [parameter for unit in units for parameter in unit.parameters]
        self._flat = torch.empty(0)
        self._views: list[Tensor] = []
        self._present: list[bool] = []
        self._work: dist.Work | None = None

    def launch(self, group: dist.ProcessGroup | None) -> int:
        """Start the all-reduce of the gradients as they are now; returns its size in bytes."""
        self.wait()
        count, first = len(self.parameters), self.parameters[0]
        size = sum(parameter.numel() for parameter in self.parameters)
        self._flat = flat = torch.empty(size + count, dtype=first.dtype, device=first.device)
        self._views = list(_views(flat, self.parameters))
        pairs = [(view, parameter.grad) for view, parameter in zip(self._views, self.parameters, strict=True)]
        self._present = [grad is not None for _, grad in pairs]
        if all(self._present):
            flat[size:] = 1.0
        else:
            flat[size:] = torch.tensor(self._present, dtype=flat.dtype, device=flat.device)
            torch._foreach_zero_(  # pyright: ignore[reportPrivateImportUsage]
                [view for view, grad in pairs if grad is None]
            )
        filled = [(view, grad) for view, grad in pairs if grad is not None]
        if filled:
            torch._foreach_copy_(  # pyright: ignore[reportPrivateImportUsage]
                [view for view, _ in filled], [grad for _, grad in filled]
            )
        flat /= dist.get_world_size(group)
        self._work = dist.all_reduce(flat, group=group, async_op=True)
        self.stale = False
        return flat.numel() * flat.element_size()

    def wait(self) -> None:
        if self._work is not None:
            self._work.wait()
            self._work = None

    def hand_out(self) -> None:
        """Wait, and make the means the gradients."""
        self.wait()
        # looked at only where this rank lacks a gradient, since looking waits for the device
        anyone = self._present if all(self._present) else (self._flat[-len(self.parameters) :] > 0.0).tolist()
        for parameter, view, has in zip(self.parameters, self._views, anyone, strict=True):
            if has:
                parameter.grad = view
        self._views = []


def _views(flat: Tensor, parameters: Iterable[Tensor]) -> Iterator[Tensor]:
    """Parts of `flat` with the shapes and, where they are dense, the strides of `parameters`, one after the other."""
    start = 0
    for parameter in parameters:
        stride = torch.empty_like(parameter, device="meta").stride()  # other than its own if it has gaps
        yield flat.as_strided(parameter.shape, stride, start)
        start += parameter.numel()
