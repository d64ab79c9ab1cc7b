"""Data-parallel gradients against one process: ours and stock DistributedDataParallel."""

import copy
from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

import residrop
from common import (
    CLASSES,
    WIDTH,
    Traffic,
    batch,
    everywhere,
    follow,
    network,
    optimizer_of,
    ours,
    run,
    share,
    untouched,
)
from residrop import BackwardDepth
from residrop.blocks.attach import sampler_of
from residrop.common.errors import RankError, UsageError
from residrop.engines.distributed import check_ranks, data_parallel


def stock(model):
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    return wrapped, wrapped


def several_buckets(model):
    return ours(model, bucket_mb=0.004)


def compiled(model):
    """Compiled as a whole, with the hooks inside."""
    handle = data_parallel(model)
    return torch.compile(model, backend="eager"), handle


def two_forwards(model, x, y):
    """Two draws in one backward: what either used is sent."""
    (0.5 * F.cross_entropy(model(x), y) + 0.5 * F.cross_entropy(model(x), y)).backward()


def tied_and_reentrant():
    """A weight that gets its gradient in two parts, in two nested backward passes."""
    return follow(several_buckets, 20, tied=True, checkpointing="reentrant", survival=0.7, every=0)


def late_backward(quiet):
    """Forward a, forward b, backward a, forward c, backward b + c: gradients of b come when only c is expected.

    With `quiet`, backward b is a backward of its own under `no_sync`.
    """
    found = []
    for make in (lambda model: None, data_parallel):
        model = network(survival=0.4)
        handle = make(model)
        x, y = batch(0)
        if handle is not None:
            x, y = share(x), share(y)
        plans = [sampler_of(model).plan(step) for step in range(3)]
        losses = []
        for number, plan in enumerate(plans):
            with residrop.using(model, plan):
                losses.append(F.cross_entropy(model(x), y))
            if number == 1:
                losses[0].backward()
        if quiet:
            with handle.no_sync() if handle is not None else nullcontext():
                losses[1].backward()
            losses[2].backward()
        else:
            (losses[1] + losses[2]).backward()
        found.append([parameter.grad for parameter in model.parameters()])
    return {
        "one_sided": sum((a is None) != (b is None) for a, b in zip(*found, strict=True)),
        "dead": sum(a is None for a in found[0]),
        "grad_error": max(float((a - b).abs().max()) for a, b in zip(*found, strict=True) if a is not None),
    }


def unused():
    """A head that no rank uses keeps no gradient; one that a single rank uses gets its share of the mean."""
    model = network()
    model.never, model.once = nn.Linear(WIDTH, CLASSES), nn.Linear(WIDTH, CLASSES)
    data_parallel(model)
    x, _ = batch(0)
    out = model(share(x)).sum()
    if dist.get_rank() == 1:
        out = out + model.once(share(x)).sum()
    out.backward()
    mine = model.once.weight.grad
    single = share(x, 1).sum(0).expand(CLASSES, -1) / dist.get_world_size()
    return {"never": model.never.weight.grad is None, "error": float((mine - single).abs().max())}


def plans_that_differ(sampler):
    """One plan, and another in which a block is present that is absent in the first, and the other way round."""
    first = sampler.plan(0)
    coins = [draw.alive for draw in first.draws]
    for step in range(1, 200):
        plan = sampler.plan(step)
        pairs = set(zip(coins, (draw.alive for draw in plan.draws), strict=True))
        if {(True, False), (False, True)} <= pairs:
            return first, plan
    raise AssertionError("no such plan in 200 steps")


def join():
    """A rank without data takes part; the others' mean counts it as zero."""
    model = network()
    handle = data_parallel(model)
    x, y = batch(0)
    first, plan = plans_that_differ(sampler_of(model))
    with residrop.using(model, first):  # a step of all ranks before, whose draw must not be taken for that of the next
        F.cross_entropy(model(x), y).backward()
    model.zero_grad()
    with residrop.using(model, plan):
        if dist.get_rank() == 0:
            F.cross_entropy(model(x), y).backward()
        else:
            handle.join()
    grads = [parameter.grad for parameter in model.parameters()]
    plain = network()
    with residrop.using(plain, plan):
        F.cross_entropy(plain(x), y).backward()
    world = dist.get_world_size()
    pairs = list(zip(grads, plain.parameters(), strict=True))
    return {
        "one_sided": everywhere(sum((grad is None) != (p.grad is None) for grad, p in pairs)),
        "error": everywhere(max(float((g * world - p.grad).abs().max()) for g, p in pairs if p.grad is not None)),
    }


def conv_network():
    torch.manual_seed(0)
    model = residrop.create("resnet-8", rule="stochastic-depth", survival=0.5, seed=1)
    return model.to(memory_format=torch.channels_last)


def buffers():
    """Batch norm statistics of rank 0 equal those under DistributedDataParallel, and one copy gives them to all."""
    mine, wrapped = conv_network(), DistributedDataParallel(conv_network(), find_unused_parameters=True)
    handle = data_parallel(mine)
    generator = torch.Generator().manual_seed(dist.get_rank())
    for _ in range(6):
        x = torch.randn(4, 3, 16, 16, generator=generator).contiguous(memory_format=torch.channels_last)
        for model in (mine, wrapped):
            model.zero_grad()
            model(x).square().mean().backward()
    strides = all(p.grad is None or p.grad.stride() == p.stride() for p in mine.parameters())
    grads = all(
        (p.grad is None) == (q.grad is None) and (p.grad is None or torch.equal(p.grad, q.grad))
        for p, q in zip(mine.parameters(), wrapped.module.parameters(), strict=True)
    )
    same = all(torch.equal(a, b) for a, b in zip(mine.buffers(), wrapped.module.buffers(), strict=True))
    before = everywhere([buffer.tolist() for name, buffer in mine.named_buffers() if name.endswith("running_mean")])
    handle.sync_buffers()
    after = everywhere([buffer.tolist() for name, buffer in mine.named_buffers() if name.endswith("running_mean")])
    return {
        "rank0_as_stock": everywhere(same)[0],
        "grads_as_stock": everywhere(grads),
        "strides": everywhere(strides),
        "differ_before": before[0] != before[1],
        "equal_after": after[0] == after[1],
    }


def the_model_stays():
    """Class, keys and forward are unchanged; copies and averages of the model have no hooks; a second call replaces."""
    model, plain = network(), network()
    if dist.get_rank() == 1:  # rank 0's values count
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1.0)
    data_parallel(model)
    handle = data_parallel(model)
    started = everywhere(all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True)))
    copied, averaged = copy.deepcopy(model), AveragedModel(model)
    x, y = batch(0)
    x, y = share(x), share(y)
    with Traffic() as silent:
        for one in (copied, averaged.module):
            F.cross_entropy(one.train()(x), y).backward()
    with Traffic() as once:
        F.cross_entropy(model(x), y).backward()
    with Traffic() as evaluated, torch.no_grad():
        model.eval()(x)
    optimizer_of(model).step()
    handle.remove()
    with Traffic() as removed:
        F.cross_entropy(model.train()(x), y).backward()
    return {
        "class": type(model) is type(plain) and list(model.state_dict()) == list(plain.state_dict()),
        "started_as_rank0": started,
        "collectives": [one.collectives for one in (silent, once, evaluated, removed)],
        "counted": [handle.collectives, handle.bytes_sent == once.bytes, handle.bytes_skipped > 0],
    }


def stock_dead_parameters():
    """find_unused_parameters leaves the gradient of a parameter that is dead on all ranks alone: None stays None."""
    model = network()
    wrapped, _ = stock(model)
    plan = residrop.Plan.of([True, False] * 4)
    x, y = batch(0)
    with residrop.using(wrapped, plan), Traffic() as traffic:
        F.cross_entropy(wrapped(share(x)), share(y)).backward()
    dead = model.blocks[3].branch[1].weight
    none = dead.grad is None
    dead.grad = torch.full_like(dead, 7.0)
    with residrop.using(wrapped, plan):
        F.cross_entropy(wrapped(share(x)), share(y)).backward()
    return {
        "none": everywhere(none),
        "left_alone": everywhere(bool((dead.grad == 7.0).all())),
        "through_wrapper": sampler_of(wrapped) is sampler_of(model),
        "sent": traffic.bytes,
        "all_bytes": sum(4 * parameter.numel() for parameter in model.parameters()),
    }


def refusals():
    found = {}
    embedding = network()
    embedding.words = nn.Embedding(3, 4, sparse=True)
    for name, call in {
        "sparse": lambda: data_parallel(embedding),
        "bucket": lambda: data_parallel(network(), bucket_mb=0.0),
        "unattached": lambda: data_parallel(nn.Linear(2, 2)),
    }.items():
        try:
            call()
        except UsageError as error:
            found[name] = str(error)
    return found


def foreign():
    """timm's ViT under `residrop.apply`: each block has two branches, with coins of their own."""
    import timm

    def make():
        torch.manual_seed(0)
        model = timm.create_model(
            "vit_tiny_patch16_224", img_size=16, patch_size=8, num_classes=CLASSES, embed_dim=24, depth=4, num_heads=2
        )
        residrop.apply(model, survival=0.5, seed=1)
        return model

    plain, model = make(), make()
    data_parallel(model)
    found = {"error": 0.0, "one_sided": 0, "live_bytes": 0, "bytes": 0, "dead": 0}
    for step in range(10):
        x = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(step))
        for one in (plain, model):
            one.zero_grad()
        plain(x).square().mean().backward()
        with Traffic() as traffic:
            model(share(x)).square().mean().backward()
        found["bytes"] += traffic.bytes
        for expected, mine in zip(plain.parameters(), model.parameters(), strict=True):
            found["one_sided"] += (expected.grad is None) != (mine.grad is None)
            found["dead"] += expected.grad is None
            if expected.grad is not None and mine.grad is not None:
                found["live_bytes"] += 4 * expected.numel()
                found["error"] = max(found["error"], float((expected.grad - mine.grad).abs().max()))
    return found


