"""Pictures draw names as they are: dollars, backslashes, signs of other scripts, names of files that are no UTF-8."""

import io
import os
import warnings

import pytest
from matplotlib.figure import Figure

from residrop.common.pictures import save_png


@pytest.mark.parametrize("word", ["$$", "a$x^2$b", r"$\frac$", r"\$1", "$", "写真", os.fsdecode(b"\xff$\xfe$"), "a\nb"])
def test_words_are_drawn_as_they_are(tmp_path, word):
    figure = Figure(layout="constrained")
    axes = figure.add_subplot()
    axes.plot([1, 1000], [1, 1000], label=word)
    axes.set(xlabel=word, ylabel=word, title=word, yscale="log")
    axes.text(1, 1, word)
    axes.legend()
    figure.suptitle(word)
    figure.supxlabel(word)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_png(figure, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 1000


def test_a_formula_is_drawn_as_its_letters_and_powers_of_ten_as_powers(tmp_path):
    figures = [Figure(), Figure()]
    for figure in figures:
        axes = figure.add_subplot()
        axes.plot([1, 1000], [1, 1000])
        axes.set(title="$x^2$", yscale="log")
    figures[0].axes[0].title.set_parse_math(False)
    wanted = io.BytesIO()
    figures[0].savefig(wanted, format="png")
    save_png(figures[1], tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes() == wanted.getvalue()
