"""Time that finding a model's residual blocks takes, in its forward passes: python benchmarks/finding.py [--json FILE].

`apply(example=batch)` runs the model, reads the sources of its blocks and compares each with its own forward; without
an example the comparison waits for the first training forward.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import timm
import torch
import torchvision
import transformers

import residrop
from residrop.research import ledger


def t5_small() -> torch.nn.Module:
    return transformers.T5EncoderModel(transformers.T5Config(dropout_rate=0.0))


def tokens() -> dict[str, Any]:
    return {"input_ids": torch.randint(100, (8, 128))}


def images() -> torch.Tensor:
    return torch.randn(8, 3, 224, 224)


MODELS: dict[str, tuple[Callable[[], torch.nn.Module], Callable[[], Any]]] = {
    "timm/vit_small_patch16_224": (lambda: timm.create_model("vit_small_patch16_224"), images),
    "timm/hiera_tiny_224": (lambda: timm.create_model("hiera_tiny_224"), images),
    "torchvision/resnet50": (torchvision.models.resnet50, images),
    "transformers/t5_small_encoder": (t5_small, tokens),
}


def seconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="times of which the median counts")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = []
    for name, (make, batch) in MODELS.items():
        torch.manual_seed(0)
        model, example = make().eval(), batch()

        def forward(model: Any = model, example: Any = example) -> None:
            with torch.no_grad():
                model(**example) if isinstance(example, dict) else model(example)

        forward()
        for granularity in ("block", "row"):
            for given in (example, None):
                shares = []
                for _ in range(arguments.rounds):
                    least = median(seconds(forward) for _ in range(3))
                    kept: dict[str, Any] = {"survival": 0.5, "granularity": granularity, "example": given}
                    shares.append(seconds(lambda model=model, kept=kept: residrop.apply(model, **kept)) / least)
                    residrop.remove(model)
                row = {
                    "model": name,
                    "granularity": granularity,
                    "example": "given" if given is not None else "none",
                    "batch_size": 8,
                    "forward_seconds": least,
                    "forwards": median(shares),
                    "first_forwards": shares[0],  # of the first row of a model: sources are read for the first time
                    "rounds": arguments.rounds,
                }
                rows.append(row)
                times = f"{row['forwards']:5.2f} forwards, the first time {shares[0]:.2f}"
                print(f"{name:<30} {granularity:<6} example {row['example']:<6} {times}")
    if arguments.json:
        command = f"python benchmarks/finding.py --rounds {arguments.rounds}"
        ledger.save(arguments.json, "Time that finding residual blocks takes", command, rows)


if __name__ == "__main__":
    main()
