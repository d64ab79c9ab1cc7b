"""Sub-networks: python benchmarks/subnetworks.py errors RUN ... | heal RUN ... | times [--json FILE].

errors: what sub-networks of trained runs lose, by budget (shares of --unit) and way of choosing, before and after batch
norms were recalibrated, on the test images, and the time they take. Blocks are chosen on training images. Runs that
differ in the seed alone are one row: means and standard errors over seeds, of a single run the standard error over
images.

heal: what a few epochs of training, plainly and with a learning rate that falls from --heal-lr, give back to
sub-networks that `residrop shrink --by greedy` makes of trained runs.

times: for a ResNet-110, a ViT-S of timm and a Llama of transformers with random weights, what budgets of time promise
and what the plain sub-networks take, all in turns; and the same of their ONNX files in onnxruntime.
"""

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import residrop
from residrop.cli import main as command_line
from residrop.cli.pictures import panels
from residrop.cli.recalibrate import training_images
from residrop.research import ledger
from residrop.training import load_run, train
from residrop.training.presets import train_command
from residrop.training.run import Run
from residrop.training.setup import choose_device, loader_of_run, precision_context

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("part", choices=("errors", "heal", "times"))
parser.add_argument("runs", nargs="*", type=Path, help="run directories, for errors and heal")
parser.add_argument("--by", nargs="+", default=["removal", "greedy", "sensitivity", "every_other", "first", "random"])
parser.add_argument("--budgets", nargs="+", type=float, default=[1.0, 0.8, 0.6, 0.4])
parser.add_argument("--unit", choices=("flops", "time"), default="flops", help="of the budgets, for errors")
parser.add_argument("--batches", type=int, default=16, help="of training images")
parser.add_argument("--data", help="another source of images with the same classes")
parser.add_argument("--heal-epochs", type=int, default=2)
parser.add_argument("--heal-lr", type=float, default=0.02)
parser.add_argument("--repeats", type=int, default=15, help="timed forwards")
parser.add_argument("--device", default="auto")
parser.add_argument("--json", type=Path)
parser.add_argument("--picture", type=Path, help="PNG of errors against the share of --unit, for errors")
UNLIKE = ("seed",)


