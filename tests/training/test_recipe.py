import ast
import dataclasses
import itertools
import json
import math
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import pytest

from residrop.common.errors import ConfigError
from residrop.training import (
    Recipe,
    checkpoint,
    loop,
    measuring,
    networks,
    optimizers,
    recipe,
    run,
    setup,
    weights,
)

FIELDS = {field.name: field for field in dataclasses.fields(Recipe)}
NAN, INF = math.nan, math.inf

# One other legal value for each field.
OTHER = {
    "graphs": "none",
    "rows": "bernoulli",
    "of": "shortcut",
    "network": "resnet-8",
    "weights": "pretrained",
    "freeze": ("conv1",),
    "without": ("blocks.block2",),
    "width": 2,
    "block": "v2",
    "bn_gamma_init": "uniform",
    "rule": "swapout",
    "survival": "uniform(0.4)",
    "theta_2": "0.3",
    "granularity": "row",
    "rescale": "train",
    "survival_timing": "early(0.5)",
    "coupling": "systematic",
    "at_least": 1,
    "draw_every": 5,
    "budget": "0.4 of flops",
    "spend": "max_regularization",
    "per_cost": True,
    "least": 0.1,
    "refresh": 3,
    "watch": ("discrepancy",),
    "data": "cifar10",
    "split": 0.2,
    "on_error": "skip",
    "validation": 7,
    "limit": 99,
    "normalization": "unit",
    "augmentation": "flip",
    "epochs": 31,
    "batch_size": 64,
    "micro_batches": 2,
    "optimizer": "adamw",
    "lr": 0.2,
    "lr_schedule": "cosine",
    "lr_drops": (0.5, 0.9),
    "lr_factor": 0.2,
    "warmup": 0.1,
    "warmup_lr": 0.02,
    "warmup_form": "linear",
    "momentum": 0.8,
    "nesterov": False,
    "weight_decay": 1e-3,
    "decay_vectors": False,
    "layer_decay": 0.9,
    "clip_grad": 1.0,
    "label_smoothing": 0.1,
    "ema": 0.9,
    "decay_dropped": True,
    "select": "best",
    "seed": 1,
    "samples": 5,
    "precision": "fp32",
    "flips": "alternating",
    "crop_area": 0.25,
    "policy": "rand-augment(1, 5)",
    "erasing": 0.25,
    "mixup": 0.2,
    "cutmix": 1.0,
    "compile": True,
    "device": "cpu",
    "channels_last": False,
    "workers": 0,
    "eval_every": 2,
    "checkpoint_minutes": 1.0,
}
MODULES = (loop, checkpoint, measuring, networks, optimizers, recipe, run, setup, weights)
FREE = {"samples", "workers", "watch", "checkpoint_minutes", "device", "graphs", "on_error"}


def base(**changes):
    needed = (
        {"budget": "0.5", "spend": "sensitivity"} if set(changes) & {"spend", "per_cost", "least", "refresh"} else {}
    )
    needed |= {"lr": 0.01} if "optimizer" in changes else {}
    needed |= {"augmentation": "resized-crop"} if set(changes) & {"flips", "crop_area"} else {}
    return Recipe(**{"validation": 10, **needed, **changes})


def test_table_of_other_values_is_complete():
    assert OTHER.keys() == FIELDS.keys()
    assert all(getattr(base(), name) != value for name, value in OTHER.items())
    assert all(getattr(base(**{name: value}), name) == value for name, value in OTHER.items())


# Every field is read


