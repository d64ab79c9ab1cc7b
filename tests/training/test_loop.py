"""What an update and an epoch do, against loops written out here."""

import json
import math
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.nn import functional as F

from residrop.blocks.attach import depth_of, expected_depth_of, sampler_of, using
from residrop.common.errors import ConfigError, RunError, UsageError
from residrop.data import Files, Images, Loader, augmentation, fit, load
from residrop.inference import evaluate
from residrop.training import Run, load_run, loop, train
from residrop.training.networks import build_network
from residrop.training.setup import evaluation_batch


def loader_for(recipe, part="train"):
    splits = load(recipe.data, validation=recipe.validation, seed=recipe.seed + 1, limit=recipe.limit)
    return Loader(
        getattr(splits, part),
        batch_size=recipe.batch_size if part == "train" else 250,
        normalization=fit(splits.train, recipe.normalization),
        augmentation=augmentation(recipe.augmentation) if part == "train" else None,
        seed=recipe.seed,
    )


@pytest.mark.parametrize(
    ("device", "kind", "batch_size", "images"),
    [
        ("cpu", "memory", 128, 250),
        ("cpu", "memory", 512, 512),
        ("cuda", "memory", 128, 2000),
        ("cuda", "files", 128, 250),
    ],
)
def test_evaluation_has_large_batches(device, kind, batch_size, images):
    labels = torch.zeros(1, dtype=torch.int64)
    found = Images(torch.zeros(1, 1, 8, 8, dtype=torch.uint8), labels)
    found = found if kind == "memory" else Files((Path("a.png"),), labels, 8)
    assert evaluation_batch(batch_size, found, torch.device(device)) == images


def network_for(recipe, steps=0):
    dataset = {"classes": [str(digit) for digit in range(10)], "channels": 1, "size": 8, "steps": steps}
    return build_network(recipe, dataset).to(memory_format=torch.channels_last)


def reference_weights(recipe):
    """Train by the textbook: plain SGD, one plan an update, micro-batches of equal size."""
    loader = loader_for(recipe)
    total = recipe.epochs * loader.steps_per_epoch
    model = network_for(recipe, total)
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=recipe.lr,
        momentum=recipe.momentum,
        nesterov=recipe.nesterov,
        weight_decay=recipe.weight_decay,
        foreach=False,
    )
    model.train()
    step = 0
    for epoch in range(recipe.epochs):
        for x, y in loader.train_batches(epoch):
            optimizer.param_groups[0]["lr"] = recipe.lr_at(step / total)
            optimizer.zero_grad(set_to_none=True)
            for parameter in model.parameters() if recipe.decay_dropped else ():
                parameter.grad = torch.zeros_like(parameter)
            size = math.ceil(len(x) / recipe.micro_batches)
            for part, (images, labels) in enumerate(zip(x.split(size), y.split(size), strict=True)):
                with using(model, sampler_of(model).plan(step, part=part)):
                    (F.cross_entropy(model(images), labels, reduction="sum") / len(x)).backward()
            optimizer.step()
            step += 1
    return model.state_dict()


@pytest.mark.parametrize(
    "changes",
    [
        {"survival": "0.5"},
        {"survival": "0.5", "decay_dropped": True},
        {"survival": "0.5", "nesterov": False, "micro_batches": 2},
        {"survival": "0.7", "granularity": "row", "micro_batches": 2},
        {"rule": "swapout", "lr_schedule": "cosine", "warmup": 0.25, "augmentation": "shift"},
        {"survival": "0.2", "survival_timing": "warmup(0.7)"},
    ],
    ids=str,
)
def test_training_equals_the_textbook_loop(tiny, tmp_path, changes):
    recipe = tiny(**{"weight_decay": 0.01, "lr": 0.02, "seed": 3, **changes})
    train(recipe, tmp_path / "run", quiet=True)
    found, wanted = load_file(tmp_path / "run" / "model.safetensors"), reference_weights(recipe)
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}")


def test_textbook_loop_drops_blocks_from_the_first_update_on(tiny):
    # otherwise the test above would say nothing of buffers that start late
    model = network_for(tiny(survival="0.5", seed=3))
    plans = [sampler_of(model).plan(step) for step in range(8)]
    assert depth_of(model, plans[0]) < 3
    assert 0 < sum(depth_of(model, plan) for plan in plans) < 24


