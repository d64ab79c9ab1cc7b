"""The papers' numbers, spelled out again; their recipes build the papers' networks."""

import dataclasses
import math
from collections import Counter, defaultdict
from functools import cache

import pytest
import torch

from residrop.blocks.attach import rules_of
from residrop.common.errors import ConfigError
from residrop.models import num_blocks
from residrop.research.papers import INSTRUMENTS, METRICS, PAPERS, PLOTTED, Figure, Table, all_rows, find, find_row
from residrop.rules.catalogue import entry_of
from residrop.schedule.survival import expected_depth, parse
from residrop.training import PRESETS
from residrop.training.networks import build_network

CLASSES = {"cifar10": 10, "cifar100": 100, "svhn": 10, "imagenet": 1000}
ROWS = [(f"{table.id}/{row.key}", table, row) for table, row in all_rows()]
TRAINED = {name: row.recipe for name, _, row in ROWS if row.recipe is not None}
FIGURES = [figure for paper in PAPERS.values() for figure in paper.figures]
VARIANTS = [(paper.name, variant) for paper in PAPERS.values() for variant in paper.variants]

# Lines of the tables as printed, cells in order; None is "-". Fractions and hours are converted in the tests.
STOCHASTIC_DEPTH_1 = {
    "maxout": (9.38, None, 2.47, None),
    "dropconnect": (9.32, None, 1.94, None),
    "net-in-net": (8.81, None, 2.35, None),
    "deeply-supervised": (7.97, None, 1.92, 33.70),
    "frac-pool": (None, 27.62, None, None),
    "all-cnn": (7.25, None, None, 41.20),
    "learning-activation": (7.51, 30.83, None, None),
    "r-cnn": (7.09, None, 1.77, None),
    "scalable-bo": (6.37, 27.40, 1.77, None),
    "highway-network": (7.60, 32.24, None, None),
    "gen-pool": (6.05, None, 1.69, 28.02),
    "constant": (6.41, 27.76, 1.80, 21.78),
    "stochastic": (5.25, 24.98, 1.75, 21.98),
}
SWAPOUT_1 = (8.75, 8.54, 8.27, 8.27, 7.97, 6.58, 6.54, 5.99, 5.87, 6.11, 5.68)
SWAPOUT_1_PARAMETERS = (0.27,) * 5 + (1.09,) * 6
SWAPOUT_2 = (10.36, 6.69, 10.14, 7.63, 7.58, 6.56, 7.34, 6.52, 6.43, 5.68)
SWAPOUT_3 = (8.27, 8.58, 7.92, 6.54, 6.40, 5.68, 5.62, 5.43, 5.09, 5.23, 4.97, 4.76)
SWAPOUT_4 = (9.32, 8.81, 8.39, 7.97, 7.60, 6.41, 4.91, 6.58, 4.92, 4.76)
SWAPOUT_5 = (35.68, 34.57, 35.04, 32.39, 27.22, 24.58, 24.33, 22.71, 28.08, 25.86, 24.86, 23.46, 22.72)
SWAPOUT_5_PARAMETERS = (None, None, None, None, 1.7, 1.7, 1.7, 10.2, 1.09, 1.10, 3.43, 3.43, 7.46)
DEPTH_DROPOUT_2 = (64.0, 104.5, 168.5, 53.6, 85.4, 139.0, 43.5, 67.6, 111.1, 33.0, 48.5, 81.5, 17.5, 34.1, 51.6)
GROWTH = {  # l: standard, uniform, linear; empirical then theoretical
    0: (2.001, 1.705, 1.694, 2, 1.7, 1.691),
    10: (2.001, 1.708, 1.633, 2, 1.7, 1.629),
    20: (2.001, 1.707, 1.569, 2, 1.7, 1.573),
    30: (2.001, 1.716, 1.555, 2, 1.7, 1.516),
    40: (1.999, 1.739, 1.530, 2, 1.7, 1.459),
}
BUDGETS = {  # budget: SenseMode, uniform, linear, with standard deviations
    "0.1": (15.4, 0.4, 17.2, 0.3),
    "0.2": (9.3, 0.5, 10.3, 0.4),
    "0.3": (7.0, 0.3, 7.7, 0.2),
    "0.4": (7.3, 0.4, 7.4, 0.3),
    "0.5": (7.3, 0.2, 6.8, 0.1, 9.1, 0.1),
    "0.6": (6.9, 0.1, 6.3, 0.2, 7.5, 0.2),
    "0.7": (7.3, 0.3, 5.9, 0.1, 6.4, 0.2),
    "0.8": (6.6, 0.2, 5.7, 0.1, 6.1, 0.2),
    "0.9": (6.2, 0.2, 5.7, 0.1, 6.0, 0.2),
}


