"""`residrop bench skip`: its options, and what it measures."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from typing import Annotated, Literal

import tyro

from residrop.cli.bench.gather import command_of, gather, steps_bar
from residrop.cli.shared import parse
from residrop.common.output import check_target
from residrop.research.bench.networks import network
from residrop.research.bench.skip import MODELS, Comparison, Settings, bench_skip
from residrop.training.setup import choose_device

__all__ = ["run"]

_Layout = tyro.conf.create_mutex_group(required=False)


@dataclass(frozen=True)
class BenchSkip:
    """Measure what skipping saves: training steps of constant depth, ours, peers, and the least work there is.

    Compared are residrop by block and by row, torchvision's StochasticDepth and timm's DropPath (masks over branches
    that are all computed), rows gathered by an index as in DINOv2, and two ideals that obey the same draws: for blocks
    the plain network with exactly the live blocks, for rows the plain network on exactly as many rows as live in each
    block. A ratio is the median over steps of time(variant) / time(other) at the same step; all variants take turns.
    First every variant is checked to compute what it should. Ctrl-C prints what there is.

    residrop bench skip --quick
    residrop bench skip --models resnet-110 --survival 0.8 --steps 30 --json skip.json

    All defaults take about ten minutes on two cores; --quick takes less than one. Set OMP_NUM_THREADS to the number of
    cores that nobody else uses.
    """

    models: tuple[str, ...] = MODELS
    """Networks: ours (resnet-56; resnet-56/v2 for pre-activation), torchvision/RESNET, timm/VIT, timm/convnext_tiny,
    timm/hiera_tiny_224, transformers/llama_8_layers, transformers/opt_6_layers, transformers/t5_small_encoder."""
    survival: tuple[str, ...] = ("uniform(0.5)", "linear_decay(0.5)")
    """Survival rates: a number, one number per block, or a schedule."""
    batch_size: int | None = None
    """Images or sequences in a step (default: 64 of 32 pixels, 32 of 64 pixels, 32 of 64 tokens)."""
    pixels: int | None = None
    """Height and width of the images (default: 32 for ours, 64 for ImageNet's networks and those of others)."""
    steps: int = 15
    """Timed steps of every variant."""
    quick: bool = False
    """Two networks, uniform(0.5), small batches and few steps; options given beside it count."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 is autocast."""
    channels_last: Annotated[bool, _Layout, tyro.conf.FlagCreatePairsOff] = False
    """Memory format of convolutional networks; this is the default."""
    contiguous: Annotated[bool, _Layout, tyro.conf.FlagCreatePairsOff] = False
    """The other memory format."""
    device: str = "auto"
    """cpu, cuda, ...; auto takes a GPU where there is one."""
    compile: bool = False
    """Compile every branch with torch.compile, in all variants."""
    seed: int = 0
    """Seed of weights, images and draws."""
    json: str | None = None
    """Write the rows to this file as JSON (- for standard output)."""


QUICK = BenchSkip(
    models=("resnet-56", "torchvision/resnet18"), survival=("uniform(0.5)",), batch_size=16, steps=5, quick=True
)


def run(arguments: Sequence[str], prog: str) -> int:
    """Measure, print a table per network and survival, write JSON. Returns the exit code: 130 after Ctrl-C."""
    args = parse(BenchSkip, arguments, prog, QUICK if "--quick" in arguments else None)
    check_target(args.json)
    said = command_of("residrop bench skip", args, QUICK if args.quick else BenchSkip())
    said += " --quick" if args.quick else ""
    settings = Settings(
        steps=args.steps,
        batch_size=args.batch_size,
        pixels=args.pixels,
        precision=args.precision,
        channels_last=not args.contiguous,
        device=choose_device(args.device),
        compile=args.compile,
        seed=args.seed,
    )
    for name in args.models:  # all of them before the first is measured
        network(name, args.pixels)
    numbers, total = count(1), len(args.models) * len(args.survival)
    with steps_bar("checking that all variants compute the same") as bar:

        def on_start(one: Comparison) -> None:
            bar.start(f"{next(numbers)}/{total}  {one.net.name}, {one.survival}", one.rounds)

        parts = bench_skip(args.models, args.survival, settings, on_start, bar.step)
        return gather(args.json, parts, "Skipping against peers and the ideal", said)
