"""Checks shared by the model constructors. Every one raises before any parameter exists."""

from collections.abc import Sequence

from torch import Tensor

from residrop.common.errors import ConfigError
from residrop.rules.base import Rule
from residrop.rules.depth import ConstantDepth

__all__ = ["check_images", "complete_rules"]


def complete_rules(rules: Sequence[Rule] | None, num_blocks: int) -> list[Rule]:
    """One rule for each of the `num_blocks` blocks, input to output; None is a network of constant depth."""
    if rules is None:
        return [ConstantDepth() for _ in range(num_blocks)]
    given = list(rules)
    if len(given) != num_blocks:
        raise ConfigError(
            f"{len(given)} rules were given for {num_blocks} residual blocks; give one rule per block, input to output"
        )
    if len({id(rule) for rule in given}) != num_blocks:
        # One module at two places has one number, so both blocks would live and die by one coin.
        raise ConfigError("the same rule object was given for more than one block; make a new rule per block")
    return given


def check_images(x: Tensor, channels: int, smallest: int) -> None:
    """Refuse input that is not `[n, channels, h, w]` with h and w of at least `smallest`."""
    if x.dim() != 4 or x.shape[1] != channels:
        raise ConfigError(
            f"the input has shape {list(x.shape)}; this network reads [n, {channels}, height, width]. "
            "Build it with channels=... to change the second number"
        )
    if x.shape[2] < smallest or x.shape[3] < smallest:
        raise ConfigError(
            f"the input is {x.shape[2]} x {x.shape[3]} pixels; this network needs at least {smallest} x {smallest}"
        )
