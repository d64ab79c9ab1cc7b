"""Lightning's Trainer with a model under rules."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import residrop
from residrop import Residual, StochasticDepth

pytest.importorskip("lightning")

import lightning as L

from residrop.engines.integrations.lightning import SamplerCallback

DEPTH = 6


class Lit(L.LightningModule):
    def __init__(self, late: bool = False) -> None:
        super().__init__()
        self.late = late
        self.net = nn.Sequential(
            *(Residual(nn.Linear(8, 8), rule=StochasticDepth(0.5)) for _ in range(DEPTH)), nn.Linear(8, 3)
        )
        if not late:
            residrop.attach(self.net, seed=7)
        self.steps, self.live = [], []

    def configure_model(self) -> None:
        if self.late:
            residrop.attach(self.net, seed=7)

    def training_step(self, batch, index):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch, index):
        self.log("loss", F.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)

    def on_before_optimizer_step(self, optimizer):
        self.steps.append(residrop.sampler_of(self).step)
        self.live.append([block.branch.weight.grad is not None for block in self.net[:DEPTH]])


def loader() -> DataLoader:
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(48, 8, generator=generator), torch.randint(3, (48,), generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size=8)


def trained(place: Path, *, per: str = "forward", checkpoint: str | None = None, late: bool = False, **options):
    torch.manual_seed(0)
    lit = Lit(late)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "accelerator": "cpu"}
    trainer = L.Trainer(
        default_root_dir=place, callbacks=[SamplerCallback(per)], enable_checkpointing=False, **quiet, **options
    )
    trainer.fit(lit, loader(), loader(), ckpt_path=checkpoint, weights_only=True)
    return lit, trainer


pytestmark = [
    pytest.mark.filterwarnings("ignore:The '.*' does not have many workers"),
    pytest.mark.filterwarnings("ignore:`isinstance\\(treespec, LeafSpec\\)` is deprecated"),
]


def test_each_forward_is_a_step_and_dead_branches_stand_still(tmp_path):
    lit, _ = trained(tmp_path, max_epochs=2)
    sampler = residrop.sampler_of(lit)
    assert lit.steps == list(range(1, 13))  # validation, its sanity check too, draws nothing
    assert lit.live == [[draw.alive for draw in sampler.plan(number).draws] for number in range(12)]


@pytest.mark.parametrize("late", [False, True])
def test_resumed_training_is_the_unbroken_one(tmp_path, late):
    whole, _ = trained(tmp_path, max_epochs=2, late=late)
    _, trainer = trained(tmp_path, max_epochs=1, late=late)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    saved = torch.load(tmp_path / "half.ckpt", weights_only=True)
    assert list(saved["callbacks"].values()) == [{"seed": 7, "step": 6}]
    rest, _ = trained(tmp_path, max_epochs=2, checkpoint=str(tmp_path / "half.ckpt"), late=late)
    assert rest.steps == whole.steps[6:]
    for one, other in zip(whole.parameters(), rest.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0.0, atol=0.0)


def test_micro_batches_are_steps_or_share_one(tmp_path):
    lit, _ = trained(tmp_path, max_epochs=2, accumulate_grad_batches=2)
    assert lit.steps == [2, 4, 6, 8, 10, 12]
    # 6 batches an epoch, by 4: the second update of an epoch has 2, and validation comes in the middle of an update
    lit, _ = trained(tmp_path, per="update", max_epochs=2, accumulate_grad_batches=4, val_check_interval=3)
    sampler = residrop.sampler_of(lit)
    assert lit.steps == [0, 1, 2, 3]
    assert sampler.step == 4
    assert lit.live == [[draw.alive for draw in sampler.plan(number).draws] for number in range(4)]


def test_bf16_precision(tmp_path):
    lit, _ = trained(tmp_path, max_epochs=1, precision="bf16-mixed")
    assert lit.steps == list(range(1, 7))
    assert all(torch.isfinite(parameter).all() for parameter in lit.parameters())
