"""What `residrop evaluate --uncertainty` found as one HTML page: style and pictures inside, nothing loaded."""

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from residrop.cli.uncertainty import tables
from residrop.cli.uncertainty.study import Study
from residrop.cli.uncertainty.tables import Table

__all__ = ["as_page"]

_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; font-size: 0.9rem; }
caption { text-align: left; font-weight: 600; padding: 0.3rem 0; }
th, td { padding: 0.25rem 0.7rem; text-align: right; border-bottom: 1px solid #8884; }
th.word, td.word { text-align: left; }
div.wide { overflow-x: auto; }
img { max-width: 100%; height: auto; background: white; }
p.result { border-left: 4px solid #47a; padding: 0.2rem 0 0.2rem 0.8rem; }
"""

_SECTIONS = {
    "measures": (
        "Errors and calibration",
        "NLL and Brier score judge probabilities as a whole. ECE is the mean distance between confidence and the share "
        "of right decisions. A temperature divides logits, or the log of mean probabilities; decisions stay.",
    ),
    "selective": (
        "Predictions withheld",
        "The most certain predictions are kept. AURC is the error among them, averaged over all shares; coverage at a "
        "risk is the largest share that a threshold keeps with at most that error.",
    ),
    "conformal": (
        "Conformal sets",
        "A set of classes for every image, which holds the right one as often as promised. THR gives the smallest "
        "sets, APS and RAPS larger ones for difficult images. Sets are made without temperatures.",
    ),
    "ood": (
        "Foreign images",
        "AUROC is the probability that a foreign image has the higher score: 50% knows nothing. AUPR takes foreign "
        "images as positive and depends on how many there are. FPR95 is the share of test images taken for foreign "
        "where 95% of the foreign ones are found.",
    ),
    "corruptions": ("Corrupted images", "Error and calibration of the test images as they get worse."),
}


def as_page(title: str, facts: Mapping[str, str], found: Study, pictures: Mapping[str, Path]) -> str:
    """The page. `pictures` are PNG files by their names of `pictures.draw`, which go into it."""
    parts: dict[str, tuple[list[Table], str]] = {
        "measures": ([tables.measures(found)], "reliability"),
        "selective": ([tables.selective(found)], "risk-coverage"),
        "conformal": ([tables.conformal(found)], "conformal"),
        "ood": (list(tables.ood(found)), "ood"),
        "corruptions": ([tables.corruptions(found)], "corruptions"),
    }
    body = [f"<h1>{escape(title)}</h1>", f'<p class="result">{escape(found.recommendation)}</p>']
    items = "".join(f"<li>{escape(name)}: {escape(value)}</li>" for name, value in facts.items())
    notes = "".join(f"<li>{escape(note)}</li>" for note in found.notes)
    body.append(f"<ul>{items}{notes}</ul>")
    for name, (listed, picture) in parts.items():
        if picture in pictures:
            heading, text = _SECTIONS[name]
            body += [f"<h2>{escape(heading)}</h2>", f"<p>{escape(text)}</p>", *map(_table, listed)]
            body.append(_image(pictures[picture], heading))
    return (
        f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<title>{escape(title)}</title>\n'
        '<meta name="viewport" content="width=device-width">\n'
        f"<style>{_STYLE}</style>\n<body>\n" + "\n".join(body) + "\n</body>\n</html>\n"
    )


def _table(table: Table) -> str:
    def row(cells: Sequence[str], tag: str) -> str:
        words = [' class="word"' if number < table.words else "" for number in range(len(table.headings))]
        made = (f"<{tag}{word}>{escape(cell)}</{tag}>" for word, cell in zip(words, cells, strict=True))
        return f"<tr>{''.join(made)}</tr>"

    lines = [row(table.headings, "th"), *(row(cells, "td") for cells in table.rows)]
    return f'<div class="wide"><table><caption>{escape(table.title)}</caption>{"".join(lines)}</table></div>'


def _image(path: Path, words: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<p><img alt="{escape(words)}" src="data:image/png;base64,{data}"></p>'
