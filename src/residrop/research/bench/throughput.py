"""Images per second of training, against the loop people write today and against bare convolutions.

What is measured, all in turns in one round, in an order that changes from round to round:

- ours: an update as `residrop train` makes it, from the images in memory to the optimizer (`training.loop.updates`);
- network: forward, loss and backward of the same update for a batch that lies ready. What is left of an update is data,
  augmentation, optimizer and the loop's Python: the share outside the network;
- bare: the convolutions that live under the draw of that update, by themselves, in the same type and memory format;
- plain loop: see `residrop.research.bench.plain`; a few steps of it, in another process, while this one waits.

Shares and ratios are medians over rounds of two times of one round. The draws are those nearest to the expected depth,
as in `residrop bench skip`. On a GPU each time is that of several updates under one draw, which the processor may
launch ahead, and the bare convolutions are one CUDA graph. FLOPs are those of PyTorch's counter for the forward under a
draw, times three.
"""

import gc
from collections.abc import Callable, Iterator, Sequence
from random import Random
from statistics import median, quantiles
from typing import Any

import torch

from residrop.common.errors import ConfigError
from residrop.models import create
from residrop.research.bench.measure import median_ratio, quiet_collector
from residrop.research.bench.ours import RULES, Ours, ThroughputSettings
from residrop.research.bench.plain import PlainLoop, Task
from residrop.research.bench.skip import describe

__all__ = ["RULES", "ThroughputSettings", "bench_throughput", "depth_of_name"]


def depth_of_name(name: str) -> int:
    """20 of "resnet-20"; ConfigError for another network."""
    family, _, depth = name.rpartition("-")
    if family != "resnet" or not depth.isdecimal():
        raise ConfigError(f"network {name!r} has no form for every rule; give resnet-20, resnet-56, resnet-110, ...")
    return int(depth)


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
            ours = {rule: Ours(depth_of_name(name), width, rule, settings) for rule in rules}
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
    ours: dict[str, Ours],
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
    name: str, width: int, ours: dict[str, Ours], settings: ThroughputSettings, times: _Times
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


def _row(rule: str, ours: Ours, times: dict[str, list[float]], settings: ThroughputSettings) -> dict[str, Any]:
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
        "graphs": settings.graphs if settings.device.type == "cuda" else "none",
    }
