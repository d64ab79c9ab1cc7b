"""Trained runs as folders to publish: weights, recipe, log and a model card each, and one table of all."""

import hashlib
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from residrop.common.errors import ConfigError, RunError
from residrop.common.files import replacing, write_json, write_text
from residrop.research.papers import PAPERS
from residrop.research.papers.work import DATA, rows_of_run
from residrop.research.report.markdown import escaped
from residrop.training.checked import write_record
from residrop.training.checkpoint import Run
from residrop.training.presets import train_command
from residrop.training.recipe import Recipe

__all__ = ["Model", "publish"]

# Of a run directory. What resumes a training, says who logs where, or names the training images stays behind.
_FILES = (
    "model.safetensors",
    "normalization.safetensors",
    "dataset.json",
    "versions.json",
    "metrics.jsonl",
    "evaluation.json",
)
_OPTIONAL = (
    "recalibrated.safetensors",
    "calibration.json",
    "survival.jsonl",
    "instruments.jsonl",
    "curves.png",
)


class _Hub(NamedTuple):
    id: str
    title: str


_HUB = {
    "cifar10": _Hub("uoft-cs/cifar10", "CIFAR-10"),
    "cifar100": _Hub("uoft-cs/cifar100", "CIFAR-100"),
    "svhn": _Hub("ufldl-stanford/svhn", "SVHN"),
    "imagenet": _Hub("ILSVRC/imagenet-1k", "ImageNet"),
}
"""Data sets as the Hugging Face hub calls them."""


class _Score(NamedTuple):
    file: str  # in .eval_results
    name: str
    accuracy: float
    notes: str


@dataclass(frozen=True)
class Model:
    """A published run: a row of the table.

    Attributes:
        name: of its folder.
        rows: of the papers' tables that it is a run of, with variant and scale of the schedule; empty for other runs.
        network: as in its recipe, as are `rule`, `survival`, `data` (without a path), `epochs` and `seed`.
        error: on the test images, in percent, by deterministic inference.
        sampled_error: the same by stochastic inference, or None.
        images: number of test images.
        parameters: of the network.
        bytes: size of the file of weights.
        sha256: of that file.
    """

    name: str
    rows: tuple[str, ...]
    network: str
    rule: str
    survival: str
    data: str
    epochs: int
    seed: int
    error: float
    sampled_error: float | None
    images: int
    parameters: int
    bytes: int
    sha256: str


def publish(runs: Sequence[Path], folder: Path) -> list[Model]:
    """Write finished runs as folders of `folder`, each with a model card and scores as the Hugging Face hub reads them,
    and a table of all that are there, these and earlier ones, as README.md and models.json.

    A folder is a run directory, so `residrop evaluate`, `predict`, `export` and `residrop.load_run` take it. Paths of
    this machine are left out of the recipe.

    Args:
        runs: run directories. One of the same name that is there already is replaced.
        folder: where to; it is made if it is not there.

    Raises:
        RunError: a run is not finished, or its files are damaged.
        ConfigError: two runs have one name, a run lies in `folder` already, its network is read from a folder of
            transformers, or `folder` cannot be written.
    """
    found = [Run.open(path) for path in dict.fromkeys(path.resolve() for path in runs)]
    names = [run.path.name for run in found]
    if double := next((name for name in names if names.count(name) > 1), None):
        raise ConfigError(f"two runs are called {double}, and folders of models are called like their runs; rename one")
    for run in found:
        if (network := run.recipe().network).startswith("transformers:"):
            raise ConfigError(
                f"{run.path} is of {network}, a folder without which it cannot be loaded; publish the network by "
                "its save_pretrained"
            )
        if run.path.parent == folder.resolve():
            raise ConfigError(f"{run.path} lies in --models {folder} already; give another folder")
        if run.evaluation() is None:
            raise RunError(f"{run.path} is not finished; continue it with residrop train --resume --out {run.path}")
        run.build("model")  # weights that load, or an error before anything is written
    try:
        for run in found:
            _write(run, folder / run.path.name)
        models = [_model(Run(path)) for path in sorted(folder.iterdir()) if (path / "evaluation.json").is_file()]
        write_text(folder / "README.md", _render("models.md.jinja", models=models))
        write_json(folder / "models.json", [asdict(model) for model in models])
    except OSError as error:
        raise ConfigError(f"--models {folder} cannot be written ({error.strerror}); give another folder") from None
    return models


