"""What of a model may be residual blocks although no sums were found in it: the report names it, so that a part of a
model under rules is not taken for all of it.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from torch import nn

from residrop.surgery.reading.read import read

__all__ = ["overlooked"]

LEAST_SHARE = 0.02  # of the model's parameters; a class that has less is not worth a line


def overlooked(model: nn.Module, taken: Iterable[nn.Module], named: Iterable[str]) -> list[tuple[str, str]]:
    """Lists of modules of one class that repeat, in which nothing has a rule and nothing is named as left alone.

    Args:
        model: any model.
        taken: its blocks under rules.
        named: names of modules that the report mentions already.

    Returns:
        (names, what there is to know), for classes that hold a fiftieth of the model's parameters or more.
    """
    mentioned = {model.get_submodule(name) for name in named}
    done = {*taken, *mentioned}
    around = {module for module in model.modules() if any(part in done for part in module.modules())}
    total = sum(parameter.numel() for parameter in model.parameters())
    lists = list(_lists(model, "", around, done, max(total, 1)))
    shares: dict[str, float] = {}
    for one in lists:
        shares[one.kind] = shares.get(one.kind, 0.0) + one.share
    return [
        (
            one.name,
            f"{one.number} x {one.kind}, {one.share:.1%} of the model's parameters, no residual blocks as far as can "
            f"be read ({one.why}); if they are, name them in `blocks` for the generic rule",
        )
        for one in lists
        if shares[one.kind] >= LEAST_SHARE
    ]


def _may_be_residual(module: nn.Module) -> bool:
    """False for layers, sequences of them, and a single layer (with norm and activation) that changes the shape."""
    layers = [one for one in module.modules() if isinstance(one, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d))]
    if type(module) is nn.Sequential or next(module.children(), None) is None or not layers:
        return False
    layer = layers[0]
    if len(layers) > 1:
        return True
    if isinstance(layer, nn.Linear):
        return layer.in_features == layer.out_features
    return layer.in_channels == layer.out_channels and max(layer.stride) == 1


class _List(NamedTuple):
    """Modules of one class in a list: their names, class, number, share of the model's parameters, and why they are no
    blocks."""

    name: str
    kind: str
    number: int
    share: float
    why: str


_LITTLE = "what it adds to its input holds few of its weights"


def _lists(module: nn.Module, name: str, around: set[nn.Module], done: set[nn.Module], total: int) -> Iterator[_List]:
    """Lists that are not `around` something mentioned."""
    if module in done:
        return
    prefix = f"{name}." if name else ""
    groups: dict[type, dict[str, nn.Module]] = {}
    if isinstance(module, (nn.ModuleList, nn.Sequential)):
        for key, child in module.named_children():
            if child not in around and _may_be_residual(child):
                groups.setdefault(type(child), {})[key] = child
    listed: set[nn.Module] = set()
    for kind, members in groups.items():
        inner = [
            found for key, child in members.items() for found in _lists(child, f"{prefix}{key}", around, done, total)
        ]
        share = sum(parameter.numel() for child in members.values() for parameter in child.parameters()) / total
        if len(members) < 2 or sum(one.share for one in inner) >= share / 2:  # stages, say, that hold the blocks
            continue
        listed |= set(members.values())
        names = [f"{prefix}{key}" for key in members]
        if len(members) == len(module._modules):
            names = [f"{prefix}*"]
        elif len(names) > 4:
            names[2:-1] = ["..."]
        why = read(next(iter(members.values()))).why or _LITTLE
        yield _List(", ".join(names), kind.__name__, len(members), share, why)
    for key, child in module.named_children():
        if child not in listed:
            yield from _lists(child, f"{prefix}{key}", around, done, total)
