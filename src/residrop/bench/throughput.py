"""Images per second of training, against the loop people write today and against bare convolutions.

What is measured, all in turns in one round, in an order that changes from round to round:

- ours: an update as `residrop train` makes it, from the images in memory to the optimizer (`training.loop.updates`);
- network: forward, loss and backward of the same update for a batch that lies ready. What is left of an update is data,
  augmentation, optimizer and the loop's Python: the share outside the network;
- bare: the convolutions that live under the draw of that update, by themselves, in the same type and memory format;
- plain loop: see `residrop.bench.plain`; a few steps of it, in another process, while this one waits.

Shares and ratios are medians over rounds of two times of one round. The draws are those nearest to the expected depth,
as in `residrop bench skip`. On a GPU each time is that of several updates under one draw, which the processor may
launch ahead, and the bare convolutions are one CUDA graph. FLOPs are those of PyTorch's counter for the forward under a
draw, times three.
"""

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from random import Random
from statistics import median, quantiles
from typing import Any, Literal, NamedTuple

import torch
from torch.nn import functional as F

from residrop.attach import using
from residrop.bench.bare import Bare, recorded
from residrop.bench.measure import median_ratio, quiet_collector, seconds_of
from residrop.bench.peers import draws
from residrop.bench.plain import CLASSES, PlainLoop, Task, images_of
from residrop.bench.skip import describe
from residrop.data import Images, Loader, augmentation, fit
from residrop.errors import ConfigError
from residrop.models import create
from residrop.survival import check_whole
from residrop.theory.costs import costs_of
from residrop.training.loop import updates
from residrop.training.recipe import Recipe
from residrop.training.run import start
from residrop.training.setup import Prepared, precision_context, resolve

__all__ = ["RULES", "ThroughputSettings", "bench_throughput", "depth_of_name"]


class _Protocol(NamedTuple):
    """The network and rates that go with a rule."""

    family: str
    survival: str | None
    block: Literal["v1", "v2"] | None = None


RULES: dict[str, _Protocol] = {
    "constant": _Protocol("resnet", None),
    "stochastic-depth": _Protocol("resnet", "linear_decay(0.5)"),
    "swapout": _Protocol("resnet-ours", "linear(1, 0.5)", "v2"),
    "depth-dropout": _Protocol("depth-dropout-resnet", "uniform(0.5)"),
}
_QUEUED = 20  # updates in a row on a GPU
_MORE_EPOCHS = 1000  # of the learning rate's schedule, none of which is reached


@dataclass(frozen=True, kw_only=True)
class ThroughputSettings:
    """How it is measured.

    Attributes:
        steps: timed rounds.
        warmup: rounds before them.
        batch_size: images in a step.
        images: how many there are, of CIFAR's size; rounded up to whole batches.
        plain_steps: steps of the plain loop in a round.
        workers: processes of its DataLoader.
        precision: of our training; "auto" takes bf16 autocast where the hardware has it.
        compile: whether our branches are compiled.
        device: where to run.
        seed: seed of weights, images and draws.
    """

    steps: int = 5
    warmup: int = 2
    batch_size: int = 128
    images: int = 2048
    plain_steps: int = 3
    workers: int = 2
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    compile: bool = False
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"steps": 1, "warmup": 0, "batch_size": 2, "images": 1, "plain_steps": 1, "workers": 0}
        for name, value in least.items():
            check_whole(name, getattr(self, name), least=value)


def depth_of_name(name: str) -> int:
    """20 of "resnet-20"; ConfigError for another network."""
    family, _, depth = name.rpartition("-")
    if family != "resnet" or not depth.isdecimal():
        raise ConfigError(f"network {name!r} has no form for every rule; give resnet-20, resnet-56, resnet-110, ...")
    return int(depth)


