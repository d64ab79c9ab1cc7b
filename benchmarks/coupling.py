"""Coupled draws beside independent ones at equal survival rates: python benchmarks/coupling.py steps | errors.

steps: a trained ResNet-20 (on the digits, at constant depth, made on the spot) and a small Llama of transformers with
random weights, at block and row level. Over many draws, the spread of a step's FLOPs and of its measured time, and the
variance of its gradient: trace of the covariance over draws, at fixed weights and a fixed batch, relative to
independent draws; standard errors over ten parts of the draws.

errors: test error on the digits (or --data) after training with each coupling, mean and standard error over seeds.
"""

import argparse
import math
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

import residrop
from residrop import sampler_of
from residrop.blocks.attach import rules_of
from residrop.blocks.observe import branch_flops
from residrop.research import ledger
from residrop.schedule.sampler import Draw
from residrop.schedule.survival import parse
from residrop.training import Recipe, load_run, train
from residrop.training.presets import train_command

COUPLINGS = ("independent", "systematic", "balanced", "apart")
PARTS = 10
parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("part", choices=("steps", "errors"))
parser.add_argument("--survival", default="linear_decay(0.5)")
parser.add_argument("--draws", type=int, default=200, help="for steps; a multiple of 10")
parser.add_argument("--seeds", type=int, default=3, help="for errors")
parser.add_argument("--epochs", type=int, default=20)
parser.add_argument("--couplings", nargs="+", choices=COUPLINGS, default=list(COUPLINGS), help="for errors")
parser.add_argument("--network", default="resnet-20", help="for errors")
parser.add_argument("--data", default="digits", help="for errors")
parser.add_argument("--work", type=Path, default=Path("runs/coupling"), help="folder of the runs, for errors")
parser.add_argument("--json", type=Path)


def models() -> dict[str, tuple[nn.Module, dict[str, Tensor] | Tensor, Callable[[Any], Tensor]]]:
    """Each with one batch, and the loss of its output."""
    import transformers

    with tempfile.TemporaryDirectory() as folder:
        recipe = Recipe(network="resnet-20", rule="constant", data="digits", epochs=5, samples=0, augmentation="shift")
        train(recipe, Path(folder) / "run", quiet=True)
        trained = load_run(Path(folder) / "run").model
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=344,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=4,
        use_cache=False,
    )
    ids = torch.randint(0, 256, (8, 64))
    images, labels = torch.randn(32, 1, 8, 8), torch.randint(0, 10, (32,))
    return {
        "resnet-20": (trained, images, lambda found: nn.functional.cross_entropy(found, labels)),
        "transformers/llama, 8 layers": (
            transformers.LlamaForCausalLM(config),
            {"input_ids": ids, "labels": ids},
            lambda found: found.loss,
        ),
    }


def presence(draw: Draw, rows: int) -> float:
    """Share of the rows in which a block is present."""
    return float(draw.alive) if draw.alive is not None else draw.live(rows) / rows


def measured(
    model: nn.Module, x: Any, loss: Callable[[Any], Tensor], costs: tuple[int, ...], draws: int
) -> dict[str, list[float]]:
    """Of every step: FLOPs of its branches, seconds, and of every part of the steps the variance of the gradient."""
    rows = len(x["input_ids"]) if isinstance(x, dict) else len(x)
    sampler = sampler_of(model)
    parameters = [one for one in model.parameters() if one.requires_grad]
    work, seconds, variances = [], [], []
    sums = [torch.zeros_like(one) for one in parameters]
    squares, count = 0.0, draws // PARTS
    for step in range(draws):
        plan = sampler.plan(step)
        work.append(sum(cost * presence(draw, rows) for cost, draw in zip(costs, plan.draws, strict=True)))
        model.zero_grad()
        started = time.perf_counter()
        with residrop.using(model, plan):
            value = loss(model(**x) if isinstance(x, dict) else model(x))
        value.backward()
        seconds.append(time.perf_counter() - started)
        for total, one in zip(sums, parameters, strict=True):
            if one.grad is not None:
                total += one.grad
                squares += float(one.grad.square().sum())
        if step % count == count - 1:
            of_mean = sum(float((total / count).square().sum()) for total in sums)
            variances.append((squares / count - of_mean) * count / (count - 1))
            squares = 0.0
            for total in sums:
                total.zero_()
    return {"work": work, "seconds": seconds, "variances": variances}


