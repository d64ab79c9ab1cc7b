"""nn.TransformerEncoderLayer and nn.TransformerDecoderLayer: their attentions and feed-forward parts are branches.

The reference is attention, layer norm and feed-forward part written out in float64, each branch times a factor of every
row: it calls nothing of torch's layers but reads their parameters.
"""

import copy
import itertools
import math
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from block_checks import RATE, ROWS, TRIALS, draw_of
from torch import Tensor, nn
from torch.nn.functional import gelu, linear, relu

import residrop
from residrop.common.errors import InactiveWarning, UsageError
from residrop.schedule.sampler import Plan

WIDTH, HEADS, TOKENS, SOURCE, DEPTH = 8, 2, 5, 6, 2
BRANCHES = {"encoder": 2, "decoder": 3}
Factors = Iterator[Tensor]  # of the branches in the order of their calls, each (rows, 1, 1)


def causal(tokens: int) -> Tensor:
    return torch.ones(tokens, tokens, dtype=torch.bool).triu(1)


def padding(tokens: int, dtype: torch.dtype) -> Tensor:
    """Another number of padded tokens in every row, as bools or as what is added to scores."""
    padded = torch.arange(tokens) >= torch.tensor([tokens, tokens - 1, tokens - 2, tokens - 1])[:, None]
    return padded if dtype == torch.bool else torch.zeros(ROWS, tokens, dtype=dtype).masked_fill(padded, -torch.inf)


MASKS: dict[str, dict[str, dict[str, Tensor]]] = {
    "encoder": {
        "no mask": {},
        "causal and padding": {"mask": causal(TOKENS), "src_key_padding_mask": padding(TOKENS, torch.bool)},
        "as numbers": {
            "mask": torch.linspace(-1, 1, TOKENS * TOKENS, dtype=torch.float64).view(TOKENS, TOKENS),
            "src_key_padding_mask": padding(TOKENS, torch.float64),
        },
    },
    "decoder": {
        "no mask": {},
        "causal and padding": {
            "tgt_mask": causal(TOKENS),
            "tgt_key_padding_mask": padding(TOKENS, torch.bool),
            "memory_key_padding_mask": padding(SOURCE, torch.bool),
        },
        "as numbers": {
            "memory_mask": torch.linspace(-1, 1, TOKENS * SOURCE, dtype=torch.float64).view(TOKENS, SOURCE),
            "memory_key_padding_mask": padding(SOURCE, torch.float64),
        },
    },
}
every_kind = pytest.mark.parametrize("kind", BRANCHES)
every_order = pytest.mark.parametrize("norm_first", [False, True], ids=["norm last", "norm first"])
every_mask = pytest.mark.parametrize("masks", MASKS["encoder"])


def built(kind: str, *, batch_first: bool = True, **options: Any) -> nn.Module:
    """A stack of layers in training mode, all parameters drawn."""
    torch.manual_seed(3)
    options = {"dropout": 0.0, "batch_first": batch_first, **options}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "enable_nested_tensor is True")  # of torch 2.9 where norms come first
        if kind == "encoder":
            model: nn.Module = nn.TransformerEncoder(nn.TransformerEncoderLayer(WIDTH, HEADS, 12, **options), DEPTH)
        else:
            model = nn.TransformerDecoder(nn.TransformerDecoderLayer(WIDTH, HEADS, 12, **options), DEPTH)
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0.1, 0.4)
    return model.double().train()


def inputs(kind: str) -> list[Tensor]:
    """The batch, rows first, and for a decoder what it looks up; wanting gradients."""
    torch.manual_seed(5)
    shapes = [(ROWS, TOKENS, WIDTH), (ROWS, SOURCE, WIDTH)][: 1 + (kind == "decoder")]
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


# The reference


