"""`residrop reproduce`: the papers' tables and figures, measured here beside what was published."""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Annotated, Any

import tyro
from rich.console import Console

from residrop.cli.shared import Device, Json, Quiet, parse, table_of
from residrop.common.errors import ConfigError
from residrop.common.output import check_target, console_for, write
from residrop.research import ledger
from residrop.research.papers import PAPERS
from residrop.research.papers.claims import Drawn, Judged, Measured, judge, judge_curves
from residrop.research.papers.estimate import Estimator, as_text
from residrop.research.papers.figures import Context, Line, draw, entries_of, lines_of
from residrop.research.papers.rows import Figure, Row, Table
from residrop.research.papers.runner import Plan, Runner, default_workers
from residrop.research.papers.status import Status, missing, overview
from residrop.research.papers.work import Settings, variant_of
from residrop.training.checkpoint import versions

__all__ = ["read_duration", "run"]


@dataclass(frozen=True)
class Reproduce:
    """Measure the tables and figures of the papers, and print them beside what was published.

    residrop reproduce                                     what there is, and how far it is
    residrop reproduce --missing                           what is not measured in full, the best value first
    residrop reproduce swapout/table-2 --data PATH         fill what the ledger lacks, then print the table
    residrop reproduce swapout/table-2 --scale 0.05 --budget 2h --data PATH

    Numbers are kept in the ledger (--ledger), a folder of JSON files, as soon as each run ends; what is there is not
    measured again. Ctrl-C saves all trainings, and the same command continues them. A shortened schedule (--scale) is
    marked on every number made with it and never mixed with full ones. Timings and theory need no data.
    """

    target: Annotated[str | None, tyro.conf.Positional] = None
    """Table or figure, such as swapout/table-2; without it, all are listed."""
    rows: tuple[str, ...] = ()
    """Keys of rows (default: all that can be measured)."""
    seeds: int = 1
    """Number of seeds, 0 upwards."""
    scale: float = 1.0
    """Share of the full schedule in (0, 1]: epochs are scaled, everything else is a share of them."""
    variant: str | None = None
    """Another reading of an ambiguous text, or the same on a smaller network (resnet-20, w1), by name; an unknown name
    lists those of the paper."""
    points: tuple[float, ...] = ()
    """Of a figure whose points are trainings: positions to train (default: all)."""
    data: str | None = None
    """Where the data are: parquet:PATH, folder:PATH or the PATH of a folder (default: as the recipe names them).
    Numbers of other data than the paper's are shown and not recorded."""
    budget: str | None = None
    """Time there is, such as 90s, 20min or 2h: runs are estimated, and those that fit are made, best value first."""
    missing: bool = False
    """List rows that are not measured at full scale, by value per minute, with an estimate and the command. A row is
    worth 1, and 1 for each comparison of a claim it appears in; rows of one training count together."""
    workers: int | None = None
    """Trainings at a time (default: 2 on a GPU; on the CPU one a core, 4 at most)."""
    steps: int = 15
    """Timed updates of each network in timing rows."""
    compile: bool | None = None
    """Compile networks, as residrop train --compile does (default: on a GPU)."""
    device: Device = "auto"
    runs: Path = Path("runs/reproduce")
    """Folder of the run directories; rows of one recipe share a run."""
    ledger: Path = Path("results")
    """Folder of what was measured."""
    json: Json = None
    quiet: Quiet = False


def run(arguments: Sequence[str], prog: str) -> int:
    """List, or fill and show a table or figure."""
    args = parse(Reproduce, arguments, prog)
    check_target(args.json)
    settings = Settings(
        scale=args.scale,
        seeds=args.seeds,
        variant=args.variant,
        data=args.data,
        device=args.device,
        steps=args.steps,
        points=args.points,
        compile=args.compile,
    )
    budget = None if args.budget is None else read_duration(args.budget)
    if args.workers is not None and args.workers < 1:
        raise ConfigError(f"workers is {args.workers}; give at least 1 training at a time")
    if args.target is None:
        if args.rows or args.points or args.variant or args.budget or args.data:
            raise ConfigError(
                "--rows, --points, --variant, --data and --budget are for one table or figure; name it first"
            )
        return _list_missing(args) if args.missing else _list(args)
    if args.missing:
        raise ConfigError("--missing lists what is missing of all tables; leave the name of the table out")
    terminal = console_for("-")
    workers = args.workers or default_workers(args.device)
    runner = Runner(settings, args.runs, args.ledger, workers=workers, console=terminal, quiet=args.quiet)
    plan = runner.plan(args.target, args.rows, budget)
    if runner.source is not None and runner.source.kind is None:
        terminal.print(f"--data holds {runner.source.found}: not the paper's data, so nothing is recorded")
    if not args.quiet and plan.trainings:
        epochs = ", ".join(str(count) for count in sorted({one.recipe.epochs for one in plan.trainings.values()}))
        estimated = f", about {as_text(sum(plan.seconds[name] for name in plan.trainings))}" if plan.seconds else ""
        terminal.print(f"trainings: {len(plan.trainings)}, of {epochs} epochs{estimated}")
    runner.run(plan)
    console = console_for(args.json)
    found = _figure(plan, runner, console) if isinstance(plan.target, Figure) else _table(plan, runner, args, console)
    for one in plan.left_out:
        about = "" if one.seconds is None else f" (estimated {as_text(one.seconds)})"
        console.print(f"left out: {', '.join(one.rows) or one.name}: {one.why}{about}")
    write(args.json, found | {"left_out": [one._asdict() for one in plan.left_out]})
    return 0


def read_duration(text: str) -> float:
    """Seconds of "90s", "20min", "2h" or "1.5d"; ConfigError if it is not understood."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(s|min|h|d)\s*", text)
    if found is None or float(found[1]) == 0.0:
        raise ConfigError(f"budget {text!r} is not understood; give a time such as 90s, 20min, 2h or 1.5d")
    return float(found[1]) * {"s": 1.0, "min": 60.0, "h": 3600.0, "d": 86_400.0}[found[2]]


# Tables


def _table(plan: Plan, runner: Runner, args: Reproduce, console: Console) -> dict[str, Any]:
    table = plan.target
    assert isinstance(table, Table)
    rows = [table.row(key) for key in dict.fromkeys(args.rows)] or list(table.rows)
    lines = [line for row in rows for line in _lines(table, row, runner)]
    scale = "" if runner.settings.scale == 1.0 else f", schedule x {runner.settings.scale:g}"
    variant = f", variant {runner.settings.variant}" if runner.settings.variant else ""
    if runner.source is not None and runner.source.kind is None:
        variant += f", of other data ({runner.source.found})"
    theory = any(row.theory is not None for row in rows)
    title, predicted = f"{table.id}: {table.title}{scale}{variant}", ("predicted",) if theory else ()
    headings = ("row", "metric", "published", *predicted, "measured", "difference", "seeds", "scale", "device")
    cells = [_cells(line, theory) for line in lines]
    console.print(table_of(title, headings, cells, left=("row", "metric", "device")))
    if table.note:
        console.print(f"note: {table.note}")
    judged = [judge(claim, lambda name: runner.measured(f"{table.paper}/{name}")) for claim in _claims(table)]
    for one in judged:
        _show_claim(one, console)
    return {
        "id": table.id,
        "title": table.title,
        "scale": runner.settings.scale,
        "variant": runner.settings.variant,
        "rows": lines,
        "claims": [_claim_as_dict(one) for one in judged],
    }


def _lines(table: Table, row: Row, runner: Runner) -> Iterator[dict[str, Any]]:
    """What is shown of a row: one line for each metric and device it was measured with, at least one."""
    common = {"key": row.key, "label": row.label, "column": row.column, "spread": row.spread}
    empty = {"measured": [], "seeds": [], "scale": None, "device": None, "wall_seconds": [], "note": row.note}
    errors = "standard_errors"
    found = runner.of(f"{table.id}/{row.key}") if row.own else []
    for metric in (row.metric, *row.also):
        first = metric == row.metric
        about = {**common, "metric": metric, "published": row.published if first else None}
        about["theory"] = row.theory if first else None
        mine = [entry for entry in found if entry["metric"] == metric]
        for entry in mine:
            yield {**about, **{name: entry[name] for name in empty}, errors: entry.get(errors), "status": "measured"}
        if not mine and first:
            able = row.recipe is not None or row.instrument is not None
            yield {**about, **empty, errors: None, "status": "not yet measured" if able else "quoted"}


def _cells(line: dict[str, Any], theory: bool) -> list[str]:
    label = f"{line['label']}, {line['column']}" if line["column"] else line["label"]
    digits = 3 if line["metric"] == "growth_rate" else 2
    spread = f" ± {line['spread']:g}" if line["spread"] is not None else ""
    published = _number(line["published"], digits) + spread
    head = [f"{label} [{line['key']}]", line["metric"].replace("_", " "), published]
    head += [_number(line["theory"], 3)] if theory else []
    values, errors = line["measured"], line["standard_errors"]
    if not values:
        return [*head, line["status"], "", "", "", ""]
    mean = fmean(values)
    deviation = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    if len(values) == 1 and errors:
        deviation = f" ± {errors[0]:.{digits}f} se"
    difference = "" if line["published"] is None else f"{mean - line['published']:+.{digits}f}"
    scale = f"{line['scale']:g}"
    return [*head, f"{mean:.{digits}f}{deviation}", difference, str(len(values)), scale, line["device"]]


def _number(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}f}"


# Claims


def _claims(table: Table) -> list[Any]:
    return [claim for claim in PAPERS[table.paper].claims if claim.where == table.name and claim.pairs]


def _show_claim(one: Judged, console: Console) -> None:
    count = {verdict: sum(pair.verdict == verdict for pair in one.pairs) for verdict in ("seen", "not seen", "open")}
    console.print(
        f"claim {one.verdict}: {one.claim.text} (comparisons: {count['seen']} seen, {count['not seen']} not seen, "
        f"{count['open']} open)"
    )
    for pair in one.pairs:
        if pair.difference is not None:
            error = "no standard error" if pair.error is None else f"± {pair.error:.3g} standard error"
            console.print(f"  {pair.verdict}: {pair.smaller} - {pair.larger} = {pair.difference:+.3g} ({error})")


def _claim_as_dict(one: Judged) -> dict[str, Any]:
    pairs = [{**asdict(pair), "verdict": pair.verdict} for pair in one.pairs]
    return {"text": one.claim.text, "where": one.claim.where, "verdict": one.verdict, "pairs": pairs}


# Figures


def _figure(plan: Plan, runner: Runner, console: Console) -> dict[str, Any]:
    figure, settings = plan.target, runner.settings
    assert isinstance(figure, Figure)

    def measured(name: str) -> Measured:
        return runner.measured(f"{figure.paper}/{name}", anywhere=False)

    variant = variant_of(figure.paper, settings.variant)
    lines = lines_of(figure, Context(settings, runner.source, runner.runs, runner.bench, measured, variant))
    scaled = any(curve.instrument is None for curve in figure.curves)
    scale = settings.scale if scaled else 1.0
    stamp = f"{runner.device}; {settings.seeds} seed(s); schedule x {scale:g}" if scaled else runner.device
    stamp += f"; variant {variant.name}: {variant.why}" if variant else ""
    other = runner.source if scaled and runner.source is not None and runner.source.kind is None else None
    stamp += f"; of other data ({other.found})" if other else ""
    data = f"data-{other.digest[:8]}" if other else None
    name = "_".join(filter(None, (figure.id.replace("/", "_"), settings.variant, data, f"scale{scale:g}.png")))
    if lines:
        groups: dict[str, list[Line]] = {}  # curves are recorded with the versions they were measured with
        for line in lines:
            groups.setdefault(json.dumps(line.versions or versions(), sort_keys=True), []).append(line)
        for found, some in groups.items():
            runner.keep(figure, entries_of(figure, some, scale, settings.variant), json.loads(found))
        draw(runner.runs / name, figure, lines, stamp)
        console.print(f"{figure.id}: {figure.title}, {len(lines)} of {len(figure.curves)} curves")
        console.print(f"picture: {runner.runs / name}")
    else:
        console.print(f"{figure.id}: nothing to draw; no curve's runs are finished")
    for line in lines:
        console.print(f"  {line.label}: {_ends(line)}" + (f" ({line.note})" if line.note else ""))
    drawn = {line.label: Drawn(line.x, line.y, line.error) for line in lines}
    for claim in PAPERS[figure.paper].claims:
        if claim.where == figure.name:
            judged = judge_curves(claim, drawn)
            if judged.pairs:
                _show_claim(judged, console)
            else:
                console.print(f"claim open, look at the picture: {claim.text}")
    return {
        "id": figure.id,
        "title": figure.title,
        "scale": scale,
        "variant": settings.variant,
        "lines": entries_of(figure, lines, scale, settings.variant),
    }


def _ends(line: Line) -> str:
    first, last = (f"{line.y[i]:.4g} at {line.x[i]:g}" for i in (0, -1))
    return first if len(line.x) == 1 else f"{first} ... {last}"


# Lists


def _list(args: Reproduce) -> int:
    found = overview(ledger.pooled(ledger.read(args.ledger)))
    headings = ("id", "title", "in full", "scaled", "not yet", "quoted")
    title, left = "tables and figures: rows (curves) measured", ("id", "title", "scaled")
    console = console_for(args.json)
    console.print(table_of(title, headings, map(_status_cells, found), left))
    console.print("scaled: with a shortened schedule, by its scale; quoted: numbers of other work cannot be run here")
    console.print("residrop reproduce ID measures one; residrop reproduce --missing says which next")
    write(args.json, [asdict(one) for one in found])
    return 0


def _status_cells(one: Status) -> tuple[str, ...]:
    if one.drawing:
        return one.id, one.title, "", "a drawing, no data", "", ""
    scaled = ", ".join(one.shortened)
    counts = (str(count) if count else "" for count in (one.open, one.quoted))
    return one.id, one.title, str(one.full) if one.full else "", scaled, *counts


def _list_missing(args: Reproduce) -> int:
    if not args.quiet:
        console_for("-").print("estimating (half a minute)")
    found = missing(ledger.pooled(ledger.read(args.ledger)), Estimator(args.device), args.steps)
    rows = [(str(one.value), as_text(one.seconds), "\n".join(one.rows), one.command) for one in found]
    title, headings = "not measured at full scale, by value per minute", ("value", "estimated", "rows", "command")
    console = console_for(args.json)
    console.print(table_of(title, headings, rows, left=("rows", "command")))
    console.print(
        "value: 1 for each row, and 1 for each comparison of a claim it appears in; times are estimated for one seed "
        "on this device, from FLOPs and a few updates of a small network; add --data PATH where the data are"
    )
    write(args.json, [{**one._asdict(), "per_minute": one.per_minute} for one in found])
    return 0