def ours_untouched(model):
    return ours(untouched(model))


def mismatches():
    """What check_ranks says on every rank when the last rank has something else."""
    other = dist.get_rank() == dist.get_world_size() - 1
    found = {}

    def tell(name, model, call=check_ranks):
        try:
            call(model)
            text = ""
        except RankError as error:
            text = str(error)
        found[name] = everywhere(text)

    tell("nothing", network())
    tell("seed", network(seed=4 if other else 3))
    tell("seed_data_parallel", network(seed=4 if other else 3), data_parallel)
    tell("large_seed", network(seed=1 << 70 if other else 3))
    tell("rates", network(survival=0.6 if other else 0.5))
    tell("rules", network(rescale="train" if other else "test"))
    tell("parameters", network(every=4 if other else 3))
    timed = network()
    residrop.attach(timed, seed=3, timing="warmup(10)" if other else "constant")
    tell("timing", timed)
    residrop.attach(timed, seed=3, coupling="systematic" if other else "independent")
    tell("coupling", timed)
    stepped = network()
    wrapped = DistributedDataParallel(stepped, find_unused_parameters=True)
    if other:
        stepped(batch(0)[0])
    tell("step", wrapped)
    lonely = network(granularity="row")
    sampler_of(lonely).rank = 0
    tell("rank", lonely)
    data_parallel(lonely)
    found["ranks_after"] = everywhere(sampler_of(lonely).rank)
    with Traffic() as traffic:
        check_ranks(network())
    found["cost"] = [traffic.names, traffic.bytes // dist.get_world_size()]
    return found


EARLY = network(granularity="row", survival=0.5)  # before there is a process group


def early():
    """Keys of rows, by rank, for a model that was attached before its process knew its rank."""
    plan = sampler_of(EARLY).plan(0)
    check_ranks(EARLY)
    return everywhere(plan.draws[0].key % 2**32)


PER_RANK = {"granularity": "row", "survival": 0.4}
CHECKS = {
    "ours": lambda: follow(ours),
    "buckets": lambda: follow(several_buckets, 10),
    "stock": lambda: follow(stock),
    "rows": lambda: follow(ours, 20, granularity="row", scope="shared"),
    "accumulated": lambda: follow(ours, 25, micro=3),
    "stock_accumulated": lambda: follow(stock, 10, micro=3),
    "two_forwards": lambda: follow(ours, 5, backward=two_forwards),
    "compiled": lambda: follow(compiled, 10, depth=3),
    "checkpointed": lambda: follow(ours, checkpointing="plain"),
    "checkpointed_reentrant": lambda: follow(ours, checkpointing="reentrant"),
    "stock_checkpointed": lambda: follow(stock, checkpointing="plain"),
    "tied": tied_and_reentrant,
    "late": lambda: late_backward(False),
    "late_quiet": lambda: late_backward(True),
    "own_blocks": lambda: follow(ours, fill=True, scope="per_rank"),
    "own_rows": lambda: follow(ours, rows=dist.get_world_size(), fill=True, **PER_RANK),
    "own_rows_untouched": lambda: follow(ours_untouched, rows=dist.get_world_size(), **PER_RANK),
    "own_blocks_untouched": lambda: follow(ours_untouched, scope="per_rank"),
    "stock_own_rows": lambda: follow(stock, rows=dist.get_world_size(), fill=True, **PER_RANK),
    "backward": lambda: follow(ours, rule=BackwardDepth, rescale="train"),
    "stock_backward": lambda: follow(stock, 20, rule=BackwardDepth),
    "backward_checkpointed": lambda: follow(ours, 20, rule=BackwardDepth, checkpointing="reentrant"),
    "backward_accumulated": lambda: follow(ours, 15, micro=3, rule=BackwardDepth),
    "backward_rows": lambda: follow(ours, 20, rule=BackwardDepth, granularity="row", scope="shared"),
    "backward_own_blocks": lambda: follow(ours, 20, fill=True, rule=BackwardDepth, scope="per_rank"),
    "early": early,
    "unused": unused,
    "join": join,
    "buffers": buffers,
    "stays": the_model_stays,
    "stock_dead": stock_dead_parameters,
    "foreign": foreign,
    "refusals": refusals,
    "mismatches": mismatches,
    "soak": lambda: follow(ours, 500, survival=0.3),
    "stock_soak": lambda: follow(stock, 500, survival=0.3),
}

if __name__ == "__main__":
    run(CHECKS)