def attention(own: nn.MultiheadAttention, x: Tensor, memory: Tensor, mask: Tensor | None, pad: Tensor | None) -> Tensor:
    bias = own.in_proj_bias if own.in_proj_bias is not None else torch.zeros(3 * WIDTH, dtype=torch.float64)
    projections = zip(own.in_proj_weight.chunk(3), bias.chunk(3), (x, memory, memory), strict=True)
    query, key, value = (linear(z, w, b).unflatten(-1, (HEADS, -1)).transpose(1, 2) for w, b, z in projections)
    scores = query @ key.transpose(-1, -2) / math.sqrt(WIDTH / HEADS)
    for hidden in (mask, None if pad is None else pad[:, None, None]):
        if hidden is not None:
            scores = scores.masked_fill(hidden, -torch.inf) if hidden.dtype == torch.bool else scores + hidden
    return linear((scores.softmax(-1) @ value).transpose(1, 2).flatten(2), own.out_proj.weight, own.out_proj.bias)


def norm(own: nn.LayerNorm, x: Tensor) -> Tensor:
    y = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + own.eps).sqrt() * own.weight
    return y if own.bias is None else y + own.bias


def reference(model: nn.Module, given: Sequence[Tensor], masks: dict[str, Tensor], factors: Factors) -> Tensor:
    """What the stack gives, batch first, if every branch is multiplied by its factor."""
    x, memory = (*given, None)[:2]
    own_mask = masks.get("mask", masks.get("tgt_mask"))
    own_padding = masks.get("src_key_padding_mask", masks.get("tgt_key_padding_mask"))
    others = masks.get("memory_mask"), masks.get("memory_key_padding_mask")
    for layer in model.layers:
        branches = [lambda z, layer=layer: attention(layer.self_attn, z, z, own_mask, own_padding)]
        if memory is not None:
            branches.append(lambda z, layer=layer: attention(layer.multihead_attn, z, memory, *others))
        activation = gelu if layer.activation is gelu else relu
        branches.append(
            lambda z, layer=layer, f=activation: linear(
                f(linear(z, layer.linear1.weight, layer.linear1.bias)), layer.linear2.weight, layer.linear2.bias
            )
        )
        norms = [layer.norm1, layer.norm2, *([layer.norm3] if memory is not None else [])]
        for branch, own in zip(branches, norms, strict=True):
            if layer.norm_first:
                x = x + next(factors) * branch(norm(own, x))
            else:
                x = norm(own, x + next(factors) * branch(x))
    return x


def same(factors: Sequence[float]) -> Factors:
    return (torch.full((ROWS, 1, 1), factor, dtype=torch.float64) for factor in factors)


def assert_same(model: nn.Module, factors: Factors, kind: str, masks: str, *, batch_first: bool = True) -> None:
    """Output and all gradients of the model are those of the reference; no gradient counts as one of 0."""
    given, hidden = inputs(kind), MASKS[kind][masks]
    wanted = reference(model, given, hidden, factors)
    found = model(*(x if batch_first else x.transpose(0, 1) for x in given), **hidden)
    found = found if batch_first else found.transpose(0, 1)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    weight = torch.linspace(-1, 2, wanted.numel(), dtype=torch.float64).view(wanted.shape)
    leaves = [*given, *model.parameters()]
    grads = []
    for out in (found, wanted):
        got = torch.autograd.grad((out * weight).sum(), leaves, allow_unused=True)
        grads.append([torch.zeros_like(x) if grad is None else grad for x, grad in zip(leaves, got, strict=True)])
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-9)


@every_mask
@every_order
@every_kind
@pytest.mark.parametrize("batch_first", [True, False])
def test_reference_is_the_plain_model_where_all_is_present(kind, norm_first, masks, batch_first):
    model = built(kind, norm_first=norm_first, batch_first=batch_first)
    assert_same(model, same([1.0] * DEPTH * BRANCHES[kind]), kind, masks, batch_first=batch_first)


# Block and row level


def cuts(kind: str) -> list[tuple[bool, ...]]:
    """All present, none, each absent alone, each present alone."""
    count = DEPTH * BRANCHES[kind]
    alone = [tuple(place == number for place in range(count)) for number in range(count)]
    return [(True,) * count, (False,) * count, *alone, *(tuple(not coin for coin in coins) for coins in alone)]


