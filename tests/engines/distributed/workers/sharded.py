"""FSDP2 against one process: what is gathered and reduced, prefetching, mixed precision, checkpoints."""

import sys
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn import functional as F

import residrop
from common import (
    ROWS,
    WIDTH,
    Traffic,
    batch,
    everywhere,
    follow,
    loss_backward,
    network,
    run,
    share,
    whole,
)
from residrop import BackwardDepth
from residrop.blocks.attach import sampler_of
from residrop.common.errors import ConfigError, RankError
from residrop.engines.distributed import check_ranks, complete_state, data_parallel, prefetch


def sharded(*, target="block", lists="none", wrapper=False, **options):
    """A function that shards a network per block (or branch), with prefetch lists: none, fixed ones, or `prefetch`."""

    def wrap(model):
        if wrapper:
            for number, block in enumerate(model.blocks):
                model.blocks[number] = checkpoint_wrapper(block)
        units = [block.branch if target == "branch" else block for block in model.blocks]
        for unit in units:
            fully_shard(unit, **options)
        fully_shard(model, **options)
        if lists == "fixed":
            for one, other in pairwise(units):
                one.set_modules_to_forward_prefetch([other])
                other.set_modules_to_backward_prefetch([one])
        if lists in ("live", "two"):
            ahead = 2 if lists == "two" else 1
            prefetch(model, model.blocks, forward=ahead, backward=ahead)
        check_ranks(model)
        return model, None

    return wrap


def traffic_of_plans(rule=residrop.StochasticDepth, **options):
    """Collectives and bytes of one training step by the number of live blocks; the blocks are all alike."""
    model, _ = sharded(**options)(network(every=0, rule=rule))
    x, y = batch(0)
    found = {}
    for live in (8, 0, 1, 4, 8):  # the first one initialises
        plan = residrop.Plan.of([number < live for number in range(8)])
        with residrop.using(model, plan), Traffic() as traffic:
            loss_backward(model, share(x), share(y))
        found[live] = [traffic.collectives, traffic.bytes, traffic.names.count("reduce_scatter_base")]
    return found


