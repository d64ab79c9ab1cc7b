"""`residrop predict`: class, probability and uncertainty of image files."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from residrop.cli.shared import Device, Json, RunPath, Weights, open_run, parse, table_of
from residrop.common.errors import DataError
from residrop.common.output import check_target, console_for, write
from residrop.data.read import read_images
from residrop.inference import predict
from residrop.training.setup import choose_device, precision_context

__all__ = ["run"]

_BATCH = 256


@dataclass(frozen=True)
class Predict:
    """Predict the classes of image files, with probability and uncertainty.

    Uncertainty is the entropy of the averaged prediction; the randomness share is the part of it that comes from
    the network's own randomness (mutual information), which is high for inputs unlike the training images.
    """

    run: RunPath
    images: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Image files (any format Pillow reads), upright and on white; resized and cropped to the size of the training
    images."""
    samples: int = 30
    """Sampled passes; 0 is one pass in expectation."""
    weights: Weights = "model"
    device: Device = "auto"
    json: Json = None


def run(arguments: Sequence[str], prog: str) -> int:
    """Predict image files in batches, print a table, write JSON."""
    args = parse(Predict, arguments, prog)
    check_target(args.json)
    if not args.images:
        raise DataError("no image files were given; name at least one")
    run, model = open_run(args.run, args.weights)
    device, dataset = choose_device(args.device), run.dataset()
    pixels = read_images(args.images, size=dataset["size"], channels=dataset["channels"])
    model, normalization = model.to(device), run.normalization().to(device)
    rows: list[dict[str, Any]] = []
    with precision_context(run.recipe(), device)():
        for first in range(0, len(pixels), _BATCH):
            found = predict(model, normalization(pixels[first : first + _BATCH].to(device)), args.samples)
            best = found.classes[:, None]
            columns = {
                "class": [dataset["classes"][number] for number in found.classes.tolist()],
                "probability": found.probabilities.gather(1, best).squeeze(1).tolist(),
                "standard_error": found.standard_error.gather(1, best).squeeze(1).tolist(),
                "entropy": found.entropy.tolist(),
                "mutual_information": found.mutual_information.tolist(),
            }
            if args.samples == 1:
                columns["standard_error"] = [None] * len(best)
            files = map(str, args.images[first : first + _BATCH])
            for file, *values in zip(files, *columns.values(), strict=True):
                rows.append({"file": file, **dict(zip(columns, values, strict=True)), "samples": args.samples})
    passes = f"{args.samples} sampled passes" if args.samples else "expectation"
    keys = ("probability", "standard_error", "entropy", "mutual_information")
    cells = [
        (row["file"], row["class"], *("-" if row[key] is None else f"{row[key]:.3f}" for key in keys)) for row in rows
    ]
    headings = ("file", "class", "probability", "± se", "uncertainty (nats)", "of it randomness")
    console_for(args.json).print(table_of(f"{args.run}, {passes}", headings, cells, left=("file", "class")))
    write(args.json, rows)
    return 0
