"""Record board on CIFAR-10: the papers' protocols beside a recipe of today, at equal time: python benchmarks/board.py.

ResNets of --depths with constant depth, stochastic depth and swapout, each trained by the protocol of its paper (in
shares of fewer epochs) and by today's recipe: label smoothing, no decay of vectors, a triangular learning rate,
alternating flips, an average of the weights. With --minutes every run gets the epochs that fit into this time of
training, by the speed of its updates, which is measured first, one kind after the other; with --epochs all get these.

What is stopped is continued by the same command with the same --work. The board: test error after the last epoch, mean
and standard deviation over seeds (today: of the averaged weights); and the training time after which the test error of
the weights in training was at most 8.75% and 7.5%, looked at after every epoch (He et al., 2016:
91.25% is their ResNet-20, 92.5% between their ResNet-20 and -32), median over seeds.
"""

import argparse
import itertools
import json
import time
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from residrop.research import ledger
from residrop.training import Recipe, Run, preset
from residrop.training.loop import updates
from residrop.training.pool import train_all
from residrop.training.run import start
from residrop.training.setup import prepare, resolve

PAPERS = {
    "constant": "stochastic-depth/resnet-20-constant",
    "stochastic-depth": "stochastic-depth/resnet-20",
    "swapout": "swapout/v2-20-w1",
}
TODAY = {
    "lr": 0.2,
    "lr_schedule": "triangular",
    "warmup": 0.2,
    "warmup_lr": 0.0,
    "nesterov": True,
    "weight_decay": 5e-4,
    "decay_vectors": False,
    "label_smoothing": 0.1,
    "augmentation": "crop",
    "flips": "alternating",
    "ema": 0.99,
    "batch_size": 128,
    "validation": 0,
    "select": "last",
    "bn_gamma_init": None,
    "normalization": "channel",
}
# Test errors of the same networks after 200 epochs (github.com/chenyaofo/pytorch-cifar-models)
ANCHORS = {20: 7.40, 32: 6.47, 56: 5.63}
TARGETS = (8.75, 7.5)
IMAGES = 50_000


def recipe_of(depth: int, rule: str, protocol: str, options: dict[str, Any]) -> Recipe:
    """What is trained for one row and column of the board."""
    made = preset(PAPERS[rule]).recipe
    changes = TODAY if protocol == "today" else {}
    network = made.network.replace("-20", f"-{depth}")
    return made.replace(**{**changes, "network": network, "samples": 0, "eval_every": 1, **options})


def speeds(recipes: dict[str, Recipe], rounds: int) -> dict[str, float]:
    """Training images per second, of each kind, one after the other in every round."""
    runs = {}
    for name, recipe in recipes.items():
        recipe = resolve(recipe.replace(limit=4096, validation=0, select="last", epochs=1000))
        ready = prepare(recipe)
        state = start(recipe, ready)
        state.model.train()
        loader = ready.loaders["train"]
        work = (one for epoch in itertools.count() for one in updates(recipe, state, loader, epoch))
        runs[name] = recipe, work, list[float]()
    for number in range(rounds + 1):
        for recipe, work, seconds in runs.values():
            started = time.perf_counter()
            for _ in range(10):
                next(work)
            if recipe.device != "cpu" and torch.cuda.is_available():
                torch.cuda.synchronize()
            if number:  # the first round warms up
                seconds.append((time.perf_counter() - started) / (10 * recipe.batch_size))
    return {name: 1.0 / median(seconds) for name, (_, _, seconds) in runs.items()}


