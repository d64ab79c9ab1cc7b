"""Layers of Hugging Face transformers under rules."""

import copy
import pickle
import random
from collections.abc import Sequence

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

import residrop
from residrop import StochasticDepth
from residrop.blocks.skippable import parameters_of
from residrop.common.errors import PlanError
from residrop.schedule.sampler import Draw, Plan
from residrop.surgery import Report
from residrop.surgery.drops import ReplacedDrop

pytest.importorskip("transformers")

import transformers
from transformers_models import (
    FAMILIES,
    ROWS,
    SEQ2SEQ,
    SPEECH,
    TEXT,
    TOKENS,
    built,
    ids,
    output,
    step,
    text,
    tossed,
    without_dropout,
)

RATE = 0.4
every_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)


@pytest.fixture
def _written_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks go through their mixins, even where their own forward would do."""
    monkeypatch.setattr(StochasticDepth, "is_plain_sum", lambda self: False)


def applied(model: nn.Module, **options) -> tuple[nn.Module, Report]:
    model = copy.deepcopy(model)
    return model, residrop.apply(model, **options)


def ends_of(family, report) -> dict[str, Sequence[str]]:
    return {
        entry.name: family.decoder_ends if "decoder.layers" in entry.name and family.decoder_ends else family.ends
        for entry in report.blocks
    }


def assert_same(ours, theirs, tolerance: float = 0.0) -> None:
    """Outputs and gradients agree, relative to the largest of them; no gradient counts as one of zeros."""
    torch.testing.assert_close(ours[0], theirs[0], rtol=0.0, atol=tolerance * float(theirs[0].abs().max()))
    largest = max(float(grad.abs().max()) for grad in theirs[1].values() if grad is not None and grad.numel())
    for name, grad in theirs[1].items():
        if grad is not None:
            own = torch.zeros_like(grad) if ours[1][name] is None else ours[1][name]
            torch.testing.assert_close(own, grad, rtol=0.0, atol=tolerance * largest)


CLOSE = 2e-5


# Every form of layer


@every_family
@pytest.mark.usefixtures("_written_anew")
@pytest.mark.filterwarnings("ignore::residrop.InactiveWarning")
def test_all_present_is_the_plain_model_to_the_last_bit(family):
    plain, inputs = family.model(), family.inputs()
    model, report = applied(plain, survival=1.0)
    assert {len(entry.rates) for entry in report.blocks} <= {len(family.ends), len(family.decoder_ends)}
    for module in plain.modules():
        if hasattr(module, "drop_prob"):
            module.drop_prob = 0.0
    for training in (False, True):  # dropout of units is on in training, and drawn in the same order
        assert_same(step(model.train(training), inputs), step(plain.train(training), inputs))
    assert list(model.state_dict()) == list(plain.state_dict())


@every_family
def test_coins_multiply_branches(family):
    plain, inputs = family.model().train(), family.inputs()
    model, report = applied(without_dropout(plain), survival=RATE, rescale="train", granularity="block")
    layers = ends_of(family, report)
    toss = random.Random(0)
    coins = [toss.random() < 0.5 for ends in layers.values() for _ in ends]
    coins[:2] = [True, False]
    with residrop.using(model, Plan.of(coins)):
        ours = step(model, inputs)
    assert_same(ours, step(tossed(plain, layers, [coin / RATE for coin in coins]), inputs), CLOSE)
    if not any(map(is_parametrized, model.modules())):  # which torch does not pickle
        loaded = pickle.loads(pickle.dumps(model))
        with residrop.using(loaded, Plan.of(coins)):
            assert_same(step(loaded, inputs), ours)
    for coin, (rule, parts) in zip(coins, _branches(model, report), strict=True):
        grads = [parameter.grad for parameter in parameters_of(parts) if parameter.requires_grad]
        assert grads
        assert coin or all(grad is None for grad in grads), rule


def _branches(model, report):
    return [pair for entry in report.blocks for pair in model.get_submodule(entry.name).residrop_branches()]


def _rows(count: int) -> tuple[Plan, list[torch.Tensor]]:
    """Draws of rows, and 1 / RATE where a row is present."""
    draws = [Draw((RATE,), key=derived) for derived in range(1, 1 + count)]
    masks = []
    for draw in draws:
        rows, mask = draw.rows(ROWS), torch.zeros(ROWS)
        mask[[(rows.start + place) % ROWS for place in range(rows.live)]] = 1 / RATE
        masks.append(mask)
    return Plan(tuple(draws)), masks


@every_family
def test_rows_multiply_rows_of_branches(family):
    plain, inputs = family.model().train(), family.inputs()
    model, report = applied(without_dropout(plain), survival=RATE, rescale="train", granularity="row")
    layers = ends_of(family, report)
    plan, masks = _rows(sum(map(len, layers.values())))
    with residrop.using(model, plan):
        ours = step(model, inputs)
    assert_same(ours, step(tossed(plain, layers, masks), inputs), CLOSE)


@every_family
@pytest.mark.parametrize("level", ["block", "row"])
def test_presence_in_backward_only(family, level):
    """The loss is that of the whole model; of absent branches, or rows of them, there is no gradient."""
    plain, inputs = family.model().train(), family.inputs()
    how = {"rule": "backward-depth", "survival": RATE, "rescale": "train", "granularity": level}
    norms = [one for one in plain.modules() if isinstance(one, nn.modules.batchnorm._BatchNorm)]
    if level == "row" and norms:
        pytest.skip("batch norm needs the whole batch")
    model, report = applied(without_dropout(plain), **how)
    layers = ends_of(family, report)
    plan, factors = _rows(sum(map(len, layers.values())))
    if level == "block":
        coins = [number % 3 != 1 for number in range(len(factors))]
        plan, factors = Plan.of(coins), [coin / RATE for coin in coins]
    with residrop.using(model, plan):
        ours = step(model, inputs)
    assert_same(ours, step(tossed(plain, layers, factors, backward=True), inputs), CLOSE)


def test_layers_that_call_their_base_class_are_whole_blocks():
    model = FAMILIES["llama"].model()

    class Own(type(model.model.layers[0])):
        def forward(self, hidden_states, **kwargs):
            return super().forward(hidden_states, **kwargs)

    model.model.layers[1].__class__ = Own
    model.model.layers[2].forward = model.model.layers[2].forward
    report = residrop.apply(model, survival=0.5)
    assert [entry.name for entry in report.blocks] == ["model.layers.0"]
    residrop.remove(model)
    report = residrop.apply(model, survival=0.5, blocks="model.layers.*")
    assert [entry.kind for entry in report.blocks] == ["transformers LlamaDecoderLayer", "tests Own, whole"]
    assert report.left_alone[0][0] == "model.layers.2"


def test_subclass_with_the_same_forward_is_read():
    model = FAMILIES["llama"].model()

    class Own(type(model.model.layers[0])):
        pass

    model.model.layers[1].__class__ = Own
    report = residrop.apply(model, survival=0.5)
    assert [entry.kind for entry in report.blocks] == [
        "transformers LlamaDecoderLayer",
        "tests Own",
        "transformers LlamaDecoderLayer",
    ]


# Arguments


@pytest.mark.parametrize("level", ["block", "row"])
def test_arguments_of_every_row_and_of_all(level):
    """Positions and masks per row, for all rows, and where the number of tokens is that of rows."""
    plain = FAMILIES["llama"].model().train()
    model, report = applied(without_dropout(plain), survival=RATE, granularity=level)
    layers = ends_of(FAMILIES["llama"], report)
    plan = residrop.sampler_of(model).plan(4)
    factors = [_factor(draw) for draw in plan.draws]
    square = torch.ones(ROWS, ROWS, dtype=torch.long)
    square[2, -2:] = 0
    places = torch.arange(TOKENS)
    for inputs in (
        {"input_ids": ids()},
        {"input_ids": ids(), "position_ids": places[None]},
        {"input_ids": ids(), "position_ids": places + 2 * torch.arange(ROWS)[:, None]},
        {"input_ids": ids(tokens=ROWS), "attention_mask": square},
        {"inputs_embeds": torch.randn(ROWS, TOKENS, 32), "attention_mask": torch.ones(ROWS, 1, TOKENS, TOKENS).bool()},
        {"inputs_embeds": torch.randn(ROWS, TOKENS, 32), "attention_mask": torch.ones(1, 1, TOKENS, TOKENS).bool()},
    ):
        with residrop.using(model, plan):
            ours = step(model, inputs)
        assert_same(ours, step(tossed(plain, layers, factors), inputs), CLOSE)


def _factor(draw: Draw) -> float | torch.Tensor:
    if draw.key is None:
        return float(bool(draw.alive)) / RATE
    rows, mask = draw.rows(ROWS), torch.zeros(ROWS)
    mask[[(rows.start + place) % ROWS for place in range(rows.live)]] = 1 / RATE
    return mask


class _Asked(nn.Module):
    """A decoder's first layer alone, to be called with any arguments."""

    def __init__(self) -> None:
        super().__init__()
        model = FAMILIES["llama"].model()
        self.layer, self.rotary = model.model.layers[0], model.model.rotary_emb

    def forward(self, x=None, **kwargs):
        x = torch.randn(3, 3, 32) if x is None else x
        return self.layer(x, position_embeddings=self.rotary(x, torch.arange(3)[None]), **kwargs)


