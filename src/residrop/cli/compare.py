"""`residrop compare`: several rules or values of a field, with the same data, seeds and schedule."""

import dataclasses
import re
import statistics
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from difflib import get_close_matches
from itertools import product
from pathlib import Path
from typing import Any, get_origin, get_type_hints

import tyro
from rich.console import Console

from residrop.cli.shared import Fields, Json, Log, Quiet, RecipeName, free_directory, parse, peek, resumed, table_of
from residrop.common.errors import ConfigError, RunError, UsageError
from residrop.common.files import write_json
from residrop.common.lock import held
from residrop.common.output import check_target, console_for, write
from residrop.rules.catalogue import entry_of
from residrop.training import Interrupted, Outcome, Recipe, preset, train
from residrop.training.checked import read_record, write_record
from residrop.training.logbook import draw_curves
from residrop.training.presets import short_name
from residrop.training.run import check_same
from residrop.training.setup import prepare

__all__ = ["Compare", "compare", "run"]

_OF_RULES = ("theta_2", "granularity", "rescale", "rows", "of")  # which only some take


@dataclass(frozen=True)
class Compare:
    """Train several rules on the same data, seeds and schedule, and print them side by side.

    --sweep does the same with values of any other field: --rules stochastic-depth --sweep survival=0.5,0.7,0.9. Values
    of several fields are combined, each with each. The table has the columns of Table 1 of Swapout, both kinds of
    inference, and the training time relative to constant depth. Finished runs are not trained again with --resume.
    """

    settings: tyro.conf.OmitArgPrefixes[Fields] = field(default_factory=Fields)
    recipe: RecipeName = "digits"
    rules: tuple[str, ...] = ("constant", "stochastic-depth", "swapout", "skipforward", "dropout", "depth-dropout")
    """Rules to compare. Each takes its paper's survival rates unless --survival is given."""
    sweep: tuple[str, ...] = ()
    """Fields and their values, such as survival=0.5,0.7,0.9 or "survival=linear(1, 0.5),0.5" lr=0.1,0.05. Values are
    written as on the command line; commas in brackets part nothing."""
    seeds: int = 1
    """Number of seeds per rule, from --seed upwards."""
    out: Path | None = None
    """Directory for the runs, the table and the curves (default: runs/compare-RECIPE-001, ...)."""
    resume: bool = False
    """Continue the comparison in --out; finished runs are kept."""
    log: Log = ("tensorboard",)
    json: Json = None
    quiet: Quiet = False


def run(arguments: Sequence[str], prog: str) -> int:
    """Train every rule and value with every seed, print the table, draw the curves."""
    args = parse(Compare, arguments, prog, _start(arguments))
    check_target(args.json)
    if not args.rules or args.seeds < 1:
        raise ConfigError(f"{len(args.rules)} rules and {args.seeds} seeds were given; compare at least one of each")
    with ExitStack() as stack:
        out = args.out or stack.enter_context(free_directory(f"compare-{short_name(args.recipe)}"))
        stack.enter_context(held(out))
        return compare(args, out)


def compare(args: Compare, out: Path) -> int:
    """Train what the options say into a directory, which this process holds."""
    base = args.settings.recipe()
    seeds = range(base.seed, base.seed + args.seeds)
    variants = _variants(base, args.rules, args.sweep)
    names = {label: re.sub(r"[^A-Za-z0-9._=-]+", "-", label).strip("-") for label in variants}
    if len(set(names.values())) < len(names):
        raise ConfigError(
            "two of the values swept would have one directory; give values that differ in more than signs"
        )
    if (out / "settings.json").exists() and not args.resume:
        raise RunError(f"{out} already holds a comparison; continue it with --resume, or choose another --out")
    for label, recipe in variants.items():  # all of them before the first is trained, and the saved settings change
        prepare(recipe)
        for seed in seeds:
            check_same(recipe.replace(seed=seed), out / f"{names[label]}-seed{seed}", args.resume)
    saved = {"settings": base.to_dict(), "rules": list(args.rules), "seeds": args.seeds, "sweep": list(args.sweep)}
    write_record(out / "settings.json", saved)
    rows: list[dict[str, Any]] = []
    failed: list[str] = []
    curves: dict[str, list[dict[str, Any]]] = {}
    for label, recipe in variants.items():
        outcomes: list[Outcome] = []
        for seed in seeds:
            if not args.quiet:
                Console(stderr=True).print(f"{label}, seed {seed}", highlight=False, style="bold")
            path = out / f"{names[label]}-seed{seed}"
            try:
                one = recipe.replace(seed=seed)
                outcomes.append(train(one, path, resume=args.resume, quiet=args.quiet, log=args.log))
            except Interrupted:
                raise Interrupted(f"stopped; continue with residrop compare --resume --out {out}") from None
            except UsageError as error:  # it diverged, say; the others are compared without it
                failed.append(f"{path.name}: {error}")
        if outcomes:
            rows.append(_row(label, recipe, outcomes))
            curves[label] = outcomes[0].history
    if not rows:
        raise RunError(f"all {len(failed)} trainings failed; {failed[0]}")
    constant = next((row["train_seconds"] for row in rows if row["rule"] == "constant"), None)
    for row in rows:
        row["relative_time"] = row["train_seconds"] / constant if constant else None
    console = console_for(args.json)
    title = f"{base.network}, {base.data}, {base.epochs} epochs, {args.seeds} seed(s)"
    headings = (
        "rule" if len({row["rule"] for row in rows}) == len(rows) else "variant",
        "parameters",
        "deterministic",
        "sampled",
        "time",
        "expected depth",
    )
    console.print(table_of(title, headings, map(_cells, rows), left=headings[:1]))
    console.print("errors on the test images; time is training time relative to constant depth")
    write(args.json, rows)
    try:
        write_json(out / "compare.json", rows)
        draw_curves(out / "curves.png", curves, f"{base.network}, {base.data}")
    except OSError as error:
        why = f"{out} cannot be written ({error.strerror}); make that possible, then repeat with --resume --out {out}"
        raise RunError(why) from None
    console.print(f"curves: {out / 'curves.png'}")
    if failed:
        for line in failed:
            console.print(f"failed: {line}")
        raise RunError(f"{len(failed)} of {len(variants) * len(seeds)} trainings failed; {failed[0]}")
    return 0


