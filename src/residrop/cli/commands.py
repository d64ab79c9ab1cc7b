"""What the commands of the command line do, once their arguments are read."""

import dataclasses
import json
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from rich.console import Console
from rich.table import Table

from residrop.cli.evaluating import show
from residrop.common.errors import ConfigError, DataError, RunError
from residrop.common.files import write_json
from residrop.common.output import check_target as _check_target
from residrop.common.output import console_for as _console
from residrop.common.output import write as _write
from residrop.data import sources
from residrop.data.read import read_images
from residrop.inference import predict
from residrop.models import list_models
from residrop.rules.catalogue import RULES, entry_of
from residrop.training import PRESETS, Interrupted, Outcome, Recipe, Run, load_run, preset, train
from residrop.training.distributed import process_group
from residrop.training.logbook import draw_curves
from residrop.training.run import check_same
from residrop.training.setup import choose_device, precision_context, prepare

__all__ = [
    "Recipes",
    "compare_command",
    "free_directory",
    "predict_command",
    "read_settings",
    "recipes_command",
    "train_command",
]


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
    json: str | None = None
    """Write the listing to this file as JSON (- for standard output)."""


def free_directory(name: str) -> Path:
    """The first of runs/NAME-001, runs/NAME-002, ... that does not exist."""
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", name)
    taken = {path.name for path in Path("runs").glob(f"{stem}-*")}
    number = 1
    while f"{stem}-{number:03d}" in taken:
        number += 1
    return Path("runs") / f"{stem}-{number:03d}"


def read_settings(path: Path) -> dict[str, Any]:
    """What `--resume` starts from: `recipe.json` of a run, or `settings.json` of a comparison."""
    if path.name == "recipe.json":
        return {"settings": Run.open(path.parent).recipe()}
    try:
        found = json.loads(path.read_text())
        return {
            "settings": Recipe.from_dict(found["settings"]),
            "rules": tuple(found["rules"]),
            "seeds": found["seeds"],
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path} is damaged ({error}); give all options of the comparison, or start it anew") from None


def train_command(recipe: Recipe, out: Path | None, name: str, resume: bool, *, target: str | None, quiet: bool) -> int:
    """Train (into a free directory of this `name` if `out` is None), show the evaluation table, write JSON."""
    with process_group(recipe.device) as ranks:
        ranks.from_main(lambda: _check_target(target))
        place = ranks.from_main(lambda: out or free_directory(name))
        outcome = train(recipe, place, resume=resume, quiet=quiet)
    if not ranks.main:
        return 0
    facts = {
        "parameters": f"{outcome.parameters:,}",
        "expected depth": f"{outcome.expected_depth:.2f} blocks",
        "training time": f"{outcome.train_seconds:.1f} s",
        "run": str(place),
    }
    show(_console(target), f"{recipe.network}, {recipe.rule}, {recipe.data}", outcome.evaluation, facts)
    _write(target, outcome.to_dict())
    return 0


def compare_command(
    base: Recipe, rules: Sequence[str], seeds: int, out: Path, resume: bool, *, target: str | None, quiet: bool
) -> int:
    """Train every rule with every seed, print the table, draw the curves."""
    _check_target(target)
    if not rules or seeds < 1:
        raise ConfigError(f"{len(rules)} rules and {seeds} seeds were given; compare at least one of each")
    recipes = [_for_rule(base, rule) for rule in dict.fromkeys(rules)]
    if (out / "settings.json").exists() and not resume:
        raise RunError(f"{out} already holds a comparison; continue it with --resume, or choose another --out")
    for recipe in recipes:  # all of them before the first is trained, and before the saved settings change
        prepare(recipe)
        for seed in range(base.seed, base.seed + seeds):
            check_same(recipe.replace(seed=seed), out / f"{recipe.rule}-seed{seed}", resume)
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "settings.json", {"settings": base.to_dict(), "rules": list(rules), "seeds": seeds})
    except OSError as error:
        raise RunError(f"{out} cannot be written ({error.strerror}); choose another --out") from None
    console = _console(target)
    rows: list[dict[str, Any]] = []
    curves: dict[str, list[dict[str, Any]]] = {}
    for recipe in recipes:
        outcomes: list[Outcome] = []
        for seed in range(base.seed, base.seed + seeds):
            if not quiet:
                Console(stderr=True).print(f"{recipe.rule}, seed {seed}", highlight=False, style="bold")
            path = out / f"{recipe.rule}-seed{seed}"
            try:
                outcomes.append(train(recipe.replace(seed=seed), path, resume=resume, quiet=quiet))
            except Interrupted:
                raise Interrupted(f"stopped; continue with residrop compare --resume --out {out}") from None
        rows.append(_row(recipe.rule, outcomes))
        curves[recipe.rule] = outcomes[0].history
    constant = next((row["train_seconds"] for row in rows if row["rule"] == "constant"), None)
    for row in rows:
        row["relative_time"] = row["train_seconds"] / constant if constant else None
    _show_rows(console, f"{base.network}, {base.data}, {base.epochs} epochs, {seeds} seed(s)", rows, seeds)
    draw_curves(out / "curves.png", curves, f"{base.network}, {base.data}")
    console.print(f"curves: {out / 'curves.png'}")
    write_json(out / "compare.json", rows)
    _write(target, rows)
    return 0