def reached(run: Run, target: float) -> float | None:
    """Seconds of training after which the test error was at most this; None if it never was."""
    passed = 0.0
    for line in (json.loads(text) for text in (run.path / "metrics.jsonl").read_text().splitlines()):
        passed += line["seconds"]
        if line["test_error"] <= target:
            return passed
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="cifar10", help="source of CIFAR-10")
    parser.add_argument("--depths", nargs="+", type=int, default=[20, 32])
    parser.add_argument("--rules", nargs="+", choices=PAPERS, default=list(PAPERS))
    parser.add_argument("--protocols", nargs="+", choices=("paper", "today"), default=["paper", "today"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=10.0, help="of training for every run")
    parser.add_argument("--epochs", type=int, help="for every run, in place of --minutes")
    parser.add_argument("--compile", action="store_true", help="compile the networks")
    parser.add_argument("--workers", type=int, default=1, help="runs at a time, which share the threads")
    parser.add_argument("--rounds", type=int, default=5, help="of ten updates, to measure speeds")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--work", type=Path, default=Path("runs/board"), help="folder of the runs")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    options = {"data": arguments.data, "device": arguments.device, "compile": arguments.compile}
    cells = list(itertools.product(arguments.depths, arguments.rules, arguments.protocols))
    kinds = {"-".join(map(str, cell)): recipe_of(*cell, options) for cell in cells}
    machine = f"{arguments.device}{' compiled' * arguments.compile} {torch.get_num_threads()} threads"
    arguments.work.mkdir(parents=True, exist_ok=True)
    kept = arguments.work / "speeds.json"
    every = json.loads(kept.read_text()) if kept.exists() else {}
    found = every.get(machine, {})
    if arguments.epochs is None and (missing := {name: one for name, one in kinds.items() if name not in found}):
        found |= speeds(missing, arguments.rounds)
        kept.write_text(json.dumps({**every, machine: found}))
    planned: dict[str, Recipe] = {}
    for name, recipe in kinds.items():
        images = IMAGES - recipe.validation
        epochs = arguments.epochs or max(1, int(60.0 * arguments.minutes * found[name] / images))
        planned[name] = recipe.replace(epochs=epochs)
        speed = f", {found[name]:.0f} images/s" if name in found else ""
        print(f"{name}: {epochs} epochs{speed}", flush=True)
    # the first seed of all before the second, so that a board that was stopped has every row
    runs = {
        f"{name}-{recipe.epochs}-seed{seed}": recipe.replace(seed=seed)
        for seed in range(arguments.seeds)
        for name, recipe in planned.items()
    }
    train_all(runs, arguments.work, workers=arguments.workers)
    rows = []
    for cell, (name, recipe) in zip(cells, planned.items(), strict=True):
        done = [Run(arguments.work / f"{name}-{recipe.epochs}-seed{seed}") for seed in range(arguments.seeds)]
        errors = [run.evaluation()["deterministic_error"] for run in done]
        times = {target: [reached(run, target) for run in done] for target in TARGETS}
        rows.append(
            {
                **dict(zip(("depth", "rule", "protocol"), cell, strict=True)),
                "survival": recipe.survival,
                "epochs": recipe.epochs,
                "seeds": arguments.seeds,
                "images_per_second": found.get(name),
                "minutes": fmean(run.evaluation()["train_seconds"] for run in done) / 60.0,
                "errors": errors,
                "error": fmean(errors),
                "error_sd": stdev(errors) if len(errors) > 1 else None,
                **{
                    f"seconds_to_{target:g}": median(seconds) if None not in seconds else None
                    for target, seconds in times.items()
                },
            }
        )
    _print(rows)
    if arguments.json:
        limit = f"--epochs {arguments.epochs}" if arguments.epochs else f"--minutes {arguments.minutes:g}"
        depths = " ".join(map(str, arguments.depths))
        command = f"python benchmarks/board.py --data parquet:PATH --depths {depths} {limit} --seeds {arguments.seeds}"
        command += " --compile" if arguments.compile else ""
        kept_rows = [{name: value for name, value in row.items() if value is not None} for row in rows]
        what = f"Record board on CIFAR-10 after equal {'epochs' if arguments.epochs else 'training time'}"
        ledger.save(arguments.json, what, command, kept_rows)


def _print(rows: list[dict[str, Any]]) -> None:
    table = Table("network", "rule", "protocol", "epochs", "error", *(f"time to {one:g}%" for one in TARGETS))
    for row in rows:
        spread = f" ± {row['error_sd']:.2f}" if row["error_sd"] is not None else ""
        times = (row[f"seconds_to_{target:g}"] for target in TARGETS)
        cells = [row["rule"], row["protocol"], str(row["epochs"]), f"{row['error']:.2f}{spread}%"]
        table.add_row(f"ResNet-{row['depth']}", *cells, *("-" if one is None else f"{one:.0f} s" for one in times))
    Console().print(table)
    for depth in sorted({row["depth"] for row in rows} & ANCHORS.keys()):
        print(f"ResNet-{depth}: {ANCHORS[depth]:.2f}% after 200 epochs in pytorch-cifar-models")


if __name__ == "__main__":
    main()
