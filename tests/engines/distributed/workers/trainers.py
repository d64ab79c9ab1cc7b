"""Trains a few updates with somebody's trainer, alone or on all ranks of torchrun: `trainers.py NAME FILE`."""

import os
import sys
import warnings
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import residrop
from residrop import Residual, StochasticDepth

UPDATES, ROWS, DEPTH = 8, 8, 6  # of all ranks together
WORLD = int(os.environ.get("WORLD_SIZE", "1"))


def network():
    torch.manual_seed(0)
    blocks = [Residual(nn.Linear(8, 8), rule=StochasticDepth(0.5)) for _ in range(DEPTH)]
    model = nn.Sequential(*blocks, nn.Linear(8, 3))
    residrop.attach(model, seed=7)
    return model


class Classifier(nn.Module):
    """What transformers' trainer wants: arguments by name, a dict with a loss."""

    def __init__(self):
        super().__init__()
        self.net = network()

    def forward(self, x, labels):
        return {"loss": F.cross_entropy(self.net(x), labels)}


def batches():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(64, 8, generator=generator), torch.randint(3, (64,), generator=generator)


def hugging_face(place):
    from transformers import Trainer, TrainingArguments

    from residrop.engines.integrations.transformers import SamplerCallback

    x, y = batches()
    model = Classifier()
    arguments = TrainingArguments(
        output_dir=str(place),
        max_steps=UPDATES,
        per_device_train_batch_size=ROWS // WORLD,
        learning_rate=0.1,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0.0,
        ddp_find_unused_parameters=WORLD > 1,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        logging_strategy="no",
    )
    data = [{"x": one, "labels": int(label)} for one, label in zip(x, y, strict=True)]
    Trainer(model, arguments, train_dataset=data, callbacks=[SamplerCallback()]).train()
    return model.net


def lightning(place):
    import lightning as L

    from residrop.engines.integrations.lightning import SamplerCallback

    class Lit(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = network()

        def training_step(self, batch, index):
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    lit = Lit()
    trainer = L.Trainer(
        max_steps=UPDATES,
        accelerator="cpu",
        devices=WORLD,
        strategy="ddp_find_unused_parameters_true" if WORLD > 1 else "auto",
        callbacks=[SamplerCallback()],
        default_root_dir=place,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        logger=False,
        use_distributed_sampler=False,
    )
    data = TensorDataset(*batches())
    share = DistributedSampler(data, WORLD, int(os.environ.get("RANK", "0")), shuffle=False)  # its own would shuffle
    trainer.fit(lit, DataLoader(data, batch_size=ROWS // WORLD, sampler=share))
    return lit.net


def accelerate(place):
    from accelerate import Accelerator, DistributedDataParallelKwargs

    accelerator = Accelerator(cpu=True, kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)])
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    data = DataLoader(TensorDataset(*batches()), batch_size=ROWS // WORLD)
    model, optimizer, data = accelerator.prepare(model, optimizer, data)
    accelerator.register_for_checkpointing(residrop.sampler_of(model))
    for x, y in data:
        optimizer.zero_grad()
        accelerator.backward(F.cross_entropy(model(x), y))
        optimizer.step()
    return accelerator.unwrap_model(model)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    name, file = sys.argv[1], Path(sys.argv[2])
    trained = {"transformers": hugging_face, "lightning": lightning, "accelerate": accelerate}[name](file.parent)
    if os.environ.get("RANK", "0") == "0":
        assert residrop.sampler_of(trained).step == UPDATES
        save_file({key: value.detach().contiguous() for key, value in trained.state_dict().items()}, file)
