"""The weights that a training starts from: a file, another run, or what a library has for its model."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from residrop.common.errors import ConfigError
from residrop.training.foreign import is_foreign, pretrained
from residrop.training.networks import load_weights
from residrop.training.recipe import Recipe

__all__ = ["check_weights", "give_weights", "start_weights"]

_INSIDE = ("state_dict_ema", "state_dict", "model_ema", "model")  # where training programs keep the weights
_PREFIXES = ("module.", "_orig_mod.")  # of DistributedDataParallel and torch.compile


def check_weights(recipe: Recipe) -> None:
    """ConfigError if the recipe's `weights` cannot be what a training starts from; said before data are read."""
    given = recipe.weights
    if given is None:
        return
    if given == "pretrained":
        if not is_foreign(recipe.network):
            raise ConfigError(f"weights is 'pretrained', which {recipe.network} has none of; give a file or a run")
    elif not _file_of(given).is_file():
        raise ConfigError(f"weights {given} is no file and no run directory with weights; give one, or 'pretrained'")


def start_weights(recipe: Recipe, model: nn.Module) -> list[str]:
    """Give a network the weights that its recipe names.

    Returns:
        What a user should know, a line each: which weights were taken, and what of them did not fit.

    Raises:
        ConfigError: they cannot be read, or are of another network.
    """
    given = recipe.weights
    if given is None:
        folder = recipe.network.removeprefix("transformers:").partition("?")[0]
        if folder == recipe.network or not [*Path(folder).glob("*.safetensors"), *Path(folder).glob("*.bin")]:
            return []
        given = "pretrained"
    if given == "pretrained":
        return give_weights(model, pretrained(recipe.network), f"the pretrained weights of {recipe.network}")
    return give_weights(model, _read(_file_of(given)), given)


def _file_of(given: str) -> Path:
    path = Path(given)
    return path / "model.safetensors" if path.is_dir() else path


def _read(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by name. Nothing of it is run."""
    try:
        found: Any
        found = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except (OSError, SafetensorError, RuntimeError, EOFError, ValueError) as error:
        what = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise ConfigError(f"weights {path} cannot be read ({what})") from None
    except Exception as error:  # torch.load's own for whatever is no weights
        what = str(error).partition("\n")[0][:200]
        raise ConfigError(f"weights {path} holds more than weights, and is not read ({what})") from None
    for name in _INSIDE:
        if isinstance(found, Mapping) and isinstance(found.get(name), Mapping):
            found = found[name]
            break
    if not isinstance(found, Mapping) or not all(isinstance(one, Tensor) for one in found.values()) or not found:
        raise ConfigError(f"weights {path} is no table of tensors by name; save the model's state_dict")
    return {_bare(str(name)): one for name, one in found.items()}


def _bare(name: str) -> str:
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    return name


def give_weights(model: nn.Module, tensors: Mapping[str, Tensor], source: str) -> list[str]:
    """Load weights into a network, all but those of a classifier for another number of classes.

    A parameter counts as the classifier's if it belongs to a layer of as many outputs as the network has, and differs
    from the file's in the number of outputs alone, or is not in the file with all else of its layer. Everything else
    has to fit.

    Returns:
        What a user should know, a line each.

    Raises:
        ConfigError: the weights are of another network; the network is unchanged.
    """
    wanted = model.state_dict()
    first = _differences(wanted, tensors)
    adapt = getattr(sys.modules[type(model).__mro__[_plain_class(model)].__module__], "checkpoint_filter_fn", None)
    if adapt is not None and set(first) - _head(model, wanted, tensors):
        # timm's own way from older or other forms of a checkpoint, such as position embeddings of another size
        try:
            tensors = adapt(dict(tensors), model)
        except Exception:  # it was made for the checkpoints that timm knows
            tensors = dict(tensors)
        first = _differences(wanted, tensors)
    head = _head(model, wanted, tensors)
    wrong = [f"{name} {why}" for name, why in first.items() if name not in head]
    if wrong:
        raise ConfigError(
            f"weights {source} do not fit the network: {wrong[0]}" + (f", and {len(wrong) - 1} more" * (len(wrong) > 1))
        )
    if not any(one.is_meta for one in wanted.values()):  # there they are only compared
        load_weights(model, {**wanted, **{name: one for name, one in tensors.items() if name not in head}})
    lines = [f"weights: {source}"]
    if head:
        lines.append(f"new, with random weights: {', '.join(sorted(head))} (for the classes of these data)")
    return lines


def _plain_class(model: nn.Module) -> int:
    """Where in the bases of a model its own library's class is: `residrop.apply` may stand in front of it."""
    return next(i for i, one in enumerate(type(model).__mro__) if not one.__module__.startswith("residrop"))


def _differences(wanted: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """By name what is missing, too much or of another shape."""
    found = {name: "is missing" for name in wanted if name not in tensors}
    found |= {name: "is not in the network" for name in tensors if name not in wanted}
    for name in wanted.keys() & tensors.keys():
        if wanted[name].shape != tensors[name].shape:
            found[name] = f"has shape {tuple(tensors[name].shape)}, in the network {tuple(wanted[name].shape)}"
    return found


def _head(model: nn.Module, wanted: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> set[str]:
    """Names of what belongs to classifiers that the tensors have for another number of classes, or not at all."""
    layers = [name for name, one in model.named_modules() if isinstance(one, (nn.Linear, nn.Conv2d))]
    last = layers[-1:] and wanted[f"{layers[-1]}.weight"].shape[0]
    found: set[str] = set()
    for layer in layers:
        own = [name for name in wanted if name.rpartition(".")[0] == layer]
        if wanted[f"{layer}.weight"].shape[0] != last:
            continue
        given = tensors.get(f"{layer}.weight")
        if given is None:
            gone = not any(name in tensors for name in own) and layer == layers[-1]
        else:
            gone = given.shape[0] != last and given.shape[1:] == wanted[f"{layer}.weight"].shape[1:]
        if gone:
            found.update(own)
    return found
