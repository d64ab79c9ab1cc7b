"""Published methods by name: the rates of every step as the papers write them, and one training step of each."""

import math
from pathlib import Path

import pytest
import torch

import residrop
from residrop.common.errors import ConfigError
from residrop.schedule.timing import Timing

LAYERS, STEPS = 6, 1000


def llama():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "vocab_size": 64}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_hidden_layers=LAYERS)).train()


def drops_of_dont_drop_dropout(step, layer):
    fall = min(max((900 - step) / 100, 0.0), 1.0)
    return 0.5 * (layer - 1) / (LAYERS - 1) * fall


def drops_of_progressive_dropping(step, layer):
    keep = 0.5 * math.exp(-100 / STEPS * step) + 0.5
    return layer / LAYERS * (1 - keep)


def drops_of_layer_skip(step, layer):
    return 0.2 * (math.exp(math.log(2) * (layer - 1) / (LAYERS - 1)) - 1)


LAWS = {  # the drop rate of a layer (1 is the first) at a step (0 is the first) of 1000
    "layerdrop": lambda step, layer: 0.2,
    "progressive-layer-dropping": drops_of_progressive_dropping,
    "layerskip": drops_of_layer_skip,
    "layerskip-from-scratch": lambda step, layer: drops_of_layer_skip(step, layer) * (2 ** (step / STEPS) - 1),
    "dont-drop-dropout": drops_of_dont_drop_dropout,
    "growth": lambda step, layer: float(step < 800),
    "lisa": lambda step, layer: 1 - 2 / LAYERS,
}


def test_every_method_has_its_law():
    assert list(residrop.METHODS) == list(LAWS)
    assert all(one.title and "arXiv" in one.source for one in residrop.METHODS.values())


@pytest.mark.parametrize("name", LAWS)
def test_rates_are_those_of_the_paper(name):
    model = llama()
    report = residrop.apply(model, **residrop.method(name, STEPS))
    sampler = residrop.sampler_of(model)
    assert len(report.blocks) == len(sampler.sites) == LAYERS  # one coin a layer
    for step in (0, 1, 10, 799, 800, 850, 899, 900, 999):
        law = [1 - LAWS[name](step, layer) for layer in range(1, LAYERS + 1)]
        assert [rate for (rate,) in sampler.rates_at(step)] == pytest.approx(law, abs=1e-12)


def test_two_methods_divide_what_is_present_by_its_rate():
    divided = {name for name, method in residrop.METHODS.items() if method.options["rescale"] == "train"}
    assert divided == {"progressive-layer-dropping", "dont-drop-dropout"}
    assert {residrop.METHODS[name].options["rescale"] for name in set(LAWS) - divided} == {"none"}


@pytest.mark.parametrize("name", LAWS)
def test_a_training_by_it_runs(name):
    """Of 10 steps each method draws another plan than full depth at least once, and every drawn step has a gradient."""
    model = llama()
    residrop.apply(model, **residrop.method(name, 10))
    tokens = torch.randint(64, (4, 12), generator=torch.Generator().manual_seed(0))
    with residrop.observe(model) as seen:
        for _ in range(10):
            model.zero_grad()
            model(input_ids=tokens, labels=tokens).loss.backward()
            assert model.model.embed_tokens.weight.grad is not None
    assert 0.0 < seen.effective_depth < LAYERS


def test_lisa_trains_two_layers_for_twenty_steps_and_then_others():
    model = llama()
    residrop.apply(model, **residrop.method("lisa", STEPS))
    sampler = residrop.sampler_of(model)
    periods = [
        {tuple(draw.alive for draw in sampler.plan(step).draws) for step in range(start, start + 20)}
        for start in range(0, 400, 20)
    ]
    assert all(len(plans) == 1 for plans in periods)
    assert all(sum(plan) == 2 for plans in periods for plan in plans)
    assert len(set.union(*periods)) > 5


def test_a_network_that_grows_is_without_layers_and_then_whole():
    """Before 0.8 of the training its loss is that of a network without layers, which get no gradient."""
    model, bare = llama(), llama()
    bare.model.layers = bare.model.layers[:0]
    residrop.apply(model, **residrop.method("growth", 5))
    tokens = torch.randint(64, (2, 12), generator=torch.Generator().manual_seed(0))
    plain = llama()(input_ids=tokens, labels=tokens).loss
    for step in range(5):
        model.zero_grad()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        without = step < 4
        assert torch.equal(loss, bare(input_ids=tokens, labels=tokens).loss if without else plain)
        grown = {one.grad is None for one in model.model.layers.parameters()}
        assert grown == {without}


def test_timings_are_in_steps_of_the_training():
    assert residrop.method("growth", 50)["timing"] == Timing(((40, 1.0), (40, 0.0)))
    assert "timing" not in residrop.method("layerdrop", 50)
    assert residrop.method("layerdrop", 50) is not residrop.METHODS["layerdrop"].options  # a dict of one's own


@pytest.mark.parametrize(
    ("name", "steps", "message"),
    [
        ("layer-skip", 10, r"method 'layer-skip' is unknown; did you mean layerskip\? give one of layerdrop, "),
        ("", 10, "method '' is unknown; give one of"),
        (None, 10, "method None is unknown"),
        ("growth", 1.5, "steps"),
        ("growth", -1, "steps"),
    ],
)
def test_what_it_cannot_make_is_refused(name, steps, message):
    with pytest.raises(ConfigError, match=message):
        residrop.method(name, steps)


@pytest.mark.parametrize("name", LAWS)
def test_the_documentation_has_the_same_options(name):
    page = (Path(__file__).parents[2] / "docs" / "language.md").read_text("utf-8")
    line = next(one for one in page.splitlines() if one.startswith(f"| `{name}` |"))
    method = residrop.METHODS[name]
    assert f"`{method.options['survival']}`" in line
    assert method.options.get("timing", "throughout") in line
    assert ("a row of a layer" in line) == (method.options["granularity"] == "row")
    assert method.source.removeprefix("arXiv ") in line or "the same" in line
