"""`residrop recalibrate`: batch-norm statistics for prediction in expectation."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from rich.console import Console

from residrop.cli.shared import RECALIBRATED, Device, Json, RunPath, parse
from residrop.common.output import check_target, console_for, write
from residrop.data import Loader
from residrop.inference.deploy.recalibrate import Mode, recalibrate
from residrop.training import Run, load_run
from residrop.training.logbook import Meter
from residrop.training.setup import choose_device, precision_context, splits_of_run

__all__ = ["run", "training_images"]


@dataclass(frozen=True)
class Recalibrate:
    """Re-estimate the batch-norm statistics of a run for prediction in expectation, from its training images.

    Batch norm collected its statistics while blocks or units were absent at random; in expectation its inputs have
    other means and variances. The images are not augmented. Writes RUN/recalibrated.safetensors and leaves
    model.safetensors alone: compare the two with residrop evaluate RUN --weights recalibrated.
    """

    run: RunPath
    data: str | None = None
    """Another source of training images with the same classes."""
    batches: int = 200
    """Batches of training images to take at most, of the recipe's batch size."""
    mode: Mode = "layers"
    """layers: each layer after all earlier ones (exact); at-once: one pass, by the statistics of each batch."""
    device: Device = "auto"
    json: Json = None


def run(arguments: Sequence[str], prog: str) -> int:
    """Recalibrate a run and write the new weights."""
    args = parse(Recalibrate, arguments, prog)
    check_target(args.json)
    run, model = load_run(args.run)
    recipe, device = run.recipe(), choose_device(args.device)
    model = model.to(device)
    loader = training_images(run, args.data, device)
    console = Console(stderr=True, markup=False)
    with precision_context(recipe, device)(), Meter(1000, 0, "recalibrating", console=console) as meter:
        done = recalibrate(
            model,
            loader.train_batches(0),
            args.batches,
            args.mode,
            on_progress=lambda share: meter.step(int(1000 * share), "", 0.0),
        )
    run.save_weights(RECALIBRATED, model)
    out = console_for(args.json)
    out.print(f"{done.layers} batch norms have new statistics from {done.images} images ({done.mode})")
    out.print(f"largest change: {done.largest_change:.2f} standard deviations, in {done.where}")
    out.print(f"weights: {args.run / f'{RECALIBRATED}.safetensors'}")
    out.print(f"compare: residrop evaluate {args.run} --weights {RECALIBRATED}")
    write(args.json, done.to_dict())
    return 0


def training_images(run: Run, data: str | None, device: torch.device, batch_size: int | None = None) -> Loader:
    """The images a run was trained on, shuffled, as they come at prediction: normalised, not augmented."""
    recipe = run.recipe()
    return Loader(
        splits_of_run(run, data).train,
        batch_size=batch_size or recipe.batch_size,
        normalization=run.normalization(),
        seed=recipe.seed,
        device=device,
        channels_last=recipe.channels_last,
        workers=recipe.workers,
    )