@pytest.mark.parametrize(
    "value",
    [
        -3 * torch.rand(3, 3),
        -3 * torch.rand(1, 1, 3, 3),
        -3 * torch.rand(4, 3, 3),  # for every head
        -3 * torch.rand(3, 1, 1, 3),
        -3 * torch.rand(3, 4, 3, 3),
    ],
    ids=lambda value: "x".join(map(str, value.shape)),
)
def test_masks_of_three_tokens_for_three_rows(value):
    """Whatever the first dimension of a mask means, rows get what is theirs."""
    model = _Asked().train()
    plain = copy.deepcopy(model.layer)
    residrop.apply(model, survival=RATE, granularity="row", rescale="none")
    for key in range(2):
        x, (first, second) = torch.randn(3, 3, 32), (Draw((RATE,), key=key), Draw((RATE,), key=key + 7))
        with residrop.using(model, Plan((first, second))):
            found = model(x, attention_mask=value)
        masks = []
        for draw in (first, second):
            window, live = draw.rows(3), torch.zeros(3, 1, 1)
            live[[(window.start + row) % 3 for row in range(window.live)]] = 1.0
            masks.append(live)
        rotary = model.rotary(x, torch.arange(3)[None])
        normed = plain.input_layernorm(x)
        y = x + masks[0] * plain.self_attn(normed, position_embeddings=rotary, attention_mask=value)[0]
        torch.testing.assert_close(found, y + masks[1] * plain.mlp(plain.post_attention_layernorm(y)))


