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
from residrop.training.loggers import make_loggers
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


@dataclass(frozen=True)
class Variant:
    """One row of a comparison: a recipe, what tables call it, its directory, and the values of swept fields in it."""

    recipe: Recipe
    label: str
    name: str
    values: dict[str, str]


def compare(args: Compare, out: Path) -> int:
    """Train what the options say into a directory, which this process holds."""
    make_loggers(args.log)
    base = args.settings.recipe()
    seeds = range(base.seed, base.seed + args.seeds)
    variants = _variants(base, args.rules, args.sweep)
    if len({one.name for one in variants}) < len(variants):
        raise ConfigError(
            "two of the values swept would have one directory; give values that differ in more than signs"
        )
    if (out / "recipe.json").exists():
        raise RunError(f"{out} holds a single run; choose another --out")
    if (out / "settings.json").exists() and not args.resume:
        raise RunError(
            f"{out} already holds a comparison; continue it with residrop compare --resume --out {out}, or choose "
            "another --out"
        )
    for one in variants:  # all of them before the first is trained, and before the saved settings change
        prepare(one.recipe)
        for seed in seeds:
            check_same(one.recipe.replace(seed=seed), out / f"{one.name}-seed{seed}", args.resume)
    saved: dict[str, Any] = {name: list(getattr(args, name)) for name in ("rules", "sweep", "log")}
    write_record(out / "settings.json", {"settings": base.to_dict(), "seeds": args.seeds, **saved})
    rows: list[dict[str, Any]] = []
    failed: list[str] = []
    curves: dict[str, list[dict[str, Any]]] = {}
    for variant in variants:
        outcomes: list[Outcome] = []
        for seed in seeds:
            if not args.quiet:
                Console(stderr=True).print(f"{variant.label}, seed {seed}", highlight=False, style="bold")
            path = out / f"{variant.name}-seed{seed}"
            try:
                one = variant.recipe.replace(seed=seed)
                outcomes.append(train(one, path, resume=args.resume, quiet=args.quiet, log=args.log))
            except Interrupted:
                raise Interrupted(f"stopped; continue with residrop compare --resume --out {out}") from None
            except UsageError as error:  # it diverged, say; the others are compared without it
                failed.append(f"{path.name}: {error}")
        if outcomes:
            rows.append(_row(variant, outcomes))
            curves[variant.label] = outcomes[0].history
    if not rows:
        raise RunError(f"all {len(failed)} trainings failed; {failed[0]}")
    for row in rows:
        constant = (one for one in rows if one["rule"] == "constant" and one["swept"].items() <= row["swept"].items())
        seconds = next((one["train_seconds"] for one in constant), None)
        row["relative_time"] = row["train_seconds"] / seconds if seconds else None
    console = console_for(args.json)
    swept = {field for one in variants for field in one.values}
    shown = {"network": base.network, "data": base.data, "epochs": f"{base.epochs} epochs"}
    title = ", ".join(text for field, text in shown.items() if field not in swept)
    headings = (
        "rule" if len({row["rule"] for row in rows}) == len(rows) else "variant",
        "parameters",
        "deterministic",
        "sampled",
        "time",
        "expected depth",
    )
    console.print(table_of(f"{title}, {args.seeds} seed(s)", headings, map(_cells, rows), left=headings[:1]))
    console.print("errors on the test images; time is training time relative to constant depth")
    write(args.json, rows)
    try:
        write_json(out / "compare.json", rows)
        draw_curves(out / "curves.png", curves, title)
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
            found = {
                "sweep": [],
                "log": ["tensorboard"],
                **read_record(saved, {"settings": dict, "rules": [str], "seeds": int}),
            }
            settings = Fields.from_recipe(Recipe.from_dict(found["settings"]))
            rules, sweep = tuple(found["rules"]), tuple(found["sweep"])
            log = tuple(found["log"])
            return Compare(settings=settings, rules=rules, seeds=found["seeds"], sweep=sweep, log=log)
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


def _variants(base: Recipe, rules: Sequence[str], sweep: Sequence[str]) -> list[Variant]:
    """What is compared; equal recipes are there once."""
    swept = [_values(one) for one in sweep]
    fields = [pairs[0][0] for pairs in swept]
    if len(set(fields)) < len(fields):
        raise ConfigError(f"sweep has a field twice ({', '.join(fields)}); give all values of a field at once")
    rules = list(dict.fromkeys(rules))
    found: list[Variant] = []
    for rule in rules:
        for combined in product(*swept):
            words = [word for field, value in combined for word in _words(field, value)]
            made = parse(Fields, words, "residrop compare --sweep", Fields.from_recipe(base)).recipe()
            recipe = _for_rule(made, rule)
            values = {field: _shown(field, value) for field, value in combined if not _lacks(recipe, field)}
            telling = [f"{field}={value}" for field, value in values.items()]
            label = ", ".join([rule, *telling] if len(rules) > 1 or not telling else telling)
            name = re.sub(r"[^A-Za-z0-9._=]+", "-", "-".join([rule, *telling])).strip("-")
            if all(recipe != one.recipe for one in found):
                found.append(Variant(recipe, label, name, values))
    for one in fields:
        if all(one not in variant.values for variant in found):
            raise ConfigError(f"sweep of {one}: none of {', '.join(rules)} takes it here; leave it out")
    return found


def _shown(field: str, value: str) -> str:
    return Path(value).name if field in ("data", "weights") else value  # where it lies on this machine tells nothing


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
    if field == "survival" and (recipe.rule == "constant" or recipe.budget is not None):
        return True
    return field in _OF_RULES and field not in entry_of(recipe.rule).options


def _for_rule(base: Recipe, rule: str) -> Recipe:
    """The base recipe under another rule; options that the rule does not take are left out."""
    options = entry_of(rule).options
    free = {name: None for name in _OF_RULES if name not in options}
    return base.replace(rule=rule, **free, **({"survival": None} if rule == "constant" else {}))


def _row(variant: Variant, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """The first seed's outcome, with means and standard deviations over seeds in place of its numbers."""
    found = [outcome.to_dict() for outcome in outcomes]
    row: dict[str, Any] = {
        **found[0],
        "rule": variant.recipe.rule,
        "label": variant.label,
        "swept": variant.values,
    }
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
