"""The report: its numbers are the ledger's, full and shortened schedules stand apart, the page needs nothing else."""

import json
import os
import re
import threading
from collections import Counter
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from statistics import fmean, stdev

import pytest

from residrop.cli import main
from residrop.common.errors import RunError
from residrop.research import ledger
from residrop.research.papers import PAPERS, find
from residrop.research.report import as_markdown, as_page, collect
from residrop.research.report.blocks import Chart, Dots, Report, Section, Series, Text
from residrop.training import Recipe

ROOT = Path(__file__).parents[3]
CPU, GPU = "cpu (AMD EPYC)", "cuda (H200)"
VERSIONS = {"residrop": "0.1.0", "torch": "2.15.0"}
NASTY = "<b>a & b</b> | `c` [d](http://e.org) _f_"
VOID = {"meta"}


class Page(HTMLParser):
    """Tables by the id of their section, as lists of rows of cells, beside all ids, links, tags and attributes."""

    def __init__(self, text):
        super().__init__()
        self.tables, self.texts = {}, {}
        self.ids, self.links, self.tags, self.attributes = [], [], [], []
        self.places, self.open, self.cell = [], [], None
        self.feed(text)
        assert self.open == []

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.tags.append(tag)
        self.attributes += attrs
        self.open += [] if tag in VOID else [tag]
        self.ids += [given["id"]] if "id" in given else []
        self.links += [given["href"]] if "href" in given else []
        if tag == "section":
            self.places.append(given["id"])
        elif tag == "table":
            self.tables.setdefault(self.places[-1], []).append([])
        elif tag == "tr":
            self.tables[self.places[-1]][-1].append([])
        elif tag in ("td", "th"):
            self.cell = ""

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        if tag == "section":
            self.places.pop()
        elif tag in ("td", "th"):
            self.tables[self.places[-1]][-1][-1].append(self.cell)
            self.cell = None

    def handle_data(self, data):
        if self.cell is not None:
            self.cell += data
        elif self.places:
            self.texts[self.places[-1]] = self.texts.get(self.places[-1], "") + data


def entry(place, key, measured, *, scale=1.0, metric=None, variant=None, **changes):
    """A measured row as `residrop reproduce` records it."""
    table = find(place)
    row = table.row(key)
    recipe = row.recipe
    named = {one.name: one for one in PAPERS[table.paper].variants}
    read = named[variant].of(recipe) if variant else recipe
    return {
        "kind": "paper",
        "id": f"{place}/{key}",
        "metric": metric or row.metric,
        "published": row.published,
        "measured": measured,
        "seeds": list(range(len(measured))),
        "scale": scale,
        "epochs": max(1, round(scale * recipe.epochs)) if recipe else None,
        "recipe": read.replace(seed=0).fingerprint() if recipe else None,
        "variant": variant,
        "wall_seconds": [1.0] * len(measured),
        "note": "",
        **changes,
    }


def put(folder, place, *entries, device=CPU):
    ledger.record(
        folder, place, entries, what=place, command=f"residrop reproduce {place}", device=device, found=VERSIONS
    )


def measure(folder, rows, name="bench.json", what="A benchmark", command="residrop bench skip"):
    ledger.save(folder / name, what, command, rows, device=CPU)


def page_of(folder, runs=()):
    return Page(as_page(collect(folder, runs)))


