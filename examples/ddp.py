"""Your own training loop on several processes, with gradients of live blocks only.

    torchrun --nproc-per-node 2 examples/ddp.py

The one line that makes it data parallel is `residrop.engines.distributed.data_parallel(model)`. It prints losses, and
how many bytes of gradients were not sent because their blocks were dead. (Stock DistributedDataParallel works, too,
with find_unused_parameters=True; it sends zeros for dead blocks.)
"""

import argparse
import os

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch.nn import functional as F

import residrop
from residrop.engines.distributed import check_ranks, data_parallel

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--epochs", type=int, default=8)
parser.add_argument("--survival", default="linear_decay(0.5)")
arguments = parser.parse_args()

on_gpu = torch.cuda.is_available()
if "RANK" in os.environ:
    dist.init_process_group("nccl" if on_gpu else "gloo")
rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if on_gpu else torch.device("cpu")
if on_gpu:
    torch.cuda.set_device(device)

digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32, device=device).unsqueeze(1) / 8.0 - 1.0
labels = torch.tensor(digits.target, device=device)
train, test = slice(0, 1440), slice(1440, None)

model = residrop.create("resnet-20", rule="stochastic-depth", survival=arguments.survival, channels=1, seed=0).to(
    device
)
sync = data_parallel(model)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4, nesterov=True)

batch_size = 64
for epoch in range(arguments.epochs):
    order = torch.randperm(1440, generator=torch.Generator().manual_seed(epoch)).to(device)  # the same on all ranks
    optimizer.param_groups[0]["lr"] = 0.1 if epoch < arguments.epochs // 2 else 0.01
    total = torch.zeros((), device=device)
    model.train()
    for rows in order.split(batch_size)[:-1]:
        mine = rows.chunk(ranks)[rank]
        loss = F.cross_entropy(model(images[mine]), labels[mine])
        optimizer.zero_grad()
        loss.backward()  # gradients are averaged when this returns
        optimizer.step()
        total += loss.detach()
    check_ranks(model)  # an error if a rank has drifted apart, instead of a hang
    if ranks > 1:
        dist.all_reduce(total)
    if rank == 0:
        print(f"epoch {epoch + 1}: loss {float(total) / ranks / (1440 // batch_size):.4f}")

sync.sync_buffers()  # batch norm statistics of rank 0
with torch.no_grad():
    error = 100.0 * float((model.eval()(images[test]).argmax(1) != labels[test]).float().mean())
if rank == 0:
    sent, skipped = sync.bytes_sent / 2**20, sync.bytes_skipped / 2**20
    print(f"test error {error:.1f}%")
    if ranks > 1:
        print(f"gradients: {sent:.1f} MiB sent in {sync.collectives} all-reduces, {skipped:.1f} MiB not sent")
if dist.is_initialized():
    dist.destroy_process_group()
