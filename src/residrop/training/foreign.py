"""Image classifiers of timm, torchvision and transformers, by name and as they are in their libraries."""

import ast
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from residrop.common.checks import closest_first
from residrop.common.errors import ConfigError
from residrop.common.extras import extra

__all__ = ["LIBRARIES", "Logits", "OwnInput", "configuration", "is_foreign", "own_input", "plain", "pretrained"]

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, where a model says nothing


@dataclass(frozen=True)
class OwnInput:
    """The images that a model was made for.

    Attributes:
        size: their height and width in pixels.
        mean: of the three channels, in units of the pixel range [0, 1]; they are subtracted.
        std: by which the rest is divided.
    """

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


class Logits(nn.Module):
    """A model of transformers as one from images to logits.

    Attributes:
        model: takes `pixel_values` and returns an output with `logits`.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """Tensor[N, C, H, W] to Tensor[N, classes]."""
        return self.model(pixel_values=x).logits


def is_foreign(network: str) -> bool:
    """Whether a network is one of another library: "timm:NAME", "torchvision:NAME" or "transformers:PATH"."""
    return network.partition(":")[0] in LIBRARIES and ":" in network


def own_input(network: str) -> OwnInput:
    """The images that a model of another library was made for.

    Raises:
        ConfigError: the library knows no such model.
        MissingExtraError: the library is not installed.
    """
    return _of(network)[0].own_input(*_of(network)[1:])


def configuration(network: str) -> dict[str, Any] | None:
    """What a run directory has to keep, besides the name, to build the model again: a configuration of transformers."""
    library, name, _ = _of(network)
    return library.configuration(name)


def plain(network: str, classes: int, size: int, kept: dict[str, Any] | None = None) -> nn.Module:
    """A model from Tensor[N, 3, size, size] to Tensor[N, classes] with random weights.

    Args:
        network: "timm:NAME", "torchvision:NAME" or "transformers:PATH"; options of the model follow a question mark, as
            in "timm:resnet18?drop_path_rate=0.1&act_layer=silu".
        classes: number of outputs.
        size: of the images in pixels, for models that need to know it.
        kept: `configuration` of a run.

    Raises:
        ConfigError: there is no such model, or it does not take these options.
    """
    library, name, options = _of(network)
    try:
        return library.plain(name, classes, size, options, kept)
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        what = " ".join(str(error).split())[:200]
        raise ConfigError(f"{network} cannot be built ({type(error).__name__}: {what})") from None


def pretrained(network: str) -> dict[str, Tensor]:
    """The weights that the library has for a model, as its `state_dict`; downloaded unless its cache has them.

    Raises:
        ConfigError: there are none, or they cannot be got.
    """
    library, name, options = _of(network)
    try:
        return library.pretrained(name, options)
    except ConfigError:
        raise
    except Exception as error:  # of as many kinds as there are ways for a download to fail
        what = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"the pretrained weights of {network} cannot be got ({type(error).__name__}: {what}); give --weights FILE"
        ) from None


class _Timm:
    @staticmethod
    def own_input(name: str, options: dict[str, Any]) -> OwnInput:
        with extra("timm"):
            import timm
        found: Any = timm.get_pretrained_cfg(_timm_name(name))
        return OwnInput(found.input_size[-1], tuple(found.mean), tuple(found.std))

    @staticmethod
    def configuration(name: str) -> None:
        return None

    @staticmethod
    def plain(name: str, classes: int, size: int, options: dict[str, Any], kept: Any) -> nn.Module:
        with extra("timm"):
            import timm
        name = _timm_name(name)
        if size != _Timm.own_input(name, options).size and "img_size" not in options:
            try:
                return timm.create_model(name, num_classes=classes, img_size=size, **options)
            except TypeError:  # convolutional networks take any size
                pass
        return timm.create_model(name, num_classes=classes, **options)

    @staticmethod
    def pretrained(name: str, options: dict[str, Any]) -> dict[str, Tensor]:
        with extra("timm"):
            import timm
        return timm.create_model(_timm_name(name), pretrained=True).state_dict()


def _timm_name(name: str) -> str:
    with extra("timm"):
        import timm
    if not timm.is_model(name):
        raise ConfigError(f"timm knows no model {name!r}; the names most like it: {_nearest(name, timm.list_models())}")
    return name


class _Torchvision:
    @staticmethod
    def _weights(name: str) -> Any:
        from torchvision import models

        known = models.list_models(module=models)
        if name not in known:
            raise ConfigError(
                f"torchvision knows no image classifier {name!r}; the names most like it: {_nearest(name, known)}"
            )
        return models.get_model_weights(name).DEFAULT  # pyright: ignore[reportAttributeAccessIssue]

    @staticmethod
    def own_input(name: str, options: dict[str, Any]) -> OwnInput:
        transforms = _Torchvision._weights(name).transforms()
        return OwnInput(transforms.crop_size[0], tuple(transforms.mean), tuple(transforms.std))

    @staticmethod
    def configuration(name: str) -> None:
        return None

    @staticmethod
    def plain(name: str, classes: int, size: int, options: dict[str, Any], kept: Any) -> nn.Module:
        from torchvision import models

        _Torchvision._weights(name)
        if name.startswith("vit_"):
            options = {"image_size": size, **options}
        return models.get_model(name, weights=None, num_classes=classes, **options)

    @staticmethod
    def pretrained(name: str, options: dict[str, Any]) -> dict[str, Tensor]:
        return dict(_Torchvision._weights(name).get_state_dict(progress=True, check_hash=True))


class _Transformers:
    @staticmethod
    def _config(path: str) -> Any:
        with extra("transformers"):
            import transformers
        if not (Path(path) / "config.json").is_file():
            raise ConfigError(
                f"{path} has no config.json; give the folder of an image classifier, as its save_pretrained writes it"
            )
        try:
            return transformers.AutoConfig.from_pretrained(path, local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            raise ConfigError(f"{path}/config.json cannot be read ({' '.join(str(error).split())[:200]})") from None

    @staticmethod
    def own_input(path: str, options: dict[str, Any]) -> OwnInput:
        size = getattr(_Transformers._config(path), "image_size", None) or 224
        mean, std = _MEAN, _STD
        processing = Path(path) / "preprocessor_config.json"
        if processing.is_file():
            found = json.loads(processing.read_text())
            mean, std = tuple(found.get("image_mean") or mean), tuple(found.get("image_std") or std)
            crop = found.get("crop_size") or found.get("size") or size
            size = crop.get("height") or crop.get("shortest_edge") or size if isinstance(crop, dict) else crop
        return OwnInput(size if isinstance(size, int) else size[0], mean, std)

    @staticmethod
    def configuration(path: str) -> dict[str, Any]:
        return json.loads(_Transformers._config(path).to_json_string(use_diff=False))

    @staticmethod
    def plain(path: str, classes: int, size: int, options: dict[str, Any], kept: dict[str, Any] | None) -> nn.Module:
        with extra("transformers"):
            import transformers
        if kept is None:
            config = _Transformers._config(path)
        else:
            config = transformers.AutoConfig.for_model(kept["model_type"]).from_dict(dict(kept))
        config.num_labels = classes
        if hasattr(config, "image_size"):
            config.image_size = size
        for name, value in options.items():
            if not hasattr(config, name):
                raise ConfigError(f"the configuration in {path} has no {name}")
            setattr(config, name, value)
        return Logits(transformers.AutoModelForImageClassification.from_config(config))

    @staticmethod
    def pretrained(path: str, options: dict[str, Any]) -> dict[str, Tensor]:
        with extra("transformers"):
            import transformers
        model = transformers.AutoModelForImageClassification.from_pretrained(path, local_files_only=True)
        return Logits(model).state_dict()


_LIBRARY: dict[str, Any] = {"timm": _Timm, "torchvision": _Torchvision, "transformers": _Transformers}
LIBRARIES = tuple(_LIBRARY)


@cache
def _of(network: str) -> tuple[Any, str, dict[str, Any]]:
    """The library, the name (or path) and the options of a network."""
    library, _, rest = network.partition(":")
    name, _, query = rest.partition("?")
    options: dict[str, Any] = {}
    for part in filter(None, query.split("&")):
        key, equals, value = part.partition("=")
        if not equals or not key.isidentifier():
            raise ConfigError(f"{network}: {part!r} is no option; write {library}:{name}?drop_path_rate=0.1")
        try:
            options[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            options[key] = value
    return _LIBRARY[library], name, options


def _nearest(name: str, known: list[str]) -> str:
    return ", ".join(closest_first(name, known).split(", ")[:5])