@every_mask
@every_order
@every_kind
@pytest.mark.parametrize("batch_first", [True, False])
def test_block_level(kind, norm_first, masks, batch_first):
    model = built(kind, norm_first=norm_first, batch_first=batch_first)
    report = residrop.apply(model, survival=RATE)
    assert [(entry.name, entry.rates) for entry in report.blocks] == [
        (f"layers.{number}", (RATE,) * BRANCHES[kind]) for number in range(DEPTH)
    ]
    for coins in cuts(kind) if batch_first else cuts(kind)[::4]:
        with residrop.using(model, Plan.of(coins)):
            assert_same(model, same([coin / RATE for coin in coins]), kind, masks, batch_first=batch_first)


@every_order
@every_kind
@pytest.mark.parametrize("options", [{"activation": gelu}, {"bias": False}, {"layer_norm_eps": 0.1}], ids=str)
def test_block_level_with_other_layers(kind, norm_first, options):
    model = built(kind, norm_first=norm_first, **options)
    residrop.apply(model, survival=RATE, rescale="test")
    for coins in cuts(kind)[::3]:
        with residrop.using(model, Plan.of(coins)):
            assert_same(model, same([float(coin) for coin in coins]), kind, "no mask")


def windows(branches: int) -> Iterator[tuple[Plan, Factors]]:
    """Draws of the rows of each branch, and these rows as factors."""
    starts = itertools.cycle(itertools.chain(*TRIALS))
    for _ in range(3):
        draws = [draw_of(*next(starts)) for _ in range(branches)]
        factors = []
        for draw in draws:
            rows, factor = draw.rows(ROWS), torch.zeros(ROWS, 1, 1, dtype=torch.float64)
            factor[[(rows.start + i) % ROWS for i in range(rows.live)]] = 1 / draw.rates[0]
            factors.append(factor)
        yield Plan(tuple(draws)), iter(factors)


@every_mask
@every_order
@every_kind
def test_row_level(kind, norm_first, masks):
    model = built(kind, norm_first=norm_first)
    residrop.apply(model, survival=RATE, granularity="row")
    for plan, factors in windows(DEPTH * BRANCHES[kind]):
        with residrop.using(model, plan):
            assert_same(model, factors, kind, masks)


@every_kind
@pytest.mark.parametrize("mask", ["mask of every head", "batch second"])
def test_rows_that_cannot_be_told_are_refused_or_right(kind, mask):
    """A mask of (rows times heads, tokens, tokens); tokens before rows."""
    first = mask != "batch second"
    model, given = built(kind, batch_first=first), [x if first else x.transpose(0, 1) for x in inputs(kind)]
    name = {"encoder": "mask", "decoder": "tgt_mask"}[kind]
    masks = {name: torch.rand(ROWS * HEADS, TOKENS, TOKENS, dtype=torch.float64)} if first else {}
    plain = copy.deepcopy(model)
    plan, factors = next(windows(DEPTH * BRANCHES[kind]))
    try:
        residrop.apply(model, survival=RATE, granularity="row")
        with residrop.using(model, plan):
            found = model(*given, **masks)
    except UsageError:
        return
    own = {name: mask.view(ROWS, HEADS, TOKENS, TOKENS) for name, mask in masks.items()}
    wanted = reference(plain, inputs(kind), own, factors)
    torch.testing.assert_close(found if first else found.transpose(0, 1), wanted)


@every_kind
def test_dropped_branches_are_not_called(kind):
    model = built(kind)
    residrop.apply(model, survival=0.5)
    called: list[str] = []
    for name, module in model.named_modules():
        if name.endswith(("self_attn", "multihead_attn", "linear1", "linear2")):
            module.register_forward_hook(lambda module, args, out, name=name: called.append(name))
    with residrop.using(model, Plan.of([False] * DEPTH * BRANCHES[kind])):
        model(*inputs(kind))
    assert called == []
    with residrop.using(model, Plan.of([False] * (DEPTH * BRANCHES[kind] - 1) + [True])):
        model(*inputs(kind))
    assert called == ["layers.1.linear1", "layers.1.linear2"]


# Modes


