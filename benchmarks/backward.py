"""Presence in backward only: python benchmarks/backward.py [--json FILE].

What `BackwardDepth` costs and saves, of steps under the same draws: at constant depth, under stochastic depth, and with
presence in backward only. The least backward there is, is that of stochastic depth: of the present branches, and of
nothing else; the least forward is that of constant depth. Variants take turns; ratios are medians over steps, the draws
those of the first `4 * steps` whose depth is nearest to its expectation. Kept for backward: activations, mean over the
draws. Peak: the most resident memory of a process that makes these steps, above what it had before the first, gradients
included.
"""

import argparse
import copy
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

import residrop
from residrop import sampler_of
from residrop.research import ledger
from residrop.research.bench.measure import median_ratio, quiet_collector, saved_bytes
from residrop.schedule.sampler import Plan

RULES = ("constant", "stochastic-depth", "backward-depth")
parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--survival", type=float, default=0.5)
parser.add_argument("--steps", type=int, default=15)
parser.add_argument("--json", type=Path)
parser.add_argument("--peak", nargs=3, metavar=("MODEL", "LEVEL", "RULE"), help="print the bytes of one row's peak")


def llama() -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    import transformers

    sizes = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 8, "num_attention_heads": 4}
    config = transformers.LlamaConfig(**sizes, vocab_size=512, use_cache=False)
    ids = torch.randint(0, 512, (16, 128))
    return transformers.LlamaForCausalLM(config), lambda model: model(input_ids=ids, labels=ids).loss


def vit() -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    import timm

    images, labels = torch.randn(32, 3, 64, 64), torch.randint(0, 10, (32,))
    model = timm.create_model("vit_small_patch16_224", img_size=64, num_classes=10)
    return model, lambda model: nn.functional.cross_entropy(model(images), labels)


def resnet() -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    import torchvision

    images, labels = torch.randn(16, 3, 96, 96), torch.randint(0, 10, (16,))
    model = torchvision.models.resnet50(num_classes=10)
    return model, lambda model: nn.functional.cross_entropy(model(images), labels)


CASES = {
    ("transformers/llama, 8 layers", "block"): llama,
    ("transformers/llama, 8 layers", "row"): llama,
    ("timm/vit_small_patch16_224, 64 px", "block"): vit,
    ("timm/vit_small_patch16_224, 64 px", "row"): vit,
    ("torchvision/resnet50, 96 px", "block"): resnet,  # batch norm is not for rows
}


def made(name: str, level: str, rules: tuple[str, ...], survival: float) -> tuple[dict[str, nn.Module], Any]:
    """A model under each rule, with the same weights, and its loss."""
    torch.manual_seed(0)
    plain, loss = CASES[name, level]()
    models = {}
    for rule in rules:
        models[rule] = copy.deepcopy(plain)
        how: dict[str, Any] = {} if rule == "constant" else {"granularity": level, "rescale": "none"}
        residrop.apply(models[rule], rule, 1.0 if rule == "constant" else survival, **how)
        models[rule].train()
    return models, loss


def plans_of(model: nn.Module, steps: int) -> list[Plan]:
    """Draws of typical depth, which rules of one granularity and rate share."""
    sampler = sampler_of(model)

    def off(plan: Plan) -> float:
        depths = [float(draw.alive) if draw.alive is not None else draw.live(16) / 16 for draw in plan.draws]
        return abs(sum(depths) - sum(rate for site in sampler.sites for rate in site.rates))

    return sorted(map(sampler.plan, range(4 * steps)), key=off)[:steps]


def peak(name: str, level: str, rule: str, survival: float, steps: int) -> int:
    """Bytes of the most resident memory during some steps, above what there was before them."""
    models, loss = made(name, level, tuple({"stochastic-depth", rule}), survival)
    plans = plans_of(models["stochastic-depth"], steps)
    model = models[rule]
    loss(model)  # blocks look at themselves once
    model.zero_grad()
    before = resident("VmRSS")
    for plan in plans:
        model.zero_grad()
        with nullcontext() if rule == "constant" else residrop.using(model, plan):
            value = loss(model)
        value.backward()
        del value
    return resident("VmHWM") - before