def test_objects_that_may_have_rows_are_refused():
    model = _Asked().train()
    residrop.apply(model, survival=RATE, granularity="row")
    with pytest.raises(PlanError, match=r"a object as argument mine, .*whole=\[.*cut=\[.*granularity='block'"):
        model(mine=object())
    residrop.remove(model)
    residrop.apply(model, survival=RATE, granularity="row", whole=["mine"])
    model(mine=object()).sum().backward()


def test_unknown_arguments_can_be_explained():
    seen = []
    model = _Asked().train()
    model.layer.self_attn.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((kwargs["mine"].shape, kwargs["ours"].shape)), with_kwargs=True
    )
    residrop.apply(model, survival=0.67, granularity="row", whole=["ours"], cut=["mine"])
    with residrop.using(model, Plan((Draw((0.67,), key=3), Draw((0.67,), key=4)))):
        model(mine=torch.zeros(3, 3, 3), ours=torch.zeros(3))
    assert seen == [((2, 3, 3), (3,))]


# Caches


def _causal(name: str, **options):
    model = FAMILIES[name].model()
    residrop.apply(model, survival=0.5, **options)
    return model


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert-decoder", "bart", "mistral", "gemma2"])
@pytest.mark.parametrize("level", ["block", "row"])
def test_training_fills_no_cache(name, level):
    family = FAMILIES[name]
    model = family.model().train()
    residrop.apply(model, survival=0.5, granularity=level)
    for _ in range(3):
        result = model(**family.inputs(), use_cache=True)
        assert result.past_key_values.get_seq_length() == 0
    without = model(**family.inputs(), use_cache=False)
    assert without.past_key_values is None


