"""An Accelerate loop over a network with stochastic depth, with gradient accumulation, saved and resumed.

    python examples/accelerate_loop.py
    accelerate launch --cpu --num_processes 2 examples/accelerate_loop.py

No glue is needed: the sampler of the draws is registered for checkpointing like a scheduler. The micro-batches of an
update share a plan, so blocks that are absent have no gradient when the optimizer steps, and are left as they are.
Under several processes Accelerate wraps the network in stock DDP, which has to be told that gradients may be absent
(`residrop.engines.distributed.data_parallel` is told by the draws, and sends less). Needs accelerate.
"""

import argparse
import tempfile

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import broadcast_object_list
from sklearn.datasets import load_digits
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import residrop

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--epochs", type=int, default=4)
epochs = parser.parse_args().epochs

MICRO_BATCHES = 2
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8.0 - 1.0
labels = torch.tensor(digits.target)

accelerator = Accelerator(
    gradient_accumulation_steps=MICRO_BATCHES,
    kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
)
network = residrop.create("resnet-20", rule="stochastic-depth", survival="linear_decay(0.5)", channels=1, seed=0)
sampler = residrop.sampler_of(network)
optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9, nesterov=True)
batches = DataLoader(TensorDataset(images[:1440], labels[:1440]), batch_size=60 // accelerator.num_processes)
model, optimizer, batches = accelerator.prepare(network, optimizer, batches)
accelerator.register_for_checkpointing(sampler)


def train(epoch):
    """One epoch; returns its mean loss on this process."""
    model.train()
    total = 0.0
    for number, (x, y) in enumerate(batches):
        part = number % MICRO_BATCHES
        with accelerator.accumulate(model), residrop.using(model, sampler.plan(part=part)):
            loss = F.cross_entropy(model(x), y)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            total += float(loss.detach())
        sampler.step += accelerator.sync_gradients  # a plan given by hand advances nothing
    accelerator.print(f"epoch {epoch + 1}: loss {total / len(batches):.3f}, {sampler.step} updates drawn")


folder = broadcast_object_list([tempfile.mkdtemp()])[0]
for epoch in range(epochs // 2):
    train(epoch)
accelerator.save_state(folder)
for epoch in range(epochs // 2, epochs):
    train(epoch)
first = [parameter.detach().clone() for parameter in network.parameters()]

accelerator.load_state(folder)
accelerator.print(f"back at {sampler.step} updates")
for epoch in range(epochs // 2, epochs):
    train(epoch)
off = max(float((one - other).detach().abs().max()) for one, other in zip(first, network.parameters(), strict=True))
accelerator.print(f"the same epochs again: weights off by {off:.1e}")

with torch.no_grad():
    wrong = network.eval()(images[1440:].to(accelerator.device)).argmax(1).cpu() != labels[1440:]
accelerator.print(f"test error {100.0 * float(wrong.float().mean()):.1f}%")
accelerator.end_training()
