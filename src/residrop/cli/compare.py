"""`residrop compare`: several rules, with the same data, seeds and schedule."""

import statistics
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console

from residrop.cli.shared import Fields, Json, Quiet, RecipeName, free_directory, parse, peek, resumed, table_of
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

__all__ = ["run"]


@dataclass(frozen=True)
class Compare:
    """Train several rules on the same data, seeds and schedule, and print them side by side.

    The table has the columns of Table 1 of Swapout, both kinds of inference, and the training time relative to
    constant depth. Finished runs are not trained again with --resume.
    """

    settings: tyro.conf.OmitArgPrefixes[Fields] = field(default_factory=Fields)
    recipe: RecipeName = "digits"
    rules: tuple[str, ...] = ("constant", "stochastic-depth", "swapout", "skipforward", "dropout", "depth-dropout")
    """Rules to compare. Each takes its paper's survival rates unless --survival is given."""
    seeds: int = 1
    """Number of seeds per rule, from --seed upwards."""
    out: Path | None = None
    """Directory for the runs, the table and the curves (default: runs/compare-RECIPE-001, ...)."""
    resume: bool = False
    """Continue the comparison in --out; finished runs are kept."""
    json: Json = None
    quiet: Quiet = False


def run(arguments: Sequence[str], prog: str) -> int:
    """Train every rule with every seed, print the table, draw the curves."""
    args = parse(Compare, arguments, prog, _start(arguments))
    base = args.settings.recipe()
    check_target(args.json)
    if not args.rules or args.seeds < 1:
        raise ConfigError(f"{len(args.rules)} rules and {args.seeds} seeds were given; compare at least one of each")
    with ExitStack() as stack:
        out = args.out or stack.enter_context(free_directory(f"compare-{short_name(args.recipe)}"))
        stack.enter_context(held(out))
        return _compare(args, base, out)


def _compare(args: Compare, base: Recipe, out: Path) -> int:
    seeds = range(base.seed, base.seed + args.seeds)
    recipes = [_for_rule(base, rule) for rule in dict.fromkeys(args.rules)]
    if (out / "settings.json").exists() and not args.resume:
        raise RunError(f"{out} already holds a comparison; continue it with --resume, or choose another --out")
    for recipe in recipes:  # all of them before the first is trained, and before the saved settings change
        prepare(recipe)
        for seed in seeds:
            check_same(recipe.replace(seed=seed), out / f"{recipe.rule}-seed{seed}", args.resume)
    saved = {"settings": base.to_dict(), "rules": list(args.rules), "seeds": args.seeds}
    write_record(out / "settings.json", saved)
    rows: list[dict[str, Any]] = []
    failed: list[str] = []
    curves: dict[str, list[dict[str, Any]]] = {}
    for recipe in recipes:
        outcomes: list[Outcome] = []
        for seed in seeds:
            if not args.quiet:
                Console(stderr=True).print(f"{recipe.rule}, seed {seed}", highlight=False, style="bold")
            path = out / f"{recipe.rule}-seed{seed}"
            try:
                outcomes.append(train(recipe.replace(seed=seed), path, resume=args.resume, quiet=args.quiet))
            except Interrupted:
                raise Interrupted(f"stopped; continue with residrop compare --resume --out {out}") from None
            except UsageError as error:  # it diverged, say; the others are compared without it
                failed.append(f"{path.name}: {error}")
        if outcomes:
            rows.append(_row(recipe.rule, outcomes))
            curves[recipe.rule] = outcomes[0].history
    if not rows:
        raise RunError(f"all {len(failed)} trainings failed; {failed[0]}")
    constant = next((row["train_seconds"] for row in rows if row["rule"] == "constant"), None)
    for row in rows:
        row["relative_time"] = row["train_seconds"] / constant if constant else None
    console = console_for(args.json)
    title = f"{base.network}, {base.data}, {base.epochs} epochs, {args.seeds} seed(s)"
    headings = ("rule", "parameters", "deterministic", "sampled", "time", "expected depth")
    console.print(table_of(title, headings, map(_cells, rows), left=("rule",)))
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
        raise RunError(f"{len(failed)} of {len(recipes) * len(seeds)} trainings failed; {failed[0]}")
    return 0


def _start(arguments: Sequence[str]) -> Compare:
    """The options that those on the command line override: of the comparison to resume, or of a recipe."""
    saved = resumed(arguments, "settings.json")
    if saved:
        try:
            found = read_record(saved, {"settings": dict, "rules": [str], "seeds": int})
            settings = Fields.from_recipe(Recipe.from_dict(found["settings"]))
            return Compare(settings=settings, rules=tuple(found["rules"]), seeds=found["seeds"])
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


def _for_rule(base: Recipe, rule: str) -> Recipe:
    """The base recipe under another rule; options that the rule does not take are left out."""
    options = entry_of(rule).options
    free = {name: None for name in ("theta_2", "granularity", "rescale", "rows", "of") if name not in options}
    return base.replace(rule=rule, **free, **({"survival": None} if rule == "constant" else {}))


def _row(rule: str, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """The first seed's outcome, with means and standard deviations over seeds in place of its numbers."""
    found = [outcome.to_dict() for outcome in outcomes]
    row: dict[str, Any] = {**found[0], "rule": rule}
    for key in ("deterministic_error", "sampled_error"):
        values = [value[key] for value in found]
        row[key] = None if None in values else statistics.fmean(values)
        row[f"{key}_std"] = statistics.stdev(values) if len(values) > 1 and None not in values else None
    row["train_seconds"] = statistics.fmean(value["train_seconds"] for value in found)
    row["details"] = [value["details"] for value in found]
    return row


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    return (
        row["rule"],
        f"{row['parameters']:,}",
        *(_percent(row[key], row[f"{key}_std"]) for key in ("deterministic_error", "sampled_error")),
        f"{row['relative_time']:.2f}x" if row["relative_time"] else f"{row['train_seconds']:.0f} s",
        f"{row['expected_depth']:.2f}",
    )


def _percent(value: float | None, deviation: float | None) -> str:
    spread = "" if deviation is None else f" ± {deviation:.2f}"
    return "-" if value is None else f"{value:.2f}{spread}%"