@pytest.mark.parametrize("branches", [True, False])
def test_a_layer_that_is_always_present_keeps_its_cache_at_row_level(branches):
    """Whole batches go through it, so its part of the cache is right, and the comparison of rows leaves it alone."""
    model = FAMILIES["llama"].model().train()
    count = len(model.model.layers)
    rates = [1.0] + [0.5] * (count - 1)
    residrop.apply(model, survival=rates, granularity="row", branches=branches)
    for _ in range(3):
        cache = model(input_ids=ids(), use_cache=True).past_key_values
        assert [cache.get_seq_length(layer) for layer in range(count)] == [ids().shape[1]] + [0] * (count - 1)


def test_a_cache_of_states_is_left_out_while_it_is_empty():
    """Mamba's cache counts no tokens."""
    torch.manual_seed(0)
    options = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}
    plain = transformers.MambaForCausalLM(transformers.MambaConfig(**options))
    model = copy.deepcopy(plain)
    residrop.apply(model, survival=0.5, rescale="none", example={"input_ids": ids(2, 4)})
    inputs = {"input_ids": ids(2, 4)}
    with residrop.using(model.train(), Plan.of([True, False])):
        found = model(**inputs, use_cache=True).logits
    del plain.backbone.layers[1]
    assert torch.equal(found, plain.train()(**inputs, use_cache=False).logits)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "mixtral"])
def test_text_is_generated_as_before(name):
    plain = FAMILIES[name].model().eval()
    model, _ = applied(plain, survival=0.5)
    options = {"attention_mask": torch.ones(2, 4, dtype=torch.long), "max_new_tokens": 6, "do_sample": False}
    for extra in ({}, {"use_cache": False}, {"num_beams": 2}):
        expected = plain.generate(ids(2, 4), **options, **extra)
        model.train()(**text())  # a training step in between leaves nothing behind
        assert torch.equal(model.eval().generate(ids(2, 4), **options, **extra), expected)


def test_half_filled_caches_are_refused():
    options = {"attention_mask": torch.ones(2, 4, dtype=torch.long), "max_new_tokens": 6, "do_sample": False}
    model = _causal("llama")
    with pytest.raises(PlanError, match="cache of keys and values in a pass with coins; generate text in eval mode"):
        model.train().generate(ids(2, 4), **options)
    assert residrop.sampler_of(model).step == 0
    with residrop.sampling(model), pytest.raises(PlanError, match="cache of keys and values"):
        model.generate(ids(2, 4), **options)
    cache = model.eval()(ids(2, 4), use_cache=True).past_key_values
    with pytest.raises(PlanError, match="cache of keys and values"):
        model.train()(ids(2, 1), None, None, cache)  # by place: its name depends on the version
    assert residrop.sampler_of(model).step == 0


