"""How far uncertainty can be relied on, run beside run: python benchmarks/uncertainty.py RUN ... [--ood DATA ...].

Every run is measured by `residrop evaluate --uncertainty`: one pass, the mean of sampled passes, and each with a
temperature. Runs that differ in the seed alone are one row: means and standard errors over seeds, of a single run the
standard errors over images. What a score finds: AUROC of the test images against each source of `--ood`.
"""

import argparse
import json
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from rich.console import Console
from rich.table import Table

from residrop.cli import main as residrop
from residrop.research import ledger
from residrop.training.presets import train_command
from residrop.training.run import Run

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("runs", nargs="+", type=Path, help="run directories")
parser.add_argument("--samples", type=int, default=30)
parser.add_argument("--data", help="another source of test images with the same classes")
parser.add_argument("--calibration", help="for runs without validation images")
parser.add_argument("--ood", nargs="+", default=[], help="sources of foreign images")
parser.add_argument("--name", nargs="+", default=[], help="of these sources, in the same order, for the file")
parser.add_argument("--device", default="auto")
parser.add_argument("--json", type=Path)
UNLIKE = ("seed", "recipe", "versions")  # of runs that are one row
MEASURES = ("error", "nll", "brier", "ece", "ece_mass", "aurc", "coverage_at_1", "coverage_at_5")


def evaluated(path: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """What the command says of a run."""
    options = ["--samples", str(arguments.samples), "--device", arguments.device]
    for name in ("data", "calibration"):
        if value := getattr(arguments, name):
            options += [f"--{name}", value]
    if arguments.ood:
        options += ["--ood", *arguments.ood]
    print(f"\n{path}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "found.json"
        if code := residrop(["evaluate", str(path), "--uncertainty", *options, "--json", str(file)]):
            raise SystemExit(code)
        return json.loads(file.read_text())


def pooled(values: Sequence[dict[str, float]]) -> tuple[float, float]:
    """Mean and standard error of one measure over the runs."""
    mean = fmean(one["value"] for one in values)
    if len(values) == 1:
        return mean, values[0]["standard_error"]
    return mean, stdev(one["value"] for one in values) / math.sqrt(len(values))


def rows_of(found: Sequence[dict[str, Any]], names: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of runs that differ in the seed alone: of every inference, and of every score of uncertainty."""
    run = {name: value for name, value in found[0]["run"].items() if name not in UNLIKE}
    base = {"rule": found[0]["rule"], "run": run, "seeds": len(found), "images": found[0]["uncertainty"]["images"]}
    rows: list[dict[str, Any]] = []
    for samples in sorted({one["samples"] for one in found[0]["uncertainty"]["measures"]}):
        for tempered in (False, True):
            several = [
                one
                for each in found
                for one in each["uncertainty"]["measures"]
                if one["samples"] == samples and (one["temperature"] != 1) == tempered
            ]
            if len(several) < len(found):
                continue  # a temperature could not be fitted
            row = {**base, "samples": samples, "tempered": tempered}
            if tempered:
                row["temperature"] = fmean(one["temperature"] for one in several)
            for name in MEASURES:
                row[name], row[f"{name}_se"] = pooled([one[name] for one in several])
            rows.append(row)
    first = found[0]["uncertainty"]
    for place, one in enumerate(first["selective"]):
        row = {**base, "samples": one["samples"], "score": one["score"]}
        row["aurc"], row["aurc_se"] = pooled([each["uncertainty"]["selective"][place]["aurc"] for each in found])
        rows.append(row)
    sources = list(dict.fromkeys(one["source"] for one in first["ood"]))
    for place, one in enumerate(first["ood"]):
        number = sources.index(one["source"])
        row = {**base, "samples": one["samples"], "score": one["score"]}
        row["foreign"] = names[number] if number < len(names) else one["source"]
        for name in ("auroc", "aupr", "fpr95"):
            row[name], row[f"{name}_se"] = pooled([each["uncertainty"]["ood"][place][name] for each in found])
        rows.append(row)
    return rows


def main() -> None:
    """Measure every run, print the tables, write JSON."""
    arguments = parser.parse_args()
    groups: dict[str, list[dict[str, Any]]] = {}
    for path in arguments.runs:
        one = evaluated(path, arguments)
        alike = {"rule": one["rule"]} | {name: value for name, value in one["run"].items() if name not in UNLIKE}
        groups.setdefault(json.dumps(alike, sort_keys=True), []).append(one)
    rows = [row for found in groups.values() for row in rows_of(found, arguments.name)]
    table = Table("rule", "inference", *MEASURES[:6])
    for row in rows:
        if "nll" in row:
            kind = f"{row['samples']} passes" if row["samples"] else "one pass"
            kind += f", T {row['temperature']:.2f}" if row["tempered"] else ""
            cells = [f"{row[name]:.3f} ± {row[f'{name}_se']:.3f}" for name in MEASURES[:6]]
            table.add_row(row["rule"], kind, *cells)
    Console().print(table)
    table = Table("rule", "passes", "score", "foreign images", "AUROC")
    for row in rows:
        if "auroc" in row:
            cells = (str(row["samples"]), row["score"], row["foreign"], f"{row['auroc']:.1f} ± {row['auroc_se']:.1f}%")
            table.add_row(row["rule"], *cells)
    Console().print(table)
    if arguments.json:
        sources = f" --ood {' '.join(arguments.name or arguments.ood)}" if arguments.ood else ""
        command = f"python benchmarks/uncertainty.py RUN ... --samples {arguments.samples}{sources}"
        command = "; ".join(
            [*dict.fromkeys(train_command(Run(path).recipe(), shared=True) for path in arguments.runs), command]
        )
        ledger.save(arguments.json, "Uncertainty of trained networks, run beside run", command, rows)


if __name__ == "__main__":
    main()
