"""Sampled prediction of pixels and of numbers: python benchmarks/outputs.py [--json FILE] [--plot FILE].

Segmentation: generated images of circles, squares and triangles in noise; error, NLL and calibration of pixels in
expectation and averaged over samples, and how well each score of uncertainty finds the pixels that are wrong (AUROC).

Regression: the diabetes set of scikit-learn, a network that predicts mean and variance; how many of the test values lie
in 90% intervals made of the variance between passes, of the predicted variance, and of both.
"""

import argparse
import math
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
import torch
from matplotlib import pyplot
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_diabetes
from torch import Tensor, nn
from torchmetrics.functional.classification import binary_auroc, multiclass_calibration_error

import residrop
from residrop.research import ledger

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--seeds", type=int, default=5)
parser.add_argument("--samples", type=int, default=30)
parser.add_argument("--steps", type=int, default=300, help="of training, of the segmentation")
parser.add_argument("--json", type=Path)
parser.add_argument("--plot", type=Path, help="draw maps of the first test images")
RULES = {"stochastic-depth": 0.7, "swapout": 0.8}
SHAPES = ("background", "circle", "square", "triangle")
SIDE = 48


def shapes(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images Tensor[count, 1, SIDE, SIDE] of three shapes each, and their classes Tensor[count, SIDE, SIDE] int64."""
    law = np.random.default_rng(seed)
    down, right = np.mgrid[0:SIDE, 0:SIDE].astype(np.float32)
    images, classes = np.zeros((count, 1, SIDE, SIDE), np.float32), np.zeros((count, SIDE, SIDE), np.int64)
    for image, labels in zip(images, classes, strict=True):
        for kind in law.permutation(3) + 1:
            y, x = law.uniform(8, SIDE - 8, 2)
            size, brightness = law.uniform(5, 10), law.uniform(0.5, 1.0)
            if kind == 1:
                inside = (down - y) ** 2 + (right - x) ** 2 < size**2
            elif kind == 2:
                inside = np.maximum(abs(down - y), abs(right - x)) < 0.9 * size
            else:
                inside = (down < y + 0.8 * size) & (down > y - size + 2 * abs(right - x))
            image[0][inside], labels[inside] = brightness, kind
    images += law.normal(0, 0.35, images.shape).astype(np.float32)
    return torch.from_numpy(images), torch.from_numpy(classes)


def segmenter(rule: str, seed: int) -> nn.Module:
    """Tensor[n, 1, H, W] to logits Tensor[n, 4, H, W]."""
    torch.manual_seed(seed)

    def branch(dilation: int) -> nn.Module:
        first = nn.Conv2d(24, 24, 3, padding=dilation, dilation=dilation, bias=False)
        return nn.Sequential(first, nn.BatchNorm2d(24), nn.ReLU(), nn.Conv2d(24, 24, 3, padding=1))

    blocks = [
        residrop.Residual(branch(d), rule=residrop.make_rule(rule, RULES[rule]), post=nn.ReLU()) for d in (1, 2, 4) * 2
    ]
    model = nn.Sequential(nn.Conv2d(1, 24, 3, padding=1), nn.ReLU(), *blocks, nn.Conv2d(24, len(SHAPES), 1))
    residrop.attach(model, seed=seed)
    return model


def trained_segmenter(rule: str, seed: int, steps: int) -> nn.Module:
    """One that was trained on fresh images."""
    model = segmenter(rule, seed).train()
    adam = torch.optim.Adam(model.parameters(), lr=3e-3)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)
    for step in range(steps):
        x, y = shapes(16, 1_000_000 * (seed + 1) + step)
        loss = nn.functional.cross_entropy(model(x), y)
        adam.zero_grad(set_to_none=True)
        loss.backward()
        adam.step()
        cosine.step()
    return model.eval()


def pixels(found: Any, truth: Tensor) -> dict[str, float]:
    """Quality of a dense prediction."""
    p, labels = found.probabilities.movedim(1, -1).flatten(0, -2), truth.flatten()
    wrong = found.classes.flatten() != labels
    chosen = p.gather(1, labels[:, None]).clamp_min(1e-12)
    scores = {"entropy": found.entropy, "confidence": 1.0 - found.probabilities.amax(1)}
    if found.samples:
        scores |= {"mutual_information": found.mutual_information, "disagreement": found.disagreement}
    aurocs = {f"auroc_{name}": float(binary_auroc(s.flatten(), wrong.long())) for name, s in scores.items()}
    return {
        "error": 100.0 * float(wrong.float().mean()),
        "nll": float(-chosen.log().mean()),
        "ece": 100.0 * float(multiclass_calibration_error(p, labels, num_classes=len(SHAPES), n_bins=15)),
        **aurocs,
    }


def segmentation(rule: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each way of prediction, means over seeds."""
    x, truth = shapes(64, 1)
    found: dict[str, list[dict[str, float]]] = {}
    for seed in range(arguments.seeds):
        model = trained_segmenter(rule, seed, arguments.steps)
        once, sampled = residrop.predict(model, x, 0), residrop.predict(model, x, arguments.samples)
        for way, one in (("expectation", once), ("samples", sampled)):
            found.setdefault(way, []).append(pixels(one, truth))
        if seed == 0 and arguments.plot:
            draw(arguments.plot.with_stem(f"{arguments.plot.stem}_{rule}"), x[:4], truth[:4], model, arguments.samples)
    return [{"task": "segmentation", "rule": rule, "way": way, **summary(rows)} for way, rows in found.items()]


def summary(rows: list[dict[str, float]]) -> dict[str, float | int | None]:
    """Means and standard errors over seeds."""
    means = {name: fmean(row[name] for row in rows) for name in rows[0]}
    spread = len(rows) > 1
    errors = {
        f"{name}_se": stdev(row[name] for row in rows) / math.sqrt(len(rows)) if spread else None for name in means
    }
    return {"seeds": len(rows), **means, **errors}


def draw(path: Path, x: Tensor, truth: Tensor, model: nn.Module, samples: int) -> None:
    """Images, truth, decision, entropy and mutual information of every pixel."""
    found = residrop.predict(model, x, samples)
    columns = {
        "image": (x[:, 0], {"cmap": "gray"}),
        "truth": (truth, {"cmap": "viridis", "vmin": 0, "vmax": 3}),
        "decision": (found.classes, {"cmap": "viridis", "vmin": 0, "vmax": 3}),
        "entropy (nats)": (found.entropy, {"cmap": "magma", "vmin": 0.0, "vmax": 1.0}),
        "of it randomness": (found.mutual_information, {"cmap": "magma", "vmin": 0.0, "vmax": 0.3}),
    }
    figure, panels = pyplot.subplots(len(x), len(columns), figsize=(2 * len(columns), 2 * len(x)), layout="constrained")
    for row in range(len(x)):
        for axes, (name, (values, options)) in zip(panels[row], columns.items(), strict=True):
            shown = axes.imshow(values[row], **options)
            axes.set_axis_off()
            if row == 0:
                axes.set_title(name, fontsize=10)
            if row == len(x) - 1 and options["cmap"] == "magma":
                figure.colorbar(shown, ax=panels[:, list(columns).index(name)], shrink=0.5)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def regression(rule: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each kind of interval, means over seeds (each with another split)."""
    inputs, targets = load_diabetes(return_X_y=True, scaled=True)
    found: dict[str, list[dict[str, float]]] = {}
    for seed in range(4 * arguments.seeds):
        order = np.random.default_rng(seed).permutation(len(inputs))
        x = torch.tensor(inputs[order] / inputs.std(), dtype=torch.float32)
        y = torch.tensor((targets[order] - targets.mean()) / targets.std(), dtype=torch.float32)
        model = trained_regressor(rule, seed, x[:300], y[:300])

        def pair(out: Tensor) -> tuple[Tensor, Tensor]:
            return out[:, 0], nn.functional.softplus(out[:, 1]) + 1e-3

        once = residrop.predict(model, x[300:], 0, kind="numbers", outputs=pair)
        both = residrop.predict(model, x[300:], arguments.samples, kind="numbers", outputs=pair)
        ways = {
            "predicted variance, one pass": once,
            "variance between passes": both._replace(noise=None),
            "both": both,
        }
        for way, one in ways.items():
            low, high = one.interval(0.9)
            inside = (low <= y[300:]) & (y[300:] <= high)
            nll = nn.functional.gaussian_nll_loss(one.mean, y[300:], one.total_variance, full=True)
            rmse = (one.mean - y[300:]).square().mean().sqrt()
            row = {"coverage": 100.0 * float(inside.float().mean()), "width": float((high - low).mean())}
            found.setdefault(way, []).append({**row, "nll": float(nll), "rmse": float(rmse)})
    return [{"task": "regression", "rule": rule, "way": way, **summary(rows)} for way, rows in found.items()]


def trained_regressor(rule: str, seed: int, x: Tensor, y: Tensor) -> nn.Module:
    """Tensor[n, 10] to Tensor[n, 2]: mean, and a number of which softplus makes the variance."""
    torch.manual_seed(seed)
    blocks = [
        residrop.Residual(nn.Sequential(nn.ReLU(), nn.Linear(64, 64)), rule=residrop.make_rule(rule, RULES[rule]))
        for _ in range(4)
    ]
    model = nn.Sequential(nn.Linear(x.shape[1], 64), *blocks, nn.Linear(64, 2))
    residrop.attach(model, seed=seed)
    adam = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    for _ in range(60):
        for some in torch.randperm(len(x)).split(50):
            out = model(x[some])
            variance = nn.functional.softplus(out[:, 1]) + 1e-3
            loss = nn.functional.gaussian_nll_loss(out[:, 0], y[some], variance)
            adam.zero_grad(set_to_none=True)
            loss.backward()
            adam.step()
    return model.eval()


def main() -> None:
    """Both tasks under both rules."""
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for task in (segmentation, regression):
        for rule in RULES:
            rows += task(rule, arguments)
            shown = {name: value for name, value in rows[-1].items() if isinstance(value, float)}
            table = Table(
                "way", *[name for name in shown if not name.endswith("_se")], title=f"{task.__name__}, {rule}"
            )
            for row in rows:
                if (row["task"], row["rule"]) == (task.__name__, rule):
                    values = [f"{row[name]:.3f}" if name in row else "" for name in shown if not name.endswith("_se")]
                    table.add_row(row["way"], *values)
            Console().print(table)
    if arguments.json:
        options = f" --samples {arguments.samples} --steps {arguments.steps}"
        command = f"python benchmarks/outputs.py --seeds {arguments.seeds}{options}"
        ledger.save(arguments.json, "Sampled prediction of pixels and numbers", command, rows)


if __name__ == "__main__":
    main()
