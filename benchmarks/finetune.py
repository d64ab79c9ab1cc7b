"""Fine-tuning from one command, beside timm's own training script: python benchmarks/finetune.py --timm-train FILE.

A ViT-Tiny of timm and a ResNet-18 of torchvision are trained on the images of a folder, from the same file of weights,
by residrop and by timm's train.py (the script of its repository, with the `timm` beside it; it is not part of the
package), with one recipe: AdamW without decay of vectors, clipped gradients, linear warm-up, cosine, label smoothing,
flips. Both use drop path at row level with rates that rise linearly to the one given.

--part errors trains --epochs epochs with every seed and compares test errors. --part times trains two epochs, one
system after the other in every round, and compares the second, without evaluation. Without --folder, 300 training and
100 test images of each class of --data are written as PNG files of 64x64 pixels.
"""

import argparse
import csv
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file

from residrop.data import Images, load
from residrop.research import ledger

MODELS = {"vit": ("timm:vit_tiny_patch16_224", "vit_tiny_patch16_224"), "resnet": ("torchvision:resnet18", "resnet18")}
SIZE, BATCH, LR, DECAY, CLIP, SMOOTHING = 64, 64, 5e-4, 0.05, 1.0, 0.1
# timm's script tells no time of an epoch
TIMM = """
import json, sys, time, train
inner, seconds = train.train_one_epoch, []
def timed(*args, **kwargs):
    started = time.perf_counter()
    out = inner(*args, **kwargs)
    seconds.append(time.perf_counter() - started)
    return out
train.train_one_epoch = timed
train.main()
json.dump(seconds, open(TIMES, "w"))
"""
OURS = """
import sys, json
from pathlib import Path
from residrop.training import Recipe, train
outcome = train(Recipe(**json.loads(sys.argv[1])), Path(sys.argv[2]), quiet=True)
"""


def write_images(source: str, folder: Path, training: int, test: int) -> None:
    """PNG files of a data source, some of every class."""
    splits = load(source)
    for part, images, each in (("train", splits.train, training), ("test", splits.test, test)):
        assert isinstance(images, Images)
        for number, name in enumerate(splits.classes):
            place = folder / part / name
            place.mkdir(parents=True, exist_ok=True)
            for index in (images.labels == number).nonzero().flatten()[:each].tolist():
                picture = Image.fromarray(images.pixels[index].permute(1, 2, 0).numpy())
                picture.resize((SIZE, SIZE), Image.Resampling.BICUBIC).save(place / f"{index}.png")


def write_weights(path: Path, model: str) -> None:
    """The random weights that both systems start from."""
    import timm
    import torchvision

    torch.manual_seed(0)
    options: dict[str, Any] = {"num_classes": 10}
    if model == "vit":
        made = timm.create_model(MODELS[model][1], img_size=SIZE, **options)
    else:
        made = torchvision.models.resnet18(**options)
    save_file(made.state_dict(), path)


def ours(
    model: str, rate: float, seed: int, epochs: int, folder: Path, weights: Path, out: Path
) -> tuple[float, list[float]]:
    """Test error in percent after the last epoch, and the time of every epoch in seconds."""
    recipe = {
        "network": MODELS[model][0] + (f"?drop_path_rate={rate}" if model == "vit" else ""),
        "survival": "from_model" if model == "vit" and rate else f"linear(1, {1.0 - rate})",
        "rule": "stochastic-depth" if rate else "constant",
        "granularity": "row" if rate else None,
        "weights": str(weights),
        "data": f"folder:{folder}?size={SIZE}",
        "optimizer": "adamw",
        "lr": LR,
        "weight_decay": DECAY,
        "clip_grad": CLIP,
        "lr_schedule": "cosine",
        "warmup": 1 / epochs,
        "warmup_form": "linear",
        "warmup_lr": 0.0,
        "label_smoothing": SMOOTHING,
        "augmentation": "flip",
        "epochs": epochs,
        "batch_size": BATCH,
        "precision": "fp32",
        "seed": seed,
        "samples": 0,
        "eval_every": epochs,
    }
    if recipe["rule"] == "constant":
        recipe["survival"] = None
    subprocess.run([sys.executable, "-c", OURS, json.dumps(recipe), str(out)], check=True)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return lines[-1]["test_error"], [line["seconds"] for line in lines]


