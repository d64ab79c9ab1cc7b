"""Swapout against the addition it replaces: `residrop bench swapout`.

What is measured, all variants taking turns in one process, medians over steps:

- the operation Theta_1 X + Theta_2 F on two tensors: `add` (X + F), `naive` (two `bernoulli_` masks and products), the
  same compiled by torch.compile, ours without and with the compiler. X and F are leaves whose gradients are stored, so
  the addition copies the incoming gradient twice; `relative_to_add_inside` leaves that out (`torch.autograd.grad`),
  where the addition's backward is nothing at all;
- one training step (forward, cross-entropy, backward) of a network with these operations at its sums.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from random import Random
from statistics import median
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from residrop import functional
from residrop.common.checks import check_whole
from residrop.common.errors import ConfigError
from residrop.models import create
from residrop.research.bench.measure import median_ratio, quiet_collector, saved_bytes, seconds_of
from residrop.research.bench.skip import describe
from residrop.rules.base import Rule

__all__ = ["NETWORKS", "SHAPES", "SwapoutSettings", "bench_steps", "bench_swapout"]

SHAPES = ((128, 32, 32, 32),)
NETWORKS = (("resnet-20", 1), ("resnet-20", 2))
THETA = 0.5
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Operation = Callable[[Tensor, Tensor, int], Tensor]


@dataclass(frozen=True, kw_only=True)
class SwapoutSettings:
    """How it is measured.

    Attributes:
        steps: timed steps of every variant.
        warmup: steps before them.
        precision: type of the tensors of the operation; networks run in fp32, or autocast to bf16.
        channels_last: memory format.
        batch_size: images in a training step.
        device: where to run.
        seed: seed of tensors, weights and keys.
    """

    steps: int = 15
    warmup: int = 3
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    channels_last: bool = False
    batch_size: int = 128
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("warmup", 0), ("batch_size", 2)):
            check_whole(name, getattr(self, name), least=least)


def _naive(x: Tensor, f: Tensor, key: int) -> Tensor:
    return torch.empty_like(x).bernoulli_(THETA) * x + torch.empty_like(f).bernoulli_(THETA) * f


def _ours(x: Tensor, f: Tensor, key: int) -> Tensor:
    return functional.swapout(x, f, THETA, THETA, key)


@contextmanager
def _compiler(on: bool) -> Iterator[None]:
    functional.use_compiler(on)
    try:
        yield
    finally:
        functional.use_compiler("auto")


def _operations() -> dict[str, tuple[Operation, bool]]:
    """Every variant, and whether ours may use the compiler in it."""
    compiled: Any = torch.compile(_naive, dynamic=False)
    return {
        "add": (lambda x, f, key: x + f, False),
        "naive": (_naive, False),
        "naive, compiled": (compiled, False),
        "residrop, eager": (_ours, False),
        "residrop, compiled": (_ours, True),
    }


def bench_swapout(
    shapes: Sequence[Sequence[int]], settings: SwapoutSettings, on_step: Callable[[], object] = lambda: None
) -> Iterator[list[dict[str, Any]]]:
    """Measure the operation on tensors of every shape; yields one list of rows per shape.

    On Ctrl-C the rows of the running shape come too, if it has timed a step, before KeyboardInterrupt is raised.

    Raises:
        ConfigError: a shape that is empty or too large, or channels last for other than four dimensions.
    """
    for shape in shapes:
        if min(shape, default=0) < 1 or (settings.channels_last and len(shape) != 4):
            raise ConfigError(f"shape {tuple(shape)} cannot be measured; give positive sizes, four for channels last")
        yield from _one_shape(tuple(shape), settings, on_step)


def _one_shape(
    shape: tuple[int, ...], settings: SwapoutSettings, on_step: Callable[[], object]
) -> Iterator[list[dict[str, Any]]]:
    generator = torch.Generator().manual_seed(settings.seed)
    layout = torch.channels_last if settings.channels_last else torch.contiguous_format

    def made() -> Tensor:
        values = torch.randn(shape, generator=generator).to(settings.device, _DTYPES[settings.precision])
        return values.contiguous(memory_format=layout)

    x, f, grad = made().requires_grad_(), made().requires_grad_(), made()

    def backward(run: Operation, key: int) -> None:
        x.grad = f.grad = None
        run(x, f, key).backward(grad)

    def inside(run: Operation, key: int) -> None:
        torch.autograd.grad(run(x, f, key), (x, f), grad)

    ways: dict[str, Callable[[Operation, int], object]] = {
        "forward": lambda run, key: run(x, f, key),
        "forward_backward": backward,
        "inside": inside,
    }
    operations = _operations()
    times = {(name, way): list[float]() for name in operations for way in ways}
    order = Random(settings.seed)

    def measure() -> None:
        for step in range(-settings.warmup, settings.steps):
            for name, way in order.sample(list(times), len(times)):
                run, compiler = operations[name]
                with _compiler(compiler):
                    seconds = seconds_of(partial(ways[way], run, 1000 + step), settings.device)
                if step >= 0:
                    times[name, way].append(seconds)
            on_step()

    stopped, steps = _measured(measure, times)
    rows: list[dict[str, Any]] = []
    for name, (run, compiler) in operations.items():
        with _compiler(compiler):
            kept = saved_bytes(lambda run=run: run(x, f, 1), (x, f))
        row = {
            "shape": list(shape),
            "dtype": settings.precision,
            "variant": name,
            "forward_seconds": median(times[name, "forward"]),
            "forward_backward_seconds": median(times[name, "forward_backward"]),
            "relative_to_add": median_ratio(times[name, "forward_backward"], times["add", "forward_backward"]),
            "relative_to_add_inside": median_ratio(times[name, "inside"], times["add", "inside"]),
            "saved_bytes": kept,
        }
        rows.append(row | _facts(settings, steps))
    yield rows
    if stopped:
        raise stopped


class _Naive(Rule):
    """Swapout as it is usually written."""

    def __init__(self) -> None:
        super().__init__((THETA, THETA), "unit")

    def forward(self, x: Tensor, shortcut: Any, branch: Any, *, post: Any = None, along: Sequence[Any] = ()) -> Tensor:
        y = _naive(shortcut(x), branch(x, *along), 0)
        return y if post is None else post(y)


def _network(name: str, width: int, rule: Any, settings: SwapoutSettings) -> nn.Module:
    rates: dict[str, Any] = {} if rule == "constant" else {"survival": THETA}
    model = create(name, width=width, block="v2", classes=10, rule=rule, seed=settings.seed, **rates)
    layout = torch.channels_last if settings.channels_last else torch.contiguous_format
    return model.to(settings.device, memory_format=layout).train()  # pyright: ignore[reportCallIssue]


def bench_steps(
    networks: Sequence[tuple[str, int]], settings: SwapoutSettings, on_step: Callable[[], object] = lambda: None
) -> Iterator[list[dict[str, Any]]]:
    """Measure training steps of networks (name, width factor) at their own sums; yields rows per network.

    On Ctrl-C the rows of the running one come too, if it has timed a step, before KeyboardInterrupt is raised.
    """
    for name, width in networks:
        forms: dict[str, tuple[nn.Module, bool]] = {
            "constant depth": (_network(name, width, "constant", settings), False),
            "naive": (_network(name, width, lambda _: _Naive(), settings), False),
            "residrop, eager": (_network(name, width, "swapout", settings), False),
            "residrop, compiled": (_network(name, width, "swapout", settings), True),
        }
        yield from _one_network(name, width, forms, settings, on_step)


def _one_network(
    name: str,
    width: int,
    forms: dict[str, tuple[nn.Module, bool]],
    settings: SwapoutSettings,
    on_step: Callable[[], object],
) -> Iterator[list[dict[str, Any]]]:
    generator = torch.Generator().manual_seed(settings.seed)
    layout = torch.channels_last if settings.channels_last else torch.contiguous_format
    x = torch.randn(settings.batch_size, 3, 32, 32, generator=generator).contiguous(memory_format=layout)
    y = torch.randint(10, (settings.batch_size,), generator=generator).to(settings.device)
    x = x.to(settings.device)
    half = torch.autocast(settings.device.type, dtype=torch.bfloat16, enabled=settings.precision == "bf16")

    def loss(model: nn.Module) -> Tensor:
        with half:
            return F.cross_entropy(model(x).float(), y)

    def one(model: nn.Module) -> None:
        model.zero_grad(set_to_none=True)
        loss(model).backward()

    times, order = {form: list[float]() for form in forms}, Random(settings.seed)

    def measure() -> None:
        for step in range(-settings.warmup, settings.steps):
            for form in order.sample(list(forms), len(forms)):
                model, compiler = forms[form]
                with _compiler(compiler):
                    seconds = seconds_of(partial(one, model), settings.device)
                if step >= 0:
                    times[form].append(seconds)
            on_step()

    stopped, steps = _measured(measure, times)
    rows: list[dict[str, Any]] = []
    for form, (model, compiler) in forms.items():
        with _compiler(compiler):
            kept = saved_bytes(partial(loss, model), model.parameters(), settings.precision == "bf16")
        row = {
            "model": f"{name} W x{width}",
            "dtype": settings.precision,
            "variant": form,
            "step_seconds": median(times[form]),
            "relative_to_constant": median_ratio(times[form], times["constant depth"]),
            "saved_bytes": kept,
            "batch_size": settings.batch_size,
        }
        rows.append(row | _facts(settings, steps))
    yield rows
    if stopped:
        raise stopped


def _measured(measure: Callable[[], object], times: dict[Any, list[float]]) -> tuple[KeyboardInterrupt | None, int]:
    """Run `measure`, which fills `times`; the Ctrl-C that ended it, and the steps that all have, to which it cuts them.

    Raises:
        KeyboardInterrupt: there is no such step.
    """
    stopped = None
    try:
        with quiet_collector():
            measure()
    except KeyboardInterrupt as error:
        stopped = error
    steps = min(map(len, times.values()))
    if stopped and not steps:
        raise stopped
    for found in times.values():
        del found[steps:]
    return stopped, steps


def _facts(settings: SwapoutSettings, steps: int) -> dict[str, Any]:
    return {
        "theta": THETA,
        "steps": steps,
        "memory_format": "channels_last" if settings.channels_last else "contiguous",
        **describe(settings.device, settings.seed),
    }
