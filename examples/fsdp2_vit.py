"""A vision transformer under FSDP2, one block a shard: dead blocks are neither gathered nor reduced.

    torchrun --nproc-per-node 2 examples/fsdp2_vit.py

timm's ViT is put under stochastic depth by `residrop.apply`, and sharded block by block by `fully_shard` as always. The
same steps are run plain and with survival rates of 0.5 and 0.25, and the collectives that FSDP starts are counted.
(`branches=False` gives a block one coin: its shard is left alone where attention and MLP are both dead.) Needs timm.
"""

import argparse
import os

import timm
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import residrop
from residrop.engines.distributed import check_ranks, prefetch


class Counted(TorchDispatchMode):
    """Counts the collectives started inside, and the bytes of their buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.collectives = self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if str(func).startswith("c10d."):
            self.collectives += 1
            self.bytes += max(one.nbytes for one in args if isinstance(one, torch.Tensor))
        return func(*args, **(kwargs or {}))


def train(survival: float | None, steps: int, device: torch.device) -> None:
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=64, patch_size=8, num_classes=10, embed_dim=96, depth=12
    ).to(device)
    if survival is not None:
        residrop.apply(model, survival=survival, branches=False, seed=1)
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    if survival is not None:
        prefetch(model, model.blocks)  # optional: gathers the next live block while one computes
        check_ranks(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    generator = torch.Generator().manual_seed(dist.get_rank())  # every rank its own images
    images = torch.randn(16, 3, 64, 64, generator=generator).to(device)
    labels = torch.randint(10, (16,), generator=generator).to(device)
    losses = []
    with Counted() as counted:
        for _ in range(steps):
            loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    if dist.get_rank() == 0:
        name = "plain" if survival is None else f"p = {survival}"
        megabytes = counted.bytes / steps / 2**20
        print(f"{name}: loss {losses[0]:.3f} to {losses[-1]:.3f}")
        print(f"    a step: {counted.collectives / steps:.1f} collectives, {megabytes:.2f} MiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    steps = parser.parse_args().steps
    on_gpu = torch.cuda.is_available()
    dist.init_process_group("nccl" if on_gpu else "gloo")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    for survival in (None, 0.5, 0.25):
        train(survival, steps, device)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
