"""The drop modules that models bring along: what they drop, and how they are switched off and on again."""

from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import nn

from residrop.surgery.blocks import Undo

__all__ = ["Own", "own_survival", "silenced"]


class Own(NamedTuple):
    """What a model's own drop module does, in the words of rules; None is the rule's default."""

    survival: float
    granularity: str | None = None
    rescale: str | None = None


def own_survival(module: Any) -> Own | None:
    """What a drop module of torchvision, timm or transformers does; None if it is no such module.

    They are told by their form: `p` and `mode` (torchvision), or `drop_prob` and a name that ends in DropPath.
    """
    name = type(module).__name__
    if name == "StochasticDepth" and hasattr(module, "p") and hasattr(module, "mode"):
        return Own(1.0 - module.p, "block" if module.mode == "batch" else "row", "train")
    if name.endswith("DropPath") and hasattr(module, "drop_prob"):
        rescale = "train" if getattr(module, "scale_by_keep", True) else "none"
        return Own(1.0 - (module.drop_prob or 0.0), "row", rescale)
    return None


def silenced(modules: Iterable[nn.Module]) -> list[Undo]:
    """Switch off every drop module among `modules`, where rules take over; returns how to switch them on again."""
    inside = [module for module in modules if own_survival(module) is not None]
    return [Undo(module, "p" if hasattr(module, "p") else "drop_prob", 0.0) for module in inside]
