"""Which parameters an optimizer moves, by how much, and that absent blocks stay where they are."""

import copy
from contextlib import nullcontext

import pytest
import timm
import timm.optim
import torch
from torch import nn
from torch.nn import functional as F

import residrop
from residrop.common.errors import ConfigError
from residrop.models import create
from residrop.schedule.sampler import Plan
from residrop.training import Recipe, load_run, loop, train
from residrop.training.networks import build_network
from residrop.training.optimizers import freeze, layers_of, make_optimizer
from residrop.training.setup import prepare, resolve
from residrop.training.update import one_pass

DATASET = {"classes": [str(digit) for digit in range(10)], "channels": 1, "size": 8, "steps": 8}
KINDS = {
    "sgd": {"lr": 0.05, "weight_decay": 0.1},
    "adamw": {"lr": 0.001, "weight_decay": 0.1, "optimizer": "adamw"},
    "lion": {"lr": 0.001, "weight_decay": 0.1, "optimizer": "lion"},
    "muon": {"lr": 0.01, "weight_decay": 0.1, "optimizer": "muon"},
}


def made(kind):
    if kind == "muon" and not hasattr(timm.optim, "Muon"):
        pytest.skip(f"timm {timm.__version__} has no Muon")
    return Recipe(network="resnet-8", survival="0.5", seed=1, **KINDS[kind])


def step(model, optimizer, plan, seed):
    x = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    optimizer.zero_grad()
    with residrop.using(model.train(), plan):
        F.cross_entropy(model(x), torch.arange(6)).backward()
    optimizer.step()


@pytest.mark.parametrize("kind", KINDS)
def test_absent_blocks_do_not_move(kind):
    recipe = made(kind)
    model = build_network(recipe, DATASET)
    optimizer = make_optimizer(recipe, model)
    block = model.blocks.block2
    for seed in (0, 1):  # momentum has to be something
        step(model, optimizer, Plan.of([True, True, True]), seed)
    before = copy.deepcopy(block.state_dict())
    others = copy.deepcopy(model.blocks.block1.state_dict())
    step(model, optimizer, Plan.of([True, False, True]), 2)
    for name, value in block.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert not any(torch.equal(v, others[n]) for n, v in model.blocks.block1.named_parameters())
    step(model, optimizer, Plan.of([True, True, True]), 3)
    assert not any(torch.equal(v, before[n]) for n, v in block.named_parameters())


def test_norms_and_biases_decay_under_sgd_only_or_as_told():
    model = create("resnet-8", classes=10, channels=1)
    vectors = {id(one) for one in model.parameters() if one.ndim == 1}
    assert vectors
    for kind, told, decayed in (
        ("sgd", None, True),
        ("sgd", False, False),
        ("adamw", None, False),
        ("adamw", True, True),
    ):
        groups = make_optimizer(made(kind).replace(decay_vectors=told), model).param_groups
        decays = {id(one): group["weight_decay"] for group in groups for one in group["params"]}
        assert decays.keys() == {id(one) for one in model.parameters()}
        assert {decays[one] for one in vectors} == {0.1 if decayed else 0.0}
        assert {decay for one, decay in decays.items() if one not in vectors} == {0.1}


def test_what_a_model_of_timm_spares_is_not_decayed():
    recipe = Recipe(
        network="timm:test_vit", rule="constant", survival="1", optimizer="adamw", lr=1e-3, weight_decay=0.1
    )
    model = build_network(recipe, {**DATASET, "channels": 3, "size": 160})
    groups = make_optimizer(recipe, model).param_groups
    decays = {id(one): group["weight_decay"] for group in groups for one in group["params"]}
    assert model.pos_embed.ndim > 1
    assert decays[id(model.pos_embed)] == 0.0
    assert decays[id(model.blocks[0].attn.qkv.weight)] == 0.1


def test_layers_are_counted_by_blocks():
    model = create("resnet-8", classes=10, channels=1)
    layers = layers_of(model)
    assert list(layers.values()) == sorted(layers.values())
    assert {layer: next(name for name in layers if layers[name] == layer).split(".")[0] for layer in range(5)} == {
        0: "stem", 1: "blocks", 2: "blocks", 3: "blocks", 4: "tail"
    }  # fmt: skip
    assert all(name.startswith(f"blocks.block{layer}.") for name, layer in layers.items() if 0 < layer < 4)


