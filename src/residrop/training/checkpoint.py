"""Run directories: what a run leaves on disk, written atomically, read without unpickling code, and verified.

recipe.json                the resolved recipe
versions.json              software and machine
dataset.json               classes, image size, digest of the training images
files.json.gz              names of the training images, if they are read batch by batch
normalization.safetensors  statistics of the training pixels
metrics.jsonl              one line per epoch
survival.jsonl             survival rates that were measured along the way (recipes with a budget)
instruments.jsonl          sensitivity and discrepancy of the blocks along the way (recipes that watch them)
curves.png                 learning curves
tensorboard/               the metrics for TensorBoard
metrics.csv                the metrics as a table, if asked for
logs.json                  what Weights & Biases and MLflow call the run
last.pt                    everything needed to resume
best.safetensors           weights of the epoch with the lowest validation error
model.safetensors          weights to report on
evaluation.json            final evaluation, both ways
calibration.json           temperatures and conformal sets, if fitted by residrop evaluate --uncertainty
run.lock                   held, and there, while a process writes: who it is
"""

import contextlib
import json
import platform
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor, nn

from residrop.blocks.attach import set_survival
from residrop.common.errors import RunError
from residrop.common.version import __version__
from residrop.data import Normalization
from residrop.data.normalize import NormalizationMode
from residrop.training.checked import (
    load_state,
    load_tensors,
    read_lines,
    read_record,
    save_state,
    save_tensors,
    write_record,
)
from residrop.training.foreign import is_foreign
from residrop.training.networks import build_network, load_weights, survival_of
from residrop.training.recipe import Recipe

__all__ = ["LoadedRun", "Run", "load_run", "versions"]


_SURVIVAL = "survival_rates"  # in the metadata of weights
_REWRITTEN = "delete it, and residrop train --resume writes it again"
_DATASET = {"classes": [str], "channels": int, "size": int, "normalization": str, "steps": int, "digest": str}
_EVALUATION = {
    "deterministic_error": int | float,
    "sampled_error": int | float | None,
    "train_seconds": int | float,
    "details": dict,
    "run": dict,
}


