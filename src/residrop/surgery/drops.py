"""The drop modules that models bring along: what they drop, and how rules take their place and give it back."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from torch import nn

from residrop.common.checks import is_number
from residrop.common.errors import ConfigError
from residrop.rules.base import Rule
from residrop.surgery.blocks import Change

__all__ = ["Own", "ReplacedDrop", "own_survival", "replaced", "set_rate", "survival_of"]


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


_RULES = "residrop_rules_in_place"  # rules that stand in a drop module's place; None in place of them: rates were given
_OWN = "residrop_class"  # a drop module's own class
_SOURCES = "residrop_sources"  # the drop modules that a rule has its rate from


class ReplacedDrop(nn.Module):
    """Stands in front of a drop module's class while rules are in its place: it drops nothing itself.

    Training loops that set the module's probability (a ramp of drop path rates) go on working: the rules get the rate
    at once, as from `residrop.set_survival`. The probability reads as it was last set, and stays when rules are gone.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return args[0] if args else next(iter(kwargs.values()))

    def __reduce_ex__(self, protocol: Any) -> Any:
        # the class is made when needed, so pickle cannot find it by its name
        return _again, (self.__dict__[_OWN],), self.__dict__


_CLASSES: dict[type, type[ReplacedDrop]] = {}


def _attribute(own: Any) -> str:
    """Name of a drop module's probability; `own` is the module or its class."""
    name = own.__name__ if isinstance(own, type) else type(own).__name__
    return "p" if name == "StochasticDepth" else "drop_prob"


def _class_for(own: type) -> type[ReplacedDrop]:
    if own not in _CLASSES:
        name = _attribute(own)
        attributes = {"__module__": own.__module__, "__qualname__": own.__qualname__, "__doc__": own.__doc__}
        probability = property(lambda self: self.__dict__[name], lambda self, value: _follow(self, name, value))
        _CLASSES[own] = type(own.__name__, (ReplacedDrop, own), {**attributes, name: probability})
    return _CLASSES[own]


def _again(own: type) -> Any:
    return object.__new__(_class_for(own))


def _follow(module: Any, name: str, value: Any) -> None:
    """Set the probability of a replaced drop module, and the rates of the rules in its place."""
    rate = survival_of(name, value)
    rules: list[Rule] | None = module.__dict__[_RULES]
    if rules is None:
        if rate < 1.0 and value != module.__dict__[name]:
            raise ConfigError(
                f"{name} of a {type(module).__name__} was set to {value}, but rules with rates of their own are in its "
                "place; use residrop.set_survival(model, rates), or apply(..., survival='from_model'), whose rules "
                "follow it"
            )
    else:
        for rule in rules:
            _check_follows(rule)
        for rule in rules:
            others = [own_survival(one) for one in rule.__dict__[_SOURCES] if one is not module]
            set_rate(rule, min([rate, *(own.survival for own in others if own is not None)]))
    module.__dict__[name] = value


def survival_of(name: str, drop_rate: Any) -> float:
    """The survival rate that belongs to a drop rate (None is 0); ConfigError if that is no number in [0, 1]."""
    if drop_rate is not None and not (is_number(drop_rate) and 0.0 <= drop_rate <= 1.0):
        raise ConfigError(f"{name} was set to {drop_rate!r}; give a drop rate in [0, 1]")
    return 1.0 - (drop_rate or 0.0)


def _check_follows(rule: Rule) -> None:
    if len(rule.rates) != 1:
        raise ConfigError(
            f"the rule in place of a model's own drop rate is a {type(rule).__name__}, which has {len(rule.rates)} "
            "rates and cannot follow when that is set; use stochastic-depth, or leave the drop rate as it was"
        )


def set_rate(rule: Rule, rate: float) -> None:
    """Give one rule another survival rate from the next draw on, as `residrop.set_survival` gives them to all."""
    _check_follows(rule)
    if rule.rates == (rate,):
        return
    if rule.sampler is not None:
        sites = list(rule.sampler.sites)
        sites[rule.index] = replace(rule.site, rates=(rate,))
        rule.sampler.change(sites)
    rule.rates = (rate,)


class _Replacement(Change):
    """A drop module whose class was changed."""

    def __init__(self, module: nn.Module, follows: bool) -> None:
        self.module, own = module, type(module)
        name = _attribute(own)
        self.shadowed = name not in module.__dict__  # an attribute of the class
        module.__dict__.setdefault(name, getattr(module, name))
        module.__dict__[_OWN], module.__dict__[_RULES] = own, [] if follows else None
        module.__class__ = _class_for(own)

    def undo(self) -> None:
        own = self.module.__dict__.pop(_OWN)
        if type(self.module) is not _class_for(own):
            self.module.__dict__[_OWN] = own
            raise ConfigError(
                f"a {own.__name__} was changed since residrop.apply (by fully_shard?); remove the rules before that"
            )
        self.module.__class__ = own
        del self.module.__dict__[_RULES]
        if self.shadowed:
            del self.module.__dict__[_attribute(own)]


def replaced(pairs: Sequence[tuple[nn.Module, Rule]], follows: bool) -> list[Change]:
    """Let rules take the place of drop modules.

    Args:
        pairs: drop modules, each with the rule in its place; both may come several times.
        follows: whether the rules have their rates from the modules, and get what these are set to later.

    Returns:
        How to undo it.
    """
    changes: list[Change] = []
    for module, rule in pairs:
        if not isinstance(module, ReplacedDrop):
            changes.append(_Replacement(module, follows))
        if follows and (rules := module.__dict__[_RULES]) is not None:
            if rule not in rules:
                rules.append(rule)
            vars(rule).setdefault(_SOURCES, []).append(module)
    return changes
