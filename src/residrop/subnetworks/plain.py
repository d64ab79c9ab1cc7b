"""The network of some of a model's blocks as a plain module, in which the others are gone."""

import copy
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from residrop.blocks.attach import detach, in_expectation, rules_of
from residrop.blocks.modes import evaluating
from residrop.blocks.residual import Residual, Shortcut
from residrop.common.errors import ConfigError
from residrop.inference.deploy.folding import without_hooks
from residrop.inference.sampled.batch import Batch
from residrop.subnetworks.blocks import Whole, put_rules, without_extras
from residrop.subnetworks.layers import renumbered
from residrop.subnetworks.shortcuts import shortcut_of, traced
from residrop.surgery.apply import remove
from residrop.surgery.arguments import is_cache
from residrop.surgery.blocks import AppliedBlock

__all__ = ["cut", "plain", "reloads"]


def plain(whole: Whole, kept: Sequence[bool]) -> nn.Module:
    """A module of torch and of the model's own library that computes what the model does under the draw with just the
    blocks that are kept, to the last bit in eval mode.

    Blocks of residrop are traced by `torch.fx`, and the result is a graph of `torch.nn` modules with the names of their
    parameters. Of other models the classes stay: an absent block leaves the `nn.ModuleList` that it stands in, and
    becomes its shortcut elsewhere (`nn.Identity`, or a graph of what it computes, such as a projection).

    Raises:
        ConfigError: the model cannot be traced, or computes something else without the blocks.
    """
    with in_expectation(whole.model):
        model = copy.deepcopy(whole.model)
    names = [block.name for block, keep in zip(whole.blocks, kept, strict=True) if not keep]
    if any(isinstance(module, Residual) for module in model.modules()):
        alive = whole.plan(kept).draws
        factors = {rule: (1.0, float(bool(draw.alive))) for rule, draw in zip(rules_of(model), alive, strict=True)}
        detach(model)
        without_hooks(model)
        found = traced(model, factors)
        if found is None:
            raise ConfigError(
                f"{type(model).__name__} cannot be traced by torch.fx, so it cannot be written without its blocks"
            )
        _check(found, whole, kept)
        return found
    shortcuts = _shortcuts(model, names)
    remove(model)
    first: ConfigError | None = None
    for leave_out in (_out_of_lists, _in_place):
        candidate = copy.deepcopy(model)
        try:
            leave_out(candidate, shortcuts)
            _check(candidate, whole, kept)
        except ConfigError as error:
            first = first or error
        else:
            return candidate
    assert first is not None
    raise first


def cut(model: nn.Module, names: Sequence[str]) -> None:
    """Leave residual blocks out of a model for good, in place: of residrop's, each becomes its `Shortcut`; of others,
    what `plain` makes of it (layers of transformers' models leave their list).

    Args:
        model: of residrop, or plain.
        names: of the blocks.

    Raises:
        ConfigError: a name of no block.
    """
    modules = dict(model.named_modules())
    if any(isinstance(module, Residual) for module in modules.values()):
        known = {name: module for name, module in modules.items() if isinstance(module, Residual)}
        _check_names(model, names, known)
        for name in names:
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, Shortcut(known[name]))
        return
    with evaluating(model):  # as a traced block decides by that
        put_rules(model, None, None)
        try:
            _check_names(model, names, [name for name, one in model.named_modules() if isinstance(one, AppliedBlock)])
            shortcuts = _shortcuts(model, names)
        finally:
            remove(model)
    configured = any(hasattr(getattr(module, "config", None), "to_dict") for module in model.modules())
    (_out_of_lists if configured else _in_place)(model, shortcuts)


def _shortcuts(model: nn.Module, names: Sequence[str]) -> dict[str, nn.Module]:
    """What is left of blocks, under each of their names.

    Raises:
        ConfigError: it cannot be told.
    """
    found: dict[nn.Module, nn.Module] = {}
    for name in names:
        block = model.get_submodule(name)
        shortcut = shortcut_of(block)
        if shortcut is None:
            raise ConfigError(f"{type(block).__name__} cannot be traced by torch.fx, so its shortcut cannot be written")
        found[block] = shortcut
    return {name: found[one] for name, one in model.named_modules(remove_duplicate=False) if one in found}


def _check_names(model: nn.Module, names: Sequence[str], blocks: Collection[str]) -> None:
    for name in names:
        if name not in blocks:
            raise ConfigError(
                f"{type(model).__name__} has no residual block {name!r}; its blocks are {', '.join(blocks)}"
            )


def _in_place(model: nn.Module, shortcuts: dict[str, nn.Module]) -> None:
    for name, shortcut in shortcuts.items():
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, shortcut.train(model.training))


def _out_of_lists(model: nn.Module, shortcuts: dict[str, nn.Module]) -> None:
    """The same, but blocks leave their list where it is one, and numbers of layers follow."""
    lists: dict[str, list[int]] = {}
    others: dict[str, nn.Module] = {}
    for name, shortcut in shortcuts.items():
        parent, _, own = name.rpartition(".")
        if type(model.get_submodule(parent)) is nn.ModuleList and isinstance(shortcut, nn.Identity):
            lists.setdefault(parent, []).append(int(own))
        else:
            others[name] = shortcut
    _in_place(model, others)
    for name, absent in lists.items():
        layers: Any = model.get_submodule(name)
        left = [number for number in range(len(layers)) if number not in absent]
        if not left:
            raise ConfigError(f"no layer of {name} is left; keep one at least")
        renumbered(model, name, left)


def _check(model: nn.Module, whole: Whole, kept: Sequence[bool]) -> None:
    """ConfigError if a model is not the whole one with just these blocks."""
    what = type(whole.model).__name__
    inputs = whole.data[0][0]
    wanted = whole.output(kept, inputs)
    with torch.no_grad(), evaluating(model):
        try:
            with without_extras(model) as more:
                found = Batch(inputs).copied().called(model)
            if more:  # as it will be called
                Batch(inputs).copied().called(model)
        except Exception as error:
            first = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ConfigError(f"{what} fails without the blocks that are left out: {first}") from error
    pairs = list(zip(_tensors(wanted), _tensors(found), strict=False))
    same = len(_tensors(wanted)) == len(_tensors(found)) and all(
        one.shape == other.shape and torch.equal(one, other) for one, other in pairs
    )
    if not same:
        raise ConfigError(
            f"{what} computes something else without the blocks than with them absent; its forward depends on where "
            "they stand: name other blocks"
        )


def reloads(model: nn.Module, whole: Whole, kept: Sequence[bool]) -> bool | None:
    """Whether a sub-network of transformers, built again from its configuration, is the same with its weights; None for
    other models."""
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "to_dict") or not hasattr(model, "save_pretrained"):
        return None
    try:
        with torch.device("meta"):
            again = type(model)(copy.deepcopy(config))
        again.load_state_dict(model.state_dict(), assign=True)
        buffers = dict(model.named_buffers())
        for name, buffer in list(again.named_buffers()):
            if buffer.is_meta:  # those that no file keeps
                holder, _, own = name.rpartition(".")
                again.get_submodule(holder)._buffers[own] = buffers[name]
        _check(again.eval(), whole, kept)
    except Exception:  # whatever the code of a model may raise
        return False
    return True


def _tensors(output: Any) -> list[Tensor]:
    leaves = tree_leaves(output, is_leaf=is_cache)
    return [leaf.nan_to_num() for leaf in leaves if isinstance(leaf, Tensor)]
