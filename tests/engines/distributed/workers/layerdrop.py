"""Layer drop of transformers under engines: what its own does, and what rules in its place do."""

import sys
from datetime import timedelta
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from transformers import Wav2Vec2Config, Wav2Vec2Model

import residrop
from common import Traffic, everywhere, plain_names, run, share, whole
from residrop.engines.distributed import check_ranks

LAYERS, ROWS = 4, 4


def speech(layerdrop):
    """A wav2vec 2.0 of four layers whose only randomness is layer drop; equal on all ranks."""
    torch.manual_seed(0)
    nothing = dict.fromkeys(
        ("hidden_dropout", "attention_dropout", "activation_dropout", "feat_proj_dropout", "mask_time_prob"), 0.0
    )
    small = {"hidden_size": 16, "num_hidden_layers": LAYERS, "num_attention_heads": 2, "intermediate_size": 32}
    convolutions = {"conv_dim": (8,), "conv_kernel": (10,), "conv_stride": (10,), "num_feat_extract_layers": 1}
    positions = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
    config = Wav2Vec2Config(**small, **convolutions, **positions, **nothing, layerdrop=layerdrop)
    model = Wav2Vec2Model(config).train()
    for parameter in model.parameters():  # layers that matter
        nn.init.normal_(parameter, 1.0 if parameter.ndim == 1 else 0.0, 0.15)
    return model


def batch(step):
    return torch.randn(ROWS, 400, generator=torch.Generator().manual_seed(step))


def loss_of(model, x):
    return model(x).last_hidden_state.square().mean()


def shard_layers(model):
    for layer in model.encoder.layers:
        fully_shard(layer)
    return model


def shard_all(model):
    return fully_shard(shard_layers(model))


def shard_all_once(model):
    """FSDP as it was before `fully_shard`."""
    layer = type(model.encoder.layers[0])
    policy = ModuleWrapPolicy({layer})
    return FullyShardedDataParallel(model, auto_wrap_policy=policy, use_orig_params=True, device_id=torch.device("cpu"))


def applied_per_step(wrap, steps=8):
    """How many layers transformers applies in a step at layer drop 0.5, and whether that changes anything."""
    model = speech(0.5)
    layers = list(model.encoder.layers)
    calls = []
    for layer in layers:
        layer.register_forward_hook(lambda *_: calls.append(1))
    model, without = wrap(model), speech(0.0)
    counts, same = [], True
    torch.manual_seed(dist.get_rank())  # its coins
    for step in range(steps):
        calls.clear()
        x = share(batch(step))
        out = model(x).last_hidden_state
        counts.append(len(calls))
        same &= bool(torch.allclose(out, without(x).last_hidden_state, atol=1e-6))
        out.square().mean().backward()
    return {"applied": counts, "same_as_without": min(everywhere(same))}


def followed(wrap, steps=20, only=""):
    """Rules in the place of layer drop against one process: gradients, and the collectives of every step."""
    plain = speech(0.5)
    residrop.apply(plain, survival="from_model", seed=3)
    model = speech(0.5)
    residrop.apply(model, survival="from_model", seed=3)
    model = wrap(model)
    check_ranks(model)
    torch.manual_seed(dist.get_rank())
    found = {"error": 0.0, "one_sided": 0, "live": [], "collectives": [], "reduced": []}
    for _ in range(8):  # a layer that is absent at its first call is run once to see what it returns
        loss_of(model, share(batch(0))).backward()
        loss_of(plain, batch(0)).backward()
    for step in range(steps):
        x = batch(step)
        plain.zero_grad()
        model.zero_grad()
        loss_of(plain, x).backward()
        with Traffic() as traffic:
            loss_of(model, share(x)).backward()
        ours = plain_names(model)
        for name, parameter in plain.named_parameters():
            if only not in name:
                continue
            grad = ours[name].grad
            found["one_sided"] += (grad is None) != (parameter.grad is None)
            if grad is not None and parameter.grad is not None:
                found["error"] = max(found["error"], float((whole(grad) - parameter.grad).abs().max()))
        live = [any(one.grad is not None for one in layer.parameters()) for layer in plain.encoder.layers]
        found["live"].append(sum(live))
        found["collectives"].append(traffic.collectives)
        found["reduced"].append(sum("reduce_scatter" in name for name in traffic.names))
    found["steps_equal"] = len(set(everywhere(residrop.sampler_of(model).step))) == 1
    return found


def apart():
    """Layers sharded, the model around them not: transformers takes its loop for unsharded, and every rank skips layers
    of its own. One waits for the other until the time-out of the process group."""
    model = shard_layers(speech(0.5))
    torch.manual_seed(dist.get_rank())
    for step in range(8):
        loss_of(model, share(batch(step))).backward()
        print("finished step", step, flush=True)
    return {}


def crossed():
    """The same with as many live layers on both ranks, but others: what is gathered is not the layer that was meant."""
    model, plain = shard_layers(speech(0.5)), speech(0.5)
    mine = [[0.1, 0.9, 0.9, 0.9], [0.9, 0.1, 0.9, 0.9]][1 - dist.get_rank()]
    outputs = []
    for one in (model, plain):
        coins = iter(mine)
        with mock.patch("torch.rand", lambda size, coins=coins: torch.tensor(next(coins))):
            outputs.append(one(share(batch(0))).last_hidden_state.detach())
    return {"off": max(everywhere(float((outputs[0] - outputs[1]).abs().max())))}


CHECKS = {
    "theirs": lambda: applied_per_step(shard_all),
    "theirs_fsdp1": lambda: applied_per_step(shard_all_once),
    "theirs_alone": lambda: applied_per_step(lambda model: model),
    "ours": lambda: followed(shard_all),
    "together": lambda: followed(shard_layers, only="encoder.layers."),
    "crossed": crossed,
    "apart": apart,
}

if __name__ == "__main__":
    if sys.argv[2:] == ["apart"]:
        dist.init_process_group("gloo", timeout=timedelta(seconds=10))
        apart()
    else:
        run(CHECKS)