@pytest.mark.parametrize("decay_dropped", [False, True])
def test_weights_of_a_dropped_block_stay_or_decay(tiny, tmp_path, decay_dropped):
    recipe = tiny(survival="1,0,1", decay_dropped=decay_dropped, weight_decay=0.1, epochs=1, lr_drops=())
    start = network_for(recipe).state_dict()
    train(recipe, tmp_path / "run", quiet=True)
    found = load_file(tmp_path / "run" / "model.safetensors")
    shrink, velocity = 1.0, 0.0
    for _ in range(4):
        gradient = 0.1 * shrink
        velocity = 0.9 * velocity + gradient
        shrink -= recipe.lr * (gradient + 0.9 * velocity)
    factor = shrink if decay_dropped else 1.0
    weights = [key for key in start if key.startswith("blocks.block2.") and start[key].ndim == 4]
    assert weights
    for key in weights:
        torch.testing.assert_close(found[key], factor * start[key], rtol=1e-5, atol=1e-7)
    assert not torch.equal(found["blocks.block1." + weights[0].split(".", 2)[2]],
                           start["blocks.block1." + weights[0].split(".", 2)[2]])  # fmt: skip
    running = [key for key in start if key.startswith("blocks.block2.") and "running" in key]
    assert running
    assert all(torch.equal(found[key], start[key]) for key in running)


@pytest.mark.parametrize("limit", [192, 198], ids=["even", "last-batch-of-6"])
def test_micro_batches_of_a_network_without_batch_norm_change_nothing(tiny, tmp_path, limit):
    recipe = tiny(network="stable-vanilla-5", width=16, survival="0.5", limit=limit, lr=0.01)
    whole = train(recipe, tmp_path / "1", quiet=True)
    parts = train(recipe.replace(micro_batches=4), tmp_path / "4", quiet=True)
    one, four = (load_file(tmp_path / name / "model.safetensors") for name in "14")
    assert one.keys() == four.keys()
    assert all(torch.allclose(one[key], four[key], rtol=0, atol=1e-6) for key in one)
    assert not torch.equal(one["stem.weight"], network_for(recipe).stem.weight)
    for a, b in zip(whole.history, parts.history, strict=True):
        assert a["realised_depth"] == b["realised_depth"]
        assert a["train_error"] == b["train_error"]
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-5)


def test_micro_batches_draw_their_own_rows_but_share_block_coins(tiny):
    for granularity, same in (("block", True), ("row", False)):
        sampler = sampler_of(network_for(tiny(survival="0.5", granularity=granularity)))
        assert (sampler.plan(3, part=0) == sampler.plan(3, part=1)) is same


@pytest.mark.parametrize("changes", [{"survival": "0.5"}, {"rule": "swapout"}, {"rule": "constant"}], ids=str)
def test_realised_depth_is_a_recount_of_the_plans(tiny, tmp_path, changes):
    recipe = tiny(**changes)
    history = train(recipe, tmp_path / "run", quiet=True).history
    model = network_for(recipe, steps=8)
    plans = [depth_of(model, sampler_of(model).plan(step)) for step in range(8)]
    assert [line["realised_depth"] for line in history] == pytest.approx([sum(plans[:4]) / 4, sum(plans[4:]) / 4])


def test_metrics_of_an_epoch_tell_the_truth(finished):
    recipe, path, outcome = finished
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    assert lines == outcome.history
    assert [line["epoch"] for line in lines] == [1, 2]
    assert [line["lr"] for line in lines] == pytest.approx([recipe.lr_at(0.25), recipe.lr_at(0.75)])
    assert [line["expected_depth"] for line in lines] == pytest.approx([2.0, 2.0])  # 5/6 + 4/6 + 3/6
    for line in lines:
        assert line["train_error"] * 200 / 100 == pytest.approx(round(line["train_error"] * 200 / 100))
        assert line["validation_error"] * 40 / 100 == pytest.approx(round(line["validation_error"] * 40 / 100))
        assert line["images_per_second"] == pytest.approx(200 / line["seconds"])
    assert outcome.train_seconds == pytest.approx(sum(line["seconds"] for line in lines))