def test_generation_under_a_plan_or_sampled_without_a_cache():
    options = {"attention_mask": torch.ones(2, 4, dtype=torch.long), "max_new_tokens": 6, "do_sample": False}
    plain = FAMILIES["llama"].model().eval()
    model, report = applied(plain, survival=0.5, rescale="none")
    coins = [True, True, True, False, False, True]
    reference = tossed(plain, ends_of(FAMILIES["llama"], report), [float(coin) for coin in coins])
    with residrop.using(model, Plan.of(coins)):
        text = model.eval().generate(ids(2, 4), use_cache=False, **options)
    assert torch.equal(text, reference.generate(ids(2, 4), use_cache=False, **options))
    with residrop.using(model, Plan.of([True] * 6)):  # nothing is absent, so the cache is whole
        text = model.generate(ids(2, 4), **options)
    assert torch.equal(text, plain.generate(ids(2, 4), **options))
    with residrop.sampling(model):
        first = model.generate(ids(2, 4), use_cache=False, **options)
    assert first.shape == text.shape


# What else models do


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("level", ["block", "row"])
@pytest.mark.parametrize("name", ["llama", "bert", "vit", "wav2vec2-layerdrop"])
def test_gradient_checkpointing_changes_no_gradient(name, level, reentrant):
    """huggingface/transformers#30113: layer drop and gradient checkpointing collide."""
    drops = name == "wav2vec2-layerdrop"
    family = FAMILIES[name.removesuffix("-layerdrop")]
    plain = family.model() if not drops else built("Wav2Vec2Model", "Wav2Vec2Config", **{**SPEECH, "layerdrop": 0.5})()
    grads = []
    for checkpointing in (False, True):
        model = copy.deepcopy(plain).train()
        residrop.apply(model, survival="from_model" if drops else 0.5, granularity=level, seed=2)
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        grads.append([step(model, family.inputs()) for _ in range(3)])
        assert residrop.sampler_of(model).step == 3
    for once, again in zip(*grads, strict=True):
        assert_same(once, again, 1e-6)
        assert {name for name, grad in once[1].items() if grad is None} == {
            name for name, grad in again[1].items() if grad is None
        }


def test_hidden_states_and_attentions_are_recorded():
    plain = FAMILIES["llama"].model()
    plain.set_attn_implementation("eager")
    model, _ = applied(plain, survival=0.5)
    asked = {**text(), "output_hidden_states": True, "output_attentions": True}
    expected, result = plain.eval()(**asked), model.eval()(**asked)
    torch.testing.assert_close(result.hidden_states, expected.hidden_states, rtol=0.0, atol=0.0)
    torch.testing.assert_close(result.attentions, expected.attentions, rtol=0.0, atol=0.0)
    with residrop.using(model.train(), Plan.of([True, True, False, False, False, True])):
        result = model(**asked)
    states = result.hidden_states
    assert len(states) == 4
    assert torch.equal(states[1], states[2])  # the second layer is absent, its state is not
    assert len(result.attentions) == 1  # of the branches that were computed


@pytest.mark.parametrize("name", ["bert", "llama", "swin"])
def test_saved_models_are_plain_ones(name, tmp_path):
    family = FAMILIES[name]
    model, _ = applied(family.model(), survival=0.5)
    model.save_pretrained(tmp_path)
    plain = type(family.model()).from_pretrained(tmp_path).eval()
    assert torch.equal(output(plain(**family.inputs())), output(model.eval()(**family.inputs())))
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    assert config.to_dict() == plain.config.to_dict()


def test_mixture_of_experts_balances_live_layers():
    model = FAMILIES["mixtral"].model().train()
    residrop.apply(model, survival=0.5)
    with residrop.using(model, Plan.of([True, False, True, True, True, True])):
        result = model(**text(), labels=ids(), output_router_logits=True)
    assert len(result.router_logits) == 2
    result.loss.backward()
    assert all(parameter.grad is None for parameter in model.model.layers[0].mlp.parameters())


# Their own drops


