"""How the papers' files are read: entries that share fields, recipes over a base, rates that come from a budget."""

from pathlib import Path

import pytest

from residrop.research.papers import PAPERS, Row, all_rows, find, find_row, reader
from residrop.schedule import budgets
from residrop.training import preset

FILES = sorted(Path(reader.__file__).parent.glob("*.toml"))


@pytest.fixture
def written(tmp_path, monkeypatch):
    """Reads a paper of one table whose rows are given."""
    monkeypatch.setattr(reader, "files", lambda package: tmp_path)

    def written(rows):
        head = 'title = "T"\nauthors = "A"\nyear = 2026\nvenue = "V"\nfigures = []\nvariants = []\nclaims = []\n'
        table = '[[tables]]\nname = "table-1"\ntitle = "T"\nkind = "training"\n'
        (tmp_path / "toy.toml").write_text(head + table + rows)
        return reader.read("toy").tables[0].rows

    return written


def test_every_file_is_a_paper():
    assert {path.stem for path in FILES} == set(PAPERS)
    assert len(FILES) == 4
    assert [paper.year for paper in PAPERS.values()] == [2016, 2016, 2016, 2021]


def test_entries_of_a_list_share_the_fields_beside_it(written):
    rows = written(
        '[[tables.rows]]\ncolumn = "C"\npublished = 1.0\nsetting = {a = 1, b = 2}\n'
        'rows = [{key = "x", label = "X", setting = {b = "None"}}, {key = "y", label = "Y", published = 2.0}]\n'
        '[[tables.rows]]\nkey = "z"\nlabel = "Z"\npublished = 3.0\n'
    )
    assert rows == (
        Row(key="x", label="X", column="C", published=1.0, setting={"a": 1, "b": None}),
        Row(key="y", label="Y", column="C", published=2.0, setting={"a": 1, "b": 2}),
        Row(key="z", label="Z", published=3.0),
    )


def test_recipe_is_a_preset_or_fields_over_one(written):
    first, second, third = written(
        '[[tables.rows]]\nlabel = "L"\npublished = 1.0\nrecipe = {base = "digits", epochs = 3}\n'
        'rows = [{key = "x"}, {key = "y", recipe = {lr = 1}}]\n'
        '[[tables.rows]]\nkey = "z"\nlabel = "L"\npublished = 1.0\nrecipe = "digits/swapout"\n'
    )
    digits = preset("digits").recipe
    assert first.recipe == digits.replace(epochs=3)
    assert second.recipe == digits.replace(epochs=3, lr=1.0)
    assert third.recipe == preset("digits/swapout").recipe


def test_unknown_field_is_refused(written):
    with pytest.raises(TypeError, match="publishd"):
        written('rows = [{key = "x", label = "X", publishd = 1.0}]\n')


def test_nothing_is_left_as_toml_has_it():
    """No list, which could be changed, and no "None"."""

    def leaves(value):
        if isinstance(value, dict):
            return [leaf for one in value.values() for leaf in leaves(one)]
        return [leaf for one in value for leaf in leaves(one)] if isinstance(value, tuple) else [value]

    found = [leaf for _, row in all_rows() for leaf in leaves(tuple(vars(row).values()))]
    assert len(found) > 2000
    assert not any(isinstance(leaf, list) or leaf == "None" for leaf in found)


@pytest.mark.parametrize("budget", [0.5, 0.6, 0.7, 0.8, 0.9])
def test_linear_rates_of_table_2_are_those_of_the_budget(budget):
    recipe = find_row(f"sd-regularization/table-2/linear-{budget}")[1].recipe
    assert recipe is not None
    assert recipe.survival == f"linear_decay({budgets.linear_at(54, budget * 54)[-1]!r})"


@pytest.mark.parametrize(
    ("name", "blocks", "budget"),
    [("figure-1a", 100, 0.5), ("figure-2a", 50, 0.5), ("figure-2b", 50, 0.7), ("figure-2c", 50, 0.7)],
)
def test_linear_rates_of_figures_are_those_of_the_budget(name, blocks, budget):
    curve = find(f"sd-regularization/{name}").curves[-1]
    assert curve.label == "Linear"
    assert curve.setting["survival"] == f"linear_decay({budgets.linear_at(blocks, budget * blocks)[-1]!r})"


def test_shares_saved_follow_from_the_printed_times():
    for data in ("cifar10", "cifar100", "svhn"):
        plain, dropped, saved = (
            find_row(f"stochastic-depth/table-2/{kind}-{data}")[1].published
            for kind in ("constant", "stochastic", "saved")
        )
        assert saved == 100.0 * (1.0 - dropped / plain)