def value(name):
    published = find_row(name)[1].published
    assert published is not None
    return published


def rows_of(name):
    table = find(name)
    assert isinstance(table, Table)
    return table.rows


def printed(name):
    return tuple(row.published for row in rows_of(name))


def rates_of(recipe):
    """p_l or (theta_1, theta_2) by block, without building anything."""
    blocks = num_blocks(recipe.network)
    first = parse(entry_of(recipe.rule).survival if recipe.survival is None else recipe.survival, blocks)
    return first, first if recipe.theta_2 is None else parse(recipe.theta_2, blocks)


@cache
def network(recipe):
    described = {"classes": [str(i) for i in range(CLASSES[recipe.data])], "channels": 3, "size": 32, "steps": 1000}
    with torch.device("meta"):
        return build_network(recipe, described)


def parameters(recipe):
    return sum(parameter.numel() for parameter in network(recipe).parameters())


# What is there


def test_every_table_and_figure_is_there():
    names = {paper.name: {one.name for one in (*paper.tables, *paper.figures)} for paper in PAPERS.values()}
    assert names == {
        "stochastic-depth": {
            "table-1", "table-2", "section-3", "section-4", "figure-1", "figure-2", "figure-3-left", "figure-3-right",
            "figure-4-left", "figure-4-right", "figure-5", "figure-6", "figure-7", "figure-8-left", "figure-8-right",
        },
        "swapout": {
            "table-1", "table-2", "table-3", "table-4", "table-5", "figure-1", "figure-2-left", "figure-2-right",
        },
        "depth-dropout": {
            "table-1", "table-2", "table-3", "section-3", "section-4", "figure-1", "figure-2a", "figure-2b",
            "figure-2c", "figure-3a", "figure-3b", "figure-4a", "figure-4b",
        },
        "sd-regularization": {
            "table-1", "table-2", "section-3", "figure-1a", "figure-1b", "figure-2a", "figure-2b", "figure-2c",
            "figure-3", "figure-4", "figure-5-left", "figure-5-right",
        },
    }  # fmt: skip


def test_ids_are_unique_and_found():
    every = [one for paper in PAPERS.values() for one in (*paper.tables, *paper.figures)]
    assert all(find(one.id) is one for one in every)
    assert all(one.id.startswith(f"{name}/") for name, paper in PAPERS.items() for one in paper.tables + paper.figures)
    assert max(Counter(one.id for one in every).values()) == 1
    assert max(Counter(name for name, _, _ in ROWS).values()) == 1
    assert find_row("swapout/table-2/0.5-0.5-stochastic")[1].published == 6.69


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("swapout/tabel-2", "'swapout/tabel-2' is no table or figure; did you mean swapout/table-2"),
        ("zzzz", "'zzzz' is no table or figure; did you mean stochastic-depth/table-1"),
        ("swapout/figure-2", "did you mean .*swapout/figure-2-left"),
    ],
)
def test_unknown_id_suggests_close_ones(name, message):
    with pytest.raises(ConfigError, match=message):
        find(name)


def test_unknown_row_suggests_close_ones():
    with pytest.raises(ConfigError, match="swapout/table-1 has no row 'swapout-v2-w3'; did you mean swapout-v2-w"):
        find_row("swapout/table-1/swapout-v2-w3")
    with pytest.raises(ConfigError, match=r"figure-1 is a figure and has curves, no rows"):
        find_row("swapout/figure-1/x")


# The numbers


