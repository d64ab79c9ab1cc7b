"""Layer drop of transformers: which layers a model leaves out in training, and how it is made to leave that to rules.

Its loops toss a coin before every layer, in one of two forms: `if coin < self.layerdrop`, or the same with
`self.config.layerdrop`. Each rank tosses its own, under FSDP and ZeRO-3 a layer that lost its toss is applied all the
same, and compiled code keeps the first outcome. With rules in place, the loops call every layer.
"""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from residrop.surgery.blocks import Undo, record_changes
from residrop.surgery.generic import GenericBlock

__all__ = ["LayerDrop", "end_layer_drop", "layer_drops"]


class CarryingLayer(GenericBlock):
    """A whole layer that returns a second state with the hidden one; where it is absent, it hands on what it got.

    Attributes:
        carried: name of the argument that is that state.
    """

    residrop_carried: ClassVar[str] = ""

    def residrop_forward(self, *args: Any, **kwargs: Any) -> Any:
        _, given = self.residrop_signature.take(args, kwargs)
        y, state, *rest = super().residrop_forward(*args, **kwargs)
        return y, given[self.residrop_carried] if state is None else state, *rest


class WavLMLayer(CarryingLayer):
    residrop_carried = "position_bias"


class PegasusXLayer(CarryingLayer):
    residrop_carried = "global_hidden_states"


_MIXINS = {"WavLMEncoder": WavLMLayer, "WavLMEncoderStableLayerNorm": WavLMLayer, "PegasusXEncoder": PegasusXLayer}
_FIRST_STAYS = ("WavLMEncoder", "WavLMEncoderStableLayerNorm")  # it computes the position bias of all
# a layer of the first gives a trend, too, that is added up; those of adapters shorten their sequence
_NOT_RESIDUAL = ("AutoformerDecoder", "Adapter")


@dataclass(frozen=True)
class LayerDrop:
    """What a model's layer drop does to one layer.

    Attributes:
        owner: the module whose loop tosses the coins.
        attribute: where the probability to leave a layer out is: "layerdrop" or "config.layerdrop".
        survival: of this layer.
        mixin: what takes the place of its forward; None where the layer is no residual block.
    """

    owner: nn.Module
    attribute: str
    survival: float
    mixin: type[GenericBlock] | None


def layer_drops(model: nn.Module) -> dict[nn.Module, LayerDrop]:
    """The layers that a model drops by itself, those with a rate above 0."""
    found: dict[nn.Module, LayerDrop] = {}
    for owner in model.modules():
        attribute = _attribute(owner)
        layers = getattr(owner, "layers", None)
        name = type(owner).__name__
        if not attribute or not isinstance(layers, nn.ModuleList):
            continue
        survival = 1.0 - _value(owner, attribute)
        if survival == 1.0:
            continue
        mixin = None if name.endswith(_NOT_RESIDUAL) else _MIXINS.get(name, GenericBlock)
        for number, layer in enumerate(layers):
            rate = 1.0 if number == 0 and name in _FIRST_STAYS else survival
            found[layer] = LayerDrop(owner, attribute, rate, mixin)
    return found


def _attribute(owner: nn.Module) -> str:
    """Where the forward of a module reads its probability of layer drop; "" if it reads none."""
    forward = inspect.unwrap(type(owner).forward)
    if not forward.__module__.partition(".")[0].startswith("transformers"):
        return ""
    name = next((name for name in forward.__code__.co_names if name.endswith("layerdrop")), "")
    return name if not name or name in vars(owner) else f"config.{name}"


def _value(owner: Any, attribute: str) -> float:
    for name in attribute.split("."):
        owner = getattr(owner, name)
    return float(owner)


def end_layer_drop(
    model: nn.Module, taken: Sequence[nn.Module], drops: Mapping[nn.Module, LayerDrop]
) -> list[tuple[str, str]]:
    """Make the loops around the blocks that have rules call all layers, until the first of them is given back.

    Args:
        model: the model.
        taken: its blocks under rules.
        drops: what `layer_drops` found before.

    Returns:
        Names of layers without a rule, and what is now to be known of them.
    """
    owners = {drops[block].owner for block in taken if block in drops}
    for owner, attribute in dict.fromkeys((drop.owner, drop.attribute) for drop in drops.values()):
        if owner in owners:
            record_changes(taken[0], [_without(owner, attribute)])
    names = {module: name for name, module in model.named_modules()}
    why = {
        True: "the layer drop of its neighbours is left to rules, so it is always present",
        False: "its model's layer drop goes on, as it is no residual block under a rule",
    }
    return [(names[layer], why[drop.owner in owners]) for layer, drop in drops.items() if layer not in taken]


def _without(owner: Any, attribute: str) -> Undo:
    if attribute.startswith("config."):
        return Undo(owner, "config", _view(owner.config, attribute.removeprefix("config."), 0.0))
    return Undo(owner, attribute, 0.0)


def _view(config: Any, name: str, value: float) -> Any:
    """The same configuration, also when it changes later, but for one attribute: it is not the owner's alone."""
    own = type(config)
    attributes = {
        "__module__": own.__module__,
        name: property(lambda self: value),
        "__reduce_ex__": lambda self, protocol: (_view, (config, name, value)),
    }
    view = object.__new__(type(own.__name__, (own,), attributes))
    view.__dict__ = config.__dict__
    return view