@dataclass(frozen=True)
class Run:
    """A run directory."""

    path: Path

    @classmethod
    def create(cls, path: Path, recipe: Recipe, dataset: dict[str, Any], normalization: Normalization) -> "Run":
        """Start a run in an empty or new directory; RunError if it holds a run already or cannot be written."""
        if (path / "recipe.json").exists():
            raise RunError(f"{path} already holds a run; continue it with --resume, or choose another --out")
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(f"{path} cannot be written ({error.strerror}); choose another --out") from None
        run = cls(path)
        run.write_versions()
        write_record(path / "dataset.json", {**dataset, "normalization": normalization.mode})
        save_tensors(path / "normalization.safetensors", {"mean": normalization.mean, "std": normalization.std})
        write_record(path / "recipe.json", recipe.to_dict())  # last: its presence makes the directory a run
        return run

    @classmethod
    def open(cls, path: Path) -> "Run":
        """Open an existing run; RunError if there is none."""
        if not path.is_dir():
            raise RunError(f"{path} is no directory; give the folder that residrop train wrote")
        run = cls(path)
        run.recipe()
        return run

    def recipe(self) -> Recipe:
        """The resolved recipe."""
        path = self.path / "recipe.json"
        values = read_record(path)
        try:
            recipe = Recipe.from_dict(values)
            if missing := sorted({"network", "rule", "data", "epochs", "seed"} - values.keys()):
                raise ValueError(f"{', '.join(missing)} is missing")
            return recipe
        except (TypeError, ValueError, AttributeError) as error:
            raise RunError(f"{path} is no recipe ({error}); restore it or train anew") from None

    def extend(self, epochs: int, steps: int) -> None:
        """Give the run more epochs, of so many updates in all; what was reported after fewer goes."""
        for name in ("evaluation.json", "model.safetensors", "recalibrated.safetensors"):
            (self.path / name).unlink(missing_ok=True)
        write_record(self.path / "recipe.json", self.recipe().replace(epochs=epochs).to_dict())
        write_record(self.path / "dataset.json", {**self.dataset(), "steps": steps})

    def write_versions(self) -> None:
        """Write software and machine of this process, as those of the run."""
        write_record(self.path / "versions.json", versions())

    def versions(self) -> dict[str, str]:
        """Software and machine of the run."""
        return read_record(self.path / "versions.json", {"residrop": str, "torch": str}, _REWRITTEN)

    def dataset(self) -> dict[str, Any]:
        """`classes` (names), `channels`, `size` (pixels), `steps` (updates of the training), `digest` of the images."""
        path = self.path / "dataset.json"
        found = read_record(path, _DATASET)
        if not found["classes"] or min(found["channels"], found["size"], found["steps"]) < 1:
            raise RunError(f"{path} does not describe a data set; restore it or train anew")
        return found

    def normalization(self) -> Normalization:
        """The pixel statistics of the training images."""
        path, dataset = self.path / "normalization.safetensors", self.dataset()
        restore = "restore it or train anew"
        tensors, _ = load_tensors(path, restore, restore)
        mean, std = (tensors.get(name, torch.empty(0)) for name in ("mean", "std"))
        found = Normalization(dataset["normalization"], mean, std)
        channels, size = dataset["channels"], dataset["size"]
        shapes = [(some, *whole) for some in (1, channels) for whole in ((1, 1), (size, size))]
        if (
            found.mode not in (*get_args(NormalizationMode), "model")
            or any(part.dtype != torch.float32 or tuple(part.shape) not in shapes for part in (mean, std))
            or not bool(mean.isfinite().all() and std.isfinite().all() and (std > 0).all())
        ):
            raise RunError(f"{path} does not fit the images that dataset.json describes; {restore}")
        return found

    def evaluation(self) -> dict[str, Any] | None:
        """The final evaluation, as `Outcome.to_dict` has it; None while the run is not finished."""
        path = self.path / "evaluation.json"
        again = f"delete it, and evaluate the run again with residrop train --resume --out {self.path}"
        return read_record(path, _EVALUATION, again) if path.exists() else None

    def history(self) -> list[dict[str, Any]]:
        """The metrics of the epochs so far, as `metrics.jsonl` has them."""
        path = self.path / "metrics.jsonl"
        lines = read_lines(path)
        for number, line in enumerate(lines, start=1):
            wrong = [name for name, value in line.items() if not isinstance(value, int | float | None)]
            if line.get("epoch") != number or wrong:
                what = f"{wrong[0]} is no number" if wrong else f"epoch is {line.get('epoch')!r}"
                raise RunError(f"{path} is damaged (line {number}: {what}); restore it or train anew")
        return lines

    def train_seconds(self) -> float:
        """Time spent training so far, evaluation excluded."""
        return float(sum(line.get("seconds") or 0.0 for line in self.history()))

    def save_state(self, state: dict[str, Any]) -> None:
        """Save everything needed to resume."""
        save_state(self.path / "last.pt", state)

    def load_state(self) -> dict[str, Any] | None:
        """The state to resume from; None if the run was stopped before it saved one."""
        path = self.path / "last.pt"
        return load_state(path, "delete it to start this run anew") if path.exists() else None

    def save_weights(self, name: str, model: nn.Module) -> None:
        """Save a model's `state_dict` as `name`.safetensors, with its survival rates if these come from a budget."""
        rates = None
        if self.recipe().budget is not None:
            rates = {_SURVIVAL: json.dumps(survival_of(model))}
        save_tensors(self.path / f"{name}.safetensors", model.state_dict(), rates)

    def load_weights(self, name: str, model: nn.Module) -> None:
        """Load `name`.safetensors into a model; RunError if missing, damaged or of another network."""
        self._give(name, self._read_weights(name), model)

    def build(self, name: str) -> nn.Module:
        """The network with the weights `name`.safetensors, in eval mode on the CPU; RunError as of `load_weights`."""
        recipe, dataset = self.recipe(), {key: value for key, value in self.dataset().items() if key != "steps"}
        found = self._read_weights(name)
        try:
            with torch.device("cpu" if is_foreign(recipe.network) else "meta"):  # before any memory is taken
                model = build_network(recipe, dataset)
            needed = _bytes(model.state_dict().values())
        except (RuntimeError, OverflowError, TypeError) as error:
            why = str(error).partition("\n")[0][:200]
            raise RunError(f"{self.path} describes no network that can be built ({why}); train anew") from None
        if needed > 2 * (held := _bytes(found[0].values())) + 1_000_000:
            raise RunError(
                f"{self.path / name}.safetensors does not fit the recipe's network: it has {held} bytes of weights, "
                f"the network {needed}; {self._again(name)}"
            )
        if not is_foreign(recipe.network):
            model = build_network(recipe, dataset)
        self._give(name, found, model)
        return model.eval()

    def _again(self, name: str) -> str:
        if name == "model":
            return "continue the run with --resume to write it again"
        return f"restore it, or delete {self.path / 'last.pt'} to train anew" if name == "best" else "write it again"

    def _read_weights(self, name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
        missing = "the run did not get that far (continue it with --resume)"
        if name == "best":
            missing = f"only runs with a validation set have it; if this one had it, {self._again(name)}"
        return load_tensors(self.path / f"{name}.safetensors", missing, self._again(name))

    def _give(self, name: str, found: tuple[dict[str, Tensor], dict[str, str]], model: nn.Module) -> None:
        path = self.path / f"{name}.safetensors"
        tensors, about = found
        try:
            load_weights(model, tensors)
        except RuntimeError as error:
            first = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
            text = f"{path} does not fit the recipe's network: {first[:200]}; {self._again(name)}"
            raise RunError(text) from None
        if self.recipe().budget is not None:
            try:
                set_survival(model, json.loads(about.get(_SURVIVAL, "")))
            except (ValueError, TypeError, RecursionError) as error:
                raise RunError(f"{path} does not say its survival rates ({error}); {self._again(name)}") from None


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class LoadedRun(NamedTuple):
    """A run and its network.

    Attributes:
        run: the directory.
        model: with the trained weights, in eval mode on the CPU.
    """

    run: Run
    model: nn.Module

    @property
    def recipe(self) -> Recipe:
        """Every setting of the training."""
        return self.run.recipe()

    @property
    def classes(self) -> tuple[str, ...]:
        """What the network's outputs mean."""
        return tuple(self.run.dataset()["classes"])

    @property
    def normalization(self) -> Normalization:
        """From uint8 pixels Tensor[N, C, H, W] to what the network reads."""
        return self.run.normalization()


def load_run(path: Path | str, weights: str = "model") -> LoadedRun:
    """Open a run and build its network with the trained weights, in eval mode on the CPU.

    Args:
        path: the run directory.
        weights: `model` (to report on), `best` (of the validation) or `recalibrated`.

    Raises:
        RunError: no run there, or a file of it is missing or damaged.
    """
    run = Run.open(Path(path))
    return LoadedRun(run, run.build(weights))


def versions() -> dict[str, str]:
    """Software and machine, as a run directory keeps them: no paths, no host names."""
    packages = ("torch", "torchvision", "numpy")
    return {
        "residrop": __version__,  # also where the package is on the path and not installed
        **{name: version(name) for name in packages},
        "python": platform.python_version(),
        "machine": platform.machine(),
        "system": platform.system(),
        "cuda": torch.version.cuda or "",
        "processor": _processor(),
        "threads": str(torch.get_num_threads()),
    }


def _processor() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()