def test_numbers_of_stochastic_depth():
    cells = {
        f"{method}-{data}": cell
        for method, line in STOCHASTIC_DEPTH_1.items()
        for data, cell in zip(("cifar10", "cifar100", "svhn", "imagenet"), line, strict=True)
        if cell is not None
    }
    assert {row.key: row.published for row in rows_of("stochastic-depth/table-1")} == cells
    hours = {"constant": ((20, 42), (20, 51), (33, 43)), "stochastic": ((15, 7), (15, 20), (25, 33))}
    minutes = {
        f"{kind}-{data}": 60 * h + m
        for kind, line in hours.items()
        for data, (h, m) in zip(("cifar10", "cifar100", "svhn"), line, strict=True)
    }
    times = {row.key: row.published for row in rows_of("stochastic-depth/table-2") if row.metric == "minutes"}
    assert times == minutes
    saved = [value(f"stochastic-depth/table-2/saved-{data}") for data in ("cifar10", "cifar100", "svhn")]
    assert saved == pytest.approx([27.0, 26.5, 24.2], abs=0.05)
    assert printed("stochastic-depth/section-4") == (
        13.63, 11.66, 44.74, 37.8, 27.22, 7.93, 6.67, 4.91, 23.06, 23.38,
    )  # fmt: skip
    assert printed("stochastic-depth/section-3") == (40, 25, 40)


def test_numbers_of_swapout():
    assert printed("swapout/table-1") == SWAPOUT_1
    assert printed("swapout/table-2") == SWAPOUT_2
    assert printed("swapout/table-3") == SWAPOUT_3
    assert printed("swapout/table-4") == SWAPOUT_4
    assert printed("swapout/table-5") == SWAPOUT_5
    assert tuple(row.parameters_m for row in rows_of("swapout/table-1")) == SWAPOUT_1_PARAMETERS
    assert tuple(row.parameters_m for row in rows_of("swapout/table-3")[::3]) == (0.27, 1.09, 4.33, 7.43)
    assert tuple(row.parameters_m for row in rows_of("swapout/table-5")) == SWAPOUT_5_PARAMETERS
    assert [row.parameters_m for row in rows_of("swapout/table-4")][5:] == [1.7, 19.4, 1.09, 10.2, 7.43]


def test_numbers_of_depth_dropout():
    assert printed("depth-dropout/table-1") == pytest.approx([100 * error for error in (0.085, 0.081, 0.098, 0.113)])
    assert printed("depth-dropout/table-2") == DEPTH_DROPOUT_2
    assert printed("depth-dropout/table-3") == pytest.approx([100 * error for error in (0.340, 0.341)])
    assert printed("depth-dropout/section-3") == (45.5,)
    assert printed("depth-dropout/section-4") == (12.3, 34.6, 56.7, 6.9)
    assert [row.theory for row in rows_of("depth-dropout/table-2")[-3:]] == [12.3, 34.6, 56.7]


def test_numbers_of_sd_regularization():
    rows = [find_row(f"sd-regularization/table-1/{mode}-{layer}")[1] for layer in GROWTH for mode in
            ("standard", "uniform", "linear")]  # fmt: skip
    assert [row.published for row in rows] == [rate for line in GROWTH.values() for rate in line[:3]]
    assert [row.theory for row in rows] == [rate for line in GROWTH.values() for rate in line[3:]]
    cells = {
        f"{mode}-{budget}": pair
        for budget, line in BUDGETS.items()
        for mode, pair in zip(("sensemode", "uniform", "linear"), zip(line[::2], line[1::2], strict=True), strict=False)
    }
    rows = rows_of("sd-regularization/table-2")
    assert {row.key: (row.published, row.spread) for row in rows} == {**cells, "constant": (6.37, 0.12)}


def test_both_kinds_of_inference_are_told_apart():
    metrics = [row.metric for row in rows_of("swapout/table-2")]
    assert metrics == ["error", "sampled_error"] * 5
    assert [row.metric for row in rows_of("swapout/table-3")] == ["error", "error", "sampled_error"] * 4
    assert find_row("swapout/table-1/resnet-v2-ours-w2")[1].metric == "error"
    assert find_row("swapout/table-1/dropout-v2-w2")[1].also == ("error",)


