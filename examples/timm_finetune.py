"""Fine-tuning a timm model whose drop path really skips, beside the same model as timm has it.

    python examples/timm_finetune.py                                        # a small ViT on the digits, no download
    python examples/timm_finetune.py --model deit_tiny_patch16_224 --pretrained --size 224    # your own choice

The one line is `residrop.apply(model, survival="from_model")`. timm computes every branch and multiplies dropped rows by
zero; here they are not computed. Both models see the same batches, one step after the other, and it prints what was
done to the model, the time of a step of each, and their accuracies.
"""

import argparse
import copy
import time
from statistics import median

import timm
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import residrop

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", default=None, help="name of a timm model (default: a ViT of 8 blocks)")
parser.add_argument("--pretrained", action="store_true", help="load its weights (this downloads them)")
parser.add_argument("--size", type=int, default=32, help="side of the images in pixels")
parser.add_argument("--drop-path", type=float, default=0.4, help="rate of drops of the last block")
parser.add_argument("--epochs", type=int, default=6)
parser.add_argument("--batch-size", type=int, default=64)
arguments = parser.parse_args()

torch.manual_seed(0)
options = {"in_chans": 1, "num_classes": 10, "drop_path_rate": arguments.drop_path, "img_size": arguments.size}
if arguments.model is None:
    small = {"patch_size": 8, "embed_dim": 96, "depth": 8, "num_heads": 3}
    plain = timm.create_model("vit_tiny_patch16_224", **options, **small)
else:
    plain = timm.create_model(arguments.model, pretrained=arguments.pretrained, **options)

skipping = copy.deepcopy(plain)
print(residrop.apply(skipping, survival="from_model"))

digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8.0 - 1.0
images = F.interpolate(images, size=arguments.size, mode="bilinear", align_corners=False)
labels = torch.tensor(digits.target)

models: dict[str, nn.Module] = {"timm": plain, "residrop": skipping}
optimizers = {name: torch.optim.AdamW(model.parameters(), lr=1e-3) for name, model in models.items()}
seconds: dict[str, list[float]] = {name: [] for name in models}
for epoch in range(arguments.epochs):
    losses = dict.fromkeys(models, 0.0)
    batches = torch.randperm(1440).split(arguments.batch_size)
    for rows in batches:
        for name, model in models.items():
            start = time.perf_counter()
            loss = F.cross_entropy(model.train()(images[rows]), labels[rows])
            optimizers[name].zero_grad()
            loss.backward()
            optimizers[name].step()
            seconds[name].append(time.perf_counter() - start)
            losses[name] += loss.item() / len(batches)
    print(f"epoch {epoch + 1}: " + ", ".join(f"{name} loss {loss:.4f}" for name, loss in losses.items()))

for name, model in models.items():
    with torch.no_grad():
        right = (model.eval()(images[1440:]).argmax(1) == labels[1440:]).float().mean()
    print(f"{name}: {1000 * median(seconds[name]):.1f} ms a step, test accuracy {float(right):.1%}")
ratio = median(seconds["residrop"]) / median(seconds["timm"])
print(f"a step with skipped rows takes {ratio:.2f} of the time of one with masked rows")

residrop.remove(skipping)  # a plain timm model again, with the weights that were trained
assert skipping.state_dict().keys() == plain.state_dict().keys()
