"""`residrop bench throughput`: its options, and what it measures."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from residrop.cli.bench.gather import command_of, gather, steps_bar
from residrop.cli.shared import parse
from residrop.common.output import check_target
from residrop.research.bench.throughput import RULES, ThroughputSettings, bench_throughput
from residrop.training.setup import choose_device

__all__ = ["run"]

_ALL: dict[str, Any] = {"networks": ("resnet-20", "resnet-56", "resnet-110"), "widths": (1, 2, 4)}


@dataclass(frozen=True)
class BenchThroughput:
    """Measure training in images per second: ours, against a plain loop and against bare convolutions.

    Compared are the updates of residrop train, data and optimizer included, with the loop that people write today
    (torchvision's transforms in a DataLoader, float32, eager, at constant depth) and with the convolutions that live in
    these updates, by themselves. Images are synthetic, of CIFAR's size. All take turns; ratios are medians over rounds.
    Ctrl-C prints what there is.

    residrop bench throughput --quick
    residrop bench throughput --networks resnet-20 --widths 1 2 --json throughput.json

    All defaults take about ten minutes on two cores; --all takes an hour there. Nothing else should run beside it.
    """

    networks: tuple[str, ...] = ("resnet-20", "resnet-56")
    """Networks of 6n + 2 layers; each is measured in the form that goes with a rule."""
    widths: tuple[int, ...] = (1, 2)
    """Multiples of their width."""
    rules: tuple[str, ...] = tuple(RULES)
    """Rules: constant, stochastic-depth, swapout, depth-dropout."""
    batch_size: int = 128
    """Images in a step."""
    steps: int = 5
    """Timed rounds."""
    plain_steps: int = 3
    """Steps of the plain loop in a round."""
    quick: bool = False
    """One small network, small batches, few rounds; options given beside it count."""
    all: bool = False
    """ResNet-20, -56 and -110, widths 1, 2 and 4; options given beside it count."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic of ours; auto takes bf16 autocast where the device computes it in hardware."""
    compile: bool = False
    """Compile our networks and augmentation, as residrop train --compile does."""
    graphs: Literal["none", "passes", "updates"] = "updates"
    """What a GPU replays as CUDA graphs, see residrop train."""
    device: str = "auto"
    """cpu, cuda, ...; auto takes a GPU where there is one."""
    seed: int = 0
    """Seed of weights, images and draws."""
    json: str | None = None
    """Write the rows to this file as JSON (- for standard output)."""


QUICK_THROUGHPUT = BenchThroughput(
    networks=("resnet-8",), widths=(1,), batch_size=32, steps=3, plain_steps=2, quick=True
)


def run(arguments: Sequence[str], prog: str) -> int:
    """Measure, print a table per network and width, write JSON. Returns the exit code: 130 after Ctrl-C."""
    args = parse(BenchThroughput, arguments, prog, QUICK_THROUGHPUT if "--quick" in arguments else None)
    check_target(args.json)
    start = QUICK_THROUGHPUT if args.quick else BenchThroughput()
    said = command_of("residrop bench throughput", args, start) + (" --quick" if args.quick else "")
    if args.all:
        args = replace(
            args, **{name: most for name, most in _ALL.items() if getattr(args, name) == getattr(start, name)}
        )
    settings = ThroughputSettings(
        steps=args.steps,
        batch_size=args.batch_size,
        plain_steps=args.plain_steps,
        images=256 if args.quick else 2048,
        precision=args.precision,
        compile=args.compile,
        graphs=args.graphs,
        device=choose_device(args.device),
        seed=args.seed,
    )
    total = len(args.networks) * len(args.widths) * (settings.warmup + settings.steps)
    with steps_bar("throughput", total) as bar:
        parts = bench_throughput(args.networks, args.widths, args.rules, settings, bar.step)
        how = "compiled, " if args.compile else ""
        what = f"Images per second of training, {how}against a plain loop and bare convolutions"
        return gather(args.json, parts, what, said)
