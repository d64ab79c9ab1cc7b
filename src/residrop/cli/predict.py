"""`residrop predict`: class, probability and uncertainty of image files."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from torch import Tensor

from residrop.cli.shared import Device, Json, RunPath, Temperature, Weights, open_run, parse, table_of, temperature_of
from residrop.common.checks import check_whole
from residrop.common.errors import ConfigError, DataError, RunError
from residrop.common.output import check_target, console_for, write
from residrop.data.read import read_images
from residrop.inference import Prediction, default_samples, predict
from residrop.inference.uncertainty import Conformal, with_temperature
from residrop.inference.uncertainty.conformal import Method
from residrop.training import Run
from residrop.training.calibration import Fitted, load_fitted
from residrop.training.setup import choose_device, precision_context

__all__ = ["run"]

_BATCH = 256


@dataclass(frozen=True)
class Predict:
    """Predict the classes of image files, with probability and uncertainty.

    Uncertainty is the entropy of the averaged prediction; the randomness share is the part of it that comes from
    the network's own randomness (mutual information). Whether either is higher for images unlike those of the training
    depends on the network and the images: residrop evaluate RUN --uncertainty --ood DATA measures it. What that command
    fitted is applied: a temperature to the probabilities, and with --coverage conformal sets. Uncertainty is that of
    the passes, without the temperature.
    """

    run: RunPath
    images: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Image files (any format Pillow reads), upright and on white; resized and cropped to the size of the training
    images."""
    samples: int | None = None
    """Sampled passes; 0 is one pass in expectation. Default: 30 if the rule draws unit by unit (swapout), else 0."""
    temperature: Temperature = None
    coverage: float | None = None
    """Also give a set of classes that holds the right one with this probability, such as 0.9 (conformal prediction)."""
    sets: Method = "thr"
    """With --coverage: thr (smallest sets), aps (larger for difficult images) or raps (the same without unlikely
    classes)."""
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
    samples = default_samples(model) if args.samples is None else check_whole("samples", args.samples, least=0)
    temperature, said = temperature_of(run, args.weights, samples, args.temperature)
    conformal = None
    if args.coverage is not None:
        conformal = _conformal(run, *load_fitted(run, args.weights, samples), args.coverage, args.sets)
    device, dataset = choose_device(args.device), run.dataset()
    pixels = read_images(args.images, size=dataset["size"], channels=dataset["channels"])
    model, normalization = model.to(device), run.normalization().to(device)
    rows: list[dict[str, Any]] = []
    with precision_context(run.recipe(), device)():
        for first in range(0, len(pixels), _BATCH):
            x = normalization(pixels[first : first + _BATCH].to(device))
            found = predict(model, x, samples, keep=temperature != 1, kind="classes")
            columns = _columns(found, temperature, dataset["classes"])
            if conformal is not None:
                names = dataset["classes"]
                sets = conformal.sets(found.probabilities, first).tolist()
                columns["set"] = [[name for name, inside in zip(names, row, strict=True) if inside] for row in sets]
            files = map(str, args.images[first : first + _BATCH])
            for file, *values in zip(files, *columns.values(), strict=True):
                rows.append({"file": file, **dict(zip(columns, values, strict=True)), "samples": samples})
    passes = f"{samples} sampled passes" if samples else "expectation"
    console = console_for(args.json)
    keys = ("probability", "standard_error", "entropy", "mutual_information")
    cells = [
        (row["file"], row["class"], *("-" if row[key] is None else f"{row[key]:.3f}" for key in keys)) for row in rows
    ]
    headings = ("file", "class", "probability", "± se", "uncertainty (nats)", "of it randomness")
    if conformal is not None:
        headings = (*headings, f"set, {conformal.coverage:.0%} promised")
        cells = [(*cell, ", ".join(row["set"]) or "(empty)") for cell, row in zip(cells, rows, strict=True)]
    left = ("file", "class", headings[-1] if conformal else "")
    console.print(table_of(f"{args.run}, {passes}", headings, cells, left=left))
    if said:
        console.print(said)
    write(args.json, rows)
    return 0


def _conformal(run: Run, fitted: Fitted | None, why: str, coverage: float, method: Method) -> Conformal:
    """The predictor of sets that was fitted for a coverage."""
    if fitted is None:
        raise RunError(f"--coverage needs sets that were fitted on held-out images, but {run.path} has none: {why}")
    found = {one.coverage: one for one in fitted.conformal if one.method == method}
    if coverage not in found:
        levels = ", ".join(f"{one:g}" for one in found)
        raise ConfigError(f"--coverage is {coverage:g}; sets were fitted for {levels}: give one of these")
    return found[coverage]


def _columns(found: Prediction, temperature: float, classes: Sequence[str]) -> dict[str, list[Any]]:
    """What is said of every image; a temperature changes probabilities, and leaves scores of uncertainty alone."""
    best = found.classes[:, None]
    spread: list[Any] = [None] * len(best)  # of a single sample nothing is known
    if found.samples != 1:
        spread = _spread(found, temperature, best).tolist()
    return {
        "class": [classes[number] for number in found.classes.tolist()],
        "probability": with_temperature(found.probabilities, temperature).gather(1, best).squeeze(1).tolist(),
        "standard_error": spread,
        "entropy": found.entropy.tolist(),
        "mutual_information": found.mutual_information.tolist(),
        "temperature": [temperature] * len(best),
    }


def _spread(found: Prediction, temperature: float, best: Tensor) -> Tensor:
    """Standard error of the probability of class `best` over the samples; with a temperature by the jackknife."""
    if temperature == 1 or not found.samples:
        return found.standard_error.gather(1, best).squeeze(1)
    assert found.sample_probabilities is not None
    count = found.samples
    others = (count * found.probabilities - found.sample_probabilities).clamp_min(0) / (count - 1)
    left_out = torch.stack([with_temperature(one, temperature).gather(1, best).squeeze(1) for one in others])
    return left_out.std(0, correction=0) * (count - 1) ** 0.5
