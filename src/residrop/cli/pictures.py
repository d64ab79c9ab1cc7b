"""Pictures that commands draw: one look for all of them."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from residrop.common.output import writing
from residrop.common.pictures import save_png

__all__ = ["panels"]


@contextmanager
def panels(path: Path, count: int, title: str, option: str = "--picture") -> Iterator[list[Any]]:
    """Axes side by side, two in a row if there are many, saved in the end as the PNG that `option` asks for.

    Raises:
        ConfigError: the file cannot be written.
    """
    from matplotlib.figure import Figure  # slow to import
    from matplotlib.ticker import AutoLocator, MaxNLocator

    across = count if count < 3 else 2
    down = -(-count // across)
    figure = Figure(figsize=(6.0 * across, 4.2 * down), dpi=120, layout="constrained")
    axes = list(figure.subplots(down, across, squeeze=False).flat)
    yield axes[:count]
    for unused in axes[count:]:
        unused.set_axis_off()
    for one in axes[:count]:
        one.grid(alpha=0.25)
        if one.get_xlabel().startswith(("block", "epoch")) and isinstance(one.xaxis.get_major_locator(), AutoLocator):
            one.xaxis.set_major_locator(MaxNLocator(integer=True))
        if one.get_legend_handles_labels()[0]:
            one.legend(frameon=False, fontsize=9)
    figure.suptitle(title)
    with writing(path, option) as temporary:
        save_png(figure, temporary)
