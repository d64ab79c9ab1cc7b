"""What `residrop analyze` looks at: a run directory, a network of residrop, or a model of torchvision or timm."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from torch import Tensor, nn
from torch.nn import functional as F

from residrop.blocks.attach import rules_of, set_survival
from residrop.cli.shared import Json
from residrop.common.errors import ConfigError
from residrop.data import fit, load
from residrop.models import create, list_models, num_blocks, reads_flat_rows
from residrop.schedule.sampler import derive_key
from residrop.schedule.survival import parse
from residrop.surgery import apply
from residrop.theory import sine_task
from residrop.training import Run, load_run
from residrop.training.networks import survival_of
from residrop.training.setup import choose_device, loader_of_run

__all__ = ["Analysis", "Target", "find_target"]

Loss = Callable[[Tensor, Tensor], Tensor]
_DEFAULT = "uniform(0.5)"  # where neither the user nor the model names rates


@dataclass(frozen=True, kw_only=True)
class Analysis:
    """Options that all instruments share."""

    target: Annotated[str, tyro.conf.Positional] = "stable-vanilla-50"
    """A run directory, a network of residrop, torchvision:NAME or timm:NAME."""
    survival: str | None = None
    """Survival rates, as of residrop train (default: the run's own, elsewhere uniform(0.5))."""
    width: int | None = None
    """Width of a network of residrop (Vanilla: units of a layer)."""
    data: str | None = None
    """Images to measure on: digits, cifar10 or the path of a folder (default: a run's test images, elsewhere noise)."""
    images: int = 64
    """How many of them."""
    pretrained: bool = False
    """With torchvision and timm: load their pretrained weights (needs network or cache)."""
    seed: int = 0
    """Seed of weights, masks and noise."""
    device: str = "cpu"
    """cpu, cuda, ..."""
    picture: Path | None = None
    """PNG to draw (default: analyze-INSTRUMENT.png in the run directory, or in this one)."""
    json: Json = None

    def check(self) -> None:
        """Raise ConfigError for numbers out of range, before anything is built."""


@dataclass(frozen=True)
class Target:
    """A model with rules, and batches to measure it on.

    Attributes:
        name: as shown.
        model: attached, in eval mode.
        rates: one per rule.
        batches: pairs of input and target, on the device.
        loss: that of the task.
        inputs: what the batches are, in words.
        run: the run directory it came from.
        vanilla: (blocks, width, whether Stable) of a Vanilla network at initialisation.
    """

    name: str
    model: nn.Module
    rates: tuple[float, ...]
    batches: list[tuple[Tensor, Tensor]]
    loss: Loss
    inputs: str
    run: Run | None = None
    vanilla: tuple[int, int, bool] | None = None

    @property
    def x(self) -> Tensor:
        """The inputs of the first batch."""
        return self.batches[0][0]

    def lines(self, name: str) -> list[dict[str, Any]]:
        """A file of JSON lines that the run wrote along its training; none without a run or such a file."""
        file = None if self.run is None else self.run.path / name
        return [] if file is None or not file.exists() else [json.loads(line) for line in file.read_text().splitlines()]


def find_target(options: Analysis) -> Target:
    """Build or open what the options name.

    Raises:
        UsageError: nothing of that name, rates or data that do not fit it, or a run that is damaged.
    """
    if options.images < 2:
        raise ConfigError(f"images is {options.images}; give at least 2")
    device = choose_device(options.device)
    if Path(options.target).is_dir() or os.sep in options.target:
        return _of_run(options, device)
    library, _, name = options.target.rpartition(":")
    if library == "" and _known(name):
        return _of_residrop(options, device)
    return _of_library(options, library, name, device)


def _known(name: str) -> bool:
    try:
        num_blocks(name)
    except ConfigError:
        return False
    return True


def _of_run(options: Analysis, device: torch.device) -> Target:
    run, model = load_run(Path(options.target))
    if options.survival is not None:
        set_survival(model, parse(options.survival, len(rules_of(model))))
    model.to(device)
    loader = loader_of_run(run, options.data, device)
    found, seen = [], 0
    for x, y in loader.eval_batches():
        found.append((x[: options.images - seen], y[: options.images - seen]))
        seen += len(found[-1][0])
        if seen >= options.images:
            break
    inputs = f"{seen} test images"
    return Target(str(run.path), model, tuple(survival_of(model)), found, F.cross_entropy, inputs, run)


def _of_residrop(options: Analysis, device: torch.device) -> Target:
    name = options.target
    more: dict[str, Any] = {} if options.width is None else {"width": options.width}
    survival = options.survival or _DEFAULT
    if reads_flat_rows(name):
        model = create(name, rule="stochastic-depth", survival=survival, seed=options.seed, classes=1, **more)
        x, y = sine_task(options.images, options.seed)
        batches = [(x.to(device), y[:, None].to(device))]
        vanilla = num_blocks(name), model.get_submodule("stem").out_features, name.startswith("stable-")
        inputs = f"{len(x)} rows of the sine task"
        rates = tuple(survival_of(model))
        return Target(name, model.to(device).eval(), rates, batches, F.mse_loss, inputs, None, vanilla)  # pyright: ignore
    batches, classes, inputs = _images(options, 32, device)
    channels = batches[0][0].shape[1]
    model = create(
        name,
        rule="stochastic-depth",
        survival=survival,
        seed=options.seed,
        classes=classes,
        channels=channels,
        **more,
    )
    return Target(name, model.to(device).eval(), tuple(survival_of(model)), batches, F.cross_entropy, inputs)


def _images(options: Analysis, size: int, device: torch.device) -> tuple[list[tuple[Tensor, Tensor]], int, str]:
    """Test images of --data, or noise where there is none; the number of classes; what they are."""
    if options.data is None:
        generator = torch.Generator().manual_seed(derive_key(options.seed, 5) >> 1)
        x = torch.randn(options.images, 3, size, size, generator=generator)
        y = torch.randint(10, (options.images,), generator=generator)
        return [(x.to(device), y.to(device))], 10, f"{len(x)} images of noise (name --data for real ones)"
    from residrop.data import Images

    splits = load(options.data)
    if not isinstance(splits.test, Images):
        raise ConfigError(f"data {options.data!r} is a folder of large images; train a run on it and analyze that")
    x = fit(splits.train, "channel")(splits.test.pixels[: options.images])
    if x.shape[-1] != size and size != 32:
        x = F.interpolate(x, (size, size), mode="bilinear", antialias=True)
    y = splits.test.labels[: options.images]
    return [(x.to(device), y.to(device))], len(splits.classes), f"{len(x)} test images of {splits.name}"


def _of_library(options: Analysis, library: str, name: str, device: torch.device) -> Target:
    if library not in ("", "torchvision", "timm"):
        raise ConfigError(
            f"{options.target!r}: {library!r} is no library known here; give torchvision:NAME or timm:NAME"
        )
    if options.width is not None:
        raise ConfigError("width is for networks of residrop; a model of another library has its own")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        found = None if library == "timm" else _from_torchvision(name, options.pretrained)
        if found is None and library != "torchvision":
            found = _from_timm(name, options.pretrained)
    if found is None:
        raise ConfigError(
            f"{options.target!r} is no run directory, no network of residrop ({', '.join(list_models())}) and no model "
            "of torchvision or timm (if installed)"
        )
    model, size = found
    apply(model, survival=options.survival or _DEFAULT, seed=options.seed)
    batches, _, inputs = _images(options, size, device)
    if batches[0][0].shape[1] == 1:
        batches = [(x.expand(-1, 3, -1, -1), y) for x, y in batches]
    return Target(options.target, model.to(device).eval(), tuple(survival_of(model)), batches, F.cross_entropy, inputs)


def _from_torchvision(name: str, pretrained: bool) -> tuple[nn.Module, int] | None:
    from torchvision import models  # slow to import

    if name not in models.list_models():
        return None
    model: Any = models.get_model(name, weights="DEFAULT" if pretrained else None)
    return model, 224


def _from_timm(name: str, pretrained: bool) -> tuple[nn.Module, int] | None:
    try:
        import timm
    except ImportError:
        return None
    if not timm.is_model(name):
        return None
    model: Any = timm.create_model(name, pretrained=pretrained)
    return model, model.default_cfg["input_size"][-1]
