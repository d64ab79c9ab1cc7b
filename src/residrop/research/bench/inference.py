"""Sampled inference against passes made one by one: `residrop bench inference`.

What is measured, all variants taking turns in one process, in an order that changes from step to step:

- deterministic: as many passes in expectation as there are samples (nobody needs them; they are the unit of cost);
- naive: as many sampled passes, one by one, and the mean of their probabilities. Branches that a coin leaves out are
  not called there either;
- residrop: `residrop.predict`.

Ratios are medians over steps of two times of the same step. Every step has samples of its own, the same for both.
"""

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from random import Random
from statistics import median, quantiles
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from residrop import functional
from residrop.blocks.attach import sampling
from residrop.common.checks import check_whole
from residrop.common.errors import ConfigError
from residrop.inference import predict
from residrop.models import create
from residrop.research.bench.measure import median_ratio, quiet_collector, seconds_of
from residrop.research.bench.skip import describe

__all__ = ["CASES", "Case", "InferenceSettings", "bench_inference"]

DETERMINISTIC, NAIVE, OURS = "deterministic", "naive", "residrop"


class Case(NamedTuple):
    """A network under a rule."""

    model: str
    rule: str
    survival: str
    options: dict[str, Any]

    def build(self, seed: int) -> nn.Module:
        """The network in training mode."""
        return create(self.model, rule=self.rule, survival=self.survival, seed=seed, **self.options)


CASES: dict[str, Case] = {
    "resnet-56": Case("resnet-56", "stochastic-depth", "linear_decay(0.5)", {}),
    "resnet-56-row": Case("resnet-56", "stochastic-depth", "linear_decay(0.5)", {"granularity": "row"}),
    "resnet-20-w2": Case("resnet-ours-20", "swapout", "linear(1, 0.5)", {"width": 2, "block": "v2"}),
    "resnet-20-w2-skipforward": Case("resnet-ours-20", "skipforward", "linear(1, 0.5)", {"width": 2, "block": "v2"}),
}


@dataclass(frozen=True, kw_only=True)
class InferenceSettings:
    """How it is measured.

    Attributes:
        samples: sampled passes of a prediction.
        batch_size: images in a batch, 3 x 32 x 32 each.
        steps: timed steps of every variant.
        warmup: steps before them.
        device: where to run.
        compile: whether unit masks may use the compiler (`residrop.functional.use_compiler`), in all variants.
        seed: seed of weights, images and draws.
    """

    samples: int = 30
    batch_size: int = 64
    steps: int = 5
    warmup: int = 1
    compile: bool = True
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("samples", 1), ("batch_size", 1), ("steps", 1), ("warmup", 0)):
            check_whole(name, getattr(self, name), least=least)


@torch.no_grad()
def _deterministic(model: nn.Module, x: Tensor, samples: int, first: int) -> Tensor:
    model.eval()
    mean = torch.zeros((), device=x.device)
    for number in range(1, samples + 1):
        mean = mean + (model(x).softmax(dim=1) - mean) / number
    return mean


@torch.no_grad()
def _naive(model: nn.Module, x: Tensor, samples: int, first: int) -> Tensor:
    mean = torch.zeros((), device=x.device)
    with sampling(model, first=first):
        for number in range(1, samples + 1):
            mean = mean + (model(x).softmax(dim=1) - mean) / number
    return mean


def _ours(model: nn.Module, x: Tensor, samples: int, first: int) -> Tensor:
    return predict(model, x, samples, first=first).probabilities


_VARIANTS = {DETERMINISTIC: _deterministic, NAIVE: _naive, OURS: _ours}


def bench_inference(
    cases: Sequence[str], settings: InferenceSettings, on_step: Callable[[], object] = lambda: None
) -> Iterator[list[dict[str, Any]]]:
    """Measure every case; yields the rows of each as it ends.

    On Ctrl-C the rows of the running case come too, if it has timed a step, before KeyboardInterrupt is raised.

    Args:
        cases: names in `CASES`.
        settings: see `InferenceSettings`.
        on_step: called `warmup + steps` times in each.

    Raises:
        ConfigError: an unknown name, or predictions that are not those of single passes; nothing is timed then.
    """
    for name in cases:
        if name not in CASES:
            raise ConfigError(f"case {name!r} is unknown; choose one of {', '.join(CASES)}")
    for name in cases:
        times: dict[str, list[float]] = {variant: [] for variant in _VARIANTS}
        functional.use_compiler(settings.compile)  # "auto" would begin to compile between two steps
        try:
            _measure(name, settings, times, on_step)
        except KeyboardInterrupt:
            if rows := _rows(CASES[name], settings, times):
                yield rows
            raise
        finally:
            functional.use_compiler("auto")
        yield _rows(CASES[name], settings, times)


def _measure(
    name: str, settings: InferenceSettings, times: dict[str, list[float]], on_step: Callable[[], object]
) -> None:
    generator = torch.Generator().manual_seed(settings.seed)
    model = CASES[name].build(settings.seed).to(settings.device)
    with torch.no_grad():
        for _ in range(3):  # batch norm has seen something
            model(torch.randn(16, 3, 32, 32, generator=generator).to(settings.device))
    x = torch.randn(settings.batch_size, 3, 32, 32, generator=generator).to(settings.device)
    if not torch.allclose(_ours(model, x, 3, 0), _naive(model, x, 3, 0), rtol=0.0, atol=1e-5):
        raise ConfigError(f"{name}: predictions are not those of single passes; nothing was timed")
    order = Random(settings.seed)
    with quiet_collector():
        for step in range(-settings.warmup, settings.steps):
            first = (step + settings.warmup) * settings.samples
            gc.collect()
            for variant in order.sample(list(_VARIANTS), len(_VARIANTS)):
                run = partial(_VARIANTS[variant], model, x, settings.samples, first)
                seconds = seconds_of(run, settings.device)
                if step >= 0:
                    times[variant].append(seconds)
            on_step()


def _rows(case: Case, settings: InferenceSettings, times: dict[str, list[float]]) -> list[dict[str, Any]]:
    steps = min(map(len, times.values()))
    if steps == 0:
        return []
    times = {variant: found[:steps] for variant, found in times.items()}
    rows: list[dict[str, Any]] = []
    for variant, found in times.items():
        ratios = [a / b for a, b in zip(found, times[DETERMINISTIC], strict=True)]
        row = {
            "model": case.model,
            "rule": case.rule,
            "samples": settings.samples,
            "seconds": median(found),
            "relative_to_naive": median_ratio(found, times[NAIVE]),
            "relative_to_deterministic": median(ratios),
            "quartiles_relative_to_deterministic": quantiles(ratios, n=4)[::2] if steps > 1 else None,
            "variant": variant,
            "survival": case.survival,
            "options": case.options,
            "batch_size": settings.batch_size,
            "pixels": 32,
            "steps": steps,
            "compiled": settings.compile,
        }
        rows.append(row | describe(settings.device, settings.seed))
    return rows
