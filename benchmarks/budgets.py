"""Which survival rates for which budget: python benchmarks/budgets.py --data PATH [--json FILE] [--plot FILE].

Trains a network at several budgets, its rates found in several ways, and tabulates test error in expectation and the
time of a training step relative to full depth. Stopped runs are continued and finished ones kept by the same command.
Steps are timed at the end, each beside one at full depth: leave the machine alone then, or give --no-time.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.nn import functional as F

from residrop import sampler_of, set_survival, using
from residrop.common.errors import UsageError
from residrop.research import ledger
from residrop.schedule.sampler import Plan
from residrop.training import Interrupted, Recipe, load_run, preset
from residrop.training.pool import train_all
from residrop.training.setup import precision_context

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--data", default="digits", help="digits, cifar10, or the path of a folder")
parser.add_argument("--name", help="of the data in the results (default: digits or cifar10)")
parser.add_argument("--network", default="stable-resnet-20")
parser.add_argument("--budgets", type=float, nargs="+", default=[0.3, 0.5, 0.7, 0.9])
parser.add_argument("--seeds", type=int, default=2)
parser.add_argument("--epochs", type=int, default=8)
parser.add_argument("--limit", type=int, default=10_000, help="training images, the same for every seed")
parser.add_argument("--refresh", type=int, default=2, help="epochs between measurements of adaptive rates")
parser.add_argument("--workers", type=int, default=2, help="runs at a time")
parser.add_argument("--runs", type=Path, default=Path("runs/budgets"), help="where runs are kept")
parser.add_argument("--time", action=argparse.BooleanOptionalAction, default=True, help="time steps at the end")
parser.add_argument("--steps", type=int, default=16, help="timed, of each run")
parser.add_argument("--json", type=Path)
parser.add_argument("--plot", type=Path, help="draw error against budget and against time")
arguments = parser.parse_args()

NAME = arguments.name or ("digits" if arguments.data == "digits" else "cifar10")
MODES = {
    "uniform": {"spend": "uniform"},
    "linear": {"spend": "linear"},
    "SenseMode": {"spend": "sensitivity"},
    "adaptive": {"spend": "sensitivity", "refresh": arguments.refresh},
    "cost-aware": {"spend": "sensitivity", "per_cost": True},  # its budget is one of measured time
}
FULL = "full depth"


def recipe(mode: str, budget: float, seed: int) -> Recipe:
    """A short training by the protocol of the paper's Table 2."""
    changes: dict[str, object] = {"rule": "constant", "survival": None}
    if mode != FULL:
        unit = "time" if mode == "cost-aware" else "blocks"
        changes = {"survival": None, "budget": f"{budget:g} of {unit}", **MODES[mode]}
    return preset("sd-regularization/stable-resnet-110").recipe.replace(
        network=arguments.network,
        data=arguments.data,
        augmentation="shift" if arguments.data == "digits" else "crop",
        limit=None if arguments.data == "digits" else arguments.limit,
        epochs=arguments.epochs,
        validation=0,
        select="last",
        eval_every=arguments.epochs,
        samples=0,
        seed=seed,
        **changes,
    )


def cells() -> dict[str, tuple[str, float, int]]:
    """All runs, by the name of their directory. Linear decay cannot drop more than about half of the blocks."""
    found: dict[str, tuple[str, float, int]] = {}
    for seed in range(arguments.seeds):
        found[f"full-{seed}"] = (FULL, 1.0, seed)
        for budget in arguments.budgets:
            for mode in MODES:
                if mode != "linear" or budget >= 0.5:
                    found[f"{mode.lower()}-{budget:g}-{seed}"] = (mode, budget, seed)
    return found


def history(path: Path) -> list[list[float]]:
    """The rates a run had, one list per measurement."""
    file = path / "survival.jsonl"
    return [json.loads(line)["rates"] for line in file.read_text().splitlines()] if file.exists() else []


def typical_plan(model: torch.nn.Module, rates: list[float], first: int) -> Plan:
    """Of a hundred plans one whose depth is nearest to the expected one: few steps are timed, so their depth counts."""
    plans = (sampler_of(model).plan(step) for step in range(first, first + 100))
    return min(plans, key=lambda plan: abs(sum(bool(draw.alive) for draw in plan.draws) - sum(rates)))