def reads(module):
    """Names of the recipe's fields that a module's code reads, as attributes or by getattr over a literal tuple."""
    tree = ast.parse(Path(module.__file__).read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name != "__post_init__":
            owners = {argument.arg for argument in [*node.args.args, *node.args.kwonlyargs]} & {"recipe", "self"}
            for inner in ast.walk(node):
                if isinstance(inner, ast.Attribute) and isinstance(inner.value, ast.Name) and inner.value.id in owners:
                    if inner.value.id == "recipe" or module is recipe:
                        yield inner.attr
                elif isinstance(inner, ast.comprehension | ast.For) and isinstance(inner.iter, ast.Tuple):
                    yield from (word.value for word in inner.iter.elts if isinstance(word, ast.Constant))


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_is_read_outside_its_check(name):
    assert any(name in reads(module) for module in MODULES)


def test_every_field_has_a_docstring():
    tree = ast.parse(Path(recipe.__file__).read_text())
    body = next(node for node in tree.body if isinstance(node, ast.ClassDef)).body
    explained = {
        node.target.id
        for node, after in itertools.pairwise(body)
        if isinstance(node, ast.AnnAssign)
        and isinstance(after, ast.Expr)
        and isinstance(after.value, ast.Constant)
        and len(after.value.value) > 10
    }
    assert explained == FIELDS.keys()


# To a file and back


@pytest.mark.parametrize("name", FIELDS)
def test_round_trip_through_json(name):
    made = base(**{name: OTHER[name]})
    again = Recipe.from_dict(json.loads(json.dumps(made.to_dict())))
    assert again == made
    assert again.fingerprint() == made.fingerprint()
    assert type(getattr(again, name)) is type(OTHER[name])


def test_from_dict_refuses_unknown_fields_by_name():
    with pytest.raises(ConfigError, match=r"unknown fields bar, foo; .*another version"):
        Recipe.from_dict({**Recipe().to_dict(), "foo": 1, "bar": 2})


def test_from_dict_of_fewer_fields_takes_defaults():
    assert Recipe.from_dict({"epochs": 3}) == Recipe(epochs=3)


def test_recipe_is_frozen_and_keyword_only():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Recipe().epochs = 3
    with pytest.raises(TypeError):
        Recipe("resnet-20")


def test_replace_checks_anew_and_leaves_the_original():
    original = Recipe()
    assert original.replace(epochs=3).epochs == 3
    assert original.epochs == 30
    with pytest.raises(ConfigError, match="epochs is 0"):
        original.replace(epochs=0)


# Refused values

REFUSED = [
    *[({name: value}, rf"{name} is {value!r}; give a whole number of at least 1")
      for name in ("epochs", "batch_size", "micro_batches", "eval_every") for value in (0, -1, 1.5, True)],
    *[({name: -1}, rf"{name} is -1; give a whole number of at least 0")
      for name in ("validation", "samples", "workers")],
    *[({name: value}, rf"{name} is {value}; it is a share .*\[0, 1\]")
      for name in ("warmup", "momentum", "layer_decay", "label_smoothing") for value in (NAN, -0.1, 1.1, INF)],
    *[({name: value}, rf"{name} is {value}; give a finite number of at least 0")
      for name in ("lr", "warmup_lr", "lr_factor", "weight_decay", "checkpoint_minutes", "clip_grad")
      for value in (NAN, -1e-9, INF)],
    ({"optimizer": "adam"}, r"optimizer is 'adam'; choose one of 'sgd', 'adamw', 'lion', 'muon'"),
    ({"optimizer": "adamw"}, r"lr is 0\.1, which suits sgd; adamw needs its own"),
    ({"optimizer": "lion", "lr": 1e-3, "decay_dropped": True}, r"decay_dropped is on, .* lion has none"),
    *[({"ema": value}, rf"ema is {value}; it is a share between 0 and 1") for value in (0.0, 1.0, -1.0, NAN)],
    ({"ema": 0.9, "select": "best", "validation": 9}, r"ema is given and select is 'best', .* leave one out"),
    ({"freeze": (1,)}, r"freeze is \(1,\); give words"),
    ({"lr_drops": ("a",)}, r"lr_drops is \('a',\); give numbers"),
    ({"limit": 0}, r"limit is 0; .*at least 1"),
    ({"limit": -5}, r"limit is -5; .*at least 1"),
    ({"seed": 1.0}, r"seed is 1\.0; give a whole number"),
    ({"lr_drops": (0.5, 1.5)}, r"lr_drops\[1\] is 1\.5"),
    ({"lr_drops": (NAN,)}, r"lr_drops\[0\] is nan"),
    ({"lr_drops": (0.75, 0.5)}, r"lr_drops are \(0\.75, 0\.5\); give them in rising order"),
    *[({"survival_timing": value}, rf"survival timing .{value}.* is not understood; give constant, warmup")
      for value in ("", "linear", "warmup", "0.5")],
    ({"survival_timing": 0.5}, r"survival_timing is 0\.5; give str"),
    ({"survival_timing": "warmup(100)"}, r"reaches the time 100; times are shares of the training"),
    ({"survival_timing": "early(0.9, 0.2)"}, r"reaches the time 1\.1; times are shares"),
    ({"survival_timing": "early(0.2, -0.1)"}, r"reaches the time -0\.1; times are shares"),
    ({"survival_timing": "points(0.4:1, 0.3:0)"}, r"goes back in time"),
    ({"select": "best"}, r"select is 'best', which needs held-out images; set validation"),
    ({"batch_size": 100, "micro_batches": 3}, r"batch_size 100 cannot be cut into 3 equal micro_batches"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=lambda value: str(value)[:40])
def test_bad_value_is_refused_by_name(changes, message):
    with pytest.raises(ConfigError, match=message):
        Recipe(**changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"lr_drops": ()},
        {"lr_drops": (0.5, 0.5)},
        {"momentum": 0.0},
        {"warmup": 1.0},
        {"survival_timing": "warmup(1)"},
        {"survival_timing": "plateau(0, 1)"},
        {"survival_timing": "points(0:0, 1:1)"},
        {"lr": 0.0},
        {"seed": -3},
        {"samples": 0},
        {"limit": 1},
        {"batch_size": 96, "micro_batches": 96},
    ],
    ids=str,
)
def test_value_at_the_border_is_accepted(changes):
    made = Recipe(**changes)
    assert {name: getattr(made, name) for name in changes} == changes


