"""What recalibrated batch norm gains: python benchmarks/recalibration.py [--data DATA] [--seeds N] [--json FILE].

Trains short runs (resumed, or skipped if finished, when started again), then scores each on the test images: in
expectation with the statistics of training, after `residrop.recalibrate` in each mode, and averaged over samples.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch

import residrop
from residrop.data import Loader, load
from residrop.inference import score
from residrop.research import ledger
from residrop.training import Recipe, load_run, train
from residrop.training.setup import loader_of_run

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--data", default="digits", help="digits, cifar10, or the path of a folder")
parser.add_argument("--name", help="of the data in the table (default: digits or cifar10)")
parser.add_argument("--network", default="resnet-ours-14")
parser.add_argument("--epochs", type=int, help="default: 20 on digits, 8 elsewhere")
parser.add_argument("--limit", type=int, help="training images (default: all of digits, 20000 elsewhere)")
parser.add_argument("--test-limit", type=int, default=10_000, help="test images")
parser.add_argument("--batches", type=int, default=40, help="of training images, for recalibration")
parser.add_argument("--seeds", type=int, default=1)
parser.add_argument("--samples", type=int, default=30)
parser.add_argument("--models", nargs="+", default=["swapout-0.5", "swapout-linear", "stochastic-depth"])
parser.add_argument("--runs", type=Path, default=Path("runs/recalibration"), help="where runs are kept")
parser.add_argument("--json", type=Path)
parser.add_argument("--plot", type=Path, help="draw error and NLL of all ways as a PNG")
arguments = parser.parse_args()

MODELS = {
    "swapout-0.5": {"rule": "swapout", "survival": "uniform(0.5)"},
    "swapout-linear": {"rule": "swapout", "survival": "linear(1, 0.5)"},
    "stochastic-depth": {"rule": "stochastic-depth", "survival": "linear_decay(0.5)"},
    "stochastic-depth-0.5": {"rule": "stochastic-depth", "survival": "uniform(0.5)"},
}
DIGITS = arguments.data == "digits"
NAME = arguments.name or ("digits" if DIGITS else "cifar10")


def recipe(model, seed):
    """A short training of one model."""
    epochs = arguments.epochs or (20 if DIGITS else 8)
    return Recipe(
        network=arguments.network,
        block="v2",
        data=arguments.data,
        limit=arguments.limit or (None if DIGITS else 20_000),
        augmentation="shift" if DIGITS else "crop",
        epochs=epochs,
        batch_size=64 if DIGITS else 128,
        lr_schedule="cosine",
        seed=seed,
        samples=0,
        precision="fp32",
        device="cpu",
        eval_every=epochs,
        **MODELS[model],
    )


def probabilities(model, batches, samples):
    """Class probabilities of all test images."""
    return torch.cat([residrop.predict(model, x, samples, first=i * samples).probabilities for i, (x, _) in batches])


def variances(model):
    """The running variances of all batch norms by name."""
    norms = {name: one for name, one in model.named_modules() if isinstance(one, torch.nn.BatchNorm2d)}
    return {name: norm.running_var.clone() for name, norm in norms.items()}


def ratios_of(before, after):
    """Mean logarithm of after / before: of batch norms that read sums of the stream, and of those inside a branch."""
    logs = {name: (after[name] / before[name]).log() for name in after}
    inside = [log for name, log in logs.items() if name.endswith("bn2")]
    sums = [log for name, log in logs.items() if not name.endswith("bn2") and name != "blocks.block1.branch.bn1"]
    return {"sums": torch.cat(sums).mean(), "branches": torch.cat(inside).mean()}


def rows_of(name, seed):
    """Train one run if that is still to be done, and score it in every way."""
    path = arguments.runs / f"{NAME}-{arguments.network}-{name}-seed{seed}"
    chosen = recipe(name, seed)
    train(chosen, path, resume=True)
    run, model = load_run(path)
    test = []
    for x, y in loader_of_run(run).eval_batches():
        test.append((x, y))
        if sum(len(labels) for _, labels in test) >= arguments.test_limit:
            break
    labels = torch.cat([y for _, y in test])
    training = Loader(
        load(chosen.data, validation=0, seed=seed + 1, limit=chosen.limit).train,
        batch_size=chosen.batch_size,
        normalization=run.normalization(),
        seed=seed,
    )
    wrong_before = None
    for mode in ("before", "at-once", "layers", f"sampled-{arguments.samples}"):
        print(f"{path.name}: {mode}", file=sys.stderr)
        done, started = None, time.perf_counter()
        if mode in ("at-once", "layers"):
            before = variances(model)
            done = residrop.recalibrate(model, training.train_batches(0), arguments.batches, mode)
            ratios = {name: log.exp().item() for name, log in ratios_of(before, variances(model)).items()}
        seconds = time.perf_counter() - started
        found = probabilities(model, enumerate(test), arguments.samples if mode.startswith("sampled") else 0)
        if done is not None:
            done.undo()
        wrong = (found.argmax(dim=1) != labels).double()
        wrong_before = wrong if wrong_before is None else wrong_before
        change = wrong - wrong_before
        scores = score(found, labels)
        yield {
            "model": name,
            "data": NAME,
            "network": arguments.network,
            **MODELS[name],
            "seed": seed,
            "epochs": chosen.epochs,
            "training_images": training.num_images,
            "test_images": len(labels),
            "mode": mode,
            "error": scores.error,
            "error_se": scores.error_se,
            "change": 100 * float(change.mean()),
            "change_se": 100 * float(change.std()) / len(labels) ** 0.5,  # of the images that both decide differently
            "nll": scores.nll,
            "ece": scores.ece,
            "recalibration_images": done.images if done else 0,
            "recalibration_seconds": seconds if done else 0.0,
            "largest_change": done.largest_change if done else 0.0,
            "variance_of_sums": ratios["sums"] if done else 1.0,
            "variance_in_branches": ratios["branches"] if done else 1.0,
        }


def draw(path, rows):
    """Error and NLL of every way, means over seeds with standard errors, a panel each."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 3.6), dpi=120, layout="constrained")
    panels = figure.subplots(1, 2)
    models, modes = (list(dict.fromkeys(row[key] for row in rows)) for key in ("model", "mode"))
    for axes, key, label in zip(panels, ("error", "nll"), ("test error (%)", "NLL (nats)"), strict=True):
        for place, mode in enumerate(modes):
            values = [[row[key] for row in rows if row["model"] == model and row["mode"] == mode] for model in models]
            means = [statistics.fmean(one) for one in values]
            spread = [statistics.stdev(one) / len(one) ** 0.5 if len(one) > 1 else 0.0 for one in values]
            where = [number + 0.16 * (place - 1.5) for number in range(len(models))]
            axes.errorbar(where, means, yerr=spread, fmt="o", capsize=3, label=mode)
        axes.set_xticks(range(len(models)), models)
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0.0)
        axes.grid(axis="y", alpha=0.25)
    panels[0].legend(frameon=False, fontsize=8)
    figure.suptitle(f"{NAME}, {arguments.network}, {arguments.seeds} seed(s)")
    figure.savefig(path)


def command():
    """How to repeat it, without the places of files."""
    options = ("network", "epochs", "limit", "test_limit", "batches", "seeds", "samples")
    given = {name: getattr(arguments, name) for name in options if getattr(arguments, name) != parser.get_default(name)}
    words = [f"--{name.replace('_', '-')} {value}" for name, value in given.items()]
    models = f"--models {' '.join(arguments.models)}"
    return " ".join(["python benchmarks/recalibration.py", f"--data {'digits' if DIGITS else 'PATH'}", *words, models])


rows = []
for name in arguments.models:
    for seed in range(arguments.seeds):
        for row in rows_of(name, seed):
            rows.append(row)
            print(
                f"{row['model']:<22} seed {seed}  {row['mode']:<12} error {row['error']:6.2f}%  "
                f"change {row['change']:+6.2f} ± {row['change_se']:.2f}  NLL {row['nll']:.4f}  ECE {row['ece']:5.2f}%"
            )
        if arguments.json:
            ledger.save(arguments.json, f"Recalibrated batch norm on {NAME}", command(), rows)
if arguments.plot:
    draw(arguments.plot, rows)