def resident(kind: str) -> int:
    """Bytes of memory of this process, now (VmRSS) or at most (VmHWM; ru_maxrss is never below that of the parent)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(kind))


def peak_elsewhere(name: str, level: str, rule: str, arguments: argparse.Namespace) -> int:
    command = [sys.executable, __file__, "--survival", str(arguments.survival), "--steps", str(arguments.steps)]
    # what is freed goes back to the system at once, so that it does not count as resident
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(
        [*command, "--peak", name, level, rule], env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    return int(done.stdout)


def measured(name: str, level: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for every rule."""
    models, loss = made(name, level, RULES, arguments.survival)
    plans = plans_of(models["stochastic-depth"], arguments.steps)
    forwards, backwards = ({rule: [] for rule in RULES} for _ in range(2))
    with quiet_collector():
        for number, plan in enumerate(track([*plans[:2], *plans], f"{name}, {level}", console=Console(stderr=True))):
            for rule, model in models.items():
                model.zero_grad()
                started = time.perf_counter()
                with nullcontext() if rule == "constant" else residrop.using(model, plan):
                    value = loss(model)
                half = time.perf_counter()
                value.backward()
                ended = time.perf_counter()
                if number >= 2:  # after two steps of warm-up
                    forwards[rule].append(half - started)
                    backwards[rule].append(ended - half)
    kept = {}
    for rule, model in models.items():
        kept[rule] = 0.0
        for plan in plans:
            with nullcontext() if rule == "constant" else residrop.using(model, plan):
                kept[rule] += saved_bytes(lambda model=model: loss(model), model.parameters()) / len(plans)
    del models
    peaks = {rule: peak_elsewhere(name, level, rule, arguments) for rule in RULES}
    steps = {rule: list(map(sum, zip(forwards[rule], backwards[rule], strict=True))) for rule in RULES}
    ideal = list(map(sum, zip(forwards["constant"], backwards["stochastic-depth"], strict=True)))
    return [
        {"model": name, "granularity": level, "rule": rule, "survival": arguments.survival, "steps": arguments.steps}
        | {"forward_seconds": median(forwards[rule]), "backward_seconds": median(backwards[rule])}
        | {"backward_relative_to_constant": median_ratio(backwards[rule], backwards["constant"])}
        | {"backward_relative_to_ideal": median_ratio(backwards[rule], backwards["stochastic-depth"])}
        | {"step_relative_to_constant": median_ratio(steps[rule], steps["constant"])}
        | {"step_relative_to_whole_forward_ideal": median_ratio(steps[rule], ideal)}
        | {"saved_bytes": kept[rule], "saved_relative_to_constant": kept[rule] / kept["constant"]}
        | {"peak_bytes": peaks[rule], "peak_relative_to_constant": peaks[rule] / peaks["constant"]}
        | {"threads": torch.get_num_threads()}
        for rule in RULES
    ]


def main() -> None:
    arguments = parser.parse_args()
    if arguments.peak:
        print(peak(*arguments.peak, arguments.survival, arguments.steps))
        return
    rows = [row for name, level in CASES for row in measured(name, level, arguments)]
    table = Table("model", "level", "rule", "backward, x constant", "x ideal", "step, x constant", "kept", "peak")
    for row in rows:
        names = ("backward_relative_to_constant", "backward_relative_to_ideal", "step_relative_to_constant")
        numbers = (f"{row[key]:.2f}" for key in (*names, "saved_relative_to_constant", "peak_relative_to_constant"))
        table.add_row(row["model"], row["granularity"], row["rule"], *numbers)
    Console(width=None if sys.stdout.isatty() else 140).print(table)
    if arguments.json:
        ledger.save(arguments.json, "Presence in backward only: time and memory", "python benchmarks/backward.py", rows)


if __name__ == "__main__":
    main()