@pytest.mark.parametrize(
    ("name", "rates"),
    [
        ("dinov2", [(0.7, 0.7)] * 3),
        ("pixio", [(0.7, 0.7)] * 3),
        ("convnext", [(1.0,), (0.9,), (0.8,), (0.7,)]),
        ("swin", [(1.0, 1.0), (0.9667, 1.0), (0.9333, 1.0), (0.9, 1.0)]),  # its drop path is on attention alone
        ("swinv2", [(1.0, 1.0), (0.9667, 0.9667), (0.9333, 0.9333), (0.9, 0.9)]),
    ],
)
def test_drop_paths_hand_over_their_rates(name, rates):
    plain = FAMILIES[name].model().train()
    drops = {name: module.drop_prob for name, module in plain.named_modules() if hasattr(module, "drop_prob")}
    assert any(drops.values())
    model, report = applied(plain, survival="from_model")
    assert [tuple(round(rate, 4) for rate in entry.rates) for entry in report.blocks] == rates
    assert {entry.granularity for entry in report.blocks} == {"row"}
    assert all(isinstance(model.get_submodule(name), ReplacedDrop) for name in drops)
    expected = output(copy.deepcopy(plain).eval()(**FAMILIES[name].inputs()))
    assert torch.equal(output(model.eval()(**FAMILIES[name].inputs())), expected)
    residrop.remove(model)
    assert {name: module.drop_prob for name, module in model.named_modules() if hasattr(module, "drop_prob")} == drops
    assert_same(step(model.train(), FAMILIES[name].inputs()), step(plain, FAMILIES[name].inputs()))


LAYERDROP = {
    "wav2vec2": ("Wav2Vec2", {**SPEECH, "layerdrop": 0.5}, [0.5] * 3),
    "hubert-stable": (
        "Hubert",
        {**SPEECH, "layerdrop": 0.5, "do_stable_layer_norm": True, "feat_extract_norm": "layer"},
        [0.5] * 3,
    ),
    "wavlm": ("WavLM", {**SPEECH, "layerdrop": 0.5}, [1.0, 0.5, 0.5]),
    "conformer": ("Wav2Vec2Conformer", {**SPEECH, "layerdrop": 0.5}, [0.5] * 3),
    "bart": ("Bart", {**SEQ2SEQ, "encoder_layerdrop": 0.5, "decoder_layerdrop": 0.25}, [0.5, 0.5, 0.75, 0.75]),
    "pegasus-x": (
        "PegasusX",
        {**SEQ2SEQ, "encoder_layerdrop": 0.5, "decoder_layerdrop": 0.25, "num_global_tokens": 4, "block_size": 4},
        [0.5, 0.5, 0.75, 0.75],
    ),
    "opt": (
        "OPT",
        {**TEXT, "ffn_dim": 48, "word_embed_proj_dim": 32, "layerdrop": 0.5},
        [0.5] * 3,
    ),
}


def _with_layerdrop(name: str) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    kind, config, _ = LAYERDROP[name]
    torch.manual_seed(0)
    model = built(f"{kind}Model", f"{kind}Config", **config)()
    if kind == "OPT":
        return model, text()
    return model, {**text(), "decoder_input_ids": ids()} if "d_model" in config else FAMILIES["hubert"].inputs()


@pytest.mark.parametrize("name", LAYERDROP)
def test_layer_drop_is_taken_over(name):
    model, inputs = _with_layerdrop(name)
    without_dropout(model)
    plain, config = copy.deepcopy(model), model.config.to_dict()
    report = residrop.apply(model, survival="from_model")
    assert [entry.rates for entry in report.blocks] == [(rate,) for rate in LAYERDROP[name][2]]
    assert {entry.granularity for entry in report.blocks} == {"block"}
    assert report.left_alone == ()
    assert model.config.to_dict() == config
    layers = [model.get_submodule(entry.name) for entry in report.blocks]
    for number in range(6):
        step(model.train(), inputs)
        live = [any(one.grad is not None for one in layer.parameters()) for layer in layers]
        assert live == [draw.alive for draw in residrop.sampler_of(model).plan(number).draws]
    torch.manual_seed(3)
    state = torch.get_rng_state()
    model(**inputs)
    assert torch.equal(torch.get_rng_state(), state)  # no coin of its own is tossed
    plain.load_state_dict(model.state_dict())  # the statistics of batch norm have moved
    expected = output(plain.eval()(**inputs))
    assert torch.equal(output(model.eval()(**inputs)), expected)
    parametrized = any(map(is_parametrized, model.modules()))
    for again in (copy.deepcopy(model) if parametrized else pickle.loads(pickle.dumps(model)), model):
        residrop.remove(again)
        assert again.config.to_dict() == config
        assert torch.equal(output(again(**inputs)), expected)


