"""What was fitted on held-out images for the weights of a run: calibration.json.

It holds for a weights file as it was then, so its digest is kept beside it, and others are told that it is not theirs.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from residrop.common.errors import RunError
from residrop.inference.uncertainty import Conformal
from residrop.inference.uncertainty.calibration import check_temperature
from residrop.training.checked import read_record, write_record
from residrop.training.checkpoint import Run

__all__ = ["FILE", "Fitted", "check_fitted", "load_fitted", "save_fitted"]

FILE = "calibration.json"


@dataclass(frozen=True)
class Fitted:
    """What was fitted for one kind of inference.

    Attributes:
        temperature: of its probabilities; None where no image was decided wrongly.
        conformal: predictors of sets, for probabilities without the temperature.
        images: how many it was fitted on.
        source: which these were.
    """

    temperature: float | None
    conformal: tuple[Conformal, ...]
    images: int
    source: str

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON values."""
        return {**vars(self), "conformal": [one.to_dict() for one in self.conformal]}


def save_fitted(run: Run, weights: str, found: Mapping[int, Fitted]) -> None:
    """Write what was fitted for `weights`.safetensors, by number of sampled passes (0: one pass).

    Entries for other weights, and for other numbers of passes of the same weights, stay.

    Raises:
        RunError: a file cannot be read or written.
    """
    before = _read(run)
    digest = _digest(run, weights)
    mine = before.get(weights, {})
    passes = mine.get("passes", {}) if mine.get("digest") == digest else {}
    passes |= {str(samples): one.to_dict() for samples, one in found.items()}
    write_record(run.path / FILE, {**before, weights: {"digest": digest, "passes": passes}})


def check_fitted(run: Run) -> None:
    """RunError if `save_fitted` would find a damaged file."""
    _read(run)


def load_fitted(run: Run, weights: str, samples: int) -> tuple[Fitted | None, str]:
    """What was fitted for a weights file and number of sampled passes; else None and why there is nothing.

    Raises:
        RunError: the file is damaged.
    """
    found, again = _read(run).get(weights), f"run residrop evaluate {run.path} --uncertainty"
    again += f" --weights {weights}" if weights != "model" else ""
    if found is None:
        return None, f"nothing was fitted for these weights; {again}"
    try:
        if found["digest"] != _digest(run, weights):
            return None, f"{FILE} was fitted for other weights and is ignored; {again}"
        if (values := found["passes"].get(str(samples))) is None:
            passes = " and ".join(sorted(found["passes"], key=int))
            return (
                None,
                f"{FILE} was fitted for {passes} sampled passes, not for {samples}; {again} --samples {samples}",
            )
        if values["temperature"] is not None:
            check_temperature(values["temperature"])
        conformal = tuple(map(Conformal.from_dict, values["conformal"]))
        return Fitted(values["temperature"], conformal, values["images"], values["source"]), ""
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, RunError):
            raise
        raise RunError(f"{run.path / FILE} is damaged ({error}); delete it, and {again}") from None


def _read(run: Run) -> dict[str, Any]:
    path = run.path / FILE
    return read_record(path, advice="delete it, and fit again with --uncertainty") if path.exists() else {}


def _digest(run: Run, weights: str) -> str:
    path = run.path / f"{weights}.safetensors"
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise RunError(f"{path} cannot be read ({error.strerror}); give --weights that are there") from None
