"""What adaptive sampling saves on trained runs: python benchmarks/adaptive.py RUN [RUN ...] [--json FILE].

For each confidence and several sets of passes, over the run's test images: passes an image, agreement with all passes,
and the time beside that of all passes made by `predict` (which share what their draws agree on) and of a loop that
makes them one by one, batch after batch in one process. "Wanted" is the ratio of the passes.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

import residrop
from residrop.research import ledger
from residrop.training import load_run
from residrop.training.run import Run
from residrop.training.setup import choose_device, loader_of_run, precision_context

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("runs", nargs="+", type=Path, help="run directories")
parser.add_argument("--data", help="another source of test images with the same classes")
parser.add_argument("--confidence", nargs="+", type=float, default=[0.95, 0.8, 0.5])
parser.add_argument("--samples", type=int, default=30)
parser.add_argument("--sets", type=int, default=5, help="of --samples passes each")
parser.add_argument("--limit", type=int, help="test images (default: all)")
parser.add_argument("--batch-size", type=int, default=256)
parser.add_argument("--device", default="auto")
parser.add_argument("--json", type=Path)
arguments = parser.parse_args()
SAMPLES = arguments.samples
DEVICE = choose_device(arguments.device)


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds that something takes, and what it gives."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    found = work()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started, found


@torch.no_grad()
def one_by_one(model: torch.nn.Module, x: Tensor, first: int) -> Tensor:
    """Mean probabilities of a loop."""
    total: Any = 0.0
    with residrop.sampling(model, first=first):
        for _ in range(SAMPLES):
            total = total + model(x).float().softmax(1)
    return total / SAMPLES


def measured(path: Path) -> list[dict[str, Any]]:
    """One row for each confidence."""
    loaded, run = load_run(path), Run(path)
    model, recipe = loaded.model.eval().to(DEVICE), run.recipe()
    pieces = [x.split(arguments.batch_size) for x, _ in loader_of_run(run, arguments.data, DEVICE).eval_batches()]
    batches = torch.cat([x for some in pieces for x in some])[: arguments.limit].split(arguments.batch_size)
    images = sum(len(x) for x in batches)
    used = {confidence: [] for confidence in arguments.confidence}
    alike = dict.fromkeys(arguments.confidence, 0)
    seconds: dict[Any, list[float]] = {name: [] for name in (*arguments.confidence, "all", "loop")}
    with precision_context(recipe, DEVICE)():
        residrop.predict(model, batches[0], 2)  # warms up
        for number in track(range(arguments.sets), path.name, console=Console(stderr=True)):
            first, passed, counts = number * SAMPLES, dict.fromkeys(seconds, 0.0), dict.fromkeys(used, 0.0)
            for x in batches:
                taken, every = timed(lambda x=x, first=first: residrop.predict(model, x, SAMPLES, first=first))
                passed["all"] += taken
                taken, mean = timed(lambda x=x, first=first: one_by_one(model, x, first))
                passed["loop"] += taken
                if not torch.allclose(mean, every.probabilities, atol=0.02):
                    sys.exit("shared passes are not those of the loop")
                for confidence in arguments.confidence:
                    taken, found = timed(
                        lambda x=x, first=first, confidence=confidence: residrop.predict_adaptive(
                            model, x, confidence=confidence, max_samples=SAMPLES, first=first
                        )
                    )
                    passed[confidence] += taken
                    counts[confidence] += float(found.used.sum())
                    alike[confidence] += int((found.classes == every.classes).sum())
            for name, value in passed.items():
                seconds[name].append(value)
            for confidence, count in counts.items():
                used[confidence].append(count / images)
    return [
        {
            "run": {"network": recipe.network, "width": recipe.width, "rule": recipe.rule, "survival": recipe.survival}
            | {"data": arguments.data or recipe.data.partition(":")[0], "epochs": recipe.epochs, "seed": recipe.seed},
            "confidence": confidence,
            "samples": SAMPLES,
            "sets": arguments.sets,
            "images": images,
            "batch_size": arguments.batch_size,
            "mean_passes": fmean(counts),
            "passes_sd": stdev(counts) if len(counts) > 1 else None,
            "agreement": 100.0 * alike[confidence] / (images * arguments.sets),
            "time_of_all": median(a / b for a, b in zip(seconds[confidence], seconds["all"], strict=True)),
            "time_of_loop": median(a / b for a, b in zip(seconds[confidence], seconds["loop"], strict=True)),
            "all_of_loop": median(a / b for a, b in zip(seconds["all"], seconds["loop"], strict=True)),
            "wanted": fmean(counts) / SAMPLES,
        }
        for confidence, counts in used.items()
    ]


def main() -> None:
    """Measure every run, print the table, write JSON."""
    rows = [row for path in arguments.runs for row in measured(path)]
    table = Table("run", "confidence", "passes", "agreement", "wanted", "time / all shared", "time / loop")
    for row in rows:
        spread = "" if row["passes_sd"] is None else f" ± {row['passes_sd']:.2f}"
        cells = (f"{row['mean_passes']:.2f}{spread}", f"{row['agreement']:.2f}%", f"{row['wanted']:.2f}")
        times = (f"{row['time_of_all']:.2f}", f"{row['time_of_loop']:.2f}")
        table.add_row(f"{row['run']['rule']} {row['run']['network']}", f"{row['confidence']:g}", *cells, *times)
    Console().print(table)
    if arguments.json:
        what = "Adaptive sampling of trained networks: passes, agreement and time beside all passes"
        command = "python benchmarks/adaptive.py " + " ".join(["RUN"] * len(arguments.runs))
        ledger.save(arguments.json, what, command, rows, device=ledger.describe_device(DEVICE.type))


if __name__ == "__main__":
    main()