def test_learning_rates_fall_by_layer():
    model = create("resnet-8", classes=10, channels=1)
    layers = layers_of(model)
    groups = make_optimizer(made("sgd").replace(layer_decay=0.5), model).param_groups
    scales = {id(one): group["scale"] for group in groups for one in group["params"]}
    assert {layers[name]: scales[id(one)] for name, one in model.named_parameters()} == {
        layer: 0.5 ** (4 - layer) for layer in range(5)
    }


def textbook(recipe, ready):
    """Weights after SGD, layer by layer with a learning rate of its own, clipped gradients, and smoothed labels."""
    model = build_network(recipe, ready.dataset).to(memory_format=torch.channels_last).train()
    total = ready.dataset["steps"]
    layers, buffers = layers_of(model), {}
    batches = (batch for epoch in range(recipe.epochs) for batch in ready.loaders["train"].train_batches(epoch))
    for number, (x, y) in enumerate(batches):
        model.zero_grad()
        target = F.one_hot(y, 10) * (1 - recipe.label_smoothing) + recipe.label_smoothing / 10
        with residrop.using(model, residrop.sampler_of(model).plan(number)):
            (-(target * model(x).log_softmax(1)).sum() / len(x)).backward()
        live = {name: one for name, one in model.named_parameters() if one.grad is not None}
        norm = sum(one.grad.double().square().sum() for one in live.values()).sqrt().item()
        with torch.no_grad():
            for name, one in live.items():
                gradient = one.grad * min(1.0, recipe.clip_grad / norm) + recipe.weight_decay * one * (one.ndim > 1)
                buffers[name] = recipe.momentum * buffers.get(name, 0.0) + gradient
                rate = recipe.lr_at(number / total) * recipe.layer_decay ** (4 - layers[name])
                one -= rate * (gradient + recipe.momentum * buffers[name])
    return model.state_dict()


