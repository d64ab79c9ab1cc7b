"""The optimizer of a recipe: which parameters it moves, how far, and with how much decay.

Parameters of absent blocks have no gradient, and none of these optimizers moves a parameter without one: neither by
its momentum nor by decay.
"""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from residrop.blocks.skippable import Skippable
from residrop.common.errors import ConfigError
from residrop.common.extras import extra
from residrop.training.recipe import Recipe

__all__ = ["freeze", "layers_of", "make_optimizer"]


def freeze(model: nn.Module, patterns: tuple[str, ...]) -> None:
    """Let parameters be as they are: those that a pattern names, or that are in a module that it names.

    Batch norm goes on collecting statistics where it was in training mode before.

    Raises:
        ConfigError: a pattern names nothing, or nothing is left to train.
    """
    for pattern in patterns:
        found = [one for name, one in model.named_parameters() if _is_named(name, pattern)]
        if not found:
            names = ", ".join(name for name, _ in model.named_children())
            raise ConfigError(f"freeze {pattern!r} is the name of no module or parameter; the network has {names}")
        for one in found:
            one.requires_grad_(False)
    if not any(one.requires_grad for one in model.parameters()):
        raise ConfigError(f"freeze {' '.join(patterns)} leaves nothing to train")


def _is_named(name: str, pattern: str) -> bool:
    parts = name.split(".")
    return any(fnmatchcase(".".join(parts[:end]), pattern) for end in range(1, len(parts) + 1))


def layers_of(model: nn.Module) -> dict[str, int]:
    """For every parameter by name its layer: l for those of block l = 1..L, 0 before the first block, L + 1 for the
    classifier behind the last. What stands between two blocks counts with the one before it."""
    owner: dict[str, int] = {}
    count = 0
    for name, module in model.named_modules():
        if isinstance(module, Skippable):
            count += 1
            owner.update({f"{name}.{own}": count for own, _ in module.named_parameters()})
    layers, now, rest = {}, 0, []
    for name, _ in model.named_parameters():
        rest = [] if name in owner else [*rest, name]
        now = layers[name] = owner.get(name, now)
    layers.update(dict.fromkeys(rest, count + 1))
    return layers


def make_optimizer(recipe: Recipe, model: nn.Module) -> torch.optim.Optimizer:
    """The recipe's optimizer of a model's parameters, but for those that need no gradient.

    Every group has a `scale`, by which it multiplies the learning rate: 1, or less for early layers (`layer_decay`).

    Raises:
        ConfigError: this version of timm does not have the optimizer.
        MissingExtraError: timm is not installed.
    """
    groups = _groups(recipe, model)
    if recipe.optimizer == "sgd":
        return _sgd(recipe, groups)
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=recipe.lr, weight_decay=recipe.weight_decay, fused=True)
    with extra("timm"):
        import timm
        import timm.optim
    make: Any = getattr(timm.optim, recipe.optimizer.capitalize(), None)
    if make is None:
        raise ConfigError(f"timm {timm.__version__} has no {recipe.optimizer}; update it: pip install -U timm")
    options: dict[str, Any] = {"lr": recipe.lr, "weight_decay": recipe.weight_decay}
    if recipe.optimizer == "muon":
        options |= {"momentum": recipe.momentum, "nesterov": recipe.nesterov}
    return make(groups, **options)


def _groups(recipe: Recipe, model: nn.Module) -> list[dict[str, Any]]:
    """Parameters by their decay and learning rate; one group, as long as all are alike."""
    everything = recipe.optimizer == "sgd" if recipe.decay_vectors is None else recipe.decay_vectors
    spared = set() if everything else _spared(model)
    layers: Mapping[str, int] = layers_of(model) if recipe.layer_decay != 1.0 else {}
    last = max(layers.values(), default=0)
    found: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, one in model.named_parameters():
        if one.requires_grad:
            decay = 0.0 if name in spared else recipe.weight_decay
            scale = recipe.layer_decay ** (last - layers.get(name, last))
            found.setdefault((decay, scale), []).append(one)
    return [{"params": some, "weight_decay": decay, "scale": scale} for (decay, scale), some in found.items()]


def _spared(model: nn.Module) -> set[str]:
    """Names of parameters that are not decayed: vectors, and what a model of timm says should not be."""
    named: Any = getattr(model, "no_weight_decay", set)
    return {name for name, one in model.named_parameters() if one.ndim <= 1} | set(named())


def _sgd(recipe: Recipe, groups: list[dict[str, Any]]) -> torch.optim.SGD:
    optimizer = torch.optim.SGD(
        groups,
        lr=recipe.lr,
        momentum=recipe.momentum,
        nesterov=recipe.nesterov and recipe.momentum > 0,
        weight_decay=recipe.weight_decay,
        fused=True,
    )
    if recipe.momentum > 0:
        # Fused SGD cannot start some buffers later than others, as blocks dropped in the first updates ask for. A
        # buffer of zeros is the same: without dampening the first step makes it the gradient either way.
        for group in groups:
            for parameter in group["params"]:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer
