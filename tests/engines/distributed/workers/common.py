"""What the worker scripts share: small networks without batch norm, the single-process reference, counted traffic."""

import json
import os
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import residrop
from residrop.blocks.attach import rules_of, sampler_of
from residrop.engines.distributed import data_parallel

ROWS, WIDTH, CLASSES = 8, 16, 5


class Tokens(nn.Module):
    """Stem, residual blocks, head; every third block's shortcut has parameters."""

    def __init__(
        self,
        depth=8,
        *,
        survival=0.5,
        checkpointing="",
        tied=False,
        norm=nn.LayerNorm,
        every=3,
        rule=residrop.StochasticDepth,
        **options,
    ):
        super().__init__()
        self.stem = nn.Linear(WIDTH, WIDTH)
        branches = [
            nn.Sequential(norm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))
            for _ in range(depth)
        ]
        rates = survival if isinstance(survival, list) else [survival] * depth
        if tied:
            branches[-1] = branches[0]
        self.blocks = nn.ModuleList(
            residrop.Residual(
                branch,
                nn.Linear(WIDTH, WIDTH) if every and number % every == 1 else None,
                rule(rates[number], **options),
            )
            for number, branch in enumerate(branches)
        )
        self.head = nn.Linear(WIDTH, CLASSES)
        self.checkpointing = checkpointing

    def forward(self, x):
        x = self.stem(x)
        for module in (*self.blocks, self.head):
            if self.checkpointing:
                x = checkpoint(module, x, use_reentrant=self.checkpointing == "reentrant")
            else:
                x = module(x)
        return x


def network(seed=3, **options):
    torch.manual_seed(0)
    model = Tokens(**options)
    residrop.attach(model, seed=seed)
    return model


def batch(number, rows=ROWS):
    generator = torch.Generator().manual_seed(number)
    return torch.randn(rows, WIDTH, generator=generator), torch.randint(CLASSES, (rows,), generator=generator)


def share(x, rank=None):
    rank = dist.get_rank() if rank is None else rank
    return x.chunk(dist.get_world_size())[rank]


def optimizer_of(model):
    return torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=1e-3)


def plain_names(model):
    """Parameters by the names of the unwrapped model."""
    found = {}
    for name, parameter in model.named_parameters():
        found[name.removeprefix("module.").replace("_checkpoint_wrapped_module.", "").removeprefix("_orig_mod.")] = (
            parameter
        )
    return found


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def distance(one, other):
    """Largest difference; of a sharded tensor, between this rank's shard and its part of the whole `other`."""
    one, other = one.detach(), other.detach()
    if hasattr(one, "to_local"):
        one, parts = one.to_local(), other.chunk(dist.get_world_size())
        if one.numel() == 0:
            return 0.0
        other = parts[dist.get_rank()]
    return float((one - other).abs().max())


def untouched(model):
    """Draws per rank without the row that keeps a branch in step which is absent here and present elsewhere."""
    for rule in rules_of(model):
        rule.may_live_on_other_ranks = lambda: False
    return model


def loss_backward(model, x, y, weight=1.0):
    (weight * F.cross_entropy(model(x).float(), y)).backward()


def reference_backward(model, x, y, backward=loss_backward):
    """One process, the whole batch; if draws or rows are each rank's own, every rank's part under that rank's draws."""
    if all(rule.scope == "shared" and rule.granularity == "block" for rule in rules_of(model)):
        backward(model, x, y)
        return
    sampler, world = sampler_of(model), dist.get_world_size()
    for rank in range(world):
        sampler.rank = rank
        with residrop.using(model, sampler.plan()):
            loss_backward(model, share(x, rank), share(y, rank), 1.0 / world)
    sampler.step += 1


def differences(model, plain, found):
    """Record how far gradients are from the reference, and how many exist on one side only."""
    ours = plain_names(model)
    for name, parameter in plain.named_parameters():
        grad = ours[name].grad
        if (grad is None) != (parameter.grad is None):
            found["one_sided"] += 1
        expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        grad = torch.zeros_like(ours[name]) if grad is None else grad
        found["grad_error"] = max(found["grad_error"], distance(grad, expected))


def follow(wrap, steps=50, *, micro=1, backward=loss_backward, rows=ROWS, fill=False, **options):
    """Train `steps` updates distributed and in one process, on the same draws; returns what differs and what was sent.

    `wrap(model)` makes it distributed and returns (module to call, handle or None). With `fill`, missing gradients are
    zeros for both optimizers: where a branch is touched on all ranks it has zeros, in one process none.
    """
    torch.set_num_threads(1)
    plain = untouched(network(**{**options, "checkpointing": ""}))
    model, handle = wrap(network(**options))
    optimizers = optimizer_of(plain), optimizer_of(model)
    found = {"one_sided": 0, "grad_error": 0.0, "dead": 0, "live_bytes": 0, "collectives": 0, "bytes": 0}
    for step in range(steps):
        for one in optimizers:
            one.zero_grad()
        for part in range(micro):
            x, y = batch(step * micro + part, rows)
            reference_backward(plain, x, y, backward)
            quiet = handle.no_sync() if part + 1 < micro else nullcontext()
            with quiet, Traffic() as traffic:
                backward(model, share(x), share(y))
            found["collectives"] += traffic.collectives
            found["bytes"] += traffic.bytes
        differences(model, plain, found)
        grads = [parameter.grad for parameter in plain.parameters()]
        found["dead"] += sum(grad is None for grad in grads)
        found["live_bytes"] += sum(4 * grad.numel() for grad in grads if grad is not None)
        if fill:
            for parameter in (*plain.parameters(), *model.parameters()):
                parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for one in optimizers:
            one.step()
    ours = plain_names(model)
    found["error"] = max(distance(ours[name], parameter) for name, parameter in plain.named_parameters())
    for key in ("error", "grad_error", "one_sided"):
        found[key] = max(everywhere(found[key]))
    found["parameters"] = sum(1 for _ in plain.parameters())
    return found


def ours(model, **options):
    return model, data_parallel(model, **options)


class Traffic(TorchDispatchMode):
    """Counts collectives and the bytes of their largest buffer, wherever they are started from."""

    def __init__(self):
        super().__init__()
        self.collectives = self.bytes = 0
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if str(func).startswith("c10d."):
            sizes = [sum(t.nbytes for t in tree_leaves(arg) if isinstance(t, torch.Tensor)) for arg in args]
            self.collectives += 1
            self.bytes += max(sizes)
            self.names.append(str(func).split(".")[1].strip("_"))
        return func(*args, **(kwargs or {}))


def everywhere(value):
    """The values of all ranks, as a list by rank."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def run(checks):
    """Run named checks in a process group of their own; rank 0 writes what they return as JSON."""
    dist.init_process_group("gloo")
    chosen = sys.argv[2:] or list(checks)
    results = {}
    for name in chosen:
        started = time.perf_counter()
        results[name] = checks[name]()
        if dist.get_rank() == 0:
            print(f"{name}: {time.perf_counter() - started:.1f} s", flush=True)
    if dist.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()
    # without Python's own end: threads that gloo leaves behind now and then abort it (pytorch/pytorch#190489)
    sys.stdout.flush()
    os._exit(0)
