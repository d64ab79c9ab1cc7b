"""Layer drop of transformers: which layers a model leaves out in training, and how it is made to leave that to rules.

Its loops toss a coin before every layer, in one of two forms: `if coin < self.layerdrop`, or the same with
`self.config.layerdrop`. Each rank tosses its own, under FSDP and ZeRO-3 a layer that lost its toss is applied all the
same, and compiled code keeps the first outcome. With rules in place, the loops call every layer.
"""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import copysign
from typing import Any, ClassVar

from torch import nn

from residrop.common.errors import ConfigError
from residrop.surgery.blocks import record_changes
from residrop.surgery.drops import set_rate, survival_of
from residrop.surgery.generic import GenericBlock

__all__ = ["LayerDrop", "end_layer_drop", "layer_drops"]


class DroppedLayer(GenericBlock):
    """A whole layer whose model drops it by itself, and so makes do with None for whatever else it returns."""

    residrop_lenient = True


class CarryingLayer(DroppedLayer):
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
        active: whether the model drops any layer at all.
    """

    owner: nn.Module
    attribute: str
    survival: float
    mixin: type[GenericBlock] | None
    active: bool

    @property
    def follows(self) -> bool:
        """Whether a rule for this layer has its rate from the layer drop."""
        return self.active and self.survival < 1.0


def layer_drops(model: nn.Module) -> dict[nn.Module, LayerDrop]:
    """The layers that a model drops by itself, or would if its rate were set above 0."""
    found: dict[nn.Module, LayerDrop] = {}
    for owner in model.modules():
        attribute = _attribute(owner)
        layers = getattr(owner, "layers", None)
        name = type(owner).__name__
        if not attribute or not isinstance(layers, nn.ModuleList):
            continue
        survival = 1.0 - _value(owner, attribute)
        mixin = None if name.endswith(_NOT_RESIDUAL) else _MIXINS.get(name, DroppedLayer)
        for number, layer in enumerate(layers):
            rate = 1.0 if number == 0 and name in _FIRST_STAYS else survival
            found[layer] = LayerDrop(owner, attribute, rate, mixin, survival < 1.0)
    return found


def _attribute(owner: nn.Module) -> str:
    """Where the forward of a module reads its probability of layer drop; "" if it reads none."""
    forward = inspect.unwrap(type(owner).forward)
    if not (forward.__module__ or "").partition(".")[0].startswith("transformers"):
        return ""
    name = next((name for name in forward.__code__.co_names if name.endswith("layerdrop")), "")
    return name if not name or name in vars(owner) else f"config.{name}"


def _value(owner: Any, attribute: str) -> float:
    for name in attribute.split("."):
        owner = getattr(owner, name)
    return float(owner)


def end_layer_drop(
    model: nn.Module, taken: Sequence[nn.Module], drops: Mapping[nn.Module, LayerDrop], inherits: bool
) -> list[tuple[str, str]]:
    """Make the loops around the blocks that have rules call all layers, until the first of them is given back.

    Args:
        model: the model.
        taken: its blocks under rules.
        drops: what `layer_drops` found before.
        inherits: whether the rules have their rates from the layer drop, and get what it is set to later.

    Returns:
        Names of layers without a rule, and what is now to be known of them.
    """
    owners = {drops[block].owner for block in taken if block in drops}
    for owner, attribute in dict.fromkeys((drop.owner, drop.attribute) for drop in drops.values()):
        if owner in owners:
            follow = [one for one in taken if one in drops and drops[one].owner is owner and drops[one].follows]
            change = _TakenOver(owner, attribute, follow if inherits else [])
            record_changes(taken[0], [change])
            # this block's alone, so not of its class
            checks = getattr(taken[0], "residrop_checks", ())
            vars(taken[0])["residrop_checks"] = (*checks, change.follow)
    names = {module: name for name, module in model.named_modules()}
    why = {
        True: "the layer drop of its neighbours is left to rules, so it is always present",
        False: "its model's layer drop goes on, as it is no residual block under a rule",
    }
    return [
        (names[layer], why[drop.owner in owners]) for layer, drop in drops.items() if drop.active and layer not in taken
    ]


class _TakenOver:
    """A layer drop in whose place rules are: its loop reads 0, and what it is set to later goes to the rules.

    Where the probability is the loop's own attribute, it is -0.0 meanwhile: no loop sees the difference to 0.0, but it
    tells whether somebody has set it.
    """

    def __init__(self, owner: Any, attribute: str, blocks: Sequence[Any]) -> None:
        self.owner, self.attribute, self.blocks = owner, attribute, blocks
        self.rate = _value(owner, attribute)
        if attribute.startswith("config."):
            self.config = owner.config
            owner.config = _view(owner.config, attribute.removeprefix("config."))
        else:
            self.config = None
            setattr(owner, attribute, -0.0)

    def follow(self, *call: Any) -> None:
        """Before a draw: hand on what the layer drop was set to since the last one."""
        rate = self._rate()
        if rate == self.rate and not self._was_set():
            return
        survival = survival_of(self.attribute, rate)
        if not self.blocks and rate > 0.0:
            raise ConfigError(
                f"{self.attribute} of a {type(self.owner).__name__} was set to {rate}, but rules that have their rates "
                "elsewhere are in its place; use residrop.set_survival(model, rates)"
            )
        for block in self.blocks:
            set_rate(block.residrop_rules[0], survival)
        self.rate = rate
        if self.config is None:
            setattr(self.owner, self.attribute, -0.0)

    def _rate(self) -> float:
        if self.config is not None:
            return float(getattr(self.config, self.attribute.removeprefix("config.")))
        return float(getattr(self.owner, self.attribute)) if self._was_set() else self.rate

    def _was_set(self) -> bool:
        """Whether the loop's own attribute was set since it was taken over, if only to what it was."""
        if self.config is not None:
            return False
        rate = float(getattr(self.owner, self.attribute))
        return rate != 0.0 or copysign(1.0, rate) > 0.0

    def undo(self) -> None:
        if self.config is None:
            setattr(self.owner, self.attribute, self._rate())
        else:
            self.owner.config = self.config


def _view(config: Any, name: str) -> Any:
    """The same configuration, also when it changes later, but for one attribute, which reads as 0: it is not the
    owner's alone."""
    own = type(config)
    attributes = {
        "__module__": own.__module__,
        "__reduce_ex__": lambda self, protocol: (_view, (config, name)),  # the class is made when needed
        name: property(lambda self: 0.0, lambda self, value: self.__dict__.__setitem__(name, value)),
    }
    view = object.__new__(type(own.__name__, (own,), attributes))
    view.__dict__ = config.__dict__
    return view
