"""Pictures whose words are drawn as they are, whatever signs they hold. matplotlib is imported by whoever draws."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from matplotlib.text import Text

__all__ = ["save_png"]


def save_png(figure: Figure, file: Path) -> None:
    """Save a figure as a PNG; names of files and data in its words are never read as formulas between dollars."""
    for text in _words(figure):
        text.set_parse_math(False)
        text.set_text(text.get_text().encode("utf-8", "backslashreplace").decode())  # no UTF-8: a name of a file
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # letters that the font lacks are drawn as boxes
        figure.savefig(file, format="png")  # pyright: ignore[reportUnknownMemberType]


def _words(artist: Any) -> Iterator[Text]:
    """All texts below an artist but the numbers at the ticks, whose powers of ten are formulas."""
    from matplotlib.axis import Tick
    from matplotlib.text import Text

    for child in artist.get_children():
        if isinstance(child, Text):
            yield child
        elif not isinstance(child, Tick):
            yield from _words(child)