def test_computed_shares_follow_from_printed_times():
    totals = [value(f"depth-dropout/table-2/{ratio}-total") for ratio in ("0.0", "0.25", "0.5", "0.75")]
    saved = [100 * (1 - total / totals[0]) for total in totals[1:]]
    assert [value(f"depth-dropout/table-2/{ratio}-saved") for ratio in ("0.25", "0.5", "0.75")] == pytest.approx(
        saved, abs=0.05
    )
    for ratio, (forward, backward) in {"0.25": (53.6, 85.4), "0.75": (33.0, 48.5)}.items():
        assert value(f"depth-dropout/table-2/{ratio}-total") == pytest.approx(forward + backward)


def test_predictions_are_what_their_settings_give():
    """The printed theory, from the settings that instruments are given: a wrong schedule or network would differ."""
    settings = {name: row.setting for name, _, row in ROWS}
    blocks = settings["stochastic-depth/section-3/blocks"]
    assert expected_depth(parse(blocks["survival"], blocks["blocks"])) == 40.25
    for key, exact in (("saved-0.5", 25.463), ("saved-0.2", 40.741)):
        setting = settings[f"stochastic-depth/section-3/{key}"]
        share = 1 - expected_depth(parse(setting["survival"], setting["blocks"])) / setting["blocks"]
        assert 100 * share == pytest.approx(exact, abs=1e-3)
    exact = {}
    for name in ("section-3/unit-0.5", "section-4/saved-0.25", "section-4/saved-0.5", "section-4/saved-0.75"):
        setting = settings[f"depth-dropout/{name}"]
        rate, droppable = parse(setting["survival"], 1)[0], setting["droppable"]
        exact[name] = 100 * droppable * (1 - rate - setting["shortcut"]) / setting["blocks"]
    assert list(exact.values()) == pytest.approx([44.4, 12.35, 34.57, 56.79], abs=0.05)
    for layer in GROWTH:
        for mode, tolerance in (("standard", 0), ("uniform", 0), ("linear", 0.01)):
            _, row = find_row(f"sd-regularization/table-1/{mode}-{layer}")
            rates = parse(row.setting["survival"], 50)[layer:]
            growth = math.prod(1 + rate for rate in rates) ** (1 / len(rates))
            assert row.theory == pytest.approx(growth, abs=tolerance + 1e-9), (mode, layer)


def test_claims_hold_in_the_published_numbers():
    claims = [(name, claim) for name, paper in PAPERS.items() for claim in paper.claims]
    pairs = [(f"{name}/{low}", f"{name}/{high}") for name, claim in claims for low, high in claim.pairs]
    wrong = [(low, high) for low, high in pairs if not value(low) < value(high)]
    assert len(pairs) > 70
    assert wrong == []


def test_claims_are_about_something():
    for paper in PAPERS.values():
        names = {one.name for one in (*paper.tables, *paper.figures)}
        assert {claim.where for claim in paper.claims} <= names


def test_orderings_that_the_texts_state():
    assert value("swapout/table-3/20-w1-deterministic") > value("swapout/table-3/20-w1-resnet")  # "most widths"
    assert value("swapout/table-5/resnet-v2-ours-20-w2") - value("swapout/table-5/swapout-20-w2") > 2
    assert value("swapout/table-5/swapout-32-w4-0.8") - value("swapout/table-5/resnet-v2-1001") == pytest.approx(0.01)
    best = min(row.published or 100 for row in rows_of("stochastic-depth/table-1") if row.column == "CIFAR10+")
    assert best == value("stochastic-depth/table-1/stochastic-cifar10")
    for data in ("cifar10", "cifar100"):
        plain, dropped = (
            value(f"stochastic-depth/section-4/{kind}-{data}-plain") for kind in ("constant", "stochastic")
        )
        assert 1 - dropped / plain == pytest.approx(0.15, abs=0.01)
    for budget, line in BUDGETS.items():
        assert (line[0] < line[2]) == (float(budget) < 0.5)


