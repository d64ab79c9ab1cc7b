"""What compiling saves of a training step on the CPU: `torch.compile` as it is, and `residrop.compile`.

    python benchmarks/compiled.py --json results/compiled.json

Each network three times with the same weights and draws, in turns, batches in channels-last memory, in bf16 where the
processor computes it: eager, `torch.compile(model)`, `residrop.compile(model)`. Losses must agree before anything is
timed. `start_seconds` is what compiling took, with an empty cache.
"""

import argparse
import copy
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
import torchvision
from torch import Tensor, nn
from torch._inductor.utils import fresh_cache
from torch.nn import functional as F

import residrop
from residrop.research import ledger
from residrop.research.bench.measure import median_ratio, quiet_collector
from residrop.training.memory import keep_memory
from residrop.training.recipe import Recipe
from residrop.training.setup import precision_context, resolve

CPU = torch.device("cpu")


def cifar(rule: str, survival: str | None) -> Callable[[], tuple[nn.Module, Tensor]]:
    def made() -> tuple[nn.Module, Tensor]:
        return residrop.create("resnet-20", rule=rule, survival=survival, seed=0), torch.randn(128, 3, 32, 32)

    return made


def vision() -> tuple[nn.Module, Tensor]:
    model = torchvision.models.resnet18(num_classes=10)
    residrop.apply(model, survival=0.75, seed=0)
    return model, torch.randn(32, 3, 96, 96)


NETWORKS = {
    "resnet-20": cifar("constant", None),
    "resnet-20, stochastic depth": cifar("stochastic-depth", "linear_decay(0.5)"),
    "resnet-20, swapout": cifar("swapout", "linear(1, 0.5)"),
    "torchvision/resnet18, 96 px, rows": vision,
}


WAYS: dict[str, Callable[[nn.Module], object]] = {
    "eager": lambda model: None,
    "torch.compile": nn.Module.compile,
    "residrop.compile": residrop.compile,
}


def measure(network: str, steps: int, recipe: Recipe) -> list[dict[str, object]]:
    autocast = precision_context(recipe, CPU)
    torch.manual_seed(0)
    model, x = NETWORKS[network]()
    model, x = (one.to(memory_format=torch.channels_last) for one in (model, x))
    y = torch.arange(len(x)) % 10
    models = {way: copy.deepcopy(model) for way in WAYS}

    def step(way: str, number: int) -> float:
        one = models[way]
        one.zero_grad(set_to_none=True)
        with residrop.using(one, residrop.sampler_of(one).plan(number)), autocast():
            loss = F.cross_entropy(one(x).float(), y)
        loss.backward()
        return loss.item()

    started, first = {}, {}
    for way, compiled in WAYS.items():
        compiled(models[way])
        passes = []
        with fresh_cache():
            for _ in range(2):  # every draw is seen before it is timed
                began = time.perf_counter()
                losses = [step(way, number) for number in range(steps)]
                passes.append(time.perf_counter() - began)
                first.setdefault(way, losses[0])
        started[way] = None if way == "eager" else passes[0] - passes[1]
    for way, loss in first.items():
        if abs(loss - first["eager"]) > 0.02 * first["eager"]:
            raise SystemExit(f"{network}: the loss is {loss} under {way}, {first['eager']} without a compiler")
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    with quiet_collector():
        for number in range(steps):
            for way in WAYS:
                began = time.perf_counter()
                step(way, number)
                times[way].append(time.perf_counter() - began)
    return [
        {
            "network": network,
            "variant": way,
            "seconds": median(times[way]),
            "relative_to_eager": median_ratio(times[way], times["eager"]),
            "start_seconds": started[way],
            "batch_size": len(x),
            "steps": steps,
            "precision": recipe.precision,
        }
        for way in WAYS
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--steps", type=int, default=15, help="timed steps, each under a draw of its own")
    parser.add_argument("--json", type=Path, help="write the results here")
    args = parser.parse_args()
    keep_memory(CPU)
    recipe = resolve(Recipe(device="cpu"))
    rows = []
    for network in args.networks:
        torch._dynamo.reset()
        for row in measure(network, args.steps, recipe):
            print("{network:30} {variant:18} {seconds:8.4f} s  {relative_to_eager:5.2f} of eager".format(**row))
            rows.append(row)
    if args.json:
        given = "" if args.networks == list(NETWORKS) else f" --networks {' '.join(map(repr, args.networks))}"
        command = f"python benchmarks/compiled.py --steps {args.steps}{given}"
        ledger.save(
            args.json, "A training step compiled on the CPU, of the same step without a compiler", command, rows
        )


if __name__ == "__main__":
    main()
