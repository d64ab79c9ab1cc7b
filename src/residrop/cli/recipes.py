"""`residrop recipes`: the recipes, networks, rules and data sources there are."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from residrop.cli.shared import Json, parse, table_of
from residrop.common.output import check_target, console_for, write
from residrop.data import sources
from residrop.models import list_models
from residrop.rules.catalogue import RULES
from residrop.training import PRESETS, preset

__all__ = ["run"]


@dataclass(frozen=True)
class Recipes:
    """List recipes (the papers' protocols), or show one in full."""

    name: Annotated[str | None, tyro.conf.Positional] = None
    """Recipe to show with all its fields; a name or the path of a .toml file."""
    networks: bool = False
    """List the networks instead."""
    rules: bool = False
    """List the rules instead."""
    data: bool = False
    """List the data sources instead."""
    json: Json = None


def run(arguments: Sequence[str], prog: str) -> int:
    """List recipes, networks, rules or data sources, or show one recipe."""
    args = parse(Recipes, arguments, prog)
    check_target(args.json)
    if args.name is not None:
        return _show(args.name, args.json)
    if args.networks:
        others = {
            "timm:NAME": "any image classifier of timm with residual blocks (docs/train.md)",
            "torchvision:NAME": "the same of torchvision",
            "transformers:PATH": "the same of transformers, from the folder that save_pretrained wrote",
        }
        headings, rows = ("networks", "what it is"), (list_models() | others).items()
    elif args.rules:
        headings, rows = ("rules", "what it is"), [(name, entry.title) for name, entry in RULES.items()]
    elif args.data:
        headings, rows = ("data", "what it is"), sources().items()
    else:
        headings = ("recipe", "what it is", "published error")
        errors = {name: "" if one.published is None else f"{one.published}%" for name, one in PRESETS.items()}
        rows = [(name, one.title, errors[name]) for name, one in PRESETS.items()]
    console_for(args.json).print(table_of(None, headings, rows, left=headings))
    write(args.json, [dict(zip(headings, row, strict=True)) for row in rows])
    return 0


def _show(name: str, target: str | None) -> int:
    console, chosen = console_for(target), preset(name)
    console.print(f"{name}: {chosen.title}", style="bold")
    if chosen.published is not None:
        console.print(f"published test error: {chosen.published}%")
    if chosen.note:
        console.print(f"where the paper is silent: {chosen.note}")
    for key, value in chosen.recipe.to_dict().items():
        console.print(f"  {key}: {value}")
    console.print(f"residrop train --recipe {name}")
    write(target, {"name": name, **dataclasses.asdict(chosen)})
    return 0