def column(table, heading):
    where = table[0].index(heading)
    return {row[0]: row[where] for row in table[1:]}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A ledger with something in it, inside an empty working directory."""
    monkeypatch.chdir(tmp_path)
    measure(tmp_path / "results", [{"network": "a", "relative_to_loop": 2.5}])
    return tmp_path / "results"


@pytest.fixture
def cli(capsys):
    def call(*arguments):
        capsys.readouterr()
        try:
            code = main(["report", *map(str, arguments)])
        except SystemExit as stop:
            code = stop.code or 0
        out, err = capsys.readouterr()
        return code, " ".join(out.split()), " ".join(err.split())

    return call


# Tables of the papers

TABLE = "depth-dropout/table-1"


def test_full_and_shortened_schedules_stand_apart(place):
    full, short = [8.25, 8.75], [30.5, 31.0, 31.75]
    put(place, TABLE, entry(TABLE, "0.0", full))
    put(place, TABLE, entry(TABLE, "0.0", short, scale=0.05), entry(TABLE, "0.5", [40.0], scale=0.05))
    put(place, TABLE, entry(TABLE, "0.5", [35.0], scale=0.1))
    page = page_of(place)
    (table,) = page.tables["depth-dropout-table-1"]
    assert table[0] == ["row", "published", "measured", "difference", "seeds", "scale 0.1", "scale 0.05"]
    epochs = entry(TABLE, "0.0", short, scale=0.05)["epochs"]
    rows = {row[0]: row[1:] for row in table[1:]}
    assert rows["dropout ratio 0.0"] == [
        "8.50",
        f"{fmean(full):.2f} ± {stdev(full):.2f}",
        "+0.00",
        "2",
        "",
        f"{fmean(short):.2f} ± {stdev(short):.2f} (3 seeds, {epochs} epochs)",
    ]
    assert rows["dropout ratio 0.5"][1:4] == ["not yet measured", "", ""]
    assert rows["dropout ratio 0.5"][4:] == ["35.00 (1 seed, 16 epochs)", f"40.00 (1 seed, {epochs} epochs)"]
    assert rows["dropout ratio 0.25"][1:] == ["not yet measured", "", "", "", ""]
    assert "not comparable in absolute terms" in page.texts["depth-dropout-table-1"]
    assert f"Device: {CPU}." in page.texts["depth-dropout-table-1"]
    assert ("class", "apart") in page.attributes


def test_no_difference_without_full_numbers(place):
    put(place, TABLE, entry(TABLE, "0.0", [30.0], scale=0.05))
    (table,) = page_of(place).tables["depth-dropout-table-1"]
    assert table[0] == ["row", "published", "measured", "scale 0.05"]
    assert set(column(table, "measured").values()) == {"not yet measured"}


def test_every_number_of_the_ledger_is_in_its_column(place):
    """All rows of all tables with a recipe, at two scales, with numbers that occur nowhere else."""
    given, value = {}, 1000.0
    for paper in PAPERS.values():
        for table in paper.tables:
            rows = [row for row in table.rows if row.recipe is not None]
            for scale in (1.0, 0.25) if rows else ():
                found = []
                for row in rows:
                    value += 1.37
                    found.append(entry(table.id, row.key, [value, value + 0.5], scale=scale))
                    given[f"{value + 0.25:.2f}"] = "measured" if scale == 1.0 else "scale 0.25"
                put(place, table.id, *found)
    seen = Counter()
    for tables in page_of(place).tables.values():
        for table in tables:
            for row in table[1:]:
                for heading, cell in zip(table[0], row, strict=True):
                    numbers = [number for number in re.findall(r"\d+\.\d\d", cell) if number in given]
                    assert len(numbers) <= 1
                    assert all(given[number] == heading for number in numbers)
                    seen.update(numbers)
    assert len(given) > 150
    assert seen == Counter(dict.fromkeys(given, 1))


def test_quoted_rows_further_metrics_and_readings(place):
    where = "swapout/table-1"
    row = next(row for row in find(where).rows if row.also)
    put(place, where, entry(where, row.key, [9.0]), entry(where, row.key, [9.5], metric=row.also[0]))
    put(place, TABLE, entry(TABLE, "0.25", [9.0], variant="two-halves"))
    page = page_of(place)
    (table,) = page.tables["swapout-table-1"]
    mine = [line for line in table[1:] if line[0] == row.label]
    assert [(line[1], line[2], line[-1]) for line in mine] == [
        (f"{row.published:.2f}", "9.00", row.metric.replace("_", " ")),
        ("", "9.50", row.also[0].replace("_", " ")),
    ]
    quoted = [line.label for line in find(where).rows if not line.own]
    assert [column(table, "measured")[label] for label in quoted] == ["quoted"] * len(quoted) != []
    assert (
        column(page.tables["depth-dropout-table-1"][0], "measured")["dropout ratio 0.25 (variant: two-halves)"]
        == "9.00"
    )


def test_smaller_networks_stand_apart_and_are_judged_alone(place):
    pair = {"0.0": [20.0], "0.25": [24.0]}
    errors = {"standard_errors": [0.5]}
    put(place, TABLE, *(entry(TABLE, key, one, scale=0.03, variant="resnet-20", **errors) for key, one in pair.items()))
    page = page_of(place)
    (table,) = page.tables["depth-dropout-table-1"]
    assert (
        column(table, "scale 0.03")["dropout ratio 0.25 (variant: resnet-20)"] == "24.00 ± 0.50 se (1 seed, 5 epochs)"
    )
    text = page.texts["depth-dropout-table-1"]
    assert "Variant resnet-20: not the paper's network" in text
    assert "Claim not seen (scale 0.03, variant resnet-20)" in text
    assert "without standard errors" not in text
    (status,) = [row for one in page.tables["status"] for row in one if row[0] == "table-1" and row[2]]
    assert status[1:4] == ["", "2 (resnet-20 at 0.03)", "4"]
    (claims,) = page.tables["claims"]
    assert [row[1:4] for row in claims[1:]] == [["scale 0.03, variant resnet-20", "not seen", "1 not seen of 3"]]


def test_figures_of_variants_are_drawn_apart(place):
    curve = {
        "kind": "measurement", "figure": "stochastic-depth/figure-7", "curve": "constant depth", "x": [1.0, 2.0],
        "y": [0.5, 0.25], "error": None, "predicted": None, "scale": 0.01, "seeds": [0], "recipe": None, "note": "",
    }  # fmt: skip
    for variant in (None, "resnet-20"):
        put(place, "stochastic-depth/figure-7", {**curve, "variant": variant})
    page = page_of(place)
    text = page.texts["stochastic-depth-figure-7"]
    assert text.count("scale 0.01: schedules shortened") == 2
    assert text.count("; variant resnet-20") == 1
    (status,) = [row for one in page.tables["status"] for row in one if row[0] == "figure-7"]
    assert status[1:4] == ["", "1 at 0.01, 1 (resnet-20 at 0.01)", "1"]


def test_the_summary_counts_rows_once(place):
    put(place, TABLE, entry(TABLE, "0.0", [9.0], scale=0.1), entry(TABLE, "0.25", [9.0], scale=0.1))
    put(place, TABLE, entry(TABLE, "0.5", [9.0], scale=0.05), entry(TABLE, "0.25", [9.0], scale=0.05))
    put(place, TABLE, entry(TABLE, "0.0", [9.0], variant="two-halves"))
    put(place, TABLE, *(entry(TABLE, "0.75", [9.0], variant="resnet-20", scale=scale) for scale in (0.1,)))
    text = " ".join(block.text for block in collect(place).blocks)
    assert "0 are measured in full and 3 with a shortened schedule, 1 on a smaller network; " in text


def test_curves_of_an_older_recipe_or_version_are_not_drawn(place):
    figure = find("stochastic-depth/figure-7")
    curve = figure.curves[0]
    common = {"kind": "measurement", "figure": figure.id, "curve": curve.label, "x": [1.0, 2.0], "error": None,
              "predicted": None, "scale": 0.01, "seeds": [0], "variant": None, "note": ""}  # fmt: skip
    now = curve.recipe.replace(seed=0).fingerprint()
    put(place, figure.id, {**common, "y": [0.5, 0.25], "recipe": "older"})
    put(place, figure.id, {**common, "y": [0.5, 0.25], "recipe": "older", "scale": 0.02})
    put(place, figure.id, {**common, "y": [0.6, 0.35], "recipe": now})
    ledger.record(
        place, figure.id, [{**common, "y": [0.7, 0.45], "recipe": now}],
        what="again", command="residrop reproduce", device=CPU, found={**VERSIONS, "torch": "3"},
    )  # fmt: skip
    (paper,) = [one for one in collect(place).sections if one.anchor == "stochastic-depth"]
    (section,) = [one for one in paper.sections if one.anchor == "stochastic-depth-figure-7"]
    (chart,) = [block for block in section.blocks if isinstance(block, Chart)]
    assert [series.y for series in chart.series] == [[0.7, 0.45]]
    (status,) = [row for one in page_of(place).tables["status"] for row in one if row[0] == "figure-7"]
    assert status[2] == "1 at 0.01"


def test_two_devices_are_two_lines(place):
    put(place, TABLE, entry(TABLE, "0.0", [8.0]))
    put(place, TABLE, entry(TABLE, "0.0", [9.0]), device=GPU)
    (table,) = page_of(place).tables["depth-dropout-table-1"]
    assert [(row[2], row[-1]) for row in table[1:3]] == [("8.00", CPU), ("9.00", GPU)]


def test_timing_and_theory_are_drawn_beside_what_is_published(place):
    where = "depth-dropout/section-4"
    put(place, where, entry(where, "saved-0.25", [12.35], standard_errors=[0.25]), entry(where, "saved-0.5", [34.57]))
    report = collect(place)
    (paper,) = [one for one in report.sections if one.anchor == "depth-dropout"]
    (section,) = [one for one in paper.sections if one.anchor == "depth-dropout-section-4"]
    (drawn,) = [block for block in section.blocks if isinstance(block, Dots)]
    assert drawn.rows[0] == ("dropout ratio 0.25", {"published": 12.3, "measured": 12.35})
    (table,) = page_of(place).tables["depth-dropout-section-4"]
    assert column(table, "measured")["dropout ratio 0.25"] == "12.35 ± 0.25 se"


@pytest.mark.parametrize(
    ("errors", "verdict"),
    [
        ({"0.25": [7, 7.1], "0.0": [8, 8.1], "0.5": [9, 9.1], "0.75": [10, 10.1]}, "seen"),
        ({"0.25": [7, 7.1], "0.0": [8, 8.1], "0.5": [9, 9.1], "0.75": [6, 6.1]}, "not seen"),
        ({"0.25": [7, 7.1], "0.0": [8, 8.1], "0.5": [9, 9.1]}, "open"),
        ({"0.25": [7, 7.1], "0.0": [7, 7.2], "0.5": [9, 9.1], "0.75": [10, 10.1]}, "open"),
    ],
)
def test_claims_are_judged_at_each_scale_alone(place, errors, verdict):
    put(place, TABLE, *(entry(TABLE, key, values, scale=0.05) for key, values in errors.items()))
    put(place, TABLE, entry(TABLE, "0.0", [1.0]))
    text = page_of(place).texts["depth-dropout-table-1"]
    assert f"Claim {verdict} (scale 0.05): the error is lowest" in text
    assert "(in full)" not in text
    (grid,) = page_of(place).tables["claims"]
    (row,) = grid[1:]
    assert row[0].startswith("the error is lowest")
    assert row[1:3] == ["scale 0.05", verdict]
    assert row[3].endswith(" of 3")
    assert row[4] == TABLE
    assert "Claim, not yet measured: the gap to the baseline" in page_of(place).texts["depth-dropout-table-3"]


def test_without_a_measured_comparison_there_are_no_claims(place):
    put(place, TABLE, entry(TABLE, "0.0", [8.0]))
    assert "claims" not in page_of(place).tables


def test_the_newer_of_two_documents_counts(place):
    put(place, TABLE, entry(TABLE, "0.0", [8.0]))
    path = place / "depth-dropout_table-1_cpu_scale1.json"
    newer = json.loads(path.read_text()) | {"date": "2999-01-01"}
    newer["entries"][0]["measured"] = [7.0]
    (place / "a.json").write_text(json.dumps(newer))
    (table,) = page_of(place).tables["depth-dropout-table-1"]
    assert column(table, "measured")["dropout ratio 0.0"] == "7.00"


def test_numbers_of_a_recipe_that_no_row_has_are_left_out_and_named(place):
    put(place, TABLE, entry(TABLE, "0.0", [77.77], recipe="0123456789abcdef"))
    page = page_of(place)
    assert "77.77" not in str(page.tables["depth-dropout-table-1"])
    assert "(1 numbers): depth-dropout/table-1/0.0 in" in page.texts["documents"]


# Figures


def curve(figure, label, x, y, **changes):
    return {
        "kind": "measurement", "figure": figure, "curve": label, "x": x, "y": y, "error": None, "predicted": None,
        "scale": 0.05, "seeds": [0], "recipe": None, "variant": None, "note": "", **changes,
    }  # fmt: skip


def test_figures_are_drawn_in_the_papers_axes(place):
    where = "stochastic-depth/figure-3-left"
    figure = find(where)
    put(place, where, curve(where, figure.curves[0].label, [1, 2, 3], [50.0, 30.0, 20.0], note="as it is"))
    report = collect(place)
    sections = {one.anchor: one for paper in report.sections for one in paper.sections}
    (chart,) = [block for block in sections["stochastic-depth-figure-3-left"].blocks if isinstance(block, Chart)]
    assert (chart.x, chart.y, chart.log) == (figure.x, figure.y, figure.scale == "log")
    assert chart.series[0] == Series(figure.curves[0].label, [1, 2, 3], [50.0, 30.0, 20.0], None, None)
    assert chart.caption == (
        f"scale 0.05: schedules shortened to that share of the epochs; 1 seed; {CPU}; "
        f"1 of {len(figure.curves)} curves not yet measured"
    )
    page = Page(as_page(report))
    assert "as it is." in page.texts["stochastic-depth-figure-3-left"]
    assert where not in str(page.tables["stochastic-depth-figures-open"])
    assert "stochastic-depth/figure-7" in str(page.tables["stochastic-depth-figures-open"])


@pytest.mark.parametrize(
    ("low", "high", "errors", "verdict", "counts"),
    [
        ([0.1, 0.2], [0.3, 0.4], None, "seen", "2 seen of 2"),
        ([0.1, 0.5], [0.3, 0.4], None, "not seen", "1 seen, 1 not seen of 2"),
        ([0.1, 0.2], [0.3, 0.4], [0.01, 0.2], "open", "1 seen, 1 open of 2"),
    ],
)
def test_claims_about_curves_are_judged_position_by_position(place, low, high, errors, verdict, counts):
    where = "stochastic-depth/figure-7"
    common = {"kind": "measurement", "figure": where, "x": [1.0, 2.0], "error": errors, "predicted": None,
              "scale": 0.01, "seeds": [0], "recipe": None, "variant": "resnet-20", "note": ""}  # fmt: skip
    curves = {"constant depth": low, "stochastic depth": high}
    put(place, where, *({**common, "curve": label, "y": y} for label, y in curves.items()))
    page = page_of(place)
    assert f"Claim {verdict} (scale 0.01, variant resnet-20)" in page.texts["stochastic-depth-figure-7"]
    (claims,) = page.tables["claims"]
    assert claims[1][1:] == ["scale 0.01, variant resnet-20", verdict, counts, where]


def test_a_heat_map_is_a_table(place):
    figure = next(one for paper in PAPERS.values() for one in paper.figures if one.shape == "heat map")
    put(place, figure.id, *(curve(figure.id, label, [0.2, 0.8], [9.25, None]) for label in ("20", "32")))
    (table,) = page_of(place).tables[figure.id.replace("/", "-")]
    assert table == [[figure.y, "0.2", "0.8"], ["20", "9.25", ""], ["32", "9.25", ""]]


# Runs


def run_at(path, rule="constant", finished=True):
    path.mkdir(parents=True)
    (path / "recipe.json").write_text(json.dumps(Recipe(rule=rule, epochs=2).to_dict()))
    history = [
        {"epoch": 1, "seconds": 60.0, "train_loss": 2.0, "first_gradient": 0.01},
        {"epoch": 2, "seconds": 30.0, "train_loss": 1.0, "first_gradient": 0.001, "test_error": 12.5},
    ]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in history))
    if finished:
        found = {"deterministic_error": 12.5, "sampled_error": None, "train_seconds": 90.0, "details": {}, "run": {}}
        (path / "evaluation.json").write_text(json.dumps(found))
    return path


def test_runs_have_their_results_and_curves(tmp_path, cli, monkeypatch):
    monkeypatch.chdir(tmp_path)
    a, b = run_at(tmp_path / "a"), run_at(tmp_path / "b", "swapout", finished=False)
    code, out, _ = cli(a, b)
    assert (code, out) == (0, "written: report.html")
    page = Page((tmp_path / "report.html").read_text())
    (table,) = page.tables["runs"]
    assert [row[0] for row in table] == ["run", "a", "b"]
    assert column(table, "error %") == {"a": "12.50", "b": ""}
    assert column(table, "minutes") == {"a": "1.50", "b": "1.50"}
    assert "is not finished" in page.texts["runs"]
    charts = [block for block in collect(None, [a, b]).sections[0].blocks if isinstance(block, Chart)]
    assert [chart.title for chart in charts] == ["Training loss", "Gradient of the first convolution"]  # one error: no
    assert charts[1].series[1] == Series("b", [1.0, 2.0], [0.01, 0.001])


def test_runs_of_one_name_are_told_apart(tmp_path):
    paths = [run_at(tmp_path / "a/run"), run_at(tmp_path / "b/run")]
    (table,) = Page(as_page(collect(None, [*paths, paths[0]]))).tables["runs"]
    assert [row[0] for row in table[1:]] == ["a/run", "b/run"]


# Pages


def test_labels_are_escaped(place):
    measure(place, [{"model": NASTY, "x": 1.5}, {"model": "b", "x": 2.5}], "nasty.json", what=f"What {NASTY}")
    report = collect(place)
    page = Page(as_page(report))
    (table,) = page.tables["measured-nasty"]
    assert table[1] == [NASTY, "1.500"]
    assert f"What {NASTY}" in page.texts["measured-nasty"]
    assert "http://e.org" not in page.links
    assert "b" not in page.tags
    text = as_markdown(report)
    (line,) = [line for line in text.splitlines() if line.startswith("| ") and "1.500" in line]
    assert line == r"| &lt;b&gt;a &amp; b&lt;/b&gt; \| \`c\` \[d\](http://e.org) \_f\_ | 1.500 |"


def test_names_in_charts_are_escaped():
    name = '<u>a & b</u>"$x$'
    series = (Series(name, [1.0, 2.0], [1.0, 2.0], None, [1.0, 2.0]),)
    blocks = [
        Chart(name, name, name, series, caption=name),
        Dots(name, name, ((name, {name: 1.0}),), {name: 2.0}, name),
    ]
    page = Page(as_page(Report(name, [Text(name)], [Section(name, "a", blocks)])))
    assert "u" not in page.tags
    assert [value for key, value in page.attributes if key == "aria-label"] == ["Contents", name, name]
    assert page.texts["a"].count(name) >= 10


def test_the_page_needs_nothing_else(place):
    put(place, TABLE, entry(TABLE, "0.0", [30.0], scale=0.05))
    text = as_page(collect(place))
    page = Page(text)
    assert not {"link", "img", "iframe", "object", "embed", "audio", "video"} & set(page.tags)
    assert not {"src", "srcset", "data", "xlink:href"} & {name for name, _ in page.attributes}
    assert not re.search(r"url\(|@import|https?:", text)
    assert all(link.startswith("#") and link[1:] in page.ids for link in page.links)
    assert max(Counter(page.ids).values()) == 1
    assert {"nav", "main", "section", "figure"} - {"figure"} <= set(page.tags)
    assert "prefers-color-scheme: dark" in text
    assert ("name", "viewport") in page.attributes


def test_markdown_has_the_numbers_of_the_page(place):
    put(place, TABLE, entry(TABLE, "0.0", [8.25]), entry(TABLE, "0.5", [9.75]))
    put(place, TABLE, entry(TABLE, "0.0", [30.5], scale=0.05))
    report = collect(place)
    text = as_markdown(report, "report.html", "../results")
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    plain = [[re.sub(r"\\(.)", r"\1", cell.strip()).replace("&amp;", "&") for cell in row] for row in rows]
    shown = [row for tables in Page(as_page(report)).tables.values() for table in tables for row in table]
    numbers = [[cell for cell in row if re.match(r"[+-]?\d", cell)] for row in shown]
    numbers = [row for row in numbers if row]
    assert ["8.50", "8.25", "-0.25", "1", "30.50 (1 seed, 8 epochs)"] in numbers
    assert [row for row in ([c for c in row if re.match(r"[+-]?\d", c)] for row in plain) if row] == numbers
    assert "[bench.json](../results/bench.json)" in text
    assert "[report](report.html)" in text


def test_one_ledger_gives_one_report(place):
    assert as_page(collect(place)) == as_page(collect(place))


def charts_below(sections):
    found = [block for one in sections for block in one.blocks if isinstance(block, (Chart, Dots))]
    return found + [chart for one in sections for chart in charts_below(one.sections)]


def test_the_docs_are_what_the_ledger_renders_to():
    """If not: residrop report --markdown docs/results.md --html docs/report.html

    Drawings are compared by their names alone: how they are written depends on matplotlib's version.
    """
    report = collect(ROOT / "results")
    written = (ROOT / "docs/results.md").read_text(encoding="utf-8")
    assert written == as_markdown(report, "report.html", "../results")
    page = (ROOT / "docs/report.html").read_text(encoding="utf-8")
    drawings = re.compile(r"<svg .*?</svg>", re.DOTALL)
    assert drawings.sub("", page) == drawings.sub("", as_page(report))
    names = [unescape(re.search(r'aria-label="([^"]*)"', one)[1]) for one in drawings.findall(page)]
    assert names == [chart.title for chart in charts_below(report.sections)] != []
    assert all("<path" in one and "<text" in one for one in drawings.findall(page))
    assert len(page.encode()) < 1_000_000


# The command


def test_help_teaches(cli):
    code, out, _ = cli("--help")
    assert code == 0
    assert all(word in out for word in ("--ledger", "--markdown", "--html", "needs no network", "report.html"))


@pytest.mark.parametrize(
    ("options", "written"),
    [
        ((), ["report.html"]),
        (("--markdown", "a/r.md"), ["a/r.md"]),
        (("--markdown", "a/r.md", "--html", "b/r.html"), ["a/r.md", "b/r.html"]),
        (("--html", "r.html"), ["r.html"]),
    ],
)
def test_files_are_written(place, cli, options, written):
    code, out, err = cli(*options)
    assert (code, err) == (0, "")
    assert out.endswith(" ".join(f"written: {one}" for one in written))
    found = {str(path.relative_to(place.parent)) for path in place.parent.rglob("*") if path.is_file()}
    assert found == {"results/bench.json", *written}
    assert "depth-dropout" in out


def test_links_and_fifos_are_no_files_to_replace(place, cli):
    folder = place.parent
    (folder / "r.html").symlink_to("page")
    os.mkfifo(folder / "r.md")
    got = []
    reader = threading.Thread(target=lambda: got.append((folder / "r.md").read_text()), daemon=True)
    reader.start()
    assert cli("--markdown", "r.md", "--html", "r.html")[0] == 0
    reader.join(20)
    assert (folder / "r.html").is_symlink()
    assert (folder / "r.md").is_fifo()
    assert "</html>" in (folder / "page").read_text()
    assert got[0].startswith("#")


@pytest.mark.parametrize("option", ["--markdown", "--html"])
def test_a_full_device_is_one_line_and_stays_a_device(place, cli, option):
    """Through a link, or a failing test run by root would replace the device itself."""
    (place.parent / "link").symlink_to("/dev/full")
    code, _, err = cli(option, "link")
    refused = f"residrop: error: {option} link cannot be written (No space left on device); give another file"
    assert (code, err) == (2, refused)
    assert (place.parent / "link").is_char_device()


def test_links_lead_from_the_markdown_to_the_other_files(place, cli):
    assert cli("--markdown", "a/b/r.md", "--html", "a/r.html")[0] == 0
    text = (place.parent / "a/b/r.md").read_text()
    assert "[report](../r.html)" in text
    assert "(../../results/bench.json)" in text


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ("{", "cannot be read"),
        ("[1]", "give a JSON object"),
        ('{"rows": []}', "missing"),
        ('{"schema": 2}', "missing"),
        (None, "holds no document"),
    ],
)
def test_what_is_no_ledger_is_refused(tmp_path, cli, monkeypatch, broken, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "results").mkdir()
    if broken is not None:
        (tmp_path / "results/a.json").write_text(broken)
    code, out, err = cli()
    assert (code, out) == (2, "")
    assert err.startswith("residrop: error: ")
    assert message in err
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--ledger", "nowhere"), "nowhere is no folder"),
        (("nowhere",), "nowhere is no directory"),
        (("--html", "results"), "cannot be written"),
        (("--markdown", "results/bench.json/a.md"), "cannot be written"),
    ],
)
def test_bad_input_is_one_line(place, cli, arguments, message):
    code, _, err = cli(*arguments)
    assert code == 2
    assert err.startswith("residrop: error: ")
    assert message in err


def test_misspelt_options_are_told_by_tyro(place, cli):
    code, out, err = cli("--htlm", "a")
    assert (code, out) == (2, "")
    assert "Unrecognized options: --htlm" in err
    assert "--html" in err.replace("--htlm", "")


@pytest.mark.parametrize("name", ["metrics.jsonl", "evaluation.json", "recipe.json"])
def test_damaged_runs_are_refused(tmp_path, name):
    run = run_at(tmp_path / "run")
    (run / name).write_text("[1]\n")
    with pytest.raises(RunError, match=name):
        collect(None, [run])
