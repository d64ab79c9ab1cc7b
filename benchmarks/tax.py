"""What rules cost that drop nothing: python benchmarks/tax.py [--steps N] [--json FILE]. The bound is 1%.

A training step of a plain model against the same model under rules whose rates are all 1, in one process, in turns; the
ratio is the median over steps of the ratio of two neighbouring steps, with its quartiles.
"""

import argparse
import copy
import time
import warnings
from pathlib import Path
from statistics import quantiles

import torch
import torchvision
from torch.nn import functional as F

import residrop
from residrop.research import ledger

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--steps", type=int, default=40)
parser.add_argument("--json", type=Path)
arguments = parser.parse_args()


def resnet20(rule):
    """Ours, at 32 pixels."""
    return residrop.create("resnet-20", rule=rule, survival=1, classes=100)


def timed(model, x, y):
    """Seconds of one training step."""
    started = time.perf_counter()
    model.zero_grad()
    F.cross_entropy(model(x), y).backward()
    return time.perf_counter() - started


def pairs():
    """(name, plain model, the same under rules, pixels, batch size)."""
    warnings.simplefilter("ignore", residrop.InactiveWarning)
    plain = torchvision.models.resnet18(num_classes=100)
    ruled = copy.deepcopy(plain)
    residrop.apply(ruled, survival=1.0)
    yield "torchvision/resnet18", plain, ruled, 32, 64
    try:
        import timm
    except ImportError:
        pass
    else:
        plain = timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=100)
        ruled = copy.deepcopy(plain)
        residrop.apply(ruled, survival=1.0)
        yield "timm/vit_tiny_patch16_224", plain, ruled, 64, 64
    yield "resnet-20", resnet20("constant"), resnet20("stochastic-depth"), 32, 64


rows = []
for name, plain, ruled, pixels, batch_size in pairs():
    x, y = torch.randn(batch_size, 3, pixels, pixels), torch.randint(100, (batch_size,))
    for model in (plain, ruled, plain, ruled):
        timed(model.train(), x, y)
    ratios = []
    for step in range(arguments.steps):
        order = (plain, ruled) if step % 2 else (ruled, plain)  # neither always comes second
        seconds = {id(model): timed(model, x, y) for model in order}
        ratios.append(seconds[id(ruled)] / seconds[id(plain)])
    low, middle, high = quantiles(ratios, n=4)
    rows.append(
        {
            "model": name,
            "batch_size": batch_size,
            "steps": arguments.steps,
            "relative_to_plain": middle,
            "quartiles": [low, high],
            "threads": torch.get_num_threads(),
        }
    )
    print(f"{name:<28} {middle:.4f} of the plain step (quartiles {low:.4f} to {high:.4f})")
if arguments.json:
    command = f"python benchmarks/tax.py --steps {arguments.steps}"
    ledger.save(arguments.json, "Cost of rules that drop nothing", command, rows)
