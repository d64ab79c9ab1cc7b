"""Finding the residual blocks of a model that nobody here wrote."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from residrop.blocks.residual import Residual
from residrop.common.errors import ConfigError
from residrop.rules.base import Rule
from residrop.surgery.blocks import AppliedBlock
from residrop.surgery.drops import Own, own_survival
from residrop.surgery.finding import as_whole, candidates, inside_branches, named
from residrop.surgery.libraries.transformers.layerdrop import LayerDrop
from residrop.surgery.overlooked import overlooked
from residrop.surgery.read_block import ReadBlock

__all__ = ["Found", "LeftAlone", "check_bare", "drops_of", "find", "own_drops"]

LeftAlone = tuple[str, str]  # name of a module, and why it stays as it is


@dataclass(frozen=True)
class Found:
    """A block to be put under rules.

    Attributes:
        name: dotted name in the model.
        block: the module.
        mixin: what takes the place of the block's forward.
        drop: the model's own layer drop, where a rule for the whole block takes its place.
    """

    name: str
    block: nn.Module
    mixin: type[AppliedBlock]
    drop: LayerDrop | None = None

    @property
    def kind(self) -> str:
        """How the block is known, for reports: its class, and "whole" if its branches are not told apart."""
        library = type(self.block).__module__.partition(".")[0]
        name = type(self.block).__name__
        whole = "" if issubclass(self.mixin, ReadBlock) else ", whole"
        return f"{name if library == '__main__' else f'{library} {name}'}{whole}"

    @property
    def branches(self) -> int:
        """Number of branches, each with a rule of its own."""
        return len(self.mixin.residrop_reading.branches) if issubclass(self.mixin, ReadBlock) else 1


def check_bare(model: nn.Module) -> None:
    """ConfigError if a model has rules already."""
    what = type(model).__name__
    if any(isinstance(module, AppliedBlock) for module in model.modules()):
        raise ConfigError(f"{what} has rules already; call residrop.remove(model) first")
    if any(isinstance(module, (Residual, Rule)) for module in model.modules()):
        raise ConfigError(
            f"{what} has residual blocks of residrop already; give their rules when you build it, as in "
            "residrop.create(..., rule=...), and call residrop.attach(model)"
        )


def find(
    model: nn.Module, blocks: Any, *, branches: bool = True, drops: Mapping[nn.Module, LayerDrop] | None = None
) -> tuple[list[Found], list[LeftAlone]]:
    """The blocks of a model in the order of its modules, and those that have to stay as they are.

    Args:
        model: any model.
        blocks: None for all that are found (see `surgery.finding`); or a name pattern ("encoder.layers.*"; `*` does not
            cross a dot), a class, a module list (its elements), a module, or several of these.
        branches: False takes blocks as a whole.
        drops: the layers whose layer drop is taken over; they are found as whole blocks.

    Raises:
        ConfigError: nothing matches, a named module is no part of the model, or a block lies inside another.
    """
    names = {module: name for name, module in model.named_modules()}
    drops = {layer: drop for layer, drop in (drops or {}).items() if drop.active and drop.mixin is not None}
    left: list[LeftAlone] = []
    if blocks is None:
        chosen, left = candidates(model, names, drops)
    else:
        wanted = {block for one in _several(blocks) for block in _matches(model, names, one)}
        chosen = {block: named(block) for block in names if block in wanted}
    found: list[Found] = []
    for block, mixin in chosen.items():
        drop = drops.get(block)
        if "forward" in block.__dict__:
            left.append((names[block], "its forward was replaced on the object, by an engine or by hand"))
        elif drop is not None and drop.mixin is not None:
            found.append(Found(names[block], block, drop.mixin, drop))
        else:
            found.append(Found(names[block], block, mixin if branches else as_whole(mixin)))
    if not found:
        raise ConfigError(_nothing(model, blocks, left))
    _check_apart(found)
    return found, left


def _check_apart(found: list[Found]) -> None:
    owner: dict[nn.Module, Found] = {}
    for one in found:
        for part in one.block.modules():
            owner.setdefault(part, one)
    for one in found:  # blocks come in the order of modules, so an outer one was first
        outer = owner[one.block]
        if outer is not one:
            raise ConfigError(f"block {one.name!r} lies inside block {outer.name!r}; choose one of the two in `blocks`")


def _several(blocks: Any) -> Iterable[Any]:
    return blocks if isinstance(blocks, (tuple, list, set, frozenset)) else (blocks,)


def _matches(model: nn.Module, names: dict[nn.Module, str], wanted: Any) -> Iterator[nn.Module]:
    if isinstance(wanted, str):
        parts = wanted.split(".")
        for module, name in names.items():
            if name and len(name.split(".")) == len(parts) and all(map(fnmatchcase, name.split("."), parts)):
                yield module
    elif isinstance(wanted, type):
        yield from (module for module in names if isinstance(module, wanted) and module is not model)
    elif isinstance(wanted, nn.Module):
        elements = list(wanted) if isinstance(wanted, (nn.ModuleList, nn.Sequential)) else [wanted]
        for module in elements:
            if module not in names:
                raise ConfigError(
                    f"a {type(module).__name__} in `blocks` is no part of this {type(model).__name__}; take it from "
                    "the model that you give"
                )
            yield module
    else:
        raise ConfigError(f"blocks contains {wanted!r}; give name patterns, classes, modules or lists of modules")


def _nothing(model: nn.Module, blocks: Any, left: list[LeftAlone]) -> str:
    what = type(model).__name__
    if left:
        reasons = "; ".join(f"{name}: {why}" for name, why in left[:3])
        return f"none of the {len(left)} blocks found in {what} can be put under a rule: {reasons}"
    if blocks is not None:
        given = repr(blocks) if isinstance(blocks, (str, type)) else f"these {type(blocks).__name__}"
        return f"nothing in {what} matches blocks={given}; names look like {_examples(model)}"
    looked = "".join(f"; looked at {names}: {why.partition(';')[0]}" for names, why in overlooked(model, (), ())[:2])
    return (
        f"{what} has no residual blocks: in the source of none of its modules is there a sum of a value and a function "
        f"of it that holds most of the module's weights{looked}; if it has blocks all the same, name them, for example "
        f"residrop.apply(model, blocks={_examples(model)}, ...), by a pattern, a class or a module list"
    )


def _examples(model: nn.Module) -> str:
    """Patterns for the module lists of a model, the likeliest places of blocks: those with the most parameters."""
    lists = {
        name: sum(parameter.numel() for parameter in one.parameters())
        for name, one in model.named_modules()
        if name and isinstance(one, (nn.ModuleList, nn.Sequential)) and len({type(each) for each in one}) < len(one)
    }
    likely = sorted(lists, key=lambda name: -lists[name])[:3]
    return " or ".join(repr(f"{name}.*") for name in likely) or repr("layers.*")


def drops_of(found: Found) -> list[tuple[int, nn.Module]]:
    """The block's own drop modules whose place its rules take, each with the number of that rule."""
    return [
        (number, module)
        for number, module in inside_branches(found.block, found.mixin)
        if isinstance(module, nn.Module) and own_survival(module) is not None
    ]


def own_drops(found: Found) -> list[Own] | None:
    """What a block's own drop modules do, one entry per branch; None if it has none."""
    if found.drop is not None:
        return [Own(found.drop.survival, "block", "none")]
    inside: dict[int, list[Own]] = {}
    for number, module in drops_of(found):
        own = own_survival(module)
        assert own is not None
        inside.setdefault(number, []).append(own)
    if not inside:
        return None
    drops = {number: min(owns, key=lambda own: own.survival) for number, owns in inside.items()}
    # a branch without one is always present: models leave the module out where the rate of drops is 0
    always = next(iter(drops.values()))._replace(survival=1.0)
    return [drops.get(number, always) for number in range(found.branches)]