def test_training_with_every_new_field_equals_the_textbook(tiny, tmp_path):
    recipe = resolve(
        tiny(
            survival="0.6", seed=2, layer_decay=0.7, clip_grad=0.5, label_smoothing=0.2, decay_vectors=False,
            weight_decay=0.05, warmup=0.5, warmup_form="linear", lr_schedule="triangular",
        )
    )  # fmt: skip
    train(recipe, tmp_path / "run", quiet=True)
    found = load_run(tmp_path / "run")[1].state_dict()
    for name, value in textbook(recipe, prepare(recipe)).items():
        torch.testing.assert_close(
            found[name], value, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("kind", ["adamw", "lion", "muon"])
def test_resumed_run_equals_the_uninterrupted(tiny, tmp_path, interrupt, assert_same_run, kind):
    made(kind)  # or skip
    recipe = tiny(survival="0.5", layer_decay=0.8, clip_grad=1.0, **KINDS[kind])
    train(recipe, tmp_path / "whole", quiet=True)
    interrupt(recipe, tmp_path / "broken", 3)
    train(recipe, tmp_path / "broken", resume=True, quiet=True)
    assert_same_run(tmp_path / "whole", tmp_path / "broken")


def test_resumed_run_with_mixed_images_equals_the_uninterrupted(tiny, tmp_path, interrupt, assert_same_run):
    recipe = tiny(
        survival="0.5", policy="rand-augment", erasing=0.25, mixup=0.2, cutmix=1.0, augmentation="resized-crop",
        flips="alternating", micro_batches=2, label_smoothing=0.1, precision="bf16",
    )  # fmt: skip
    train(recipe, tmp_path / "whole", quiet=True)
    interrupt(recipe, tmp_path / "broken", 3)
    train(recipe, tmp_path / "broken", resume=True, quiet=True)
    assert_same_run(tmp_path / "whole", tmp_path / "broken")


def test_loss_and_errors_of_mixed_labels():
    torch.manual_seed(0)
    x, shares = torch.randn(6, 4), torch.rand(6, 4).softmax(1)
    model, sums = nn.Linear(4, 4), torch.zeros(3, dtype=torch.float64)
    one_pass(model, x, shares, 1 / 6, sums, nullcontext, label_smoothing=0.2)
    smoothed = 0.8 * shares + 0.2 / 4
    loss = -(smoothed * model(x).log_softmax(1)).sum(1).mean()
    (wanted,) = torch.autograd.grad(loss, [model.weight])
    torch.testing.assert_close(model.weight.grad, wanted)
    wrong = (model(x).argmax(1) != shares.argmax(1)).sum()
    assert sums.tolist() == pytest.approx([6 * loss.item(), wrong.item(), 6.0], rel=1e-6)


# What is not trained


def test_frozen_parameters_stay_and_others_move(tiny, tmp_path):
    recipe = tiny(freeze=("stem", "blocks.block1.*", "*.bias"), epochs=1)
    before = build_network(recipe, DATASET).state_dict()
    train(recipe, tmp_path / "run", quiet=True)
    model = load_run(tmp_path / "run")[1]
    for name, value in model.named_parameters():
        still = name.startswith(("stem.", "blocks.block1.")) or name.endswith(".bias")
        assert torch.equal(value, before[name]) == still, name


def test_patterns_that_name_nothing_or_everything_are_refused():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    with pytest.raises(ConfigError, match=r"freeze 'conv\*' is the name of no module .*; the network has 0, 1"):
        freeze(model, ("conv*",))
    with pytest.raises(ConfigError, match="leaves nothing to train"):
        freeze(model, ("0", "1.*"))


# The average of weights


def averaged(recipe, states):
    """The average of weights by the textbook, one number after the other."""
    average = states[0]
    for number, weights in enumerate(states[1:]):
        decay = min(recipe.ema, (1 + number) / (10 + number))
        average = {name: decay * average[name] + (1 - decay) * weights[name] for name in weights}
    return average


@pytest.mark.parametrize("ema", [0.05, 0.3])
def test_reported_weights_are_the_average_with_statistics_of_their_own(tiny, tmp_path, monkeypatch, ema):
    recipe = tiny(survival="0.6", seed=2, ema=ema)
    states = [{name: one.clone() for name, one in build_network(recipe, DATASET).named_parameters()}]
    original = loop._update

    def update(recipe, state, *others):
        original(recipe, state, *others)
        states.append({name: one.detach().clone() for name, one in state.model.named_parameters()})

    monkeypatch.setattr(loop, "_update", update)
    outcome = train(recipe, tmp_path / "run", quiet=True)
    assert len(states) == 9
    _, model = load_run(tmp_path / "run")
    for name, value in averaged(recipe, states).items():
        torch.testing.assert_close(model.get_parameter(name), value, rtol=1e-5, atol=1e-6)
    before = copy.deepcopy(model.state_dict())
    loader = prepare(recipe).loaders["train"]
    residrop.recalibrate(model, loader.fixed_batches(99, 64))
    for name, value in model.state_dict().items():
        torch.testing.assert_close(before[name], value, rtol=1e-4, atol=1e-5)
    found = residrop.evaluate(model, prepare(recipe).loaders["test"].eval_batches(), 0)
    assert found.deterministic.nll == pytest.approx(outcome.evaluation.deterministic.nll, rel=1e-5)


def test_stopped_run_with_an_average_equals_the_uninterrupted(tiny, tmp_path, interrupt, assert_same_run):
    recipe = tiny(survival="0.5", ema=0.9)
    train(recipe, tmp_path / "whole", quiet=True)
    interrupt(recipe, tmp_path / "broken", 3)
    train(recipe, tmp_path / "broken", resume=True, quiet=True)
    assert_same_run(tmp_path / "whole", tmp_path / "broken")


def test_average_needs_no_batch_norm(tiny, tmp_path):
    recipe = tiny(network="vanilla-3", ema=0.9, epochs=1, lr=0.01)
    train(recipe, tmp_path / "run", quiet=True)
    assert load_run(tmp_path / "run")[0].evaluation()


def test_a_run_is_not_continued_with_another_optimizer(tiny, tmp_path):
    train(tiny(epochs=1), tmp_path / "run", quiet=True)
    with pytest.raises(residrop.UsageError, match=r"another recipe: .*optimizer \(was 'sgd', is 'adamw'\)"):
        train(tiny(epochs=1, optimizer="adamw", lr=0.01), tmp_path / "run", resume=True, quiet=True)
