"""The steps of `residrop evaluate --uncertainty`: what it reads, measures and leaves in the run directory."""

from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from torch import nn

from residrop.cli.shared import table_of
from residrop.cli.uncertainty import tables
from residrop.cli.uncertainty.page import as_page
from residrop.cli.uncertainty.pictures import PICTURES, draw
from residrop.cli.uncertainty.sources import foreign_images, held_out_images
from residrop.cli.uncertainty.study import Meters, Study, study
from residrop.common.output import check_target, writing
from residrop.data import Loader
from residrop.inference.uncertainty import Collector
from residrop.training import Run
from residrop.training.calibration import FILE, check_fitted, save_fitted

__all__ = ["Work"]

_PAGE, _OPTION = "uncertainty.html", "--uncertainty:"


class Work:
    """Reads all images first, so that nothing is computed in vain.

    Args:
        run: the run.
        weights: the name of its weights.
        test: its test images.
        calibration: source of images to fit on; None for the run's validation images.
        ood: sources of foreign images.
        corruptions: whether to corrupt the test images.
        device: of the images.

    Raises:
        UsageError: images that are missing or do not fit, a run directory that cannot be written to.
    """

    def __init__(
        self,
        run: Run,
        weights: str,
        test: Loader,
        calibration: str | None,
        ood: Sequence[str],
        corruptions: bool,
        device: torch.device,
    ) -> None:
        for name in (FILE, _PAGE, *(f"{picture}.png" for picture in PICTURES)):
            check_target(run.path / name, _OPTION)
        check_fitted(run)
        self.run, self.weights, self._test, self._corruptions = run, weights, test, corruptions
        self._held = held_out_images(run, calibration, test, device)
        self._foreign = [foreign_images(run, source, test, device) for source in ood]
        self.collector = Collector()

    def carry_out(self, model: nn.Module, samples: int, meter: Meters) -> Study:
        """Measure; the collector has the predictions of the test images."""
        found = self.collector.predictions()
        return study(model, found, self._test, self._held, self._foreign, self._corruptions, samples, meter)

    def leave(self, found: Study, console: Console) -> None:
        """Print the tables, write calibration.json, the pictures and the page, and end with the recommendation."""
        recipe, folder = self.run.recipe(), self.run.path
        shown = [tables.measures(found), tables.selective(found), tables.conformal(found), *tables.ood(found)]
        if found.corrupted:
            shown.append(tables.corruptions(found))
        for one in shown:
            console.print(table_of(one.title, one.headings, one.rows, left=one.headings[: one.words]))
        save_fitted(self.run, self.weights, found.fitted)
        title = f"{recipe.network}, {recipe.rule}, {Path(recipe.data).name}"
        pictures = draw(folder, found, title)
        facts = {
            "test images": str(found.images),
            "fitted on": f"{self._held.loader.num_images} {self._held.name}",
            "weights": self.weights,
        }
        with writing(folder / _PAGE, _OPTION) as temporary:
            text = as_page(f"Uncertainty of {title}", facts, found, pictures)
            temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
        for note in found.notes:
            console.print(f"note: {note}")
        console.print(f"fitted on {facts['fitted on']}: {folder / FILE}, which residrop predict and export apply")
        console.print(f"page with pictures: {folder / _PAGE}")
        console.print(found.recommendation)
