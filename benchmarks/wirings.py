"""What data parallelism costs under dead blocks, by how it is wired: collectives, bytes and time of a training step.

    torchrun --nproc-per-node 2 benchmarks/wirings.py --json results/wirings.json

Wirings of one and the same network, at the same draws, in turns: none (no communication), stock DDP with
find_unused_parameters, DDP around every branch, composable `replicate` on every branch, and
`residrop.engines.distributed.data_parallel`. Gradients of all must agree to 1e-6 before anything is timed.
"""

import argparse
import itertools
import statistics
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._composable.replicate import replicate
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import residrop
from residrop.engines.distributed import data_parallel
from residrop.research import ledger


class Traffic(TorchDispatchMode):
    """Counts the collectives started inside, and the bytes of their largest buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.collectives = self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if str(func).startswith("c10d."):
            sizes = [sum(t.nbytes for t in tree_leaves(arg) if isinstance(t, Tensor)) for arg in args]
            self.collectives, self.bytes = self.collectives + 1, self.bytes + max(sizes)
        return func(*args, **(kwargs or {}))


def resnet() -> tuple[nn.Module, Tensor]:
    model = residrop.create("resnet-56", rule="stochastic-depth", survival=0.5, seed=1)
    return model.to(memory_format=torch.channels_last), torch.randn(16, 3, 32, 32)


def mlp() -> tuple[nn.Module, Tensor]:
    """16 blocks of 1.6 million parameters on 8 rows: communication is most of a step."""
    torch.manual_seed(0)
    blocks = [
        residrop.Residual(
            nn.Sequential(nn.LayerNorm(768), nn.Linear(768, 1024), nn.ReLU(), nn.Linear(1024, 768)),
            rule=residrop.StochasticDepth(0.5),
        )
        for _ in range(16)
    ]
    model = nn.Sequential(nn.Linear(768, 768), *blocks, nn.Linear(768, 10))
    residrop.attach(model, seed=1)
    return model, torch.randn(8, 768)


def blocks_of(model: nn.Module) -> list[residrop.Residual]:
    return [module for module in model.modules() if isinstance(module, residrop.Residual)]


def unused(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model, find_unused_parameters=True)


def branch_ddp(model: nn.Module) -> nn.Module:
    for block in blocks_of(model):
        block.branch = DistributedDataParallel(block.branch)
    inside = {parameter for block in blocks_of(model) for parameter in block.branch.parameters()}
    ignored = [name for name, parameter in model.named_parameters() if parameter in inside]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ignored)
    return DistributedDataParallel(model)


def branch_replicate(model: nn.Module) -> nn.Module:
    for block in blocks_of(model):
        replicate(block.branch)
    return replicate(model, ignored_modules=[block.branch for block in blocks_of(model)])


def ours(model: nn.Module) -> nn.Module:
    data_parallel(model)
    return model


WIRINGS = {
    "none": lambda model: model,
    "find_unused_parameters": unused,
    "ddp_per_branch": branch_ddp,
    "replicate_per_branch": branch_replicate,
    "data_parallel": ours,
}
NETWORKS = {"resnet-56": resnet, "mlp-16": mlp}


def step(model: nn.Module, x: Tensor) -> list[Tensor | None]:
    for parameter in model.parameters():
        parameter.grad = None
    model(x).square().mean().backward()
    return [parameter.grad for parameter in model.parameters()]


def agree(grads: dict[str, list[Tensor | None]]) -> None:
    """Every wiring has the same gradients, and none where the block was dead."""
    for name, mine in grads.items():
        for one, other in zip(grads["find_unused_parameters"], mine, strict=True):
            if (one is None) != (other is None) or (one is not None and float((one - other).abs().max()) > 1e-6):
                raise SystemExit(f"{name} has other gradients than find_unused_parameters")


def measure(network: str, steps: int) -> list[dict[str, object]]:
    _, x = NETWORKS[network]()
    x = torch.randn(x.shape, generator=torch.Generator().manual_seed(dist.get_rank()))
    models = {name: wire(NETWORKS[network]()[0]) for name, wire in WIRINGS.items()}
    sampler = residrop.sampler_of(models["none"])
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for number in range(-3, steps):  # the first three are checked
        grads = {}
        for name, model in models.items():
            with residrop.using(model, sampler.plan(abs(number))):
                dist.barrier()
                started = time.perf_counter()
                grads[name] = step(model, x)
                seconds[name].append(time.perf_counter() - started)
        if number < 0:
            agree({name: each for name, each in grads.items() if name != "none"})
            seconds = {name: [] for name in models}
    traffic = {name: Traffic() for name in models}
    for name, model in models.items():  # by itself: counting slows every operation
        for number in range(steps):
            with residrop.using(model, sampler.plan(number)), traffic[name]:
                step(model, x)
    found = []
    for name, times in seconds.items():
        ratios = [mine / base for mine, base in zip(times, seconds["none"], strict=True)]
        found.append(
            {
                "network": network,
                "wiring": name,
                "processes": dist.get_world_size(),
                "steps": steps,
                "collectives": traffic[name].collectives / steps,
                "bytes": traffic[name].bytes / steps,
                "seconds": statistics.median(times),
                "relative_to_none": statistics.median(ratios),
                "parameter_bytes": sum(p.nbytes for p in models["none"].parameters()),
            }
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    rows = list(itertools.chain.from_iterable(measure(network, arguments.steps) for network in NETWORKS))
    if dist.get_rank() == 0:
        for row in rows:
            print(
                f"{row['network']:10} {row['wiring']:23} {row['collectives']:5.1f} collectives "
                f"{row['bytes'] / 2**20:7.2f} MiB {1000 * row['seconds']:7.1f} ms {row['relative_to_none']:5.2f}x"
            )
        if arguments.json:
            command = (
                f"torchrun --nproc-per-node {dist.get_world_size()} benchmarks/wirings.py --steps {arguments.steps}"
            )
            ledger.save(arguments.json, "Data-parallel wirings", command, rows)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
