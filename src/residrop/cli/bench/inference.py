"""`residrop bench inference`: its options, and what it measures."""

from collections.abc import Sequence
from dataclasses import dataclass

from residrop.cli.bench.gather import command_of, gather, steps_bar
from residrop.cli.shared import parse
from residrop.common.errors import ConfigError
from residrop.common.output import check_target
from residrop.research.bench.inference import CASES, InferenceSettings, bench_inference
from residrop.training.setup import choose_device

__all__ = ["run"]


@dataclass(frozen=True)
class BenchInference:
    """Measure what sampled inference costs: residrop.predict against as many passes made one by one.

    Cases: resnet-56 (stochastic depth by block, linear decay to 0.5), resnet-56-row (the same by row), resnet-20-w2
    (Swapout's network with Linear(1, 0.5)), resnet-20-w2-skipforward. The unit of cost is as many deterministic passes
    as there are samples. First every prediction is checked to be that of single passes. Ctrl-C prints what there is.

    residrop bench inference --quick
    residrop bench inference --cases resnet-56 --batch-size 64 1 --json inference.json

    All defaults take about six minutes on two cores. Set OMP_NUM_THREADS to the number of cores that nobody else uses.
    """

    cases: tuple[str, ...] = tuple(CASES)
    """Networks and rules, by the names above."""
    samples: int = 30
    """Sampled passes of a prediction."""
    batch_size: tuple[int, ...] = (64, 1)
    """Images in a batch; all cases are measured with each."""
    steps: int = 3
    """Timed steps of every variant."""
    quick: bool = False
    """Two cases, 16 images, 5 samples and 3 steps; options given beside it count."""
    device: str = "auto"
    """cpu, cuda, ...; auto takes a GPU where there is one."""
    compile: bool = True
    """Let the masks of unit-level rules use the compiler, in all variants."""
    seed: int = 0
    """Seed of weights, images and draws."""
    json: str | None = None
    """Write the rows to this file as JSON (- for standard output)."""


QUICK_INFERENCE = BenchInference(cases=("resnet-56", "resnet-20-w2"), samples=5, batch_size=(16,), steps=3, quick=True)


def run(arguments: Sequence[str], prog: str) -> int:
    """Measure, print a table per case and batch size, write JSON. Returns the exit code: 130 after Ctrl-C."""
    args = parse(BenchInference, arguments, prog, QUICK_INFERENCE if "--quick" in arguments else None)
    check_target(args.json)
    said = command_of("residrop bench inference", args, QUICK_INFERENCE if args.quick else BenchInference())
    said += " --quick" if args.quick else ""
    if not args.cases or not args.batch_size:
        raise ConfigError("no case or no batch size was given; name at least one of each")
    device = choose_device(args.device)
    every = [
        InferenceSettings(
            samples=args.samples,
            batch_size=size,
            steps=args.steps,
            device=device,
            compile=args.compile,
            seed=args.seed,
        )
        for size in args.batch_size
    ]
    total = len(args.cases) * sum(one.warmup + one.steps for one in every)
    with steps_bar("sampled inference", total) as bar:
        parts = (found for settings in every for found in bench_inference(args.cases, settings, bar.step))
        return gather(args.json, parts, "Cost of sampled inference", said)
