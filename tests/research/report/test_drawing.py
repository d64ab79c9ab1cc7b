"""Charts: values stand where they should, labels are text and nothing else, and nothing is loaded."""

import itertools
import re
from xml.etree import ElementTree

import pytest

from residrop.research.report.blocks import Chart, Dots, Series
from residrop.research.report.drawing import drawing


def numbers(path):
    return [tuple(map(float, pair)) for pair in re.findall(r"([-\d.]+) ([-\d.]+)", path)]


def drawn(chart):
    return ElementTree.fromstring(drawing(chart, "a"))


def styled(svg, *parts):
    """Elements by what their style says."""
    return [one for one in svg.iter() if all(part in one.get("style", "") for part in parts)]


def marks(svg):
    return [(float(one.get("x")), float(one.get("y"))) for one in svg.iter("use")]


def texts(svg):
    return [one.text for one in svg.iter("text")]


@pytest.mark.parametrize("log", [False, True])
def test_lines_are_where_their_values_are(log):
    y = [1.0, 10.0, None, 1000.0, 100.0]
    svg = drawn(Chart("A & B", "x", "y", (Series("s", [0, 1, 2, 3, 4], y, [0.1] * 5, [1.0] * 5),), log))
    across, heights = zip(*marks(svg), strict=True)
    steps = [b - a for a, b in itertools.pairwise(across)]
    assert steps == pytest.approx([steps[0], 2 * steps[0], steps[0]], abs=0.2)
    assert heights[0] > heights[1] > heights[3] > heights[2]
    decades = [heights[0] - heights[1], heights[1] - heights[3]]
    assert (decades[0] == pytest.approx(decades[1], abs=1.5)) == log  # evenly spaced, and only there
    (line,) = styled(svg, "fill: none", "stroke: var(--c0)", "stroke-linecap: square")
    assert line.get("d").count("M") == 2  # nothing where there is no value
    assert numbers(line.get("d")) == marks(svg)
    (predicted,) = styled(svg, "stroke-dasharray", "stroke: var(--c0)")
    ends = numbers(predicted.get("d"))
    assert ends[0][1] == ends[-1][1] == pytest.approx(heights[0], abs=0.1)
    bands = [numbers(band.get("d")) for band in styled(svg, "fill: var(--c0)", "fill-opacity: 0.18")]
    assert [min(x for x, _ in band) for band in bands] == [across[0], across[2]]
    assert all(0 <= x <= 400 and 0 <= height <= 270 for band in bands for x, height in band)
    assert svg.get("aria-label") == "A & B"
    assert svg.get("viewBox") == "0 0 400 270"


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize(
    "values", [[5.0], [5.0, 5.0], [0.0, 0.0], [None, 3.0], [1e-12, 2e-12], [1e9, 3e9], [-1.0, 2.0], [None]]
)
def test_charts_of_few_or_equal_values(values, log):
    svg = drawn(Chart("t", "x", "y", (Series("a", list(range(len(values))), values),), log))
    assert len(marks(svg)) == sum(value is not None and (value > 0.0 or not log) for value in values)
    assert all(0.0 <= x <= 400.0 and 0.0 <= y <= 270.0 for x, y in marks(svg))
    assert len(texts(svg)) >= 4  # names of the axes and numbers along them


def test_dots_are_where_their_values_are():
    rows = (("a", {"published": 1.0, "measured": 2.0}), ("b", {"measured": 3.0}))
    svg = drawn(Dots("t", "ratio", rows, {"a": 1.5}))
    titles = [one.text for one in svg.iter("title")]
    assert titles == ["a: published 1", "a: measured 2", "b: measured 3"]
    (first, upper), (second, same), (third, lower) = marks(svg)
    assert upper == same < lower
    assert second - first == pytest.approx(third - second, abs=0.2)
    (bound,) = styled(svg, "stroke: var(--bad)")
    assert numbers(bound.get("d"))[0][0] == pytest.approx((first + second) / 2, abs=0.1)
    assert texts(svg)[-2:] == ["a", "b"]


@pytest.mark.parametrize(
    "name", ["<b>a & b</b>", "$x$", "$", "\\frac", "_a", "a\x00b", "\u65e5\u672c", "#0f0f00", 60 * "long "]
)
def test_names_are_text_whatever_they_hold(name):
    for chart in (
        Dots("t", name, ((name, {"x": 1.0}), ("b", {"x": 2.0}))),
        Chart(name.replace("\x00", ""), name, name, (Series(name, [1, 2], [1.0, 2.0]),)),
    ):
        svg = drawn(chart)
        shown = " ".join(texts(svg))
        assert name.replace("\x00", " ")[:20] in shown
        assert not list(svg.iter("b"))


def test_nothing_is_loaded_and_ids_are_the_charts_own():
    chart = Chart("t", "x", "y", (Series("a", [1, 2], [1.0, 2.0]),))
    one, again, other = (drawing(chart, name) for name in ("a", "a", "b"))
    assert one == again
    ids = [set(re.findall(r' id="([^"]+)"', text)) for text in (one, other)]
    assert ids[0]
    assert not ids[0] & ids[1]
    assert set(re.findall(r'href="#([^"]+)"', one)) == ids[0]
    assert not re.search(r"url\(|https?:|<style|font-family|0f0f", one)