def test_numbers_printed_twice_agree():
    def same(first, second):
        return value(f"swapout/{first}") == value(f"swapout/{second}")

    assert same("table-1/swapout-v2-w2", "table-2/linear-1-0.5-stochastic")
    assert same("table-1/swapout-v2-w2", "table-3/20-w2-stochastic")
    assert same("table-1/resnet-v2-ours-w1", "table-3/20-w1-resnet")
    assert same("table-1/resnet-v2-ours-w2", "table-3/20-w2-resnet")
    assert same("table-1/swapout-v1-w2", "table-4/swapout-v1-20-w2")
    assert same("table-3/32-w4-stochastic", "table-4/swapout-v2-32-w4")
    assert value("swapout/table-4/resnet-v1-110") == value("stochastic-depth/table-1/constant-cifar10")
    assert value("swapout/table-4/stochastic-depth-1202") == value("stochastic-depth/section-4/stochastic-1202")


# Recipes


def test_presets_and_rows_publish_the_same():
    published = defaultdict(set)
    for _, row in all_rows():
        published[row.recipe].add(row.published)
    presets = {name: one for name, one in PRESETS.items() if one.published is not None}
    assert len(presets) >= 25
    missing = [name for name, one in presets.items() if one.published not in published[one.recipe]]
    assert missing == []


@pytest.mark.parametrize("recipe", dict.fromkeys(TRAINED.values()), ids=lambda recipe: recipe.fingerprint())
def test_recipe_builds(recipe):
    model = network(recipe)
    assert sum(parameter.numel() for parameter in model.parameters()) > 200_000
    assert len(list(rules_of(model))) in (8, 9, 15, 27, 50, 54, 75, 600)


def test_parameter_counts_are_those_printed():
    copied = {"swapout/table-5/resnet-v2-ours-20-w2"}  # the network of CIFAR-10, see its note
    counted = {
        name: (round(parameters(row.recipe) / 1e6, 2), row.parameters_m)
        for name, _, row in ROWS
        if row.recipe is not None and row.parameters_m is not None
    }
    assert {name for name, (found, wanted) in counted.items() if found != wanted} == copied
    assert counted["swapout/table-5/resnet-v2-ours-20-w2"] == (1.10, 1.09)
    assert len(counted) == 10 + 12 + 2 + 5


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("stochastic-depth/table-1/constant-cifar10", 1_727_962),
        ("stochastic-depth/table-1/stochastic-cifar100", 1_733_812),
        ("stochastic-depth/table-1/constant-svhn", 2_408_474),
        ("stochastic-depth/table-1/constant-imagenet", 60_192_808),
        ("stochastic-depth/section-4/constant-1202", 19_421_274),
        ("swapout/table-5/swapout-56-w2-0.8", 3_427_876),
        ("swapout/table-3/32-w4-resnet", 7_432_074),
        ("depth-dropout/table-1/0.0", 853_018),
        ("depth-dropout/table-1/0.75", 897_818),
        ("depth-dropout/table-3/0.0", 11_689_512),
        ("depth-dropout/table-3/0.5", 12_043_816),
        ("sd-regularization/table-2/sensemode-0.3", 1_727_962),
    ],
)
def test_parameter_count(name, count):
    assert parameters(TRAINED[name]) == count


@pytest.mark.parametrize("name", [name for name in TRAINED if name.startswith("sd-regularization/table-2")])
def test_budgets_of_the_modes_are_met(name):
    recipe = TRAINED[name]
    mode, _, budget = name.rpartition("/")[2].partition("-")
    wanted = float(budget or 1)
    measured = recipe.budget is not None
    assert measured == (mode == "sensemode")
    rates = [rule.rates[0] if rule.rates else 1.0 for rule in rules_of(network(recipe))]
    found = float(recipe.budget or sum(rates) / len(rates))
    assert found == pytest.approx(wanted)
    assert recipe.spend == ("sensitivity" if measured else "uniform")


def test_linear_mode_has_the_rates_of_the_theory():
    last = [rates_of(TRAINED[f"sd-regularization/table-2/linear-{budget}"])[0][-1] for budget in list(BUDGETS)[4:]]
    assert last == pytest.approx([0.01818, 0.21455, 0.41091, 0.60727, 0.80364], abs=1e-5)


def test_rates_of_depth_dropout_are_one_minus_the_ratio():
    for ratio in ("0.25", "0.5", "0.75"):
        rates = [rule.rates[0] for rule in rules_of(network(TRAINED[f"depth-dropout/table-1/{ratio}"])) if rule.rates]
        assert min(rates) == pytest.approx(1 - float(ratio))
        setting = find_row(f"depth-dropout/table-2/{ratio}-total")[1].setting
        assert setting["survival"] == TRAINED[f"depth-dropout/table-1/{ratio}"].survival


