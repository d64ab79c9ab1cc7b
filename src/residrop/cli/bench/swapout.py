"""`residrop bench swapout`: its options, and what it measures."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Literal

from residrop.cli.bench.gather import command_of, gather, steps_bar
from residrop.cli.shared import parse
from residrop.common.errors import ConfigError
from residrop.common.output import check_target
from residrop.research.bench.swapout import NETWORKS, SHAPES, SwapoutSettings, bench_steps, bench_swapout
from residrop.training.setup import choose_device

__all__ = ["run"]


@dataclass(frozen=True)
class BenchSwapout:
    """Measure what swapout costs beside the addition it replaces: the operation, and training steps with it.

    Compared are X + F, two bernoulli_ masks (as they are and compiled by torch.compile), and ours without and with the
    compiler; then training steps of ResNet-20 (pre-activation) at constant depth, with two bernoulli_ masks, and ours.
    All variants take turns; a ratio is the median over steps of time(variant) / time(addition or constant depth).
    Ctrl-C prints what there is.

    residrop bench swapout --quick
    residrop bench swapout --shapes 256,64,16,16 --widths 4 --json swapout.json

    All defaults take about four minutes on two cores. Set OMP_NUM_THREADS to the number of cores that nobody else uses.
    """

    shapes: tuple[str, ...] = tuple(",".join(map(str, shape)) for shape in SHAPES)
    """Shapes of the tensors of the operation, sizes with commas between them."""
    widths: tuple[int, ...] = tuple(width for _, width in NETWORKS)
    """Width factors of ResNet-20 whose training steps are measured."""
    steps: int = 15
    """Timed steps of every variant."""
    batch_size: int = 128
    """Images in a training step."""
    quick: bool = False
    """Small tensors, one network, few steps; options given beside it count."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Type of the tensors; networks run in fp32, with bf16 under autocast."""
    channels_last: bool = False
    """Memory format."""
    device: str = "auto"
    """cpu, cuda, ...; auto takes a GPU where there is one."""
    seed: int = 0
    """Seed of tensors, weights and keys."""
    json: str | None = None
    """Write the rows to this file as JSON (- for standard output)."""


QUICK_SWAPOUT = BenchSwapout(shapes=("16,32,32,32",), widths=(1,), steps=3, batch_size=16, quick=True)


def _shape(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(size) for size in text.split(","))
    except ValueError:
        raise ConfigError(f"shape {text!r} is not understood; give sizes such as 128,32,32,32") from None


def run(arguments: Sequence[str], prog: str) -> int:
    """Measure, print a table each, write JSON. Returns the exit code: 130 after Ctrl-C."""
    args = parse(BenchSwapout, arguments, prog, QUICK_SWAPOUT if "--quick" in arguments else None)
    check_target(args.json)
    said = command_of("residrop bench swapout", args, QUICK_SWAPOUT if args.quick else BenchSwapout())
    said += " --quick" if args.quick else ""
    shapes = [_shape(text) for text in args.shapes]
    settings = SwapoutSettings(
        steps=args.steps,
        precision=args.precision,
        channels_last=args.channels_last,
        batch_size=args.batch_size,
        device=choose_device(args.device),
        seed=args.seed,
    )
    networks = [("resnet-20", width) for width in args.widths]
    total = (len(shapes) + len(networks)) * (settings.warmup + settings.steps)
    with steps_bar("swapout (the first steps compile)", total) as bar:
        parts = chain(bench_swapout(shapes, settings, bar.step), bench_steps(networks, settings, bar.step))
        return gather(args.json, parts, "Cost of swapout against addition", said)
