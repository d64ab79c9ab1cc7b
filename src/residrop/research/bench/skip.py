"""Skipping against its peers and against the least work there is: `residrop bench skip`.

What is measured: one training step, forward, cross-entropy and backward, without the optimizer's update, of

- constant depth: the plain network;
- residrop, block and row: `StochasticDepth` in our own networks, `residrop.apply` in foreign ones;
- torchvision `StochasticDepth` (batch and row) and timm `DropPath` (row): masks over branches that are all computed;
- index gather: row-level skipping as in DINOv2, `index_select` and `index_add`;
- ideal, block: for every step the plain network that has exactly the live branches of its draw;
- ideal, row: for every step the plain network on a batch of exactly as many rows as live in each block, without a
  copy of any row; stem and head see the whole batch. A shortcut that computes something is part of both ideals where
  the branch is absent: as a block, or on the other rows.

How: all variants share the parameters and take turns in one process, so that a slow minute of the machine is shared.
Step t has one block-level and one row-level draw, made beforehand; ours, index gather and the ideals obey it. Both
ratios of a variant are medians over steps of time(variant, t) / time(other, t): where the number of live blocks changes
from step to step, a ratio of medians would compare a step with many to a step with few. The draws are, of the first
`4 * steps` of the sampler, those whose depth is nearest to its expectation: a few steps then stand for many, in time as
in memory, and no draw is made by hand. Memory is the mean over these draws.
"""

import gc
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from importlib import metadata
from importlib.util import find_spec
from random import Random
from statistics import fmean, median, quantiles
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import StochasticDepth as TorchvisionStochasticDepth

from residrop.blocks.attach import using
from residrop.common.errors import ConfigError
from residrop.engines.compiling import compile_branches
from residrop.research.bench.base import CLASSES, Network
from residrop.research.bench.measure import median_ratio, peak_bytes, quiet_collector, saved_bytes, seconds_of
from residrop.research.bench.networks import has_timm, network
from residrop.research.bench.peers import IndexGather, draws, live_network, narrow_network, spares_of
from residrop.research.bench.verify import verify
from residrop.rules.depth import StochasticDepth
from residrop.schedule.sampler import Plan

__all__ = ["MODELS", "Comparison", "Settings", "Variant", "bench_skip", "describe", "variants_of"]

