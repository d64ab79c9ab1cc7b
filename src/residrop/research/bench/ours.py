"""Our training for `residrop bench throughput`: an update, the network in it, and its bare convolutions."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from residrop.blocks.attach import using
from residrop.common.checks import check_whole
from residrop.data import Images, Loader, augmentation, fit
from residrop.models import create
from residrop.research.bench.bare import Bare, recorded
from residrop.research.bench.measure import seconds_of
from residrop.research.bench.peers import draws
from residrop.research.bench.plain import CLASSES, images_of
from residrop.theory.costs import costs_of
from residrop.training.loop import updates
from residrop.training.recipe import Recipe
from residrop.training.run import start
from residrop.training.setup import Prepared, precision_context, resolve

__all__ = ["RULES", "Ours", "ThroughputSettings"]


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
        compile: whether our networks are compiled.
        graphs: as in a recipe.
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
    graphs: Literal["none", "passes", "updates"] = "updates"
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"steps": 1, "warmup": 0, "batch_size": 2, "images": 1, "plain_steps": 1, "workers": 0}
        for name, value in least.items():
            check_whole(name, getattr(self, name), least=value)


class Ours:
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
                graphs=settings.graphs,
                device=str(device),
                seed=settings.seed,
            )
        )
        images = Images(*images_of(-(-settings.images // settings.batch_size) * settings.batch_size, settings.seed))
        mode = self.recipe.normalization
        normalization = fit(images, None if mode == "model" else mode)
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
        self._pass = partial(self._forward_backward, self.state.model, self._autocast)
        if (update := self.state.recorded) is not None:  # then the network by itself is a graph, too
            autocast = precision_context(self.recipe, device, cached=False)
            with update.whole.recording(self.x):
                self._pass = recorded(partial(self._forward_backward, update.whole.forward, autocast))
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
        with using(self.state.model, self.plans[number]):
            if self.state.recorded is not None:
                self.state.recorded.whole.draw(self.x)
            self._pass()

    def _forward_backward(self, forward: Callable[[Tensor], Tensor], autocast: Callable[[], Any]) -> None:
        self.clear()
        with autocast():
            loss = F.cross_entropy(forward(self.x).float(), self.y)
        loss.backward()

    def clear(self) -> None:
        """Leave no gradients, as a step finds it after the optimizer's `zero_grad`."""
        self.state.model.zero_grad(set_to_none=True)


def _under(branches: Sequence[float], fixed: float, plan: Any) -> float:
    return fixed + sum(cost for cost, draw in zip(branches, plan.draws, strict=True) if draw.alive is not False)