def _write(run: Run, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for name in (*_FILES, *_OPTIONAL):
        if (run.path / name).is_file():
            with replacing(target / name) as temporary:
                shutil.copyfile(run.path / name, temporary)
        else:
            (target / name).unlink(missing_ok=True)  # of a model of the same name
    recipe = _without_paths(run.recipe())
    write_record(target / "recipe.json", recipe.to_dict())
    model, hub = _model(Run(target)), _hub(run, recipe)
    scores = _scores(run, hub[0]) if hub else []
    shutil.rmtree(target / ".eval_results", ignore_errors=True)
    for score in scores:
        assert hub is not None
        (target / ".eval_results").mkdir(exist_ok=True)
        text = _render("eval_results.yaml.jinja", score=score, hub=hub[1])
        write_text(target / ".eval_results" / score.file, text)
    card = _render(
        "model_card.md.jinja",
        model=model,
        recipe=recipe,
        hub=hub[1] if hub else None,
        scores=scores,
        found=run.evaluation(),
        dataset=run.dataset(),
        versions=run.versions(),
        command=train_command(recipe.replace(seed=0), shared=True) + (f" --seed {recipe.seed}" if recipe.seed else ""),
        curves=(target / "curves.png").is_file(),
        papers=[PAPERS[name] for name in dict.fromkeys(row.partition("/")[0] for row in model.rows)],
    )
    write_text(target / "README.md", card)


def _model(run: Run) -> Model:
    recipe, found = run.recipe(), run.evaluation()
    assert found is not None
    weights = (run.path / "model.safetensors").read_bytes()
    return Model(
        name=run.path.name,
        rows=rows_of_run(run.path.name),
        network=recipe.network,
        rule=recipe.rule,
        survival=recipe.survival or (f"budget {recipe.budget}" if recipe.budget else "of the rule's paper"),
        data=recipe.data,
        epochs=recipe.epochs,
        seed=recipe.seed,
        error=found["deterministic_error"],
        sampled_error=found["sampled_error"],
        images=found["details"].get("images", 0),
        parameters=found.get("parameters", 0),
        bytes=len(weights),
        sha256=hashlib.sha256(weights).hexdigest(),
    )


def _without_paths(recipe: Recipe) -> Recipe:
    """The recipe with names in place of paths: where data and weights lie on this machine is nobody's business."""
    kind, colon, place = recipe.data.rpartition(":")
    weights = recipe.weights and Path(recipe.weights).name
    return recipe.replace(data=f"{kind}{colon}{Path(place).name}", weights=weights)


def _hub(run: Run, recipe: Recipe) -> tuple[str, _Hub] | None:
    """Which data set of the hub the run was tested on, if name, classes, channels, pixels and test images agree."""
    kind = recipe.data.rpartition(":")[2]
    found, tested = run.dataset(), run.evaluation()
    if kind not in _HUB or tested is None:
        return None
    one = DATA[kind]
    same = (len(found["classes"]), found["channels"], found["size"], tested["details"].get("images"))
    return (kind, _HUB[kind]) if same == (one.classes, one.channels, one.size or found["size"], one.test) else None


def _scores(run: Run, kind: str) -> list[_Score]:
    found = run.evaluation()
    assert found is not None
    first = _Score(
        f"{kind}.yaml", "accuracy", found["deterministic_error"], "deterministic inference: every coin is its mean"
    )
    scores = [first]
    if found["sampled_error"] is not None:
        notes = f"stochastic inference: probabilities averaged over {found['samples']} sampled passes"
        scores.append(_Score(f"{kind}_sampled.yaml", "accuracy of sampled passes", found["sampled_error"], notes))
    return [one._replace(accuracy=round(100.0 - one.accuracy, 4)) for one in scores]


def _render(template: str, **values: Any) -> str:
    loader = FileSystemLoader(Path(__file__).parent)
    found = Environment(
        loader=loader, undefined=StrictUndefined, keep_trailing_newline=True, trim_blocks=True, lstrip_blocks=True
    )
    found.filters["escaped"] = escaped
    return found.get_template(template).render(**values)