def test_thetas_of_the_schedules():
    def thetas(key):
        return [rule.rates for rule in rules_of(network(TRAINED[f"swapout/table-2/{key}-stochastic"]))]

    assert thetas("0.5-0.5") == [(0.5, 0.5)] * 9
    assert thetas("0.2-0.8") == [(0.2, 0.8)] * 9
    assert thetas("0.8-0.2") == [(0.8, 0.2)] * 9
    first, *_, last = thetas("linear-0.5-1")
    assert (first, last) == ((0.5, 0.5), (1.0, 1.0))
    rising = [0.5, 0.5625, 0.625, 0.6875, 0.75, 0.8125, 0.875, 0.9375, 1.0]
    assert [pair[0] for pair in thetas("linear-1-0.5")] == rising[::-1]


def test_both_inferences_come_from_one_training():
    for key in ("0.5-0.5", "0.2-0.8", "0.8-0.2", "linear-0.5-1", "linear-1-0.5"):
        assert TRAINED[f"swapout/table-2/{key}-deterministic"] == TRAINED[f"swapout/table-2/{key}-stochastic"]
    assert len({TRAINED[f"swapout/table-2/{key}"] for key in ("0.2-0.8-stochastic", "0.8-0.2-stochastic")}) == 2
    same = ("table-1/swapout-v2-w2", "table-2/linear-1-0.5-stochastic", "table-3/20-w2-deterministic")
    assert len({TRAINED[f"swapout/{name}"] for name in same}) == 1
    assert TRAINED["swapout/table-3/32-w4-stochastic"] == TRAINED["swapout/table-4/swapout-v2-32-w4"]
    twice = ("stochastic-depth/table-1/constant-cifar100", "stochastic-depth/section-4/constant-cifar100")
    assert TRAINED[twice[0]] == TRAINED[twice[1]]


def test_recipes_that_say_the_same_are_equal():
    """Two spellings of one training ("0.5", "uniform(0.5)") would be trained twice."""
    spelled = defaultdict(set)
    curves = [curve for figure in FIGURES for curve in figure.curves]
    drawn = {one.recipe for curve in curves for one in (curve, *curve.points)} - {None}
    assert len(drawn) > 70
    for recipe in {*TRAINED.values(), *drawn}:
        rest = dataclasses.replace(recipe, survival=None, theta_2=None)
        spelled[rest, rates_of(recipe)].add(recipe)
    assert [same for same in spelled.values() if len(same) > 1] == []


def test_seeds_and_machine_are_left_open():
    plain = type(next(iter(TRAINED.values())))()
    for name, recipe in TRAINED.items():
        found = {field: getattr(recipe, field) for field in ("seed", "device", "precision", "samples", "limit")}
        assert found == {field: getattr(plain, field) for field in found}, name


# Rows, curves, variants are well formed


def test_rows_say_how_they_are_filled():
    for name, table, row in ROWS:
        assert row.metric in METRICS, name
        assert (row.recipe is not None) + (row.instrument is not None) == row.own, name
        assert row.instrument is None or row.instrument in INSTRUMENTS, name
        assert bool(row.setting) == (row.instrument is not None), name
        assert table.kind == "training" or row.recipe is None, name
        assert row.label, name
        assert row.published is not None, name
        assert row.published > 0, name


def test_instruments_are_all_used():
    used = {row.instrument for _, row in all_rows()} | {curve.instrument for one in FIGURES for curve in one.curves}
    assert used - {None} == set(INSTRUMENTS)


def test_networks_of_instruments_exist():
    settings = [row.setting for _, row in all_rows()] + [curve.setting for one in FIGURES for curve in one.curves]
    named = [setting for setting in settings if "network" in setting]
    assert len(named) > 30
    for setting in named:
        blocks = num_blocks(setting["network"])
        assert blocks in (25, 27, 50, 54, 75, 100, 200)
        assert num_blocks(setting.get("baseline", setting["network"])) == blocks
        assert len(parse(setting.get("survival") or 1.0, blocks)) == blocks
        assert entry_of(setting.get("rule", "constant"))


