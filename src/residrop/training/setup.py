"""What a training is made of before it starts: device, precision, batches, optimizer."""

import dataclasses
import hashlib
import os
import platform
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from residrop.common.errors import ConfigError, RunError
from residrop.data import (
    Files,
    Images,
    Loader,
    Normalization,
    Splits,
    augmentation,
    fit,
    in_colour,
    load,
    load_test,
    sized,
)
from residrop.rules.catalogue import entry_of
from residrop.training.checkpoint import Run
from residrop.training.distributed import ALONE, Ranks
from residrop.training.foreign import configuration, is_foreign, own_input
from residrop.training.listing import data_of
from residrop.training.networks import build_network
from residrop.training.recipe import Recipe
from residrop.training.weights import check_weights, start_weights

__all__ = [
    "Prepared",
    "check_form",
    "choose_device",
    "data_digest",
    "evaluation_batch",
    "form_of",
    "loader_for",
    "loader_of_run",
    "precision_context",
    "prepare",
    "resolve",
    "splits_of_run",
    "validation_of_run",
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
    data, normalization = recipe.data, recipe.normalization
    if is_foreign(recipe.network):
        data, normalization = sized(data, own_input(recipe.network).size, recipe.split), normalization or "model"
    precision = recipe.precision
    if precision == "auto":
        precision = "bf16" if _computes_bf16(choose_device(recipe.device)) else "fp32"
    return recipe.replace(survival=survival, precision=precision, data=data, normalization=normalization or "channel")


def precision_context(
    recipe: Recipe, device: torch.device, cached: bool = True
) -> Callable[[], AbstractContextManager[Any]]:
    """A function that makes the autocast context of a recipe on a device, for CUDA graphs without `cached` weights."""
    if recipe.precision == "fp32" or (recipe.precision == "auto" and not _computes_bf16(device)):
        return nullcontext
    return lambda: torch.autocast(device.type, dtype=torch.bfloat16, cache_enabled=cached)


def loader_for(
    recipe: Recipe,
    images: Images | Files,
    part: str,
    normalization: Normalization,
    device: torch.device,
    ranks: Ranks = ALONE,
    classes: int | None = None,
) -> Loader:
    """A rank's batches of the images of one part (train, validation, test); only those of train are augmented, and need
    the number of classes."""
    made = dataclasses.replace(
        augmentation(recipe.augmentation),
        alternate=recipe.flips == "alternating",
        area=recipe.crop_area,
        policy=recipe.policy,
        erasing=recipe.erasing,
        mixup=recipe.mixup,
        cutmix=recipe.cutmix,
    )
    return Loader(
        images,
        batch_size=recipe.batch_size if part == "train" else evaluation_batch(recipe.batch_size, images, device),
        normalization=normalization,
        augmentation=made if part == "train" else None,
        seed=recipe.seed,
        device=device,
        channels_last=recipe.channels_last,
        workers=recipe.workers,
        share=(ranks.rank, ranks.size),
        compile=recipe.compile,
        classes=classes,
    )


def evaluation_batch(batch_size: int, images: Images | Files, device: torch.device) -> int:
    """Images in a batch of evaluation, which keeps nothing for backward: as many as fill the device.

    On the CPU more than 250 leave the cache; on a GPU 2000 small images fill it, files are as large as they are.
    """
    return max(batch_size, 2000 if device.type != "cpu" and isinstance(images, Images) else 250)


def loader_of_run(run: Run, data: str | None = None, device: torch.device | None = None) -> Loader:
    """The test images of a run (of another `data` source if given), normalised as in its training.

    Nothing but these is read, and their labels are matched with the run's classes by name.
    """
    recipe, dataset = run.recipe(), run.dataset()
    source = data or recipe.data
    images = load_test(
        source,
        dataset["classes"],
        size=dataset["size"],
        split=recipe.split,
        on_error=recipe.on_error,
        listed=None if data else data_of(run)["listed"],
    )
    if isinstance(images, Images) and images.pixels.shape[1] < dataset["channels"]:
        images = Images(images.pixels.expand(-1, dataset["channels"], -1, -1), images.labels)
    check_form(run, source, *form_of(images))
    return loader_for(recipe, images, "test", run.normalization(), device or choose_device(recipe.device))


def splits_of_run(run: Run, data: str | None = None) -> Splits:
    """The images of a run as its training had them (or of another `data` source), its list of files included."""
    recipe, dataset = run.recipe(), run.dataset()
    source = data or recipe.data
    splits = load(
        sized(source, dataset["size"], recipe.split),
        validation=recipe.validation,
        seed=recipe.seed + 1,
        limit=recipe.limit,
        split=recipe.split,
        on_error=recipe.on_error,
        classes=dataset["classes"],
        listed=data_of(run)["listed"] if data is None else None,
    )
    if dataset["channels"] == 3:
        splits = in_colour(splits)
    check_form(run, source, splits.channels, splits.size)
    return splits


def validation_of_run(run: Run, device: torch.device) -> Loader:
    """The images that a run held out of its training, in order and not augmented.

    Raises:
        RunError: it held out none, or its source has other images now, of which some may have been trained on.
    """
    recipe = run.recipe()
    if not recipe.validation:
        raise RunError(
            f"{run.path} held out no validation images; give others with labels by --calibration DATA, which must be "
            "neither training nor test images, or train with --validation N"
        )
    splits = splits_of_run(run)
    if splits.listed is None and data_digest(splits) != run.dataset()["digest"]:
        raise RunError(
            f"{run.path} was trained on other images than {recipe.data} has now, so its validation images are unknown; "
            "give others by --calibration DATA"
        )
    assert splits.validation is not None
    return loader_for(recipe, splits.validation, "validation", run.normalization(), device)


def form_of(images: Images | Files) -> tuple[int, int]:
    """Channels and size in pixels."""
    return (3, images.size) if isinstance(images, Files) else (images.pixels.shape[1], images.pixels.shape[-1])


def check_form(run: Run, source: str, channels: int, size: int) -> None:
    """RunError if images are not of the channels and size that a run was trained on."""
    wanted = run.dataset()["channels"], run.dataset()["size"]
    if (channels, size) != wanted:
        raise RunError(
            f"{run.path} was trained on {wanted[0]}-channel images of {wanted[1]}x{wanted[1]} pixels, {source} has "
            f"{channels} of {size}x{size}; give the matching --data (folder: and parquet: take ?size={wanted[1]})"
        )


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
    listed: tuple[str, ...] | None = None  # as of `Splits`


def _normalization(recipe: Recipe, splits: Splits) -> Normalization:
    if recipe.normalization != "model":
        return fit(splits.train, recipe.normalization)
    if not is_foreign(recipe.network):
        raise ConfigError(f"normalization is 'model', which {recipe.network} has none of; choose 'channel'")
    own = own_input(recipe.network)
    return Normalization("model", *(torch.tensor(part).reshape(3, 1, 1) for part in (own.mean, own.std)))


def _compilers() -> tuple[str, ...]:
    return os.environ.get("CXX", "g++"), "g++", "clang++"


def prepare(recipe: Recipe, ranks: Ranks = ALONE, before: dict[str, Any] | None = None) -> Prepared:
    """Load a recipe's data and check that its network can be built for them; nothing is written.

    Every rank gets all images and reads its share of each batch. `before` is `data_of` the run that is continued, whose
    classes and list of images count.

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
    if before is None:
        check_weights(recipe)
    splits = load(
        recipe.data,
        validation=recipe.validation,
        seed=recipe.seed + 1,
        limit=recipe.limit,
        split=recipe.split,
        on_error=recipe.on_error,
        classes=before["classes"] if before else None,
        listed=before["listed"] if before else None,
    )
    if is_foreign(recipe.network):
        splits = in_colour(splits)
    normalization = _normalization(recipe, splits)
    parts = [name for name in ("train", "validation", "test") if getattr(splits, name) is not None]
    classes = len(splits.classes)
    loaders = {
        name: loader_for(recipe, getattr(splits, name), name, normalization, device, ranks, classes) for name in parts
    }
    steps = loaders["train"].steps_per_epoch
    if steps == 0:
        raise ConfigError(f"{len(splits.train)} training image(s) make no batch of at least two; give more images")
    dataset = {
        "classes": splits.classes,
        "channels": splits.channels,
        "size": splits.size,
        "steps": recipe.epochs * steps,
        # the images of a list are those of the run by its construction, but for those that are gone
        "digest": before["digest"] if before and before["listed"] else data_digest(splits),
    }
    if is_foreign(recipe.network):
        dataset |= {"config": config} if (config := configuration(recipe.network)) is not None else {}
        network = build_network(recipe, dataset)
    else:
        with torch.device("meta"):
            network = build_network(recipe, dataset).eval()
            network(torch.empty(2, splits.channels, splits.size, splits.size))  # refuses images it cannot read
    if before is None:
        start_weights(recipe, network)  # refuses those that do not fit, before anything is written
    return Prepared(device, normalization, loaders, dataset, splits.listed)
