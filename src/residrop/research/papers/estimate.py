"""How long a training will take, estimated: its FLOPs over the rate at which one small network trains here.

The FLOPs of a forward are counted on meta tensors; forward and backward take three times that. Branches that a rule
leaves out are not counted, as blocks of one network cost about the same. The rate is that of a few updates of a small
network of the same width, rule level and precision on random images, measured once. Reading of files, compilation and
the effect of batch sizes are not in it: expect to be wrong by a factor of up to two.
"""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from residrop.blocks.attach import expected_depth_of, rules_of
from residrop.research.papers.work import DATA, Training
from residrop.theory.costs import read_budget
from residrop.training.checked import read_lines
from residrop.training.networks import build_network
from residrop.training.optimizers import make_optimizer
from residrop.training.recipe import Recipe
from residrop.training.setup import choose_device, precision_context

__all__ = ["Estimator", "as_text"]

_LARGE = 224  # pixels, of what has no size of its own


class _Work(NamedTuple):
    """FLOPs of the forward of one image at full depth, and the share of them that an update makes."""

    forward: float
    share: float


class Estimator:
    """Estimates in seconds; measurements are kept.

    Args:
        device: as in a recipe.
    """

    def __init__(self, device: str = "auto") -> None:
        self.device = choose_device(device)
        self._rates: dict[tuple[object, ...], float] = {}
        self._work: dict[tuple[object, ...], _Work] = {}
        self._forwards: dict[tuple[object, ...], float] = {}

    def seconds(self, recipe: Recipe, epochs: int | None = None) -> float:
        """A training of the recipe on the data it names (not counted: what a `--data` holds instead), evaluations
        included.

        Args:
            recipe: with any data; those that are no paper's count as CIFAR-10.
            epochs: instead of the recipe's.
        """
        epochs = recipe.epochs if epochs is None else epochs
        size = DATA.get(recipe.data.partition(":")[0], DATA["cifar10"])
        work = self._work_of(recipe)
        images = recipe.limit or size.train - recipe.validation
        evaluated = (size.test + recipe.validation) * max(1, epochs // recipe.eval_every)
        passes = recipe.samples if recipe.rule != "constant" else 0
        forwards = 3.0 * work.share * images * epochs + evaluated + size.test * (1 + work.share * passes)
        return forwards * work.forward / self.rate(recipe)

    def timing(self, setting: Mapping[str, Any], steps: int) -> float:
        """Timed updates of a network under its rule and of its baseline, warm-up included."""
        common = {"data": setting["data"], "batch_size": setting["batch_size"]}
        ours = Recipe(network=setting["network"], rule=setting["rule"], survival=setting["survival"], **common)
        plain = Recipe(network=setting["baseline"], rule="constant", **common)
        every = [(self._work_of(recipe), self.rate(recipe)) for recipe in (ours, plain)]
        seconds = sum(3.0 * work.share * work.forward / rate for work, rate in every)
        return (steps + 2) * setting["batch_size"] * seconds

    def left(self, training: Training, runs: Path) -> float:
        """What is left of a run, by the epochs its directory has."""
        recipe = training.recipe.replace(data=training.full.data)
        done = len(read_lines(runs / training.name / "metrics.jsonl"))
        return self.seconds(recipe) * max(0.0, 1.0 - done / recipe.epochs)

    def _work_of(self, recipe: Recipe) -> _Work:
        size = DATA.get(recipe.data.partition(":")[0], DATA["cifar10"])
        net = (recipe.network, recipe.width, recipe.block, recipe.rule == "depth-dropout", size)
        rates = (recipe.rule, recipe.survival, recipe.granularity, recipe.budget)
        if (net, rates) in self._work:
            return self._work[net, rates]
        described = {"classes": [""] * size.classes, "channels": size.channels, "size": size.size or _LARGE}
        with torch.device("meta"):
            model = build_network(recipe, described).eval()
            x = torch.empty(1, size.channels, described["size"], described["size"])
        if net not in self._forwards:
            with torch.no_grad(), FlopCounterMode(display=False) as counter:
                model(x)
            self._forwards[net] = float(counter.get_total_flops())
        rules = rules_of(model)
        skips = any(rule.site.rates and rule.site.granularity in ("block", "row") for rule in rules)
        share = expected_depth_of(model) / len(rules) if skips else 1.0
        if recipe.budget is not None:
            share = read_budget(recipe.budget)[0]
        self._work[net, rates] = _Work(self._forwards[net], share)
        return self._work[net, rates]

    def rate(self, recipe: Recipe) -> float:
        """FLOPs per second of training, of a small network like the recipe's."""
        unit = recipe.rule in ("swapout", "skipforward", "dropout", "dropout-residual", "dropout-sum")
        wide = recipe.network.startswith("imagenet")
        key = (4 if wide else min(recipe.width or 1, 4), unit, recipe.precision, recipe.channels_last)
        if key not in self._rates:
            width, *_ = key
            rule, survival = ("swapout", "uniform(0.5)") if unit else ("constant", None)
            small = Recipe(network="resnet-14", width=width, rule=rule, survival=survival, precision=recipe.precision)
            self._rates[key] = self._measured(small, 32 if self.device.type == "cpu" else 256)
        return self._rates[key]

    def _measured(self, recipe: Recipe, rows: int, steps: int = 3) -> float:
        described = {"classes": [str(i) for i in range(10)], "channels": 3, "size": 32}
        model = build_network(recipe, described).train().to(self.device)
        model = model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        optimizer, autocast = make_optimizer(recipe, model), precision_context(recipe, self.device)
        x = torch.randn(rows, 3, 32, 32, generator=torch.Generator().manual_seed(0)).to(self.device)
        x = x.contiguous(memory_format=torch.channels_last)
        y = torch.zeros(rows, dtype=torch.long, device=self.device)
        fastest = float("inf")
        for _ in range(steps):
            started = time.perf_counter()
            optimizer.zero_grad(set_to_none=True)
            with autocast():
                loss = F.cross_entropy(model(x).float(), y)
            loss.backward()
            optimizer.step()
            if self.device.type != "cpu":
                torch.accelerator.synchronize(self.device)
            fastest = min(fastest, time.perf_counter() - started)
        return 3.0 * rows * self._work_of(recipe.replace(data="cifar10")).forward / fastest


def as_text(seconds: float) -> str:
    """ "40 s", "12 min", "3.5 h" or "4.2 days"."""
    for unit, size, digits in (("s", 1.0, 0), ("min", 60.0, 0), ("h", 3600.0, 1)):
        if seconds < {"s": 90.0, "min": 5400.0, "h": 172_800.0}[unit]:
            return f"{seconds / size:.{digits}f} {unit}"
    return f"{seconds / 86_400.0:.1f} days"