def errors_of(path: Path, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Points of one run."""
    loaded, run = load_run(path), Run(path)
    recipe, device = run.recipe(), choose_device(arguments.device)
    loader = training_images(run, arguments.data, device)
    batches = [pair for _, pair in zip(range(arguments.batches), loader.train_batches(0), strict=False)]
    test = loader_of_run(run, arguments.data, device)
    images = sum(len(y) for _, y in test.eval_batches())

    def error(model: nn.Module) -> float:
        return residrop.evaluate(model, test.eval_batches(), 0).deterministic.error

    print(path, file=sys.stderr, flush=True)
    with precision_context(recipe, device)():
        points = residrop.frontier(
            loaded.model.to(device),
            batches,
            error,
            budgets={1.0, *arguments.budgets},
            unit=arguments.unit,
            by=arguments.by,
            seed=recipe.seed,
            repeats=arguments.repeats,
        )
    about = {"network": recipe.network, "width": recipe.width, "rule": recipe.rule, "survival": recipe.survival}
    about |= {"data": (arguments.data or recipe.data).partition(":")[0], "epochs": recipe.epochs, "seed": recipe.seed}
    return [
        {"run": about, "by": one.by, "budget": one.budget, "blocks": len(one.kept), "of": one.blocks}
        | {"predicted": one.predicted, "before": one.before, "error": one.metric}
        | {"time": one.seconds / points[0].seconds, "images": images}
        for one in points
    ]


def pooled(points: list[dict[str, Any]], name: str) -> tuple[float, float]:
    """Mean and standard error of an error over the seeds."""
    values = [one[name] for one in points]
    if len(values) > 1:
        return fmean(values), stdev(values) / math.sqrt(len(values))
    share = values[0] / 100.0
    return values[0], 100.0 * math.sqrt(share * (1.0 - share) / points[0]["images"])


def errors(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for every kind of run, way of choosing and budget."""
    groups: dict[Any, list[dict[str, Any]]] = {}
    for path in arguments.runs:
        for point in errors_of(path, arguments):
            kind = tuple((name, value) for name, value in point["run"].items() if name not in UNLIKE)
            groups.setdefault((kind, point["by"], point["budget"]), []).append(point)
    rows = []
    for (kind, by, budget), points in groups.items():
        (before, before_se), (error, error_se) = pooled(points, "before"), pooled(points, "error")
        rows.append(
            {"run": dict(kind), "by": by, "budget": budget, "runs": len(points), "images": points[0]["images"]}
            | {"blocks": fmean(one["blocks"] for one in points), "of": points[0]["of"]}
            | {"unit": arguments.unit, "share": fmean(one["predicted"] for one in points)}
            | {"time": fmean(one["time"] for one in points)}
            | {"error_before": before, "error_before_se": before_se, "error": error, "error_se": error_se}
        )
    table = Table("run", "by", "budget", "blocks", "time", "error, %", "recalibrated, %")
    for row in rows:
        table.add_row(
            f"{row['run']['rule']} {row['run']['survival']}, {row['run']['network']}",
            row["by"],
            row["budget"],
            f"{row['blocks']:.1f} of {row['of']}",
            f"{row['time']:.2f}",
            f"{row['error_before']:.2f} ± {row['error_before_se']:.2f}",
            f"{row['error']:.2f} ± {row['error_se']:.2f}",
        )
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    return rows


def heal(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for every run and budget below the whole."""
    rows: list[dict[str, Any]] = []
    table = Table("run", "budget", "blocks", "whole, %", "smaller, %", f"after {arguments.heal_epochs} epochs, %")
    for run in arguments.runs:
        for budget in (one for one in arguments.budgets if one < 1.0):
            with tempfile.TemporaryDirectory() as folder:
                small, told = Path(folder) / "small", Path(folder) / "told.json"
                options = ["--budget", f"{budget} of flops", "--by", "greedy", "--out", str(small), "--json", str(told)]
                if code := command_line(["shrink", str(run), *options]):
                    raise SystemExit(code)
                found, recipe = json.loads(told.read_text()), Run(small).recipe()
                schedule = {"epochs": arguments.heal_epochs, "lr": arguments.heal_lr, "lr_schedule": "cosine"}
                again = recipe.replace(weights=str(small), warmup=0.0, eval_every=arguments.heal_epochs, **schedule)
                outcome = train(again, Path(folder) / "healed")
            whole = Run(run).recipe()
            about = {"network": whole.network, "rule": whole.rule, "survival": whole.survival, "epochs": whole.epochs}
            row: dict[str, Any] = {"run": about, "budget": budget, "blocks": len(found["kept"])}
            row |= {"of": len(found["kept"]) + len(found["removed"]), "error_whole": found["error"][0]}
            row |= {"error_small": found["error"][1], "heal_epochs": arguments.heal_epochs, "lr": arguments.heal_lr}
            row["error_healed"] = outcome.evaluation.deterministic.error
            rows.append(row)
            errors = (f"{row[name]:.2f}" for name in ("error_whole", "error_small", "error_healed"))
            table.add_row(str(run), f"{budget} of flops", f"{row['blocks']} of {row['of']}", *errors)
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    return rows


def draw(path: Path, rows: list[dict[str, Any]]) -> None:
    """Error against the share of FLOPs or of measured time, a panel for every way of training, a line for every way of
    choosing."""
    named = [(f"trained with {row['run']['rule']}, survival {row['run']['survival']}", row) for row in rows]
    kinds = list(dict.fromkeys(name for name, _ in named))
    data = f"{rows[0]['run']['network']} on {rows[0]['run']['data']}"
    what = "measured time" if rows[0]["unit"] == "time" else "FLOPs"
    with panels(path, len(kinds), f"{data}: sub-networks, batch norms recalibrated") as axes:
        for axis, kind in zip(axes, kinds, strict=True):
            for by in dict.fromkeys(row["by"] for row in rows):
                own = [row for name, row in named if name == kind and row["by"] == by]
                names = ("time" if rows[0]["unit"] == "time" else "share", "error", "error_se")
                share, error, bars = ([one[name] for one in own] for name in names)
                axis.errorbar(share, error, bars, fmt=".-", capsize=2, label=by)
            axis.set(title=kind, xlabel=f"share of {what}", ylabel="error on test images (%)", ylim=(0, 100))


def models() -> dict[str, tuple[nn.Module, list[Any]]]:
    """Untrained models, each with one batch."""
    import timm
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=2048,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=4,
        use_cache=False,
    )
    ids = torch.randint(0, 2048, (8, 128))
    return {
        "resnet-110": (
            residrop.create("resnet-110", rule="stochastic-depth", survival="linear_decay(0.5)"),
            [(torch.randn(32, 3, 32, 32), torch.randint(0, 10, (32,)))],
        ),
        "timm/vit_small_patch16_224, 64 px": (
            timm.create_model("vit_small_patch16_224", img_size=64, num_classes=10),
            [(torch.randn(32, 3, 64, 64), torch.randint(0, 10, (32,)))],
        ),
        "transformers/llama, 8 layers": (
            transformers.LlamaForCausalLM(config),
            [{"input_ids": ids, "labels": ids}],
        ),
    }


def seconds_in_onnxruntime(models: list[nn.Module], example: Tensor, repeats: int) -> list[float]:
    """Medians of the files' times, in turns."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        sessions = []
        for number, model in enumerate(models):
            file = Path(folder) / f"{number}.onnx"
            residrop.export(model, file, example)
            sessions.append(onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"]))
    given, times = {"images": example.numpy()}, [[] for _ in models]
    for _ in range(repeats + 2):
        for session, own in zip(sessions, times, strict=True):
            own.append(timed(lambda session=session: session.run(None, given)))
    return [median(own[2:]) for own in times]


def timed(work: Callable[[], Any]) -> float:
    """Seconds that something takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def times(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for every model and budget."""
    rows: list[dict[str, Any]] = []
    for name, (model, batches) in models().items():
        budgets = [one for one in arguments.budgets if one < 1.0]
        made = [
            residrop.shrink(model, f"{budget} of time", batches=batches, by="random", repeats=arguments.repeats)
            for budget in budgets
        ]
        files = [math.nan] * (len(made) + 1)
        if isinstance(batches[0], tuple):
            whole = residrop.shrink(model, "1.0 of blocks", batches=batches, by="first", repeats=1).model
            files = seconds_in_onnxruntime([whole, *(one.model for one in made)], batches[0][0], arguments.repeats)
        for one, budget, file in zip(made, budgets, files[1:], strict=True):
            rows.append(
                {"model": name, "budget": budget, "unit": one.unit, "blocks": len(one.kept)}
                | {"of": len(one.kept) + len(one.removed), "predicted": one.predicted, "measured": one.measured_time}
                | {"ratio": one.measured_time / one.predicted, "milliseconds_whole": 1000 * one.seconds[0]}
                | {"milliseconds": 1000 * one.seconds[1], "threads": torch.get_num_threads()}
                | (
                    {}
                    if math.isnan(file)
                    else {"onnx_milliseconds_whole": 1000 * files[0], "onnx_milliseconds": 1000 * file}
                )
            )
    table = Table("model", "budget", "blocks", "predicted", "measured", "measured / predicted", "ms", "onnxruntime, ms")
    for row in rows:
        onnx = (
            ""
            if "onnx_milliseconds" not in row
            else f"{row['onnx_milliseconds_whole']:.1f} -> {row['onnx_milliseconds']:.1f}"
        )
        table.add_row(
            row["model"],
            f"{row['budget']} of {row['unit']}",
            f"{row['blocks']} of {row['of']}",
            f"{row['predicted']:.3f}",
            f"{row['measured']:.3f}",
            f"{row['ratio']:.3f}",
            f"{row['milliseconds_whole']:.1f} -> {row['milliseconds']:.1f}",
            onnx,
        )
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    return rows


def main() -> None:
    """Measure one of the two parts."""
    arguments = parser.parse_args()
    if (arguments.part == "times") == bool(arguments.runs):
        parser.error("errors and heal take runs, times takes none")
    rows = {"errors": errors, "heal": heal, "times": times}[arguments.part](arguments)
    if arguments.picture and arguments.part == "errors":
        draw(arguments.picture, rows)
    if arguments.json:
        what = {
            "errors": "Errors of sub-networks of trained runs, by budget and way of choosing",
            "heal": "Errors of sub-networks before and after further training",
            "times": "What budgets of time promise, and what plain sub-networks take",
        }[arguments.part]
        command = f"python benchmarks/subnetworks.py {arguments.part}" + " RUN ..." * bool(arguments.runs)
        command += f" --unit {arguments.unit}" * (arguments.unit != "flops")
        command = "; ".join(
            [*dict.fromkeys(train_command(Run(path).recipe(), shared=True) for path in arguments.runs), command]
        )
        ledger.save(arguments.json, what, command, rows)


if __name__ == "__main__":
    main()