LITERALS = [
    name
    for name, hint in get_type_hints(Recipe).items()
    if any(get_origin(part) is Literal for part in (hint, *get_args(hint)))
]


@pytest.mark.parametrize("name", [name for name in LITERALS if name in ("lr_schedule", "select", "precision")])
def test_misspelt_choice_is_refused_not_silently_another_one(name):
    # lr_schedule="cos" trains with steps, select="Best" reports the last epoch, precision="fp16" runs fp32
    with pytest.raises(ConfigError, match=name):
        Recipe(**{name: "Best", "validation": 10})


def test_best_without_validation_images_is_refused_for_imagenet():
    # imagenet has no validation part of its own (val/ is its test part): `best` silently reports the last epoch
    with pytest.raises(ConfigError, match="select is 'best'"):
        Recipe(data="imagenet:/tmp", select="best", normalization="imagenet")


# The learning rate


def epochs_of_change(made, updates=7):
    """(1-based epochs, counted from 0) at whose first update the learning rate changes, with the new rate."""
    total = made.epochs * updates
    rates = [made.lr_at(update / total) for update in range(total)]
    changes = [(0, rates[0])]
    for update in range(1, total):
        if rates[update] != rates[update - 1]:
            assert update % updates == 0, "changes within an epoch"
            changes.append((update // updates, rates[update]))
    return changes


@pytest.mark.parametrize("updates", [1, 7, 352, 391])
@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"epochs": 500}, [(0, 0.1), (250, 0.01), (375, 0.001)]),
        ({"epochs": 256, "lr_drops": (196 / 256, 224 / 256)}, [(0, 0.1), (196, 0.01), (224, 0.001)]),
        ({"epochs": 300, "warmup": 10 / 300}, [(0, 0.01), (10, 0.1), (150, 0.01), (225, 0.001)]),
        ({"epochs": 50, "lr_drops": (0.6, 0.7)}, [(0, 0.1), (30, 0.01), (35, 0.001)]),
        ({"epochs": 40, "lr_drops": ()}, [(0, 0.1)]),
        ({"epochs": 10, "lr_drops": (0.5, 0.5)}, [(0, 0.1), (5, 0.001)]),
    ],
    ids=["cifar", "swapout", "1202", "svhn", "flat", "twice"],
)
def test_steps_change_at_exact_epochs(changes, expected, updates):
    found = epochs_of_change(Recipe(**changes), updates)
    assert [epoch for epoch, _ in found] == [epoch for epoch, _ in expected]
    assert [rate for _, rate in found] == pytest.approx([rate for _, rate in expected], rel=1e-12)


def test_cosine_falls_from_lr_to_zero():
    made = Recipe(lr=0.4, lr_schedule="cosine", epochs=100)
    rates = [made.lr_at(i / 1000) for i in range(1000)]
    assert rates[0] == 0.4
    assert made.lr_at(0.5) == pytest.approx(0.2)
    assert all(a > b for a, b in itertools.pairwise(rates))
    assert 0.0 < rates[-1] < 1e-5
    assert made.lr_at(1.0) == pytest.approx(0.0, abs=1e-12)


