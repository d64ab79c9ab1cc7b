"""`residrop predict` as a user meets it."""

import shutil

import pytest

from command_line import assert_refused, strictly
from residrop.data import load
from residrop.inference import predict
from residrop.training import load_run


def test_predict_gives_class_probability_and_uncertainty(cli, run, digits):
    paths, labels = digits
    code, out, _ = cli("predict", run, *paths, "--samples", "4", "--json", "-")
    rows = strictly(out)
    assert code == 0
    assert [row["file"] for row in rows] == [str(path) for path in paths]
    keys = {"file", "class", "probability", "standard_error", "entropy", "mutual_information", "temperature", "samples"}
    assert all(row.keys() == keys for row in rows)
    opened, model = load_run(run)
    pixels = load("digits").test.pixels[:12]
    wanted = predict(model, opened.normalization()(pixels), 4)
    assert [int(row["class"]) for row in rows] == wanted.classes.tolist()
    assert [row["probability"] for row in rows] == pytest.approx(wanted.probabilities.amax(1).tolist(), rel=1e-4)
    assert [row["entropy"] for row in rows] == pytest.approx(wanted.entropy.tolist(), rel=1e-3, abs=1e-5)
    assert sum(int(row["class"]) == label for row, label in zip(rows, labels.tolist(), strict=True)) >= 8


def test_predict_shows_a_table(cli, run, digits, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(digits[0][0].parent)
    code, out, _ = cli("predict", run, "3.png", "--samples", "0")
    opened, model = load_run(run)
    pixels = load("digits").test.pixels[3:4]
    found = predict(model, opened.normalization()(pixels), 0)
    assert code == 0
    line = next(line for line in out.splitlines() if "3.png" in line)
    assert f" {found.classes.item()} " in line
    assert f"{found.probabilities.max():.3f}" in line


def test_file_names_with_brackets_are_shown_in_full(cli, run, digits, monkeypatch):
    # rich reads [copy] as markup and swallows it
    monkeypatch.setenv("COLUMNS", "200")
    folder = digits[0][0].parent
    monkeypatch.chdir(folder)
    shutil.copy(digits[0][0], folder / "photo[copy].png")
    _, out, _ = cli("predict", run, "photo[copy].png", "--samples", "0")
    assert "photo[copy].png" in out


def test_paths_that_look_like_markup_do_not_crash(cli, run, digits):
    folder = digits[0][0].parent / "a["
    folder.mkdir()
    shutil.copy(digits[0][0], folder / "b].png")
    assert cli("predict", run, folder / "b].png", "--samples", "0")[0] == 0


def test_long_file_names_are_not_cut_where_standard_output_is_a_file(cli, run, digits):
    # without a terminal the table is 80 wide, and names are what gives way
    name = digits[0][0].parent / ("a-rather-long-file-name-" * 3 + ".png")
    shutil.copy(digits[0][0], name)
    _, out, _ = cli("predict", run, name, "--samples", "0")
    assert name.name in out


def test_bad_input_to_predict_is_one_line(cli, place, run, digits):
    good = digits[0][0]
    bad = good.with_name("bad.png")
    bad.write_text("no image")
    for arguments, words in (
        ([good, "--samples", "-1"], "samples is -1; give a whole number of at least 0"),
        ([good, bad], "bad.png cannot be decoded"),
        ([good, "nowhere.png"], "nowhere.png is no file"),
        ([good.parent], "is no file"),
        ([good, "--device", "abacus"], "'abacus'"),
    ):
        result = cli("predict", run, *arguments)
        assert_refused(result, place)
        assert words in result[2]