def relative_time(path: Path, steps: int) -> float:
    """Median time of steps under a run's rates over that of full ones made in turn; rates of its whole course."""
    run, model = load_run(path)
    course = history(path)
    if not course:
        return 1.0
    data = run.dataset()
    x = torch.randn(run.recipe().batch_size, data["channels"], data["size"], data["size"])
    x = x.to(memory_format=torch.channels_last)
    model = model.to(memory_format=torch.channels_last).train()
    y = torch.randint(len(data["classes"]), (len(x),))
    autocast = precision_context(run.recipe(), torch.device("cpu"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, fused=True)

    def seconds(plan: Plan) -> float:
        started = time.perf_counter()
        optimizer.zero_grad()
        with using(model, plan), autocast():
            loss = F.cross_entropy(model(x).float(), y)
        loss.backward()
        optimizer.step()
        return time.perf_counter() - started

    full = Plan.of([True] * len(course[0]))
    spent, whole = [], []
    for number in range(-1, steps):
        rates = course[number % len(course)]
        set_survival(model, rates)
        plan = typical_plan(model, rates, first=500 * (number + 1))
        pair = seconds(plan), seconds(full)
        if number >= 0:
            spent.append(pair[0])
            whole.append(pair[1])
    return sum(spent) / sum(whole)


def rows_of(results: dict[str, dict]) -> list[dict]:
    """One row a run."""
    rows = []
    for name, (mode, budget, seed) in cells().items():
        found = results[name]
        rows.append(
            {
                "study": "budgets",
                "network": arguments.network,
                "data": NAME,
                "training_images": arguments.limit if NAME != "digits" else None,
                "epochs": arguments.epochs,
                "mode": mode,
                "budget": budget,
                "seed": seed,
                "error": found["deterministic_error"],
                "expected_depth": found["expected_depth"],
                "train_seconds": found["train_seconds"],
                "rates": history(arguments.runs / name),
                "recipe": found["run"]["recipe"],
            }
        )
    return rows


def summary(rows: list[dict]) -> list[tuple[str, float, float, float, float | None]]:
    """Mode, budget, mean error, standard deviation over seeds, mean relative time."""
    found = []
    for mode, budget in dict.fromkeys((row["mode"], row["budget"]) for row in rows):
        mine = [row for row in rows if (row["mode"], row["budget"]) == (mode, budget)]
        errors = [row["error"] for row in mine]
        spread = statistics.stdev(errors) if len(errors) > 1 else float("nan")
        times = [row["relative_time"] for row in mine if "relative_time" in row]
        found.append((mode, budget, statistics.mean(errors), spread, statistics.mean(times) if times else None))
    return found


def draw(rows: list[dict], path: Path) -> None:
    """Error against budget, and against the time of a step."""
    figure = Figure(figsize=(10.0, 4.2), dpi=120, layout="constrained")
    by_budget, by_time = figure.subplots(1, 2, sharey=True)
    lines = summary(rows)
    full = next(line for line in lines if line[0] == FULL)
    for number, mode in enumerate(MODES):
        mine = [line for line in lines if line[0] == mode]
        _, budgets, errors, spreads, times = zip(*mine, strict=True)
        by_budget.errorbar(budgets, errors, spreads, fmt="o-", color=f"C{number}", capsize=3, label=mode)
        if None not in times:
            by_time.errorbar(times, errors, spreads, fmt="o-", color=f"C{number}", capsize=3, label=mode)
    for axes, label in ((by_budget, "budget (share of blocks; cost-aware: of time)"), (by_time, "time of a step")):
        axes.axhline(full[2], color="grey", linestyle="--", label=FULL)
        axes.axhspan(full[2] - full[3], full[2] + full[3], color="grey", alpha=0.15)
        axes.set(xlabel=label if axes is by_budget else f"{label} (full depth is 1)")
        axes.grid(alpha=0.25)
    by_budget.set(ylabel="test error (%)")
    by_budget.legend(frameon=False)
    figure.suptitle(f"{arguments.network}, {NAME}, {arguments.epochs} epochs, {arguments.seeds} seeds")
    figure.savefig(path)


def main() -> int:
    """Run the study."""
    console = Console(stderr=True, markup=False)
    recipes = {name: recipe(*cell) for name, cell in cells().items()}
    try:
        results = train_all(recipes, arguments.runs, workers=arguments.workers, console=console)
    except (UsageError, Interrupted) as error:
        print(f"budgets: {error}", file=sys.stderr)
        return 130 if isinstance(error, Interrupted) else 2
    rows = rows_of(results)
    if arguments.time:
        for row, name in track(list(zip(rows, cells(), strict=True)), "timing steps", console=console):
            row["relative_time"] = relative_time(arguments.runs / name, arguments.steps)
    table = Table(title=f"{arguments.network} on {NAME}", title_justify="left")
    for heading in ("mode", "budget", "error (%)", "± std", "time of a step"):
        table.add_column(heading, justify="left" if heading == "mode" else "right")
    for mode, budget, error, spread, relative in summary(rows):
        table.add_row(
            mode, f"{budget:g}", f"{error:.2f}", f"{spread:.2f}", "" if relative is None else f"{relative:.3f}"
        )
    Console().print(table)
    if arguments.json:
        ledger.save(
            arguments.json,
            f"Survival rates from a budget: {arguments.network} on {NAME}",
            "python benchmarks/budgets.py --data PATH",
            rows,
        )
    if arguments.plot:
        draw(rows, arguments.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
