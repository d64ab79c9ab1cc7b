"""Networks by name: `create("resnet-110", rule="stochastic-depth")` is a network ready to train."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import nn

from residrop.blocks.attach import connect
from residrop.blocks.inactive import warn_if_certain
from residrop.common.checks import check_whole, closest_first
from residrop.common.errors import ConfigError
from residrop.models import cifar, imagenet
from residrop.models.cifar import CifarResNet
from residrop.models.imagenet import ImageNetResNet
from residrop.models.vanilla import Vanilla
from residrop.rules.base import Rule
from residrop.rules.catalogue import RULES, entry_of, make_rule
from residrop.rules.depth import ConstantDepth
from residrop.schedule.coupling import Coupling
from residrop.schedule.survival import parse
from residrop.schedule.timing import Timing

__all__ = ["create", "list_models", "num_blocks", "reads_flat_rows"]

Rates = str | float | Sequence[float]
RuleMaker = Callable[[float], Rule]


def _one_block_each(depth: int) -> int:
    return check_whole("depth", depth, least=1)


@dataclass(frozen=True, kw_only=True)
class _Family:
    """One line of the catalogue: what a name means.

    Attributes:
        build: constructor, called as build(depth, rules=..., **options).
        blocks: number of residual blocks L at a depth.
        starts: 0-based first blocks of the stages at a depth; within a stage all outputs have one shape.
        exempt: 0-based blocks at a depth that depth dropout never drops; None where the network has no trainable
            shortcuts.
        fixed: options that the name stands for, closed to the caller.
        defaults: options whose default differs from the constructor's.
        depths: how the depth is written in the listing.
        summary: one line with the paper.
    """

    build: Callable[..., nn.Module]
    blocks: Callable[[int], int]
    summary: str
    starts: Callable[[int], Sequence[int]] = lambda depth: (0,)
    exempt: Callable[[int], tuple[int, ...]] | None = None
    fixed: Mapping[str, object] = field(default_factory=dict[str, object])
    defaults: Mapping[str, object] = field(default_factory=dict[str, object])
    depths: str = "<depth>"

    def places(self, depth: int) -> list[int]:
        """For every block its 0-based place in its stage."""
        starts = self.starts(depth)
        return [block - max(start for start in starts if start <= block) for block in range(self.blocks(depth))]

    @property
    def options(self) -> list[str]:
        """Names a caller may pass to `create` on top of its own arguments."""
        known = inspect.signature(self.build).parameters
        return [name for name in known if name not in {"depth", "rules", "classes", "channels", *self.fixed}]


def _cifar_family(summary: str, **more: Any) -> _Family:
    return _Family(
        build=CifarResNet,
        blocks=lambda depth: 3 * cifar.blocks_per_group(depth),
        starts=cifar.group_starts,
        exempt=cifar.group_starts,
        summary=summary,
        **more,
    )


def _imagenet_family(summary: str, **more: Any) -> _Family:
    return _Family(
        build=ImageNetResNet,
        blocks=lambda depth: sum(imagenet.blocks_per_group(depth)),
        starts=lambda depth: (0, *accumulate(imagenet.blocks_per_group(depth)[:-1])),
        exempt=imagenet.reshaping_blocks,
        depths="|".join(map(str, imagenet.IMAGENET_DEPTHS)),
        summary=summary,
        **more,
    )


_FAMILIES: dict[str, _Family] = {
    "resnet": _cifar_family("small images, depth 6n + 2, parameter-free shortcuts (Huang et al. 2016, Sec. 4)"),
    "resnet-ours": _cifar_family(
        "small images, pooling between groups, learned projections, 1x1 convolution head (Singh et al. 2016, Sec. 4)",
        fixed={"downsample": "pool", "shortcut": "project", "head": "conv"},
        defaults={"conv_bias": True},
    ),
    "stable-resnet": _cifar_family(
        "resnet with every branch multiplied by 1/sqrt(L) (Hayou & Ayed 2021, eq. 3)", fixed={"stable": True}
    ),
    "depth-dropout-resnet": _cifar_family(
        "resnet with trainable shortcuts in all but the first block of a group (Guo & Gould 2016, eq. 3)",
        fixed={"transform": True},
    ),
    "vanilla": _Family(
        build=Vanilla,
        blocks=_one_block_each,
        summary="fully connected, W relu(y) in every block; depth = blocks (Hayou & Ayed 2021, Sec. 2)",
    ),
    "stable-vanilla": _Family(
        build=Vanilla,
        blocks=_one_block_each,
        summary="vanilla with every branch multiplied by 1/sqrt(L) (Hayou & Ayed 2021, eq. 3)",
        fixed={"stable": True},
    ),
    "imagenet-resnet": _imagenet_family(
        "large images, projections where shapes change; 152 as in Huang et al. 2016, 18 as in Guo & Gould 2016"
    ),
    "imagenet-depth-dropout-resnet": _imagenet_family(
        "imagenet-resnet with trainable shortcuts in place of the identities (Guo & Gould 2016, Sec. IV)",
        fixed={"transform": True},
    ),
}


def list_models() -> dict[str, str]:
    """Every name that `create` knows, as a pattern, with one line on the network and its paper."""
    return {f"{prefix}-{family.depths}": family.summary for prefix, family in _FAMILIES.items()}


def num_blocks(name: str, **options: object) -> int:
    """Number L of residual blocks of a network: how many survival rates it takes. Nothing is built."""
    family, depth = _find(name)
    _check_options(name, family, options)
    return family.blocks(depth)


def reads_flat_rows(name: str) -> bool:
    """Whether a network reads rows of `in_features` numbers rather than images; ConfigError if it is unknown."""
    return _find(name)[0].build is Vanilla


def create(
    name: str,
    *,
    rule: str | RuleMaker = "constant",
    survival: Rates | None = None,
    theta_2: Rates | None = None,
    granularity: str | None = None,
    rescale: str | None = None,
    classes: int | None = None,
    channels: int | None = None,
    seed: int = 0,
    timing: Timing | str = "constant",
    coupling: Coupling = "independent",
    costs: Sequence[float] = (),
    at_least: int = 0,
    draw_every: int = 1,
    **options: Any,
) -> nn.Module:
    """Build a network by name, give each block its rule, and attach the sampler of their draws.

    Weights are a function of `seed` alone: the global random state is neither read nor moved, and the network is
    the same on every default device (on "meta" it has no weights). Rules have no parameters, so the `state_dict` of a
    network fits the same network under any other rule of the same shortcuts.

    `rule="depth-dropout"` turns on trainable shortcuts (`transform=True`) unless the option is given: without them
    the method is another one. With it, and with any rule that leaves out branches on a network with trainable
    shortcuts, the blocks that depth dropout exempts stay at constant depth whatever `survival` says of them.

    Args:
        name: one of the patterns of `list_models()`, such as "resnet-110".
        rule: a name in `residrop.RULES`, or a function from one survival rate to a new rule.
        survival: rate per block, in any form that `residrop.schedule.survival.parse` reads; None is 1 for "constant"
            and the paper's schedule for the other names. A function as `rule` needs it.
        theta_2: for swapout, the same for the branch's mask; None means as `survival`.
        granularity: passed to the rule.
        rescale: passed to the rule.
        classes: number of outputs; None is the network's default.
        channels: channels of the input image; None is the network's default.
        seed: seed of weights and draws.
        timing: the share of every drop that is in force at a step, as in `attach`; times are training steps.
        coupling: how the presence of a block depends on that of others in the same step, as in `attach`.
        costs: for "balanced", as in `attach`.
        at_least: as in `attach`.
        draw_every: as in `attach`.
        options: further options of the rule (such as `of` of skipforward) and of the network (such as `width`).

    Returns:
        The network in training mode, with residual blocks `blocks.block1` to `blocks.blockL`.

    Raises:
        ConfigError: an unknown name or option, or a value that the network or the rule refuses.

    Warns:
        InactiveWarning: a rule other than "constant" with all rates 1.
    """
    family, depth = _find(name)
    check_whole("seed", seed)
    for_rule, settings = _share_out(name, family, rule, options)
    settings |= _input_and_output(name, family, classes, channels, settings)
    for_rule |= {"granularity": granularity, "rescale": rescale}
    rules = _make_rules(rule, family.places(depth), survival, theta_2, for_rule)
    if family.exempt is not None and (rule == "depth-dropout" or settings.get("transform")):
        for index in family.exempt(depth):
            if rules[index].granularity != "unit":
                rules[index] = ConstantDepth()
    model = _seeded(lambda: family.build(depth, rules=rules, **settings), seed)
    how: dict[str, Any] = {"coupling": coupling, "costs": costs, "at_least": at_least, "draw_every": draw_every}
    warn_if_certain(connect(model, seed=seed, timing=timing, **how), "this rule")
    return model


_ARGUMENTS = tuple(
    key for key, value in inspect.signature(create).parameters.items() if value.kind is value.KEYWORD_ONLY
)


def _find(name: str) -> tuple[_Family, int]:
    prefix, _, depth = name.rpartition("-")
    if prefix not in _FAMILIES or not (depth.isascii() and depth.isdigit()):
        raise ConfigError(f"model {name!r} is unknown; known: {closest_first(name, list_models())}")
    family = _FAMILIES[prefix]
    family.blocks(int(depth))  # refuses a depth that the family does not have
    return family, int(depth)


def _share_out(
    name: str, family: _Family, rule: str | RuleMaker, options: Mapping[str, object]
) -> tuple[dict[str, object], dict[str, Any]]:
    """Part the options into the rule's and the network's, the latter completed by what the name stands for."""
    of_rule = entry_of(rule).options if isinstance(rule, str) else ()
    for_rule = {key: value for key, value in options.items() if key in of_rule}
    settings = {key: value for key, value in options.items() if key not in of_rule}
    _check_options(name, family, settings, also=(*_ARGUMENTS, *of_rule))
    if rule == "depth-dropout":
        if family.exempt is None:
            raise ConfigError(f"rule 'depth-dropout' needs trainable shortcuts, which {name!r} cannot have")
        settings.setdefault("transform", True)
    return for_rule, {**family.defaults, **settings, **family.fixed}


def _check_options(name: str, family: _Family, options: Mapping[str, object], also: Sequence[str] = ()) -> None:
    for option in options:
        if option in family.fixed:
            raise ConfigError(f"option {option!r} is decided by the name {name!r}: {family.fixed[option]!r}")
        if option not in family.options:
            known = closest_first(option, dict.fromkeys([*family.options, *also]))
            raise ConfigError(f"option {option!r} is unknown to {name!r}; known: {known}")


def _input_and_output(
    name: str, family: _Family, classes: int | None, channels: int | None, settings: Mapping[str, object]
) -> dict[str, object]:
    """`classes` and `channels` under the names of the constructor; those left at None are absent."""
    if family.build is not Vanilla:
        both = {"classes": classes, "channels": channels}
        return {key: value for key, value in both.items() if value is not None}
    if channels is not None:
        raise ConfigError(f"{name!r} reads flat rows, not images; give in_features=... instead of channels")
    if classes is None:
        return {}
    if "out_features" in settings:
        raise ConfigError("classes and out_features are the same number; give one of them")
    return {"out_features": classes}


def _make_rules(
    rule: str | RuleMaker,
    places: Sequence[int],
    survival: Rates | None,
    theta_2: Rates | None,
    options: dict[str, object],
) -> list[Rule]:
    count = len(places)
    if not isinstance(rule, str):
        given = [key for key, value in {**options, "theta_2": theta_2}.items() if value is not None]
        if given:
            raise ConfigError(f"{given[0]} is for rules named by a string; set it inside the function given as rule")
        if survival is None:
            raise ConfigError("survival is missing; a rule given as a function has no default schedule")
        return [rule(rate) for rate in parse(survival, count)]

    rates = parse(entry_of(rule).survival if survival is None else survival, count)
    if rule == "constant" and any(rate != 1.0 for rate in rates):
        raise ConfigError(
            f"survival is {survival!r}, but rule 'constant' keeps every block; "
            f"choose one of {', '.join(word for word in RULES if word != rule)}"
        )
    seconds = [None] * count if theta_2 is None else parse(theta_2, count)
    every = zip(rates, seconds, places, strict=True)
    return [make_rule(rule, first, place=place, theta_2=second, **options) for first, second, place in every]


def _seeded(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    """Build from `seed` on the CPU, then move to the default device; the global random state is put back.

    CUDA generators would give other weights for the same seed. Meta tensors have no weights to agree on, and are
    made directly so that the largest networks cost nothing.
    """
    device = torch.get_default_device()
    place = device if device.type == "meta" else torch.device("cpu")
    with torch.random.fork_rng(devices=[]), place:
        # not torch.manual_seed, which also seeds the CUDA generators
        torch.default_generator.manual_seed(seed % 2**64)
        model = build()
    return model.to(device)
