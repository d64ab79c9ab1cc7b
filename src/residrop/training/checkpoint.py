"""Run directories: what a run leaves on disk, written atomically and read without unpickling code.

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
last.pt                    everything needed to resume
best.safetensors           weights of the epoch with the lowest validation error
model.safetensors          weights to report on
evaluation.json            final evaluation, both ways
"""

import contextlib
import json
import platform
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from residrop.blocks.attach import rules_of, set_survival
from residrop.common.errors import RunError
from residrop.common.files import replacing, write_json
from residrop.data import Normalization
from residrop.models import create, reads_flat_rows
from residrop.schedule.timing import parse as parse_timing
from residrop.training.recipe import Recipe

__all__ = ["Run", "build_network", "load_run", "survival_of", "versions"]


_SURVIVAL = "survival_rates"  # in the metadata of weights
_UNMEASURED = 0.5  # the survival rate before there is another


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise RunError(f"{path} does not exist; is {path.parent} a run directory of residrop train?") from None
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read ({error}); restore it or train anew") from None


def build_network(recipe: Recipe, dataset: dict[str, Any]) -> nn.Module:
    """The attached network of a recipe for a data set as `dataset.json` describes it.

    `steps` is the length of the training in updates, of which the times of `survival_timing` are shares; without it the
    network has the rates of the training's end throughout. Rates from a budget come with the weights
    (`Run.load_weights`) or are measured as the training starts.
    """
    options = {
        name: getattr(recipe, name)
        for name in ("width", "block", "bn_gamma_init", "theta_2", "granularity", "rescale", "rows", "of")
        if getattr(recipe, name) is not None
    }
    if reads_flat_rows(recipe.network):
        options["in_features"] = dataset["channels"] * dataset["size"] ** 2
    else:
        options["channels"] = dataset["channels"]
    return create(
        recipe.network,
        rule=recipe.rule,
        survival=recipe.survival if recipe.budget is None else _UNMEASURED,
        classes=len(dataset["classes"]),
        seed=recipe.seed,
        timing=parse_timing(recipe.survival_timing, training=dataset.get("steps", 0)),
        **options,
    )


def survival_of(model: nn.Module) -> list[float]:
    """The survival rates of a model's rules; 1 for those without coins, the first of those with several rates."""
    return [rule.rates[0] if rule.rates else 1.0 for rule in rules_of(model)]


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
            run = cls(path)
            write_json(path / "versions.json", versions())
            write_json(path / "dataset.json", {**dataset, "normalization": normalization.mode})
            tensors = {"mean": normalization.mean, "std": normalization.std}
            run._save_tensors("normalization.safetensors", tensors)
            write_json(path / "recipe.json", recipe.to_dict())  # last: its presence makes the directory a run
        except OSError as error:
            raise RunError(f"{path} cannot be written ({error.strerror}); choose another --out") from None
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
        try:
            return Recipe.from_dict(_read_json(path))
        except RunError:
            raise
        except (TypeError, ValueError, AttributeError) as error:
            raise RunError(f"{path} is no recipe ({error}); restore it or train anew") from None

    def versions(self) -> dict[str, str]:
        """Software and machine of the run."""
        return _read_json(self.path / "versions.json")

    def dataset(self) -> dict[str, Any]:
        """`classes` (names), `channels`, `size` (pixels), `steps` (updates of the training), `digest` of the images."""
        path = self.path / "dataset.json"
        found = _read_json(path)
        if not isinstance(found, dict) or not {"classes", "channels", "size", "normalization"} <= found.keys():
            raise RunError(f"{path} does not describe a data set; restore it or train anew")
        return found

    def normalization(self) -> Normalization:
        """The pixel statistics of the training images."""
        tensors = self._load_tensors("normalization.safetensors")
        return Normalization(mode=self.dataset()["normalization"], mean=tensors["mean"], std=tensors["std"])

    def train_seconds(self) -> float:
        """Time spent training so far, evaluation excluded."""
        path = self.path / "metrics.jsonl"
        seconds = 0.0
        for line in path.read_text().splitlines() if path.exists() else []:
            with contextlib.suppress(ValueError, KeyError, TypeError):  # the last line of a run cut short
                seconds += float(json.loads(line)["seconds"])
        return seconds

    def save_state(self, state: dict[str, Any]) -> None:
        """Save everything needed to resume."""
        with replacing(self.path / "last.pt") as temporary:
            torch.save(state, temporary)

    def load_state(self) -> dict[str, Any] | None:
        """The state to resume from; None if the run was stopped before it saved one."""
        path = self.path / "last.pt"
        if not path.exists():
            return None
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise RunError(f"{path} is damaged ({type(error).__name__}); delete it to start this run anew") from None
        if not isinstance(state, dict):
            raise RunError(f"{path} is not the state of a run; delete it to start this run anew")
        return state

    def save_weights(self, name: str, model: nn.Module) -> None:
        """Save a model's `state_dict` as `name`.safetensors, with its survival rates if these come from a budget."""
        rates = None
        if self.recipe().budget is not None:
            rates = {_SURVIVAL: json.dumps(survival_of(model))}
        self._save_tensors(f"{name}.safetensors", model.state_dict(), rates)

    def load_weights(self, name: str, model: nn.Module) -> None:
        """Load `name`.safetensors into a model; RunError if missing, damaged or of another network."""
        tensors = self._load_tensors(f"{name}.safetensors")
        try:
            model.load_state_dict(tensors)
        except RuntimeError as error:
            first = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
            raise RunError(f"{self.path / name}.safetensors does not fit the recipe's network: {first}") from None
        if self.recipe().budget is not None:
            self._load_survival(self.path / f"{name}.safetensors", model)

    def _load_survival(self, path: Path, model: nn.Module) -> None:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get(_SURVIVAL, "")
        try:
            set_survival(model, json.loads(text))
        except (ValueError, TypeError) as error:
            raise RunError(f"{path} does not say its survival rates ({error}); train anew") from None

    def _save_tensors(self, name: str, tensors: dict[str, Tensor], about: dict[str, str] | None = None) -> None:
        with replacing(self.path / name) as temporary:
            save_file({key: value.detach().cpu().contiguous() for key, value in tensors.items()}, temporary, about)

    def _load_tensors(self, name: str) -> dict[str, Tensor]:
        path = self.path / name
        if not path.exists():
            raise RunError(f"{path} does not exist; the run did not get that far (continue it with --resume)")
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise RunError(f"{path} is damaged ({error}); continue the run with --resume to write it again") from None


def load_run(path: Path, weights: str = "model") -> tuple[Run, nn.Module]:
    """Open a run and build its network with the trained weights, in eval mode on the CPU.

    Args:
        path: the run directory.
        weights: `model` (to report on) or `best`.

    Raises:
        RunError: no run there, or a file of it is missing or damaged.
    """
    run = Run.open(path)
    dataset = {key: value for key, value in run.dataset().items() if key != "steps"}
    model = build_network(run.recipe(), dataset)
    run.load_weights(weights, model)
    return run, model.eval()


def versions() -> dict[str, str]:
    """Software and machine, as a run directory keeps them: no paths, no host names."""
    packages = ("residrop", "torch", "torchvision", "numpy")
    return {
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