def _start(arguments: Sequence[str]) -> Compare:
    """The options that those on the command line override: of the comparison to resume, or of a recipe."""
    saved = resumed(arguments, "settings.json")
    if saved:
        try:
            found = {"sweep": [], **read_record(saved, {"settings": dict, "rules": [str], "seeds": int})}
            settings = Fields.from_recipe(Recipe.from_dict(found["settings"]))
            rules, sweep = tuple(found["rules"]), tuple(found["sweep"])
            return Compare(settings=settings, rules=rules, seeds=found["seeds"], sweep=sweep)
        except RunError:
            raise
        except (ValueError, TypeError) as error:
            what = f"{saved} is damaged ({error}); give all options of the comparison, or start it anew"
            raise RunError(what) from None
    name = peek(arguments, "--recipe") or "digits"
    recipe = preset(name).recipe
    if not peek(arguments, "--survival"):
        recipe = recipe.replace(survival=None)  # each rule's own, not the preset's
    return Compare(settings=Fields.from_recipe(recipe), recipe=name)


def _variants(base: Recipe, rules: Sequence[str], sweep: Sequence[str]) -> dict[str, Recipe]:
    """What is compared, by what the tables call it; equal recipes are there once."""
    swept = [_values(one) for one in sweep]
    found: dict[str, Recipe] = {}
    for rule in dict.fromkeys(rules):
        for combined in product(*swept):
            words = [word for field, value in combined for word in _words(field, value)]
            recipe = _for_rule(
                parse(Fields, words, "residrop compare --sweep", Fields.from_recipe(base)).recipe(), rule
            )
            telling = [f"{field}={value}" for field, value in combined if not _lacks(recipe, field)]
            label = ", ".join([rule, *telling] if len(rules) > 1 or not telling else telling)
            if recipe not in found.values():
                found[label] = recipe
    return found


def _values(text: str) -> list[tuple[str, str]]:
    """The pairs of field and value of "field=value,value,..."."""
    field, given, values = text.partition("=")
    field = field.strip().replace("-", "_")
    known = [one.name for one in dataclasses.fields(Recipe) if one.name not in ("rule", "seed")]
    if field in ("rule", "seed"):
        raise ConfigError(f"sweep {text!r}: compare rules with --rules and seeds with --seeds")
    if field not in known or not given:
        close = get_close_matches(field, known, n=1)
        hint = f"; did you mean {close[0]}?" if close and field not in known else ""
        raise ConfigError(f"sweep {text!r}: give FIELD=VALUE,VALUE,... with a field of the recipe{hint}")
    parts = [part.strip() for part in re.split(r",(?![^(]*\))", values)]
    if not all(parts):
        raise ConfigError(f"sweep {text!r}: a value is empty; write None for no value")
    return [(field, part) for part in dict.fromkeys(parts)]


def _words(field: str, value: str) -> list[str]:
    """The words of the command line that give a field a value."""
    option, kind = f"--{field.replace('_', '-')}", get_type_hints(Recipe)[field]
    if kind is bool:
        if value not in ("True", "False", "true", "false"):
            raise ConfigError(f"sweep {field}={value}: it is either True or False")
        return [option if value.lower() == "true" else f"--no-{option[2:]}"]
    return [option, *(value.split() if get_origin(kind) is tuple else [value])]


def _lacks(recipe: Recipe, field: str) -> bool:
    """Whether the rule of a recipe does not take a field."""
    if recipe.rule == "constant" and field == "survival":
        return True
    return field in _OF_RULES and field not in entry_of(recipe.rule).options


def _for_rule(base: Recipe, rule: str) -> Recipe:
    """The base recipe under another rule; options that the rule does not take are left out."""
    options = entry_of(rule).options
    free = {name: None for name in _OF_RULES if name not in options}
    return base.replace(rule=rule, **free, **({"survival": None} if rule == "constant" else {}))


def _row(label: str, recipe: Recipe, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """The first seed's outcome, with means and standard deviations over seeds in place of its numbers."""
    found = [outcome.to_dict() for outcome in outcomes]
    row: dict[str, Any] = {**found[0], "rule": recipe.rule, "label": label}
    for key in ("deterministic_error", "sampled_error"):
        values = [value[key] for value in found]
        row[key] = None if None in values else statistics.fmean(values)
        row[f"{key}_std"] = statistics.stdev(values) if len(values) > 1 and None not in values else None
    row["train_seconds"] = statistics.fmean(value["train_seconds"] for value in found)
    row["details"] = [value["details"] for value in found]
    return row


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    return (
        row["label"],
        f"{row['parameters']:,}",
        *(_percent(row[key], row[f"{key}_std"]) for key in ("deterministic_error", "sampled_error")),
        f"{row['relative_time']:.2f}x" if row["relative_time"] else f"{row['train_seconds']:.0f} s",
        f"{row['expected_depth']:.2f}",
    )


def _percent(value: float | None, deviation: float | None) -> str:
    spread = "" if deviation is None else f" ± {deviation:.2f}"
    return "-" if value is None else f"{value:.2f}{spread}%"
