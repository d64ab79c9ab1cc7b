"""What `residrop recalibrate` and `residrop export` do with a trained run."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from rich.console import Console

from residrop.common.errors import RunError
from residrop.common.output import check_target, console_for, write
from residrop.data import Loader, load
from residrop.inference.deploy.export import export
from residrop.inference.deploy.recalibrate import Mode, recalibrate
from residrop.models import reads_flat_rows
from residrop.training import Run, load_run
from residrop.training.logbook import Meter
from residrop.training.setup import choose_device, precision_context

__all__ = ["RECALIBRATED", "Export", "Recalibrate", "Weights", "check_weights", "export_command", "recalibrate_command"]

RECALIBRATED = "recalibrated"  # the weights file that `residrop recalibrate` writes, beside model.safetensors
Weights = Literal["model", "best", "recalibrated"]
RunPath = Annotated[Path, tyro.conf.Positional]


@dataclass(frozen=True)
class Recalibrate:
    """Re-estimate the batch-norm statistics of a run for prediction in expectation, from its training images.

    Batch norm collected its statistics while blocks or units were absent at random; in expectation its inputs have
    other means and variances. The images are not augmented. Writes RUN/recalibrated.safetensors and leaves
    model.safetensors
    alone: compare the two with residrop evaluate RUN --weights recalibrated.
    """

    run: RunPath
    """Run directory."""
    data: str | None = None
    """Another source of training images with the same classes."""
    batches: int = 200
    """Batches of training images to take at most, of the recipe's batch size."""
    mode: Mode = "layers"
    """layers: each layer after all earlier ones (exact); at-once: one pass, by the statistics of each batch."""
    device: str = "auto"
    """cpu, cuda, ...; auto takes a GPU where there is one."""
    json: str | None = None
    """Write what was done to this file as JSON (- for standard output)."""


@dataclass(frozen=True)
class Export:
    """Write a run's network as a file that predicts without residrop.

    The network in expectation, all factors and batch norms folded; any number of images at a time. Class names, mean
    and standard deviation of the pixels are kept in the file. It is read back and compared before the command ends.
    """

    run: RunPath
    """Run directory."""
    to: Path
    """File to write: .onnx (needs the extra residrop[export]), .pt2 (torch.export) or .safetensors (folded weights)."""
    weights: Weights = "model"
    """Which weights of the run: model, best (of the validation) or recalibrated."""
    sampled: bool = False
    """One sampled pass whose coins are inputs of the graph, in place of the expectation (.onnx and .pt2)."""
    json: str | None = None
    """Write what was done to this file as JSON (- for standard output)."""


def check_weights(path: Path, weights: str) -> str:
    """The name of a weights file of a run; RunError, with what to do, if there is none."""
    if weights == RECALIBRATED and path.is_dir() and not (path / f"{weights}.safetensors").exists():
        raise RunError(f"{path} has no recalibrated weights; make them with residrop recalibrate {path}")
    return weights


def recalibrate_command(args: Recalibrate) -> int:
    """Recalibrate a run and write the new weights."""
    check_target(args.json)
    run, model = load_run(args.run)
    recipe, place = run.recipe(), choose_device(args.device)
    model = model.to(place)
    loader = _training_images(run, args.data, place)
    console = Console(stderr=True, markup=False)
    with precision_context(recipe, place)(), Meter(1000, 0, "recalibrating", console=console) as meter:
        done = recalibrate(
            model,
            loader.train_batches(0),
            args.batches,
            args.mode,
            on_progress=lambda share: meter.step(int(1000 * share), "", 0.0),
        )
    try:
        run.save_weights(RECALIBRATED, model)
    except OSError as error:
        raise RunError(f"{args.run} cannot be written ({error.strerror}); make the run directory writable") from None
    out = console_for(args.json)
    out.print(f"{done.layers} batch norms have new statistics from {done.images} images ({done.mode})")
    out.print(f"largest change: {done.largest_change:.2f} standard deviations, in {done.where}")
    out.print(f"weights: {args.run / f'{RECALIBRATED}.safetensors'}")
    out.print(f"compare: residrop evaluate {args.run} --weights {RECALIBRATED}")
    write(args.json, done.to_dict())
    return 0


def _training_images(run: Run, data: str | None, device: torch.device) -> Loader:
    """The images a run was trained on, shuffled, as they come at prediction: normalised, not augmented."""
    recipe, dataset = run.recipe(), run.dataset()
    splits = load(data or recipe.data, validation=recipe.validation, seed=recipe.seed + 1, limit=recipe.limit)
    if splits.classes != tuple(dataset["classes"]) or splits.channels != dataset["channels"]:
        raise RunError(
            f"{run.path} was trained on {len(dataset['classes'])} classes of {dataset['channels']}-channel images, "
            f"{splits.name} has {len(splits.classes)} of {splits.channels}; give the matching --data"
        )
    return Loader(
        splits.train,
        batch_size=recipe.batch_size,
        normalization=run.normalization(),
        seed=recipe.seed,
        device=device,
        channels_last=recipe.channels_last,
        workers=recipe.workers,
    )


def export_command(args: Export) -> int:
    """Export a run."""
    check_target(args.json)
    run, model = load_run(args.run, check_weights(args.run, args.weights))
    dataset = run.dataset()
    size = (2, dataset["channels"], dataset["size"], dataset["size"])
    example = torch.randn(size, generator=torch.Generator().manual_seed(0))
    try:
        done = export(model, args.to, example, metadata=_facts(run, args.weights), sampled=args.sampled)
    except OSError as error:
        raise RunError(f"{args.to} cannot be written ({error.strerror}); choose another --to") from None
    out = console_for(args.json)
    out.print(f"{done.path}: {args.to.stat().st_size / 1e6:.2f} MB, one {'sampled pass' if args.sampled else 'pass'}")
    out.print(
        f"checked with {done.checked_by} at two batch sizes: outputs agree to {done.difference:.1e} of the largest"
    )
    write(args.json, done.to_dict())
    return 0


def _facts(run: Run, weights: str) -> dict[str, Any]:
    """What a program that feeds images to the file has to know."""
    recipe, dataset, normalization = run.recipe(), run.dataset(), run.normalization()
    facts = {
        "classes": list(dataset["classes"]),
        "input": "float32 [images, channels, height, width]: (pixels / 255 - mean) / std",
        "channels": dataset["channels"],
        "size": dataset["size"],
        "mean": normalization.mean.squeeze().tolist(),
        "std": normalization.std.squeeze().tolist(),
        "normalization": normalization.mode,
        "network": recipe.network,
        "rule": recipe.rule,
        "survival": recipe.survival,
        "weights": weights,
        "residrop": run.versions().get("residrop", ""),
    }
    if reads_flat_rows(recipe.network):
        facts["flat"] = "the network flattens its input"
    return facts