@pytest.mark.parametrize(
    ("timing", "expected"),
    [
        ("early(0.5)", [0.3, 3.0]),
        ("late(0.5)", [3.0, 0.3]),
        ("plateau(0.25, 0.5)", [0.3 + 2.7 * 0.25, 3.0]),
        ("progressive(2)", [3 - 2.7 * (1 - math.exp(-2 * 3 / 8)), 3 - 2.7 * (1 - math.exp(-2 * 7 / 8))]),
    ],
)
def test_timing_reaches_plans_metrics_and_the_final_evaluation(tiny, tmp_path, timing, expected):
    recipe = tiny(survival="0.1", survival_timing=timing, lr=0.01)
    outcome = train(recipe, tmp_path / "run", quiet=True)
    assert [line["expected_depth"] for line in outcome.history] == pytest.approx(expected)  # at updates 3 and 7
    last = {"late(0.5)": 0.3, "progressive(2)": 3 - 2.7 * (1 - math.exp(-2))}.get(timing, 3.0)
    assert outcome.expected_depth == pytest.approx(last)
    _, model = load_run(tmp_path / "run")
    assert expected_depth_of(model) == pytest.approx(last)
    found = evaluate(model, loader_for(recipe, "test").eval_batches(), samples=0).deterministic
    # the loop evaluates at the rates in force after the last update, the report at those of the training's end
    assert outcome.history[-1]["test_nll"] == pytest.approx(found.nll, rel=1e-6)
    assert outcome.evaluation.deterministic.nll == pytest.approx(found.nll, rel=1e-6)


def test_warm_up_of_the_rates_reaches_plans_metrics_and_evaluation(tiny, tmp_path, cut_power):
    recipe = tiny(survival="0.1", survival_timing="warmup(1)", epochs=3, lr=0.01)
    cut_power(recipe, tmp_path / "run", 5)  # after one epoch of 4 updates
    saved = Run.open(tmp_path / "run").load_state()
    outcome = train(recipe, tmp_path / "run", resume=True, quiet=True)
    history = outcome.history
    expected = [3 * (1.0 - 0.9 * (4 * epoch - 1) / 12) for epoch in (1, 2, 3)]  # at the last update of each epoch
    assert [line["expected_depth"] for line in history] == pytest.approx(expected)
    depths = [line["realised_depth"] for line in history]
    assert depths[0] > 2.0 > depths[2]

    model = network_for(recipe, steps=12)
    model.load_state_dict(saved["model"])
    test = loader_for(recipe, "test")
    with using(model, sampler_of(model).expectation(4)):
        current = evaluate(model, test.eval_batches(), samples=0).deterministic
    final = evaluate(model, test.eval_batches(), samples=0).deterministic
    assert history[0]["test_nll"] == pytest.approx(current.nll, rel=1e-6)
    assert abs(final.nll - current.nll) > 0.001

    _, trained = load_run(tmp_path / "run")
    reported = evaluate(trained, test.eval_batches(), samples=0).deterministic
    assert outcome.evaluation.deterministic.nll == pytest.approx(reported.nll, rel=1e-6)
    assert outcome.expected_depth == pytest.approx(0.3)


@pytest.mark.filterwarnings("ignore::residrop.common.errors.InactiveWarning")  # rates of 1 are meant here
def test_select_best_reports_the_weights_of_the_lowest_validation_error(tiny, tmp_path):
    # the second half of the training destroys the network
    spoil = {"lr_drops": (0.5,), "lr_factor": 1e3, "epochs": 4, "validation": 60, "lr": 0.1, "limit": 400}
    recipe = tiny(select="best", survival="1", **spoil)
    outcome = train(recipe, tmp_path / "best", quiet=True)
    errors = [line["validation_error"] for line in outcome.history]
    chosen = errors.index(min(errors))
    assert chosen < 2
    assert errors[-1] > min(errors) + 10
    assert outcome.evaluation.deterministic.error == outcome.history[chosen]["test_error"]
    best, model = (load_file(tmp_path / "best" / f"{name}.safetensors") for name in ("best", "model"))
    assert all(torch.equal(best[key], model[key]) for key in model)

    last = train(recipe.replace(select="last"), tmp_path / "last", quiet=True)
    assert last.evaluation.deterministic.error == last.history[-1]["test_error"]
    assert last.history[-1]["test_error"] == outcome.history[-1]["test_error"]


def test_eval_every_leaves_epochs_out_but_never_the_last(tiny, tmp_path):
    recipe = tiny(epochs=3, eval_every=2)
    history = train(recipe, tmp_path / "run", quiet=True).history
    assert ["test_error" in line for line in history] == [False, True, True]
    assert ["test_nll" in line for line in history] == [False, True, True]
    every = train(recipe.replace(eval_every=1), tmp_path / "every", quiet=True).history
    assert [line["train_loss"] for line in every] == [line["train_loss"] for line in history]


