"""The rule for blocks nobody knows: x + b (block(x) - x), for any module with input and output of one shape."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from residrop.blocks.modes import evaluating
from residrop.blocks.skippable import Part
from residrop.common.errors import ConfigError, PlanError
from residrop.rules.base import Rule
from residrop.surgery.blocks import AppliedBlock, Branch
from residrop.surgery.containers import RULES

__all__ = ["GenericBlock"]


class GenericBlock(AppliedBlock):
    """A whole block as one branch: where it is absent, its first argument is its output.

    A block that returns more than a tensor (a tuple, a dict) returns the same structure when absent, with its input in
    place of the hidden state (the first tensor of its shape) and None in place of all others.
    """

    def residrop_branches(self) -> Sequence[tuple[Rule, Sequence[Part]]]:
        rule = self.residrop_rules[0]
        assert isinstance(rule, Rule)
        children = [child for name, child in self._modules.items() if child is not None and name != RULES]
        return [(rule, [*children, *(one for one in self._parameters.values() if one is not None)])]

    def residrop_absent(self) -> bool:
        # what else the block returns is found out by running it once, for which its parameters must be there
        return "residrop_form" in self.__dict__ and super().residrop_absent()

    def residrop_forward(self, *args: Any, **kwargs: Any) -> Any:
        x, args, kwargs, name = self._residrop_hidden(args, kwargs)
        rule = self.residrop_branches()[0][0]
        rowwise = rule.cuts_rows()
        call = _Call(self, super(AppliedBlock, self).forward, name, rowwise)
        along = self.residrop_along(rule, x, args, kwargs)
        y = rule.forward_block(x, Branch(self, call), along)
        if "residrop_form" not in self.__dict__:  # absent at its first call
            with torch.no_grad(), evaluating(self):
                call(x, *args, **kwargs)
            call.others = None
        return call.result(y)

    def _residrop_hidden(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Tensor, tuple[Any, ...], dict[str, Any], str | None]:
        """The hidden state among a call's arguments (the first of the forward), the others, and its name if it came
        by name."""
        if args and isinstance(args[0], Tensor):
            return args[0], args[1:], kwargs, None
        first = self.residrop_signature.names[:1]
        for name in (*first, *kwargs):  # of a forward(**kwargs) nobody knows which is the first
            if not args and isinstance(kwargs.get(name), Tensor):
                return kwargs[name], (), {key: value for key, value in kwargs.items() if key != name}, name
        raise ConfigError(
            f"{type(self).__name__} was called without a tensor as its first argument, so it is no block x + F(x); "
            "leave it out of `blocks`"
        )


class _Form(NamedTuple):
    """What a block returns: a tree, and at which of its leaves the hidden state is."""

    spec: TreeSpec
    place: int


class _Call:
    """One call of a block: takes its output apart, and puts the combined hidden state in its place."""

    def __init__(self, block: nn.Module, forward: Callable[..., Any], name: str | None, rowwise: bool) -> None:
        self.block, self.forward, self.name, self.rowwise = block, forward, name, rowwise
        self.others: list[Any] | None = None

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        version = None if torch.compiler.is_compiling() or x.is_inference() else x._version
        out = self.forward(x, *args, **kwargs) if self.name is None else self.forward(**{self.name: x}, **kwargs)
        leaves, spec = tree_flatten(out)
        form = self.block.__dict__.get("residrop_form")
        if form is None or form.spec != spec:
            form = self.learn(x, leaves, spec)
            if version is not None and x._version != version:
                raise ConfigError(
                    f"{type(self.block).__name__} overwrites its input, which x + b (block(x) - x) needs; make its "
                    "first operation one that is not in place"
                )
        self.others = leaves
        return leaves[form.place]

    def learn(self, x: Tensor, leaves: list[Any], spec: TreeSpec) -> _Form:
        """Find the hidden state in the block's output; ConfigError if there is none."""
        where = type(self.block).__name__
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        place = next((i for i in places if leaves[i].shape == x.shape), None)
        if place is None:
            got = ", ".join(str(tuple(leaves[i].shape)) for i in places) or f"a {type(leaves[0]).__name__}"
            raise ConfigError(
                f"{where} turns {tuple(x.shape)} into {got}; the generic rule x + b (block(x) - x) needs input and "
                "output of one shape: leave this block out of `blocks`"
            )
        if self.rowwise and len(places) > 1:
            raise PlanError(
                f"{where} returns {len(places)} tensors, of which all but the hidden state have no value for absent "
                "rows; use granularity='block'"
            )
        form = self.block.__dict__["residrop_form"] = _Form(spec, place)
        return form

    def result(self, y: Tensor) -> Any:
        """The block's output, with y as its hidden state."""
        form: _Form = self.block.__dict__["residrop_form"]
        leaves: list[Any] = [None] * form.spec.num_leaves if self.others is None else self.others
        leaves[form.place] = y
        return tree_unflatten(leaves, form.spec)
