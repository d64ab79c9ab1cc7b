"""Filling rows: what the ledger lacks is trained or measured, and recorded as soon as it is there."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

from rich.console import Console

from residrop.common.errors import ConfigError, Interrupted
from residrop.research import ledger
from residrop.research.papers import PAPERS, find
from residrop.research.papers.claims import Measured
from residrop.research.papers.estimate import Estimator
from residrop.research.papers.instruments import measure
from residrop.research.papers.rows import Figure, Metric, Table
from residrop.research.papers.timings import Bench
from residrop.research.papers.work import (
    Settings,
    Source,
    Training,
    Wanted,
    fits,
    read_under,
    recipes_of_figure,
    rows_filled_by,
    seeds_missing,
    source_of,
    training,
    variant_of,
    wanted_of,
    wanted_of_figure,
)
from residrop.training.checkpoint import versions
from residrop.training.pool import train_all
from residrop.training.setup import choose_device

__all__ = ["LeftOut", "Plan", "Runner", "default_workers", "value_of"]

Entry = dict[str, Any]

_KEYS: dict[Metric, str] = {"error": "deterministic_error", "sampled_error": "sampled_error"}  # in evaluation.json
_DETAILS: dict[Metric, str] = {"error": "deterministic", "sampled_error": "sampled"}


class LeftOut(NamedTuple):
    """A run that a plan leaves out, and why."""

    name: str
    rows: tuple[str, ...]
    why: str
    seconds: float | None = None


@dataclass
class Plan:
    """What is to be done for a table or figure.

    Attributes:
        target: the table or figure.
        wanted: its rows that can be measured.
        trainings: runs that are missing, by name, in the order in which they are started.
        measured: rows of instruments and the seeds that are missing.
        left_out: runs that do not fit into the budget, or whose data are not those of `--data`.
        seconds: estimated time of each run, where a budget asked for it.
    """

    target: Table | Figure
    wanted: list[Wanted]
    trainings: dict[str, Training] = field(default_factory=dict)
    measured: list[tuple[Wanted, list[int]]] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)


def _error_over_images(found: Mapping[str, Any], metric: Metric) -> float | None:
    """Standard error of a test error over the test images, of what evaluation.json holds."""
    one = found["details"][_DETAILS[metric]]
    return None if one is None else one["error_se"]


def value_of(row_id: str) -> int:
    """What a measured row is worth: 1, and 1 for each comparison of a claim in which it appears."""
    paper, _, name = row_id.partition("/")
    return 1 + sum(name in pair for claim in PAPERS[paper].claims for pair in claim.pairs)


class Runner:
    """Fills rows under some settings.

    Args:
        settings: see `Settings`.
        runs: folder of the run directories.
        folder: the ledger.
        workers: trainings at a time.
        console: for progress.
        quiet: no progress.

    Raises:
        UsageError: data that cannot be read, a damaged ledger, settings that are not understood.
    """

    def __init__(
        self, settings: Settings, runs: Path, folder: Path, *, workers: int = 2, console: Console, quiet: bool = False
    ) -> None:
        self.settings, self.runs, self.folder, self.workers = settings, runs, folder, workers
        self.console, self.quiet = console, quiet
        self.source: Source | None = source_of(settings.data) if settings.data is not None else None
        kind = choose_device(settings.device).type
        self.device = ledger.describe_device(kind)
        self.bench = Bench(settings.device, settings.steps)
        self.entries = ledger.pooled(ledger.read(folder))
        self.unrecorded: list[Entry] = []  # numbers of other data than the paper's
        self._paper = ""

    @property
    def known(self) -> list[Entry]:
        """What counts as measured: the ledger, or with data that are not the paper's what was measured just now."""
        foreign = self.source is not None and self.source.kind is None
        return self.unrecorded if foreign else self.entries

    def of(self, row_id: str) -> list[Entry]:
        """Entries of a row that belong to the settings."""
        paper, _, name = row_id.partition("/")
        table = PAPERS[paper].table(name.partition("/")[0])
        row = PAPERS[paper].row(name)
        settings, variant = self.settings, variant_of(paper, self.settings.variant)
        recipe = read_under(table, row, variant)
        if recipe is None and row.recipe is not None:
            if variant is not None and variant.resizes:
                return []  # it is of another size: not to be compared
            recipe, settings = row.recipe, replace(settings, variant=None)  # it has but one reading
        return [entry for entry in self.known if fits(entry, row_id, recipe, settings)]

    def measured(self, row_id: str, *, anywhere: bool = True) -> Measured:
        """What is known of a row in its own metric: of the device with most seeds, this one first.

        Times are those of this device alone, and everything is unless `anywhere`.
        """
        row = PAPERS[row_id.partition("/")[0]].row(row_id.partition("/")[2])
        anywhere = anywhere and not (row.instrument or "").startswith("timing")
        found = [entry for entry in self.of(row_id) if entry["metric"] == row.metric]
        found = [entry for entry in found if anywhere or entry["device"] == self.device]
        found.sort(key=lambda entry: (-len(entry["seeds"]), entry["device"] != self.device))
        return Measured(found[0]["measured"], found[0].get("standard_errors", ())) if found else Measured()

    # Planning

    def plan(self, name: str, keys: Sequence[str] = (), budget: float | None = None) -> Plan:
        """What a table or figure lacks; with a budget in seconds, the most valuable part of it that is estimated to
        fit."""
        target = find(name)
        self._paper = target.paper
        if isinstance(target, Figure):
            if keys:
                raise ConfigError(f"{name} is a figure and has curves, no rows; leave --rows out")
            if not target.curves:
                raise ConfigError(f"{name} has nothing to measure: it is {target.note or 'a drawing'}")
            plan = Plan(target, wanted_of_figure(target, self.settings))
            self._add_recipes(plan, target)
        else:
            if self.settings.points:
                raise ConfigError(f"{name} is a table and has rows, no points; leave --points out")
            plan = Plan(target, wanted_of(target, keys, self.settings))
        self._keep_those_of_the_data(plan)
        for wanted in plan.wanted:
            missing = seeds_missing(self.known, wanted, self.settings, self.device)
            if wanted.recipe is None:
                plan.measured += [(wanted, missing)] if missing else []
                continue
            for seed in missing:
                one = training(wanted.recipe, seed, self.settings, self.source)
                plan.trainings[one.name] = one
        # a constant baseline last: it takes the times that were measured beside the rules
        plan.measured.sort(key=lambda pair: pair[0].row.setting.get("rule") == "constant")
        if budget is not None:
            self._choose(plan, budget)
        return plan

    def _add_recipes(self, plan: Plan, figure: Figure) -> None:
        for recipe in recipes_of_figure(figure, self.settings):
            for seed in range(self.settings.seeds):
                one = training(recipe, seed, self.settings, self.source)
                plan.trainings[one.name] = one

    def _keep_those_of_the_data(self, plan: Plan) -> None:
        """Leave out what `--data` has no images for."""
        if self.source is None:
            return
        recipes = [one.recipe for one in plan.wanted if one.recipe] + [one.full for one in plan.trainings.values()]
        kinds = {recipe.data for recipe in recipes}
        if self.source.kind is None and len(kinds) > 1:
            raise ConfigError(
                f"--data holds {self.source.found}, which are none of {', '.join(sorted(kinds))}; choose --rows of one"
            )
        if self.source.kind is None:
            return
        why = f"its data are not {self.source.kind}"
        for wanted in [one for one in plan.wanted if one.recipe and one.recipe.data != self.source.kind]:
            plan.wanted.remove(wanted)
            plan.left_out.append(LeftOut(wanted.id, (wanted.id,), why))
        for name, one in list(plan.trainings.items()):
            if one.full.data != self.source.kind:
                plan.left_out.append(LeftOut(name, (), why))
                del plan.trainings[name]

    def _choose(self, plan: Plan, budget: float) -> None:
        """Those that fit, by value per minute."""
        estimator = Estimator(self.settings.device)
        budget = self._choose_timings(plan, budget, estimator)
        plan.seconds = {name: estimator.left(one, self.runs) for name, one in plan.trainings.items()}
        worth = {name: self._worth(one) / max(plan.seconds[name], 1.0) for name, one in plan.trainings.items()}
        chosen: dict[str, Training] = {}
        for name in sorted(plan.trainings, key=lambda name: -worth[name]):
            if plan.seconds[name] <= budget:
                budget -= plan.seconds[name]
                chosen[name] = plan.trainings[name]
                continue
            rows = tuple(f"{table.id}/{row.key}" for table, row in self._rows_of(plan.trainings[name]))
            plan.left_out.append(LeftOut(name, rows, "does not fit into the budget", plan.seconds[name]))
        plan.trainings = chosen

    def _choose_timings(self, plan: Plan, budget: float, estimator: Estimator) -> float:
        """Timings that fit, in order; the rest of the budget is for trainings. Other instruments take a second."""
        timed: set[tuple[str, ...]] = set()
        for pair in list(plan.measured):
            row, seeds = pair[0].row, pair[1]
            if not (row.instrument or "").startswith("timing"):
                continue
            key = tuple(str(row.setting[name]) for name in ("network", "rule", "survival", "data"))
            seconds = len(seeds) * estimator.timing(row.setting, self.settings.steps) if key not in timed else 0.0
            if seconds > budget:
                plan.measured.remove(pair)
                plan.left_out.append(LeftOut(pair[0].id, (pair[0].id,), "does not fit into the budget", seconds))
                continue
            timed.add(key)
            budget -= seconds
        return budget

    def _worth(self, one: Training) -> int:
        return sum(value_of(f"{table.id}/{row.key}") for table, row in self._rows_of(one)) or 1

    def _rows_of(self, one: Training) -> list[tuple[Table, Any]]:
        return list(rows_filled_by(one.full, self.settings.variant, self._paper))

    # Running

    def run(self, plan: Plan) -> None:
        """Train and measure what a plan says; every number is recorded as soon as it is there.

        Raises:
            UsageError: a run failed; others are finished first.
            Interrupted: Ctrl-C; the same call continues.
        """
        try:
            for wanted, seeds in plan.measured:
                self._measure(wanted, seeds)
            train_all(
                {name: one.recipe for name, one in plan.trainings.items()},
                self.runs,
                workers=self.workers,
                console=self.console,
                on_finished=lambda name, found: self._finished(plan.trainings[name], found),
                quiet=self.quiet,
            )
        except KeyboardInterrupt:
            raise Interrupted("stopped; what was measured is recorded, and the same command continues") from None

    def _measure(self, wanted: Wanted, seeds: Sequence[int]) -> None:
        row = wanted.row
        for seed in seeds:
            if not self.quiet:
                self.console.print(f"measuring {wanted.id}: {row.instrument}", highlight=False)
            started = perf_counter()
            reading = measure(row, seed, self.bench)
            entry = self._entry(wanted.table, row.key, row.metric, row.published, reading.value, seed)
            entry |= {"scale": 1.0, "wall_seconds": [perf_counter() - started], "note": reading.note}
            if reading.error is not None:
                entry["standard_errors"] = [reading.error]
            self.keep(wanted.table, [entry], versions())

    def _entry(self, table: Table, key: str, metric: Metric, published: float | None, value: float, seed: int) -> Entry:
        return {
            "kind": "paper",
            "id": f"{table.id}/{key}",
            "metric": metric,
            "published": published,
            "measured": [value],
            "seeds": [seed],
            "scale": self.settings.scale,
            "epochs": None,
            "recipe": None,
            "variant": None,
            "wall_seconds": [],
            "note": "",
        }

    def _finished(self, one: Training, found: Mapping[str, Any]) -> None:
        """Record a training for every row of every table that it fills."""
        by_table: dict[str, list[Entry]] = {}
        tables: dict[str, Table] = {}
        for table, row in self._rows_of(one):
            for metric in (row.metric, *row.also):
                value = found[_KEYS[metric]]
                if value is None:
                    continue
                published = row.published if metric == row.metric else None
                entry = self._entry(table, row.key, metric, published, value, one.seed)
                entry["wall_seconds"] = [found["train_seconds"]]
                entry |= {"epochs": one.recipe.epochs, "recipe": one.full.fingerprint()}
                entry["variant"] = self.settings.variant
                if (error := _error_over_images(found, metric)) is not None:
                    entry["standard_errors"] = [error]
                tables[table.id] = table
                by_table.setdefault(table.id, []).append(entry)
        for name, entries in by_table.items():
            self.keep(tables[name], entries, found["run"]["versions"])

    def keep(self, target: Table | Figure, entries: Sequence[Entry], found: Mapping[str, str]) -> None:
        """Record entries of a table or figure; of data that are not the paper's they are kept in memory only."""
        device = ledger.describe_device(choose_device(self.settings.device).type, found)
        if self.source is not None and self.source.kind is None:
            self.unrecorded += [{**entry, "device": device, "versions": dict(found)} for entry in entries]
            return
        scale, variant = entries[0]["scale"], entries[0]["variant"]
        command = f"residrop reproduce {target.id}"
        command += f" --scale {scale:g}" if scale != 1.0 else ""
        command += f" --variant {variant}" if variant else ""
        points = " ".join(f"{place:g}" for place in self.settings.points)
        command += f" --points {points}" if points else ""
        what = f"{PAPERS[target.paper].authors} {PAPERS[target.paper].year}, {target.name}: {target.title}"
        what += f"; schedule shortened to {scale:g} of its epochs" if scale != 1.0 else ""
        ledger.record(
            self.folder,
            target.id,
            entries,
            what=what,
            command=f"{command} --seeds {{seeds}}",
            device=device,
            found=found,
        )
        self.entries = ledger.pooled(ledger.read(self.folder))


def default_workers(device: str) -> int:
    """Two processes on a GPU; on the CPU as many as there are cores, up to four: small networks gain from no more."""
    return 2 if choose_device(device).type != "cpu" else max(1, min(4, os.cpu_count() or 1))
