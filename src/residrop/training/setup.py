"""What a training is made of before it starts: device, precision, batches, optimizer."""

import hashlib
import os
import platform
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from residrop.common.errors import ConfigError, RunError
from residrop.data import Files, Images, Loader, Normalization, Splits, augmentation, fit, load
from residrop.rules.catalogue import entry_of
from residrop.training.checkpoint import Run, build_network
from residrop.training.distributed import ALONE, Ranks
from residrop.training.recipe import Recipe

__all__ = [
    "Prepared",
    "choose_device",
    "data_digest",
    "evaluation_batch",
    "loader_for",
    "loader_of_run",
    "make_optimizer",
    "precision_context",
    "prepare",
    "resolve",
]


def choose_device(name: str) -> torch.device:
    """`auto` is the GPU where there is one; anything else is a torch device name. ConfigError if it is not usable."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, dtype=torch.float64, device=device)  # sums are kept in float64
    except Exception as error:  # of as many kinds as there are backends
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"device {name!r} cannot be used here ({reason}); try --device cpu") from None
    if device.type == "meta":
        raise ConfigError("device 'meta' holds no numbers to train on; try --device cpu")
    return device


def _computes_bf16(device: torch.device) -> bool:
    """Whether the hardware multiplies bf16; emulation would be slower than fp32."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if platform.machine().lower() in ("x86_64", "amd64"):
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def resolve(recipe: Recipe) -> Recipe:
    """The recipe with what it leaves to defaults and to the machine filled in, as a run directory keeps it."""
    survival = entry_of(recipe.rule).survival if recipe.survival is None else recipe.survival
    if recipe.budget is not None:
        survival = None
    precision = recipe.precision
    if precision == "auto":
        precision = "bf16" if _computes_bf16(choose_device(recipe.device)) else "fp32"
    return recipe.replace(survival=survival, precision=precision)


def precision_context(
    recipe: Recipe, device: torch.device, cached: bool = True
) -> Callable[[], AbstractContextManager[Any]]:
    """A function that makes the autocast context of a recipe on a device, for CUDA graphs without `cached` weights."""
    if recipe.precision == "fp32" or (recipe.precision == "auto" and not _computes_bf16(device)):
        return nullcontext
    return lambda: torch.autocast(device.type, dtype=torch.bfloat16, cache_enabled=cached)


def loader_for(
    recipe: Recipe,
    splits: Splits,
    part: str,
    normalization: Normalization,
    device: torch.device,
    ranks: Ranks = ALONE,
) -> Loader:
    """A rank's batches of one part (train, validation, test) of the data; only those of train are augmented."""
    images = getattr(splits, part)
    return Loader(
        images,
        batch_size=recipe.batch_size if part == "train" else evaluation_batch(recipe.batch_size, images, device),
        normalization=normalization,
        augmentation=augmentation(recipe.augmentation) if part == "train" else None,
        seed=recipe.seed,
        device=device,
        channels_last=recipe.channels_last,
        workers=recipe.workers,
        share=(ranks.rank, ranks.size),
        compile=recipe.compile,
    )


def evaluation_batch(batch_size: int, images: Images | Files, device: torch.device) -> int:
    """Images in a batch of evaluation, which keeps nothing for backward: as many as fill the device.

    On the CPU more than 250 leave the cache; on a GPU 2000 small images fill it, files are as large as they are.
    """
    return max(batch_size, 2000 if device.type != "cpu" and isinstance(images, Images) else 250)


def loader_of_run(run: Run, data: str | None = None, device: torch.device | None = None) -> Loader:
    """The test images of a run (of another `data` source if given), normalised as in its training."""
    recipe = run.recipe()
    splits = load(data or recipe.data, validation=0)
    names = tuple(run.dataset()["classes"])
    if splits.classes != names or splits.channels != run.dataset()["channels"]:
        raise RunError(
            f"{run.path} was trained on {len(names)} classes of {run.dataset()['channels']}-channel images, "
            f"{splits.name} has {len(splits.classes)} of {splits.channels}; give the matching --data"
        )
    return loader_for(recipe, splits, "test", run.normalization(), device or choose_device(recipe.device))


def make_optimizer(recipe: Recipe, model: nn.Module) -> torch.optim.SGD:
    """SGD as the recipe has it."""
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=recipe.lr,
        momentum=recipe.momentum,
        nesterov=recipe.nesterov and recipe.momentum > 0,
        weight_decay=recipe.weight_decay,
        fused=True,
    )
    if recipe.momentum > 0:
        # Fused SGD cannot start some buffers later than others, as blocks dropped in the first updates ask for. A
        # buffer of zeros is the same: without dampening the first step makes it the gradient either way.
        for parameter in model.parameters():
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def data_digest(splits: Splits) -> str:
    """Hash that tells training sets apart: all labels in order, and 10,000 images spread over them (or file names)."""
    digest = hashlib.sha256(splits.train.labels.numpy().tobytes())
    if isinstance(splits.train, Files):
        digest.update("\n".join(path.name for path in splits.train.paths).encode())
    else:
        every = max(1, len(splits.train) // 10_000)
        digest.update(splits.train.pixels[::every].contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Prepared:
    """What a recipe's data become: the batches of each part and what a run directory says of them."""

    device: torch.device
    normalization: Normalization
    loaders: dict[str, Loader]
    dataset: dict[str, Any]


def _compilers() -> tuple[str, ...]:
    return os.environ.get("CXX", "g++"), "g++", "clang++"


def prepare(recipe: Recipe, ranks: Ranks = ALONE) -> Prepared:
    """Load a recipe's data and check that its network can be built for them; nothing is written.

    Every rank gets all images and reads its share of each batch.

    Raises:
        UsageError: anything about the recipe or its data that would stop a training.
    """
    device = choose_device(recipe.device)
    if recipe.compile and device.type == "cpu" and not any(map(shutil.which, _compilers())):
        raise ConfigError("compile is on, which needs a C++ compiler on the CPU; install g++, or leave --compile out")
    if recipe.batch_size < ranks.size:
        raise ConfigError(
            f"batch_size is {recipe.batch_size}, the images of an update on all {ranks.size} processes; "
            "give each at least one"
        )
    splits = load(recipe.data, validation=recipe.validation, seed=recipe.seed + 1, limit=recipe.limit)
    normalization = fit(splits.train, recipe.normalization)
    parts = [name for name in ("train", "validation", "test") if getattr(splits, name) is not None]
    loaders = {name: loader_for(recipe, splits, name, normalization, device, ranks) for name in parts}
    steps = loaders["train"].steps_per_epoch
    if steps == 0:
        raise ConfigError(f"{len(splits.train)} training image(s) make no batch of at least two; give more images")
    dataset = {
        "classes": splits.classes,
        "channels": splits.channels,
        "size": splits.size,
        "steps": recipe.epochs * steps,
        "digest": data_digest(splits),
    }
    with torch.device("meta"):
        network = build_network(recipe, dataset).eval()
        network(torch.empty(2, splits.channels, splits.size, splits.size))  # refuses images it cannot read
    return Prepared(device, normalization, loaders, dataset)