MODELS = ("resnet-56", "resnet-110", "torchvision/resnet50", "timm/vit_small_patch16_224")
CONSTANT, IDEAL = "constant depth", "ideal"
Map = Callable[[Tensor], Tensor]
_Key = tuple[str, str | None]
_Times = dict[_Key, list[float]]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a comparison is run.

    Attributes:
        steps: timed steps of every variant.
        warmup: steps before them.
        batch_size: images or sequences in a step; None is the network's default (64 for small images, else 32).
        pixels: height and width of the images; None is the network's default.
        precision: `fp32`, or `bf16` for autocast.
        channels_last: memory format of convolutional networks; False is contiguous.
        device: where to run.
        compile: compile every branch.
        seed: seed of weights, images and draws.
    """

    steps: int = 15
    warmup: int = 2
    batch_size: int | None = None
    pixels: int | None = None
    precision: Literal["fp32", "bf16"] = "fp32"
    channels_last: bool = True
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    compile: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.warmup < 0 or (self.batch_size is not None and self.batch_size < 2):
            raise ConfigError(
                f"steps={self.steps}, warmup={self.warmup}, batch_size={self.batch_size} were given; "
                "time at least 1 step of at least 2 images"
            )

    def autocast(self) -> AbstractContextManager[Any]:
        """The context of a forward."""
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)


class Variant(NamedTuple):
    """One way to compute a training step.

    Attributes:
        name: what it is.
        granularity: `block` or `row`; None for constant depth.
        at: from the number of a step to its forward, from a batch (`Network.inputs`) to logits; not part of what is
            timed.
        varies: whether its work depends on the draw.
    """

    name: str
    granularity: str | None
    at: Callable[[int], Map]
    varies: bool = False


def _obeying(model: nn.Module, plans: Sequence[Plan]) -> Callable[[int], Map]:
    def at(step: int) -> Map:
        def forward(x: Tensor) -> Tensor:
            with using(model, plans[step]):
                return model(x)

        return forward

    return at


def variants_of(net: Network, survival: str, x: Tensor, y: Tensor, settings: Settings) -> list[Variant]:
    """Every variant of a network, with the draws of `settings.steps` steps."""
    chain, rows = net.chain(settings.compile), x.shape[0]
    block = net.under(lambda rate: StochasticDepth(rate, "block", net.rescale), survival)  # pyright: ignore[reportArgumentType]
    row = net.under(lambda rate: StochasticDepth(rate, "row", net.rescale), survival)  # pyright: ignore[reportArgumentType]
    gather = net.under(lambda rate: IndexGather(rate, net.rescale == "train"), survival)
    if settings.compile:
        net.compile_blocks(net.model)
        for model in (block, row, gather):
            compile_branches(model)
    by_block, by_row = draws(block, settings.steps), draws(row, settings.steps)
    with settings.autocast():
        spares = spares_of(chain, x, lambda logits: F.cross_entropy(logits.float(), y))
    counts = [[draw.rows(rows).live for draw in plan.draws] for plan in by_row]
    coins = [[draw.alive is True for draw in plan.draws] for plan in by_block]

    def masked(make: Callable[[float], nn.Module]) -> Callable[[int], Map]:
        model = net.masked(make, survival)
        if settings.compile:
            net.compile_blocks(model)
        return lambda step: model

    found = [
        Variant(CONSTANT, None, lambda step: net.model),
        Variant("residrop", "block", _obeying(block, by_block), varies=True),
        Variant("torchvision StochasticDepth", "block", masked(lambda p: TorchvisionStochasticDepth(1.0 - p, "batch"))),
        Variant(IDEAL, "block", lambda step: live_network(chain, coins[step]), varies=True),
        Variant("residrop", "row", _obeying(row, by_row), varies=True),
        Variant("torchvision StochasticDepth", "row", masked(lambda p: TorchvisionStochasticDepth(1.0 - p, "row"))),
        Variant("index gather", "row", _obeying(gather, by_row), varies=True),
        Variant(IDEAL, "row", lambda step: narrow_network(chain, counts[step], spares), varies=True),
    ]
    if has_timm():
        from timm.layers import DropPath  # pyright: ignore[reportPrivateImportUsage]

        found.insert(-2, Variant("timm DropPath", "row", masked(lambda p: DropPath(1.0 - p))))
    return found


class Comparison:
    """All variants of one network under one survival schedule, and what was measured of them.

    Args:
        net: the network, on its device and in its memory format.
        survival: rates as `residrop.schedule.survival.parse` reads them.
        settings: see `Settings`.
    """

    def __init__(self, net: Network, survival: str, settings: Settings) -> None:
        self.net, self.survival, self.settings = net, survival, settings
        self.batch_size = settings.batch_size or net.batch_size
        generator = torch.Generator().manual_seed(settings.seed)
        x = net.inputs(self.batch_size, generator).to(settings.device)
        self.y = torch.randint(CLASSES, (self.batch_size,), generator=generator).to(settings.device)
        self.x = x.contiguous(memory_format=torch.channels_last) if settings.channels_last and x.dim() == 4 else x
        with _many_graphs(settings.compile):
            self.variants = variants_of(net, survival, self.x, self.y, settings)
        self.seconds: list[list[float]] = [[] for _ in self.variants]
        self.bytes: list[list[int]] = [[] for _ in self.variants]
        self.peaks: list[list[int]] = [[] for _ in self.variants]  # on a GPU

    @property
    def warmup(self) -> int:
        """Steps before the timed ones; all of them where graphs have to be compiled for every size of a batch."""
        return max(self.settings.warmup, self.settings.steps if self.settings.compile else 0)

    @property
    def rounds(self) -> int:
        """How often `run` calls `on_step`."""
        return self.warmup + 2 * self.settings.steps

    def run(self, on_step: Callable[[], object]) -> None:
        """Measure memory, then time, all variants taking turns in an order that changes from step to step."""
        settings, order = self.settings, Random(self.settings.seed)
        with quiet_collector(), _many_graphs(settings.compile):
            for step in range(settings.steps):
                for variant, found in zip(self.variants, self.bytes, strict=True):
                    if variant.varies or step == 0:
                        found.append(self._saved(variant.at(step)))
                # batch sizes that convolutions have not met would be paid for by whoever comes first
                self._step(self.variants[-1].at(step))
                if settings.device.type == "cuda":
                    self._measure_peaks(step)
                on_step()
            for step in range(-self.warmup, settings.steps):
                gc.collect()
                for number in order.sample(range(len(self.variants)), len(self.variants)):
                    run = self.variants[number].at(step % settings.steps)
                    self.net.model.zero_grad(set_to_none=True)
                    seconds = seconds_of(partial(self._step, run), settings.device)
                    if step >= 0:
                        self.seconds[number].append(seconds)
                on_step()

    def _measure_peaks(self, step: int) -> None:
        for variant, peaks in zip(self.variants, self.peaks, strict=True):
            if variant.varies or step == 0:
                self.net.model.zero_grad(set_to_none=True)
                peaks.append(peak_bytes(partial(self._step, variant.at(step)), self.settings.device))

    def _saved(self, run: Map) -> int:
        casts = self.settings.precision == "bf16" and not self.settings.compile  # graphs keep what they like
        return saved_bytes(partial(self._loss, run), self.net.model.parameters(), casts)

    def _step(self, run: Map) -> None:
        self._loss(run).backward()

    def _loss(self, run: Map) -> Tensor:
        with self.settings.autocast():
            return F.cross_entropy(run(self.x).float(), self.y)

    def rows(self) -> list[dict[str, Any]]:
        """One row per variant, of the steps that all of them have made; none if there is no such step."""
        steps = min(map(len, self.seconds))
        if steps == 0:
            return []
        times = {(v.name, v.granularity): t[:steps] for v, t in zip(self.variants, self.seconds, strict=True)}
        memory = {(v.name, v.granularity): fmean(b) for v, b in zip(self.variants, self.bytes, strict=True)}
        rows = [self._row(variant, times, memory, steps) for variant in self.variants]
        if all(self.peaks):
            constant = fmean(self.peaks[0])
            for row, peaks in zip(rows, self.peaks, strict=True):
                row |= {"peak_bytes": round(fmean(peaks)), "peak_relative_to_constant": fmean(peaks) / constant}
        return rows

    def _row(self, variant: Variant, times: _Times, memory: dict[_Key, float], steps: int) -> dict[str, Any]:
        own, constant, ideal = (variant.name, variant.granularity), (CONSTANT, None), (IDEAL, variant.granularity)
        compared = variant.granularity is not None
        ratios = [a / b for a, b in zip(times[own], times[ideal], strict=True)] if compared else []
        settings = self.settings
        return {
            "model": self.net.name,
            "rule": "stochastic-depth" if compared else "constant",
            "granularity": variant.granularity,
            "survival": self.survival,
            "variant": variant.name,
            "seconds": median(times[own]),
            "relative_to_constant": median_ratio(times[own], times[constant]),
            "relative_to_ideal": median(ratios) if compared else None,
            "saved_bytes": round(memory[own]),
            "saved_relative_to_constant": memory[own] / memory[constant],
            "saved_relative_to_ideal": memory[own] / memory[ideal] if compared else None,
            "quartiles_relative_to_ideal": quantiles(ratios, n=4)[::2] if len(ratios) > 1 else None,
            "steps": steps,
            "batch_size": self.batch_size,
            **({"pixels": self.net.pixels} if self.net.tokens is None else {"tokens": self.net.tokens}),
            "precision": settings.precision,
            "memory_format": "channels_last" if settings.channels_last and self.net.convolutional else "contiguous",
            "compiled": settings.compile,
            **describe(settings.device, settings.seed),
        }


def _many_graphs(compiled: bool) -> AbstractContextManager[Any]:
    """Inside, the compiler keeps as many graphs as all these networks have kinds of blocks."""
    if not compiled:
        return nullcontext()
    import torch._dynamo  # slow to import

    return torch._dynamo.config.patch(recompile_limit=256, accumulated_recompile_limit=4096)


def describe(device: torch.device, seed: int) -> dict[str, Any]:
    """Where, with which seed and versions a row was measured."""
    packages = ["torch", "torchvision", *(each for each in ("timm", "transformers") if find_spec(each))]
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else f"{device.type} ({platform.machine()})",
        "threads": torch.get_num_threads(),
        "seed": seed,
        "versions": {"python": platform.python_version(), **{name: metadata.version(name) for name in packages}},
    }


def bench_skip(
    models: Sequence[str],
    survivals: Sequence[str],
    settings: Settings,
    on_start: Callable[[Comparison], object] = lambda _: None,
    on_step: Callable[[], object] = lambda: None,
) -> Iterator[list[dict[str, Any]]]:
    """Compare all variants of every network under every survival; yields the rows of each comparison as it ends.

    On Ctrl-C the rows of the running comparison come too, if it has timed a step, before KeyboardInterrupt is raised.

    Args:
        models: names that `residrop.research.bench.networks.network` knows.
        survivals: rates as `residrop.schedule.survival.parse` reads them.
        settings: see `Settings`.
        on_start: called with every comparison before it is run.
        on_step: called `rounds` times in each.

    Raises:
        ConfigError: an unknown network, rates that do not fit it, or variants that do not compute what they should.
    """
    for name in models:
        for survival in survivals:
            verify(name, survival)
            torch.manual_seed(settings.seed)
            net = network(name, settings.pixels)
            net.model.to(settings.device)
            if settings.channels_last and net.convolutional:
                net.model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
            comparison = Comparison(net, survival, settings)
            on_start(comparison)
            try:
                comparison.run(on_step)
            except KeyboardInterrupt:
                if rows := comparison.rows():
                    yield rows
                raise
            yield comparison.rows()
