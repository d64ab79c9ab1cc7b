"""`residrop export`: a run as a file that predicts without residrop."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from residrop.cli.shared import Json, RunPath, Temperature, Weights, open_run, parse, temperature_of
from residrop.common.errors import ConfigError, RunError
from residrop.common.output import check_target, console_for, write
from residrop.inference.deploy.export import export
from residrop.models import reads_flat_rows
from residrop.training import Run
from residrop.training.foreign import is_foreign

__all__ = ["facts_of", "run"]


@dataclass(frozen=True)
class Export:
    """Write a run's network as a file that predicts without residrop.

    The network in expectation, all factors and batch norms folded; any number of images at a time. Class names, mean
    and standard deviation of the pixels are kept in the file. It is read back and compared before the command ends.
    """

    run: RunPath
    to: Path
    """File to write: .onnx (needs the extra residrop[export]), .pt2 (torch.export) or .safetensors (folded weights)."""
    weights: Weights = "model"
    temperature: Temperature = None
    sampled: bool = False
    """One sampled pass whose coins are inputs of the graph, in place of the expectation (.onnx and .pt2), without a
    temperature."""
    json: Json = None


def run(arguments: Sequence[str], prog: str) -> int:
    """Export a run's network."""
    args = parse(Export, arguments, prog)
    check_target(args.json)
    check_target(args.to, "--to")
    run, model = open_run(args.run, args.weights)
    if args.sampled and args.temperature not in (None, 1):
        raise ConfigError(
            "--temperature belongs to one pass in expectation, --sampled writes another; leave one of the two out"
        )
    temperature, said = (1.0, "") if args.sampled else temperature_of(run, args.weights, 0, args.temperature)
    dataset = run.dataset()
    size = (2, dataset["channels"], dataset["size"], dataset["size"])
    example = torch.randn(size, generator=torch.Generator().manual_seed(0))
    try:
        facts = facts_of(run, args.weights) | {"temperature": temperature}
        done = export(model, args.to, example, metadata=facts, sampled=args.sampled, temperature=temperature)
    except OSError as error:
        raise RunError(f"{args.to} cannot be written ({error.strerror}); choose another --to") from None
    out = console_for(args.json)
    out.print(f"{done.path}: {args.to.stat().st_size / 1e6:.2f} MB, one {'sampled pass' if args.sampled else 'pass'}")
    out.print(
        f"checked with {done.checked_by} at two batch sizes: outputs agree to {done.difference:.1e} of the largest"
    )
    if said:
        out.print(said)
    write(args.json, done.to_dict() | {"temperature": temperature})
    return 0


def facts_of(run: Run, weights: str) -> dict[str, Any]:
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
    if not is_foreign(recipe.network) and reads_flat_rows(recipe.network):
        facts["flat"] = "the network flattens its input"
    return facts
