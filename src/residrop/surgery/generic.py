"""The rule for blocks nobody knows: x + b (block(x) - x), for any module with input and output of one shape."""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, keystr, tree_flatten, tree_flatten_with_path, tree_structure, tree_unflatten

from residrop.blocks.skippable import Part
from residrop.common.errors import ConfigError, PlanError
from residrop.rules.base import Rule
from residrop.surgery.blocks import AppliedBlock, Branch
from residrop.surgery.containers import RULES
from residrop.surgery.rowwise import check_rows, looking_on

__all__ = ["GenericBlock"]


class GenericBlock(AppliedBlock):
    """A whole block as one branch: where it is absent, its first argument is its output.

    A block that returns more than a tensor (a tuple, a dict) returns the same structure when absent, with its input in
    place of the hidden state (the first tensor of its shape). What else it returns must be what the model would have
    had from the block: an argument handed on, None, or a constant. Otherwise the block is refused.

    Attributes:
        residrop_lenient: whether anything else may be None where the block is absent, for models that expect that.
    """

    residrop_lenient: ClassVar[bool] = False

    def residrop_branches(self) -> Sequence[tuple[Rule, Sequence[Part]]]:
        rule = self.residrop_rules[0]
        assert isinstance(rule, Rule)
        children = [child for name, child in self._modules.items() if child is not None and name != RULES]
        return [(rule, [*children, *(one for one in self._parameters.values() if one is not None)])]

    def residrop_absent(self) -> bool:
        # what else the block returns is found out by running it once, for which its parameters must be there
        return "residrop_forms" in self.__dict__ and super().residrop_absent()

    def residrop_unchecked(self) -> bool:
        rule = self.residrop_rules[0]
        return rule.granularity == "row" and "residrop_rowwise" not in self.__dict__

    def residrop_forward(self, *args: Any, **kwargs: Any) -> Any:
        rule = self.residrop_branches()[0][0]
        rowwise = rule.cuts_rows()
        if rowwise and not torch.compiler.is_compiling():
            self.residrop_check(args, kwargs)
        elif rowwise and self.residrop_unchecked():
            from residrop.rules import tracing

            tracing.in_python(self.residrop_check, args, kwargs)
        x, args, kwargs, name = self._residrop_hidden(args, kwargs)
        call = _Call(self, super(AppliedBlock, self).forward, name, rowwise, (x, args, kwargs))
        along = self.residrop_along(rule, x, args, kwargs)
        y = rule.forward_block(x, Branch(self, call), along)
        if call.others is None and not call.knows():  # absent at its first call
            with looking_on(self, x):
                call(x, *args, **kwargs)
            call.others = None
        return call.result(y)

    def residrop_check(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Compare, on the first batch of two rows or more, what rows give by themselves with what they give in it.

        Where it could not be seen, twice as many forwards go by until the next attempt as did before the last.
        """
        wait, gap = self.__dict__.get("residrop_rowwise", (0, 1))
        if wait:
            self.__dict__["residrop_rowwise"] = (wait - 1, gap)
            return
        if wait is None:
            return
        x, args, kwargs, name = self._residrop_hidden(args, kwargs)
        if len(x) < 2:
            return
        call = _Call(self, super(AppliedBlock, self).forward, name, True, ())
        along = self.residrop_along(self.residrop_rules[0], x, args, kwargs)
        seen = check_rows(self, call.hidden, x, (args, kwargs), along, self.residrop_signature.names[1:])
        self.__dict__["residrop_rowwise"] = (None, 0) if seen else (gap, 2 * gap)

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


class _Constant(NamedTuple):
    """An output that is the same in every call: None, a number, a text; or one that nothing needs (`unused`), which is
    None where the block is absent."""

    value: Any
    unused: bool = False


class _Form(NamedTuple):
    """What a block returns for one kind of call: a tree, at which of its leaves the hidden state is, and what the
    others are: the index of an argument (0 is the hidden state) among the leaves of a call's arguments, or a constant.
    """

    spec: TreeSpec
    place: int
    others: tuple[int | _Constant | None, ...]  # None at `place`


class _Call:
    """One call of a block: takes its output apart, and puts the combined hidden state in its place."""

    def __init__(
        self, block: nn.Module, forward: Callable[..., Any], name: str | None, rowwise: bool, given: Any
    ) -> None:
        self.block, self.forward, self.name, self.rowwise = block, forward, name, rowwise
        self.given = tree_flatten(given)[0]
        # calls of one kind have the same arguments, of the same types, and the same flags
        self.kind = (name, *(given and (len(given[1]), *given[2])), *map(_kind, self.given))
        self.others: list[Any] | None = None

    def knows(self) -> bool:
        """Whether it is known what the block returns for such arguments."""
        return self.kind in self.block.__dict__.get("residrop_forms", ())

    def run(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.forward(x, *args, **kwargs) if self.name is None else self.forward(**{self.name: x}, **kwargs)

    def hidden(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The hidden state that the block itself gives."""
        leaves, _ = tree_flatten(self.run(x, *args, **kwargs))
        return leaves[_place(self.block, x, leaves)]

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        version = None if torch.compiler.is_compiling() or x.is_inference() else x._version
        out = self.run(x, *args, **kwargs)
        leaves, spec = tree_flatten(out)
        got = tree_flatten((x, args, kwargs))[0]
        forms: dict[Any, _Form] = self.block.__dict__.setdefault("residrop_forms", {})
        form = forms.get(self.kind)
        if form is None or form.spec != spec or not _still(form, leaves, got):
            form = forms[self.kind] = self.learn(x, out, leaves, got, form)
            if version is not None and x._version != version:
                raise ConfigError(
                    f"{type(self.block).__name__} overwrites its input, which x + b (block(x) - x) needs; make its "
                    "first operation one that is not in place"
                )
        self.others = leaves
        return leaves[form.place]

    def learn(self, x: Tensor, out: Any, leaves: list[Any], got: list[Any], earlier: _Form | None) -> _Form:
        """What the block returns: ConfigError if there is no hidden state, PlanError if there is more than an absent
        block can return."""
        place = _place(self.block, x, leaves)
        others: list[int | _Constant | None] = []
        for number, leaf in enumerate(leaves):
            if number == place:
                others.append(None)
                continue
            source = self._source(leaf, got, _where(out, number))
            known = source if earlier is None or number >= len(earlier.others) else earlier.others[number]
            if isinstance(source, _Constant) and source != known:
                raise PlanError(
                    f"{type(self.block).__name__} returns {leaf!r} at {_where(out, number)!r} where it returned "
                    "something else before: nobody knows what the model should have there where the block is absent; "
                    "leave it out of `blocks`"
                )
            others.append(source)
        return _Form(tree_structure(out), place, tuple(others))

    def _source(self, leaf: Any, got: list[Any], where: str) -> int | _Constant:
        if where in self.block.__dict__.get("residrop_unused", ()):
            return _Constant(None, unused=True)
        if leaf is None or isinstance(leaf, (bool, int, float, str)):
            return _Constant(leaf)
        for number, argument in enumerate(got):
            if leaf is argument:
                return number
        if getattr(self.block, "residrop_lenient", False) and not self.rowwise:
            return _Constant(None, unused=True)
        what = f"a tensor of shape {tuple(leaf.shape)}" if isinstance(leaf, Tensor) else f"a {type(leaf).__name__}"
        if isinstance(leaf, Tensor) and any(isinstance(one, Tensor) and one.shape == leaf.shape for one in got):
            raise PlanError(
                f"{type(self.block).__name__} returns, besides the hidden state, {what} at {where!r}, the shape of an "
                "argument: it seems to be a block of two streams, of which x + b (block(x) - x) knows one; leave it "
                "out of `blocks`"
            )
        raise PlanError(
            f"{type(self.block).__name__} returns, besides the hidden state, {what} at {where!r} that is none of its "
            f"arguments: where the block is absent nobody knows what the model should have there; leave it out of "
            f"`blocks`, or name {where!r} in residrop.apply(..., unused=[...]) if nothing needs it"
        )

    def result(self, y: Tensor) -> Any:
        """The block's output, with y as its hidden state."""
        form: _Form = self.block.__dict__["residrop_forms"][self.kind]
        if self.others is None or self.rowwise:
            leaves = [one.value if isinstance(one, _Constant) else self.given[one or 0] for one in form.others]
        else:
            leaves = self.others
        leaves[form.place] = y
        return tree_unflatten(leaves, form.spec)


def _kind(leaf: Any) -> Any:
    return leaf if leaf is None or isinstance(leaf, (bool, str)) else type(leaf)


def _place(block: nn.Module, x: Tensor, leaves: list[Any]) -> int:
    """At which leaf of the output the hidden state is; ConfigError if there is none."""
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    place = next((i for i in places if leaves[i].shape == x.shape), None)
    if place is None:
        got = ", ".join(str(tuple(leaves[i].shape)) for i in places) or f"a {type(leaves[0]).__name__}"
        raise ConfigError(
            f"{type(block).__name__} turns {tuple(x.shape)} into {got}; the generic rule x + b (block(x) - x) needs "
            "input and output of one shape: leave this block out of `blocks`"
        )
    return place


def _still(form: _Form, leaves: list[Any], got: list[Any]) -> bool:
    """Whether what a block returned besides the hidden state is what was learnt of it."""
    for leaf, other in zip(leaves, form.others, strict=True):
        if isinstance(other, _Constant):
            if not other.unused and (type(leaf) is not type(other.value) or leaf != other.value):
                return False
        elif other is not None and leaf is not got[other]:
            return False
    return True


def _where(out: Any, number: int) -> str:
    """Where in the output a leaf is: "1", "attention" or "0.2"."""
    path, _ = tree_flatten_with_path(out)[0][number]
    return ".".join(keystr((one,)).strip("[].'\"") for one in path)
