"""Times of an update under random presence against constant depth, measured here as ratios (instruments `timing.*`).

Both networks take turns in one process, so that a slow minute of the machine is shared, in an order that changes from
step to step. As in `residrop bench skip`, the draws are those of the first steps whose depth is nearest to its
expectation, and a ratio is the median over steps of time(step) / time(constant depth, step). Images are random numbers
that are there: reading and augmenting them is not part of the time.
"""

import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from random import Random
from statistics import median, quantiles
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from residrop.blocks.attach import using
from residrop.research.bench.measure import median_ratio, quiet_collector, seconds_of
from residrop.research.bench.peers import draws
from residrop.schedule.sampler import Plan
from residrop.training.networks import build_network
from residrop.training.optimizers import make_optimizer
from residrop.training.recipe import Recipe
from residrop.training.setup import choose_device, precision_context, resolve

__all__ = ["Bench", "Steps", "time_updates"]

SHAPES = {"cifar10": (3, 32, 10), "cifar100": (3, 32, 100), "svhn": (3, 32, 10), "digits": (1, 8, 10)}
"""Channels, pixels and classes of the data a timing row names."""


class Steps(NamedTuple):
    """Seconds of timed updates, one number per step: with the rule, and at constant depth.

    Attributes:
        forward: forward and loss.
        backward: backward.
        update: forward, backward and the optimizer's step.
        base_forward: the same at constant depth, and so on.
        base_backward: see base_forward.
        base_update: see base_forward.
    """

    forward: list[float]
    backward: list[float]
    update: list[float]
    base_forward: list[float]
    base_backward: list[float]
    base_update: list[float]

    def saved(self, part: str) -> tuple[float, float, float]:
        """Percent of the time saved against constant depth: by the median of ratios, and by their quartiles."""
        ours, base = self.of(part), self.of(part, base=True)
        ratios = [a / b for a, b in zip(ours, base, strict=True)]
        low, _, high = quantiles(ratios, n=4) if len(ratios) > 1 else [ratios[0]] * 3
        return 100.0 * (1.0 - median_ratio(ours, base)), 100.0 * (1.0 - high), 100.0 * (1.0 - low)

    def of(self, part: str, *, base: bool = False) -> list[float]:
        """Seconds of "forward", "backward", "total" (both) or "update", step by step."""
        columns = (self.base_forward, self.base_backward, self.base_update) if base else self[:3]
        forward, backward, update = columns
        if part == "total":
            return [a + b for a, b in zip(forward, backward, strict=True)]
        return {"forward": forward, "backward": backward, "update": update}[part]


@dataclass
class Bench:
    """Where and how long to time, and what was timed before.

    Attributes:
        device: "auto", "cpu", ...
        steps: timed steps.
        warmup: steps before them.
        precision: as in a recipe.
        on_step: called after each step.
        found: measurements by setting and seed.
    """

    device: str = "auto"
    steps: int = 15
    warmup: int = 2
    precision: Any = "auto"
    on_step: Callable[[], object] = lambda: None
    found: dict[tuple[Any, ...], Steps] = field(default_factory=dict)


def time_updates(setting: Mapping[str, Any], seed: int, bench: Bench) -> Steps:
    """Time updates of `setting["network"]` under its rule and of `setting["baseline"]`; once per bench and seed."""
    wanted = tuple(setting[name] for name in ("network", "rule", "survival", "baseline", "data", "batch_size"))
    key = (*wanted, seed)
    if key in bench.found:
        return bench.found[key]
    if setting["rule"] == "constant":  # measured already, if a rule was compared with this network
        for (*_, baseline, data, size, of), steps in bench.found.items():
            if (baseline, data, size, of) == (setting["network"], setting["data"], setting["batch_size"], seed):
                return Steps(*steps[3:], *steps[3:])
    bench.found[key] = _measured(setting, seed, bench)
    return bench.found[key]


class _Side:
    """One of the two networks, its optimizer and its draws."""

    def __init__(self, recipe: Recipe, setting: Mapping[str, Any], bench: Bench) -> None:
        channels, size, classes = SHAPES[setting["data"]]
        described = {"classes": [str(i) for i in range(classes)], "channels": channels, "size": size}
        model = build_network(recipe, described).train().to(choose_device(recipe.device))
        self.model: nn.Module = model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self.optimizer = make_optimizer(recipe, self.model)
        self.plans: list[Plan] = draws(self.model, bench.steps)
        self.autocast = precision_context(recipe, choose_device(recipe.device))
        self.times: list[tuple[float, float, float]] = []
        self._loss: Tensor | None = None

    def step(self, number: int, x: Tensor, y: Tensor) -> tuple[float, float, float]:
        """Seconds of forward, backward and the whole update."""
        self.optimizer.zero_grad(set_to_none=True)
        forward = seconds_of(partial(self._forward, self.plans[number], x, y), x.device)
        backward = seconds_of(self._backward, x.device)
        rest = seconds_of(self.optimizer.step, x.device)
        return forward, backward, forward + backward + rest

    def _forward(self, plan: Plan, x: Tensor, y: Tensor) -> None:
        with using(self.model, plan), self.autocast():
            self._loss = F.cross_entropy(self.model(x).float(), y)

    def _backward(self) -> None:
        if self._loss is not None:
            self._loss.backward()
        self._loss = None


def _measured(setting: Mapping[str, Any], seed: int, bench: Bench) -> Steps:
    common = {"device": bench.device, "precision": bench.precision, "seed": seed, "lr": 1e-3}
    ours = Recipe(network=setting["network"], rule=setting["rule"], survival=setting["survival"], **common)
    plain = Recipe(network=setting["baseline"], rule="constant", survival=None, **common)
    sides = [_Side(resolve(recipe), setting, bench) for recipe in (ours, plain)]
    channels, size, classes = SHAPES[setting["data"]]
    generator, order = torch.Generator().manual_seed(seed), Random(seed)
    rows = setting["batch_size"]
    device = choose_device(bench.device)
    x = torch.randn(rows, channels, size, size, generator=generator).to(device, memory_format=torch.channels_last)
    y = torch.randint(classes, (rows,), generator=generator).to(device)
    with quiet_collector():
        for step in range(-bench.warmup, bench.steps):
            gc.collect()
            for side in order.sample(sides, 2):
                times = side.step(step % bench.steps, x, y)
                if step >= 0:
                    side.times.append(times)
            bench.on_step()
    columns = [[list(column) for column in zip(*side.times, strict=True)] for side in sides]
    return Steps(*columns[0], *columns[1])


def milliseconds(steps: Steps, part: str) -> float:
    """Median over steps."""
    return 1000.0 * median(steps.of(part))