def mixed_precision(steps):
    """bf16 parameters and activations, fp32 reduction: near the fp32 reference."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    return follow(sharded(mp_policy=policy), steps, depth=DEPTH)


def dtypes():
    """A block gives the same dtype dead or alive, also when it is sharded alone and dead in its first forward."""
    found = []
    for output_dtype in (None, torch.float32, torch.float64):
        model = network()
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, output_dtype=output_dtype)
        for number in (0, 1):  # without and with parameters in the shortcut
            block = fully_shard(model.blocks[number], mp_policy=policy)
            for alive in (False, True):
                with residrop.using(model, residrop.Plan.of([alive] * 8)):
                    found.append(str(block(torch.zeros(2, WIDTH)).dtype))
    return found


def accumulated(model, x, y):
    """Two micro-batches, reduced once; a block may be live in the first and dead in the second."""
    half = len(x) // 2
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(False)
    loss_backward(model, x[:half], y[:half], 0.5)
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(True)
    loss_backward(model, x[half:], y[half:], 0.5)


def accumulation(steps):
    """The reference takes the same halves of every rank's part."""

    def both(model, x, y):
        if isinstance(model, FSDPModule):
            accumulated(model, x, y)
            return
        shares = torch.arange(ROWS).chunk(dist.get_world_size())
        halves = [rows[: len(rows) // 2] for rows in shares] + [rows[len(rows) // 2 :] for rows in shares]
        accumulated(model, x[torch.cat(halves)], y[torch.cat(halves)])

    return follow(sharded(), steps, depth=DEPTH, backward=both)


def train_some(model, optimizer, steps, shared=True):
    losses = []
    for step in steps:
        x, y = batch(step)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(share(x) if shared else x), share(y) if shared else y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def state_of(model, optimizer):
    weights, moments = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": moments, "sampler": sampler_of(model)}


def adam_of(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-3)


def start():
    """Blocks of a low survival rate: after a few steps some have not lived yet."""
    return sharded()(network(survival=[0.9, 0.9, 0.9, 0.05, 0.9, 0.05, 0.9, 0.05]))[0]


def saved():
    """Train, save, go on; what comes after the save is for whoever loads it to repeat."""
    model = start()
    optimizer = adam_of(model)
    complete_state(optimizer)
    train_some(model, optimizer, range(4))
    steps = [state["step"] for state in optimizer.state.values()]
    dcp.save(state_of(model, optimizer), checkpoint_id=Path(sys.argv[1]).parent / "checkpoint")
    train_some(model, optimizer, range(4, 12))
    return {
        "step": sampler_of(model).step,
        "weights": weights(model),
        "never_lived": sum(int(step) == 0 for step in steps),
    }


def loaded():
    """Load what `saved` wrote, on any number of ranks, into another network, and go on."""
    model = start()
    sampler_of(model).load_state_dict({"seed": 99, "step": 77})
    optimizer = adam_of(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    complete_state(optimizer)
    state = state_of(model, optimizer)
    dcp.load(state, checkpoint_id=Path(sys.argv[1]).parent / "checkpoint")
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    check_ranks(model)
    train_some(model, optimizer, range(4, 12))
    found = {"step": sampler_of(model).step, "weights": weights(model)}
    lazy = start()
    train_some(lazy, adam_of(lazy), range(12))
    return {**found, "completed_equals_lazy": weights(lazy) == found["weights"]}


def weights(model):
    return {name: whole(parameter).tolist() for name, parameter in model.named_parameters()}


def refusals():
    model, _ = sharded()(network())
    plain = network()
    found = {}
    for name, call in {
        "data_parallel": lambda: data_parallel(model),
        "unsharded": lambda: prefetch(plain, plain.blocks),
        "negative": lambda: prefetch(model, model.blocks, forward=-1),
        "dampening": lambda: complete_state(torch.optim.SGD(plain.parameters(), 0.1, momentum=0.9, dampening=0.5)),
    }.items():
        try:
            call()
        except ConfigError as error:
            found[name] = str(error)
    other = sharded_network_with_seed(dist.get_rank())
    found["seed"] = everywhere(other)
    return found


def sharded_network_with_seed(seed):
    try:
        sharded()(network(seed=seed))
    except RankError as error:
        return str(error)
    return ""


DEPTH = 5
GRID = {
    "block": lambda steps: follow(sharded(), steps, depth=DEPTH),
    "branch": lambda steps: follow(sharded(target="branch"), steps, depth=DEPTH),
    "kept": lambda steps: follow(sharded(reshard_after_forward=False), steps, depth=DEPTH),
    "fixed": lambda steps: follow(sharded(lists="fixed"), steps, depth=DEPTH),
    "live": lambda steps: follow(sharded(lists="live"), steps, depth=DEPTH),
    "live_kept": lambda steps: follow(sharded(lists="two", reshard_after_forward=False), steps, depth=DEPTH),
    "wrapped": lambda steps: follow(sharded(lists="live", wrapper=True), steps, depth=DEPTH),
    "checkpointed": lambda steps: follow(sharded(lists="live"), steps, depth=DEPTH, checkpointing="plain"),
    "rows": lambda steps: follow(sharded(), steps, depth=DEPTH, granularity="row", scope="shared"),
    "own_rows": lambda steps: follow(
        sharded(), steps, depth=DEPTH, rows=dist.get_world_size(), fill=True, granularity="row", survival=0.4
    ),
    "own_blocks": lambda steps: follow(sharded(), steps, depth=DEPTH, fill=True, scope="per_rank"),
    "backward": lambda steps: follow(sharded(), steps, depth=DEPTH, rule=BackwardDepth, rescale="train"),
    "backward_checkpointed": lambda steps: follow(
        sharded(), steps, depth=DEPTH, rule=BackwardDepth, checkpointing="plain"
    ),
    "backward_rows": lambda steps: follow(
        sharded(), steps, depth=DEPTH, rule=BackwardDepth, granularity="row", scope="shared"
    ),
    "backward_own_blocks": lambda steps: follow(
        sharded(), steps, depth=DEPTH, fill=True, rule=BackwardDepth, scope="per_rank"
    ),
    "precision": lambda steps: mixed_precision(steps),
    "accumulation": lambda steps: accumulation(steps),
}
LONG = ("block", "live_kept")  # of the quick run; the slow one takes 50 steps of each
CHECKS = {
    **{name: partial(check, 50 if name in LONG else 10) for name, check in GRID.items()},
    **{f"{name}_50": partial(check, 50) for name, check in GRID.items()},
    "dtypes": dtypes,
    "traffic": traffic_of_plans,
    "traffic_kept": lambda: traffic_of_plans(reshard_after_forward=False),
    "traffic_branch": lambda: traffic_of_plans(target="branch"),
    "traffic_live": lambda: traffic_of_plans(lists="live"),
    "traffic_fixed": lambda: traffic_of_plans(lists="fixed"),
    "traffic_wrapped": lambda: traffic_of_plans(lists="live", wrapper=True),
    "traffic_backward": lambda: traffic_of_plans(rule=BackwardDepth),
    "saved": saved,
    "loaded": loaded,
    "refusals": refusals,
    "soak": lambda: follow(sharded(lists="live"), 500, survival=0.3),
}

if __name__ == "__main__":
    run(CHECKS)