def timms(
    script: Path, model: str, rate: float, seed: int, epochs: int, folder: Path, weights: Path, out: Path
) -> tuple[float, list[float]]:
    """The same by timm's script."""
    options: dict[str, Any] = {
        "data-dir": folder, "train-split": "train", "val-split": "test", "model": MODELS[model][1], "num-classes": 10,
        "input-size": f"3 {SIZE} {SIZE}", "crop-pct": 1.0, "initial-checkpoint": weights, "drop-path": rate,
        "opt": "adamw", "lr": LR, "weight-decay": DECAY, "clip-grad": CLIP, "smoothing": SMOOTHING,
        "sched": "cosine", "epochs": epochs - 1, "warmup-epochs": 1, "warmup-lr": 0.0, "min-lr": 0.0,
        "scale": "1.0 1.0", "ratio": "1.0 1.0", "hflip": 0.5, "color-jitter": 0.0, "train-interpolation": "bilinear",
        "batch-size": BATCH, "workers": 2, "seed": seed, "device": "cpu", "output": out, "experiment": "run",
        "log-interval": 1000,
    }  # fmt: skip
    # with --warmup-prefix its epochs come after the warm-up
    words = [word for name, value in options.items() for word in (f"--{name}", *str(value).split())]
    words += ["--sched-on-updates", "--warmup-prefix", "--checkpoint-hist", "1"]
    words += ["--model-kwargs", f"img_size={SIZE}"] if model == "vit" else []
    times = out / "times.json"
    out.mkdir(parents=True)
    code = f"import sys; sys.path.insert(0, {str(script.parent)!r}); TIMES = {str(times)!r}\n{TIMM}"
    done = subprocess.run([sys.executable, "-c", code, *words], check=False, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"timm's script failed: {done.stderr[-2000:]}")
    rows = list(csv.DictReader((out / "run" / "summary.csv").open()))
    return 100.0 - float(rows[-1]["eval_top1"]), json.loads(times.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--timm-train", type=Path, required=True, help="train.py of timm's repository")
    parser.add_argument("--part", choices=("errors", "times"), default="errors")
    parser.add_argument("--folder", type=Path, help="images by class in train/ and test/")
    parser.add_argument("--data", default="cifar10", help="source of images, without --folder")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--rates", nargs="+", type=float, default=[0.0, 0.2, 0.5], help="drop path of the last block")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3, help="of --part times")
    parser.add_argument("--epochs", type=int, default=5, help="of --part errors")
    parser.add_argument("--work", type=Path, help="folder for the runs (default: a temporary one)")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    script = arguments.timm_train.resolve()
    version = (script.parent / "timm" / "version.py").read_text().partition("=")[2].strip().strip("'\"")
    with tempfile.TemporaryDirectory() as temporary:
        work = (arguments.work or Path(temporary)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        folder = arguments.folder and arguments.folder.resolve()
        if folder is None:
            folder = work / "images"
            if not folder.exists():
                write_images(arguments.data, folder, 300, 100)
        rows = []
        for model in arguments.models:
            weights = work / f"{model}.safetensors"
            if not weights.exists():
                write_weights(weights, model)
            runs = {
                "residrop": lambda *a, weights=weights, model=model: ours(model, *a[:3], folder, weights, a[3]),
                "timm": lambda *a, weights=weights, model=model: timms(script, model, *a[:3], folder, weights, a[3]),
            }
            part = errors if arguments.part == "errors" else times
            rows += [{"model": MODELS[model][0], "timm": version, **row} for row in part(runs, model, arguments, work)]
    if arguments.json:
        command = f"python benchmarks/finetune.py --part {arguments.part} --timm-train train.py"
        ledger.save(arguments.json, f"Fine-tuning by residrop and by timm's train.py: {arguments.part}", command, rows)


def errors(runs: dict[str, Any], model: str, arguments: Any, work: Path) -> list[dict[str, Any]]:
    rows = []
    for rate in arguments.rates:
        found: dict[str, list[float]] = {}
        for system, run in runs.items():
            for seed in range(arguments.seeds):
                kept = work / f"{model}-{rate}-{system}-{seed}-{arguments.epochs}.json"
                if not kept.exists():  # of a stopped benchmark
                    with tempfile.TemporaryDirectory(dir=work) as out:
                        kept.write_text(json.dumps(run(rate, seed, arguments.epochs, Path(out) / "run")[0]))
                found.setdefault(system, []).append(json.loads(kept.read_text()))
        a, b = found.values()
        se = ((stdev(a) ** 2 + stdev(b) ** 2) / arguments.seeds) ** 0.5
        difference = fmean(a) - fmean(b)
        print(f"{model:<7} drop path {rate}: {fmean(a):6.2f} {fmean(b):6.2f}  difference {difference:+.2f} ± {se:.2f}")
        rows.append(
            {
                "drop_path": rate,
                "epochs": arguments.epochs,
                "seeds": arguments.seeds,
                **{f"{system}_error": fmean(values) for system, values in found.items()},
                **{f"{system}_errors": values for system, values in found.items()},
                "difference": difference,
                "difference_se": se,
            }
        )
    return rows


def times(runs: dict[str, Any], model: str, arguments: Any, work: Path) -> list[dict[str, Any]]:
    rows, base = [], 0.0
    for rate in arguments.rates:
        found: dict[str, list[float]] = {}
        for number in range(arguments.rounds):
            for system, run in runs.items():
                with tempfile.TemporaryDirectory(dir=work) as out:
                    found.setdefault(system, []).append(run(rate, number, 2, Path(out) / "run")[1][-1])
        pairs = zip(found["residrop"], found["timm"], strict=True)
        ratio, seconds = median(a / b for a, b in pairs), median(found["residrop"])
        base = base or seconds
        print(
            f"{model:<7} drop path {rate}: {seconds:6.1f} s, {ratio:.2f} of timm's, {seconds / base:.2f} of the first"
        )
        rows.append(
            {
                "drop_path": rate,
                "rounds": arguments.rounds,
                **{f"{system}_seconds": median(values) for system, values in found.items()},
                "relative_to_timm": ratio,
                "relative_to_first": seconds / base,
            }
        )
    return rows


if __name__ == "__main__":
    main()
