"""The network of a recipe: one of ours by its name, or an image classifier of timm, torchvision or transformers.

Those of other libraries are changed by `residrop.apply`, so every rule works on them, and checkpoints of the plain
model load into the one that is trained and back.
"""

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from residrop.blocks.attach import connect, rules_of
from residrop.blocks.observe import branch_flops
from residrop.common.errors import ConfigError, UsageError
from residrop.models import create, reads_flat_rows
from residrop.rules.catalogue import entry_of
from residrop.schedule.timing import parse as parse_timing
from residrop.subnetworks.plain import cut
from residrop.surgery.apply import apply
from residrop.surgery.report import Report
from residrop.training.foreign import is_foreign, plain
from residrop.training.recipe import Recipe

__all__ = ["build_network", "load_weights", "report_of", "survival_of"]

_UNMEASURED = 0.5  # the survival rate before there is another


def build_network(recipe: Recipe, dataset: dict[str, Any]) -> nn.Module:
    """The attached network of a recipe for a data set as `dataset.json` describes it, with random weights.

    `steps` is the length of the training in updates, of which the times of `survival_timing` are shares; without it the
    network has the rates of the training's end throughout. Rates from a budget come with the weights
    (`Run.load_weights`) or are measured as the training starts.

    Raises:
        ConfigError: an unknown network, or one that does not fit the recipe or the images.
    """
    options = {
        "survival": recipe.survival if recipe.budget is None else _UNMEASURED,
        "timing": parse_timing(recipe.survival_timing, training=dataset.get("steps", 0)),
        "seed": recipe.seed,
    }
    for name in ("theta_2", "granularity", "rescale", "rows", "of"):
        options |= {name: getattr(recipe, name)} if getattr(recipe, name) is not None else {}
    model = _changed(recipe, dataset, options) if is_foreign(recipe.network) else _ours(recipe, dataset, options)
    if recipe.coupling != "independent" or recipe.at_least or recipe.draw_every > 1:
        images = torch.zeros(2, dataset["channels"], dataset["size"], dataset["size"])
        costs = branch_flops(model, images) if recipe.coupling == "balanced" else ()
        how: dict[str, Any] = {name: getattr(recipe, name) for name in ("coupling", "at_least", "draw_every")}
        connect(model, seed=recipe.seed, timing=options["timing"], costs=costs, **how)
    return model


def _ours(recipe: Recipe, dataset: dict[str, Any], options: dict[str, Any]) -> nn.Module:
    """A network of ours under the recipe's rule."""
    for name in ("width", "block", "bn_gamma_init"):
        options |= {name: getattr(recipe, name)} if getattr(recipe, name) is not None else {}
    if reads_flat_rows(recipe.network):
        options["in_features"] = dataset["channels"] * dataset["size"] ** 2
    else:
        options["channels"] = dataset["channels"]
    model = create(recipe.network, rule=recipe.rule, classes=len(dataset["classes"]), **options)
    if recipe.without:
        cut(model, recipe.without)
        connect(model, seed=recipe.seed, timing=options["timing"])
    return model


def load_weights(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """`load_state_dict` of tensors by name; RuntimeError if they do not fit.

    Some modules (MNASNet of torchvision) refuse weights without the version of their class, which files of plain
    tensors do not keep; that of the module at hand is the one that wrote them.
    """
    given: Any = OrderedDict(tensors)
    given._metadata = getattr(model.state_dict(), "_metadata", {})
    model.load_state_dict(given)


def survival_of(model: nn.Module) -> list[float]:
    """The survival rates of a model's rules; 1 for those without coins, the first of those with several rates."""
    return [rule.rates[0] if rule.rates else 1.0 for rule in rules_of(model)]


def report_of(model: nn.Module) -> Report | None:
    """What `residrop.apply` did to a network of another library; None for one of ours."""
    return model.__dict__.get("residrop_report")


def _changed(recipe: Recipe, dataset: dict[str, Any], options: dict[str, Any]) -> nn.Module:
    """A model of another library under the recipe's rule."""
    for name in ("width", "block", "bn_gamma_init"):
        if (value := getattr(recipe, name)) is not None:
            option = name.replace("_", "-")
            raise ConfigError(
                f"{name} is {value!r}, which is for networks of residrop; {recipe.network} takes --{option} None, and "
                "options of its own after a question mark"
            )
    size = dataset["size"]
    with torch.random.fork_rng(devices=[]), _refusing(recipe.network, size):
        torch.default_generator.manual_seed(recipe.seed % 2**64)
        model = plain(recipe.network, len(dataset["classes"]), size, dataset.get("config"))
        example = torch.randn(4, dataset["channels"], size, size)
        out = model.eval()(example)
        if not isinstance(out, torch.Tensor) or out.shape != (4, len(dataset["classes"])):
            raise ConfigError(f"{recipe.network} is no classifier: it does not return a number per image and class")
        model.train()
    if recipe.without:
        cut(model, recipe.without)
    if options["survival"] is None:
        options["survival"] = entry_of(recipe.rule).survival
    if example.is_meta:  # no numbers to compare
        example = None
    model.__dict__["residrop_report"] = apply(model, recipe.rule, example=example, **options)
    return model


@contextmanager
def _refusing(network: str, size: int) -> Iterator[None]:
    try:
        yield
    except UsageError:
        raise
    except Exception as error:  # whatever a model raises at images that it cannot read
        what = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"{network} cannot read images of {size}x{size} pixels ({type(error).__name__}: {what}); give another size "
            "with --data folder:PATH?size=N"
        ) from None