def test_curves_are_drawn_from_one_thing():
    for figure in FIGURES:
        for curve in figure.curves:
            ways = [curve.recipe is not None, bool(curve.points), curve.instrument is not None]
            assert sum(ways) == 1, (figure.id, curve.label)
            assert curve.plotted in PLOTTED
            assert curve.instrument is None or curve.instrument in INSTRUMENTS
            assert (curve.plotted == "instrument") == (curve.instrument is not None)
        labels = [curve.label for curve in figure.curves]
        assert len(set(labels)) == len(labels), figure.id
        assert bool(figure.x and figure.y) == bool(figure.curves), figure.id


def test_points_of_curves_are_rows_or_trainings():
    pairs = [(PAPERS[one.paper], curve) for one in FIGURES for curve in one.curves]
    points = [(paper, point) for paper, curve in pairs for point in curve.points]
    assert len(points) > 60
    assert all((point.row is None) != (point.recipe is None) for _, point in points)
    assert all(sorted(point.x for point in curve.points) == [point.x for point in curve.points] for _, curve in pairs)
    names = [(paper, name) for paper, point in points for name in (point.row, point.x_row) if name]
    names += [(paper, name) for paper, curve in pairs for name in curve.rows]
    assert len(names) == 4 + 4 + 3 + 4 + 3 + 4
    assert all(paper.row(name).published is not None for paper, name in names)


def test_figure_8_varies_what_it_says():
    left, right = find("stochastic-depth/figure-8-left"), find("stochastic-depth/figure-8-right")
    assert isinstance(left, Figure)
    assert isinstance(right, Figure)
    for curve, schedule in zip(left.curves[1:], ("linear_decay", "uniform"), strict=True):
        *dropping, plain = curve.points
        found = [point.recipe and point.recipe.survival for point in dropping]
        assert found == [f"{schedule}({point.x:g})" for point in dropping]
        assert plain.recipe == TRAINED["stochastic-depth/table-1/constant-cifar10"]
    assert left.curves[1].points[4].recipe == TRAINED["stochastic-depth/table-1/stochastic-cifar10"]
    assert {point.recipe.network for curve in right.curves for point in curve.points if point.recipe} == {
        "resnet-20", "resnet-32", "resnet-44", "resnet-56", "resnet-110",
    }  # fmt: skip


@pytest.mark.parametrize(("paper", "variant"), VARIANTS, ids=[f"{paper}/{one.name}" for paper, one in VARIANTS])
def test_variant_is_another_training_that_builds(paper, variant):
    rows = [(table, row) for table in PAPERS[paper].tables for row in table.rows if variant.applies(table, row)]
    named = {f"{table.name}/{row.key}" for table, row in rows}
    assert rows
    named |= {name.partition("/")[0] for name in named} | {figure.name for figure in PAPERS[paper].figures}
    assert set(variant.concerns) <= named
    kinds = {}
    for recipe in {row.recipe for _, row in rows}:
        other = variant.of(recipe)
        assert other != recipe
        assert {key: getattr(other, key) for key in variant.changes} == dict(variant.changes)
        if other.network != "resnet-1202":  # slow to build
            kinds[other.network, other.rule, other.block] = other
    for other in kinds.values():
        assert network(other).training


def test_claims_name_curves_of_their_figure():
    named = 0
    for paper in PAPERS.values():
        figures = {figure.name: {curve.label for curve in figure.curves} for figure in paper.figures}
        for claim in paper.claims:
            assert not (claim.pairs and claim.curves)
            for pair in claim.curves:
                assert set(pair) <= figures[claim.where]
                named += 1
    assert named >= 2


def test_variant_names_are_unique():
    assert max(Counter((paper, one.name) for paper, one in VARIANTS).values()) == 1


def test_variant_leaves_other_rows_alone():
    swapout = PAPERS["swapout"]
    concerned = {
        one.name: {row.key for row in swapout.table("table-1").rows if one.applies(swapout.table("table-1"), row)}
        for one in swapout.variants
    }
    assert concerned["dropout-sum"] == {"dropout-v2-w2"}
    assert concerned["skipforward-literal"] == {"skipforward-v2-w2"}
    assert len(concerned["nesterov"]) == 10  # all but the quoted one