def steps(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for every model, level and coupling."""
    rows: list[dict[str, Any]] = []
    for name, (model, x, loss) in models().items():
        for level in ("block", "row"):
            base: dict[str, Any] = {}
            for coupling in track(COUPLINGS, f"{name}, {level}", console=Console(stderr=True)):
                costs = attached(model, x, level, coupling, arguments.survival)
                model.train()
                for module in model.modules():
                    if isinstance(module, nn.modules.batchnorm._BatchNorm):
                        module.eval()  # a fixed function of the weights and the draw
                found = measured(model, x, loss, costs, arguments.draws)
                of_time = sorted(found["seconds"])
                row = {
                    "model": name,
                    "granularity": level,
                    "coupling": coupling,
                    "survival": arguments.survival,
                    "draws": arguments.draws,
                    "flops_mean": fmean(found["work"]),
                    "flops_spread": stdev(found["work"]) / fmean(found["work"]),
                    "flops_range": (max(found["work"]) - min(found["work"])) / fmean(found["work"]),
                    "time_spread": stdev(of_time) / fmean(of_time),
                    "gradient_variance": fmean(found["variances"]),
                    "gradient_variance_se": stdev(found["variances"]) / math.sqrt(PARTS),
                }
                base = base or row
                row["gradient_variance_ratio"] = row["gradient_variance"] / base["gradient_variance"]
                row["gradient_variance_ratio_se"] = row["gradient_variance_ratio"] * math.hypot(
                    row["gradient_variance_se"] / row["gradient_variance"],
                    base["gradient_variance_se"] / base["gradient_variance"],
                )
                rows.append(row)
    table = Table("model", "level", "coupling", "FLOPs, ± share", "time, ± share", "variance of the gradient, ratio")
    for row in rows:
        ratio = f"{row['gradient_variance_ratio']:.3f} ± {row['gradient_variance_ratio_se']:.3f}"
        spreads = (f"{100 * row[one]:.1f}%" for one in ("flops_spread", "time_spread"))
        table.add_row(row["model"], row["granularity"], row["coupling"], *spreads, ratio)
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    return rows


def attached(model: nn.Module, x: Any, level: str, coupling: Any, survival: str) -> tuple[int, ...]:
    """Give a model these draws; returns the FLOPs of its branches."""
    arguments, options = ((), x) if isinstance(x, dict) else ((x,), {})
    if isinstance(x, dict):
        if rules_of(model):
            residrop.remove(model)
        residrop.apply(model, survival=survival, granularity=level, rescale="train")
    else:
        blocks = [module for module in model.modules() if isinstance(module, residrop.Residual)]
        rates = parse(survival, len(blocks))
        for block, rate in zip(blocks, rates, strict=True):
            block.rule = residrop.StochasticDepth(rate, granularity=level, rescale="train")
        residrop.attach(model)
    costs = branch_flops(model, *arguments, **options)
    residrop.attach(model, coupling=coupling, costs=costs if coupling == "balanced" else ())
    return costs


def errors(arguments: argparse.Namespace) -> tuple[list[dict[str, Any]], str]:
    """One row for every coupling, and the command of a training."""
    rows, recipe = [], Recipe()
    table = Table("coupling", "error, %", "NLL")
    for coupling in arguments.couplings:
        found = []
        for seed in range(arguments.seeds):
            recipe = Recipe(
                network=arguments.network,
                data=arguments.data,
                survival=arguments.survival,
                coupling=coupling,
                epochs=arguments.epochs,
                augmentation="shift" if arguments.data == "digits" else "crop",
                lr=0.2,
                lr_schedule="triangular",
                warmup=0.2,
                warmup_lr=0.0,
                weight_decay=5e-4,
                label_smoothing=0.1,
                samples=0,
                seed=seed,
            )
            path = arguments.work / f"{coupling}-{seed}"
            if not (path / "evaluation.json").exists():  # of a stopped benchmark
                train(recipe, path, resume=path.exists())
            found.append(load_run(path).run.evaluation())
        row = {"coupling": coupling, "network": arguments.network, "survival": arguments.survival}
        kind, _, path = arguments.data.partition(":")
        row |= {"data": Path(path).name if kind == "parquet" else kind, "epochs": arguments.epochs, "seeds": len(found)}
        for name in ("error", "nll"):
            values = [float(one["details"]["deterministic"][name]) for one in found]
            row[name] = fmean(values)
            row[f"{name}_se"] = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
        rows.append(row)
        table.add_row(
            coupling, f"{row['error']:.2f} ± {row['error_se']:.2f}", f"{row['nll']:.3f} ± {row['nll_se']:.3f}"
        )
    Console().print(table)
    return rows, train_command(recipe.replace(coupling="independent"), shared=True) + " --coupling ...; "


def main() -> None:
    """Measure one of the two parts."""
    arguments = parser.parse_args()
    if arguments.draws < 2 * PARTS or arguments.draws % PARTS:
        parser.error(f"--draws is {arguments.draws}; give a multiple of {PARTS}, 20 at least")
    rows, trained = (steps(arguments), "") if arguments.part == "steps" else errors(arguments)
    if arguments.json:
        what = {
            "steps": "Coupled draws: spread of a step's work, and variance of its gradient",
            "errors": "Coupled draws: test error after training",
        }[arguments.part]
        given = f" --seeds {arguments.seeds} --epochs {arguments.epochs}" if arguments.part == "errors" else ""
        command = f"{trained}python benchmarks/coupling.py {arguments.part} --survival '{arguments.survival}'{given}"
        ledger.save(arguments.json, what, command, rows)


if __name__ == "__main__":
    main()