def _for_rule(base: Recipe, rule: str) -> Recipe:
    """The base recipe under another rule; options that the rule does not take are left out."""
    options = entry_of(rule).options
    free = {name: None for name in ("theta_2", "granularity", "rescale", "rows", "of") if name not in options}
    return base.replace(rule=rule, **free, **({"survival": None} if rule == "constant" else {}))


def _row(rule: str, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    found = [outcome.to_dict() for outcome in outcomes]

    def mean(key: str) -> float | None:
        values = [value[key] for value in found]
        return None if None in values else statistics.fmean(values)

    row: dict[str, Any] = {**found[0], "rule": rule}
    for key in ("deterministic_error", "sampled_error"):
        values = [value[key] for value in found]
        row[key] = mean(key)
        row[f"{key}_std"] = statistics.stdev(values) if len(values) > 1 and None not in values else None
    row["train_seconds"] = mean("train_seconds")
    row["details"] = [value["details"] for value in found]
    return row


def _show_rows(console: Console, title: str, rows: Sequence[dict[str, Any]], seeds: int) -> None:
    table = Table(title=title, title_justify="left")
    for name in ("rule", "parameters", "deterministic", "sampled", "time", "expected depth"):
        table.add_column(name, justify="left" if name == "rule" else "right")
    for row in rows:

        def percent(key: str, row: dict[str, Any] = row) -> str:
            spread = f" ± {row[f'{key}_std']:.2f}" if seeds > 1 and row[f"{key}_std"] is not None else ""
            return "-" if row[key] is None else f"{row[key]:.2f}{spread}%"

        table.add_row(
            row["rule"],
            f"{row['parameters']:,}",
            percent("deterministic_error"),
            percent("sampled_error"),
            f"{row['relative_time']:.2f}x" if row["relative_time"] else f"{row['train_seconds']:.0f} s",
            f"{row['expected_depth']:.2f}",
        )
    console.print(table)
    console.print("errors on the test images; time is training time relative to constant depth")


def predict_command(
    path: Path, images: Sequence[Path], samples: int, device: str, target: str | None, weights: str = "model"
) -> int:
    """Classify image files."""
    _check_target(target)
    if not images:
        raise DataError("no image files were given; name at least one")
    run, model = load_run(path, weights)
    recipe, place, dataset = run.recipe(), choose_device(device), run.dataset()
    pixels = read_images(images, size=dataset["size"], channels=dataset["channels"])
    model, normalization = model.to(place), run.normalization().to(place)
    rows: list[dict[str, Any]] = []
    with precision_context(recipe, place)():
        for first in range(0, len(pixels), 256):
            batch = pixels[first : first + 256].to(place)
            found = predict(model, normalization(batch), samples)
            best = found.classes
            values = torch.stack(
                (
                    found.probabilities.gather(1, best[:, None]).squeeze(1),
                    found.standard_error.gather(1, best[:, None]).squeeze(1),
                    found.entropy,
                    found.mutual_information,
                )
            )
            for file, number, (p, se, entropy, information) in zip(
                images[first : first + 256], best.tolist(), values.T.tolist(), strict=True
            ):
                rows.append(
                    {
                        "file": str(file),
                        "class": dataset["classes"][number],
                        "probability": p,
                        "standard_error": se if samples != 1 else None,
                        "entropy": entropy,
                        "mutual_information": information,
                        "samples": samples,
                    }
                )
    table = Table(title=f"{path}, {f'{samples} sampled passes' if samples else 'expectation'}", title_justify="left")
    for name in ("file", "class", "probability", "± se", "uncertainty (nats)", "of it randomness"):
        table.add_column(name, justify="left" if name in ("file", "class") else "right")
    for row in rows:
        keys = ("probability", "standard_error", "entropy", "mutual_information")
        numbers = ("-" if row[key] is None else f"{row[key]:.3f}" for key in keys)
        table.add_row(row["file"], row["class"], *numbers)
    _console(target).print(table)
    _write(target, rows)
    return 0


def recipes_command(name: str | None, what: str, target: str | None) -> int:
    """List recipes, networks, rules or data sources, or show one recipe."""
    _check_target(target)
    console = _console(target)
    if name is not None:
        chosen = preset(name)
        console.print(f"{name}: {chosen.title}", style="bold")
        if chosen.published is not None:
            console.print(f"published test error: {chosen.published}%")
        if chosen.note:
            console.print(f"where the paper is silent: {chosen.note}")
        for key, value in chosen.recipe.to_dict().items():
            console.print(f"  {key}: {value}", markup=False)
        console.print(f"residrop train --recipe {name}", markup=False)
        _write(target, {"name": name, **dataclasses.asdict(chosen)})
        return 0
    if what == "recipes":
        rows = [(key, one.title, "" if one.published is None else f"{one.published}%") for key, one in PRESETS.items()]
        headings = ("recipe", "what it is", "published error")
    else:
        listing = {
            "networks": list_models,
            "rules": lambda: {key: e.title for key, e in RULES.items()},
            "data": sources,
        }
        rows = list(listing[what]().items())
        headings = (what, "what it is")
    table = Table()
    for heading in headings:
        table.add_column(heading, overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    _write(target, [dict(zip(headings, row, strict=True)) for row in rows])
    return 0