class _Ours:
    """A training of ours that can be continued at any update, and what belongs to it."""

    def __init__(self, depth: int, width: int, rule: str, settings: ThroughputSettings) -> None:
        family, survival, block = RULES[rule]
        device = settings.device
        self.recipe = resolve(
            Recipe(
                network=f"{family}-{depth}",
                width=width,
                block=block,
                rule=rule,
                survival=survival,
                augmentation="crop",
                epochs=_MORE_EPOCHS,
                batch_size=settings.batch_size,
                precision=settings.precision,
                compile=settings.compile,
                device=str(device),
                seed=settings.seed,
            )
        )
        images = Images(*images_of(-(-settings.images // settings.batch_size) * settings.batch_size, settings.seed))
        normalization = fit(images, self.recipe.normalization)
        self.loader = Loader(
            images,
            batch_size=settings.batch_size,
            normalization=normalization,
            augmentation=augmentation(self.recipe.augmentation),
            seed=settings.seed,
            device=device,
            compile=settings.compile,
        )
        dataset = {"classes": [""] * CLASSES, "channels": 3, "size": 32, "steps": _MORE_EPOCHS * settings.images}
        self.state = start(self.recipe, Prepared(device, normalization, {"train": self.loader}, dataset))
        self.plans = draws(self.state.model, settings.steps)
        self._autocast = precision_context(self.recipe, device)
        self._updates = self._forever()
        self.x, self.y = next(iter(self.loader.train_batches(0)))
        plain = self._uncompiled()
        dtype = torch.bfloat16 if self.recipe.precision == "bf16" else torch.float32
        self.bare = Bare(plain, self.x, dtype)
        self._repeat = 1 if device.type == "cpu" else _QUEUED
        costs = costs_of(plain, "flops", self.x[:2])
        self.flops = [3 * settings.batch_size / 2 * _under(costs.branches, costs.fixed, plan) for plan in self.plans]

    def _uncompiled(self) -> Any:
        recipe = self.recipe
        options: dict[str, Any] = {} if recipe.block is None else {"block": recipe.block}
        model = create(recipe.network, rule=recipe.rule, survival=recipe.survival, width=recipe.width, **options)
        return model.to(self.x.device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]

    def _forever(self) -> Iterator[None]:
        for epoch in count():
            yield from updates(self.recipe, self.state, self.loader, epoch)

    def parts(self, number: int) -> dict[str, Callable[[], object]]:
        """What a round measures, all of it under draw `number`."""
        return {
            "step": partial(self._step, number),
            "network": partial(self._network, number),
            "bare": self._bare_under(number),
        }

    def seconds(self, part: Callable[[], object], device: torch.device) -> float:
        """Of one run of a part."""
        return seconds_of(lambda: [part() for _ in range(self._repeat)], device) / self._repeat

    def _step(self, number: int) -> None:
        self.state.update = self.plans[number].step
        next(self._updates)

    def _bare_under(self, number: int) -> Callable[[], object]:
        work = partial(self.bare.run, self.plans[number])
        return work if self.x.device.type != "cuda" else recorded(work)

    def _network(self, number: int) -> None:
        model = self.state.model
        self.clear()
        with using(model, self.plans[number]), self._autocast():
            loss = F.cross_entropy(model(self.x).float(), self.y)
        loss.backward()

    def clear(self) -> None:
        """Leave no gradients, as a step finds it after the optimizer's `zero_grad`."""
        self.state.model.zero_grad(set_to_none=True)


def _under(branches: Sequence[float], fixed: float, plan: Any) -> float:
    return fixed + sum(cost for cost, draw in zip(branches, plan.draws, strict=True) if draw.alive is not False)


_Times = dict[str, dict[str, list[float]]]


def bench_throughput(
    networks: Sequence[str],
    widths: Sequence[int],
    rules: Sequence[str],
    settings: ThroughputSettings,
    on_step: Callable[[], object] = lambda: None,
) -> Iterator[list[dict[str, Any]]]:
    """Measure every network at every width under every rule; yields the rows of one network and width as it ends.

    On Ctrl-C the rows of the running ones come too, if they have timed a round, before KeyboardInterrupt is raised.

    Args:
        networks: "resnet-20", ...: of 6n + 2 layers, in the form that goes with each rule.
        widths: multiples of their width.
        rules: names in `RULES`.
        settings: see `ThroughputSettings`.
        on_step: called `warmup + steps` times for each network and width.

    Raises:
        ConfigError: an unknown network or rule.
        RunError: the plain loop has ended.
    """
    for rule in rules:
        if rule not in RULES:
            raise ConfigError(f"rule {rule!r} is not measured; choose among {', '.join(RULES)}")
    for name in networks:
        create(f"resnet-{depth_of_name(name)}")
    for name in networks:
        for width in widths:
            ours = {rule: _Ours(depth_of_name(name), width, rule, settings) for rule in rules}
            times: _Times = {rule: {"step": [], "network": [], "bare": [], "plain": []} for rule in rules}
            try:
                with PlainLoop(_task(name, width, settings)) as plain:
                    _measure(ours, plain, settings, times, on_step)
            except KeyboardInterrupt:
                if rows := _rows(name, width, ours, settings, times):
                    yield rows
                raise
            yield _rows(name, width, ours, settings, times)


def _task(name: str, width: int, settings: ThroughputSettings) -> Task:
    return Task(
        network=name,
        width=width,
        images=max(settings.images, settings.batch_size * settings.plain_steps),
        batch_size=settings.batch_size,
        batches=settings.plain_steps,
        workers=settings.workers,
        device=str(settings.device),
        threads=torch.get_num_threads(),
        seed=settings.seed,
    )


def _measure(
    ours: dict[str, _Ours],
    plain: PlainLoop,
    settings: ThroughputSettings,
    times: _Times,
    on_step: Callable[[], object],
) -> None:
    order = Random(settings.seed)
    with quiet_collector():
        for step in range(-settings.warmup, settings.steps):
            gc.collect()
            found: dict[tuple[str, str], float] = {}
            for rule in order.sample([*ours, ""], len(ours) + 1):
                if not rule:
                    seconds = plain.seconds()
                    found |= {(name, "plain"): seconds for name in ours}
                    continue
                parts = ours[rule].parts(step % settings.steps)
                for part in order.sample(list(parts), len(parts)):
                    found[rule, part] = ours[rule].seconds(parts[part], settings.device)
                ours[rule].clear()
            if step >= 0:
                for (rule, part), seconds in found.items():
                    times[rule][part].append(seconds)
            on_step()


def _rows(
    name: str, width: int, ours: dict[str, _Ours], settings: ThroughputSettings, times: _Times
) -> list[dict[str, Any]]:
    plain = next(iter(times.values()))["plain"]
    if not plain:
        return []
    common = {
        "model": name,
        "width": width,
        "batch_size": settings.batch_size,
        "pixels": 32,
        "steps": len(plain),
        **describe(settings.device, settings.seed),
    }
    rows = [_row(rule, ours[rule], times[rule], settings) | common for rule in ours]
    flops = ours["constant"].flops[0] if "constant" in ours else None
    seconds = median(plain)
    row = {
        "variant": "plain loop",
        "network": name,
        "rule": "constant",
        "images_per_second": settings.batch_size / seconds,
        "seconds": seconds,
        "model_flops_per_second": flops and flops / seconds,
        "relative_to_plain": 1.0,
        "precision": "fp32",
        "memory_format": "contiguous",
        "workers": settings.workers,
        "steps_in_a_round": settings.plain_steps,
    }
    return [row | common, *rows]


def _row(rule: str, ours: _Ours, times: dict[str, list[float]], settings: ThroughputSettings) -> dict[str, Any]:
    rounds = list(zip(times["step"], times["network"], strict=True))
    outside = [1.0 - network / step for step, network in rounds]
    seconds = median(times["step"])
    work = ours.flops[: len(rounds)]
    return {
        "variant": "residrop",
        "network": ours.recipe.network,
        "rule": rule,
        "survival": RULES[rule].survival,
        "images_per_second": settings.batch_size / seconds,
        "seconds": seconds,
        "model_flops_per_second": median(flops / took for flops, took in zip(work, times["step"], strict=True)),
        "bare_flops_per_second": median(flops / took for flops, took in zip(work, times["bare"], strict=True)),
        "share_of_bare": median_ratio(times["bare"], times["step"]),
        "network_share_of_bare": median_ratio(times["bare"], times["network"]),
        "share_outside": median(outside),
        "quartiles_outside": quantiles(outside, n=4)[::2] if len(outside) > 1 else None,
        "relative_to_plain": median_ratio(times["plain"], times["step"]),
        "precision": ours.recipe.precision,
        "memory_format": "channels_last",
        "compiled": settings.compile,
    }
