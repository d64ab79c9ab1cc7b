"""A Lightning Trainer over a network with stochastic depth, stopped and resumed.

    python examples/lightning_digits.py

The network is attached by `residrop.create`; its training forwards draw. `SamplerCallback` keeps the draws in the
checkpoint, so the resumed training goes on with the draws that the stopped one would have made next.
"""

import argparse
import tempfile
from pathlib import Path

import lightning.pytorch as pl
import torch
from sklearn.datasets import load_digits
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import residrop
from residrop.engines.integrations.lightning import SamplerCallback

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--epochs", type=int, default=12)
arguments = parser.parse_args()

torch.manual_seed(0)  # the order of the batches
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8.0 - 1.0
labels = torch.tensor(digits.target)


class Classifier(pl.LightningModule):
    """A ResNet-20 whose blocks are present by linear decay to 0.5."""

    def __init__(self):
        super().__init__()
        self.network = residrop.create("resnet-20", rule="stochastic-depth", channels=1, seed=0)

    def training_step(self, batch, batch_index):
        x, y = batch
        return F.cross_entropy(self.network(x), y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, nesterov=True)


def trainer(epochs, folder):
    """A quiet Trainer on the CPU."""
    return pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        devices=1,
        default_root_dir=folder,
        callbacks=[SamplerCallback()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def batches():
    """The training batches; a new loader for every Trainer."""
    return DataLoader(TensorDataset(images[:1440], labels[:1440]), batch_size=120, shuffle=True)


with tempfile.TemporaryDirectory() as folder:
    first = trainer(arguments.epochs // 2, folder)
    first.fit(Classifier(), batches())
    checkpoint = Path(folder) / "half.ckpt"
    first.save_checkpoint(checkpoint)

    model = Classifier()
    with residrop.observe(model, residrop.branch_flops(model.network, images[:2])) as seen:
        trainer(arguments.epochs, folder).fit(model, batches(), ckpt_path=str(checkpoint), weights_only=False)
print(f"steps drawn in all: {residrop.sampler_of(model).step}, after the resume: {seen.steps}")
print(seen)
with torch.no_grad():
    wrong = model.eval().network(images[1440:]).argmax(1) != labels[1440:]
print(f"test error {100.0 * float(wrong.float().mean()):.1f}%")