@every_order
@every_kind
def test_plain_to_the_last_bit_at_rate_1_in_eval_and_after_remove(kind, norm_first):
    model = built(kind, norm_first=norm_first, dropout=0.1).float()
    plain = copy.deepcopy(model)
    given = [x.detach().float() for x in inputs(kind)]

    def assert_equal() -> None:
        for training in (True, False):
            outs = []
            for one in (model, plain):
                torch.manual_seed(1)  # of the dropout
                outs.append(one.train(training)(*given))
            assert torch.equal(*outs)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", InactiveWarning)
        residrop.apply(model, survival=1.0)
    assert_equal()
    assert list(model.state_dict()) == list(plain.state_dict())
    residrop.remove(model)
    assert_equal()
    assert [type(one) for one in model.modules()] == [type(one) for one in plain.modules()]
    residrop.apply(model, survival=0.5)
    assert torch.equal(model.eval()(*given), plain.eval()(*given))


@pytest.fixture
def fast(monkeypatch) -> list[Tensor]:
    """What was given to torch's fused encoder layer."""
    own, given = torch._transformer_encoder_layer_fwd, []

    def seen(x: Tensor, *args: Any) -> Tensor:
        given.append(x)
        return own(x, *args)

    monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", seen)
    return given


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("padded", [False, True])
def test_fused_layers_stay_fused_in_eval(fast, padded):
    """With padding, rows of several lengths are one nested tensor."""
    plain = built("encoder").float().eval()
    model = copy.deepcopy(plain)
    residrop.apply(model, survival=0.5)
    (x,) = (x.detach().float() for x in inputs("encoder"))
    masks = {"src_key_padding_mask": padding(TOKENS, torch.bool)} if padded else {}
    with torch.no_grad():
        wanted = plain(x, **masks)
        assert len(fast) == DEPTH
        assert torch.equal(model(x, **masks), wanted)
    assert len(fast) == 2 * DEPTH
    assert all(one.is_nested == padded for one in fast)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("mode", ["expectation", "sampled"])
@pytest.mark.parametrize("padded", [False, True])
def test_fused_layers_do_not_pass_rules_by(mode, padded):
    """In eval without gradients the fused layer would be taken, which knows nothing of factors or absent branches."""
    model = built("encoder").eval()
    masks = "causal and padding" if padded else "no mask"
    hidden = {name: mask for name, mask in MASKS["encoder"][masks].items() if name != "mask"}
    (x,) = (x.detach() for x in inputs("encoder"))
    residrop.apply(model, survival=RATE, rescale="test" if mode == "expectation" else "none")
    coins = (True, False, False, True)
    with torch.no_grad():
        if mode == "expectation":
            factors, found = [RATE] * len(coins), model(x, **hidden)
        else:
            factors = [float(coin) for coin in coins]
            with residrop.sampling(model), residrop.using(model, Plan.of(coins)):
                found = model(x, **hidden)
        wanted = reference(model, [x], hidden, same(factors))
    kept = ~padding(TOKENS, torch.bool) if padded else torch.ones(ROWS, TOKENS, dtype=torch.bool)
    torch.testing.assert_close(found[kept], wanted[kept])


def test_whole_transformer():
    """nn.Transformer: the encoder's output goes to every decoder layer."""
    torch.manual_seed(0)
    model = nn.Transformer(WIDTH, HEADS, 2, 3, 12, dropout=0.0, batch_first=True).double().train()
    plain = copy.deepcopy(model)
    report = residrop.apply(model, survival=0.5, granularity="row", seed=1)
    assert [(entry.name, len(entry.rates)) for entry in report.blocks] == [
        *((f"encoder.layers.{number}", 2) for number in range(2)),
        *((f"decoder.layers.{number}", 3) for number in range(3)),
    ]
    source, target = reversed(inputs("decoder"))
    plan, factors = next(windows(13))
    with residrop.using(model, plan):
        found = model(source, target)
    memory = norm(plain.encoder.norm, reference(plain.encoder, [source], {}, factors))
    wanted = norm(plain.decoder.norm, reference(plain.decoder, [target, memory], {}, factors))
    torch.testing.assert_close(found, wanted)
    found.sum().backward()
