"""Fine-tune a timm model: its DropPath becomes real skipping, by one line.

    python examples/timm_finetune.py

It trains a small vision transformer on the digits twice, with timm's own DropPath (masks over branches that are all
computed) and with `residrop.apply(model, survival="from_model")` (the same rates; dropped rows are not computed), and
prints the time of a step and the test error of both. Pretrained weights load before or after `apply`.
"""

import argparse
import time

import timm
import torch
from sklearn.datasets import load_digits
from torch.nn import functional as F

import residrop

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--epochs", type=int, default=8)
parser.add_argument("--drop-path-rate", type=float, default=0.4)
arguments = parser.parse_args()

digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8.0 - 1.0
images = F.interpolate(images, size=32)
labels = torch.tensor(digits.target)
train, test = torch.arange(1440), torch.arange(1440, 1797)


def make():
    """A vision transformer of 6 blocks for images of 32 pixels."""
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224",
        img_size=32,
        patch_size=8,
        in_chans=1,
        num_classes=10,
        depth=6,
        embed_dim=192,
        num_heads=4,
        drop_path_rate=arguments.drop_path_rate,
    )


def fit(model):
    """Train, and return seconds per step and test error in percent."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    seconds, steps = 0.0, 0
    for epoch in range(arguments.epochs):
        model.train()
        for rows in train[torch.randperm(1440, generator=torch.Generator().manual_seed(epoch))].split(120):
            started = time.perf_counter()
            loss = F.cross_entropy(model(images[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            seconds, steps = seconds + time.perf_counter() - started, steps + 1
    with torch.no_grad():
        wrong = model.eval()(images[test]).argmax(1) != labels[test]
    return seconds / steps, 100.0 * float(wrong.float().mean())


masked = fit(make())
model = make()
report = residrop.apply(model, survival="from_model")  # the one line
print(report)
skipped = fit(model)
for name, (seconds, error) in {"timm DropPath": masked, "residrop": skipped}.items():
    print(f"{name:<14} {1000 * seconds:6.1f} ms a step, test error {error:.1f}%")