def test_own_layer_drop_is_back_after_remove():
    for name in ("wav2vec2", "bart", "opt"):
        model, inputs = _with_layerdrop(name)
        plain = copy.deepcopy(model)
        residrop.apply(model, survival="from_model")
        residrop.remove(model)
        for seed in range(4):
            assert_same(step(model.train(), inputs, seed), step(plain.train(), inputs, seed))


@pytest.mark.parametrize("name", LAYERDROP)
def test_absent_layers_do_nothing(name):
    """As transformers itself, where it does skip; never rescaled."""
    model, inputs = _with_layerdrop(name)
    without_dropout(model)
    plain = copy.deepcopy(model)
    rates = LAYERDROP[name][2]
    coins = [rate == 1.0 or number % 2 == 1 for number, rate in enumerate(rates)]
    report = residrop.apply(model, survival="from_model")
    with residrop.using(model, Plan.of(coins)):
        ours = step(model.train(), inputs)
    for entry, coin in zip(reversed(report.blocks), reversed(coins), strict=True):
        parent, _, number = entry.name.rpartition(".")
        if not coin:
            del plain.get_submodule(parent)[int(number)]
    for module in plain.modules():
        if isinstance(getattr(module, "layerdrop", None), float):
            module.layerdrop = 0.0
    plain.config.layerdrop = 0.0
    theirs = step(plain.train(), inputs)
    rest = {name: grad for name, grad in theirs[1].items() if "layers." not in name}  # what follows has other numbers
    assert len(rest) > 3
    assert_same(ours, (theirs[0], rest), 1e-6)


def test_configuration_stays_one_and_the_same():
    model, _ = _with_layerdrop("wav2vec2")
    residrop.apply(model, survival="from_model")
    encoder = model.encoder
    assert model.config.layerdrop == 0.5
    assert encoder.config.layerdrop == 0.0
    assert isinstance(encoder.config, type(model.config))
    model.set_attn_implementation("eager")
    assert encoder.config._attn_implementation == "eager"
    twin = copy.deepcopy(model)
    assert twin.encoder.config.layerdrop == 0.0
    residrop.remove(twin)
    assert twin.encoder.config is twin.config
    assert twin.config.layerdrop == 0.5
    assert encoder.config.layerdrop == 0.0
    residrop.remove(model)
    assert encoder.config is model.config


def test_layer_drop_is_not_doubled_by_other_rates():
    model, inputs = _with_layerdrop("wav2vec2")
    report = residrop.apply(model, survival=0.8, blocks="encoder.layers.[01]")
    assert [len(entry.rates) for entry in report.blocks] == [2, 2]
    ((name, why),) = report.left_alone
    assert name == "encoder.layers.2"
    assert "always present" in why
    assert model.encoder.config.layerdrop == 0.0
    step(model.train(), inputs)
    residrop.remove(model)
    model.config.add_adapter = True
    report = residrop.apply(model, survival=0.8, blocks=nn.ModuleList([model.feature_projection.dropout]))
    assert report.left_alone == tuple(
        (f"encoder.layers.{number}", "its model's layer drop goes on, as it is no residual block under a rule")
        for number in range(3)
    )
    assert model.encoder.config is model.config