def test_cosine_starts_after_the_warm_up():
    made = Recipe(lr=0.4, lr_schedule="cosine", warmup=0.2, warmup_lr=0.03)
    assert made.lr_at(0.0) == made.lr_at(0.1999) == 0.03
    assert made.lr_at(0.2) == 0.4
    assert made.lr_at(0.6) == pytest.approx(0.2)


def test_warm_up_over_the_whole_training_never_leaves_it():
    made = Recipe(lr_schedule="cosine", warmup=1.0, warmup_lr=0.03)
    assert made.lr_at(0.999) == 0.03


def test_linear_warm_up_joins_the_cosine():
    made = Recipe(lr=0.4, warmup=0.2, warmup_lr=0.1, warmup_form="linear", lr_schedule="cosine")
    assert made.lr_at(0.0) == 0.1
    assert made.lr_at(0.1) == pytest.approx(0.25)
    assert made.lr_at(0.2) == 0.4
    assert made.lr_at(0.6) == pytest.approx(0.2)


@pytest.mark.parametrize("form", ["constant", "linear"])
def test_triangular_rises_and_falls_in_straight_lines(form):
    made = Recipe(lr=0.4, warmup=0.25, warmup_lr=0.0, warmup_form=form, lr_schedule="triangular")
    assert [made.lr_at(i / 8) for i in range(8)] == pytest.approx(
        [0.0, 0.2, 0.4, 1 / 3, 0.8 / 3, 0.2, 0.4 / 3, 0.2 / 3]
    )


def test_triangular_without_warm_up_only_falls():
    made = Recipe(lr=0.4, lr_schedule="triangular")
    assert [made.lr_at(i / 4) for i in range(4)] == pytest.approx([0.4, 0.3, 0.2, 0.1])


def test_hash_of_a_recipe_is_that_of_before_its_newer_fields():
    # of the results that were recorded then
    assert "optimizer" not in Recipe().decisive()
    assert Recipe().decisive()["normalization"] == "channel"
    assert Recipe(optimizer="adamw", lr=0.01).decisive()["optimizer"] == "adamw"
    assert Recipe(weights="some/where/a.safetensors").decisive()["weights"] == "a.safetensors"


# The fingerprint


@pytest.mark.parametrize("name", sorted(FIELDS.keys() - FREE - {"data", "eval_every"}))
def test_fingerprint_changes_with(name):
    assert base(**{name: getattr(base(), name)}).fingerprint() != base(**{name: OTHER[name]}).fingerprint()


@pytest.mark.parametrize("name", sorted(FREE))
def test_fingerprint_does_not_change_with(name):
    assert base().fingerprint() == base(**{name: OTHER[name]}).fingerprint()


def test_fingerprint_does_not_change_with_the_folder_of_the_data():
    assert base(data="cifar10:/a").fingerprint() == base(data="cifar10:/b").fingerprint()


def test_fingerprint_of_a_recipe_that_is_not_compiled_is_that_of_before():
    # ledgers hold hashes that were made when recipes had no such field
    fields = {**Recipe().decisive()}
    assert "compile" not in fields
    assert Recipe(compile=True).decisive() == {**fields, "compile": True}


@pytest.mark.parametrize("changes", [{"budget": "0.5"}, {"watch": ("discrepancy",)}], ids=["budget", "watch"])
def test_compile_is_refused_with_what_measures_branches(changes):
    with pytest.raises(ConfigError, match="compile is on"):
        Recipe(compile=True, **changes)


def test_fingerprint_is_stable_across_processes():
    assert Recipe().fingerprint() == Recipe().fingerprint()
    assert len(Recipe().fingerprint()) == 16


def test_fingerprint_changes_with_the_kind_of_data():
    # same shapes and classes: a run on CIFAR-10 can be resumed on SVHN without a word
    assert base(data="cifar10").fingerprint() != base(data="svhn").fingerprint()


def test_fingerprint_changes_with_eval_every_where_it_selects_the_weights():
    every, second = (base(select="best", eval_every=n).fingerprint() for n in (1, 2))
    assert every != second


def test_fingerprint_does_not_change_with_the_name_of_a_bare_folder():
    # "images" has no slash and counts as a kind of data, so the same run refuses /home/me/images and ./images
    assert base(data="images").fingerprint() == base(data="./images").fingerprint()