@pytest.mark.filterwarnings("ignore::residrop.common.errors.InactiveWarning")  # rates of 1 are meant here
def test_loss_that_is_not_finite_is_an_error_with_advice(tiny, tmp_path):
    with pytest.raises(RunError, match=r"the loss is (nan|inf) in epoch 1; try a smaller lr"):
        train(tiny(lr=1e30, survival="1"), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run" / "model.safetensors").exists()
    assert not (tmp_path / "run" / "last.pt").exists()


def test_timed_saves_happen_at_every_update_if_asked(tiny, tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(loop.State, "save", lambda state, run: saved.append(state.update))
    train(tiny(epochs=1, checkpoint_minutes=0.0), tmp_path / "run", quiet=True)
    assert set(saved) == {1, 2, 3, 4}


def test_digits_are_learnt(tiny, tmp_path):
    recipe = tiny(limit=None, epochs=4, lr=0.1, samples=3)
    outcome = train(recipe, tmp_path / "run", quiet=True)
    assert outcome.evaluation.deterministic.error < 15.0
    assert outcome.evaluation.images == 355
    errors = [line["train_error"] for line in outcome.history]
    assert errors[-1] < 25.0 < errors[0]


def test_runs_repeat_and_seeds_differ(tiny, tmp_path, assert_same_run):
    recipe = tiny(epochs=1, augmentation="shift")
    for name, seed in (("a", 0), ("b", 0), ("c", -7)):
        train(recipe.replace(seed=seed), tmp_path / name, quiet=True)
    assert_same_run(tmp_path / "a", tmp_path / "b")
    a, c = (load_file(tmp_path / name / "model.safetensors") for name in "ac")
    assert not any(torch.equal(a[key], c[key]) for key in a if a[key].ndim == 4)


def test_global_random_state_is_neither_read_nor_moved(tiny, tmp_path, assert_same_run):
    recipe = tiny(epochs=1, augmentation="shift", rule="swapout", samples=2)
    train(recipe, tmp_path / "a", quiet=True)
    torch.manual_seed(12345)
    before = torch.get_rng_state()
    train(recipe, tmp_path / "b", quiet=True)
    assert torch.equal(torch.get_rng_state(), before)
    assert_same_run(tmp_path / "a", tmp_path / "b")


def test_channels_last_is_only_a_memory_format(tiny, tmp_path):
    recipe = tiny(epochs=1, survival="0.5")
    for name, choice in (("a", True), ("b", False)):
        train(recipe.replace(channels_last=choice), tmp_path / name, quiet=True)
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert all(torch.allclose(a[key], b[key], rtol=1e-3, atol=1e-4) for key in a)


# Refused before anything is written


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"network": "resnet-9"}, "9"),
        ({"network": "nonsense-8"}, "nonsense-8"),
        ({"rule": "nonsense"}, "nonsense"),
        ({"survival": "1.5"}, r"1\.5"),
        ({"survival": "1,1"}, "2 survival rates"),
        ({"rule": "constant", "theta_2": "0.5"}, "theta_2"),
        ({"device": "nonsense"}, "nonsense"),
        ({"device": "cuda:77"}, "cuda:77"),
        ({"normalization": "imagenet"}, "imagenet"),
        ({"validation": 10_000}, "validation"),
        ({"data": "nonsense"}, "nonsense"),
    ],
    ids=str,
)
def test_bad_recipe_is_refused_before_a_directory_is_made(tiny, tmp_path, changes, message):
    with pytest.raises(UsageError, match=message):
        train(tiny(**changes), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_augmentation_that_cannot_be_is_refused_before_a_directory_is_made(tiny, tmp_path):
    # what is left "already holds a run": the corrected command is refused, too, and --resume as another recipe
    for number in range(8):
        place = tmp_path / "images" / ("train" if number < 6 else "test") / "ab"[number % 2]
        place.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (3, 3), (number, 0, 0)).save(place / f"{number}.png")
    with pytest.raises(ConfigError, match="images of 3x3 allow at most 3"):
        train(tiny(data=f"folder:{tmp_path}/images?size=3", limit=None, augmentation="crop"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_meta_device_is_refused(tiny, tmp_path):
    with pytest.raises(ConfigError, match="meta"):
        train(tiny(device="meta"), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.filterwarnings("ignore:No artists with labels")
def test_one_training_image_is_refused_not_reported_untrained(tiny, tmp_path):
    # a batch of one image is left out, so there are no updates at all: the run "finishes" with its initial weights
    with pytest.raises(ConfigError, match="batch"):
        train(tiny(limit=1), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()
