"""Which models there are: a source for every library, which names its models and builds each of them small."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from torch import nn

__all__ = ["SOURCES", "Built", "NotBuilt", "Source", "all_names", "build"]


class NotBuilt(Exception):
    """Why a model cannot be built small."""


@dataclass(frozen=True)
class Built:
    """A model, with a batch as it takes it.

    Attributes:
        model: with its own initialisation; `checks` draws the parameters again.
        args: positional arguments of a call, three samples in the first dimension of all tensors that have samples.
        kwargs: named ones.
        family: for summaries.
    """

    model: nn.Module
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    family: str = ""


@dataclass(frozen=True)
class Source:
    """The models of one library.

    Attributes:
        library: the package that has to be installed.
        module: where `names()` and `build(name)` are, below this package; `build` raises `NotBuilt`.
    """

    library: str
    module: str

    def names(self) -> list[str]:
        """All models; none if the library is not installed."""
        return list(self._load().names()) if find_spec(self.library) else []

    def build(self, name: str) -> Built:
        """One of them, on the CPU in float32."""
        return self._load().build(name)

    def _load(self) -> Any:
        return import_module(f"{__package__}.{self.module}")


ROWS = 3  # samples of every batch
SOURCES: tuple[Source, ...] = (
    Source("torch", "torch_layers"),
    Source("torchvision", "torchvision_models"),
    Source("timm", "timm_models"),
    Source("transformers", "transformers_models"),
    Source("diffusers", "diffusers_models"),
)


def all_names(libraries: Sequence[str] = ()) -> list[str]:
    """ "library/model" of every model of these libraries (none given: of all)."""
    return [
        f"{one.library}/{name}" for one in SOURCES if not libraries or one.library in libraries for name in one.names()
    ]


def build(name: str) -> Built:
    """The model of this "library/model"."""
    library, _, model = name.partition("/")
    return next(one for one in SOURCES if one.library == library).build(model)


Builder = Callable[[], Built]
